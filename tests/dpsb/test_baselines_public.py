"""EVA and LoRA-GA: their start is what the papers say, is of public rows alone, and is found again on a resume."""

import json

import numpy as np
import pytest
import torch
import workbench
from peft import PeftConfig, PeftModel
from sweeps import Silent, settings_of, shared
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, OPTConfig, OPTForCausalLM
from typer.testing import CliRunner

from dpsb import beginning, run, train
from dpsb.adapter import lora_layers
from dpsb.baselines.build import adapt, add_method
from dpsb.baselines.methods import MethodError, method_named
from dpsb.baselines.public_starts import input_directions, public_start
from dpsb.basis.gradient import mean_gradients
from dpsb.basis.sources import PublicSet
from dpsb.capture import adapter_train_mode
from dpsb.cli import app
from dpsb.compare import compare_methods
from dpsb.config import ConfigError
from dpsb.curves.entries import CurveError, labels_of, parse_entries, parse_rates
from dpsb.curves.fits import check_methods
from dpsb.data import Collator, DataError
from dpsb.losses import IGNORED
from dpsb.models import MeanPooledClassifier
from dpsb.probe import _perturb
from dpsb.start import attach_again, digest, start_of
from dpsb_accounting import Ledger, verify

RANK = 4
pytestmark = [
    pytest.mark.usefixtures("quick_calibration"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
]
TASK = {"bert": "classification", "pooled": "classification", "llama": "causal-lm", "gpt2": "causal-lm"}


def base_of(tiny, kind):
    if kind != "pooled":
        return tiny.base(kind)
    return MeanPooledClassifier(tiny.base("bert").bert, 3)


def with_method(base, kind, name="eva", rank=RANK):
    """A model that the method is on, before its start, and the method."""
    method = method_named(f"peft:{name}:near.csv")
    return add_method(base, method, TASK[kind], rank, "all-linear"), method


def public_of(kind, count=24):
    """Public examples of different lengths for the models of the conftest."""
    return workbench.examples(count, kind="llama" if TASK[kind] == "causal-lm" else "bert")


def started(tiny, kind, name):
    """The untouched base of a model, and the adapter on a second one, where its training starts."""
    model, method = with_method(base_of(tiny, kind), kind, name)
    found = PublicSet("near.csv", public_of(kind), 0, "the labels of the run")
    loss_fn = tiny.loss["llama" if TASK[kind] == "causal-lm" else "bert"]
    adapter = adapt(model, method, public_start(model, method, loss_fn, found, Collator(0), 16, 64, 0.3))
    adapter.model.train()
    adapter_train_mode(adapter)
    return base_of(tiny, kind).train(), adapter, loss_fn


# --- EVA


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_eva_starts_A_at_the_singular_directions_of_what_a_layer_receives(tiny, kind):
    model, _ = with_method(tiny.base(kind), kind)
    examples, received, handles = public_of(kind), {}, []
    for name, layer in lora_layers(model).items():
        keep = received.setdefault(name, []).append
        handles.append(layer.register_forward_pre_hook(lambda _, inputs, keep=keep: keep(inputs[0].detach()[0])))
    for example in examples:  # one by one, so that there is no padding
        batch = {name: value for name, value in Collator(0)([example], len(example["input_ids"])).items()}
        with torch.no_grad():
            model.eval()(**{name: value for name, value in batch.items() if name != "labels"})
    for handle in handles:
        handle.remove()
    batches = [Collator(0)(examples[i : i + 5], 16) for i in range(0, len(examples), 5)]
    found = input_directions(model, batches, source="near.csv")
    assert set(found) == set(received)
    for name, A in found.items():
        inputs = np.concatenate([np.atleast_2d(x.double().numpy()) for x in received[name]])
        V = np.linalg.svd(inputs, full_matrices=False)[2][:RANK]
        np.testing.assert_allclose(np.abs(np.sum(V * A.double().numpy(), axis=1)), 1, atol=1e-5, err_msg=name)
        torch.testing.assert_close(A @ A.T, torch.eye(RANK), atol=1e-5, rtol=0)


def opt():
    """A model whose blocks put all tokens of a batch in one row."""
    sizes = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OPTForCausalLM(OPTConfig(vocab_size=61, num_attention_heads=4, max_position_embeddings=64, **sizes))


@pytest.mark.parametrize("kind", ["bert", "opt"])
def test_padding_and_the_size_of_microbatches_change_nothing(tiny, kind):
    like = "llama" if kind == "opt" else kind
    model, _ = with_method(opt() if kind == "opt" else tiny.base(kind), like)
    examples = public_of(like)
    one = input_directions(model, [Collator(0)(examples, 16)], source="near.csv")
    other = input_directions(model, [Collator(0)([e], 40) for e in examples], source="near.csv")
    for name, A in one.items():
        torch.testing.assert_close(A.T @ A, other[name].T @ other[name], atol=1e-4, rtol=0)


def test_too_few_inputs_for_the_rank_are_refused(tiny):
    model, _ = with_method(tiny.base("bert"), "bert")
    batch = Collator(0)([{"input_ids": [3, 4, 5], "labels": 0}], 16)
    with pytest.raises(DataError, match=r"near.csv has too few rows for rank=4: \S+ receives [13] inputs"):
        input_directions(model, [batch], source="near.csv")


# --- LoRA-GA


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_the_first_step_of_lora_ga_is_along_the_rank_2r_part_of_the_gradient(tiny, kind):
    base, adapter, loss_fn = started(tiny, kind, "lora_ga")
    plain, _ = with_method(base, kind)
    batches = [Collator(0)(public_of(kind), 16)]
    gradients = mean_gradients(plain, loss_fn, batches)
    loss_fn(adapter.model, batches[0]).mean().backward()
    config = adapter.model.peft_config["default"]
    assert config.init_lora_weights == "lora_ga"
    config.init_lora_weights = True  # so that the layers are found
    for name, layer in lora_layers(adapter.model).items():
        A, B = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
        step = (B.grad @ A + B @ A.grad).detach()
        G = gradients[name]
        U, S, Vh = torch.linalg.svd(G)
        best = U[:, : 2 * RANK] @ torch.diag(S[: 2 * RANK]) @ Vh[: 2 * RANK]
        zeta = G.shape[0] ** 0.25 / 4
        torch.testing.assert_close(step / zeta**2, best, atol=2e-3 * float(best.abs().max()), rtol=2e-3)
        torch.testing.assert_close(A @ A.T, zeta**2 * torch.eye(RANK), atol=1e-4, rtol=0)
        torch.testing.assert_close(B.T @ B, zeta**2 * torch.eye(RANK), atol=1e-4, rtol=0)


def test_a_weight_that_is_shared_keeps_its_value_elsewhere(tiny):
    model, method = with_method(tiny.base("llama"), "llama", "lora_ga")
    base = next(iter(lora_layers(model).values())).get_base_layer()
    shared_with, before = base.weight, base.weight.detach().clone()
    public_start(
        model, method, tiny.loss["llama"], PublicSet("near", public_of("llama"), 0, ""), Collator(0), 16, 64, 0.3
    )
    assert torch.equal(shared_with, before)
    assert not torch.equal(base.weight, before)
    assert not base.weight.requires_grad


def test_lora_ga_needs_twice_the_rank(tiny):
    with pytest.raises(MethodError, match=r"two times rank=17 directions of each gradient, more than .*\(32 x 32\)"):
        with_method(tiny.base("bert"), "bert", "lora_ga", rank=17)


def test_a_quantized_base_is_not_moved(tiny):
    base = tiny.base("llama")

    class Packed(torch.nn.Parameter):
        pass

    layer = base.model.layers[0].mlp.up_proj
    layer.weight = Packed(layer.weight.detach(), requires_grad=False)
    with pytest.raises(MethodError, match=r"moves the base weights, and \S+up_proj is quantized \(Packed\)"):
        with_method(base, "llama", "lora_ga")


# --- both


@pytest.mark.parametrize("name", ["eva", "lora_ga"])
@pytest.mark.parametrize("kind", list(TASK))
def test_the_start_is_the_base_model_and_rows_are_exact(tiny, kind, name):
    base, adapter, loss_fn = started(tiny, kind, name)
    batch = tiny.batch("llama" if TASK[kind] == "causal-lm" else "bert")
    if kind == "pooled":
        base.classifier = adapter.model.classifier
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        assert tiny.distance(base(**inputs).logits, adapter.model(**inputs).logits) <= 1e-5
    assert adapter.provenance.to_json() == {
        "kind": f"peft:{name}",
        "access": "public",
        "source": "near.csv",
        "labels": "the labels of the run" if name == "lora_ga" else "not used: EVA reads what the layers receive",
    }
    trained = {key.split(".")[-3] for key, _ in adapter.named_parameters() if "lora" in key}
    assert trained == {"lora_A", "lora_B"}
    _perturb(adapter)
    rows = tiny.rows(adapter, loss_fn, batch)
    for i, row in enumerate(rows):
        exact = tiny.autograd_row(adapter, loss_fn(adapter.model, tiny.take(batch, slice(i, i + 1))).sum())
        assert tiny.distance(row, exact) <= 1e-5


@pytest.mark.parametrize("name", ["eva", "lora_ga"])
def test_a_start_is_found_again_bit_for_bit_and_so_is_the_base(tiny, name):
    _, adapter, _ = started(tiny, "bert", name)
    start = start_of(adapter)
    details = {"method": f"peft:{name}:near.csv", "start_sha256": digest(start)}
    plan = workbench.fit_plan(basis=adapter.provenance.to_json(), details=details)
    model, _ = with_method(tiny.base("bert"), "bert", name)
    again = attach_again(model, start, plan)
    assert start_of(again) == start
    assert again.provenance == adapter.provenance
    weights = dict(again.model.named_parameters())
    for path, weight in adapter.model.named_parameters():
        assert torch.equal(weight, weights[path]), path


# --- whole runs


def loaded(out, kind):
    """What plain PEFT makes of a finished run, on the untouched base."""
    if kind == "causal-lm":
        base = AutoModelForCausalLM.from_pretrained(workbench.llama_folder())
    else:
        base = AutoModelForSequenceClassification.from_pretrained(workbench.bert_folder(), num_labels=2)
    return PeftModel.from_pretrained(base, str(out)).eval()


def kept_model(monkeypatch):
    """Keeps the model that a run ends with, before its files are written."""
    kept, save = {}, run.save_run

    def spy(out, adapter, *rest):
        kept["model"] = adapter.model
        return save(out, adapter, *rest)

    monkeypatch.setattr(run, "save_run", spy)
    return kept


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
@pytest.mark.parametrize("name", ["eva", "lora_ga"])
def test_a_run_ends_in_a_plain_adapter_on_the_untouched_base(kind, name, tmp_path, monkeypatch):
    kept, public = kept_model(monkeypatch), str(workbench.data_file(kind, seed=5))
    config = workbench.run_config(tmp_path / "run", kind, method=f"peft:{name}:{public}", learning_rate=0.05)
    finished = run.fine_tune(config)
    ids = {"input_ids": torch.randint(6, 50, (3, 9)), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    with torch.no_grad():
        mine, theirs = kept["model"].eval()(**ids).logits, loaded(finished.out, kind)(**ids).logits
    assert float((mine - theirs).abs().max()) <= 5e-6
    assert PeftConfig.from_pretrained(str(finished.out)).r == (8 if name == "lora_ga" else 4)
    assert PeftConfig.from_pretrained(str(finished.out)).init_lora_weights is True
    stated = finished.report.to_json()["basis"]
    assert (stated["kind"], stated["access"], stated["source"]) == (f"peft:{name}", "public", public)
    assert stated["labels"]
    assert finished.report.claim
    assert verify(finished.out / "ledger.jsonl").ok
    assert f"method peft:{name} (rows.jsonl), rank 4" in (finished.out / "README.md").read_text()
    for canary in workbench.CANARIES:
        assert all(canary.encode() not in content for content in workbench.written(finished.out).values())


@pytest.mark.parametrize("name", ["eva", "lora_ga"])
def test_the_command_line_trains_it_with_labels_of_another_kind(name, tmp_path):
    public = tmp_path / "far.jsonl"
    texts = workbench.sentences(40, seed=9)
    public.write_text("".join(json.dumps({"text": t, "label": "abc"[i % 3]}) + "\n" for i, t in enumerate(texts)))
    settings = workbench.run_settings(tmp_path / "run", method=f"peft:{name}:{public}")
    result = CliRunner().invoke(app, ["train", *workbench.options(settings), "--json"])
    assert result.exit_code == 0, result.output
    labels = json.loads(result.stdout)["basis"]["labels"]
    assert labels.startswith("another label space: a random head of 3 classes" if name == "lora_ga" else "not used")


@pytest.mark.parametrize("name", ["eva", "lora_ga"])
def test_a_run_that_was_cut_goes_on_from_the_same_start(name, tmp_path, monkeypatch):
    """Nothing is computed again: a public file that has changed meanwhile moves neither the factors nor the base."""
    public = tmp_path / "near.jsonl"
    public.write_bytes(workbench.data_file(seed=5).read_bytes())
    kept, settings = kept_model(monkeypatch), {"method": f"peft:{name}:{public}", "insecure_seed": 3}
    run.fine_tune(workbench.run_config(tmp_path / "whole", **settings))
    whole, step, steps = kept["model"].state_dict(), train._step, []

    def cut(*arguments, **named):
        steps.append(0)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(train, "_step", cut)
        with pytest.raises(KeyboardInterrupt):
            run.fine_tune(workbench.run_config(tmp_path / "run", **settings))
    assert (tmp_path / "run" / "checkpoint").exists(), "theta has left its start"
    public.write_bytes(workbench.data_file(seed=6).read_bytes())
    monkeypatch.setattr(beginning, "public_start", lambda *_: pytest.fail("the start of a resumed run is on disk"))
    start = (tmp_path / "run" / "start.safetensors").read_bytes()
    assert run.fine_tune(run.resumed_config(str(tmp_path / "run"), {}), resume=True).out == tmp_path / "run"
    assert digest(start) == Ledger.read(tmp_path / "run" / "ledger.jsonl").plan.details["start_sha256"]
    for key, value in kept["model"].state_dict().items():
        if "lora_" not in key and "classifier" not in key:
            assert torch.equal(value, whole[key]), key


# --- what is refused


@pytest.mark.parametrize("name", ["eva", "EVA", "EvaConfig", "lora_ga", "LoRA-GA", "LoraGAConfig"])
@pytest.mark.parametrize("rest", ["", ":", ": "])
def test_without_a_file_it_is_said_how_to_name_one(name, rest):
    plain = "eva" if name.lower().startswith("eva") else "lora_ga"
    with pytest.raises(MethodError, match=f"needs a file of public data, which its start reads: peft:{plain}:FILE"):
        method_named(f"peft:{name}{rest}")


@pytest.mark.parametrize("name", ["LoraGAConfig", "lora-ga", "LoRA_GA", "loraga"])
def test_a_method_is_found_however_it_is_spelt(name):
    found = method_named(f"peft:{name}:data/near.csv")
    assert found == method_named("peft:lora_ga:data/near.csv")
    assert (found.source, found.label) == ("data/near.csv", "peft:lora_ga (near.csv)")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("peft:eva:a.csv,b.csv", "takes one public file, got 'a.csv,b.csv'"),
        ("peft:pissa:a.csv", "'peft:pissa:a.csv' takes no file; those that do are peft:eva:FILE, peft:lora_ga:FILE"),
        ("peft:corda:a.csv", "is refused: its start reads data; from public data start only 'peft:eva:FILE'"),
        ("peft:loftq:a.csv", "is refused: it quantizes"),
        ("peft:psoft", "is refused: it trains a bare matrix.*use sb"),
        ("peft:", "peft:mica, peft:eva:FILE, peft:lora_ga:FILE, peft:<name"),
    ],
)
def test_what_else_is_refused(name, match):
    with pytest.raises(MethodError, match=match):
        method_named(name)


@pytest.mark.parametrize("name", ["eva", "lora_ga"])
def test_the_private_file_the_evaluation_file_and_copies_are_no_public_file(name, tmp_path):
    private, other = str(workbench.data_file()), str(workbench.data_file(seed=5))
    with pytest.raises(ConfigError, match=f"method='peft:{name}:.*' names the private training data as public"):
        workbench.run_config(tmp_path / "run", method=f"peft:{name}:{private}")
    with pytest.raises(ConfigError, match=f"method='peft:{name}:.*' is evaluated on too"):
        workbench.run_config(tmp_path / "run", method=f"peft:{name}:{other}", eval_data=other)
    copies = tmp_path / "copies.jsonl"
    copies.write_text(workbench.data_file(seed=5).read_text() + workbench.data_file().read_text().splitlines()[0])
    with pytest.raises(DataError, match="named as public, are in the private data too") as caught:
        run.fine_tune(workbench.run_config(tmp_path / "run", method=f"peft:{name}:{copies}"))
    assert not any(word in str(caught.value) for word in workbench.CANARIES)
    with pytest.raises(DataError, match=r"gone.csv"):
        run.fine_tune(workbench.run_config(tmp_path / "run", method=f"peft:{name}:gone.csv"))
    assert not (tmp_path / "run").exists(), "nothing was charged"


def test_rows_without_a_usable_label_give_no_gradient(tiny):
    model, method = with_method(tiny.base("bert"), "bert", "lora_ga")
    found = PublicSet("near.csv", [{**example, "labels": IGNORED} for example in public_of("bert")], 0, "")
    with pytest.raises(DataError, match=r"near.csv gives no gradient to start from: no row has a usable label"):
        public_start(model, method, tiny.loss["bert"], found, Collator(0), 16, 64, 0.3)


def test_weights_that_are_not_finite_are_not_put_down_to_labels(tiny):
    model, method = with_method(tiny.base("bert"), "bert", "lora_ga")
    with torch.no_grad():
        lora_layers(model)["base_model.model.bert.encoder.layer.0.output.dense"].get_base_layer().weight[0, 0] = 1e38
    found = PublicSet("near.csv", public_of("bert"), 0, "")
    with pytest.raises(DataError, match=r"near.csv gives a gradient that is not finite"):
        public_start(model, method, tiny.loss["bert"], found, Collator(0), 16, 64, 0.3)


# --- sweeps and comparisons


def test_a_sweep_takes_them_with_their_files():
    public = str(workbench.data_file(seed=6))
    given = f"sb,peft:EVA:{public}, peft:lora-ga:{public}"
    settings = settings_of(shared(), methods=given, epsilons="8")
    assert [entry.text for entry in settings.entries] == ["sb:weight", f"peft:eva:{public}", f"peft:lora_ga:{public}"]
    assert list(labels_of(settings.entries).values())[1:] == ["peft:eva (rows.jsonl)", "peft:lora_ga (rows.jsonl)"]
    check_methods(settings)
    entries = parse_entries("lora,peft:eva:a.csv", "weight")
    rates = parse_rates("peft:eva:a.csv=0.1|0.2", entries, {"lora": 0.02, "peft:eva:a.csv": 0.02})
    assert rates == {"lora": (0.02,), "peft:eva:a.csv": (0.1, 0.2)}


@pytest.mark.parametrize(
    ("methods", "match"),
    [
        ("lora,peft:eva", "needs a file of public data"),
        ("lora,peft:eva:gone.csv", "methods='peft:eva:gone.csv': file='gone.csv' does not exist"),
        ("lora,peft:eva:PRIVATE", "names the private training data as public"),
        ("lora,peft:eva:EVAL", "is evaluated on too"),
        ("peft:eva:PUBLIC,peft:EVA:PUBLIC", "twice"),
    ],
)
def test_a_sweep_refuses_what_its_cells_would(methods, match):
    for name, seed in (("PRIVATE", 0), ("EVAL", 5), ("PUBLIC", 6)):
        methods = methods.replace(name, str(workbench.data_file(seed=seed)))
    with pytest.raises(ValueError, match=match):
        settings_of(shared(), methods=methods, epsilons="8")


def test_a_sweep_knows_that_lora_ga_takes_twice_the_rank(tmp_path):
    from dpsb.curves.sweep import run_sweep

    public = workbench.data_file(seed=6)
    settings = settings_of(shared(rank=17), methods=f"lora,peft:lora_ga:{public}", epsilons="8")
    with pytest.raises(CurveError, match=r"peft:lora_ga:.* cannot be run: .*two times rank=17"):
        run_sweep(settings, tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_sweep_runs_them(tmp_path):
    from dpsb.curves.sweep import run_sweep

    public = workbench.data_file(seed=6)
    settings = settings_of(shared(), methods=f"peft:eva:{public},peft:lora_ga:{public}", epsilons="8")
    curve = run_sweep(settings, tmp_path / "out", Silent())
    assert [point.n for point in curve.points] == [1, 1]


def test_compare_starts_them_from_their_own_file():
    near, other = str(workbench.data_file(seed=5)), str(workbench.data_file(seed=6))
    given = {"model": str(workbench.bert_folder()), "labels": "ham,spam", "rank": 4, "max_length": 16, "draws": 60}
    methods = [f"peft:eva:{near}", f"peft:lora_ga:{near}"]
    for row in compare_methods(methods=methods, public=other, examples=16, **given):
        assert abs(row.measured - row.predicted) < 5 * row.standard_error
        assert row.method.endswith("(rows.jsonl)")
        assert row.snr > 0
    with pytest.raises(ValueError, match=r"starts from public=.*, on which its signal is measured"):
        next(compare_methods(methods=methods, public=near, **given))
