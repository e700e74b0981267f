"""The command `lint`: exit codes, one sentence for bad input, JSON for programs, and what it teaches."""

import json
from functools import partial
from pathlib import Path

import pytest

from dpsb_accounting.claims import CATALOG, example

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture
def call(call):
    return partial(call, "lint")


@pytest.fixture
def honest(tmp_path):
    path = tmp_path / "claim.toml"
    path.write_text(example())
    return path


def test_an_honest_claim_is_exit_code_0(call, honest):
    code, out, err = call(honest)
    assert (code, err) == (0, "")
    assert "0 errors, 0 warnings, 0 info" in out
    assert "recomputed: epsilon 2.12" in out
    assert call(honest, "--strict")[0] == 0


def test_an_error_is_exit_code_1_and_shown_with_what_to_do(call):
    code, out, _ = call(GOLDEN / "claims" / "fed-sb-reference.toml")
    assert code == 1
    for word in ("noise-seeded", "last-client-only", "epsilon inf", "13 errors"):
        assert word in out


def test_strict_turns_warnings_into_errors(call):
    report = GOLDEN / "schema-1-private" / "report.json"
    assert call(report)[0] == 0
    assert call(report, "--strict")[0] == 1


def test_json_is_one_object_with_bounds(call, tmp_path):
    path = tmp_path / "claim.json"
    path.write_text(json.dumps({"epsilon": 0.149, "delta": 1e-5, "noise_multiplier": 1, "batch_size": 60, "epochs": 1,
                                "num_examples": 60_000, "sampler": "shuffle"}))  # fmt: skip
    code, out, err = call(path, "--json")
    data = json.loads(out)
    assert (code, err, data["ok"]) == (1, "", False)
    worst = data["findings"][0]
    assert {"id", "severity", "message", "claimed", "recomputed"} <= set(worst)
    assert worst["id"] == "shuffled-as-poisson"
    assert 2.88 < worst["recomputed"]["lower"] < worst["recomputed"]["upper"] < 4.38
    assert data["recomputed"]["upper"] == worst["recomputed"]["upper"]
    _, out, _ = call(GOLDEN / "claims" / "fed-sb-reference.toml", "--json")
    assert json.loads(out)["recomputed"]["upper"] == "inf"
    assert "Infinity" not in out


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("c.json", "{", "not valid JSON"),
        ("c.toml", "epsilom = 3", "did you mean 'epsilon'"),
        ("c.json", "[" * 100_000, "nested"),
        ("c.md", "nothing", "no claim found"),
        ("c.toml", 'sampler = "[red]x[/]"', "sampler must be one of"),
    ],
)
def test_a_file_that_cannot_be_read_is_exit_code_2_and_one_sentence(call, tmp_path, name, content, word):
    path = tmp_path / name
    path.write_text(content)
    code, out, err = call(path)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert word in err


def test_no_file_and_a_missing_one(call, tmp_path):
    assert call()[0] == 2
    code, _, err = call(tmp_path / "nowhere.toml")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize("name", CATALOG)
def test_every_finding_is_explained(call, name):
    code, out, _ = call("--explain", name, "--json")
    assert code == 0
    data = json.loads(out)
    assert all(data[field] for field in ("title", "meaning", "action", "source"))
    assert data["severity"] in ("error", "warning", "info")


def test_explain_is_readable_and_names_the_nearest(call):
    code, out, _ = call("--explain", "shuffled-as-poisson")
    assert code == 0
    assert "what to do" in out
    code, _, err = call("--explain", "shufled")
    assert code == 2
    assert "the nearest is 'shuffled-as-poisson'" in err


def test_example_is_the_template(call):
    assert call("--example") == (0, example(), "")


def test_markup_in_a_claim_is_shown_as_it_is(call, tmp_path):
    path = tmp_path / "[red]c.json"
    path.write_text(json.dumps({"epsilon": 1, "taints": ["[bold]x[/bold]", "[/]"]}))
    code, out, _ = call(path)
    assert code == 1
    assert "[bold]x[/bold]" in " ".join(out.split())


def test_help_teaches(call):
    code, out, _ = call("--help")
    assert code == 0
    assert "Example" in out
    assert "Exit code" in out
