"""Lower bounds: published values, coverage under the truth, and thresholds that cannot be read off the data."""

import json
import math

import numpy as np
import pytest
from dp_accounting import get_sigma_gaussian
from scipy.stats import binom
from typer.testing import CliRunner

from dpsb_accounting import auditing
from dpsb_accounting.auditing import CanaryScores, Counts, FixedThresholds, SplitThreshold
from dpsb_accounting.cli import app, main

DELTA = 1e-5
GRID = FixedThresholds((0.0, 0.25, 0.5, 0.75, 1.0))  # in units of the noise, for every epsilon the same


def gaussian_scores(mu, count=1000, seed=0):
    """Scores of canaries under a Gaussian mechanism that is exactly mu-GDP."""
    source = np.random.default_rng(seed)
    coins = source.random(count) < 0.5
    return CanaryScores(source.normal(size=count) + mu * coins, coins)


# --- values known from elsewhere


def test_clopper_pearson_is_exact():
    for found, trials in ((0, 10), (3, 10), (10, 10), (50, 1000)):
        low, high = auditing.clopper_pearson(found, trials, 0.1)
        assert found == 0 or binom.sf(found - 1, trials, low) == pytest.approx(0.05)
        assert found == trials or binom.cdf(found, trials, high) == pytest.approx(0.05)
        assert low <= found / trials <= high
    assert auditing.clopper_pearson(0, 10, 0.1)[0] == 0.0
    assert auditing.clopper_pearson(10, 10, 0.1)[1] == 1.0


def test_counts_give_the_known_values():
    counts = Counts(true_positives=900, positives=1000, false_positives=50, negatives=1000)
    assert auditing.from_counts(counts, delta=DELTA).epsilon == pytest.approx(2.599206, abs=1e-6)
    gdp = auditing.gdp_from_counts(counts, delta=DELTA)
    assert gdp.mu == pytest.approx(2.6846, abs=1e-4)
    assert gdp.epsilon == pytest.approx(14.457, abs=1e-3)
    assert "support only epsilon 2.599" in gdp.assumptions[1]
    perfect = Counts(true_positives=1000, positives=1000, false_positives=0, negatives=1000)
    assert auditing.from_counts(perfect, delta=DELTA).epsilon == pytest.approx(5.6006, abs=1e-4)


def test_both_sides_are_used():
    """An attack that is sure of non-members proves as much as one that is sure of members."""
    sure_of_members = Counts(true_positives=500, positives=1000, false_positives=0, negatives=1000)
    mirrored = Counts(true_positives=1000, positives=1000, false_positives=500, negatives=1000)
    one, other = (auditing.from_counts(c, delta=DELTA).epsilon for c in (sure_of_members, mirrored))
    assert one == pytest.approx(other)
    assert one > 4


@pytest.mark.parametrize(
    ("found", "epsilon", "fdp"),
    [
        ((1000, 600, 600), 5.270399, 10.5149),
        ((1000, 200, 150), 0.819973, 1.29692),
        ((1000, 1000, 1000), 5.782283, None),
    ],
)
def test_one_run_gives_the_known_values(found, epsilon, fdp):
    numbers = dict(zip(("num_canaries", "guesses", "correct"), found, strict=True))
    assert auditing.one_run(**numbers, delta=DELTA).epsilon == pytest.approx(epsilon, abs=1e-6)
    if fdp:
        bound = auditing.one_run_fdp(**numbers, delta=DELTA)
        assert bound.epsilon == pytest.approx(fdp, rel=1e-5)
        assert bound.inputs["epsilon_without_gaussian_assumption"] == pytest.approx(epsilon, abs=1e-6)


def test_one_run_without_delta():
    assert auditing.one_run(num_canaries=1000, guesses=1000, correct=1000, delta=0).epsilon == pytest.approx(5.809068)


def test_one_run_p_value_written_out():
    """The formula as published, summed in the plainest way."""
    m, r, v, epsilon, delta = 50, 20, 17, 0.7, 1e-3
    mass = [math.comb(r, k) * math.exp(epsilon * k) / (1 + math.exp(epsilon)) ** r for k in range(r + 1)]
    largest = max(sum(mass[max(0, v - i) : v]) / i for i in range(1, v + 1))
    expected = sum(mass[v:]) + 2 * m * delta * largest
    assert auditing.one_run_p_value(m, r, v, epsilon, delta) == pytest.approx(expected, rel=1e-9)


# --- what the scores become


def test_guesses_are_the_highest_and_the_lowest():
    scores = CanaryScores([5, 4, 3, 2, 1, 0], [1, 0, 1, 0, 1, 0])
    assert [scores.correct_guesses(r) for r in (1, 2, 3, 4, 6)] == [1, 2, 2, 2, 4]


def test_ties_tell_nothing():
    """Scores that are all equal, given members first: the order in which they came must not be an attack."""
    coins = np.arange(2000) < 1000
    constant = CanaryScores(np.zeros(2000), coins)
    for method in auditing.METHODS:
        assert auditing.audit(constant, method, delta=DELTA, thresholds=FixedThresholds((0.5,))).epsilon == 0.0
    assert abs(constant.correct_guesses(1000) - 500) < 100


@pytest.mark.parametrize("method", auditing.METHODS)
def test_more_signal_never_proves_less_and_everything_is_on_record(method):
    found = [auditing.audit(gaussian_scores(mu, 4000), method, delta=DELTA) for mu in (0.0, 1.0, 3.0)]
    assert found[0].epsilon < 0.3
    assert found[0].epsilon < found[1].epsilon < found[2].epsilon
    content = json.loads(json.dumps(found[2].to_json()))
    assert content["confidence"] == 0.95
    assert content["assumptions"]
    assert content["threat_model"]
    assert ("mu_lower" in content) == (method in ("gdp", "one-run-fdp"))
    assert found[2].refutes(1.0)
    assert not found[2].refutes(100.0)


def test_the_gaussian_assumption_is_printed_with_its_number():
    good = auditing.audit(gaussian_scores(1.0, 4000), "gdp", delta=DELTA, thresholds=GRID)
    assert good.inputs["gaussian_distance"] < good.inputs["gaussian_distance_95"]
    assert f"{good.inputs['gaussian_distance']:.4f}" in good.assumptions[-1]
    coins = np.arange(4000) % 2 == 0
    skewed = CanaryScores(np.random.default_rng(0).exponential(size=4000) + coins, coins)
    bad = auditing.audit(skewed, "gdp", delta=DELTA, thresholds=GRID)
    assert bad.inputs["gaussian_distance"] > 2 * bad.inputs["gaussian_distance_95"]
    assert auditing.gaussian_distance(CanaryScores([1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0])) == (1.0, 0.0)


# --- thresholds


def test_a_threshold_read_off_the_scores_is_refused():
    """jax_privacy PR #362: an audit whose threshold is chosen on the scores that it judges proves nothing."""
    scores = gaussian_scores(0.0)
    with pytest.raises(ValueError, match="equals a score"):
        auditing.audit(scores, "gdp", delta=DELTA, thresholds=FixedThresholds((float(scores.values[17]),)))
    with pytest.raises(ValueError, match="thresholds must be"):
        auditing.audit(scores, "gdp", delta=DELTA, thresholds="best")


def naive_best_guesses_certify(scores):
    """The fault of a peer: the best number of guesses on the same data, uncorrected. Whether that certifies > 0."""
    order = np.argsort(-scores.values)
    right = np.cumsum(scores.included[order])
    guesses = np.arange(1, len(scores) + 1)
    return bool((binom.sf(right - 1, guesses, 0.5) <= 0.05).any())


def test_nothing_is_certified_for_a_mechanism_that_leaks_nothing():
    """Under epsilon = 0, 5 % of audits may certify more than 0; with the best uncorrected threshold far more do."""
    repetitions = 200
    allowed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / repetitions)
    false = dict.fromkeys([*auditing.METHODS, "naive"], 0)
    for seed in range(repetitions):
        scores = gaussian_scores(0.0, 200, seed)
        for method in auditing.METHODS:
            false[method] += auditing.audit(scores, method, delta=DELTA).epsilon > 0
        false["naive"] += naive_best_guesses_certify(scores)
    rates = {name: count / repetitions for name, count in false.items()}
    assert all(rates[method] <= allowed for method in auditing.METHODS), rates
    assert rates["naive"] > 2 * allowed, "the fault would be found"


def test_several_thresholds_and_guesses_are_paid_for():
    scores = gaussian_scores(1.0, 4000)
    one, five = (
        auditing.audit(scores, "gdp", delta=DELTA, thresholds=FixedThresholds(t)) for t in ((0.5,), GRID.values)
    )
    assert five.inputs["comparisons"] == 5
    assert auditing.gdp_from_counts(scores.counts(0.5), delta=DELTA, comparisons=5).epsilon < one.epsilon
    several = auditing.audit(scores, "one-run", delta=DELTA, guesses=(100, 400))
    assert several.inputs["comparisons"] == 2
    assert several.epsilon == max(
        auditing.one_run(
            num_canaries=4000, guesses=r, correct=scores.correct_guesses(r), delta=DELTA, comparisons=2
        ).epsilon
        for r in (100, 400)
    )


# --- tightness and coverage


@pytest.mark.parametrize(("epsilon", "gdp"), [(1, 0.6), (2, 0.8), (4, 0.8), (8, 0.8)])
def test_tight_on_an_exact_gaussian(epsilon, gdp):
    mu = 1 / get_sigma_gaussian(epsilon, DELTA)
    trials = [gaussian_scores(mu, 10_000, seed) for seed in range(20)]

    def mean(method, **options):
        return np.mean([auditing.audit(t, method, delta=DELTA, **options).epsilon for t in trials]) / epsilon

    assert mean("gdp", thresholds=GRID) >= gdp
    assert mean("gdp") >= gdp  # threshold from a tenth of the scores
    assert mean("one-run") >= 0.45
    assert mean("one-run-fdp") >= 0.55


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.5, 4.0])
@pytest.mark.parametrize("method", auditing.METHODS)
def test_coverage(epsilon, method):
    """At most 5 % of 1,000 repetitions, plus Monte Carlo error, exceed the truth."""
    mu, repetitions = 1 / get_sigma_gaussian(epsilon, DELTA), 1000
    misses = {"fixed": 0, "split": 0}
    for seed in range(repetitions):
        scores = gaussian_scores(mu, 1000, seed)
        misses["fixed"] += auditing.audit(scores, method, delta=DELTA, thresholds=GRID).epsilon > epsilon
        misses["split"] += auditing.audit(scores, method, delta=DELTA).epsilon > epsilon
    assert max(misses.values()) / repetitions <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / repetitions), misses


def test_randomized_response_is_covered_by_the_bounds_without_assumption():
    """A mechanism with (epsilon, 0) exactly: the one-run test has its worst case here."""
    epsilon, misses, repetitions = 1.0, {"one-run": 0, "clopper-pearson": 0}, 300
    for seed in range(repetitions):
        source = np.random.default_rng(seed)
        coins = source.random(500) < 0.5
        told = np.where(source.random(500) < 1 / (1 + math.exp(-epsilon)), coins, ~coins)
        scores = CanaryScores(told.astype(float), coins)
        for method in misses:
            misses[method] += (
                auditing.audit(scores, method, delta=1e-9, thresholds=FixedThresholds((0.5,)), guesses=(500,)).epsilon
                > epsilon
            )
    assert max(misses.values()) / repetitions <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / repetitions), misses


def test_roc():
    curve = auditing.roc(gaussian_scores(1.0, 20_000))
    assert curve.auc == pytest.approx(0.760, abs=0.01)  # Phi(1 / sqrt(2))
    assert curve.points[0].fpr == 0.01
    assert curve.points[0].tpr == pytest.approx(0.0924, abs=0.015)  # Phi(1 - 2.326)
    assert curve.points[0].low < curve.points[0].tpr < curve.points[0].high
    assert curve.fpr[0] == curve.tpr[0] == 0.0
    assert curve.fpr[-1] == curve.tpr[-1] == 1.0
    assert json.loads(json.dumps(curve.to_json()))["members"] == curve.members


# --- what is refused


@pytest.mark.parametrize(
    ("values", "included", "message"),
    [
        ([1.0, 2.0], [1], "one length"),
        ([1.0, 2.0], [1, 2], "true and false"),
        ([1.0, math.nan], [1, 0], "finite"),
        ([1.0, 2.0], [1, 1], "both kinds"),
    ],
)
def test_refuses_scores(values, included, message):
    with pytest.raises(ValueError, match=message):
        CanaryScores(values, included)


def test_refuses_arguments():
    scores = gaussian_scores(1.0, 100)
    for wrong in ({"method": "best"}, {"delta": 0.0}, {"delta": 1.0}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            auditing.audit(scores, **{"method": "gdp", "delta": DELTA, **wrong})
    with pytest.raises(ValueError, match="guesses"):
        auditing.audit(scores, "one-run", delta=DELTA, guesses=(101,))
    with pytest.raises(ValueError, match="share"):
        auditing.audit(CanaryScores([1, 0], [1, 0]), "gdp", delta=DELTA)
    with pytest.raises(ValueError, match="share"):
        SplitThreshold(1.0)
    with pytest.raises(ValueError, match="threshold"):
        FixedThresholds(())
    with pytest.raises(ValueError, match="true_positives must not exceed positives"):
        Counts(true_positives=3, positives=2, false_positives=0, negatives=1)
    with pytest.raises(ValueError, match="correct"):
        auditing.one_run(num_canaries=10, guesses=5, correct=6, delta=DELTA)
    lopsided = CanaryScores(np.arange(1000.0), np.arange(1000) < 900)
    with pytest.raises(ValueError, match="fair coins"):
        auditing.audit(lopsided, "one-run", delta=DELTA)


# --- the command line


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command(tmp_path, capsys):
    scores, path = gaussian_scores(2.0, 2000), tmp_path / "scores.npz"
    auditing.write_scores(scores, path)
    assert path.stat().st_mode & 0o777 == 0o600, "they may be losses of examples"
    table = tmp_path / "scores.csv"
    rows = [f"{v!r},{int(i)}" for v, i in zip(scores.values.tolist(), scores.included.tolist(), strict=True)]
    table.write_text("score,included\n" + "\n".join(rows) + "\n")
    found = [json.loads(run("audit", p, "--delta", DELTA, "--json").output) for p in (path, table)]
    assert found[0] == found[1]
    assert [bound["method"] for bound in found[0]["bounds"]] == list(auditing.METHODS)
    assert found[0]["bounds"][0]["confidence"] == pytest.approx(1 - 0.05 / 4)
    assert found[0]["epsilon_lower"] == max(bound["epsilon_lower"] for bound in found[0]["bounds"])
    text = run("audit", path, "--delta", DELTA, "--method", "gdp", "--threshold", 1, "--claim", 100)
    assert text.exit_code == 0
    assert "trade-off curve" in text.output
    refuted = run("audit", path, "--delta", DELTA, "--claim", 1)
    assert refuted.exit_code == 1
    assert "refuted" in refuted.output
    for option, value in (("confidence", 0), ("confidence", -1), ("confidence", 2), ("claim", "nan"), ("claim", -1)):
        with pytest.raises(SystemExit):
            main(["audit", str(path), "--delta", str(DELTA), f"--{option}", str(value)])
        assert f"{option} must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "must end in"),
        ("a.csv", b"x,y\n1,2\n", "columns score and included"),
        ("a.csv", b"score,included\nx,1\n", "line 2: score must be a number"),
        ("a.csv", b"score,included\n1,maybe\n", "included must be 0 or 1"),
        ("a.npz", b"PK\x03\x04 no archive", "not a file of arrays"),
        ("missing.npz", None, "cannot be read"),
    ],
)
def test_command_refuses_files(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit):
        main(["audit", str(tmp_path / name), "--delta", "1e-5"])
    assert message in capsys.readouterr().err


def test_pickles_are_refused(tmp_path):
    with open(tmp_path / "a.npz", "wb") as file:
        np.savez(file, scores=np.array([{}, {}], dtype=object), included=[True, False])
    with pytest.raises(ValueError, match="allow_pickle"):
        auditing.read_scores(tmp_path / "a.npz")
    with open(tmp_path / "b.npz", "wb") as file:
        np.savez(file, values=[1.0])
    with pytest.raises(ValueError, match="arrays scores and included"):
        auditing.read_scores(tmp_path / "b.npz")
