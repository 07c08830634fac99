"""Checkpoints on the model hub, or in its cache on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from tamba.errors import UserError

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_PICKLES = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]


def fetch(name: str, files: Iterable[str], *, allow_pickle: bool) -> Path:
    """The folder of a snapshot of the model `name`, with its weights and `files`.

    Raises:
        UserError: `name` is not of the form ``owner/model``, the hub does not know it or cannot be
            reached, or it has pickled weights alone and those are not allowed.
    """
    parts = name.split("/")
    if (
        len(parts) != 2
        or not all(parts)
        or name.startswith((".", "~"))
        or Path(name).suffix == ".gguf"
    ):
        raise UserError(name, "no such file or folder")
    try:
        folder = _snapshot(name, [*_WEIGHTS, *files])
        if allow_pickle and not any(folder.glob("*.safetensors")):
            _snapshot(name, _PICKLES)
    except GatedRepoError as error:
        raise UserError(name, "is gated on the hub", "accept its terms there and log in") from error
    except RepositoryNotFoundError as error:
        raise UserError(name, "no such folder, and no such model on the hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            name,
            "no such folder here, and the model hub cannot be reached",
            "check the path, or download the model where there is network and give its folder",
        ) from error
    except HFValidationError as error:
        raise UserError(name, "no such file or folder") from error
    if not any(folder.glob("*.safetensors")) and not allow_pickle:
        raise UserError(
            name,
            "has no safetensors on the hub, and pickled weights are not fetched unless asked for",
            "set allow_pickle to fetch and read them, weights only",
        )
    return folder


def _snapshot(name: str, patterns: list[str]) -> Path:
    return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*/*"]))
