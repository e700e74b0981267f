"""The command that computes a bound from flags: `epsilon`."""

from __future__ import annotations

from dpsb_accounting import accountant
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
