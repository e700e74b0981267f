"""What a method's every run would end with is said before another method has spent epsilon."""

import pytest
import workbench
from sweeps import Silent, settings_of, shared

from dpsb.baselines.methods import METHODS, PEFT_INITS
from dpsb.curves.entries import CurveError
from dpsb.curves.fits import check_methods
from dpsb.curves.sweep import run_sweep
from dpsb.data import DataError

ALL = [*METHODS, "sb:random", "sb:hybrid", "sb:private", *(f"peft:{name}" for name in PEFT_INITS), "peft:LNTuning"]


@pytest.mark.parametrize(
    ("given", "methods", "match"),
    [
        ({"rank": 40}, "head-only,sb", "'sb:weight' cannot be run: rank=40 exceeds the smaller side of .*query"),
        ({"rank": 40}, "head-only,peft:pissa", "'peft:pissa' cannot be run: rank=40 exceeds"),
        ({"basis_width": 33}, "lora,sb:hybrid", "'sb:hybrid' cannot be run: basis_width=33 exceeds the smaller side"),
        ({"basis_width": 3}, "lora,sb:hybrid", "'sb:hybrid' cannot be run: Expected basis_width=3 of at least"),
        (
            {"basis_width": 32},
            "lora,sb:private",
            "basis_width=32 is for 'hybrid', and none of .*lora, sb:private is on",
        ),
        ({"rebase_every": 5}, "sb,lora", "rebase_every=5 is for 'random' and 'public'.*sb.*, lora is on"),
        ({}, "lora,peft:NoneSuch", "'peft:NoneSuch' cannot be run: .*PEFT has no such method"),
        ({"targets": "none_such"}, "head-only,lora", "'lora' cannot be run: targets=.*do not fit"),
    ],
)
def test_nothing_is_charged_where_a_method_cannot_run(given, methods, match, tmp_path):
    settings = settings_of(shared(**given), methods=methods, epsilons="8")
    with pytest.raises(CurveError, match=match):
        run_sweep(settings, tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"text_column": "body"}, "body"),
        ({"labels": None}, "The set of labels must be public"),
        ({"eval_data": "others.jsonl"}, "eval_data='.*others.jsonl': no row has one of the labels 'ham', 'spam'"),
        ({"eval_data": "bare.jsonl"}, "bare.jsonl has no label column"),
        ({"eval_data": "none.csv"}, "eval_data='.*none.csv' holds no rows to judge runs on"),
    ],
)
def test_nothing_is_written_where_no_run_could_read_its_data(given, match, tmp_path):
    (tmp_path / "others.jsonl").write_text('{"text": "a", "label": "HAM"}\n{"text": "b", "label": "SPAM"}\n')
    (tmp_path / "none.csv").write_text("text,label\n")
    (tmp_path / "bare.jsonl").write_text('{"text": "a"}\n')
    named = {name: str(tmp_path / value) if name == "eval_data" else value for name, value in given.items()}
    with pytest.raises(DataError, match=match):
        run_sweep(settings_of(shared(**named), methods="sb", epsilons="8"), tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


def test_a_language_model_without_biases_has_no_bitfit():
    given = {k: v for k, v in workbench.run_settings("nowhere", "causal-lm").items() if v is not None}
    with pytest.raises(CurveError, match=r"'bitfit' cannot be run: .*finds no bias"):
        check_methods(settings_of(given, methods="sb,bitfit", epsilons="8"))


@pytest.mark.parametrize("pooling", ["native", "mean"])
def test_what_can_be_run_is_let_through(pooling):
    check_methods(settings_of(shared(pooling=pooling), methods=",".join(ALL), epsilons="8,inf"))


def test_a_quantized_model_is_left_to_the_cells(monkeypatch):
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained

    def quantized(*arguments, **options):
        config = read(*arguments, **options)
        config.quantization_config = {"quant_method": "torchao"}
        return config

    monkeypatch.setattr(AutoConfig, "from_pretrained", quantized)
    check_methods(settings_of(shared(rank=40), methods="sb", epsilons="8"))


def test_a_setting_that_one_method_reads_is_let_through_for_all():
    check_methods(settings_of(shared(basis_width=16, rebase_every=5), methods="lora,sb:hybrid,sb:random", epsilons="8"))


@pytest.mark.parametrize("name", ["warm_start", "precondition"])
def test_public_files_are_there_before_anything_runs(name):
    with pytest.raises(CurveError, match=f"{name}='gone.csv' does not exist"):
        settings_of(shared(**{name: "gone.csv"}))
    with pytest.raises(CurveError, match=r"'sb:public:gone.csv': file='gone.csv' does not exist"):
        settings_of(methods="sb:public:gone.csv")
