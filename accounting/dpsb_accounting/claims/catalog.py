"""The catalogue: what each kind of finding means, what to do about it, and where that is written down."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Explanation:
    """What one kind of finding means; `severity` is the usual one."""

    id: str
    severity: str
    title: str
    meaning: str
    action: str
    source: str


_COMPOSITION = "Zhu, Dong and Wang (2022), arXiv:2106.08567"
_DPSGD = "Abadi et al. (2016), arXiv:1607.00133"
_DPFY = "Ponomareva et al. (2023), 'How to DP-fy ML', arXiv:2303.00654"
_NIST = "NIST SP 800-226 (2025)"
_SHUFFLE = "Chua et al. (2024), arXiv:2403.17673 and arXiv:2411.04205"

_ENTRIES = (
    ("not-a-claim", "error", "epsilon or delta is not stated",
     "A privacy claim is a pair (epsilon, delta) together with what it protects. Without both numbers nothing "
     "is said.",
     "Ask for both numbers.", "Dwork et al. (2006), EUROCRYPT"),
    ("no-guarantee", "error", "the claim itself is that there is none",
     "Epsilon is infinite, or the report says that it makes no claim.",
     "Treat the model as trained without privacy.", _NIST),
    ("missing-fact", "warning", "a fact that decides epsilon is not stated",
     "The message names the field and what cannot be checked without it.",
     "Ask for the fact; add it to the claim.", _DPFY),
    ("epsilon-understated", "error", "epsilon is larger than claimed",
     "With the noise, the rate, the steps and delta that the claim states, bounds on epsilon were computed; "
     "the claim lies below the lower bound, or so far below the upper one that rounding cannot explain it.",
     "Claim the recomputed upper bound, or train with more noise.", _COMPOSITION),
    ("epsilon-rounded-down", "warning", "epsilon was rounded down",
     "The claim lies below what was recomputed by no more than half a per cent.",
     "Round epsilon up, never to the nearest.", _COMPOSITION),
    ("epsilon-not-confirmed", "warning", "epsilon lies between the bounds",
     "The claim is above what is certainly leaked and below what is certainly enough: it may be right, but no bound "
     "computed here proves it.",
     "Ask for the proof or claim the upper bound.", _COMPOSITION),
    ("epsilon-overstated", "info", "epsilon is smaller than claimed",
     "The claim is valid but loose, often because of Rényi accounting.",
     "A tighter accountant allows less noise at the same claim.", "Gopi et al. (2021), arXiv:2106.02848"),
    ("not-recomputable", "warning", "epsilon could not be recomputed",
     "Facts are missing, or no engine here knows a rigorous bound for this combination.",
     "The claim stands unconfirmed.", _NIST),
    ("delta-too-large", "error", "delta is 1/n or more",
     "At delta = 1/n a mechanism that publishes one record at random, in full, is private. Such a delta "
     "protects nobody.",
     "Use a delta far below 1/n, such as n^-1.1 or 1e-6, and recompute epsilon there.", _DPFY),
    ("delta-one-over-batches", "error", "delta is 1 / number of batches",
     "len(loader) is the number of batches, not of records: this delta is about batch size / n, above 1/n.",
     "Use a delta far below 1/n, and recompute epsilon there.", _DPFY),
    ("delta-near-one-over-n", "info", "delta is close to 1/n",
     "delta lies between n^-1.1 and 1/n: accepted by many, but not far below 1/n.",
     "Prefer a smaller delta.", _DPFY),
    ("delta-changed", "error", "noise was chosen for another delta than the one claimed",
     "Epsilon belongs to its delta. A target met at one delta is not met at a smaller one.",
     "State epsilon at the delta that is claimed.", _DPFY),
    ("delta-zero", "error", "delta is zero",
     "Gaussian noise gives no finite epsilon at delta = 0.",
     "State a positive delta.", "Balle and Wang (2018), arXiv:1805.06530"),
    ("shuffled-as-poisson", "error", "Poisson accounting for shuffled batches",
     "A shuffled loader puts each record in exactly one batch an epoch. That is not Poisson sampling, and "
     "amplification by Poisson sampling does not hold for it: the lower bound shows what an attacker certainly "
     "learns from the largest coordinate of an epoch. What does hold is one Gaussian an epoch. Batches that "
     "partition the data have no add_or_remove_one relation, so both bounds are for zero_out.",
     "Sample with Poisson batches, or claim the upper bound.", _SHUFFLE),
    ("fixed-order-as-poisson", "error", "Poisson accounting for batches in a fixed order",
     "An order that is fixed or known hides nothing: E epochs are exactly one Gaussian of noise multiplier "
     "sigma/sqrt(E).",
     "Sample with Poisson batches, or claim the recomputed epsilon.", _SHUFFLE),
    ("fixed-size-as-poisson", "error", "Poisson accounting for batches of a fixed size",
     "A fresh batch of fixed size in each step is sampling without replacement. Its bound is for replace_one, "
     "where the sum moves by twice the clip norm.",
     "Sample with Poisson batches, or claim the recomputed upper bound.",
     "Wang, Balle and Kasiviswanathan (2019), arXiv:1808.00087"),
    ("poisson-batches-capped", "error", "Poisson batches were cut to a maximum size",
     "Records beyond the cap are left out, so one more record can push another one out. That needs accounting of its "
     "own, under zero_out or replace_one.",
     "Account for the cap, or raise it until it makes no difference.", "Ganesh (2025), the bound in dp-accounting"),
    ("microbatches-summed", "error", "micro-batches with draws of their own were summed",
     "A record may then be in a step several times. m draws at rate q are a mixture, not one draw at rate m q.",
     "Draw once a step and split the draw, or account for the mixture.",
     "Choquette-Choo et al. (2024), arXiv:2310.15526"),
    ("sampling-prob-too-small", "error", "the sampling probability is too small for the batch size",
     "batch size / n exceeds the stated rate by more than the number of batches explains.",
     "Account with the rate that the sampler used.", _DPSGD),
    ("sampling-prob-from-batches", "warning", "the sampling probability is 1 / number of batches",
     "len(loader) is rounded, and a dropped last batch changes it. 1/len(loader) is right only where the "
     "sampler itself draws each record with exactly that probability; with a loader that drops its last batch "
     "it is an error.",
     "Take the rate from the sampler, not from the length of a loader.", _DPSGD),
    ("sampling-prob-of-other-steps", "error", "rate, steps and epochs do not belong together",
     "Rate times steps should be the number of epochs. It is not, as happens when the rate is that of a "
     "micro-batch and the steps are those of an accumulated one, or the other way round.",
     "Account with the rate and the number of the noisy steps.", _DPSGD),
    ("steps-one-short", "error", "one step was lost in a float division",
     "int(epochs / rate) loses a step for many rates, 1/93 for one, since the quotient falls just below a "
     "whole number.",
     "Round to the nearest number of steps.", "https://github.com/meta-pytorch/opacus, get_noise_multiplier"),
    ("steps-too-few", "error", "fewer steps are charged than the epochs need",
     "Epochs times batches in an epoch exceeds the stated number of steps.",
     "Charge every step that released something.", _DPSGD),
    ("stopped-by-data", "error", "the data decided when to stop",
     "Composition covers a number of steps that is fixed in advance. A run that the private data stopped costs "
     "what was planned.",
     "Claim the epsilon of the planned steps, or use a privacy filter.", "Rogers et al. (2016), arXiv:1605.08294"),
    ("gdp-clt-as-bound", "error", "a central-limit estimate is used as a bound",
     "The central limit theorem for Gaussian differential privacy gives an approximation, not a bound; it is "
     "often below the true value, by up to 99 per cent for small rates.",
     "Use PLD, PRV or RDP.", "Gopi et al. (2021), arXiv:2106.02848"),
    ("rdp-replace-one", "warning", "Rényi accounting under replace_one",
     "dp-accounting 0.6's RdpAccountant takes the sensitivity of a sum as C under replace_one, where it is 2C: its "
     "epsilon is that of twice the noise.",
     "Halve the noise multiplier there, or use PLD.", "google/differential-privacy issue 378"),
    ("replace-one-factor-two", "error", "the number is that of another relation",
     "Exchanging a record moves the sum by up to twice the clip norm. The claimed number fits add_or_remove_one, not "
     "replace_one.",
     "State add_or_remove_one, or recompute for replace_one.", _COMPOSITION),
    ("relation-without-meaning", "warning", "add_or_remove_one with batches of a fixed number or size",
     "Where batches partition the data or have a fixed size, adding a record changes other batches or their "
     "number. The relation is zero_out or replace_one, with a public number of records.",
     "State the relation that was proved.", _SHUFFLE),
    ("unit-mismatch", "error", "a unit has several examples, and epsilon is that of one",
     "A user with k examples moves k gradients. Group privacy, or accounting for the mixture, is needed.",
     "Bound the examples of a user to one, or claim the recomputed epsilon.",
     "Choquette-Choo et al. (2024), arXiv:2310.15526"),
    ("basis-from-private-data", "error", "the initial factors come from raw private data",
     "Factors or start values computed from private gradients without clipping and noise are published with "
     "the model. The records behind them have no guarantee at all: epsilon is infinite.",
     "Use public data, a data-free basis, or a noisy release that is charged.", _NIST),
    ("basis-not-charged", "error", "a private release for the basis is not in epsilon",
     "Noise was added to what made the basis, but that release costs privacy too and composes with the training.",
     "Compose both.", _COMPOSITION),
    ("federated-data-pooled", "error", "the server saw the pooled raw data",
     "The basis was computed on the raw data of all clients in one place, so the federated trust model does "
     "not hold, and through the basis every client sees something of the others.",
     "Compute a noisy basis at the clients, or use public data.", _NIST),
    ("noise-seeded", "error", "noise or draws come from a known seed",
     "Whoever knows the seed and the code subtracts the noise. There is no differential privacy.",
     "Take noise and draws from a generator keyed by the operating system, and keep no key.",
     "Holohan and Braghin (2021), arXiv:2107.10138"),
    ("noise-shared", "error", "clients drew the same noise",
     "The noises of the clients do not average out and cancel in differences: whoever sees two updates sees their "
     "difference without noise.",
     "Independent, secret randomness at each client.", _NIST),
    ("generator-not-secure", "warning", "noise comes from a framework's default generator",
     "Mersenne Twister and Philox are not cryptographic, and their state depends on a global seed that other "
     "code sets.",
     "Use a cryptographic generator.", "Holohan and Braghin (2021), arXiv:2107.10138"),
    ("part-not-counted", "error", "something was trained without being clipped and noised",
     "A head or layer that is trained on the private data and released counts like all the rest.",
     "Freeze it, or clip and noise it together with the rest.", _DPSGD),
    ("head-trained", "info", "more than the adapter is trained",
     "Fine for privacy where it is clipped and noised, but counts of trained or communicated numbers include it.",
     "State the counts with the head.", _DPFY),
    ("not-clipped", "error", "no clipping of each unit's gradient",
     "Without a bound on what one unit contributes the noise protects nothing; clipping a whole batch does not bound "
     "it either.",
     "Clip each unit's gradient.", _DPSGD),
    ("clipped-per-microbatch", "error", "micro-batches are clipped, not units",
     "One record can turn a micro-batch's clipped gradient around: the sum moves by up to 2C, not C.",
     "Clip each unit's gradient, or account with half the noise multiplier.", _DPFY),
    ("no-noise", "error", "no noise was added",
     "A noise multiplier of 0 gives no finite epsilon.", "Add noise.", _DPSGD),
    ("noise-per-microbatch", "warning", "noise is added in each micro-batch",
     "The sum of a step then holds several noises. If each has the full standard deviation there is more noise than "
     "accounted for; if they are scaled down, or taken before the clip norm is rescaled, there may be less.",
     "Add the noise once a step, to the sum.", _DPSGD),
    ("divisor-drawn-size", "error", "the noisy sum is divided by the drawn batch size",
     "The drawn size depends on whether a record is there: dividing by it releases it and changes the scale of the "
     "noise.",
     "Divide by the expected batch size, a public constant.", _DPFY),
    ("divisor-num-examples", "warning", "the divisor uses the true number of records",
     "Under add_or_remove_one the true number is private; a divisor made from it leaks it.",
     "Use a public constant, or state zero_out.", "meta-pytorch/opacus issue 571"),
    ("loss-couples-examples", "error", "one example's loss depends on the others",
     "With a mean over all tokens of a batch, or a contrastive loss, removing one example changes the "
     "gradients of the others before clipping: the sum moves by more than the clip norm.",
     "Use a loss that is a function of one example alone.", _DPFY),
    ("batch-statistics", "error", "a layer uses statistics of the batch",
     "Batch normalization makes every gradient depend on every example of the batch.",
     "Freeze it, or use layer or group normalization.", _DPFY),
    ("empty-batches", "error", "empty draws are not released as steps",
     "Skipping an empty draw, inventing an example or crashing shows that nobody was drawn, and changes the "
     "mechanism that was accounted for.",
     "Release noise alone for an empty draw.", _DPSGD),
    ("empty-batches-unhandled", "warning", "empty draws are not handled",
     "An empty draw would crash or give NaN: rare where batches are large, but a data-dependent failure.",
     "Release noise alone for an empty draw.", _DPSGD),
    ("tuning-not-charged", "error", "further training runs on these data are not in epsilon",
     "Choosing among runs by looking at private data releases something of each. All of them compose; a "
     "*random* number of runs, drawn in advance, costs less (Papernot and Steinke), a fixed number of tries "
     "does not.",
     "Tune on public data, charge all runs, or draw the number of runs at random before tuning.",
     "Papernot and Steinke (2022), arXiv:2110.03620"),
    ("selection-on-private-data", "error", "settings or checkpoints were chosen on the training data",
     "A choice made by looking at the private training data is a release that is not in epsilon.",
     "Choose on public data, or with a private selection mechanism.",
     "Papernot and Steinke (2022), arXiv:2110.03620"),
    ("selection-on-held-out", "warning", "settings or checkpoints were chosen on other private people",
     "Those people are not in the training data: the claim does not speak of them, yet the choice depends on them.",
     "Say so, or choose on public data.", _DPFY),
    ("raw-metrics-released", "error", "un-noised training metrics left the trust boundary",
     "A training loss of a step is computed from private records and has no noise. Together with it, what is "
     "published has no finite epsilon.",
     "Keep raw metrics where the data are, or add noise and charge it.", _NIST),
    ("last-client-only", "error", "only one client's epsilon is reported",
     "Clients with disjoint records are covered by the *largest* epsilon, not by that of the last or first one.",
     "Report every client and the maximum.", "McSherry (2009), parallel composition"),
    ("clients-averaged", "error", "the clients' epsilons were averaged",
     "An average protects nobody: someone in the worst client has that client's epsilon.",
     "Report the maximum.", "McSherry (2009), parallel composition"),
    ("client-above-claim", "error", "a client's epsilon exceeds the claim",
     "Recomputed at the claimed delta, at least one client spends more than is claimed.",
     "Claim the largest.", "McSherry (2009), parallel composition"),
    ("client-deltas-mixed", "error", "clients have different deltas",
     "Epsilons at different deltas cannot be compared, and a maximum over them is no guarantee.",
     "Recompute every client at one delta.", "McSherry (2009), parallel composition"),
    ("person-in-several-silos", "error", "a person may be in several clients",
     "With records in k clients a person's losses add up: the maximum over clients is not enough.",
     "Compose the clients that a person may be in.", _COMPOSITION),
    ("rounds-not-charged", "error", "not all rounds are charged",
     "Every round releases again.", "Compose all rounds.", _COMPOSITION),
    ("noise-multiplier-mismatch", "error", "noise multiplier, noise and clip norm disagree",
     "noise_std / l2_clip_norm is not the stated noise multiplier.",
     "State the noise on the clipped sum.", _DPSGD),
    ("run-tainted", "error", "the run's own report says that it is tainted",
     "A taint, such as a seeded generator, voids the guarantee.",
     "Train again without it.", "dpsb, docs/privacy.md"),
)  # fmt: skip

CATALOG: dict[str, Explanation] = {entry[0]: Explanation(*entry) for entry in _ENTRIES}


def explain(name: str) -> Explanation:
    """Returns what a kind of finding means.

    Raises:
        ValueError: If there is no such kind; names the nearest.

    Example:
        >>> explain("delta-too-large").title
        'delta is 1/n or more'
    """
    found = CATALOG.get(name)
    if found is None:
        near = difflib.get_close_matches(str(name), CATALOG, n=1, cutoff=0.3)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"there is no finding {str(name)[:60]!r}{hint}")
    return found
