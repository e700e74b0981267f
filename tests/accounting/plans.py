"""Plans and ledgers that the tests of the accounting share."""

from dpsb_accounting import Gaussian, Ledger, Phase, Plan, PoissonGaussian, chain

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


def fill(path, charges=3, plan=None):
    """Writes a ledger with some charges; returns the file's content."""
    with Ledger.create(path, plan or make_plan()) as ledger:
        for _ in range(charges):
            ledger.charge("train")
    return path.read_bytes()


def resealed(data):
    """Returns a line with a hash that fits its content."""
    data = {name: value for name, value in data.items() if name != "hash"}
    return chain.sealed_line(data)
