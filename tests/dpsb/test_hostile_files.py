"""No pickle anywhere; adapter files that were made to harm are refused with one sentence, and nothing of them runs."""

import ast
import json
import os
import pickle
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import workbench
from safetensors.torch import load_file, save_file

from dpsb.adapter_files import AdapterFileError, adapter_settings, with_adapter
from dpsb.export import export_merged
from dpsb.models import ModelError, load_base
from dpsb.reasons import foreseen, reason
from dpsb.run import fine_tune

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "dpsb").rglob("*.py"), *(ROOT / "accounting" / "dpsb_accounting").rglob("*.py")])
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_reads_or_writes_pickles(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            assert not PICKLES & {name.split(".")[0] for name in [*names, getattr(node, "module", None) or ""]}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "torch.save", "eval", "exec"), f"{path}:{node.lineno}"
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            if called.split(".")[-1] == "from_pretrained" and "Model" in called and "Peft" not in called:
                named = any(keyword.arg is None for keyword in node.keywords)
                assert named or ast.unparse(keywords["use_safetensors"]) == "True", f"{path}:{node.lineno}"
            if "allow_pickle" in keywords:
                assert ast.unparse(keywords["allow_pickle"]) == "False"


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("hostile") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpsb.plan.noise_multiplier_for", workbench.calibrated)
        return fine_tune(workbench.run_config(out, "causal-lm")).out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run that may be spoilt."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def base():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(workbench.llama_folder(), use_safetensors=True)


def refused(folder, match):
    with pytest.raises(AdapterFileError, match=match) as error:
        with_adapter(base(), folder)
    text = reason(error.value)
    assert foreseen(error.value)
    assert "\n" not in text
    return text


def test_the_adapter_itself_is_sound(run):
    assert with_adapter(base(), run) is not None


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"])
def test_an_adapter_that_is_a_pickle_is_not_read(run, tmp_path, name):
    mark = tmp_path / "it-ran"
    (run / "adapter_model.safetensors").unlink()
    (run / name).write_bytes(pickle.dumps(Bomb(mark)))
    refused(run, "a pickle can run code")
    with pytest.raises(AdapterFileError, match="a pickle can run code"):
        export_merged(run, tmp_path / "merged")
    assert not mark.exists()
    assert not (tmp_path / "merged").exists()


def test_a_pickle_under_the_name_of_safetensors_is_not_read(run, tmp_path):
    mark = tmp_path / "it-ran"
    (run / "adapter_model.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    refused(run, "cannot be read as safetensors")
    assert not mark.exists()


@pytest.mark.parametrize("which", ["classification", "causal-lm"])
def test_a_base_model_that_is_a_pickle_is_not_read(tmp_path, which):
    source = workbench.bert_folder() if which == "classification" else workbench.llama_folder()
    folder, mark = Path(shutil.copytree(source, tmp_path / "base")), tmp_path / "it-ran"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(ModelError) as error:
        load_base(str(folder), which, ("ham", "spam"))
    assert "\n" not in str(error.value)
    assert not mark.exists()


def header(length, text=b"{}"):
    return length.to_bytes(8, "little") + text


def one_tensor(shape, offsets):
    text = f'{{"x":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'.ljust(96).encode()
    return header(len(text), text) + b"\0" * 8


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        header(1 << 62),
        header((1 << 31) - 1, b"{" + b" " * 1000),
        header(10, b'{"a": 1}  '),
        header(2, b"{}") + b"\0" * 100,
        header(90, b'{"x":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'.ljust(90))
        + b"\0" * 4,
        one_tensor("[2]", "[-8,0]"),
        one_tensor("[4611686018427387904,4]", "[0,8]"),
    ],
    ids=["empty", "short", "header-2^62", "header-2^31", "no-json", "bytes-over", "tera", "negative", "overflow"],
)
def test_headers_that_lie_are_refused(run, content):
    (run / "adapter_model.safetensors").write_bytes(content)
    text = refused(run, "cannot be read as safetensors|does not fit its base model")
    assert len(text) < 500


def spoilt(run, change):
    tensors = load_file(run / "adapter_model.safetensors")
    save_file(change(tensors), run / "adapter_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(run, value):
    def one_number(tensors):
        tensors[next(iter(tensors))].view(-1)[3] = value
        return tensors

    spoilt(run, one_number)
    refused(run, "not finite in 1 of its tensors")


def test_wrong_shapes_are_refused(run):
    spoilt(run, lambda tensors: {name: torch.zeros(3, 5) for name in tensors})
    refused(run, "does not fit its base model")


@pytest.mark.parametrize("name", ["../../../escape", "/etc/passwd", "..", "a/../../b", "\x1b]0;owned\x07"])
def test_names_of_tensors_are_no_paths(run, tmp_path, name):
    """Tensors that belong to nothing in the model change nothing, and no file is made of their names."""
    spoilt(run, lambda tensors: {**tensors, name: torch.ones(2)})
    before = set(tmp_path.rglob("*"))
    with suppress(AdapterFileError):
        with_adapter(base(), run)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", ["", "[]", "3", '{"a": 1}', '{"base_model_name_or_path": 3}', "[" * 50_000, "\xff"])
def test_settings_of_an_adapter_that_are_none(run, tmp_path, content):
    (run / "adapter_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(AdapterFileError) as error:
        adapter_settings(run)
    assert "\n" not in str(error.value)
    with pytest.raises(AdapterFileError):
        export_merged(run, tmp_path / "merged")


def test_settings_of_an_adapter_that_ask_for_other_code(run):
    """``auto_mapping`` names a module to import; nothing imports it."""
    path = run / "adapter_config.json"
    content = {
        **json.loads(path.read_text()),
        "auto_mapping": {"base_model_class": "X", "parent_library": "antigravity"},
    }
    path.write_text(json.dumps(content))
    with suppress(AdapterFileError):
        with_adapter(base(), run)
    assert "antigravity" not in sys.modules


def test_what_a_run_leaves_holds_no_pickle(finished):
    for name, content in workbench.written(finished).items():
        assert not re.search(r"\.(bin|pt|pth|pkl|ckpt)$", name)
        assert not content.startswith(b"\x80\x04"), name
        assert not content.startswith(b"PK"), name
