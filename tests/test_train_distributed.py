"""Several processes train as one does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tamba
from test_train import prepare, run_training

STAGES = """
[[train]]
stage = "align"
tokens = 256
batch = 4
lr = 1e-3
dtype = "float32"
compile = false
[[train]]
stage = "distil"
tokens = 512
batch = 4
micro_batch = 1
lr = 1e-3
lr_pretrained = 1e-4
train = "all"
ce = 0.5
ema = 0.5
dtype = "float32"
compile = false
replacement = "one_by_one"
[[train]]
stage = "distil"
tokens = 128
batch = 4
lr = 1e-3
dtype = "float32"
compile = false
"""
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


WORK = """
import os, signal, sys
from pathlib import Path
import torch
import tamba
from tamba.train import engine, trainer

torch.use_deterministic_algorithms(not torch.cuda.is_available())
save = engine.Engine._save_checkpoint

def and_die(self, *args):
    save(self, *args)
    if self.stage.stage == "distil" and self.state.global_step == 3:
        self.accelerator.wait_for_everyone()
        os.kill(os.getpid(), signal.SIGKILL)

if "dies" in sys.argv:
    trainer.KEEP_SECONDS = 0.0
    engine.Engine._save_checkpoint = and_die
here = Path(sys.argv[1])
tamba.train(here / "recipe.toml", here / sys.argv[2], student=here / "built", text=here / "text")
"""


def launched(folder: Path, out: str, told: dict[str, str], *, dies: bool = False) -> None:
    """Training in two processes, told what `torchrun` tells; or until both are killed."""
    script = folder / "work.py"
    script.write_text(WORK)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    told = told | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    told |= {"PYTHONPATH": str(Path(tamba.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(script), str(folder), out, *(["dies"] if dies else [])],
            env={**os.environ, **told, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate()[1] for process in running]
    want = -signal.SIGKILL if dies else 0
    assert all(process.returncode == want for process in running), "\n\n".join(said)


def check_processes(folder: Path, told: dict[str, str], *, dies: bool = False) -> None:
    prepare(folder, STAGES)
    if dies:
        launched(folder, "two", told, dies=True)
        assert list((folder / ".two.stages").glob("*-1/checkpoint-3"))
    launched(folder, "two", told)
    run_training(folder, "one")
    curves = [
        [stage["losses"] for stage in json.loads((folder / n / "train.json").read_text())["stages"]]
        for n in ("one", "two")
    ]
    for want, got in zip(*curves, strict=True):
        assert [t for t, _ in got] == [t for t, _ in want]
        assert [v for _, v in got] == pytest.approx([v for _, v in want], rel=1e-3)
    want, got = (load_file(folder / n / "model.safetensors") for n in ("one", "two"))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    check_processes(tmp_path, {})


@pytest.mark.slow
def test_shared_out_and_killed_they_train_as_one(tmp_path: Path) -> None:
    check_processes(tmp_path, FSDP, dies=True)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("told", [{}, FSDP], ids=["replicated", "sharded"])
def test_two_devices_train_as_one(tmp_path: Path, told: dict[str, str]) -> None:
    torch.use_deterministic_algorithms(False)
    check_processes(tmp_path, told)
