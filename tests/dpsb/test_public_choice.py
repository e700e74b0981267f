"""Which public file a basis is from: what the screen says of it, and what one example moves in a private choice."""

import io

import pytest
import torch
import workbench
from rich.console import Console

from dpsb import run
from dpsb.adapter import lora_layers
from dpsb.basis import mean_gradients, stage
from dpsb.basis.budget import basis_noise_multiplier
from dpsb.basis.choose import choice_provenance, gradient_basis, sketches_of
from dpsb.basis.release import Clip, PrivateExamples
from dpsb.data import Collator, synthetic_examples
from dpsb.display import print_plan
from dpsb.losses import classification_loss
from dpsb.mechanism import Mechanism
from dpsb.randomness import SystemRandomness
from dpsb_accounting import Gaussian, Ledger, Phase

# --- what the screen says


def shown(tmp_path, **changes):
    """What a run prints of its plan on a wide screen, before anything is charged."""
    screen = io.StringIO()

    def stop(plan):
        print_plan(Console(file=screen, width=400), plan)
        raise KeyboardInterrupt

    config = workbench.run_config(tmp_path / "run", **changes)
    with pytest.raises(KeyboardInterrupt):
        run.fine_tune(config, callbacks=run.Callbacks(on_plan=stop))
    assert not any(canary in screen.getvalue() for canary in workbench.CANARIES)
    return {name.strip(): value.strip() for name, value in rows_of(screen.getvalue())}


def rows_of(text):
    return (line.strip("│").split("│") for line in text.splitlines() if line.count("│") == 3)


@pytest.fixture
def files(tmp_path):
    """A file with labels of its own and one with the run's; the first one's name looks like markup."""
    paths = []
    for name, labels in (("other[bold]", "xyz"), ("own", ("ham", "spam"))):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f'{{"text": "see {i}", "label": "{labels[i % len(labels)]}"}}\n' for i in range(12)))
        paths.append(str(path))
    return paths


def test_the_screen_says_what_was_done_about_another_label_space(tmp_path, files):
    rows = shown(tmp_path, basis=f"hybrid:{files[0]}", basis_width=8)
    assert rows["basis"] == "hybrid (released)"
    assert rows["basis from"] == f"{files[0]} (another label space: a random head of 3 classes for the gradient)"
    assert "choice" not in rows


def test_the_screen_says_which_of_several_files_was_taken_and_why(tmp_path, files, monkeypatch):
    rows = shown(tmp_path, basis=f"public:{','.join(files)}")
    assert rows["basis from"] == f"{files[1]} (the labels of the run)"
    assert rows["choice"] == "the only file whose rows carry the run's labels"
    monkeypatch.setattr(stage, "_scores", lambda _setup, _sets: [0.5, 0.55])
    rows = shown(tmp_path, basis=f"public:{','.join(files)}", task="causal-lm", model=str(workbench.llama_folder()))
    assert rows["basis from"] == f"{files[0]} (language modelling on its text; its column 'label' is not used)"
    assert "other[bold].jsonl 0.5000, own.jsonl 0.5500; less than 0.1 apart" in rows["choice"]


def test_the_screen_names_the_files_that_private_examples_choose_from(tmp_path, files):
    rows = shown(tmp_path, basis=f"public:{','.join(files)}", basis_choice="private")
    assert rows["basis"] == "public (released)"
    assert rows["public file 1"].startswith(f"{files[0]} (another label space")
    assert rows["public file 2"] == f"{files[1]} (the labels of the run)"
    assert rows["choice"] == "one of the 2 files, by the private examples, in a charged release"


@pytest.mark.parametrize(("basis", "source"), [("weight", None), ("hybrid", "weight"), ("private", None)])
def test_a_basis_without_a_public_file(tmp_path, basis, source):
    rows = shown(tmp_path, basis=basis)
    assert rows.get("basis from") == source
    assert "choice" not in rows


# --- what one example moves

SIGMA, CANDIDATES = 3.0, 3
LOSS_SCALES = {7: 1e6, 8: 1e18, 9: 1e30, 10: 1e-30, 11: float("inf"), 12: float("nan"), 13: 0.0}
"""Factors of the loss of an example by its first token: gradients that are huge, tiny, not finite, or not there."""


def scaled_loss(model, batch):
    factors = [LOSS_SCALES.get(first, 1.0) for first in batch["input_ids"][:, 0].tolist()]
    return classification_loss(model, batch) * torch.tensor(factors)


class NoNoise(SystemRandomness):
    def normal(self, count):
        return torch.zeros(count, dtype=torch.float64)


class Ones(SystemRandomness):
    def normal(self, count):
        return torch.ones(count, dtype=torch.float64)


class Choice:
    """Scores of some examples, under one clip rule; the candidates are bases of single examples' gradients."""

    def __init__(self, tiny, tmp_path, clip):
        self.path, self.model, self.clip, self.passes = tmp_path, tiny.lora(tiny.base("bert")), clip, 0
        self.layers, collate = lora_layers(self.model), Collator(0)
        provenance = choice_provenance(clip, {f"{i}.csv": "" for i in range(CANDIDATES)})
        self.stated = provenance.to_json()
        self.aimed_at = [{"input_ids": [20 + i, 30 + i, 40 + i], "labels": i} for i in range(CANDIDATES)]
        self.candidates = []
        for example in self.aimed_at:
            gradients = mean_gradients(self.model, classification_loss, [collate([example], 16)])
            self.candidates.append(sketches_of(gradient_basis(self.model, gradients, provenance).factors))

    def scores(self, data, randomness=None, token_budget=16):
        """The released scores; without noise unless asked for, each example in a pass of its own unless asked for."""
        self.passes += 1
        phase = Phase("basis", Gaussian(noise_multiplier=SIGMA), 1)
        plan = workbench.fit_plan(basis=self.stated, released_before=(phase,))
        with Ledger.create(self.path / f"{self.passes}.jsonl", plan) as ledger:
            examples = PrivateExamples(
                model=self.model,
                layers=self.layers,
                dataset=data,
                loss_fn=scaled_loss,
                collate=Collator(0),
                synthetic=synthetic_examples("classification", 61, 3, workbench.PADDED),
                max_length=workbench.PADDED,
                token_budget=token_budget,
                ledger=ledger,
                randomness=randomness or NoNoise(),
                _rehearsed=[True],
            )
            found = examples.release_preferences(self.candidates)
            assert ledger.charged("basis") == 1
            return found

    def neighbours(self, count):
        """Examples that come or go: random ones, those that a basis was made from, and those with odd losses."""
        sizes = [(token, size) for token in LOSS_SCALES for size in (1, 9)]
        odd = [{"input_ids": [token, *range(20, 20 + size)], "labels": size % 3} for token, size in sizes]
        return [*self.aimed_at, *odd, *workbench.examples(count, seed=5)]


CLIPS = [(1.0, "automatic"), (0.05, "flat"), (1.0, "flat")]


@pytest.mark.parametrize(("norm", "clipping"), CLIPS)
def test_one_example_moves_the_scores_by_no_more_than_the_event_charges(tiny, tmp_path, norm, clipping):
    """Added to or removed from the others: at most C in L2 norm, for any neighbour; the noise on a score is sigma C."""
    choice = Choice(tiny, tmp_path, Clip(l2_clip_norm=norm, clipping=clipping, share=0.01))
    others, moves = workbench.examples(5, seed=4), []
    without = choice.scores(others)
    for example in choice.neighbours(8):
        moves.append(float((choice.scores([*others[:2], example, *others[2:]]) - without).norm()))
    grid = SIGMA * norm * 2**-20 * CANDIDATES
    assert max(moves) <= norm + grid
    reached = 0.6 if (norm, clipping) == (1.0, "flat") else 0.9  # no row of shares, less their mean, is as long as 1
    assert max(moves) > reached * norm, "some neighbour comes near what is claimed"
    by_token = {token: moves[CANDIDATES + 2 * i] for i, token in enumerate(LOSS_SCALES)}
    assert min(by_token[7], by_token[8]) > 0.1 * norm, "a huge gradient counts like any other"
    assert by_token[11] == by_token[12] == by_token[13] == 0.0, "one that is not finite, or not there, not at all"
    assert moves[: len(choice.aimed_at)] == pytest.approx([max(moves)] * CANDIDATES, rel=0.2), "the candidates' own"
    noise = choice.scores(others, Ones()) - without
    assert noise.tolist() == pytest.approx([SIGMA * norm] * CANDIDATES, abs=grid)


def test_a_replaced_example_moves_them_by_no_more_than_twice_that(tiny, tmp_path):
    choice = Choice(tiny, tmp_path, Clip(l2_clip_norm=0.05, clipping="flat", share=0.01))
    others = workbench.examples(5, seed=4)
    found = [choice.scores([*others, example]) for example in choice.neighbours(2)]
    assert max(float((one - other).norm()) for one in found for other in found) <= 2 * 0.05 + 1e-6


def test_neighbours_in_one_microbatch_move_only_their_own_row(tiny, tmp_path):
    """Beside others in a batch the same holds, up to the rounding of float32."""
    choice = Choice(tiny, tmp_path, Clip(l2_clip_norm=1.0, clipping="automatic", share=0.01))
    others = workbench.examples(5, seed=4)
    without = choice.scores(others, token_budget=4096)
    for example in choice.neighbours(3):
        move = choice.scores([*others, example], token_budget=4096) - without
        assert float(move.norm()) <= 1.0 + 1e-3


def test_without_clipping_the_same_neighbours_would_break_the_claim(tiny, tmp_path, monkeypatch):
    choice = Choice(tiny, tmp_path, Clip(l2_clip_norm=0.05, clipping="flat", share=0.01))
    monkeypatch.setattr(Mechanism, "clip_and_sum", lambda _self, rows: torch.nan_to_num(rows.double()).sum(dim=0))
    others = workbench.examples(5, seed=4)
    moves = [float((choice.scores([*others, one]) - choice.scores(others)).norm()) for one in choice.aimed_at]
    assert min(moves) > 10 * 0.05


def test_the_plan_of_a_run_charges_the_ratio_that_is_used(tmp_path, files):
    seen = []

    def stop(plan):
        seen.append(plan)
        raise KeyboardInterrupt

    config = workbench.run_config(tmp_path / "run", basis=f"public:{','.join(files)}", basis_choice="private")
    with pytest.raises(KeyboardInterrupt):
        run.fine_tune(config, callbacks=run.Callbacks(on_plan=stop))
    (plan,) = seen
    phase = plan.phase("basis")
    expected = basis_noise_multiplier(epsilon=8.0, delta=plan.delta, share=0.01, neighboring=plan.neighboring)
    assert phase == Phase("basis", Gaussian(noise_multiplier=expected), 1)
    with Ledger.create(tmp_path / "ledger.jsonl", plan) as ledger:
        examples = PrivateExamples(
            model=torch.nn.Linear(1, 1), layers={}, dataset=(), loss_fn=scaled_loss, collate=Collator(0), synthetic=(),
            max_length=16, token_budget=16, ledger=ledger, randomness=NoNoise(),
        )  # fmt: skip
        mechanism = examples.mechanism
    assert mechanism.noise_std == expected * mechanism.l2_clip_norm
    assert mechanism.l2_clip_norm == plan.basis["l2_clip_norm"] == 1.0
