"""A head that starts from public rows, and rows that are scaled by public second moments before they are clipped."""

import json
from hashlib import sha256

import pytest
import torch
import workbench

from dpsb import run
from dpsb.config import ConfigError
from dpsb.data import Collator, DataError
from dpsb.losses import IGNORED, classification_loss
from dpsb.mechanism import Mechanism
from dpsb.models import head_of, load_base
from dpsb.precondition import public_row_scale
from dpsb.randomness import SeededRandomness
from dpsb.train import fit
from dpsb.warm_start import warm_start
from dpsb_accounting import Ledger, verify

pytestmark = pytest.mark.usefixtures("quick_calibration")


# --- warm start


def loss_on(model, examples):
    with torch.no_grad():
        return float(classification_loss(model.eval(), Collator(0)(examples, workbench.PADDED)).mean())


@pytest.mark.parametrize("kind", ["bert", "pooled", "llama"])
def test_the_head_is_where_the_penalized_loss_is_least(kind):
    folder = workbench.llama_folder() if kind == "llama" else workbench.bert_folder(pooled=kind == "pooled")
    model, _ = load_base(str(folder), "classification", ["a", "b", "c"])
    examples = [e for e in workbench.examples(40) if e["labels"] != IGNORED]
    before = loss_on(model, examples)
    frozen = {name: p.clone() for name, p in model.named_parameters() if p is not head_of(model).weight}
    assert warm_start(model, examples, Collator(0), workbench.PADDED, 64) == 40
    assert loss_on(model, examples) < before
    head = head_of(model)
    model.zero_grad()
    penalty = head.weight.square().sum() / (2 * len(examples))
    (classification_loss(model.eval(), Collator(0)(examples, workbench.PADDED)).mean() + penalty).backward()
    assert head.weight.grad.norm() < 2e-3
    for name, value in frozen.items():
        if not name.endswith("classifier.bias"):
            assert torch.equal(value, dict(model.named_parameters())[name]), name


def test_rows_without_a_label_of_the_run_count_for_nothing():
    model, _ = load_base(str(workbench.bert_folder()), "classification", ["a", "b", "c"])
    examples = [*workbench.examples(12), {"input_ids": [5, 6], "labels": IGNORED}]
    assert warm_start(model, examples, Collator(0), workbench.PADDED, 64) == 12
    with pytest.raises(DataError, match="at least two of the run's labels; 0 of 1"):
        warm_start(model, examples[-1:], Collator(0), workbench.PADDED, 64)


@pytest.mark.parametrize("method", ["sb", "lora", "head-only"])
def test_a_run_starts_from_it_and_resumes_from_the_same_start(tmp_path, monkeypatch, method):
    out, public = tmp_path / "run", str(workbench.data_file(seed=5))

    def cut(*_args, **_named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dpsb.train._step", cut)
        with pytest.raises(KeyboardInterrupt):
            run.fine_tune(workbench.run_config(out, method=method, warm_start=public))
    start = (out / "start.safetensors").read_bytes()
    plain = workbench.run_config(tmp_path / "plain", method=method)
    with monkeypatch.context() as patch:
        patch.setattr("dpsb.train._step", cut)
        with pytest.raises(KeyboardInterrupt):
            run.fine_tune(plain)
    assert (tmp_path / "plain" / "start.safetensors").read_bytes() != start
    monkeypatch.setattr("dpsb.inputs.warm_start", lambda *_a: pytest.fail("the start of a resumed run is on disk"))
    assert run.fine_tune(run.resumed_config(str(out), {}), resume=True).report.claim
    assert Ledger.read(out / "ledger.jsonl").plan.details["warm_start"] == "rows.jsonl"
    assert verify(out / "ledger.jsonl").ok


# --- second moments


def test_the_scale_is_that_of_the_public_rows_and_keeps_their_norm(tiny):
    adapter = tiny.adapter(tiny.base("bert"))
    examples = workbench.examples(20)
    scale = public_row_scale(adapter, classification_loss, examples, Collator(0), workbench.PADDED, 64)
    rows = tiny.rows(adapter, classification_loss, Collator(0)(examples, workbench.PADDED)).double()
    second = (rows / rows.norm(dim=1, keepdim=True)).square().mean(dim=0)
    expected = 1 / (second.sqrt() + 0.1 * second.mean().sqrt())
    expected = expected * (rows.square().sum() / (rows * expected).square().sum()).sqrt()
    torch.testing.assert_close(scale, expected, rtol=1e-3, atol=0)
    assert (rows * scale).norm().item() == pytest.approx(rows.norm().item(), rel=1e-3)


def test_rows_are_clipped_after_they_are_scaled():
    scale = torch.tensor([100.0, 0.01], dtype=torch.float64)
    mechanism = Mechanism(l2_clip_norm=1.0, noise_multiplier=1.0, clipping="flat", row_scale=scale)
    rows = torch.tensor([[3.0, 4.0], [1e-3, 1.0], [float("nan"), 1.0], [3e38, 3e38]])
    kept = [mechanism.clip_and_sum(row[None]) for row in rows]
    assert [round(float(one.norm()), 6) for one in kept] == [1.0, 0.100499, 0.0, 1.0]
    torch.testing.assert_close(kept[1], torch.tensor([0.1, 0.01], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(mechanism.clip_and_sum(rows), sum(kept))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_and_finite_is_refused(bad):
    with pytest.raises(ValueError, match="row_scale"):
        Mechanism(l2_clip_norm=1.0, noise_multiplier=1.0, clipping="flat", row_scale=torch.tensor([1.0, bad]))


@pytest.mark.parametrize("changes", [{}, {"auto_clip": True}, {"adaptive_clip": 0.5}, {"method": "lora"}])
def test_a_run_with_it_differs_only_in_what_is_clipped(tmp_path, changes):
    public = str(workbench.data_file(seed=5))
    for name, given in (("with", {"precondition": public}), ("without", {})):
        run.fine_tune(workbench.run_config(tmp_path / name, insecure_seed=3, **given, **changes))
    plans = [Ledger.read(tmp_path / name / "ledger.jsonl").plan for name in ("with", "without")]
    assert plans[0].details["precondition"] == "rows.jsonl"
    assert plans[0].phases == plans[1].phases
    assert plans[0].l2_clip_norm == plans[1].l2_clip_norm
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("with", "without")]
    assert weights[0] != weights[1]
    assert verify(tmp_path / "with" / "ledger.jsonl").ok


def test_a_constant_scale_changes_nothing_under_clipping_by_norm(tiny, tmp_path):
    """AUTO-S rows of any common scale are the same rows, but for its gamma; checks that the loop hands the scale on."""
    states = []
    for name, scale in (("plain", None), ("scaled", 1e6)):
        adapter = tiny.adapter(tiny.base("bert"))
        ledger = workbench.new_ledger(tmp_path / name, clipping="automatic")
        args, named = workbench.fit_arguments(
            adapter,
            workbench.examples(),
            ledger,
            loss_fn=classification_loss,
            randomness=SeededRandomness(1),
        )
        row_scale = None if scale is None else torch.full((adapter.dimension,), scale, dtype=torch.float64)
        fit(*args, **named, row_scale=row_scale)
        states.append(adapter.state())
    for key, value in states[0].items():
        torch.testing.assert_close(value, states[1][key], rtol=0.2, atol=0.02)


# --- bad input


def test_bad_input_is_one_sentence(tmp_path):
    private = str(workbench.data_file())
    for name in ("warm_start", "precondition"):
        with pytest.raises(ConfigError, match=f"{name}=.* names the private training data as public"):
            workbench.run_config(tmp_path, **{name: private})
    with pytest.raises(ConfigError, match="is for a classification head"):
        workbench.run_config(tmp_path, "causal-lm", warm_start="public.parquet")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in "xyz"))
    with pytest.raises(DataError, match="at least two of the run's labels; 0 of 3"):
        run.fine_tune(workbench.run_config(tmp_path / "run", warm_start=str(other)))
    with pytest.raises(DataError, match="no row has a usable label"):
        run.fine_tune(workbench.run_config(tmp_path / "run", precondition=str(other)))
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def test_second_moments_are_not_those_of_the_first_rows(tiny, monkeypatch):
    adapter, seen = tiny.adapter(tiny.base("bert")), []

    def collate(examples, length):
        seen.extend(example["labels"] for example in examples)
        return Collator(0)(examples, length)

    monkeypatch.setattr("dpsb.precondition.EXAMPLES", 12)
    by_label = sorted(workbench.examples(60), key=lambda example: example["labels"])
    public_row_scale(adapter, classification_loss, by_label, collate, workbench.PADDED, 64)
    assert len(seen) == 12
    assert set(seen) == {0, 1, 2}


def test_canaries_and_a_scale_do_not_go_together(tiny, tmp_path):
    adapter = tiny.adapter(tiny.base("bert"))
    ledger = workbench.new_ledger(tmp_path)
    args, named = workbench.fit_arguments(adapter, workbench.examples(), ledger, loss_fn=classification_loss)
    with pytest.raises(ValueError, match="do not go together"):
        fit(*args, **named, row_scale=torch.ones(adapter.dimension), canaries=[])


def planned(out, monkeypatch, **changes):
    """The plan of a run that ends before its first step."""

    def cut(*_args, **_named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dpsb.train._step", cut)
        with pytest.raises(KeyboardInterrupt):
            run.fine_tune(workbench.run_config(out, **changes))
    return Ledger.read(out / "ledger.jsonl").plan


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"basis": "public:{0}"}, {"source": 0}),
        ({"basis": "hybrid:{0}"}, {"source": 0}),
        ({"basis": "lora-sb:{0}"}, {"source": 0}),
        ({"basis": "public:{0},{1}"}, {"source": 0, "candidate_1": 0, "candidate_2": 1}),
        ({"basis": "public:{0},{1}", "basis_choice": "private"}, {"candidate_1": 0, "candidate_2": 1}),
        ({"method": "peft:eva:{0}"}, {"source": 0}),
        ({"warm_start": "{0}", "precondition": "{1}"}, {"warm_start": 0, "precondition": 1}),
    ],
    ids=["public", "hybrid", "lora-sb", "ranked", "choice", "eva", "head and rows"],
)
def test_a_plan_holds_the_digest_of_every_public_file(tmp_path, monkeypatch, changes, where):
    files = [workbench.data_file(seed=seed) for seed in (5, 6)]
    given = {name: value.format(*files) for name, value in changes.items()}
    plan = planned(tmp_path / "run", monkeypatch, **given)
    stated = {**plan.details, **plan.basis}
    digests = {f"{name}_sha256": sha256(files[index].read_bytes()).hexdigest() for name, index in where.items()}
    assert {name: stated[name] for name in stated if name.endswith("_sha256") and name != "start_sha256"} == digests


def test_a_public_file_that_changed_is_noticed_on_resume(tmp_path, monkeypatch):
    near = tmp_path / "near.jsonl"
    near.write_bytes(workbench.data_file(seed=5).read_bytes())
    planned(tmp_path / "run", monkeypatch, warm_start=str(near))
    near.write_bytes(workbench.data_file(seed=6).read_bytes())
    with pytest.raises(run.RunError, match="differ from the run's plan"):
        run.fine_tune(run.resumed_config(str(tmp_path / "run"), {}), resume=True)
