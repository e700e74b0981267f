import json
import subprocess
import sys

import pytest
from plans import make_plan

from dpsb_accounting import Ledger, __version__, epsilon, make_report
from dpsb_accounting.events import PoissonGaussian

QUESTION = ["--sampling-prob", "0.01", "--steps", "100", "--delta", "1e-5"]


@pytest.fixture
def run(tmp_path):
    with Ledger.create(tmp_path / "ledger.jsonl", make_plan()) as ledger:
        ledger.charge("train")
        make_report(ledger).write(tmp_path / "report.json")
    return tmp_path


def test_epsilon(call):
    code, out, _ = call("epsilon", "--noise-multiplier", 1, *QUESTION, "--json")
    expected = epsilon([(PoissonGaussian(noise_multiplier=1, sampling_prob=0.01), 100)], 1e-5)
    assert code == 0
    data = json.loads(out)
    assert data["epsilon"] == {"lower": expected.lower, "upper": expected.upper}
    assert data["neighboring"] == "add_or_remove_one"
    code, out, _ = call("epsilon", "--noise-multiplier", 1, *QUESTION, "--neighboring", "replace_one")
    assert code == 0
    assert "replace_one" in out
    assert "the claim" in out


def test_verify(call, run):
    code, out, _ = call("verify", run / "ledger.jsonl")
    assert code == 0
    assert "FAIL" not in out
    code, out, _ = call("verify", run / "ledger.jsonl", "--json")
    assert code == 0
    assert json.loads(out)["ok"] is True


def test_verify_fails_with_one_sentence(call, run):
    report = json.loads((run / "report.json").read_text())
    report["epsilon"]["upper"] /= 2
    other = run / "other.json"
    other.write_text(json.dumps(report))
    code, out, err = call("verify", run / "ledger.jsonl", "--report", other)
    assert code == 1
    assert "FAIL" in out
    assert err.startswith("error: verification failed")
    assert err.count("\n") == 1
    code, out, _ = call("verify", run / "ledger.jsonl", "--report", other, "--json")
    assert code == 1
    assert json.loads(out)["ok"] is False


def test_report(call, run):
    code, out, _ = call("report", run / "ledger.jsonl")
    assert code == 0
    assert out.startswith("PRIVACY REPORT")
    code, out, _ = call("report", run / "ledger.jsonl", "--json")
    assert json.loads(out) == json.loads((run / "report.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["epsilon", "--noise-multiplier", "-1", *QUESTION], "noise_multiplier must be greater than 0, not -1.0"),
        (["epsilon", "--noise-multiplier", "nan", *QUESTION], "noise_multiplier"),
        (["epsilon", "--noise-multiplier", "1", *QUESTION, "--neighboring", "x"], "neighboring must be one of"),
        (["epsilon", "--noise-multiplier", "1", "--sampling-prob", "2", *QUESTION[2:]], "sampling_prob"),
        (["epsilon", "--noise-multiplier", "1", *QUESTION[:4], "--delta", "1"], "delta"),
        (["calibrate", "--target-epsilon", "0", *QUESTION], "target_epsilon"),
        (["report", "nowhere.jsonl"], "nowhere.jsonl"),
        (["verify", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_sentence_on_stderr(call, arguments, word):
    code, _, err = call(*arguments)
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert word in err


def test_a_file_of_another_kind(call, tmp_path):
    (tmp_path / "x").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    code, _, err = call("verify", tmp_path / "x")
    assert (code, err.count("\n")) == (1, 1)


def test_help_teaches(call):
    code, out, _ = call("--help")
    assert code == 0
    for command in ("epsilon", "calibrate", "verify", "report"):
        assert command in out
        code, page, _ = call(command, "--help")
        assert code == 0
        assert "Example" in page
    assert call("--version")[1] == f"dpsb-accounting {__version__}\n"


def test_as_a_program(run):
    code = "from dpsb_accounting.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "verify", str(run / "ledger.jsonl")],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
