"""Which implementation of an operator runs: Triton kernels, a compiled loop, or plain torch.

Kernels run where every tensor lies on one CUDA device and Triton is installed. On a CPU they run
under Triton's interpreter when `TRITON_INTERPRET=1`, for tests. What they do not cover (float64,
an unusual size) goes to plain torch; on a CUDA device that is said once, since it is slower.
Mamba-1's scan and what lies between bfloat16 products have compiled loops for CPUs (Numba), where
plain torch is slow and memory-bound.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from tamba.errors import UserError

logger = logging.getLogger("tamba")

_HAS_TRITON = find_spec("triton") is not None
# Below, a call of a compiled loop costs more than it saves.
_MANY_NUMBERS = 1 << 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_run(
    op: str, *tensors: Tensor | None, unusual: str | None = None, proven: bool = True
) -> bool:
    """Whether `op` on these tensors is for the Triton kernels.

    Args:
        op: the operator's name, for the message.
        tensors: its arguments; None is left out.
        unusual: what about the call the kernels do not cover, or None.
        proven: whether the kernels were compared with the truth on a GPU. Others wait to be asked
            for: what the interpreter finds right may still be miscompiled.

    The environment variable `TAMBA_KERNELS` (`triton` or `torch`; `gluon` for `triton` with what
    `gluon_runs` says; `auto`, or none, to choose by device) decides for tests and comparisons; it
    is read at every call.

    Raises:
        UserError: it says something else.
    """
    asked = _asked()
    given = [t for t in tensors if t is not None]
    forced = asked in ("triton", "gluon")
    if asked == "torch" or not (forced or proven):
        return False
    on_gpu = given[0].is_cuda
    if not on_gpu and not (forced and os.environ.get("TRITON_INTERPRET") == "1"):
        if forced and not torch.compiler.is_compiling():
            _say_once(op, f"TAMBA_KERNELS is {asked}, and its arguments lie on no GPU")
        return False
    why = unusual or _why_not(given)
    if why and not torch.compiler.is_compiling():
        _say_once(op, why)
    return why is None


def gluon_runs() -> bool:
    """Whether kernels may be those in Gluon, Triton's lower-level dialect.

    They were compared with the truth in Python and compiled, and no GPU has run them yet: they wait
    to be asked for by ``TAMBA_KERNELS=gluon``.
    """
    return _asked() == "gluon"


def compiles_for_cpu(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether an operator that computes in `dtype` has a compiled loop for this tensor: on a CPU,
    in float32, where Numba is installed and `TAMBA_KERNELS` does not say `torch`.

    Under torch.compile plain torch runs: it can be traced.
    """
    return (
        tensor.device.type == "cpu"
        and dtype == torch.float32
        and _asked() == "auto"
        and not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and _has_numba()
    )


def rows_for_cpu(*tensors: Tensor) -> bool:
    """Whether what is done to these tensors, row by row, has a compiled loop: on a CPU, for many
    numbers in bfloat16 or float32, where Numba is installed and `TAMBA_KERNELS` says nothing else.
    """
    return (
        tensors[0].numel() >= _MANY_NUMBERS
        and all(t.dtype in (torch.bfloat16, torch.float32) for t in tensors)
        and all(compiles_for_cpu(t, torch.float32) for t in tensors)
    )


def short_products_on_cpu(tensor: Tensor) -> bool:
    """Whether this lies on a CPU whose products autocast computes in bfloat16."""
    return (
        tensor.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def _asked() -> str:
    asked = os.environ.get("TAMBA_KERNELS", "auto")
    if asked not in ("auto", "triton", "gluon", "torch"):
        # A word misspelt would silently compare one path with itself.
        raise UserError("TAMBA_KERNELS", f"is '{asked}'", "set it to triton, torch or auto")
    return asked


def _why_not(tensors: list[Tensor]) -> str | None:
    if not _HAS_TRITON:
        return "Triton is not installed"
    if any(t.device != tensors[0].device for t in tensors):
        return "its arguments lie on different devices"
    odd = next((t.dtype for t in tensors if t.is_floating_point() and t.dtype not in _DTYPES), None)
    return None if odd is None else f"the kernels know no {str(odd).removeprefix('torch.')}"


@cache
def _has_numba() -> bool:
    return find_spec("numba") is not None


@cache
def _say_once(op: str, why: str) -> None:
    logger.warning("%s runs on plain torch, slower than the Triton kernels: %s", op, why)
