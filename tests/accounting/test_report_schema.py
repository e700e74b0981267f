"""The JSON schemas that are shipped describe what is written, and refuse what is not."""

import copy
import json
import math
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
from plans import make_plan, two_phases

from dpsb_accounting import Ledger, NonPrivate, Phase, make_report
from dpsb_accounting.signature import make_keys, sign

GOLDEN = Path(__file__).parent.parent / "golden"


def validator(name):
    schema = json.loads((resources.files("dpsb_accounting") / "schema" / f"{name}-1.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture
def data(tmp_path):
    details = {"rank": 4, "target_shapes": [{"out_features": 8, "in_features": 6, "count": 2}]}
    with Ledger.create(tmp_path / "ledger.jsonl", two_phases(details=details)) as ledger:
        ledger.charge("basis")
        ledger.charge("train")
        ledger.taint("seeded", "a test")
        audit = {"method": "one run", "epsilon_lower": 0.1, "confidence": 0.95, "delta": 1e-5}
        return make_report(ledger, held_out={"accuracy": 0.9}, audits=[audit]).to_json()


def test_a_report_keeps_to_its_schema(data):
    validator("report").validate(data)
    for name in ("held_out", "audits"):
        validator("report").validate({key: value for key, value in data.items() if key != name})


def test_a_report_without_a_claim_keeps_to_its_schema(tmp_path):
    plan = make_plan(
        phases=(Phase("train", NonPrivate(reason="no noise"), 3),),
        clipping="none",
        l2_clip_norm=math.inf,
        target_epsilon=math.inf,
    )
    with Ledger.create(tmp_path / "ledger.jsonl", plan) as ledger:
        validator("report").validate(make_report(ledger).to_json())


def test_every_key_is_described_and_none_may_be_added_or_removed(data):
    schema = validator("report")
    optional = {"held_out", "audits"}
    assert set(schema.schema["properties"]) == set(data)
    for name in set(data) - optional:
        assert not schema.is_valid({key: value for key, value in data.items() if key != name}), name
    assert not schema.is_valid({**data, "really": 0.05})
    for name in ("epsilon", "spent", "mechanism", "ledger"):
        edited = copy.deepcopy(data)
        edited[name]["really"] = 0.05
        assert not schema.is_valid(edited), name
    assert not schema.is_valid({**data, "epsilon": {"lower": 0, "upper": "small"}})


@pytest.mark.parametrize("folder", sorted(path.name for path in GOLDEN.glob("schema-*")))
def test_golden_files_keep_to_the_schemas(folder):
    validator("report").validate(json.loads((GOLDEN / folder / "report.json").read_text()))
    lines = (GOLDEN / folder / "ledger.jsonl").read_text().splitlines()
    for line in lines:
        validator("ledger").validate(json.loads(line))
    if (GOLDEN / folder / "signature.json").exists():
        validator("signature").validate(json.loads((GOLDEN / folder / "signature.json").read_text()))


def test_every_kind_of_line_and_a_signature(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, two_phases()) as ledger:
        ledger.charge("train")
        ledger.taint("a", "b")
    path.write_bytes(path.read_bytes() + b"{")
    Ledger.open(path).close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["plan", "charge", "taint", "repair"]
    schema = validator("ledger")
    for line in lines:
        schema.validate(line)
        assert not schema.is_valid({**line, "more": 1})
        assert not schema.is_valid({**line, "kind": "gift"})
    make_keys(tmp_path / "key")
    content = sign(Ledger.read(path), None, tmp_path / "key")
    validator("signature").validate(content)
    assert not validator("signature").is_valid({**content, "signature": "00"})
