"""What each layer of a student is made of.

A `LayerPlan` is written by `analyze` or by a person, read by `build`, and kept with the student. It
knows layer numbers and options by name, nothing about weights. As a file it is TOML that a person
may edit: one line a layer, bottom first, with the reason beside it::

    layers = [
      "keep 0",        # loss 3.21 without it
      "convert 1",
      "transplant 25",
    ]

Layer numbers are 0-based and written out one by one: ranges are where off-by-one errors live.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

from tamba.artefact import write_file
from tamba.errors import UserError, nearest
from tamba.sections import Section, dump_toml, read_toml, toml_value, validate

Action = Literal["keep", "convert", "transplant", "reinitialize"]
Source = Literal["teacher", "donor"]
Mixer = Literal["mamba2", "mamba1"]

ACTIONS: tuple[Action, ...] = get_args(Action)
MIXERS: tuple[Mixer, ...] = get_args(Mixer)


class ConvertOptions(Section):
    """How an attention layer becomes a Mamba layer (Q→C, K→B, V→x, O→out), and what is fresh in it.

    The defaults leave the layer as close to linear attention as its form allows, so that a
    closed-form fit starts near the teacher. `The Mamba in the Llama` (arXiv 2408.15237, section 2)
    corresponds to ``conv = "random"``, ``conv_activation = "silu"``, ``gate = "random"``, ``norm =
    "head"``, ``decay = "paper"``.

    Args:
        mixer: kind of a converted layer, where the layer's own line does not say.
        weights: of the projections: the attention's (Q→C, K→B, V→x, O→out), or ``random`` ones, to
            see what the attention's are worth.
        d_conv: taps of the causal convolution.
        conv: first weights of the convolution; ``identity`` passes each token through unchanged.
        conv_activation: after the convolution.
        gate: ``none`` has no gate and no z rows; ``random`` draws z rows; ``open`` has a gate whose
            first value is the same for every channel.
        norm: RMSNorm before the output projection: none, over each head, or over all of d_inner.
        decay: first dt and A; ``paper`` draws them as Mamba does, ``slow`` forgets little,
            ``span`` spreads the heads' memory evenly over the training length on a log scale.
        d_state: state size of a Mamba-1 layer (a Mamba-2 layer has head_dim).
        slices: how Mamba-1 slices of B and x meet those of C under grouped queries: ``head`` keeps
            whole heads together, ``legacy`` pairs them as the released checkpoints do.
    """

    mixer: Mixer = "mamba2"
    weights: Literal["attention", "random"] = "attention"
    d_conv: int = Field(default=4, ge=1, le=32)
    conv: Literal["identity", "random"] = "identity"
    conv_activation: Literal["identity", "silu"] = "identity"
    gate: Literal["none", "open", "random"] = "none"
    norm: Literal["none", "head", "all"] = "none"
    decay: Literal["slow", "span", "paper"] = "span"
    d_state: int = Field(default=16, ge=1)
    slices: Literal["head", "legacy"] = "head"


@dataclass(frozen=True)
class PlanEntry:
    """One layer of the student.

    Args:
        action: ``keep`` the teacher's layer; ``convert`` its attention to a Mamba mixer;
            ``transplant`` the donor's layer; ``reinitialize``: a layer of the same shape with fresh
            weights throughout.
        index: 0-based layer of `source`.
        mixer: for ``convert``, this layer's mixer where it differs from the plan's.
        source: the model that `index` counts in; follows from the action but for ``reinitialize``,
            which takes the donor's shape unless it says ``teacher``.
        note: why, for the reader of the file; means nothing to programs.
    """

    action: Action
    index: int
    mixer: Mixer | None = None
    source: Source | None = None
    note: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.source is None:
            fallback: Source = "teacher" if self.action in ("keep", "convert") else "donor"
            object.__setattr__(self, "source", fallback)

    def __str__(self) -> str:
        words: list[str] = [self.action]
        if self.action == "reinitialize" and self.source == "teacher":
            words.append("teacher")
        words.append(str(self.index))
        if self.mixer:
            words.append(self.mixer)
        return " ".join(words)


@dataclass(frozen=True)
class LayerPlan:
    """The layers of a student, bottom first, and where the rest of the model comes from.

    A teacher layer that no entry names is dropped. `name` is what messages call the plan: its file
    or preset.
    """

    entries: tuple[PlanEntry, ...]
    convert: ConvertOptions = field(default_factory=ConvertOptions)
    embedding: Source = "teacher"
    final_norm: Source = "teacher"
    head: Source = "teacher"
    name: str = field(default="plan", compare=False)

    def __post_init__(self) -> None:
        if not self.entries:
            raise UserError(self.name, "has no layers", "list at least one under `layers`")

    @property
    def n_layers(self) -> int:
        return len(self.entries)

    @property
    def converted(self) -> tuple[int, ...]:
        """Student layers whose attention is converted."""
        return tuple(i for i, entry in enumerate(self.entries) if entry.action == "convert")

    @property
    def needs_donor(self) -> bool:
        parts = (self.embedding, self.final_norm, self.head)
        return "donor" in parts or any(entry.source == "donor" for entry in self.entries)

    def dropped(self, n_teacher: int) -> tuple[int, ...]:
        """Teacher layers that the student does not use."""
        used = {entry.index for entry in self.entries if entry.source == "teacher"}
        return tuple(i for i in range(n_teacher) if i not in used)

    def mixer_of(self, entry: PlanEntry) -> Mixer:
        """The mixer that a converted layer gets."""
        return entry.mixer or self.convert.mixer

    def check(self, n_teacher: int, n_donor: int | None) -> None:
        """Refuse a plan that these models cannot fill.

        Args:
            n_teacher: layers of the teacher.
            n_donor: layers of the donor, or None without one.

        Raises:
            UserError: naming the line, the layer asked for and the range there is.
        """
        sizes = {"teacher": n_teacher, "donor": n_donor}
        for position, entry in enumerate(self.entries):
            where = f"{self.name}: layers[{position}] '{entry}'"
            size = sizes[entry.source or "teacher"]
            if size is None:
                raise UserError(
                    where, "needs a donor and there is none", "add [donor] to the recipe"
                )
            if not 0 <= entry.index < size:
                raise UserError(
                    where,
                    f"the {entry.source} has no layer {entry.index}",
                    f"its layers are 0 to {size - 1}",
                )
        for part in ("embedding", "final_norm", "head"):
            if getattr(self, part) == "donor" and n_donor is None:
                raise UserError(
                    f"{self.name}: {part}",
                    "needs a donor and there is none",
                    "add [donor] to the recipe",
                )

    def to_toml(self, *, options: bool = True) -> str:
        """The plan as the text of a file; `read_plan` reads it back.

        Args:
            options: say how layers are converted too; without it the recipe that builds the plan
                does, which a plan for any recipe leaves to it.
        """
        width = max(len(str(entry)) for entry in self.entries) + 3
        lines = [
            "# What each layer of the student is made of, bottom first; layers not named drop out.",
            "# keep N | convert N [mamba1|mamba2] | transplant N | reinitialize [teacher] N",
            f"embedding = {toml_value(self.embedding)}",
            f"final_norm = {toml_value(self.final_norm)}",
            f"head = {toml_value(self.head)}",
            "",
            "layers = [",
        ]
        for entry in self.entries:
            text = f'"{entry}",'
            # A comment is one line of what can be seen.
            note = " ".join("".join(c if c.isprintable() else " " for c in entry.note).split())
            lines.append(f"  {text:<{width}}  # {note}" if note else f"  {text}")
        lines.append("]")
        if options:
            lines += ["", "[convert]", dump_toml(self.convert.model_dump()).rstrip()]
        return "\n".join(lines) + "\n"


class _PlanFile(Section):
    layers: tuple[str, ...]
    embedding: Source = "teacher"
    final_norm: Source = "teacher"
    head: Source = "teacher"
    convert: ConvertOptions | None = None


def read_plan(path: str | Path, convert: ConvertOptions | None = None) -> LayerPlan:
    """Read a plan file.

    Args:
        path: the TOML file.
        convert: options for a file that has no ``[convert]`` table of its own.

    Raises:
        UserError: the file is missing or not TOML, a key or an entry is unknown, or `convert` says
            something else than the file's own table.
    """
    path = Path(path)
    _, data = read_toml(path)
    file = validate(_PlanFile, data, str(path))
    if file.convert and convert:
        both = (
            (key, getattr(file.convert, key), getattr(convert, key))
            for key in ConvertOptions.model_fields
            if key in convert.model_fields_set
        )
        if apart := [words for words in both if words[1] != words[2]]:
            key, here, there = apart[0]
            rest = "".join(f", {k} {h!r} and {t!r}" for k, h, t in apart[1:])
            raise UserError(
                f"{path}: convert.{key}",
                f"is {here!r} here and {there!r} in the recipe{rest}",
                "remove [convert] here, or [build.convert] there",
            )
    return LayerPlan(
        parse_entries(file.layers, f"{path}: layers"),
        file.convert or convert or ConvertOptions(),
        file.embedding,
        file.final_norm,
        file.head,
        name=str(path),
    )


def write_plan(plan: LayerPlan, path: str | Path) -> None:
    """Write a plan file; the file appears whole or not at all."""
    write_file(path, plan.to_toml())


def parse_entries(lines: Iterable[str], where: str) -> tuple[PlanEntry, ...]:
    """Read entries as they stand in a plan file. UserError names the first line at fault."""
    return tuple(_parse_entry(line, f"{where}[{n}]") for n, line in enumerate(lines))


def _parse_entry(line: str, where: str) -> PlanEntry:
    words = line.split()
    usage = "write e.g. 'keep 0', 'convert 1 mamba2', 'transplant 25', 'reinitialize teacher 3'"
    if not words:
        raise UserError(where, "is empty", usage)
    action = words.pop(0)
    if action not in ACTIONS:
        raise UserError(where, f"unknown action '{action}'", nearest(action, ACTIONS))
    source: Source | None = None
    if words and words[0] in get_args(Source):
        source = "teacher" if words.pop(0) == "teacher" else "donor"
        wanted = PlanEntry(action, 0).source
        if action != "reinitialize" and source != wanted:
            raise UserError(where, f"'{action}' takes a layer of the {wanted}, not of the {source}")
    if not words or not re.fullmatch(r"\d+", words[0]):
        found = f"'{words[0]}'" if words else "nothing"
        raise UserError(where, f"expected a layer number after '{action}', found {found}", usage)
    index = int(words.pop(0))
    mixer: Mixer | None = None
    if words and action == "convert":
        word = words.pop(0)
        if word not in MIXERS:
            raise UserError(where, f"unknown mixer '{word}'", nearest(word, MIXERS))
        mixer = word
    if words:
        raise UserError(where, f"'{' '.join(words)}' after '{action} {index}' means nothing", usage)
    return PlanEntry(action, index, mixer, source)


def uniform_plan(n_layers: int, keep_fraction: float | Fraction) -> LayerPlan:
    """Convert layers at even distances, keeping a share of the attention.

    For 32 layers and 50, 25 or 12.5 % the kept layers are those of the checkpoints of *The Mamba in
    the Llama* (arXiv 2408.15237): 1, 3, .., 31; 3, 7, .., 31; 7, 15, 23, 31; for 75 % every fourth
    layer from 0 is converted. The first layer is a Mamba layer and the last one attention wherever
    both kinds occur.

    Raises:
        UserError: a fraction outside 0 to 1.
    """
    if not 0 <= keep_fraction <= 1:
        raise UserError("uniform plan", f"cannot keep a share of {keep_fraction}", "give 0 to 1")
    n_kept = round(Fraction(keep_fraction) * n_layers)
    entries = tuple(
        # Keep layer i where the running total i * n_kept / n_layers steps over a whole number.
        PlanEntry("keep" if (i + 1) * n_kept // n_layers > i * n_kept // n_layers else "convert", i)
        for i in range(n_layers)
    )
    return LayerPlan(entries, name=f"uniform {float(keep_fraction):g}")


def _sandwich(bottom: int, middle: Sequence[int], fresh: bool = False) -> tuple[PlanEntry, ...]:
    action: Action = "reinitialize" if fresh else "transplant"
    return (
        *(PlanEntry("keep", i) for i in range(bottom)),
        *(PlanEntry(action, i) for i in middle),
        PlanEntry("keep", 23),
    )


# Pythia-1.4B (24 layers) and Mamba-1.4B (48 layers). The paper counts both hidden states and
# layers; "12+12+1" is its words read as layers, "11+12+1" is the reading whose parameters round to
# 1.1 billion. The rows of its Table 1 are named after the donor's layers; it calls the last one
# 36-48.
E_TAMBA: dict[str, tuple[PlanEntry, ...]] = {
    "12+12+1": _sandwich(12, range(25, 37)),
    "11+12+1": _sandwich(11, range(25, 37)),
    "none": _sandwich(12, ()),
    "fresh": _sandwich(12, range(25, 37), fresh=True),
    "3-14": _sandwich(12, range(3, 15)),
    "14-25": _sandwich(12, range(14, 26)),
    "25-36": _sandwich(12, range(25, 37)),
    "36-47": _sandwich(12, range(36, 48)),
}


def e_tamba_plan(name: str = "12+12+1") -> LayerPlan:
    """A composition of *E-Tamba* for Pythia-1.4B and Mamba-1.4B.

    Args:
        name: ``12+12+1`` or ``11+12+1`` (Pythia bottom + Mamba + Pythia top: two readings of the
            paper's section on merging), or a row of its Table 1: ``none``, ``fresh``, ``3-14``,
            ``14-25``, ``25-36``, ``36-47``.

    Raises:
        UserError: no composition of that name.
    """
    if name not in E_TAMBA:
        raise UserError("e-tamba plan", f"no composition '{name}'", nearest(name, E_TAMBA))
    return LayerPlan(E_TAMBA[name], name=f"e-tamba {name}")


def preset_plan(text: str, n_layers: int) -> LayerPlan:
    """The plan that a preset's name stands for: ``uniform 0.25``, ``e-tamba 12+12+1``.

    Args:
        text: the preset and its argument.
        n_layers: layers of the teacher.

    Raises:
        UserError: an unknown preset or argument.
    """
    word, _, argument = text.partition(" ")
    argument = argument.strip()
    presets = ("uniform", "e-tamba")
    if word not in presets:
        raise UserError(f"plan '{text}'", f"no preset '{word}'", nearest(word, presets))
    if word == "e-tamba":
        return e_tamba_plan(argument)
    try:
        share = Fraction(argument)
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"plan '{text}'", f"'{argument}' is no share", "write e.g. 'uniform 0.25'"
        ) from None
    return uniform_plan(n_layers, share)
