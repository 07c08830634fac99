"""Files and folders that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from tamba.artefact import command_without_folders, new_folder
from tamba.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_takes_its_name_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty one is no loss
    with new_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
        assert names(tmp_path / "out") == [] and partial != tmp_path / "out"
    assert (tmp_path / "out" / "a").read_text() == "1" and names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, UserError("a", "b")])
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with (
        pytest.raises(error if isinstance(error, type) else type(error)),
        new_folder(tmp_path / "out") as partial,
    ):
        (partial / "a").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_what_stands_there_is_replaced_only_when_told(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("1")
    with pytest.raises(UserError, match="out: already exists"), new_folder(tmp_path / "out"):
        raise AssertionError("entered")
    with new_folder(tmp_path / "out", overwrite=True) as partial:
        assert names(partial) == [] and names(tmp_path / "out") == ["a"]
        (partial / "b").write_text("2")
    assert names(tmp_path / "out") == ["b"] and names(tmp_path) == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists"), new_folder(tmp_path / "file", overwrite=True):
        raise AssertionError("entered")


def test_two_writers_and_what_a_killed_one_left(tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "half").write_text("")
    with new_folder(tmp_path / "out") as partial:
        assert partial == left and names(left) == []
        with pytest.raises(UserError, match="another process"), new_folder(tmp_path / "out"):
            raise AssertionError("entered")
        (partial / "a").write_text("1")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["a"]


def test_shared_commands_name_no_folder_of_a_machine() -> None:
    given = ["--out", "/home/me/record.json", "runs/a", "--set", "name=two words"]
    said = command_without_folders("python bench.py", given)
    assert said == "python bench.py --out record.json runs/a --set 'name=two words'"
