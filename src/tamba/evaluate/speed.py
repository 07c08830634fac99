"""Speed: prompt and decoding, tokens a second over context and batch, and where the hybrid wins.

Models take turns at every point, so that a slow minute of the machine slows both.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from tamba import progress
from tamba.evaluate.measure import Models, Request, Role, Stores, Subject
from tamba.evaluate.memory import break_even, check_sweep, contexts_for, weight_bytes
from tamba.model.cache import TambaCache
from tamba.report import Curve, Measured, Point, Score

REPEATS = 3
DECODED = 24
"""Tokens decoded a repeat."""


def prepare(request: Request) -> _Speed:
    """Speed over contexts and batches."""
    check_sweep(request)
    return _Speed(request)


class _Speed:
    def __init__(self, request: Request) -> None:
        self.request = request
        self.settings: dict[str, Any] = {
            "contexts": list(request.options.contexts) or "as the device allows",
            "batches": list(request.options.batches),
            "repeats": REPEATS,
            "decoded": DECODED,
            "figure": "median",
        }

    def run(self, models: Models, stores: Stores) -> Measured:
        begun = time.monotonic()
        device = models.student.model.device.type
        points = [
            (context, batch)
            for context in contexts_for(self.request, device)
            for batch in self.request.options.batches
        ]
        rows: list[dict[str, str | int | float | None]] = []
        for context, batch in progress.track(points, "speed"):
            taken: dict[Role, list[tuple[float, float]]] = {s.role: [] for s in models}
            full: set[Role] = set()
            for repeat in range(REPEATS + 1):
                for subject in models:
                    if subject.role in full:
                        continue
                    try:
                        seconds = _seconds(subject, context, batch)
                    except torch.OutOfMemoryError:
                        full.add(subject.role)
                        continue
                    if repeat:  # the first one warms up
                        taken[subject.role].append(seconds)
            for role, pairs in taken.items():
                if role in full:
                    beyond = {"role": role, "context": context, "batch": batch}
                    rows.append(beyond | {"note": "out of memory"})
                    continue
                prefill = [batch * context / p for p, _ in pairs]
                decode = [batch * DECODED / d for _, d in pairs]
                rows.append(
                    {
                        "role": role,
                        "context": context,
                        "batch": batch,
                        "prefill_tokens_per_second": statistics.median(prefill),
                        "decode_tokens_per_second": statistics.median(decode),
                        "decode_least": min(decode),
                        "decode_most": max(decode),
                    }
                )
        scores: dict[str, dict[str, Score]] = {"student": {}}
        if models.teacher is not None:
            scores["student"] = _even(rows, self.request.options.batches[0])
            memory = break_even(
                models.student.model.config,
                models.teacher.model.config,
                (weight_bytes(models.student.model), weight_bytes(models.teacher.model)),
                bytes_per_value=models.student.model.dtype.itemsize,
            )
            if memory is not None:
                scores["student"]["break_even_memory_tokens"] = Score(value=memory, n=1)
        return Measured(
            settings=self.settings | {"device": device, "threads": torch.get_num_threads()},
            rows=rows,
            scores=scores,
            curves={
                f"{what}_tokens_per_second": _curve(rows, what, self.request.options.batches[0])
                for what in ("prefill", "decode")
            },
            seconds=round(time.monotonic() - begun, 3),
        )


@torch.inference_mode()
def _seconds(subject: Subject, context: int, batch: int) -> tuple[float, float]:
    """Wall time of the prompt pass, and of decoding `DECODED` tokens after it."""
    model = subject.model
    ids = torch.randint(model.config.vocab_size, (batch, context), device=model.device)
    cache = TambaCache(model.config)
    begun = _now(model)
    hidden = model.model(input_ids=ids, past_key_values=cache).last_hidden_state
    token = model.lm_head(hidden[:, -1]).argmax(-1)
    middle = _now(model)
    for _ in range(DECODED):
        hidden = model.model(input_ids=token[:, None], past_key_values=cache).last_hidden_state
        token = model.lm_head(hidden[:, -1]).argmax(-1)
    return middle - begun, _now(model) - middle


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _even(rows: list[dict[str, str | int | float | None]], batch: int) -> dict[str, Score]:
    """The least measured context from which on the student is at least as fast, by phase.

    Where the teacher alone runs out of memory, the student is faster.
    """
    found = {}
    for what in ("prefill", "decode"):
        speeds: dict[int, dict[str, float]] = {}
        for row in rows:
            if row["batch"] == batch:
                value = row.get(f"{what}_tokens_per_second")
                speeds.setdefault(int(row["context"] or 0), {})[str(row["role"])] = float(
                    value or 0
                )
        first = None
        for context in sorted(speeds, reverse=True):
            ours, theirs = speeds[context]["student"], speeds[context]["teacher"]
            if not ours and not theirs:
                continue  # neither ran there, which says nothing
            if not ours or ours < theirs:
                break
            first = context
        if first is not None:
            found[f"break_even_{what}_tokens"] = Score(value=first, n=REPEATS)
    return found


def _curve(rows: list[dict[str, str | int | float | None]], what: str, batch: int) -> Curve:
    points: dict[str, list[Point]] = {}
    for row in rows:
        if row["batch"] == batch and (found := row.get(f"{what}_tokens_per_second")):
            value = float(found)
            x = float(row["context"] or 0)
            points.setdefault(str(row["role"]), []).append(Point(x=x, value=value, n=REPEATS))
    return Curve(axis="context, tokens", points=points)
