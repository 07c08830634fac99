"""Forward and backward passes as CUDA graphs: recorded once a shape, then replayed.

A step of a small model is thousands of short kernels, and launching them one by one takes longer
than running them. A graph is launched as one. Its inputs, and the gradients that it adds to, lie at
fixed addresses; whatever the text is, shapes are the same, since all places but the last of each
row go through the loss and a mask says which of them count.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from tamba.data import Batch
from tamba.train.objectives import Objective
from tamba.train.pieces import Piece

logger = logging.getLogger("tamba")

_PLAIN_FIRST = 3
"""Passes of a shape before it is recorded: what is compiled or set up at first cannot be."""
_MOST = 4
"""Shapes that are recorded; others stay plain."""
_CLOSE = 2e-2
"""By how much a replay may differ from the plain pass, in parts of its size: sums in the order of
whatever finishes first, in 16 bits."""


class Graph(Protocol):
    """A recorded pass."""

    def replay(self) -> None:
        """Do again what was recorded."""


class Recorder:
    """Gradients of pieces, added to those of the parameters.

    Args:
        objective: in one process, its layers not checkpointed.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._record: _Cuda | None = _Cuda(objective.student.device)
        self._plain: dict[Hashable, int] = {}
        self._recorded: dict[Hashable, _Recorded] = {}
        self._sums: dict[nn.Parameter, Tensor] = {}

    def __call__(self, piece: Piece) -> Tensor:
        """Parts of the loss [k], by a replay where there is one."""
        key = self._key(piece)
        if key is None:
            return self._pass(piece, piece.share)
        piece = piece.fixed()
        if key in self._recorded:
            return self._replay(self._recorded[key], piece)
        assert self._record is not None
        with self._record.aside():
            return self._prepare(key, piece)

    def _key(self, piece: Piece) -> Hashable | None:
        """What a recording is good for; None where a pass cannot be recorded."""
        what = self._objective.repeats(piece)
        if self._record is None or what is None:
            return None
        edges = None if piece.edges is None else len(piece.edges)
        return piece.batch.tokens.shape, edges, piece.packed, what

    def _pass(self, piece: Piece, share: float | Tensor) -> Tensor:
        parts: Tensor = self._objective(piece)
        (parts.sum() * share).backward()
        return parts.detach()

    def _prepare(self, key: Hashable, piece: Piece) -> Tensor:
        """A plain pass, and after some of them a recording of it."""
        self._plain[key] = self._plain.get(key, 0) + 1
        if self._plain[key] < _PLAIN_FIRST or len(self._recorded) == _MOST:
            return self._pass(piece, piece.share)
        # Gradients are compared, so those of the pieces before step aside.
        before = {p: p.grad.clone() for p in self._objective.parameters() if p.grad is not None}
        for p in before:
            p.grad = None
        parts = self._pass(piece, piece.share)
        try:
            self._recorded[key] = self._recording(piece, parts)
        except Exception as error:  # whatever somewhere in a model cannot be recorded
            self._record = None
            self._recorded.clear()
            self._sums.clear()  # memory may be what was short
            logger.warning(
                "steps are launched kernel by kernel, slower than CUDA graphs: %s",
                str(_first(error)).partition("\n")[0],
            )
        for p, gradient in before.items():
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        return parts

    def _recording(self, piece: Piece, parts: Tensor) -> _Recorded:
        """A recorded pass, compared with a plain one that has just left its gradients."""
        assert self._record is not None and piece.counted is not None
        gradients = {p: p.grad for p in self._objective.parameters() if p.grad is not None}
        sums = {p: self._sums.setdefault(p, torch.zeros_like(g)) for p, g in gradients.items()}
        share = torch.full((), piece.share, device=parts.device)
        static = _copied(piece)

        def again() -> Tensor:
            # A batch keeps what it has worked out; what is recorded has to work it out.
            batch = Batch(static.batch.tokens, static.batch.starts)
            return self._pass(replace(static, batch=batch), share)

        try:
            for p, total in sums.items():
                p.grad = total.zero_()
            graph, found = self._record(again)
            for total in sums.values():
                total.zero_()
            made = _Recorded(graph, static, share, found, sums)
            self._replay(made, piece)
            wanted = [*gradients.values(), parts]
            if not _close([*sums.values(), found], wanted):
                raise RuntimeError("a recorded pass gives another gradient than a plain one")
        finally:
            for p, gradient in gradients.items():
                p.grad = gradient
        return made

    def _replay(self, recorded: _Recorded, piece: Piece) -> Tensor:
        begun = [(total, p.grad) for p, total in recorded.sums.items() if p.grad is not total]
        fresh = [total for total, before in begun if before is None]
        others = [(total, before) for total, before in begun if before is not None]
        if fresh:
            torch._foreach_zero_(fresh)
        if others:
            torch._foreach_copy_([total for total, _ in others], [before for _, before in others])
        for p, total in recorded.sums.items():
            p.grad = total
        for place, given in zip(_tensors(recorded.piece), _tensors(piece), strict=True):
            place.copy_(given)
        recorded.share.fill_(piece.share)
        recorded.graph.replay()
        return recorded.parts.clone()


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A pass, what it reads, and what it writes: parts of the loss, and sums of gradients."""

    graph: Graph
    piece: Piece
    share: Tensor
    parts: Tensor
    sums: dict[nn.Parameter, Tensor]


def _first(error: BaseException) -> BaseException:
    """The error that others followed: what ends a recording complains about what broke it."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _tensors(piece: Piece) -> list[Tensor]:
    """What differs between pieces of one key."""
    found = (piece.batch.tokens, piece.batch.starts, piece.rows, piece.edges, piece.counted)
    return [tensor for tensor in found if tensor is not None]


def _copied(piece: Piece) -> Piece:
    batch = Batch(piece.batch.tokens.clone(), piece.batch.starts.clone())
    rows, edges, counted = (
        None if t is None else t.clone() for t in (piece.rows, piece.edges, piece.counted)
    )
    assert rows is not None
    return replace(piece, batch=batch, rows=rows, edges=edges, counted=counted)


def _close(found: list[Tensor], wanted: list[Tensor]) -> bool:
    off, size = (
        torch.stack(torch._foreach_norm(some)).square().sum().sqrt()
        for some in ([a - b for a, b in zip(found, wanted, strict=True)], wanted)
    )
    # Where the plain pass gives no number, neither does the other, and there is nothing to compare.
    return bool(off <= _CLOSE * size) or not bool(size.isfinite())


class _Cuda:
    """Records CUDA graphs, which share what memory their passes need in between."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Inside, work is for the stream of the recordings, which gradients must be added in."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            yield
        here.wait_stream(self._stream)

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        """The recording of a pass, which is not run, and what every replay writes its result to."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            found = work()
        return graph, found
