"""What a CPU does to rows between bfloat16 products, against the definitions in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compare import assert_same, relative_rms
from loss_cases import arguments as loss_arguments
from loss_cases import ours, wanted
from tamba.model.config import (
    AttentionSpec,
    BlockSpec,
    Mamba2Spec,
    MLPSpec,
    NormSpec,
    TambaConfig,
)
from tamba.model.modeling import TambaForCausalLM
from tamba.ops import backend, causal_conv1d, ssd
from tamba.ops.losses import Weights, next_token_loss

rows = pytest.importorskip("tamba.ops.kernels.rows_cpu", reason="Numba is not installed")
attention = pytest.importorskip("tamba.ops.attention", reason="Numba is not installed")

ROWS = rows._ROWS


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled loops are taken however few the numbers are."""
    monkeypatch.delenv("TAMBA_KERNELS", raising=False)
    monkeypatch.setattr(backend, "_MANY_NUMBERS", 1)


@pytest.fixture
def make() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def draw(make: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=make).to(dtype)


def compare(
    ours: Callable[..., Tensor], truth: Callable[..., Tensor], given: list[Tensor], grad: Tensor
) -> None:
    """Values and gradients of `ours` against those of `truth` in float64, of the same numbers."""
    mine = [t.clone().requires_grad_() for t in given]
    wide = [t.double().requires_grad_() for t in given]
    got, want = ours(*mine), truth(*wide)
    assert_same(got, want, "half", "value")
    found = torch.autograd.grad(got, mine, grad)
    wanted = torch.autograd.grad(want, wide, grad.double())
    for name, a, b in zip("abc", found, wanted, strict=False):
        assert a.dtype == mine["abc".index(name)].dtype
        assert_same(a, b, "half_gradient", name)


@pytest.mark.parametrize("n", [1, ROWS, ROWS + 3])
@pytest.mark.parametrize("width", [5, 64, 100])
def test_gate(make: torch.Generator, n: int, width: int) -> None:
    given = [draw(make, n, width) * 4, draw(make, n, width)]
    compare(rows.gate, lambda a, b: F.silu(a) * b, given, draw(make, n, width))


def test_gate_of_columns_and_of_far_away_numbers(make: torch.Generator) -> None:
    both = draw(make, 2, 9, 40)
    a, b = both[..., :16], both[..., 20:36]
    assert_same(rows.gate(a, b), F.silu(a.double()) * b.double(), "half")
    far = torch.tensor([[-1e30, -100.0, 100.0, 1e30, math.inf, math.nan]]).bfloat16()
    got = rows.gate(far, torch.ones_like(far))[0].double()
    assert got[:2].abs().max() <= 1e-6
    assert_same(got[2:4], far[0, 2:4].double(), "half")
    assert math.isinf(got[4]) and math.isnan(got[5])


@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 3])
def test_norm(
    make: torch.Generator, dtype: torch.dtype, of_weight: torch.dtype, groups: int
) -> None:
    def truth(x: Tensor, weight: Tensor) -> Tensor:
        parts = x.unflatten(-1, (groups, -1))
        unit = parts / (parts.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        return unit.flatten(-2) * weight

    x = draw(make, 2, ROWS, 36, dtype=dtype)
    weight = draw(make, 36, dtype=of_weight)
    given = [x, weight]
    compare(lambda x, w: rows.rms_norm(x, w, 1e-3, groups), truth, given, draw(make, 2, ROWS, 36))


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("length", [2, ROWS, 2 * ROWS + 2])
def test_convolution(make: torch.Generator, length: int, width: int, silu: bool) -> None:
    def truth(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.conv1d(F.pad(x.mT, (width - 1, 0)), weight[:, None], bias, groups=6).mT
        return F.silu(y) if silu else y

    given = [draw(make, 2, length, 6), draw(make, 6, width), draw(make, 6)]
    compare(
        lambda x, w, b: causal_conv1d(x, w, b, activation="silu" if silu else None)[0],
        truth,
        given,
        draw(make, 2, length, 6),
    )


def test_a_convolution_that_forgets_its_halo_is_seen(
    make: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = rows._conv_backward

    def wrong(x: Any, w: Any, b: Any, silu: bool, first: int, end: int, g: Any, *to: Any) -> None:
        right(x[:end], w, b, silu, first, end, g, *to)

    monkeypatch.setattr(rows, "_conv_backward", wrong)
    with pytest.raises(AssertionError, match="half_gradient"):
        test_convolution(make, 2 * ROWS + 2, 4, True)


@pytest.mark.parametrize("dim", [8, 20])
def test_rotation(make: torch.Generator, dim: int) -> None:
    angles = torch.randn(1, 7, dim // 2, generator=make).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()

    def truth(x: Tensor) -> Tensor:
        a, b = x[..., : dim // 2], x[..., dim // 2 : dim]
        c, s = (t[:, None, :, : dim // 2].double() for t in (cos, sin))
        return torch.cat([a * c - b * s, b * c + a * s, x[..., dim:]], -1)

    x = draw(make, 2, 7, 3, 20).transpose(1, 2)
    compare(lambda x: rows.rotate(x, cos, sin), truth, [x], draw(make, 2, 3, 7, 20))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    repeats, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (t.repeat_interleave(repeats, 1) for t in (key, value))
    after = torch.ones(length, length, dtype=torch.bool).triu(1)
    return (query @ key.mT * 0.3).masked_fill(after, -math.inf).softmax(-1) @ value


@pytest.mark.parametrize("length", [1, 16, 37])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
def test_attention(
    make: torch.Generator, monkeypatch: pytest.MonkeyPatch, length: int, heads: tuple[int, int]
) -> None:
    monkeypatch.setattr(attention, "_SPAN", 16)
    given = [draw(make, 2, length, h, 32).transpose(1, 2) for h in (heads[0], heads[1], heads[1])]
    compare(
        lambda *t: attention.causal_attention(*t, 0.3),
        attend,
        given,
        draw(make, 2, heads[0], length, 32),
    )


def test_attention_that_leaves_out_the_mean_is_seen(
    make: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = rows.scores_backward

    def wrong(scores: Tensor, grads: Tensor, sums: Tensor, along: Tensor, *rest: Any) -> Tensor:
        shares: Tensor = right(scores, grads, sums, torch.zeros_like(along), *rest)
        return shares

    monkeypatch.setattr(rows, "scores_backward", wrong)
    with pytest.raises(AssertionError, match="half_gradient"):
        test_attention(make, monkeypatch, 37, (6, 2))


LOSSES = [Weights(), Weights(0.7, 0.5), Weights(0.7, 0.5, 2.5), Weights(temperature=0.5)]


@pytest.mark.parametrize("weights", LOSSES, ids=str)
@pytest.mark.parametrize("words", [11, 200])
def test_divergence(weights: Weights, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compiled = rows.divergence
    monkeypatch.setattr(rows, "divergence", lambda *a, **k: (calls.append(1), compiled(*a, **k)))
    given = loss_arguments(n=40, d=8, words=words)
    names = ("hidden", "head", "teacher_hidden", "teacher_head")
    short = {n: t.detach().bfloat16() if n in names else t for n, t in given.items()}
    wide = {n: t.double() if n in names else t for n, t in short.items()}
    for some in (short, wide):
        some["hidden"].requires_grad_()
        some["head"].requires_grad_()
    got, want = ours(weights, short), wanted(weights, wide)
    assert calls
    assert_same(got["loss"], want["loss"], "half", "loss")
    for name in ("gradient of hidden", "gradient of head"):
        assert_same(got[name], want[name], "half_gradient", name)


def test_divergence_of_logits_as_they_are(make: torch.Generator) -> None:
    student, teacher = draw(make, 3, 1000) * 8, draw(make, 3, 1000) * 8
    p, q = (t.double().log_softmax(-1) for t in (teacher, student))
    want, losses = (p.exp() * (p - q)).sum(-1), torch.empty(3)
    got = student.clone()
    rows.divergence(got, teacher, None, losses, kl=1.0, ce=0.0, temperature=1.0, grad=True)
    assert_same(losses, want, "kernel", "losses")
    assert_same(got, q.exp() - p.exp(), "half", "gradient")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_stay_seen(make: torch.Generator, bad: float) -> None:
    hidden, head = draw(make, 4, 8), draw(make, 50, 8)
    hidden[1, 0] = bad
    hidden.requires_grad_()
    loss = next_token_loss(hidden, head, teacher_hidden=draw(make, 4, 8), teacher_head=head)
    loss.backward()
    assert not loss.isfinite() and not hidden.grad[1].isfinite().any()
    assert hidden.grad[[0, 2, 3]].isfinite().all()


def test_ssd_gates_in_one_pass(make: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, z = draw(make, 2, 9, 3, 16), draw(make, 2, 9, 3, 16)
    dt, A = draw(make, 2, 9, 3), -torch.ones(3)
    B, C = draw(make, 2, 9, 1, 16), draw(make, 2, 9, 1, 16)
    got = ssd(x, dt, A, B, C, z=z, dt_softplus=True)[0]
    monkeypatch.setenv("TAMBA_KERNELS", "torch")
    wide = [t.double() for t in (x, dt, A, B, C)]
    assert_same(got, ssd(*wide, z=z.double(), dt_softplus=True)[0], "half")


def model() -> TambaForCausalLM:
    shared: dict[str, Any] = {"mlp": MLPSpec(d_mlp=96), "norm": NormSpec()}
    mamba = Mamba2Spec(n_heads=4, head_dim=16, d_state=16, n_groups=1, norm_groups=1)
    attention = AttentionSpec(n_heads=4, n_kv_heads=2, head_dim=16, rotary_dim=8)
    config = TambaConfig(
        vocab_size=70,
        hidden_size=64,
        blocks={
            "mamba2": BlockSpec(mixer=mamba, **shared),
            "attention": BlockSpec(mixer=attention, **shared),
        },
        layers=["mamba2", "attention"],
        tie_word_embeddings=True,
        max_position_embeddings=64,
    )
    torch.manual_seed(2)
    return TambaForCausalLM(config)


def gradients(hybrid: TambaForCausalLM, ids: Tensor, short: bool) -> dict[str, Tensor]:
    hybrid.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=short):
        logits = hybrid(ids, use_cache=False).logits
    (logits.float().log_softmax(-1)[..., 3].sum()).backward()
    return {n: p.grad.clone() for n, p in hybrid.named_parameters() if p.grad is not None}


def errors(hybrid: TambaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Mean relative error of gradients under autocast: on compiled loops, on plain torch."""
    ids = torch.arange(2 * 40).view(2, 40) % 70
    monkeypatch.setenv("TAMBA_KERNELS", "torch")
    want, plain = gradients(hybrid, ids, False), gradients(hybrid, ids, True)
    monkeypatch.delenv("TAMBA_KERNELS")
    loops = gradients(hybrid, ids, True)
    assert loops.keys() == want.keys()
    found = [sum(relative_rms(got[n], want[n]) for n in want) for got in (loops, plain)]
    return found[0] / len(want), found[1] / len(want)


PARTS = ["causal_conv1d", "rms_norm", "gate", "rotate", "scores_backward"]


def test_a_hybrid_under_autocast_is_no_further_from_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    used = set()

    def counted(name: str) -> Callable[..., Any]:
        right = getattr(rows, name)
        return lambda *given: (used.add(name), right(*given))[1]

    for name in PARTS:
        monkeypatch.setattr(rows, name, counted(name))
    loops, plain = errors(model(), monkeypatch)
    assert used == set(PARTS)
    assert loops < 1.2 * plain


def test_a_hybrid_of_bfloat16_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As frozen weights are beside masters that move, and a reference that is asked by TRL."""
    hybrid, ids = model().bfloat16(), torch.arange(2 * 40).view(2, 40) % 70

    def logits() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            found: Tensor = hybrid(ids, use_cache=False).logits
            return found.float()

    loops = logits()
    monkeypatch.setenv("TAMBA_KERNELS", "torch")
    assert relative_rms(loops, logits()) < 3e-2


@pytest.mark.parametrize("part", ["rms_norm", "gate", "rotate"])
def test_a_part_that_is_wrong_is_seen_in_a_hybrid(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(rows, part)
    monkeypatch.setattr(rows, part, lambda first, *rest: right(first * 1.2, *rest) * 1.1)
    loops, plain = errors(model(), monkeypatch)
    assert loops > 2 * plain
