"""Generation for many prompts at once, through our state, padded on the left.

Rows that are done leave the batch, so a batch costs what its unfinished rows cost. What is sampled
for a prompt is drawn from numbers of its own: neighbours, and runs that were cut off, change
nothing.

Shape letters: `B` rows, `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tamba.errors import UserError
from tamba.model.cache import TambaCache

Stop = Callable[[int, list[int]], bool]
"""``stop(index, tokens)``: whether this prompt's answer is complete; `tokens` is all of it."""
Choose = Callable[[Tensor, Sequence[int], int], Tensor]
"""``choose(logits, indices, step)``: the next token [B] of these prompts from their logits [B, V],
after `step` tokens of each answer."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: 0 takes the likeliest token each time.
        top_k: sample among so many; 0 for all.
        top_p: sample among the likeliest that hold this share together (Holtzman et al. 2020, arXiv
            1904.09751), of those that `top_k` leaves.
        seed: of the draws.

    Raises:
        UserError: a setting that cannot be.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError("temperature", f"{self.temperature} is not a number of 0 or more")
        if self.top_k < 0:
            raise UserError("top_k", f"{self.top_k} is below 0", "0 samples among all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError("top_p", f"{self.top_p} is not above 0 and at most 1")

    def chooser(self, names: Sequence[str]) -> Choose | None:
        """What `decode` asks for tokens; None for the likeliest.

        Args:
            names: of the prompts, by index. The draws of a prompt depend on its name, the seed and
                the number of the token, on nothing else.
        """
        if self.temperature == 0:
            return None
        generators: dict[int, torch.Generator] = {}

        def draw(index: int, step: int) -> float:
            if step == 0:
                mixed = hashlib.sha256(f"{self.seed} {names[index]}".encode()).digest()
                seed = int.from_bytes(mixed[:7], "little")
                generators[index] = torch.Generator().manual_seed(seed)
            return float(torch.rand((), generator=generators[index], dtype=torch.float64))

        def choose(logits: Tensor, indices: Sequence[int], step: int) -> Tensor:
            places = torch.tensor([draw(i, step) for i in indices], dtype=torch.float64)
            return self.pick(logits, places.to(logits.device))

        return choose

    def pick(self, logits: Tensor, places: Tensor) -> Tensor:
        """Tokens [B] at `places` [B] in [0, 1) of the cumulated distribution of `logits` [B, V]."""
        scores = logits.float() / self.temperature
        order = None
        if self.top_k and self.top_k < scores.shape[1]:
            scores, order = scores.topk(self.top_k)
        elif self.top_p < 1:
            scores, order = scores.sort(descending=True)
        likely = scores.double().softmax(-1)
        whole = likely.cumsum(-1)
        if self.top_p < 1:
            # The first is kept whatever its share.
            kept = (whole - likely < self.top_p).sum(-1, keepdim=True)
        else:
            kept = torch.full_like(places, scores.shape[1], dtype=torch.int64)[:, None]
        reach = whole.gather(-1, kept - 1) * places[:, None]
        found = torch.searchsorted(whole, reach, right=True).minimum(kept - 1)
        return (found if order is None else order.gather(-1, found))[:, 0]


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    ends: Collection[int] = (),
    stop: Stop | None = None,
    choose: Choose | None = None,
    tokens_at_once: int = 16_384,
    known: Collection[int] = (),
) -> Iterator[dict[int, list[int]]]:
    """Continue prompts, with the likeliest token each time unless `choose` says otherwise.

    Args:
        model: a `TambaForCausalLM`.
        prompts: one token or more each.
        limits: most new tokens of each.
        ends: tokens that end an answer; the token itself is part of what comes back.
        stop: ends an answer after the token that makes it true.
        choose: says the next tokens, as `Sampling.chooser` does.
        tokens_at_once: places of a batch: rows times the longest prompt and answer; one row at
            least.
        known: prompts whose answers are not needed. A batch of such alone is left out; others run
            whole, so that every answer is computed beside the same neighbours each time.

    Yields:
        New tokens by index into `prompts`, a batch at a time, longest prompts first.
    """
    for batch in _batches(prompts, limits, tokens_at_once):
        if not all(i in known for i in batch):
            yield _decode(model, prompts, limits, batch, frozenset(ends), stop, choose)


def _batches(
    prompts: Sequence[Sequence[int]], limits: Sequence[int], tokens_at_once: int
) -> Iterator[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), list(prompts[i]), i))
    batch: list[int] = []
    room = 0
    for i in order:
        if not prompts[i]:
            raise ValueError("a prompt needs a token")
        room = max(room, len(prompts[i]) + limits[i])
        if batch and room * (len(batch) + 1) > tokens_at_once:
            yield batch
            batch, room = [], len(prompts[i]) + limits[i]
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def _decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    batch: list[int],
    ends: frozenset[int],
    stop: Stop | None,
    choose: Choose | None,
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
    new = _next(model, ids.to(model.device), mask, cache, rows, choose)
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
        new = _next(model, new[:, None], None, cache, rows, choose, len(answers[rows[0]]))


def _next(
    model: Any,
    ids: Tensor,
    mask: Tensor | None,
    cache: TambaCache,
    rows: Sequence[int],
    choose: Choose | None,
    step: int = 0,
) -> Tensor:
    """[B] next tokens of the prompts `rows`."""
    hidden = model.model(
        input_ids=ids, attention_mask=mask, past_key_values=cache
    ).last_hidden_state
    logits: Tensor = model.lm_head(hidden[:, -1])
    return logits.argmax(-1) if choose is None else choose(logits, rows, step)
