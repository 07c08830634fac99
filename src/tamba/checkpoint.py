"""Models on disk: open any supported checkpoint lazily, load it, write ours whole or not at all.

`open_checkpoint` reads headers only. A `Checkpoint` then gives single tensors, under the names of
the file (`read`) or under ours (`read_parameter`), so a model of any size is built or loaded one
tensor at a time. `CheckpointWriter` writes into a hidden sibling folder and renames it at the end.

Nothing in a checkpoint is run: no model code, no pickled objects, no shard outside its folder.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, GenerationConfig

from tamba.errors import UserError
from tamba.families import Family, Origin, family_for
from tamba.formats.hub import fetch
from tamba.formats.safetensors import INDEX, SafetensorsFile, TensorSpec
from tamba.formats.writer import CheckpointWriter
from tamba.model.config import TambaConfig
from tamba.model.modeling import TambaForCausalLM
from tamba.model.recurrent import RecurrentMixer
from tamba.recipe import in_package

if TYPE_CHECKING:
    from tamba.recipe import Recipe

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "TensorSpec",
    "check_place",
    "load",
    "load_model",
    "load_tokenizer",
    "open_checkpoint",
    "open_model",
    "parameter_specs",
]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Any of these makes a tokenizer; the others only add to one.
_TOKENIZER_CORE = ("tokenizer.json", "tokenizer.model", "vocab.json")


class _Tensors(Protocol):
    """A file of tensors: what is in it, and one of them at a time."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def read(self, name: str) -> torch.Tensor: ...


class Checkpoint:
    """A checkpoint, open for reading; made by `open_checkpoint`.

    Attributes:
        location: where it lies, for messages.
        config: the content of `config.json` (with `mamba_config.json` under ``mamba_config``).
        folder: the folder that holds tokenizer and generation files, or None (GGUF).
    """

    def __init__(
        self,
        location: Path,
        config: dict[str, Any],
        files: Mapping[Path, _Tensors],
        owner: Mapping[str, Path],
        folder: Path | None,
    ) -> None:
        self.location = str(location)
        self.config = config
        self.folder = folder
        self._files = files
        self._owner = owner

    def names(self) -> list[str]:
        """The names of all tensors, in the checkpoint's own words."""
        return list(self._owner)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`, without reading it."""
        return self._spec(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The type of the tensor `name` as `read` gives it; float32 for quantised ones."""
        return self._spec(name).dtype

    def _spec(self, name: str) -> TensorSpec:
        return self._files[self._owner[name]].specs[name]

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor `name`, in `dtype` if given, in memory of its own.

        Raises:
            UserError: it holds NaN or infinity, or the file is shorter than it said.
        """
        tensor = self._files[self._owner[name]].read(name)
        if tensor.is_floating_point() and tensor.numel():
            # float8 has no minimum of its own
            low, high = torch.aminmax(tensor if tensor.element_size() > 1 else tensor.float())
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise UserError(
                    self.location,
                    f"tensor '{name}' holds NaN or infinity",
                    "the weights are damaged",
                )
        return tensor if dtype is None else tensor.to(dtype)

    def digest(self) -> str:
        """SHA-256 over the content of every file that loading reads, as hexadecimal digits."""
        total = hashlib.sha256()
        extra = [] if self.folder is None else self.companions().values()
        config = json.dumps(self.config, sort_keys=True, default=str).encode()
        total.update(hashlib.sha256(config).digest())
        for path in sorted({*self._files, *extra}, key=lambda p: p.name):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            total.update(path.name.encode() + b"\0" + digest)
        return total.hexdigest()

    def companions(self) -> dict[str, Path]:
        """Tokenizer and generation files beside the weights, by name."""
        if self.folder is None:
            return {}
        names = (*_TOKENIZER_FILES, "generation_config.json")
        return {name: self.folder / name for name in names if (self.folder / name).is_file()}

    @functools.cached_property
    def family(self) -> Family | None:
        """The pretrained family, or None when the checkpoint is one of ours."""
        if self.config.get("model_type") == TambaConfig.model_type:
            return None
        return family_for(self.config, self._owner, self._config_place)

    @property
    def family_name(self) -> str:
        """What to call the kind of checkpoint: a pretrained family, or ours."""
        return TambaConfig.model_type if self.family is None else self.family.name

    @property
    def _config_place(self) -> str:
        return self.location if self.folder is None else str(self.folder / "config.json")

    @functools.cached_property
    def tamba_config(self) -> TambaConfig:
        """The configuration in our words.

        Raises:
            UserError: unsupported family, or a key or value that is not understood.
        """
        self._check_stored_dtype()
        if self.family is None:
            try:
                return TambaConfig.from_dict(dict(self.config))
            except UserError as error:
                raise UserError(
                    f"{self._config_place}: {error.where}", error.problem, error.remedy
                ) from error
            except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise UserError(
                    self._config_place, f"not a valid tamba configuration: {error}"
                ) from error
        shapes = {name: self._spec(name).shape for name in self._owner}
        try:
            config = self.family.to_tamba_config(self.config, shapes, self._config_place)
        except UserError as error:
            if error.where.startswith(self._config_place):
                raise
            # Found in what their words became in ours.
            where = f"{self._config_place}: {error.where}"
            raise UserError(where, error.problem, error.remedy) from error
        if config.dtype is None:
            config.dtype = self._common_dtype()
        return config

    def _check_stored_dtype(self) -> None:
        for key in ("dtype", "torch_dtype"):
            name = self.config.get(key)
            try:
                _as_dtype(name.removeprefix("torch.") if isinstance(name, str) else name)
            except (UserError, TypeError):
                raise UserError(
                    f"{self._config_place}: {key}",
                    f"{name!r} is no type of weights",
                    "e.g. float32, bfloat16",
                ) from None

    def _common_dtype(self) -> torch.dtype:
        """The type that most weights have."""
        sizes: Counter[torch.dtype] = Counter()
        for name in self._owner:
            spec = self._spec(name)
            if spec.dtype.is_floating_point:
                sizes[spec.dtype] += spec.nbytes
        return sizes.most_common(1)[0][0] if sizes else torch.float32

    @functools.cached_property
    def parameters(self) -> dict[str, TensorSpec]:
        """Our parameters that this checkpoint fills, with the shape and type `load` gives them.

        Raises:
            UserError: tensors that are missing, left over, or of the wrong shape.
        """
        self._check(self._wanted)
        return self._wanted

    @functools.cached_property
    def _wanted(self) -> dict[str, TensorSpec]:
        return parameter_specs(self.tamba_config)

    @functools.cached_property
    def _origins(self) -> dict[str, Origin]:
        if self.family is None:
            return {name: Origin((name,)) for name in self._wanted}
        return self.family.weights(self.tamba_config, self._owner, self._wanted)

    def read_parameter(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Our parameter `name`, made from the tensors it comes from, in `dtype` if given."""
        origin = self._origins[name]
        if name == "model.embed_tokens.weight":
            self._check_tied_head()
        sources = [self.read(source) for source in origin.sources]
        tensor = sources[0] if origin.make is None else origin.make(*sources)
        return tensor if dtype is None else tensor.to(dtype)

    def _check(self, specs: Mapping[str, TensorSpec]) -> None:
        """Every parameter has its sources in the right shape, and every tensor has a use."""
        used: set[str] = set()
        missing: set[str] = set()
        for name, spec in specs.items():
            origin = self._origins.get(name)
            sources = (name,) if origin is None else origin.sources
            absent = [s for s in sources if s not in self._owner]
            missing.update(absent)
            used.update(sources)
            if absent or origin is None:
                missing.update(() if absent else sources)
                continue
            shapes = [torch.empty(self._spec(s).shape, device="meta") for s in sources]
            try:
                got = tuple((shapes[0] if origin.make is None else origin.make(*shapes)).shape)
            except RuntimeError:  # pieces that do not even fit one another
                got = None
            if got != spec.shape:
                found = ", ".join(f"'{s}' {list(self._spec(s).shape)}" for s in sources)
                raise UserError(
                    self.location,
                    f"{found} does not give {name} {list(spec.shape)} as the configuration says",
                )
        if missing:
            raise UserError(self.location, f"missing tensors: {_listed(missing)}")
        extra = {n for n in self._owner if n not in used and not self._has_no_use(n)}
        if extra:
            raise UserError(
                self.location,
                f"tensors that the configuration has no place for: {_listed(extra)}",
            )

    def _has_no_use(self, name: str) -> bool:
        return (self.family is not None and self.family.is_ignored(name)) or self._is_head(name)

    def _is_head(self, name: str) -> bool:
        return name in ("lm_head.weight", "embed_out.weight")

    def _check_tied_head(self) -> None:
        """A head that is stored although it is tied must be the embedding, or it would be lost.

        Looked at when the embedding is read: describing a checkpoint reads no weights.
        """
        used = {source for origin in self._origins.values() for source in origin.sources}
        for name in self._owner:
            if not self._is_head(name) or name in used:
                continue
            (embedding,) = self._origins["model.embed_tokens.weight"].sources
            if not torch.equal(self.read(name), self.read(embedding)):
                raise UserError(
                    self._config_place,
                    f"tie_word_embeddings is true, but '{name}' is not the embedding",
                    "set tie_word_embeddings to false",
                )


def _listed(names: Collection[str], limit: int = 8) -> str:
    shown = sorted(names)
    rest = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {rest} more" if rest > 0 else "")


def parameter_specs(config: TambaConfig, dtype: torch.dtype | None = None) -> dict[str, TensorSpec]:
    """Every parameter of a model that is stored: name -> shape and type.

    Args:
        config: the model's configuration.
        dtype: type of the weights; None for the configuration's, else float32. The parameters of
            the recurrences stay at least float32.
    """
    dtype = dtype or _as_dtype(config.dtype) or torch.float32
    with torch.device("meta"):
        model = TambaForCausalLM(config)
    return {
        name: TensorSpec(tuple(tensor.shape), _kept_dtype(name, dtype))
        for name, tensor in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }


def _kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    if dtype.itemsize < 4 and name.rpartition(".")[2] in RecurrentMixer.FLOAT32:
        return torch.float32
    return dtype


def open_checkpoint(
    path_or_name: str | os.PathLike[str], *, allow_pickle: bool = False
) -> Checkpoint:
    """Open a checkpoint without reading its weights.

    Args:
        path_or_name: a folder in Hugging Face's form (safetensors, single or sharded), a single
            `.safetensors` (with `config.json` beside it) or `.gguf` file, a name on the hub
            (``owner/model``), or ``package:NAME`` for weights inside an installed package.
        allow_pickle: also read `pytorch_model*.bin`, with torch's weights-only reader.

    Raises:
        UserError: nothing there, the hub cannot be reached, a file is damaged, a shard is missing
            or lies outside its folder, or the weights are pickled.
    """
    path = Path(path_or_name).expanduser()
    if str(path_or_name).startswith("package:"):
        path = in_package(str(path_or_name).removeprefix("package:"), str(path_or_name))
    elif not path.exists():
        companions = ("config.json", "mamba_config.json", "generation_config.json")
        path = fetch(str(path_or_name), [*companions, *_TOKENIZER_FILES], allow_pickle=allow_pickle)
    if path.is_dir():
        return _open_folder(path, allow_pickle)
    match path.suffix:
        case ".gguf":
            return _open_gguf(path)
        case ".safetensors":
            file = SafetensorsFile(path)
            owner = dict.fromkeys(file.specs, path)
            return Checkpoint(path, _read_config(path.parent), {path: file}, owner, path.parent)
        case ".bin" | ".pt" | ".pth":
            return _open_pickles(path.parent, [path], allow_pickle)
    raise UserError(str(path), "not a checkpoint", "give a folder, a .safetensors or a .gguf file")


def open_model(recipe: Recipe, role: Literal["teacher", "donor"] = "teacher") -> Checkpoint:
    """Open a model that a recipe names, as its section says, without reading its weights.

    Raises:
        UserError: the recipe has no such section, or what `open_checkpoint` raises.
    """
    path = recipe.model_path(role)
    source = recipe.teacher if role == "teacher" else recipe.donor
    return open_checkpoint(path, allow_pickle=source is not None and source.allow_pickle)


def _open_gguf(path: Path) -> Checkpoint:
    try:
        from tamba.formats.gguf import GGUFFile
    except ImportError as error:
        raise UserError(
            str(path), "reading GGUF needs a package", "pip install 'tamba[gguf]'"
        ) from error
    file = GGUFFile(path)
    return Checkpoint(path, file.config, {path: file}, dict.fromkeys(file.specs, path), None)


def _open_folder(folder: Path, allow_pickle: bool) -> Checkpoint:
    config = _read_config(folder)
    if (folder / INDEX).exists():
        owner, shards = _sharded(folder, INDEX, ".safetensors")
    elif (folder / "model.safetensors").exists():
        owner, shards = None, [_inside(folder, "model.safetensors", folder)]
    else:
        return _open_pickles(folder, None, allow_pickle)
    files = {path: SafetensorsFile(path) for path in shards}
    if owner is None:
        owner = {name: path for path, file in files.items() for name in file.specs}
    for name, path in owner.items():
        if name not in files[path].specs:
            raise UserError(str(path), f"the index says it holds '{name}', which it does not")
    return Checkpoint(folder, config, files, owner, folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(str(path), f"cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise UserError(str(path), "is not a JSON object")
    return data


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        found = sorted(p.name for p in folder.glob("*.gguf"))
        hint = f"for a GGUF give the file itself, {folder / found[0]}" if found else ""
        if (folder / "student" / "config.json").is_file():
            hint = f"of a run give the student, {folder / 'student'}"
        raise UserError(str(folder), "no config.json here", hint or "is this a checkpoint folder?")
    config = _read_json(folder / "config.json")
    if (folder / "mamba_config.json").is_file():
        config["mamba_config"] = _read_json(folder / "mamba_config.json")
    return config


def _inside(folder: Path, name: str, where: Path) -> Path:
    """The file `name` of `folder`. Raises UserError if name or link leads out of the folder."""
    path = folder / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise UserError(
            str(where), f"shard name '{name}' leads out of the folder", "it is not read"
        )
    if not path.is_file():
        raise UserError(str(where), f"the shard '{name}' is missing", "fetch the checkpoint again")
    home, real = folder.resolve(), path.resolve()
    # The hub's cache keeps the content of all snapshots of a model in one folder beside them.
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if real.parent not in allowed:
        raise UserError(
            str(path), f"is a link out of the folder, to {real}", "copy the file instead"
        )
    return path


def _sharded(folder: Path, index: str, suffix: str) -> tuple[dict[str, Path], list[Path]]:
    where = folder / index
    table = _read_json(where).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise UserError(str(where), "has no weight_map")
    wrong = next((v for v in table.values() if not v.endswith(suffix)), None)
    if wrong is not None:
        raise UserError(str(where), f"'{wrong}' is not a {suffix} file")
    paths = {name: _inside(folder, name, where) for name in sorted(set(table.values()))}
    return {name: paths[shard] for name, shard in table.items()}, list(paths.values())


class _PickleFile:
    """Pickled tensors, unpickled by torch's reader that builds nothing but tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @functools.cached_property
    def _state(self) -> dict[str, torch.Tensor]:
        try:
            return torch.load(
                self.path, map_location="cpu", weights_only=True, mmap=_is_zip(self.path)
            )
        except Exception as error:  # the reader raises whatever the bytes lead it to
            raise UserError(
                str(self.path), f"cannot be read as pickled weights ({str(error).splitlines()[0]})"
            ) from error

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {k: TensorSpec(tuple(v.shape), v.dtype) for k, v in self._state.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._state[name].clone()


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _open_pickles(folder: Path, files: list[Path] | None, allow_pickle: bool) -> Checkpoint:
    if files is None:
        index = "pytorch_model.bin.index.json"
        if (folder / index).exists():
            _, files = _sharded(folder, index, ".bin")
        elif (folder / "pytorch_model.bin").exists():
            files = [_inside(folder, "pytorch_model.bin", folder)]
        else:
            raise UserError(str(folder), "no model.safetensors and no index of shards here")
    if not allow_pickle:
        raise UserError(
            str(files[0]),
            "pickled weights can hold code and are not read unless asked for",
            "convert them to safetensors, or set allow_pickle to read them, weights only",
        )
    config = _read_config(folder)
    opened = {path: _PickleFile(path) for path in files}
    owner = {name: path for path, file in opened.items() for name in file.specs}
    return Checkpoint(folder, config, opened, owner, folder)


def load(
    path_or_name: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    *,
    allow_pickle: bool = False,
) -> tuple[TambaForCausalLM, Any]:
    """Load a model and its tokenizer: ours, any supported family, or GGUF.

    The weights are read one tensor at a time into a model made without memory, so loading takes
    little more than the model itself.

    Args:
        path_or_name: as for `open_checkpoint`.
        dtype: type of the weights; None for the type they are stored in. `A_log`, `dt_bias` and `D`
            stay float32 in shorter types.
        device: where the model goes; the CPU by default.
        allow_pickle: as for `open_checkpoint`.

    Returns:
        The model in evaluation mode, and the tokenizer, or None if the checkpoint has none.

    Raises:
        UserError: what `open_checkpoint` raises, unsupported family or key, missing or unexpected
            tensors, NaN weights, a type or device that cannot be.
    """
    # Before the hub is asked for anything.
    check_place(dtype, device)
    checkpoint = open_checkpoint(path_or_name, allow_pickle=allow_pickle)
    return load_model(checkpoint, dtype, device), load_tokenizer(checkpoint)


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    *,
    wide: Collection[str] = (),
) -> TambaForCausalLM:
    """The model of an open checkpoint; see `load`.

    Args:
        wide: names of parameters that are float32 in shorter types too: masters of training.
    """
    config = copy.deepcopy(checkpoint.tamba_config)
    wanted = _as_dtype(dtype) or _as_dtype(config.dtype) or torch.float32
    place = _as_device(device)
    names = checkpoint.parameters
    config.dtype = wanted
    config.name_or_path = checkpoint.location
    with torch.device("meta"):
        model = TambaForCausalLM(config)
    for name in names:
        held = torch.promote_types(wanted, torch.float32) if name in wide else wanted
        tensor = checkpoint.read_parameter(name, _kept_dtype(name, held)).to(place)
        module = model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        # Pieces of a fused tensor are views that would keep the whole of it alive.
        setattr(
            module,
            leaf,
            torch.nn.Parameter(tensor.contiguous().clone() if tensor._is_view() else tensor),
        )
    model.tie_weights()
    if checkpoint.folder is not None and (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = _generation_config(checkpoint.folder)
    return model.eval()


def check_place(dtype: torch.dtype | str | None, device: torch.device | str | None) -> torch.device:
    """The device that is meant, by default the CPU. Raises UserError for what cannot be."""
    _as_dtype(dtype)
    return _as_device(device)


def _generation_config(folder: Path) -> GenerationConfig:
    where = folder / "generation_config.json"
    _read_json(where)  # damage is said in our words
    try:
        config = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(str(where), f"cannot be read ({str(error).splitlines()[0]})") from error
    ends = config.eos_token_id
    for token in ends if isinstance(ends, list) else [ends]:
        if not isinstance(token, int | None):
            raise UserError(f"{where}: eos_token_id", f"{token!r} is not the number of a token")
    return config


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise UserError("dtype", f"{dtype!r} is no type of weights", "e.g. float32, bfloat16")
    return found


def _as_device(device: torch.device | str | None) -> torch.device:
    try:
        place = torch.device(device or "cpu")
    except RuntimeError as error:
        raise UserError("device", f"'{device}' is no device", "e.g. cpu, cuda, cuda:1") from error
    if place.type in ("cpu", "meta"):
        return place
    # Other kinds have a module of torch named after them, where this build of torch knows them.
    module = getattr(torch, place.type, None)
    if module is None or not module.is_available():
        raise UserError("device", f"torch finds no '{place.type}' here", "use cpu")
    if (place.index or 0) >= module.device_count():
        raise UserError("device", f"there are {module.device_count()}, not '{place}'")
    return place


def load_tokenizer(checkpoint: Checkpoint | str | os.PathLike[str]) -> Any:
    """The tokenizer of a checkpoint, from its own files alone; None if it has none.

    Raises:
        UserError: the files do not make a tokenizer.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    if checkpoint.folder is None:
        from tamba.formats.gguf import GGUFFile, read_tokenizer

        (file,) = checkpoint._files.values()
        assert isinstance(file, GGUFFile)
        return read_tokenizer(file.metadata, checkpoint.location)
    if not any((checkpoint.folder / name).is_file() for name in _TOKENIZER_CORE):
        return None
    try:
        return AutoTokenizer.from_pretrained(
            checkpoint.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers report damage as bare exceptions of many kinds
        raise UserError(
            str(checkpoint.folder),
            f"its tokenizer files cannot be read ({str(error).splitlines()[0]})",
        ) from error
