"""Memory: what a model must hold, counted from its configuration, and what it takes, measured.

Attention keeps a key and a value for every token, so its cache grows; a state-space layer keeps a
convolution window and a state of fixed size. The suite `memory` runs a prompt and splits what it
took by cause, beside the floor: weights, cache and last logits, without which nothing goes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tamba import progress
from tamba.errors import UserError
from tamba.evaluate.measure import Models, Request, Stores, Subject
from tamba.model.cache import RecurrentLayer, TambaCache
from tamba.model.config import TambaConfig
from tamba.report import Measured

CONTEXTS = {"cpu": (512, 1024, 2048, 4096), "cuda": tuple(2**k * 1024 for k in range(6))}
"""Contexts that are measured where the user names none; the model's positions permitting."""


def cache_bytes(config: TambaConfig, context: int, *, bytes_per_value: int = 2) -> int:
    """Bytes one sequence of `context` tokens occupies in the caches of all layers.

    Args:
        bytes_per_value: of keys, values and convolution states (2 for half precision); SSM states
            are float32 always.
    """
    return sum(block.cache_bytes(context, bytes_per_value) for block in config.block_specs)


def break_even(
    student: TambaConfig,
    teacher: TambaConfig,
    weights: tuple[int, int],
    *,
    bytes_per_value: int = 2,
) -> int | None:
    """Context from which the student's weights and cache are smaller than the teacher's.

    Args:
        weights: bytes of the student's and the teacher's.
        bytes_per_value: of keys, values and convolution states, as for `cache_bytes`.

    Returns:
        Tokens of one sequence, or None where that is so nowhere below a million.
    """

    def smaller(context: int) -> bool:
        ours, theirs = (
            cache_bytes(c, context, bytes_per_value=bytes_per_value) for c in (student, teacher)
        )
        return weights[0] + ours < weights[1] + theirs

    low, high = 0, 2**20
    if smaller(low):
        return 0
    if not smaller(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if smaller(middle) else (middle, high)
    return high


def contexts_for(request: Request, device: str) -> list[int]:
    """Contexts to measure at: those asked for, or those of `CONTEXTS` that fit; the
    model's positions where all are longer."""
    wanted = request.options.contexts or CONTEXTS.get(device, CONTEXTS["cuda"])
    fit = sorted(c for c in set(wanted) if request.positions is None or c <= request.positions)
    return fit or [int(request.positions or 1)]


def check_sweep(request: Request) -> None:
    """Refuse contexts and batches that cannot be. Raises UserError."""
    for context in request.options.contexts:
        if context < 1:
            raise UserError("--contexts", f"{context} is not above 0")
        request.check_length(context, "--contexts")
    if min(request.options.batches, default=0) < 1:
        raise UserError("--batches", "holds no number above 0")


def prepare(request: Request) -> _Memory:
    """Memory over contexts and batches."""
    check_sweep(request)
    return _Memory(request)


class _Memory:
    def __init__(self, request: Request) -> None:
        self.request = request
        self.settings: dict[str, Any] = {
            "contexts": list(request.options.contexts) or "as the device allows",
            "batches": list(request.options.batches),
            "phase": "prompt in one pass, logits of the last token",
        }

    def run(self, models: Models, stores: Stores) -> Measured:
        begun = time.monotonic()
        device = models.student.model.device.type
        points = [
            (context, batch)
            for context in contexts_for(self.request, device)
            for batch in self.request.options.batches
        ]
        rows: list[Row] = []
        with progress.task("memory", len(points) * len(list(models))) as advance:
            for subject in models:
                with _alone(subject, models):
                    for context, batch in points:
                        rows.append(_measure(subject, context, batch))
                        advance()
        return Measured(
            settings=self.settings | {"device": device},
            rows=rows,
            seconds=round(time.monotonic() - begun, 3),
        )


Row = dict[str, str | int | float | None]


def weight_bytes(model: Any) -> int:
    """Bytes of parameters and buffers, each once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@contextlib.contextmanager
def _alone(subject: Subject, models: Models) -> Iterator[None]:
    """Let nobody else's weights take room on a GPU: what fits and what the driver counts is one's
    own."""
    device = subject.model.device
    others = (
        [] if device.type == "cpu" else [m.model for m in models if m.model is not subject.model]
    )
    try:
        for model in others:
            model.to("cpu")
        yield
    finally:
        for model in others:
            model.to(device)


def _prompt(model: Any, ids: Tensor, cache: TambaCache) -> Tensor:
    """Logits [B, V] after the prompt ids [B, T], which is in the cache then."""
    hidden = model.model(input_ids=ids, past_key_values=cache).last_hidden_state
    logits: Tensor = model.lm_head(hidden[:, -1])
    return logits


@torch.inference_mode()
def _measure(subject: Subject, context: int, batch: int) -> Row:
    """One row: bytes by cause; where the device ran out of memory, the floor alone."""
    model = subject.model
    config, device = model.config, model.device
    value_bytes = model.dtype.itemsize
    weights = weight_bytes(model)
    logits = batch * config.vocab_size * value_bytes
    cache = TambaCache(config)
    floor = weights + batch * cache_bytes(config, context, bytes_per_value=value_bytes) + logits
    row: Row = {
        "role": subject.role,
        "context": context,
        "batch": batch,
        "floor": floor,
        "weights": weights,
        "logits": logits,
    }
    meter = _Cuda(device) if device.type == "cuda" else _Resident()
    try:
        ids = torch.randint(config.vocab_size, (batch, context), device=device)
        if device.type == "cuda":
            # Once before: libraries keep workspaces from their first call on, and kernels that are
            # being tuned take memory of their own.
            _prompt(model, ids, TambaCache(config))
        meter.start()
        _prompt(model, ids, cache)
        taken = meter.stop()
    except torch.OutOfMemoryError:
        return row | {"note": "out of memory"}
    states = [layer for layer in cache.layers if isinstance(layer, RecurrentLayer)]
    state = sum(layer.nbytes for layer in states)
    kv = cache.nbytes - state
    used = int(taken.pop("used") or 0)
    known = kv + state + logits
    row |= {"kv": kv, "state": state, **taken}
    if used >= known:
        # The parts of the floor must be there; the rest of what was taken is transient.
        peak = weights + used
        row |= {"activations": used - known, "peak": peak, "over_floor": peak / floor}
    # Else the process had room from before, which resident memory does not tell apart.
    return row


class _Cuda:
    """Peak of the allocator above what was there before; reserved and driver-level beside it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = torch.cuda.memory_allocated(self.device)

    def stop(self) -> Row:
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device)
        reserved = torch.cuda.max_memory_reserved(self.device)
        # What the allocator holds it gives back to nobody, so the peak is still there.
        free, total = torch.cuda.mem_get_info(self.device)
        return {"used": peak - self.before, "slack": reserved - peak, "driver": total - free}


class _Resident:
    """Peak resident memory above what was there before, as Linux counts it; else nothing."""

    def start(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        self.before = _status("VmRSS")

    def stop(self) -> Row:
        peak = _status("VmHWM")
        return {"used": max(0, peak - self.before), "resident_peak": peak}


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0
