"""From the arguments of a private Trainer to the frozen plan of its run, and back: a plan cannot change on resume."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Any

from dpsb.adapter import Adapter
from dpsb.head_share import clip_parts
from dpsb.models import target_shapes
from dpsb.plan import differing, make_plan
from dpsb.sampling import length_buckets
from dpsb.trainer.arguments import PrivacyArguments
from dpsb.trainer.examples import Form
from dpsb.trainer.files import TrainerRunError
from dpsb_accounting import Plan


def plan_of(
    privacy: PrivacyArguments,
    args: Any,
    adapter: Adapter,
    form: Form,
    dataset: Sized,
    start_sha256: str,
    existing: Plan | None = None,
) -> Plan:
    """The plan that the arguments ask for; with ``existing`` it must come to the same, noise multiplier included.

    Args:
      privacy, args: What the user stated; T is ``args.max_steps`` or follows from ``args.num_train_epochs``.
      adapter: As training starts with it.
      form: What examples look like.
      dataset: Looked at, for its length, only where ``privacy.num_examples`` is None.
      start_sha256: Binds the plan to where training starts.
      existing: The plan of the run that goes on.

    Raises:
      ValueError: If an argument is out of range.
      TrainerRunError: If ``existing`` is another plan; the message names what differs.
    """
    stepwise = args.max_steps > 0
    parts = {} if privacy.head_share is None else {"clip_parts": clip_parts(adapter, privacy.head_share)}
    plan = make_plan(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        num_examples=len(dataset) if privacy.num_examples is None else privacy.num_examples,
        num_examples_declared=privacy.num_examples is not None,
        expected_batch_size=privacy.expected_batch_size,
        steps=args.max_steps if stepwise else None,
        epochs=None if stepwise else float(args.num_train_epochs),
        neighboring=privacy.neighboring,
        l2_clip_norm=privacy.l2_clip_norm,
        clipping=privacy.clipping,
        adaptive_quantile=privacy.adaptive_clip or 0.5,
        basis=adapter.provenance.to_json(),
        noise_multiplier=None if existing is None else existing.noise_multiplier,
        details={**_details(args, adapter, form, start_sha256), **parts},
    )
    if existing is not None and plan != existing:
        odd = ", ".join(differing(plan, existing))
        raise TrainerRunError(f"The arguments differ from the run's plan in {odd}; a plan cannot change on resume.")
    return plan


def _details(args: Any, adapter: Adapter, form: Form, start_sha256: str) -> dict[str, Any]:
    model: Any = adapter.model
    base = model.get_base_model()
    name = str(getattr(base.config, "_name_or_path", "") or type(base).__name__)
    labels = (getattr(base.config, "id2label", None) or {}) if form.task == "classification" else {}
    return {
        "model": Path(name).name if Path(name).exists() else name,
        "method": "sb",
        "basis": adapter.provenance.kind,
        "start_sha256": start_sha256,
        "task": form.task,
        "rank": adapter.cores[0].up.core.in_features,
        "targets": f"{len(adapter.cores)} layers",
        "target_shapes": target_shapes(model),
        "max_length": form.max_length,
        "length_buckets": list(length_buckets(form.max_length)),
        "labels": [str(labels[key]) for key in sorted(labels)],
        "labels_origin": "model config" if labels else "none",
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "weight_decay": float(args.weight_decay),
        "learning_rate": float(args.learning_rate),
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
    }
