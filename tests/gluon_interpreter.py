"""Gluon kernels on a CPU: their Python, run program by program on torch's tensors.

Triton's interpreter does not know Gluon. Here layouts mean nothing and numbers are torch's, but
what is asynchronous is done as late as it may be (`late`), or at once. Late, a copy fills its
place, which holds no number until then, when its barrier is waited for; a product reads shared
memory, and a copy to memory its place, when they are waited for. So what is written too early, or
read before anybody waited, gives other numbers in one of the two ways. What cannot show here: a
missing fence or barrier between threads of one group of warps, and whatever a compiler does.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language import constexpr

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

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Memory:
        return Memory(self.values.view(dtype).view(list(shape)))

    @property
    def place(self) -> int:
        return self.values.data_ptr()


@dataclass
class _Barrier:
    """Complete when all have arrived and all bytes that were announced are there."""

    count: int
    waited: int = 0
    nbytes: int = 0
    phases: int = 0
    copies: list[Callable[[], None]] = field(default_factory=list)

    def settle(self, late: bool) -> bool:
        """Whether a phase is complete now; at a wait `late` copies come to their end."""
        if self.waited == self.count and self.nbytes == 0:
            for copy in self.copies if late else ():
                copy()
            self.copies.clear()
            self.phases, self.waited = self.phases + 1, 0
            return True
        return False


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
    """One program: its number, its barriers, and the parts of it that take turns."""

    def __init__(self, number: int, count: int, late: bool) -> None:
        self.number, self.count, self.late = number, count, late
        self.barriers: dict[int, _Barrier] = {}
        self.kept: list[Tensor] = []
        self.turns = _Turns()

    def init(self, bar: Memory, count: int) -> None:
        self.barriers[bar.place] = _Barrier(count)

    def invalidate(self, bar: Memory) -> None:
        assert not self.barriers.pop(bar.place).copies, "copies that nobody waited for"

    def expect(self, bar: Memory, nbytes: int, pred: Any = True) -> None:
        if pred:
            self.arrive(bar)
            self.barriers[bar.place].nbytes += int(nbytes)

    def arrive(self, bar: Memory, *, count: int = 1, pred: Any = True) -> None:
        if pred:
            barrier = self.barriers[bar.place]
            if barrier.waited == barrier.count:
                barrier.settle(self.late)
            barrier.waited += count
            assert barrier.waited <= barrier.count, "more arrive than are waited for"

    def fill(
        self, tiles: Tiles, at: Sequence[Any], bar: Memory, to: Memory, pred: Any = True
    ) -> None:
        if not pred:
            return
        barrier = self.barriers[bar.place]
        barrier.nbytes -= tiles.block_type.nbytes
        assert barrier.nbytes >= 0, "more bytes than were announced"
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

        def over() -> bool:
            # Passes when the phase of that parity is over: the one before, as it were, at first.
            return barrier.phases % 2 != int(phase) or (
                barrier.settle(self.late) and barrier.phases % 2 != int(phase)
            )

        self.turns.until(over)

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Memory:
        values = torch.empty(tuple(shape), dtype=dtype)
        values.fill_(float("nan") if dtype.is_floating_point else -12345)
        self.kept.append(values)  # so that addresses tell barriers apart
        return Memory(values)

    def parts(
        self, run: Callable[[_Part, Any, Any], None], functions: Sequence[Any]
    ) -> list[_Part]:
        """Run functions side by side, the last of them first in every round."""
        made = [_Part(self) for _ in functions]
        jobs = [
            lambda part=part, f=f, given=given: run(part, f, given)
            for part, (f, given) in zip(made, functions, strict=True)
        ]
        self.turns.run(jobs[::-1])
        return made


class _Turns:
    """Threads of which one runs at a time, until it has to wait for another."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._order: list[int] = []
        self._waiting: dict[int, Callable[[], bool]] = {}
        self._error: BaseException | None = None

    def until(self, over: Callable[[], bool]) -> None:
        if over():
            return
        if not self._order:
            raise AssertionError("waits for ever")
        me = self._order[0]
        with self._condition:
            self._waiting[me] = over
            self._next()
            while self._order[0] != me or me in self._waiting:
                if self._error is not None:
                    raise RuntimeError("another part failed")
                self._condition.wait()

    def _next(self) -> None:
        """The next part whose wait is over has its turn; all wait: they do so for ever."""
        for _ in range(len(self._order)):
            self._order.append(self._order.pop(0))
            over = self._waiting.get(self._order[0])
            if over is None or over():
                self._waiting.pop(self._order[0], None)
                self._condition.notify_all()
                return
        self._error = self._error or AssertionError("all parts wait for ever")
        self._condition.notify_all()

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        def begin(me: int) -> None:
            with self._condition:
                while self._order[0] != me:
                    if self._error is not None:
                        return
                    self._condition.wait()
                self._waiting.pop(me, None)
            try:
                jobs[me]()
            except BaseException as error:
                self._error = self._error or error
            with self._condition:
                self._order.remove(me)
                if self._order:
                    self._order.insert(0, self._order.pop())
                    self._next()
                self._condition.notify_all()

        self._order = list(range(len(jobs)))
        threads = [threading.Thread(target=begin, args=(i,)) for i in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error


class _Part:
    """Warps that run one function: what they have under way."""

    def __init__(self, program: _Program) -> None:
        self.late = program.late
        self.products: list[_Product] = []
        self.writes: list[Callable[[], None]] = []

    def spill(self, tiles: Tiles, at: Sequence[Any], source: Memory) -> None:
        at = [int(a) for a in at]
        if self.late:
            self.writes.append(lambda: tiles.write(at, source.values))
        else:
            tiles.write(at, source.values)

    def store_wait(self, pendings: int) -> None:
        while len(self.writes) > pendings:
            self.writes.pop(0)()

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

    def finish(self) -> None:
        assert not self.products, "products that nobody waited for"
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


_NOTHING = _Nothing()
_LAYOUTS = (
    *("NVMMADistributedLayout", "DotOperandLayout", "BlockedLayout", "SliceLayout"),
    *("NVMMASharedLayout", "SwizzledSharedLayout"),
)


def _run(program: _Program, part: _Part, function: Any, given: Any, named: Any = None) -> None:
    """A function's Python, in which names of Gluon mean those of this module."""

    def split(functions: Any, warps: Sequence[int], registers: Sequence[int]) -> None:
        assert len(functions) == len(warps) + 1 == len(registers) + 1
        kernels = [(compiled[id(f)], arguments) for f, arguments in functions]
        program.parts(lambda part, f, given: _run(program, part, f, given), kernels)

    gl = types.SimpleNamespace(
        **_TYPES,
        **dict.fromkeys(_LAYOUTS, _NOTHING),
        constexpr=lambda x: x,
        program_id=lambda axis: torch.tensor(program.number, dtype=torch.int32),
        arange=lambda a, b, layout=None: torch.arange(a, b, dtype=torch.int32),
        zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
        minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
        where=_where,
        exp2=torch.exp2,
        sum=lambda x, axis: x.sum(axis),
        load=_load,
        store=_store,
        static_range=range,
        thread_barrier=lambda: None,
        allocate_shared_memory=program.allocate,
        convert_layout=lambda x, layout, **_: x,
        warp_specialize=split,
    )
    names = {
        **function.fn.__globals__,
        "gl": gl,
        "tma": types.SimpleNamespace(
            async_copy_global_to_shared=program.fill,
            async_copy_shared_to_global=part.spill,
            store_wait=part.store_wait,
        ),
        "mbarrier": types.SimpleNamespace(
            init=program.init,
            invalidate=program.invalidate,
            expect=program.expect,
            arrive=program.arrive,
            wait=program.wait,
            MBarrierLayout=_NOTHING,
        ),
        "fence_async_shared": lambda *_, **__: None,
        "warpgroup_mma": part.product,
        "warpgroup_mma_wait": part.product_wait,
    }
    compiled: dict[int, Any] = {}

    def python(kernel: Any) -> Callable[..., Any]:
        made = types.FunctionType(kernel.fn.__code__, names, None, kernel.fn.__defaults__)
        made.__kwdefaults__ = kernel.fn.__kwdefaults__
        compiled[id(made)] = kernel
        return made

    for name, value in list(names.items()):
        if isinstance(value, GluonJITFunction):
            names[name] = python(value)
        elif isinstance(value, constexpr):
            names[name] = value.value
    python(function)(*given, **(named or {}))
    part.finish()


def launch(kernel: Any, programs: int, *args: Any, late: bool, **constants: Any) -> None:
    """Run `kernel` on so many programs; tensors become pointers to their first number."""
    given = [pointer(a) if isinstance(a, Tensor) else a for a in args]
    given = [torch.tensor(a, dtype=torch.int32) if type(a) is int else a for a in given]
    for number in range(programs):
        program = _Program(number, programs, late)
        _run(program, _Part(program), kernel, given, constants)
        left = [b for b in program.barriers.values() if b.copies]
        assert not left, "copies that nobody waited for"
