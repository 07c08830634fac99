"""Row `train_step_gpu`: tokens a second of a distil step, the frozen teacher included.

    python benchmarks/train_step.py [--size 1.3b] [--batch 8] [--length 2048] [--steps 12]
    torchrun --nproc-per-node 2 benchmarks/train_step.py --batch 16
    accelerate launch --num_processes 2 --use_fsdp --fsdp_version 2 --mixed_precision no \\
        --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP benchmarks/train_step.py --batch 16

Models are random: every second layer of the student is a Mamba-2 converted from attention. The
steps are those of `tamba train` (`run_steps`), whatever launched them; the first six are left out.
A step's work is counted as products of matrices: 2 operations a weight and token for each of a
forward pass, the gradient of what goes in, and the gradient of a weight that moves.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from typing import Any

import torch
from accelerate import PartialState

from tamba.artefact import command_without_folders, versions
from tamba.data import TokenBlocks
from tamba.model.config import AttentionSpec, BlockSpec, MLPSpec, TambaConfig
from tamba.model.modeling import TambaForCausalLM
from tamba.plan import ConvertOptions
from tamba.recipe import Distil
from tamba.surgery import convert_layer
from tamba.train import distil, trained_parameters
from tamba.train.engine import Engine

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"d": 64, "layers": 4, "heads": 4, "kv": 2, "mlp": 128, "vocab": 512},
    "135m": {"d": 576, "layers": 30, "heads": 9, "kv": 3, "mlp": 1536, "vocab": 49152},
    "1.3b": {"d": 2048, "layers": 24, "heads": 32, "kv": 8, "mlp": 5632, "vocab": 50304},
}
LEFT_OUT = 6
PEAK = 989e12
"""bfloat16 operations a second of an H100 or H200, as its maker says."""


def make(size: dict[str, int], device: torch.device) -> TambaForCausalLM:
    head = size["d"] // size["heads"]
    attention = AttentionSpec(
        n_heads=size["heads"], n_kv_heads=size["kv"], head_dim=head, rotary_dim=head
    )
    config = TambaConfig(
        vocab_size=size["vocab"],
        hidden_size=size["d"],
        blocks={"attention": BlockSpec(mixer=attention, mlp=MLPSpec(d_mlp=size["mlp"]))},
        layers=["attention"] * size["layers"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return TambaForCausalLM(config).to(device, torch.bfloat16)


def operations(student: TambaForCausalLM, teacher: TambaForCausalLM, length: int) -> float:
    """Of products of matrices, a token."""
    total = 0.0
    for model, trains in ((teacher, False), (student, True)):
        for name, p in model.named_parameters():
            if p.dim() == 2 and "embed" not in name:
                total += p.numel() * (2 + 2 * trains + 2 * (trains and p.requires_grad))
        if model.config.tie_word_embeddings:
            total += model.lm_head.weight.numel() * (2 + 2 * trains + 2 * trains)
        for spec in model.config.block_specs:
            if isinstance(spec.mixer, AttentionSpec):
                width = spec.mixer.n_heads * spec.mixer.head_dim
                total += 2 * length * width * (1 + 2.5 * trains)  # half of the places are seen
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1.3b")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step, over all processes")
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--train", default="all")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--compile", choices=["auto", "no"], default="auto")
    parser.add_argument("--graphs", choices=["auto", "no"], default="auto")
    parser.add_argument("--documents", type=int, help="tokens of one, on average; whole rows")
    told = parser.parse_args()
    processes = PartialState(cpu=not torch.cuda.is_available())
    device = processes.device
    size = SIZES[told.size]
    teacher, student = make(size, device), make(size, device)
    made = list(range(0, size["layers"], 2))
    options = ConvertOptions(mixer="mamba2", conv_activation="silu", gate="random", norm="head")
    for i in made:
        layer = convert_layer(student.model.layers[i], student.config, options, i)
        student.model.layers[i] = layer.to(device, torch.bfloat16)
    names = trained_parameters([n for n, _ in student.named_parameters()], made, told.train)
    for name, p in student.named_parameters():
        p.requires_grad_(name in names)
        if name in names:
            p.data = p.data.float()
    needed = operations(student, teacher, told.length)
    n_parameters = sum(p.numel() for p in student.parameters())
    generator = torch.Generator().manual_seed(0)
    shape = (2 * told.batch, told.length)
    tokens = torch.randint(size["vocab"], shape, generator=generator, dtype=torch.int32)
    starts = torch.zeros(shape, dtype=torch.bool)
    if told.documents:
        starts = torch.rand(shape, generator=generator) < 1 / told.documents
    starts[:, 0] = True
    stage = Distil(
        stage="distil",
        tokens=told.steps * told.batch * told.length,
        batch=told.batch,
        micro_batch=told.micro_batch,
        lr=1e-5,
        checkpointing=told.checkpointing,
        compile="auto" if told.compile == "auto" else False,
        graphs="auto" if told.graphs == "auto" else False,
    )
    times: list[float] = []
    note = Engine.note

    def timed(self: Engine) -> None:
        note(self)
        times.append(time.perf_counter())

    Engine.note = timed  # type: ignore[method-assign]
    log = distil(student, teacher, names, TokenBlocks(tokens, starts, tokens.numel()), stage)
    seconds = (times[-1] - times[LEFT_OUT - 1]) / (len(times) - LEFT_OUT)
    rate = told.batch * told.length / seconds
    row: dict[str, Any] = {
        "name": "train_step_gpu",
        "parameters": n_parameters,
        "processes": processes.num_processes,
        "sharded": os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true",
        "told": vars(told),
        "seconds_a_step": seconds,
        "tokens_per_second": rate,
        "losses": [log.losses[0][1], log.losses[-1][1]],
        "command": command_without_folders("python benchmarks/train_step.py", sys.argv[1:]),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if device.type == "cuda":
        row["hardware"] = torch.cuda.get_device_name()
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        row["mfu"] = rate * needed / PEAK / processes.num_processes
    if processes.is_main_process:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
