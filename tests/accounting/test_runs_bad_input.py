"""What is handed to `verify` and `report`: one clear sentence, and no exit code 0 where a claim is wrong."""

import dataclasses
import json

import pytest
from plans import make_plan, resealed

from dpsb_accounting import Ledger, Phase, PureEpsilon, cli, make_report, verify
from dpsb_accounting.signature import make_keys


def write_run(folder):
    with Ledger.create(folder / "ledger.jsonl", make_plan()) as ledger:
        for _ in range(3):
            ledger.charge("train")
        make_report(ledger).write(folder / "report.json")
    return folder / "ledger.jsonl"


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def edited(path):
    path.write_bytes(path.read_bytes().replace(b'"number":1', b'"number":2'))


def removed(path):
    lines = lines_of(path)
    path.write_bytes(b"".join(lines[:2] + lines[3:]))


def rolled_back(path):
    path.write_bytes(b"".join(lines_of(path)[:-1]))


def mixed(path):
    lines = lines_of(path)
    plan = {**json.loads(lines[0]), "schema": "dpsb-ledger/2"}
    path.write_bytes(resealed(plan) + b"".join(lines[1:]))


def second_plan(path):
    lines = lines_of(path)
    again = {**json.loads(lines[0]), "index": 4, "prev": json.loads(lines[-1])["hash"]}
    path.write_bytes(b"".join(lines) + resealed(again))


def wrong_delta(path):
    lines = lines_of(path)
    plan = json.loads(lines[0])
    plan["plan"]["delta"] = 1.5
    path.write_bytes(resealed(plan))


def deep(path):
    path.write_bytes(b"[" * 100_000 + b"\n")


FAULTS = {
    "an edited line": (edited, "line 3 of the ledger is wrong: its hash or its form"),
    "a removed line": (removed, "line 3 of the ledger is wrong: index must be 2, not 3"),
    "an empty file": (lambda path: path.write_bytes(b""), "the file is empty"),
    "another schema": (mixed, "schema must be 'dpsb-ledger/1', not 'dpsb-ledger/2'"),
    "a second plan": (second_plan, "line 5 of the ledger is wrong: the first line, and no other"),
    "a wrong delta": (wrong_delta, "line 1 of the ledger is wrong: delta must be in (0, 1), not 1.5"),
    "a picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(256)), "the file is no ledger"),
    "a report": (lambda path: path.write_text((path.parent / "report.json").read_text()), "the file is no ledger"),
    "nesting": (deep, "the file is no ledger"),
    "no file": (lambda path: path.unlink(), "No such file"),
}


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    return stop.value.code, capsys.readouterr()


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("command", ["verify", "report"])
def test_one_sentence(tmp_path, capsys, name, command):
    path = write_run(tmp_path)
    spoil, words = FAULTS[name]
    spoil(path)
    code, printed = call(capsys, command, path)
    assert code == 1
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err
    assert "claim: epsilon" not in printed.out


def test_a_ledger_behind_its_report(tmp_path, capsys):
    path = write_run(tmp_path)
    rolled_back(path)
    code, printed = call(capsys, "verify", path)
    assert code == 1
    assert "is behind: it has 3 lines, but 4 were there before" in printed.err
    assert "claim: refused" in printed.out


def test_a_ledger_is_never_written_over(tmp_path, capsys):
    path, key = write_run(tmp_path), tmp_path / "own.key"
    make_keys(key)
    kept = {file: file.read_bytes() for file in (path, key, path.parent / "report.json")}
    other = tmp_path / "copy" / "ledger.jsonl"
    other.parent.mkdir()
    other.write_bytes(kept[path])
    named = tmp_path / "march.jsonl"
    named.write_bytes(kept[path] + b"damaged")
    ahead = tmp_path / "ahead.txt"
    ahead.symlink_to(tmp_path / "later" / "ledger.jsonl")
    (tmp_path / "later").mkdir()
    for command in (
        ("report", path, "--out", ahead),
        ("report", path, "--html", path.parent / "report.json"),
        ("sign", path, "--key", key, "--out", path.parent / "report.json"),
        ("report", path, "--out", named),
        ("report", path, "--out", path.parent / "report.json"),
        ("report", path, "--out", path),
        ("report", path, "--html", path),
        ("report", path, "--out", other),
        ("report", path, "--out", key, "--sign", key),
        ("sign", path, "--key", key, "--out", path),
        ("sign", path, "--key", key, "--out", key),
    ):
        code, printed = call(capsys, *command)
        assert (code, printed.err.count("\n")) == (1, 1)
        assert "name another file to write" in printed.err
    assert {file: file.read_bytes() for file in kept} == kept
    assert other.read_bytes() == kept[path]
    assert named.read_bytes() == kept[path] + b"damaged"
    assert call(capsys, "report", path, "--out", tmp_path / "new.txt")[0] == 0


def test_a_report_that_is_written_again_keeps_its_mode_and_its_link(tmp_path, capsys):
    path, mine, link = write_run(tmp_path), tmp_path / "mine.txt", tmp_path / "link.txt"
    mine.write_text("old")
    mine.chmod(0o600)
    link.symlink_to(mine)
    assert call(capsys, "report", path, "--out", link)[0] == 0
    assert link.is_symlink()
    assert "epsilon" in mine.read_text()
    assert mine.stat().st_mode & 0o777 == 0o600


def test_numbers_that_no_engine_can_compute_with_fail_a_check(tmp_path, capsys):
    plan = dataclasses.replace(make_plan(), phases=(Phase("basis", PureEpsilon(epsilon=1e308), 1), *make_plan().phases))
    path = tmp_path / "ledger.jsonl"
    Ledger.create(path, plan).close()
    assert not verify(path).ok
    code, printed = call(capsys, "verify", path)
    assert (code, printed.err.count("\n")) == (1, 1)
    assert "cannot be recomputed" in printed.err


def test_a_folder(tmp_path, capsys):
    write_run(tmp_path)
    for command in ("verify", "report"):
        code, printed = call(capsys, command, tmp_path)
        assert (code, printed.err.count("\n")) == (1, 1)
        assert "is a directory; name the ledger in it" in printed.err


def test_a_run_that_is_still_going(tmp_path, capsys):
    path = write_run(tmp_path)
    with Ledger.open(path):
        for command, words in (("verify", "not final"), ("report", "still going")):
            code, printed = call(capsys, command, path)
            assert (code, printed.err.count("\n")) == (1, 1)
            assert words in printed.err


def test_a_torn_last_line_is_counted_and_said(tmp_path, capsys):
    path = write_run(tmp_path)
    (tmp_path / "report.json").unlink()
    path.write_bytes(path.read_bytes()[:-50])
    code, printed = call(capsys, "verify", path, "--json")
    data = json.loads(printed.out)
    assert (code, data["ok"]) == (0, True)
    details = {check["name"]: check["detail"] for check in data["checks"]}
    assert "counted as a charged step" in details["last line"]
    assert "3 of 10 train" in details["ledger"]


def test_a_tainted_run_is_confirmed_and_claims_nothing(tmp_path, capsys):
    with Ledger.create(tmp_path / "ledger.jsonl", make_plan()) as ledger:
        ledger.taint("seeded", "a test")
    code, printed = call(capsys, "verify", tmp_path / "ledger.jsonl")
    assert code == 0
    assert "claim: none" in printed.out


def test_all_lists_every_check(tmp_path, capsys):
    path = write_run(tmp_path)
    code, few = call(capsys, "verify", path)
    assert code == 0
    _, every = call(capsys, "verify", path, "--all")
    assert "the other" in few.out
    assert "disclosure" not in few.out
    assert "disclosure" in every.out
    assert "the other" not in every.out
