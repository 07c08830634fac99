"""What every test runs under: one thread, fixed seeds, no network."""

from __future__ import annotations

import os

# Before torch and the hub's library are imported, which read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Triton reads this when first imported, by whatever test; without a GPU kernels are interpreted.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gc
import random
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers.utils.logging import disable_progress_bar

# Writing a tiny model has a bar of transformers', which a test of our messages would read.
disable_progress_bar()

# The same examples every time, however slow the machine: a failing test is a fault, not the
# weather.
settings.register_profile(
    "tamba", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tamba")


@pytest.fixture(autouse=True)
def _same_each_time() -> Iterator[None]:
    """Seeds and defaults are a test's own: what it changes does not reach the next one."""
    random.seed(0)
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    _leave_imports_alone()
    # Deterministic mode fills fresh memory with NaN: what is read before it is written shows.
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(dtype)


_imported = 0


def _leave_imports_alone() -> None:
    """What imports made is looked through no more by the collections, up to a third of a second
    each, that accelerate asks for after every stage of training. Tests import too."""
    global _imported
    if _imported != (now := len(sys.modules)):
        gc.freeze()
        _imported = now


def pytest_collection_finish() -> None:
    """Not to keep for good what collecting tests left over."""
    gc.collect()


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Bytes are no name: unreadable, and packed ones differ from process to process."""
    return argname if isinstance(val, bytes) else None
