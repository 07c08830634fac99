"""The compiled scan of a CPU against the recurrence in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops_cases import Arguments, assert_agree, assert_splits_agree, scan_arguments
from tamba.ops import reference, selective_scan

scan_cpu = pytest.importorskip("tamba.ops.kernels.scan_cpu", reason="Numba is not installed")

BLOCK, RUN = scan_cpu._BLOCK, scan_cpu._RUN


@pytest.fixture(autouse=True)
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths that went through the compiled loop: a test that took another way fails."""
    calls: list[int] = []
    compiled = scan_cpu.selective_scan

    def count(x: torch.Tensor, *rest: Any) -> Any:
        calls.append(x.shape[1])
        return compiled(x, *rest)

    monkeypatch.delenv("TAMBA_KERNELS", raising=False)
    monkeypatch.setattr(scan_cpu, "selective_scan", count)
    return calls


def arguments_of(length: int, channels: int, groups: int, d_state: int, **more: Any) -> Arguments:
    made = scan_arguments(2, length, channels, groups, d_state, dtype=torch.float32, **more)
    made.tensors["C"].data.mul_(0.1)
    return made


@pytest.mark.parametrize("length", [5, RUN - 1, RUN, RUN + 1, 3 * RUN + 5])
@pytest.mark.parametrize(
    ("channels", "groups", "d_state"),
    [(6, 1, 16), (BLOCK, 1, 4), (BLOCK + 8, 1, 8), (2 * BLOCK + 2, 2, 5), (12, 12, 3)],
)
def test_equals_the_recurrence(
    used: list[int], length: int, channels: int, groups: int, d_state: int
) -> None:
    arguments = arguments_of(length, channels, groups, d_state, starts=True, padding=True)
    assert_agree(selective_scan, reference.selective_scan, arguments, "fp32", "fp32")
    assert length in used


@pytest.mark.parametrize("dt", [-60.0, -8.0, 6.0, 1000.0, 1e30])
def test_tiny_and_huge_steps(dt: float) -> None:
    arguments = arguments_of(40, 8, 1, 4, starts=True)
    arguments.tensors["dt"].data.add_(dt)
    arguments.tensors["x"].data.div_(max(1.0, dt))
    assert_agree(selective_scan, reference.selective_scan, arguments, "fp32", "fp32")


def test_a_step_of_size_zero_keeps_the_state_to_the_bit() -> None:
    arguments = arguments_of(50, 8, 1, 4, padding=torch.tensor([50, 50]))
    _, state = arguments.call(selective_scan)
    assert torch.equal(state, arguments.tensors["state"])


def test_growing_states_and_numbers_that_are_none() -> None:
    arguments = arguments_of(40, 8, 1, 4)
    arguments.tensors["A"].data.abs_().mul_(0.005)
    assert_agree(selective_scan, reference.selective_scan, arguments, "fp32", "fp32")
    arguments.tensors["x"].data[0, 7, 3] = torch.nan
    y, _ = arguments.call(selective_scan)
    assert y[0, 7:, 3].isnan().all()
    assert not y[0, :, :3].isnan().any()


def test_any_split_equals_one_call() -> None:
    arguments = arguments_of(90, 12, 2, 4, starts=True, padding=True)
    for cuts in ([1, 89], [5, 37], [10, 20, 30, 70], [RUN, 2 * RUN]):
        assert_splits_agree(selective_scan, arguments, cuts, "fp32")


def test_repeats_to_the_bit_for_any_number_of_threads() -> None:
    arguments = arguments_of(70, 3 * BLOCK, 1, 8, starts=True)

    def results() -> list[torch.Tensor]:
        y, state = arguments.call(selective_scan)
        total = y.square().sum() + state.square().sum()
        return [y, state, *torch.autograd.grad(total, list(arguments.tensors.values()))]

    before = torch.get_num_threads()
    try:
        first, *others = [(torch.set_num_threads(n), results())[1] for n in (1, 1, 2, 3)]
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_what_the_loop_does_not_cover_goes_to_plain_torch(used: list[int]) -> None:
    scan_arguments(length=13).call(selective_scan)  # float64
    assert used == []
    arguments = arguments_of(13, 8, 1, 4)
    with torch.device("meta"):
        moved = {name: torch.empty_like(t, device="meta") for name, t in arguments.tensors.items()}
    Arguments(moved, {}, arguments.options).call(selective_scan)
    assert used == []


@pytest.mark.parametrize("fault", ["exp", "start", "run"])
def test_planted_faults_are_seen(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Faults in the loop as it runs uncompiled: a poor exponential, a start or a run forgotten."""
    arguments = arguments_of(RUN + 9, 6, 1, 3, starts=fault == "start")
    forward, backward = scan_cpu._forward.py_func, scan_cpu._backward.py_func
    exp2 = scan_cpu._exp2.py_func
    monkeypatch.setattr(scan_cpu, "_power_of_two", lambda whole: 2.0**whole)
    monkeypatch.setattr(scan_cpu, "_exp2", exp2)

    def run(*given: Any) -> Any:
        return forward(*given)

    def run_back(*given: Any) -> Any:
        if fault == "start":
            given = (*given[:5], given[5] & False, *given[6:])
        if fault == "run":
            given[6][1:] = 0  # the states that runs after the first begin with
        return backward(*given)

    monkeypatch.setattr(scan_cpu, "_forward", run)
    monkeypatch.setattr(scan_cpu, "_backward", backward)
    assert_agree(selective_scan, reference.selective_scan, arguments, "fp32", "fp32")
    monkeypatch.setattr(scan_cpu, "_backward", run_back)
    if fault == "exp":
        monkeypatch.setattr(scan_cpu, "_E4", scan_cpu._E4 * 1.5)
    with pytest.raises(AssertionError):
        assert_agree(selective_scan, reference.selective_scan, arguments, "fp32", "fp32")


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 2, 3]))
    members = data.draw(st.integers(1, BLOCK + 3))
    arguments = arguments_of(
        data.draw(st.integers(5, 2 * RUN + 3)),
        groups * members,
        groups,
        data.draw(st.integers(1, 17)),
        state=data.draw(st.booleans()),
        starts=data.draw(st.booleans()),
        padding=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )
    assert_agree(selective_scan, reference.selective_scan, arguments, "fp32", "fp32")
