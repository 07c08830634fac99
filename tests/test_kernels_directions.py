"""Triton kernels that compare directions, beside float64: interpreted here, compiled with
`-m gpu`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interpreter import DEVICE, kernels  # isort: skip  # before the kernels
from models import random_ids, tiny_model
from tamba.analyze.distances import state_scores
from tamba.data import TokenBlocks
from tamba.ops import directions
from tamba.ops.directions import Compared, compare, faulty
from tamba.ops.kernels import directions as module
from tamba.ops.kernels.tiles import using

__all__ = ["kernels"]
pytestmark = pytest.mark.usefixtures("kernels", "tiles")

MEAN = 5e-8
"""Of the mean angle of a row and of the mean of one minus cosines: 1e-6 is promised."""
SINGLE = 1.5e-7
"""Of the angle of one token."""


@pytest.fixture
def tiles() -> Iterator[None]:
    """Few programs where each is interpreted; the last of them not full."""
    few = {
        "lengths": {"tokens": 32, "width": 16, "warps": 1},
        "chords": {"states": 8, "tokens": 16, "width": 16, "warps": 1},
        "chord_sums": {"tokens": 8, "warps": 1},
    }
    with using({} if DEVICE.type == "cuda" else few):
        yield


def walk(S: int, B: int, T: int, D: int) -> list[Tensor]:
    """States as layers leave them: each turns the last by an angle from none to half a turn."""
    generator = torch.Generator().manual_seed(S + D)
    x = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    states = [x]
    for index in range(1, S):
        step = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
        size = (0.0, 1e-4, 1e-2, 0.3, 1.0, 3.0)[index % 6]
        sign = -1.0 if index % 5 == 4 else 1.0
        states.append(sign * (states[-1] + size * step) * (2.0, 0.3)[index % 2])
    return states


def uneven(B: int, T: int) -> Tensor:
    """Padding on either side, and holes as separators leave them."""
    counts = torch.ones(B, T, dtype=torch.bool)
    counts[0, : T // 3] = False
    counts[-1, -2:] = False
    counts[-1, T // 2] = False
    return counts


def truth(states: list[Tensor], counts: Tensor) -> Compared:
    """Angles of chords in float64, and HSIC as torch's operators have it in float64, which its own
    test holds against the definition."""
    wide = torch.stack([s.detach().cpu().double() for s in states], dim=2)
    unit = wide / wide.norm(dim=-1, keepdim=True)
    B, _, S, _ = unit.shape
    found = torch.zeros(3, B, S, S, dtype=torch.float64)
    for b in range(B):
        u = unit[b, counts[b]]
        minus = (u[:, :, None] - u[:, None]).norm(dim=-1)
        plus = (u[:, :, None] + u[:, None]).norm(dim=-1)
        angle = 2 / math.pi * torch.atan2(minus, plus)
        found[0, b], found[1, b] = angle.mean(0), angle[-1]
        found[2, b] = minus.square().mean(0) / 2
    hsic = directions._by_torch([s.cpu().double() for s in states], counts).dependence
    return Compared(found[0], found[1], found[2].diagonal(1, 1, 2), hsic, torch.tensor(0))


def check(states: list[Tensor], counts: Tensor) -> None:
    got, want = compare([s.to(DEVICE) for s in states], counts), truth(states, counts)
    assert faulty(int(got.fault), len(counts)) is None
    for name, bound in (("angles", MEAN), ("last", SINGLE), ("apart", MEAN)):
        a, b = getattr(got, name).cpu(), getattr(want, name)
        assert a.dtype == torch.float64 and a.shape == b.shape, name
        assert float((a - b).abs().max()) < bound, (name, float((a - b).abs().max()))
    own = want.dependence.diagonal(0, 1, 2)
    scale = (own[:, :, None] * own[:, None]).abs().sqrt()
    off = (got.dependence.cpu() - want.dependence).abs()
    # Tensor cores cut sums off.
    assert float((off / (scale + 1e-12)).max()) < (1e-5 if DEVICE.type == "cuda" else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("S", "D"), [(4, 64), (9, 40)])
def test_angles_and_dependence_beside_float64(dtype: torch.dtype, S: int, D: int) -> None:
    states = [s.to(dtype) for s in walk(S, 3, 24, D)]
    check(states, uneven(3, 24))


def test_a_width_and_states_of_no_round_number() -> None:
    """Rows whose addresses are no multiples of 16 bytes, a state given as a view."""
    states = [s.to(torch.bfloat16) for s in walk(3, 2, 7, 37)]
    states[1] = torch.cat([states[1], states[1]], dim=-1)[..., :37]
    check(states, uneven(2, 7))


def test_addresses_that_do_not_fit_one_another() -> None:
    states = [s.float() for s in walk(3, 2, 8, 32)]
    states[1] = torch.cat([torch.zeros(1), states[1].flatten()])[1:].view(2, 8, 32)
    assert (states[1].data_ptr() - states[0].data_ptr()) % 16 == 4
    check(states, uneven(2, 8))


def test_states_of_two_types() -> None:
    states = [s.float() for s in walk(3, 2, 8, 32)]
    states[2] = states[2].bfloat16()
    check(states, uneven(2, 8))


def test_rows_of_many_groups_and_of_none() -> None:
    counts = torch.zeros(3, 200, dtype=torch.bool)
    counts[0] = True  # three groups of 64
    counts[1, 50:120] = True  # one
    counts[2, 7:10] = True  # three tokens, which have no estimate
    states = [s.float() for s in walk(3, 3, 200, 16)]
    check(states, counts)
    assert not compare([s.to(DEVICE) for s in states], counts).dependence[2].any()


def nearly(angle: float, D: int = 64) -> list[Tensor]:
    """Two states this many half turns apart, at every token."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, 8, D, generator=generator, dtype=torch.float64)
    w = torch.randn(1, 8, D, generator=generator, dtype=torch.float64)
    u /= u.norm(dim=-1, keepdim=True)
    w -= (w * u).sum(-1, keepdim=True) * u
    w /= w.norm(dim=-1, keepdim=True)
    turn = angle * math.pi
    return [(7.0 * u).float(), (0.1 * (math.cos(turn) * u + math.sin(turn) * w)).float()]


def check_near() -> None:
    counts = torch.ones(1, 8, dtype=torch.bool)
    for angle in (0.0, 1e-5, 1e-3, 0.1, 0.5, 0.86, 0.9, 1 - 1e-3, 1 - 1e-5, 1.0):
        states = nearly(angle)
        got, want = compare([s.to(DEVICE) for s in states], counts), truth(states, counts)
        for name in ("angles", "last"):
            off = getattr(got, name).cpu() - getattr(want, name)
            assert float(off.abs().max()) < SINGLE, angle


def test_angles_near_none_and_near_half_a_turn() -> None:
    check_near()


interpreted = pytest.mark.skipif(DEVICE.type == "cuda", reason="replaces parts of a kernel")


def no_sums(*arguments: Any) -> Any:
    """`squares` that takes differences where sums are asked for."""
    return RIGHT_SQUARES(*arguments[:6], -1.0, *arguments[7:])


def arc_cosine(chord: Any) -> Any:
    """`half_turns` from the cosine."""
    angle, versine = RIGHT_HALF_TURNS(chord)
    cosine = 1.0 - versine
    angle.handle.data = (torch.acos(torch.from_numpy(cosine.handle.data)) / math.pi).numpy()
    return angle, versine


RIGHT_SQUARES, RIGHT_HALF_TURNS = module.squares, module.half_turns


@interpreted
@pytest.mark.parametrize(("name", "fault"), [("squares", no_sums), ("half_turns", arc_cosine)])
def test_the_comparison_sees_faults(monkeypatch: pytest.MonkeyPatch, name: str, fault) -> None:
    monkeypatch.setattr(module, name, fault)
    with pytest.raises(AssertionError):
        check_near()


def test_scores_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compare states give one another's scores."""
    starts = torch.zeros(5, 24, dtype=torch.bool)
    starts[:, 0] = starts[::2, 9] = True
    blocks = TokenBlocks(random_ids(5, 24, 5).int(), starts, 5 * 24)
    model = tiny_model("attention").to(DEVICE)
    got = state_scores(model, blocks, batch_size=3)
    monkeypatch.setenv("TAMBA_KERNELS", "torch")
    want = state_scores(model, blocks, batch_size=3)
    for name in ("all_tokens", "last_token", "block_influence", "after_norm", "kernel_similarity"):
        bound = 1e-5 if name == "kernel_similarity" else 1e-6
        a, b = getattr(got, name), getattr(want, name)
        assert float((a.mean - b.mean).abs().nan_to_num().max()) < bound, name
        assert float((a.error - b.error).abs().nan_to_num().max()) < bound, name
        assert int((~a.mean.isnan()).sum()) >= 3, name


def test_twice_the_same() -> None:
    states = [s.to(DEVICE, torch.bfloat16) for s in walk(4, 3, 24, 64)]
    first, second = (compare(states, uneven(3, 24)) for _ in range(2))
    for name in ("angles", "last", "apart", "dependence"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_rows_do_not_change_one_another() -> None:
    states = [s.to(DEVICE, torch.bfloat16) for s in walk(4, 3, 24, 64)]
    counts = uneven(3, 24)
    whole = compare(states, counts)
    for row in range(3):
        alone = compare([s[row : row + 1] for s in states], counts[row : row + 1])
        for name in ("angles", "last", "apart"):
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[row]), name


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize(("value", "zero"), [(0.0, True), (math.nan, False), (math.inf, False)])
def test_a_state_without_direction_is_told(value: float, zero: bool) -> None:
    states = [s.float() for s in walk(3, 3, 8, 16)]
    counts = uneven(3, 8)
    states[2][0, 7] = states[1][2, 5] = states[1][1, 3] = value
    states[0][0, 0] = math.nan  # does not count
    for given in ([s.to(DEVICE) for s in states], [s.double() for s in states]):
        assert faulty(int(compare(given, counts).fault), 3) == (1, 1, zero)


def test_float64_takes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compared", None)
    states, counts = walk(3, 2, 8, 16), uneven(2, 8)
    got, want = compare(states, counts), truth(states, counts)
    assert float((got.angles - want.angles).abs().max()) < 1e-9


def test_compiled_for_hopper_nothing_leaves_registers() -> None:
    """The compiler takes what the interpreter takes, and a block of chords stays in registers."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    tests = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), *sys.path])
    program = [sys.executable, str(tests / "hopper_code.py"), "directions"]
    told = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-2000:]
    found = json.loads(told.stdout)
    assert len(found) == 8
    for name, used in found.items():
        assert used["stack"] == 0, (name, used)
        # Three programs of 128 threads on a multiprocessor at least.
        assert used["registers"] <= 168, (name, used)
