"""Which public file a basis is from: what the screen says of it before anything is charged."""

import io

import pytest
import workbench
from rich.console import Console

from dpsb import run
from dpsb.basis import stage
from dpsb.display import print_plan

# --- what the screen says


def shown(tmp_path, **changes):
    """What a run prints of its plan on a wide screen, before anything is charged."""
    screen = io.StringIO()

    def stop(plan):
        print_plan(Console(file=screen, width=400), plan)
        raise KeyboardInterrupt

    config = workbench.run_config(tmp_path / "run", **changes)
    with pytest.raises(KeyboardInterrupt):
        run.fine_tune(config, callbacks=run.Callbacks(on_plan=stop))
    assert not any(canary in screen.getvalue() for canary in workbench.CANARIES)
    return {name.strip(): value.strip() for name, value in rows_of(screen.getvalue())}


def rows_of(text):
    return (line.strip("│").split("│") for line in text.splitlines() if line.count("│") == 3)


@pytest.fixture
def files(tmp_path):
    """A file with labels of its own and one with the run's; the first one's name looks like markup."""
    paths = []
    for name, labels in (("other[bold]", "xyz"), ("own", ("ham", "spam"))):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f'{{"text": "see {i}", "label": "{labels[i % len(labels)]}"}}\n' for i in range(12)))
        paths.append(str(path))
    return paths


def test_the_screen_says_what_was_done_about_another_label_space(tmp_path, files):
    rows = shown(tmp_path, basis=f"hybrid:{files[0]}", basis_width=8)
    assert rows["basis"] == "hybrid (released)"
    assert rows["basis from"] == f"{files[0]} (another label space: a random head of 3 classes for the gradient)"
    assert "choice" not in rows


def test_the_screen_says_which_of_several_files_was_taken_and_why(tmp_path, files, monkeypatch):
    rows = shown(tmp_path, basis=f"public:{','.join(files)}")
    assert rows["basis from"] == f"{files[1]} (the labels of the run)"
    assert rows["choice"] == "the only file whose rows carry the run's labels"
    monkeypatch.setattr(stage, "_scores", lambda _setup, _sets: [0.5, 0.55])
    rows = shown(tmp_path, basis=f"public:{','.join(files)}", task="causal-lm", model=str(workbench.llama_folder()))
    assert rows["basis from"] == f"{files[0]} (language modelling on its text; its column 'label' is not used)"
    assert "other[bold].jsonl 0.5000, own.jsonl 0.5500; less than 0.1 apart" in rows["choice"]


def test_the_screen_names_the_files_that_private_examples_choose_from(tmp_path, files):
    rows = shown(tmp_path, basis=f"public:{','.join(files)}", basis_choice="private")
    assert rows["basis"] == "public (released)"
    assert rows["public file 1"].startswith(f"{files[0]} (another label space")
    assert rows["public file 2"] == f"{files[1]} (the labels of the run)"
    assert rows["choice"] == "one of the 2 files, by the private examples, in a charged release"


@pytest.mark.parametrize(("basis", "source"), [("weight", None), ("hybrid", "weight"), ("private", None)])
def test_a_basis_without_a_public_file(tmp_path, basis, source):
    rows = shown(tmp_path, basis=basis)
    assert rows.get("basis from") == source
    assert "choice" not in rows
