"""``dpsb generate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from dpsb.cli._shared import Json, app, guarded


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished causal-lm run.")],
    data: Annotated[str, typer.Option(help="File with prompts and completions, which are the references.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Write prompts, answers and references there, as JSON lines. As private as data."),
    ] = None,
    base_only: Annotated[bool, typer.Option("--base-only", help="Without the adapter: before training.")] = False,
    prompts: Annotated[int, typer.Option(min=1, help="Different prompts at most, from the top of the file.")] = 200,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 64,
    as_json: Json = False,
) -> None:
    """Lets a trained model answer the prompts of a file, greedily, and prints BLEU and ROUGE-L.

    The figures, and the answers, are computed from the file: they lie outside the guarantee of the run.

    Example: [bold]dpsb generate run --data held-out.parquet[/bold], and again with [bold]--base-only[/bold].
    """

    def run() -> None:
        from dpsb.generation import generate_for_file
        from dpsb_accounting.files import write_whole

        with Progress(console=Console(stderr=True, quiet=as_json), transient=True) as bar:
            task = bar.add_task("generating", total=None)
            found = generate_for_file(
                folder,
                data,
                base_only=base_only,
                prompts=prompts,
                max_new_tokens=max_new_tokens,
                on_batch=lambda done, of: bar.update(task, completed=done, total=of),
            )
        if out is not None:
            rows = zip(found.prompts, found.answers, found.references, strict=True)
            lines = [json.dumps({"prompt": p, "answer": a, "references": r}, ensure_ascii=False) for p, a, r in rows]
            write_whole(out, ("\n".join(lines) + "\n").encode(), mode=0o600)  # as sensitive as the file
        if as_json:
            typer.echo(json.dumps(dict(found.metrics), indent=1))
        else:
            who = "without the adapter" if base_only else "with the adapter"
            metrics = found.metrics
            typer.echo(
                f"BLEU {metrics['bleu']:.2f}, ROUGE-L {metrics['rouge_l']:.4f} on {metrics['prompts']} prompts, {who} "
                "(outside the guarantee)"
            )

    guarded(run)
