"""``dpsb push``: a finished run's adapter, ledger, report and card to the Hub, after a look at what would go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dpsb.cli._shared import Json, app, guarded


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    repo: Annotated[str, typer.Option(help="OWNER/NAME on the Hub; made if it is not there.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show which files would go, and which not.")] = False,
    public: Annotated[bool, typer.Option("--public", help="A repository that is made is public.")] = False,
    base_model: Annotated[str | None, typer.Option(help="The base model's name on the Hub, if it is a folder.")] = None,
    without_claim: Annotated[
        bool, typer.Option("--without-claim", help="Also a run that claims no privacy (seeded, or epsilon inf).")
    ] = False,
    local_paths: Annotated[
        bool, typer.Option("--local-paths", help="Also a ledger that names the base model by a local path.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Publishes adapter, cores, head, tokenizer, ledger, report and card of a run; nothing else of its folder goes.

    Example: [bold]dpsb push run --repo OWNER/NAME --dry-run[/bold], then without --dry-run.
    """

    def run() -> None:
        from dpsb.hub import plan_upload, push

        upload = plan_upload(folder, base_model=base_model, without_claim=without_claim, local_paths=local_paths)
        facts = {
            "repo": repo,
            "files": {name: len(content) for name, content in upload.files.items()},
            "changed": dict(upload.changed),
            "kept": dict(upload.kept),
            "pushed": not dry_run,
        }
        if not dry_run:
            facts["url"] = push(upload, repo, private=not public)
        if as_json:
            typer.echo(json.dumps(facts, indent=1))
            return
        table = Table("file", "bytes", "goes", "why")
        for name, content in upload.files.items():
            table.add_row(name, f"{len(content):,}", "yes", upload.changed.get(name, ""))
        for name, why in upload.kept.items():
            table.add_row(name, "", "no", why)
        Console().print(table)
        typer.echo(f"nothing was sent; {repo} would get these files" if dry_run else f"pushed to {facts['url']}")

    guarded(run)
