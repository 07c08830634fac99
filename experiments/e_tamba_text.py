"""Text for the small E-Tamba experiment, as streams of tokens that travel to a GPU machine.

    python experiments/e_tamba_text.py --train train.jsonl.xz --valid valid.jsonl \
        --tokenizer gpt-neox-20b.json --target linux-doc-6.1 --target git-doc --out tokens

Rows of the text are JSON objects with `text` and `source`. The sources named by ``--target`` are
what the models are later tuned on, as C4 is in the paper; all others, with a fifth of the target's
documents, are what they are pretrained on, as the Pile is. No text is in two streams:

    pretrain   other sources, one target document in five, generated lists
    finetune   the other target documents, generated lists
    analysis, general   validation documents of the other sources, by turns
    choice, report      validation documents of the target, by turns

Generated lists are random words written down again, and phone books with some entries again: models
of some million parameters hardly learn to look back from prose alone, and then recall could not be
compared. They are drawn with other seeds than the cases that recall is scored on.

A stream is uint16, every document closed by the separator, packed with xz. `tokens.json` says what
is in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import random
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from tamba.artefact import new_folder, versions
from tamba.errors import UserError
from tamba.evaluate.recall import TASKS

STREAMS = ("pretrain", "finetune", "analysis", "general", "choice", "report")
SEPARATOR = "<|endoftext|>"
SEEN = 5
"""One target document in so many is pretrained on."""
LISTS = 0.06
"""Share of generated lists among the tokens that are trained on."""
LONGEST_COPY, MOST_ENTRIES = 256, 40


def open_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a `tokenizer.json` whose separator is GPT-NeoX's."""
    if not path.is_file():
        raise UserError(str(path), "no such file", "give a tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path), eos_token=SEPARATOR, pad_token="<|padding|>"
    )
    if len(tokenizer) > 1 << 16:
        raise UserError(str(path), f"{len(tokenizer)} tokens do not fit in 16 bits")
    return tokenizer


def documents(path: Path) -> list[tuple[str, str]]:
    """(source, text) of each line."""
    if not path.is_file():
        raise UserError(str(path), "no such file")
    opened: Any = lzma.open if path.suffix == ".xz" else open
    found = []
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                found.append((row["source"], row["text"]))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{number}", "not an object with source and text") from error
    return found


def by_stream(
    train: list[tuple[str, str]], valid: list[tuple[str, str]], target: set[str], seed: int
) -> dict[str, list[str]]:
    """Texts of each stream; training text is shuffled."""
    unknown = target - {source for source, _ in train}
    if unknown:
        known = ", ".join(sorted({source for source, _ in train}))
        raise UserError("--target", f"no text of {', '.join(sorted(unknown))}", f"there is {known}")
    streams: dict[str, list[str]] = {name: [] for name in STREAMS}
    count = 0
    for source, text in train:
        count += source in target
        tuned = source in target and count % SEEN
        streams["finetune" if tuned else "pretrain"].append(text)
    for kind, names in ((False, ("analysis", "general")), (True, ("choice", "report"))):
        for k, text in enumerate(t for s, t in valid if (s in target) == kind):
            streams[names[k % 2]].append(text)
    for name in ("pretrain", "finetune"):
        random.Random(f"{seed} {name}").shuffle(streams[name])
    empty = [name for name, texts in streams.items() if not texts]
    if empty:
        raise UserError("--target", f"leaves no text for {', '.join(empty)}", "name other sources")
    return streams


def lists(tokenizer: PreTrainedTokenizerFast, seed: str) -> Iterator[list[int]]:
    """Documents to look back in, without end: words again and again, entries of a book again."""
    rng = random.Random(seed)
    copy, book = (TASKS[name].make(tokenizer, ()) for name in ("copy", "phonebook"))
    while True:
        case = copy(rng, round(4 * (LONGEST_COPY / 4) ** rng.random()))
        assert case.answer is not None
        yield [*case.prompt, *case.answer]
        case = book(rng, round(2 * (MOST_ENTRIES / 2) ** rng.random()))
        *lines, _ = str(tokenizer.decode(case.prompt)).split("\n")
        again = rng.sample(lines, min(8, len(lines)))
        yield tokenizer("\n".join([*lines, *again]) + "\n")["input_ids"]


def encoded(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Iterator[list[int]]:
    """Tokens of each text."""
    for first in range(0, len(texts), 256):
        yield from tokenizer(texts[first : first + 256], verbose=False)["input_ids"]


def mixed(texts: Iterable[list[int]], more: Iterator[list[int]], share: float) -> Iterator[Any]:
    """`texts` with documents of `more` between them, until those are `share` of all tokens."""
    size = added = 0
    for text in texts:
        yield text
        size += len(text)
        while added < share / (1 - share) * size:
            document = next(more)
            added += len(document)
            yield document


def main(arguments: list[str] | None = None) -> None:
    """Make the folder of token streams."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, required=True, help="JSON lines, .xz or plain")
    parser.add_argument("--valid", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    parser.add_argument("--target", action="append", required=True, help="a source to tune on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="training documents, for a try")
    args = parser.parse_args(arguments)
    tokenizer = open_tokenizer(args.tokenizer)
    train = documents(args.train)[: args.limit]
    streams = by_stream(train, documents(args.valid), set(args.target), args.seed)
    separator = tokenizer.eos_token_id
    about: dict[str, Any] = {
        "target": sorted(args.target),
        "seen": 1 / SEEN,
        "lists": LISTS,
        "seed": args.seed,
        "versions": versions(),
        "streams": {},
    }
    with new_folder(args.out) as folder:
        (folder / "tokenizer.json").write_bytes(args.tokenizer.read_bytes())
        for name, texts in streams.items():
            parts: Iterable[list[int]] = encoded(tokenizer, texts)
            if name in ("pretrain", "finetune"):
                parts = mixed(parts, lists(tokenizer, f"documents {args.seed} {name}"), LISTS)
            flat = np.concatenate([np.array([*ids, separator], np.uint16) for ids in parts])
            with lzma.open(folder / f"{name}.npy.xz", "wb", preset=2) as file:
                np.save(file, flat)
            about["streams"][name] = {
                "documents": len(texts),
                "tokens": len(flat),
                "bytes_of_text": sum(len(text.encode()) for text in texts),
                "sha256": hashlib.sha256(flat.tobytes()).hexdigest(),
            }
            print(f"{name}: {len(texts)} documents, {len(flat):,} tokens", flush=True)
        (folder / "tokens.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
