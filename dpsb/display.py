"""What the operator sees: plan, progress bar with epsilon spent, result. Screen only; nothing here is written."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dpsb.plan import cost_table
from dpsb_accounting import Phase, Plan
from dpsb_accounting import epsilon as epsilon_of

_MARKS = 20


class SpentCurve:
    """An upper bound on epsilon after so many steps, computed at 20 marks as the run passes them."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._known: dict[int, float] = {}

    def upper(self, step: int) -> float:
        """Epsilon's upper bound at the next mark at or after ``step``."""
        stride = max(1, -(-self._plan.steps // _MARKS))
        mark = min(self._plan.steps, -(-step // stride) * stride)
        if mark not in self._known:
            before = [phase for phase in self._plan.phases if phase.name != "train"]
            phases = [*before, Phase("train", self._plan.train.event, mark)]
            bound = epsilon_of(phases, delta=self._plan.delta, neighboring=self._plan.neighboring)
            self._known[mark] = bound.upper
        return self._known[mark]


class Display:
    """Status lines and, once the plan is known, a live bar with the epsilon spent so far."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps  epsilon spent [bold]{task.fields[spent]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet,
        )
        self._task: Any = None
        self._curve: SpentCurve | None = None
        self._last_line = 0.0

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def callbacks(self) -> Any:
        """What :func:`dpsb.run.fine_tune` calls."""
        from dpsb.run import Callbacks

        return Callbacks(on_status=self._status, on_plan=self._plan, on_step=self._step)

    def _status(self, message: str) -> None:
        self._console.print(f"[dim]{escape(message)}[/dim]", highlight=False)

    def _plan(self, plan: Plan) -> None:
        print_plan(self._console, plan)
        self._curve = SpentCurve(plan)

    def _step(self, progress: Any) -> None:
        if self._curve is None:
            return
        spent = f"<= {rounded_up(self._curve.upper(progress.step))}"
        if self._task is None:
            self._task = self._progress.add_task("training", total=progress.steps, spent=spent)
            if self._console.is_terminal:
                self._progress.start()
        self._progress.update(self._task, completed=progress.step, spent=spent)
        ended = progress.step == progress.steps
        if ended:
            self._progress.stop()
        elif not self._console.is_terminal and time.monotonic() - self._last_line > 10:
            self._last_line = time.monotonic()
            self._console.print(f"step {progress.step}/{progress.steps}, epsilon spent {spent}", highlight=False)


def print_plan(console: Console, plan: Plan, *, cost_table_too: bool = False) -> None:
    """The plan as a table, and what other batch sizes would cost."""
    table = Table(title="plan", show_header=False, title_justify="left")
    bound = epsilon_of(plan)
    table.add_row(
        "epsilon", f"at most {rounded_up(bound.upper)} (at least {bound.lower:.4f}) at delta {plan.delta:.3g}"
    )
    table.add_row("protects", f"one {plan.unit} ({plan.neighboring})")
    declared = "declared" if plan.num_examples_declared else "the true number, which counts as public"
    table.add_row("N", f"{plan.num_examples} ({declared})")
    table.add_row(
        "steps x sampling",
        f"{plan.steps} x q = {plan.sampling_prob:.5g} (expected batch {plan.expected_batch_size})",
    )
    table.add_row("noise", f"multiplier {plan.noise_multiplier:.4f}, clip norm {plan.l2_clip_norm:g} ({plan.clipping})")
    if not plan.is_private:
        table.add_row("claim", "none: nothing bounds what this run tells about anybody")
    for name, value in (*_what_is_read(plan.details), *basis_rows(plan.basis)):
        table.add_row(name, escape(value))
    share: Any = plan.details.get("basis_budget")
    if share is not None:
        table.add_row(
            "basis budget",
            f"{share['share']:.1%} of the squared level; alone epsilon {rounded_up(share['basis_epsilon'])}, training "
            f"alone {rounded_up(share['train_epsilon'])}",
        )
    console.print(table)
    if cost_table_too and plan.is_private:
        costs = Table(title="the same epsilon and passes over the data with other batch sizes", title_justify="left")
        for heading in ("expected batch", "steps", "noise multiplier", "noise / mean gradient (units of C)"):
            costs.add_column(heading, justify="right")
        for row in cost_table(plan):
            costs.add_row(
                f"{row['expected_batch_size']}",
                f"{row['steps']}",
                f"{row['noise_multiplier']:.4f}",
                f"{row['noise_per_step']:.3g}",
            )
        console.print(costs)


def _what_is_read(details: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Columns and labels, which nobody can see afterwards to have been others than were meant."""
    columns = details.get("columns")
    if isinstance(columns, Mapping) and any(columns.values()):
        yield "columns", ", ".join(f"{part}={name}" for part, name in columns.items() if name)
    if labels := details.get("labels"):
        yield "labels", ", ".join(map(str, labels[:12])) + (f", … ({len(labels)} in all)" if len(labels) > 12 else "")


def basis_rows(basis: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a plan states of its basis, a line each: kind, public files, what was done about their labels, the choice.

    The plan was frozen before any private example was read, so all of it is public; which file a private choice took is
    told once it is released.

    Args:
      basis: ``plan.basis``. Public.
    """
    yield "basis", f"{basis['kind']} ({basis['access']})"
    if "candidates" in basis:
        files = str(basis["candidates"]).split(", ")
        for i, file in enumerate(files, 1):
            yield f"public file {i}", f"{file} ({basis[f'labels_{i}']})"
        yield "choice", f"one of the {len(files)} files, by the private examples, in a charged release"
        return
    if "source" in basis:
        labels = f" ({basis['labels']})" if "labels" in basis else ""
        yield "basis from", f"{basis['source']}{labels}"
    if "choice" in basis:
        yield "choice", str(basis["choice"])


def print_memory(console: Console, memory: Any) -> None:
    """A :class:`dpsb.memory.MemoryPlan` as a table, in MiB."""
    console.print(
        f"memory of a step: {memory.parameters / 1e6:,.1f} M frozen parameters {_mib(memory.base_bytes)} MiB, "
        f"adapter {_mib(memory.adapter_bytes)}, optimizer {_mib(memory.optimizer_bytes)} (d = {memory.dimension:,})",
        highlight=False,
    )
    table = Table(title=f"MiB for {memory.task}, examples of {memory.max_length} tokens", title_justify="left")
    for heading in ("token budget", "examples at once", "activations kept", "rows", "peak of a step", "in all"):
        table.add_column(heading, justify="right")
    for row in memory.by_budget:
        sizes = (_mib(row[name]) for name in ("activations", "rows", "peak", "total"))
        table.add_row(f"{row['token_budget']}", f"{row['examples']}", *sizes)
    console.print(table)


def print_scaling(console: Console, scaling: Any) -> None:
    """A :class:`dpsb.distributed.scaling.ScalingPlan` in words."""
    cut = "blocks cut over them" if scaling.sharded else "a copy of the base on each"
    console.print(
        f"{scaling.world_size} processes, {cut}: {_mib(scaling.total_bytes)} MiB on each, of them "
        f"{_mib(scaling.weights_bytes)} frozen weights, at token budget {scaling.token_budget}",
        highlight=False,
    )
    console.print(
        f"a step of each: {scaling.examples_per_step:,.1f} examples, {scaling.flops_per_step / 1e12:,.1f} "
        f"Tflop, {_mib(int(scaling.sent_per_step))} MiB received; {scaling.steps:,} steps",
        highlight=False,
    )
    if scaling.seconds is not None:
        console.print(f"computing alone: {scaling.seconds / 3600:,.2f} hours at that speed", highlight=False)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def rounded_up(epsilon: float) -> str:
    """Four decimals, never below the value: what bounds must not be rounded down."""
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}" if math.isfinite(epsilon) else "inf"


def print_run(console: Console, run: Any) -> None:
    """The claim, held-out metrics and the files of a finished run."""
    facts = run.report.to_json()
    bounds = facts["epsilon"]
    if facts["claim"]:
        console.print(
            f"[bold green]epsilon <= {rounded_up(bounds['upper'])}[/bold green] at delta "
            f"{facts['delta']:.3g}, per {facts['unit']}, {facts['neighboring']}"
        )
    else:
        reasons = "; ".join(taint["reason"] for taint in facts["taints"]) or "epsilon is infinite"
        console.print(f"[bold red]no privacy claim[/bold red]: {escape(reasons)}")
    if run.held_out:
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in run.held_out.items())
        console.print(f"held-out ({numbers}): outside the guarantee")
    console.print(f"files in {run.out}: {', '.join(run.files)}", highlight=False, markup=False)
