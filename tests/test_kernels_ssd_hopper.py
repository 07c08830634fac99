"""SSD's kernels for Hopper cards: their Python against the recurrence in float64, and what they
become on such a card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gluon_interpreter
import interpreter
from compare import assert_same
from ops_cases import Arguments, assert_agree
from tamba.ops import ssd
from tamba.ops.kernels import ssd as module
from tamba.ops.kernels import ssd_hopper, tiles
from test_kernels_ssd import SUMS, arguments, truth

kernels = interpreter.kernels
pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels themselves run"),
]


class _Run:
    """In place of a launcher."""

    def __init__(self, kernel: Any, late: bool) -> None:
        self.kernel, self.late, self.programs = kernel, late, 0

    def __call__(
        self, grid: tuple[int, int, int], given: Any, constants: Any, sizes: Any, key: Any
    ) -> None:
        self.programs += grid[0]
        gluon_interpreter.launch(
            self.kernel, grid[0], *map(_given, given), late=self.late, **constants
        )


def _given(value: Any) -> Any:
    if hasattr(value, "block_shape"):
        base = value.base.detach()
        whole = torch.as_strided(base, value.shape, value.strides, base.storage_offset())
        return gluon_interpreter.Tiles(whole, value.block_shape)
    return value.detach() if isinstance(value, Tensor) else value


@pytest.fixture(params=[True, False], ids=["late", "early"])
def hopper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Run]:
    """A card of four multiprocessors, so that sequences are cut; what ran the gradients."""
    scan = _Run(ssd_hopper.scan_kernel, request.param)
    grads = _Run(ssd_hopper.grads_kernel, request.param)
    monkeypatch.setattr(module, "_hopper_scan", scan)
    monkeypatch.setattr(module, "_hopper_grads", grads)
    monkeypatch.setenv("TAMBA_KERNELS", "gluon")
    monkeypatch.setattr(module, "architecture", lambda device: "sm90")
    monkeypatch.setattr(module, "multiprocessors", lambda device: 4)
    sizes = {"chunk": 64, "head_dim": 64, "per_sm": 2, "warps": 4, "stages": 2}
    table = {
        name: {**size, "per_sm": 1, "states": 100}
        for name, size in tiles.TILES["sm90"].items()
        if "hopper" in name
    }
    names = ("ssd_scan", "ssd_segments", "ssd_states")
    with tiles.using({**dict.fromkeys(names, sizes), **table}):
        yield grads
    assert scan.programs


def agree(made: Arguments) -> None:
    assert_agree(ssd, truth, made, "half", "half_gradient", without=SUMS)


@pytest.mark.parametrize(
    "given",
    [
        {"length": 450},
        {"length": 300, "heads": 6, "groups": 2, "gate": False, "starts": True},  # in slices
        {"length": 64, "heads": 5, "padding": True, "batch": 2},  # several programs a chunk
        {"length": 150, "heads": 3, "groups": 3, "d_state": 64, "starts": True},  # no sums
        {"length": 100, "heads": 4, "groups": 4, "padding": True},
        {"length": 130, "head_dim": 128, "d_state": 64, "heads": 4, "groups": 2, "starts": True},
        {"length": 130, "head_dim": 128, "heads": 3, "groups": 3, "gate": False},
        {"length": 1, "batch": 3, "state": False},
    ],
    ids=lambda given: ", ".join(f"{k} {v}" for k, v in given.items()),
)
def test_agrees_with_float64(given: dict[str, Any], hopper: _Run) -> None:
    agree(arguments(**{"head_dim": 64, "d_state": 128, "dtype": torch.bfloat16} | given))
    assert hopper.programs


def test_large_and_tiny_steps(hopper: _Run) -> None:
    made = arguments(200, head_dim=64, d_state=128, dtype=torch.bfloat16)
    for low, high in ((-9.0, -4.0), (0.0, 8.0)):
        made.tensors["dt"] = torch.linspace(low, high, 400).view(1, 200, 2).requires_grad_()
        agree(made)


def test_what_a_backward_pass_needs_is_kept(hopper: _Run) -> None:
    """With a gate y before it is written too."""
    made = arguments(150, head_dim=64, d_state=64, dtype=torch.bfloat16)
    exact = made.to(torch.float64)
    y, _ = made.call(ssd)
    want, _ = exact.call(truth)
    assert_same(y, want, "half", "y")
    before = y.grad_fn.saved_tensors[-1]  # type: ignore[union-attr]
    ungated = {**exact.tensors, "z": None}
    with torch.no_grad():
        want, _ = truth(**ungated, **exact.masks, **exact.options)
    assert_same(before, want, "half", "before the gate")


def test_products_overlap_on_a_hopper_card() -> None:
    """Compiled where there is none: ptxas makes no product wait for another, and little that does
    not fit the registers goes to memory."""
    tests = Path(__file__).parent
    program = [sys.executable, str(tests / "hopper_code.py"), "gluon"]
    paths = [str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert {name.split()[0] for name in seen} == {"scan_kernel", "grads_kernel"}
    for name, found in seen.items():
        assert found["waits"] == 0, name
        # In bytes; of heads of 128 channels more sums are held.
        assert found["stack"] <= (336 if "P128" in name else 64), (name, found)
