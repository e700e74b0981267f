"""Signatures: only the signer's key, only this ledger, only this report, only these files."""

import json
import os
import stat

import pytest
from plans import make_plan, two_phases

from dpsb_accounting import Ledger, cli, make_report, verify
from dpsb_accounting.signature import SignatureError, make_keys, report_digest, sign


@pytest.fixture
def signed(tmp_path):
    """A finished run with a tensor file, signed; the keys lie outside its folder."""
    run = tmp_path / "run"
    run.mkdir()
    with Ledger.create(run / "ledger.jsonl", make_plan()) as ledger:
        ledger.charge("train")
        ledger.charge("train")
        make_report(ledger).write(run / "report.json")
    (run / "dpsb_core.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    make_keys(tmp_path / "key")
    put_signature(run, tmp_path / "key")
    return run


def put_signature(run, key):
    report = run / "report.json"
    content = sign(Ledger.read(run / "ledger.jsonl"), json.loads(report.read_text()) if report.exists() else None, key)
    (run / "signature.json").write_text(json.dumps(content))


def check(run, key="key.pub"):
    return verify(run / "ledger.jsonl", public_key=run.parent / key)


def failures(run, key="key.pub"):
    return [failure.name for failure in check(run, key).failures]


def test_an_honest_signature_holds(signed):
    outcome = check(signed)
    assert outcome.ok, outcome.failures
    names = [entry.name for entry in outcome.checks]
    assert {"signature", "signature: ledger", "signature: report", "signature: dpsb_core.safetensors"} <= set(names)


def test_without_a_key_a_signature_is_named_and_not_trusted(signed):
    outcome = verify(signed / "ledger.jsonl")
    (found,) = [entry for entry in outcome.checks if entry.name == "signature"]
    assert outcome.ok
    assert "not checked" in found.detail


def test_the_private_key_is_for_its_owner_and_never_overwritten(tmp_path):
    public = make_keys(tmp_path / "key")
    assert public == tmp_path / "key.pub"
    assert stat.S_IMODE(os.stat(tmp_path / "key").st_mode) == 0o600
    before = (tmp_path / "key").read_bytes()
    with pytest.raises(SignatureError, match="cannot create"):
        make_keys(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == before
    public.unlink()
    with pytest.raises(SignatureError, match="cannot create"):
        make_keys(tmp_path / "key")
    assert not public.exists()  # it would be of another pair
    (tmp_path / "other.pub").write_text("somebody's")
    with pytest.raises(SignatureError, match=r"other\.pub"):
        make_keys(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert (tmp_path / "other.pub").read_text() == "somebody's"


def test_another_signer_is_refused(signed):
    make_keys(signed.parent / "other")
    assert failures(signed, "other.pub") == ["signature"]
    put_signature(signed, signed.parent / "other")
    assert failures(signed) == ["signature"], "the key named in the file is not believed"


def test_a_missing_signature_is_refused(signed):
    (signed / "signature.json").unlink()
    assert failures(signed) == ["signature"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data["signed"].update(ledger_length=2),
        lambda data: data["signed"].update(run_id="another"),
        lambda data: data["signed"].update(report_sha256=None),
        lambda data: data["signed"]["files"].clear(),
        lambda data: data["signed"].update(extra=1),
        lambda data: data.update(signature="00" * 64),
        lambda data: data.update(signature="zz"),
        lambda data: data.update(signature=data["signature"][:-2]),
        lambda data: data.update(schema="dpsb-signature/9"),
        lambda data: data.update(algorithm="none"),
        lambda data: data.update(more=1),
        lambda data: data.pop("signature"),
        lambda data: data.update(signed=[]),
    ],
)
def test_every_edit_of_the_signature_is_noticed(signed, edit):
    data = json.loads((signed / "signature.json").read_text())
    edit(data)
    (signed / "signature.json").write_text(json.dumps(data))
    assert failures(signed) == ["signature"]


def test_a_ledger_that_went_on_is_not_the_one_signed(signed):
    with Ledger.open(signed / "ledger.jsonl") as ledger:
        ledger.charge("train")
        make_report(ledger).write(signed / "report.json")
    assert set(failures(signed)) == {"signature: ledger", "signature: report"}


def test_a_consistent_forgery_is_refused(signed):
    """A whole new ledger and report, which no unkeyed chain can tell from honest ones."""
    (signed / "ledger.jsonl").unlink()
    with Ledger.create(signed / "ledger.jsonl", two_phases()) as ledger:
        ledger.charge("basis")
        make_report(ledger).write(signed / "report.json")
    assert verify(signed / "ledger.jsonl").ok
    assert set(failures(signed)) == {"signature: ledger", "signature: report"}


def test_other_files_are_refused_and_missing_ones_named(signed):
    path = signed / "dpsb_core.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}" + b"more")
    assert failures(signed) == ["signature: dpsb_core.safetensors"]
    path.unlink()
    outcome = check(signed)
    assert outcome.ok
    assert "not here to compare" in outcome.checks[-1].detail
    (signed / "extra.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert failures(signed) == ["signature: extra.safetensors"]


def test_the_report_counts_not_its_layout(signed):
    report = json.loads((signed / "report.json").read_text())
    (signed / "report.json").write_text(json.dumps(report, sort_keys=True))
    assert check(signed).ok
    (signed / "report.json").unlink()
    assert failures(signed) == ["signature: report"]
    assert report_digest({"a": 1, "b": 2}) == report_digest({"b": 2, "a": 1})


def test_keys_of_another_kind(signed, tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    key = generate_private_key(SECP256R1())
    pem = serialization.Encoding.PEM
    private = serialization.PrivateFormat.PKCS8
    (tmp_path / "ec").write_bytes(key.private_bytes(pem, private, serialization.NoEncryption()))
    (tmp_path / "secret").write_bytes(key.private_bytes(pem, private, serialization.BestAvailableEncryption(b"word")))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "ec.pub").write_bytes(public)
    record = Ledger.read(signed / "ledger.jsonl")
    for name, words in (
        ("ec", "no ed25519 key"),
        ("secret", "is encrypted"),
        ("key.pub", "no private key"),
        ("no", "cannot read"),
    ):
        with pytest.raises(SignatureError, match=words):
            sign(record, None, tmp_path / name)
    for name, words in (("ec.pub", "no ed25519 key"), ("key", "no public key"), ("none.pub", "cannot read")):
        (failure,) = check(signed, name).failures
        assert words in failure.detail


def test_the_commands(signed, capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        return stop.value.code, capsys.readouterr()

    (signed / "signature.json").unlink()
    ledger, folder = signed / "ledger.jsonl", signed.parent
    code, printed = call("keygen", folder / "new")
    assert (code, (folder / "new.pub").exists()) == (0, True)
    assert call("sign", ledger, "--key", folder / "new")[0] == 0
    assert call("verify", ledger, "--check-signature", folder / "new.pub")[0] == 0
    code, printed = call("verify", ledger, "--check-signature", folder / "key.pub")
    assert code == 1
    assert "error: verification failed (1 of" in printed.err
    (signed / "signature.json").unlink()
    assert call("report", ledger, "--json", "--out", signed / "report.json", "--sign", folder / "key")[0] == 0
    assert check(signed).ok
    report = json.loads((signed / "report.json").read_text())
    (signed / "report.json").write_text(json.dumps({**report, "claim": False}))
    code, printed = call("sign", ledger, "--key", folder / "key")
    assert (code, "nothing was signed: claim" in printed.err) == (1, True)
