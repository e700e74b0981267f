"""Plans that the tests of the accounting share."""

from dpsb_accounting import Gaussian, Phase, Plan, PoissonGaussian

STEP = PoissonGaussian(noise_multiplier=1.0, sampling_prob=0.01)
BASIS = Gaussian(noise_multiplier=5.0)


def make_plan(**changes):
    """Returns a small valid plan with some fields changed."""
    fields = {
        "phases": (Phase("train", STEP, 10),),
        "delta": 1e-5,
        "target_epsilon": 3.0,
        "neighboring": "add_or_remove_one",
        "num_examples": 20_000,
        "num_examples_declared": True,
        "expected_batch_size": 200,
        "sampling_prob": 0.01,
        "l2_clip_norm": 0.5,
        "clipping": "flat",
        "basis": {"kind": "weight_svd", "access": "data_free"},
        "details": {"model": "tiny", "rank": 4, "labels": ["ham", "spam"], "learning_rate": 0.1},
    }
    return Plan(**{**fields, **changes})


def two_phases(**changes):
    """Returns a plan that pays for a basis first."""
    phases = (Phase("basis", BASIS, 1), Phase("train", STEP, 10))
    return make_plan(phases=phases, basis={"kind": "private", "access": "released"}, **changes)
