"""The text of each step: which rows, in which pieces, on which process.

Rows come in a new order every epoch. Whatever a step reads is a function of its number and the
seed, not of how many processes share it or of how far a run came before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tamba.data import Batch, TokenBlocks
from tamba.model.tokens import segments


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of one step that go through a model together.

    Args:
        batch: their tokens [B, T] and where documents begin.
        rows: [B] int64, which rows of the stage's text they are.
        places: [n] int64, ``b · T + t`` of each place whose next token counts.
        step: 0, 1, ... of the stage.
        share: weight of this piece's mean in the step's, over all processes.
        packed: whether documents begin inside rows of the text, these or others.
        edges: `tamba.model.tokens.segments` of the batch, counted where that waits for nothing;
            None where rows are not packed, or to be counted later.
        counted: [n] bool, which of `places` do; None for all.
    """

    batch: Batch
    rows: Tensor
    places: Tensor
    step: int
    share: float
    packed: bool = True
    edges: Tensor | None = None
    counted: Tensor | None = None

    @property
    def targets(self) -> Tensor:
        """[n], the tokens that follow `places`."""
        return self.batch.tokens.flatten()[self.places + 1]

    def at_places(self, hidden: Tensor) -> Tensor:
        """[B, T, D] -> [n, D]."""
        return hidden.flatten(0, 1).index_select(0, self.places)

    def to(self, device: torch.device) -> Piece:
        """The same on a device."""

        def moved(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            batch=self.batch.to(device),
            rows=moved(self.rows),
            places=moved(self.places),
            edges=moved(self.edges),
            counted=moved(self.counted),
        )

    def fixed(self) -> Piece:
        """The same with `places` that depend on its shape alone: all but the last of each row."""
        rows, length = self.batch.tokens.shape
        index = torch.arange(rows * length, device=self.batch.tokens.device)
        places = index.view(rows, length)[:, :-1].flatten()
        return replace(self, places=places, counted=self.batch.predicted.flatten())


Count = Callable[[Batch], int]
"""How much of a batch a mean is over."""


def predicted(batch: Batch) -> int:
    """Places whose next token is in the same document."""
    return int(batch.predicted.sum())


def tokens(batch: Batch) -> int:
    """All places."""
    return batch.tokens.numel()


def rows_of_step(n: int, batch: int, step: int, seed: int) -> Tensor:
    """[batch] int64: rows of step 0, 1, ..., from a new order of all `n` each epoch."""
    first, stop = step * batch, (step + 1) * batch
    epochs = range(first // n, -(-stop // n))
    stream = torch.cat([_order(n, epoch, seed) for epoch in epochs])
    return stream[first - epochs.start * n :][:batch]


@lru_cache(maxsize=8)
def _order(n: int, epoch: int, seed: int) -> Tensor:
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "little"))
    return torch.randperm(n, generator=generator)


class Pieces:
    """The pieces of every step, as one process sees them.

    Args:
        batch: rows of a step over all processes, which must be divisible by `world`.
        micro_batch: rows of a piece; None for all of a process.
        count: what the step's mean is over.
    """

    def __init__(
        self,
        blocks: TokenBlocks,
        batch: int,
        micro_batch: int | None,
        seed: int,
        count: Count,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._blocks, self._batch, self._seed, self._count = blocks, batch, seed, count
        self._rank, self._world = rank, world
        self._packed = bool(blocks.starts[:, 1:].any())
        mine = batch // world
        self._micro = min(micro_batch or mine, mine)
        self.per_step = -(-mine // self._micro)

    def of(self, step: int) -> Iterator[Piece]:
        """This process' pieces of a step, on the CPU."""
        rows = rows_of_step(len(self._blocks), self._batch, step, self._seed)
        # All processes know the whole step, so none has to be told by how much to divide.
        all_of_it = self._take(rows)
        whole = max(1, self._count(all_of_it))
        for some in rows[self._rank :: self._world].split(self._micro):
            batch = all_of_it if len(some) == len(rows) else self._take(some)
            keep = torch.zeros_like(batch.starts)
            keep[:, :-1] = batch.predicted
            places = keep.flatten().nonzero()[:, 0]
            edges = segments(batch.starts) if self._packed else None
            share = self._count(batch) / whole
            yield Piece(batch, some, places, step, share, self._packed, edges)

    def _take(self, rows: Tensor) -> Batch:
        # Whole rows are copied: indexing goes by element, and the device waits for it.
        tokens, starts = (
            t.index_select(0, rows) for t in (self._blocks.tokens, self._blocks.starts)
        )
        return Batch(tokens.long(), starts)
