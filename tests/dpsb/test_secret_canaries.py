"""Secrets in a language model's data: a model that memorizes them is found, by rank and by what it writes."""

import json

import numpy as np
import pytest
import torch
import workbench
from typer.testing import CliRunner

from dpsb import audit as auditor
from dpsb.canaries import example_losses
from dpsb.cli import app
from dpsb.data import Collator
from dpsb.losses import IGNORED
from dpsb.randomness import SeededRandomness
from dpsb.run import fine_tune
from dpsb.secret_canaries import SecretCanaries
from dpsb_accounting.auditing import audit


def losses_of(tiny, model):
    return lambda examples: example_losses(model, examples, tiny.loss["llama"], Collator(0), 16, 2048)


def test_secrets_are_completions_and_come_from_the_randomness(tiny):
    one, same, other = (SecretCanaries(40, tiny.vocab, 12, 5, SeededRandomness(s)) for s in (1, 1, 2))
    assert one.examples() == same.examples() != other.examples()
    assert len(one.examples()) == one.included.sum()
    for example in one.examples():
        assert len(example["input_ids"]) == len(example["labels"]) == 12
        assert example["labels"][:6] == [IGNORED] * 6
        assert example["labels"][6:] == example["input_ids"][6:]
        assert all(0 <= token < tiny.vocab for token in example["input_ids"])


def test_a_model_that_never_saw_them_knows_nothing(tiny):
    model = tiny.base("llama")
    secrets = SecretCanaries(200, tiny.vocab, 12, 31, SeededRandomness(3))
    scores = secrets.by_rank(losses_of(tiny, model))
    secrets.by_writing(model)
    found = secrets.summary()
    assert found["exposure_inserted"] == pytest.approx(1.44, abs=0.4)
    assert found["exposure_left_out"] == pytest.approx(1.44, abs=0.4)
    assert found["written_inserted"] == found["written_left_out"] == 0
    assert abs(scores.inserted.mean() - scores.left_out.mean()) < 0.5
    assert audit(scores, "one-run", delta=1e-5).epsilon < 1


def test_a_model_that_memorized_them_is_refuted_by_rank_and_by_writing(tiny):
    model, secrets = tiny.base("llama"), SecretCanaries(40, tiny.vocab, 8, 31, SeededRandomness(3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = Collator(0)(secrets.examples(), 8)
    model.train()
    for _ in range(150):
        tiny.loss["llama"](model, batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for scores in (secrets.by_rank(losses_of(tiny, model)), secrets.by_writing(model)):
        assert "black box" in scores.threat_model
        assert audit(scores, "one-run", delta=1e-5, guesses=(20,)).epsilon > 1.5
    found = secrets.summary()
    assert found["exposure_inserted"] > 4.9 > found["exposure_left_out"] + 1
    assert found["written_inserted"] > 0.9
    assert found["written_left_out"] == 0
    assert model.training, "the model is left in the mode in which it was"


def test_only_leading_tokens_count():
    """A model that writes the secret but for its first token has written nothing."""
    secrets = SecretCanaries(20, 50, 8, 1, SeededRandomness(1))

    class Parrot(torch.nn.Module):
        def __init__(self, wrong):
            super().__init__()
            self.weight, self.wrong = torch.nn.Parameter(torch.zeros(1)), wrong

        def generate(self, input_ids, **_options):
            answer = torch.from_numpy(secrets._secrets[:, 0].copy())
            answer[:, self.wrong] += 1
            return torch.cat([input_ids, answer], dim=1)

    assert secrets.by_writing(Parrot(0)).values.tolist() == [0] * 20
    assert secrets.by_writing(Parrot(2)).values.tolist() == [2] * 20


def test_losses_that_are_not_finite_are_no_secret(tiny):
    secrets = SecretCanaries(20, tiny.vocab, 8, 3, SeededRandomness(1))
    scores = secrets.by_rank(lambda examples: np.full(len(examples), np.nan))
    assert np.isfinite(scores.values).all()


@pytest.mark.parametrize(("count", "length", "references"), [(1, 8, 4), (4, 1, 4), (4, 8, 0)])
def test_refuses(count, length, references):
    with pytest.raises(ValueError, match="at least"):
        SecretCanaries(count, 61, length, references)


def test_dpsb_audit_of_a_language_model_attacks_with_secrets(tmp_path, monkeypatch):
    monkeypatch.setattr("dpsb.plan.noise_multiplier_for", workbench.calibrated)
    monkeypatch.setattr(auditor, "_MANY", 8000)
    run = fine_tune(workbench.run_config(tmp_path / "run", "causal-lm"))
    done = CliRunner().invoke(app, ["audit", str(run.out), "--json", "--input-canaries", "30", "--canaries", "50"])
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    names = [attack["name"] for attack in content["attacks"]]
    assert names == ["gradient canaries", "input canaries", "secrets, by rank", "secrets, by generation"]
    assert set(content["secrets"]) == {
        "exposure_inserted",
        "exposure_left_out",
        "written_inserted",
        "written_left_out",
    }
    assert not content["refuted"]
    assert "Of the secrets that were put in" in (tmp_path / "run-audit" / "audit.html").read_text()
