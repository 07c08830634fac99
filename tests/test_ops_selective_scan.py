"""The selective scan: blocks of runs against the recurrence over tokens."""

from __future__ import annotations

import importlib
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from compare import assert_same
from ops_cases import (
    Arguments,
    a_start_in_each_row,
    assert_agree,
    assert_splits_agree,
    scan_arguments,
)
from tamba.ops import causal_conv1d, reference, selective_scan

module = importlib.import_module("tamba.ops.selective_scan")
STEPS = module._STEPS


@pytest.fixture(params=["one block", "many blocks"], autouse=True)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything with the block sizes of real use, and with ones that a few tokens fill."""
    monkeypatch.setenv("TAMBA_KERNELS", "torch")
    if request.param == "many blocks":
        monkeypatch.setattr(module, "_BLOCK", 12 * 5 * 6)
        monkeypatch.setattr(module, "_WORTH", 12 * 5 * 2)


@pytest.mark.parametrize("groups", [1, 2, 6, 12])
@pytest.mark.parametrize("length", [1, STEPS, STEPS + 1, 8, 9, 29])
def test_blocks_equal_the_recurrence(length: int, groups: int) -> None:
    arguments = scan_arguments(length=length, groups=groups, starts=True, padding=True)
    assert_agree(selective_scan, reference.selective_scan, arguments, "fp64", "fp64")


@pytest.mark.parametrize("masks", [{}, {"starts": True}, {"padding": True}], ids=str)
def test_without_state_and_with_each_mask_alone(masks: dict[str, bool]) -> None:
    arguments = scan_arguments(length=13, state=False, **masks)
    assert_agree(selective_scan, reference.selective_scan, arguments, "fp64", "fp64")


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_real_size_in_float32(groups: int) -> None:
    arguments = scan_arguments(
        2, 150, 48, groups, 16, starts=True, padding=True, dtype=torch.float32
    )
    arguments.tensors["C"].data.mul_(0.05)
    assert_agree(selective_scan, reference.selective_scan, arguments, "fp32")


@pytest.mark.parametrize("groups", [1, 3, 12])
def test_bfloat16_arguments(groups: int) -> None:
    arguments = scan_arguments(2, 150, 48, groups, 16, starts=True, padding=True)
    arguments = arguments.to(torch.float32).to(torch.bfloat16, "x", "B", "C", "z")
    y, state = arguments.call(selective_scan)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert_agree(selective_scan, reference.selective_scan, arguments, "half", "half_gradient")


@pytest.mark.parametrize("dt", [-60.0, -8.0, 6.0, 1000.0])
def test_tiny_and_huge_steps(dt: float) -> None:
    arguments = scan_arguments(length=13, starts=True)
    arguments.tensors["dt"].data.add_(dt)
    assert_agree(selective_scan, reference.selective_scan, arguments, "fp64", "fp64")


def test_optional_arguments_left_out() -> None:
    arguments = scan_arguments(state=False)
    bare = {name: arguments.tensors[name] for name in ("x", "dt", "A", "B", "C")}
    bare["dt"] = bare["dt"].detach().abs().requires_grad_()
    assert_agree(selective_scan, reference.selective_scan, Arguments(bare), "fp64", "fp64")


@pytest.mark.parametrize("starts", [[0], [3], [4], [3, 4, 5], [12], list(range(13))], ids=str)
def test_documents_anywhere(starts: list[int]) -> None:
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[1, starts] = True
    arguments = scan_arguments(starts=mask)
    assert_agree(selective_scan, reference.selective_scan, arguments, "fp64", "fp64")


def test_a_packed_row_equals_its_documents_apart() -> None:
    starts = torch.zeros(2, 13, dtype=torch.bool)
    starts[:, [0, 5, 6]] = True
    arguments = scan_arguments(starts=starts)
    y, state = arguments.call(selective_scan)
    for start, stop in ((0, 5), (5, 6), (6, 13)):
        apart, last = arguments.span(start, stop, None).call(selective_scan, starts=None)
        assert_same(y[:, start:stop], apart, "fp64")
    assert_same(state, last, "fp64")


@pytest.mark.parametrize("padding", [[0, 1], [4, 12], [13, 3]], ids=str)
def test_padding_touches_nothing(padding: list[int]) -> None:
    arguments = scan_arguments(padding=torch.tensor(padding), starts=True)
    assert_agree(selective_scan, reference.selective_scan, arguments, "fp64", "fp64")
    y, state = arguments.call(selective_scan)
    for row, pads in enumerate(padding):
        alone = arguments.span(pads, 13, arguments.tensors["state"])
        apart, last = alone.call(selective_scan, padding=None)
        assert_same(y[row, pads:], apart[row], "fp64")
        assert_same(state[row], last[row], "fp64")


def test_padded_positions_hold_anything() -> None:
    arguments = scan_arguments(padding=torch.tensor([5, 13]), starts=True)
    other = scan_arguments(padding=torch.tensor([5, 13]), seed=1)
    hidden = ~arguments.real
    y, state = arguments.call(selective_scan)
    for name in ("x", "dt", "B", "C", "z"):
        arguments.tensors[name].data[hidden] = other.tensors[name][hidden].detach()
    again, last = arguments.call(selective_scan)
    assert_same(again[~hidden], y[~hidden], "fp64")
    assert_same(last, state, "fp64")
    assert_same(state[1], arguments.tensors["state"][1], "exact")


def test_any_split_equals_one_call() -> None:
    arguments = scan_arguments(starts=True, padding=True)
    for cuts in combinations(range(14), 2):
        assert_splits_agree(selective_scan, arguments, list(cuts))
    assert_splits_agree(selective_scan, arguments, list(range(1, 13)))


def test_no_tokens() -> None:
    arguments = scan_arguments(length=0)
    y, state = arguments.call(selective_scan)
    assert y.shape == (2, 0, 12)
    assert_same(state, arguments.tensors["state"], "exact")


def test_one_step_equals_the_readable_step() -> None:
    arguments = scan_arguments(length=1)
    t = arguments.tensors
    y, state = arguments.call(selective_scan, D=None, z=None)
    dt = torch.nn.functional.softplus(t["dt"] + t["dt_bias"])[:, 0]
    want_y, want = reference.selective_scan_step(
        t["state"], t["x"][:, 0], dt, t["A"], t["B"][:, 0], t["C"][:, 0]
    )
    assert_same(y[:, 0], want_y, "fp64")
    assert_same(state, want, "fp64")


@pytest.mark.parametrize("groups", [1, 2, 12])
def test_mixing_matrix_times_inputs_is_the_output(groups: int) -> None:
    arguments = scan_arguments(groups=groups, state=False, starts=True, padding=True)
    given_to_matrix = {
        name: value
        for name, value in {**arguments.tensors, **arguments.masks}.items()
        if name not in ("x", "z")
    }
    matrix = reference.selective_scan_mixing_matrix(**given_to_matrix, dt_softplus=True)
    y, _ = arguments.call(selective_scan, z=None)
    mixed = torch.einsum("bdij,bjd->bid", matrix, arguments.tensors["x"])
    assert_same(y[arguments.real], mixed[arguments.real], "fp64")
    assert_same(matrix, matrix.tril(), "exact")
    swapped = {**given_to_matrix, "B": given_to_matrix["C"], "C": given_to_matrix["B"]}
    wrong = reference.selective_scan_mixing_matrix(**swapped, dt_softplus=True)
    with pytest.raises(AssertionError):
        assert_same(y, torch.einsum("bdij,bjd->bid", wrong, arguments.tensors["x"]), "fp64")


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_by_finite_differences(groups: int) -> None:
    starts = torch.zeros(1, 7, dtype=torch.bool)
    starts[0, 4] = True
    arguments = scan_arguments(1, 7, 2, groups, 2, starts=starts)
    names = list(arguments.tensors)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return arguments.call(selective_scan, **dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(run, tuple(arguments.tensors.values()), fast_mode=False)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.integers(1, 4))
    arguments = scan_arguments(
        batch=draw(st.integers(1, 3)),
        length=draw(st.integers(1, 20)),
        channels=groups * draw(st.integers(1, 4)),
        groups=groups,
        d_state=draw(st.integers(1, 5)),
        state=draw(st.booleans()),
        starts=draw(st.booleans()),
        padding=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
    )
    assert_agree(selective_scan, reference.selective_scan, arguments, "fp64", "fp64")


FAULTS = {
    "D dropped": lambda **k: selective_scan(**{**k, "D": None}),
    "gate dropped": lambda **k: selective_scan(**{**k, "z": None}),
    "dt bias dropped": lambda **k: selective_scan(**{**k, "dt_bias": None}),
    "softplus dropped": lambda **k: selective_scan(
        **{**k, "dt": k["dt"].abs(), "dt_softplus": False}
    ),
    "state dropped": lambda **k: selective_scan(**{**k, "state": None}),
    "groups swapped": lambda **k: selective_scan(**{**k, "B": k["B"].flip(2)}),
    "states swapped": lambda **k: selective_scan(**{**k, "A": k["A"].flip(1)}),
    "starts ignored": lambda **k: selective_scan(**{**k, "starts": None}),
    "starts one late": lambda **k: selective_scan(**{**k, "starts": k["starts"].roll(1, 1)}),
    "padding ignored": lambda **k: selective_scan(**{**k, "padding": None}),
    "padding one short": lambda **k: selective_scan(
        **{**k, "padding": (k["padding"] - 1).clamp(0)}
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str) -> None:
    arguments = scan_arguments(starts=a_start_in_each_row(), padding=torch.tensor([3, 0]))
    assert_agree(selective_scan, reference.selective_scan, arguments, "fp64")
    with pytest.raises(AssertionError):
        assert_agree(FAULTS[fault], reference.selective_scan, arguments, "fp64")


@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "z", "state"])
def test_a_lost_gradient_is_seen(name: str) -> None:
    def faulty(**k: Any) -> tuple[Tensor, Tensor]:
        return selective_scan(**{**k, name: k[name].detach() + 0 * k[name]})

    with pytest.raises(AssertionError, match=f"gradient of {name}"):
        assert_agree(faulty, reference.selective_scan, scan_arguments(), "fp64", "fp64")


def test_runs_that_do_not_follow_one_another_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def lone_runs(self: Any) -> None:
        self._edges = []
        advance(self)

    advance = module._Chain.advance
    monkeypatch.setattr(module._Chain, "advance", lone_runs)
    with pytest.raises(AssertionError):
        assert_agree(
            selective_scan, reference.selective_scan, scan_arguments(length=40), "fp64", "fp64"
        )


@pytest.mark.parametrize("length", [1, 13])
def test_autocast_changes_nothing(length: int) -> None:
    arguments = scan_arguments(length=length, dtype=torch.float32)
    want = arguments.call(selective_scan)
    with torch.autocast("cpu", torch.bfloat16):
        got = arguments.call(selective_scan)
    assert_same(got[0], want[0], "exact")
    assert_same(got[1], want[1], "exact")


def test_strided_arguments() -> None:
    arguments = scan_arguments()
    strided = {
        name: t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        for name, t in arguments.tensors.items()
    }
    for length in (1, 13):
        got = Arguments(strided, {}, arguments.options).span(0, length, strided["state"])
        want = arguments.span(0, length, arguments.tensors["state"])
        for a, b in zip(got.call(selective_scan), want.call(selective_scan), strict=True):
            assert_same(a, b, "fp64")


class _Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor made under it has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_nothing_has_a_number_for_every_token_channel_and_state(groups: int) -> None:
    batch, length, channels, d_state = 2, 512, 64, 32
    arguments = scan_arguments(batch, length, channels, groups, d_state, dtype=torch.float32)
    with _Largest() as largest:
        y, _ = arguments.call(selective_scan)
        torch.autograd.grad(y.sum(), list(arguments.tensors.values()), allow_unused=True)
    assert largest.numel < batch * length * channels * d_state // 2
    with _Largest() as largest:
        t = arguments.tensors
        torch.exp(t["dt"][..., None] * t["A"])
    assert largest.numel == batch * length * channels * d_state


def test_what_is_kept_for_the_gradient() -> None:
    batch, length, channels, d_state = 2, 512, 64, 16
    arguments = scan_arguments(batch, length, channels, 1, d_state, dtype=torch.float32)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        arguments.call(selective_scan)
    assert sum(kept.values()) <= 12 * batch * length * channels


def test_wrong_shapes_are_named() -> None:
    arguments = scan_arguments()
    with pytest.raises(ValueError, match="G dividing D"):
        arguments.call(selective_scan, B=arguments.tensors["B"][:, :, :1].expand(-1, -1, 5, -1))
    with pytest.raises(ValueError, match=r"z \(2, 12, 12\)"):
        arguments.call(selective_scan, z=arguments.tensors["z"][:, 1:])
    for name, wrong in (
        ("D", torch.ones(1)),
        ("dt_bias", torch.ones(1)),
        ("starts", torch.zeros(2, 1, dtype=torch.bool)),
        ("padding", torch.zeros(1, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=rf"{name} \({', '.join(map(str, wrong.shape))}"):
            arguments.call(selective_scan, **{name: wrong})


def test_equals_the_mixer_of_transformers() -> None:
    config = MambaConfig(
        hidden_size=16,
        state_size=8,
        num_hidden_layers=1,
        vocab_size=8,
        time_step_rank=3,
        use_mambapy=False,
    )
    torch.manual_seed(0)
    mixer = MambaMixer(config, layer_idx=0).eval()
    mixer.dt_proj.bias.data.normal_()
    mixer.D.data.normal_()
    mixer.A_log.data.normal_()
    hidden = torch.randn(2, 21, 16)
    with torch.no_grad():
        want = mixer(hidden)
        x, z = mixer.in_proj(hidden).chunk(2, dim=-1)
        x, _ = causal_conv1d(x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, activation="silu")
        dt, B, C = mixer.x_proj(x).split([3, 8, 8], dim=-1)
        y, _ = selective_scan(
            x,
            dt @ mixer.dt_proj.weight.T,
            -mixer.A_log.exp(),
            B[:, :, None],
            C[:, :, None],
            D=mixer.D,
            z=z,
            dt_bias=mixer.dt_proj.bias,
            dt_softplus=True,
        )
        got = mixer.out_proj(y)
    assert_same(got, want, "fp32")
