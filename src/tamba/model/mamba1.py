"""The Mamba-1 mixer (Gu and Dao 2023, arXiv 2312.00752), in its own form and in the grouped form
that *The Mamba in the Llama* (arXiv 2408.15237) makes of attention.

Shape letters: `B` batch, `T` tokens, `D` channels (d_inner), `G` groups, `N` d_state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, initialization

from tamba.model.config import Mamba1Spec, TambaConfig
from tamba.model.layers import PaddedLinear
from tamba.model.recurrent import RecurrentMixer, inverse_softplus_of_dt, no_autocast
from tamba.model.tokens import Tokens
from tamba.ops import causal_conv1d, selective_scan


class Mamba1Mixer(RecurrentMixer):
    """``out_proj(selective_scan(conv(x)) * silu(z))``; where dt, B and C come from is `dt_from`."""

    def __init__(self, config: TambaConfig, spec: Mamba1Spec, layer_idx: int) -> None:
        super().__init__(layer_idx)
        self.spec = spec
        self.slices = mamba1_in_proj_slices(spec)
        rows = max(s.stop for s in self.slices.values())
        self.in_proj = PaddedLinear(config.d_model, rows, bias=spec.proj_bias)
        self.conv1d = nn.Conv1d(
            spec.d_inner, spec.d_inner, spec.d_conv, groups=spec.d_inner, bias=spec.conv_bias
        )
        self.x_proj = (
            PaddedLinear(spec.d_inner, spec.dt_rank + 2 * spec.n_groups * spec.d_state, bias=False)
            if spec.dt_from == "inner"
            else None
        )
        self.dt_proj = nn.Linear(spec.dt_rank, spec.d_inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(spec.d_inner, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(spec.d_inner, spec.d_state, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(spec.d_inner, dtype=torch.float32))
        self.out_proj = nn.Linear(spec.d_inner, config.d_model, bias=spec.proj_bias)
        if self.A_log.device.type != "meta":
            self.reset_ssm_parameters()

    @torch.no_grad()
    def reset_ssm_parameters(self) -> None:
        """dt log-uniform in [1e-3, 1e-1], A = 1..N for every channel (S4D-real), D one."""
        spec = self.spec
        initialization.uniform_(self.dt_proj.weight, -(spec.dt_rank**-0.5), spec.dt_rank**-0.5)
        initialization.copy_(self.dt_bias, inverse_softplus_of_dt(spec.d_inner, 1e-3, 1e-1))
        ladder = torch.arange(1, spec.d_state + 1, dtype=torch.float32).log()
        initialization.copy_(self.A_log, ladder.expand(spec.d_inner, -1))
        initialization.ones_(self.D)
        self.reset_convolution()

    def forward(self, hidden: Tensor, state: Cache | None, tokens: Tokens) -> Tensor:
        """hidden [B, T, D] -> [B, T, D]."""
        spec = self.spec
        sizes = [s.stop - s.start for s in self.slices.values()]
        # One split, not slices: its gradient is put together, not a sum of padded ones.
        parts = dict(zip(self.slices, self.in_proj(hidden).split(sizes, dim=-1), strict=True))
        x = parts["x"]
        if spec.dt_from == "inner":
            inputs: tuple[Tensor, ...] = (x,)
        else:
            # The shared channels are repeated before the convolution, which has its own taps for
            # every channel.
            inputs = (
                self._repeat(x, spec.d_inner // spec.n_groups).flatten(-2),
                parts["B"],
                parts["C"],
                self.dt_proj(parts["dt"]),
            )
        y = self.run(inputs, state, tokens)
        if spec.gate:
            z = parts["z"]
            y = (y * F.silu(z.to(torch.promote_types(z.dtype, torch.float32)))).to(z.dtype)
        return self.out_proj(y)

    def _repeat(self, x: Tensor, width: int) -> Tensor:
        """[B, T, kv groups * width] -> [B, T, G, width], in blocks of `repeat_span` groups."""
        spec = self.spec
        x = x.unflatten(-1, (-1, width))
        if spec.n_kv_groups is None or spec.n_kv_groups == spec.n_groups:
            return x
        times = spec.n_groups // spec.n_kv_groups
        return x.unflatten(2, (-1, spec.repeat_span)).repeat_interleave(times, dim=2).flatten(2, 3)

    def scan(
        self,
        inputs: Sequence[Tensor],
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        starts: Tensor | None,
        padding: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        spec = self.spec
        x = inputs[0]
        with no_autocast(x):
            x, conv_state = causal_conv1d(
                x,
                self.conv1d.weight[:, 0].to(x.dtype),
                None if self.conv1d.bias is None else self.conv1d.bias.to(x.dtype),
                activation="silu" if spec.conv_activation == "silu" else None,
                state=conv_state,
                starts=starts,
                padding=padding,
            )
        if self.x_proj is not None:
            sizes = [spec.dt_rank, spec.n_groups * spec.d_state, spec.n_groups * spec.d_state]
            dt, B, C = self.x_proj(x).split(sizes, dim=-1)
            dt = self.dt_proj(dt)
            B = B.unflatten(-1, (spec.n_groups, spec.d_state))
        else:
            _, B, C, dt = inputs
            B = self._repeat(B, spec.d_state)
        with no_autocast(x):
            y, ssm_state = selective_scan(
                x,
                dt,
                -torch.exp(self.A_log),
                B,
                C.unflatten(-1, (spec.n_groups, spec.d_state)),
                D=self.D,
                dt_bias=self.dt_bias,
                dt_softplus=True,
                state=ssm_state,
                starts=starts,
                padding=padding,
            )
        return y, conv_state, ssm_state


def mamba1_in_proj_slices(spec: Mamba1Spec) -> dict[str, slice]:
    """Rows of ``in_proj`` by name: [x | z], or [z | x | B | C | dt] when `dt_from` is ``input``."""
    z = spec.d_inner if spec.gate else 0
    if spec.dt_from == "inner":
        sizes = {"x": spec.d_inner, "z": z}
    else:
        kv = spec.n_kv_groups or spec.n_groups
        sizes = {
            "z": z,
            "x": kv * (spec.d_inner // spec.n_groups),
            "B": kv * spec.d_state,
            "C": spec.n_groups * spec.d_state,
            "dt": spec.dt_rank,
        }
    slices, start = {}, 0
    for name, size in sizes.items():
        slices[name] = slice(start, start + size)
        start += size
    return slices
