"""Registration with transformers' Auto classes, without importing transformers for it.

Importing transformers and torch takes seconds, and ``tamba --help`` needs neither. So the model is
registered at once where transformers is already imported, and otherwise right after it is: a finder
stands first in `sys.meta_path` until somebody imports transformers, then steps aside.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_LIBRARY = "transformers"


def register_with_transformers() -> None:
    """Make `AutoConfig` and the Auto models know tamba's, now or when transformers is imported."""
    if _LIBRARY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    # Importing the package of the model registers it. Where that import is what led here, this
    # finds it under way and returns at once.
    importlib.import_module("tamba.model")


class _Watch(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _LIBRARY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


class _RegisterAfter(Loader):
    """A loader that registers once the real one is through."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The package must find its own files through the loader that knows them.
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _register()
