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

from tamba.analyze.distances import state_scores
from tamba.calibrate import calibrate, can_calibrate, fit_output
from tamba.data import Batch, TokenBlocks
from tamba.errors import UserError
from tamba.model.attention import Attention
from tamba.model.block import Block
from tamba.model.config import AttentionSpec
from tamba.model.modeling import TambaForCausalLM
from tamba.model.recurrent import RecurrentMixer
from tamba.ops.losses import Weights, next_token_loss
from tamba.plan import ConvertOptions, LayerPlan, PlanEntry
from tamba.progress import track
from tamba.recipe import Recipe
from tamba.surgery import convert_layer
from tamba.trace import Trace, climb, computing, each, enter, finish, trace

_DTYPE = torch.bfloat16
"""Of matrix products, where weights are wider: scores need two digits."""
_STRIDE = 2
"""Every which predicted position is scored."""
_HELD_BYTES = 3 << 30
"""Activations held at once."""


@dataclass(frozen=True)
class Analysis:
    """What was found about each layer.

    Args:
        score: the name of the score, as in the recipe.
        scores: by layer, bottom first; None for layers that cannot be converted. ``swap`` and
            ``least_squares`` are KL(teacher, changed teacher) in nats a token, the others angles
            from 0 to 1.
        order: convertible layers, least harm first.
        plan: the chosen conversion.
        frontier: (layers converted, perplexity ratio) on the text scored on, in `order` and without
            any training.
        distances: [L, L] angular distances d(l, n) of the hidden states before layers l and l + n
            (row l, column n - 1; NaN beyond the last layer), where the score rests on them.
    """

    score: str
    scores: list[float | None]
    order: list[int]
    plan: LayerPlan
    frontier: list[tuple[int, float]]
    distances: list[list[float | None]] | None = None


def analyze_model(teacher: TambaForCausalLM, blocks: TokenBlocks, recipe: Recipe) -> Analysis:
    """Score the layers of a model in memory; see `analyze`.

    Args:
        teacher: left as it is.
        blocks: text, of which ``analyze.tokens`` are scored on and as many fitted on.
        recipe: its ``analyze`` and ``build.convert`` sections decide.
    """
    wanted, options = recipe.analyze, recipe.build.convert
    fit, score = divided(blocks, wanted.tokens)
    convertible = [
        i for i, s in enumerate(teacher.config.block_specs) if isinstance(s.mixer, AttentionSpec)
    ]
    distances = None
    frontier: list[tuple[int, float]] = []
    if wanted.score in ("own_turn", "column_mean"):
        table = angular_distances(teacher, score)
        scores = {
            i: float(table[i, 0] if wanted.score == "own_turn" else table[i].nanmean())
            for i in convertible
        }
        distances = [[None if math.isnan(x) else x for x in row] for row in table.tolist()]
    else:
        closed = fit if wanted.score == "least_squares" else None
        replaced, scores = swap_scores(teacher, convertible, options, score, closed, recipe.seed)
        order = sorted(scores, key=lambda i: (scores[i], i))
        counts = {round(wanted.convert * share) for share in (0.5, 1.0, 1.5, 2.0)}
        counts = {n for n in counts if 0 < n <= len(order)}
        frontier = perplexity_ratios(
            teacher, {n: {i: replaced[i] for i in order[:n]} for n in sorted(counts)}, score
        )
    order = sorted(scores, key=lambda i: (scores[i], i))
    chosen = [i for i in order if i not in wanted.always_keep][: wanted.convert]
    entries = tuple(
        PlanEntry(
            "convert" if i in chosen else "keep",
            i,
            note=f"{wanted.score} {scores[i]:.4f}" if i in scores else "no attention",
        )
        for i in range(teacher.config.num_hidden_layers)
    )
    by_layer = [scores.get(i) for i in range(len(entries))]
    plan = LayerPlan(entries, options)
    return Analysis(wanted.score, by_layer, order, plan, frontier, distances)


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


def swap_scores(
    teacher: TambaForCausalLM,
    layers: Sequence[int],
    options: ConvertOptions,
    blocks: TokenBlocks,
    fit: TokenBlocks | None = None,
    seed: int = 0,
) -> tuple[dict[int, Block], dict[int, float]]:
    """KL(teacher, teacher with one layer converted), in nats a token, for each of `layers`.

    Args:
        layers: attention layers.
        options: how each is converted.
        blocks: text to score on.
        fit: text for the closed-form fit of the converted layer; None to leave it as converted.
            Mixers that `calibrate` does not know are fitted in their output projection.
        seed: of what the conversion draws.

    Returns:
        The converted layer, and the score, by layer.
    """
    L, D = teacher.config.num_hidden_layers, teacher.config.hidden_size
    n_tokens = len(blocks) * blocks.length + (0 if fit is None else 2 * len(fit) * fit.length)
    size = max(1, _HELD_BYTES // (4 * D * n_tokens))
    converted: dict[int, Block] = {}
    scores: dict[int, float] = {}
    for first in range(0, len(layers), size):
        some = layers[first : first + size]
        reference = trace(teacher, blocks, streams=[*some, L], dtype=_DTYPE)
        seen = (
            Trace() if fit is None else trace(teacher, fit, mixers=some, heads=True, dtype=_DTYPE)
        )

        def one(
            index: int, _: Any, reference: Trace = reference, seen: Trace = seen
        ) -> tuple[Block, float]:
            original = teacher.model.layers[index]
            assert isinstance(original, Block)
            layer = convert_layer(original, teacher.config, options, index, seed=seed)
            if index in seen.mixers:
                _fit(teacher, layer, index, seen)
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
    size = max(1, _HELD_BYTES // (8 * D * n_tokens))
    made: dict[int, Block] = {}
    for first in range(0, len(layers), size):
        some = layers[first : first + size]
        seen = (
            Trace() if fit is None else trace(teacher, fit, mixers=some, heads=True, dtype=_DTYPE)
        )

        def one(index: int, _: Any, seen: Trace = seen) -> Block:
            original = teacher.model.layers[index]
            assert isinstance(original, Block)
            layer = convert_layer(original, teacher.config, options, index, seed=seed)
            if index in seen.mixers:
                _fit(teacher, layer, index, seen)
            return layer

        found = each(one, some, device=teacher.device, label="convert layers")
        made |= dict(zip(some, found, strict=True))
    return made


def _fit(teacher: TambaForCausalLM, layer: Block, index: int, seen: Trace) -> None:
    attention = teacher.model.layers[index].mixer
    assert isinstance(attention, Attention)
    key = attention.rotary_key
    angles = None if key is None else teacher.model._rotary[key]
    layer.requires_grad_(False)
    mixer = layer.mixer
    assert isinstance(mixer, RecurrentMixer)
    if can_calibrate(layer.spec.mixer, attention.spec):
        calibrate(mixer, attention, angles, seen.mixers[index], dtype=_DTYPE)
    else:
        fit_output(mixer, seen.mixers[index], dtype=_DTYPE)


def _harm(
    teacher: TambaForCausalLM,
    replaced: Mapping[int, Block],
    blocks: TokenBlocks,
    reference: Trace,
    first: int,
) -> float:
    """KL of the teacher with layers replaced, from the stream before layer `first` on."""
    top = reference.streams[len(teacher.model.layers)]
    ours, theirs = [], []
    with computing(teacher, _DTYPE):
        for row, batch in enumerate(blocks.batches(1)):
            batch = batch.to(teacher.device)
            _, tokens = enter(teacher, batch)
            stream = reference.streams[first][row : row + 1]
            stream = _climb(teacher, replaced, stream, tokens, first)
            # Neighbours say much the same, and the head costs as much as half of the layers.
            here = batch.predicted[0].nonzero()[row % _STRIDE :: _STRIDE, 0]
            ours.append(finish(teacher, stream)[0, here])
            theirs.append(finish(teacher, top[row : row + 1])[0, here])
        head = teacher.lm_head.weight
        return float(
            next_token_loss(
                torch.cat(ours), head, teacher_hidden=torch.cat(theirs), teacher_head=head
            )
        )


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
    with computing(teacher, _DTYPE):
        for batch in track(blocks.batches(4), "frontier", -(-len(blocks) // 4)):
            batch = batch.to(teacher.device)
            for key in sums:
                nats, n = loss({} if key is None else sets[key], batch)
                sums[key] += nats
            count += n
    return [(n, math.exp((sums[n] - sums[None]) / max(1, count))) for n in sets]


def angular_distances(model: TambaForCausalLM, blocks: TokenBlocks) -> Tensor:
    """[L, L] float64: `StateScores.all_tokens` with products in a short type: two digits."""
    return state_scores(model, blocks, dtype=_DTYPE, label="angles").all_tokens.mean
