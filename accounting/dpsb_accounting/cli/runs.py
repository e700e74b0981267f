"""Commands about a run that somebody handed over: `verify`, `report`, `sign`, `keygen`."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpsb_accounting import signature, strict
from dpsb_accounting.chain import SCHEMA
from dpsb_accounting.cli._shared import AsJson, LedgerPath, app, bound_json, fail, plain
from dpsb_accounting.files import write_whole
from dpsb_accounting.ledger import LEDGER_NAME, Ledger, in_use
from dpsb_accounting.record import LedgerRecord
from dpsb_accounting.report import make_report
from dpsb_accounting.report.words import up
from dpsb_accounting.verify import REPORT_NAME, Check, Verification, verify

_ALWAYS = {
    *("ledger", "last line", "repairs", "checkpoint", "checkpoint.old", "report", "ledger not behind the report"),
    *("epsilon: upper", "claim", "taints", "cross_check_reason", "accounting: version"),
}

Out = Annotated[Path | None, typer.Option("--out", help="Write there instead of printing.")]


@app.command("verify")
def verify_command(
    ledger: LedgerPath,
    report: Annotated[
        Path | None, typer.Option(help="The report to compare; otherwise report.json beside the ledger.")
    ] = None,
    check_signature: Annotated[
        Path | None,
        typer.Option(metavar="PUBLIC_KEY", help="Check the signature with this ed25519 key, PEM, got from the signer."),
    ] = None,
    signature_file: Annotated[
        Path | None, typer.Option("--signature", help="The signature; otherwise signature.json beside the ledger.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="List every check, also those that hold.")] = False,
    as_json: AsJson = False,
) -> None:
    """Verify a ledger and recompute everything its report says.

    Exit code 0 only if every check holds: each line and its hash, the plan against the charges, the report,
    and what the checkpoints and tensor files beside the ledger say of it. The chain proves that the lines are
    consistent, not that an honest program wrote them; a signature says who vouches for them.

    Example:  dpsb-accounting verify run/ledger.jsonl

    Example:  dpsb-accounting verify run/ledger.jsonl --check-signature hospital.pub
    """
    outcome = verify(ledger, report, public_key=check_signature, signature_path=signature_file)
    if as_json:
        bound = {} if outcome.epsilon is None else bound_json(outcome.epsilon)
        typer.echo(json.dumps({**outcome.to_json(), **bound}, indent=2))
    else:
        table = Table("check", "", "found", title=f"Verification of {ledger}", title_justify="left")
        shown = [check for check in outcome.checks if every or not check.ok or _matters(check)]
        for check in shown:
            table.add_row(plain(check.name), "[green]ok[/]" if check.ok else "[red]FAIL[/]", plain(check.detail))
        if len(shown) < len(outcome.checks):
            rest = f"the other {len(outcome.checks) - len(shown)} checks"
            table.add_row(rest, "[green]ok[/]", "every other key of the report is as recomputed; --all lists them")
        Console().print(table)
        if outcome.epsilon is not None:
            typer.echo(f"recomputed: {outcome.epsilon}")
            typer.echo("claim: " + (_upper(outcome) if outcome.claim else "none, see the taints and the plan"))
    if not outcome.ok:
        first = outcome.failures[0]
        fail(
            f"verification failed ({len(outcome.failures)} of {len(outcome.checks)} checks): "
            f"{first.name}: {first.detail}"
        )


def _matters(check: Check) -> bool:
    """Whether a check that holds is worth a line: what it found is more than 'the same'."""
    return check.name in _ALWAYS or check.name.endswith(".safetensors") or check.name.startswith("signature")


def _upper(outcome: Verification) -> str:
    upper = outcome.epsilon.upper if outcome.epsilon is not None else math.inf
    return f"epsilon {up(upper, 6)}" if outcome.ok else "refused, since a check failed"


@app.command("report")
def report_command(
    ledger: LedgerPath,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write one HTML file with plots; it opens offline.")
    ] = None,
    as_json: AsJson = False,
    out: Out = None,
    sign: Annotated[
        Path | None,
        typer.Option(metavar="PRIVATE_KEY", help="Then sign the ledger and the report.json beside it, as `sign` does."),
    ] = None,
) -> None:
    """Print the report that a ledger supports, recomputed now: text, JSON or HTML.

    Page one says what is claimed, page two how it was computed.

    Example:  dpsb-accounting report run/ledger.jsonl

    Example:  dpsb-accounting report run/ledger.jsonl --html report.html

    Example:  dpsb-accounting report run/ledger.jsonl --json --out run/report.json --sign hospital.key
    """
    for path in (html, None if as_json else out):
        if path is not None and path.resolve().name == REPORT_NAME:
            fail(f"{path} is where `verify` looks for JSON (--json --out); name another file to write")
    record = _ended(ledger)
    made = make_report(record)
    if html is not None:
        from dpsb_accounting.report.html import to_html

        _write(html, to_html(made, record), ledger, sign)
    if out is not None:
        _write(out, json.dumps(made.to_json(), indent=2) + "\n" if as_json else made.to_text(), ledger, sign)
    elif html is None or as_json:
        typer.echo(json.dumps(made.to_json(), indent=2) if as_json else made.to_text(), nl=as_json)
    if sign is not None:
        _sign(ledger, sign, None)


@app.command("sign")
def sign_command(
    ledger: LedgerPath,
    key: Annotated[Path, typer.Option("--key", help="Your ed25519 private key, PEM; see `keygen`.")],
    out: Out = None,
) -> None:
    """Sign a finished run: its ledger, the report and the tensor files beside it.

    Nothing is signed that does not verify. The signature goes to signature.json beside the ledger.

    Example:  dpsb-accounting sign run/ledger.jsonl --key hospital.key
    """
    _sign(ledger, key, out)


@app.command("keygen")
def keygen_command(
    private_key: Annotated[Path, typer.Argument(metavar="PRIVATE_KEY", help="New file for the private key.")],
) -> None:
    """Make an ed25519 key pair for signing: PRIVATE_KEY and PRIVATE_KEY.pub.

    Keep the first secret; give the second to auditors by a way they trust. The same with OpenSSL:
    openssl genpkey -algorithm ed25519 -out KEY && openssl pkey -in KEY -pubout -out KEY.pub

    Example:  dpsb-accounting keygen hospital.key
    """
    public = signature.make_keys(private_key)
    typer.echo(f"private key: {private_key} (keep it secret)\npublic key: {public}")


def _ended(ledger: Path) -> LedgerRecord:
    """Reads a ledger of which a report can be made: its run writes it no more."""
    if in_use(ledger):
        fail(
            f"{ledger} is being written by a run that is still going: steps and taints may follow, so that a report "
            "made now would be behind; wait until it has ended, or look at it with `dpsb-accounting verify`"
        )
    return Ledger.read(ledger)


def _sign(ledger: Path, key: Path, out: Path | None) -> None:
    outcome = verify(ledger)
    if not outcome.ok:
        fail(f"nothing was signed: {outcome.failures[0].name}: {outcome.failures[0].detail}")
    report = None if outcome.report is None else strict.mapping(strict.load(outcome.report))
    content = signature.sign(Ledger.read(ledger), report, key)
    target = out or ledger.parent / signature.SIGNATURE_NAME
    _write(target, json.dumps(content, indent=2) + "\n", ledger, key, outcome.report)
    what = "the ledger" if report is None else f"the ledger and {REPORT_NAME}"
    typer.echo(f"signed {what}: {target}", err=True)


def _write(path: Path, text: str, *read: Path | None) -> None:
    """Writes a file whole or not at all, over none that the command has read and over no ledger: that is a budget."""
    try:
        target = path.resolve()  # a link stays one
        if any(source is not None and target.exists() and target.samefile(source) for source in read):
            fail(f"{path} is what this command reads; name another file to write")
        if LEDGER_NAME in (path.name, target.name) or (target.is_file() and _is_ledger(target)):
            fail(f"{path} is a ledger, or has the name of one; name another file to write")
        if target.exists() and not target.is_file():  # a pipe or a terminal
            path.write_text(text, encoding="utf-8")
        else:
            mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o644
            write_whole(target, text.encode(), mode)
    except OSError as error:
        fail(f"cannot write {path}: {error.strerror}")


def _is_ledger(path: Path) -> bool:
    """Whether a file says of itself that it is a ledger, be it one that is damaged further down."""
    with path.open("rb") as file:
        return f'"schema":"{SCHEMA}"'.encode() in file.readline(1 << 20)
