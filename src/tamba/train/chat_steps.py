"""Steps of stages on conversations: TRL's trainers, told what differs.

Rows come framed and masked; reference log-probabilities of preferences are computed once; a step
whose loss or gradient is no number moves nothing; checkpoints appear under their names when they
are whole, and a run that was cut off goes on from the last. TRL is an extra, imported by this file
alone.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tamba import progress
from tamba.errors import UserError
from tamba.model.modeling import TambaForCausalLM
from tamba.model.recurrent import RecurrentMixer
from tamba.ops.losses import Weights, next_token_loss
from tamba.recipe import ChatStage, Sft
from tamba.train import engine
from tamba.train.engine import Place, full
from tamba.train.log import StageLog, stage_log
from tamba.train.memory import new_checkpoint, write_tensors
from tamba.train.schedules import rate_factor

IGNORED = -100
"""A label that is not scored, in transformers' words."""
_CURVE = "curve.json"
_LEFT = ("forward", "_original_forward", "_is_accelerate_prepared", "model_tags")
"""Attributes that trainers put on a model. The third would keep the next stage from autocast."""
_RESTORED = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")


def check_library(where: str) -> None:
    """Raise UserError, whose message begins with `where`, if TRL is not installed."""
    for name in ("trl", "datasets"):
        if importlib.util.find_spec(name) is None:
            raise UserError(where, f"needs the package '{name}', which is not installed", _INSTALL)


_INSTALL = "pip install 'tamba[chat]'"


def kind_of(stage: ChatStage) -> str:
    """The word that the recipe has for a stage."""
    return str(cast(Any, stage).stage)


class Run:
    """One stage at work: its trainer's arguments, and what it leaves."""

    def __init__(
        self, student: TambaForCausalLM, stage: ChatStage, seed: int, place: Place, folder: Path
    ) -> None:
        self.student, self.stage, self.seed = student, stage, seed
        self.place, self.folder = place, folder

    def trainer(
        self,
        collate: Any,
        rows: Sequence[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        tokens: int,
        **options: Any,
    ) -> Any:
        """A trainer of TRL's over these rows, which hold so many tokens."""
        from datasets import Dataset

        trainer_class, config_class = _classes(kind_of(self.stage))
        stage, cuda = self.stage, self.student.device.type == "cuda"
        steps = self._steps(len(rows), tokens)
        models = {k: options.pop(k) for k in ("ref_model", "teacher_model") if k in options}
        if self.place.logs is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.place.logs)
        args = config_class(
            output_dir=str(self.folder),
            use_cpu=not cuda,
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=stage.lr,
            weight_decay=stage.weight_decay,
            adam_beta1=stage.betas[0],
            adam_beta2=stage.betas[1],
            max_grad_norm=stage.clip,
            bf16=stage.dtype == "bfloat16",
            # Layers are told in `running`; transformers 5.23 has another word for this than 5.17.
            **{next(n for n in _CHECKPOINTING if n in config_class.__dataclass_fields__): False},
            logging_steps=max(1, steps // 200),
            logging_nan_inf_filter=False,
            save_strategy="no",  # `_Watch` says when
            disable_tqdm=True,
            report_to=list(self.place.report_to) or "none",
            seed=self.seed % 2**32,
            remove_unused_columns=False,
            dataloader_pin_memory=cuda,
            **options,
        )
        args._n_gpu = min(args.n_gpu, 1)  # one process is one GPU, however many are there
        mine, rest = divmod(stage.batch, args.world_size)
        micro = stage.micro_batch or mine
        if rest or mine % micro:
            raise UserError(
                f"train: {kind_of(stage)}",
                f"batch = {stage.batch} cannot be shared by {args.world_size} processes in pieces "
                f"of {micro}",
                "choose a multiple",
            )
        args.per_device_train_batch_size = micro
        args.gradient_accumulation_steps = mine // micro
        trainer = trainer_class(
            model=self.student,
            args=args,
            train_dataset=Dataset.from_list(list(rows)),
            # Trainers set its padding token.
            processing_class=copy.deepcopy(tokenizer),
            **({} if collate is None else {"data_collator": collate}),
            **models,
        )
        trainer.begin(stage, steps, self.folder, self.place)
        self._tokens = round(tokens / len(rows) * steps * stage.batch)
        return trainer

    def _steps(self, rows: int, tokens: int) -> int:
        stage = self.stage
        if stage.steps is not None:
            return stage.steps
        if stage.tokens is not None:
            return max(1, round(stage.tokens / (tokens / rows * stage.batch)))
        return max(1, math.ceil((stage.epochs or 1) * math.ceil(rows / stage.batch)))

    def log(self, trainer: Any) -> StageLog:
        """Make the steps, from the last checkpoint where there is one; what they did."""
        with progress.task(kind_of(self.stage), trainer.steps) as advance:
            trainer.advance = advance
            trainer.train(resume_from_checkpoint=get_last_checkpoint(str(self.folder)))
        return stage_log(kind_of(self.stage), self._tokens, [[x] for x in trainer.losses])


@contextmanager
def running(
    student: TambaForCausalLM,
    teacher: TambaForCausalLM | None,
    moving: Collection[str] | None,
    stage: ChatStage,
    seed: int,
    place: Place,
) -> Iterator[Run]:
    """Inside, a stage may do with models and random numbers as it likes; after it they are as they
    were, but for the parameters that moved."""
    models = [student, *([] if teacher is None else [teacher])]
    needed = [{p: p.requires_grad for p in model.parameters()} for model in models]
    training = [model.training for model in models]
    configs = [c for m in models for c in (m.config, m.generation_config)]
    settings = [(c, name, getattr(c, name)) for c in configs for name in _RESTORED]
    states = random.getstate(), np.random.get_state()
    for name, parameter in student.named_parameters():
        moves = moving is None or name in moving
        parameter.requires_grad_(moves)
        if moves and parameter.dtype.itemsize < 4:
            raise TypeError(f"{name} is {parameter.dtype}; steps need a float32 master")
    if teacher is not None:
        teacher.requires_grad_(False).eval()
    layers: list[Any] = list(student.model.layers)
    for layer in layers:
        layer.gradient_checkpointing = stage.checkpointing
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(_quiet())
        folder = place.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield Run(student, stage, seed, place, folder)
        finally:
            for layer in layers:
                layer.gradient_checkpointing = False
            random.setstate(states[0])
            np.random.set_state(states[1])
            for config, name, value in settings:
                setattr(config, name, value)
            for model, before, was in zip(models, needed, training, strict=True):
                # What TRL and accelerate have put around it.
                for name in _LEFT:
                    model.__dict__.pop(name, None)
                model.train(was)
                for parameter in model.parameters():
                    parameter.grad = None
                    parameter.requires_grad_(before.get(parameter, True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Bars of ours, not of the data library; and no advice for authors of trainers."""
    from datasets.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # TRL 1.16 calls transformers by names that 5.23 is about to retire.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing", FutureWarning)
            yield
    finally:
        if shown:
            bars.enable_progress_bar()


class _Steps(Trainer):
    """What our stages tell TRL's trainers, which stand behind it in the order of classes."""

    losses: list[float]
    advance: Callable[..., None] = staticmethod(lambda *_, **__: None)
    _run_folder: Path | None = None

    def begin(self, stage: ChatStage, steps: int, folder: Path, place: Place) -> None:
        self.stage, self.steps, self.folder = stage, steps, folder
        self.losses = []
        self.keeps = place.folder is not None
        self.skipped_running = 0
        self.total: Tensor | None = None
        self.seen: list[Any] = []
        self.kept = time.monotonic()
        self.add_callback(_Watch(self))
        self.remove_callback(PrinterCallback)

    def _send_telemetry(self) -> None:
        """Nobody is told what is trained here."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """The run's own card says more."""

    # What a step is made of.

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # Decaying norms, biases, taps and decays would pull them to a meaningless zero.
        return [
            name
            for name, p in model.named_parameters()
            if p.dim() == 2 and name.rpartition(".")[2] not in RecurrentMixer.FLOAT32
        ]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        factor = partial(rate_factor, cast(Any, self.stage), num_training_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Tensor:
        self.seen.append(inputs)
        loss: Tensor = super().training_step(model, inputs, *args, **options)
        self.total = loss.detach() if self.total is None else self.total + loss.detach()
        return loss

    def judge(self) -> None:
        """Keep a gradient of no number from the optimiser's step, which is next."""
        moving = [p for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in moving if p.grad is not None], foreach=True)
        assert self.total is not None
        told = torch.stack([self.total.double(), full(norm).double().to(self.total.device)])
        loss, size = self.accelerator.reduce(told, "mean").tolist()
        self.losses.append(loss)
        if math.isfinite(loss) and math.isfinite(size):
            self.skipped_running = 0
        else:
            self.losses[-1] = math.nan  # counted, though the gradient alone was no number
            for parameter in moving:
                parameter.grad = None
            self.skipped_running += 1
            if self.skipped_running == min(engine.MOST_SKIPPED, self.steps):
                self._give_up()
        self.total, self.seen = None, []

    def _give_up(self) -> None:
        n, step = self.skipped_running, self.state.global_step + 1
        remedy = "lower the learning rate"
        if self.keeps and self.is_world_process_zero():
            path = self.folder.parent / f"not-a-number-{step}.safetensors"
            tensors = {
                f"{i}/{name}": value.detach().cpu().contiguous()
                for i, inputs in enumerate(self.seen)
                if isinstance(inputs, Mapping)
                for name, value in inputs.items()
                if isinstance(value, Tensor)
            }
            write_tensors(path, tensors, {})
            remedy += f"; the last batch is in {path}"
        raise UserError(
            f"train: {kind_of(self.stage)}",
            f"no loss or gradient was a number in {n} steps, up to step {step}",
            remedy,
        )

    def wants_to_keep(self) -> bool:
        """Whether a checkpoint is due, as the first process sees it."""
        late = self.keeps and time.monotonic() - self.kept >= engine.KEEP_SECONDS
        told = torch.tensor(float(late and self.is_world_process_zero()), device=self.args.device)
        return bool(self.accelerator.reduce(told, "sum") > 0)

    # Checkpoints.

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._run_folder or self.folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        main, name = self.is_world_process_zero(), f"checkpoint-{self.state.global_step}"
        wait = self.accelerator.wait_for_everyone
        try:
            with new_checkpoint(self.folder, name, main, wait) as self._run_folder:
                super()._save_checkpoint(model, trial)
                if main:
                    (self._run_folder / name / _CURVE).write_text(json.dumps(self.losses))
        finally:
            self._run_folder = None
        self.kept = time.monotonic()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save or output_dir is None:
            return
        tensors = {}
        for name, parameter in self._moving().items():
            kept = parameter.detach() if state_dict is None else state_dict[name]
            tensors[name] = kept.cpu().contiguous()
        save_file(tensors, Path(output_dir) / "model.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.losses = json.loads((Path(resume_from_checkpoint) / _CURVE).read_text())
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        kept = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        with torch.no_grad():
            for name, parameter in self._moving().items():
                parameter.copy_(kept[name])

    def _moving(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


class _Watch(TrainerCallback):
    """Tells a trainer of ours where the loop is, and the loop when to keep a checkpoint."""

    def __init__(self, trainer: _Steps) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.kept = time.monotonic()
        if state.global_step:
            self._trainer.advance(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.judge()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.advance(1, note=f"{self._trainer.losses[-1]:.3f}")
        if state.global_step < self._trainer.steps and self._trainer.wants_to_keep():
            control.should_save = True


class _SftSteps(_Steps):
    """Learns the answers of conversations."""

    teacher: TambaForCausalLM | None = None

    def learn_from(self, teacher: TambaForCausalLM | None, stage: Sft) -> None:
        """Compare with the teacher too, where the stage gives that weight."""
        self.weights = Weights(kl=stage.kl, ce=stage.ce, temperature=stage.temperature)
        self.teacher = teacher if stage.kl else None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if self.teacher is None:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return loss * self.weights.ce if self.weights.ce != 1 else loss
        return self._beside_teacher(model, inputs, num_items_in_batch)

    def _beside_teacher(self, model: nn.Module, inputs: dict[str, Any], count: Any) -> Tensor:
        student, teacher = self.accelerator.unwrap_model(model), self.teacher
        assert teacher is not None
        labels = inputs["labels"][:, 1:]
        places = labels != IGNORED
        shown = {k: v for k, v in inputs.items() if k != "labels"}
        seen: list[Tensor] = []
        hook = student.model.register_forward_hook(
            lambda module, args, output: seen.append(output.last_hidden_state)
        )
        try:
            # Through what wraps the model, which may have to see its backward pass.
            model(**shown, use_cache=False, logits_to_keep=1)
        finally:
            hook.remove()
        with self.accelerator.autocast():
            with torch.no_grad():
                above = teacher.model(**shown, use_cache=False).last_hidden_state
            loss = next_token_loss(
                seen[0][:, :-1][places],
                student.lm_head.weight,
                labels[places],
                teacher_hidden=above[:, :-1][places],
                teacher_head=teacher.lm_head.weight,
                weights=self.weights,
            )
        mine = places.sum()
        whole = mine if count is None else torch.as_tensor(count, device=mine.device)
        return loss * (mine / whole.clamp_min(1)) * self.accelerator.num_processes


class _DpoSteps(_Steps):
    """Learns which of two answers is preferred."""

    train_dataset: Any
    ref_model: Any = None

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # framed and checked before

    def ask_reference(self) -> None:
        """Compute what the reference says of every pair, and let it go."""
        reference, size = self.ref_model, self.args.per_device_train_batch_size
        found: dict[str, list[float]] = {"ref_chosen_logps": [], "ref_rejected_logps": []}
        rows = self.train_dataset
        was = reference.training
        reference.eval()
        for first in progress.track(range(0, len(rows), size), "dpo: reference"):
            some = [rows[i] for i in range(first, min(first + size, len(rows)))]
            batch = self._prepare_inputs(self.data_collator(some))
            sides = self.compute_ref_log_probs(reference, batch)
            for name, values in zip(found, sides, strict=True):
                found[name] += values.float().tolist()
        reference.train(was)
        for name, column in found.items():
            rows = rows.add_column(name, column)
        self.train_dataset, self.precompute_ref_logps, self.ref_model = rows, True, None


@cache
def _classes(kind: str) -> tuple[Any, Any]:
    """A trainer of TRL's behind what our steps say, and its configuration."""
    import trl

    ours, theirs, config = {
        "sft": (_SftSteps, trl.SFTTrainer, trl.SFTConfig),
        "dpo": (_DpoSteps, trl.DPOTrainer, trl.DPOConfig),
        "on_policy": (_Steps, trl.DistillationTrainer, trl.DistillationConfig),
    }[kind]
    return type(f"{kind}_steps", (ours, theirs), {}), config
