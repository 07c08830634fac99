"""SSD: matrix products in chunks against the recurrence over tokens."""

from __future__ import annotations

import importlib
import logging
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from compare import assert_same
from ops_cases import (
    Arguments,
    a_start_in_each_row,
    assert_agree,
    assert_splits_agree,
    ssd_arguments,
)
from tamba.errors import UserError
from tamba.ops import backend, causal_conv1d, reference, ssd

CHUNK = 4
LENGTHS = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]
module = importlib.import_module("tamba.ops.ssd")


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", [ssd, reference.ssd_chunked], ids=["fast", "readable"])
def test_chunks_equal_the_recurrence(form: Any, length: int, groups: int) -> None:
    arguments = ssd_arguments(length=length, groups=groups, starts=True, padding=True)
    assert_agree(form, reference.ssd, arguments, "fp64", "fp64")


@pytest.mark.parametrize("masks", [{}, {"starts": True}, {"padding": True}], ids=str)
def test_without_state_and_with_each_mask_alone(masks: dict[str, bool]) -> None:
    arguments = ssd_arguments(length=13, state=False, **masks)
    assert_agree(ssd, reference.ssd, arguments, "fp64", "fp64")


@pytest.mark.parametrize("groups", [1, 3, 9])
def test_real_size_in_float32(groups: int) -> None:
    arguments = ssd_arguments(
        2, 150, 9, 64, groups, 64, starts=True, padding=True, chunk_size=64, dtype=torch.float32
    )
    # Sums over 150 tokens of products of normal numbers; scaled so that outputs are near 1.
    arguments.tensors["C"].data.mul_(0.02)
    assert_agree(ssd, reference.ssd, arguments, "fp32")


@pytest.mark.parametrize("groups", [1, 3, 9])
def test_bfloat16_operands(groups: int) -> None:
    arguments = ssd_arguments(2, 150, 9, 64, groups, 64, starts=True, padding=True, chunk_size=64)
    arguments = arguments.to(torch.float32).to(torch.bfloat16, "x", "B", "C")
    y, state = arguments.call(ssd)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    # Gradients of A and dt_bias are sums over tokens of what that of dt shows token by token; here
    # their terms cancel, so that the rounding of the terms says nothing about the sums.
    assert_agree(ssd, reference.ssd, arguments, "half", "half_gradient", without=("A", "dt_bias"))


@pytest.mark.parametrize("tile", [1, 5, 8, 1000])
def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(module, "_TILE", tile)
    arguments = ssd_arguments(3, 27, starts=True, padding=True)
    assert_agree(ssd, reference.ssd, arguments, "fp64", "fp64")


@pytest.mark.parametrize("d_state, head_dim", [(1, 1), (16, 2), (2, 16)])
def test_shapes_of_the_state(d_state: int, head_dim: int) -> None:
    arguments = ssd_arguments(head_dim=head_dim, d_state=d_state)
    assert_agree(ssd, reference.ssd, arguments, "fp64", "fp64")


@pytest.mark.parametrize("dt", [-60.0, -8.0, 6.0, 1000.0])
def test_tiny_and_huge_steps(dt: float) -> None:
    arguments = ssd_arguments(length=13, starts=True)
    arguments.tensors["dt"].data.add_(dt)
    # With huge steps nothing is left of A's gradient but numbers near the smallest there are.
    without = ("A",) if dt == 1000.0 else ()
    assert_agree(ssd, reference.ssd, arguments, "fp64", "fp64", without=without)


def test_small_decays_after_huge_ones_keep_their_digits() -> None:
    arguments = ssd_arguments(1, 64, 2, 4, 2, 4, chunk_size=64, dtype=torch.float32)
    dt = torch.full((1, 64, 2), 1e-3)
    dt[:, :20] = 400.0
    arguments = Arguments(arguments.tensors, {}, {"dt_softplus": False, "chunk_size": 64})
    arguments.tensors["dt"].data.copy_(dt)
    arguments.tensors["dt_bias"].data.zero_()
    y, _ = arguments.call(ssd)
    want, _ = arguments.to(torch.float64).call(reference.ssd)
    assert_same(y[:, 20:], want[:, 20:], "fp32")


def test_limits_of_dt() -> None:
    arguments = ssd_arguments()
    arguments.options["dt_limit"] = (0.3, 0.9)
    assert_agree(ssd, reference.ssd, arguments, "fp64", "fp64")
    with pytest.raises(AssertionError):
        assert_agree(lambda **k: ssd(**{**k, "dt_limit": None}), reference.ssd, arguments, "fp64")


def test_optional_arguments_left_out() -> None:
    arguments = ssd_arguments(state=False)
    bare = {name: arguments.tensors[name] for name in ("x", "dt", "A", "B", "C")}
    bare["dt"] = bare["dt"].detach().abs().requires_grad_()
    assert_agree(ssd, reference.ssd, Arguments(bare, {}, {"chunk_size": 4}), "fp64", "fp64")


@pytest.mark.parametrize("starts", [[0], [3], [4], [3, 4, 5], [12], list(range(13))], ids=str)
def test_documents_anywhere(starts: list[int]) -> None:
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[1, starts] = True
    assert_agree(ssd, reference.ssd, ssd_arguments(starts=mask), "fp64", "fp64")


def test_a_packed_row_equals_its_documents_apart() -> None:
    starts = torch.zeros(2, 13, dtype=torch.bool)
    starts[:, [0, 5, 6]] = True
    arguments = ssd_arguments(starts=starts)
    y, state = arguments.call(ssd)
    for start, stop in ((0, 5), (5, 6), (6, 13)):
        apart, last = arguments.span(start, stop, None).call(ssd, starts=None)
        assert_same(y[:, start:stop], apart, "fp64")
    assert_same(state, last, "fp64")


@pytest.mark.parametrize("padding", [[0, 1], [4, 12], [13, 3]], ids=str)
def test_padding_touches_nothing(padding: list[int]) -> None:
    arguments = ssd_arguments(padding=torch.tensor(padding), starts=True)
    assert_agree(ssd, reference.ssd, arguments, "fp64", "fp64")
    y, state = arguments.call(ssd)
    for row, pads in enumerate(padding):
        alone = arguments.span(pads, 13, arguments.tensors["state"])
        apart, last = alone.call(ssd, padding=None)
        assert_same(y[row, pads:], apart[row], "fp64")
        assert_same(state[row], last[row], "fp64")


def test_padded_positions_hold_anything() -> None:
    arguments = ssd_arguments(padding=torch.tensor([5, 13]), starts=True)
    other = ssd_arguments(padding=torch.tensor([5, 13]), seed=1)
    hidden = ~arguments.real
    y, state = arguments.call(ssd)
    for name in ("x", "dt", "B", "C"):
        arguments.tensors[name].data[hidden] = other.tensors[name][hidden].detach()
    again, last = arguments.call(ssd)
    assert_same(again[~hidden], y[~hidden], "fp64")
    assert_same(last, state, "fp64")
    assert_same(state[1], arguments.tensors["state"][1], "exact")


def test_any_split_equals_one_call() -> None:
    arguments = ssd_arguments(starts=True, padding=True)
    for cuts in combinations(range(14), 2):
        assert_splits_agree(ssd, arguments, list(cuts))
    assert_splits_agree(ssd, arguments, list(range(1, 13)))


def test_no_tokens() -> None:
    arguments = ssd_arguments(length=0)
    y, state = arguments.call(ssd)
    assert y.shape == (2, 0, 4, 3)
    assert_same(state, arguments.tensors["state"], "exact")


def test_one_step_equals_the_readable_step() -> None:
    arguments = ssd_arguments(length=1)
    t = arguments.tensors
    y, state = arguments.call(ssd, D=None)
    dt = torch.nn.functional.softplus(t["dt"] + t["dt_bias"])[:, 0]
    want_y, want = reference.ssd_step(
        t["state"], t["x"][:, 0], dt, t["A"], t["B"][:, 0], t["C"][:, 0]
    )
    assert_same(y[:, 0], want_y, "fp64")
    assert_same(state, want, "fp64")


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mixing_matrix_times_inputs_is_the_output(groups: int) -> None:
    arguments = ssd_arguments(groups=groups, state=False, starts=True, padding=True)
    given_to_matrix = {
        name: value
        for name, value in {**arguments.tensors, **arguments.masks}.items()
        if name != "x"
    }
    matrix = reference.ssd_mixing_matrix(**given_to_matrix, dt_softplus=True)
    y, _ = arguments.call(ssd)
    mixed = torch.einsum("bhij,bjhp->bihp", matrix, arguments.tensors["x"])
    assert_same(y[arguments.real], mixed[arguments.real], "fp64")
    assert_same(matrix, matrix.tril(), "exact")
    swapped = {**given_to_matrix, "B": given_to_matrix["C"], "C": given_to_matrix["B"]}
    wrong = reference.ssd_mixing_matrix(**swapped, dt_softplus=True)
    with pytest.raises(AssertionError):
        assert_same(y, torch.einsum("bhij,bjhp->bihp", wrong, arguments.tensors["x"]), "fp64")


def test_gradients_by_finite_differences() -> None:
    starts = torch.zeros(1, 7, dtype=torch.bool)
    starts[0, 4] = True
    arguments = ssd_arguments(1, 7, 2, 2, 1, 2, starts=starts)
    names = list(arguments.tensors)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return arguments.call(ssd, **dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(run, tuple(arguments.tensors.values()), fast_mode=False)


def test_gradient_of_only_one_result() -> None:
    arguments = ssd_arguments()
    exact = list(arguments.tensors.values())
    for index in (0, 1):
        got = torch.autograd.grad(arguments.call(ssd)[index].sum(), exact, allow_unused=True)
        want = torch.autograd.grad(
            arguments.call(reference.ssd)[index].sum(), exact, allow_unused=True
        )
        for name, a, b in zip(arguments.tensors, got, want, strict=True):
            zeros = torch.zeros_like(arguments.tensors[name])
            assert_same(zeros if a is None else a, zeros if b is None else b, "fp64", name)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.integers(1, 3))
    arguments = ssd_arguments(
        batch=draw(st.integers(1, 3)),
        length=draw(st.integers(1, 20)),
        heads=groups * draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 5)),
        groups=groups,
        d_state=draw(st.integers(1, 5)),
        state=draw(st.booleans()),
        starts=draw(st.booleans()),
        padding=draw(st.booleans()),
        chunk_size=draw(st.integers(1, 16)),
        seed=draw(st.integers(0, 1000)),
    )
    assert_agree(ssd, reference.ssd, arguments, "fp64", "fp64")


def _without_chunk_states(**given: Any) -> tuple[Tensor, Tensor]:
    arguments = Arguments(
        {k: v for k, v in given.items() if isinstance(v, Tensor) and v.is_floating_point()},
        {k: given.get(k) for k in ("starts", "padding")},
        {"dt_softplus": True},
    )
    state, outputs = given["state"], []
    for start in range(0, given["x"].shape[1], CHUNK):
        y, _ = arguments.span(start, min(start + CHUNK, given["x"].shape[1]), state).call(ssd)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


FAULTS = {
    "D dropped": lambda **k: ssd(**{**k, "D": None}),
    "dt bias dropped": lambda **k: ssd(**{**k, "dt_bias": None}),
    "softplus dropped": lambda **k: ssd(**{**k, "dt": k["dt"].abs(), "dt_softplus": False}),
    "state dropped": lambda **k: ssd(**{**k, "state": None}),
    "groups swapped": lambda **k: ssd(**{**k, "B": k["B"].flip(2)}),
    "starts ignored": lambda **k: ssd(**{**k, "starts": None}),
    "starts one late": lambda **k: ssd(**{**k, "starts": k["starts"].roll(1, 1)}),
    "padding ignored": lambda **k: ssd(**{**k, "padding": None}),
    "padding one short": lambda **k: ssd(**{**k, "padding": (k["padding"] - 1).clamp(0)}),
    "chunk states not passed": _without_chunk_states,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str) -> None:
    arguments = ssd_arguments(starts=a_start_in_each_row(), padding=torch.tensor([3, 0]))
    assert_agree(ssd, reference.ssd, arguments, "fp64")
    with pytest.raises(AssertionError):
        assert_agree(FAULTS[fault], reference.ssd, arguments, "fp64")


GRADIENT_FAULTS = {
    name: lambda name=name, **k: ssd(**{**k, name: k[name].detach() + 0 * k[name]})
    for name in ("x", "dt", "A", "B", "C", "D", "state")
}


@pytest.mark.parametrize("name", GRADIENT_FAULTS)
def test_a_lost_gradient_is_seen(name: str) -> None:
    arguments = ssd_arguments()
    with pytest.raises(AssertionError, match=f"gradient of {name}"):
        assert_agree(GRADIENT_FAULTS[name], reference.ssd, arguments, "fp64", "fp64")


def test_a_wrong_backward_pass_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module._Gradients.add

    def state_gradient_not_passed(*args: Any) -> Tensor:
        return torch.zeros_like(right(*args))

    monkeypatch.setattr(module, "_TILE", 4)
    monkeypatch.setattr(module._Gradients, "add", state_gradient_not_passed)
    with pytest.raises(AssertionError, match="gradient of"):
        assert_agree(ssd, reference.ssd, ssd_arguments(), "fp64", "fp64")


def test_a_rounded_product_is_seen_in_float32() -> None:
    arguments = ssd_arguments(2, 150, 9, 64, 9, 64, chunk_size=64, dtype=torch.float32)
    rounded = arguments.to(torch.bfloat16, "x", "B", "C")
    with pytest.raises(AssertionError):
        assert_same(rounded.call(ssd)[0], arguments.call(reference.ssd)[0], "fp32")


@pytest.mark.parametrize("length", [1, 13])
def test_autocast_changes_nothing(length: int) -> None:
    arguments = ssd_arguments(length=length, dtype=torch.float32)
    want = arguments.call(ssd)
    with torch.autocast("cpu", torch.bfloat16):
        got = arguments.call(ssd)
    grads = torch.autograd.grad(got[0].sum(), [arguments.tensors["x"]])
    assert_same(got[0], want[0], "exact")
    assert_same(got[1], want[1], "exact")
    assert_same(grads[0], torch.autograd.grad(want[0].sum(), [arguments.tensors["x"]])[0], "exact")


def test_strided_arguments() -> None:
    arguments = ssd_arguments()
    strided = {
        name: t.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        for name, t in arguments.tensors.items()
    }
    for length in (1, 13):
        got = Arguments(strided, {}, arguments.options).span(0, length, strided["state"]).call(ssd)
        want = arguments.span(0, length, arguments.tensors["state"]).call(ssd)
        assert_same(got[0], want[0], "fp64")
        assert_same(got[1], want[1], "fp64")


def test_what_is_kept_for_the_gradient() -> None:
    batch, length, heads, head_dim, groups, d_state, chunk = 2, 256, 4, 16, 2, 16, 16
    arguments = ssd_arguments(
        batch, length, heads, head_dim, groups, d_state, chunk_size=chunk, dtype=torch.float32
    )
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        arguments.call(ssd)
    tokens = batch * length
    inputs = tokens * (heads * head_dim + 2 * groups * d_state + 3 * heads)
    states = tokens // chunk * heads * head_dim * d_state
    assert sum(kept.values()) <= inputs + states + 1000


def test_a_misspelt_choice_of_kernels_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAMBA_KERNELS", "Torch")
    with pytest.raises(UserError, match=r"TAMBA_KERNELS: is 'Torch'; set it to triton, torch"):
        ssd_arguments().call(ssd)


def test_wrong_shapes_are_named() -> None:
    arguments = ssd_arguments()
    with pytest.raises(ValueError, match="G dividing H"):
        arguments.call(ssd, B=arguments.tensors["B"][:, :, :1].expand(-1, -1, 3, -1))
    with pytest.raises(ValueError, match=r"dt \(2, 12, 4\)"):
        arguments.call(ssd, dt=arguments.tensors["dt"][:, 1:])
    # What kernels would read beyond, and torch would spread.
    for name, wrong in (
        ("D", torch.ones(1)),
        ("dt_bias", torch.ones(1)),
        ("starts", torch.zeros(2, 1, dtype=torch.bool)),
        ("padding", torch.zeros(1, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match=rf"{name} \({', '.join(map(str, wrong.shape))}"):
            arguments.call(ssd, **{name: wrong})


@pytest.mark.parametrize("groups", [1, 2])
def test_equals_the_mixer_of_transformers(groups: int) -> None:
    config = Mamba2Config(
        hidden_size=16,
        num_heads=4,
        head_dim=8,
        expand=2,
        state_size=8,
        n_groups=groups,
        chunk_size=8,
        num_hidden_layers=1,
        vocab_size=8,
        time_step_limit=(0.02, 0.8),
    )
    torch.manual_seed(0)
    mixer = Mamba2Mixer(config, layer_idx=0).eval()
    mixer.dt_bias.data.normal_()
    mixer.D.data.normal_()
    hidden = torch.randn(2, 21, 16)
    with torch.no_grad():
        want = mixer(hidden)
        z, xBC, dt = mixer.in_proj(hidden).split([32, 32 + 2 * groups * 8, 4], dim=-1)
        xBC, _ = causal_conv1d(xBC, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, activation="silu")
        x, B, C = xBC.split([32, groups * 8, groups * 8], dim=-1)
        y, _ = ssd(
            x.unflatten(-1, (4, 8)),
            dt,
            -mixer.A_log.exp(),
            B.unflatten(-1, (groups, 8)),
            C.unflatten(-1, (groups, 8)),
            D=mixer.D,
            dt_bias=mixer.dt_bias,
            dt_softplus=True,
            dt_limit=config.time_step_limit,
            chunk_size=16,
        )
        got = mixer.out_proj(mixer.norm(y.flatten(2), z))
    assert_same(got, want, "fp32")


def test_kernels_asked_for_where_none_can_run_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Or whoever compares paths would compare one with itself."""
    monkeypatch.setenv("TAMBA_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend._say_once.cache_clear()
    made = ssd_arguments().to(torch.float32)
    with caplog.at_level(logging.WARNING, "tamba"):
        made.call(ssd)
        made.call(ssd)
    assert [m for m in caplog.messages if "TAMBA_KERNELS" in m] == [
        "ssd runs on plain torch, slower than the Triton kernels: "
        "TAMBA_KERNELS is triton, and its arguments lie on no GPU"
    ]
