"""``dpsb federate simulate`` and ``report``: from a TOML file to a finished folder, on tiny models."""

import json
import os
import signal

import pytest
import workbench
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from dpsb.cli import app
from dpsb.data import DataError, Table, read_table
from dpsb.federated import trainer
from dpsb.federated.checks import FederatedError
from dpsb.federated.config import config_from_json, read_federation
from dpsb.federated.server import load_state
from dpsb.federated.simulate import simulate
from dpsb.federated.spec import read_policy
from dpsb.federated.split import split_table
from dpsb.probe import ProbeError
from dpsb_accounting import Ledger, PoissonGaussian, epsilon, verify


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("dpsb.federated.calibrate.noise_multiplier_for", lambda **_facts: 2.0)  # epsilon about 1.5
    monkeypatch.setattr("dpsb.federated.trainer.check_before_run", lambda *_args: None)


def settings(tmp_path, run="", federation="", silos=""):
    path = tmp_path / "fed.toml"
    path.write_text(
        f'model = "{workbench.bert_folder()}"\nlabels = "ham,spam"\nepsilon = 8.0\nrank = 4\n'
        f'expected_batch_size = 8\nmax_length = {workbench.PADDED}\nout = "{tmp_path / "out"}"\n{run}\n'
        f"[federation]\nrounds = 2\nlocal_steps = 2\n{federation}\n{silos}\n"
    )
    return path


def split_file(tmp_path):
    rows = workbench.rows(90)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "group": f"g{i % 11}"}) + "\n" for i, row in enumerate(rows)))
    return f'data = "{path}"'


SPLIT = 'silos = 3\nsplit_by = "group"'


@pytest.mark.parametrize(
    ("run", "federation", "match"),
    [
        ("delta = 0.5", "", r"delta=0\.5 below one over the \d+ examples"),
        ("", "min_silos = 9", "min_silos=9"),
        ("", 'model = "trusted_server"\nlocal_steps = 1', "needs server_optimizer"),
        ("", 'model = "secagg"\nserver_optimizer = "sgd"\nlocal_steps = 1\ndropouts = 2', "none is left"),
        ("", 'server_learning_rate = "x"', "server_learning_rate='x'"),
        ("", "server_learning_rate = -1", "server_learning_rate=-1"),
    ],
)
def test_settings_that_no_round_could_have_leave_nothing(tmp_path, run, federation, match):
    """The start and the settings they left refused the corrected file."""
    path = settings(tmp_path, f"{split_file(tmp_path)}\n{run}", f"{SPLIT}\n{federation}")
    if "local_steps" in federation:
        path.write_text(path.read_text().replace("local_steps = 2\n", ""))
    with pytest.raises(FederatedError, match=match):
        simulate(read_federation(path))
    assert not (tmp_path / "out").exists()


def test_a_model_that_fails_its_test_leaves_nothing(tmp_path, monkeypatch):
    def fails(*_args):
        raise ProbeError("a layer is not captured")

    monkeypatch.setattr("dpsb.federated.trainer.check_before_run", fails)
    with pytest.raises(ProbeError, match="a layer is not captured"):
        simulate(read_federation(settings(tmp_path, split_file(tmp_path), SPLIT)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fed.toml", "rows.jsonl"]


def test_one_file_split_over_three_silos(tmp_path):
    held_out = f'eval_data = "{workbench.data_file(seed=7)}"'
    done = simulate(read_federation(settings(tmp_path, f"{split_file(tmp_path)}\n{held_out}", SPLIT)))
    out = done.out
    report = json.loads((out / "report.json").read_text())
    assert report["claim"]
    assert report["model"] == "silo_local"
    assert [row["name"] for row in report["silos"]] == ["silo-1", "silo-2", "silo-3"]
    assert all(row["charged"] == row["planned"] == 4 for row in report["silos"])
    assert report["epsilon"]["upper"] <= 8.0
    assert report["rounds"]["done"] == 2
    assert set(done.held_out) == {"accuracy", "cross_entropy", "examples"}
    assert report["held_out"]["note"] == "outside the guarantee"
    card = (out / "adapter" / "README.md").read_text()
    assert report["statement"] in card
    assert "accuracy" not in card
    for name in ("silo-1", "silo-2", "silo-3"):
        (ledger,) = (out / "silos" / name).glob("runs/*/ledger.jsonl")
        assert verify(ledger).ok
        assert read_policy(out / "silos" / name / "policy.toml").max_epsilon == 8.0
        assert Ledger.read(ledger).plan.neighboring == "zero_out"
    base = AutoModelForSequenceClassification.from_pretrained(workbench.bert_folder(), num_labels=2)
    PeftModel.from_pretrained(base, out / "adapter")
    for content in workbench.written(out).values():
        for canary in workbench.CANARIES:
            assert canary.split("-")[0].encode() not in content
    with pytest.raises(RuntimeError, match="is finished"):
        simulate(read_federation(tmp_path / "fed.toml"))


def test_own_files_declared_sizes_and_budgets(tmp_path, monkeypatch):
    monkeypatch.setattr("dpsb.federated.calibrate.noise_multiplier_for", workbench.calibrated)
    silos = "".join(
        f'[silos.{name}]\ndata = "{workbench.data_file(seed=seed)}"\nepsilon = {epsilon}\nnum_examples = 60\n'
        for name, seed, epsilon in (("north", 1, 4.0), ("south", 2, 8.0))
    )
    done = simulate(read_federation(settings(tmp_path, silos=silos)))
    rows = {row.name: row.epsilon.upper for row in done.federation.report.per_silo}
    assert 3.5 < rows["north"] <= 4.0 < rows["south"] <= 8.0
    assert done.federation.report.terms.neighboring == "add_or_remove_one"


@pytest.mark.parametrize(
    ("model", "more"), [("trusted_server", ""), ("secagg", ""), ("client_level", "server_learning_rate = 0.5")]
)
def test_models_with_sums_in_one_process(tmp_path, model, more):
    federation = f'{SPLIT}\nmodel = "{model}"\nserver_optimizer = "adam"\n{more}'
    path = settings(tmp_path, split_file(tmp_path), federation)
    if model != "client_level":
        path.write_text(path.read_text().replace("local_steps = 2", "local_steps = 1"))
    done = simulate(read_federation(path))
    assert done.federation.report.model == model
    assert done.federation.report.claim
    assert done.federation.report.terms.unit == ("client" if model == "client_level" else "example")


def test_noise_in_whole_numbers_in_one_process(tmp_path, monkeypatch):
    """Calibrated by its own bound: the claim keeps to the budget that Gaussian noise of that size would not fill."""
    pytest.importorskip("flwr")
    monkeypatch.setattr("dpsb.federated.calibrate.noise_multiplier_for", lambda **_facts: 0.8)  # if it were Gaussian
    federation = f'{SPLIT}\nmodel = "secagg"\nnoise = "skellam"\nserver_optimizer = "adam"\nlocal_steps = 1'
    path = settings(tmp_path, split_file(tmp_path), federation)
    path.write_text(path.read_text().replace("local_steps = 2\n", "").replace("epsilon = 8.0", "epsilon = 2.0"))
    done = simulate(read_federation(path))
    report = done.federation.report
    assert report.claim
    assert 1.9 < report.epsilon.upper <= 2.0
    event = Ledger.read(next((done.out / "silos" / "silo-1").glob("runs/*/ledger.jsonl"))).plan.train.event
    gaussian = PoissonGaussian(noise_multiplier=event.noise_multiplier, sampling_prob=event.sampling_prob)
    assert epsilon([(gaussian, 2)], report.terms.delta, "zero_out").upper < 1.9
    assert (done.out / "silos" / "silo-1" / "sum.key").stat().st_mode & 0o777 == 0o600


def test_noise_in_whole_numbers_is_of_one_model(tmp_path):
    with pytest.raises(FederatedError, match="noise='skellam' is of model secagg, not of silo_local"):
        read_federation(settings(tmp_path, split_file(tmp_path), f'{SPLIT}\nnoise = "skellam"'))


def test_a_killed_simulation_goes_on(tmp_path):
    """kill -9 in the second round, in the middle of a silo's steps; the spare round pays for what that wasted."""
    path = settings(tmp_path, split_file(tmp_path), f"{SPLIT}\nspare_rounds = 1")
    child = os.fork()
    if child == 0:
        try:
            inner, calls = trainer.charged_sum, []

            def deadly(*arguments, **options):
                found = inner(*arguments, **options)
                calls.append(0)
                if len(calls) == 9:
                    os.kill(os.getpid(), signal.SIGKILL)
                return found

            trainer.charged_sum = deadly
            simulate(read_federation(path))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert load_state(tmp_path / "out").round == 1
    done = simulate(read_federation(path))
    assert done.federation.state.round == 2
    assert [row.charged for row in done.federation.report.per_silo] == [4, 5, 4]
    path.write_text(path.read_text().replace("rounds = 2", "rounds = 3"))
    (tmp_path / "out" / "report.json").unlink()
    with pytest.raises(RuntimeError, match="cannot change on resume"):
        simulate(read_federation(path))


@pytest.mark.parametrize(
    ("run", "federation", "said"),
    [
        ("steps = 3", SPLIT, "steps=3 is rounds times local_steps"),
        ('unit_column = "group"', SPLIT, "unit_column='group' is not there for federations yet"),
        ('warm_start = "public.parquet"', SPLIT, "warm_start='public.parquet' is not there for federations yet"),
        ('precondition = "public.parquet"', SPLIT, "precondition='public.parquet' is not there for federations yet"),
        ('basis = "trained"', SPLIT, "basis='trained' is not there for federations yet; use 'public:FILE'"),
        ('method = "lora"', SPLIT, "method='lora' is not federated here"),
        ('basis = "lora-sb"\nallow_non_private_basis = true', SPLIT, "lora-sb"),
        ("basis_share = 0.1", SPLIT, "basis_share=0.1 is for a basis that is paid for"),
        ('basis = "leak"\nallow_non_private_basis = true', SPLIT, "is computed from private data"),
        ("epsilon_ = 3", SPLIT, "unknown key 'epsilon_'"),
        ("lr = 0.1\nlearning_rate = 0.2", SPLIT, "has both 'lr' and 'learning_rate'"),
        ("", "silos = 1", "Say who takes part"),
        ("", SPLIT + "\nround = 2", "unknown key 'round'"),
        ("", SPLIT + '\nmodel = "trust"', "Expected model='trust'"),
        ('labels_ = "x"', SPLIT, "unknown key 'labels_'"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, run, federation, said):
    with pytest.raises(FederatedError, match=said):
        read_federation(settings(tmp_path, f"{split_file(tmp_path)}\n{run}", federation))


def test_a_replaced_row_may_not_move_from_silo_to_silo(tmp_path):
    """One removed from a silo of epsilon 3 and added to another of epsilon 3 can be told apart at 3.16."""
    run = f'{split_file(tmp_path)}\nneighboring = "replace_one"'
    silos = "".join(f"[silos.{name}]\nnum_examples = 45\n" for name in ("north", "south"))
    with pytest.raises(FederatedError, match="replaced can leave a silo and enter another"):
        simulate(read_federation(settings(tmp_path, run, 'split_by = "group"', silos)))
    assert not (tmp_path / "out").exists()


def test_no_row_is_at_two_silos(tmp_path):
    file = workbench.data_file(seed=1)
    (tmp_path / "again.jsonl").symlink_to(file)
    parts = "".join(
        f'[silos.{name}]\ndata = "{where}"\n' for name, where in (("a", file), ("b", tmp_path / "again.jsonl"))
    )
    with pytest.raises(FederatedError, match="Silos 'a' and 'b' have the same rows"):
        read_federation(settings(tmp_path, silos=parts))


@pytest.mark.parametrize("key", ["eval_data", "basis"])
def test_no_silos_rows_are_held_out_or_public(tmp_path, key):
    """Also not those of a silo after the first: metrics on them, or a basis from them, would leak them unnoised."""
    files = {name: workbench.data_file(seed=seed) for name, seed in (("north", 1), ("south", 2))}
    silos = "".join(f'[silos.{name}]\ndata = "{file}"\n' for name, file in files.items())
    used = f'{key} = "{"public:" if key == "basis" else ""}{files["south"]}"'
    with pytest.raises(FederatedError, match=r"\[silos.south\]: .* training data"):
        read_federation(settings(tmp_path, used, silos=silos))


@pytest.mark.parametrize("basis", ["public", "hybrid"])
def test_no_silo_holds_rows_that_the_basis_takes_for_public(tmp_path, basis):
    files = {name: workbench.data_file(seed=seed) for name, seed in (("north", 1), ("south", 2))}
    own = [json.loads(line) for line in files["south"].read_text().splitlines()]
    own = sorted(own, key=lambda row: -len(row["text"]))[:2]
    near = tmp_path / "near.jsonl"
    near.write_text("".join(json.dumps(row) + "\n" for row in [*workbench.rows(30, seed=3), *own]))
    silos = "".join(f'[silos.{name}]\ndata = "{file}"\n' for name, file in files.items())
    path = settings(tmp_path, f'basis = "{basis}:{near}"', silos=silos)
    with pytest.raises(DataError, match=r"2 of the 32 rows of .*, named as public, are in the data of silo 'south'"):
        simulate(read_federation(path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("basis", ["weight", "private"])
def test_settings_of_a_federation_that_an_earlier_version_began(tmp_path, basis):
    config = read_federation(settings(tmp_path, f'{split_file(tmp_path)}\nbasis = "{basis}"', SPLIT))
    earlier = config.to_json()
    earlier["run"]["basis_sampling_prob"] = 1.0
    assert config_from_json(earlier) == config


def test_a_split_needs_its_column(tmp_path):
    path = settings(tmp_path, f'data = "{workbench.data_file()}"', SPLIT)
    with pytest.raises(DataError, match="no column 'group'; it has 'text', 'label'"):
        simulate(read_federation(path))
    assert not (tmp_path / "out").exists()


def test_a_row_moves_nobody_else():
    table = Table("t", {"text": [f"text {i}" for i in range(40)], "group": [f"g{i % 7}" for i in range(40)]})
    names = ["a", "b", "c"]
    whole = split_table(table, names, "group", 0)
    assert sum(map(len, whole.values())) == 40
    for group in {f"g{i}" for i in range(7)}:
        assert sum(group in part.columns["group"] for part in whole.values()) == 1
    less = Table("t", {name: values[1:] for name, values in table.columns.items()})
    for name, part in split_table(less, names, "group", 0).items():
        assert part.columns["text"] == [text for text in whole[name].columns["text"] if text != "text 0"]


def test_the_example_reads_and_its_column_exists():
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    config = read_federation(root / "examples" / "federated_mail" / "fed.toml")
    assert len(config.silos) == 3
    parts = split_table(read_table(config.run.data), list(config.silos), config.federation.split_by, 0)
    assert all(len(part) > 300 for part in parts.values())


def test_commands(tmp_path, monkeypatch):
    path = settings(tmp_path, split_file(tmp_path), SPLIT)
    runner = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"})
    done = runner.invoke(app, ["federate", "simulate", "--config", str(path)])
    assert done.exit_code == 0, done.output
    assert "What each party sees" in done.output
    assert "replies used: 6 of 6" in done.output
    again = runner.invoke(app, ["federate", "report", str(tmp_path / "out"), "--json"])
    facts = json.loads(again.stdout)
    assert facts["claim"]
    assert facts["bytes"]["up"] == facts["bytes"]["down"] > 0
    missing = runner.invoke(app, ["federate", "report", str(tmp_path / "nothing")])
    assert missing.exit_code == 1
    assert "holds no federation" in missing.output
    assert "trusted with its data" in runner.invoke(app, ["federate", "--help"]).output
    (ledger,) = (tmp_path / "out" / "silos" / "silo-2").glob("runs/*/ledger.jsonl")
    ledger.unlink()
    gone = runner.invoke(app, ["federate", "report", str(tmp_path / "out")])
    assert gone.exit_code == 1
    assert "nothing can be claimed" in gone.output


def test_an_interrupted_command_says_how_to_go_on(tmp_path, monkeypatch):
    path = settings(tmp_path, split_file(tmp_path), SPLIT)
    monkeypatch.setattr(trainer, "charged_sum", lambda *_a, **_o: (_ for _ in ()).throw(KeyboardInterrupt))
    done = CliRunner().invoke(app, ["federate", "simulate", "--config", str(path)])
    assert done.exit_code == 1
    assert "the same command goes on" in " ".join(done.output.split())


def test_bytes_of_a_round_are_those_of_the_cores_and_the_head(tmp_path):
    done = simulate(read_federation(settings(tmp_path, split_file(tmp_path), SPLIT)))
    cores = [value for name, value in done.federation.state.theta.items() if name.endswith(".R")]
    head = [value for name, value in done.federation.state.theta.items() if not name.endswith(".R")]
    numbers = 4 * 4 * len(cores) + sum(value.numel() for value in head)
    assert all(value.shape == (4, 4) for value in cores)
    assert [record.bytes_up for record in done.federation.state.history] == [3 * 4 * numbers] * 2
