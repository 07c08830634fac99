"""What the stages minimise, each as one module whose forward pass is the loss.

The student is a child of the module and everything that reads its weights happens inside `forward`,
so that whatever wraps the module (sharding over processes, above all) sees every use of them. The
teacher is not a child: it is neither sharded, stepped nor saved.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tamba.data import TokenBlocks
from tamba.model.attention import Attention
from tamba.model.mamba2 import Mamba2Mixer
from tamba.model.modeling import TambaForCausalLM
from tamba.model.tokens import Tokens
from tamba.ops.losses import Weights, next_token_loss
from tamba.recipe import Align, Distil
from tamba.trace import climb, computing, finish
from tamba.train.mixing import attention_matrix, mixing_matrix
from tamba.train.pieces import Count, Piece, predicted, tokens
from tamba.train.schedules import Active

Pairs = Mapping[int, int]
"""Student layer -> the teacher's attention layer that it was made of."""

_SCALE_TOKENS = 4096
"""Text on which the size of each layer's output is measured."""


class Objective(nn.Module):
    """A loss of a piece of text, in parts that are summed.

    Args:
        student: whose parameters move.
    """

    _no_split_modules: tuple[str, ...] = ("Block",)
    """Units that accelerate shards one by one."""
    count: Count = staticmethod(predicted)
    """What the parts are means over."""

    def __init__(self, student: TambaForCausalLM) -> None:
        super().__init__()
        self.student = student
        self.layers: Sequence[int] = ()

    def forward(self, piece: Piece) -> Tensor:
        """[k], each a mean over the piece; part i is of layer ``layers[i]`` where there are any."""
        raise NotImplementedError

    def apart(self, names: Sequence[str]) -> list[list[str]]:
        """The parameters whose gradients are clipped together."""
        return [list(names)]

    def units(self) -> Sequence[nn.Module]:
        """The modules that are compiled one by one."""
        return list(self.student.model.layers)

    def repeats(self, piece: Piece) -> Hashable | None:
        """What is done to a piece besides what its shape says; None where it waits for the CPU."""
        return ()


# Layer by layer.


class AlignObjective(Objective):
    """How far converted mixers are from the teacher's, each on what the teacher's own was given.

    A part is the squared error relative to the variance of the teacher's output, and what
    `stage.mixing` adds. On a CPU layers are computed side by side, each with its gradient.

    Args:
        blocks: text whose first rows say how large outputs are.
    """

    count = staticmethod(tokens)

    def __init__(
        self,
        student: TambaForCausalLM,
        teacher: TambaForCausalLM,
        pairs: Pairs,
        blocks: TokenBlocks,
        stage: Align,
        threads: int = 1,
    ) -> None:
        super().__init__(student)
        self.layers = sorted(pairs)
        # Mixers are called alone here, not by their layers.
        self._no_split_modules = (*{type(_mixer(student, i)).__name__ for i in self.layers},)
        self._teacher = [teacher]
        self._pairs, self._mixing = pairs, stage.mixing
        self._watched = _Watched()
        self._dtype: torch.dtype = getattr(torch, stage.dtype)
        self._scales = self._measure(blocks)
        self._pool = _single_threads(min(threads, len(self.layers)))

    def close(self) -> None:
        """Let the threads go."""
        if self._pool is not None:
            self._pool.shutdown()

    def apart(self, names: Sequence[str]) -> list[list[str]]:
        groups = [[n for n in names if n.startswith(_mixer_name(i))] for i in self.layers]
        return [group for group in groups if group]

    def units(self) -> Sequence[nn.Module]:
        return [*(_mixer(self.student, i) for i in self.layers), self._watched]

    def forward(self, piece: Piece) -> Tensor:
        seen, their_tokens = self._read(piece)
        ours = Tokens(their_tokens.positions, starts=their_tokens.starts)

        def error(index: int) -> Tensor:
            inputs, outputs = seen[index]
            mixer = _mixer(self.student, index)
            wide = torch.promote_types(outputs.dtype, torch.float32)
            with computing(mixer, self._dtype, grad=True):
                got = mixer(inputs, None, ours)
                off = (got.to(wide) - outputs).square().sum(-1).mean() / self._scales[index]
                if self._mixing:
                    assert isinstance(mixer, Mamba2Mixer)
                    with torch.no_grad():
                        want = attention_matrix(self._attention(index), inputs, their_tokens)
                    gap = mixing_matrix(mixer, inputs, ours) - want
                    # Row by row, so that a step is the same however it is divided.
                    off = off + self._mixing * (_size(gap) / _size(want)).mean()
            return off

        if self._pool is None or not torch.is_grad_enabled():
            return torch.stack([self._kept(index)(error, index) for index in self.layers])
        # Threads need the gradient of a layer at once, so nothing is kept of it.
        groups = [
            [p for p in _mixer(self.student, i).parameters() if p.requires_grad]
            for i in self.layers
        ]
        work = [lambda i=i: error(i) for i in self.layers]
        parts: Tensor = _SideBySide.apply(
            self._pool, work, [len(group) for group in groups], *(p for g in groups for p in g)
        )
        return parts

    def _kept(self, index: int) -> Callable[..., Tensor]:
        """How a layer's error is called: such that it is computed again, if the layer is told so.

        Layers see to that themselves, but here their mixers alone are called.
        """
        layer: Any = self.student.model.layers[index]
        if not layer.gradient_checkpointing:
            return lambda error, index: error(index)
        again: Callable[..., Tensor] = layer._gradient_checkpointing_func
        return again

    def _attention(self, index: int) -> Attention:
        mixer = _mixer(self._teacher[0], self._pairs[index])
        assert isinstance(mixer, Attention)
        return mixer

    def _read(self, piece: Piece) -> tuple[dict[int, tuple[Tensor, Tensor]], Tokens]:
        """What the teacher's mixers are given and give, by student layer, and where tokens are."""
        (teacher,) = self._teacher
        wanted = set(self._pairs.values())
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        with computing(teacher, self._dtype):
            hidden, where = _enter(teacher, piece)
            for index, layer in enumerate(teacher.model.layers[: max(wanted) + 1]):
                hidden, *both = self._watched(layer, hidden, where)
                if index in wanted:
                    seen[index] = (both[0], both[1])
        return {ours: seen[theirs] for ours, theirs in self._pairs.items()}, where

    def _measure(self, blocks: TokenBlocks) -> dict[int, Tensor]:
        """Mean squared distance of each layer's output from its mean, over the first rows."""
        (teacher,) = self._teacher
        rows = blocks.take(max(1, _SCALE_TOKENS // blocks.length))
        count = 0
        sums: dict[int, Any] = dict.fromkeys(self.layers, 0.0)
        squares: dict[int, Any] = dict.fromkeys(self.layers, 0.0)
        for batch in rows.batches(4):
            batch = batch.to(teacher.device)
            piece = Piece(batch, batch.tokens[:, 0], batch.tokens[:, 0], 0, 1.0)
            count += batch.tokens.numel()
            for index, (_, outputs) in self._read(piece)[0].items():
                wide = torch.promote_types(outputs.dtype, torch.float32)
                x = outputs.flatten(0, 1).to(wide)
                sums[index] = sums[index] + x.sum(0, dtype=torch.float64)
                squares[index] = squares[index] + x.square().sum(dtype=torch.float64)
        return {
            i: ((squares[i] - sums[i].square().sum() / count) / count).clamp_min(1e-30).to(wide)
            for i in self.layers
        }


class _Watched(nn.Module):
    """A layer, with what its mixer was given and gave: [B, T, D] each."""

    def forward(
        self, layer: nn.Module, hidden: Tensor, where: Tokens
    ) -> tuple[Tensor, Tensor, Tensor]:
        seen: list[Tensor] = []

        def mixer(given: Tensor, state: None, tokens: Tokens) -> Tensor:
            gave: Tensor = layer.mixer(given, state, tokens)  # type: ignore[operator]
            seen.extend((given, gave))
            return gave

        hidden = layer(hidden, None, where, mixer=mixer)
        return hidden, seen[0], seen[1]


def _enter(model: TambaForCausalLM, piece: Piece) -> tuple[Tensor, Tokens]:
    """The embedded tokens [B, T, D] of a piece, and where they stand.

    Whether rows hold several documents is said, not looked up: that would wait for the device, and
    a batch of whole rows would need graphs of its own.
    """
    hidden = model.model.embed_tokens(piece.batch.tokens)
    documents = piece.batch.starts.cumsum(1) if piece.packed else None
    return hidden, model.model._locate(hidden, None, None, None, documents, piece.edges)


def _size(matrices: Tensor) -> Tensor:
    """[B, H, T, T] -> [B], sums of squares."""
    return matrices.square().flatten(1).sum(1)


def _mixer(model: TambaForCausalLM, index: int) -> nn.Module:
    return model.model.layers[index].get_submodule("mixer")


def _mixer_name(index: int) -> str:
    return f"model.layers.{index}.mixer."


def _single_threads(n: int) -> ThreadPoolExecutor | None:
    """`n` threads in each of which torch computes alone; None where one is all there is."""
    if n < 2:
        return None
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,))
    try:
        # Threads begin with their first work; all of them have to before the number is put back.
        all_here = Barrier(n)
        for waiting in [pool.submit(all_here.wait) for _ in range(n)]:
            waiting.result()
    finally:
        torch.set_num_threads(before)
    return pool


class _SideBySide(torch.autograd.Function):
    """Scalars that share no parameter, each computed in a thread together with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        pool: ThreadPoolExecutor,
        work: Sequence[Callable[[], Tensor]],
        sizes: Sequence[int],
        *parameters: Tensor,
    ) -> Tensor:
        edges = [0]
        for size in sizes:
            edges.append(edges[-1] + size)

        def one(k: int) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            with torch.enable_grad():
                value = work[k]()
            some = parameters[edges[k] : edges[k + 1]]
            return value.detach(), torch.autograd.grad(value, some, allow_unused=True)

        found = list(pool.map(one, range(len(work))))
        ctx.gradients = [gradients for _, gradients in found]
        return torch.stack([value for value, _ in found])

    @staticmethod
    def backward(ctx: Any, *weights: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if gradient is None else gradient.mul_(weight)
            for some, weight in zip(gradients, weights[0], strict=True)
            for gradient in some
        )
        return None, None, None, *scaled


# End to end.


class TeacherSignal(Protocol):
    """What a teacher says of a piece; see docs/training.md."""

    def __call__(self, piece: Piece) -> Mapping[str, Any]:
        """Keyword arguments of `next_token_loss` for the places of a piece. Takes no gradients."""


class LiveTeacher:
    """A teacher in process.

    Args:
        dtype: of its matrix products.
    """

    def __init__(self, model: TambaForCausalLM, dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype

    def units(self) -> Sequence[nn.Module]:
        """The modules that are compiled one by one."""
        return list(self._model.model.layers)

    def __call__(self, piece: Piece) -> dict[str, Tensor]:
        with computing(self._model, self._dtype):
            hidden, where = _enter(self._model, piece)
            hidden = finish(self._model, climb(self._model, hidden, where, 0))
            return {
                "teacher_hidden": piece.at_places(hidden),
                "teacher_head": self._model.lm_head.weight,
            }


class DistilObjective(Objective):
    """How far the student's next-token distribution is from the teacher's, the text's, or both.

    Args:
        signal: what the teacher says; None where the loss does not ask it.
        teacher: whose attention runs in place of converted layers that are not `active` yet, and
            `pairs`, which says where.
        active: converted layers that run in a step; None for all in every one.
    """

    def __init__(
        self,
        student: TambaForCausalLM,
        signal: TeacherSignal | None,
        stage: Distil,
        teacher: TambaForCausalLM | None = None,
        pairs: Pairs | None = None,
        active: Active | None = None,
    ) -> None:
        super().__init__(student)
        self._signal = signal
        self._teacher = [teacher]
        self._pairs, self._active = dict(pairs or {}), active
        self._dtype: torch.dtype = getattr(torch, stage.dtype)
        self._weights = loss_weights(stage)

    def units(self) -> Sequence[nn.Module]:
        if self._active is not None:
            return []  # a graph for each mixer that stands in, and then too many of them
        theirs = self._signal.units() if isinstance(self._signal, LiveTeacher) else ()
        return [*super().units(), *theirs]

    def repeats(self, piece: Piece) -> Hashable | None:
        if self._signal is not None and not isinstance(self._signal, LiveTeacher):
            return None
        return () if self._active is None else tuple(self._active(piece.step))

    def forward(self, piece: Piece) -> Tensor:
        wanted: Mapping[str, Any] = {}
        if self._signal is not None:
            with torch.no_grad():
                wanted = self._signal(piece)
        with computing(self.student, self._dtype, grad=torch.is_grad_enabled()):
            hidden, where = _enter(self.student, piece)
            others, their = self._stand_ins(piece)
            for index, layer in enumerate(self.student.model.layers):
                if index in others:
                    hidden = layer(hidden, None, their, mixer=others[index])
                else:
                    hidden = layer(hidden, None, where)
            hidden = finish(self.student, hidden)
            loss = next_token_loss(
                piece.at_places(hidden),
                self.student.lm_head.weight,
                piece.targets,
                counted=piece.counted,
                weights=self._weights,
                **wanted,
            )
        return loss[None]

    def _stand_ins(self, piece: Piece) -> tuple[dict[int, nn.Module], Tokens | None]:
        """The teacher's attention by student layer that is not active, and its view of tokens."""
        (teacher,) = self._teacher
        if self._active is None or teacher is None:
            return {}, None
        active = set(self._active(piece.step))
        waiting = [index for index in self._pairs if index not in active]
        if not waiting:
            return {}, None
        others = {i: _mixer(teacher, self._pairs[i]) for i in waiting}
        # The student may have no attention of its own, and then no angles or masks either.
        return others, _enter(teacher, piece)[1]


def loss_weights(stage: Distil) -> Weights:
    """The loss of a stage, as `ops.losses` takes it."""
    return Weights(
        kl=stage.kl,
        ce=stage.ce,
        temperature=stage.temperature,
        divergence=stage.divergence,
        beta=stage.beta,
        top_k=stage.top_k,
    )
