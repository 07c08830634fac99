"""The text of a recipe, as blocks of tokens: what is fitted on, and what is held out.

A run prepares it once and every step reads the same blocks. Text that the teacher writes is sampled
here, with the teacher that the recipe names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tamba.checkpoint import load_model, load_tokenizer, open_model
from tamba.data import TokenBlocks, read_texts, split_texts
from tamba.errors import UserError
from tamba.recipe import Recipe
from tamba.teacher_text import write_blocks

WRITTEN = "teacher-written"


@dataclass(frozen=True, eq=False)
class RecipeText:
    """Blocks to fit on, and blocks to measure on: no document is on both sides.

    Either is None where the recipe names no text for it.
    """

    train: TokenBlocks | None
    heldout: TokenBlocks | None

    def save(self, folder: str | Path) -> None:
        """Write the blocks into a folder, which is made."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train", "heldout"):
            blocks: TokenBlocks | None = getattr(self, name)
            if blocks is not None:
                blocks.save(folder / f"{name}.safetensors")


def read_text(folder: str | Path) -> RecipeText:
    """Read what `RecipeText.save` wrote. Raises UserError for a missing folder or damaged file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(str(folder), "no such folder of text")
    train, heldout = (folder / f"{name}.safetensors" for name in ("train", "heldout"))
    return RecipeText(
        TokenBlocks.load(train) if train.exists() else None,
        TokenBlocks.load(heldout) if heldout.exists() else None,
    )


def prepare_text(recipe: Recipe, *, teacher: Any = None, tokenizer: Any = None) -> RecipeText:
    """Read, split, tokenize and pack the text that a recipe names.

    Args:
        recipe: its ``[data]`` section decides, and ``evaluate.texts`` where it names other text to
            measure on; rows have ``data.length`` tokens.
        teacher: the teacher, where it is open already; otherwise opened if it has to write.
        tokenizer: of the teacher; read from its checkpoint if None.

    Raises:
        UserError: a source that cannot be read, or too little text to fill one row or to divide.
    """
    data = recipe.data
    if tokenizer is None:
        tokenizer = _tokenizer(recipe)
    parts: dict[str, list[TokenBlocks]] = {"train": [], "heldout": []}
    train, heldout = recipe.text_sources("train"), recipe.text_sources("texts")
    for source in dict.fromkeys((*train, *heldout)):
        sides = [n for n, names in (("train", train), ("heldout", heldout)) if source in names]
        if source == WRITTEN:
            written = _written(recipe, teacher, tokenizer)
            pieces = [written] if len(sides) == 1 else _divided(written, data.heldout_share)
        else:
            texts = read_texts(source, key=data.text_key)
            halves = split_texts(texts, data.heldout_share) if len(sides) == 2 else (texts,)
            pieces = [
                TokenBlocks.from_texts(half, tokenizer, data.length, fill=side == "heldout")
                for side, half in zip(sides, halves, strict=True)
            ]
        for side, piece in zip(sides, pieces, strict=True):
            parts[side].append(piece)
    return RecipeText(
        _mixed(parts["train"], recipe.seed), _mixed(parts["heldout"], recipe.seed + 1)
    )


def _tokenizer(recipe: Recipe) -> Any:
    checkpoint = open_model(recipe)
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise UserError(
            checkpoint.location, "has no tokenizer", "put tokenizer.json beside the weights"
        )
    return tokenizer


def _written(recipe: Recipe, teacher: Any, tokenizer: Any) -> TokenBlocks:
    data = recipe.data
    openings = None
    if data.written_openings:
        file = recipe.locate(data.written_openings, "data.written_openings")
        openings = file.read_text(encoding="utf-8").splitlines()
    if teacher is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        teacher = load_model(open_model(recipe), recipe.teacher.dtype, device)
    return write_blocks(
        teacher,
        tokenizer,
        data.length,
        tokens=data.written_tokens,
        openings=openings,
        temperature=data.written_temperature,
        seed=recipe.seed,
    )


def _divided(blocks: TokenBlocks, share: float) -> list[TokenBlocks]:
    """The first blocks to train on, the last `share` held out.

    The document that runs over the cut would be on both sides: the held-out side gives its part up.
    """
    n_held = max(1, round(len(blocks) * share))
    cut = len(blocks) - n_held
    if cut < 1:
        raise UserError(
            "data.written_tokens",
            f"{blocks.n_tokens} tokens cannot be divided into rows of {blocks.length}",
            "write more, or shorter rows",
        )
    tokens, starts = blocks.tokens[cut:].clone(), blocks.starts[cut:].clone()
    # Each token a document of its own: nothing is predicted from it and nothing sees it.
    first = starts[0].nonzero().flatten()
    starts[0, : int(first[1]) if len(first) > 1 else blocks.length] = True
    held = TokenBlocks(tokens, starts, n_held * blocks.length, blocks.bytes_per_token)
    return [blocks.take(cut), held]


def _mixed(parts: Sequence[TokenBlocks], seed: int) -> TokenBlocks | None:
    """All rows of several sources in one order, so that any beginning holds some of each."""
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0]
    tokens = torch.cat([part.tokens for part in parts])
    starts = torch.cat([part.starts for part in parts])
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    # Filling is marked in the rows themselves, so its place does not matter.
    n_tokens = sum(part.n_tokens for part in parts)
    sizes = [part.bytes_per_token for part in parts]
    density = None
    if None not in sizes:
        density = sum((s or 0) * p.n_tokens for s, p in zip(sizes, parts, strict=True)) / n_tokens
    return TokenBlocks(tokens[order], starts[order], n_tokens, density)
