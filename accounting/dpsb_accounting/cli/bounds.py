"""Commands that compute a bound from flags: `epsilon`, `noise-multiplier`."""

from __future__ import annotations

from typing import Annotated

import typer

from dpsb_accounting import accountant, calibrate
from dpsb_accounting.cli._shared import (
    AsJson,
    Delta,
    Neighboring,
    NoiseMultiplier,
    SamplingProb,
    Steps,
    app,
    show_bound,
)
from dpsb_accounting.events import PoissonGaussian


@app.command("epsilon")
def epsilon_command(
    noise_multiplier: NoiseMultiplier,
    sampling_prob: SamplingProb,
    steps: Steps,
    delta: Delta,
    neighboring: Neighboring = "add_or_remove_one",
    as_json: AsJson = False,
) -> None:
    """Bound the epsilon of private training with given noise.

    Example:  dpsb-accounting epsilon --noise-multiplier 1 --sampling-prob 0.01 --steps 1000 --delta 1e-5
    """
    event = PoissonGaussian(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob)
    bound = accountant.epsilon([(event, steps)], delta, neighboring)
    show_bound(bound, as_json, {})


@app.command("noise-multiplier")
def noise_multiplier_command(
    epsilon: Annotated[float, typer.Option(help="The epsilon that must not be exceeded.")],
    sampling_prob: SamplingProb,
    steps: Steps,
    delta: Delta,
    neighboring: Neighboring = "add_or_remove_one",
    as_json: AsJson = False,
) -> None:
    """Find the least noise that keeps training within a target epsilon.

    Example:  dpsb-accounting noise-multiplier --epsilon 3 --sampling-prob 0.01 --steps 1000 --delta 1e-5
    """
    noise = calibrate.noise_multiplier_for(
        target_epsilon=epsilon,
        delta=delta,
        sampling_prob=sampling_prob,
        steps=steps,
        neighboring=neighboring,
    )
    event = PoissonGaussian(noise_multiplier=noise, sampling_prob=sampling_prob)
    show_bound(accountant.epsilon([(event, steps)], delta, neighboring), as_json, {"noise_multiplier": noise})
