"""What a model must remember of the text before, in bytes, counted from its configuration.

Attention keeps a key and a value for every token, so its cache grows; a state-space layer keeps a
convolution window and a state of fixed size. Measured memory belongs to another file.
"""

from __future__ import annotations

from tamba.model.config import AttentionSpec, Mamba1Spec, TambaConfig


def cache_bytes(config: TambaConfig, context: int, *, bytes_per_value: int = 2) -> int:
    """Bytes one sequence of `context` tokens occupies in the caches of all layers.

    Args:
        bytes_per_value: of keys, values and convolution states (2 for half precision); SSM states
            are float32 always.
    """
    total = 0
    for block in config.block_specs:
        mixer = block.mixer
        if isinstance(mixer, AttentionSpec):
            seen = context if mixer.sliding_window is None else min(context, mixer.sliding_window)
            total += 2 * mixer.n_kv_heads * mixer.head_dim * seen * bytes_per_value
        elif isinstance(mixer, Mamba1Spec):
            total += mixer.d_inner * (mixer.d_conv - 1) * bytes_per_value
            total += mixer.d_inner * mixer.d_state * 4
        else:
            total += mixer.d_conv_channels * (mixer.d_conv - 1) * bytes_per_value
            total += mixer.n_heads * mixer.head_dim * mixer.d_state * 4
    return total
