"""What an unfinished run has done, in a hidden folder beside its output.

Whole stages are kept when they end: the parameters that any of them moved, and their logs. The
stage at hand keeps checkpoints of its own in a folder below.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

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
        """Keep a stage that is whole, and let its checkpoints go.

        Raises:
            UserError: the disk has no room; what was kept before stays.
        """
        index = len(self.logs)
        self.logs.append(log)
        self._moved.update(moved)
        if not self._writes:
            return
        parameters = dict(model.named_parameters())
        tensors = {n: parameters[n].detach().cpu().contiguous() for n in sorted(self._moved)}
        facts = {
            "digest": self.digest,
            "logs": json.dumps([log.to_dict() for log in self.logs]),
        }
        write_tensors(self._path, tensors, facts)
        shutil.rmtree(self.stage_folder(index), ignore_errors=True)

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
        raise full_disk(path.parent, error) from error


@contextmanager
def new_checkpoint(folder: Path, name: str, main: bool, wait: Callable[[], None]) -> Iterator[Path]:
    """A checkpoint that appears as `name` in `folder` when it is whole; those before go after that.

    Args:
        main: whether this process makes and renames folders.
        wait: for all processes.

    Yields:
        The folder in which a folder `name` is to be filled.

    Raises:
        UserError: a disk without room; what was kept before is still there.
    """
    partial = folder / "partial"
    try:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            (partial / name).mkdir(parents=True)
        wait()
        yield partial
        wait()
        if main:
            os.replace(partial / name, folder / name)
            for old in folder.glob("checkpoint-*"):
                if old.name != name:
                    shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, RuntimeError) and not _is_writing(error):
            raise
        raise full_disk(folder, error) from error


def _is_writing(error: RuntimeError) -> bool:
    """Whether torch's own writer failed, which has no error class for a full disk."""
    return any(word in str(error) for word in ("PytorchStreamWriter", "unexpected pos"))


def full_disk(folder: Path, error: Exception) -> UserError:
    """What a run says when it cannot write."""
    return UserError(str(folder), f"cannot be written ({error})", "free some room on the disk")
