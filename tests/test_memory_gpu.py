"""The suite `memory` on a CUDA device, against the allocator asked by hand and the CPU."""

from __future__ import annotations

import gc

import pytest
import torch

from models import STACKS, tiny_model
from tamba.evaluate import memory, speed
from tamba.evaluate.measure import Models, Options, Request, Subject
from tamba.evaluate.memory import cache_bytes
from tamba.model.cache import TambaCache
from tamba.store import Store
from texts import byte_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PARTS = ("weights", "kv", "state", "activations", "logits")
BLOCK = 512
"""What the allocator rounds a tensor up to."""


@pytest.fixture(autouse=True)
def as_in_use():
    """Deterministic mode is the other tests' own: on CUDA it refuses ordinary operations."""
    torch.use_deterministic_algorithms(False)


def subject(stack, role="student", device="cuda", dtype=torch.float32):
    model = tiny_model(stack, dtype=dtype).to(device)
    return Subject(role, role, model, byte_tokenizer(), role, 100)


def rows_of(*subjects, **options):
    request = Request(
        "memory",
        (),
        {s.role: s.model.config for s in subjects},
        byte_tokenizer(),
        Options(**options),
    )
    return memory.prepare(request).run(Models(*subjects), lambda _: Store()).rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stack", sorted(STACKS))
def test_what_is_held_is_what_the_cpu_holds(stack, dtype):
    there = rows_of(subject(stack, dtype=dtype), contexts=(64, 300), batches=(1, 3))
    here = rows_of(subject(stack, device="cpu", dtype=dtype), contexts=(64, 300), batches=(1, 3))
    assert len(there) == 4
    for got, want in zip(there, here, strict=True):
        for key in ("context", "batch", "weights", "kv", "state", "logits", "floor"):
            assert got[key] == want[key], key
        config = tiny_model(stack).config
        size = cache_bytes(config, got["context"], bytes_per_value=dtype.itemsize)
        assert got["kv"] + got["state"] == got["batch"] * size


@pytest.mark.parametrize("stack", sorted(STACKS))
def test_parts_sum_to_the_peak_that_the_allocator_saw(stack):
    one = subject(stack)
    (row,) = rows_of(one, contexts=(512,), batches=(2,))
    assert sum(row[part] for part in PARTS) == row["peak"] and row["activations"] > 0
    assert row["peak"] >= row["floor"] and row["over_floor"] == row["peak"] / row["floor"]
    assert row["slack"] >= 0 and row["driver"] >= row["peak"]
    # The same pass by hand.
    ids = torch.randint(one.model.config.vocab_size, (2, 512), device="cuda")
    cache = TambaCache(one.model.config)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        hidden = one.model.model(input_ids=ids, past_key_values=cache).last_hidden_state
        one.model.lm_head(hidden[:, -1])
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - before
    assert row["peak"] - row["weights"] == pytest.approx(taken, rel=0.02, abs=64 * BLOCK)


def test_weights_are_what_loading_takes():
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    one = subject("mixed")
    taken = torch.cuda.memory_allocated() - before
    (row,) = rows_of(one, contexts=(8,))
    tensors = len(list(one.model.state_dict()))
    assert row["weights"] <= taken <= row["weights"] + 2 * BLOCK * tensors


def test_memory_that_a_layer_takes_for_a_while_shows_as_activations():
    """A planted 64 MiB inside the pass: a meter that looked only at its end would miss it."""
    one, extra = subject("mixed"), 64 * 2**20
    (plain,) = rows_of(one, contexts=(64,))

    def waste(*_):
        torch.empty(extra, dtype=torch.uint8, device="cuda")

    hook = one.model.model.layers[1].register_forward_hook(waste)
    (wasteful,) = rows_of(one, contexts=(64,))
    hook.remove()
    assert wasteful["activations"] - plain["activations"] == pytest.approx(extra, rel=0.1)
    assert all(wasteful[part] == plain[part] for part in PARTS if part != "activations")


def test_the_other_model_takes_no_room():
    student, teacher = subject("mamba2"), subject("attention", "teacher")
    (alone,) = rows_of(student, contexts=(256,))
    seen = []
    hook = student.model.model.register_forward_hook(
        lambda *_: seen.append(teacher.model.device.type)
    )
    rows = rows_of(student, teacher, contexts=(256,))
    hook.remove()
    assert set(seen) == {"cpu"}
    assert {k: rows[0][k] for k in PARTS} == {k: alone[k] for k in PARTS}
    # Both are back where they were.
    assert student.model.device.type == teacher.model.device.type == "cuda"


def test_running_out_of_memory_is_a_row_and_the_next_is_measured():
    one = subject("attention")
    _, total = torch.cuda.mem_get_info()
    try:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(256 * 2**20 / total)
        rows = rows_of(one, contexts=(64, 128), batches=(1, 200_000))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [row.get("note") for row in rows] == [None, "out of memory", None, "out of memory"]
    assert rows[2]["peak"] > 0


def test_speed_runs(monkeypatch):
    monkeypatch.setattr(speed, "REPEATS", 1)
    subjects = subject("mixed"), subject("attention", "teacher")
    request = Request(
        "speed",
        (),
        {s.role: s.model.config for s in subjects},
        byte_tokenizer(),
        Options(contexts=(64, 128)),
    )
    got = speed.prepare(request).run(Models(*subjects), lambda _: Store())
    assert len(got.rows) == 4
    assert all(row["decode_tokens_per_second"] > 0 for row in got.rows)
