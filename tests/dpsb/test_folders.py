import os
import stat
from pathlib import Path

import pytest

from dpsb.folders import new_folder


@pytest.mark.parametrize("there", [False, True])
def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path, there):
    out = tmp_path / "deep" / "out"
    if there:
        out.mkdir(parents=True)
    with pytest.raises(RuntimeError, match="no"):
        _fail_half_way(out)
    assert os.listdir(out.parent) == (["out"] if there else [])
    with new_folder(out) as new:
        (new / "a").write_text("x")
        (new / "b").mkdir()
    assert sorted(os.listdir(out)) == ["a", "b"]
    assert os.listdir(out.parent) == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((out / "b").stat().st_mode) == 0o777 & ~umask


def test_what_a_killed_start_left_is_passed_over(tmp_path):
    out = tmp_path / "out"
    (out / ".dpsb-new-x" / "new").mkdir(parents=True)
    with new_folder(out) as new:
        (new / "a").write_text("x")
    assert sorted(os.listdir(out)) == [".dpsb-new-x", "a"]


def test_a_link_to_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with new_folder(tmp_path / "out") as new:
        (new / "a").write_text("x")
    assert os.listdir(tmp_path / "disk") == ["a"]


def test_the_file_that_says_that_all_is_there_comes_last(tmp_path, monkeypatch):
    moved, rename = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (moved.append(self.name), rename(self, to))[1])
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out", last="b") as new:
        for name in "abc":
            (new / name).write_text("x")
    assert moved[-1] == "b"
    assert sorted(moved) == ["a", "b", "c"]


def test_what_is_beside_a_new_folder_stays(tmp_path):
    for name in ("out.new", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    with new_folder(tmp_path / "out") as new:
        (new / "a").write_text("x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "mine", "mine", "out", "out.new", "out.old"]


@pytest.mark.parametrize("there", [False, True])
def test_nothing_is_written_over(tmp_path, there):
    out = tmp_path / "out"
    if there:
        out.mkdir()
    with pytest.raises(FileExistsError):
        _be_overtaken(out)
    assert [path.read_text() for path in out.iterdir()] == ["theirs"]
    for taken in (out, tmp_path / "link"):
        if taken.name == "link":
            taken.symlink_to("nowhere")
        with pytest.raises(FileExistsError, match="exists already; choose another folder"), new_folder(taken):
            pass


def _fail_half_way(out):
    with new_folder(out) as new:
        (new / "half").write_text("x")
        raise RuntimeError("no")


def _be_overtaken(out):
    with new_folder(out) as new:
        (new / "a").write_text("ours")
        out.mkdir(exist_ok=True)
        (out / "a").write_text("theirs")
