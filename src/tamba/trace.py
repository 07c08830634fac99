"""Running a model by hand: what its mixers were given and gave, and from one layer to another.

Repair and analysis look inside a model where generation does not: they fit a mixer to what another
one did on some text, and try a layer without running the layers below it again. Text is rows of
equal length; activations are kept for all rows of a `TokenBlocks` at once, in the short type that
they were computed in.

Shape letters: `n` rows, `B` rows of a batch, `T` tokens of a row, `D` d_model, `H` heads, `P`
head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tamba import progress
from tamba.data import Batch, TokenBlocks
from tamba.model.attention import Attention
from tamba.model.modeling import TambaForCausalLM
from tamba.model.recurrent import RecurrentMixer
from tamba.model.tokens import Tokens

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Seen:
    """What one mixer did on some text.

    Args:
        inputs: [n, T, D], normed, as the mixer got them.
        outputs: [n, T, D], what it added to the residual stream.
        starts: [n, T] bool, True where a document begins.
        heads: [n, T, H·P], before the output projection, of an attention layer; None if not kept.
    """

    inputs: Tensor
    outputs: Tensor
    starts: Tensor
    heads: Tensor | None = None

    def take(self, rows: int) -> Seen:
        """The first rows."""
        heads = None if self.heads is None else self.heads[:rows]
        return Seen(self.inputs[:rows], self.outputs[:rows], self.starts[:rows], heads)


@dataclass(frozen=True, eq=False)
class Trace:
    """What was kept of a pass over some rows.

    Args:
        mixers: by layer.
        streams: [n, T, D] by layer, the residual stream before it; the number of layers stands for
            what the final norm is given.
    """

    mixers: dict[int, Seen] = field(default_factory=dict)
    streams: dict[int, Tensor] = field(default_factory=dict)


def trace(
    model: TambaForCausalLM,
    blocks: TokenBlocks,
    *,
    mixers: Collection[int] = (),
    heads: bool = False,
    streams: Collection[int] = (),
    dtype: torch.dtype | None = None,
    batch_size: int = 8,
    label: str = "teacher reads",
) -> Trace:
    """Run `model` over rows and keep what was asked for; layers above the last of it do not run.

    Args:
        mixers: layers whose mixers are watched.
        heads: keep what attention gives before its output projection too.
        streams: layers before which the residual stream is kept.
        dtype: of matrix products and of what mixers were given and gave; None for the weights' own.
        batch_size: rows at a time.
        label: of the progress bar.
    """
    n, length = blocks.tokens.shape
    last = max([*(i + 1 for i in mixers), *streams], default=0)
    device = model.device
    kept = dtype or model.dtype

    def room(kind: torch.dtype, width: int) -> Tensor:
        return torch.empty(n, length, width, dtype=kind, device=device)

    found = Trace(
        {
            i: Seen(
                room(kept, model.config.hidden_size),
                room(kept, model.config.hidden_size),
                blocks.starts.to(device),
                room(kept, _inner(model, i)) if heads else None,
            )
            for i in mixers
        }
    )
    with computing(model, dtype), progress.task(label, n) as advance:
        first = 0
        for batch in blocks.batches(batch_size):
            rows = slice(first, first + len(batch.tokens))
            hidden, tokens = enter(model, batch.to(device))
            for index in range(last + 1):
                if index in streams:
                    if index not in found.streams:
                        found.streams[index] = room(hidden.dtype, hidden.shape[-1])
                    found.streams[index][rows] = hidden
                if index == last or index == len(model.model.layers):
                    break
                with _watch(model, index, found.mixers.get(index), rows):
                    hidden = model.model.layers[index](hidden, None, tokens)
            first = rows.stop
            advance(len(batch.tokens))
    return found


def _mixer(model: TambaForCausalLM, index: int) -> nn.Module:
    mixer = model.model.layers[index].mixer
    assert isinstance(mixer, nn.Module)
    return mixer


def _inner(model: TambaForCausalLM, index: int) -> int:
    mixer = _mixer(model, index)
    assert isinstance(mixer, Attention)
    return mixer.o_proj.in_features


@contextmanager
def _watch(model: TambaForCausalLM, index: int, seen: Seen | None, rows: slice) -> Iterator[None]:
    """Inside, what goes through the mixer of a layer is written to `rows` of `seen`."""
    if seen is None:
        yield
        return
    mixer = _mixer(model, index)

    def whole(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.inputs[rows] = args[0]
        seen.outputs[rows] = output

    def inner(_: nn.Module, args: tuple[Any, ...]) -> None:
        assert seen.heads is not None
        seen.heads[rows] = args[0]

    with ExitStack() as hooks:
        hooks.callback(mixer.register_forward_hook(whole).remove)
        if seen.heads is not None:
            assert isinstance(mixer, Attention)
            hooks.callback(mixer.o_proj.register_forward_pre_hook(inner).remove)
        yield


@contextmanager
def computing(model: nn.Module, dtype: torch.dtype | None, grad: bool = False) -> Iterator[None]:
    """Matrix products in `dtype` where some weights have another type; gradients only if asked.

    Inside, weights are shortened once, as long as they are leaves that may need gradients: autocast
    keeps the short copies of no others.
    """
    weights = [
        p for n, p in model.named_parameters() if n.rpartition(".")[2] not in RecurrentMixer.FLOAT32
    ]
    short = dtype is not None and any(p.dtype != dtype for p in weights)
    with (
        torch.set_grad_enabled(grad),
        torch.autocast(weights[0].device.type, dtype=dtype, enabled=short),
    ):
        yield


def enter(model: TambaForCausalLM, batch: Batch) -> tuple[Tensor, Tokens]:
    """The embedded tokens [B, T, D] of a batch, and where they stand."""
    hidden = model.model.embed_tokens(batch.tokens)
    return hidden, model.model._locate(hidden, None, batch.position_ids, None, None)


def places(starts: Tensor) -> Tokens:
    """What a recurrent mixer has to know of rows whose documents begin at `starts` [B, T]."""
    inside = bool(starts[:, 1:].any())
    positions = torch.arange(starts.shape[1], device=starts.device)[None]
    return Tokens(positions=positions, starts=starts if inside else None)


def climb(
    model: TambaForCausalLM, hidden: Tensor, tokens: Tokens, first: int, last: int | None = None
) -> Tensor:
    """The residual stream [B, T, D] before layer `first`, taken to before layer `last`."""
    for layer in model.model.layers[first:last]:
        hidden = layer(hidden, None, tokens)
    return hidden


def finish(model: TambaForCausalLM, hidden: Tensor) -> Tensor:
    """The residual stream after the last layer, normed for the head."""
    normed: Tensor = model.model.final_norm(hidden.to(model.model.embed_tokens.weight.dtype))
    return normed


class Cancelled(Exception):
    """Raised inside `each` in work that is no longer wanted."""


def each(
    work: Callable[[Item, Callable[..., None]], Result],
    items: Iterable[Item],
    *,
    device: torch.device,
    label: str,
    total: float | None = None,
) -> list[Result]:
    """``[work(item, advance) for item in items]``, on a CPU as many at a time as torch has threads.

    Each item then computes in one thread, so that small operations need not wait for one another,
    and its result does not depend on how many cores there are.

    Args:
        work: must not depend on the order of items, nor draw from the global random state.
        label: of the progress bar.
        total: units that `advance` counts; None for one an item.
    """
    items = list(items)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    lock, stop = Lock(), Event()
    with progress.task(label, len(items) if total is None else total) as advance:

        def locked(n: float = 1, note: str = "") -> None:
            if stop.is_set():
                raise Cancelled
            with lock:
                advance(n, note)

        def one(item: Item) -> Result:
            result = work(item, locked)
            if total is None:
                locked()
            return result

        if threads == 1 or len(items) < 2:
            return [one(item) for item in items]
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(min(threads, len(items))) as pool:
                waiting = [pool.submit(one, item) for item in items]
                try:
                    return [w.result() for w in waiting]
                except BaseException:
                    stop.set()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:
            torch.set_num_threads(threads)
