"""What kernels become on a Hopper card, compiled where there is none; a program, prints JSON.

`TRITON_INTERPRET` must not be set when Triton is imported, and so this is a process of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import specialisation
from tamba.ops.directions import compare

TARGET = GPUTarget("cuda", 90, 32)


def compiled(kernel: Any, *args: Any, **kwargs: Any) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, where what does not fit them goes."""
    backend = make_backend(TARGET)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, kinds, options = bind(*args, **kwargs)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, kinds, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=TARGET, options=vars(parsed)).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        told = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return {"registers": int(found[1]), "stack": int(found[2])}


def main() -> None:
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
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
