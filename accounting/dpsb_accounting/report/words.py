"""The sentences of a report. Under one revision their wording never changes, so that they can be verified."""

from __future__ import annotations

import math

from dpsb_accounting.plan import Plan
from dpsb_accounting.record import LedgerRecord

RELATIONS = {
    "add_or_remove_one": "two data sets are neighbours if one has one {unit} more than the other",
    "zero_out": "two data sets are neighbours if one {unit} contributes nothing in one of them; their size is the "
    "same and counts as public",
    "replace_one": "two data sets are neighbours if one {unit} is exchanged for any other; their size is the same "
    "and counts as public",
}

ASSUMPTIONS = (
    "The program that wrote the ledger did what its lines say; the hash chain shows consistency, not honesty.",
    "Each {unit}'s contribution is clipped to the stated L2 norm before it is summed, whatever it holds.",
    "Units are drawn independently with the stated probability and in secret; empty draws are steps too.",
    "Noise and draws come from a cryptographic generator keyed by the operating system, and are never kept.",
    "All facts of the plan (model, labels, lengths, learning rate, number of steps) are public.",
    "One person contributes one {unit}; with k of them the guarantee for that person is weaker.",
)

MOVING_CLIP = (
    "The clip norm moves from the stated one on, by released numbers only: each release is the clipped sum together "
    "with a noisy count of the {unit}s within the clip norm, and the stated event covers both."
)

HALF_PRECISION = (
    "The frozen weights compute in bfloat16, where an example's gradient also depends, by rounding, on what else is in "
    "its microbatch; that dependence, measured in the trainer's documentation, is not in epsilon."
)

PART_OF_SWEEP = (
    "This run is one of several on the same data, made to compare settings: each costs what its own report says, and "
    "together they cost more than any of them. The page of the sweep states the epsilon of all."
)

DECLARED_PUBLIC = (
    "What was read of {files} was declared public: it went in without clipping or noise, and nothing here protects "
    "whoever is in it."
)

NOT_COVERED = (
    "Choosing hyper-parameters, or among several runs, by looking at the same data.",
    "Metrics computed on private held-out people, and any other use of the data outside this ledger.",
    "What the base model learned about anyone before this run.",
    "Whoever sees the machine while it trains: time, memory, unreleased gradients.",
)

NOISE_NOTE = (
    "Expected squared length of one step's noise on the target weights, every method with this run's noise multiplier, "
    "clip norm and expected batch size, hence at the same epsilon; how much of the gradient each method keeps within "
    "the clip norm is not in it."
)

NOT_AUDITED = "not audited: no lower bound from an attack on this model has been put here"

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.1)

_SIZES = {
    "add_or_remove_one": "unbounded differential privacy: the number of units is not revealed",
    "zero_out": "the number of units is fixed and public (between bounded and unbounded differential privacy)",
    "replace_one": "bounded differential privacy: the number of units is fixed and public",
}

_BASES = {
    "data_free": "The frozen basis was computed without any data.",
    "public": "The frozen basis was computed from data declared public, which nothing here protects.",
    "released": "The frozen basis was computed from the private data under a charged phase of this ledger.",
    "non_private": "The frozen basis was computed from the private data with no guarantee: no claim is possible.",
}


def statement(ledger: LedgerRecord, upper: float, claim: bool) -> str:
    """Returns the claim in words; under this schema the wording never changes, so that it can be verified."""
    plan = ledger.plan
    unit = plan.unit
    if claim:
        first = (
            f"Whatever is published of this run, its held-out metrics excepted, is ({up(upper)}, {plan.delta:g})-"
            f"differentially private for each single {unit}: with or without the data of any one {unit}, every outcome "
            f"is almost equally likely, up to a factor of e^{up(upper)} and an additional probability of "
            f"{plan.delta:g}."
        )
    elif ledger.taints:
        names = ", ".join(repr(taint.name) for taint in ledger.taints)
        first = f"No privacy claim can be made for this run: it is tainted by {names}."
    else:
        first = "No privacy claim can be made for this run: something was released with no guarantee (epsilon = inf)."
    parts = [first, f"The relation is {plan.neighboring}: {RELATIONS[plan.neighboring].format(unit=unit)}."]
    if not plan.num_examples_declared:
        parts.append(
            f"The number of examples was not declared, so the true number, {plan.num_examples}, counts as public."
        )
    if claim:
        parts.append(
            f"The epsilon is that of the whole plan of {plan.steps} steps, whatever made the run stop; "
            f"{ledger.charged('train')} of them were charged."
        )
    return " ".join(parts)


def up(value: float, significant: int = 4) -> str:
    """Some digits, rounded up, so that a printed claim is never smaller than the bound."""
    if value == 0:
        return "0"
    digits = significant - 1 - math.floor(math.log10(value))
    scale = 10.0**digits
    return f"{math.ceil(value * scale - 1e-9) / scale:.{max(digits, 0)}f}"


def attackers(upper: float, delta: float) -> list[dict[str, float]]:
    r"""Returns what the best attacker can reach, whoever it is and whatever else it knows.

    An attacker guesses whether one unit's data was used. At false-positive rate :math:`\alpha` its true-positive rate
    is at most :math:`\min(e^\epsilon \alpha + \delta,\; 1 - e^{-\epsilon}(1 - \delta - \alpha))`.

    Args:
        upper: The claimed epsilon, finite.
        delta: The claimed delta.

    Returns:
        One object per false-positive rate; the true-positive rate is rounded up to four decimals. Public.

    References:
        Kairouz, Oh and Viswanath (2017), arXiv:1311.0776, Theorem 2.1.

    Example:
        >>> attackers(1.0, 1e-5)[1]
        {'false_positive_rate': 0.01, 'true_positive_rate_at_most': 0.0272}
    """
    found = []
    for rate in FALSE_POSITIVE_RATES:
        bound = true_positive_rate(upper, delta, rate)
        found.append(
            {"false_positive_rate": rate, "true_positive_rate_at_most": min(1.0, math.ceil(bound * 1e4) / 1e4)}
        )
    return found


def true_positive_rate(epsilon: float, delta: float, false_positive_rate: float) -> float:
    """Returns the largest true-positive rate that (epsilon, delta) allows at a false-positive rate."""
    growth = math.exp(min(epsilon, 700.0))
    first = growth * false_positive_rate + delta
    second = 1 - (1 - delta - false_positive_rate) / growth
    return min(1.0, first, second)


def disclosure(plan: Plan) -> dict[str, str]:
    """Returns the fields that guidelines for differential-privacy claims ask for, one sentence each.

    What a ledger cannot know is said to be unknown, so that whoever publishes the report states it beside it.

    References:
        NIST SP 800-226 (2025); Ponomareva et al. (2023), arXiv:2303.00654, Section 5.3.3.
    """
    unit = plan.unit
    return {
        "privacy_unit": f"One {unit}. {_multiplicity(plan)}",
        "relation": f"{plan.neighboring}: {_SIZES[plan.neighboring]}.",
        "trust_model": "Central: the machine that trains, its operator and its memory are trusted with the raw data. "
        "Nobody else is.",
        "adversary_sees": "Everything published: the model after every step, checkpoints, ledger, report, code "
        f"and all settings; it may know the data of all units but one, and choose the data of the one {unit} it "
        "attacks.",
        "accesses_covered": "Every access in the phases of this ledger. " + _BASES[str(plan.basis["access"])],
        "accesses_not_covered": "Hyper-parameter tuning, model selection, evaluation, data cleaning and label "
        "lists taken from the data: each is a further release unless it used public data, and adds to epsilon.",
        "final_model": "The guarantee holds for all intermediate states, hence for the final model.",
        "accounting": "Composition of the privacy losses of all planned releases; bounds, not estimates. Sampling "
        "counts as amplification only where a phase's event states it.",
        "assumptions": "They are listed under 'This rests on'. Whether the program that wrote the "
        "ledger kept to them cannot be seen from the ledger; its code and tests have to be read.",
        "delta": f"{plan.delta:g}, which times the number of units, {plan.num_examples}, is "
        f"{plan.delta * plan.num_examples:.3g}; a method that publishes one unit at random needs 1.",
        "floating_point": "The guarantee is that of the real-valued mechanism. Rounding in sums, noise and sampling "
        "can weaken it; the trainer's documentation says what was done about that.",
        "side_channels": "Not covered: running time, memory use, caches, swap, logs on the operator's screen.",
        "data_retention": "Not known to the ledger: how the raw data were collected, who may read "
        "them, how long they are kept. The guarantee neither needs nor replaces their deletion.",
        "pretraining": "The base model's own training data count as public here.",
        "reproduction": "dpsb-accounting verify recomputes every number of this report from the ledger.",
    }


def _multiplicity(plan: Plan) -> str:
    if plan.unit == "example":
        return (
            "A person with k examples is protected by (k epsilon, k e^((k-1) epsilon) delta) at worst (group privacy)."
        )
    return f"All data of one {plan.unit} counts as one unit, however much it is."
