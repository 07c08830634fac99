"""Matrices of mixers, beside what the mixers do with them."""

from __future__ import annotations

import pytest
import torch

from compare import assert_same
from models import random_ids, tiny_config, tiny_model
from tamba.data import Batch
from tamba.trace import climb, enter
from tamba.train.mixing import attention_matrix, can_compare, mixing_matrix
from test_train import rows


def batch() -> Batch:
    blocks = rows(3)
    return Batch(random_ids(3, 16), blocks.starts)


@torch.no_grad()
@pytest.mark.parametrize("stack", ["attention", "sliding"])
def test_attention_weights_its_tokens_by_its_matrix(stack: str) -> None:
    model = tiny_model(stack)
    model.set_attn_implementation("eager")
    want = model(**batch().inputs, output_attentions=True).attentions
    hidden, where = enter(model, batch())
    for index, layer in enumerate(model.model.layers):
        got = attention_matrix(layer.mixer, layer.norm(hidden), where)
        assert_same(got, want[index], "fp32", f"layer {index}")
        hidden = climb(model, hidden, where, index, index + 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mamba2_gqa", "mamba2_plain"])
def test_a_mixer_multiplies_its_values_with_its_matrix(kind: str) -> None:
    model = tiny_model([kind] * 2)
    (layer, _), mixer = model.model.layers, model.model.layers[0].mixer
    hidden, where = enter(model, batch())
    hidden = layer.norm(hidden)
    matrix = mixing_matrix(mixer, hidden, where)
    s = mixer.slices
    projected = mixer.in_proj(hidden)
    inputs = [projected[..., s["x"].start : s["C"].stop], projected[..., s["dt"]]]
    want, _, _ = mixer.scan(inputs, None, None, where.starts, None)
    from tamba.ops import causal_conv1d

    xBC, _ = causal_conv1d(
        inputs[0],
        mixer.conv1d.weight[:, 0],
        mixer.conv1d.bias,
        activation="silu" if mixer.spec.conv_activation == "silu" else None,
        starts=where.starts,
    )
    x, _, _ = mixer.split_heads(xBC)
    got = torch.einsum("bhij,bjhp->bihp", matrix, x).flatten(-2)
    assert_same(got, want, "fp32")
    assert can_compare(mixer.spec, tiny_config("attention").block_specs[0].mixer)
