"""What a model lost and what it gained, measured against its teacher.

`evaluate` is the verb: it opens checkpoints and text, measures, and hands back a record. The
measures themselves are in the files beside this one and take models and tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tamba import report
from tamba.checkpoint import load
from tamba.data import Source, TokenBlocks, read_texts, text_digest
from tamba.errors import UserError
from tamba.evaluate.memory import cache_bytes
from tamba.evaluate.parts import layers_of, memory_of, of_one, of_two
from tamba.evaluate.perplexity import Comparison, PerplexityResult, compare, perplexity

__all__ = ["Comparison", "PerplexityResult", "cache_bytes", "compare", "evaluate", "perplexity"]


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
    if out is not None:
        _check_folder(Path(out))
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
        found = of_one(alone, length)
    else:
        found = of_two(compare(teacher, student, blocks, **options), length)
    seconds["perplexity"] = time.monotonic() - begun

    record = report.Record.begin(
        name=os.path.basename(os.fspath(model).rstrip("/")),
        teacher=None if against is None else os.path.basename(os.fspath(against).rstrip("/")),
        perplexity=found,
        layers=layers_of(student),
        parameters={"student": student.num_parameters()}
        | ({} if teacher is None else {"teacher": teacher.num_parameters()}),
        memory=memory_of(student, teacher),
        seconds=seconds,
        digests={"text": text_digest(texts)},
    )
    if out is not None:
        report.write_report(record, out)
    return record


def _check_folder(out: Path) -> None:
    """Refuse, before hours of work, a folder that could not be written to after them."""
    above = out
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise UserError(str(out), f"{above} is no folder", "choose another --out")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(str(out), f"{above} may not be written to", "choose another --out")


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
