"""What of a run goes to the Hub, and nothing else: a list of names, and a copy that was read through first."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpsb.artifacts import CORE_NAME, HUB_NAMES
from dpsb.basis.stage import CHOICE_NAME
from dpsb.models import HEAD_FILE
from dpsb.run import SETTINGS_NAME, RunError
from dpsb.serving.adapters import CONFIG, TOKENIZER_FILES, WEIGHTS
from dpsb_accounting import Ledger, LedgerRecord
from dpsb_accounting.ledger import LEDGER_NAME

REPORT, CARD, SIGNATURE = "report.json", "README.md", "signature.json"
ALLOWED = (WEIGHTS, CONFIG, CORE_NAME, HEAD_FILE, CHOICE_NAME, LEDGER_NAME, REPORT, CARD, SIGNATURE, *TOKENIZER_FILES)
"""Every name that may go. Whatever else a folder holds stays: checkpoints, settings, states, logs, data."""
_NEEDED = (WEIGHTS, CONFIG, LEDGER_NAME, REPORT, CARD)
_KEPT = {
    SETTINGS_NAME: "settings, with local paths",
    "checkpoint": "a state for --resume",
    "start.safetensors": "a state for --resume",
    "basis.safetensors": "a state for --resume",
}
_JSON = (CONFIG, REPORT, "tokenizer_config.json")
"""In these and in the card a model's name may stand; what looks like one in a vocabulary or a template is a token."""
_PATH = re.compile(r"(?:/|~/|\.{1,2}/|[A-Za-z]:[\\/]|\\\\)\S")
"""How a name of a local file begins; a Hub id is ``name`` or ``owner/name``."""
_WHOLE = r"(?<![\w/\\.-]){}(?![\w/\\-]|\.\w)"
"""A path in a text that is no part of a longer one."""
_FILES = re.compile(r",\s*|^(?:public|hybrid|lora-sb|peft:\w+):")
"""What stands before each file in a list of them, as a basis names its public files."""


@dataclass(frozen=True)
class Upload:
    """What would go to the Hub.

    Args:
      folder: The run.
      files: Names and contents, as they would go.
      changed: Of those that differ from the run's: name, and what was changed. The run's own files stay as they are.
      kept: What stays, and why.
    """

    folder: Path
    files: Mapping[str, bytes]
    changed: Mapping[str, str]
    kept: Mapping[str, str]


def plan_upload(
    folder: Path, *, base_model: str | None = None, without_claim: bool = False, local_paths: bool = False
) -> Upload:
    """Decides what of a finished run may be published. Sends nothing.

    Guarantees:
      * Only names in :data:`ALLOWED`, never a folder inside the run's, never a link.
      * Metrics on held-out people, which the guarantee does not cover, are taken out of the report.
      * Where the adapter names its base model by a local folder, the Hub's name is put there; any other local path in a
        file of text is an error.

    Args:
      folder: A finished run of an adapter.
      base_model: The base model's name on the Hub, if it was loaded from a folder.
      without_claim: Also a run that claims nothing (seeded, or without noise).
      local_paths: Also a ledger that names the base model by a local path. A ledger cannot be changed afterwards.

    Raises:
      RunError: If the run is not finished, claims nothing, or would give away a local path.
    """
    for name in _NEEDED:
        if not (folder / name).is_file():
            raise RunError(
                f"{folder} is no finished run of an adapter: {name} is missing. A run of head-only, bitfit or full "
                "holds a whole model, which the Hub's own tools push."
            )
    record = Ledger.read(folder / LEDGER_NAME)
    if not without_claim and (record.taints or not record.plan.is_private):
        raise RunError(f"The run in {folder} claims no privacy; --without-claim pushes it anyway.")
    files, kept = {}, {}
    for path in sorted(folder.iterdir()):
        if path.name in ALLOWED and path.is_file() and not path.is_symlink():
            files[path.name] = path.read_bytes()
        else:
            kept[path.name] = _KEPT.get(path.name, "not on the list of what is published")
    changed = _without_metrics(files) | _with_base_model(files, record, base_model, local_paths)
    if changed and files.pop(SIGNATURE, None) is not None:
        kept[SIGNATURE] = f"it is for the run's own files, and {', '.join(changed)} would differ"
    _check_paths(files, local_paths)
    return Upload(folder, files, changed, kept)


def push(upload: Upload, repo: str, *, private: bool = True, api: Any = None) -> str:
    """Sends what was planned, through huggingface_hub and with the token that it finds.

    Args:
      upload: From :func:`plan_upload`.
      repo: ``"owner/name"``; made if it is not there.
      private: Whether a repository that is made is private.
      api: A ``huggingface_hub.HfApi``, or something like it.

    Returns:
      Where it is.

    Raises:
      RunError: If the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi() if api is None else api
    with tempfile.TemporaryDirectory(prefix="dpsb-push-") as scratch:
        for name, content in upload.files.items():
            (Path(scratch) / name).write_bytes(content)
        try:
            api.create_repo(repo_id=repo, private=private, exist_ok=True, repo_type="model")
            done = api.upload_folder(
                repo_id=repo,
                repo_type="model",
                folder_path=scratch,
                allow_patterns=sorted(upload.files),
                commit_message="Adapter, ledger and privacy report of a dpsb run",
            )
        except HfHubHTTPError as error:
            status = getattr(getattr(error, "response", None), "status_code", "no answer")
            raise RunError(f"The Hub refused {repo!r} ({status}); is the token for it (`hf auth login`)?") from None
        except OSError as error:
            raise RunError(f"The Hub cannot be reached ({type(error).__name__}).") from None
    return str(getattr(done, "repo_url", None) or repo)


def _without_metrics(files: dict[str, bytes]) -> dict[str, str]:
    """Takes held-out metrics out of the report: they are computed on people, without noise."""
    report = json.loads(files[REPORT])
    if "held_out" not in report:
        return {}
    del report["held_out"]
    files[REPORT] = (json.dumps(report, indent=2) + "\n").encode()
    return {REPORT: "held-out metrics taken out"}


def _with_base_model(
    files: dict[str, bytes], record: LedgerRecord, given: str | None, local_paths: bool
) -> dict[str, str]:
    """Puts the base model's name on the Hub in the place of a local folder."""
    stated = str(record.plan.details.get("model", ""))
    found = str(json.loads(files[CONFIG]).get("base_model_name_or_path") or "")
    local = [name for name in dict.fromkeys((found, stated)) if _PATH.match(name) or Path(name).is_dir()]
    local += [name.rstrip("/\\") for name in local if name.endswith(("/", "\\"))]
    name = given or HUB_NAMES.get(stated)
    if not local:
        return {}
    if name is None:
        raise RunError("The adapter names its base model by a local folder; give its name on the Hub: --base-model ID.")
    changed = {}
    whole = re.compile("|".join(_WHOLE.format(re.escape(path)) for path in local))
    for file in (file for file in (*_JSON, CARD) if file in files):
        text = files[file].decode()
        if file == CARD:
            new = rest = whole.sub(lambda _found: name, text)
            spelled = local
        else:
            content = json.loads(text)
            renamed = _renamed(content, local, name)
            new = text if renamed == content else json.dumps(renamed, indent=2, ensure_ascii=False) + "\n"
            rest = json.dumps(renamed, ensure_ascii=False)
            spelled = [json.dumps(path, ensure_ascii=False)[1:-1] for path in local]
        if not local_paths and any(path in rest.replace(name, "") for path in spelled):
            raise RunError(
                f"{file} names something in or beside the base model's local folder; write it in another way, or "
                "--local-paths publishes it."
            )
        if new != text:
            files[file] = new.encode()
            changed[file] = f"base model named {name}"
    return changed


def _renamed(value: Any, local: Sequence[str], name: str) -> Any:
    """JSON with a name in the place of every text that is one of ``local`` as a whole."""
    if isinstance(value, dict):
        return {key: _renamed(inner, local, name) for key, inner in value.items()}
    if isinstance(value, list):
        return [_renamed(inner, local, name) for inner in value]
    return name if value in local else value


def _check_paths(files: Mapping[str, bytes], local_paths: bool) -> None:
    fixed = (LEDGER_NAME, CHOICE_NAME)
    for name, content in files.items():
        if name not in (*_JSON, *fixed) or (local_paths and name in fixed):
            continue
        for line in content.decode().splitlines() if name == LEDGER_NAME else [content.decode()]:
            if (key := next(_local(json.loads(line)), None)) is not None:
                more = "; --local-paths publishes it, as what a ledger binds cannot be changed" if name in fixed else ""
                raise RunError(f"{name} would give away a local path ({key}){more}.")


def _local(value: Any, key: str = "") -> Iterator[str]:
    """Where local paths stand in JSON, without what they say."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _local(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _local(inner, key)
    elif isinstance(value, str) and any(_PATH.match(part) for part in _FILES.split(value)):
        yield key
