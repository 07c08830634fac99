"""What kernels become on a Hopper card, compiled where there is none; a program, prints JSON.

`TRITON_INTERPRET` must not be set when Triton is imported, and so this is a process of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

import specialisation
from tamba.ops.directions import compare
from tamba.ops.kernels import ssd

TARGET = GPUTarget("cuda", 90, 32)


def compiled(kernel: Any, *args: Any, **kwargs: Any) -> dict[str, int]:
    """Registers of a thread, bytes of its stack, where what does not fit them goes, and how many
    times ptxas says that products wait for one another."""
    backend = make_backend(TARGET)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, kinds, options = bind(*args, **kwargs)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, kinds, options
    )
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(kernel, signature, constants, attributes)
    made = triton.compile(source, target=TARGET, options=vars(parsed)).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        told = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "waits": _assembled(made["ptx"]).count("(C75"),
    }


def _assembled(ptx: str) -> str:
    """What ptxas says of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        tool = triton.knobs.nvidia.ptxas.path
        asked = [tool, "-v", "--gpu-name", "sm_90a", str(path), "-o", str(path.with_suffix(".o"))]
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


def directions() -> dict[str, dict[str, int]]:
    """The kernels of `tamba analyze`, by name and dtype."""
    seen: dict[str, dict[str, int]] = {}
    with specialisation.launches():
        for dtype in (torch.bfloat16, torch.float32):

            def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
                name = f"{self.fn.__name__} {str(dtype).removeprefix('torch.')}"  # noqa: B023
                seen[name] = compiled(self, *args, **kwargs)

            JITFunction.run = run
            # As many states and numbers as SmolLM2-135M has.
            states = [torch.empty(1, 64, 576, dtype=dtype) for _ in range(32)]
            compare(states, torch.ones(1, 64, dtype=torch.bool))
    return seen


def gluon() -> dict[str, dict[str, int]]:
    """SSD's kernels in Gluon, by name and shape."""
    seen: dict[str, dict[str, int]] = {}
    with specialisation.launches() as _, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAMBA_KERNELS", "gluon")
        patch.setattr(ssd, "architecture", lambda device: "sm90")
        label = ""

        def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            if self.is_gluon():
                seen[f"{self.fn.__name__} {label}"] = compiled(self, *args, **kwargs)

        patch.setattr(JITFunction, "run", run)
        shapes = (4, 1, 64, 128, False), (9, 9, 64, 64, True), (4, 4, 128, 128, False)
        for heads, groups, p, n, gate in shapes:
            label = f"H{heads} G{groups} P{p} N{n}" + " gate" * gate
            ssd._scan._compiled.clear()
            x, z, y = (torch.empty(1, 200, heads, p, dtype=torch.bfloat16) for _ in range(3))
            B, C = (torch.empty(1, 200, groups, n, dtype=torch.bfloat16) for _ in range(2))
            dt, A = torch.empty(1, 200, heads), torch.empty(heads)
            given = (x, dt, A, B, C, A, z if gate else None, A, None, None, None)
            call = ssd.Call(*given, True, 0.0, 1.0)
            _, _, before = ssd.forward(call, gate)
            ssd.backward(call, y, None, before)
    return seen


if __name__ == "__main__":
    print(json.dumps({"directions": directions, "gluon": gluon}[sys.argv[1]]()))
