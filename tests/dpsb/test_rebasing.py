"""Periodic re-basing: the same function before and after, one plain adapter at the end, and no epsilon."""

import json

import pytest
import torch
import workbench
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dpsb import attach, rebasing, run
from dpsb.adapter import Factors
from dpsb.basis import random, stage
from dpsb.basis._common import public_generator
from dpsb.basis.setup import Setup
from dpsb.basis.sources import public_gradients
from dpsb.checkpoint import load_checkpoint, save_checkpoint
from dpsb.config import ConfigError
from dpsb.data import DataError
from dpsb.models import HEAD_NAMES, add_lora
from dpsb.rebasing import Rebasing, RebasingError
from dpsb.train import fit
from dpsb_accounting import Ledger, LedgerError, epsilon

IDS = torch.randint(5, 20, (3, 9), generator=torch.Generator().manual_seed(1))
LOADERS = {
    "classification": lambda: AutoModelForSequenceClassification.from_pretrained(workbench.bert_folder(), num_labels=2),
    "causal-lm": lambda: AutoModelForCausalLM.from_pretrained(workbench.llama_folder()),
}


pytestmark = pytest.mark.usefixtures("quick_calibration")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def adapted(kind="classification", rank=4):
    model = add_lora(LOADERS[kind](), kind, rank)
    return attach(model, random(model), allow=HEAD_NAMES)


def shake(adapter, seed=0):
    """Puts the cores somewhere, as steps would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for core in adapter.cores:
            core.up.core.weight.copy_(0.3 * torch.randn(core.up.core.weight.shape, generator=generator))


def other_random(adapter):
    return lambda window: random(adapter.model, generator=public_generator(window)).factors


@pytest.mark.parametrize("kind", LOADERS)
def test_folding_changes_no_output_and_unfolding_neither(kind, tmp_path):
    adapter = adapted(kind)
    start = logits(adapter.model)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.1)
    moving = Rebasing(2, other_random(adapter))
    for step in (1, 2, 3, 4, 5):
        shake(adapter, step)
        before = logits(adapter.model)
        moving.after_step(step, 6, adapter, optimizer)
        torch.testing.assert_close(logits(adapter.model), before, rtol=1e-4, atol=1e-5)
        assert all((core.up.core.weight == 0).all() for core in adapter.cores) == (step in (2, 4))
    assert moving.count == 2
    assert float((before - start).abs().max()) > 0.01, "the cores do something"
    plain = moving.unfold(adapter)
    assert plain.cores == ()
    torch.testing.assert_close(logits(plain.model), before, rtol=1e-4, atol=1e-5)
    plain.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LOADERS[kind](), str(tmp_path))
    torch.testing.assert_close(logits(loaded), before, rtol=1e-4, atol=1e-5)
    assert loaded.peft_config["default"].r == loaded.peft_config["default"].lora_alpha == 12


def test_a_weight_that_is_shared_keeps_its_value_elsewhere(tiny):
    """A head that is tied to the embeddings, and two layers on one weight: PEFT adapts each of them on its own."""
    base = tiny.base("llama")
    base.lm_head.weight = base.model.embed_tokens.weight
    first, second = (block.mlp.up_proj for block in base.model.layers[:2])
    second.weight = first.weight
    model = add_lora(base, "causal-lm", 4, ["lm_head", "up_proj"])
    adapter = attach(model, random(model), allow=HEAD_NAMES)
    assert len(adapter.cores) == 3
    tied = base.model.embed_tokens.weight
    start, values = logits(model), tied.detach().clone()
    shake(adapter)
    before = logits(model)
    moving = Rebasing(1, other_random(adapter))
    moving.after_step(1, 3, adapter, torch.optim.SGD(adapter.parameters(), lr=0.1))
    assert float((before - start).abs().max()) > 0.01
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(moving.unfold(adapter).model), before, rtol=1e-4, atol=1e-5)
    assert base.model.embed_tokens.weight is tied
    assert torch.equal(tied, values)


def test_the_last_step_is_not_followed_by_a_window_that_nobody_uses():
    adapter = adapted()
    moving = Rebasing(2, other_random(adapter))
    moving.after_step(4, 4, adapter, torch.optim.SGD(adapter.parameters(), lr=0.1))
    assert moving.count == 0
    assert moving.unfold(adapter) is adapter


def test_what_the_optimizer_knows_of_the_old_window_is_dropped_and_of_the_head_is_kept():
    adapter = adapted()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.1)
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    Rebasing(1, other_random(adapter)).after_step(1, 2, adapter, optimizer)
    cores = {id(core.up.core.weight) for core in adapter.cores}
    assert {id(parameter) for parameter in optimizer.state} == {id(p) for p in adapter.parameters()} - cores


def trained(out, **changes):
    """A run of five steps that re-bases every second one; what the model in memory computes at its end."""
    kept = {}
    original = Rebasing.unfold

    def keep(self, adapter):
        kept["logits"] = logits(adapter.model)
        return original(self, adapter)

    settings = {"basis": "random", "rebase_every": 2, "steps": 5, "learning_rate": 0.3, **changes}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rebasing, "unfold", keep)
        return run.fine_tune(workbench.run_config(out, **settings)), kept["logits"]


class CutOff(KeyboardInterrupt):
    """Stands for a machine that went down."""


def cut_off(out, monkeypatch, basis="random"):
    """The same run, cut off after its last step and before anything of it is saved; what its model computed then."""
    kept = {}

    def crash(_self, adapter):
        kept["logits"] = logits(adapter.model)
        raise CutOff

    config = workbench.run_config(out, basis=basis, rebase_every=2, steps=5, learning_rate=0.3)
    with monkeypatch.context() as patch:
        patch.setattr(Rebasing, "unfold", crash)
        with pytest.raises(CutOff):
            run.fine_tune(config)
    return kept["logits"]


def loaded_from(out):
    return PeftModel.from_pretrained(LOADERS["classification"](), str(out))


def test_a_run_leaves_one_plain_adapter_on_the_untouched_base_and_pays_nothing_for_it(tmp_path):
    finished, expected = trained(tmp_path / "run")
    model = loaded_from(tmp_path / "run")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert model.peft_config["default"].r == 12
    assert not (tmp_path / "run" / "dpsb_core.safetensors").exists(), "no single core describes it"
    assert not (tmp_path / "run" / "checkpoint").exists()
    ledger = Ledger.read(tmp_path / "run" / "ledger.jsonl")
    assert ledger.plan.details["rebase_every"] == 2
    run.fine_tune(workbench.run_config(tmp_path / "usual", basis="random", steps=5))
    usual = Ledger.read(tmp_path / "usual" / "ledger.jsonl")
    assert "rebase_every" not in usual.plan.details
    assert ledger.plan.phases == usual.plan.phases
    assert epsilon(ledger) == epsilon(usual)
    assert finished.report.claim is True
    assert "re-based every 2 steps" in (tmp_path / "run" / "README.md").read_text()


def test_a_run_that_is_cut_off_goes_on_in_the_window_where_it_was(tmp_path, monkeypatch):
    out, kept = tmp_path / "run", cut_off(tmp_path / "run", monkeypatch)
    assert Ledger.read(out / "ledger.jsonl").charged("train") == 5
    run.fine_tune(run.resumed_config(str(out), {}), resume=True)
    torch.testing.assert_close(logits(loaded_from(out)), kept, rtol=1e-4, atol=1e-5)
    assert float((kept - logits(LOADERS["classification"]())).abs().max()) > 0.01


def test_a_checkpoint_holds_every_window_to_the_bit(tmp_path):
    adapter, ledger = adapted(), workbench.new_ledger(tmp_path)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.1)
    moving = Rebasing(1, other_random(adapter))
    with ledger:
        for step in (1, 2):
            shake(adapter, step)
            moving.after_step(step, 9, adapter, optimizer)
        shake(adapter, 3)
        save_checkpoint(tmp_path, adapter, optimizer, ledger, None, moving)
        other = adapted()
        again = Rebasing(1, other_random(other))
        assert load_checkpoint(tmp_path, other, torch.optim.Adam(other.parameters(), lr=0.1), ledger, again)
        assert (logits(other.model) == logits(adapter.model)).all()
        assert again.count == 2
        (tmp_path / "checkpoint" / rebasing.REBASED_NAME).write_bytes(b"cut off")
        with pytest.raises(LedgerError, match="cannot be read"):
            load_checkpoint(tmp_path, adapted(), torch.optim.Adam(other.parameters(), lr=0.1), ledger, again)


def test_public_directions_are_those_of_the_weights_and_the_head_as_they_then_are(tmp_path, monkeypatch):
    seen = []
    original = stage.new_factors

    def watched(setup, provenance):
        inner = original(setup, provenance)

        def factors(window):
            found = inner(window)
            seen.append((setup, {name: value.clone() for name, value in setup.model.state_dict().items()}, found))
            return found

        return factors

    monkeypatch.setattr(rebasing, "new_factors", watched)
    trained(tmp_path / "run", basis=f"public:{workbench.data_file(seed=5)}", head_init_std=1.0)
    assert len(seen) == 2
    for setup, state, found in seen:
        fresh = add_lora(LOADERS["classification"](), "classification", 4)
        own = fresh.state_dict()
        moved = {name: value for name, value in state.items() if name in own and "lora_" not in name}
        assert len(moved) > 10
        fresh.load_state_dict({**own, **moved})
        gradients = public_gradients(
            fresh, setup.loss_fn, setup.public[0], setup.collate, setup.max_length, 4096, setup.config.head_init_std
        )
        for name, factors in found.items():
            U, _, Vh = torch.linalg.svd(gradients[name])
            assert float((factors.B.T @ U[:, :4]).square().sum()) == pytest.approx(4, abs=1e-2)
            assert float((factors.A @ Vh[:4].T).square().sum()) == pytest.approx(4, abs=1e-2)
    first, second = (found for _, _, found in seen)
    assert any(float((first[n].A @ second[n].A.T).square().sum()) < 3.9 for n in first), "training moved the gradient"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"basis": "weight"}, "rebase_every=2 is for 'random' and 'public'"),
        ({"basis": "private"}, "rebase_every=2 is for 'random' and 'public'"),
        ({"method": "lora", "basis": "weight"}, "rebase_every=2 is for 'random' and 'public'"),
        ({"rebase_every": 0}, "Expected rebase_every=0 of at least 1"),
        ({"dtype": "bfloat16"}, "rebase_every=2 adds to the frozen weights"),
        ({"precondition": "near.csv"}, "rebase_every=2 adds to the frozen weights"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        workbench.run_config(tmp_path / "run", **{"basis": "random", "rebase_every": 2, **changes})
    assert not (tmp_path / "run").exists()


def test_in_a_sweep_a_method_without_new_directions_ignores_it(tmp_path):
    shared = {"rebase_every": 2, "part_of_sweep": True}
    assert not workbench.run_config(tmp_path, **shared, method="lora").rebases
    assert not workbench.run_config(tmp_path, **shared, basis="weight").rebases
    assert workbench.run_config(tmp_path, **shared, basis="random").rebases


def test_weights_that_would_round_the_update_away_are_refused(tmp_path):
    adapter = adapted()
    adapter.cores[0].layer.get_base_layer().to(torch.bfloat16)
    config = workbench.run_config(tmp_path, basis="random", rebase_every=2)
    setup = Setup(
        config=config,
        model=adapter.model,
        loss_fn=None,
        collate=None,
        examples=(),
        public=(),
        max_length=16,
        delta=1e-5,
        neighboring="zero_out",
    )
    with pytest.raises(RebasingError, match=r"takes plain ones in float32; .* of bfloat16"):
        rebasing.rebasing_of(setup, adapter)


def test_a_plan_cannot_change_on_resume(tmp_path, monkeypatch):
    out = tmp_path / "run"
    cut_off(out, monkeypatch, f"public:{workbench.data_file(seed=5)}")
    for changes in ({"rebase_every": 3}, {"basis": f"public:{workbench.data_file(seed=6)}"}):
        with pytest.raises(run.RunError, match="differ from the run's plan"):
            run.fine_tune(run.resumed_config(str(out), changes), resume=True)
    settings = json.loads((out / "run.json").read_text())
    assert settings["rebase_every"] == 2


def test_a_resumed_run_takes_no_directions_from_a_file_that_has_changed(tmp_path, monkeypatch):
    """The ledger says, by its SHA-256, which file the directions are from."""
    public, out = tmp_path / "near.jsonl", tmp_path / "run"
    public.write_bytes(workbench.data_file(seed=5).read_bytes())
    cut_off(out, monkeypatch, f"public:{public}")
    public.write_bytes(workbench.data_file(seed=6).read_bytes())
    with pytest.raises(DataError, match=r"near.jsonl is not the file that the run began with"):
        run.fine_tune(run.resumed_config(str(out), {}), resume=True)
    public.write_bytes(workbench.data_file(seed=5).read_bytes())
    assert run.fine_tune(run.resumed_config(str(out), {}), resume=True).report.claim


def test_other_processes_would_not_know_of_it(tiny, tmp_path):
    adapter = tiny.adapter(tiny.base("bert"))
    with workbench.new_ledger(tmp_path) as ledger:
        arguments, named = workbench.fit_arguments(adapter, workbench.examples(), ledger, loss_fn=tiny.loss["bert"])
        with pytest.raises(ValueError, match="rebasing and team do not go together"):
            fit(*arguments, **named, rebasing=Rebasing(1, other_random(adapter)), team=object())
        assert ledger.charged("train") == 0


def test_every_layer_gets_a_factor_of_its_own_shape():
    adapter = adapted()
    found = other_random(adapter)(3)
    assert {name: (f.A.shape, f.B.shape) for name, f in found.items()} == {
        core.name: (core.layer.lora_A["default"].weight.shape, core.up.up.shape) for core in adapter.cores
    }
    assert all(isinstance(f, Factors) for f in found.values())
