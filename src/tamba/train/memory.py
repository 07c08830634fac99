"""What an unfinished run has done, in a hidden folder beside its output.

Whole stages are kept when they end: the parameters that any of them moved, and their logs. The
stage at hand keeps checkpoints of its own in a folder below.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from tamba.artefact import write_file
from tamba.errors import UserError
from tamba.train.log import StageLog


class Memory:
    """The stages that a run has done.

    Only parameters that some stage has moved are written; no copy of any is held.

    Args:
        folder: hidden, beside the run's output.
        digest: of everything that the run depends on; what another run left is not read.
        writes: whether this process is the one that writes.
    """

    def __init__(self, folder: Path, digest: str, writes: bool = True) -> None:
        self.folder, self.digest = folder, digest
        self.logs: list[StageLog] = []
        self._writes = writes
        self._moved: set[str] = set()

    @property
    def _path(self) -> Path:
        return self.folder / "stages.safetensors"

    def stage_folder(self, index: int) -> Path:
        """Where the checkpoints of stage `index` lie."""
        return self.folder / f"{self.digest[:16]}-{index}"

    @property
    def logs_folder(self) -> Path:
        """Where loggers that write files write them."""
        return self.folder / f"{self.digest[:16]}-logs"

    def restore(self, model: nn.Module) -> list[StageLog]:
        """Load what was kept of this run into a model; the logs of the stages that are whole."""
        try:
            with safe_open(self._path, "pt") as file:
                facts = file.metadata()
                if facts["digest"] != self.digest:
                    return []
                self.logs = [StageLog.from_dict(log) for log in json.loads(facts["logs"])]
                parameters = dict(model.named_parameters())
                kept = {name: parameters[name] for name in file.keys()}  # noqa: SIM118
                with torch.no_grad():
                    for name, parameter in kept.items():
                        parameter.copy_(file.get_tensor(name))
                self._moved.update(kept)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            # Nothing of use is there: the run begins anew, which is always right.
            self.logs = []
            return []
        return list(self.logs)

    def keep(self, log: StageLog, model: nn.Module, moved: Sequence[str]) -> None:
        """Keep a stage that is whole, and let its checkpoints go. All processes call this.

        Raises:
            UserError: the disk has no room; what was kept before stays.
        """
        index = len(self.logs)
        self.logs.append(log)
        self._moved.update(moved)
        with together(self.folder):
            if self._writes:
                self._write(model)
                shutil.rmtree(self.stage_folder(index), ignore_errors=True)

    def _write(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        tensors = {n: parameters[n].detach().cpu().contiguous() for n in sorted(self._moved)}
        facts = {
            "digest": self.digest,
            "logs": json.dumps([log.to_dict() for log in self.logs]),
        }
        write_tensors(self._path, tensors, facts)

    def forget(self) -> None:
        """The run is whole."""
        if self._writes:
            shutil.rmtree(self.folder, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, lambda partial: save_file(dict(tensors), partial, metadata=dict(facts)))
    except (OSError, SafetensorError) as error:
        raise _not_written(path.parent, error) from error


@contextmanager
def new_checkpoint(folder: Path, name: str, main: bool) -> Iterator[Path]:
    """A checkpoint that appears as `name` in `folder` when it is whole; those before go after that.

    All processes enter. Where one of them cannot write, all of them stop.

    Args:
        main: whether this process makes and renames folders.

    Yields:
        The folder in which a folder `name` is to be filled.

    Raises:
        UserError: a disk without room; what was kept before is still there.
    """
    partial = folder / "partial"
    try:
        with together(folder):
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / name).mkdir(parents=True)
        with together(folder):
            yield partial
        with together(folder):
            if main:
                os.replace(partial / name, folder / name)
                for old in folder.glob("checkpoint-*"):
                    if old.name != name:
                        shutil.rmtree(old, ignore_errors=True)
    except UserError:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def together(place: Path) -> Iterator[None]:
    """Inside, files are written in `place`; if one process cannot, all stop with its message.

    Every process comes here, whether it has anything to write or not. Inside, one that failed must
    leave no other waiting. Errors of programming are not shared.

    Raises:
        UserError: of the first process that failed.
    """
    mine: UserError | None = None
    try:
        yield
    except UserError as error:
        mine = error
    except (Exception, CheckpointException) as error:
        cause = _of_writing(error)
        if cause is None:
            raise
        mine = _not_written(place, cause)
        mine.__cause__ = error
    for said in from_all(mine and (mine.where, mine.problem, mine.remedy)):
        if said is not None:
            raise UserError(*said) from mine


_SHARE = "choose a folder that all hosts share"


def same_everywhere(found: object, where: str, what: str, remedy: str = _SHARE) -> None:
    """Refuse that processes find different things where each goes on from what it has.

    Raises:
        UserError: they do, on all of them; nothing else would tell.
    """
    if any(other != found for other in from_all(found)):
        raise UserError(where, f"the processes do not find the same {what}", remedy)


def from_all(mine: Any) -> list[Any]:
    """What each process has, in order."""
    found = [mine]
    if torch.distributed.is_initialized():
        found *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, mine)
    return found


def _of_writing(error: BaseException) -> BaseException | None:
    """The error itself if it says that a file cannot be written, or the one in it that does."""
    if isinstance(error, CheckpointException):  # of all processes, on all processes
        causes = [_of_writing(cause) for cause, _ in error.failures.values()]
        return None if None in causes else causes[0]
    if isinstance(error, (OSError, SafetensorError)):
        return error
    # torch's own writer has no error class for a full disk.
    writer = ("PytorchStreamWriter", "unexpected pos")
    words = str(error) if isinstance(error, RuntimeError) else ""
    return error if any(word in words for word in writer) else None


_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def _not_written(folder: Path, error: BaseException) -> UserError:
    """What a run says when it cannot write."""
    # Libraries in Rust have the number in their text alone.
    told = re.search(r"os error (\d+)", str(error))
    number = int(told[1]) if told else getattr(error, "errno", None)
    remedy = "free some room on the disk"
    if number in _DENIED:
        remedy = "check its permissions or choose another place"
    return UserError(str(folder), f"cannot be written ({error})", remedy)
