"""``dpsb federate``: simulate, report, init, server and silo."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dpsb.cli._shared import Json, app, fail, guarded

federate = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Several silos train one adapter together and exchange only the small cores R.\n\n"
    "Every silo adds its own noise and keeps its own ledger; nobody has to be trusted with its data. Start with "
    "[bold]dpsb federate simulate --config examples/federated_mail/fed.toml[/bold].",
)
app.add_typer(federate, name="federate")


@federate.command()
def simulate(
    config: Annotated[Path, typer.Option(help="Settings (TOML): those of dpsb train, [federation], [silos.NAME].")],
    out: Annotated[Path | None, typer.Option(help="Folder of the federation; takes the place of the file's.")] = None,
    engine: Annotated[
        str, typer.Option(help="local: plain calls. flower: every message through Flower's simulation engine (Ray).")
    ] = "local",
    as_json: Json = False,
) -> None:
    """Runs a federation on this machine, in one process: to try out settings before anything is deployed.

    The file says on which data (one file that is split by a column, or one for each silo), which model, how many
    rounds, how many private steps between two averages, and each silo's epsilon.

    The folder then holds a folder for each silo (policy, ledger, replies), the server's checkpoint, a plain LoRA
    adapter and one report. Kill it at any time and start it again: it goes on at the round that is open.

    Example: [bold]dpsb federate simulate --config examples/federated_mail/fed.toml --out fed-run[/bold]
    """

    def run() -> None:
        _end_like_an_interrupt()
        from dpsb.federated.config import read_federation
        from dpsb.federated.simulate import Callbacks
        from dpsb.federated.simulate import simulate as run_simulation

        settings = read_federation(config, None if out is None else str(out))
        console = Console(stderr=as_json, quiet=as_json)
        with _bar(console) as progress:
            task = progress.add_task("training", total=None, round="")

            def on_terms(terms: Any, policies: Mapping[str, Any]) -> None:
                _show_terms(console, terms, policies)
                progress.update(task, total=terms.rounds * len(terms.silos))

            finished = run_simulation(
                settings,
                engine=engine,
                callbacks=Callbacks(
                    on_status=lambda message: console.print(f"[dim]{escape(message)}[/dim]", highlight=False),
                    on_terms=on_terms,
                    on_reply=lambda reply: progress.update(
                        task, advance=_rounds_done(reply), round=f"round {reply.round + 1}"
                    ),
                    on_round=lambda record: _show_round(console, record),
                    on_problem=lambda reason: console.print(f"[yellow]{escape(reason)}[/yellow]", highlight=False),
                ),
            )
        _print(finished.federation, finished.out, finished.held_out, as_json)

    def stoppable() -> None:
        try:
            run()
        except KeyboardInterrupt:
            fail("interrupted; charged steps are spent, the same command goes on at the round that is open.")

    guarded(stoppable)


@federate.command()
def report(
    out: Annotated[Path, typer.Argument(help="Folder of a federation.")],
    as_json: Json = False,
) -> None:
    """Recomputes the report of a federation, finished or not, from its silos' ledgers.

    Exit code 0 only if the federation as a whole may claim its epsilon.

    Example: [bold]dpsb federate report fed-run[/bold]
    """

    def run() -> None:
        from dpsb.federated.report import federation_report

        _print(federation_report(out), out, {}, as_json)

    guarded(run)


@federate.command()
def audit(
    config: Annotated[Path, typer.Option(help="Settings (TOML) of the federation, as for simulate.")],
    out: Annotated[Path, typer.Option(help="New folder of the audit.")],
    silo: Annotated[str | None, typer.Option(help="Whose releases are attacked. \\[default: the first]")] = None,
    canaries: Annotated[int, typer.Option(help="Gradient canaries, at most the number of trained numbers.")] = 3000,
    confidence: Annotated[float, typer.Option(help="Probability that the bound holds.")] = 0.95,
    as_json: Json = False,
) -> None:
    """Simulates a federation once more with canaries at one silo; writes what that proves about its epsilon.

    Every ledger of the simulation is tainted, and its model is not for release. Exit code 1 if the claim is refuted.

    Example: [bold]dpsb federate audit --config fed.toml --out fed-audit[/bold]
    """

    def run() -> None:
        from dpsb.federated.audit import audit_federation
        from dpsb.federated.config import read_federation

        found = audit_federation(read_federation(config), out, host=silo, canaries=canaries, confidence=confidence)
        content = found.content
        if as_json:
            typer.echo(json.dumps(content, indent=1))
        else:
            line = (
                f"silo {content['silo']}, {content['model']}: epsilon is at least {content['epsilon_lower']:.4g}, "
                f"claimed is at most {content['claimed_epsilon']:.4g}; page: {found.out}/audit.html"
            )
            Console().print(escape(line), highlight=False, soft_wrap=True)
        if content["refuted"]:
            raise RuntimeError("the claim is refuted: the attack proves a larger epsilon. Do not rely on it.")

    guarded(run)


@federate.command()
def init(
    config: Annotated[Path, typer.Option(help="Settings (TOML), as for simulate; every silo declares num_examples.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the server; takes the place of the file's.")] = None,
    host: Annotated[
        str, typer.Option(help="Names and addresses under which silos reach the server, comma-separated.")
    ] = "127.0.0.1,localhost",
    port: Annotated[int, typer.Option(help="Port of the server.")] = 8800,
) -> None:
    """Prepares a deployment: the server's folder, certificates, and a folder to carry to each silo. Reads no data.

    Example: [bold]dpsb federate init --config fed.toml --out fed --host fed.example.org[/bold]
    """

    def run() -> None:
        _end_like_an_interrupt()
        from dpsb.federated.config import read_federation
        from dpsb.federated.flower.setup import FOR_SILOS, initialize

        settings = read_federation(config, None if out is None else str(out), needs_data=False)
        hosts = [name.strip() for name in host.split(",") if name.strip()]
        made = initialize(settings, hosts, port, typer.echo)
        secure = settings.federation.noise == "skellam"
        keys = ", exchanges public keys with the other silos (`dpsb federate key`)" if secure else ""
        typer.echo(
            f"wrote {made}. Carry each folder under {made / FOR_SILOS} to its silo and delete it here. A silo reads "
            f"policy.toml, names its data in silo.toml{keys} and starts `dpsb federate silo FOLDER`. Here: "
            f"`dpsb federate server {made}`"
        )

    guarded(run)


@federate.command()
def key(
    folder: Annotated[Path, typer.Argument(help="The silo's folder, from init.")],
    peer: Annotated[
        list[Path] | None, typer.Option(help="sum.pub of another silo, got from that silo; may be given several times.")
    ] = None,
) -> None:
    """For secure sums: makes a silo's key, on its own machine, or adds other silos' public keys to its policy.

    The key stays in the silo's folder. sum.pub goes to the other silos, not by way of the server, which could put its
    own in its place; silos compare the digits by telephone.

    Example: [bold]dpsb federate key north[/bold], then [bold]dpsb federate key north --peer south.pub[/bold]
    """

    def run() -> None:
        from dpsb.federated.config import settings_in
        from dpsb.federated.secure.keys import add_peers, make_key, read_public

        silos = settings_in(folder).silos
        if peer:
            policy = add_peers(folder, peer, silos)
            missing = sorted(set(silos) - set(policy.peers) - {policy.silo})
            typer.echo("".join(f"{name} {public}\n" for name, public in sorted(policy.peers.items())), nl=False)
            typer.echo(f"still missing: {', '.join(missing)}" if missing else "the public keys of all silos are there")
            return
        path = make_key(folder)
        name, public = read_public(path)
        typer.echo(f"{name} {public}\nGive {path} to the other silos, not by way of the server.")

    guarded(run)


@federate.command()
def server(
    out: Annotated[Path, typer.Argument(help="Folder that init made.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8800,
    patience: Annotated[float, typer.Option(help="Seconds to wait for silos to appear.")] = 600.0,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a round's replies.")] = 3600.0,
    as_json: Json = False,
) -> None:
    """Runs the rounds of a deployment over TLS, then writes adapter and report. Killed, it goes on when started again.

    Example: [bold]dpsb federate server fed --host 0.0.0.0[/bold], behind a proxy that lets silos reach /v1/fleet/ only.
    """

    def run() -> None:
        from dpsb.federated.flower.serving import serve_federation

        _end_like_an_interrupt()
        console = Console(stderr=as_json, quiet=as_json)
        finished = serve_federation(
            out,
            host,
            port,
            patience=patience,
            timeout=timeout,
            on_status=lambda message: console.print(f"[dim]{escape(message)}[/dim]", highlight=False),
        )
        _print(finished, out, {}, as_json)

    guarded(run)


@federate.command()
def silo(
    folder: Annotated[Path, typer.Argument(help="The silo's folder, from init.")],
    part: Annotated[
        str, typer.Option(help="all, worker (has the data) or node (Flower's SuperNode): two parts for two users.")
    ] = "all",
    node_folder: Annotated[Path | None, typer.Option(help="Of the node. \\[default: FOLDER/node]")] = None,
    group: Annotated[str | None, typer.Option(help="Group whose members may reach the worker; else its owner.")] = None,
) -> None:
    """Runs a silo until it is stopped: it loads its model once, and answers rounds within its policy and its ledger.

    Example: [bold]dpsb federate silo north[/bold]
    """

    def run() -> None:
        from dpsb.federated.flower.setup import run_silo

        _end_like_an_interrupt()
        console = Console(stderr=True)
        run_silo(
            folder,
            part=part,
            node_folder=node_folder,
            group=group,
            on_status=lambda message: console.print(f"[dim]{escape(message)}[/dim]", highlight=False),
            on_problem=lambda reason: console.print(f"[yellow]{escape(reason)}[/yellow]", highlight=False),
            on_reply=lambda reply: console.print(_answered(reply), highlight=False, markup=False),
        )

    guarded(run)


def _end_like_an_interrupt() -> None:
    """Lets SIGTERM, with which services are stopped, end what this process started, as Ctrl-C does."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _rounds_done(reply: Any) -> int:
    """What a reply adds to the progress: nothing where it is a note of a secure sum."""
    return 0 if hasattr(reply, "phase") else 1


def _answered(reply: Any) -> str:
    why, phase = getattr(reply, "message", None), getattr(reply, "phase", None)
    sent = "sent an update" if phase is None else f"a secure sum, {phase}"
    return f"round {reply.round + 1}: " + (sent if why is None else f"refused: {why}")


def _print(federation: Any, out: Path, held_out: Mapping[str, float], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**federation.to_json(held_out), "out": str(out)}, indent=1))
    else:
        from dpsb_accounting.cli.federation import show_federation

        show_federation(federation.report)
        console = Console()
        state = federation.state
        used = [len(record.silos) for record in state.history]
        console.print(
            f"rounds: {state.round} of {state.terms.rounds}, replies used: {sum(used)} of "
            f"{state.round * len(state.terms.silos)}",
            highlight=False,
        )
        for silo, why in state.left.items():
            console.print(f"{silo} left: {why}", highlight=False, markup=False)
        for silo in federation.never:
            console.print(
                f"{silo} has no ledger here: nothing of it was used, and the claim leaves it out.", markup=False
            )
        if held_out:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in held_out.items())
            console.print(f"held-out ({numbers}): outside the guarantee")
        console.print(f"files in {out}: adapter/, server/, silos/, report.json", highlight=False, markup=False)
    if not federation.report.claim:
        fail(federation.report.statement)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]replies"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[round]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet or not console.is_terminal,
    )


def _show_terms(console: Console, terms: Any, policies: Mapping[str, Any]) -> None:
    table = Table(title=f"federation, model {terms.model.value}", title_justify="left")
    for heading in ("silo", "epsilon at most", "q", "noise multiplier"):
        table.add_column(heading, justify="left" if heading == "silo" else "right")
    for name, asked in terms.silos.items():
        table.add_row(
            escape(name),
            f"{policies[name].max_epsilon:g}",
            f"{asked.sampling_prob:.4g}",
            f"{asked.noise_multiplier:.4f}",
        )
    console.print(table)
    console.print(f"{terms.rounds} rounds of {terms.local_steps} private steps in each silo", highlight=False)


def _show_round(console: Console, record: Any) -> None:
    if record.lost or not console.is_terminal:
        lost = "".join(f"; {name} lost ({why})" for name, why in record.lost.items())
        console.print(f"round {record.round + 1}: {len(record.silos)} silos{lost}", highlight=False, markup=False)
