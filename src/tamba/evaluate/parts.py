"""What was measured, as the parts of a record."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tamba import report
from tamba.errors import UserError
from tamba.evaluate.memory import cache_bytes
from tamba.evaluate.perplexity import Comparison
from tamba.plan import Action, LayerPlan, PlanEntry, parse_entries

CONTEXTS = tuple(2**k * 1024 for k in range(6))
"""Context lengths at which caches are compared: 1k to 32k."""


def perplexity_of(suites: Mapping[str, report.Measured]) -> report.Perplexity | None:
    """The section on perplexity, from the suites `ppl` and `kl`; None without the first."""
    found = suites.get("ppl")
    if found is None or "student" not in found.scores:
        return None
    by_role = found.scores
    student, teacher = by_role["student"], by_role.get("teacher")
    ratio = student.get("ratio")
    divergence = suites["kl"].scores.get("student", {}) if "kl" in suites else {}
    density = {r: s["bits_per_byte"].value for r, s in by_role.items() if "bits_per_byte" in s}
    return report.Perplexity(
        student=student["perplexity"].value,
        teacher=None if teacher is None else teacher["perplexity"].value,
        ratio=None if ratio is None else ratio.value,
        ratio_error=None if ratio is None else ratio.error,
        tokens=found.settings["scored_tokens"],
        length=found.settings["length"],
        kl=divergence["kl"].value if "kl" in divergence else None,
        agreement=divergence["agreement"].value if "agreement" in divergence else None,
        bits_per_byte=density or None,
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


def layers_of(
    model: Any,
    plan: LayerPlan | None = None,
    *,
    folder: Path | None = None,
    teacher: Any | None = None,
) -> report.Layers:
    """Layers of a student, and how many were converted from attention.

    Said by, in this order: `plan`; ``build.json`` in `folder`, which `tamba build` leaves; the
    `teacher`, where it has attention in the same place. A model with none of them was converted
    from nothing: a transplanted or pretrained Mamba layer does not count.
    """
    mixers = [block.mixer.kind for block in model.config.block_specs]
    if plan is not None:
        converted = len(plan.converted)
    elif (entries := built_entries(folder)) is not None:
        converted = sum(entry.action == "convert" for entry in entries)
    elif teacher is not None:
        before = [block.mixer.kind for block in teacher.config.block_specs]
        alike = before if len(before) == len(mixers) else mixers
        converted = sum(was == "attention" != now for was, now in zip(alike, mixers, strict=True))
    else:
        converted = 0
    return report.Layers(total=len(mixers), converted=converted)


def built_entries(folder: Path | None) -> tuple[PlanEntry, ...] | None:
    """The layers that a build record in `folder` names, bottom first; None where there is none.

    Raises:
        UserError: there is one, and it cannot be read.
    """
    path = None if folder is None else folder / "build.json"
    if path is None or not path.is_file():
        return None
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))["layers"]
        return parse_entries(layers, str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(str(path), "is not a record of a build", "remove it") from error


ORIGINS: dict[Action, Literal["kept", "converted", "transplanted", "reinitialized"]] = {
    "keep": "kept",
    "convert": "converted",
    "transplant": "transplanted",
    "reinitialize": "reinitialized",
}


def plan_of(model: Any, entries: Sequence[PlanEntry] | None) -> list[report.PlanLayer]:
    """What each layer of a student is and where it came from; nothing where nobody says."""
    blocks = model.config.block_specs
    if entries is None or len(entries) != len(blocks):
        return []
    return [
        report.PlanLayer(
            mixer=block.mixer.kind,
            origin=ORIGINS[entry.action],
            source=entry.source,
            source_layer=entry.index,
        )
        for entry, block in zip(entries, blocks, strict=True)
    ]


def recipe_of(folder: Path | None) -> str | None:
    """The recipe that `tamba build` left in `folder`, as TOML."""
    path = None if folder is None else folder / "recipe.toml"
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


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
