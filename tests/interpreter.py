"""Triton's interpreter, so that kernels can be tested where there is no GPU.

It is on where there is no GPU (conftest.py). Importing this skips the importing module where Triton
is missing. What the interpreter cannot show: how the compiler treats a kernel; `pytest -m gpu` can.
"""

from __future__ import annotations

import inspect
from functools import cache, cached_property
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime import interpreter

_patch_tensor, _patch_attribute = interpreter._patch_lang_tensor, interpreter._patch_attr
_patch, _Scope = interpreter._patch_lang, interpreter._LangPatchScope
_numpy_dtype = interpreter._get_np_dtype
_core = interpreter.tl.core


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    """Triton 3.6 turns one-element arrays into loop bounds by `int`, which numpy 2.4 refuses."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


class _Found(dict[str, Any]):
    """In place of a scope: what would be set there."""

    def set_attr(self, package: Any, name: str, value: Any) -> None:
        self[name] = value


@cache
def _builtins(package: Any, builder: Any) -> dict[str, Any]:
    found = _Found()
    for name, member in inspect.getmembers(package, _core.is_builtin):
        _patch_attribute(package, name, member, builder, found)
    return found


def _patch_builtins(package: Any, builder: Any, scope: Any) -> None:
    """Every launch looks through all of the language for what to replace; it is the same each time,
    and took a quarter of the time."""
    for name, value in _builtins(package, builder).items():
        scope.set_attr(package, name, value)


@cache
def _languages(function: Any) -> frozenset[str]:
    seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
    return frozenset(value.__name__ for value in seen if value in (interpreter.tl, _core))


_replaced: set[str] = set()


class _Launch(_Scope):
    """What a launch replaced; nothing is replaced after it."""

    def restore(self) -> None:
        super().restore()
        _replaced.clear()


def _patch_once(function: Any) -> Any:
    """A function that a kernel calls finds replaced what the launch replaced; doing it again for
    every call took a sixth of the time."""
    if _languages(function) <= _replaced:
        return _Scope()
    scope = _Launch()
    scope._changes = _patch(function)._changes
    _replaced.update(_languages(function))
    return scope


# Every tensor's shape is one of the language's tuples, and its type, with a name in words, took a
# sixth of the time; hardly ever does anything ask for it.
_lazy_type = cached_property(lambda self: _core._type_for_tuple_values(self.values))
_lazy_type.__set_name__(_core.tuple, "type")
_make_tuple = _core.tuple.__init__


def _tuple(self: Any, args: Any, type: Any = None) -> None:
    if type is None:
        self.values = list(args)
    else:
        _make_tuple(self, args, type)


_numpy_dtypes: dict[str, Any] = {}


def _known_dtype(dtype: Any) -> Any:
    """From a table that is made once, not at every call."""
    scalar = dtype.scalar
    name = "*" if scalar.is_ptr() else scalar.name
    if name not in _numpy_dtypes:
        _numpy_dtypes[name] = _numpy_dtype(dtype)
    return _numpy_dtypes[name]


def _assert_no_overflow(_: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    """Triton works this out by operations of its own, a quarter of the time, and looks at what
    comes of it only in its debug mode."""
    if lhs.dtype.int_bitwidth < 64:
        wide = _WIDE[operation.__name__](*(x.handle.data.astype(np.int64) for x in (lhs, rhs)))
        least, most = lhs.dtype.get_int_min_value(), lhs.dtype.get_int_max_value()
        assert least <= wide.min() and wide.max() <= most, f"{lhs.dtype} overflows"


_WIDE = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

interpreter._patch_lang_tensor = _patch_tensor_and_index
interpreter._patch_builtin = _patch_builtins
interpreter._get_np_dtype = _known_dtype
interpreter._patch_lang = _patch_once
INTERPRETED = triton.knobs.runtime.interpret
if INTERPRETED:  # of these the compiler has need as they are
    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = _assert_no_overflow
    _core.tuple.type, _core.tuple.__init__ = _lazy_type, _tuple
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators run on their Triton kernels, whatever the device."""
    monkeypatch.setenv("TAMBA_KERNELS", "triton")
