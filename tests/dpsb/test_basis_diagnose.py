"""``dpsb basis``: what each basis holds, by direct computation; who judges it; forecasts; only public files."""

import json

import pytest
import torch
import workbench
from typer.testing import CliRunner

from dpsb.adapter import Basis, Provenance, attach, lora_layers
from dpsb.basis._common import public_generator
from dpsb.basis.diagnose import DATA_FREE, cut, diagnose_bases
from dpsb.basis.per_example import WHOLE
from dpsb.basis.private import private, private_provenance
from dpsb.basis.rehearsal import Budget, Rehearsal, is_visible, noise_of
from dpsb.basis.release import Clip
from dpsb.basis.sources import PublicSet
from dpsb.capture import adapter_train_mode, per_example_gradients
from dpsb.cli import app
from dpsb.data import Collator
from dpsb.heads import HEAD_NAMES
from dpsb.losses import classification_loss
from dpsb.mechanism import Mechanism

RANK = 4
BUDGET = Budget(epsilon=8.0, delta=1e-5, num_examples=5000, expected_batch_size=250, steps=20)
CLIP = Clip(l2_clip_norm=1.0, clipping="automatic", share=0.1)


pytestmark = pytest.mark.usefixtures("quick_calibration")


def public_set(name="near", count=24, seed=1, own_labels=0, run_labels=False):
    return PublicSet(name, workbench.examples(count, seed=seed), own_labels, "its labels", run_labels)


def diagnosis(tiny, *sets, count=24, **changes):
    model = tiny.lora(tiny.base("bert"))
    halves = [cut(entry, Collator(0), count, 64) for entry in sets or (public_set(),)]
    arguments = {"rank": RANK, "head_std": 0.3, **changes}
    return diagnose_bases(model, lora_layers(model), classification_loss, halves, **arguments)


def figures_of(found, basis):
    return next(entry for entry in found.bases if entry.basis == basis)


# --- by direct computation


def one_by_one(tiny, examples, names):
    """Each example's gradient (out, in) of every target, by autograd alone."""
    base, collate, found = tiny.base("bert").eval(), Collator(0), []
    longest = max(len(example["input_ids"]) for example in workbench.examples(24))
    for example in examples:
        base.zero_grad()
        classification_loss(base, collate([example], longest)).sum().backward()
        found.append({n: base.get_submodule(n.removeprefix("base_model.model.")).weight.grad.double() for n in names})
    return found


def mean(gradients):
    return {name: sum(one[name] for one in gradients) / len(gradients) for name in gradients[0]}


def dot(one, other):
    return sum(float((one[name] * other[name]).sum()) for name in one)


def seen(gradient, factors):
    return {name: f.B.double().T @ gradient[name] @ f.A.double().T for name, f in factors.items()}


@pytest.mark.parametrize("kind", ["weight", "hadamard"])
def test_figures_are_those_of_one_by_one_autograd(tiny, kind):
    found = diagnosis(tiny, budget=BUDGET)
    factors = DATA_FREE[kind](tiny.lora(tiny.base("bert"))).factors
    judged = one_by_one(tiny, workbench.examples(24)[12:], factors)
    first, second = mean(judged[:6]), mean(judged[6:])
    inside = dot(seen(first, factors), seen(second, factors))
    got = figures_of(found, kind)
    assert got.energy == pytest.approx(inside / dot(first, second), rel=1e-3)
    rows = torch.tensor([dot(seen(g, factors), seen(g, factors)) ** 0.5 for g in judged])
    whole = torch.tensor([dot(g, g) ** 0.5 for g in judged])
    assert got.rho == pytest.approx(float(rows.median() / whole.median()), rel=1e-3)
    sigma = noise_of(BUDGET, lora_layers(tiny.lora(tiny.base("bert"))))["free"].train
    noise = sigma / 250 * float(rows.median()) * (len(factors) * RANK**2) ** 0.5
    assert got.snr_per_step == pytest.approx(inside**0.5 / noise, rel=1e-3)
    (entry,) = found.sets
    assert entry.coherence == pytest.approx(
        dot(first, second) / (dot(first, first) * dot(second, second)) ** 0.5, rel=1e-3
    )
    assert entry.median_norm == pytest.approx(float(whole.median()), rel=1e-3)


def test_a_public_basis_is_fitted_on_the_half_that_does_not_judge(tiny):
    found = diagnosis(tiny)
    layers = lora_layers(tiny.lora(tiny.base("bert")))
    gradients = one_by_one(tiny, workbench.examples(24), layers)
    fitted = mean(gradients[:12])
    first, second = mean(gradients[12:18]), mean(gradients[18:])
    inside = 0.0
    for name, gradient in fitted.items():
        U, _, Vh = torch.linalg.svd(gradient)
        B, A = U[:, :RANK], Vh[:RANK]
        inside += float(((B.T @ first[name] @ A.T) * (B.T @ second[name] @ A.T)).sum())
    got = figures_of(found, "public:near")
    assert got.energy == found.sets[0].own_half == pytest.approx(inside / dot(first, second), rel=2e-3)
    assert got.energy > 3 * figures_of(found, "random").energy
    assert got.rho > figures_of(found, "random").rho


def test_every_basis_is_judged_by_every_set(tiny):
    """Its own other half among them: the figures of three files alone, and what each holds of the others."""
    sets = [public_set("a"), public_set("b", seed=2), public_set("c", seed=3)]
    found = diagnosis(tiny, *sets)
    assert all(len(entry.energies) == 3 for entry in found.bases if not entry.paid)
    for i, entry in enumerate(sets):
        alone = diagnosis(tiny, entry)
        assert found.sets[i].own_half == pytest.approx(alone.sets[0].own_half)
        for basis in ("weight", f"public:{entry.name}"):
            assert figures_of(found, basis).energies[i] == pytest.approx(figures_of(alone, basis).energy)
    for entry in found.bases:
        if not entry.paid:
            shares = [energy / one.own_half for energy, one in zip(entry.energies, found.sets, strict=True)]
            assert entry.energy == pytest.approx(sum(entry.energies) / 3)
            assert entry.of_own == pytest.approx(sum(shares) / 3)


@pytest.mark.parametrize("position", [0, 1])
def test_a_file_with_other_labels_changes_no_figure(tiny, position):
    """Before, public:near was judged by it alone, and a paid basis, judged on near too, was recommended."""
    alone = diagnosis(tiny, public_set(run_labels=True), budget=BUDGET)
    sets = [public_set(run_labels=True)]
    sets.insert(position, public_set("other", seed=2, own_labels=5))
    both = diagnosis(tiny, *sets, budget=BUDGET)
    for one in alone.bases:
        assert figures_of(both, one.basis) == one
    assert both.recommended == alone.recommended == "public:near"
    assert [entry.judges for entry in both.sets] == [entry.run_labels for entry in both.sets]
    assert "judged on held-out rows of near, as the other files' labels are not the run's" in both.reason


def test_two_files_with_the_runs_labels_both_judge(tiny):
    sets = [
        public_set("a", run_labels=True),
        public_set("b", seed=2, run_labels=True),
        public_set("other", seed=3, own_labels=5),
    ]
    found = diagnosis(tiny, *sets, budget=BUDGET)
    assert [entry.judges for entry in found.sets] == [True, True, False]
    assert all(len(entry.energies) == 2 for entry in found.bases)
    assert found.recommended in ("public:a", "public:b")
    assert "judged on held-out rows of a, b" in found.reason
    assert "its own file among them, too kind if the private data are unlike it" in found.reason


# --- what of a row is the head's


def direct_shares(model, factors, count, examples):
    """The median share of the head in each row, from rows as training makes them."""
    adapter = attach(
        model, Basis(factors=factors, provenance=Provenance(kind="random", access="data_free")), allow=HEAD_NAMES
    )
    adapter_train_mode(adapter)
    heads = torch.cat([torch.full((p.numel(),), "classifier" in n) for n, p in adapter.named_parameters()])
    assert int(heads.sum()) == count
    with per_example_gradients(adapter, len(examples)) as rows:
        classification_loss(model, Collator(0)(examples, workbench.PADDED)).sum().backward()
        squares = rows.get().double().square()
    return float((squares[:, heads].sum(dim=1) / squares.sum(dim=1)).median())


@pytest.mark.parametrize("kind", ["weight", "hadamard"])
@pytest.mark.parametrize("own_labels", [0, 5])
def test_the_heads_share_is_that_of_the_rows_in_training(tiny, kind, own_labels):
    found = diagnosis(tiny, public_set(own_labels=own_labels))
    base = tiny.base("bert", num_labels=own_labels or 3)
    base.bert.load_state_dict(tiny.base("bert").bert.state_dict())
    model = tiny.lora(base).eval()
    if own_labels:  # the head of a file with labels of its own
        head = model.base_model.model.classifier.modules_to_save["default"]
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=public_generator()) * 0.3)
            head.bias.zero_()
    numbers = (own_labels or 3) * 33
    expected = direct_shares(model, DATA_FREE[kind](model).factors, numbers, workbench.examples(24)[12:])
    assert figures_of(found, kind).head_share == pytest.approx(expected, rel=1e-4)
    assert found.sets[0].head_numbers == numbers


def test_a_model_without_a_trained_head_has_no_share_of_one(tiny):
    model = tiny.lora(tiny.base("bert"), task_type=None, target_modules=["query", "value"])
    found = diagnose_bases(
        model,
        lora_layers(model),
        classification_loss,
        [cut(public_set(), Collator(0), 24, 64)],
        rank=RANK,
        head_std=0.3,
    )
    assert all(entry.head_share is None for entry in found.bases)
    assert found.advice == ""


# --- hybrids and forecasts


def test_a_wider_hybrid_could_hold_more(tiny):
    bounds = []
    for width in (4, 8, 32):
        found = diagnosis(tiny, width=width)
        assert found.width == width
        bounds.append(figures_of(found, "hybrid").at_most)
        assert figures_of(found, "hybrid").energy is None, "no forecast without a budget"
        assert figures_of(found, "hybrid:near").at_most >= figures_of(found, "public:near").energy - 1e-6
    assert bounds[0] < bounds[1] < bounds[2] <= 1


def test_forecasts_follow_the_budget(tiny):
    energies = {}
    for many in (300, 3_000_000):
        budget = Budget(epsilon=1.0, delta=1e-8, num_examples=many, expected_batch_size=many // 10, steps=10)
        found = diagnosis(tiny, budget=budget)
        for basis in ("private", "hybrid", "public:near"):
            energies[basis, many] = figures_of(found, basis).energy
        one = figures_of(found, "private")
        assert one.paid
        assert one.share == pytest.approx(0.1)
        assert one.visible_layers == (1.0 if many > 300 else pytest.approx(0, abs=0.4))
    assert energies["private", 3_000_000] > energies["private", 300]
    assert energies["hybrid", 3_000_000] > energies["hybrid", 300]
    assert energies["private", 3_000_000] == pytest.approx(energies["public:near", 300], rel=0.2)


def test_a_rehearsal_is_the_release_of_as_many_examples(tiny):
    """N examples, each n-th of them the same: N/n times the clipped sum, and the noise of one release."""
    model = tiny.lora(tiny.base("bert")).eval()
    layers, batch = lora_layers(model), tiny.batch("bert")
    whole = dict.fromkeys(layers, WHOLE)

    def released(noise, count):
        mechanism = Mechanism(l2_clip_norm=1.0, noise_multiplier=noise, clipping="automatic")
        rehearsal = Rehearsal(
            model=model,
            layers=layers,
            loss_fn=classification_loss,
            batches=[batch],
            num_examples=count,
            mechanism=mechanism,
        )
        return rehearsal.release(whole), rehearsal

    exact, _ = released(1e-9, 5)
    many, rehearsal = released(1e-9, 5000)
    assert sum(float(total.square().sum()) for total in exact.values()) ** 0.5 <= 5
    assert all(float((many[name] - 1000 * exact[name]).abs().max()) < 1e-5 for name in exact)
    assert rehearsal.visible == [1.0]
    noisy, rehearsal = released(7.0, 5)
    residual = torch.cat([(noisy[name] - exact[name]).flatten() for name in exact])
    assert float(residual.std()) == pytest.approx(7.0, rel=0.05)
    assert rehearsal.visible == [0.0]
    basis = private(rehearsal, private_provenance(CLIP, 2))
    assert len(rehearsal.visible) == 5, "each round rehearses both of its releases"
    assert set(basis.factors) == set(layers)


def test_what_stands_above_the_noise():
    total = torch.zeros(16, 81, dtype=torch.float64)
    total[3, 5] = 1.0
    assert is_visible(total, 0.9 / 6)
    assert not is_visible(total, 1.1 / 6)


# --- the command


def command(*options, columns=200):
    return CliRunner().invoke(app, ["basis", *options], env={"COLUMNS": str(columns)})


def diagnose(*options, **changes):
    model = ["--model", str(workbench.bert_folder()), "--rank", "4", "--max-length", "16"]
    return command("--diagnose", *model, *options, **changes)


def test_only_public_files_are_read(monkeypatch):
    read, opened = [], __import__("dpsb.data", fromlist=["read_table"]).read_table
    monkeypatch.setattr("dpsb.basis.sources.read_table", lambda source: read.append(str(source)) or opened(source))
    for module in ("dpsb.compare", "dpsb.inputs", "dpsb.prepare"):
        monkeypatch.setattr(f"{module}.read_table", lambda source: pytest.fail(f"{source} was read"))
    files = [str(workbench.data_file(seed=seed)) for seed in (9, 8)]
    budget = ["--epsilon", "8", "--num-examples", "400", "--expected-batch-size", "40", "--steps", "5"]
    result = diagnose("--public", ",".join(files), "--labels", "ham,spam", *budget, "--examples", "24", "--json")
    assert result.exit_code == 0, result.output
    assert read == files
    found = json.loads(result.stdout)
    assert found["recommended"] in {entry["basis"] for entry in found["bases"]}
    assert {entry["basis"] for entry in found["bases"]} == {
        *DATA_FREE,
        "private",
        "hybrid",
        *(f"{kind}:{file}" for kind in ("public", "hybrid") for file in files),
    }
    assert all(0 <= entry["energy"] <= 1 and entry["rho"] > 0 and entry["snr_per_step"] > 0 for entry in found["bases"])
    assert not any(canary in result.output for canary in workbench.CANARIES)
    assert "--data" not in command("--help").stdout


def test_the_table_and_another_label_space(tmp_path):
    path = tmp_path / "other.jsonl"
    rows = [{"text": f"see {word} now", "label": "xyz"[i % 3]} for i, word in enumerate(workbench.WORDS[:24])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = diagnose("--public", str(path), "--labels", "ham,spam")
    assert result.exit_code == 0, result.output
    assert "another label space: a random head of 3 classes" in result.stdout
    assert "Use --basis" in result.stdout
    assert "complementary" in result.stdout


def test_the_table_is_whole_on_80_columns():
    files = [str(workbench.data_file(seed=seed)) for seed in (9, 8)]
    budget = ["--epsilon", "8", "--num-examples", "400", "--expected-batch-size", "40", "--steps", "5"]
    labels = ["--labels", "ham,spam", "--examples", "24"]
    result = diagnose("--public", ",".join(files), *labels, *budget, columns=80)
    assert result.exit_code == 0, result.output
    table = result.stdout.split(files[0])[0]
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    for word in ("complementary", "energy", "of own", "at most", "head", "S/N", "price", "seen"):
        assert word in table


def test_a_causal_model():
    options = ["--model", str(workbench.llama_folder()), "--task", "causal-lm", "--rank", "2", "--max-length", "16"]
    result = command("--diagnose", *options, "--public", str(workbench.data_file("causal-lm")), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sets"][0]["coherence"] > 0


def test_without_diagnose_the_bases_are_listed():
    assert "hadamard" in command().stdout
    assert set(json.loads(command("--json").stdout)) >= {"weight", "private", "hybrid", "leak"}


def test_without_diagnose_a_public_file_is_not_ignored():
    result = command("--public", "missing.csv", "--epsilon", "3")
    assert result.exit_code == 1
    assert "Add --diagnose, or leave out --public and --epsilon: without it bases are listed." in result.stderr
    assert "hadamard" not in result.stdout


FILE = str(workbench.data_file(seed=9))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "needs public data: name at least one file"),
        (["--public", f"{FILE}.missing.csv"], "does not exist"),
        (["--public", f"{FILE},{FILE}"], "name each file once"),
        (["--public", FILE, "--rank", "40"], "rank=40 exceeds the smaller side of"),
        (["--public", FILE, "--basis-width", "99"], "basis_width=99 exceeds the smaller side of"),
        (["--public", FILE, "--basis-width", "3"], "basis_width=3 of at least the rank, 4"),
        (["--public", FILE, "--examples", "5"], "holds 5 rows; a diagnosis needs at least 8"),
        (["--public", FILE, "--task", "translation"], "task='translation' to be one of"),
        (["--public", FILE, "--epsilon", "3"], "Give both epsilon=3.0 and num_examples=None"),
        (["--public", FILE, "--epsilon", "inf", "--num-examples", "900"], "epsilon=inf to be positive and finite"),
        (["--public", FILE, "--epsilon", "3", "--num-examples", "0"], "num_examples=0 of at least 1"),
        (["--public", FILE, "--epsilon", "3", "--num-examples", "90"], "expected_batch_size=256 between 1 and"),
        (["--public", FILE, "--targets", "nowhere"], "do not fit this model"),
    ],
)
def test_bad_input_is_one_sentence(options, sentence):
    result = diagnose(*options)
    assert result.exit_code == 1
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
