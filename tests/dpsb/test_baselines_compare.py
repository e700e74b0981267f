"""``dpsb compare``: predicted beside measured on a real model, with a picture; bad input in one sentence."""

import json

import pytest
import workbench
from typer.testing import CliRunner

from dpsb.cli import app
from dpsb.compare import compare_methods

METHODS = "sb,lora-xs,ffa-lora,lora,bitfit,head-only,full"
STARTS = "peft:pissa,peft:olora,peft:orthogonal,peft:mica"


def command(*options):
    return CliRunner().invoke(app, ["compare", "--model", str(workbench.bert_folder()), "--rank", "4", *options])


@pytest.fixture
def public():
    return ["--public", str(workbench.data_file()), "--labels", "ham,spam", "--examples", "16", "--max-length", "16"]


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_predicted_beside_measured(public, tmp_path, ending):
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"noise.{ending}"
    result = command(*public, "--methods", METHODS, "--draws", "60", "--plot", str(picture), "--json")
    assert result.exit_code == 0, result.output
    rows = {row["method"]: row for row in json.loads(result.stdout)}
    assert list(rows) == ["sb (weight)", *METHODS.split(",")[1:]]
    for name in ("sb (weight)", "lora-xs", "ffa-lora", "lora", "full"):
        row = rows[name]
        assert row["measured_noise_energy"] == pytest.approx(row["predicted_noise_energy"], rel=0.06)
        assert 0 < row["measured_noise_energy_standard_error"] < 0.02 * row["measured_noise_energy"]
    assert rows["bitfit"]["predicted_noise_energy"] is None
    assert rows["head-only"]["measured_noise_energy"] is None
    assert all(row["snr_per_step"] > 0 for row in rows.values())
    assert rows["sb (weight)"]["dimension"] < rows["ffa-lora"]["dimension"] < rows["lora"]["dimension"]
    assert picture.stat().st_size > 2000
    assert not any(canary in result.output for canary in workbench.CANARIES)


def test_every_start_of_lora_has_a_closed_form():
    model = str(workbench.bert_folder())
    rows = list(compare_methods(model=model, methods=["lora-xs", *STARTS.split(",")], rank=4, draws=60))
    assert len(rows) == 5
    for row in rows:
        assert abs(row.measured - row.predicted) < 5 * row.standard_error < 0.1 * row.predicted, row.method


def test_one_draw_has_no_standard_error():
    result = command("--methods", "sb,head-only", "--draws", "2")
    assert "±" in result.stdout
    assert "±" not in command("--methods", "sb,head-only", "--draws", "1").stdout


def test_a_public_basis_is_measured_on_the_other_half(public):
    result = command(*public, "--methods", "sb", "--basis", "public")
    assert result.exit_code == 0, result.output
    assert "sb (public)" in result.stdout


@pytest.mark.parametrize("basis", ["random", "complementary", "hadamard"])
def test_directions_that_need_no_data(basis):
    facts = {"model": str(workbench.bert_folder()), "methods": ["sb"], "basis": basis, "rank": 4}
    (row,) = compare_methods(labels="ham,spam", draws=2, **facts)
    assert row.method == f"sb ({basis})"
    assert row.predicted == pytest.approx(13 * 16 / 256**2), "orthonormal A and B leave the noise of R as it is"


def test_class_names_of_a_saved_public_data_set_are_public(tmp_path):
    import datasets

    names = datasets.ClassLabel(names=["ham", "spam"])
    rows = {"text": [f"a mail about {i} things" for i in range(16)], "label": [0, 1] * 8}
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    (row,) = compare_methods(model=str(workbench.bert_folder()), public=str(tmp_path / "saved"), methods=["sb"], rank=4)
    assert row.snr is not None


def test_without_data_only_the_noise_is_compared():
    (row,) = compare_methods(model=str(workbench.llama_folder()), task="causal-lm", methods=["sb"], rank=4)
    assert row.signal is None
    assert row.snr is None
    assert row.predicted == pytest.approx(14 * 16 / 256**2)


@pytest.mark.parametrize(("targets", "weights"), [("query,value", 4), (r"re:.*\.0\..*query", 1), ("all-linear", 13)])
def test_targets_mean_what_they_mean_in_training(targets, weights):
    """Two blocks of six weights and the pooler; a core has 4 x 4 numbers, the head 2 x 32 + 2."""
    result = command("--methods", "sb", "--draws", "1", "--targets", targets, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)[0]["dimension"] == 16 * weights + 66


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--task", "foo"], "task='foo' to be one of classification, causal-lm"),
        (["--targets", "nothing"], "its linear layers are called"),
        (["--targets", "re:(query"], "targets='re:(query' is no regular expression"),
        (["--methods", "lorra"], "method='lorra' to be one of those that exist: sb, lora-xs"),
        (["--methods", "peft:IA3"], "is refused: it trains bare tensors"),
        (["--methods", " , "], "methods to name at least one of sb, lora-xs"),
        (["--labels", "from-data"], "labels='from-data' to name at least two; 'from-data' needs a file of public data"),
        (["--basis", "public"], "basis='public' to be one of"),
        (["--plot", "noise.pdf"], "to end in .svg or .png"),
        (["--noise-multiplier", "0"], "noise_multiplier=0.0 to be positive"),
        (["--draws", "0"], "draws=0 of at least 1"),
        (["--examples", "1"], "examples=1 of at least 4"),
        (["--public", "none.parquet"], "none.parquet does not exist"),
        (["--rank", "400"], "rank=400 exceeds the smaller side"),
    ],
)
def test_bad_input_is_one_sentence(options, sentence):
    result = command(*options)
    assert result.exit_code == 1
    assert sentence in " ".join(result.stderr.split())
