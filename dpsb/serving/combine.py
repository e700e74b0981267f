"""Sums of adapters on one basis, and what the sum of their runs costs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpsb.folders import check_new, new_folder
from dpsb.run import RunError
from dpsb.serving.adapters import TOKENIZER_FILES, copy_plain_files, read_core_adapter, write_plain_adapter
from dpsb_accounting import Bound, Ledger, LedgerRecord, epsilon, make_report
from dpsb_accounting.ledger import LEDGER_NAME
from dpsb_accounting.plan import number_to_json


def combined_bound(records: Sequence[LedgerRecord], *, disjoint_people: bool) -> Bound:
    """Bounds on epsilon of several runs whose results are published together.

    On the same people the runs compose: all their events together, at the largest of their deltas. Where nobody's data
    is in two of the runs, each person is protected by the one run that reads it, so that the largest of the runs'
    epsilons (at that delta) holds for all (parallel composition).

    Args:
      records: Ledgers of different runs.
      disjoint_people: That no person has data in two of the runs; **the caller vouches for that**.

    Raises:
      RunError: If a run is named twice, makes no claim, or the runs protect different units or relations.
      ValueError: If the largest delta of the runs is not below 1/N of each.

    References:
      McSherry (2009), Theorem 4 (parallel composition).
    """
    plans = [record.plan for record in records]
    if len({record.run_id for record in records}) < len(records):
        raise RunError("Two of the ledgers are of the same run.")
    for name in ("neighboring", "unit"):
        found = sorted({str(getattr(plan, name)) for plan in plans})
        if len(found) > 1:
            raise RunError(f"The runs state different {name}: {', '.join(found)}; their epsilons cannot be combined.")
    for record in records:
        if record.taints or not record.plan.is_private:
            raise RunError(f"Run {record.run_id} makes no claim, so no sum that holds it does.")
    delta = max(plan.delta for plan in plans)
    for record in records:
        record.plan.check_delta(delta, f" of run {record.run_id}")
    if not disjoint_people:
        parts = [(phase.event, phase.count) for plan in plans for phase in plan.phases]
        return replace(epsilon(parts, delta, plans[0].neighboring), unit=plans[0].unit)
    return max((epsilon(plan, delta) for plan in plans), key=lambda bound: bound.upper)


def combine(
    runs: Sequence[Path], out: Path, *, weights: Sequence[float] | None = None, disjoint_people: bool = False
) -> dict[str, Any]:
    """Writes the weighted sum of R-only adapters on one basis as a plain LoRA adapter, with what it claims.

    As every run's update is s B R A with the same A and B, the sum of the updates is the update of the sum of the R;
    heads are summed with the same weights.

    Args:
      runs: Folders of finished R-only runs.
      out: New folder; also gets ``claim.json`` and the ledgers that it follows from.
      weights: One for each run, by default all the same and 1 together.
      disjoint_people: See :func:`combined_bound`.

    Returns:
      The content of ``claim.json``.

    Raises:
      RunError: If runs are not finished, have different bases, or their epsilons cannot be combined.
      FileExistsError: If ``out`` holds something.
    """
    if len(runs) < 2:
        raise RunError(f"Expected at least two runs to combine, got {len(runs)}.")
    check_new(out)
    shares = [1.0 / len(runs)] * len(runs) if weights is None else list(weights)
    if len(shares) != len(runs):
        raise RunError(f"Expected one weight for each of {len(runs)} runs, got {len(shares)}.")
    adapters = [read_core_adapter(run) for run in runs]
    for run, adapter in zip(runs[1:], adapters[1:], strict=True):
        if (odd := adapters[0].same_basis(adapter)) is not None:
            raise RunError(f"{run} cannot be added to {runs[0]}: they differ in {odd}.")
    records = [Ledger.read(run / LEDGER_NAME) for run in runs]
    bound = combined_bound(records, disjoint_people=disjoint_people)
    claim = {
        "epsilon": {"lower": number_to_json(bound.lower), "upper": number_to_json(bound.upper)},
        "delta": bound.delta,
        "unit": bound.unit,
        "neighboring": bound.neighboring,
        "assumptions": _assumptions(records),
        "composition": "parallel: nobody has data in two runs" if disjoint_people else "sequential: the same people",
        "runs": [
            {"run_id": r.run_id, "ledger_head": r.head, "weight": w} for r, w in zip(records, shares, strict=True)
        ],
    }
    with new_folder(out) as new:
        parts = {
            name: _sum([getattr(adapter, name) for adapter in adapters], shares) for name in ("R", "direct", "head")
        }
        write_plain_adapter(replace(adapters[0], **parts), new)
        for pattern in TOKENIZER_FILES:
            copy_plain_files(runs[0], pattern, new)
        (new / "ledgers").mkdir()
        for run, record in zip(runs, records, strict=True):
            shutil.copyfile(run / LEDGER_NAME, new / "ledgers" / f"{record.run_id}.jsonl")
        (new / "claim.json").write_text(json.dumps(claim, indent=1) + "\n")
    return claim


def _assumptions(records: Sequence[LedgerRecord]) -> list[str]:
    found: list[Any] = [make_report(record).to_json()["assumptions"] for record in records]
    return list(dict.fromkeys(str(line) for lines in found for line in lines))


def _sum(parts: Sequence[Mapping[str, torch.Tensor]], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    return {
        name: sum(w * part[name].double() for w, part in zip(weights, parts, strict=True)).to(value.dtype)  # type: ignore[union-attr]
        for name, value in parts[0].items()
    }
