"""The E-Tamba experiment on one GPU in minutes: pretrain a pair, transplant, tune, compare.

    python experiments/e_tamba_mini.py --tokens tokens --out runs/e-tamba-mini --seconds 700
    python experiments/e_tamba_mini.py --tokens tokens --out runs/smoke --smoke        # on a CPU

`tokens` is the folder that `e_tamba_text.py` makes. What is done, in order of importance:

    shapes     memory of the paper's models, random weights in their true shapes
    pretrain   a GPT-NeoX Transformer and a Mamba on the same text in the same order
    analysis   equation 1 over both; which base layers go, which groups of the donor may come
    search     the learning rate of each kind of row
    starts     how far each of them is from the base before any tuning
    grid       Table 1: deleted, fresh, every group of the donor, attention turned into Mamba-2
    final      Table 2: base, donor and hybrids tuned on the same tokens, seed by seed
    memory     of the small models
    teaching   those of the first seed shown how to copy and look up, at each of some rates
    taught     the better of these, by documents that nothing else is measured on
    recall     copying and phone book at growing lengths, as taught and as tuned

Every row of the record is a file in ``OUT/rows``, written when it is done; the same call goes on
where it stopped. A row that does not fit in ``--seconds`` any more is left out and listed under
`not_run`, and so is one that ``--only`` does not name: with ``--only 'search/*/0.001*'
'grid/[0-9]*/0' 'final/*'`` the pair is made and analysed, one rate is tried, the groups of the
donor are compared with one seed, and Table 2 is filled. Checkpoints are in ``OUT/work``: without
them nothing can go on. The record, `e-tamba-mini.json`, is written anew after each row;
`e_tamba_figures.py` draws it.

On a GPU a step of learning is one CUDA graph: with layers so small a step is mostly the launching
of kernels. A graph is compared with plain steps before it is used; where it cannot be made, or says
something else, the call ends with status 3 and ``--eager`` goes on without.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import lzma
import math
import os
import platform
import random
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from e_tamba_lessons import Document, Lessons, batches_of_answers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from tamba.analyze import StateScores, state_scores
from tamba.analyze.choice import (
    Budget,
    Facts,
    Group,
    choose,
    donor_groups,
    rank_correlations,
    transplant_plans,
)
from tamba.analyze.distances import Estimate
from tamba.artefact import command_without_folders, new_folder, versions, write_file
from tamba.build import build_student
from tamba.checkpoint import load_model, open_checkpoint, parameter_specs
from tamba.data import TokenBlocks
from tamba.errors import UserError, nearest
from tamba.evaluate import SUITES, Options, perplexity
from tamba.evaluate.measure import Models, Request, Subject
from tamba.evaluate.perplexity import token_scores
from tamba.evaluate.recall import RecallMeasure
from tamba.evaluate.statistics import mean_score
from tamba.families.gpt_neox import GPT_NEOX
from tamba.families.mamba import STATE_SPACES_MAMBA
from tamba.model.config import TambaConfig
from tamba.model.modeling import TambaForCausalLM
from tamba.model.recurrent import RecurrentMixer
from tamba.ops.losses import Weights, next_token_loss
from tamba.plan import ConvertOptions, LayerPlan, PlanEntry, e_tamba_plan
from tamba.recipe import LeastSquares
from tamba.sections import Section, read_toml, validate
from tamba.store import Store
from tamba.train.closed_form import least_squares

RECIPES = Path(__file__).parents[1] / "recipes" / "e-tamba-mini"
RECORD = "e-tamba-mini.json"
Row = dict[str, Any]
FITTED_SHARE = 0.1
"""Of a learning rate, for mixers that were made of attention."""
NEEDED = ("speed", "pretrain/*", "analysis")
"""Rows that all others rest on."""
PARTS = ("untuned", "search", "starts", "grid", "final", "teaching", "taught", "recall", "memory")
"""What needs the pair and its analysis."""
_SAID_EVERY = 15.0
"""Seconds between lines of a long training."""


class Shape(Section):
    d_model: int
    heads: int
    base_layers: int
    donor_layers: int
    d_state: int
    vocabulary: int
    positions: int


class Text(Section):
    length: int
    rows: int
    measured: int


class Pretrain(Section):
    steps: int
    seconds: float
    lr: float
    warmup: float


class Transplant(Section):
    replaced: int
    group: int
    choose: str


class Finetune(Section):
    rates: tuple[float, ...]
    warmup: float
    seeds: tuple[int, ...]
    search_steps: int
    grid_steps: int
    final_steps: int


class Optimizer(Section):
    betas: tuple[float, float]
    weight_decay: float
    clip: float


class Recall(Section):
    cases: int
    few: int
    copy_lengths: tuple[int, ...]
    phonebook: tuple[int, ...]
    places: int


class Teach(Section):
    rows: int
    steps: int
    seconds: float
    rates: tuple[float, ...]
    warmup: float
    copy_length: int
    phonebook: int
    held_out: int
    held_out_copy: int
    held_out_phonebook: int

    @property
    def longest(self) -> dict[str, int]:
        """Sizes that are taught up to, by task."""
        return {"copy": self.copy_length, "phonebook": self.phonebook}

    @property
    def judged(self) -> dict[str, int]:
        """Sizes that a rate is chosen at, by task."""
        return {"copy": self.held_out_copy, "phonebook": self.held_out_phonebook}


class Memory(Section):
    contexts: tuple[int, ...]


class Settings(Section):
    """What `recipes/e-tamba-mini/experiment.toml` says; each table is explained there."""

    models: Shape
    text: Text
    pretrain: Pretrain
    transplant: Transplant
    finetune: Finetune
    optimizer: Optimizer
    recall: Recall
    teach: Teach
    memory: Memory
    shapes: Shape


def check_names(only: Sequence[str]) -> None:
    """Refuse patterns that no row can have. Raises UserError."""
    parts = ("shapes", *(name.partition("/")[0] for name in NEEDED), *PARTS)
    for pattern in only:
        if not any(fnmatchcase(part, pattern.partition("/")[0]) for part in parts):
            hint = nearest(pattern.partition("/")[0], parts)
            raise UserError("--only", f"no row is called '{pattern}'", hint)


def check(settings: Settings, where: str) -> None:
    """Refuse what could not be, before hours of work. Raises UserError."""
    models, wanted = settings.models, settings.transplant
    # Something below the layers that go, and the last one, must stay.
    if not 1 <= wanted.replaced <= models.base_layers - 2:
        raise UserError(
            f"{where}: transplant.replaced",
            f"{wanted.replaced} of {models.base_layers} layers cannot go",
            "the first and the last stay: name 1 or more, and 2 fewer than there are",
        )
    if not 2 <= wanted.group <= models.donor_layers:
        raise UserError(
            f"{where}: transplant.group",
            f"the donor has {models.donor_layers} layers, no groups of {wanted.group}",
            "name 2 or more, and no more than it has",
        )
    for name in ("models", "shapes"):
        shape: Shape = getattr(settings, name)
        if shape.d_model % shape.heads:
            raise UserError(
                f"{where}: {name}.heads", f"{shape.heads} do not divide {shape.d_model}"
            )
        longest = max(settings.memory.contexts)
        if longest > shape.positions:
            raise UserError(
                f"{where}: {name}.positions", f"{shape.positions} are fewer than {longest}",
                "memory.contexts asks for more",
            )  # fmt: skip
    if len(settings.memory.contexts) < 2:
        raise UserError(
            f"{where}: memory.contexts", "the first is a warm-up and not kept", "name two or more"
        )
    if not settings.finetune.seeds or not settings.finetune.rates:
        raise UserError(f"{where}: finetune", "names no seed or no rate", "name one at least")
    teach = settings.teach
    if not teach.rates:
        raise UserError(f"{where}: teach.rates", "names no rate", "name one at least")
    for task, size in teach.judged.items():
        if not 2 <= size <= teach.longest[task]:
            raise UserError(
                f"{where}: teach.held_out_{task}",
                f"{size} is not among the sizes taught, up to {teach.longest[task]}",
                "rates are chosen within them, from 2 up",
            )
    if teach.rows < 2:
        raise UserError(
            f"{where}: teach.rows", f"{teach.rows} cannot be half text", "name 2 or more"
        )


# The record.


class Rows:
    """Finished rows, each a file of its own, and the record made of them.

    Args:
        folder: of the rows; those that lie there are taken as they are.
        record: the file.
        header: what the record says beside its rows.
        seconds: from now on; a row that is expected not to fit is left out.
        only: patterns of the names of rows to make, beside those `NEEDED`.

    Raises:
        UserError: rows that were made with other settings or of another text.
    """

    def __init__(
        self,
        folder: Path,
        record: Path,
        header: Row,
        seconds: float,
        only: Sequence[str] = ("*",),
    ) -> None:
        self.folder, self.record, self.header, self.seconds = folder, record, {**header}, seconds
        self.only = (*NEEDED, *only)
        self.begun = time.monotonic()
        self.not_run: dict[str, str] = {}
        self.late: set[str] = set()
        self.failed = False
        self.rows: dict[str, Row] = {}
        folder.mkdir(parents=True, exist_ok=True)
        record.parent.mkdir(parents=True, exist_ok=True)
        made_of = json.dumps([header["settings"], header["text"]], indent=1)
        mark = folder / "made-of.txt"
        if mark.is_file() and mark.read_text(encoding="utf-8") != made_of:
            raise UserError(
                str(folder), "holds rows of other settings or text", "choose another --out"
            )
        write_file(mark, made_of)
        # A record of several calls says what each of them was.
        calls = folder / "calls.txt"
        before = calls.read_text(encoding="utf-8").splitlines() if calls.is_file() else []
        self.header["calls"] = [*before, header["command"]]
        write_file(calls, "\n".join(self.header["calls"]) + "\n")
        for path in sorted(folder.glob("*.json"), key=lambda p: p.stat().st_mtime_ns):
            row = json.loads(path.read_text(encoding="utf-8"))
            self.rows[row.pop("name")] = row

    @property
    def spent(self) -> float:
        return time.monotonic() - self.begun

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    def __getitem__(self, name: str) -> Row | None:
        return self.rows.get(name)

    def do(self, name: str, expected: float, make: Callable[[], Row]) -> Row | None:
        """The row of this name: as it was found, or made now, or None where that cannot be.

        Args:
            expected: seconds that making it will take.
        """
        if name in self.rows:
            return self.rows[name]
        if not any(fnmatchcase(name, pattern) for pattern in self.only):
            self.skip(name, "was not asked for")
            return None
        if self.left < expected:
            self.late.add(name)
            self.skip(name, f"{expected:.0f} s were expected and {self.left:.0f} s left")
            return None
        begun = time.monotonic()
        try:
            row = make()
        except GraphError:  # every row that follows would fail alike, or worse
            raise
        except UserError as error:
            self.skip(name, str(error))
            return None
        except Exception as error:  # one bad row must not take a machine's hour with it
            traceback.print_exc()
            self.failed = True
            self.skip(name, f"{type(error).__name__}: {error}")
            return None
        finally:
            free()
        row["wall_seconds"] = round(time.monotonic() - begun, 2)
        self.rows[name] = row
        self.not_run.pop(name, None)
        path = self.folder / f"{name.replace('/', '__').replace(' ', '_')}.json"
        write_file(path, json.dumps({"name": name, **row}))
        self.write()
        print(f"[{self.spent:5.0f} s] {name}: {_short(row)}", flush=True)
        return row

    def skip(self, name: str, why: str) -> None:
        """Say that a row is left out."""
        # Rows come up again in later parts.
        if self.not_run.get(name) == why:
            return
        self.not_run[name] = why
        self.write()
        print(f"[{self.spent:5.0f} s] {name}: not run, {why}", flush=True)

    def write(self) -> None:
        """The record as far as it has come."""
        record = {**self.header, "rows": self.rows, "not_run": self.not_run}
        lines = json.dumps(_rounded(record), separators=(",", ":"))
        # About a row a line: small, and still readable as a difference.
        write_file(self.record, lines.replace('},"', '},\n"') + "\n")


class GraphError(Exception):
    """A step cannot be made a CUDA graph, or is another step then."""


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _short(row: Row) -> str:
    """What the log says of a row."""
    said = [f"{row['wall_seconds']} s"]
    for key in ("report", "choice"):
        if key in row:
            said.append(f"{key} ppl {row[key]['ppl']:.2f}")
    if "held_out" in row:
        said += [f"{task} {found['nll']:.3f}" for task, found in row["held_out"].items()]
    said += [f"{k} {row[k]}" for k in ("tokens_per_second", "steps", "layers") if k in row]
    return ", ".join(said)


def free() -> None:
    """Give back what no row holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# Models.


def base_config(shape: Shape) -> TambaConfig:
    """A Transformer as Pythia is made: parallel residual, a quarter of each head rotated."""
    config = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.d_model,
        "intermediate_size": 4 * shape.d_model,
        "num_hidden_layers": shape.base_layers,
        "num_attention_heads": shape.heads,
        "rotary_pct": 0.25,
        "max_position_embeddings": shape.positions,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "float32",
    }
    return GPT_NEOX.to_tamba_config(config, {}, "base")


def donor_config(shape: Shape, rows: int) -> TambaConfig:
    """A Mamba as state-spaces makes them, with so many rows in its tied table."""
    config = {
        "d_model": shape.d_model,
        "n_layer": shape.donor_layers,
        "vocab_size": rows,
        "ssm_cfg": {"d_state": shape.d_state},
    }
    return STATE_SPACES_MAMBA.to_tamba_config(config, {}, "donor")


def spliced_config(plan: LayerPlan, base: TambaConfig, donor: TambaConfig) -> TambaConfig:
    """What `build` would make of this plan, for models that are not on disk."""
    layers = [(base if e.source == "teacher" else donor).layers[e.index] for e in plan.entries]
    return TambaConfig(
        vocab_size=base.vocab_size,
        hidden_size=base.hidden_size,
        blocks={**base.blocks, **donor.blocks},
        layers=layers,
        final_norm=asdict(base.final_norm_spec),
        residual_in_fp32=True,
        tie_word_embeddings=False,
        max_position_embeddings=base.max_position_embeddings,
    )


def parameters(config: TambaConfig) -> Row:
    """How many numbers a model learns, and how many of them are not in its tables."""
    sizes = {name: math.prod(spec.shape) for name, spec in parameter_specs(config).items()}
    total = sum(sizes.values())
    tables = sum(sizes.get(n, 0) for n in ("model.embed_tokens.weight", "lm_head.weight"))
    return {"total": total, "outside_tables": total - tables}


def new_model(
    config: TambaConfig, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> TambaForCausalLM:
    """A model with the weights that it begins with."""
    torch.manual_seed(seed)
    with device:
        return TambaForCausalLM._from_config(config, dtype=dtype)


# Text and training.


def windows(folder: Path, stream: str, length: int, device: torch.device) -> TokenBlocks:
    """A stream cut into rows, on the device: a copy of each batch would hold up the next step.

    As for Pythia and Mamba, a document sees what stands before it in its row.
    """
    path = folder / f"{stream}.npy.xz"
    if not path.is_file():
        raise UserError(str(path), "no such file", "make it with e_tamba_text.py")
    with lzma.open(path, "rb") as file:
        flat = torch.from_numpy(np.load(file).astype(np.int32))
    n = len(flat) // length
    if n == 0:
        raise UserError(str(path), f"{len(flat)} tokens do not fill a row of {length}")
    starts = torch.zeros(n, length, dtype=torch.bool, device=device)
    starts[:, 0] = True
    return TokenBlocks(flat[: n * length].view(n, length).to(device), starts, n * length)


def _plain_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).float(), targets)


def _fused_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return next_token_loss(hidden, head, targets, weights=Weights(kl=0.0, ce=1.0))


class Loss:
    """Mean cross-entropy of the next token. Over a large vocabulary it is half of a small model's
    step, so on a GPU the fused one is taken where it gives what plain torch gives."""

    def __init__(self, device: torch.device, positions: int, shape: Shape) -> None:
        self.how, self.function = "plain", _plain_loss
        if device.type != "cuda":
            return
        hidden = torch.randn(positions, shape.d_model, device=device)
        head = 0.05 * torch.randn(shape.vocabulary, shape.d_model, device=device)
        targets = torch.randint(shape.vocabulary, (positions,), device=device)
        try:
            plain, fused = (
                self._values(f, hidden, head, targets) for f in (_plain_loss, _fused_loss)
            )
            worst = max(float((b - a).norm() / a.norm()) for a, b in zip(plain, fused, strict=True))
            if not worst < 1e-2:
                raise ValueError(f"they differ by {worst:.2g}")
        except Exception as error:  # the experiment can go on without it
            print(f"not the fused loss: {type(error).__name__}: {error}"[:400], flush=True)
        else:
            self.how, self.function = f"fused, {worst:.1e} from plain", _fused_loss

    @staticmethod
    def _values(
        function: Callable[[Tensor, Tensor, Tensor], Tensor],
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
    ) -> list[Tensor]:
        """Loss and both gradients."""
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        with torch.autocast(hidden.device.type, dtype=torch.bfloat16):
            loss = function(leaves[0], leaves[1], targets)
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def __call__(self, model: TambaForCausalLM, ids: Tensor) -> Tensor:
        """ids [B, T] -> [1]."""
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            return self._text(model, hidden, ids)[None]

    def taught(
        self, model: TambaForCausalLM, text: Tensor, lessons: Tensor, answers: Tensor
    ) -> Tensor:
        """Rows of text, and lessons of which only the answers count.

        Args:
            text: [B, T].
            lessons: [B', T].
            answers: [K], places in the flat lessons; none is the first token of a row.

        Returns:
            [2], the mean over the text and over the answers.
        """
        with torch.autocast(text.device.type, dtype=torch.bfloat16):
            ids = torch.cat([text, lessons])
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            before = hidden[len(text) :].flatten(0, 1)[answers - 1]
            said = self.function(before, model.lm_head.weight, lessons.flatten()[answers])
            return torch.stack([self._text(model, hidden[: len(text)], text), said])

    def _text(self, model: TambaForCausalLM, hidden: Tensor, ids: Tensor) -> Tensor:
        before = hidden[:, :-1].flatten(0, 1)
        return self.function(before, model.lm_head.weight, ids[:, 1:].flatten())


Batch = tuple[Tensor, ...]
LossOf = Callable[..., Tensor]
"""``loss_of(model, *batch)``: parts [P], whose mean is learned from."""


class Step:
    """Gradients of a batch, clipped, left in the parameters: by a CUDA graph, or as torch does it.

    Args:
        first: a batch; all others have its shapes.
        graph: make it one. The device must be a GPU then.

    Raises:
        GraphError: it cannot be made, or gives other losses or gradients than plain steps.
    """

    def __init__(
        self, model: TambaForCausalLM, loss_of: LossOf, clip: float, first: Batch, graph: bool
    ) -> None:
        self.model, self.loss_of, self.clip = model, loss_of, clip
        self.graph: torch.cuda.CUDAGraph | None = None
        if graph:
            try:
                self._record(first)
            except GraphError:
                raise
            except Exception as error:  # whatever a kernel does that cannot be recorded
                raise GraphError(f"{type(error).__name__}: {error}") from error

    def __call__(self, batch: Batch) -> Tensor:
        """Parts of the loss [P]."""
        if self.graph is None:
            self.model.zero_grad(set_to_none=True)
            return self._plain(batch)[0]
        for place, tensor in zip(self.inputs, batch, strict=True):
            place.copy_(tensor)
        self.graph.replay()
        return self.outputs[0].clone()

    def _plain(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Parts of the loss, and the length of the gradient before it is clipped."""
        parts = self.loss_of(self.model, *batch)
        parts.mean().backward()
        return parts.detach(), nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)

    def _record(self, first: Batch) -> None:
        self.inputs = tuple(tensor.clone() for tensor in first)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # What is compiled or set up at a first call cannot be recorded.
            for _ in range(3):
                self.model.zero_grad(set_to_none=True)
                parts, norm = self._plain(self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        plain = torch.cat([parts, norm[None]]).tolist()
        self.model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        # Gradients are made inside, so that a replay writes them anew and adds to nothing.
        with torch.cuda.graph(graph, stream=side):
            self.outputs = self._plain(self.inputs)
        graph.replay()
        recorded = torch.cat([self.outputs[0], self.outputs[1][None]]).tolist()
        if not all(math.isclose(a, b, rel_tol=2e-2) for a, b in zip(recorded, plain, strict=True)):
            raise GraphError(f"a recorded step gives {recorded}, a plain one {plain}")
        self.graph = graph


@dataclass(frozen=True)
class Rate:
    """A learning rate, and the share of it at which recurrent mixers learn."""

    lr: float
    mixers: float = 1.0

    def __str__(self) -> str:
        return f"{self.lr:g}" if self.mixers == 1 else f"{self.lr:g} mixers {self.mixers:g}"


@dataclass(frozen=True)
class Budgeted:
    """One training run.

    Args:
        lr: its highest rate.
        cosine: down to a tenth at the end; else constant after the warm-up.
        warmup: share of the steps.
        seed: of the order of the rows.
        mixers: share of the rate at which recurrent mixers learn.
    """

    steps: int
    lr: float
    warmup: float
    seed: int
    cosine: bool = False
    mixers: float = 1.0

    def rate(self, step: int) -> float:
        """Of a step, counted from 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        if not self.cosine:
            return self.lr
        done = (step - warm) / max(1, self.steps - warm)
        return self.lr * (0.55 + 0.45 * math.cos(math.pi * done))


def train(
    model: TambaForCausalLM,
    batches: Iterable[Batch],
    run: Budgeted,
    settings: Settings,
    loss_of: LossOf,
    label: str,
    graph: bool,
) -> Row:
    """Tune every parameter: AdamW on float32 weights, products in bfloat16."""
    device = model.device
    mixers = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, RecurrentMixer)
        for parameter in module.parameters()
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    wanted = settings.optimizer
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        small = parameter.dim() < 2 or leaf in RecurrentMixer.FLOAT32
        share = run.mixers if id(parameter) in mixers else 1.0
        groups.setdefault((share, 0.0 if small else wanted.weight_decay), []).append(parameter)
    fused = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        [{"params": p, "share": share, "weight_decay": d} for (share, d), p in groups.items()],
        lr=run.lr,
        betas=wanted.betas,
        fused=fused,
    )
    model.train()
    losses = []
    served = iter(batches)
    first = next(served)
    step_of = Step(model, loss_of, wanted.clip, first, graph)
    wait(device)
    begun = said = time.monotonic()
    for step, batch in zip(range(run.steps), itertools.chain([first], served), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = run.rate(step) * group["share"]
        loss = step_of(batch)
        optimizer.step()
        losses.append(loss)
        if time.monotonic() - said > _SAID_EVERY:
            said = time.monotonic()
            told = ", ".join(f"{part:.3f}" for part in loss.tolist())
            print(f"  {label}: step {step + 1} of {run.steps}, loss {told}", flush=True)
    wait(device)
    seconds = time.monotonic() - begun
    model.zero_grad(set_to_none=True)
    model.eval()
    curve = torch.stack(losses).float().cpu()
    if not bool(torch.isfinite(curve).all()):
        raise UserError(label, f"the loss is not finite at a rate of {run.lr:g}", "lower it")
    rows = sum(len(ids) for ids in first if ids.dim() == 2)
    tokens = run.steps * rows * settings.text.length
    parts = torch.tensor_split(curve, min(20, len(curve)))
    means = [[round(v, 4) for v in part.mean(0).tolist()] for part in parts]
    return {
        **asdict(run),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds),
        "loss": [mean[0] for mean in means],
        **({"loss_of_answers": [mean[1] for mean in means]} if curve.shape[1] > 1 else {}),
    }


def score(model: TambaForCausalLM, blocks: TokenBlocks, settings: Settings) -> Row:
    """Perplexity of at most `text.measured` rows."""
    autocast = torch.bfloat16 if model.device.type == "cuda" else None
    some = blocks.take(settings.text.measured)
    found = perplexity(model, some, batch_size=settings.text.rows, autocast=autocast)
    error = found.standard_error
    return {
        "ppl": found.ppl,
        "ppl_error": None if error is None else error * found.ppl,
        "nll": found.nll,
        "tokens": found.tokens,
    }


# The experiment.


class Experiment:
    """All parts, on one device. `work` holds checkpoints, which are no part of the record."""

    def __init__(
        self,
        settings: Settings,
        tokens: Path,
        work: Path,
        rows: Rows,
        device: str,
        graphs: bool = True,
    ):
        self.settings, self.rows, self.work = settings, rows, work
        self.device = torch.device(device)
        self.graphs = graphs and self.device.type == "cuda"
        self.plans: dict[str, LayerPlan] = {}
        self.groups: list[Group] = []
        self.leader = ""
        self.streams = {
            name: windows(tokens, name, settings.text.length, self.device)
            for name in ("pretrain", "finetune", "analysis", "general", "choice", "report")
        }
        self.tokenizer = _tokenizer(tokens / "tokenizer.json")
        if len(self.tokenizer) > settings.models.vocabulary:
            raise UserError(
                "models.vocabulary",
                f"{settings.models.vocabulary} rows are too few for {len(self.tokenizer)} tokens",
            )
        self.configs = {
            "base": base_config(settings.models),
            "donor": donor_config(settings.models, settings.models.vocabulary),
        }
        self.loss: Loss | None = None
        self.measures: dict[str, RecallMeasure] = {}
        self.teacher: Lessons | None = None
        self.taught_rows: tuple[int, Tensor, Tensor] | None = None

    def run(self) -> None:
        """Everything, the most important first."""
        self.shapes()
        if not self.speed() or not self.pretrain() or not self.analysis():
            for part in PARTS:
                self.rows.skip(part, "the pair or its analysis is not there")
            return
        self.untuned()
        self.search()
        self.starts()
        for seed in self.settings.finetune.seeds:
            self.grid(seed, list(self.plans))
        first, *others = self.settings.finetune.seeds
        for seed in (first, *others):
            self.final(seed, self.systems)
        main = ["base", "donor", *(f"final/{s}/{first}" for s in self.systems[:4])]
        self.memory(main)
        self.teach(first, self.systems[:5])
        for seed in self.settings.finetune.seeds:
            self.grid(seed, ["shuffled"])
        self.teach(first, self.systems[5:])
        self.recall({name: name for name in main})
        for seed in others:
            self.teach(seed, self.systems[:5])

    # Sizes and speeds.

    def shapes(self) -> None:
        """The paper's three models, and Pythia as it is without a fused attention."""
        shape = self.settings.shapes
        pythia = base_config(shape)
        mamba = donor_config(shape, shape.vocabulary - 27)
        models = {
            "pythia-1.4b": (pythia, torch.bfloat16, "sdpa"),
            "mamba-1.4b": (mamba, torch.bfloat16, "sdpa"),
            **{
                f"e-tamba {reading}": (
                    spliced_config(e_tamba_plan(reading), pythia, mamba),
                    torch.bfloat16,
                    "sdpa",
                )
                for reading in ("12+12+1", "11+12+1")
            },
            "pythia-1.4b, eager": (pythia, torch.bfloat16, "eager"),
            "pythia-1.4b, eager, float32": (pythia, torch.float32, "eager"),
        }
        for name, (config, dtype, attention) in models.items():

            def make(config: Any = config, dtype: Any = dtype, attention: str = attention) -> Row:
                model = new_model(config, 0, self.device, dtype).eval()
                if attention != "sdpa":
                    model.set_attn_implementation(attention)
                return {
                    "parameters": parameters(config),
                    "layers": config.num_hidden_layers,
                    "dtype": str(dtype).removeprefix("torch."),
                    "attention": attention,
                    "memory": self.memory_of(model),
                }

            self.rows.do(f"shapes/{name}", 6, make)

    def speed(self) -> Row | None:
        """Seconds of a step of either model, which all budgets go by."""
        text = self.settings.text
        self.loss = Loss(self.device, text.rows * (text.length - 1), self.settings.models)

        def make() -> Row:
            found: Row = {"loss": self.loss.how if self.loss else "", "graphs": self.graphs}
            for role in ("base", "donor"):
                model = new_model(self.configs[role], 0, self.device)
                for steps in (3, 8):  # what is compiled is compiled in the first
                    run = Budgeted(steps, 1e-4, 0.5, 0)
                    row = self.train(model, "pretrain", run, f"speed of {role}")
                found[role] = row["seconds"] / steps
            wanted = self.settings.pretrain
            found["scale"] = min(
                1.0, wanted.seconds / wanted.steps / (found["base"] + found["donor"])
            )
            return found

        return self.rows.do("speed", 20, make)

    def steps(self, wanted: int) -> int:
        """Steps of a run, fewer where the machine is slower than the experiment was made for."""
        row = self.rows["speed"]
        assert row is not None
        return max(1, round(wanted * row["scale"]))

    def train(self, model: TambaForCausalLM, stream: str, run: Budgeted, label: str) -> Row:
        assert self.loss is not None
        rows, blocks = self.settings.text.rows, self.streams[stream]
        served = blocks.batches(rows, shuffle_seed=run.seed, epochs=None)
        batches = ((batch.tokens,) for batch in served)
        row = train(model, batches, run, self.settings, self.loss, label, self.graphs)
        return row | {"epochs": row["tokens"] / (len(blocks) * blocks.length)}

    # The pair.

    def pretrain(self) -> bool:
        """Both models from nothing; whether both are there."""
        wanted, speed = self.settings.pretrain, self.rows["speed"]
        assert speed is not None
        for k, role in enumerate(("base", "donor")):
            folder = self.work / role

            def make(k: int = k, role: str = role, folder: Path = folder) -> Row:
                model = new_model(self.configs[role], k, self.device)
                run = Budgeted(self.steps(wanted.steps), wanted.lr, wanted.warmup, 0, cosine=True)
                row = self.train(model, "pretrain", run, f"pretrain {role}")
                self.save(model, folder)
                return row | {"parameters": parameters(model.config), "init_seed": k}

            expected = self.steps(wanted.steps) * speed[role] + 3
            if self.rows.do(f"pretrain/{role}", expected, make) is None:
                return False
            if not folder.is_dir():
                raise UserError(
                    str(folder),
                    "the checkpoint of a finished row is gone",
                    "keep OUT/work, or begin with another OUT",
                )
        return True

    def save(self, model: TambaForCausalLM, folder: Path) -> None:
        """A checkpoint as every verb reads it."""
        # What stands there was written by a call that ended before its row was.
        with new_folder(folder, overwrite=folder.exists()) as partial:
            model.save_pretrained(partial)
            self.tokenizer.save_pretrained(partial)

    def load(self, folder: Path, dtype: torch.dtype = torch.float32) -> TambaForCausalLM:
        return load_model(open_checkpoint(folder), dtype, self.device)

    def untuned(self) -> None:
        """The pair on the target's text and on its own kind, before any tuning."""
        for role in ("base", "donor"):
            self.rows.do(
                f"untuned/{role}", 4, lambda role=role: self.scores(self.load(self.work / role))
            )

    def scores(
        self, model: TambaForCausalLM, streams: Sequence[str] = ("report", "general")
    ) -> Row:
        return {name: score(model, self.streams[name], self.settings) for name in streams}

    # Which layers.

    def analysis(self) -> bool:
        """Distances of both, the layers that go, the groups that may come; sets `plans`."""
        row = self.rows.do("analysis", 15, self._analyse)
        if row is None:
            return False
        n, replaced = self.settings.models.base_layers, row["replaced"]
        self.groups = [Group(*g) for g in row["groups"]]
        self.plans = transplant_plans(n, replaced, self.groups)
        # In the order of the paper's table.
        order = ["none", "fresh", *map(str, self.groups)]
        self.plans = {name: self.plans[name] for name in order}
        self.plans["fitted"] = LayerPlan(
            tuple(PlanEntry("convert" if i in replaced else "keep", i) for i in range(n)),
            ConvertOptions(),
            name="fitted",
        )
        self.leader = str(max(self.groups, key=lambda g: g.turn))
        return True

    def _analyse(self) -> Row:
        some = self.streams["analysis"].take(self.settings.text.measured)
        half = max(1, len(some) // 2)
        parts = [some.take(half), TokenBlocks(some.tokens[half:], some.starts[half:], 0)]
        out: Row = {"rows": len(some), "length": some.length}
        measured = {}
        for role in ("base", "donor"):
            model = self.load(self.work / role)
            whole = state_scores(model, some, label=f"states of {role}")
            halves = [state_scores(model, part, label=f"half of {role}") for part in parts]
            measured[role] = whole
            per_layer = _layer_scores(whole)
            dropped, doubt = self._drop(model, some.take(self.settings.text.rows))
            again = [_layer_scores(part) for part in halves]
            out[role] = {
                "all_tokens": _rows_of(whole.all_tokens.mean),
                "last_token": _rows_of(whole.last_token.mean),
                "largest_error": float(np.nanmax(whole.all_tokens.error.numpy())),
                "largest_error_last": float(np.nanmax(whole.last_token.error.numpy())),
                "scores": {name: e.mean.tolist() for name, e in per_layer.items()},
                "errors": {name: e.error.tolist() for name, e in per_layer.items()},
                "drop_loss": dropped,
                "drop_loss_error": doubt,
                "after_final_norm": whole.after_norm.mean.tolist(),
                "agreement": rank_correlations(
                    {n: e.mean.tolist() for n, e in per_layer.items()} | {"drop_loss": dropped}
                )["spearman"],
                "halves_agree": {
                    name: rank_correlations(
                        {str(k): part[name].mean.tolist() for k, part in enumerate(again)}
                    )["spearman"]["0"]["1"]
                    for name in per_layer
                },
                "tokens": whole.tokens,
            }
        wanted = self.settings.transplant
        scores = {name: e.mean.tolist() for name, e in _layer_scores(measured["base"]).items()}
        distances = {"all_tokens": _rows_of(measured["base"].all_tokens.mean)}
        facts = Facts.of(self.configs["base"], ConvertOptions())
        budget = Budget(layers=wanted.replaced)
        choice = choose(wanted.choose, facts, budget, scores, distances)
        groups = donor_groups(_rows_of(measured["donor"].all_tokens.mean), wanted.group)
        other = {
            name: list(choose(name, facts, budget, scores, distances).layers)
            for name in ("e-tamba own_turn", "gromov all_tokens", "lowest block_influence")
        }
        return out | {
            "replaced": list(choice.layers),
            "chosen_by": choice.strategy,
            "other_choices": other,
            "groups": [[g.first, g.last, g.turn] for g in groups],
        }

    def _drop(
        self, model: TambaForCausalLM, blocks: TokenBlocks
    ) -> tuple[list[float], list[float | None]]:
        """Nats a token that leaving out each layer costs, and standard errors row by row."""
        layers = model.model.layers
        whole = self._row_losses(model, blocks)
        costs = []
        try:
            for layer in range(len(layers)):
                model.model.layers = nn.ModuleList(b for i, b in enumerate(layers) if i != layer)
                costs.append(self._row_losses(model, blocks) - whole)
        finally:
            model.model.layers = layers
        n = len(whole)
        errors = [float(cost.std()) / math.sqrt(n) if n > 1 else None for cost in costs]
        return [float(cost.mean()) for cost in costs], errors

    def _row_losses(self, model: TambaForCausalLM, blocks: TokenBlocks) -> Tensor:
        """[n], nats a token of each row."""
        autocast = torch.bfloat16 if model.device.type == "cuda" else None
        size = self.settings.text.rows
        scored = token_scores([model], blocks, batch_size=size, autocast=autocast)
        rows = [nll[0].sum(1).cpu() / batch.predicted.sum(1).cpu() for batch, nll in scored]
        return torch.cat(rows)

    # Tuning.

    @property
    def systems(self) -> list[str]:
        """Of Table 2: the best group of the donor, the pair itself, and the controls."""
        return [self.best_group(), "base", "donor", "fitted", "fresh", "none"]

    def best_group(self) -> str:
        """By the mean perplexity on the text that is kept for choices; once tuned to the end, it
        stays, whatever rows of the grid come later."""
        for group in map(str, self.groups):
            if any(name.startswith(f"final/{group}/") for name in self.rows.rows):
                return group
        means = {}
        for group in map(str, self.groups):
            found = self.of_grid(group)
            if found:
                means[group] = sum(r["choice"]["nll"] for r in found) / len(found)
        return min(means, key=lambda g: means[g]) if means else self.leader

    def of_grid(self, system: str) -> list[Row]:
        """Its finished rows, a seed each."""
        rows = (self.rows[f"grid/{system}/{seed}"] for seed in self.settings.finetune.seeds)
        return [row for row in rows if row is not None]

    def student(self, system: str, seed: int) -> Path:
        """The checkpoint that a row begins from."""
        if system in ("base", "donor"):
            return self.work / system
        folder = self.work / "students" / (f"{system}-{seed}" if system == "fresh" else system)
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            if system == "fitted":
                model = self.load(self.student("converted", seed))
                self.fit(model)
                self.save(model, folder)
                return folder
            base, donor = (open_checkpoint(self.work / role) for role in ("base", "donor"))
            plan = self.plan(system)
            build_student(base, plan, folder, donor=donor if plan.needs_donor else None, seed=seed)
        return folder

    def fit(self, student: TambaForCausalLM) -> None:
        """Set converted mixers to do what the attention did, in closed form.

        As converted they are sums where attention takes a mean: such a start is worse than leaving
        the layers out. The text is some of what is tuned on, so this sees nothing that other rows
        do not.
        """
        converted = {i: self.plan("fitted").entries[i].index for i in self.plan("fitted").converted}
        text = self.streams["finetune"].take(self.settings.text.measured)
        stage = LeastSquares(
            stage="least_squares",
            tokens=len(text) * text.length,
            fit="mixer",
            inputs="teacher",
            dtype="float32" if self.device.type == "cpu" else "bfloat16",
        )
        least_squares(student, self.load(self.work / "base"), converted, text, stage)

    def starts(self) -> None:
        """What tuning begins from: each row of Table 1 on the text that choices are made on, and
        how far its layers turn the stream."""
        for system in (*self.plans, "converted"):

            def make(system: str = system) -> Row:
                model = self.load(self.student(system, self.settings.finetune.seeds[0]))
                some = self.streams["choice"].take(self.settings.text.rows)
                # A layer that hardly turns the stream of its new model has nothing to say in it.
                turns = state_scores(model, some, label=f"states of {system}").own_turn
                return self.scores(model, ("choice",)) | {"own_turn": turns.mean.tolist()}

            self.rows.do(f"starts/{system}", 5, make)

    def plan(self, system: str) -> LayerPlan:
        if system == "converted":  # the fitted one before its fit
            return self.plans["fitted"]
        if system != "shuffled":
            return self.plans[system]
        # The best group's own layers in another order: do they only lend the scale of their
        # weights?
        entries = list(self.plans[self.best_group()].entries)
        places = [i for i, entry in enumerate(entries) if entry.action == "transplant"]
        moved = list(places)
        while moved == places and len(places) > 1:
            random.Random("shuffled").shuffle(moved)
            moved = moved if moved != places else moved[::-1]
        for place, origin in zip(places, moved, strict=True):
            entries[place] = self.plans[self.best_group()].entries[origin]
        return LayerPlan(tuple(entries), name="shuffled")

    def tune(self, system: str, seed: int, steps: int, rate: Rate, label: str) -> tuple[Any, Row]:
        """A trained model and what its row says."""
        folder = self.student(system, seed)
        model = self.load(folder)
        run = Budgeted(
            self.steps(steps), rate.lr, self.settings.finetune.warmup, seed, mixers=rate.mixers
        )
        row = self.train(model, "finetune", run, label)
        layers = [] if system in ("base", "donor") else [str(e) for e in self.plan(system).entries]
        return model, row | {"parameters": parameters(model.config), "plan": layers}

    def expected(self, system: str, steps: int) -> float:
        """Seconds that a row of tuning takes, from what was seen of the pair."""
        return self.steps(steps) * self.pace(system) + 3

    def pace(self, system: str) -> float:
        """Seconds of a step of a system, by the layers that it has of either model."""
        speed, models = self.rows["speed"], self.settings.models
        assert speed is not None
        if system in ("base", "donor"):
            return float(speed[system])
        entries = self.plan(system).entries
        kept = sum(entry.action in ("keep", "convert") for entry in entries)
        ours = speed["base"] * kept / models.base_layers
        return float(ours + speed["donor"] * (len(entries) - kept) / models.donor_layers)

    def search(self) -> None:
        """Short runs at each rate: of the group that turns its stream most, and of the others."""
        wanted = self.settings.finetune
        for system in (self.leader, "base", "fresh", "fitted", "none", "donor"):
            for rate in self.rates(system):

                def make(system: str = system, rate: Rate = rate) -> Row:
                    name = f"search {system} {rate}"
                    model, row = self.tune(system, wanted.seeds[0], wanted.search_steps, rate, name)
                    return row | self.scores(model, ("choice",))

                expected = self.expected(system, wanted.search_steps)
                self.rows.do(f"search/{system}/{rate}", expected, make)

    def rates(self, system: str) -> list[Rate]:
        """What is tried. Mixers that were fitted to stand for attention may learn slower than the
        rest: at its highest rate they lose what they were fitted to."""
        shares = (1.0, FITTED_SHARE) if system == "fitted" else (1.0,)
        return [Rate(lr, share) for lr in self.settings.finetune.rates for share in shares]

    def rate(self, system: str) -> Rate:
        """The best of the rates that were tried for this system, or for groups of the donor."""
        kind = system if system in ("base", "donor", "fresh", "fitted", "none") else self.leader
        rates = self.rates(kind)
        found = {r: row for r in rates if (row := self.rows[f"search/{kind}/{r}"]) is not None}
        if not found:
            raise UserError(f"search/{kind}", "no rate was tried", "make these rows first")
        return min(found, key=lambda r: found[r]["choice"]["nll"])

    def grid(self, seed: int, systems: Sequence[str]) -> None:
        """Rows of Table 1."""
        wanted = self.settings.finetune
        for system in systems:

            def make(system: str = system) -> Row:
                label = f"grid {system} {seed}"
                model, row = self.tune(system, seed, wanted.grid_steps, self.rate(system), label)
                return row | self.scores(model, ("choice", "report"))

            expected = self.expected(system, wanted.grid_steps)
            self.rows.do(f"grid/{system}/{seed}", expected, make)

    def final(self, seed: int, systems: Sequence[str]) -> None:
        """Rows of Table 2; their models are kept to be taught."""
        wanted = self.settings.finetune
        for system in systems:

            def make(system: str = system) -> Row:
                label = f"final {system} {seed}"
                model, row = self.tune(system, seed, wanted.final_steps, self.rate(system), label)
                self.save(model, self.work / f"final/{system}/{seed}")
                return row | self.scores(model)

            expected = self.expected(system, wanted.final_steps)
            self.rows.do(f"final/{system}/{seed}", expected, make)

    # What the tuned models can do, and what they can learn to do.

    def teach(self, seed: int, systems: Sequence[str]) -> None:
        """Show tuned models how to copy and look up, and measure both.

        Models of the first seed are taught at each rate, and the one that says the answers of
        `held_out` documents best is kept; other seeds are taught at its rate.
        """
        wanted, first = self.settings.teach, self.settings.finetune.seeds[0]
        for system in systems:
            name, start = f"taught/{system}/{seed}", self.work / f"final/{system}/{seed}"
            if not start.is_dir():
                self.rows.skip(name, f"there is no final/{system}/{seed}")
                self.rows.skip(f"recall/{name}", "there is no such model")
                continue

            def make(rate: float, folder: Path, system: str = system, start: Path = start) -> Row:
                model = self.load(start)
                # Mixers that were made of attention lose their fit here too at the whole rate.
                given = Rate(rate, self.rate(system).mixers)
                row = self._teach(model, given, seed, f"teach {system} {seed} {rate:g}")
                self.save(model, folder)
                return (
                    row
                    | {
                        "model": str(folder.relative_to(self.work)),
                        "held_out": {task: self._held_out(model, task) for task in wanted.judged},
                    }
                    | self.scores(model)
                )

            expected = self.teach_steps * self.pace(system) * self.teach_share + 5
            if seed == first:
                tried = [f"teaching/{system}/{rate:g}" for rate in wanted.rates]
                for rate, trial in zip(wanted.rates, tried, strict=True):
                    to = self.work / trial
                    self.rows.do(trial, expected, lambda r=rate, to=to, m=make: m(r, to))
                if self.rows.late.intersection(tried):
                    self.rows.skip(name, "not all of its rates were tried")
                    self.rows.skip(f"recall/{name}", "not all of its rates were tried")
                    continue
                self.rows.do(name, 0, lambda tried=tried: self._best_taught(tried))
            else:
                chosen = self.rows[f"taught/{system}/{first}"]
                if chosen is None:
                    self.rows.skip(name, f"there is no taught/{system}/{first} to take a rate from")
                    continue
                rate, to = chosen["lr"], self.work / name
                self.rows.do(name, expected, lambda r=rate, to=to, m=make: m(r, to))
            row = self.rows[name]
            if row is not None:
                self.recall({name: row["model"]})

    def _best_taught(self, tried: Sequence[str]) -> Row:
        """The row whose answers are likeliest, both tasks counting alike."""
        found = {name: row for name in tried if (row := self.rows[name]) is not None}
        if not found:
            raise UserError("teach.rates", "nothing came of any of them", "try lower ones")
        best = min(found, key=lambda n: sum(t["nll"] for t in found[n]["held_out"].values()))
        return found[best] | {"of": list(found)}

    @property
    def teach_steps(self) -> int:
        """The same for every model: fewer where the base would take more than its seconds."""
        speed, wanted = self.rows["speed"], self.settings.teach
        assert speed is not None
        return max(1, min(wanted.steps, int(wanted.seconds / speed["base"] / self.teach_share)))

    @property
    def teach_share(self) -> float:
        """Of a step's seconds: fewer rows are quicker, unless it is launching that takes long."""
        return self.settings.teach.rows / self.settings.text.rows if self.graphs else 1.0

    @property
    def lessons(self) -> Lessons:
        if self.teacher is None:
            scored = {
                task: [case for _, case in self.measure(task).cases.values()]
                for task in ("copy", "phonebook")
            }
            self.teacher = Lessons(self.tokenizer, scored)
        return self.teacher

    def _teach(self, model: TambaForCausalLM, rate: Rate, seed: int, label: str) -> Row:
        """Steps of which half the rows are text and half lessons; what a seed sees, all see."""
        assert self.loss is not None
        wanted, text, steps = self.settings.teach, self.settings.text, self.teach_steps
        half = wanted.rows // 2
        if self.taught_rows is None or self.taught_rows[0] != seed:
            made = self.lessons.rows(steps * half, text.length, f"taught {seed}", wanted.longest)
            self.taught_rows = seed, *made
        _, tokens, answers = self.taught_rows
        lessons = tokens.to(self.device).long().view(steps, half, text.length)
        places, share = batches_of_answers(answers, half, seed)
        places = places.to(self.device)
        # In another order than the one that it was tuned in.
        served = self.streams["finetune"].batches(
            wanted.rows - half, shuffle_seed=1000 + seed, epochs=None
        )
        batches = (
            (batch.tokens, lessons[k], places[k])
            for k, batch in zip(range(steps), served, strict=False)
        )
        run = Budgeted(steps, rate.lr, wanted.warmup, seed, cosine=True, mixers=rate.mixers)
        row = train(model, batches, run, self.settings, self.loss.taught, label, self.graphs)
        return row | {
            "longest": wanted.longest,
            "answers": places.numel(),
            "share_of_answers": share,
        }

    @torch.inference_mode()
    def _held_out(self, model: TambaForCausalLM, task: str) -> Row:
        """Nats a token of the answers of new documents, and how many would be written rightly."""
        wanted = self.settings.teach
        documents = self.lessons.held_out(task, wanted.judged[task], wanted.held_out)
        losses, right = [], 0
        for begin in range(0, len(documents), self.settings.text.rows):
            for found, said in self._answers(model, documents[begin:][: self.settings.text.rows]):
                losses.append(found)
                right += said
        nats = torch.cat(losses)
        return {
            "size": wanted.judged[task],
            "nll": nats.mean().item(),
            "tokens": len(nats),
            "exact": right / len(documents),
            "n": len(documents),
        }

    def _answers(
        self, model: TambaForCausalLM, documents: Sequence[Document]
    ) -> list[tuple[Tensor, bool]]:
        """Of each document: nats of its answer's tokens, and whether each is the likeliest."""
        longest = max(len(document.tokens) for document in documents)
        # Nothing looks ahead, so what fills a row behind its document changes nothing.
        ids = torch.zeros(len(documents), longest, dtype=torch.long)
        for row, document in enumerate(documents):
            ids[row, : len(document.tokens)] = torch.tensor(document.tokens)
        with torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"
        ):
            hidden = model.model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
            found = []
            for row, document in enumerate(documents):
                places = torch.tensor(document.answers)
                logits = model.lm_head(hidden[row, (places - 1).to(self.device)]).float().cpu()
                wanted = ids[row, places]
                loss = F.cross_entropy(logits, wanted, reduction="none")
                found.append((loss, bool((logits.argmax(-1) == wanted).all())))
        return found

    def recall(self, models: Mapping[str, str]) -> None:
        """Copying and phone book, of checkpoints by their place in `work`."""
        wanted = self.settings.recall
        for name, place in models.items():
            if not (self.work / place).is_dir():
                self.rows.skip(f"recall/{name}", "there is no such model")
                continue

            def make(name: str = name, place: str = place) -> Row:
                model = self.load(self.work / place, torch.bfloat16)
                out: Row = {"dtype": "bfloat16", "cases": wanted.cases, "few": wanted.few}
                if name.startswith("taught/"):
                    out["longest"] = self.settings.teach.longest
                for task in ("copy", "phonebook"):
                    out[task] = self._recall(model, task)
                return out

            self.rows.do(f"recall/{name}", 20, make)

    def measure(self, task: str) -> RecallMeasure:
        """The scored cases of a task, the same for all models."""
        if task not in self.measures:
            wanted = self.settings.recall
            sizes = wanted.copy_lengths if task == "copy" else wanted.phonebook
            request = Request(
                suite=task,
                data=(),
                configs={"student": self.configs["base"]},
                tokenizer=self.tokenizer,
                options=Options(lengths={task: sizes}, cases=wanted.cases),
            )
            measure = SUITES[task].prepare(request)
            assert isinstance(measure, RecallMeasure)
            self.measures[task] = measure
        return self.measures[task]

    def _recall(self, model: TambaForCausalLM, task: str) -> list[Row]:
        """A point a size: all cases, and the first few as the paper has them."""
        wanted = self.settings.recall
        subject = self.subject(model, wanted.places // 4)
        measure = self.measure(task)
        items = measure.answer(subject, Store())
        by_size: dict[int, list[Row]] = {}
        for name, (size, _) in measure.cases.items():
            by_size.setdefault(size, []).append(items[name])
        points = []
        for size, found in sorted(by_size.items()):
            right = [float(item["acc"]) for item in found]
            few = mean_score(right[: wanted.few])
            all_of_them = mean_score(right)
            point: Row = {
                "size": size,
                "longest_prompt": max(item["prompt"] for item in found),
                "acc": all_of_them.value,
                "low": all_of_them.low,
                "high": all_of_them.high,
                "n": len(right),
                "few": few.value,
                "few_low": few.low,
                "few_high": few.high,
            }
            if task == "copy":
                point["right_before_error"] = mean_score(
                    [float(item["right_before_error"]) for item in found]
                ).value
            points.append(point)
        return points

    def memory(self, names: Sequence[str]) -> None:
        """What small models take at the contexts asked for."""
        for name in names:
            if not (self.work / name).is_dir():
                self.rows.skip(f"memory/{name}", "there is no such model")
                continue

            def make(name: str = name) -> Row:
                model = self.load(self.work / name, torch.bfloat16)
                return {"dtype": "bfloat16", "memory": self.memory_of(model)}

            self.rows.do(f"memory/{name}", 4, make)

    def memory_of(self, model: TambaForCausalLM) -> list[Row]:
        """Bytes by cause at batch 1. The first, short context is there to warm up."""
        request = Request(
            suite="memory",
            data=(),
            configs={"student": model.config},
            tokenizer=self.tokenizer,
            options=Options(contexts=self.settings.memory.contexts),
        )
        models = Models(self.subject(model, 1))
        rows = SUITES["memory"].prepare(request).run(models, lambda _: Store()).rows
        return [dict(row) for row in rows[1:]]

    def subject(self, model: TambaForCausalLM, tokens_at_once: int) -> Subject:
        return Subject("student", "", model, self.tokenizer, "", tokens_at_once)


def _layer_scores(found: StateScores) -> dict[str, Estimate]:
    return {
        "own_turn": found.own_turn,
        "column_mean": found.column_mean,
        "block_influence": found.block_influence,
        "last_turn": found.last_turn,
    }


def _rows_of(table: Tensor) -> list[list[float]]:
    """[L, L] as rows [l][n-1] of falling length."""
    n = len(table)
    return [[round(v, 5) for v in table[low, : n - low].tolist()] for low in range(n)]


def _tokenizer(path: Path) -> Any:
    if not path.is_file():
        raise UserError(str(path), "no such file", "make it with e_tamba_text.py")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(path), eos_token="<|endoftext|>", pad_token="<|padding|>"
    )


def header(settings: Settings, tokens: Path, arguments: Sequence[str], device: str) -> Row:
    """What the record says beside its rows."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "experiment": "e-tamba-mini",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_without_folders("python experiments/e_tamba_mini.py", arguments),
        "machine": {"device": gpu or platform.processor() or "cpu", "cores": os.cpu_count()},
        "versions": versions(),
        "settings": settings.model_dump(),
        "text": json.loads((tokens / "tokens.json").read_text(encoding="utf-8")),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run what is not done yet; 1 where a row failed, 3 where it takes ``--eager`` to go on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=Path, required=True, help="made by e_tamba_text.py")
    parser.add_argument("--out", type=Path, required=True, help="rows and checkpoints")
    parser.add_argument("--record", type=Path, help=f"the record; OUT/{RECORD} by default")
    parser.add_argument("--settings", type=Path, help="instead of recipes/e-tamba-mini's")
    parser.add_argument("--seconds", type=float, default=math.inf, help="to leave rows out after")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="ROW", help="patterns of rows to make"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    args = parser.parse_args(arguments)
    path = args.settings or RECIPES / ("smoke.toml" if args.smoke else "experiment.toml")
    settings = validate(Settings, read_toml(path)[1], str(path))
    check(settings, str(path))
    check_names(args.only)
    device = "cuda" if torch.cuda.is_available() and not args.smoke else "cpu"
    if not (args.tokens / "tokens.json").is_file():
        raise UserError(str(args.tokens), "holds no tokens.json", "make it with e_tamba_text.py")
    about = header(settings, args.tokens, sys.argv[1:] if arguments is None else arguments, device)
    disable_progress_bar()
    record = args.record or args.out / RECORD
    rows = Rows(args.out / "rows", record, about, args.seconds, args.only)
    try:
        Experiment(settings, args.tokens, args.out / "work", rows, device, not args.eager).run()
    except GraphError as error:
        print(f"a step cannot be recorded, go on with --eager: {error}", flush=True)
        rows.write()
        return 3
    rows.write()
    print(f"{len(rows.rows)} rows, {len(rows.not_run)} not run: {record}")
    return int(rows.failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
