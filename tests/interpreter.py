"""Triton's interpreter, so that kernels can be tested where there is no GPU.

It is on where there is no GPU (conftest.py). Importing this skips the importing module where Triton
is missing. What the interpreter cannot show: how the compiler treats a kernel; `pytest -m gpu` can.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter

_patch_tensor, _patch_attribute = interpreter._patch_lang_tensor, interpreter._patch_attr
_numpy_dtype = interpreter._get_np_dtype


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
    for name, member in inspect.getmembers(package, interpreter.tl.core.is_builtin):
        _patch_attribute(package, name, member, builder, found)
    return found


def _patch_builtins(package: Any, builder: Any, scope: Any) -> None:
    """Every launch, and every call of one kernel's function by another, looks through all of the
    language for what to replace; it is the same each time, and took a quarter of the time."""
    for name, value in _builtins(package, builder).items():
        scope.set_attr(package, name, value)


_numpy_dtypes: dict[str, Any] = {}


def _known_dtype(dtype: Any) -> Any:
    """From a table that is made once, not at every call."""
    scalar = dtype.scalar
    name = "*" if scalar.is_ptr() else scalar.name
    if name not in _numpy_dtypes:
        _numpy_dtypes[name] = _numpy_dtype(dtype)
    return _numpy_dtypes[name]


interpreter._patch_lang_tensor = _patch_tensor_and_index
interpreter._patch_builtin = _patch_builtins
interpreter._get_np_dtype = _known_dtype
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators run on their Triton kernels, whatever the device."""
    monkeypatch.setenv("TAMBA_KERNELS", "triton")
