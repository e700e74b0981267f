"""Other people's engines run these adapters: Opacus, accelerate, PEFT."""

import pytest
import torch
from opacus import PrivacyEngine
from torch.utils.data import DataLoader, Dataset

from dpsb.losses import classification_loss


class Mails(Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch["labels"])

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.batch.items()}


def frozen(model):
    return {name: value.clone() for name, value in model.named_buffers() if name.endswith((".weight", ".up"))}


def loader(tiny, count=24):
    return DataLoader(Mails(tiny.batch("bert", lengths=[12] * count)), batch_size=8)


@pytest.mark.parametrize("wrap_model", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Opacus says that its generator is not a secure one
def test_a_plain_opacus_engine_trains_the_cores(tiny, wrap_model):
    adapter = tiny.adapter(tiny.base("bert"), scatter=0.0)
    cores, factors = adapter.state(), frozen(adapter.model)
    weights = {n: p.detach().clone() for n, p in adapter.model.named_parameters() if not p.requires_grad}
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    made = PrivacyEngine().make_private(
        module=adapter.model,
        optimizer=optimizer,
        data_loader=loader(tiny),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=True,
        grad_sample_mode="hooks",
        wrap_model=wrap_model,
    )
    engine_part, optimizer, batches = made
    model = engine_part if wrap_model else adapter.model
    steps = 0
    while steps < 2:
        for batch in batches:
            if not len(batch["labels"]):
                continue
            optimizer.zero_grad()
            classification_loss(model, batch).mean().backward()
            assert all(p.grad_sample.shape[0] == len(batch["labels"]) for p in adapter.parameters())
            optimizer.step()
            steps += 1
    assert all(not torch.equal(cores[name], R) for name, R in adapter.state().items())
    assert len(factors) == 2 * len(adapter.cores)
    assert all(torch.equal(factors[name], value) for name, value in frozen(adapter.model).items())
    after = dict(adapter.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in weights.items())


def test_accelerate_trains_the_cores_without_privacy(tiny):
    accelerate = pytest.importorskip("accelerate")
    adapter = tiny.adapter(tiny.base("bert"), scatter=0.0)
    cores, factors = adapter.state(), frozen(adapter.model)
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, batches = accelerator.prepare(
        adapter.model, torch.optim.AdamW(adapter.parameters(), lr=0.01), loader(tiny)
    )
    accelerator.backward(classification_loss(model, next(iter(batches))).mean())
    optimizer.step()
    assert all(not torch.equal(cores[name], R) for name, R in adapter.state().items())
    assert all(torch.equal(factors[name], value) for name, value in frozen(adapter.model).items())


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_peft_merges_and_unloads_an_attached_adapter(tiny, kind):
    """Without dpsb's own merge: PEFT reads ``weight`` of the two factors."""
    adapter, batch = tiny.adapter(tiny.base(kind)), tiny.batch(kind)
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        expected = adapter.model(**inputs).logits
        merged = adapter.model.merge_and_unload()(**inputs).logits
    assert tiny.distance(merged, expected) <= 1e-5


def test_trained_model_still_generates(tiny):
    adapter = tiny.adapter(tiny.base("llama"))
    tokens = adapter.model.eval().generate(
        input_ids=torch.tensor([[3, 4, 5]]),
        attention_mask=torch.ones(1, 3).long(),
        max_new_tokens=3,
        do_sample=False,
    )
    assert tokens.shape[1] > 3
