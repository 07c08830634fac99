"""The Mamba-2 mixer (Dao and Gu 2024, arXiv 2405.21060), as trained from scratch and as converted
from grouped-query attention (*The Mamba in the Llama*, arXiv 2408.15237, section 3).

Shape letters: `B` batch, `T` tokens, `H` heads, `G` groups, `P` head_dim, `N` d_state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, initialization

from tamba.model.config import Mamba2Spec, TambaConfig
from tamba.model.layers import PaddedLinear, RMSNorm
from tamba.model.recurrent import RecurrentMixer, inverse_softplus_of_dt, no_autocast
from tamba.model.tokens import Tokens
from tamba.ops import causal_conv1d, ssd


class Mamba2Mixer(RecurrentMixer):
    """``out_proj(norm(ssd(conv([x | B | C])) * silu(z)))``, every part as its `Mamba2Spec` says."""

    def __init__(self, config: TambaConfig, spec: Mamba2Spec, layer_idx: int) -> None:
        super().__init__(layer_idx)
        self.spec = spec
        self.slices = spec.in_proj_slices
        self.in_proj = PaddedLinear(config.d_model, self.slices["dt"].stop, bias=spec.proj_bias)
        channels = spec.d_conv_channels
        self.conv1d = nn.Conv1d(
            channels, channels, spec.d_conv, groups=channels, bias=spec.conv_bias
        )
        self.dt_bias = nn.Parameter(torch.empty(spec.n_heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(spec.n_heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(spec.n_heads, dtype=torch.float32))
        self.norm = (
            RMSNorm(spec.d_inner, spec.norm_eps, spec.norm_groups) if spec.norm_groups else None
        )
        self.out_proj = nn.Linear(spec.d_inner, config.d_model, bias=spec.proj_bias)
        if self.A_log.device.type != "meta":
            self.reset_ssm_parameters()

    @torch.no_grad()
    def reset_ssm_parameters(self) -> None:
        """dt log-uniform in [1e-3, 1e-1], A uniform in [1, 16], D one (Mamba-2's own start)."""
        n = self.spec.n_heads
        initialization.copy_(self.dt_bias, inverse_softplus_of_dt(n, 1e-3, 1e-1))
        initialization.copy_(self.A_log, torch.empty(n).uniform_(1, 16).log())
        initialization.ones_(self.D)
        self.reset_convolution()

    def forward(self, hidden: Tensor, state: Cache | None, tokens: Tokens) -> Tensor:
        """hidden [B, T, D] -> [B, T, D]."""
        s = self.slices
        sizes = [s["z"].stop, s["C"].stop - s["x"].start, s["dt"].stop - s["dt"].start]
        # One split, not slices: its gradient is put together, not a sum of padded ones.
        z, xBC, dt = self.in_proj(hidden).split(sizes, dim=-1)
        # Without a cache the gate goes into the scan; a cache would keep it for rolling back.
        inside = self.spec.gate and state is None and not self._norm_first
        y = self.run([xBC, dt, z] if inside else [xBC, dt], state, tokens)
        return self.out_proj(self.gate_and_norm(y, None if inside else z))

    @property
    def _norm_first(self) -> bool:
        return self.spec.norm_before_gate and self.norm is not None

    def gate_and_norm(self, y: Tensor, z: Tensor | None) -> Tensor:
        """y [B, T, d_inner] gated by z and normalised, in the order the template says.

        z is None where y has been gated already.
        """
        if self._norm_first and self.norm is not None:
            y = self.norm(y)
        if self.spec.gate and z is not None:
            y = (y * F.silu(z.to(torch.promote_types(z.dtype, torch.float32)))).to(z.dtype)
        if not self.spec.norm_before_gate and self.norm is not None:
            y = self.norm(y)
        return y

    def scan(
        self,
        inputs: Sequence[Tensor],
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        starts: Tensor | None,
        padding: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        spec, (xBC, dt, *z) = self.spec, inputs
        with no_autocast(xBC):
            xBC, conv_state = causal_conv1d(
                xBC,
                self.conv1d.weight[:, 0].to(xBC.dtype),
                None if self.conv1d.bias is None else self.conv1d.bias.to(xBC.dtype),
                activation="silu" if spec.conv_activation == "silu" else None,
                state=conv_state,
                starts=starts,
                padding=padding,
            )
            x, B, C = self.split_heads(xBC)
            y, ssm_state = ssd(
                x,
                dt,
                -torch.exp(self.A_log),
                B,
                C,
                D=self.D,
                z=z[0].unflatten(-1, (-1, spec.head_dim)) if z else None,
                dt_bias=self.dt_bias,
                dt_softplus=True,
                dt_limit=spec.dt_limit,
                state=ssm_state,
                starts=starts,
                padding=padding,
                chunk_size=spec.chunk_size,
            )
        return y.flatten(-2), conv_state, ssm_state

    def split_heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, channels] -> x [B, T, H, P], B and C [B, T, G, N], shared heads repeated."""
        spec, s = self.spec, self.slices
        x, B, C = xBC.split([s[k].stop - s[k].start for k in ("x", "B", "C")], dim=-1)
        x, B, C = (
            x.unflatten(-1, (-1, spec.head_dim)),
            B.unflatten(-1, (-1, spec.d_state)),
            C.unflatten(-1, (-1, spec.d_state)),
        )
        if spec.n_kv_heads is not None:
            x = x.repeat_interleave(spec.n_heads // spec.n_kv_heads, dim=2)
            if spec.n_groups > spec.n_kv_heads:
                B = B.repeat_interleave(spec.n_groups // spec.n_kv_heads, dim=2)
        return x, B, C
