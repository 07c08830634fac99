"""`import tamba`: quick, and transformers knows the model whatever is imported first."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

import tamba
from test_floors import OPTIONAL

SRC = str(Path(tamba.__file__).parents[1])

FIRST = {
    # With every optional package missing: loading, building and generating need none.
    "tamba": f"""
for name in {sorted(OPTIONAL)!r}:
    sys.modules[name] = None
import tamba, tamba.generate, tamba.plan, tamba.recipe
""",
    # transformers is then imported from inside the model's own import.
    "a part of the model": "import tamba.model.config",
}


def python(code: str) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {SRC!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(FIRST["tamba"], id="tamba"),
        pytest.param(FIRST["a part of the model"], id="a part", marks=pytest.mark.slow),
    ],
)
def test_registered_whatever_comes_first(first: str) -> None:
    code = f"""{first}
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
config = AutoConfig.for_model("tamba")
print(type(AutoModelForCausalLM.from_config(config)).__name__)
print(type(AutoModel.from_config(config)).__name__)
"""
    assert python(code).split() == ["TambaForCausalLM", "TambaModel"]


def test_registered_after_transformers() -> None:
    # In this process transformers is imported, and tamba after it or before: both must do.
    assert type(AutoConfig.for_model("tamba")) is tamba.TambaConfig


def test_import_brings_neither_torch_nor_transformers() -> None:
    code = "import tamba, tamba.cli\nprint(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert python(code).split() == []
    # The same look at what the recipe's reader brings: the check can see a module.
    code = "import tamba.recipe\nprint(*sorted({'torch', 'pydantic'} & set(sys.modules)))"
    assert python(code).split() == ["pydantic"]


def test_a_verb_is_a_function_and_a_module() -> None:
    import tamba.generate as module

    assert tamba.generate is module
    with pytest.raises(tamba.UserError, match="prompt: is empty"):
        tamba.generate("nowhere", " ")
    assert inspect.signature(tamba.generate) == inspect.signature(module.generate)
    assert set(tamba.__all__) <= set(dir(tamba))
    with pytest.raises(AttributeError, match="has no attribute 'bild'"):
        tamba.bild  # noqa: B018
