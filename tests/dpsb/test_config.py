"""Settings: every mistake is named, and what is written down reads back as it was."""

import json
import math

import pytest

from dpsb.basis.budget import basis_noise_multiplier, gaussian_level
from dpsb.config import ConfigError, RunConfig, make_config
from dpsb.config_file import read_config

LEAST = {"model": "m", "data": "d.csv", "out": "o"}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"task": "regression"}, "task='regression' to be one of classification, causal-lm"),
        ({"schedule": "step"}, "schedule='step'"),
        ({"optimizer": "lion"}, "optimizer='lion'"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"pooling": "max"}, "pooling='max'"),
        ({"epsilon": 0.0}, r"epsilon=0\.0 > 0"),
        ({"epsilon": math.nan}, "epsilon=nan"),
        ({"epsilon": "3"}, "epsilon='3' to be of type float"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.5}, r"rank=2\.5 to be of type int"),
        ({"rank": True}, "rank=True"),
        ({"auto_clip": 1}, "auto_clip=1 to be of type bool"),
        ({"steps": 3, "epochs": 2.0}, r"steps=3 or epochs=2\.0, not both"),
        ({"steps": 0}, "steps=0"),
        ({"epochs": math.inf}, "epochs=inf"),
        ({"num_examples": 0}, "num_examples=0"),
        ({"tokens_per_example": 0}, "tokens_per_example=0"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1"),
        ({"l2_clip_norm": math.inf}, "l2_clip_norm=inf"),
        ({"learning_rate": -0.1}, r"learning_rate=-0\.1"),
        ({"head_learning_rate": 0.0}, r"head_learning_rate=0\.0"),
        ({"labels": ["ham", "spam"]}, "labels="),
        ({"targets": "re:["}, "is no regular expression"),
        ({"basis": "privat"}, "basis='privat' to be one of weight, random, complementary"),
        ({"basis": "private:x.csv"}, "takes no file"),
        ({"basis": "private", "epsilon": math.inf}, "takes a share of epsilon, which is infinite"),
        ({"basis": "hybrid", "unit_column": "sender"}, "does not protect the units"),
        ({"basis": "leak"}, "every epsilon of the run is infinite"),
        ({"basis": "public:a.csv,a.csv"}, "names a file twice"),
        ({"basis": "public:a.csv,d.csv"}, "names the private training data as public"),
        ({"basis": "private", "basis_share": 1.0}, "leaves no budget to train"),
        ({"basis": "private", "basis_share": 0.99}, r"basis_share=0\.99 from 0\.0001 to 0\.9: more"),
        ({"basis": "hybrid", "basis_share": 1e-12}, r"basis_share=1e-12 from 0\.0001 to 0\.9: less saves training"),
        ({"basis": "hybrid", "basis_share": -0.1}, r"basis_share=-0\.1 from"),
        ({"basis": "hybrid", "basis_rounds": 2}, "basis_rounds=2 is for 'private', so basis='hybrid' would ignore it"),
        ({"basis": "weight", "basis_share": 0.1}, r"basis_share=0\.1 is for a basis that is paid for.*leave out"),
        ({"basis": "public:a.csv", "basis_clip_norm": 1.0}, r"basis_clip_norm=1\.0 is for a basis that is paid for"),
        ({"basis": "public:a.csv,b.csv", "basis_sampling_prob": 0.5}, r"basis_sampling_prob=0\.5 is for a basis"),
        ({"basis": "random", "basis_width": 8}, "basis_width=8 is for 'hybrid', so basis='random' would ignore it"),
        ({"basis": "private", "basis_width": 8}, "basis_width=8 is for 'hybrid'"),
        ({"basis": "public:a.csv", "basis_choice": "private"}, "basis_choice='private' is for 'public' with several"),
        ({"basis": "hybrid:a.csv,b.csv", "basis_choice": "private"}, "basis_choice='private' is for 'public'"),
        ({"basis": "public:e.csv", "eval_data": "e.csv"}, "basis='public:e.csv' is evaluated on too"),
        ({"basis": "hybrid:a.csv,e.csv", "eval_data": "e.csv"}, "basis='hybrid:a.csv,e.csv' is evaluated on too"),
        ({"warm_start": "e.csv", "eval_data": "e.csv"}, "warm_start='e.csv' is evaluated on too"),
        ({"precondition": "o/n:test", "eval_data": "o/n:test"}, "precondition='o/n:test' is evaluated on too"),
        ({"data": "o/n", "eval_data": "O/n:train"}, "is the training data"),
        ({"data": "o/n:train+validation", "eval_data": "o/n:validation"}, "is the training data"),
        ({"data": "o/n:all", "eval_data": "o/n:test"}, "is the training data"),
        ({"data": "o/n:train[:80%]", "eval_data": "o/n:train"}, "is the training data"),
        ({"basis": "private", "basis_rounds": -1}, "basis_rounds=-1"),
        ({"basis": "private", "basis_sampling_prob": 0.0}, r"basis_sampling_prob=0\.0"),
        ({"basis": "private", "basis_clip_norm": 0.0}, r"basis_clip_norm=0\.0"),
        ({"basis": "private", "basis_clip_norm": 1e-24}, r"basis_clip_norm=1e-24 between 1e-06 and 1e\+06"),
        ({"basis": "hybrid", "basis_width": 0}, "basis_width=0"),
        ({"basis": "public:a.csv,b.csv", "basis_choice": "best"}, "basis_choice='best'"),
        ({"basis": "public"}, r"public:FILE"),
        ({"basis": "weight:x"}, "takes no file"),
        ({"basis": "lora-sb"}, "publishes raw gradients"),
    ],
)
def test_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        RunConfig(**{**LEAST, **changes})


def test_whole_numbers_are_numbers():
    assert RunConfig(**LEAST, epsilon=3, learning_rate=1) == RunConfig(**LEAST, epsilon=3.0, learning_rate=1.0)


def test_splits_of_a_data_set_on_the_hub_are_not_one_another():
    config = RunConfig(
        **{**LEAST, "data": "org/name:train"}, eval_data="org/name:test", warm_start="org/name:validation"
    )
    assert config.eval_data == "org/name:test"
    assert RunConfig(**{**LEAST, "data": "org/name"}, eval_data="org/name:test").data == "org/name"


def test_the_least_share_buys_a_hundred_times_the_noise_of_the_whole_budget():
    share = RunConfig(**LEAST, basis="hybrid", basis_share=1e-4).basis_share
    noise = basis_noise_multiplier(epsilon=3.0, delta=1e-5, share=share)
    assert noise * gaussian_level(3.0, 1e-5) == pytest.approx(100)


def test_what_a_sweep_shares_may_be_for_another_of_its_methods():
    assert RunConfig(**LEAST, basis="weight", basis_share=0.1, part_of_sweep=True).basis_share == 0.1


def test_the_private_file_is_not_public_by_another_name(tmp_path):
    data = tmp_path / "mail.csv"
    data.write_text("text,label\n")
    (tmp_path / "link.csv").symlink_to(data)
    for name in ("mail.csv", "link.csv", f"../{tmp_path.name}/mail.csv"):
        for kind in ("public", "lora-sb"):
            with pytest.raises(ConfigError, match="names the private training data as public"):
                RunConfig(**{**LEAST, "data": str(data), "basis": f"{kind}:{tmp_path / name}"})


def test_lora_sb_without_a_public_file_needs_an_infinite_epsilon():
    assert RunConfig(**LEAST, basis="lora-sb", epsilon=math.inf).basis == "lora-sb"


def test_settings_that_earlier_versions_wrote_down_are_still_read():
    """They named the value of ``basis_sampling_prob`` that says nothing, whatever the basis."""
    facts = RunConfig(**LEAST).to_json() | {"basis_sampling_prob": 1.0}
    assert make_config(facts).basis_sampling_prob == 1.0
    assert make_config(facts).with_basis("random").basis_sampling_prob is None


@pytest.mark.parametrize("suffix", [".toml", ".json"])
def test_settings_read_back(tmp_path, suffix):
    config = RunConfig(**LEAST, epsilon=math.inf, labels="ham,spam", auto_clip=True)
    path = tmp_path / f"run{suffix}"
    facts = config.to_json()
    assert facts["epsilon"] == "inf"
    if suffix == ".json":
        path.write_text(json.dumps(facts))
    else:
        path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in facts.items() if v is not None))
    assert make_config(read_config(path)) == config


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.toml", "rnak = 3", r"a\.toml: unknown key 'rnak'; known are adaptive_clip"),
        ("a.toml", "rank = ", "cannot be read as settings"),
        ("a.json", "[]", "must hold one table"),
        ("a.json", "3", "must hold one table"),
        ("a.json", "{", "cannot be read as settings"),
        ("a.toml", b"\xff\xfe", "cannot be read as settings"),
    ],
)
def test_files_that_are_no_settings(tmp_path, name, content, match):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=match):
        read_config(path)


@pytest.mark.parametrize("missing", list(LEAST))
def test_what_every_run_needs(missing):
    with pytest.raises(ConfigError, match=f"{missing} is missing: give --{missing}"):
        make_config({**LEAST, missing: ""})


def test_changes():
    config = RunConfig(**LEAST)
    assert config.with_changes({"rank": 4}).rank == 4
    assert config.rank == 16
    with pytest.raises(ConfigError, match="unknown key 'sigma'"):
        config.with_changes({"sigma": 4})
    assert (config.clipping, config.with_changes({"auto_clip": True}).clipping) == ("flat", "automatic")
