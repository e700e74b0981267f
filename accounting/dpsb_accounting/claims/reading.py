"""Reading a claim from a file: JSON, TOML, Markdown, or a report of dpsb itself."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from dpsb_accounting import gaussian
from dpsb_accounting.claims.claim import CLIENT_FIELDS, FIELDS, MOST_CLIENTS, Claim, ClaimError, Client

LARGEST_FILE = 1_000_000
REPORT_SCHEMA = "dpsb-report/1"
_NAMES = {name: field.name for field in FIELDS for name in (field.name, *field.synonyms)}
_CLIENT_NAMES = {"name": "name", **{name: known for name, known in _NAMES.items() if known in CLIENT_FIELDS}}
_MOST_PAIRS = 2000
_LONGEST_LINE = 1000  # of a table row or a `key: value` line; longer ones are prose
_FENCE = re.compile(r"(`{3,}|~{3,})\s*(\w*)")
_KEY = re.compile(r"[A-Za-z][\w -]{0,60}")
_STEPS = ("poisson_gaussian", "gaussian", "non_private")
_ACCESS = {"data_free": "data_free", "public": "public", "released": "private_release", "non_private": "private_raw"}


def read_claim(path: str | os.PathLike[str]) -> Claim:
    """Reads a claim from a .json, .toml or .md file; any other ending is tried as JSON.

    Guarantees: nothing in the file is executed or imported; a file that cannot be read in full is refused.

    Args:
        path: The file, UTF-8, at most 1 MB.

    Returns:
        The claim. Public.

    Raises:
        ClaimError: If the file cannot be read; one sentence.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise ClaimError(f"cannot read {path}: {error.strerror}") from None
    if len(raw) > LARGEST_FILE:
        raise ClaimError(f"{path} is larger than {LARGEST_FILE} bytes, too large for a claim")
    try:
        text = raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise ClaimError(f"{path} is not UTF-8 text") from None
    kind = path.suffix.lower()
    try:
        if kind == ".toml":
            return claim_from(_toml(text))
        if kind in (".md", ".markdown"):
            return _from_markdown(text)
        return claim_from(_json(text))
    except RecursionError:
        raise ClaimError(f"{path} is nested too deeply for a claim") from None
    except ClaimError as error:
        raise ClaimError(f"{path.name}: {error}") from None


def claim_from(data: object) -> Claim:
    """Returns the claim that a JSON-like object states, or that a dpsb report states.

    Raises:
        ClaimError: If a key is unknown (the nearest known one is named), given twice, or a value makes no sense.

    Example:
        >>> claim_from({"eps": 3, "delta": 1e-5, "sigma": 1.1}).noise_multiplier
        1.1
        >>> claim_from({"epsilom": 3})
        Traceback (most recent call last):
        dpsb_accounting.claims.claim.ClaimError: unknown key 'epsilom'; did you mean 'epsilon'?
    """
    if not isinstance(data, Mapping):
        raise ClaimError(f"a claim must be an object of keys and values, not {type(data).__name__}")
    schema = data.get("schema")
    if schema is not None:
        if schema != REPORT_SCHEMA:
            raise ClaimError(f"schema must be {REPORT_SCHEMA!r} or left out, not {str(schema)[:60]!r}")
        return _from_report(data)
    values = _known(data, {**_NAMES, "clients": "clients"}, "")
    clients = values.pop("clients", [])
    if not isinstance(clients, list) or len(clients) > MOST_CLIENTS:
        raise ClaimError(f"clients must be a list of at most {MOST_CLIENTS} objects")
    return _made({**values, "clients": tuple(_client(entry, index) for index, entry in enumerate(clients))})


def _made(values: Mapping[str, object]) -> Claim:
    """The claim with these fields; every value is checked there, whatever its type is here."""
    return Claim(**values)  # type: ignore[arg-type]


def _client(data: object, index: int) -> Client:
    if not isinstance(data, Mapping):
        raise ClaimError(f"client {index} must be an object, not {type(data).__name__}")
    values = {"name": f"client-{index}", **_known(data, _CLIENT_NAMES, f"client {index}: ")}
    return Client(**values)  # type: ignore[arg-type]


def _known(data: Mapping[object, object], names: Mapping[str, str], where: str) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in data.items():
        name = names.get(_normal(key))
        if name is None:
            raise ClaimError(f"{where}{_unknown(key, names)}")
        if name in values:
            raise ClaimError(f"{where}{name!r} is given twice, the second time as {str(key)[:60]!r}")
        if value is not None:
            values[name] = value
    return values


def _unknown(key: object, names: Mapping[str, str]) -> str:
    shown = str(key)[:60]
    near = difflib.get_close_matches(_normal(shown), names, n=1, cutoff=0.5)
    return f"unknown key {shown!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _normal(key: object) -> str:
    return re.sub(r"[\s-]+", "_", str(key).strip(" *`_").lower())


def _json(text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite)
    except ClaimError:
        raise
    except ValueError as error:
        raise ClaimError(f"not valid JSON: {error}") from None


def _toml(text: str) -> object:
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise ClaimError(f"not valid TOML: {str(error)[:200]}") from None


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for name, value in pairs:
        if name in result:
            raise ClaimError(f"the key {name[:60]!r} occurs twice in one object")
        result[name] = value
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ClaimError(f'{text[:40]} is not a finite number; write "inf" for an infinite epsilon')
    return value


def _from_markdown(text: str) -> Claim:
    """Fenced blocks first, then front matter, then tables and `key: value` lines; the first with an epsilon counts."""
    front, fenced, lines = _split(text)
    blocks = [_block(kind, content) for kind, content in fenced]
    claims = [block for block in blocks if isinstance(block, Mapping) and _states_epsilon(block)]
    if len(claims) > 1:
        raise ClaimError(f"{len(claims)} fenced blocks state an epsilon; a file must hold one claim")
    if claims:
        return claim_from(claims[0])
    if front is not None:
        values = _toml(front[1]) if front[0] == "+++" else _yaml_like(front[1])
        if isinstance(values, Mapping) and _states_epsilon(values):
            return claim_from(_ours(values))
    found: dict[object, object] = {}
    pairs = [pair for pair in map(_pair, lines) if pair is not None]
    if len(pairs) > _MOST_PAIRS:
        raise ClaimError(f"more than {_MOST_PAIRS} lines look like 'key: value'; put the claim into a fenced block")
    for key, shown in pairs:
        if _NAMES.get(_normal(key)) is not None or _typo(key):
            name, value = _NAMES.get(_normal(key), key), _scalar(shown)
            if name in found and found[name] != value:
                raise ClaimError(f"{name!r} is stated twice, as {found[name]!r} and as {value!r}")
            found[name] = value
    if not _states_epsilon(found):
        raise ClaimError("no claim found: no fenced block, front matter, table or 'key: value' line states an epsilon")
    return claim_from(found)


def _split(text: str) -> tuple[tuple[str, str] | None, list[tuple[str, str]], list[str]]:
    """Front matter with its marker, fenced blocks with their kinds, and all other lines; one pass over the lines."""
    lines = text.split("\n")
    front: tuple[str, str] | None = None
    start = 0
    if lines[0].rstrip() in ("---", "+++"):
        marker = lines[0].rstrip()
        end = next((index for index, line in enumerate(lines[1:], 1) if line.rstrip() == marker), None)
        if end is not None:
            front, start = (marker, "\n".join(lines[1:end])), end + 1
    fenced: list[tuple[str, str]] = []
    rest: list[str] = []
    block: list[str] = []
    fence, kind = "", ""
    for line in lines[start:]:
        if fence:
            if line.rstrip() == fence:
                fenced.append((kind, "\n".join(block)))
                fence, block = "", []
            else:
                block.append(line)
        elif line.startswith(("```", "~~~")) and len(line) <= _LONGEST_LINE:
            match = _FENCE.match(line)
            fence, kind = (match[1], match[2].lower()) if match else ("```", "")
        else:
            rest.append(line)
    return front, fenced, rest


def _pair(line: str) -> tuple[str, str] | None:
    """The key and the value of a table row or of a `key: value` or `key = value` line; None for anything else."""
    if len(line) > _LONGEST_LINE:
        return None
    line = line.strip()
    if line.startswith("|"):
        cells = line.split("|")
        parts = cells[1:3] if len(cells) > 3 else []
    else:
        line = line[2:] if line[:2] in ("- ", "* ", "+ ") else line
        at = min((index for index in (line.find(":"), line.find("=")) if index > 0), default=0)
        parts = [line[:at], line[at + 1 :]] if at else []
    if len(parts) != 2:
        return None
    key, value = (part.strip().strip("*`_").strip() for part in parts)
    return (key, value) if value and _KEY.fullmatch(key) else None


def _block(kind: str, text: str) -> object:
    if kind == "json":
        return _json(text)
    if kind == "toml":
        return _toml(text)
    return _yaml_like(text) if kind in ("yaml", "yml") else None


def _states_epsilon(values: Mapping[object, object]) -> bool:
    return values.get("schema") == REPORT_SCHEMA or any(_NAMES.get(_normal(key)) == "epsilon" for key in values)


def _ours(values: Mapping[object, object]) -> dict[object, object]:
    """Front matter holds other people's keys too: they are left out, unless they look like a misspelt one of ours."""
    return {
        key: value
        for key, value in values.items()
        if key == "clients" or ((_NAMES.get(_normal(key)) or _typo(key)) and _normal(key) not in ("name", "model"))
    }


def _typo(key: object) -> bool:
    word = _normal(key)
    return len(word) >= 5 and bool(difflib.get_close_matches(word, _NAMES, n=1, cutoff=0.88))


def _yaml_like(text: str) -> dict[object, object]:
    """Flat `key: value` lines, values as in JSON or plain words; indented lines and lists of other keys are skipped."""
    values: dict[object, object] = {}
    for line in text.split("\n"):
        key, colon, value = line.partition(":")
        value = value.partition(" #")[0].strip()
        if not colon or not value or not _KEY.fullmatch(key):
            continue
        if key in values:
            raise ClaimError(f"the key {key!r} occurs twice")
        values[key] = _scalar(value)
        if len(values) > _MOST_PAIRS:
            raise ClaimError(f"more than {_MOST_PAIRS} keys, too many for a claim")
    return values


def _scalar(text: str) -> object:
    if len(text) <= 40 and re.fullmatch(r"\d{1,3}(,\d{3})+(\.\d+)?", text):
        text = text.replace(",", "")
    if (len(text) > 1 and text[0] in '[{"') or re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", text):
        try:
            return _json(text.lstrip("+"))
        except ClaimError:
            return text
    return {"true": True, "yes": True, "false": False, "no": False}.get(text.lower(), text.strip("'"))


def _from_report(data: Mapping[object, object]) -> Claim:
    """What a report of dpsb claims; only what it says is taken over."""
    epsilon, step, basis = (_object(data.get(name)) for name in ("epsilon", "mechanism", "basis"))
    taints = [entry.get("name") for entry in map(_object, _list(data.get("taints")))]
    values: dict[str, object] = {
        "title": "dpsb report",
        "epsilon": epsilon.get("upper"),
        "makes_claim": data.get("claim"),
        "taints": taints or None,
        "noise_source": "seeded" if "seeded_randomness" in taints else None if taints else "operating_system",
        "basis": _ACCESS.get(str(basis.get("access"))),
        "sampler": "poisson" if step.get("type") != "non_private" else None,
        "batch_size": step.get("expected_batch_size"),
        "clipping": "none" if step.get("clipping") == "none" else "per_unit",
        "accountant": _method(data),
        **{name: data.get(name) for name in ("delta", "unit", "neighboring", "num_examples")},
        **{name: step.get(name) for name in ("noise_multiplier", "sampling_prob", "steps")},
        **_before_training(data),
    }
    if step.get("type") not in _STEPS:
        raise ClaimError(f"a report whose steps are {str(step.get('type'))[:40]!r}: verify its ledger instead")
    clip, noise = step.get("l2_clip_norm"), step.get("noise_multiplier")
    if clip != "inf":
        values["l2_clip_norm"] = clip
    if noise == 0:
        values["sampling_prob"] = None
    return _made({name: value for name, value in values.items() if value is not None})


def _before_training(data: Mapping[object, object]) -> dict[str, object]:
    releases: list[tuple[float, int]] = []
    phases = [phase for phase in map(_object, _list(data.get("phases"))) if phase.get("name") != "train"]
    events = [(_object(phase.get("event")), phase.get("count")) for phase in phases]
    events = [(event, count) for event, count in events if event.get("type") != "non_private"]
    if len(events) == 1 and events[0][0].get("type") in _STEPS:
        event, count = events[0]
        return {
            "basis_noise_multiplier": event.get("noise_multiplier"),
            "basis_sampling_prob": event.get("sampling_prob"),
            "basis_count": count,
            "basis_charged": True,
        }
    for event, count in events:
        noise = event.get("noise_multiplier")
        if event.get("type") != "gaussian" or not isinstance(noise, float) or not isinstance(count, int) or noise <= 0:
            raise ClaimError("a report with such phases before training: verify its ledger instead")
        releases.append((noise, count))
    return {"basis_noise_multiplier": gaussian.composed(releases), "basis_charged": True} if releases else {}


def _method(data: Mapping[object, object]) -> str:
    entries = [str(_object(entry).get("method")) for entry in _list(data.get("accounting"))]
    first = entries[0].split(",")[0].split()[0].lower() if entries and entries[0] else "other"
    return {"exact": "gaussian"}.get(first, first if first in ("pld", "prv", "rdp") else "other")


def _object(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
