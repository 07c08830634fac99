"""What all stages of gradient steps have in common, as a transformers Trainer.

Steps are counted and told. One whose loss or gradient is no number moves nothing, and a run of them
ends the stage with the last batch on disk. Checkpoints appear under their names when they are
whole, and a stage goes on from the last. What a step is made of is another matter: `engine` takes
it from rows of text, `chat_steps` from TRL.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tamba import progress
from tamba.errors import UserError
from tamba.model.recurrent import RecurrentMixer
from tamba.recipe import Align
from tamba.train.memory import new_checkpoint, same_everywhere, together, write_tensors
from tamba.train.schedules import rate_factor

KEEP_SECONDS = 600.0
"""Work that a kill may cost."""
MOST_SKIPPED = 8
"""Steps in a row that may come to nothing."""
_CURVE = "curve.json"

Arguments = TypeVar("Arguments", bound=TrainingArguments)


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

    @contextmanager
    def opened(self) -> Iterator[Path]:
        """Inside, a folder for checkpoints stands; one that passes where none are kept."""
        if self.folder is None:
            with tempfile.TemporaryDirectory() as passing:
                yield Path(passing)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        yield self.folder

    def arguments(
        self, kind: type[Arguments], folder: Path, steps: int, seed: int, stage: Any, **options: Any
    ) -> Arguments:
        """What every stage tells a Trainer, as arguments of this kind, and `options` besides.

        Raises:
            UserError: a launcher that was told what the stage cannot follow.
        """
        check_launch(stage, f"train: {stage.stage}")
        if self.logs is not None:
            # The one way in which both ends of the supported range of transformers are told.
            os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.logs)
        with _own_precision():
            args = kind(
                output_dir=str(folder),
                max_steps=steps,
                logging_steps=max(1, steps // 200),
                logging_nan_inf_filter=False,  # would wait for the device after each piece
                save_strategy="no",  # `_Watch` says when
                disable_tqdm=True,
                report_to=list(self.report_to) or "none",
                seed=seed % 2**32,
                **options,
            )
        args._n_gpu = min(args.n_gpu, 1)  # one process is one GPU, however many are there
        return args


NOWHERE = Place()


def check_launch(stage: Any, where: str) -> None:
    """Refuse what a launcher says and a stage cannot follow.

    A stage's `dtype` is what matrix products run in; parameters and all else stay as they are.
    ``--mixed_precision`` may say the same, and is not passed on. DeepSpeed may share out moments
    and gradients.

    Args:
        stage: any but least squares.

    Raises:
        UserError: the launcher asks for another precision, FSDP2 where matrices are compared, or
            DeepSpeed's configuration for 16-bit parameters or its stage 3; its message begins with
            `where` or the configuration's path.
    """
    told = os.environ.get(_PRECISION, "no").lower()
    if told != "no" and _TYPES.get(told, told) != stage.dtype:
        raise UserError(
            where,
            f"dtype = '{stage.dtype}', and the launcher was told --mixed_precision {told}",
            "launch with --mixed_precision no: dtype says what matrix products run in",
        )
    if isinstance(stage, Align) and stage.mixing and _told("ACCELERATE_USE_FSDP"):
        raise UserError(
            where,
            "mixing reads a mixer's parameters outside of its pass, where FSDP2 shares them out",
            "launch without FSDP2, or leave mixing out",
        )
    if not _told("ACCELERATE_USE_DEEPSPEED"):
        return
    asked = _deepspeed()
    if str(asked["zero_optimization"].get("stage", 0)) == "3":
        raise UserError(
            where,
            "DeepSpeed's stage 3 shares out parameters, which stages read outside of their layers",
            "use its stage 2, or FSDP2 to share out parameters too",
        )
    for name in ("bf16", "fp16"):
        if asked[name].get("enabled") is True:
            raise UserError(
                where,
                f"DeepSpeed's configuration enables {name}, which shortens the float32 parameters",
                f"leave {name} out of it: dtype says what matrix products run in",
            )


def _told(name: str) -> bool:
    """Whether the launcher says so."""
    return os.environ.get(name, "false").lower() == "true"


_PRECISION = "ACCELERATE_MIXED_PRECISION"
_TYPES = {"bf16": "bfloat16", "fp16": "float16"}


def _deepspeed() -> dict[str, dict[str, Any]]:
    """Sections of DeepSpeed's configuration, from what ``accelerate launch`` leaves behind."""
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        level = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        read: Any = {"zero_optimization": {"stage": level}}
    else:
        try:
            read = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(path, f"cannot be read ({error})", "give a JSON file") from error
    sections: dict[str, dict[str, Any]] = {
        name: {} for name in ("zero_optimization", "bf16", "fp16")
    }
    given = read if isinstance(read, dict) else {}
    return sections | {k: v for k, v in given.items() if isinstance(v, dict)}


@contextmanager
def _own_precision() -> Iterator[None]:
    """Inside, accelerate does not see what the launcher was told of precision: see `check_launch`.

    It would shorten parameters that are shared out, and scale losses.
    """
    told = os.environ.pop(_PRECISION, None)
    try:
        yield
    finally:
        if told is not None:
            os.environ[_PRECISION] = told


class StageTrainer(Trainer):
    """Steps of one stage. `begin` comes before them, `take_steps` makes them.

    Whoever inherits adds the parts of each step's loss to `_total` in `training_step`, such that
    their sum over processes is the step's, and says what `_last_batch` was.
    """

    stage: Any
    """The recipe's section; it has the keys of a learning rate."""
    losses: list[list[float]]
    """The parts of the loss of each step; NaN in one that was skipped."""
    seconds: list[float]
    """Of each step, over all runs that the stage was cut into."""
    steps: int
    unit = ""
    """Of a loss, as it is shown."""
    _resumed: str | None = None
    _run_folder: Path | None = None

    def begin(self, kind: str, student: nn.Module, steps: int, folder: Path, keeps: bool) -> None:
        """Get ready.

        Args:
            kind: of the stage, in the recipe's words.
            student: whose parameters that take gradients are kept.
            folder: of checkpoints, if it `keeps` any.
        """
        self.kind, self.student, self.steps = kind, student, steps
        self.losses, self.seconds = [], []
        self._folder, self._keeps = folder, keeps
        self._advance: Callable[..., None] | None = None
        self._skipped_running = 0
        self._total: Tensor | None = None
        self._wants_to_keep = False
        self._kept = self._last = time.monotonic()
        self.add_callback(_Watch(self))
        self.remove_callback(PrinterCallback)

    def take_steps(self) -> None:
        """Make the steps, from the last checkpoint where there is one.

        Raises:
            UserError: steps that come to nothing, a disk or a device without room, or processes
                that do not see the same checkpoint.
        """
        self._resumed = get_last_checkpoint(str(self._folder))
        name = self._resumed and Path(self._resumed).name
        same_everywhere(name, str(self._folder), "checkpoint")
        main = self.is_world_process_zero()
        with progress.task(self.kind, self.steps) if main else nullcontext() as self._advance:
            try:
                self.train(resume_from_checkpoint=self._resumed)
            except torch.OutOfMemoryError as error:
                rows = self.stage.micro_batch or self.stage.batch // self.args.world_size
                raise UserError(
                    f"train: {self.kind}",
                    f"out of memory with {rows} rows at a time",
                    "lower micro_batch, or set checkpointing = true",
                ) from error

    def release(self) -> None:
        """Let gradients' moments go: the next stage needs the room, and cycles hold the trainer."""
        holders: tuple[Any, ...] = (self, self.callback_handler)
        for holder in holders:
            holder.optimizer = holder.lr_scheduler = None
        self.accelerator.free_memory()

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        asked = _told("ACCELERATE_USE_FSDP")
        cpus = (DistributedType.MULTI_CPU, DistributedType.FSDP)  # as the stage before left it
        sharded = getattr(state, "fsdp_plugin", None) is not None
        if asked and not sharded and state.distributed_type in cpus:
            # accelerate shards over GPUs alone; here CPUs too, where sharding can be tried out.
            state.distributed_type = DistributedType.FSDP
            # Whoever asks for the state again has it from there.
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        factor = partial(rate_factor, self.stage, num_training_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _moving(self) -> dict[str, nn.Parameter]:
        """What moves, by its name in the student."""
        return {n: p for n, p in self.student.named_parameters() if p.requires_grad}

    # What is done with a gradient.

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last thing before the optimiser's step, which a gradient of no number is kept from.

        One wait for the device a step: the loss is read here, and nowhere else.
        """
        grad_norm = self._norm_of(model, grad_norm)
        assert self._total is not None
        total, self._total = self._total.double().flatten(), None
        wants = self._keeps and time.monotonic() - self._kept >= KEEP_SECONDS
        norm = torch.as_tensor(full(grad_norm), dtype=total.dtype, device=total.device)
        told = torch.cat([total, total.new_tensor([float(wants)]), norm.reshape(1)])
        *parts, wanted, size = self.accelerator.reduce(told, "sum").tolist()
        self._wants_to_keep = wanted > 0
        self.losses.append(parts)
        if all(map(math.isfinite, (*parts, size))):
            self._skipped_running = 0
        else:
            # Its loss may be a number where its gradient is none: the curve has neither.
            self.losses[-1] = [math.nan] * len(parts)
            model.zero_grad(set_to_none=True)
            self._skipped_running += 1
            # DeepSpeed has stepped before it lets anybody look.
            most = 1 if self.is_deepspeed_enabled else min(MOST_SKIPPED, self.steps)
            if self._skipped_running == most:
                self._give_up()
        return grad_norm

    def _norm_of(self, model: nn.Module, clipped: Any) -> Any:
        """The gradient's norm; `clipped` is what it was, if it was clipped."""
        return super()._get_grad_norm(model, clipped)

    def _give_up(self) -> None:
        step = self.state.global_step + 1
        remedy = "lower the learning rate"
        if self._keeps:
            path = self._folder.parent / f"not-a-number-{step}.safetensors"
            batch = self._last_batch()
            try:
                with together(path.parent):
                    if self.is_world_process_zero():
                        write_tensors(path, batch, {})
                remedy += f"; the last batch is in {path}"
            except UserError as error:  # what came before it is what has to be said
                remedy += f"; the last batch is not kept: {error}"
        raise UserError(
            f"train: {self.kind}",
            f"no loss or gradient was a number in {self._skipped_running} steps, up to step {step}",
            remedy,
        )

    def _last_batch(self) -> Mapping[str, Tensor]:
        """What the step at hand was made of, on all processes; on the CPU. All of them ask."""
        raise NotImplementedError

    # Checkpoints.

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._run_folder or self._folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        main, name = self.is_world_process_zero(), f"checkpoint-{self.state.global_step}"
        besides = self._kept_besides()
        try:
            with new_checkpoint(self._folder, name, main) as self._run_folder:
                super()._save_checkpoint(model, trial)
                if main:
                    curve = {"losses": self.losses, "seconds": self.seconds}
                    (self._run_folder / name / _CURVE).write_text(json.dumps(curve))
                    for file, tensors in besides.items():
                        save_file(dict(tensors), self._run_folder / name / file)
        finally:
            self._run_folder = None
        self._kept = time.monotonic()

    def _kept_besides(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Further files of a checkpoint and their tensors, on the CPU. All processes ask."""
        return {}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save or output_dir is None:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return  # they keep shards, and read nothing else
        tensors = {n: p.detach().cpu().contiguous() for n, p in self._moving().items()}
        save_file(tensors, Path(output_dir) / "model.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        kept = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        with torch.no_grad():
            for name, parameter in self._moving().items():
                parameter.copy_(kept[name])

    # Where the Trainer's loop is.

    def _begin(self) -> None:
        """Before the first step of this run."""
        if self._resumed:
            curve = json.loads((Path(self._resumed) / _CURVE).read_text())
            self.losses, self.seconds = curve["losses"], curve["seconds"]
            for parts in reversed(self.losses):
                if all(map(math.isfinite, parts)):
                    break
                self._skipped_running += 1
        self._kept = self._last = time.monotonic()
        if self._advance is not None and self.state.global_step:
            self._advance(self.state.global_step)

    def _stepped(self) -> None:
        """After the optimiser's step."""

    def note(self) -> None:
        """Count a step that is done, and show it."""
        before, self._last = self._last, time.monotonic()
        self.seconds.append(self._last - before)
        if self._advance is not None:
            loss = math.fsum(self.losses[-1]) / len(self.losses[-1])
            self._advance(1, note=f"{loss:.3f}{self.unit}")


class _Watch(TrainerCallback):
    """Tells a trainer of ours where the loop is, and the loop when to keep a checkpoint."""

    def __init__(self, trainer: StageTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer._begin()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer._stepped()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.note()
        if self._trainer._wants_to_keep and state.global_step < self._trainer.steps:
            control.should_save = True


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is for a parameter: norms, biases, taps and decays it would pull to a
    meaningless zero."""
    return parameter.dim() == 2 and name.rpartition(".")[2] not in RecurrentMixer.FLOAT32


def full(tensor: Any) -> Any:
    """The whole of a tensor that may be sharded; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
