"""A file that releases produced is bound by its hash: once, in the chain, and seen by every reader."""

import hashlib

import plans
import pytest

from dpsb_accounting import Ledger, LedgerError

SHA = hashlib.sha256(b"a basis").hexdigest()


def test_bound_once_and_read_back(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, plans.make_plan()) as ledger:
        ledger.charge("train")
        ledger.bind_file("basis.safetensors", SHA)
        ledger.charge("train")
        with pytest.raises(LedgerError, match="already"):
            ledger.bind_file("basis.safetensors", "0" * 64)
    record = Ledger.read(path)
    assert record.files == {"basis.safetensors": SHA}
    assert record.charged("train") == 2


@pytest.mark.parametrize("name", ["a" * 256, "ü" * 128, "a/b", "..", ""])
def test_a_name_that_no_file_beside_the_ledger_has(tmp_path, name):
    with Ledger.create(tmp_path / "ledger.jsonl", plans.make_plan()) as ledger:
        with pytest.raises(LedgerError, match="name must"):
            ledger.bind_file(name, SHA)
        ledger.bind_file("a" * 255, SHA)
    assert set(Ledger.read(tmp_path / "ledger.jsonl").files) == {"a" * 255}


def test_another_hash_breaks_the_chain(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, plans.make_plan()) as ledger:
        ledger.bind_file("basis.safetensors", SHA)
    path.write_text(path.read_text().replace(SHA, SHA[::-1]))
    with pytest.raises(LedgerError, match="edited"):
        Ledger.read(path)


def test_a_torn_binding_is_dropped(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, plans.make_plan()) as ledger:
        ledger.charge("train")
        ledger.bind_file("basis.safetensors", SHA)
    path.write_bytes(path.read_bytes()[:-30])
    assert Ledger.read(path).torn
    with Ledger.open(path) as ledger:
        assert ledger.files == {}
        assert ledger.charged("train") == 1
