"""Gluon kernels on a CPU: their Python, run program by program on torch's tensors.

Triton's interpreter does not know Gluon. Here layouts mean nothing and numbers are torch's, but what
is asynchronous is done as late as it may be (`late`), or at once: a copy fills its place, which holds
no number until then, when its barrier is waited for; a product reads shared memory when it is waited
for; a copy to memory reads its place when that is waited for. So a place that is written too early,
or read before anybody waited, gives other numbers in one of the two ways. What cannot show here: a
missing fence or barrier between threads, and whatever a compiler does.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction

_TYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int32": torch.int32,
    "int64": torch.int64,
}


class Pointer:
    """Places in a flat view of a tensor's memory."""

    def __init__(self, memory: Tensor, at: Any = 0) -> None:
        self.memory, self.at = memory, at

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.memory, self.at + more)


def pointer(tensor: Tensor) -> Pointer:
    """To the first number of a contiguous tensor."""
    return Pointer(tensor.view(-1))


class Tiles:
    """A tensor [B, T, C] read and written in tiles, zeros beyond its edges."""

    layout = None

    def __init__(self, tensor: Tensor, block: Sequence[int]) -> None:
        self.tensor, self.block = tensor, tuple(block)
        count = 1
        for n in self.block:
            count *= n
        nbytes = count * tensor.element_size()
        self.block_type = types.SimpleNamespace(nbytes=nbytes)
        self.nbytes_per_cta = nbytes

    def _ranges(self, at: Sequence[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        there, here = [], []
        for first, n, size in zip(map(int, at), self.block, self.tensor.shape, strict=True):
            low, high = max(first, 0), max(min(first + n, size), 0)
            there.append(slice(low, max(low, high)))
            here.append(slice(low - first, max(low, high) - first))
        return tuple(there), tuple(here)

    def read(self, at: Sequence[Any]) -> Tensor:
        there, here = self._ranges(at)
        found = torch.zeros(self.block, dtype=self.tensor.dtype)
        found[here] = self.tensor[there]
        return found

    def write(self, at: Sequence[Any], values: Tensor) -> None:
        there, here = self._ranges(at)
        self.tensor[there] = values[here]


class Memory:
    """Shared memory, or a view of it."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def index(self, i: Any) -> Memory:
        return Memory(self.values[int(i)])

    def slice(self, start: Any, length: int, dim: int = 0) -> Memory:
        return Memory(self.values.narrow(dim, int(start), length))

    def reshape(self, shape: Sequence[int]) -> Memory:
        return Memory(self.values.view(list(shape)))

    def permute(self, order: Sequence[int]) -> Memory:
        return Memory(self.values.permute(list(order)))

    def load(self, layout: Any = None) -> Tensor:
        return self.values.clone()

    def store(self, values: Tensor) -> None:
        assert self.values.shape == values.shape, (self.values.shape, values.shape)
        assert self.values.dtype == values.dtype, (self.values.dtype, values.dtype)
        self.values.copy_(values)

    @property
    def place(self) -> int:
        return self.values.data_ptr()


@dataclass
class _Barrier:
    expected: int = 0
    arrived: int = 0
    phases: int = 0
    copies: list[Callable[[], None]] = field(default_factory=list)
    armed: bool = False


class _Product:
    """A product that is under way."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute: Callable[[], Tensor] | None = compute
        self.values: Tensor | None = None

    def finish(self) -> Tensor:
        if self._compute is not None:
            self.values, self._compute = self._compute(), None
        assert self.values is not None
        return self.values


class _Program:
    """One program: its number, and what it has under way."""

    def __init__(self, number: int, count: int, late: bool) -> None:
        self.number, self.count, self.late = number, count, late
        self.barriers: dict[int, _Barrier] = {}
        self.products: list[_Product] = []
        self.writes: list[Callable[[], None]] = []
        self.kept: list[Tensor] = []

    # --- tma, mbarrier

    def init(self, bar: Memory, count: int) -> None:
        self.barriers[bar.place] = _Barrier()

    def invalidate(self, bar: Memory) -> None:
        assert not self.barriers.pop(bar.place).copies, "copies that nobody waited for"

    def expect(self, bar: Memory, nbytes: int, pred: Any = True) -> None:
        if pred:
            barrier = self.barriers[bar.place]
            assert not barrier.armed, "a barrier is used again before it was waited for"
            barrier.expected, barrier.arrived, barrier.armed = int(nbytes), 0, True

    def fill(self, tiles: Tiles, at: Sequence[Any], bar: Memory, to: Memory, pred: Any = True) -> None:
        if not pred:
            return
        barrier = self.barriers[bar.place]
        assert barrier.armed
        barrier.arrived += tiles.block_type.nbytes
        values, place = tiles.read(at), to.values
        assert place.shape == values.shape and place.dtype == values.dtype
        if self.late:
            place.fill_(float("nan"))
            barrier.copies.append(lambda: place.copy_(values))
        else:
            place.copy_(values)

    def wait(self, bar: Memory, phase: Any, pred: Any = True, deps: Any = ()) -> None:
        if not pred:
            return
        barrier = self.barriers[bar.place]
        if barrier.armed and barrier.phases % 2 == int(phase):
            assert barrier.arrived == barrier.expected, "waits for bytes that nobody sends"
            for copy in barrier.copies:
                copy()
            barrier.copies.clear()
            barrier.armed = False
            barrier.phases += 1
        assert barrier.phases % 2 != int(phase), "waits for ever"

    def spill(self, tiles: Tiles, at: Sequence[Any], source: Memory) -> None:
        at = [int(a) for a in at]
        if self.late:
            self.writes.append(lambda: tiles.write(at, source.values))
        else:
            tiles.write(at, source.values)

    def store_wait(self, pendings: int) -> None:
        while len(self.writes) > pendings:
            self.writes.pop(0)()

    # --- products

    def product(
        self, a: Any, b: Memory, acc: Any, *, use_acc: Any = True, is_async: bool = False, **_: Any
    ) -> Any:
        assert isinstance(b, Memory)

        def compute() -> Tensor:
            left = a.values if isinstance(a, Memory) else a
            assert left.dtype == b.values.dtype
            found = left.float() @ b.values.float()
            begun = acc.finish() if isinstance(acc, _Product) else acc
            return found + begun if use_acc else found

        made = _Product(compute)
        if not self.late or not is_async:
            made.finish()
        if not is_async:
            return made.finish()
        self.products.append(made)
        return made

    def product_wait(self, pendings: int = 0, deps: Sequence[Any] = ()) -> Any:
        while len(self.products) > pendings:
            self.products.pop(0).finish()
        found = []
        for dep in deps:
            if isinstance(dep, _Product):
                assert dep not in self.products, "read before it was waited for"
            found.append(dep.finish() if isinstance(dep, _Product) else dep)
        return found[0] if len(found) == 1 else tuple(found)

    # --- memory

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Memory:
        values = torch.empty(tuple(shape), dtype=dtype)
        values.fill_(float("nan") if dtype.is_floating_point else -12345)
        self.kept.append(values)  # so that addresses tell barriers apart
        return Memory(values)

    def finish(self) -> None:
        assert not self.products
        assert all(not b.copies for b in self.barriers.values()), "copies that nobody waited for"
        self.store_wait(0)


def _load(places: Pointer, mask: Any = None, other: Any = 0.0) -> Tensor:
    at = torch.as_tensor(places.at)
    if mask is None:
        return places.memory[at.long()]
    mask = torch.as_tensor(mask).expand(at.shape)
    found = torch.full(at.shape, other, dtype=places.memory.dtype)
    found[mask] = places.memory[at[mask].long()]
    return found


def _store(places: Pointer, values: Any, mask: Any = None) -> None:
    at = torch.as_tensor(places.at)
    values = torch.as_tensor(values).to(places.memory.dtype).expand(at.shape)
    if mask is None:
        places.memory[at.long()] = values
    else:
        mask = torch.as_tensor(mask).expand(at.shape)
        places.memory[at[mask].long()] = values[mask]


def _where(mask: Any, a: Any, b: Any) -> Tensor:
    tensors = [t for t in (a, b) if isinstance(t, Tensor)]
    dtype = tensors[0].dtype if tensors else torch.float32
    a, b = (t if isinstance(t, Tensor) else torch.tensor(t, dtype=dtype) for t in (a, b))
    return torch.where(torch.as_tensor(mask), a, b)


class _Nothing:
    """Layouts."""

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return self

    def __getattr__(self, name: str) -> _Nothing:
        return self


def _language(program: _Program) -> dict[str, Any]:
    nothing = _Nothing()
    gl = types.SimpleNamespace(
        **_TYPES,
        constexpr=lambda x: x,
        program_id=lambda axis: torch.tensor(program.number, dtype=torch.int32),
        num_programs=lambda axis: torch.tensor(program.count, dtype=torch.int32),
        arange=lambda a, b, layout=None: torch.arange(a, b, dtype=torch.int32),
        zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
        minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
        maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
        where=_where,
        exp2=torch.exp2,
        sum=lambda x, axis: x.sum(axis),
        load=_load,
        store=_store,
        static_range=range,
        static_assert=lambda *_: None,
        thread_barrier=lambda: None,
        allocate_shared_memory=program.allocate,
        convert_layout=lambda x, layout, **_: x,
        join=lambda a, b: torch.stack([a, b], -1),
        **dict.fromkeys(
            ("NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout", "SliceLayout"), nothing
        ),
        NVMMASharedLayout=nothing,
        SwizzledSharedLayout=nothing,
        DistributedLinearLayout=nothing,
    )
    return {
        "gl": gl,
        "tma": types.SimpleNamespace(
            async_copy_global_to_shared=program.fill,
            async_copy_shared_to_global=program.spill,
            store_wait=program.store_wait,
        ),
        "mbarrier": types.SimpleNamespace(
            init=program.init,
            invalidate=program.invalidate,
            expect=program.expect,
            wait=program.wait,
            MBarrierLayout=nothing,
        ),
        "fence_async_shared": lambda *_, **__: None,
        "warpgroup_mma": program.product,
        "warpgroup_mma_wait": program.product_wait,
    }


def _bound(kernel: Any, replaced: dict[str, Any]) -> Callable[..., Any]:
    """A kernel's Python, in which names of Gluon mean those of this module."""
    names = {**kernel.fn.__globals__, **replaced}

    def python(function: Any) -> Callable[..., Any]:
        made = types.FunctionType(function.fn.__code__, names, None, function.fn.__defaults__)
        made.__kwdefaults__ = function.fn.__kwdefaults__
        return made

    for name, value in list(names.items()):
        if isinstance(value, GluonJITFunction):
            names[name] = python(value)
    return python(kernel)


def launch(kernel: Any, programs: int, *args: Any, late: bool, **constants: Any) -> None:
    """Run `kernel` on so many programs; tensors become pointers to their first number."""
    given = [pointer(a) if isinstance(a, Tensor) else a for a in args]
    given = [torch.tensor(a, dtype=torch.int32) if type(a) is int else a for a in given]
    for number in range(programs):
        program = _Program(number, programs, late)
        _bound(kernel, _language(program))(*given, **constants)
        program.finish()


__all__ = ["Tiles", "inf", "launch", "pointer"]
