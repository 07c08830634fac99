"""Scores by effect: what changing one layer does to a model's predictions, by forward passes alone.

A layer is left out, replaced by a converted one, or, in a student without attention, given its
attention back. Layers below it are not run again. Each change is measured on text (KL to the
reference and change of the loss, row by row against the unchanged model) and, where there is a
probe, on recall.

Shape letters: `n` rows, `T` tokens of a row, `D` d_model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from tamba.analyze.probe import Probe
from tamba.analyze.swaps import (
    DTYPE,
    HELD_BYTES,
    bad_rows,
    check_finite,
    converted_layers,
    over_rows,
    row_kl,
    scored_places,
)
from tamba.data import TokenBlocks
from tamba.errors import UserError
from tamba.model.block import Block
from tamba.model.config import AttentionSpec, TambaConfig
from tamba.model.modeling import TambaForCausalLM
from tamba.ops.losses import Weights, next_token_loss
from tamba.plan import ConvertOptions
from tamba.trace import climb, computing, each, enter, finish, trace

Variants = Mapping[int, Block | None]
"""What stands in a layer's place; None where the layer is left out."""


@dataclass(frozen=True)
class Change:
    """What changing one layer did.

    Args:
        kl: KL(reference, changed) less KL(reference, unchanged), in nats a token.
        loss: nats a token more on the text than the unchanged model; ``exp(loss)`` is the ratio of
            perplexities.
        recall: share of the probe's answers fewer; None without a probe.
        kl_error, loss_error, recall_error: standard errors over rows; None for a single row.
    """

    kl: float
    loss: float
    recall: float | None = None
    kl_error: float | None = None
    loss_error: float | None = None
    recall_error: float | None = None


class Ledger:
    """Finished changes on disk, one JSON line each, so that a call that was cut off goes on.

    Args:
        path: the file, which is made; None to remember nothing.
        inputs: what changes were measured on. A file of other inputs is begun anew.
    """

    def __init__(self, path: Path | None = None, inputs: str = "") -> None:
        self._path = path
        self._lock = Lock()
        self._known: dict[tuple[str, int], Change] = {}
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if _json(lines[0] if lines else "") == {"inputs": inputs}:
            for line in lines[1:]:
                # The last line may be half written.
                if (found := _json(line)) is not None:
                    score, layer = found.pop("score"), found.pop("layer")
                    self._known[score, layer] = Change(**found)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [
            json.dumps({"score": s, "layer": i} | asdict(c)) for (s, i), c in self._known.items()
        ]
        path.write_text("\n".join([json.dumps({"inputs": inputs}), *kept]) + "\n", encoding="utf-8")

    def find(self, score: str, layer: int) -> Change | None:
        """The change of a layer, if it is finished."""
        return self._known.get((score, layer))

    def add(self, score: str, layer: int, change: Change) -> None:
        """Remember a finished change."""
        line = json.dumps({"score": score, "layer": layer} | asdict(change)) + "\n"
        with self._lock:
            self._known[score, layer] = change
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line)


def _json(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def change_scores(
    model: TambaForCausalLM,
    variants: Variants,
    blocks: TokenBlocks,
    *,
    score: str,
    reference: TambaForCausalLM | None = None,
    probe: Probe | None = None,
    ledger: Ledger | None = None,
    dtype: torch.dtype | None = DTYPE,
) -> dict[int, Change]:
    """What each of `variants` does in its layer's place, all others left as they are.

    Args:
        model: left as it is.
        blocks: text to score on.
        score: the name that `ledger` remembers changes under.
        reference: whose predictions KL is measured to, and whose layers `variants` are; None for
            `model` itself.
        probe: of recall.
        dtype: of matrix products; None for the weights' own.

    Raises:
        UserError: a layer that is not there, or a reference of another vocabulary.
    """
    ledger = ledger or Ledger()
    L = len(model.model.layers)
    for index in variants:
        if not 0 <= index < L:
            raise UserError(score, f"there is no layer {index}", f"the layers are 0 to {L - 1}")
    if reference is not None and reference.config.vocab_size != model.config.vocab_size:
        raise UserError(score, "student and teacher have other vocabularies", "take a pair")
    todo = [i for i in variants if ledger.find(score, i) is None]
    texts: list[_Text | _Recall] = [_Text(blocks)]
    if probe is not None:
        texts.append(_Recall(probe))
    n_tokens = sum(t.blocks.tokens.numel() for t in texts)
    size = max(1, HELD_BYTES // (4 * model.config.hidden_size * n_tokens) - 1)
    for first in range(0, len(todo), size):
        some = todo[first : first + size]
        seen = [trace(model, t.blocks, streams=[*some, L], dtype=dtype).streams for t in texts]
        if first == 0:
            wanted = None
            if reference is not None:
                top = len(reference.model.layers)
                wanted = trace(reference, blocks, streams=[top], dtype=dtype).streams[top]
            check_finite(model, seen[0][L], blocks, dtype)
            if reference is not None and wanted is not None:
                check_finite(reference, wanted, blocks, dtype)
            before = [
                t.measure(
                    model, reference or model, s[L], s[L] if wanted is None else wanted, dtype
                )
                for t, s in zip(texts, seen, strict=True)
            ]

        def one(
            index: int, _: Any, seen: Any = seen, before: Any = before, wanted: Any = wanted
        ) -> Change:
            found: dict[str, tuple[float, float | None]] = {}
            for t, streams, base in zip(texts, seen, before, strict=True):
                top = _climbed(
                    model,
                    reference or model,
                    index,
                    variants[index],
                    t.blocks,
                    streams[index],
                    dtype,
                )
                if len(rows := bad_rows(top)):
                    raise UserError(
                        f"score '{score}'",
                        f"layer {index} changed, row {rows[0]} gives no finite numbers",
                        "compute in a wider type, or leave this score out",
                    )
                theirs = streams[L] if wanted is None else wanted
                after = t.measure(model, reference or model, top, theirs, dtype)
                found |= {name: over_rows(after[name] - base[name]) for name in after}
            recall, recall_error = found.get("recall", (None, None))
            change = Change(
                found["kl"][0],
                found["loss"][0],
                None if recall is None else 0.0 - recall,  # no loss is 0, not -0
                found["kl"][1],
                found["loss"][1],
                recall_error,
            )
            ledger.add(score, index, change)
            return change

        each(one, some, device=model.device, label=f"score: {score}")
    return {i: change for i in variants if (change := ledger.find(score, i)) is not None}


def _climbed(
    model: TambaForCausalLM,
    owner: TambaForCausalLM,
    index: int,
    variant: Block | None,
    blocks: TokenBlocks,
    stream: Tensor,
    dtype: torch.dtype | None,
) -> Tensor:
    """[n, T, D]: the stream before layer `index` taken to the top with `variant` in its place."""
    tops = []
    with computing(model, dtype):
        for row, batch in enumerate(blocks.batches(1)):
            _, tokens = enter(model, batch.to(model.device))
            hidden = stream[row : row + 1]
            if variant is not None:
                # The owner knows angles and masks that this model may have no use for.
                _, theirs = enter(owner, batch.to(owner.device))
                hidden = variant(hidden, None, theirs)
            tops.append(climb(model, hidden, tokens, index + 1))
    return torch.cat(tops)


@dataclass(frozen=True, eq=False)
class _Text:
    blocks: TokenBlocks

    def measure(
        self,
        model: TambaForCausalLM,
        reference: TambaForCausalLM,
        top: Tensor,
        wanted: Tensor,
        dtype: torch.dtype | None,
    ) -> dict[str, Tensor]:
        """KL to the reference and loss of every row, [n] in nats a token, from the last states."""
        kl, loss = [], []
        head = model.lm_head.weight
        only = Weights(kl=0.0, ce=1.0)
        with computing(model, dtype):
            for row, batch in enumerate(self.blocks.batches(1)):
                batch = batch.to(model.device)
                here = scored_places(batch, row)
                if not len(here):
                    continue
                ours = top[row : row + 1]
                follow = batch.tokens[0, here + 1]
                kl.append(row_kl(model, reference, ours, wanted[row : row + 1], here))
                loss.append(
                    next_token_loss(finish(model, ours)[0, here], head, follow, weights=only)
                )
        if not kl:
            raise UserError("text", "holds no token to score", "give longer documents")
        return {"kl": torch.stack(kl).cpu(), "loss": torch.stack(loss).double().cpu()}


@dataclass(frozen=True, eq=False)
class _Recall:
    probe: Probe

    @property
    def blocks(self) -> TokenBlocks:
        return self.probe.blocks

    def measure(
        self,
        model: TambaForCausalLM,
        reference: TambaForCausalLM,
        top: Tensor,
        wanted: Tensor,
        dtype: torch.dtype | None,
    ) -> dict[str, Tensor]:
        """Share of every row's answers that are the likeliest token, [n]."""
        found = []
        with computing(model, dtype):
            for row in range(len(top)):
                at = self.probe.answers[row].nonzero()[:, 0].to(top.device)
                logits = model.lm_head(finish(model, top[row : row + 1])[0, at - 1])
                answers = self.blocks.tokens[row].to(top.device)[at]
                found.append((logits.argmax(-1) == answers).double().mean())
        return {"recall": torch.stack(found).cpu()}


def drop_scores(model: TambaForCausalLM, blocks: TokenBlocks, **options: Any) -> dict[int, Change]:
    """`change_scores` of leaving out each layer in turn: leave-one-out, for any model.

    Args:
        options: those of `change_scores`.
    """
    everything: Variants = dict.fromkeys(range(len(model.model.layers)))
    return change_scores(model, everything, blocks, **({"score": "drop"} | options))


def conversion_scores(
    teacher: TambaForCausalLM,
    blocks: TokenBlocks,
    convert: ConvertOptions,
    *,
    fit: TokenBlocks | None = None,
    seed: int = 0,
    ledger: Ledger | None = None,
    **options: Any,
) -> dict[int, Change]:
    """`change_scores` of converting each attention layer in turn.

    Args:
        convert: how.
        fit: text for the closed-form fit of each converted layer; None to leave it as converted.
        seed: of what the conversion draws.
        options: those of `change_scores`.
    """
    ledger = ledger or Ledger()
    score = str(options.pop("score", "swap" if fit is None else "least_squares"))
    layers = attention_layers(teacher)
    todo = [i for i in layers if ledger.find(score, i) is None]
    made = converted_layers(teacher, todo, convert, fit, seed)
    change_scores(teacher, made, blocks, score=score, ledger=ledger, **options)
    return {i: change for i in layers if (change := ledger.find(score, i)) is not None}


def attention_layers(model: TambaForCausalLM) -> list[int]:
    """Layers whose mixer is attention."""
    specs = model.config.block_specs
    return [i for i, spec in enumerate(specs) if isinstance(spec.mixer, AttentionSpec)]


def aligned_scores(
    teacher: TambaForCausalLM, student: TambaForCausalLM, blocks: TokenBlocks, **options: Any
) -> dict[int, Change]:
    """`change_scores` of putting each layer of an aligned student in its place in the teacher.

    Args:
        student: as deep as the teacher; layers that differ in kind from the teacher's are tried.
        options: those of `change_scores`.

    Raises:
        UserError: models that do not match, or no layer that differs.
    """
    variants: Variants = {i: ours for i, ours, _ in _pairs(teacher, student)}
    return change_scores(teacher, variants, blocks, **({"score": "aligned"} | options))


def restore_scores(
    teacher: TambaForCausalLM, student: TambaForCausalLM, blocks: TokenBlocks, **options: Any
) -> dict[int, Change]:
    """What giving one layer its attention back does to a student: higher helps more.

    KL to the teacher that goes, loss that goes, recall that comes (KL-guided selection, without its
    training).

    Args:
        student: as deep as the teacher, its attention converted.
        options: those of `change_scores`.

    Raises:
        UserError: models that do not match, or no layer that differs.
    """
    variants: Variants = {i: theirs for i, _, theirs in _pairs(teacher, student)}
    told = {"score": "restore", "reference": teacher} | options
    found = change_scores(student, variants, blocks, **told)
    return {
        i: Change(
            0.0 - c.kl,
            0.0 - c.loss,
            None if c.recall is None else 0.0 - c.recall,
            c.kl_error,
            c.loss_error,
            c.recall_error,
        )
        for i, c in found.items()
    }


def _pairs(
    teacher: TambaForCausalLM, student: TambaForCausalLM
) -> Iterator[tuple[int, Block, Block]]:
    """(index, the student's, the teacher's) layers where the teacher alone has attention."""
    for i in student_pairs(teacher.config, student.config, student.config.name_or_path):
        mine, other = student.model.layers[i], teacher.model.layers[i]
        assert isinstance(mine, Block) and isinstance(other, Block)
        yield i, mine, other


def student_pairs(theirs: TambaConfig, ours: TambaConfig, name: str) -> list[int]:
    """Layers where a teacher has attention and its student `name` has not.

    Args:
        theirs: the teacher's config.
        ours: the student's.

    Raises:
        UserError: models that do not match, or no layer that differs.
    """
    sizes: Sequence[tuple[str, int, int]] = (
        ("layers", ours.num_hidden_layers, theirs.num_hidden_layers),
        ("numbers a token", ours.hidden_size, theirs.hidden_size),
        ("tokens in its vocabulary", ours.vocab_size, theirs.vocab_size),
    )
    for what, here, there in sizes:
        if here != there:
            raise UserError(
                name or "student",
                f"has {here} {what} and the teacher {there}",
                "give the student that was made of this teacher",
            )
    both = enumerate(zip(ours.block_specs, theirs.block_specs, strict=True))
    pairs = [
        i
        for i, (mine, other) in both
        if isinstance(other.mixer, AttentionSpec) and not isinstance(mine.mixer, AttentionSpec)
    ]
    if not pairs:
        raise UserError(name or "student", "has no converted layer", "give one that has")
    return pairs
