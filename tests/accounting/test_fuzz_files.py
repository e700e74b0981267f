"""Files from strangers: whatever is in a ledger, report, claim, signature or score file, one sentence comes out."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import make_plan, resealed, two_phases

from dpsb_accounting import Ledger, LedgerError, make_report, verify
from dpsb_accounting.auditing import read_scores
from dpsb_accounting.claims import ClaimError, read_claim

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["inf", "nan", "../../etc/passwd", "\x1b[31m", "0" * 64, 1e308, -1, 0, 2**63]),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def one_sentence(error):
    """What a user is shown: one line of printable text, no traceback, no internals."""
    text = str(error)
    assert text
    assert "\n" not in text.strip()
    assert "Traceback" not in text
    assert len(text) < 2000
    return text


def places(value, path=()):
    """The path of every value inside a JSON value, the whole included."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from places(inner, (*path, index))


def changed(value, path, new):
    if not path:
        return new
    if isinstance(value, dict):
        return {key: changed(inner, path[1:], new) if key == path[0] else inner for key, inner in value.items()}
    return [changed(inner, path[1:], new) if index == path[0] else inner for index, inner in enumerate(value)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "ledger.jsonl"
    with Ledger.create(path, two_phases()) as ledger:
        ledger.charge("basis")
        ledger.charge("train")
        ledger.taint("canaries", "made to be audited")
        ledger.bind_file("basis.safetensors", "0" * 64)
    return path.read_bytes()


def read_both(path):
    """Reading, and opening to write, refuse in the same documented way; then the report is made of what was read."""
    for read in (Ledger.read, Ledger.open):
        try:
            found = read(path)
        except LedgerError as error:
            one_sentence(error)
            continue
        if read is Ledger.open:
            found.close()


# --- ledgers


@given(content=st.binary(max_size=300))
@quick
def test_random_bytes_are_no_ledger(tmp_path, content):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(content)
    with pytest.raises(LedgerError) as error:
        Ledger.read(path)
    one_sentence(error.value)


@given(data=st.data())
@quick
def test_a_resealed_line_with_any_value_anywhere(tmp_path, whole, data):
    """The hash fits, so only the checks of the content stand between a hostile line and the accountant."""
    lines = [json.loads(line) for line in whole.splitlines()]
    number = data.draw(st.integers(0, len(lines) - 1))
    where = data.draw(st.sampled_from(list(places(lines[number]))[1:]))
    lines[number] = changed(lines[number], where, data.draw(ANYTHING))
    path, previous, written = tmp_path / "ledger.jsonl", None, []
    for index, line in enumerate(lines):
        if index and previous is not None and index > number:
            line = {**line, "prev": previous}
        try:
            written.append(resealed(line))
        except (ValueError, TypeError):
            return  # not even JSON: nobody can write it
        previous = json.loads(written[-1])["hash"]
    path.write_bytes(b"".join(written))
    read_both(path)


@given(data=st.data())
@quick
def test_bytes_cut_doubled_and_swapped(tmp_path, whole, data):
    start, end = sorted(data.draw(st.lists(st.integers(0, len(whole)), min_size=2, max_size=2)))
    middle = data.draw(st.sampled_from([b"", whole[start:end] * 2, whole[start:end][::-1], b"\0" * 10, b"[" * 40_000]))
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(whole[:start] + middle + whole[end:])
    read_both(path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b", "..", ".", "", "a\0b", "x/y"])
def test_a_ledger_binds_no_file_outside_its_folder(tmp_path, name):
    path = tmp_path / "run" / "ledger.jsonl"
    path.parent.mkdir()
    with Ledger.create(path, make_plan()) as ledger:
        with pytest.raises((LedgerError, ValueError)) as error:
            ledger.bind_file(name, "0" * 64)
        one_sentence(error.value)


# --- reports, signatures


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signed") / "run"
    shutil.copytree(GOLDEN / "schema-1-revision-2", folder)
    return folder


@given(data=st.data())
@quick
def test_a_report_or_signature_with_any_value_anywhere(tmp_path, signed, data):
    """It verifies, or a check fails: nothing is raised for a bad file."""
    folder = tmp_path / "run"
    shutil.copytree(signed, folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["report.json", "signature.json"]))
    content = json.loads((folder / name).read_text())
    where = data.draw(st.sampled_from(list(places(content))))
    new = data.draw(ANYTHING)
    (folder / name).write_text(json.dumps(changed(content, where, new)))
    found = verify(folder / "ledger.jsonl", public_key=folder / "signer.pub")
    for check in found.checks:
        one_sentence(check.detail)


@given(content=st.binary(max_size=200))
@quick
def test_random_bytes_are_no_report(tmp_path, signed, content):
    folder = tmp_path / "run"
    shutil.copytree(signed, folder, dirs_exist_ok=True)
    (folder / "report.json").write_bytes(content)
    found = verify(folder / "ledger.jsonl")
    assert not found.ok
    for check in found.failures:
        one_sentence(check.detail)


# --- claims


@given(
    content=st.binary(max_size=200) | ANYTHING.map(lambda value: json.dumps(value, default=str).encode()),
    suffix=st.sampled_from([".json", ".toml", ".yaml", ".md", ""]),
)
@quick
def test_any_file_is_a_claim_or_refused(tmp_path, content, suffix):
    path = tmp_path / f"claim{suffix}"
    path.write_bytes(content)
    try:
        read_claim(path)
    except ClaimError as error:
        one_sentence(error)


@given(data=st.data())
@quick
def test_a_claim_with_any_value_anywhere(tmp_path, data):
    claim = {
        "epsilon": 3.0,
        "delta": 1e-5,
        "noise_multiplier": 1.0,
        "sampling_prob": 0.01,
        "steps": 1000,
        "unit": "example",
        "clients": [{"epsilon": 2.0, "examples": 100}],
    }
    where = data.draw(st.sampled_from(list(places(claim))[1:]))
    path = tmp_path / "claim.json"
    path.write_text(json.dumps(changed(claim, where, data.draw(ANYTHING))))
    try:
        read_claim(path)
    except ClaimError as error:
        one_sentence(error)


# --- scores


@given(content=st.binary(max_size=300), suffix=st.sampled_from([".npz", ".csv"]))
@quick
def test_any_file_is_scores_or_refused(tmp_path, content, suffix):
    path = tmp_path / f"scores{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_scores(path)
    one_sentence(error.value)


def test_a_report_of_an_honest_ledger_is_still_made(tmp_path, whole):
    """The fuzzed base file itself is sound: the tests above fail for what they change."""
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(whole)
    assert make_report(Ledger.read(path)).to_json()["taints"]
