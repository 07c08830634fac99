"""Log-likelihoods of continuations: batched by length, shared beginnings computed once.

Requests that begin alike (the choices of a question, the two halves of a Winograd schema, equal
worked examples) form a group: the common tokens go through the model once, its state is copied to
each member, and only the rest of each is computed. Logits are made for scored positions alone.

Shape letters: `B` rows, `T` tokens, `V` vocabulary, `n` scored positions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tamba.model.cache import TambaCache

Pair = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context and of the continuation to score."""

_LOGITS_AT_ONCE = 2**24
_WORTH_SHARING = 0.25
"""Share of a request's tokens that a common beginning must save; a second pass has its price."""
_WORTH_A_PASS = 128
"""Tokens from which a pass is efficient enough not to wait for more of another length."""
_LIKE = 0.8
"""Rests shorter than this share of the longest are not padded to it, if both can fill a pass."""


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation.

    Args:
        total: sum of the log-probabilities of its tokens, in nats.
        greedy: whether each token is the likeliest one.
        tokens: how many there are.
    """

    total: float
    greedy: bool
    tokens: int


@dataclass
class _Group:
    """Requests whose inputs share their first `shared` tokens; a lone one shares all of its own."""

    members: list[int]
    shared: int


def loglikelihoods(
    model: Any,
    pairs: Sequence[Pair],
    *,
    tokens_at_once: int = 4096,
    max_length: int | None = None,
) -> Iterator[dict[int, Likelihood]]:
    """Score continuations after their contexts.

    Args:
        model: a `TambaForCausalLM`.
        pairs: a context of one token or more, and a continuation of one token or more.
        tokens_at_once: tokens of a batch, padding included; one group at least.
        max_length: longest input; longer ones lose tokens on the left, as in lm-eval.

    Yields:
        Results by index into `pairs`, a batch at a time, longest first.
    """
    inputs, targets = [], []
    for context, continuation in pairs:
        if not context or not continuation:
            raise ValueError("a context and a continuation need a token each")
        whole = [*context, *continuation]
        if max_length is not None:
            whole = whole[-(max_length + 1) :]
        inputs.append(whole[:-1])
        targets.append(whole[-min(len(continuation), len(whole) - 1) :])
    # Logits in half precision would round likelihoods to an eighth of a nat.
    head = model.lm_head.weight.detach()
    head = head if head.dtype == torch.float64 else head.float()
    for batch in _batches(_groups(inputs), inputs, tokens_at_once):
        with torch.inference_mode():
            yield _score(model, head, batch, inputs, targets)


def _groups(inputs: Sequence[Sequence[int]]) -> list[_Group]:
    """Neighbours in lexicographic order share the most; they are joined while it pays."""
    groups: list[_Group] = []
    for index in sorted(range(len(inputs)), key=lambda i: (list(inputs[i]), i)):
        group = groups[-1] if groups else None
        if group is not None:
            shared = _common(inputs[group.members[-1]], inputs[index], group.shared)
            members = len(group.members)
            # What the group computes with and without the newcomer, against the newcomer alone.
            lost = (group.shared - shared) * (members - 1)
            if shared - lost >= _WORTH_SHARING * len(inputs[index]):
                group.members.append(index)
                group.shared = shared
                continue
        groups.append(_Group([index], len(inputs[index])))
    return groups


def _common(a: Sequence[int], b: Sequence[int], most: int) -> int:
    n = 0
    for x, y in zip(a[:most], b, strict=False):
        if x != y:
            break
        n += 1
    return n


def _batches(
    groups: list[_Group], inputs: Sequence[Sequence[int]], tokens_at_once: int
) -> Iterator[list[_Group]]:
    """Groups with beginnings of like length together, lone ones apart, as many as fit."""

    def rests(group: _Group) -> int:
        return sum(len(inputs[i]) - group.shared for i in group.members)

    lone = [g for g in groups if len(g.members) == 1]
    joined = [g for g in groups if len(g.members) > 1]
    # A group that is too large for a batch is cut; its parts compute the beginning each.
    parts = [
        _Group(g.members[first : first + size], g.shared)
        for g in joined
        for each in [max(1, rests(g) // len(g.members))]
        for size in [max(2, (tokens_at_once - g.shared) // each)]
        for first in range(0, len(g.members), size)
    ]
    for kind in (lone, parts):
        batch: list[_Group] = []
        longest = more = 0
        for group in sorted(kind, key=lambda g: (-g.shared, list(inputs[g.members[0]]))):
            cost = (len(batch) + 1) * max(longest, group.shared) + more + rests(group)
            if batch and cost > tokens_at_once:
                yield batch
                batch, longest, more = [], 0, 0
            batch.append(group)
            longest, more = max(longest, group.shared), more + rests(group)
        if batch:
            yield batch


def _cut(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rests by like length, longest first; empty ones are left out."""
    part: list[int] = []
    for k in sorted(range(len(lengths)), key=lambda k: -lengths[k]):
        if part:
            longest = lengths[part[0]]
            enough = len(part) * longest >= _WORTH_A_PASS
            if enough and lengths[k] < _LIKE * longest:
                yield part
                part = []
        if lengths[k]:
            part.append(k)
    if part:
        yield part


def _score(
    model: Any,
    head: Tensor,
    groups: list[_Group],
    inputs: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> dict[int, Likelihood]:
    members = [(row, group, i) for row, group in enumerate(groups) for i in group.members]
    rests = [len(inputs[i]) - group.shared for _, group, i in members]
    longest = max(group.shared for group in groups)
    # Without a second pass padding stands on the right, where causality makes it harmless.
    at_right = not any(rests)
    begin = torch.zeros(len(groups), longest, dtype=torch.long)
    offsets = [0 if at_right else longest - group.shared for group in groups]
    for row, group in enumerate(groups):
        tokens = torch.tensor(inputs[group.members[0]][: group.shared])
        begin[row, offsets[row] : offsets[row] + group.shared] = tokens
    cache = None if at_right else TambaCache(model.config)
    mask = None
    if any(offsets):
        mask = torch.arange(longest) >= torch.tensor(offsets)[:, None]
        mask = mask.to(model.device)
    hidden = _run(model, begin, cache, mask)

    places: list[tuple[int, int]] = []
    scored: list[tuple[int, int]] = []  # of each place: its request, and which of its targets
    for row, group, i in members:
        start = len(inputs[i]) - len(targets[i])
        for k in range(start, min(len(inputs[i]), group.shared)):
            places.append((row, offsets[row] + k))
            scored.append((i, k - start))
    picked = [_pick(hidden, places)]
    for part in _cut(rests):
        assert cache is not None
        state = _copies(cache, [members[k][0] for k in part])
        more = torch.zeros(len(part), rests[part[0]], dtype=torch.long)
        places = []
        for row, k in enumerate(part):
            _, group, i = members[k]
            more[row, : rests[k]] = torch.tensor(inputs[i][group.shared :])
            start = len(inputs[i]) - len(targets[i])
            for t in range(max(start, group.shared), len(inputs[i])):
                places.append((row, t - group.shared))
                scored.append((i, t - start))
        picked.append(_pick(_run(model, more, state), places))

    wanted = torch.tensor([targets[i][k] for i, k in scored], device=model.device)
    logp, best = _read(torch.cat(picked), head, wanted)
    values: dict[int, list[float]] = {i: [] for _, _, i in members}
    greedy = dict.fromkeys(values, True)
    for (i, _), value, is_best in zip(scored, logp, best, strict=True):
        values[i].append(value)
        greedy[i] = greedy[i] and is_best
    return {i: Likelihood(math.fsum(v), greedy[i], len(targets[i])) for i, v in values.items()}


def _run(
    model: Any, tokens: Tensor, cache: TambaCache | None, mask: Tensor | None = None
) -> Tensor:
    """[B, T, D] of tokens [B, T] after what is in the cache."""
    hidden: Tensor = model.model(
        input_ids=tokens.to(model.device),
        attention_mask=mask,
        past_key_values=cache,
        use_cache=False,
    ).last_hidden_state
    return hidden


def _copies(cache: TambaCache, rows: list[int]) -> TambaCache:
    """A cache of copies of some rows; the one given stays as it is."""
    # Selecting makes new tensors, so a shallow copy of each layer is enough.
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    found.batch_select_indices(torch.tensor(rows))
    return found


def _pick(hidden: Tensor, places: list[tuple[int, int]]) -> Tensor:
    """[n, D] of hidden [B, T, D] at (row, column) places."""
    index = torch.tensor(places, dtype=torch.long, device=hidden.device).view(-1, 2)
    return hidden[index[:, 0], index[:, 1]]


def _read(hidden: Tensor, head: Tensor, wanted: Tensor) -> tuple[list[float], list[bool]]:
    """Log-probability of each wanted token [n], and whether it is the likeliest."""
    logp: list[float] = []
    best: list[bool] = []
    step = max(1, _LOGITS_AT_ONCE // len(head))
    for states, tokens in zip(hidden.split(step), wanted.split(step), strict=True):
        logits = states.to(head.dtype) @ head.T
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        # The largest value is much cheaper to find than its place, which only ties need.
        largest = logits.amax(-1)
        likeliest = chosen == largest
        for row in likeliest.nonzero()[:, 0].tolist():
            likeliest[row] = logits[row].argmax() == tokens[row]
        total = logits.sub_(largest[:, None]).exp_().sum(-1)
        logp += (chosen - largest - total.log()).double().tolist()
        best += likeliest.tolist()
    return logp, best
