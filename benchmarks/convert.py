"""Row `convert`: time and peak memory of building a student of 8B shape in a fresh process.

    python benchmarks/convert.py [--layers 32] [--dense] [--json benchmarks/results/convert.json]

The teacher has the shape of Llama-3.1-8B in bfloat16 and lies on disk as four shards. By default
its files are holes (zeros that take no disk), so reading costs memory bandwidth only; `--dense`
fills them with random numbers first and takes 15 GiB more disk. Every second layer is converted to
Mamba-2. The bar is 3 GiB of peak resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from tamba.checkpoint import CheckpointWriter, parameter_specs
from tamba.families import family_for
from tamba.formats.safetensors import INDEX, TensorSpec

GiB = 1 << 30
BAR_GIB = 3.0
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def make_teacher(folder: Path, layers: int, dense: bool) -> int:
    """Write the teacher; returns its bytes."""
    config = {**CONFIG, "num_hidden_layers": layers}
    family = family_for(config)
    ours = family.to_tamba_config(config, {})
    mine = parameter_specs(ours, torch.bfloat16)
    names = {n: o.sources[0] for n, o in family.tensors(ours, mine).items()}
    specs = {theirs: TensorSpec(mine[name].shape, torch.bfloat16) for theirs, name in names.items()}
    if dense:
        with CheckpointWriter(folder, specs, config) as writer:
            for name, spec in specs.items():
                writer.write(name, torch.randn(spec.shape, dtype=torch.bfloat16) * 0.02)
    else:
        write_holes(folder, specs, config)
    return sum(spec.nbytes for spec in specs.values())


def write_holes(folder: Path, specs: dict[str, TensorSpec], config: dict[str, object]) -> None:
    """Safetensors files whose data are holes: a header, and a length."""
    folder.mkdir(parents=True)
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, spec in specs.items():
        if sum(s.nbytes for s in shards[-1].values()) + spec.nbytes > 4 * GiB:
            shards.append({})
        shards[-1][name] = spec
    table = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, begin = {}, 0
        for name, spec in shard.items():
            end = begin + spec.nbytes
            shape = list(spec.shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            table[name], begin = file, end
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + begin)
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    (folder / "config.json").write_text(json.dumps(config))


# VmHWM and not `getrusage`: the latter's maximum begins with the parent's, before the exec.
BUILD = """
import sys, time
from pathlib import Path
from fractions import Fraction
from tamba.build import build_student
from tamba.checkpoint import open_checkpoint
from tamba.plan import uniform_plan

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

base = peak()
begun = time.perf_counter()
teacher = open_checkpoint(sys.argv[1])
plan = uniform_plan(teacher.tamba_config.num_hidden_layers, Fraction(1, 2))
report = build_student(teacher, plan, sys.argv[2])
seconds = time.perf_counter() - begun
print(seconds, base, peak(), sum(report.elements().values()))
"""


def measure(teacher: Path, student: Path) -> dict[str, float]:
    """Build in a fresh process: seconds, memory after imports and at the peak, parameters."""
    command = [sys.executable, "-c", BUILD, str(teacher), str(student)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, base, peak, parameters = done.stdout.split()
    return {
        "seconds": round(float(seconds), 1),
        "imports_gib": round(int(base) * 1024 / GiB, 2),
        "peak_gib": round(int(peak) * 1024 / GiB, 2),
        "student_parameters": int(parameters),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dense", action="store_true", help="random weights, not holes")
    parser.add_argument("--json", type=Path, help="where to write the row")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="tamba-convert-", dir=options.folder))
    try:
        size = make_teacher(work / "teacher", options.layers, options.dense)
        begun = time.perf_counter()
        found = measure(work / "teacher", work / "student")
        wall = time.perf_counter() - begun
    finally:
        shutil.rmtree(work, ignore_errors=True)
    row = {
        "row": "convert",
        "shape": f"Llama-3.1-8B, {options.layers} of 32 layers, bfloat16, every second to Mamba-2",
        "input": "random numbers" if options.dense else "holes",
        "teacher_gib": round(size / GiB, 2),
        **found,
        "process_seconds": round(wall, 1),
        "bar_gib": BAR_GIB,
        "within_bar": found["peak_gib"] <= BAR_GIB,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    print(json.dumps(row, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(row, indent=2) + "\n")
    return 0 if row["within_bar"] else 1


if __name__ == "__main__":
    sys.exit(main())
