"""Log-likelihoods of continuations: batched by length, shared beginnings computed once.

Requests that begin alike (the choices of a question, the two halves of a Winograd schema, equal
worked examples) form a group: the common tokens go through the model once, its state is copied to
each member, and only the rest of each is computed. Logits are made for scored positions alone.

Shape letters: `B` rows, `T` tokens, `V` vocabulary, `n` scored positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tamba.model.cache import TambaCache

Pair = tuple[Sequence[int], Sequence[int]]
"""Tokens of a context and of the continuation to score."""

_LOGITS_AT_ONCE = 2**24
_WORTH_SHARING = 0.25
"""Share of a request's tokens that a common beginning must save; a second pass has its price."""


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


@dataclass
class _Batch:
    groups: list[_Group] = field(default_factory=list)
    shared: int = 0
    rest: int = 0
    members: int = 0

    def cost_with(self, group: _Group, rest: int) -> int:
        return (len(self.groups) + 1) * max(self.shared, group.shared) + (
            self.members + len(group.members)
        ) * max(self.rest, rest)


def _batches(
    groups: list[_Group], inputs: Sequence[Sequence[int]], tokens_at_once: int
) -> Iterator[list[_Group]]:
    """Groups of like size together, lone ones apart, as many as fit."""

    def rest(group: _Group) -> int:
        return max(len(inputs[i]) for i in group.members) - group.shared

    lone = [g for g in groups if len(g.members) == 1]
    joined = [g for g in groups if len(g.members) > 1]
    # A group that is too large for a batch is cut; its parts compute the beginning each.
    parts = [
        _Group(g.members[first : first + size], g.shared)
        for g in joined
        for size in [max(2, (tokens_at_once - g.shared) // max(1, rest(g)))]
        for first in range(0, len(g.members), size)
    ]
    for kind in (lone, parts):
        batch = _Batch()
        for group in sorted(kind, key=lambda g: (-g.shared, -rest(g), list(inputs[g.members[0]]))):
            if batch.groups and batch.cost_with(group, rest(group)) > tokens_at_once:
                yield batch.groups
                batch = _Batch()
            batch.groups.append(group)
            batch.shared = max(batch.shared, group.shared)
            batch.rest = max(batch.rest, rest(group))
            batch.members += len(group.members)
        if batch.groups:
            yield batch.groups


def _score(
    model: Any,
    head: Tensor,
    groups: list[_Group],
    inputs: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
) -> dict[int, Likelihood]:
    device = model.device
    longest = max(g.shared for g in groups)
    rests = max(len(inputs[i]) - g.shared for g in groups for i in g.members)
    begin = torch.zeros(len(groups), longest, dtype=torch.long)
    # Without a second pass padding stands on the right, where causality makes it harmless.
    at_right = rests == 0
    for row, group in enumerate(groups):
        place = slice(group.shared) if at_right else slice(longest - group.shared, None)
        begin[row, place] = torch.tensor(inputs[group.members[0]][: group.shared])
    cache = None if at_right else TambaCache(model.config)
    mask = None
    if not at_right and any(g.shared < longest for g in groups):
        lengths = torch.tensor([g.shared for g in groups])
        mask = (torch.arange(longest) >= longest - lengths[:, None]).to(device)
    hidden = model.model(
        input_ids=begin.to(device), attention_mask=mask, past_key_values=cache, use_cache=False
    ).last_hidden_state
    owners: list[int] = []
    members = [(row, group, i) for row, group in enumerate(groups) for i in group.members]
    first: list[tuple[int, int]] = []
    wanted: list[int] = []
    for row, group, i in members:
        offset = 0 if at_right else longest - group.shared
        start = len(inputs[i]) - len(targets[i])
        for k in range(start, min(len(inputs[i]), group.shared)):
            first.append((row, offset + k))
            wanted.append(targets[i][k - start])
            owners.append(i)
    picked = [_pick(hidden, first)]
    if cache is not None:
        cache.batch_select_indices(torch.tensor([row for row, _, _ in members], device=device))
        more = torch.zeros(len(members), rests, dtype=torch.long)
        second: list[tuple[int, int]] = []
        for row, (_, group, i) in enumerate(members):
            rest = inputs[i][group.shared :]
            more[row, : len(rest)] = torch.tensor(rest, dtype=torch.long)
            start = len(inputs[i]) - len(targets[i])
            for k in range(max(start, group.shared), len(inputs[i])):
                second.append((row, k - group.shared))
                wanted.append(targets[i][k - start])
                owners.append(i)
        hidden = model.model(input_ids=more.to(device), past_key_values=cache).last_hidden_state
        picked.append(_pick(hidden, second))
    logp, best = _read(torch.cat(picked), head, torch.tensor(wanted, device=device))
    totals = dict.fromkeys((i for _, _, i in members), 0.0)
    greedy = dict.fromkeys(totals, True)
    for i, value, is_best in zip(owners, logp, best, strict=True):
        totals[i] += value
        greedy[i] = greedy[i] and is_best
    return {i: Likelihood(totals[i], greedy[i], len(targets[i])) for i in totals}


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
        logp += (chosen - logits.logsumexp(-1)).double().tolist()
        best += (logits.argmax(-1) == tokens).tolist()
    return logp, best
