"""What a new process waits for, and what is compiled again when shapes change.

Each row is a fresh process that imports the package, runs a small hybrid (a Mamba-2, a Mamba-1 and
an attention layer at the head sizes of real models) once forward, once through a training step and
for a few decoded tokens, and then changes length, batch and document layout. Triton's disk cache
is empty for the first row and warm for the second. Compilations are counted by Triton's own hook,
which speaks whenever a kernel meets arguments it has no binary for in this process.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tamba.errors import UserError

CHANGES = {
    "length": [(2, 1000), (2, 63), (2, 1), (2, 4097)],
    "batch": [(3, 512), (1, 512), (5, 512)],
    "documents": [(2, 512), (2, 1000), (1, 777)],
}
"""By kind of change, (batch, length) of the calls after the first one of (2, 512)."""
_LIMITS = {"cold": 10.0, "warm": 2.0}


@dataclass(frozen=True)
class Row:
    """One fresh process.

    Args:
        id: ``cold_start/cold`` or ``cold_start/warm``.
        cache: Triton's cache folder, shared by the rows of one run.
    """

    id: str
    device: str
    cache: Path

    def run(self, limit: float = 300.0) -> dict[str, Any]:
        """Start the process, wait, and give what it found."""
        state = self.id.rpartition("/")[2]
        if state == "warm" and self.device == "cuda" and not any(self.cache.iterdir()):
            self._answer(limit)  # the row of the empty cache was not asked for
        found = self._answer(limit)
        found["forward_met"] = found["first_forward_seconds"] <= _LIMITS[state]
        found["import_met"] = found["import_seconds"] <= 1.0
        counts = [found[f"compiled_for_{kind}"] for kind in CHANGES]
        found["recompiled_met"] = None if None in counts else sum(counts) == 0
        return {"id": self.id, **found}

    def _answer(self, limit: float) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            done = subprocess.run(
                [sys.executable, "-m", "tamba.bench.cold_start", self.device, str(answer)],
                env={**os.environ, "TRITON_CACHE_DIR": str(self.cache)},
                capture_output=True,
                text=True,
                timeout=limit,
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise RuntimeError(last)
            found: dict[str, Any] = json.loads(answer.read_text())
        return found


def rows(at: torch.device) -> list[Row]:
    """The cold process, then the warm one."""
    cache = Path(tempfile.mkdtemp(prefix="tamba-triton-"))
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    return [Row(f"cold_start/{state}", at.type, cache) for state in ("cold", "warm")]


def _timed(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextlib.contextmanager
def _compilations() -> Iterator[list[str]]:
    """Names of the Triton kernels that met arguments they had no binary for, while inside."""
    found: list[str] = []
    try:
        knobs = importlib.import_module("triton").knobs
    except (ImportError, AttributeError):
        yield found
        return

    def hook(*, fn: Any, **_: Any) -> None:
        found.append(fn.name)

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = hook
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before


def _measure(device: torch.device, over_torch: float, of_model: float) -> dict[str, Any]:
    """Everything a row reports; runs in the fresh process."""
    config_room = importlib.import_module("tamba.model.config")
    modeling = importlib.import_module("tamba.model.modeling")
    mlp = config_room.MLPSpec(d_mlp=512)
    blocks = {
        "mamba2": config_room.BlockSpec(
            mixer=config_room.Mamba2Spec(
                n_heads=8, head_dim=64, d_state=128, n_groups=1, norm_groups=1
            ),
            mlp=mlp,
        ),
        "mamba1": config_room.BlockSpec(
            mixer=config_room.Mamba1Spec(d_inner=512, d_state=16, dt_rank=16), mlp=mlp
        ),
        "attention": config_room.BlockSpec(
            mixer=config_room.AttentionSpec(n_heads=4, n_kv_heads=2, head_dim=64, rotary_dim=64),
            mlp=mlp,
        ),
    }
    config = config_room.TambaConfig(
        vocab_size=512, hidden_size=256, blocks=blocks, layers=["mamba2", "mamba1", "attention"]
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    on_gpu = device.type == "cuda"
    found: dict[str, Any] = {"import_seconds": over_torch, "import_of_model_seconds": of_model}

    def build() -> Any:
        with device:
            return modeling.TambaForCausalLM._from_config(config, dtype=dtype)

    start = time.perf_counter()
    model = build()
    found["build_seconds"] = time.perf_counter() - start
    optimizer = torch.optim.AdamW(model.parameters(), fused=on_gpu)

    def step(batch: int, length: int, documents: int = 0) -> None:
        ids = torch.randint(0, 512, (batch, length), device=device)
        given: dict[str, Any] = {}
        if documents:
            at = torch.arange(length, device=device)
            given["seq_idx"] = (at * documents // length).expand(batch, length)
        model(ids, labels=ids if length > 1 else None, **given).logits.float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def forward() -> None:
        with torch.no_grad():
            model(torch.randint(0, 512, (2, 512), device=device))

    def decode() -> None:
        ids = torch.randint(0, 512, (2, 16), device=device)
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)

    with _compilations() as names:
        found["first_forward_seconds"] = _timed(forward, device)
        found["first_training_step_seconds"] = _timed(lambda: step(2, 512), device)
        found["first_decode_seconds"] = _timed(decode, device)
        found["kernels_compiled"] = len(names) if on_gpu else None
    with _compilations() as names:
        step(2, 512, documents=3)  # the first packed rows may need a variant of their own
    found["compiled_for_first_documents"] = len(names) if on_gpu else None
    again: dict[str, list[str]] = {}
    for kind, shapes in CHANGES.items():
        with _compilations() as names:
            for n, (batch, length) in enumerate(shapes):
                step(batch, length, documents=n + 2 if kind == "documents" else 0)
        found[f"compiled_for_{kind}"] = len(names) if on_gpu else None
        again[kind] = sorted(set(names))
    found["compiled_again"] = again
    return found


def _main(device: str, answer: Path, imports: list[float]) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device", "there is no CUDA device", "use cpu")
    answer.write_text(json.dumps(_measure(torch.device(device), *imports)))


if __name__ == "__main__":
    # A process of its own for the import, since this one has imported the package by now.
    _code = (
        "import time, torch; a = time.perf_counter(); import tamba; b = time.perf_counter(); "
        "tamba.TambaForCausalLM; print(b - a, time.perf_counter() - b)"
    )
    _said = subprocess.check_output([sys.executable, "-c", _code], text=True)
    _main(sys.argv[1], Path(sys.argv[2]), [float(word) for word in _said.split()[-2:]])
