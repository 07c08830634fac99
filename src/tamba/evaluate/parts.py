"""What was measured, as the parts of a record."""

from __future__ import annotations

from typing import Any

from tamba import report
from tamba.evaluate.memory import cache_bytes
from tamba.evaluate.perplexity import Comparison, PerplexityResult
from tamba.plan import LayerPlan

CONTEXTS = tuple(2**k * 1024 for k in range(6))
"""Context lengths at which caches are compared: 1k to 32k."""


def of_one(result: PerplexityResult, length: int) -> report.Perplexity:
    """A model measured alone, on windows of `length` tokens."""
    density = result.bits_per_byte
    return report.Perplexity(
        student=result.ppl,
        tokens=result.tokens,
        length=length,
        bits_per_byte=None if density is None else {"student": density},
    )


def of_two(found: Comparison, length: int) -> report.Perplexity:
    """Teacher and student measured on the same windows of `length` tokens."""
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


def layers_of(model: Any, plan: LayerPlan | None = None) -> report.Layers:
    """Layers of a student, and how many are converted.

    Args:
        plan: what the student was built from. Without one, every layer that is no attention counts:
            a checkpoint does not say which of them were transplanted.
    """
    mixers = [block.mixer.kind for block in model.config.block_specs]
    if plan is not None:
        return report.Layers(total=len(mixers), converted=len(plan.converted))
    return report.Layers(total=len(mixers), converted=sum(kind != "attention" for kind in mixers))


def memory_of(student: Any, teacher: Any | None) -> list[report.CachePoint]:
    """Bytes of the cache of both at each of `CONTEXTS`, counted from their configurations."""
    return [
        report.CachePoint(
            context=context,
            student=cache_bytes(student.config, context),
            teacher=None if teacher is None else cache_bytes(teacher.config, context),
        )
        for context in CONTEXTS
    ]
