"""Several processes train as one does."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tamba
from models import tiny_model
from tamba.text import RecipeText
from tamba.train.pieces import rows_of_step
from test_train import prepare, rows, run_training

STAGES = """
[[train]]
stage = "align"
tokens = 256
batch = 4
lr = 1e-3
checkpointing = true
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
from tamba.train import trainer

torch.use_deterministic_algorithms(not torch.cuda.is_available())
save = trainer.StageTrainer._save_checkpoint

def and_die(self, *args):
    save(self, *args)
    if [self.kind, str(self.state.global_step)] == sys.argv[3:]:
        self.accelerator.wait_for_everyone()
        os.kill(os.getpid(), signal.SIGKILL)

if len(sys.argv) > 3:
    trainer.KEEP_SECONDS = 0.0
    trainer.StageTrainer._save_checkpoint = and_die
here = Path(sys.argv[1])
tamba.train(here / "recipe.toml", here / sys.argv[2], student=here / "built", text=here / "text")
"""


def launched(
    folder: Path, script: str, told: dict[str, str], *arguments: str, seconds: float = 300.0
) -> list[tuple[int, str, str]]:
    """A script in two processes, told what `torchrun` tells: exit status, output and errors."""
    path = folder / "work.py"
    path.write_text(script)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    told = told | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    told |= {"PYTHONPATH": str(Path(tamba.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(path), str(folder), *arguments],
            env={**os.environ, **told, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said = [process.communicate(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
    return [(one.returncode, *words) for one, words in zip(running, said, strict=True)]


def train(folder: Path, out: str, told: dict[str, str], *dies: str) -> None:
    """Training in two processes, or until both are killed after a step of a stage."""
    found = launched(folder, WORK, told, out, *dies)
    want = -signal.SIGKILL if dies else 0
    assert all(status == want for status, *_ in found), "\n\n".join(e for *_, e in found)


def check_processes(folder: Path, told: dict[str, str], *dies: str) -> None:
    """Two processes come to what one comes to; killed between, too."""
    if dies:
        train(folder, "two", told, *dies)
        assert list((folder / ".two.stages").glob(f"*-1/checkpoint-{dies[1]}"))
    train(folder, "two", told)
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
    prepare(tmp_path, STAGES.replace("lr = 1e-3", "lr = 1e-3\nmixing = 0.5", 1))
    check_processes(tmp_path, {})


@pytest.mark.slow
def test_shared_out_and_killed_they_train_as_one(tmp_path: Path) -> None:
    prepare(tmp_path, STAGES)
    check_processes(tmp_path, FSDP, "distil", "3")


TALKS = """
name = "talks"
teacher.path = "teacher"
build.plan = ["keep 0", "convert 1"]
output.report_to = []
[[train]]
stage = "sft"
data = ["chats.jsonl"]
packed = true
[[train]]
stage = "dpo"
data = ["pairs.jsonl"]
reference = "student"
[[train]]
stage = "dpo"
data = ["pairs.jsonl"]
[[train]]
stage = "sft"
data = ["chats.jsonl"]
kl = 1.0
""".replace("data =", 'steps = 4\nbatch = 4\nmicro_batch = 1\nlr = 1e-3\ndtype = "float32"\ndata =')


def prepare_talks(folder: Path, recipe: str) -> None:
    chats = pytest.importorskip("test_train_chat")
    tiny_model(["attention"] * 2, vocab_size=257).save_pretrained(folder / "teacher")
    chats.tokenizer().save_pretrained(folder / "teacher")
    chats.write_rows(folder / "chats.jsonl", chats.rows(8))
    chats.write_rows(folder / "pairs.jsonl", chats.pairs(8))
    (folder / "recipe.toml").write_text(recipe)
    RecipeText(rows(), None).save(folder / "text")
    tamba.build(folder / "recipe.toml", folder / "built")


@pytest.mark.slow
@pytest.mark.parametrize("told", [{}, FSDP], ids=["replicated", "sharded"])
def test_two_processes_converse_as_one(tmp_path: Path, told: dict[str, str]) -> None:
    """Killed in the second stage; the references are the student itself and a teacher in use."""
    prepare_talks(tmp_path, TALKS)
    check_processes(tmp_path, told, "dpo", "2")


ANSWERS = """
name = "answers"
teacher.path = "teacher"
build.plan = ["keep 0", "convert 1"]
output.report_to = []
[[train]]
stage = "on_policy"
data = ["chats.jsonl"]
steps = 2
batch = 4
micro_batch = 1
length = 64
new_tokens = 12
lr = 1e-3
dtype = "bfloat16"
"""
ENDS = """
import os, sys
from transformers.generation import utils
from tamba.model.modeling import TambaForCausalLM

right = TambaForCausalLM.generate
last = 1 if os.environ["RANK"] == "0" else 12

def generate(self, *args, **options):
    options["generation_config"].max_new_tokens = last
    return right(self, *args, **options)

TambaForCausalLM.generate = generate
if "alone" in sys.argv:
    utils.is_fsdp_managed_module = lambda _: False
    del sys.argv[3]
"""


def check_answers(folder: Path, told: dict[str, str], *more: str) -> None:
    """The answers of one process are shorter than those of the other."""
    prepare_talks(folder, ANSWERS)
    found = launched(folder, ENDS + WORK, told, "two", *more, seconds=50 if more else 100)
    assert [status for status, *_ in found] == [0, 0], "\n\n".join(e for *_, e in found)
    stage = json.loads((folder / "two" / "train.json").read_text())["stages"][0]
    assert stage["skipped"] == 0 and len(stage["losses"]) == 2
    kept = load_file(folder / "two" / "model.safetensors")
    assert {t.dtype for t in kept.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("told", [{}, FSDP], ids=["replicated", "sharded"])
def test_processes_whose_answers_end_apart_wait(tmp_path: Path, told: dict[str, str]) -> None:
    check_answers(tmp_path, told)


@pytest.mark.slow
def test_processes_that_do_not_wait_are_seen(tmp_path: Path) -> None:
    with pytest.raises((AssertionError, subprocess.TimeoutExpired)):
        check_answers(tmp_path, FSDP, "alone")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("told", [{}, FSDP], ids=["replicated", "sharded"])
def test_two_devices_train_as_one(tmp_path: Path, told: dict[str, str]) -> None:
    torch.use_deterministic_algorithms(False)
    prepare(tmp_path, STAGES)
    check_processes(tmp_path, told)


# Where one process fails.

FAILS = """
import json, os, sys
from pathlib import Path
from unittest import mock
import torch
from torch.distributed.checkpoint import FileSystemWriter
import tamba
from tamba.checkpoint import CheckpointWriter
from tamba.errors import UserError
from tamba.train import memory, objectives, teacher, trainer

here, rank = Path(sys.argv[1]), int(os.environ["RANK"])
trainer.KEEP_SECONDS = 0.0


def full(place, name, here=lambda *args: True, on=0):
    right = getattr(place, name)

    def wrong(*args, **told):
        if rank == on and here(*args):
            raise OSError(28, "No space left on device")
        return right(*args, **told)

    return mock.patch.object(place, name, wrong)


def at(*steps):
    return lambda *args: any(f"checkpoint-{n}" in str(a) for a in args for n in steps)


right = objectives.next_token_loss
none = mock.patch.object(
    objectives, "next_token_loss", lambda *a, **k: right(*a, **k) * float("nan")
)
faults = {
    "checkpoint": [full(trainer, "save_file", at(3))],
    "the other's": [full(torch, "save", at(3), on=1)],
    "shards": [full(FileSystemWriter, "write_data", on=1)],
    "stage": [full(memory, "save_file", lambda t, path, **k: "stages" in Path(path).name)],
    "store": [full(teacher, "save_file")],
    "output": [full(CheckpointWriter, "write")],
    "no number": [none],
    "no number, no room": [none, full(trainer, "write_tensors")],
}
if "alone" in sys.argv:
    memory.from_all = lambda mine: [mine]
for name in sys.argv[2].split(";"):
    out = name.replace(" ", "-")
    with mock.patch.object(trainer, "MOST_SKIPPED", 3):
        for patch in faults[name]:
            patch.start()
        try:
            recipe = here / ("stored.toml" if name == "store" else "recipe.toml")
            tamba.train(recipe, here / out, student=here / "built", text=here / "text")
        except UserError as error:
            print(json.dumps([name, str(error)]), flush=True)
        for patch in faults[name]:
            patch.stop()
"""
ONE_STAGE = """
[[train]]
stage = "distil"
tokens = 320
batch = 4
micro_batch = 1
lr = 1e-3
dtype = "float32"
compile = false
top_k = 9
"""
ROOM = r"cannot be written \(.*No space left on device.*\); free some room on the disk"
NAN = r"train: distil: no loss or gradient was a number in 3 steps, up to step 3; lower the "


def check_failures(folder: Path, told: dict[str, str], wanted: dict[str, str], *more: str) -> None:
    """Both processes say the same of each fault."""
    path = prepare(folder, ONE_STAGE)
    (folder / "stored.toml").write_text(path.read_text() + 'stored = "top"\n')
    found = launched(folder, FAILS, told, ";".join(wanted), *more, seconds=120)
    said = [
        [json.loads(line) for line in out.splitlines() if line[:2] == '["'] for _, out, _ in found
    ]
    assert said[0] == said[1], found
    assert [status for status, *_ in found] == [0, 0], found
    assert [name for name, _ in said[0]] == list(wanted)
    for name, message in said[0]:
        assert re.search(wanted[name], message), (name, message)


@pytest.mark.slow
def test_where_one_process_cannot_write_all_stop(tmp_path: Path) -> None:
    wanted = {
        "checkpoint": ROOM,
        "the other's": ROOM,
        "stage": ROOM,
        "store": "not enough room on disk|" + ROOM,
        "output": "room",
        "no number": NAN + r"learning rate; the last batch is in .*not-a-number-3.safetensors$",
        "no number, no room": NAN + r"learning rate; the last batch is not kept: .*No space left",
    }
    check_failures(tmp_path, {}, wanted)
    for name in ("checkpoint", "the-other's"):
        left = [p.name for p in (tmp_path / f".{name}.stages").glob("*/*")]
        assert left == ["checkpoint-2"], name
    assert not any((tmp_path / name.replace(" ", "-")).exists() for name in wanted)
    assert not (tmp_path / "top").exists()
    # The rows of both, not of the first alone.
    kept = load_file(tmp_path / ".no-number.stages" / "not-a-number-3.safetensors")
    some = rows_of_step(len(rows()), 4, 2, 0)
    assert kept["rows"].tolist() == some.tolist()
    assert torch.equal(kept["tokens"], rows().tokens[some].long())
    # What was left is enough to go on from.
    train(tmp_path, "checkpoint", {})
    run_training(tmp_path, "one")
    want, got = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "checkpoint"))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_where_one_process_cannot_write_its_shards_all_stop(tmp_path: Path) -> None:
    check_failures(tmp_path, FSDP, {"shards": ROOM, "stage": ROOM})


@pytest.mark.slow
def test_a_process_that_stops_alone_is_seen(tmp_path: Path) -> None:
    with pytest.raises((AssertionError, subprocess.TimeoutExpired)):
        check_failures(tmp_path, {}, {"checkpoint": ROOM}, "alone")
