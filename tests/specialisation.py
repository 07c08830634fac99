"""What Triton would compile a kernel for, found without a GPU: launches are bound, not run.

Triton looks a binary up by what it has specialised a launch on: dtypes, constants, and of integers
whether they are 1 or divisible by 16, of pointers whether they are aligned. The same code of
Triton's is asked here, for a Hopper card, with CPU tensors that say they lie on one. Outputs stay
uninitialised.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

from tamba.ops.kernels import conv, selective_scan, ssd, tiles

# A kernel's name with what it would be compiled for: one (name, kind) an argument, and options.
Launch = tuple[str, tuple[tuple[str, str], ...], str]


@cache
def _binder(kernel: Any) -> Any:
    made = JITFunction(kernel.fn, **kernel.kwargs) if interpreted(kernel) else kernel
    backend = make_backend(GPUTarget("cuda", 90, 32))
    return made.arg_names, create_function_from_signature(made.signature, made.params, backend)


def forget_binders() -> None:
    """After a kernel was changed."""
    _binder.cache_clear()


def interpreted(kernel: Any) -> bool:
    return isinstance(kernel, InterpretedFunction)


def key_of(kernel: Any, *args: Any, **kwargs: Any) -> Launch:
    """What the launch of `kernel` with these arguments is compiled for."""
    names, bind = _binder(kernel)
    _, kinds, options = bind(*args, **kwargs)
    named = tuple((n, str(kind)) for n, kind in zip(names, kinds, strict=True))
    return kernel.fn.__module__ + "." + kernel.fn.__name__, named, str(sorted(options.items()))


@contextmanager
def launches(known_kinds: set[Any] | None = None) -> Iterator[list[Launch]]:
    """Launches inside, none of which runs; tensors say that they are on a card with 132
    multiprocessors, and operators take their kernels. Calls of `known_kinds` went before."""
    known_kinds = set() if known_kinds is None else known_kinds
    found: list[Launch] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append(key_of(self, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        for kind in (JITFunction, InterpretedFunction):
            patch.setattr(kind, "run", record)
        patch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        patch.setattr(tiles, "architecture", lambda device: "sm90")
        for module in (conv, selective_scan, ssd):
            if hasattr(module, "multiprocessors"):
                patch.setattr(module, "multiprocessors", lambda device: 132)
        patch.setattr(selective_scan, "_known_kinds", known_kinds)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(ssd, "_on", lambda tensor: nullcontext())
        patch.setenv("TAMBA_KERNELS", "triton")
        yield found


def differences(known: set[Launch], new: set[Launch]) -> list[str]:
    """Of launches not `known`: the kernel, and the arguments in which it differs from the known
    launch nearest to it."""
    told = []
    for name, kinds, options in sorted(new - known):
        others = [k for k in known if k[0] == name]
        if not others:
            told.append(f"{name}: launched for the first time")
            continue
        odd = [
            [f"{a[0]} {b[1]} then {a[1]}" for a, b in zip(kinds, other[1], strict=True) if a != b]
            + ([] if options == other[2] else [f"options {other[2]} then {options}"])
            for other in others
        ]
        told.append(f"{name}: " + ", ".join(min(odd, key=len)))
    return told
