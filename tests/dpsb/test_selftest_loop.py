"""Record and replay of whole training loops: a correct loop passes, each seeded fault is found by the check named."""

from dataclasses import replace

import pytest
import torch
import workbench

from dpsb.mechanism import Mechanism
from dpsb.sampling import poisson_draw
from dpsb.selftest.replay import check_replay
from dpsb_accounting import Ledger

D, STEPS, LR, ROWS = 300, 10, 0.5, 6
PLAN = workbench.fit_plan(
    steps=STEPS, num_examples=10, expected_batch_size=3, l2_clip_norm=0.5, noise_multiplier=0.02, epsilon=1e6
)


def rows():
    source = torch.Generator().manual_seed(3)
    return list(torch.randn(ROWS, D, generator=source, dtype=torch.float64))


class Loop:
    """Private SGD in a few lines, taken apart so that each test can break one of them."""

    def __call__(self, folder, dataset, randomness, on_step):
        path = folder / "ledger.jsonl"
        resumed = path.exists()
        theta = torch.zeros(D, dtype=torch.float64)
        self.mechanism = Mechanism.from_plan(PLAN)
        with Ledger.open(path) if resumed else Ledger.create(path, PLAN) as ledger:
            for number in self.steps(ledger, resumed):
                self.before(ledger, number)
                draw = self.draw(len(dataset), randomness)
                self.after(ledger, number, draw)
                chosen = [dataset[i] for i in draw]
                total = self.total(torch.stack(chosen) if chosen else torch.zeros(0, D, dtype=torch.float64))
                released = self.release(total, chosen, randomness)
                if released is None:
                    break
                theta = theta - self.update(released, total, draw)
                on_step()
        return {"theta": theta}

    def steps(self, ledger, resumed):
        return range(ledger.remaining("train"))

    def before(self, ledger, number):
        ledger.charge("train")

    def draw(self, count, randomness):
        return poisson_draw(count, PLAN.sampling_prob, randomness).tolist()

    def after(self, ledger, number, draw):
        pass

    def total(self, chosen):
        return self.mechanism.clip_and_sum(chosen)

    def release(self, total, chosen, randomness):
        return self.mechanism.release(total, randomness)

    def update(self, released, total, draw):
        return LR * released / PLAN.expected_batch_size


def checks(loop, folder):
    start = torch.zeros(D)
    another = torch.full((D,), 3.0, dtype=torch.float64)
    return list(check_replay(loop, folder, rows(), another, plan=PLAN, learning_rate=LR, start=start))


def test_a_correct_loop_passes(tmp_path):
    found = checks(Loop(), tmp_path)
    assert all(check.passed for check in found), found
    assert {"replay_remove", "replay_ledger", "update", "resume"} <= {check.name for check in found}


class NoClipping(Loop):
    def total(self, chosen):
        return chosen.sum(dim=0)


class ClipFromData(Loop):
    """C is the median of the norms of the draw."""

    def total(self, chosen):
        norms = chosen.norm(dim=1)
        mechanism = replace(self.mechanism, l2_clip_norm=float(norms.median()) if len(norms) else 1.0)
        return mechanism.clip_and_sum(chosen)


class DividedBeforeRelease(Loop):
    """The sum over the drawn size is released with the noise of a sum over one."""

    def release(self, total, chosen, randomness):
        quiet = replace(self.mechanism, noise_multiplier=self.mechanism.noise_multiplier / max(1, len(chosen)))
        return quiet.release(total / max(1, len(chosen)), randomness)


class LessNoise(Loop):
    def release(self, total, chosen, randomness):
        mechanism = replace(self.mechanism, noise_multiplier=0.9 * self.mechanism.noise_multiplier)
        return mechanism.release(total, randomness)


class NoiseInMicrobatches(Loop):
    def release(self, total, chosen, randomness):
        zero = torch.zeros(D, dtype=torch.float64)
        for row in chosen:
            zero += self.mechanism.release(self.mechanism.clip_and_sum(row[None]), randomness)
        return zero


class EmptyDrawsDropped(Loop):
    def release(self, total, chosen, randomness):
        return super().release(total, chosen, randomness) if chosen else torch.zeros_like(total)


class EmptyDrawsRepeated(Loop):
    def draw(self, count, randomness):
        while not (found := super().draw(count, randomness)):
            pass
        return found


class Shuffled(Loop):
    def draw(self, count, randomness):
        return torch.randperm(count)[:3].tolist()


class MoreOften(Loop):
    def draw(self, count, randomness):
        return poisson_draw(count, 1.2 * PLAN.sampling_prob, randomness).tolist()


class DoubleStep(Loop):
    def update(self, released, total, draw):
        return 2 * super().update(released, total, draw)


class DrawnSizeDivides(Loop):
    def update(self, released, total, draw):
        return LR * released / max(1, len(draw))


class RawGradientAdded(Loop):
    def update(self, released, total, draw):
        return super().update(released + 1e-3 * total, total, draw)


class ChargedAfterDraw(Loop):
    def before(self, ledger, number):
        pass

    def after(self, ledger, number, draw):
        ledger.charge("train")


class NeverCharged(ChargedAfterDraw):
    def after(self, ledger, number, draw):
        pass


class UnchargedResume(Loop):
    """A resumed run starts over, and charges only what is left."""

    def steps(self, ledger, resumed):
        return range(STEPS)

    def before(self, ledger, number):
        if ledger.remaining("train"):
            ledger.charge("train")


class DrawnSizeInLedger(Loop):
    def after(self, ledger, number, draw):
        ledger.taint(f"drawn_{number}", f"{len(draw)} rows")


class StopsOnData(Loop):
    """Stops as soon as the raw sum points one way."""

    def release(self, total, chosen, randomness):
        return None if float(total.sum()) > 4 else super().release(total, chosen, randomness)


class StopsEarly(Loop):
    def steps(self, ledger, resumed):
        return range(ledger.remaining("train") - 1)


FAULTS = {
    NoClipping: "replay_remove",
    ClipFromData: "replay_remove",
    DividedBeforeRelease: "replay_noise",
    LessNoise: "replay_noise",
    NoiseInMicrobatches: "one_release_a_step",
    EmptyDrawsDropped: "one_release_a_step",
    EmptyDrawsRepeated: "one_release_a_step",
    Shuffled: "charged_before_draw",
    MoreOften: "replay_draws",
    DoubleStep: "update",
    DrawnSizeDivides: "update",
    RawGradientAdded: "update",
    ChargedAfterDraw: "charged_before_draw",
    NeverCharged: "one_release_a_step",
    UnchargedResume: "resume",
    DrawnSizeInLedger: "replay_ledger",
    StopsOnData: "replay_control_flow",
    StopsEarly: "one_release_a_step",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_of_a_loop_are_found(fault, tmp_path):
    failed = {check.name for check in checks(fault(), tmp_path) if check.passed is False}
    assert FAULTS[fault] in failed
