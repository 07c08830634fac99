"""Score layers and choose which to convert: `tamba analyze`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tamba.analyze.distances import StateScores, state_scores
from tamba.analyze.swaps import (
    Analysis,
    analyze_model,
    angular_distances,
    perplexity_ratios,
    swap_scores,
)
from tamba.checkpoint import load_model, open_model
from tamba.errors import UserError
from tamba.model.config import AttentionSpec
from tamba.plan import write_plan
from tamba.recipe import Recipe, as_recipe
from tamba.text import prepare_text, read_text

__all__ = [
    "Analysis",
    "StateScores",
    "analyze",
    "analyze_model",
    "angular_distances",
    "perplexity_ratios",
    "state_scores",
    "swap_scores",
]


def analyze(
    recipe: Recipe | str | Path, out: str | Path, *, text: str | Path | None = None
) -> Analysis:
    """Score the layers of a recipe's teacher and write the plan that converts the least harmful.

    Text to fit and to score on are different rows of the recipe's training text, or of its held-out
    text where it trains on none.

    Args:
        recipe: the recipe or its file.
        out: the folder to make: `scores.json`, `plan.toml`, and `record.json` for the report.
        text: the folder of prepared text; None to prepare it here.

    Raises:
        UserError: more layers to convert than there is attention, a layer to keep that is not
            there, or a model or text that cannot be; `out` is not made.
    """
    recipe = as_recipe(recipe)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(str(out), "already exists", "choose another folder or remove it")
    checkpoint = open_model(recipe)
    _check(recipe, checkpoint.tamba_config.block_specs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepared = prepare_text(recipe) if text is None else read_text(text)
    blocks = prepared.train or prepared.heldout
    if blocks is None:
        raise UserError(recipe.where("data.heldout"), "names no text", "scores need some")
    dtype = None if recipe.teacher.dtype is None else getattr(torch, recipe.teacher.dtype)
    teacher = load_model(checkpoint, dtype, device)
    found = analyze_model(teacher, blocks, recipe)
    _write(out, found)
    return found


def _check(recipe: Recipe, specs: Sequence[Any]) -> None:
    wanted = recipe.analyze
    for layer in wanted.always_keep:
        if not 0 <= layer < len(specs):
            raise UserError(
                recipe.where("analyze.always_keep"),
                f"there is no layer {layer}",
                f"the teacher's are 0 to {len(specs) - 1}",
            )
    free = [
        i
        for i, spec in enumerate(specs)
        if isinstance(spec.mixer, AttentionSpec) and i not in wanted.always_keep
    ]
    if wanted.convert > len(free):
        raise UserError(
            recipe.where("analyze.convert"),
            f"{wanted.convert} layers are to be converted and {len(free)} can be",
            "convert fewer or keep fewer",
        )


def _write(out: Path, found: Analysis) -> None:
    """The folder, whole or not at all."""
    partial = out.absolute().parent / f".{out.absolute().name}.partial"
    record = {
        "scores": found.scores,
        "score_name": "KL (nats/token)" if found.frontier else found.score,
        "frontier": [
            {"converted": n, "ratio": ratio, "stage": found.score} for n, ratio in found.frontier
        ],
    }
    scores = {
        "score": found.score,
        "scores": found.scores,
        "order": found.order,
        "frontier": found.frontier,
        "distances": found.distances,
    }
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
        (partial / "record.json").write_text(json.dumps(record, indent=1) + "\n")
        write_plan(replace(found.plan, name="plan.toml"), partial / "plan.toml")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        problem = f"cannot be written ({error.strerror})"
        raise UserError(str(out), problem, "choose another folder or free some room") from error
