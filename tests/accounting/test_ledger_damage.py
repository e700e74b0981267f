"""Edits, cuts and torn lines: what is noticed, and what the message says."""

import json
import os

import pytest
from plans import fill, make_plan, resealed

from dpsb_accounting import Ledger, LedgerError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def test_every_changed_byte_is_noticed(path):
    whole = fill(path, 2, make_plan(details={}))
    record = Ledger.read(path)
    for position in range(len(whole)):
        edited = bytearray(whole)
        edited[position] ^= 0x20 if position % 2 else 0x01
        path.write_bytes(edited)
        with pytest.raises(LedgerError):
            Ledger.read(path).check_not_behind(record.length, record.head)


def test_removed_repeated_and_swapped_lines_are_noticed(path):
    lines = fill(path, 4).splitlines(keepends=True)
    for changed in (
        lines[:2] + lines[3:],
        lines[1:],
        lines[:3] + lines[2:],
        [lines[0], lines[2], lines[1], *lines[3:]],
        lines + lines[:1],
        [*lines[:2], b"\n", *lines[2:]],
        [*lines[:2], b"{}\n", *lines[2:]],
    ):
        path.write_bytes(b"".join(changed))
        with pytest.raises(LedgerError, match=r"line \d of the ledger is wrong"):
            Ledger.read(path)
        with pytest.raises(LedgerError):
            Ledger.open(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"number": 2}, "number"),
        ({"number": True}, "number"),
        ({"index": 7}, "index"),
        ({"phase": "basis"}, "phase"),
        (
            {"event": {"type": "poisson_gaussian", "noise_multiplier": 2.0, "sampling_prob": 0.01}},
            "not the one planned",
        ),
        ({"extra": 1}, "unknown fields: 'extra'"),
        ({"kind": "plan"}, "first line, and no other"),
        ({"kind": "gift"}, "kind"),
        ({"prev": "0" * 64}, "prev"),
    ],
)
def test_a_resealed_lie_is_noticed(path, changes, words):
    lines = fill(path, 2).splitlines(keepends=True)
    lines[2] = resealed({**json.loads(lines[2]), **changes})
    path.write_bytes(b"".join(lines))
    with pytest.raises(LedgerError, match=words):
        Ledger.read(path)


def test_more_charges_than_planned_are_noticed(path):
    last = fill(path, 10).splitlines()[-1]
    line = json.loads(last)
    extra = resealed({**line, "index": 11, "number": 10, "prev": line["hash"]})
    with path.open("ab") as file:
        file.write(extra)
    with pytest.raises(LedgerError, match="all 10 charges"):
        Ledger.read(path)


def test_another_schema_is_refused(path):
    first = json.loads(fill(path, 0))
    path.write_bytes(resealed({**first, "schema": "dpsb-ledger/2"}))
    with pytest.raises(LedgerError, match="schema must be 'dpsb-ledger/1', not 'dpsb-ledger/2'"):
        Ledger.read(path)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x80\x00\n", b"[1]\n", b"PK\x03\x04" * 100, b"\0" * 50])
def test_what_is_no_ledger_is_refused(path, content):
    path.write_bytes(content)
    for act in (Ledger.read, Ledger.open):
        with pytest.raises(LedgerError):
            act(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", ["charge", "taint"])
def test_a_line_torn_at_any_byte(path, kind, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    with Ledger.create(path, make_plan(details={})) as ledger:
        ledger.charge("train")
        before, length = path.read_bytes(), ledger.length
        if kind == "charge":
            ledger.charge("train")
        else:
            ledger.taint("seeded", "a test")
    line = path.read_bytes()[len(before) :]
    for size in range(1, len(line)):
        for filled in (b"", b"\0" * 9):
            torn = line[:size] + filled
            path.write_bytes(before + torn)
            whole = size == len(line) - 1 and not filled
            record = Ledger.read(path)
            assert record.torn == (not whole)
            counted = kind == "charge" or (size < 3 and kind == "taint")
            assert record.charged("train") >= (2 if counted else 1)
            with Ledger.open(path) as ledger:
                assert ledger.repairs == 1
                assert ledger.length == length + 1 + int(whole)
                assert ledger.charged("train") == 1 + int(whole and kind == "charge")
                assert ledger.charge("train") == ledger.charged("train") - 1
            assert not Ledger.read(path).torn


def test_a_torn_line_never_hides_an_edit(path):
    whole = fill(path, 2)
    for end in (b"x", b"{", b'{"event":{"noise_multiplier":2', b'{"hash":"a"}', b"\n", b"\0\0\n\0x"):
        path.write_bytes(whole + end)
        if end == b"{":
            assert Ledger.read(path).torn
            continue
        with pytest.raises(LedgerError):
            Ledger.read(path)
    path.write_bytes(whole[:-1] + b"x")
    with pytest.raises(LedgerError):
        Ledger.open(path)


def test_a_torn_plan_means_nothing_was_drawn(path):
    whole = fill(path, 0)
    for size in (1, 10, len(whole) - 2):
        path.write_bytes(whole[:size])
        with pytest.raises(LedgerError, match="no data was drawn"):
            Ledger.open(path)


def test_a_rolled_back_ledger_is_refused(path):
    fill(path, 5)
    record = Ledger.read(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]))
    with pytest.raises(LedgerError, match="is behind: it has 4 lines, but 6"):
        Ledger.read(path).check_not_behind(record.length, record.head)
    with Ledger.open(path) as ledger:
        for _ in range(4):
            ledger.charge("train")
        ledger.check_not_behind(4, record.hash_at(3))
        ledger.check_not_behind(6, record.head)  # the charges are the same lines again
        ledger.taint("x", "y")
        with pytest.raises(LedgerError, match="another ledger"):
            ledger.check_not_behind(9, record.head)
    with pytest.raises(ValueError, match="length"):
        record.check_not_behind(0, record.head)


def test_another_kind_of_file_is_called_that(path):
    for content in (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), b'{\n  "schema": "dpsb-report/1"\n}\n', b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(LedgerError, match="the file is no ledger"):
            Ledger.read(path)


def test_a_file_without_lines_is_not_read_whole(path, monkeypatch):
    monkeypatch.setattr("dpsb_accounting.record.LONGEST_LINE", 1000)
    monkeypatch.setattr("dpsb_accounting.chain.LONGEST_LINE", 1000)
    path.write_bytes(b"a" * 5000)
    with pytest.raises(LedgerError, match="line 1 of the ledger is wrong: it has more than 1000 bytes"):
        Ledger.read(path)


def test_a_directory_is_told_where_the_ledger_is(path):
    with pytest.raises(LedgerError, match=f"is a directory; name the ledger in it, such as {path}"):
        Ledger.read(path.parent)


def test_two_schemas_in_one_ledger_are_refused(path):
    lines = fill(path, 2).splitlines(keepends=True)
    second = {**json.loads(lines[0]), "schema": "dpsb-ledger/2", "index": 3, "prev": json.loads(lines[-1])["hash"]}
    path.write_bytes(b"".join(lines) + resealed(second))
    with pytest.raises(LedgerError, match="line 4 of the ledger is wrong: the first line, and no other"):
        Ledger.read(path)
