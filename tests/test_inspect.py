from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tamba
from hf_models import tiny_hf_model
from models import STACKS, random_ids, tiny_model
from tamba.checkpoint import parameter_specs
from tamba.errors import UserError
from tamba.formats.safetensors import SafetensorsFile
from tamba.inspect import describe, inspect, measure_bandwidth
from tamba.model.cache import TambaCache


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("tied", [False, True])
def test_counts_equal_the_model(stack: str, tied: bool) -> None:
    model = tiny_model(stack, tie_word_embeddings=tied)
    found = describe(model.config, parameter_specs(model.config))
    unique = {id(p): p for p in model.parameters()}.values()
    assert found.parameters == sum(p.numel() for p in unique)
    assert found.parameters == sum(found.parameters_by_part.values())
    assert found.weight_bytes == sum(p.nbytes for p in unique)
    assert (found.parameters_by_part["head"] == 0) == tied
    assert found.layers == tuple(block.mixer.kind for block in model.config.block_specs)


def cache_size(cache: TambaCache) -> int:
    """Bytes of every tensor that the layers of a cache hold."""
    total = 0
    for layer in cache.layers:
        for name in ("keys", "values", "conv_state", "ssm_state"):
            tensor = getattr(layer, name, None)
            total += 0 if tensor is None else tensor.nbytes
    return total


@pytest.mark.parametrize("stack", ["attention", "mamba1", "mamba2"])
def test_cache_bytes_equal_the_cache(stack: str) -> None:
    model = tiny_model(stack)
    found = describe(model.config, parameter_specs(model.config), contexts=[9])
    cache = TambaCache(model.config)
    with torch.no_grad():
        model(random_ids(1, 9), past_key_values=cache)
    assert cache_size(cache) == found.floors[0].cache_bytes
    assert found.floors[0].cache_bytes == found.state_bytes + 9 * found.cache_bytes_per_token
    assert found.floors[0].memory_bytes == found.weight_bytes + found.floors[0].cache_bytes


def test_speed_floor_is_bytes_over_bandwidth() -> None:
    model = tiny_model("mixed")
    specs = parameter_specs(model.config)
    found = describe(model.config, specs, contexts=[0, 100], bandwidth=1e6)
    # All weights once, but of the embedding one row of d_model float32 numbers.
    rest = found.weight_bytes - (model.config.vocab_size - 1) * model.config.hidden_size * 4
    for floor in found.floors:
        assert floor.tokens_per_second == pytest.approx(1e6 / (rest + floor.cache_bytes))
    assert json.loads(json.dumps(found.to_dict()))["bandwidth"] == 1e6
    assert describe(model.config, specs).floors[0].tokens_per_second is None


@pytest.mark.parametrize(
    ("stack", "positions", "contexts"),
    [
        ("mixed", 512, [512]),
        ("mixed", 8192, [4096, 8192]),
        ("mixed", 65536, [4096, 32768]),
        ("mamba2", 512, [4096, 32768]),  # no attention, no end
    ],
)
def test_floors_are_told_where_the_model_has_positions(
    stack: str, positions: int, contexts: list[int]
) -> None:
    config = tiny_model(stack, max_position_embeddings=positions).config
    found = describe(config, parameter_specs(config))
    assert [floor.context for floor in found.floors] == contexts


def test_other_peoples_folders(tmp_path: Path) -> None:
    theirs = tiny_hf_model("qwen3")
    theirs.save_pretrained(tmp_path)
    found = inspect(tmp_path, bandwidth=1e9, contexts=[])
    assert (found.family, found.dtype, found.floors) == ("qwen3", "float32", ())
    assert found.parameters == theirs.num_parameters()


def test_bandwidth_is_plausible() -> None:
    # From a slow laptop under load to the fastest accelerator of these years.
    assert 1e8 < measure_bandwidth(megabytes=16, seconds=0.05) < 2e13


def test_a_wrong_checkpoint_is_told_before_bandwidth_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("tamba.inspect.measure_bandwidth", lambda: pytest.fail("was measured"))
    tiny_model("attention").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    del tensors["lm_head.weight"]
    save_file(tensors, weights)
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        inspect(tmp_path)


def test_no_weights_are_read(tmp_path, monkeypatch):
    """Not even where a tied head is stored beside the embedding."""
    model = tiny_model("attention", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, weights)

    def read(self, name):
        raise AssertionError(f"{name} was read")

    with monkeypatch.context() as patch:
        patch.setattr(SafetensorsFile, "read", read)
        assert inspect(tmp_path, bandwidth=1e9).tied
        with pytest.raises(AssertionError, match="was read"):
            tamba.load(tmp_path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, weights)
    with pytest.raises(UserError, match="is not the embedding"):
        tamba.load(tmp_path)
