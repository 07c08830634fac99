"""What both Mamba mixers share: a scan over new tokens from a state, and float32 parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, initialization

from tamba.model.cache import RecurrentLayer
from tamba.model.tokens import Tokens


class RecurrentMixer(nn.Module):
    """Base of the mixers whose memory is a convolution state and an SSM state.

    A subclass writes its maths once, in `scan`; full sequence, continuation, one token and replay
    after a rollback are that same function with different states.
    """

    FLOAT32 = ("A_log", "dt_bias", "D")
    """Parameters that keep float32 when the module is cast to a shorter type: `A_log` and `dt_bias`
    pass through exponentials, and all three cost nothing."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def scan(
        self,
        inputs: Sequence[Tensor],
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        starts: Tensor | None,
        padding: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mixer inputs [B, T, ...] and states before -> output [B, T, d_inner], states after."""
        raise NotImplementedError

    def reset_ssm_parameters(self) -> None:
        """Fill the parameters that no general initialisation knows."""
        raise NotImplementedError

    def reset_convolution(self) -> None:
        """torch's own start for a convolution: the general one of a language model is too small."""
        convolution = self.get_submodule("conv1d")
        assert isinstance(convolution, nn.Conv1d)
        initialization.kaiming_uniform_(convolution.weight, a=math.sqrt(5))
        if convolution.bias is not None:
            initialization.zeros_(convolution.bias)

    def run(self, inputs: Sequence[Tensor], state: Cache | None, tokens: Tokens) -> Tensor:
        """`scan` over the new tokens, from and into the cache when there is one."""
        inputs = [tokens.arrange(x) for x in inputs]
        if state is None:
            output, _, _ = self.scan(inputs, None, None, tokens.starts, tokens.padding)
        else:
            layer = state.layers[self.layer_idx]
            if not isinstance(layer, RecurrentLayer):
                raise TypeError(
                    f"cache layer {self.layer_idx} is no RecurrentLayer: {type(layer).__name__}"
                )
            output = layer.advance(self.scan, inputs, tokens.starts, tokens.padding)
        return tokens.restore(output)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = [p for name in self.FLOAT32 if (p := self._parameters.get(name)) is not None]

        def keep_float32(t: Tensor) -> Tensor:
            out = fn(t)
            if out.is_floating_point() and out.element_size() < 4 and any(t is p for p in kept):
                return t.to(out.device)
            return out

        return super()._apply(keep_float32, recurse)


@contextmanager
def no_autocast(x: Tensor) -> Iterator[None]:
    """Inside, operations keep the dtypes they are given: decays and states must stay float32."""
    with torch.autocast(device_type=x.device.type, enabled=False):
        yield


def inverse_softplus_of_dt(n: int, low: float, high: float, floor: float = 1e-4) -> Tensor:
    """[n] biases whose softplus is log-uniform in [low, high] (Gu and Dao 2023, section 3.6)."""
    dt = torch.exp(torch.empty(n).uniform_(math.log(low), math.log(high))).clamp_min(floor)
    return dt + torch.log(-torch.expm1(-dt))
