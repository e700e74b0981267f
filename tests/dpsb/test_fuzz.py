"""Settings and messages from strangers: whatever is in them, the documented errors come out, with one sentence."""

import json
import math
from dataclasses import fields

import pytest
import torch
from federation import terms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpsb.config import ConfigError, RunConfig, make_config
from dpsb.config_file import read_config
from dpsb.federated.checks import FederatedError
from dpsb.federated.config import FederateConfig, FederationSettings, SiloSettings, read_federation
from dpsb.federated.judge import judge
from dpsb.federated.messages import SUM, Receipt, Refusal, RoundMessage, Update
from dpsb.federated.server import ServerError, load_state
from dpsb.federated.spec import SiloPolicy, read_policy
from dpsb.federated.wire import WireError, pack, unpack
from dpsb.reasons import foreseen, reason

quick = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["inf", "nan", "../../etc/passwd", "a\0b", "\x1b[31m", "public:", "part:", 2**63, -1, 0, 1e308]),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def one_sentence(error):
    text = reason(error)
    assert foreseen(error)
    assert text
    assert "\n" not in text
    assert "Traceback" not in text
    assert len(text) < 4000


# --- settings of a run

RUN = {"model": "minilm", "data": "rows.jsonl", "out": "run", "epsilon": 3.0}
RUN_KEYS = sorted(field.name for field in fields(RunConfig))


@given(changes=st.dictionaries(st.sampled_from(RUN_KEYS), ANYTHING, min_size=1, max_size=3))
@quick
def test_settings_with_any_values_are_a_config_or_refused(changes):
    try:
        found = make_config({**RUN, **changes})
    except ConfigError as error:
        one_sentence(error)
        return
    json.dumps(found.to_json())


@given(content=st.binary(max_size=200), suffix=st.sampled_from([".toml", ".json"]))
@quick
def test_any_file_is_settings_or_refused(tmp_path, content, suffix):
    path = tmp_path / f"run{suffix}"
    path.write_bytes(content)
    try:
        read_config(path)
    except ConfigError as error:
        one_sentence(error)


@pytest.mark.parametrize(("suffix", "content"), [(".json", "[" * 50_000), (".toml", "a = " + "[" * 50_000)])
def test_settings_that_nest_without_end_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"run{suffix}"
    path.write_text(content)
    with pytest.raises(ConfigError, match="cannot be read as settings"):
        read_config(path)
    with pytest.raises(FederatedError, match="cannot be read"):
        read_federation(path)
    with pytest.raises(FederatedError, match="cannot be read"):
        read_policy(path)


# --- settings of a federation


def toml(value):
    """A value as TOML, or None where TOML has no such value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf") if math.isinf(value) else repr(value)
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, list):
        return "[" + ", ".join(toml(inner) for inner in value if toml(inner) is not None) + "]"
    if isinstance(value, dict):
        pairs = [f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items() if toml(inner) is not None]
        return "{" + ", ".join(pairs) + "}"
    return None


SECTIONS = {
    "": RUN_KEYS,
    "federation": sorted(field.name for field in fields(FederationSettings)),
    "silos.north": sorted(field.name for field in fields(SiloSettings)),
}


@given(
    changes=st.lists(
        st.sampled_from([(section, key) for section, keys in SECTIONS.items() for key in keys]), min_size=1, max_size=3
    ),
    data=st.data(),
)
@quick
def test_a_federations_file_with_any_values_is_read_or_refused(tmp_path, changes, data):
    tables = {
        "": {**RUN, "labels": "ham,spam"},
        "federation": {"rounds": 3, "local_steps": 2},
        "silos.north": {"data": "north.jsonl"},
        "silos.south": {"data": "south.jsonl"},
    }
    for section, key in changes:
        tables[section] = {**tables[section], key: data.draw(ANYTHING)}
    lines = []
    for section, content in tables.items():
        lines += [f"[{section}]"] if section else []
        lines += [f"{key} = {toml(value)}" for key, value in content.items() if toml(value) is not None]
    path = tmp_path / "fed.toml"
    path.write_text("\n".join(lines), errors="replace")
    try:
        assert isinstance(read_federation(path), FederateConfig)
    except (FederatedError, ConfigError) as error:
        one_sentence(error)


@given(content=st.binary(max_size=200))
@quick
def test_any_file_is_a_federation_or_a_policy_or_refused(tmp_path, content):
    path = tmp_path / "fed.toml"
    path.write_bytes(content)
    for read in (read_federation, read_policy):
        try:
            read(path)
        except (FederatedError, ConfigError) as error:
            one_sentence(error)


@pytest.mark.parametrize("text", ["silos = 3", "federation = 3", "[silos]\nnorth = 3", "silos = []", "federation = []"])
def test_tables_that_are_none_are_refused(tmp_path, text):
    path = tmp_path / "fed.toml"
    path.write_text(f'model = "m"\ndata = "d"\nout = "o"\n{text}\n')
    with pytest.raises(FederatedError) as error:
        read_federation(path)
    one_sentence(error.value)


POLICY_KEYS = sorted(field.name for field in fields(SiloPolicy))


@given(changes=st.dictionaries(st.sampled_from(POLICY_KEYS), ANYTHING, min_size=1, max_size=3))
@quick
def test_a_policy_with_any_values_is_read_or_refused(tmp_path, changes):
    content = {"silo": "north", "max_epsilon": 3.0, "delta": 1e-5, "max_rounds": 10, "max_local_steps": 5, **changes}
    path = tmp_path / "policy.toml"
    lines = [f"{key} = {toml(value)}" for key, value in content.items() if toml(value) is not None]
    path.write_text("\n".join(lines), errors="replace")
    try:
        read_policy(path)
    except FederatedError as error:
        one_sentence(error)


# --- messages

THETA = {"a.R": torch.arange(4.0).view(2, 2), "head": torch.zeros(3)}
RECEIPT = Receipt(ledger_id="run", length=3, head="a" * 64, round=1)
SPEC = terms().specs("0" * 32, 0, THETA, "1" * 64)["north"]
MESSAGES = [
    pack(RoundMessage(silo="north", spec=SPEC, theta=THETA, receipt=RECEIPT)),
    pack(
        Update(silo="north", run_id="0" * 32, round=0, theta_sha256=SPEC.theta_sha256, tensors=THETA, receipt=RECEIPT)
    ),
    pack(
        Update(
            silo="north",
            run_id="0" * 32,
            round=0,
            theta_sha256=SPEC.theta_sha256,
            tensors={SUM: torch.ones(7, dtype=torch.float64)},
            receipt=RECEIPT,
        )
    ),
    pack(Refusal(silo="north", run_id="0" * 32, round=0, kind="spec", message="No.")),
]


def received(content):
    """What coordinator and silo do with bytes: unpack, and judge what comes out."""
    try:
        found = unpack(content, THETA)
    except WireError as error:
        one_sentence(error)
        return
    if isinstance(found, (Update, Refusal)):
        verdict = judge([found], {"north": SPEC}, THETA, {}, max_update_norm=1000.0)
        for said in (*verdict.lost.values(), *verdict.left.values(), *verdict.notes):
            assert "\n" not in said
        for update in verdict.updates.values():
            assert all(bool(torch.isfinite(tensor).all()) for tensor in update.tensors.values())


@given(content=st.binary(max_size=200), magic=st.booleans())
@quick
def test_random_bytes_are_no_message(content, magic):
    received(b"dpsbfed2" * magic + content)


@given(
    message=st.sampled_from(MESSAGES),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=5),
    cut=st.integers(0, 20),
)
@quick
def test_changed_bytes_are_a_message_or_refused(message, edits, cut):
    changed = bytearray(message)
    for where, value in edits:
        changed[where % len(changed)] = value
    received(bytes(changed[: len(changed) - cut]))


def framed(meta, raw):
    import zlib

    framing = zlib.compress(json.dumps(meta).encode(), 9)
    return b"dpsbfed2" + len(framing).to_bytes(4, "big") + framing + raw


def meta_of(message):
    import zlib

    from dpsb.federated.wire import USUAL

    length = int.from_bytes(message[8:12], "big")
    return json.loads(zlib.decompressobj(zdict=USUAL).decompress(message[12 : 12 + length])), message[12 + length :]


def places(value, path=()):
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))


def changed_at(value, path, new):
    if not path:
        return new
    return {key: changed_at(inner, path[1:], new) if key == path[0] else inner for key, inner in value.items()}


@given(message=st.sampled_from(MESSAGES), data=st.data())
@settings(quick, max_examples=300)
def test_a_message_with_any_value_anywhere_is_a_message_or_refused(message, data):
    meta, raw = meta_of(message)
    where = data.draw(st.sampled_from(list(places(meta))))
    received(framed(changed_at(meta, where, data.draw(ANYTHING)), raw))


@given(numbers=st.lists(st.floats(width=32), min_size=7, max_size=7))
@quick
def test_updates_of_any_numbers_are_finite_or_not_used(numbers):
    tensors = {"a.R": torch.tensor(numbers[:4]).view(2, 2), "head": torch.tensor(numbers[4:])}
    facts = {"silo": "north", "run_id": "0" * 32, "round": 0, "theta_sha256": SPEC.theta_sha256}
    received(pack(Update(**facts, tensors=tensors, receipt=RECEIPT)))


# --- the coordinator's own files


@given(content=st.binary(max_size=100) | ANYTHING.map(lambda value: json.dumps(value).encode()))
@quick
def test_any_server_state_is_read_or_refused(tmp_path, content):
    folder = tmp_path / "server"
    folder.mkdir(exist_ok=True)
    (folder / "server.json").write_bytes(content)
    for name in ("theta", "moments"):
        (folder / f"{name}.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    with pytest.raises(ServerError) as error:
        load_state(tmp_path)
    one_sentence(error.value)
