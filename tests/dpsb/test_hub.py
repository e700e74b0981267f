"""What a push would send: an allowed list, no metrics on people, no local paths, nothing of an unfinished run."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import workbench
from typer.testing import CliRunner

from dpsb import hub, run
from dpsb.cli import app
from dpsb.run import RunError
from dpsb_accounting import verify

BASE = "owner/tiny-bert"
SECRETS = {
    "checkpoint/state.safetensors": "moments of Adam",
    "checkpoint/position.json": "{}",
    "start.safetensors": "where it began",
    "training_args.bin": "seed=42",
    "rng_state.pth": "random state",
    "trainer_state.json": '{"loss": 0.71}',
    "losses.jsonl": '{"loss": 0.7}',
    "key.pem": "-----BEGIN PRIVATE KEY-----",
    "optimizer.pt": "second moments",
    ".env": "TOKEN=hf_secret",
    "rows.jsonl": "a patient's text",
    "tokenizer_notes.txt": "a note",
}


class FakeApi:
    """Stands for huggingface_hub.HfApi: keeps what it is sent, by its own reading of the allowed patterns."""

    def __init__(self, error=None):
        self.error, self.sent, self.made = error, {}, None

    def create_repo(self, *, repo_id, private, exist_ok, repo_type):
        self.made = (repo_id, private, exist_ok, repo_type)

    def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns, commit_message):
        from huggingface_hub.utils import filter_repo_objects

        if self.error is not None:
            raise self.error
        names = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*")]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            self.sent[name] = (Path(folder_path) / name).read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with held-out metrics, among files that must never be published."""
    out = tmp_path_factory.mktemp("hub") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpsb.plan.noise_multiplier_for", workbench.calibrated)
        run.fine_tune(workbench.run_config(out, eval_data=str(workbench.data_file(seed=3))))
    for name, content in SECRETS.items():
        path = out / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    (out / "vocab.txt").symlink_to("/etc/hostname")
    return out


def planned(folder, **options):
    return hub.plan_upload(folder, **{"base_model": BASE, "local_paths": True, **options})


def test_only_the_allowed_files_go_and_the_rest_is_named(finished):
    upload = planned(finished)
    assert set(upload.files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "dpsb_core.safetensors",
        "ledger.jsonl",
        "report.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    there = {path.name for path in finished.iterdir()}
    assert set(upload.files) | set(upload.kept) == there
    assert {name.split("/")[0] for name in SECRETS} | {"run.json", "vocab.txt"} == set(upload.kept)


def test_what_goes_names_no_local_path_and_no_metric_on_people(finished):
    upload = planned(finished)
    for name, content in upload.files.items():
        if name != "ledger.jsonl":
            assert str(workbench.bert_folder()).encode() not in content, name
        for secret in SECRETS.values():
            assert len(secret) < 6 or secret.encode() not in content
    report = json.loads(upload.files["report.json"])
    assert "held_out" not in report
    assert "held_out" in json.loads((finished / "report.json").read_text()), "the run's own file stays"
    assert report["epsilon"] == json.loads((finished / "report.json").read_text())["epsilon"]
    assert json.loads(upload.files["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert f"from_pretrained('{BASE}'" in upload.files["README.md"].decode()


def test_what_was_sent_verifies_where_it_arrives(finished, tmp_path):
    api = FakeApi()
    upload = planned(finished)
    hub.push(upload, "owner/adapter", api=api)
    assert api.made == ("owner/adapter", True, True, "model")
    assert api.sent == dict(upload.files)
    for name, content in api.sent.items():
        (tmp_path / name).write_bytes(content)
    assert verify(tmp_path / "ledger.jsonl").ok


def test_a_base_model_in_a_folder_needs_its_name_and_a_ledger_that_names_it_consent(finished):
    with pytest.raises(RunError, match="--base-model"):
        hub.plan_upload(finished)
    with pytest.raises(RunError, match=r"ledger.jsonl would give away a local path \(plan.details.model\)") as error:
        hub.plan_upload(finished, base_model=BASE)
    assert str(workbench.bert_folder()) not in str(error.value)


@pytest.mark.parametrize("chosen", ["/home/alice/near.parquet", "near.jsonl, /home/alice/far.jsonl", "public:~/a.csv"])
def test_a_choice_of_files_gives_no_local_path_away(finished, tmp_path, chosen):
    for path in finished.iterdir():
        if path.is_file() and path.name in hub.ALLOWED:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "basis_choice.json").write_text(json.dumps({"chosen": chosen}))
    with pytest.raises(RunError, match=r"basis_choice.json would give away a local path \(chosen\)") as error:
        planned(tmp_path, local_paths=False)
    assert "alice" not in str(error.value)
    report = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps({**report, "basis": {**report["basis"], "candidates": chosen}}))
    with pytest.raises(RunError, match=r"report.json would give away a local path \(basis.candidates\)"):
        planned(tmp_path)


def test_only_a_whole_path_is_the_base_models(finished, tmp_path):
    """A public file may lie beside the model under a name that begins with the model's; a choice of files is bound."""
    copied = [path for path in finished.iterdir() if path.is_file() and path.name in hub.ALLOWED]
    for path in copied:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = str(workbench.bert_folder())
    near = f"{model}-near.jsonl"
    (tmp_path / "basis_choice.json").write_text(json.dumps({"chosen": near, "model": model}))
    card = tmp_path / "README.md"
    card.write_text(f"{card.read_text()}\nFrom {near}, /x{model}, {model}/x and {model}.\n")
    sent = planned(tmp_path).files
    assert sent["basis_choice.json"] == (tmp_path / "basis_choice.json").read_bytes()
    assert sent["README.md"].decode().endswith(f"\nFrom {near}, /x{model}, {model}/x and {BASE}.\n")


@pytest.mark.parametrize("written", ["file://{}", "{}/tokenizer.json", "_{}_"])
def test_a_path_beside_the_base_models_is_not_given_away(finished, tmp_path, written):
    for path in finished.iterdir():
        if path.is_file() and path.name in hub.ALLOWED:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    card = tmp_path / "README.md"
    card.write_text(f"{card.read_text()}\n{written.format(workbench.bert_folder())}\n")
    with pytest.raises(
        RunError, match=r"README.md names something in or beside the base model's local folder"
    ) as error:
        planned(tmp_path, local_paths=False)
    assert str(workbench.bert_folder()) not in str(error.value)


def test_a_folder_may_be_called_like_the_model_or_a_token():
    """``/gpt2`` stands in ``openai-community/gpt2``, and tokens such as ``/model`` or ``</think>`` name no folder."""
    name = "openai-community/gpt2"
    kept = {
        "tokenizer.json": b'{"model": {"vocab": {"/gpt2": 5, "/gpt2s": 6}}}',
        "chat_template.jinja": b"<gpt2>{{ messages }}</gpt2>",
    }
    files = {
        hub.CONFIG: b'{"base_model_name_or_path": "/gpt2"}',
        hub.CARD: f"From /gpt2, which is {name}.".encode(),
        **kept,
    }
    record = SimpleNamespace(plan=SimpleNamespace(details={"model": "/gpt2/"}))
    assert list(hub._with_base_model(files, record, name, False)) == [hub.CONFIG, hub.CARD]
    assert json.loads(files[hub.CONFIG]) == {"base_model_name_or_path": name}
    assert files[hub.CARD].decode() == f"From {name}, which is {name}."
    assert {file: files[file] for file in kept} == kept


def test_a_folder_here_is_no_name_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    record = SimpleNamespace(plan=SimpleNamespace(details={"model": "models/mine"}))
    files = {hub.CONFIG: b'{"base_model_name_or_path": "models/mine"}'}
    with pytest.raises(RunError, match="--base-model ID"):
        hub._with_base_model(files, record, None, False)


def test_a_signature_goes_only_with_the_files_that_it_is_for(finished, tmp_path):
    for path in finished.iterdir():
        if path.is_file() and path.name in hub.ALLOWED:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "signature.json").write_text("{}")
    assert "would differ" in planned(tmp_path).kept["signature.json"]


@pytest.mark.parametrize("name", ["report.json", "adapter_model.safetensors", "README.md"])
def test_an_unfinished_run_is_not_published(finished, tmp_path, name):
    for path in finished.iterdir():
        if path.is_file() and path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(RunError, match=f"no finished run of an adapter: {name}"):
        planned(tmp_path)


def test_a_run_without_a_claim_needs_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr("dpsb.plan.noise_multiplier_for", workbench.calibrated)
    run.fine_tune(workbench.run_config(tmp_path / "seeded", insecure_seed=1))
    with pytest.raises(RunError, match="claims no privacy"):
        planned(tmp_path / "seeded")
    assert "ledger.jsonl" in planned(tmp_path / "seeded", without_claim=True).files


def test_the_command_shows_and_sends_nothing_in_a_dry_run(finished, monkeypatch):
    api = FakeApi()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    monkeypatch.setenv("COLUMNS", "160")
    options = ["push", str(finished), "--repo", "owner/adapter", "--base-model", BASE, "--local-paths"]
    result = CliRunner().invoke(app, [*options, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "nothing was sent" in result.output
    assert (api.made, api.sent) == (None, {})
    for name in ("run.json", "training_args.bin", "checkpoint", "adapter_model.safetensors"):
        assert name in result.output
    facts = json.loads(CliRunner().invoke(app, [*options, "--json"]).stdout)
    assert (facts["pushed"], set(facts["files"])) == (True, set(api.sent))


def test_a_refusal_of_the_hub_is_one_sentence(finished, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: FakeApi(ConnectionError("no route; token hf_secret")))
    options = ["push", str(finished), "--repo", "owner/adapter", "--base-model", BASE, "--local-paths"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 1
    assert "The Hub cannot be reached" in result.stderr
    assert "hf_secret" not in result.output


def test_version_of_everything_as_json():
    found = json.loads(CliRunner().invoke(app, ["--version", "--json"]).stdout)
    for name in ("dpsb", "torch", "peft", "transformers", "opacus", "dp-accounting", "python", "platform"):
        assert found[name], name
    assert CliRunner().invoke(app, ["--version"]).stdout == f"dpsb {found['dpsb']}\n"
    assert CliRunner().invoke(app, ["--json", "plan"]).exit_code == 1
