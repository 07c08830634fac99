"""Configurations that cannot be: every entry is checked for its type and size, and named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import tiny_config
from tamba.errors import UserError
from tamba.model import config as config_module
from tamba.model.config import BlockSpec, TambaConfig

GOOD = tiny_config("mixed").to_dict()


def with_value(path: tuple[str, ...], value: object) -> dict[str, Any]:
    data = copy.deepcopy(GOOD)
    inside = data
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return data


# What is written, and what the one line must say: the place and the fault.
BAD = {
    ("vocab_size",): {-3: "must be 1 or more, not -3", "many": "a whole number", True: "not True"},
    ("hidden_size",): {0: "must be 1 or more", 3.5: "a whole number, not 3.5"},
    ("initializer_range",): {"x": "must be a number", -1.0: "cannot be -1.0"},
    ("residual_in_fp32",): {1: "true or false, not 1"},
    ("num_hidden_layers",): {5: "lists 7 layers and num_hidden_layers says 5"},
    ("final_norm", "eps"): {"x": "must be a number, not 'x'", 0: "1 or more", -1e-5: "positive"},
    ("final_norm", "kind"): {"batch": "'batch' is not one of rms, layer"},
    ("blocks", "attention", "residual"): {"serial": "not one of sequential, parallel"},
    ("blocks", "attention", "mlp", "d_mlp"): {-48: "must be 1 or more, not -48"},
    ("blocks", "attention", "mlp", "activation"): {"sliu": "did you mean 'silu'?"},
    ("blocks", "attention", "mixer", "kind"): {"mamba3": "did you mean 'mamba", 7: "unknown mixer"},
    ("blocks", "attention", "mixer", "n_heads"): {0: "1 or more", "4": "a whole number, not '4'"},
    ("blocks", "attention", "mixer", "n_kv_heads"): {3: "3 does not divide n_heads = 4"},
    ("blocks", "attention", "mixer", "head_dim"): {None: "a whole number, not None"},
    ("blocks", "attention", "mixer", "rotary_dim"): {-2: "0 or more", 7: "not even"},
    ("blocks", "attention", "mixer", "scale"): {float("nan"): "must be a number"},
    ("blocks", "attention", "mixer", "rope", "rope_type"): {"linaer": "did you mean 'linear'?"},
    ("blocks", "attention", "mixer", "rope", "rope_theta"): {0: "positive", "x": "a number"},
    ("blocks", "sliding", "mixer", "sliding_window"): {-1: "1 or more", 2.0: "a whole number"},
    ("blocks", "sliding", "mixer", "qk_norm"): {3: "must be a table, not 3"},
    ("blocks", "mamba1", "mixer", "dt_from"): {"outer": "not one of inner, input"},
    ("blocks", "mamba2", "mixer", "dt_limit"): {(0.1,): "must be 2 numbers", "x": "2 numbers"},
    ("blocks", "mamba2", "mixer", "chunk_size"): {0: "1 or more"},
}
ROWS = [(path, value, says) for path, rows in BAD.items() for value, says in rows.items()]


def check_named(path: tuple[str, ...], value: object, says: str = "") -> None:
    with pytest.raises(UserError) as caught:
        TambaConfig.from_dict(with_value(path, value))
    assert says in str(caught.value)
    key = "layers" if path == ("num_hidden_layers",) else path[-1]
    assert key in caught.value.where


@pytest.mark.parametrize(("path", "value", "says"), ROWS, ids=lambda x: str(x)[-40:])
def test_what_cannot_be_is_named(path: tuple[str, ...], value: object, says: str) -> None:
    check_named(path, value, says)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (GOOD["layers"][:-1], "lists 6 layers and num_hidden_layers says 7"),
        (3, "config: layers: must be a list, not 3"),
        ([*GOOD["layers"][:-1], 3], r"layers[6]: must be a word, not 3"),
        ([*GOOD["layers"][:-1], "mamba9"], "no block named 'mamba9'"),
    ],
)
def test_layer_lists_that_cannot_be(layers: object, says: str) -> None:
    with pytest.raises(UserError) as caught:
        TambaConfig.from_dict(GOOD | {"layers": layers, "num_hidden_layers": 7})
    assert says in str(caught.value)


def leaves(table: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of everything inside blocks and final norm that is no table."""
    found = []
    for key, value in table.items():
        found += leaves(value, (*path, key)) if isinstance(value, dict) else [(*path, key)]
    return found


LEAVES = [p for p in leaves({k: GOOD[k] for k in ("blocks", "final_norm")}) if "rope" not in p]
NONSENSE = st.one_of(
    st.integers(max_value=-1),
    st.floats(max_value=-1e-3) | st.just(float("nan")),
    st.text().filter(lambda word: word not in ("rms", "layer", "silu", "gelu")),
    st.lists(st.integers(), min_size=1),
    st.dictionaries(st.text(min_size=1), st.integers(), min_size=1),
)


@given(st.sampled_from(LEAVES), NONSENSE)
def test_nonsense_anywhere_is_named(path: tuple[str, ...], value: object) -> None:
    if path[-1] == "scale" and isinstance(value, int | float) and value == value:
        return  # a factor on q·k may be any number
    check_named(path, value)


def test_an_unchecked_value_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "_check_value", lambda *_: None)
    with pytest.raises((pytest.fail.Exception, TypeError)):
        check_named(("blocks", "mamba2", "mixer", "chunk_size"), 0)


def test_a_kind_that_is_no_word_is_named() -> None:
    with pytest.raises(UserError, match="kind"):
        BlockSpec.from_dict({"mixer": {"kind": [0]}}, "block")
