"""The command line: what it prints, what it refuses, and that an error is one sentence without private text."""

import json
import subprocess
import sys

import pytest
import workbench
from typer.testing import CliRunner

from dpsb.cli import app
from dpsb.config import ConfigError
from dpsb_accounting import cli as accounting
from dpsb_accounting import verify

COMMANDS = ("plan", "train", "report", "export", "demo")


pytestmark = pytest.mark.usefixtures("quick_calibration", "wide_terminal")


def dpsb(*arguments):
    """Runs a command in this process; whatever it prints must be free of the canaries."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    for canary in workbench.CANARIES:
        assert canary.split("-")[0] not in result.output
    return result


def train(out, *further, kind="classification", **changes):
    changes = {name: value for name, value in workbench.run_settings(out, kind, **changes).items() if value is not None}
    return dpsb("train", *workbench.options(changes), *further)


def fails(result, match):
    """One sentence on standard error, nothing else, no traceback."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), "no exception comes through"
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert match in lines[0]
    assert "unexpected" not in lines[0]


# --- help, plan


def test_help_teaches():
    top = dpsb("--help")
    assert top.exit_code == 0
    for command in COMMANDS:
        assert command in top.output
        page = dpsb(command, "--help")
        assert page.exit_code == 0
        assert f"Example: dpsb {command}" in page.output
    page = " ".join(dpsb("train", "--help").output.replace("│", " ").split())
    for words in (
        "private and hybrid",
        "hadamard",
        "--basis-share",
        "public:FILE",
        "lora-sb:FILE",
        "--resume",
        "from-data",
        "--num-examples",
        "[default: 4096]",
    ):
        assert words in page
    assert dpsb("--version").output.startswith("dpsb ")


PLAN = ("plan", "--epsilon", 3, "--delta", "1e-5", "--num-examples", 4000, "--expected-batch-size", 512)


def test_plan_as_json_and_as_a_table():
    facts = json.loads(dpsb(*PLAN, "--epochs", 10, "--json").stdout)
    assert facts["steps"] == 79
    assert facts["sampling_prob"] == pytest.approx(0.128)
    assert 0 < facts["epsilon"]["lower"] <= facts["epsilon"]["upper"] <= 3
    table = dpsb(*PLAN, "--epochs", 10).output
    for words in ("epsilon", "add_or_remove_one", "multiplier", "expected batch", "256", "1024"):
        assert words in table
    infinite = dpsb("plan", "--epsilon", "inf", "--num-examples", 100, "--expected-batch-size", 10, "--json")
    assert json.loads(infinite.stdout)["epsilon"]["upper"] == "inf"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (("--num-examples", 0), "num_examples=0"),
        (("--expected-batch-size", 5000), "expected_batch_size=5000"),
        (("--epochs", 3, "--steps", 5), "exactly one of steps"),
        (("--delta", 0.01), "less than 1 / num_examples"),
        (("--neighboring", "somehow"), "somehow"),
        (("--epsilon", -1), "epsilon"),
        (("--epochs", "inf"), "epochs"),
        (("--epsilon", "1e-9", "--delta", "1e-12"), "cannot be reached"),
    ],
)
def test_plan_refuses(changes, match):
    fails(dpsb(*PLAN, *changes), match)


# --- train, report, export, verify


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, through the command line."""
    out = tmp_path_factory.mktemp("cli") / "run"
    result = train(out, "--json", num_examples=64, eval_data=workbench.data_file(seed=5))
    assert result.exit_code == 0, result.output
    return out, result


def test_train_prints_one_json_object_and_nothing_else(finished):
    out, result = finished
    assert result.stderr == ""
    facts = json.loads(result.stdout)
    report = json.loads((out / "report.json").read_text())
    assert {name: facts[name] for name in report} == report
    assert (facts["claim"], facts["out"]) == (True, str(out))
    assert "ledger.jsonl" in facts["files"]


def test_train_prints_plan_claim_and_files(tmp_path):
    result = train(tmp_path / "run", kind="causal-lm")
    assert result.exit_code == 0, result.output
    words = " ".join(result.output.split())
    for part in ("making the plan", "zero_out", "true number, which counts as public", "epsilon <= ", "files in"):
        assert part in words


def test_train_from_a_file_of_settings(tmp_path):
    settings = workbench.run_settings(tmp_path / "run", epsilon="inf")
    config = tmp_path / "run.toml"
    config.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    result = dpsb("train", "--config", config, "--steps", 2)
    assert result.exit_code == 0, result.output
    assert "no privacy claim: epsilon is infinite" in " ".join(result.output.split())
    assert json.loads((tmp_path / "run" / "report.json").read_text())["spent"]["of"] == 2
    config.write_text(config.read_text() + "nois = 1\n")
    fails(dpsb("train", "--config", config, "--out", tmp_path / "other"), "unknown key 'nois'")


def test_resume_from_the_command_line(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("dpsb.train._step", lambda *_args: (_ for _ in ()).throw(KeyboardInterrupt))
        interrupted = train(out, "--json")
    assert interrupted.exit_code == 1
    assert "charged steps are spent" in interrupted.stderr
    partial = json.loads(dpsb("report", out, "--json").stdout)
    assert (partial["spent"]["steps"], partial["spent"]["of"]) == (1, 3)
    resumed = dpsb("train", "--out", out, "--resume", "--json")
    assert json.loads(resumed.stdout)["spent"]["steps"] == 3
    fails(dpsb("train", "--out", out, "--resume", "--json"), "is finished: its budget is spent")
    fails(train(out, "--json"), "already holds a finished run")


def test_report(finished):
    out, _ = finished
    assert json.loads(dpsb("report", out, "--json").stdout)["claim"] is True
    page = dpsb("report", out).output
    assert "PRIVACY REPORT" in page
    fails(dpsb("report", out / "nowhere"), "cannot read")


def accounting_main(capsys, *arguments):
    try:
        accounting.main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    return code, capsys.readouterr()


def test_the_auditor_verifies_and_notices_tampering(finished, tmp_path, capsys):
    out, _ = finished
    for name in ("ledger.jsonl", "report.json"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    assert accounting_main(capsys, "verify", tmp_path / "ledger.jsonl")[0] == 0
    report = json.loads((tmp_path / "report.json").read_text())
    report["epsilon"]["upper"] *= 0.9
    (tmp_path / "report.json").write_text(json.dumps(report))
    code, printed = accounting_main(capsys, "verify", tmp_path / "ledger.jsonl")
    assert code == 1
    assert "epsilon: upper" in printed.err
    assert verify(out / "ledger.jsonl").ok


def test_export_refuses(finished, tmp_path):
    fails(dpsb("export", tmp_path, "--merged", tmp_path / "m"), "holds no finished adapter")
    (tmp_path / "mine").write_text("x")
    fails(dpsb("export", finished[0], "--merged", tmp_path), "exists already")


# --- what train refuses: one sentence, nothing started


def broken_file(tmp_path, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text(f'{{"text": "{workbench.CANARIES[0]}", "label": \n')
    return path


def only(tmp_path, **columns):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**columns, "label": i}) + "\n" for i in "ab" * 20))
    return path


REFUSED = {
    "private basis without a budget": ({"basis": "private", "epsilon": "inf"}, "takes a share of epsilon"),
    "hybrid basis of a missing file": ({"basis": "hybrid:pub.csv"}, "pub.csv does not exist"),
    "private LoRA-SB": ({"basis": "lora-sb"}, "publishes raw gradients"),
    "public is private": (lambda _: {"basis": f"public:{workbench.data_file()}"}, "names the private training data"),
    "unknown basis": ({"basis": "svd"}, "to be one of weight, random"),
    "delta too large": ({"delta": 0.02}, "would be allowed"),
    "delta too large, declared": ({"delta": 0.01, "num_examples": 100}, "must be less than 1 / num_examples"),
    "unreachable": ({"epsilon": 1e-9, "delta": 1e-12}, "cannot be reached"),
    "relation of an undeclared N": ({"neighboring": "add_or_remove_one"}, "needs num_examples_declared"),
    "wrong column": ({"text_column": "body"}, "has no column 'body'; it has 'text', 'label'"),
    "no label column": ({"data": lambda _: workbench.data_file("causal-lm")}, "has no label column"),
    "missing file": ({"data": "nowhere.csv"}, "nowhere.csv does not exist"),
    "unreadable file": ({"data": broken_file}, "cannot be read as .jsonl"),
    "unknown kind": ({"data": lambda p: broken_file(p, "rows.txt")}, "unknown kind"),
    "no labels": ({"labels": None}, "set of labels must be public"),
    "one label": ({"labels": "ham"}, "two different labels"),
    "rank too large": ({"rank": 33}, "rank=33 exceeds"),
    "unknown target": ({"targets": "nowhere"}, "targets=['nowhere']"),
    "bad pattern": ({"targets": "re:("}, "is no regular expression"),
    "no model": ({"model": "./nowhere"}, "The model folder './nowhere' does not exist"),
    "a folder without a model": ({"model": lambda p: p}, "cannot be loaded"),
    "batch too large": ({"expected_batch_size": 61}, "expected_batch_size=61"),
    "no steps": ({"steps": 0}, "steps=0"),
    "steps and epochs": ({"epochs": 2}, "not both"),
    "N of 0": ({"num_examples": 0}, "num_examples=0"),
    "no room for a text": ({"max_length": 2}, "max_length=2 of at least 3: 2 tokens of every example"),
    "unknown task": ({"task": "regression"}, "task='regression'"),
    "unwritable": ({"out": "/proc/nowhere/run"}, "cannot be written"),
    "markup": ({"data": "[/x][red]nowhere.csv"}, "[/x][red]nowhere.csv does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_train_refuses(tmp_path, name):
    changes, match = REFUSED[name]
    changes = changes(tmp_path) if callable(changes) else changes
    changes = {key: value(tmp_path) if callable(value) else value for key, value in changes.items()}
    out = changes.pop("out", tmp_path / "run")
    before = workbench.written(tmp_path)
    fails(train(out, "--json", **changes), match)
    after = {path: content for path, content in workbench.written(tmp_path).items() if path not in before}
    assert set(after) <= {name for name in after if name.startswith("rows")}


def test_train_refuses_without_its_main_settings(tmp_path):
    fails(dpsb("train", "--json"), "model, data, out are missing")
    fails(dpsb("train", "--json", "--resume", "--out", tmp_path), "holds no run to resume")
    fails(dpsb("train", "--config", tmp_path / "none.toml"), "cannot be read as settings")
    out = tmp_path / "file"
    out.write_text("x")
    fails(train(out, "--json"), "is a file; --out names the folder")


def test_train_writes_over_nobodys_files(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("mine")
    fails(train(project, "--json"), "is not empty and holds no run")
    assert workbench.written(project) == {"README.md": b"mine"}


def test_held_out_rows_without_a_declared_label_stop_a_run_before_it_costs(tmp_path):
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(json.dumps({"text": "now", "label": "Ham"}) + "\n" for _ in range(3)))
    fails(
        train(tmp_path / "run", "--json", eval_data=held_out),
        "has one of the labels 'ham', 'spam': check",
    )
    assert not (tmp_path / "run").exists()


def test_a_settings_file_takes_the_short_names_of_the_command_line(tmp_path):
    from dpsb.config_file import read_config

    (tmp_path / "run.toml").write_text("lr = 0.1\nlearning_rate = 0.2\n")
    with pytest.raises(ConfigError, match=r"run.toml has both 'lr' and 'learning_rate'"):
        read_config(tmp_path / "run.toml")
    (tmp_path / "run.toml").write_text("lr = 0.1\nhead_lr = 0.2\nwarm_start_lr = 0.3\n")
    read = read_config(tmp_path / "run.toml")
    assert read == {"learning_rate": 0.1, "head_learning_rate": 0.2, "warm_start_learning_rate": 0.3}


def test_empty_texts_and_unknown_labels_train(tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = [{"text": "", "label": workbench.CANARIES[1]}, {"text": None, "label": None}, {"text": "now"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 15))
    result = train(tmp_path / "run", "--json", data=data, num_examples=40)
    assert result.exit_code == 0, result.output
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    fails(train(tmp_path / "none", "--json", data=empty), "no columns")


class Panic(BaseException):
    """As code in Rust ends under Python: no ``Exception``."""


@pytest.mark.parametrize("error", [KeyError, IndexError, TypeError, Panic])
def test_an_error_that_nobody_foresaw_shows_no_data(tmp_path, monkeypatch, error):
    def broken(*_args):
        raise error(workbench.CANARIES[0])

    monkeypatch.setattr("dpsb.train._step", broken)
    result = train(tmp_path / "run", "--json")
    assert result.exit_code == 1
    assert f"error: unexpected {error.__name__} at test_cli.py:" in result.stderr
    monkeypatch.setenv("DPSB_TRACEBACK", "1")
    with pytest.raises(error):
        CliRunner().invoke(app, ["train", "--out", str(tmp_path / "run"), "--resume"], catch_exceptions=False)


WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder

class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] == "torch" else PathFinder.find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import dpsb_accounting
print("accounting works", flush=True)
sys.argv[0] = PROGRAM
import dpsb
"""


def test_without_torch_the_import_names_the_extra():
    sentence = "dpsb trains with torch, which is not installed: pip install '.[train]' in a checkout"
    for program, kind in (("'-c'", "ImportError"), ("'/usr/bin/dpsb'", "error")):
        code = WITHOUT_TORCH.replace("PROGRAM", program)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "accounting works\n")
        assert done.stderr.strip().splitlines()[-1].startswith(f"{kind}: {sentence}")
        assert ("Traceback" in done.stderr) == (kind == "ImportError")


def test_arguments_say_what_they_are():
    """typer 0.20 with click 8.5 leaves their help out: the pins must go together."""
    told = CliRunner().invoke(app, ["unpack", "--help"]).output
    assert "Whose adapter." in told
