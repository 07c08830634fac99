"""Greedy generation for many prompts at once, through our state, padded on the left.

Rows that are done leave the batch, so a batch costs what its unfinished rows cost.

Shape letters: `B` rows, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tamba.model.cache import TambaCache

Stop = Callable[[int, list[int]], bool]
"""``stop(index, tokens)``: whether this prompt's answer is complete; `tokens` is all of it."""


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    ends: Collection[int] = (),
    stop: Stop | None = None,
    tokens_at_once: int = 16_384,
) -> Iterator[dict[int, list[int]]]:
    """Continue prompts with the likeliest token each time.

    Args:
        model: a `TambaForCausalLM`.
        prompts: one token or more each.
        limits: most new tokens of each.
        ends: tokens that end an answer; the token itself is part of what comes back.
        stop: ends an answer after the token that makes it true.
        tokens_at_once: places of a batch: rows times the longest prompt and answer; one row at
            least.

    Yields:
        New tokens by index into `prompts`, a batch at a time, longest prompts first.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), list(prompts[i]), i))
    batch: list[int] = []
    room = 0
    for i in order:
        if not prompts[i]:
            raise ValueError("a prompt needs a token")
        room = max(room, len(prompts[i]) + limits[i])
        if batch and room * (len(batch) + 1) > tokens_at_once:
            yield _decode(model, prompts, limits, batch, frozenset(ends), stop)
            batch, room = [], len(prompts[i]) + limits[i]
        batch.append(i)
    if batch:
        yield _decode(model, prompts, limits, batch, frozenset(ends), stop)


@torch.inference_mode()
def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    batch: list[int],
    ends: frozenset[int],
    stop: Stop | None,
) -> dict[int, list[int]]:
    answers: dict[int, list[int]] = {i: [] for i in batch}
    rows = [i for i in batch if limits[i] > 0]
    if not rows:
        return answers
    longest = max(len(prompts[i]) for i in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, i in enumerate(rows):
        ids[row, longest - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
    mask = None
    if any(len(prompts[i]) < longest for i in rows):
        lengths = torch.tensor([len(prompts[i]) for i in rows])
        mask = (torch.arange(longest) >= longest - lengths[:, None]).to(model.device)
    cache = TambaCache(model.config)
    new = _next(model, ids.to(model.device), mask, cache)
    while True:
        going = []
        for row, (i, token) in enumerate(zip(rows, new.tolist(), strict=True)):
            answer = answers[i]
            answer.append(token)
            done = token in ends or len(answer) >= limits[i] or (stop and stop(i, answer))
            if not done:
                going.append(row)
        if not going:
            return answers
        if len(going) < len(rows):
            kept = torch.tensor(going, device=new.device)
            cache.batch_select_indices(kept)
            new, rows = new[kept], [rows[row] for row in going]
        new = _next(model, new[:, None], None, cache)


def _next(model: Any, ids: Tensor, mask: Tensor | None, cache: TambaCache) -> Tensor:
    """[B] likeliest next tokens."""
    hidden = model.model(
        input_ids=ids, attention_mask=mask, past_key_values=cache
    ).last_hidden_state
    return model.lm_head(hidden[:, -1]).argmax(-1)
