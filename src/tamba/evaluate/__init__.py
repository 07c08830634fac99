"""What a model lost and what it gained, measured against its teacher.

`evaluate` is the verb: it opens checkpoints and text, measures, and hands back a record. The
measures themselves are in the files beside this one and take models and tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import torch

from tamba import report
from tamba.checkpoint import load
from tamba.data import Source, TokenBlocks, read_texts, text_digest
from tamba.errors import UserError
from tamba.evaluate.memory import cache_bytes
from tamba.evaluate.perplexity import Comparison, PerplexityResult, compare, perplexity

__all__ = ["Comparison", "PerplexityResult", "cache_bytes", "compare", "evaluate", "perplexity"]

CONTEXTS = tuple(2**k * 1024 for k in range(6))
"""Context lengths at which caches are compared: 1k to 32k."""


def evaluate(
    model: str | os.PathLike[str],
    data: Source | Sequence[Source],
    *,
    against: str | os.PathLike[str] | None = None,
    length: int = 1024,
    limit: int | None = None,
    batch_size: int = 4,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    out: str | os.PathLike[str] | None = None,
) -> report.Record:
    """Measure a checkpoint on text, alone or beside its teacher.

    Args:
        model: a checkpoint of ours or any supported one: folder, hub name or GGUF file.
        data: sources of text, see `tamba.data.read_texts`.
        against: the teacher.
        length: tokens a window; windows do not overlap, and the last one may be shorter.
        limit: measure on the first so many windows.
        autocast: type of matrix products, see `tamba.evaluate.perplexity`.
        out: folder for ``report.json``, ``report.html`` and plots; nothing is written without one.

    Raises:
        UserError: something is missing or does not fit, see `load`, `read_texts` and `compare`.
    """
    if limit is not None and limit < 1:
        raise UserError("limit", f"{limit} windows leave nothing to measure", "use 1 or more")
    texts = read_texts(data)
    seconds: dict[str, float] = {}
    begun = time.monotonic()
    student, tokenizer = load(model, dtype=dtype, device=device)
    teacher = None if against is None else load(against, dtype=dtype, device=device)[0]
    for part in (student, teacher):
        _check_length(part, length)
    if tokenizer is None:
        raise UserError(str(model), "has no tokenizer", "put tokenizer.json beside the weights")
    seconds["load"] = time.monotonic() - begun

    begun = time.monotonic()
    # A window more than asked for, so that the last one measured is a whole one.
    enough = None if limit is None else (limit + 1) * length
    blocks = TokenBlocks.from_texts(texts, tokenizer, length, fill=True, max_tokens=enough)
    if limit is not None:
        blocks = blocks.take(limit)
    options: dict[str, Any] = {"batch_size": batch_size, "autocast": autocast}
    if teacher is None:
        alone = perplexity(student, blocks, **options)
        found = _of_one(alone, length)
    else:
        found = _of_two(compare(teacher, student, blocks, **options), length)
    seconds["perplexity"] = time.monotonic() - begun

    record = report.Record.begin(
        name=os.path.basename(os.fspath(model).rstrip("/")),
        teacher=None if against is None else os.path.basename(os.fspath(against).rstrip("/")),
        perplexity=found,
        layers=_layers(student),
        parameters={"student": student.num_parameters()}
        | ({} if teacher is None else {"teacher": teacher.num_parameters()}),
        memory=_memory(student, teacher),
        seconds=seconds,
        digests={"text": text_digest(texts)},
    )
    if out is not None:
        report.write_report(record, out)
    return record


def _of_one(result: PerplexityResult, length: int) -> report.Perplexity:
    density = result.bits_per_byte
    return report.Perplexity(
        student=result.ppl,
        tokens=result.tokens,
        length=length,
        bits_per_byte=None if density is None else {"student": density},
    )


def _of_two(found: Comparison, length: int) -> report.Perplexity:
    density = {
        name: result.bits_per_byte
        for name, result in (("teacher", found.teacher), ("student", found.student))
        if result.bits_per_byte is not None
    }
    return report.Perplexity(
        teacher=found.teacher.ppl,
        student=found.student.ppl,
        ratio=found.ratio,
        ratio_error=found.ratio_error,
        tokens=found.student.tokens,
        length=length,
        kl=found.kl,
        agreement=found.agreement,
        bits_per_byte=density or None,
    )


def _layers(model: Any) -> report.Layers:
    mixers = [block.mixer.kind for block in model.config.block_specs]
    return report.Layers(total=len(mixers), converted=sum(kind != "attention" for kind in mixers))


def _memory(student: Any, teacher: Any | None) -> list[report.CachePoint]:
    return [
        report.CachePoint(
            context=context,
            student=cache_bytes(student.config, context),
            teacher=None if teacher is None else cache_bytes(teacher.config, context),
        )
        for context in CONTEXTS
    ]


def _check_length(model: Any | None, length: int) -> None:
    """Refuse windows longer than the positions that attention was trained for."""
    if model is None or "full_attention" not in model.config.layer_types:
        return
    positions = model.config.max_position_embeddings
    if length > positions:
        raise UserError(
            "length",
            f"{length} is beyond the model's {positions} positions",
            f"use {positions} at most",
        )
