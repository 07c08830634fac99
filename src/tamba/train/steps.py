"""Gradient steps that can be cut off: rates, optimisers, orders of rows, loss curves, memory.

Whatever decides a step is a function of its number and the seed, so a run that is killed and goes
on from what `Memory` kept ends with the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tamba.artefact import write_file
from tamba.data import TokenBlocks
from tamba.errors import UserError
from tamba.model.recurrent import RecurrentMixer
from tamba.recipe import Align, Distil

_POINTS = 48
"""Losses shown a stage."""
KEEP_SECONDS = 600.0
"""Work that a kill may cost."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StageLog:
    """What a stage did.

    Args:
        stage: its kind.
        tokens: text that it went over.
        losses: (tokens so far, mean loss since the last point). For ``least_squares`` and ``align``
            a loss is the mean over layers of the squared error relative to the variance of the
            teacher's output; for ``distil`` it is nats a token.
        layers: what is left of each layer's variance, by student layer.
    """

    stage: str
    tokens: int
    losses: list[tuple[int, float]] = field(default_factory=list)
    layers: dict[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it back."""
        return {
            "stage": self.stage,
            "tokens": self.tokens,
            "losses": [list(point) for point in self.losses],
            "layers": {str(i): left for i, left in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StageLog:
        losses = [(int(tokens), float(loss)) for tokens, loss in data["losses"]]
        layers = {int(i): float(left) for i, left in data["layers"].items()}
        return cls(data["stage"], data["tokens"], losses, layers)


class Schedule:
    """Steps of a stage and their learning rates."""

    def __init__(self, stage: Align | Distil, length: int) -> None:
        self.stage = stage
        self.steps = max(1, stage.tokens // (stage.batch * length))
        self.tokens = self.steps * stage.batch * length

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        stage = self.stage
        warmup = math.ceil(stage.warmup * self.steps)
        if step < warmup:
            return stage.lr * (step + 1) / warmup
        share = (step - warmup) / max(1, self.steps - warmup)
        factor = {
            "constant": 1.0,
            "linear": 1.0 - share,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * share)),
        }
        return stage.lr * factor[stage.schedule]


class Learner:
    """AdamW over float32 masters, one step after another.

    Args:
        named: the parameters, by their names in the student.

    Raises:
        TypeError: a parameter shorter than float32, in which small steps are lost.
    """

    def __init__(
        self, named: Mapping[str, nn.Parameter], stage: Align | Distil, schedule: Schedule
    ) -> None:
        for name, parameter in named.items():
            if parameter.dtype.itemsize < 4:
                raise TypeError(f"{name} is {parameter.dtype}; steps need a float32 master")
        self.named = dict(named)
        self._schedule = schedule
        self._clip = stage.clip
        decayed = {
            name
            for name, p in named.items()
            if p.dim() == 2 and name.rpartition(".")[2] not in RecurrentMixer.FLOAT32
        }
        matrices = [p for name, p in named.items() if name in decayed]
        others = [p for name, p in named.items() if name not in decayed]
        self._adam = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": stage.weight_decay},
                # Decaying norms, biases, taps and decays would pull them to a meaningless zero.
                {"params": others, "weight_decay": 0.0},
            ],
            lr=stage.lr,
            betas=stage.betas,
            fused=True,
        )
        self.taken = 0

    def step(self) -> None:
        """Move by the gradients that have gathered."""
        if self._clip:
            nn.utils.clip_grad_norm_(list(self.named.values()), self._clip)
        for group in self._adam.param_groups:
            group["lr"] = self._schedule.rate(self.taken)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.taken += 1

    def moments(self) -> dict[str, Tensor]:
        """The optimiser's running means: ``exp_avg/NAME`` and ``exp_avg_sq/NAME``."""
        return {
            f"{moment}/{name}": self._adam.state[p][moment]
            for name, p in self.named.items()
            for moment in _MOMENTS
            if p in self._adam.state
        }

    def go_on(self, taken: int, moments: Mapping[str, Tensor]) -> None:
        """Take up after `taken` steps, which left these moments."""
        self.taken = taken
        for name, parameter in self.named.items():
            if f"{_MOMENTS[0]}/{name}" in moments:
                state = {m: moments[f"{m}/{name}"].to(parameter.device) for m in _MOMENTS}
                step = torch.tensor(float(taken), dtype=torch.float32, device=parameter.device)
                self._adam.state[parameter] = {"step": step, **state}


class Curve:
    """Gathers the losses of all learners of a stage.

    Args:
        stage: its kind.
        tokens: text that its steps go over.
    """

    def __init__(self, stage: str, tokens: int) -> None:
        self._stage, self._tokens = stage, tokens
        self._losses: dict[int, dict[int, float | Tensor]] = {}
        self._checked = 0

    def add(self, learner: int, step: int, loss: Tensor) -> None:
        """The loss before step `step` = 1, 2, ... of a learner; read only when asked for."""
        self._losses.setdefault(learner, {})[step] = loss

    def check(self) -> None:
        """Raise UserError if a loss since the last check is no number."""
        last = self._checked
        for losses in self._losses.values():
            for step in range(self._checked + 1, max(losses, default=0) + 1):
                losses[step] = value = float(losses[step])
                last = max(last, step)
                if not math.isfinite(value):
                    raise UserError(
                        f"train: {self._stage}",
                        f"the loss is no longer a number, at step {step}",
                        "lower the learning rate",
                    )
        self._checked = last

    def log(self, by_layer: bool = False) -> StageLog:
        """The curve in a few points; `by_layer`, learners' last eighths too."""
        self.check()
        n_steps = self._checked
        points = []
        for some in _split(range(1, n_steps + 1), _POINTS):
            values = [float(each[step]) for step in some for each in self._losses.values()]
            points.append((some[-1] * self._tokens // n_steps, math.fsum(values) / len(values)))
        layers = {}
        if by_layer:
            tail = range(n_steps - max(1, n_steps // 8) + 1, n_steps + 1)
            for layer, losses in self._losses.items():
                layers[layer] = math.fsum(float(losses[step]) for step in tail) / len(tail)
        return StageLog(self._stage, self._tokens, points, layers)

    def to_lists(self) -> dict[str, list[float]]:
        """Plain data for JSON: the losses of each learner, step by step."""
        return {
            str(learner): [float(losses[step]) for step in sorted(losses)]
            for learner, losses in self._losses.items()
        }

    def go_on(self, lists: Mapping[str, Sequence[float]]) -> None:
        """Take up what `to_lists` gave."""
        self._losses = {
            int(learner): dict(enumerate(map(float, losses), start=1))
            for learner, losses in lists.items()
        }
        self._checked = max(map(len, self._losses.values()), default=0)


def _split(items: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    count = min(most, len(items))
    for a, b in pairwise(round(i * len(items) / count) for i in range(count + 1)):
        yield items[a:b]


@dataclass(frozen=True)
class Steps:
    """Steps `first` to `first + count` of a stage."""

    first: int
    count: int

    @property
    def stop(self) -> int:
        return self.first + self.count

    def after(self, taken: int) -> Steps:
        """Those that remain when `taken` steps of the stage have been made."""
        first = min(max(self.first, taken), self.stop)
        return Steps(first, self.stop - first)

    def parts(self, most: int) -> Iterator[Steps]:
        """The same in runs of no more than `most` steps."""
        for first in range(self.first, self.stop, most):
            yield Steps(first, min(most, self.stop - first))


def pools(
    blocks: TokenBlocks, bytes_each: int, batch: int, steps: int, room: int
) -> Iterator[tuple[TokenBlocks, Steps]]:
    """Rows that are held at once, and the steps that are taken on them.

    No more rows than the steps can use; where these are more than one epoch, each pool gets its
    share of all of them.

    Args:
        bytes_each: what a row takes, of `room` bytes.
        batch: rows of a step.
        steps: of the stage.
    """
    n = min(len(blocks), steps * batch)
    size = min(n, max(batch, room // max(1, bytes_each)))
    count = -(-n // size)
    edges = [round(i * n / count) for i in range(count + 1)]
    shares = [round(i * steps / count) for i in range(count + 1)]
    for (a, b), (start, stop) in zip(pairwise(edges), pairwise(shares), strict=True):
        pool = TokenBlocks(blocks.tokens[a:b], blocks.starts[a:b], (b - a) * blocks.length)
        yield pool, Steps(start, stop - start)


def orders(n: int, batch: int, pool: Steps, part: Steps, seed: int) -> Iterator[Tensor]:
    """Rows [batch] of each step of `part`: a new order of all `n` rows of the pool each epoch."""
    epoch, used = divmod((part.first - pool.first) * batch, n)
    left = _permutation(n, pool, epoch, seed)[used:]
    for _ in range(part.count):
        while len(left) < batch:
            epoch += 1
            left = torch.cat([left, _permutation(n, pool, epoch, seed)])
        yield left[:batch]
        left = left[batch:]


def _permutation(n: int, pool: Steps, epoch: int, seed: int) -> Tensor:
    mixed = hashlib.sha256(f"{seed} {pool.first} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "little"))
    return torch.randperm(n, generator=generator)


class Memory:
    """What an unfinished run has done, in a folder: parameters that moved, and the stage at hand.

    Whole stages are kept when they end, a stage of gradient steps every `KEEP_SECONDS` too, with
    its moments and losses. Only parameters that some stage has moved are written; no copy of any is
    held.

    Args:
        folder: a hidden folder beside the run's output.
        digest: of everything that the run depends on; what another run left is not read.
        model: whose parameters these are.
    """

    def __init__(self, folder: Path, digest: str, model: nn.Module) -> None:
        self.folder, self.digest = folder, digest
        self._parameters = dict(model.named_parameters())
        self._moved: set[str] = set()
        self._logs: list[StageLog] = []
        self._begun: dict[str, Any] = {}
        self._moments: dict[str, Tensor] = {}
        self._kept = time.monotonic()

    @property
    def _path(self) -> Path:
        return self.folder / "stage.safetensors"

    def restore(self) -> list[StageLog]:
        """Load what was kept of this run into the model; the logs of the stages that are whole."""
        try:
            with safe_open(self._path, "pt") as file:
                facts = file.metadata()
                if facts["digest"] != self.digest:
                    return []
                logs = [StageLog.from_dict(log) for log in json.loads(facts["logs"])]
                begun = json.loads(facts["begun"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            # Nothing of use is there: the run begins anew, which is always right.
            return []
        with torch.no_grad():
            for name, tensor in tensors.items():
                kind, _, parameter = name.partition("/")
                if kind == "parameter":
                    self._parameters[parameter].copy_(tensor)
                    self._moved.add(parameter)
                else:
                    self._moments[name] = tensor
        self._logs, self._begun = logs, begun
        return list(logs)

    def moves(self, names: Sequence[str]) -> None:
        """The stage at hand moves these parameters."""
        self._moved.update(names)

    def resume(self, learners: Mapping[int, Learner], curve: Curve) -> int:
        """Bring a stage of gradient steps to where it was cut off; the steps taken."""
        if not self._begun:
            return 0
        taken = int(self._begun["taken"])
        for learner in learners.values():
            learner.go_on(taken, self._moments)
        curve.go_on(self._begun["losses"])
        self._begun, self._moments = {}, {}
        return taken

    def offer(self, learners: Mapping[int, Learner], curve: Curve, taken: int) -> None:
        """Keep the stage as it stands after `taken` steps, if enough time has gone by."""
        if time.monotonic() - self._kept < KEEP_SECONDS:
            return
        curve.check()
        moments = {k: t for learner in learners.values() for k, t in learner.moments().items()}
        self._write({"taken": taken, "losses": curve.to_lists()}, moments)

    def keep(self, log: StageLog) -> None:
        """Keep a stage that is whole."""
        self._logs.append(log)
        self._write({}, {})

    def _write(self, begun: Mapping[str, Any], moments: Mapping[str, Tensor]) -> None:
        moved: dict[str, Tensor] = {f"parameter/{n}": self._parameters[n] for n in self._moved}
        tensors = {n: t.detach().cpu().contiguous() for n, t in (moved | dict(moments)).items()}
        facts = {
            "digest": self.digest,
            "logs": json.dumps([log.to_dict() for log in self._logs]),
            "begun": json.dumps(begun),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self._path, lambda path: save_file(tensors, path, metadata=facts))
        except (OSError, SafetensorError) as error:
            raise UserError(
                str(self.folder), f"cannot be written ({error})", "free some room on the disk"
            ) from error
        self._kept = time.monotonic()

    def forget(self) -> None:
        """The run is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)
