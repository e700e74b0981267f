"""The model card of an adapter that silos trained together."""

from __future__ import annotations

from dpsb.federated.config import FederateConfig
from dpsb.federated.report import Federation


def federation_card(config: FederateConfig, federation: Federation) -> str:
    """What the adapter is and what is claimed. No metrics on private people."""
    report, run = federation.report, config.run
    rests_on = "\n".join(f"- {line}" for line in report.assumptions)
    return f"""---
library_name: peft
tags:
- lora
- differential-privacy
- dpsb
---

# Adapter trained by {len(config.silos)} silos with differential privacy

Base model `{run.model}`, task {run.task}, R-only (rank {run.rank}), averaged over {federation.state.round} rounds in
the privacy model {report.model}. It is a plain LoRA adapter; dpsb is not needed to load it.

## Privacy

{report.statement}

This rests on:

{rests_on}

To check the claim, recompute it from the silos' ledgers: `dpsb-accounting federated --model {report.model}`.
"""
