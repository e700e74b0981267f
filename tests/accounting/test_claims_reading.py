"""Reading claims: every format gives the same claim, and bad input ends with one sentence."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from dpsb_accounting.claims import Claim, ClaimError, claim_from, example, read_claim
from dpsb_accounting.claims.claim import CLIENT_FIELDS, FIELDS

FACTS = {"epsilon": 3.0, "delta": 1e-6, "num_examples": 60_000, "noise_multiplier": 1.1, "sampler": "poisson"}
CLAIM = Claim(**FACTS)
DOCS = Path(__file__).parent.parent.parent / "docs" / "claims.md"

FRONT = """---
license: apache-2.0
tags:
- text-classification
epsilon: 3.0
delta: 1e-6
num_examples: 60,000
noise_multiplier: 1.1   # on the sum
sampler: poisson
---
# A model card
"""
FENCED = """# A card
```python
epsilon = 99
```
```yaml
epsilon: 3.0
delta: 1e-6
num_examples: 60000
noise_multiplier: 1.1
sampler: "poisson"
```
"""
TABLE = """# A card
Some text: which says nothing.

| setting | value |
|---|---|
| Epsilon | 3.0 |
| delta | `1e-6` |
| Dataset size | 60,000 |
| **Noise multiplier** | 1.1 |
| learning rate | 5e-4 |

- Sampling: poisson
"""


@pytest.fixture
def write(tmp_path):
    def _write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return _write


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.json", json.dumps(FACTS)),
        ("c.JSON", json.dumps(FACTS)),
        ("c.toml", "\n".join(f"{name} = {json.dumps(value)}" for name, value in FACTS.items())),
        ("c.md", FRONT),
        ("c.md", FENCED),
        ("c.md", TABLE),
        ("c.md", TABLE.replace("\n", "\r\n")),
        ("c.md", "```json\n" + json.dumps(FACTS) + "\n```\n"),
        ("c.md", "+++\n" + "\n".join(f"{name} = {json.dumps(value)}" for name, value in FACTS.items()) + "\n+++\n"),
        ("c.json", b"\xef\xbb\xbf" + json.dumps(FACTS).encode()),
    ],
)
def test_every_format_gives_the_same_claim(write, name, content):
    assert read_claim(write(name, content)) == CLAIM


def test_the_example_is_a_claim_and_uses_known_fields():
    values = tomllib.loads(example())
    assert set(values) <= {field.name for field in FIELDS}
    assert claim_from(values).epsilon == values["epsilon"]


def test_int_and_float_are_the_same_claim():
    assert Claim(epsilon=3, num_examples=100.0, noise_multiplier=1) == Claim(
        epsilon=3.0, num_examples=100, noise_multiplier=1.0
    )


def test_every_synonym_is_one_field_only():
    names = [name for field in FIELDS for name in (field.name, *field.synonyms)]
    assert len(names) == len(set(names))


def test_synonyms_of_values():
    claim = claim_from({"adjacency": "Add-or-remove", "unit": "person", "accounting": "GDP", "clipping": "flat"})
    assert (claim.neighboring, claim.unit, claim.accountant, claim.clipping) == (
        "add_or_remove_one", "user", "gdp_clt", "per_unit",
    )  # fmt: skip


def test_clients_take_what_they_leave_out_from_the_claim():
    claim = claim_from({"epsilon": 3, "batch_size": 32, "epochs": 2, "clients": [{"n": 100}, {"name": "b", "n": 200}]})
    first, second = claim.clients
    assert (first.name, second.name) == ("client-0", "b")
    assert claim.of_client(second).num_examples == 200
    assert claim.of_client(second).batch_size == 32


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"epsilom": 3}, "unknown key 'epsilom'; did you mean 'epsilon'"),
        ({"clients": [{"epsilom": 3}]}, "client 0: unknown key 'epsilom'"),
        ({"clients": [{"sampler": "poisson"}]}, "unknown key 'sampler'"),
        ({"epsilon": 3, "eps": 3}, "'epsilon' is given twice"),
        ({"epsilon": "three"}, "epsilon must be a number, not 'three'"),
        ({"epsilon": True}, "epsilon must be a number"),
        ({"epsilon": -1}, "epsilon must be at least 0"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"delta": 1}, "delta must be below 1"),
        ({"delta": float("inf")}, "delta must be finite"),
        ({"num_examples": 1.5}, "num_examples must be a whole number"),
        ({"num_examples": 10**400}, "num_examples must be at most"),
        ({"epsilon": 10**400}, "epsilon is too large"),
        ({"sampling_prob": 2}, "sampling_prob must be in (0, 1]"),
        ({"sampler": "random"}, "sampler must be one of"),
        ({"sampler": ["poisson"]}, "sampler must be one of"),
        ({"trained": [["adapter"]]}, "trained must be one of"),
        ({"trained": 3}, "trained must be a list"),
        ({"batch_norm": "maybe"}, "batch_norm must be true or false"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"clients": {}}, "clients must be a list"),
        ({"clients": [3]}, "client 0 must be an object"),
        ({"clients": [{"name": "a"}, {"name": "a"}]}, "different names"),
        ({"clients": [{}] * 1001}, "at most 1000"),
        ({"schema": "dpsb-report/9"}, "schema must be"),
        ({"title": "x" * 1000}, "title must be at most 500"),
        ([], "must be an object"),
        (None, "must be an object"),
    ],
)
def test_bad_values_are_one_sentence_that_names_the_field(data, words):
    with pytest.raises(ClaimError) as error:
        claim_from(data)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.json", "{", "not valid JSON"),
        ("c.json", '{"epsilon": NaN}', "not a finite number"),
        ("c.json", '{"epsilon": 1e999}', "not a finite number"),
        ("c.json", '{"epsilon": 3, "epsilon": 4}', "occurs twice"),
        ("c.json", "[" * 100_000, "nested too deeply"),
        ("c.json", '{"a":' * 100_000, "nested too deeply"),
        ("c.toml", "a = " + "[" * 100_000, ""),
        ("c.toml", "epsilon = = 3", "not valid TOML"),
        ("c.toml", "epsilon = nan", "epsilon"),
        ("c.toml", "epsilon = 1979-05-27", "epsilon must be a number"),
        ("c.json", '{"num_examples": ' + "9" * 5000 + "}", ""),
        ("c.json", b"\x89PNG\r\n\x1a\n\xff", "not UTF-8"),
        ("c.json", b"x" * 1_000_001, "too large"),
        ("c.json", "", "not valid JSON"),
        ("c.md", "# nothing here", "no claim found"),
        ("c.md", "```json\n{}\n```", "no claim found"),
        ("c.md", FENCED + FENCED, "2 fenced blocks"),
        ("c.md", "- epsilon: 3\n- epsilon: 4\n", "stated twice"),
        ("c.md", TABLE.replace("Noise multiplier", "Noise multipler"), "did you mean 'noise_multiplier'"),
        ("c.md", FRONT.replace("noise_multiplier", "noise_multipler"), "did you mean 'noise_multiplier'"),
    ],
)
def test_bad_files_are_one_sentence(write, name, content, words):
    with pytest.raises(ClaimError) as error:
        read_claim(write(name, content))
    assert words in str(error.value)
    assert str(error.value).count("\n") == 0


def test_hostile_markdown_is_read_in_a_moment(write):
    many = "\n".join(f"noise_multiplieq{number}: 1" for number in range(30_000))
    for content in (
        many,
        f"---\n{many}\n---\n",
        "|" * 400_000,
        "a" * 400_000 + ":",
        "```" * 100_000,
        "- " * 200_000,
        "epsilon" + " " * 400_000,
    ):
        with pytest.raises(ClaimError):
            read_claim(write("c.md", content))


def test_a_folder_and_a_missing_file(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(ClaimError, match="cannot read"):
            read_claim(path)


def test_a_report_that_says_more_than_a_claim_can_is_refused(write):
    report = {"schema": "dpsb-report/1", "epsilon": {"upper": 1}, "mechanism": {"type": "laplace"}}
    with pytest.raises(ClaimError, match="verify its ledger"):
        read_claim(write("report.json", json.dumps(report)))
    report["mechanism"] = {"type": "gaussian"}
    report["phases"] = [{"name": "labels", "event": {"type": "pure_epsilon", "epsilon": 1.0}, "count": 1}]
    with pytest.raises(ClaimError, match="verify its ledger"):
        read_claim(write("report.json", json.dumps(report)))


def test_the_manual_has_every_field_synonym_and_finding():
    from dpsb_accounting.claims import CATALOG

    text = DOCS.read_text()
    words = set(re.findall(r"`([^`\n]+)`", text))
    for field in FIELDS:
        assert {field.name, *field.synonyms} <= words, field.name
    assert {"clients", *CLIENT_FIELDS} <= words
    assert set(CATALOG) <= words
