"""Gradient steps: transformers' Trainer, told what a step is made of.

The Trainer and accelerate run the loop, wrap the model (one process, DDP, FSDP2, DeepSpeed), add up
gradients and talk to loggers. Here is what differs: text comes from `Pieces`; the loss is an
`Objective` and weighted so that a step does not depend on how it is divided; a step whose loss or
gradient is no number moves nothing; checkpoints appear under their names when they are whole.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.checkpoint import checkpoint
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tamba import progress
from tamba.data import TokenBlocks
from tamba.errors import UserError
from tamba.model.recurrent import RecurrentMixer
from tamba.recipe import Align, Distil
from tamba.train.log import StageLog, stage_log
from tamba.train.memory import new_checkpoint, write_tensors
from tamba.train.objectives import Objective
from tamba.train.pieces import Piece, Pieces
from tamba.train.recorder import Recorder
from tamba.train.schedules import n_steps, rate_factor

KEEP_SECONDS = 600.0
"""Work that a kill may cost."""
MOST_SKIPPED = 8
"""Steps in a row that may come to nothing."""
_CURVE, _MEAN = "curve.json", "ema.safetensors"
_NOTE_SECONDS = 0.5


@dataclass(frozen=True)
class Place:
    """Where a stage keeps and tells what it does.

    Args:
        folder: of its checkpoints; None to keep none.
        logs: of what loggers write.
        report_to: loggers, in transformers' words.
    """

    folder: Path | None = None
    logs: Path | None = None
    report_to: tuple[str, ...] = ()


NOWHERE = Place()


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
        folder = place.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        engine = Engine(objective, stage, blocks, seed, fresh, folder, place, uneven=uneven)
        main = engine.is_world_process_zero()
        if main:
            engine.advance = stack.enter_context(progress.task(stage.stage, engine.steps))
        stack.callback(engine.release)
        engine.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
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


class Engine(Trainer):
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
        self.steps = n_steps(stage, blocks.length)
        self.advance: Callable[..., None] | None = None
        self.losses: list[list[float]] = []
        self.seconds: list[float] = []
        self._last = time.monotonic()
        self._fresh, self._folder = fresh, folder
        self._run_folder = folder
        self._row_tokens = stage.batch * blocks.length
        self._skipped_running = 0
        self._total: Tensor | None = None
        self._mean: dict[str, Tensor] = {}
        self._kept = self._noted = time.monotonic()
        self._keeps = place.folder is not None
        self._wants_to_keep = False
        if place.logs is not None:
            # The one way in which both ends of the supported range of transformers are told.
            os.environ["TENSORBOARD_LOGGING_DIR"] = str(place.logs)
        args = TrainingArguments(
            output_dir=str(folder),
            use_cpu=objective.student.device.type == "cpu",
            max_steps=self.steps,
            max_grad_norm=stage.clip,
            logging_steps=max(1, self.steps // 200),
            logging_nan_inf_filter=False,  # would wait for the device after each piece
            save_strategy="no",  # `_Watch` says when
            disable_tqdm=True,
            report_to=list(place.report_to) or "none",
            seed=seed % 2**32,
            ignore_data_skip=True,  # `Pieces` begins anywhere
            ddp_find_unused_parameters=uneven,
        )
        args._n_gpu = min(args.n_gpu, 1)  # one process is one GPU, however many are there
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
        super().__init__(model=objective, args=args, callbacks=[_Watch(self)])
        self.remove_callback(PrinterCallback)
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

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if asked and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate shards over GPUs alone; here CPUs too, where sharding can be tried out.
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True

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
            self.accelerator.backward(parts.sum() * (inputs.share * self.args.world_size))
        weighted = parts.detach() * inputs.share
        self._total = weighted if self._total is None else self._total + weighted
        return (weighted.sum() * self.args.world_size).nan_to_num(0.0)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        stage = self.stage
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self._named().items():
            rate = stage.lr if self._fresh(name) else stage.lr_pretrained or stage.lr
            # Decaying norms, biases, taps and decays would pull them to a meaningless zero.
            matrix = parameter.dim() == 2 and name.rpartition(".")[2] not in RecurrentMixer.FLOAT32
            decay = stage.weight_decay if matrix else 0.0
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

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, partial(rate_factor, self.stage, num_training_steps)
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _named(self) -> dict[str, nn.Parameter]:
        """What moves, by its name in the student."""
        return {n: p for n, p in self.objective.student.named_parameters() if p.requires_grad}

    # What is done with a gradient.

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        return self._norm(self.stage.clip)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last thing before the optimiser's step, which a gradient of no number is kept from.

        One wait for the device a step: the loss is read here, and nowhere else.
        """
        if self.is_deepspeed_enabled:
            grad_norm = super()._get_grad_norm(model, grad_norm)
        elif grad_norm is None:
            grad_norm = self._norm(math.inf)
        assert self._total is not None
        total, self._total = self._total.double(), None
        wants = self._keeps and time.monotonic() - self._kept >= KEEP_SECONDS
        told = torch.cat([total, total.new_tensor([float(wants)])])
        told = self.accelerator.reduce(told, "sum")
        norm_here = torch.as_tensor(grad_norm, dtype=told.dtype, device=told.device)
        *parts, wanted, norm = torch.cat([told, norm_here.reshape(1)]).tolist()
        self._wants_to_keep = wanted > 0
        self.losses.append(parts)
        if all(map(math.isfinite, (*parts, norm))):
            self._skipped_running = 0
        else:
            # Its loss may be a number where its gradient is none: the curve has neither.
            self.losses[-1] = [math.nan] * len(parts)
            model.zero_grad(set_to_none=True)
            self._skipped_running += 1
            if self._skipped_running == min(MOST_SKIPPED, self.steps):
                self._give_up()
        return grad_norm

    def _norm(self, most: float) -> Tensor:
        named = {n: p for n, p in self._named().items() if p.grad is not None}
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

    def _give_up(self) -> None:
        step = self.state.global_step
        where, n = f"train: {self.stage.stage}", self._skipped_running
        problem = f"no loss or gradient was a number in {n} steps, up to step {step + 1}"
        remedy = "lower the learning rate"
        if self._keeps:
            path = self._folder.parent / f"not-a-number-{step + 1}.safetensors"
            if self.is_world_process_zero():
                pieces = list(self.pieces.of(step))
                tensors = {
                    "tokens": torch.cat([p.batch.tokens for p in pieces]),
                    "starts": torch.cat([p.batch.starts for p in pieces]),
                    "rows": torch.cat([p.rows for p in pieces]),
                }
                write_tensors(path, tensors, {})
            remedy += f"; the last batch is in {path}"
        raise UserError(where, problem, remedy)

    # A running mean of what moves.

    @torch.no_grad()
    def _update_mean(self) -> None:
        if not self.stage.ema or self._skipped_running:
            return
        for name, parameter in self._named().items():
            mean = self._mean[name]
            mean.lerp_(parameter.detach(), 1.0 - self.stage.ema)

    @torch.no_grad()
    def _start_mean(self) -> None:
        if not self.stage.ema:
            return
        path = Path(self._resumed) / _MEAN if self._resumed else None
        kept = load_file(path) if path else {}
        for name, parameter in self._named().items():
            mean = parameter.detach().clone()
            if name in kept:
                full = kept[name].to(self.args.device)
                if isinstance(mean, DTensor):
                    full = distribute_tensor(full, mean.device_mesh, mean.placements)
                mean.copy_(full)
            self._mean[name] = mean

    def finish(self) -> None:
        """After the last step: the running mean becomes the parameters."""
        named = self._named()
        with torch.no_grad():
            for name, mean in self._mean.items():
                named[name].copy_(mean)

    def release(self) -> None:
        """Let gradients' moments go: the next stage needs the room, and cycles hold the engine."""
        holders: tuple[Any, ...] = (self, self.callback_handler)
        for holder in holders:
            holder.optimizer = holder.lr_scheduler = None
        self._mean.clear()
        self._recorder = None
        self.accelerator.free_memory()

    # Checkpoints.

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._run_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        main, name = self.is_world_process_zero(), f"checkpoint-{self.state.global_step}"
        wait = self.accelerator.wait_for_everyone
        try:
            with new_checkpoint(self._folder, name, main, wait) as self._run_folder:
                super()._save_checkpoint(model, trial)
                means = {n: full(mean).cpu() for n, mean in self._mean.items()}
                if main:
                    curve = {"losses": self.losses, "seconds": self.seconds}
                    (self._run_folder / name / _CURVE).write_text(json.dumps(curve))
                    if means:
                        save_file(means, self._run_folder / name / _MEAN)
        finally:
            self._run_folder = self._folder
        self._kept = time.monotonic()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save or output_dir is None:
            return
        tensors = {}
        for name, parameter in self._named().items():
            kept = parameter.detach() if state_dict is None else state_dict[f"student.{name}"]
            tensors[name] = kept.cpu().contiguous()
        save_file(tensors, Path(output_dir) / "model.safetensors")

    _resumed: str | None = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._resumed = resume_from_checkpoint
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        kept = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        with torch.no_grad():
            for name, parameter in self._named().items():
                parameter.copy_(kept[name])

    def _begin(self) -> None:
        if self._resumed:
            path = Path(self._resumed) / _CURVE
            curve = json.loads(path.read_text())
            self.losses, self.seconds = curve["losses"], curve["seconds"]
            for parts in reversed(self.losses):
                if all(map(math.isfinite, parts)):
                    break
                self._skipped_running += 1
        self._start_mean()
        self._kept = self._last = time.monotonic()
        if self.advance is not None and self.state.global_step:
            self.advance(self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        logs["tokens"] = self.state.global_step * self._row_tokens
        super().log(logs, start_time)

    def note(self) -> None:
        """Count a step that is done, and show it."""
        before, self._last = self._last, time.monotonic()
        self.seconds.append(self._last - before)
        if self.advance is not None:
            loss = math.fsum(self.losses[-1]) / len(self.losses[-1])
            unit = "" if self.objective.layers else " nats"
            self.advance(1, note=f"{loss:.3f}{unit}")


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class _Watch(TrainerCallback):
    """Tells the engine where the Trainer's loop is, and the loop when to keep a checkpoint."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._engine._begin()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._engine._update_mean()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._engine.note()
        if self._engine._wants_to_keep and state.global_step < self._engine.steps:
            control.should_save = True


class _Stream:
    """The pieces of all steps from the one that the engine is at, on its device."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __iter__(self) -> Iterator[Piece]:
        for step in range(self._engine.state.global_step, self._engine.steps):
            for piece in self._engine.pieces.of(step):
                yield piece.to(self._engine.args.device)


__all__: Sequence[str] = ["Engine", "Place", "run_steps"]
