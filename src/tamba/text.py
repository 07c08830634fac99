"""The text of a recipe, as blocks of tokens: what is fitted on, and what is held out.

A run prepares each side once and every step reads the same blocks. Text that the teacher writes is
sampled here, with the teacher that the recipe names.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tamba.artefact import new_folder
from tamba.checkpoint import load_model, load_tokenizer, open_model
from tamba.data import TokenBlocks, check_sources, read_texts, split_texts
from tamba.errors import UserError
from tamba.lookup_text import SHORTEST_ROW, with_lookups
from tamba.model.config import TambaConfig
from tamba.recipe import WRITTEN, ChatStage, Recipe
from tamba.teacher_text import write_blocks

Side = Literal["train", "heldout"]
SIDES: tuple[Side, ...] = ("train", "heldout")
SOURCES: tuple[Literal["train", "texts"], ...] = ("train", "texts")
"""What a recipe names for each side."""


@dataclass(frozen=True, eq=False)
class RecipeText:
    """Blocks to fit on, and blocks to measure on: no document is on both sides.

    Either is None where the recipe names no text for it.
    """

    train: TokenBlocks | None
    heldout: TokenBlocks | None

    def save(self, folder: str | Path) -> None:
        """Write the blocks into a new folder, whole or not at all.

        Raises:
            UserError: something stands there, or the disk is full.
        """
        with new_folder(folder) as partial:
            for side in SIDES:
                blocks: TokenBlocks | None = getattr(self, side)
                if blocks is not None:
                    blocks.save(partial / f"{side}.safetensors")


def read_text(folder: str | Path) -> RecipeText:
    """Read what `RecipeText.save` wrote. Raises UserError for a missing folder or damaged file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(str(folder), "no such folder of text")
    train, heldout = (folder / f"{side}.safetensors" for side in SIDES)
    return RecipeText(
        TokenBlocks.load(train) if train.exists() else None,
        TokenBlocks.load(heldout) if heldout.exists() else None,
    )


def prepare_text(
    recipe: Recipe,
    *,
    sides: Collection[Side] = SIDES,
    written: TokenBlocks | None = None,
    teacher: Any = None,
    tokenizer: Any = None,
) -> RecipeText:
    """Read, split, tokenize and pack the text that a recipe names.

    Args:
        recipe: its ``[data]`` section decides, and ``evaluate.texts`` where it names other text to
            measure on; rows have ``data.length`` tokens.
        sides: which to prepare; the other one is None.
        written: what `write_text` gave, where the teacher has written already.
        teacher: the teacher, where it is open already; otherwise opened if it has to write.
        tokenizer: of the teacher; read from its checkpoint if None.

    Raises:
        UserError: a source that cannot be read, too little text to fill one row or to divide, or
            rows that are too short for `data.lookup_share`.
    """
    data = recipe.data
    check_text(recipe)
    if tokenizer is None:
        tokenizer = _tokenizer(recipe)
    parts: dict[Side, list[TokenBlocks]] = {"train": [], "heldout": []}
    named: dict[Side, tuple[str, ...]] = {
        side: recipe.text_sources(key) for side, key in zip(SIDES, SOURCES, strict=True)
    }
    for source in dict.fromkeys(source for side in SIDES for source in named[side]):
        homes = [side for side in SIDES if source in named[side]]
        if not set(homes) & set(sides):
            continue
        if source == WRITTEN:
            if written is None:
                written = write_text(recipe, teacher=teacher, tokenizer=tokenizer)
            blocks = [written] if len(homes) == 1 else _divided(written, data.heldout_share)
            pieces = dict(zip(homes, blocks, strict=True))
        else:
            texts = read_texts(source, key=data.text_key, limit=data.rows)
            halves = split_texts(texts, data.heldout_share) if len(homes) == 2 else (texts,)
            pieces = {
                side: TokenBlocks.from_texts(half, tokenizer, data.length, fill=side == "heldout")
                for side, half in zip(homes, halves, strict=True)
                if side in sides
            }
        for side, piece in pieces.items():
            if side in sides:
                parts[side].append(piece)
    train = _mixed(parts["train"], recipe.seed)
    if train is not None and data.lookup_share:
        train = with_lookups(train, data.lookup_share, recipe.seed)
    return RecipeText(train, _mixed(parts["heldout"], recipe.seed + 1))


def check_lengths(recipe: Recipe, teacher: TambaConfig) -> None:
    """Refuse rows that are longer than the teacher's attention has positions for.

    Raises:
        UserError: naming ``data.length``, or the stage whose own ``length`` it is.
    """
    lengths = {recipe.where("data.length"): recipe.data.length}
    for i, stage in enumerate(recipe.train):
        # Conversations are as long as they are; theirs is a bound.
        if not isinstance(stage, ChatStage) and (length := getattr(stage, "length", None)):
            lengths[f"{recipe.where_stage(i)}.length"] = length
    for where, length in lengths.items():
        if teacher.positions is not None and length > teacher.positions:
            raise UserError(
                where,
                f"{length} is beyond the teacher's {teacher.positions} positions",
                f"use {teacher.positions} at most",
            )


def check_text(recipe: Recipe) -> None:
    """Refuse text that is not there or that cannot be made as asked, before any is read or written.

    Raises:
        UserError: a source of no kind that is read, or rows too short for `data.lookup_share`.
    """
    data = recipe.data
    for key in SOURCES:
        check_sources(recipe.text_sources(key), data.rows)
    if data.lookup_share and data.length < SHORTEST_ROW:
        raise UserError(
            recipe.where("data.lookup_share"),
            f"takes rows of {SHORTEST_ROW} tokens or more, and these have {data.length}",
            "lengthen data.length, or leave lookup_share out",
        )


def _tokenizer(recipe: Recipe) -> Any:
    checkpoint = open_model(recipe)
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise UserError(
            checkpoint.location, "has no tokenizer", "put tokenizer.json beside the weights"
        )
    return tokenizer


def write_text(recipe: Recipe, *, teacher: Any = None, tokenizer: Any = None) -> TokenBlocks:
    """What the teacher of a recipe writes, as blocks of ``data.length`` tokens.

    Args:
        teacher, tokenizer: where they are open already.

    Raises:
        UserError: the teacher cannot be opened, or has no chat template and no openings are named.
    """
    data = recipe.data
    if tokenizer is None:
        tokenizer = _tokenizer(recipe)
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
