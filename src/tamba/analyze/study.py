"""All that was found about the layers of one model, and how it is written down.

`study` measures, `Study` knows every score by name, and `files_of` makes the artefact: JSON for
programs, a page of tables and pictures for people. Nothing here touches the disk but the record of
finished effects.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tamba.analyze.choice import (
    RATIO_LIMIT,
    Budget,
    Choice,
    Facts,
    Group,
    Scores,
    Table,
    choose,
    donor_groups,
    rank_correlations,
    ratio,
)
from tamba.analyze.distances import Estimate, StateScores, state_scores, triangle
from tamba.analyze.effects import (
    Change,
    Ledger,
    aligned_scores,
    attention_layers,
    conversion_scores,
    drop_scores,
    restore_scores,
    student_pairs,
)
from tamba.analyze.probe import Probe
from tamba.analyze.swaps import divided, scored_rows
from tamba.data import TokenBlocks
from tamba.errors import UserError, nearest
from tamba.model.config import AttentionSpec, TambaConfig
from tamba.model.modeling import TambaForCausalLM
from tamba.plan import ConvertOptions
from tamba.plots import to_bytes
from tamba.plots.layers import heat_maps, plan_stack, score_bars

Measure = Literal["states", "drop", "swap", "least_squares", "aligned", "restore"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
STATE_SCORES = ("own_turn", "last_turn", "column_mean", "block_influence", "kernel_change")
_PREFERRED = ("aligned", "restore", "least_squares", "swap", "drop", "own_turn")
"""Scores to choose by where nobody says, the most telling first."""

Lists = dict[str, list[float | None]]


@dataclass(frozen=True)
class Settings:
    """What to measure, and what to choose by.

    Args:
        measures: of `MEASURES`.
        effect_tokens: text that effects are scored on, and as much again to fit on where layers are
            fitted.
        dtype: of matrix products; None for the model's own type, and bfloat16 where layers are
            changed.
        convert: how layers are converted.
        choose: a strategy of `STRATEGIES`; empty for the lowest of the most telling score.
        budget: of the choice; None for half of the layers that may be replaced.
        always_keep: layers that stay.
        groups: size of the candidate groups, for a model that gives layers; None for none.
        seed: of what a conversion draws.
    """

    measures: tuple[str, ...] = ("states",)
    effect_tokens: int = 4096
    dtype: torch.dtype | None = None
    convert: ConvertOptions = field(default_factory=ConvertOptions)
    choose: str = ""
    budget: Budget | None = None
    always_keep: tuple[int, ...] = ()
    groups: int | None = None
    seed: int = 0

    def check(
        self,
        config: TambaConfig,
        *,
        student: Sequence[int] | None = None,
        recall: bool = False,
        where: str | None = None,
    ) -> None:
        """Refuse what a model cannot be asked for, before it is read.

        Args:
            config: of the model.
            where: the model is, for messages.
            student: attention layers that the converted one has converted; None where there is no
                such model.
            recall: whether effects are measured on recall too.

        Raises:
            UserError: an unknown score or strategy, layers that are not there, one layer alone, a
                budget that cannot be kept.
        """
        n_layers = config.num_hidden_layers
        attention = any(isinstance(spec.mixer, AttentionSpec) for spec in config.block_specs)
        for name in self.measures:
            if name not in MEASURES:
                raise UserError("scores", f"there is none called '{name}'", nearest(name, MEASURES))
        if not self.measures:
            raise UserError("scores", "names none", f"of {', '.join(MEASURES)}")
        for layer in self.always_keep:
            if not 0 <= layer < n_layers:
                raise UserError(
                    "layers to keep", f"there is no layer {layer}", f"they are 0 to {n_layers - 1}"
                )
        if n_layers < 2:
            raise UserError(
                where or config.name_or_path or "model",
                f"has {n_layers} layer, and layers are compared with one another",
                "analyse a model of two layers or more",
            )
        for name in self.measures:
            if name in ("swap", "least_squares", "aligned", "restore") and not attention:
                raise UserError(
                    f"score '{name}'", "takes attention layers, and there are none", "ask for drop"
                )
            if name in ("aligned", "restore") and student is None:
                raise UserError(f"score '{name}'", "takes a converted student", "name one")
        if self.groups is not None and not 1 <= self.groups <= n_layers:
            raise UserError(
                "groups", f"there are {n_layers} layers, no group of {self.groups}", "ask for fewer"
            )
        if self.groups is not None and "states" not in self.measures:
            raise UserError("groups", "are found from hidden states", "ask for the score 'states'")
        if not attention and (self.choose or self.budget is not None):
            raise UserError(
                self.choose or "number of layers",
                "chooses attention to convert, and there is none",
                "leave it out; groups of layers to transplant come from --groups",
            )
        if attention:
            # Which layers is not known yet; whether any can be chosen so is.
            flat: dict[str, list[float | None]] = {
                name: [
                    None
                    if name.startswith(("aligned", "restore")) and i not in (student or ())
                    else 0.0
                    for i in range(n_layers)
                ]
                for name in self._names(recall)
            }
            level = [[0.0] * (n_layers - i) for i in range(n_layers)]
            known = ("all_tokens", "last_token") if "states" in self.measures else ()
            self.choice(config, flat, dict.fromkeys(known, level))

    def _names(self, recall: bool) -> list[str]:
        """Names of the scores that will be measured."""
        names = list(STATE_SCORES) if "states" in self.measures else []
        parts = ("", "_loss", "_recall", "_ratio") if recall else ("", "_loss")
        return names + [m + part for m in self.measures if m != "states" for part in parts]

    @property
    def fits(self) -> bool:
        """Whether text is set aside to fit layers on."""
        return "least_squares" in self.measures

    @property
    def converts(self) -> bool:
        """Whether layers are converted to score them, so that scores are of one form of mixer."""
        return not {"swap", "least_squares"}.isdisjoint(self.measures)

    def facts(self, config: TambaConfig) -> Facts:
        """What a choice has to know of a model."""
        return Facts.of(config, self.convert, always_keep=self.always_keep)

    def choice(
        self, config: TambaConfig, scores: Scores, distances: Mapping[str, Table]
    ) -> Choice | None:
        """The layers to replace. Raises UserError, see `choose`.

        None where nobody says how to choose and no score is of every layer that may be replaced.
        """
        facts = self.facts(config)
        whole = [
            name
            for name in _PREFERRED
            if name in scores and all(scores[name][i] is not None for i in facts.free)
        ]
        if not self.choose and not whole:
            if self.budget is None:
                return None
            raise UserError(
                "number of layers",
                "cannot be chosen: the student has not converted every layer that may be",
                "ask for another score too, or keep the layers that it has not converted",
            )
        strategy = self.choose or f"lowest {whole[0]}"
        budget = self.budget
        if budget is None:
            alone = strategy.split()[0] in ("explicit", "jamba")
            budget = Budget() if alone else Budget(layers=len(facts.free) // 2)
        return choose(strategy, facts, budget, scores, distances)


@dataclass(frozen=True, eq=False)
class Study:
    """What was found about each layer.

    Args:
        model: its name.
        n_layers: of the model.
        states: scores from hidden states, where they were asked for.
        changes: by measure and layer.
        choice: the layers to replace, where some can be.
        groups: candidate groups of layers to give.
        text: what was read: sources, rows, their length, tokens that counted for hidden states, and
            rows that effects were scored on.
    """

    model: str
    n_layers: int
    states: StateScores | None = None
    changes: Mapping[str, Mapping[int, Change]] = field(default_factory=dict)
    choice: Choice | None = None
    groups: Sequence[Group] = ()
    text: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The model's name without folders and endings."""
        return Path(self.model).stem or self.model

    def scores(self) -> tuple[Lists, Lists]:
        """Every score by name, a value a layer, and the standard errors of each."""
        values: Lists = {}
        errors: Lists = {}
        if self.states is not None:
            for name in STATE_SCORES:
                found: Estimate = getattr(self.states, name)
                values[name], errors[name] = _listed(found.mean), _listed(found.error)
        for measure, layers in self.changes.items():
            for part in ("kl", "loss", "recall"):
                name = measure if part == "kl" else f"{measure}_{part}"
                changes = [layers.get(i) for i in range(self.n_layers)]
                if any(c is not None and getattr(c, part) is not None for c in changes):
                    values[name] = [None if c is None else getattr(c, part) for c in changes]
                    errors[name] = [
                        None if c is None else getattr(c, f"{part}_error") for c in changes
                    ]
            if f"{measure}_recall" in values:
                ratios = [_retrieval(layers.get(i)) for i in range(self.n_layers)]
                values[f"{measure}_ratio"] = [value for value, _ in ratios]
                errors[f"{measure}_ratio"] = [error for _, error in ratios]
        return values, errors

    def distances(self) -> dict[str, list[list[float]]]:
        """Angular distances [l][n-1] by name; empty where hidden states were not read."""
        return {} if self.states is None else self.states.distances()


def _retrieval(change: Change | None) -> tuple[float | None, float | None]:
    """Retrieval beside knowledge: answers lost for each nat that the text loses, and its error.

    The error is that of a ratio of two means over different rows, to first order; None where the
    ratio is cut off.
    """
    if change is None or change.recall is None:
        return None, None
    value = ratio(change.recall, change.loss)
    if not 0.0 < value < RATIO_LIMIT or change.recall_error is None or change.loss_error is None:
        return value, None
    over, under = change.recall_error / change.recall, change.loss_error / change.loss
    return value, value * math.hypot(over, under)


def _listed(values: Tensor) -> list[float | None]:
    return [_number(v) for v in values.tolist()]


def study(
    model: TambaForCausalLM,
    blocks: TokenBlocks,
    settings: Settings,
    *,
    probe: Probe | None = None,
    student: TambaForCausalLM | None = None,
    record: Path | None = None,
    text: Mapping[str, Any] | None = None,
) -> Study:
    """Measure what `settings` asks for and choose.

    Args:
        blocks: text; layers are fitted on its first rows and scored on the next.
        probe: of recall, for the effects.
        student: converted, for ``aligned`` and ``restore``.
        record: the file of finished effects, see `Ledger`.

    Raises:
        UserError: what `Settings.check` raises, too little text, or what the measures raise.
    """
    pairs = None
    if student is not None:
        pairs = student_pairs(model.config, student.config, student.config.name_or_path)
    settings.check(model.config, student=pairs, recall=probe is not None)
    states = None
    changes: dict[str, dict[int, Change]] = {}
    effects = [name for name in MEASURES if name in settings.measures and name != "states"]
    fit: TokenBlocks | None = None
    if settings.fits:
        fit, score = divided(blocks, settings.effect_tokens)
    else:
        score = scored_rows(blocks, settings.effect_tokens)
    if "states" in settings.measures:
        states = state_scores(model, blocks, dtype=settings.dtype)
    if effects:
        ledger = Ledger()
        if record is not None:
            ledger = Ledger(record, _digest(model, score, fit, settings, probe, student))
        told: dict[str, Any] = {"probe": probe, "ledger": ledger}
        if settings.dtype is not None:
            told["dtype"] = settings.dtype
        for name in effects:
            if name == "drop":
                changes[name] = drop_scores(model, score, **told)
            elif name in ("aligned", "restore"):
                assert student is not None
                measure = aligned_scores if name == "aligned" else restore_scores
                changes[name] = measure(model, student, score, **told)
            else:
                changes[name] = conversion_scores(
                    model,
                    score,
                    settings.convert,
                    fit=fit if name == "least_squares" else None,
                    seed=settings.seed,
                    **told,
                )
    title = model.config.name_or_path or "model"
    read = dict(text or {})
    if states is not None:
        read["tokens"] = states.tokens
    if effects:
        read["effect_rows"] = len(score)
    found = Study(title, len(model.model.layers), states, changes, text=read)
    values, _ = found.scores()
    choice = None
    if attention_layers(model):
        choice = settings.choice(model.config, values, found.distances())
    groups: Sequence[Group] = ()
    if settings.groups is not None:
        groups = donor_groups(found.distances()["all_tokens"], settings.groups)
    return replace(found, choice=choice, groups=groups)


def _digest(
    model: TambaForCausalLM,
    score: TokenBlocks,
    fit: TokenBlocks | None,
    settings: Settings,
    probe: Probe | None,
    student: TambaForCausalLM | None,
) -> str:
    """SHA-256 of everything that finished effects depend on."""
    digest = hashlib.sha256()
    for blocks in (score, fit, None if probe is None else probe.blocks):
        if blocks is not None:
            digest.update(blocks.tokens.numpy().tobytes() + blocks.starts.numpy().tobytes())
    if probe is not None:
        digest.update(probe.answers.numpy().tobytes())
    for one in (model, student):
        if one is not None:
            config = one.config.to_diff_dict()
            digest.update(json.dumps(config, sort_keys=True, default=str).encode())
            for name, weight in one.state_dict().items():
                digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
                digest.update(weight.detach().cpu().flatten().view(torch.uint8).numpy())
    told = [settings.convert.model_dump(), settings.seed, str(settings.dtype)]
    digest.update(json.dumps(told).encode())
    return digest.hexdigest()


# The artefact.


def scores_json(found: Study) -> dict[str, Any]:
    """What ``scores.json`` holds.

    ``angular_distance`` and ``kernel_similarity`` are lists [l][n-1], with their standard errors
    beside them; every other score is a list, a value a layer, whose errors are under
    ``standard_error``.
    """
    values, errors = found.scores()
    out: dict[str, Any] = {"model": found.model, "layers": found.n_layers, "text": found.text}
    if found.states is not None:
        out |= tables_json(found.states)
    out |= values
    out["standard_error"] = errors
    out["rank_correlation"] = rank_correlations(values)
    if found.choice is not None:
        out["choice"] = {"strategy": found.choice.strategy, "layers": list(found.choice.layers)}
    if found.groups:
        out["groups"] = [{"first": g.first, "last": g.last, "turn": g.turn} for g in found.groups]
    return out


def tables_json(states: StateScores) -> dict[str, Any]:
    """What ``scores.json`` holds of every two states, and of the final norm."""
    return {
        "angular_distance": states.distances()
        | {
            "standard_error": {
                "all_tokens": _numbers(states.all_tokens.error),
                "last_token": _numbers(states.last_token.error),
            }
        },
        "kernel_similarity": {
            "all_tokens": _numbers(states.kernel_similarity.mean),
            "standard_error": {"all_tokens": _numbers(states.kernel_similarity.error)},
        },
        "after_final_norm": _listed(states.after_norm.mean),
    }


def _numbers(table: Tensor) -> list[list[float | None]]:
    return [[_number(v) for v in row] for row in triangle(table)]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def files_of(found: Study, plan: str | None = None) -> dict[str, str | bytes]:
    """The artefact by file name: ``scores.json``, ``report.md``, pictures, ``plan.toml``.

    Args:
        plan: text of the plan, where there is one.
    """
    values, errors = found.scores()
    files: dict[str, str | bytes] = {"scores.json": json.dumps(scores_json(found), indent=1) + "\n"}
    entries: list[tuple[str, int]] = []
    if found.choice is not None:
        chosen = found.choice.layers
        entries = [("convert" if i in chosen else "keep", i) for i in range(found.n_layers)]
    bars = {name: (values[name], errors[name]) for name in values}
    drawn = pictures(found.title, found.distances(), bars, entries)
    files |= drawn
    if plan is not None:
        files["plan.toml"] = plan
    files["report.md"] = report(found, [name[:-4] for name in drawn if name.endswith(".png")])
    return files


def pictures(
    title: str,
    tables: Mapping[str, Table],
    bars: Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]],
    entries: Sequence[tuple[str, int]],
) -> dict[str, bytes]:
    """Heat maps, bars and a plan as PNG and SVG by file name, of what is given.

    Args:
        title: the model's name.
        tables: distances [l][n-1] by name.
        bars: by score, a value and a standard error a layer.
        entries: of the plan: action and layer.

    Raises:
        UserError: matplotlib is not installed.
    """
    figures = {}
    if tables:
        named = {name.replace("_", " "): table for name, table in tables.items()}
        figures["distances"] = heat_maps(named, f"Angular distance, {title}")
    chosen = [layer for action, layer in entries if action == "convert"]
    limits = {name: RATIO_LIMIT for name in bars if name.endswith("_ratio")}
    figures["scores"] = score_bars(bars, f"Scores by layer, {title}", chosen, limits)
    if entries:
        figures["plan"] = plan_stack(entries, "Plan")
    return {
        f"{name}.{ending}": to_bytes(figure, ending)
        for name, figure in figures.items()
        for ending in ("png", "svg")
    }


def report(found: Study, pictures: Sequence[str] = ()) -> str:
    """The page for people, in Markdown: scores, where they disagree, and what was chosen."""
    values, errors = found.scores()
    text = ", ".join(f"{key} {value}" for key, value in found.text.items())
    lines = [f"# Layers of {found.title}", "", f"Text: {text}." if text else "", ""]
    if found.choice is not None:
        layers = ", ".join(map(str, found.choice.layers)) or "none"
        lines += [f"Chosen by `{found.choice.strategy}`: {layers}.", ""]
    if found.groups:
        words = "; ".join(f"{g} (turns {g.turn:.3f})" for g in found.groups)
        lines += [f"Candidate groups: {words}.", ""]
    lines += [f"![{name}]({name}.png)" for name in pictures]
    lines += ["", "## Scores", "", "Higher matters more; two standard errors behind ±.", ""]
    lines += ["| layer | " + " | ".join(values) + " |", "|---" * (len(values) + 1) + "|"]
    for i in range(found.n_layers):
        cells = [_cell(values[name][i], errors[name][i]) for name in values]
        lines.append(f"| {i} | " + " | ".join(cells) + " |")
    lines += ["", "## Agreement", "", "Spearman's rank correlation above the diagonal, Kendall's"]
    lines += ["below it; 1 ranks layers alike, 0 has nothing to do with it.", ""]
    lines += ["| | " + " | ".join(values) + " |", "|---" * (len(values) + 1) + "|"]
    both = rank_correlations(values)
    names = list(values)
    for r, a in enumerate(names):
        cells = []
        for c, b in enumerate(names):
            value = both["spearman" if c > r else "kendall"][a][b]
            cells.append("" if r == c else "-" if value is None else f"{value:.2f}")
        lines.append(f"| {a} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None, error: float | None) -> str:
    if value is None:
        return ""
    shown = f"{value:.3g}"
    return shown if error is None else f"{shown} ± {2 * error:.1g}"
