"""Steps of stages on conversations: TRL's trainers, told what differs.

Rows come framed and masked; reference log-probabilities of preferences are computed once; `trainer`
counts, skips and keeps as for all stages. TRL is an extra, imported by this file alone.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import random
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from itertools import count, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from tamba import progress
from tamba.errors import UserError
from tamba.model.modeling import TambaForCausalLM
from tamba.ops.losses import Weights, next_token_loss
from tamba.recipe import ChatStage, Sft
from tamba.train.log import StageLog, stage_log
from tamba.train.memory import from_all
from tamba.train.trainer import Place, StageTrainer, decays

IGNORED = -100
"""A label that is not scored, in transformers' words."""
_LEFT = ("forward", "_is_accelerate_prepared", "model_tags")
"""What trainers put on a model. The second would keep the next stage's from preparing it."""
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


def shares(stage: ChatStage, processes: int, where: str) -> tuple[int, int]:
    """Rows that go through a process at a time, and how often a step.

    Raises:
        UserError: so many processes cannot share a step; its message begins with `where`.
    """
    mine, rest = divmod(stage.batch, processes)
    micro = min(stage.micro_batch or mine, mine)
    if rest or mine % micro:
        pieces = f" in pieces of {micro}" if not rest else ""
        raise UserError(
            where,
            f"batch = {stage.batch} cannot be shared by {processes} processes{pieces}",
            "choose a multiple",
        )
    return micro, mine // micro


def padding(tokenizer: PreTrainedTokenizerBase, words: int) -> int:
    """The token that fills rows, of those that a model with so many words has."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int) and token < words:
            return token
    return 0


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
        args = self.place.arguments(
            config_class,
            self.folder,
            steps,
            self.seed,
            stage,
            use_cpu=not cuda,
            per_device_train_batch_size=1,
            learning_rate=stage.lr,
            weight_decay=stage.weight_decay,
            adam_beta1=stage.betas[0],
            adam_beta2=stage.betas[1],
            max_grad_norm=stage.clip,
            bf16=False,  # not accelerate's business: see `_Steps.computing`
            # Layers are told in `running`; transformers 5.23 has another word for this than 5.17.
            **{next(n for n in _CHECKPOINTING if n in config_class.__dataclass_fields__): False},
            remove_unused_columns=False,
            dataloader_pin_memory=cuda,
            **options,
        )
        micro, pieces = shares(stage, args.world_size, f"train: {kind_of(stage)}")
        args.per_device_train_batch_size = micro
        args.gradient_accumulation_steps = pieces
        filled, words = copy.deepcopy(tokenizer), self.student.config.vocab_size
        # Trainers set its padding token where there is none; here, where the model lacks it.
        if filled.pad_token_id is not None and filled.pad_token_id >= words:
            filled.pad_token_id = padding(tokenizer, words)
        trainer = trainer_class(
            model=self.student,
            args=args,
            train_dataset=Dataset.from_list(list(rows)),
            processing_class=filled,
            **({} if collate is None else {"data_collator": collate}),
            **models,
        )
        trainer.stage = stage
        for model in (self.student, *models.values()):
            # Also where TRL asks a model outside of a step. What follows its logits is float32.
            model.forward = convert_outputs_to_fp32(trainer.computing()(model.forward))
        keeps = self.place.folder is not None
        trainer.begin(kind_of(stage), self.student, steps, self.folder, keeps)
        self._tokens = round(tokens / len(rows) * steps * stage.batch)
        return trainer

    def _steps(self, rows: int, tokens: int) -> int:
        stage = self.stage
        if stage.steps is not None:
            return stage.steps
        if stage.tokens is not None:
            return max(1, round(stage.tokens / (tokens / rows * stage.batch)))
        return max(1, math.ceil((stage.epochs or 1) * rows / stage.batch))

    def log(self, trainer: Any) -> StageLog:
        """Make the steps, from the last checkpoint where there is one; what they did."""
        try:
            trainer.take_steps()
        finally:
            trainer.release()
        kind = kind_of(self.stage)
        return stage_log(kind, self._tokens, trainer.losses, seconds=trainer.seconds)


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
        # Named, for else every process would open all devices.
        devices = [student.device] if student.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(_quiet())
        folder = stack.enter_context(place.opened())
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


class _Steps(StageTrainer):
    """What our stages tell TRL's trainers, which stand behind it in the order of classes."""

    train_dataset: Any

    def begin(self, *args: Any, **told: Any) -> None:
        super().begin(*args, **told)
        self._seen: list[Any] = []

    def _send_telemetry(self) -> None:
        """Nobody is told what is trained here."""

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """The run's own card says more."""

    # What a step is made of.

    def _get_train_sampler(self, *_: Any, **__: Any) -> Sampler[int]:
        rows, seed = len(self.train_dataset), self.args.seed
        return Turns(rows, self.stage.batch, self.steps, seed, self.repeats())

    def repeats(self) -> int:
        """How often a trainer wants the rows of a step."""
        return 1

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, p in model.named_parameters() if decays(name, p)]

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Tensor:
        loss: Tensor = super().training_step(model, inputs, *args, **options)
        mine = loss.detach() / self.args.world_size
        self._total = mine if self._total is None else self._total + mine
        # The curve that loggers hear would be no number from here on.
        return loss.nan_to_num(0.0, 0.0, 0.0)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Any:
        self._seen.append(inputs)  # with what the student has answered, where it is asked
        with self.computing():
            return super().compute_loss(model, inputs, *args, **options)

    def computing(self) -> torch.autocast:
        """Inside, matrix products run in the stage's type, and nothing else is shortened.

        accelerate would shorten parameters that are shared out, decays and what gradients are
        summed in too; and it tells a model's forward pass alone, which TRL may go round.
        """
        short = self.stage.dtype == "bfloat16"
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=short)

    def _stepped(self) -> None:
        self._seen = []

    def _last_batch(self) -> dict[str, Tensor]:
        mine = [
            {n: t.detach().cpu().clone() for n, t in inputs.items() if isinstance(t, Tensor)}
            for inputs in self._seen
            if isinstance(inputs, Mapping)
        ]
        pieces = [piece for theirs in from_all(mine) for piece in theirs]
        return {f"{i}/{n}": tensor for i, piece in enumerate(pieces) for n, tensor in piece.items()}


class Turns(Sampler[int]):
    """Which rows each step is made of: every row once, then every row once in another order, ...

    A function of the step and the seed alone. What a data loader does at the end of its rows (a
    step of fewer, or filled up) depends on how a step is divided.

    Args:
        rows, batch, steps: so many rows, rows of a step, and steps.
        repeats: how often the rows of a step come, one time after another.
    """

    def __init__(self, rows: int, batch: int, steps: int, seed: int, repeats: int = 1) -> None:
        self.rows, self.batch, self.steps = rows, batch, steps
        self.seed, self.repeats = seed, repeats

    def __len__(self) -> int:
        return self.steps * self.batch * self.repeats

    def __iter__(self) -> Iterator[int]:
        stream = self._stream()
        for _ in range(self.steps):
            yield from [*islice(stream, self.batch)] * self.repeats

    def _stream(self) -> Iterator[int]:
        for turn in count():
            yield from np.random.default_rng([self.seed, turn]).permutation(self.rows).tolist()


class _OnPolicySteps(_Steps):
    """Learns along the student's own answers, which are sampled for a whole step at once."""

    def repeats(self) -> int:
        return int(self.args.gradient_accumulation_steps)

    def _prepare_inputs(self, inputs: Any) -> Any:
        with self.computing():  # weights are shortened once, not for every token
            return super()._prepare_inputs(inputs)


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
        self._seen.append(inputs)
        with self.computing():
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

    ref_model: Any = None

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset  # framed and checked before

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # TRL would share the reference out over processes, in place: the student itself perhaps, or
        # the next stage's teacher. It is asked whole, before the first step.
        self._shares_out, self.is_fsdp_enabled = self.is_fsdp_enabled, False

    def begin(self, *args: Any, **told: Any) -> None:
        self.is_fsdp_enabled = self._shares_out
        super().begin(*args, **told)

    def ask_reference(self) -> None:
        """Compute what the reference says of every pair, and let it go."""
        reference, size = self.ref_model, self.args.per_device_train_batch_size
        rows, world = self.train_dataset, self.args.world_size
        firsts = range(0, len(rows), size)
        mine: dict[int, list[list[float]]] = {}
        was = reference.training
        reference.eval()
        for turn in progress.track(range(0, len(firsts), world), "dpo: reference"):
            # As many for each process, for it may be that all have to ask at once.
            first = firsts[min(turn + self.args.process_index, len(firsts) - 1)]
            some = [rows[i] for i in range(first, min(first + size, len(rows)))]
            batch = self._prepare_inputs(self.data_collator(some))
            sides = self.compute_ref_log_probs(reference, batch)
            mine[first] = [side.float().tolist() for side in sides]
        reference.train(was)
        found = {first: sides for theirs in from_all(mine) for first, sides in theirs.items()}
        for k, name in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
            rows = rows.add_column(name, [value for first in firsts for value in found[first][k]])
        self.train_dataset, self.precompute_ref_logps, self.ref_model = rows, True, None


@cache
def _classes(kind: str) -> tuple[Any, Any]:
    """A trainer of TRL's behind what our steps say, and its configuration."""
    import trl

    ours, theirs, config = {
        "sft": (_SftSteps, trl.SFTTrainer, trl.SFTConfig),
        "dpo": (_DpoSteps, trl.DPOTrainer, trl.DPOConfig),
        "on_policy": (_OnPolicySteps, trl.DistillationTrainer, trl.DistillationConfig),
    }[kind]
    return type(f"{kind}_steps", (ours, theirs), {}), config
