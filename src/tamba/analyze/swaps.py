"""What converting a layer does: how a recipe's analysis scores layers and chooses among them.

The score that counts is the harm done: how far the teacher's next-token distribution moves when one
layer's attention is replaced by the mixer that a conversion would put there, as it is (``swap``) or
after its closed-form fit (``least_squares``). Layers below the replaced one need not run again.

Shape letters: `n` rows, `T` tokens of a row, `L` layers, `D` d_model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tamba.analyze.choice import Choice, Facts, plan_of
from tamba.analyze.distances import StateScores, state_scores
from tamba.calibrate import calibrate, can_calibrate, fit_output
from tamba.data import Batch, TokenBlocks
from tamba.errors import UserError
from tamba.model.attention import Attention
from tamba.model.block import Block
from tamba.model.modeling import TambaForCausalLM
from tamba.model.recurrent import RecurrentMixer
from tamba.ops.losses import Weights, next_token_loss
from tamba.plan import ConvertOptions, LayerPlan
from tamba.progress import track
from tamba.recipe import Recipe
from tamba.surgery import convert_layer
from tamba.trace import Trace, climb, computing, each, enter, finish, trace

QUICK_STATE_SCORES = ("own_turn", "column_mean")
"""What a recipe may take for `score` beside the harm of a conversion."""
DTYPE = torch.bfloat16
"""Of matrix products, where weights are wider: scores need two digits."""
HELD_BYTES = 3 << 30
"""Activations held at once."""
_STRIDE = 2
"""Every which predicted position is scored: neighbours say much the same, and the head costs as
much as half of the layers."""


Harm = tuple[float, float | None]
"""A score of a layer, and its standard error over rows; None for a single row."""


def scored_places(batch: Batch, row: int) -> Tensor:
    """[k] positions of a batch of one row, number `row` of the text, whose predictions count."""
    return batch.predicted[0].nonzero()[row % _STRIDE :: _STRIDE, 0]


def over_rows(rows: Tensor) -> Harm:
    """Mean of [n], a value a row, and its standard error."""
    n = len(rows)
    return float(rows.mean()), None if n < 2 else float(rows.std() / math.sqrt(n))


def row_kl(
    changed: TambaForCausalLM,
    reference: TambaForCausalLM,
    ours: Tensor,
    theirs: Tensor,
    here: Tensor,
) -> Tensor:
    """KL(reference, changed) of one row at the places `here`, in nats a token, float64.

    Args:
        ours: [1, T, D], the last states of `changed`.
        theirs: [1, T, D'], the last states of `reference`.
    """
    return next_token_loss(
        finish(changed, ours)[0, here],
        changed.lm_head.weight,
        teacher_hidden=finish(reference, theirs)[0, here],
        teacher_head=reference.lm_head.weight,
    ).double()


@dataclass(frozen=True)
class Analysis:
    """What was found about each layer.

    Args:
        score: the name of the score, as in the recipe.
        scores: by layer, bottom first; None for layers that cannot be converted or are to be kept.
            ``swap`` and ``least_squares`` are KL(teacher, changed teacher) in nats a token, the
            others angles from 0 to 1.
        order: layers that may be converted, least harm first.
        plan: the chosen conversion.
        frontier: (layers converted, perplexity ratio) on the text scored on, in `order` and without
            any training.
        errors: standard errors of `scores` over rows of text; None for a single row.
        states: scores of hidden states, where `score` is one of them.
    """

    score: str
    scores: list[float | None]
    order: list[int]
    plan: LayerPlan
    frontier: list[tuple[int, float]]
    errors: list[float | None]
    states: StateScores | None = None


def analyze_model(teacher: TambaForCausalLM, blocks: TokenBlocks, recipe: Recipe) -> Analysis:
    """Score the layers of a model in memory; see `analyze`.

    Args:
        teacher: left as it is.
        blocks: text, of which ``analyze.tokens`` are scored on and as many fitted on.
        recipe: its ``analyze`` and ``build.convert`` sections decide.
    """
    wanted, options = recipe.analyze, recipe.build.convert
    fit, score = divided(blocks, wanted.tokens)
    facts = Facts.of(teacher.config, options, always_keep=wanted.always_keep)
    states = None
    frontier: list[tuple[int, float]] = []
    if wanted.score in QUICK_STATE_SCORES:
        states = state_scores(teacher, score, dtype=DTYPE, label="angles")
        turns = states.own_turn if wanted.score == "own_turn" else states.column_mean
        found = {i: (float(turns.mean[i]), _finite(float(turns.error[i]))) for i in facts.free}
    else:
        closed = fit if wanted.score == "least_squares" else None
        replaced, found = swap_scores(teacher, facts.free, options, score, closed, recipe.seed)
        order = sorted(found, key=lambda i: (found[i][0], i))
        counts = {round(wanted.convert * share) for share in (0.5, 1.0, 1.5, 2.0)}
        counts = {n for n in counts if 0 < n <= len(order)}
        frontier = perplexity_ratios(
            teacher, {n: {i: replaced[i] for i in order[:n]} for n in sorted(counts)}, score
        )
    order = sorted(found, key=lambda i: (found[i][0], i))
    why = {i: f"{wanted.score} {value:.4f}" for i, (value, _) in found.items()}
    choice = Choice(f"lowest {wanted.score}", tuple(sorted(order[: wanted.convert])), why)
    nothing = (None, None)
    scores, errors = zip(*(found.get(i, nothing) for i in range(facts.n_layers)), strict=True)
    plan = plan_of(choice, facts, options)
    return Analysis(wanted.score, [*scores], order, plan, frontier, [*errors], states)


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def divided(blocks: TokenBlocks, tokens: int) -> tuple[TokenBlocks, TokenBlocks]:
    """Rows to fit on and other rows to score on, `tokens` of each where there are so many.

    Raises:
        UserError: fewer than two rows.
    """
    if len(blocks) < 2:
        raise UserError(
            "text",
            f"is {len(blocks)} row, which cannot be divided into text to fit and text to score on",
            "give more text, or shorter rows",
        )
    n = max(1, min(tokens // blocks.length, len(blocks) // 2))
    parts = (slice(0, n), slice(n, 2 * n))
    first, second = (
        TokenBlocks(blocks.tokens[part], blocks.starts[part], n * blocks.length) for part in parts
    )
    return first, second


def scored_rows(blocks: TokenBlocks, tokens: int) -> TokenBlocks:
    """Rows to score on where nothing is fitted: those of `divided` as far as there are so many."""
    n = min(max(1, tokens // blocks.length), len(blocks))
    first = min(n, len(blocks) - n)
    part = slice(first, first + n)
    return TokenBlocks(blocks.tokens[part], blocks.starts[part], n * blocks.length)


def bad_rows(stream: Tensor) -> list[int]:
    """Rows of [n, T, D] that hold a number that is not finite."""
    return [row for row, x in enumerate(stream) if not bool(torch.isfinite(x).all())]


def check_finite(
    model: TambaForCausalLM, top: Tensor, blocks: TokenBlocks, dtype: torch.dtype | None
) -> None:
    """Refuse numbers that are not finite, naming the lowest layer that gives them.

    Args:
        top: [n, T, D], what the last layer gives.
    """
    bad = bad_rows(top)
    if not bad:
        return
    row = TokenBlocks(blocks.tokens[bad[:1]], blocks.starts[bad[:1]], blocks.length)
    n_layers = len(model.model.layers)
    streams = trace(model, row, streams=range(n_layers + 1), dtype=dtype).streams
    first = next((i for i in range(n_layers + 1) if bad_rows(streams[i])), n_layers)
    raise UserError(
        f"{model.config.name_or_path or 'model'}: "
        + (f"layer {first - 1}" if first else "embedding"),
        f"gives a hidden state that is not a finite number, in row {bad[0]}",
        "check the weights, or compute in a wider type",
    )


def swap_scores(
    teacher: TambaForCausalLM,
    layers: Sequence[int],
    options: ConvertOptions,
    blocks: TokenBlocks,
    fit: TokenBlocks | None = None,
    seed: int = 0,
) -> tuple[dict[int, Block], dict[int, Harm]]:
    """KL(teacher, teacher with one layer converted), in nats a token, for each of `layers`.

    Args:
        layers: attention layers.
        options: how each is converted.
        blocks: text to score on.
        fit: text for the closed-form fit of the converted layer; None to leave it as converted.
            Mixers that `calibrate` does not know are fitted in their output projection.
        seed: of what the conversion draws.

    Raises:
        UserError: hidden states that are not finite (which layer, which row), or nothing to score.

    Returns:
        The converted layer, and the score with its standard error, by layer.
    """
    L, D = teacher.config.num_hidden_layers, teacher.config.hidden_size
    n_tokens = len(blocks) * blocks.length + (0 if fit is None else 2 * len(fit) * fit.length)
    size = max(1, HELD_BYTES // (4 * D * n_tokens))
    converted: dict[int, Block] = {}
    scores: dict[int, Harm] = {}
    for first in range(0, len(layers), size):
        some = layers[first : first + size]
        reference = trace(teacher, blocks, streams=[*some, L], dtype=DTYPE)
        if first == 0:
            check_finite(teacher, reference.streams[L], blocks, DTYPE)
        seen = _seen(teacher, some, fit)

        def one(
            index: int, _: Any, reference: Trace = reference, seen: Trace = seen
        ) -> tuple[Block, Harm]:
            layer = _converted(teacher, index, options, seen, seed)
            return layer, _harm(teacher, {index: layer}, blocks, reference, index)

        found = each(one, some, device=teacher.device, label="score layers")
        for index, (layer, score) in zip(some, found, strict=True):
            converted[index], scores[index] = layer, score
    return converted, scores


def converted_layers(
    teacher: TambaForCausalLM,
    layers: Sequence[int],
    options: ConvertOptions,
    fit: TokenBlocks | None = None,
    seed: int = 0,
) -> dict[int, Block]:
    """Each of `layers` converted, and fitted on `fit` where it is given, as `swap_scores` does."""
    D = teacher.config.hidden_size
    n_tokens = 1 if fit is None else len(fit) * fit.length
    size = max(1, HELD_BYTES // (8 * D * n_tokens))
    made: dict[int, Block] = {}
    for first in range(0, len(layers), size):
        some = layers[first : first + size]
        seen = _seen(teacher, some, fit)

        def one(index: int, _: Any, seen: Trace = seen) -> Block:
            return _converted(teacher, index, options, seen, seed)

        found = each(one, some, device=teacher.device, label="convert layers")
        made |= dict(zip(some, found, strict=True))
    return made


def _seen(teacher: TambaForCausalLM, layers: Sequence[int], fit: TokenBlocks | None) -> Trace:
    """What the mixers of `layers` do on the text to fit on; nothing where there is none."""
    if fit is None:
        return Trace()
    return trace(teacher, fit, mixers=layers, heads=True, dtype=DTYPE)


def _converted(
    teacher: TambaForCausalLM, index: int, options: ConvertOptions, seen: Trace, seed: int
) -> Block:
    """A layer converted, and fitted to what was seen of it."""
    original = teacher.model.layers[index]
    assert isinstance(original, Block)
    layer = convert_layer(original, teacher.config, options, index, seed=seed)
    if index in seen.mixers:
        _fit(teacher, layer, index, seen)
    return layer


def _fit(teacher: TambaForCausalLM, layer: Block, index: int, seen: Trace) -> None:
    attention = teacher.model.layers[index].mixer
    assert isinstance(attention, Attention)
    key = attention.rotary_key
    angles = None if key is None else teacher.model._rotary[key]
    layer.requires_grad_(False)
    mixer = layer.mixer
    assert isinstance(mixer, RecurrentMixer)
    if can_calibrate(layer.spec.mixer, attention.spec):
        calibrate(mixer, attention, angles, seen.mixers[index], dtype=DTYPE)
    else:
        fit_output(mixer, seen.mixers[index], dtype=DTYPE)


def _harm(
    teacher: TambaForCausalLM,
    replaced: Mapping[int, Block],
    blocks: TokenBlocks,
    reference: Trace,
    first: int,
) -> Harm:
    """KL of the teacher with layers replaced, from the stream before layer `first` on."""
    top = reference.streams[len(teacher.model.layers)]
    rows = []
    with computing(teacher, DTYPE):
        for row, batch in enumerate(blocks.batches(1)):
            batch = batch.to(teacher.device)
            _, tokens = enter(teacher, batch)
            stream = reference.streams[first][row : row + 1]
            stream = _climb(teacher, replaced, stream, tokens, first)
            here = scored_places(batch, row)
            if len(here):
                rows.append(row_kl(teacher, teacher, stream, top[row : row + 1], here))
    if not rows:
        raise UserError("text", "holds no token to score", "give longer documents")
    each_row = torch.stack(rows).cpu()
    if len(wrong := (~torch.isfinite(each_row)).nonzero()):
        raise UserError(
            f"layer {', '.join(map(str, replaced))} converted",
            f"gives no finite numbers in row {int(wrong[0])}",
            "keep it with analyze.always_keep, or convert it another way",
        )
    return over_rows(each_row)


def _climb(
    teacher: TambaForCausalLM,
    replaced: Mapping[int, Block],
    hidden: Tensor,
    tokens: Any,
    first: int,
) -> Tensor:
    """To the top from layer `first`, through `replaced` in place of the layers of those numbers."""
    at = first
    for index in sorted(replaced):
        hidden = climb(teacher, hidden, tokens, at, index)
        hidden = replaced[index](hidden, None, tokens)
        at = index + 1
    return climb(teacher, hidden, tokens, at)


def perplexity_ratios(
    teacher: TambaForCausalLM,
    sets: Mapping[int, Mapping[int, Block]],
    blocks: TokenBlocks,
) -> list[tuple[int, float]]:
    """(key, perplexity ratio to the teacher) for each set of replaced layers."""

    def loss(replaced: Mapping[int, Block], batch: Batch) -> tuple[float, int]:
        here = batch.predicted
        hidden, tokens = enter(teacher, batch)
        hidden = finish(teacher, _climb(teacher, replaced, hidden, tokens, 0))[:, :-1][here]
        targets = batch.tokens[:, 1:][here]
        only_text = Weights(kl=0.0, ce=1.0)
        nats = next_token_loss(hidden, teacher.lm_head.weight, targets, weights=only_text)
        return float(nats) * len(targets), len(targets)

    sums = dict.fromkeys([None, *sets], 0.0)
    count = 0
    with computing(teacher, DTYPE):
        for batch in track(blocks.batches(4), "frontier", -(-len(blocks) // 4)):
            batch = batch.to(teacher.device)
            for key in sums:
                nats, n = loss({} if key is None else sets[key], batch)
                sums[key] += nats
            count += n
    return [(n, math.exp((sums[n] - sums[None]) / max(1, count))) for n in sets]
