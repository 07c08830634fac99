"""The last step of a run: teacher and student on the same held-out tokens, and in conversation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from tamba import progress, report
from tamba.checkpoint import load, load_model, load_tokenizer, open_model
from tamba.data import TokenBlocks
from tamba.errors import UserError
from tamba.evaluate.parts import layers_of, memory_of, of_two, plan_of
from tamba.evaluate.perplexity import compare
from tamba.generate import generate
from tamba.plan import LayerPlan
from tamba.recipe import Recipe


def evaluate_student(
    recipe: Recipe,
    student: str | Path,
    blocks: TokenBlocks,
    plan: LayerPlan | None = None,
    **sections: Any,
) -> report.Record:
    """Measure a student beside the teacher of its recipe.

    Args:
        recipe: its ``[evaluate]`` section decides.
        student: the checkpoint.
        blocks: held-out text.
        plan: what the student was built from.
        sections: what earlier steps know of the record (scores, frontier, training losses).

    Raises:
        UserError: a checkpoint cannot be opened, or vocabularies differ.
    """
    wanted = recipe.evaluate
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begun = time.monotonic()
    ours, tokenizer = load(student, device=device)
    checkpoint = open_model(recipe)
    teacher = load_model(checkpoint, recipe.teacher.dtype, device)
    tokenizer = tokenizer or load_tokenizer(checkpoint)
    if tokenizer is None:
        raise UserError(str(student), "has no tokenizer", "put tokenizer.json beside the weights")
    seconds = {"load": time.monotonic() - begun}

    begun = time.monotonic()
    blocks = blocks.take(max(1, wanted.tokens // blocks.length))
    autocast = None if wanted.dtype is None else getattr(torch, wanted.dtype)
    found = compare(teacher, ours, blocks, batch_size=wanted.batch, autocast=autocast)
    seconds["perplexity"] = time.monotonic() - begun

    begun = time.monotonic()
    chat = []
    for prompt in progress.track(wanted.prompts, "chat"):
        said = [
            generate(model, prompt, tokenizer=tokenizer, new_tokens=wanted.new_tokens).text.strip()
            for model in (ours, teacher)
        ]
        chat.append(report.Chat(prompt=prompt, student=said[0], teacher=said[1]))
    if chat:
        seconds["chat"] = time.monotonic() - begun

    known = {
        "teacher": recipe.teacher.path,
        "perplexity": of_two(found, blocks.length),
        "layers": layers_of(ours, plan),
        "parameters": {"teacher": teacher.num_parameters(), "student": ours.num_parameters()},
        "memory": memory_of(ours, teacher),
        "chat": chat,
        "answer": chat[0].student if chat else None,
        "seconds": seconds,
        "recipe": recipe.text,
        "plan": plan_of(ours, None if plan is None else plan.entries),
    }
    return report.Record.begin(recipe.name, **(known | sections))
