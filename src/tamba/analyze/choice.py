"""From scores to plans: which layers to replace, under a budget, and with what.

A strategy is written as words, as in ``lowest least_squares``; `STRATEGIES` says what each does.
This file knows layer numbers, scores and bytes, nothing of models or text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise

from tamba.errors import UserError, nearest
from tamba.model.config import AttentionSpec, TambaConfig
from tamba.plan import ConvertOptions, LayerPlan, PlanEntry, uniform_plan
from tamba.surgery import converted_block

Scores = Mapping[str, Sequence[float | None]]
"""Score of each layer by name, higher where it matters more; None where there is none."""
Table = Sequence[Sequence[float]]
"""Distances [l][n-1], rows of falling length."""

RATIO_LIMIT = 50.0
"""Largest ratio of two scores: where the lower one is hardly above zero it is noise."""
_JAMBA_PERIOD, _JAMBA_PLACE = 8, 4

STRATEGIES = {
    "lowest SCORE": "layers of the lowest score, as many as the budget asks for",
    "ratio A/B": "layers whose score A is lowest beside their score B",
    "sum A + 0.25 B": "layers whose sum of weighted scores is lowest, of as many scores as named",
    "uniform": "at even distances, the last layer kept (The Mamba in the Llama)",
    "explicit 3,5,7": "these layers",
    "e-tamba [SCORE]": "the neighbouring layers of the lowest score, the last layer kept (E-Tamba)",
    "gromov [last_token|all_tokens]": "the block that turns the stream least (Gromov et al.)",
    "top": "from the last layer down (Sajjad et al.)",
    "bottom": "from the first layer up (Sajjad et al.)",
    "alternate [even|odd]": "every other layer, from the top (Sajjad et al.; counted from 1)",
    "symmetric": "from the middle outwards (Sajjad et al.)",
    "contribution": "layers that change the stream least (Sajjad et al.)",
    "jamba": "all but one layer in eight (Jamba)",
}
"""How a strategy is written -> what it replaces."""


@dataclass(frozen=True)
class Facts:
    """What a choice has to know of a model.

    Args:
        n_layers: of the model.
        free: layers that may be replaced.
        kept_bytes: cache of each layer as it is, for one sequence.
        replaced_bytes: cache of each layer once it is replaced.
        always_keep: layers that stay because somebody asked for it.
    """

    n_layers: int
    free: tuple[int, ...]
    kept_bytes: tuple[int, ...] = ()
    replaced_bytes: tuple[int, ...] = ()
    always_keep: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        config: TambaConfig,
        options: ConvertOptions,
        *,
        always_keep: Sequence[int] = (),
        context: int = 8192,
        bytes_per_value: int = 2,
    ) -> Facts:
        """Of a model whose attention layers may be converted.

        Args:
            always_keep: layers that stay as they are.
            context: tokens of the sequence whose cache is counted.
            bytes_per_value: of keys, values and convolution states; SSM states are float32.
        """
        specs = config.block_specs
        free = [
            i
            for i, spec in enumerate(specs)
            if isinstance(spec.mixer, AttentionSpec) and i not in always_keep
        ]
        kept = [spec.cache_bytes(context, bytes_per_value) for spec in specs]
        replaced = list(kept)
        for i in free:
            made = converted_block(specs[i], options, config.d_model)
            replaced[i] = made.cache_bytes(context, bytes_per_value)
        return cls(len(specs), tuple(free), tuple(kept), tuple(replaced), tuple(always_keep))

    def why_not(self, layer: int) -> str:
        """Why a layer that is not free may not be replaced."""
        return "is kept, as asked" if layer in self.always_keep else "has no attention"

    def cache_bytes(self, chosen: Sequence[int]) -> int:
        """Cache of one sequence once `chosen` are replaced."""
        some = set(chosen)
        return sum(
            self.replaced_bytes[i] if i in some else self.kept_bytes[i]
            for i in range(self.n_layers)
        )


@dataclass(frozen=True)
class Budget:
    """How much to replace: so many layers, or as few as bring the cache down to so many bytes."""

    layers: int | None = None
    cache_bytes: int | None = None


@dataclass(frozen=True)
class Choice:
    """Layers to replace, bottom first, and the words of the strategy that chose them."""

    strategy: str
    layers: tuple[int, ...]
    why: Mapping[int, str] = field(default_factory=dict)


Pick = Callable[[int], Sequence[int]]
"""The n layers that a strategy would replace."""


def choose(
    strategy: str,
    facts: Facts,
    budget: Budget,
    scores: Scores | None = None,
    distances: Mapping[str, Table] | None = None,
) -> Choice:
    """The layers that a strategy replaces.

    Args:
        strategy: as in `STRATEGIES`.
        budget: ``explicit`` and ``jamba`` have their own number of layers and only look whether it
            is kept to.
        scores: by name, for strategies that go by them.
        distances: ``all_tokens`` and ``last_token``, for ``gromov``.

    Raises:
        UserError: an unknown strategy or score, a layer that is not there or has no attention, more
            layers than there are, or a cache that no replacement makes so small.
    """
    where = f"strategy '{strategy}'"
    word, _, argument = strategy.strip().partition(" ")
    argument = argument.strip()
    known = {usage.partition(" ")[0]: usage for usage in STRATEGIES}
    if word not in known:
        raise UserError(where, f"there is none called '{word}'", nearest(word, known))
    if argument and known[word] == word:
        remedy = "the budget says how many layers are replaced"
        raise UserError(where, f"'{argument}' after '{word}' means nothing", remedy)
    scores, distances = scores or {}, distances or {}
    if word in ("explicit", "jamba"):
        if word == "explicit":
            fixed = _explicit(argument, facts, where)
        else:
            fixed = [i for i in facts.free if i % _JAMBA_PERIOD != _JAMBA_PLACE]
        _check_fixed(fixed, facts, budget, where)
        return Choice(strategy, tuple(sorted(fixed)))
    why: dict[int, str] = {}
    match word:
        case "lowest" | "contribution":
            name = argument if word == "lowest" else "block_influence"
            pick = _lowest(_score(name, scores, facts, where), why, name)
        case "ratio":
            pick = _lowest(_ratio(argument, scores, facts, where), why, argument)
        case "sum":
            pick = _lowest(_sum(argument, scores, facts, where), why, argument)
        case "e-tamba":
            name = argument or "column_mean"
            pick = _run(_score(name, scores, facts, where), facts, where, why, name)
        case "gromov":
            pick = _block(argument or "last_token", distances, facts, where, why)
        case "uniform":
            pick = _uniform(facts)
        case _:
            pick = _in_order(_order(word, argument, facts, where))
    return Choice(strategy, tuple(sorted(_spend(pick, facts, budget, where))), why)


def _spend(pick: Pick, facts: Facts, budget: Budget, where: str) -> Sequence[int]:
    """As many layers as the budget asks for."""
    if budget.layers is None and budget.cache_bytes is None:
        raise UserError(where, "does not say how many layers", "give a budget of layers or bytes")
    most = len(facts.free)
    if budget.layers is not None:
        if not 0 <= budget.layers <= most:
            raise UserError(
                where,
                f"{budget.layers} layers are to be replaced and {most} can be",
                "replace fewer or keep fewer",
            )
        chosen = pick(budget.layers)
        _check_fixed(chosen, facts, replace(budget, layers=None), where)
        return chosen
    assert budget.cache_bytes is not None
    for n in range(most + 1):
        chosen = pick(n)
        if facts.cache_bytes(chosen) <= budget.cache_bytes:
            return chosen
    raise _too_large(chosen, facts, budget, where)


def _check_fixed(chosen: Sequence[int], facts: Facts, budget: Budget, where: str) -> None:
    if budget.layers is not None and len(chosen) != budget.layers:
        raise UserError(
            where,
            f"replaces {len(chosen)} layers, not {budget.layers}",
            "leave the number of layers out, or choose another strategy",
        )
    if budget.cache_bytes is not None and facts.cache_bytes(chosen) > budget.cache_bytes:
        raise _too_large(chosen, facts, budget, where)


def _too_large(chosen: Sequence[int], facts: Facts, budget: Budget, where: str) -> UserError:
    return UserError(
        where,
        f"leaves a cache of {facts.cache_bytes(chosen):,} bytes with {len(chosen)} layers replaced,"
        f" above {budget.cache_bytes:,}",
        "allow more bytes, or keep fewer layers",
    )


def _explicit(argument: str, facts: Facts, where: str) -> list[int]:
    words = argument.replace(",", " ").split()
    if not words or not all(word.isdigit() for word in words):
        raise UserError(where, "names no layers", "write e.g. 'explicit 3,5,7'")
    for layer in map(int, words):
        if layer >= facts.n_layers:
            raise UserError(
                where, f"there is no layer {layer}", f"they are 0 to {facts.n_layers - 1}"
            )
        if layer not in facts.free:
            raise UserError(where, f"layer {layer} {facts.why_not(layer)}", "leave it out")
    return sorted(set(map(int, words)))


def _score(name: str, scores: Scores, facts: Facts, where: str) -> dict[int, float]:
    """The score of every layer that may be replaced."""
    if name not in scores:
        hint = nearest(name, scores) if scores else "measure it first"
        raise UserError(where, f"there is no score '{name}'", hint)
    found = {i: scores[name][i] for i in facts.free}
    missing = [i for i, value in found.items() if value is None or not math.isfinite(value)]
    if missing:
        raise UserError(
            where, f"layer {missing[0]} has no score '{name}'", "choose another or keep it"
        )
    return {i: value for i, value in found.items() if value is not None}


def _ratio(argument: str, scores: Scores, facts: Facts, where: str) -> dict[int, float]:
    over, slash, under = (part.strip() for part in argument.partition("/"))
    if not slash:
        raise UserError(where, "names no two scores", "write e.g. 'ratio drop_recall/drop_loss'")
    a, b = (_score(name, scores, facts, where) for name in (over, under))
    return {i: ratio(value, b[i]) for i, value in a.items()}


def ratio(over: float, under: float) -> float:
    """Of two changes, 0 where nothing is lost, and no more than `RATIO_LIMIT`."""
    if over <= 0.0:
        return 0.0
    # Exactly the limit: what is cut off is told by it.
    return over / under if under > over / RATIO_LIMIT else RATIO_LIMIT


def _sum(argument: str, scores: Scores, facts: Facts, where: str) -> dict[int, float]:
    total = dict.fromkeys(facts.free, 0.0)
    for part in argument.split("+"):
        *before, name = part.split() or [""]
        try:
            weight = float(before[0]) if before else 1.0
        except ValueError:
            weight = math.nan
        if len(before) > 1 or not math.isfinite(weight):
            hint = "write e.g. 'sum least_squares + 0.25 least_squares_recall'"
            raise UserError(where, f"'{part.strip()}' is no weight and score", hint)
        for i, value in _score(name, scores, facts, where).items():
            total[i] += weight * value
    return total


def _lowest(score: Mapping[int, float], why: dict[int, str], name: str) -> Pick:
    why |= {i: f"{name} {value:.4g}" for i, value in score.items()}
    return _in_order(sorted(score, key=lambda i: (score[i], i)))


def _in_order(order: Sequence[int]) -> Pick:
    return lambda n: order[:n]


def _order(word: str, argument: str, facts: Facts, where: str) -> list[int]:
    """Sajjad et al. 2023 (arXiv 2004.03844, section 3), over the layers that may be replaced."""
    down = sorted(facts.free, reverse=True)
    if word == "top":
        return down
    if word == "bottom":
        return down[::-1]
    if word == "symmetric":
        middle = (facts.n_layers - 1) / 2
        return sorted(down, key=lambda i: abs(i - middle))
    parity = argument or "odd"
    if parity not in ("even", "odd"):
        raise UserError(where, f"'{argument}' is neither even nor odd")
    # Of layers counted from 1.
    first = [i for i in down if (i + 1) % 2 == (parity == "odd")]
    return first + [i for i in down if i not in first]


def _uniform(facts: Facts) -> Pick:
    """As `uniform_plan`, among the layers that may be replaced."""
    free = facts.free

    def pick(n: int) -> list[int]:
        if not free:
            return []
        plan = uniform_plan(len(free), Fraction(len(free) - n, len(free)))
        return [free[i] for i in plan.converted]

    return pick


def _run(
    score: Mapping[int, float], facts: Facts, where: str, why: dict[int, str], name: str
) -> Pick:
    """Neighbours of the lowest sum among all layers but the last."""
    why |= {i: f"{name} {value:.4g}" for i, value in score.items()}

    def pick(n: int) -> list[int]:
        runs = [r for r in _runs(facts, n) if not n or r[-1] != facts.n_layers - 1]
        if not runs:
            raise _no_run(n, where, " below the last")
        return min(runs, key=lambda run: sum(score[i] for i in run))

    return pick


def _block(
    which: str, distances: Mapping[str, Table], facts: Facts, where: str, why: dict[int, str]
) -> Pick:
    """The n layers from l on with the least d(l, n)."""
    if which not in distances:
        hint = nearest(which, distances) if distances else "measure them first"
        raise UserError(where, f"there are no distances '{which}'", hint)
    table = distances[which]

    def pick(n: int) -> list[int]:
        runs = _runs(facts, n)
        if not runs:
            raise _no_run(n, where, "")
        if not n:
            return []
        best = min(runs, key=lambda run: table[run[0]][n - 1])
        together = f"together turn by {table[best[0]][n - 1]:.4g}"
        why.clear()
        why.update(dict.fromkeys(best, f"{best[0]} to {best[-1]} {together} ({which})"))
        return best

    return pick


def _runs(facts: Facts, n: int) -> list[list[int]]:
    """Every run of n neighbouring layers that may all be replaced."""
    free = set(facts.free)
    starts = range(facts.n_layers - n + 1)
    runs = [list(range(first, first + n)) for first in starts] if n else [[]]
    return [run for run in runs if free.issuperset(run)]


def _no_run(n: int, where: str, place: str) -> UserError:
    return UserError(
        where, f"no {n} neighbouring layers{place} can all be replaced", "replace fewer"
    )


def plan_of(choice: Choice, facts: Facts, options: ConvertOptions) -> LayerPlan:
    """The plan that converts the chosen layers, with the reason beside each line."""
    entries = tuple(
        PlanEntry(
            "convert" if i in choice.layers else "keep",
            i,
            note=choice.why.get(i, "" if i in facts.free else facts.why_not(i)),
        )
        for i in range(facts.n_layers)
    )
    return LayerPlan(entries, options, name=choice.strategy)


# Layers of a donor.


@dataclass(frozen=True)
class Group:
    """Neighbouring layers of a donor, `first` to `last`, and the angle that they turn the stream by
    together."""

    first: int
    last: int
    turn: float

    @property
    def layers(self) -> range:
        return range(self.first, self.last + 1)

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


def donor_groups(table: Table, size: int, *, count: int | None = None) -> list[Group]:
    """Candidate runs of `size` layers, bottom first: those that together turn the stream most.

    Neighbouring groups may share one layer, as the groups of *E-Tamba* do (3-14, 14-25, 25-36 and
    36-47 of 48 layers for size 12); otherwise they do not overlap. Of all ways to lay `count`
    groups over the layers, the one with the largest sum of turns d(first, size) is taken, and the
    highest of equals.

    Args:
        table: distances of the donor.
        count: how many; None for as many as there is room for.

    Raises:
        UserError: a group larger than the donor, or more groups than fit.
    """
    L = len(table)
    if not 1 <= size <= L:
        raise UserError("donor", f"has {L} layers, no group of {size}", "ask for fewer layers")
    step = max(1, size - 1)
    room = (L - size) // step + 1
    count = room if count is None else count
    if not 1 <= count <= room:
        raise UserError("donor", f"{count} groups of {size} do not fit {L} layers", f"up to {room}")
    turns = [table[first][size - 1] for first in range(L - size + 1)]
    # best[k][s]: the largest sum of k groups that begin at layer s or above, and the first of them.
    starts = len(turns)
    best = [[(0.0, -1)] * (starts + step + 1)]
    for k in range(1, count + 1):
        row = [(-math.inf, -1)] * (starts + step + 1)
        for s in range(starts - 1, -1, -1):
            taken = turns[s] + best[k - 1][min(s + step, starts + step)][0]
            row[s] = (taken, s) if taken > row[s + 1][0] else row[s + 1]
        best.append(row)
    groups, at = [], 0
    for k in range(count, 0, -1):
        first = best[k][at][1]
        groups.append(Group(first, first + size - 1, turns[first]))
        at = first + step
    return groups


def transplant_plans(
    n_teacher: int,
    replaced: Sequence[int],
    groups: Sequence[Group],
    controls: Sequence[int] | None = None,
) -> dict[str, LayerPlan]:
    """One plan a group, with the group in the place of `replaced` teacher layers, and two controls.

    Args:
        n_teacher: layers of the teacher.
        replaced: neighbouring teacher layers that go.
        groups: of the donor.
        controls: donor layers that the control ``fresh`` reinitializes; those of the first group if
            None. The control ``none`` puts nothing there.

    Raises:
        UserError: layers that are not there or are no neighbours, or nothing is kept.
    """
    run = sorted(replaced)
    if not run or any(high != low + 1 for low, high in pairwise(run)):
        raise UserError("plan", f"{run} are no neighbouring layers", "name a run, e.g. 12 to 22")
    if run[0] < 0 or run[-1] >= n_teacher:
        raise UserError(
            "plan", f"the teacher has no layers {run[0]} to {run[-1]}", f"0 to {n_teacher - 1}"
        )
    if len(run) == n_teacher:
        raise UserError("plan", "keeps no layer of the teacher", "replace fewer")
    fresh = groups[0].layers if controls is None and groups else controls or ()

    def plan(name: str, middle: Sequence[PlanEntry]) -> LayerPlan:
        below = [PlanEntry("keep", i) for i in range(run[0])]
        above = [PlanEntry("keep", i) for i in range(run[-1] + 1, n_teacher)]
        return LayerPlan((*below, *middle, *above), name=name)

    plans = {
        str(group): plan(
            str(group),
            [PlanEntry("transplant", i, note=f"turns {group.turn:.3f}") for i in group.layers],
        )
        for group in groups
    }
    plans["none"] = plan("none", [])
    plans["fresh"] = plan("fresh", [PlanEntry("reinitialize", i) for i in fresh])
    return plans


# Agreement.


def rank_correlations(scores: Scores) -> dict[str, dict[str, dict[str, float | None]]]:
    """Spearman's rho and Kendall's tau-b of every two scores, over layers that have both.

    None where one of them is the same everywhere.
    """
    out: dict[str, dict[str, dict[str, float | None]]] = {"spearman": {}, "kendall": {}}
    for a, first in scores.items():
        for kind in out:
            out[kind][a] = {}
        for b, second in scores.items():
            both = [
                (x, y)
                for x, y in zip(first, second, strict=True)
                if x is not None and y is not None
            ]
            out["spearman"][a][b] = _pearson(
                _ranks([x for x, _ in both]), _ranks([y for _, y in both])
            )
            out["kendall"][a][b] = _kendall(both)
    return out


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equals share their mean."""
    return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def _pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    n = len(x)
    if n < 2:
        return None
    mx, my = sum(x) / n, sum(y) / n
    xx, yy = sum((v - mx) ** 2 for v in x), sum((v - my) ** 2 for v in y)
    if xx == 0 or yy == 0:
        return None
    xy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return max(-1.0, min(1.0, xy / math.sqrt(xx * yy)))


def _kendall(both: Sequence[tuple[float, float]]) -> float | None:
    agree = told_x = told_y = 0
    for i, (x, y) in enumerate(both):
        for a, b in both[:i]:
            dx, dy = (x > a) - (x < a), (y > b) - (y < b)
            agree += dx * dy
            told_x += dx != 0
            told_y += dy != 0
    return None if not told_x or not told_y else agree / math.sqrt(told_x * told_y)
