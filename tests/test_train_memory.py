"""What processes write together: whole or not there, and all stop where one cannot."""

from __future__ import annotations

import errno
import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from tamba.errors import UserError
from tamba.train import memory
from tamba.train.memory import new_checkpoint, same_everywhere, together, write_tensors

SECONDS = 20
FULL = OSError(errno.ENOSPC, "No space left on device")


def in_two(work: Callable[[int], object], folder: Path) -> list[object]:
    """What `work(rank)` says or raises in each of two processes."""
    context = multiprocessing.get_context("fork")
    told = context.Queue()

    def process(rank: int) -> None:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=SECONDS),
        )
        try:
            said = work(rank)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        told.put((rank, said))

    running = [context.Process(target=process, args=(rank,), daemon=True) for rank in (0, 1)]
    for one in running:
        one.start()
    found = dict(told.get(timeout=2 * SECONDS) for _ in running)
    for one in running:
        one.join(SECONDS)
        assert one.exitcode == 0
    return [found[rank] for rank in (0, 1)]


def checkpoint(folder: Path, step: int, rank: int, fails: int | None = None) -> None:
    with new_checkpoint(folder, f"checkpoint-{step}", rank == 0) as partial:
        (partial / f"checkpoint-{step}" / f"{rank}").write_text("some")
        if rank == fails:
            raise FULL


def check_checkpoints(folder: Path) -> None:
    """One that any process cannot write leaves the one before, and all say the same."""
    kept = folder / "kept"

    def work(rank: int) -> list[str]:
        said = []
        for step, fails in ((1, None), (2, 0), (3, 1), (4, None), (5, 1)):
            try:
                checkpoint(kept, step, rank, fails)
            except UserError as error:
                said.append(f"{step}: {error}")
        return said

    first, second = in_two(work, folder)
    message = f"{kept}: cannot be written ({FULL}); free some room on the disk"
    assert first == second == [f"{step}: {message}" for step in (2, 3, 5)]
    assert sorted(str(p.relative_to(kept)) for p in kept.glob("**/*")) == [
        "checkpoint-4",
        "checkpoint-4/0",
        "checkpoint-4/1",
    ]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_all_stop_where_one_cannot_write(tmp_path: Path) -> None:
    check_checkpoints(tmp_path)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_one_that_stops_alone_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "from_all", lambda mine: [mine])
    with pytest.raises(AssertionError):
        check_checkpoints(tmp_path)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_that_read_other_files_are_told(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        same_everywhere("checkpoint-3", "there", "checkpoint")
        same_everywhere(None if rank else "checkpoint-3", "there", "checkpoint")

    message = "the processes do not find the same checkpoint; choose a folder that all hosts share"
    assert in_two(work, tmp_path) == [f"UserError: there: {message}"] * 2


def test_what_cannot_be_written_says_why(tmp_path: Path) -> None:
    for error, remedy in (
        (FULL, "free some room on the disk"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "free some room on the disk"),
        (PermissionError(errno.EACCES, "Permission denied"), "check its permissions"),
        (RuntimeError("[enforce fail] unexpected pos 64 vs 0"), "free some room on the disk"),
    ):
        with pytest.raises(UserError, match=remedy), together(tmp_path):
            raise error
    # Of the library that writes safetensors, which keeps the number to itself.
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="cannot be written"):
        write_tensors(tmp_path / "file" / "below.safetensors", {"a": torch.zeros(1)}, {})
    for mistake in (RuntimeError("shapes differ"), KeyError("a")):
        with pytest.raises(type(mistake)), together(tmp_path):
            raise mistake
