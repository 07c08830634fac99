"""Pretrained families: config map and weight-name map of each, both directions.

`family_for` finds the family of a checkpoint; a `Family` reads and writes its configuration and
says, tensor by tensor, how its weights become ours and back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tamba.errors import UserError, nearest
from tamba.families.family import Family, Origin, Shapes
from tamba.families.gpt_neox import GPT_NEOX
from tamba.families.llama import LLAMA, MISTRAL, SMOLLM3
from tamba.families.mamba import MAMBA, STATE_SPACES_MAMBA
from tamba.families.mamba2 import MAMBA2, STATE_SPACES_MAMBA2
from tamba.families.mamba_in_llama import MAMBA_IN_LLAMA
from tamba.families.qwen2 import QWEN2
from tamba.families.qwen3 import QWEN3

__all__ = ["FAMILIES", "Family", "Origin", "Shapes", "family_for"]

# In order of preference: a converted Llama also looks like a Llama.
FAMILIES: tuple[Family, ...] = (
    MAMBA_IN_LLAMA,
    LLAMA,
    MISTRAL,
    SMOLLM3,
    QWEN2,
    QWEN3,
    GPT_NEOX,
    MAMBA,
    MAMBA2,
    STATE_SPACES_MAMBA,
    STATE_SPACES_MAMBA2,
)


def family_for(
    config: Mapping[str, Any], names: Collection[str] = (), where: str = "config.json"
) -> Family:
    """The family whose configuration this is.

    Args:
        config: the content of `config.json` (with `mamba_config.json` under ``mamba_config``).
        names: the names of the checkpoint's tensors.
        where: place for the message.

    Raises:
        UserError: no supported family.
    """
    for family in FAMILIES:
        if family.matches(config, names):
            return family
    kind = config.get("model_type")
    if kind is None:
        raise UserError(where, "names no model_type, and is not a state-spaces configuration")
    known = [f.name for f in FAMILIES]
    raise UserError(where, f"unsupported family {kind!r}", nearest(str(kind), known))
