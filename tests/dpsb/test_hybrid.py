"""The hybrid basis, the choice among public sets, and the data-free references."""

import json
from hashlib import sha256

import pytest
import torch
import workbench

from dpsb import run
from dpsb.adapter import lora_layers
from dpsb.basis import stage
from dpsb.basis.choose import held_energy, rank_public
from dpsb.basis.complementary import complementary
from dpsb.basis.hadamard import hadamard, walsh_frame
from dpsb.basis.hybrid import TIMES_RANK, WidthError, check_width, frames_of, turn
from dpsb.basis.release import PrivateExamples
from dpsb.basis.sources import EXAMPLES, own_head, read_public
from dpsb.data import Columns, DataError
from dpsb.models import ModelError
from dpsb_accounting import Gaussian, Ledger, LedgerError, PoissonGaussian, epsilon, verify

pytestmark = pytest.mark.usefixtures("quick_calibration")


# --- turning


def spans(left, other):
    """How much of one orthonormal frame lies in another: 1 where the spaces are equal."""
    return float((left.T @ other).square().sum()) / left.shape[1]


def core_of(values, extra, noise_std, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    return torch.diag(values) + extra + noise_std * noise


def test_below_the_noise_the_public_directions_stay():
    values = {f"layer {i}": torch.linspace(1.0, 0.2, 24, dtype=torch.float64) for i in range(6)}
    cores = {name: core_of(v, 0, 200.0, i) for i, (name, v) in enumerate(values.items())}
    kept = turn(cores, values, 200.0, dict.fromkeys(values, 8))
    first = torch.eye(24, dtype=torch.float64)[:, :8]
    for left, right in kept.values():
        assert spans(left, first) == pytest.approx(1.0)
        assert spans(right, first) == pytest.approx(1.0)
    by_the_core_alone = [spans(torch.linalg.svd(core)[0][:, :8], first) for core in cores.values()]
    assert max(by_the_core_alone) < 0.65


def test_noise_alone_hardly_ever_moves_a_direction():
    values = {f"layer {i}": torch.linspace(1.0, 0.2, 24, dtype=torch.float64) for i in range(3)}
    first = torch.eye(24, dtype=torch.float64)[:, :8]
    moved = 0
    for draw in range(200):
        cores = {name: core_of(0 * v, 0, 5.0, 10 * draw + i) for i, (name, v) in enumerate(values.items())}
        kept = turn(cores, values, 5.0, dict.fromkeys(values, 8))
        moved += any(spans(left, first) < 0.999 for left, _ in kept.values())
    assert moved <= 14, "2.3 % of 200 draws exceed two standard deviations; 14 is four above that"


def test_a_private_gradient_of_the_opposite_sign_keeps_the_public_directions():
    values = {"layer": torch.linspace(1.0, 0.2, 24, dtype=torch.float64)}
    kept = turn({"layer": core_of(-50 * values["layer"], 0, 0.5)}, values, 0.5, {"layer": 8})
    first = torch.eye(24, dtype=torch.float64)[:, :8]
    assert min(spans(side, first) for side in kept["layer"]) > 0.99


def test_far_above_the_noise_the_private_core_decides():
    values = {"layer": torch.linspace(1.0, 0.2, 24, dtype=torch.float64)}
    hidden = torch.zeros(24, 24, dtype=torch.float64)
    hidden[20, 22] = 50.0
    kept = turn({"layer": core_of(values["layer"], hidden, 0.01)}, values, 0.01, {"layer": 1})
    left, right = kept["layer"]
    assert abs(float(left[20, 0])) > 0.999
    assert abs(float(right[22, 0])) > 0.999


def test_without_noise_the_turn_is_the_truncated_svd():
    generator = torch.Generator().manual_seed(3)
    core = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    values = {"layer": torch.linspace(2.0, 0.5, 12, dtype=torch.float64)}
    left, right = turn({"layer": core}, values, 0.0, {"layer": 4})["layer"]
    U, _, Vh = torch.linalg.svd(core)
    assert spans(left, U[:, :4]) == pytest.approx(1.0, abs=1e-6)
    assert spans(right, Vh[:4].T) == pytest.approx(1.0, abs=1e-6)


def test_a_public_set_without_gradient_in_a_layer_is_no_obstacle():
    core = torch.zeros(6, 6, dtype=torch.float64)
    core[4, 5] = 9.0
    values = {"a": torch.zeros(6, dtype=torch.float64), "b": torch.ones(6, dtype=torch.float64)}
    kept = turn({"a": core, "b": core}, values, 0.1, {"a": 2, "b": 2})
    for left, right in kept.values():
        assert bool(torch.isfinite(left).all())
        assert bool(torch.isfinite(right).all())


@pytest.mark.parametrize("width", [None, 4, 32])
def test_widths(tiny, width):
    layers = lora_layers(tiny.lora(tiny.base("bert")))
    expected = min(TIMES_RANK * 4, 32) if width is None else width
    assert check_width(layers, 4, width) == expected
    frames = frames_of(layers, expected)
    assert all(f.left.shape[1] == f.right.shape[1] == expected for f in frames.values())


@pytest.mark.parametrize(("width", "match"), [(3, "of at least the rank, 4"), (33, "exceeds the smaller side of")])
def test_widths_that_do_not_fit(tiny, width, match):
    with pytest.raises(WidthError, match=match):
        check_width(lora_layers(tiny.lora(tiny.base("bert"))), 4, width)


# --- data-free references


def test_complementary_leaves_the_leading_space_alone(tiny):
    model = tiny.lora(tiny.base("llama"), rank=2)
    basis = complementary(model)
    assert basis.provenance.to_json() == {"kind": "complementary", "access": "data_free"}
    for name, layer in lora_layers(model).items():
        U, _, Vh = torch.linalg.svd(layer.get_base_layer().weight.detach(), full_matrices=False)
        top = min(16, (min(U.shape[0], Vh.shape[1]) - 2) // 2)
        A, B, _ = basis.factors[name]
        assert float((U[:, :top].T @ B).abs().max()) < 1e-4
        assert float((A @ Vh[:top].T).abs().max()) < 1e-4
        assert float((A @ A.T - torch.eye(2)).abs().max()) < 1e-5
        assert float((B.T @ B - torch.eye(2)).abs().max()) < 1e-5


def test_complementary_where_hardly_anything_is_left(tiny):
    basis = complementary(tiny.lora(tiny.base("bert"), rank=32))
    for A, B, _ in basis.factors.values():
        assert float((A @ A.T - torch.eye(32)).abs().max()) < 1e-5
        assert float((B.T @ B - torch.eye(32)).abs().max()) < 1e-5


@pytest.mark.parametrize(("width", "rank"), [(4, 4), (5, 5), (48, 16), (384, 16), (1536, 7), (3, 1), (61, 33)])
def test_walsh_frames_are_orthonormal_for_any_width(width, rank):
    frame = walsh_frame(width, rank)
    exact = frame.double()
    assert float((exact.T @ exact - torch.eye(rank)).abs().max()) < 1e-5
    assert torch.allclose(frame[:, 0], torch.full((width,), width**-0.5))
    assert torch.equal(frame, walsh_frame(width, rank)), "nothing is drawn"


def test_a_power_of_two_gives_walsh_functions_themselves(tiny):
    frame = walsh_frame(64, 8)
    assert torch.allclose(frame.abs(), torch.full_like(frame, 1 / 8))
    assert hadamard(tiny.lora(tiny.base("gpt2"))).provenance.access == "data_free"


# --- public sets


def pieces(seed, count, rank=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, rank, generator=generator) @ torch.randn(rank, count, generator=generator)


def test_the_set_nearest_to_the_others_is_ranked_first():
    from dpsb.adapter import Factors
    from dpsb.basis._common import truncated_svd

    shared = pieces(0, 20)
    gradients = [{"w": shared + 0.1 * pieces(i, 20, 20) / 20} for i in (1, 2)] + [{"w": pieces(7, 20)}]
    factors = []
    for entry in gradients:
        U, _, Vh = truncated_svd(entry["w"], 2, torch.Generator())
        factors.append({"w": Factors(A=Vh, B=U)})
    scores = rank_public(factors, gradients)
    assert scores[2] < min(scores[:2])
    assert rank_public(factors[:1], gradients[:1]) == [1.0]
    assert held_energy(factors[2], gradients[2]) == pytest.approx(1.0, abs=1e-4)


def test_a_gradient_that_any_basis_holds_speaks_for_nobody():
    """More of set a's gradient is held by b's basis (0.4) than of b's by a's (0.25), but a's stands in better for b's
    own (0.25 of 0.3) than b's for a's (0.4 of 0.6)."""
    from dpsb.adapter import Factors

    unit = torch.eye(3)
    factors = [{"w": Factors(A=unit[i : i + 1], B=unit[:, i : i + 1])} for i in (0, 1)]
    energies = [(0.6, 0.4, 0.0), (0.25, 0.3, 0.45)]
    gradients = [{"w": torch.diag(torch.tensor(parts)).sqrt()} for parts in energies]
    assert rank_public(factors, gradients) == pytest.approx([0.25 / 0.3, 0.4 / 0.6])


def ranked(tmp_path, monkeypatch, scores, first, second, **changes):
    """The file that is taken of two, and what the plan says, if they are ranked by these scores."""
    monkeypatch.setattr(stage, "_scores", lambda _setup, _sets: scores)
    monkeypatch.setattr(run, "fit", lambda *_a, **_k: pytest.fail("not this far"))
    basis = f"public:{first},{second}"
    seen = []

    def stop(plan):
        seen.append(plan.basis)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.fine_tune(
            workbench.run_config(tmp_path / "run", basis=basis, **changes), callbacks=run.Callbacks(on_plan=stop)
        )
    return seen[0]


def labelled(path, labels, texts=("see the free offer now", "we meet on monday at noon", "the report is here for you")):
    lines = [f'{{"text": "{text} {i}", "label": "{labels[i % len(labels)]}"}}' for i, text in enumerate(texts * 4)]
    return write(path, lines)


def test_a_ranking_that_does_not_tell_takes_the_first_named_and_says_so(tmp_path, monkeypatch):
    files = [labelled(tmp_path / f"{name}.jsonl", ("ham", "spam")) for name in "ab"]
    basis = ranked(tmp_path, monkeypatch, [0.5, 0.55], *files)
    assert basis["source"] == files[0]
    assert "first named" in basis["choice"]
    assert "--basis-choice private" in basis["choice"]
    basis = ranked(tmp_path, monkeypatch, [0.5, 0.65], *files)
    assert basis["source"] == files[1]
    assert "first named" not in basis["choice"]


def test_a_file_with_the_runs_labels_comes_before_one_with_others(tmp_path, monkeypatch):
    other, own = labelled(tmp_path / "other.jsonl", "xyz"), labelled(tmp_path / "own.jsonl", ("ham", "spam"))
    monkeypatch.setattr(stage, "rank_public", lambda *_a: pytest.fail("there is nothing to rank"))
    basis = ranked(tmp_path, monkeypatch, None, other, own)
    assert (basis["source"], basis["labels"]) == (own, "the labels of the run")
    assert basis["choice"] == "the only file whose rows carry the run's labels"


def test_a_file_of_one_row_cannot_be_ranked(tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", ['{"text": "see"}']) for name in "ab"]
    with pytest.raises(DataError, match="single row; to be ranked"):
        run.fine_tune(workbench.run_config(tmp_path / "run", basis=f"public:{','.join(files)}"))


def test_a_file_sorted_by_label_shows_every_label(tmp_path):
    """Sorted or alternating: any part of the rows that a basis is made from has both labels."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workbench.bert_folder())
    files = {"sorted": ["ham"] * 1100 + ["spam"] * 1100, "alternating": ["ham", "spam"] * 1100}
    for name, labels in files.items():
        path = write(tmp_path / f"{name}.jsonl", [f'{{"text": "see", "label": "{label}"}}' for label in labels])
        found = read_public(path, "classification", Columns(), tokenizer, ("ham", "spam"), 16)
        assert len(found.examples) == 2 * EXAMPLES
        for part in (found.examples[:EXAMPLES], found.examples[EXAMPLES:], found.examples[:64]):
            share = sum(example["labels"] for example in part) / len(part)
            assert 0.3 < share < 0.7, name


@pytest.mark.parametrize(
    ("labels", "count", "own", "said"),
    [
        ([str(i % 3) for i in range(90)], 77, 3, "3 of the run's 77 labels occur"),
        ([str(i % 3) for i in range(90)], 2, 3, "2 of the run's 2 labels occur"),
        ([str(i % 77) for i in range(154)], 77, 0, "the labels of the run"),
        ([str(i) for i in range(30)], 77, 0, "the labels of the run"),
        (["0"] * 50 + ["1"] * 45 + ["unknown"] * 5, 2, 0, "the labels of the run"),
    ],
    ids=["numbers of another task", "a label more", "the run's", "too few rows for all", "some rows without"],
)
def test_the_runs_labels_are_told_from_those_of_another_task(tmp_path, labels, count, own, said):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workbench.bert_folder())
    path = write(tmp_path / "p.jsonl", [f'{{"text": "see", "label": "{label}"}}' for label in labels])
    found = read_public(path, "classification", Columns(), tokenizer, [str(i) for i in range(count)], 16)
    assert (found.own_labels, found.run_labels) == (own, own == 0)
    assert said in found.note


def test_the_file_that_private_examples_chose_is_on_record(tmp_path, monkeypatch):
    statuses, out = [], tmp_path / "run"
    paid = PrivateExamples.release_preferences
    scores = torch.tensor([-1.5, 2.0]).double()
    monkeypatch.setattr(PrivateExamples, "release_preferences", lambda *given: (paid(*given), scores)[1])
    config = workbench.run_config(out, basis=f"public:{','.join(PUBLIC)}", basis_choice="private")
    finished = run.fine_tune(config, callbacks=run.Callbacks(on_status=statuses.append))
    content = (out / "basis_choice.json").read_bytes()
    ledger = Ledger.read(out / "ledger.jsonl")
    assert json.loads(content) == {"chosen": PUBLIC[1], "scores": f"{PUBLIC[0]} -1.5, {PUBLIC[1]} 2"}
    assert ledger.files["basis_choice.json"] == sha256(content).hexdigest()
    assert f"chose `{PUBLIC[1]}` for its basis" in (out / "README.md").read_text()
    assert f"basis: the private examples chose {PUBLIC[1]}" in statuses
    assert "basis_choice.json" in finished.files
    assert verify(out / "ledger.jsonl").ok
    (out / "basis_choice.json").write_bytes(content.replace(b"2", b"3"))
    assert [check.name for check in verify(out / "ledger.jsonl").failures] == ["basis_choice.json"]
    with pytest.raises(LedgerError, match="not the one that the ledger binds"):
        stage.chosen_file(out, ledger)


def write(path, lines):
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    ("lines", "own", "note"),
    [
        (['{"text": "see free", "label": "spam"}', '{"text": "the", "label": "ham"}'], 0, "the labels of the run"),
        ([f'{{"text": "we {x}", "label": "{x}"}}' for x in "abc"], 3, "random head of 3 classes"),
        (['{"text": "see"}', '{"text": "now"}'], 0, "drawn at random"),
        ([f'{{"text": "we", "label": "{"x" * 99}{i}"}}' for i in range(3)], 0, "drawn at random"),
        (['{"prompt": "see", "completion": "now"}'], 0, "drawn at random"),
    ],
)
def test_another_label_space_is_allowed_and_said(tmp_path, lines, own, note):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workbench.bert_folder())
    found = read_public(write(tmp_path / "p.jsonl", lines), "classification", Columns(), tokenizer, ("ham", "spam"), 16)
    assert found.own_labels == own
    assert note in found.note
    assert all(0 <= example["labels"] < max(own, 2) for example in found.examples)


def test_columns_of_the_private_file_need_not_exist_in_the_public_one(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workbench.bert_folder())
    path = write(tmp_path / "p.jsonl", ['{"text": "see", "label": "ham"}', '{"text": "we", "label": "spam"}'])
    found = read_public(path, "classification", Columns(text="mail", label="kind"), tokenizer, ("ham", "spam"), 16)
    assert [example["labels"] for example in found.examples] == [0, 1]


def test_a_public_file_without_rows_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "none.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(DataError, match="no rows"):
        read_public(str(path), "classification", Columns(), None, ("a", "b"), 16)


def test_a_head_of_another_size_answers_for_the_time(tiny):
    model, batch = tiny.lora(tiny.base("bert")), tiny.batch("bert")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with own_head(model, 7, 0.3):
        assert model(**inputs).logits.shape == (5, 7)
    assert model(**inputs).logits.shape == (5, 3)
    assert not any(module._forward_hooks for module in model.modules())


# --- runs


PUBLIC = [f"{workbench.data_file(seed=seed)}" for seed in (9, 8)]


@pytest.mark.parametrize(
    ("changes", "kind", "access", "charges"),
    [
        ({"basis": "hybrid"}, "hybrid", "released", 1),
        ({"basis": f"hybrid:{PUBLIC[0]}", "basis_width": 8, "basis_share": 0.05}, "hybrid", "released", 1),
        ({"basis": "private", "basis_rounds": 1}, "private", "released", 2),
        ({"basis": f"public:{','.join(PUBLIC)}"}, "public", "public", 0),
        ({"basis": f"public:{','.join(PUBLIC)}", "basis_choice": "private"}, "public", "released", 1),
        ({"basis": "hadamard"}, "hadamard", "data_free", 0),
        ({"basis": "complementary"}, "complementary", "data_free", 0),
    ],
)
def test_runs_say_what_was_used_and_pay_for_it(tmp_path, changes, kind, access, charges):
    finished = run.fine_tune(workbench.run_config(tmp_path / "run", **changes))
    report = finished.report.to_json()
    assert report["claim"] is True
    assert (report["basis"]["kind"], report["basis"]["access"]) == (kind, access)
    ledger = Ledger.read(tmp_path / "run" / "ledger.jsonl")
    assert 7.9 < epsilon(ledger).upper <= 8
    assert (sum(ledger.charged(p.name) for p in ledger.plan.phases) - 3) == charges
    choice = {"basis_choice.json"} if changes.get("basis_choice") == "private" else set()
    assert ledger.files.keys() == ({"basis.safetensors"} | choice if charges else set())
    assert not (tmp_path / "run" / "basis.safetensors").exists(), "a finished run keeps what it needs elsewhere"
    if charges:
        assert isinstance(ledger.plan.phases[0].event, PoissonGaussian if "basis_rounds" in changes else Gaussian)
        assert ledger.plan.details["basis_budget"]["share"] > 0
    if "choice" in report["basis"]:
        assert "rows.jsonl" in str(report["basis"])


def test_a_run_of_a_causal_model_with_a_labelled_public_set(tmp_path):
    config = workbench.run_config(tmp_path / "run", "causal-lm", basis=f"hybrid:{workbench.data_file(seed=4)}")
    basis = run.fine_tune(config).report.to_json()["basis"]
    assert "column 'label' is not used" in basis["labels"]


def test_the_leak_is_on_record(tmp_path):
    config = workbench.run_config(tmp_path / "run", basis="leak", allow_non_private_basis=True)
    report = run.fine_tune(config).report.to_json()
    assert report["claim"] is False
    assert report["epsilon"]["upper"] == "inf"
    ledger = Ledger.read(tmp_path / "run" / "ledger.jsonl")
    assert (ledger.charged("basis"), ledger.charged("train")) == (1, 3)
    assert ledger.plan.noise_multiplier > 0.1, "trained with the noise of its target"


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"basis": "hybrid", "basis_width": 99}, WidthError, "exceeds the smaller side of"),
        ({"basis": "private", "rank": 40}, ModelError, "rank=40 exceeds"),
        ({"basis": "private", "basis_share": 0.95}, ValueError, "leaves no budget to train"),
        ({"basis": f"hybrid:{PUBLIC[0]}.missing.csv"}, DataError, "does not exist"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path, changes, error, match):
    with pytest.raises(error, match=match):
        run.fine_tune(workbench.run_config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
