"""Gradient steps: transformers' Trainer, told what a step is made of.

The Trainer and accelerate run the loop, wrap the model (one process, DDP, FSDP2, DeepSpeed), add up
gradients and talk to loggers; `trainer` counts, skips and keeps. Here is what a step of these
stages is: text comes from `Pieces`; the loss is an `Objective` and weighted so that a step does not
depend on how it is divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments

from tamba.data import TokenBlocks
from tamba.errors import UserError
from tamba.recipe import Align, Distil
from tamba.train.log import StageLog, stage_log
from tamba.train.objectives import Objective
from tamba.train.pieces import Piece, Pieces, rows_of_step
from tamba.train.recorder import Recorder
from tamba.train.schedules import n_steps
from tamba.train.trainer import NOWHERE, Place, StageTrainer, decays, full

_MEAN = "ema.safetensors"


def run_steps(
    objective: Objective,
    stage: Align | Distil,
    blocks: TokenBlocks,
    moving: Collection[str],
    *,
    fresh: Callable[[str], bool] = lambda name: True,
    seed: int = 0,
    place: Place = NOWHERE,
    uneven: bool = False,
) -> StageLog:
    """Train parameters of a student, from the last checkpoint where there is one.

    Args:
        moving: names of the parameters that move, in the student; float32 at least.
        fresh: whether a parameter takes `stage.lr` rather than `stage.lr_pretrained`.
        seed: of the order of rows.
        uneven: whether some steps leave some of them without a gradient.

    Raises:
        TypeError: a parameter shorter than float32, in which small steps are lost.
        UserError: steps that come to nothing, or a disk without room.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_moving(objective, moving))
        stack.enter_context(_prepared(objective, stage))
        folder = stack.enter_context(place.opened())
        engine = Engine(objective, stage, blocks, seed, fresh, folder, place, uneven=uneven)
        stack.callback(engine.release)
        engine.take_steps()
        engine.finish()
        tokens = engine.steps * stage.batch * blocks.length
        return stage_log(stage.stage, tokens, engine.losses, objective.layers, engine.seconds)


@contextmanager
def _moving(objective: Objective, names: Collection[str]) -> Iterator[None]:
    """Inside, these parameters of the student take gradients and no others."""
    named = dict(objective.student.named_parameters())
    for name in named.keys() & set(names):
        if named[name].dtype.itemsize < 4:
            raise TypeError(f"{name} is {named[name].dtype}; steps need a float32 master")
    before = {p: p.requires_grad for p in named.values()}
    for name, parameter in named.items():
        parameter.requires_grad_(name in names)
    try:
        yield
    finally:
        for parameter in objective.student.parameters():
            parameter.grad = None
            parameter.requires_grad_(before.get(parameter, True))


@contextmanager
def _prepared(objective: Objective, stage: Align | Distil) -> Iterator[None]:
    """Inside, layers are checkpointed and compiled as the stage says."""
    student = objective.student
    training = student.training
    layers: list[Any] = list(student.model.layers)
    if stage.checkpointing:
        for layer in layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    compiles = student.device.type == "cuda" if stage.compile == "auto" else stage.compile
    units = objective.units() if compiles else []
    for unit in units:
        # Layer by layer: one graph serves all layers of a kind, and is small.
        unit.compile(dynamic=False)
    try:
        with _many_graphs() if units else nullcontext():
            yield
    finally:
        student.train(training)
        for layer in layers:
            layer.gradient_checkpointing = False
        for unit in units:
            unit._compiled_call_impl = None


def _many_graphs() -> Any:
    """Inside, no kind of layer is given up for having a few graphs.

    Attention of teacher and student, and a last piece of fewer rows, are graphs of one function.
    """
    import torch._dynamo

    return torch._dynamo.config.patch(recompile_limit=64)


class Engine(StageTrainer):
    """Steps of one stage. Use `run_steps`."""

    def __init__(
        self,
        objective: Objective,
        stage: Align | Distil,
        blocks: TokenBlocks,
        seed: int,
        fresh: Callable[[str], bool],
        folder: Path,
        place: Place,
        *,
        uneven: bool,
    ) -> None:
        self.objective, self.stage = objective, stage
        self.unit = "" if objective.layers else " nats"
        self._fresh, self._blocks, self._seed = fresh, blocks, seed
        self._row_tokens = stage.batch * blocks.length
        self._mean: dict[str, Tensor] = {}
        steps = n_steps(stage, blocks.length)
        args = place.arguments(
            TrainingArguments,
            folder,
            steps,
            seed,
            stage,
            use_cpu=objective.student.device.type == "cpu",
            max_grad_norm=stage.clip,
            ignore_data_skip=True,  # `Pieces` begins anywhere
            ddp_find_unused_parameters=uneven,
        )
        world = args.world_size
        if stage.batch % world:
            raise UserError(
                f"train: {stage.stage}",
                f"batch = {stage.batch} cannot be shared by {world} processes",
                "choose a multiple",
            )
        self.pieces = Pieces(
            blocks, stage.batch, stage.micro_batch, seed, objective.count, args.process_index, world
        )
        args.gradient_accumulation_steps = self.pieces.per_step
        super().__init__(model=objective, args=args)
        self.begin(stage.stage, objective.student, steps, folder, place.folder is not None)
        self._recorder = Recorder(objective) if self._records() else None

    def _records(self) -> bool:
        """Whether passes are launched as CUDA graphs."""
        stage = self.stage
        # What wraps a model in several processes talks to the others in the middle of a pass.
        can = self.args.device.type == "cuda" and self.accelerator.num_processes == 1
        can = can and not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if stage.graphs is True and not can:
            raise UserError(
                f"train: {stage.stage}",
                "graphs = true, and they are for one process on a GPU",
                "leave graphs out",
            )
        return can and bool(stage.graphs) and not stage.checkpointing

    # What a step is made of.

    def get_train_dataloader(self) -> Any:
        return _Stream(self)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Piece], num_batches: int, device: torch.device
    ) -> tuple[list[Piece], None]:
        return [*islice(epoch_iterator, num_batches)], None

    def floating_point_ops(self, inputs: Piece) -> int:
        return 0

    def training_step(
        self, model: nn.Module, inputs: Piece, num_items_in_batch: Any = None
    ) -> Tensor:
        model.train()
        # Gradients of processes are averaged; a step is the sum of its pieces.
        if self._recorder is not None:
            parts = self._recorder(inputs)
        else:
            parts = model(inputs)
            self._backward(parts.sum() * (inputs.share * self.args.world_size))
        weighted = parts.detach() * inputs.share
        self._total = weighted if self._total is None else self._total + weighted
        return (weighted.sum() * self.args.world_size).nan_to_num(0.0, 0.0, 0.0)

    def _backward(self, loss: Tensor) -> None:
        # DeepSpeed would divide by the number of pieces, whose shares are in the loss already.
        how = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **how)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        stage = self.stage
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self._moving().items():
            rate = stage.lr if self._fresh(name) else stage.lr_pretrained or stage.lr
            decay = stage.weight_decay if decays(name, parameter) else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": some, "lr": rate, "weight_decay": decay}
                for (rate, decay), some in groups.items()
            ],
            betas=stage.betas,
            fused=True,
        )
        return self.optimizer

    # What is done with a gradient.

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        return self._norm(self.stage.clip)

    def _norm_of(self, model: nn.Module, clipped: Any) -> Any:
        if self.is_deepspeed_enabled:
            return super()._norm_of(model, clipped)
        return self._norm(math.inf) if clipped is None else clipped

    def _norm(self, most: float) -> Tensor:
        named = {n: p for n, p in self._moving().items() if p.grad is not None}
        norms = []
        for names in self.objective.apart(list(named)):
            some = [named[name] for name in names]
            norm = get_total_norm([p.grad for p in some if p.grad is not None], foreach=True)
            if most < math.inf:
                clip_grads_with_norm_(some, most, norm, foreach=True)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if not norms:
            return torch.zeros((), device=self.args.device)
        return torch.linalg.vector_norm(torch.stack(norms))

    def _last_batch(self) -> dict[str, Tensor]:
        rows = rows_of_step(len(self._blocks), self.stage.batch, self.state.global_step, self._seed)
        tokens, starts = self._blocks.tokens[rows].long(), self._blocks.starts[rows]
        return {"tokens": tokens, "starts": starts, "rows": rows}

    # A running mean of what moves.

    @torch.no_grad()
    def _stepped(self) -> None:
        if not self.stage.ema or self._skipped_running:
            return
        self._averaged += 1
        # What the stage began with has no part in it, however few the steps (Kingma and Ba 2015,
        # arXiv 1412.6980, section 3).
        weight = (1.0 - self.stage.ema) / (1.0 - self.stage.ema**self._averaged)
        for name, parameter in self._moving().items():
            self._mean[name].lerp_(parameter.detach(), weight)

    def _begin(self) -> None:
        super()._begin()
        self._start_mean()

    @torch.no_grad()
    def _start_mean(self) -> None:
        if not self.stage.ema:
            return
        path = Path(self._resumed) / _MEAN if self._resumed else None
        kept = load_file(path) if path else {}
        self._averaged = sum(all(map(math.isfinite, parts)) for parts in self.losses)
        for name, parameter in self._moving().items():
            mean = parameter.detach().clone()
            if name in kept:
                full = kept[name].to(self.args.device)
                if isinstance(mean, DTensor):
                    full = distribute_tensor(full, mean.device_mesh, mean.placements)
                mean.copy_(full)
            self._mean[name] = mean

    def finish(self) -> None:
        """After the last step: the running mean becomes the parameters."""
        named = self._moving()
        with torch.no_grad():
            for name, mean in self._mean.items():
                named[name].copy_(mean)

    def _kept_besides(self) -> dict[str, dict[str, Tensor]]:
        means = {name: full(mean).cpu() for name, mean in self._mean.items()}
        return {_MEAN: means} if means else {}

    def release(self) -> None:
        super().release()
        self._mean.clear()
        self._recorder = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["tokens"] = self.state.global_step * self._row_tokens
        super().log(logs, start_time)


class _Stream:
    """The pieces of all steps from the one that the engine is at, on its device."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __iter__(self) -> Iterator[Piece]:
        for step in range(self._engine.state.global_step, self._engine.steps):
            for piece in self._engine.pieces.of(step):
                yield piece.to(self._engine.args.device)


__all__: Sequence[str] = ["NOWHERE", "Engine", "Place", "run_steps"]
