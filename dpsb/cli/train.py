"""``dpsb train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpsb.cli._shared import Json, app, guarded, train_and_print

if TYPE_CHECKING:
    from dpsb.distributed.team import Team


@app.command()
def train(
    model: Annotated[
        str | None, typer.Option(help="Folder, Hub id, 'minilm' (embedded) or 'smollm2' (from a package). Required.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Private training data: .parquet, .jsonl, .csv, a data set folder, or a Hub id. Required."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="New or empty folder for the run. Required.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings from a TOML file; an unknown key is an error.")] = None,
    task: Annotated[str | None, typer.Option(help="classification or causal-lm.")] = None,
    eval_data: Annotated[
        str | None,
        typer.Option(help="Held-out file; its metrics lie outside the guarantee.", rich_help_panel="Data"),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Data",
            help="By default the first that exists of text, text_a, sentence, premise, question, …",
        ),
    ] = None,
    text_pair_column: Annotated[
        str | None,
        typer.Option(rich_help_panel="Data", help="Second text of a pair: text_b, sentence2, hypothesis, answer, …"),
    ] = None,
    label_column: Annotated[
        str | None,
        typer.Option(rich_help_panel="Data", help="Class of a text: label, labels, category, class, intent."),
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(rich_help_panel="Data", help="Not part of the loss.")] = None,
    completion_column: Annotated[str | None, typer.Option(rich_help_panel="Data", help="What is learnt.")] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Data",
            help="The public label set: 'ham,spam', or 'from-data' to state that what the file holds is public. "
            "Rows with another label contribute zero.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(rich_help_panel="Data", help="Tokens per example; longer ones are cut. \\[default: 256]"),
    ] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            rich_help_panel="Privacy", help="Target; 'inf' trains without noise, claims nothing. \\[default: 3]"
        ),
    ] = None,
    delta: Annotated[
        float | None, typer.Option(rich_help_panel="Privacy", help="Below 1/N. \\[default: 1/(10 N)]")
    ] = None,
    num_examples: Annotated[
        int | None,
        typer.Option(
            rich_help_panel="Privacy",
            help="A declared public N, never compared with the file. Without it the true number counts as public.",
        ),
    ] = None,
    neighboring: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Privacy",
            help="add_or_remove_one (default if N is declared), zero_out (default otherwise) or replace_one.",
        ),
    ] = None,
    expected_batch_size: Annotated[
        int | None, typer.Option(rich_help_panel="Privacy", help="M; q = M/N. \\[default: 256]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(rich_help_panel="Privacy", help="Number of steps T, instead of --epochs.")
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(rich_help_panel="Privacy", help="Expected passes over the data. \\[default: 10]"),
    ] = None,
    l2_clip_norm: Annotated[
        float | None,
        typer.Option(rich_help_panel="Privacy", help="C, flat clipping of each row. \\[default: 1]"),
    ] = None,
    auto_clip: Annotated[
        bool | None,
        typer.Option("--auto-clip", rich_help_panel="Privacy", help="AUTO-S instead of flat clipping."),
    ] = None,
    adaptive_clip: Annotated[
        float | None,
        typer.Option(
            rich_help_panel="Privacy",
            help="Let C follow this quantile of the norms (0.5: median); the noisy count it takes is accounted for.",
        ),
    ] = None,
    unit_column: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Privacy",
            help="Protect people, not examples: the column that says whose an example is. N and M then count people.",
        ),
    ] = None,
    examples_per_unit: Annotated[
        int | None,
        typer.Option(rich_help_panel="Privacy", help="At most so many of a person's examples a step. \\[default: 4]"),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Adapter",
            help="sb (R-only, default), lora-xs, lora, lora-plus, ffa-lora, bitfit, head-only, full, peft:NAME, or "
            "from a public file peft:eva:FILE, peft:lora_ga:FILE.",
        ),
    ] = None,
    lora_plus_ratio: Annotated[
        float | None,
        typer.Option(rich_help_panel="Optimizer", help="lora-plus: learning rate of B over that of A. \\[default: 16]"),
    ] = None,
    rank: Annotated[int | None, typer.Option(rich_help_panel="Adapter", help="r of the cores. \\[default: 16]")] = None,
    basis: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Adapter",
            help="weight (SVD of the weights, default), random, complementary, hadamard, public:FILE (gradient of "
            "public data; of FILE,FILE,... the nearest), trained (LoRA after --warm-start-epochs), private (noisy "
            "gradient of the private data), hybrid[:FILE] (public, turned by a small private release), lora-sb:FILE "
            "(as published). private and hybrid are paid from epsilon; see dpsb basis --diagnose.",
        ),
    ] = None,
    basis_share: Annotated[
        float | None,
        typer.Option(
            rich_help_panel="Adapter",
            help="Share of the budget for a basis that is paid for, 0.0001 to 0.9. \\[default: 0.1; 0.05 from epsilon "
            "3; hybrid 0.02]",
        ),
    ] = None,
    basis_width: Annotated[
        int | None, typer.Option(rich_help_panel="Adapter", help="hybrid: public width. \\[default: 6 times the rank]")
    ] = None,
    basis_rounds: Annotated[
        int | None,
        typer.Option(
            rich_help_panel="Adapter",
            help="private: rounds of subspace iteration, 0 for one release of whole gradients. \\[default: 0, or 2 for "
            "weights wider than 1024]",
        ),
    ] = None,
    basis_clip_norm: Annotated[
        float | None,
        typer.Option(rich_help_panel="Adapter", help="Flat clipping in the basis release. \\[default: normalize]"),
    ] = None,
    basis_sampling_prob: Annotated[
        float | None,
        typer.Option(
            rich_help_panel="Adapter",
            help="Poisson draw for each basis release. \\[default: 1, all; 0.5 for subspace iteration]",
        ),
    ] = None,
    basis_choice: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Adapter",
            help="Of several public files: public (ranked by each other, default) or private (a small charged score).",
        ),
    ] = None,
    rebase_every: Annotated[
        int | None,
        typer.Option(
            rich_help_panel="Adapter",
            help="random, public: every so many steps the update goes into the frozen weights and new directions are "
            "taken. Costs no epsilon; the adapter's rank grows. \\[default: never]",
        ),
    ] = None,
    allow_non_private_basis: Annotated[
        bool | None,
        typer.Option("--allow-non-private-basis", rich_help_panel="Adapter", help="For --basis leak: claims nothing."),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(rich_help_panel="Adapter", help="Modules, comma-separated, or re:REGEX. \\[default: all-linear]"),
    ] = None,
    pooling: Annotated[
        str | None,
        typer.Option(rich_help_panel="Adapter", help="Classifier: auto (default), native or mean over the tokens."),
    ] = None,
    head_init_std: Annotated[
        float | None, typer.Option(rich_help_panel="Adapter", help="Spread of the new head's weights. \\[default: 0.3]")
    ] = None,
    warm_start: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Adapter",
            help="Public file with rows of the run's labels: the head starts as a logistic regression on them.",
        ),
    ] = None,
    warm_start_epochs: Annotated[
        int | None,
        typer.Option(
            rich_help_panel="Adapter",
            help="Passes of all that the method trains over the rows of --warm-start, without privacy and before the "
            "first private step. 5 is usual, with --basis trained. Costs no epsilon. \\[default: 0]",
        ),
    ] = None,
    warm_start_learning_rate: Annotated[
        float | None,
        typer.Option(
            "--warm-start-lr",
            "--warm-start-learning-rate",
            rich_help_panel="Optimizer",
            help="Learning rate of the passes of --warm-start-epochs. \\[default: 0.005]",
        ),
    ] = None,
    head_share: Annotated[
        float | None,
        typer.Option(
            rich_help_panel="Privacy",
            help="Clip the classification head and the adapter apart: the head's share of the squared clip norm.",
        ),
    ] = None,
    precondition: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Privacy",
            help="Public file: rows are scaled by the second moments of its gradients before they are clipped.",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--lr",
            "--learning-rate",
            rich_help_panel="Optimizer",
            help="Learning rate of the cores, or of the method's tensors. \\[default: 0.02]",
        ),
    ] = None,
    head_learning_rate: Annotated[
        float | None,
        typer.Option(
            "--head-lr",
            "--head-learning-rate",
            rich_help_panel="Optimizer",
            help="Learning rate of the classification head. \\[default: --lr]",
        ),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(rich_help_panel="Optimizer", help="constant, linear (default) or cosine.")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            rich_help_panel="Optimizer",
            help="adam (default), adamw, adam-corrected (the noise taken out of its second moment) or sgd.",
        ),
    ] = None,
    momentum: Annotated[
        float | None, typer.Option(rich_help_panel="Optimizer", help="Of sgd. \\[default: 0.9]")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(rich_help_panel="Optimizer", help="Of adamw. \\[default: 0]")
    ] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template", rich_help_panel="Data", help="Causal LM: prompts in the model's chat template."
        ),
    ] = None,
    tokens_per_example: Annotated[
        int | None,
        typer.Option(rich_help_panel="Optimizer", help="Causal LM: divide losses by this, not by own token count."),
    ] = None,
    token_budget: Annotated[
        int | None,
        typer.Option(rich_help_panel="Machine", help="Tokens per microbatch: memory and speed only. \\[default: 4096]"),
    ] = None,
    remember_frozen_blocks: Annotated[
        bool | None,
        typer.Option(
            "--remember-frozen-blocks",
            rich_help_panel="Machine",
            help="With targets in upper blocks only, or --method head-only: run the frozen blocks below once per "
            "example and keep what they return in memory. Speed and memory only.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(rich_help_panel="Machine", help="float32 (default) or bfloat16, frozen weights."),
    ] = None,
    shard_base: Annotated[
        bool | None,
        typer.Option(
            "--shard-base",
            rich_help_panel="Machine",
            help="Under torchrun: cut the frozen weights over the processes instead of a copy on each.",
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(rich_help_panel="Machine", help="Steps between checkpoints. \\[default: 25]")
    ] = None,
    allow_dropout: Annotated[
        bool | None,
        typer.Option("--allow-dropout", rich_help_panel="Machine", help="Leave the model's dropout on."),
    ] = None,
    insecure_seed: Annotated[
        int | None,
        typer.Option(rich_help_panel="Machine", help="Repeatable noise, for tests; the run claims nothing."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out; charged steps are spent.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fine-tunes on private data and writes a plain LoRA adapter, its ledger and its epsilon report.

    Example: [bold]dpsb train --model minilm --data mail.parquet --labels ham,spam --epsilon 3 --out run[/bold]
    """
    given = {
        key: value
        for key, value in locals().items()
        if value is not None and key not in ("config", "resume", "as_json")
    }

    def run() -> None:
        from dpsb.distributed.team import started_by_torchrun, team

        if not started_by_torchrun():
            lead(None)
            return
        with team() as processes:
            if processes.leads:
                lead(processes)
            else:
                from dpsb.distributed.assist import assist

                assist(processes)

    def lead(team: Team | None) -> None:
        from dpsb.config import make_config
        from dpsb.config_file import read_config
        from dpsb.run import fine_tune, resumed_config

        settings = {**(read_config(config) if config else {}), **given}
        if resume:
            chosen = resumed_config(str(settings.get("out", "")), {k: v for k, v in settings.items() if k != "out"})
        else:
            chosen = make_config(settings)
        train_and_print(lambda callbacks: fine_tune(chosen, resume=resume, callbacks=callbacks, team=team), as_json)

    guarded(run)
