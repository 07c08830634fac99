"""Triton's interpreter, so that kernels can be tested where there is no GPU.

It is on where there is no GPU (conftest.py). Importing this skips the importing module where Triton
is missing. What the interpreter cannot show: how the compiler treats a kernel; `pytest -m gpu` can.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    """Triton 3.6 turns one-element arrays into loop bounds by `int`, which numpy 2.4 refuses."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_and_index
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators run on their Triton kernels, whatever the device."""
    monkeypatch.setenv("TAMBA_KERNELS", "triton")
