"""Turn a pretrained Transformer language model into a Transformer–Mamba hybrid.

Every verb of the command line is a function here: ``tamba.build("recipe.toml", "student")``.
``tamba.load(path)`` opens a checkpoint. Names are imported when they are first used; the model is
known to transformers' Auto classes as soon as both packages are imported.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tamba._auto import register_with_transformers

if TYPE_CHECKING:
    from tamba.analyze import analyze
    from tamba.bench import bench
    from tamba.build import build
    from tamba.checkpoint import load
    from tamba.errors import UserError
    from tamba.evaluate import evaluate
    from tamba.generate import generate
    from tamba.generate_data import generate_data
    from tamba.inspect import inspect
    from tamba.model.cache import TambaCache
    from tamba.model.config import TambaConfig
    from tamba.model.modeling import TambaForCausalLM
    from tamba.plan import LayerPlan, read_plan
    from tamba.recipe import Recipe, read_recipe
    from tamba.run import run
    from tamba.train import train

__version__ = "0.1.0"

__all__ = [
    "LayerPlan",
    "Recipe",
    "TambaCache",
    "TambaConfig",
    "TambaForCausalLM",
    "UserError",
    "analyze",
    "bench",
    "build",
    "evaluate",
    "generate",
    "generate_data",
    "inspect",
    "load",
    "read_plan",
    "read_recipe",
    "report",
    "run",
    "train",
]

_HOME = {
    "LayerPlan": "tamba.plan",
    "Recipe": "tamba.recipe",
    "TambaCache": "tamba.model.cache",
    "TambaConfig": "tamba.model.config",
    "TambaForCausalLM": "tamba.model.modeling",
    "UserError": "tamba.errors",
    "load": "tamba.checkpoint",
    "read_plan": "tamba.plan",
    "read_recipe": "tamba.recipe",
}
# Each lives in the module of its own name.
_VERBS = frozenset(
    {
        "analyze",
        "bench",
        "build",
        "evaluate",
        "generate",
        "generate_data",
        "inspect",
        "report",
        "run",
        "train",
    }
)


class _Verb(ModuleType):
    """A verb's module; calling it calls its function, whatever was imported first."""

    @property
    def _function(self) -> Any:
        return self.__dict__[self.__name__.rpartition(".")[2]]

    @property
    def __signature__(self) -> Any:
        # Not at the top: it would cost the command line's help a third of its time.
        from inspect import signature

        return signature(self._function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


class _Package(ModuleType):
    """This package: a verb's module becomes callable when the import system hangs it in here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _VERBS and isinstance(value, ModuleType):
            value.__class__ = _Verb
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        return importlib.import_module(f"tamba.{name}")
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'tamba' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Package
register_with_transformers()
