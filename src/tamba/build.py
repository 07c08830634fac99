"""Build a student: keep, convert, transplant, reinitialize and drop layers, one tensor at a time.

The plan says what each layer of the student is made of. Weights stream from the teacher (and the
donor) into the student's files, so an 8B model is built in less memory than two of its embedding
tables take. Every tensor is accounted for in `build.json`: copied, transformed from what, or new.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from tamba.artefact import versions
from tamba.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    TensorSpec,
    load_tokenizer,
    open_model,
    parameter_specs,
)
from tamba.errors import UserError
from tamba.model.config import AttentionSpec, BlockSpec, TambaConfig
from tamba.plan import LayerPlan, PlanEntry, Source
from tamba.progress import task
from tamba.recipe import Recipe, as_recipe
from tamba.surgery import How, Piece, convert_mixer, converted_block, fresh_block, layer_seed, lost

_VOCAB_PADDING = 512
"""Tables are padded to at most this multiple, so two that round up alike may be one vocabulary."""


@dataclass(frozen=True)
class Row:
    """Where one tensor of the student comes from.

    Args:
        tensor: its name in the student.
        how: ``copied``, ``transformed`` or ``new``.
        elements: numbers in it.
        new: how many of them are fresh.
        sources: what it is made of, as ``teacher: NAME`` or ``donor: NAME``.
    """

    tensor: str
    how: How
    elements: int
    new: int
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuildReport:
    """What a build did.

    Args:
        rows: one for each tensor of the student.
        layers: each layer's plan entry, bottom first.
        lost: student layer -> what its conversion left behind.
        dropped: teacher layers that the student does not use.
    """

    rows: tuple[Row, ...]
    layers: tuple[str, ...]
    lost: dict[int, list[str]] = field(default_factory=dict)
    dropped: tuple[int, ...] = ()

    def elements(self) -> dict[How, int]:
        """Numbers of the student by origin; fresh ones of a transformed tensor count as new."""
        count: Counter[How] = Counter()
        for row in self.rows:
            count[row.how] += row.elements - row.new
            count["new"] += row.new
        return {how: count[how] for how in get_args(How)}

    def __str__(self) -> str:
        """A line a layer: its entry, and how many tensors are copied, transformed and new."""
        prefixes = [f"model.layers.{i}." for i in range(len(self.layers))]
        lines = []
        for prefix, entry in zip(prefixes, self.layers, strict=True):
            rows = [r for r in self.rows if r.tensor.startswith(prefix)]
            lines.append(f"{prefix.rstrip('.'):<18} {entry:<24} {_counts(rows)}")
        outer = [r for r in self.rows if not r.tensor.startswith("model.layers.")]
        lines.append(f"{'outside':<18} {'':<24} {_counts(outer)}")
        total = sum(self.elements().values())
        shares = ", ".join(f"{n / total:.1%} {how}" for how, n in self.elements().items())
        lines.append(f"{total:,} parameters: {shares}")
        if self.dropped:
            lines.append("dropped teacher layers: " + ", ".join(map(str, self.dropped)))
        return "\n".join(lines)


def _counts(rows: list[Row]) -> str:
    count = Counter(row.how for row in rows)
    return ", ".join(f"{count[how]} {how}" for how in get_args(How) if count[how])


def build(
    recipe: Recipe | str | Path, out: str | Path, *, analysis: str | Path | None = None
) -> BuildReport:
    """Make the student that a recipe describes.

    Args:
        recipe: the recipe or its file.
        out: the folder to make: a Hugging Face checkpoint with `build.json`, `recipe.toml` and
            `plan.toml`.
        analysis: the folder that `analyze` wrote, for ``build.plan = "analyze"``.

    Returns:
        What was copied, transformed and new; printed, it is a table.

    Raises:
        UserError: a model, plan or option that cannot be, or a full disk; `out` is not made.
    """
    recipe = as_recipe(recipe)
    teacher, donor = open_models(recipe)
    plan = recipe.layer_plan(
        teacher.tamba_config.num_hidden_layers, None if analysis is None else Path(analysis)
    )
    return build_student(
        teacher,
        plan,
        out,
        donor=donor,
        dtype=None if recipe.build.dtype is None else getattr(torch, recipe.build.dtype),
        seed=recipe.seed,
        shard_bytes=recipe.output.shard_bytes,
        extra_files={"recipe.toml": recipe.text},
    )


def open_models(recipe: Recipe) -> tuple[Checkpoint, Checkpoint | None]:
    """A recipe's teacher and its donor, if it names one, without reading weights."""
    return open_model(recipe), None if recipe.donor is None else open_model(recipe, "donor")


def build_student(
    teacher: Checkpoint,
    plan: LayerPlan,
    out: str | Path,
    *,
    donor: Checkpoint | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    shard_bytes: int = 4 << 30,
    overwrite: bool = False,
    extra_files: Mapping[str, str] | None = None,
) -> BuildReport:
    """Make a student from open checkpoints and a plan; see `build`.

    Args:
        teacher: where kept and converted layers come from.
        plan: what each layer is made of.
        out: the folder to make.
        donor: where transplanted layers come from.
        dtype: type of the student's weights; None for the teacher's.
        seed: of fresh weights; each layer draws its own from it.
        shard_bytes: largest weights file.
        overwrite: replace an existing `out` at the very end.
        extra_files: further files for the folder, by name.
    """
    models: dict[Source, Checkpoint] = {"teacher": teacher}
    if donor is not None:
        models["donor"] = donor
    config = student_config(teacher, plan, donor, dtype)
    specs = parameter_specs(config)
    for checkpoint in models.values():
        _ = checkpoint.parameters  # whatever is missing or misshapen shows now, before any work
    rows = []
    writer = CheckpointWriter(
        out, specs, _config_json(config), overwrite=overwrite, shard_bytes=shard_bytes
    )
    with writer, task("build", len(specs)) as advance:
        for name, piece in _student_tensors(models, plan, config, specs, seed):
            tensor = piece.tensor.to(specs[name].dtype)
            writer.write(name, tensor)
            rows.append(Row(name, piece.how, tensor.numel(), piece.n_new, piece.sources))
            advance()
        report = _report(rows, plan, models)
        _add_companions(writer, models[plan.embedding])
        for name, text in {**(extra_files or {}), "plan.toml": plan.to_toml()}.items():
            writer.add_file(name, text)
        writer.add_file("build.json", json.dumps(_record(report, models), indent=1) + "\n")
    return report


# What the student is.


def student_config(
    teacher: Checkpoint,
    plan: LayerPlan,
    donor: Checkpoint | None = None,
    dtype: torch.dtype | None = None,
) -> TambaConfig:
    """The configuration of the student that a plan makes of these models.

    Raises:
        UserError: a layer that is not there, a donor of another width or vocabulary, a layer that
            cannot be converted.
    """
    configs: dict[Source, TambaConfig] = {"teacher": teacher.tamba_config}
    if donor is not None:
        configs["donor"] = donor.tamba_config
    plan.check(teacher.tamba_config.num_hidden_layers, _layers_of(donor))
    if donor is not None and plan.needs_donor:
        _check_donor(teacher, donor, plan)
    base = configs["teacher"]
    words, head = configs[plan.embedding], configs[plan.head]
    tied = plan.embedding == plan.head and words.tie_word_embeddings
    if words.vocab_size != head.vocab_size:
        raise UserError(
            f"{plan.name}: head",
            f"the {plan.head}'s {head.vocab_size} rows do not match the {plan.embedding}'s "
            f"embedding of {words.vocab_size}",
            "take both from one model",
        )
    blocks, layers = _blocks(plan, configs)
    used = {configs[entry.source or "teacher"].residual_in_fp32 for entry in plan.entries}
    return TambaConfig(
        vocab_size=words.vocab_size,
        hidden_size=base.hidden_size,
        blocks={name: block.to_dict() for name, block in blocks.items()},
        layers=layers,
        final_norm=asdict(configs[plan.final_norm].final_norm_spec),
        # A layer trained on a float32 stream needs one; to the others it does no harm.
        residual_in_fp32=any(used),
        tie_word_embeddings=tied,
        max_position_embeddings=_positions(plan, configs),
        initializer_range=base.initializer_range,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        dtype=dtype or base.dtype,
        architectures=["TambaForCausalLM"],
    )


def _layers_of(checkpoint: Checkpoint | None) -> int | None:
    return None if checkpoint is None else checkpoint.tamba_config.num_hidden_layers


def _blocks(
    plan: LayerPlan, configs: Mapping[Source, TambaConfig]
) -> tuple[dict[str, BlockSpec], list[str]]:
    """Templates by name, and the name of each layer's."""
    blocks: dict[str, BlockSpec] = {}
    layers = []
    for position, entry in enumerate(plan.entries):
        config = configs[entry.source or "teacher"]
        assert config.layers is not None
        name, block = config.layers[entry.index], config.block_specs[entry.index]
        if entry.action == "convert":
            try:
                block = converted_block(block, plan.convert, config.d_model, plan.mixer_of(entry))
            except UserError as error:
                where = f"{plan.name}: layers[{position}] '{entry}'"
                raise UserError(where, error.problem, error.remedy) from error
            name = block.mixer.kind
        layers.append(_name_for(block, name, blocks))
    return blocks, layers


def _name_for(block: BlockSpec, wish: str, blocks: dict[str, BlockSpec]) -> str:
    """The name that `block` has among `blocks`, where it is entered under `wish` if it is new."""
    for name, known in blocks.items():
        if known == block:
            return name
    name, count = wish, 1
    while name in blocks:
        count += 1
        name = f"{wish}_{count}"
    blocks[name] = block
    return name


def _positions(plan: LayerPlan, configs: Mapping[Source, TambaConfig]) -> int:
    """`max_position_embeddings`: of the models whose attention the student has, and they must agree
    where rotary scaling depends on it."""
    lengths: dict[Source, int] = {}
    scaled = set()
    for entry in plan.entries:
        config = configs[entry.source or "teacher"]
        mixer = config.block_specs[entry.index].mixer
        if isinstance(mixer, AttentionSpec) and entry.action != "convert":
            lengths[entry.source or "teacher"] = config.max_position_embeddings
            if mixer.rope.get("rope_type") in ("dynamic", "longrope", "yarn"):
                scaled.add(entry.source)
    if scaled and len(set(lengths.values())) > 1:
        raise UserError(
            f"{plan.name}: layers",
            "teacher and donor scale their rotary positions for texts of different lengths",
            "a student has one max_position_embeddings",
        )
    fallback = configs["teacher"].max_position_embeddings
    return lengths.get("teacher", lengths.get("donor", fallback))


def _check_donor(teacher: Checkpoint, donor: Checkpoint, plan: LayerPlan) -> None:
    """Refuse a donor whose residual stream or whose tokens are others."""
    ours, theirs = teacher.tamba_config, donor.tamba_config
    if ours.hidden_size != theirs.hidden_size:
        raise UserError(
            donor.location,
            f"the donor is {theirs.hidden_size} wide and the teacher {ours.hidden_size}",
            "layers can only be transplanted between models of one width",
        )
    tokenizers = [load_tokenizer(c) for c in (teacher, donor)]
    if all(t is not None for t in tokenizers):
        a, b = (t.get_vocab() for t in tokenizers)
        moved = [token for token in a if b.get(token, a[token]) != a[token]]
        if moved:
            token = min(moved, key=a.__getitem__)
            raise UserError(
                donor.location,
                f"another vocabulary: {token!r} is {b[token]} there, {a[token]} in the teacher",
                "layers only understand the tokens they were trained on",
            )
        shared, fewer = len(a.keys() & b.keys()), min(len(a), len(b))
        # Two releases of one tokenizer differ in a handful of added tokens.
        if shared < fewer - _VOCAB_PADDING:
            raise UserError(
                donor.location,
                f"another vocabulary: {shared} of {fewer} tokens are the teacher's",
                "layers only understand the tokens they were trained on",
            )
        return
    rows = (ours.vocab_size, theirs.vocab_size)
    if len({-(-n // _VOCAB_PADDING) for n in rows}) > 1:
        raise UserError(
            donor.location,
            f"another vocabulary: {rows[1]} tokens, and {rows[0]} in the teacher",
            "layers only understand the tokens they were trained on",
        )


# Its tensors.


def _student_tensors(
    models: Mapping[Source, Checkpoint],
    plan: LayerPlan,
    config: TambaConfig,
    specs: Mapping[str, TensorSpec],
    seed: int,
) -> Iterator[tuple[str, Piece]]:
    """Every tensor of the student in the order of `specs`, made when it is asked for."""
    by_layer: dict[int | None, list[str]] = {}
    for name in specs:
        parts = name.split(".")
        layer = int(parts[2]) if name.startswith("model.layers.") else None
        by_layer.setdefault(layer, []).append(name)
    for layer, names in by_layer.items():
        if layer is None:
            for name in names:
                yield name, _outer(models, plan, name)
        else:
            yield from _layer(models, plan.entries[layer], layer, names, config, plan, seed)


def _outer(models: Mapping[Source, Checkpoint], plan: LayerPlan, name: str) -> Piece:
    """Embedding, final norm or head."""
    if name == "lm_head.weight":
        source: Source = plan.head
        tied = models[source].tamba_config.tie_word_embeddings
        theirs = "model.embed_tokens.weight" if tied else name
    else:
        source = plan.final_norm if name.startswith("model.final_norm") else plan.embedding
        theirs = name
    return Piece(models[source].read_parameter(theirs), (f"{source}: {theirs}",))


def _layer(
    models: Mapping[Source, Checkpoint],
    entry: PlanEntry,
    layer: int,
    names: list[str],
    config: TambaConfig,
    plan: LayerPlan,
    seed: int,
) -> Iterator[tuple[str, Piece]]:
    source: Source = entry.source or "teacher"
    model = models[source]
    ours, theirs = f"model.layers.{layer}.", f"model.layers.{entry.index}."
    block = config.block_specs[layer]
    made: dict[str, Piece] = {}
    if entry.action == "reinitialize":
        drawn = fresh_block(block, config, layer_seed(seed, layer))
        made = {ours + k: Piece(v, (), v.numel()) for k, v in drawn.items()}
    elif entry.action == "convert":
        attention = model.tamba_config.block_specs[entry.index].mixer
        assert isinstance(attention, AttentionSpec)
        pieces = convert_mixer(
            lambda name: model.read_parameter(f"{theirs}mixer.{name}"),
            attention,
            block,
            plan.convert,
            config,
            layer_seed(seed, layer),
        )
        for name, piece in pieces.items():
            sources = tuple(f"{source}: {theirs}mixer.{s}" for s in piece.sources)
            made[f"{ours}mixer.{name}"] = Piece(piece.tensor, sources, piece.n_new)
    for name in names:
        if name in made:
            yield name, made.pop(name)
        else:
            origin = theirs + name.removeprefix(ours)
            yield name, Piece(model.read_parameter(origin), (f"{source}: {origin}",))


# What goes beside them.


def _config_json(config: TambaConfig) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(config.to_json_string())
    return data


def _add_companions(writer: CheckpointWriter, model: Checkpoint) -> None:
    """The tokenizer and generation files of the model whose embedding the student has."""
    companions = model.companions()
    for name, path in companions.items():
        writer.add_file(name, path)
    if model.folder is None and (tokenizer := load_tokenizer(model)) is not None:
        tokenizer.save_pretrained(writer.folder)


def _report(rows: list[Row], plan: LayerPlan, models: Mapping[Source, Checkpoint]) -> BuildReport:
    teacher = models["teacher"].tamba_config
    left = {}
    for position, entry in enumerate(plan.entries):
        mixer = teacher.block_specs[entry.index].mixer if entry.action == "convert" else None
        if isinstance(mixer, AttentionSpec):
            left[position] = lost(mixer)
    return BuildReport(
        tuple(rows),
        tuple(map(str, plan.entries)),
        left,
        plan.dropped(teacher.num_hidden_layers),
    )


def _record(report: BuildReport, models: Mapping[Source, Checkpoint]) -> dict[str, Any]:
    """`build.json`: the table, the inputs by digest, and the versions that made it."""
    return {
        "layers": list(report.layers),
        "dropped": list(report.dropped),
        "lost": {str(layer): what for layer, what in report.lost.items()},
        "parameters": report.elements(),
        "inputs": {
            source: {
                "path": model.location,
                "family": model.family_name,
                "sha256": model.digest(),
            }
            for source, model in models.items()
        },
        "versions": versions(),
        "table": [asdict(row) for row in report.rows],
    }
