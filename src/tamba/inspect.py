"""What a checkpoint is and what it must cost: layers, parameters, state, memory and speed floors.

Everything is counted from the configuration; no weights are read. A floor is a bound that no
implementation can beat: decoding one token reads every weight (one row of an untied embedding) and
the whole state once, so time per token is at least those bytes over the memory bandwidth.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tamba.checkpoint import TensorSpec, open_checkpoint
from tamba.evaluate.memory import cache_bytes
from tamba.model.config import TambaConfig

CONTEXTS = (4096, 32768)
"""Contexts to give floors for where the user names none: those that the model has positions for,
and where it has fewer, all of them."""


@dataclass(frozen=True)
class Floor:
    """Bounds at one context length, batch 1.

    Args:
        context: tokens before the one that is decoded.
        cache_bytes: keys, values, convolution windows and SSM states.
        memory_bytes: weights and cache.
        tokens_per_second: most that decoding can reach at `Inspection.bandwidth`; None without one.
    """

    context: int
    cache_bytes: int
    memory_bytes: int
    tokens_per_second: float | None


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Args:
        layers: kind of mixer of each layer, bottom first: ``attention``, ``mamba1``, ``mamba2``.
        parameters: of the whole model; a tied table counts once.
        weight_bytes: parameters in the type they compute in.
        cache_bytes_per_token: growth of the cache with each token; sliding windows count as
            growing.
        state_bytes: convolution windows and SSM states, whatever the context.
        bandwidth: bytes a second, measured or given.
    """

    model: str
    family: str
    dtype: str
    layers: tuple[str, ...]
    d_model: int
    vocab_size: int
    tied: bool
    max_positions: int
    parameters: int
    parameters_by_part: dict[str, int]
    weight_bytes: int
    cache_bytes_per_token: int
    state_bytes: int
    bandwidth: float | None
    floors: tuple[Floor, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def inspect(
    model: str | Path,
    *,
    contexts: Iterable[int] | None = None,
    bandwidth: float | None = None,
) -> Inspection:
    """Describe a checkpoint without reading its weights.

    Args:
        model: a folder, GGUF file or hub name.
        contexts: lengths to give floors for; None for some that the model has positions for.
        bandwidth: memory bandwidth in bytes a second; None to measure it.

    Raises:
        UserError: the checkpoint cannot be opened or its family is not supported.
    """
    checkpoint = open_checkpoint(str(model))
    # What is wrong with the checkpoint is said before half a second is measured.
    config, parameters = checkpoint.tamba_config, checkpoint.parameters
    if bandwidth is None:
        bandwidth = measure_bandwidth()
    return describe(
        config,
        parameters,
        model=str(model),
        family="tamba" if checkpoint.family is None else checkpoint.family.name,
        contexts=contexts,
        bandwidth=bandwidth,
    )


def describe(
    config: TambaConfig,
    parameters: Mapping[str, TensorSpec],
    *,
    model: str = "model",
    family: str = "tamba",
    contexts: Iterable[int] | None = None,
    bandwidth: float | None = None,
) -> Inspection:
    """The same from a configuration and the shapes and types of its parameters (tied ones once)."""
    dtype = config.dtype or torch.float32
    weight_bytes = sum(spec.nbytes for spec in parameters.values())
    read = weight_bytes
    if not config.tie_word_embeddings:
        # Of an untied embedding, decoding reads one row.
        read -= (config.vocab_size - 1) * config.hidden_size * dtype.itemsize

    def state(context: int) -> int:
        return cache_bytes(config, context, bytes_per_value=dtype.itemsize)

    if contexts is None:
        most = config.positions or max(CONTEXTS)
        contexts = sorted({min(context, most) for context in CONTEXTS})
    floors = []
    for context in contexts:
        cache = state(context)
        speed = None if bandwidth is None else bandwidth / (read + cache)
        floors.append(Floor(context, cache, weight_bytes + cache, speed))
    return Inspection(
        model=model,
        family=family,
        dtype=str(dtype).removeprefix("torch."),
        layers=tuple(block.mixer.kind for block in config.block_specs),
        d_model=config.hidden_size,
        vocab_size=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        max_positions=config.max_position_embeddings,
        parameters=sum(math.prod(spec.shape) for spec in parameters.values()),
        parameters_by_part=_by_part(parameters),
        weight_bytes=weight_bytes,
        cache_bytes_per_token=state(1) - state(0),
        state_bytes=state(0),
        bandwidth=bandwidth,
        floors=tuple(floors),
    )


def measure_bandwidth(megabytes: int = 256, seconds: float = 0.4) -> float:
    """Read bandwidth of the default device in bytes a second: the best of repeated large sums."""
    device = torch.get_default_device()
    if device.type == "cpu" and torch.cuda.is_available():
        device = torch.device("cuda")
    data = torch.ones(megabytes * 2**20 // 4, dtype=torch.float32, device=device)
    best = 0.0
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        data.sum().item()
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def _by_part(parameters: Mapping[str, TensorSpec]) -> dict[str, int]:
    parts = {"embedding": 0, "mixers": 0, "mlps": 0, "norms": 0, "head": 0}
    for name, spec in parameters.items():
        if name.startswith("lm_head"):
            part = "head"
        elif "embed_tokens" in name:
            part = "embedding"
        elif ".mixer." in name:
            part = "mixers"
        else:
            part = "mlps" if ".mlp." in name else "norms"
        parts[part] += math.prod(spec.shape)
    return parts
