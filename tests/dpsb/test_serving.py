"""Packs, sums and server-ready adapters: the same logits without dpsb, the right size, the right epsilon."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import workbench
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from dpsb import run
from dpsb.cli import app
from dpsb.run import RunError
from dpsb.serving.combine import combine, combined_bound
from dpsb.serving.pack import add_to_pack, read_pack
from dpsb.serving.tenants import Tenants
from dpsb.serving.vllm import RANKS, export_for_vllm, problems_for_vllm
from dpsb_accounting import Ledger, epsilon

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs: two classifiers and a mean-pooled one on one basis each, two language models."""
    out = tmp_path_factory.mktemp("runs")
    settings = {
        "one": ("classification", {"pooling": "native"}),
        "two": ("classification", {"pooling": "native", "data": str(workbench.data_file(seed=4))}),
        "pooled": ("classification", {"pooling": "mean"}),
        "pooled2": ("classification", {"pooling": "mean"}),
        "causal": ("causal-lm", {}),
        "causal2": ("causal-lm", {"epsilon": 4.0}),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpsb.plan.noise_multiplier_for", workbench.calibrated)
        for name, (kind, changes) in settings.items():
            run.fine_tune(workbench.run_config(out / name, kind, **changes))
    return out


def inputs():
    return {"input_ids": torch.randint(5, 20, (3, 7), generator=torch.Generator().manual_seed(1))}


def peft_logits(folder, kind=AutoModelForCausalLM, **options):
    base = kind.from_pretrained(json.loads((folder / CONFIG).read_text())["base_model_name_or_path"], **options)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(folder)).eval()(**inputs()).logits


def test_a_pack_gives_every_adapter_back_bit_for_bit(runs, tmp_path):
    for names in (("one", "two"), ("pooled", "pooled2"), ("causal", "causal2")):
        pack = add_to_pack(tmp_path / names[0], {name: runs / name for name in names})
        assert pack.tenants == sorted(names)
        for name in names:
            out = tmp_path / f"{name}-again"
            pack.unpack(name, out)
            for file in (WEIGHTS, "head.safetensors"):
                assert (out / file).exists() == (runs / name / file).exists()
                if (out / file).exists():
                    was, now = load_file(runs / name / file), load_file(out / file)
                    assert was.keys() == now.keys()
                    assert all(torch.equal(value, now[key]) for key, value in was.items())
            claim = json.loads((out / "claim.json").read_text())
            ledger = Ledger.read(runs / name / "ledger.jsonl")
            assert (claim["run_id"], claim["ledger_head"]) == (ledger.run_id, ledger.head)
            assert claim["epsilon"]["upper"] == epsilon(ledger.plan).upper


def test_an_unpacked_adapter_computes_the_same_in_plain_peft(runs, tmp_path):
    add_to_pack(tmp_path / "pack", {"causal": runs / "causal"}).unpack("causal", tmp_path / "again")
    torch.testing.assert_close(peft_logits(tmp_path / "again"), peft_logits(runs / "causal"), rtol=0, atol=0)


def test_a_loaded_pack_switches_between_tenants(runs, tmp_path):
    add_to_pack(tmp_path / "pack", {"one": runs / "one", "two": runs / "two"})
    tenants = Tenants(tmp_path / "pack")
    found = {}
    for name in ("one", "two", "one"):
        tenants.use(name)
        assert tenants.tenant == name
        with torch.no_grad():
            found[name] = tenants.model(**inputs()).logits
        wanted = peft_logits(runs / name, AutoModelForSequenceClassification, num_labels=2)
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found["one"], found["two"])


def test_a_loaded_pack_of_pooled_classifiers_has_each_tenants_head(runs, tmp_path):
    add_to_pack(tmp_path / "pack", {"pooled": runs / "pooled", "pooled2": runs / "pooled2"})
    tenants = Tenants(tmp_path / "pack")
    for name in ("pooled2", "pooled"):
        tenants.use(name)
        head = load_file(runs / name / "head.safetensors")
        assert torch.equal(tenants.model.classifier.weight, head["weight"])
        assert torch.equal(tenants.model.classifier.bias, head["bias"])


def test_a_thousand_tenants_take_little_more_than_their_cores(runs, tmp_path):
    """At the size that people pack: 16 x 16 cores in 36 layers. Heads come on top, and are counted."""
    import dpsb.serving.pack as module
    from dpsb.serving.adapters import CoreAdapter

    layers = [f"base_model.model.layer.{i}" for i in range(36)]
    A = {layer: torch.zeros(16, 384) for layer in layers}
    B = {layer: torch.zeros(384, 16) for layer in layers}
    (tmp_path / "tenants").mkdir()
    claim = module._claim_of(runs / "one")
    for i in range(20):
        R = {layer: torch.randn(16, 16) for layer in layers}
        module._write_tenant(tmp_path / "tenants" / f"t{i}.safetensors", CoreAdapter({}, A, B, R, {}, {}, {}), claim)
    taken = sum(path.stat().st_size for path in (tmp_path / "tenants").iterdir())
    assert taken <= 1.05 * 20 * 36 * 16 * 16 * 4


def test_bad_packs_and_tenants_are_one_sentence(runs, tmp_path):
    pack = add_to_pack(tmp_path / "pack", {"one": runs / "one"})
    before = workbench.written(tmp_path / "pack")
    for given, message in (
        ({"pooled": runs / "pooled"}, "differ in"),
        ({"causal": runs / "causal"}, "differ in base_model_name_or_path"),
        ({"one": runs / "two"}, "holds a tenant 'one' already"),
        ({"../x": runs / "two"}, r"Expected the tenant name '\.\./x'"),
        ({"none": tmp_path}, "is no finished R-only run on one basis: adapter_config.json is missing"),
    ):
        with pytest.raises(RunError, match=message):
            add_to_pack(tmp_path / "pack", given)
    assert workbench.written(tmp_path / "pack") == before
    with pytest.raises(RunError, match="holds no tenant 'nobody'; there are one"):
        pack.unpack("nobody", tmp_path / "out")
    with pytest.raises(RunError, match="holds no tenant"):
        pack.unpack("../../one", tmp_path / "out")
    with pytest.raises(RunError, match="holds no pack"):
        read_pack(tmp_path)
    with pytest.raises(RunError, match="neither empty nor a pack"):
        add_to_pack(runs, {"one": runs / "one"})
    file = tmp_path / "pack" / "tenants" / "one.safetensors"
    save_file({"cores": torch.zeros(2, 2, 2)}, file)
    with pytest.raises(RunError, match="not this pack's"):
        pack.read("one")
    file.write_bytes(b"junk")
    with pytest.raises(RunError, match="is damaged"):
        pack.read("one")


def test_tensors_of_another_run_have_no_claim(runs, tmp_path):
    """The claim is that of the ledger, so the tensors must be of that ledger: they carry its run, length and head."""
    shutil.copytree(runs / "one", tmp_path / "mixed")
    for name in (WEIGHTS, "dpsb_core.safetensors"):
        shutil.copyfile(runs / "two" / name, tmp_path / "mixed" / name)
    with pytest.raises(RunError, match="is not of the ledger beside it"):
        add_to_pack(tmp_path / "pack", {"mixed": tmp_path / "mixed"})
    with pytest.raises(RunError, match="is not of the ledger beside it"):
        combine([tmp_path / "mixed", runs / "one"], tmp_path / "sum")


def test_heads_whose_rows_mean_other_labels_do_not_mix(runs, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpsb.plan.noise_multiplier_for", workbench.calibrated)
        run.fine_tune(workbench.run_config(tmp_path / "turned", pooling="native", labels="spam,ham"))
    with pytest.raises(RunError, match=r"differ in labels \(\['ham', 'spam'\] and \['spam', 'ham'\]\)"):
        add_to_pack(tmp_path / "pack", {"one": runs / "one", "turned": tmp_path / "turned"})
    with pytest.raises(RunError, match="differ in labels"):
        combine([runs / "one", tmp_path / "turned"], tmp_path / "sum")


def test_a_tenant_without_a_head_does_not_get_another_tenants(runs, tmp_path):
    pack = add_to_pack(tmp_path / "pack", {"one": runs / "one"})
    cores = torch.stack(list(pack.read("one").R.values()))
    save_file({"cores": cores + 1}, tmp_path / "pack" / "tenants" / "bare.safetensors")
    tenants = Tenants(tmp_path / "pack")
    tenants.use("one")
    before = [value.clone() for value in tenants.model.state_dict().values()]
    with pytest.raises(RunError, match="lacks"):
        tenants.use("bare")
    assert tenants.tenant == "one"
    assert all(torch.equal(a, b) for a, b in zip(before, tenants.model.state_dict().values(), strict=True))


def test_links_in_a_pack_from_elsewhere_are_not_followed(runs, tmp_path):
    pack = add_to_pack(tmp_path / "pack", {"one": runs / "one"})
    (tmp_path / "secret").write_text("a key")
    (tmp_path / "pack" / "tokenizer" / "x").symlink_to(tmp_path / "secret")
    pack.unpack("one", tmp_path / "out")
    assert not (tmp_path / "out" / "x").exists()


def test_a_delta_that_promises_nothing_to_one_of_the_runs_is_refused(runs):
    record = Ledger.read(runs / "causal" / "ledger.jsonl")
    other = Ledger.read(runs / "causal2" / "ledger.jsonl")
    many = replace(other.plan, num_examples=10**6, delta=1e-7, expected_batch_size=200_000)
    plans = {record.run_id: record.plan, other.run_id: many}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(other), "plan", property(lambda self: plans[self.run_id]))
        with pytest.raises(ValueError, match="must be less than 1 / num_examples = 1e-06 of run"):
            combined_bound([record, other], disjoint_people=True)


def test_a_sum_of_adapters_is_the_sum_of_their_updates(runs, tmp_path):
    combine([runs / "causal", runs / "causal2"], tmp_path / "sum", weights=[0.25, 2.0])
    one, two, both = (load_file(folder / WEIGHTS) for folder in (runs / "causal", runs / "causal2", tmp_path / "sum"))
    for name in (name for name in both if name.endswith("lora_A.weight")):
        other = name.replace("lora_A", "lora_B")
        update = both[other] @ both[name]
        torch.testing.assert_close(update, 0.25 * one[other] @ one[name] + 2.0 * two[other] @ two[name])
    assert peft_logits(tmp_path / "sum").shape == peft_logits(runs / "causal").shape


def test_what_a_sum_costs_follows_from_the_ledgers(runs, tmp_path):
    folders = [runs / "causal", runs / "causal2"]
    plans = [Ledger.read(folder / "ledger.jsonl").plan for folder in folders]
    delta = max(plan.delta for plan in plans)
    together = combine(folders, tmp_path / "sum")
    parts = [(phase.event, phase.count) for plan in plans for phase in plan.phases]
    assert together["epsilon"]["upper"] == epsilon(parts, delta, plans[0].neighboring).upper
    apart = combine(folders, tmp_path / "apart", disjoint_people=True)
    assert apart["epsilon"]["upper"] == max(epsilon(plan, delta).upper for plan in plans)
    assert apart["epsilon"]["upper"] < together["epsilon"]["upper"]
    assert sorted(path.stem for path in (tmp_path / "sum" / "ledgers").iterdir()) == sorted(
        entry["run_id"] for entry in together["runs"]
    )


def test_sums_without_a_claim_are_refused(runs, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpsb.plan.noise_multiplier_for", workbench.calibrated)
        run.fine_tune(workbench.run_config(tmp_path / "seeded", "causal-lm", insecure_seed=1))
        run.fine_tune(workbench.run_config(tmp_path / "declared", "causal-lm", num_examples=60))
    for other, message in (
        (tmp_path / "seeded", "makes no claim"),
        (tmp_path / "declared", "state different neighboring"),
        (runs / "causal", "of the same run"),
        (runs / "one", "differ in"),
    ):
        with pytest.raises(RunError, match=message):
            combine([runs / "causal", other], tmp_path / "sum")
    with pytest.raises(RunError, match="one weight for each of 2 runs, got 1"):
        combine([runs / "causal", runs / "causal2"], tmp_path / "sum", weights=[1.0])
    assert not (tmp_path / "sum").exists()


def test_an_export_for_vllm_computes_the_same_at_an_allowed_rank(runs, tmp_path):
    rank = export_for_vllm(runs / "causal", tmp_path / "out")
    assert rank == 8
    assert problems_for_vllm(tmp_path / "out") == []
    assert problems_for_vllm(tmp_path / "out", max_lora_rank=8) == []
    torch.testing.assert_close(peft_logits(tmp_path / "out"), peft_logits(runs / "causal"), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["r"] in RANKS


def test_uneven_ranks_and_scales_become_even(tmp_path):
    """vLLM reads r and lora_alpha only: an adapter with patterns would be served as another one."""
    base = AutoModelForCausalLM.from_pretrained(workbench.llama_folder())
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 12},
        alpha_pattern={"v_proj": 3},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(base, config).save_pretrained(tmp_path / "in")
    assert len(problems_for_vllm(tmp_path / "in")) >= 2
    assert export_for_vllm(tmp_path / "in", tmp_path / "out") == 16
    torch.testing.assert_close(peft_logits(tmp_path / "out"), peft_logits(tmp_path / "in"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "biases"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 1024}, "rank 1024"),
        ({"r": 5}, "and r is 5"),
    ],
)
def test_every_known_bad_case_is_named(runs, tmp_path, change, message):
    export_for_vllm(runs / "causal", tmp_path / "good")
    path = tmp_path / "good" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert any(message in problem for problem in problems_for_vllm(tmp_path / "good"))


def test_tensors_that_are_no_factors_are_named(runs, tmp_path):
    export_for_vllm(runs / "causal", tmp_path / "good")
    weights = load_file(tmp_path / "good" / WEIGHTS)
    first = next(name for name in weights if name.endswith("lora_A.weight"))
    for changed, message in (
        ({**weights, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, "no LoRA factor"),
        ({name: value for name, value in weights.items() if name != first}, "has no lora_A"),
        ({**weights, first: weights[first] * float("nan")}, "not finite"),
    ):
        save_file(changed, tmp_path / "good" / WEIGHTS, metadata={"format": "pt"})
        assert any(message in problem for problem in problems_for_vllm(tmp_path / "good"))
    with pytest.raises(RunError, match="task_type is 'SEQ_CLS'"):
        export_for_vllm(runs / "one", tmp_path / "classifier")
    assert not (tmp_path / "classifier").exists()


def test_the_commands(runs, tmp_path):
    cli = CliRunner()
    done = cli.invoke(app, ["pack", f"a={runs / 'one'}", str(runs / "two"), "--out", str(tmp_path / "pack"), "--json"])
    assert json.loads(done.stdout)["tenants"] == 2
    assert cli.invoke(app, ["unpack", str(tmp_path / "pack"), "a", "--out", str(tmp_path / "a")]).exit_code == 0
    assert (tmp_path / "a" / WEIGHTS).exists()
    folders = [str(runs / "causal"), str(runs / "causal2")]
    done = cli.invoke(app, ["combine", *folders, "--out", str(tmp_path / "sum"), "--weights", "1,1"])
    assert done.exit_code == 0
    assert "sequential: the same people" in done.stdout
    done = cli.invoke(app, ["export", folders[0], "--vllm", str(tmp_path / "vllm")])
    assert "--max-lora-rank 8" in done.stdout
    assert cli.invoke(app, ["export", folders[0]]).exit_code == 1
    assert cli.invoke(app, ["combine", *folders, "--out", str(tmp_path / "x"), "--weights", "a"]).exit_code == 1
