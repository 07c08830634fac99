"""Whole models: a Mamba-2 prefill and a training step of a hybrid, beside transformers.

Weights are random at published dimensions, which is all that speed depends on. The peer stack on a
GPU is transformers' own model with mamba_ssm's Triton SSD and a Triton or CUDA convolution in place
of its plain-torch fallbacks; on a CPU it is transformers as it comes. MFU is the work of the matrix
products (and of attention and SSD) over the time and the machine's measured rate of bfloat16
products.

Shape letters: `B` batch, `L` length, `D` d_model.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tamba.bench.kernels import plain_torch
from tamba.bench.measure import (
    Bar,
    Times,
    clock_for,
    peak_of,
    reason,
    relative_rms,
    take_turns,
)
from tamba.bench.peers import Peers, Refusal, keep_share_of_configurations, tune_briefly
from tamba.model.config import (
    AttentionSpec,
    BlockSpec,
    Mamba2Spec,
    MLPSpec,
    NormSpec,
    TambaConfig,
)
from tamba.model.modeling import TambaForCausalLM
from tamba.ops.losses import next_token_loss

OURS, PEER = "ours", "transformers + mamba_ssm"
# Seconds; on a CPU a side that takes longer is timed by one step.
_PATIENCE = 20.0
# A deep stack of random layers in bfloat16 against float32.
_LOGITS_BOUND = 0.1


@dataclass(frozen=True)
class Sizes:
    """Dimensions of a hybrid; `n_attention` layers of softmax attention, evenly spread."""

    vocab: int
    d_model: int
    n_layers: int
    n_heads: int
    head_dim: int = 64
    d_state: int = 128
    d_mlp: int | None = None
    n_attention: int = 0
    attention_heads: int = 0
    kv_heads: int = 0

    @property
    def d_inner(self) -> int:
        return self.n_heads * self.head_dim

    def attention_layers(self) -> list[int]:
        """Indices, evenly spread; the first layer is a Mamba-2 layer."""
        if not self.n_attention:
            return []
        return [int((i + 0.5) * self.n_layers / self.n_attention) for i in range(self.n_attention)]

    def flops(self, batch: int, length: int, *, logits: int) -> float:
        """Of one forward pass: matrix products, attention's causal half, SSD in chunks of 256."""
        d, tokens = self.d_model, batch * length
        attention_dim = self.attention_heads * 64
        kv_dim = self.kv_heads * 64
        mamba = d * (2 * self.d_inner + 2 * self.d_state + self.n_heads) + self.d_inner * d
        ssd = 256 * self.d_state + 256 * self.d_inner + 4 * self.d_state * self.d_inner
        attention = d * (2 * attention_dim + 2 * kv_dim)
        mlp = 3 * d * (self.d_mlp or 0)
        n_mamba = self.n_layers - self.n_attention
        per_token = n_mamba * (2 * mamba + ssd) + self.n_layers * 2 * mlp
        per_token += self.n_attention * (2 * attention + 2 * length * attention_dim)
        return float(tokens * per_token + 2 * batch * logits * d * self.vocab)


MAMBA2_2_7B = Sizes(vocab=50288, d_model=2560, n_layers=64, n_heads=80)
HYBRID_1_3B = Sizes(
    vocab=32000,
    d_model=2048,
    n_layers=24,
    n_heads=64,
    d_mlp=5632,
    n_attention=12,
    attention_heads=32,
    kv_heads=8,
)


HYBRID_135M = Sizes(
    vocab=49152,
    d_model=576,
    n_layers=30,
    n_heads=9,
    d_state=64,
    d_mlp=1536,
    n_attention=15,
    attention_heads=9,
    kv_heads=3,
)


def our_model(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Random weights of ours at these sizes."""
    norm = NormSpec()
    mlp = None if sizes.d_mlp is None else MLPSpec(d_mlp=sizes.d_mlp)
    blocks = {
        "mamba2": BlockSpec(
            mixer=Mamba2Spec(
                n_heads=sizes.n_heads,
                head_dim=sizes.head_dim,
                d_state=sizes.d_state,
                n_groups=1,
                norm_groups=1,
            ),
            mlp=mlp,
            norm=norm,
        )
    }
    at = sizes.attention_layers()
    if at:
        blocks["attention"] = BlockSpec(
            mixer=AttentionSpec(
                n_heads=sizes.attention_heads,
                n_kv_heads=sizes.kv_heads,
                head_dim=64,
                rotary_dim=32,
            ),
            mlp=mlp,
            norm=norm,
        )
    config = TambaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.d_model,
        blocks=blocks,
        layers=["attention" if i in at else "mamba2" for i in range(sizes.n_layers)],
        residual_in_fp32=sizes.d_mlp is None,
        tie_word_embeddings=True,
        max_position_embeddings=1 << 20,
    )
    with device:
        return TambaForCausalLM._from_config(config, dtype=dtype)


def peer_model(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, peers: Peers | None
) -> nn.Module:
    """transformers' model of the same sizes, on the peers' kernels where there are peers.

    Raises:
        Refusal: a peer is missing.
    """
    common: dict[str, Any] = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.d_model,
        "num_hidden_layers": sizes.n_layers,
        "tie_word_embeddings": True,
    }
    if sizes.d_mlp is None:
        room, kind = "mamba2", "Mamba2"
        own: dict[str, Any] = {
            "num_heads": sizes.n_heads,
            "head_dim": sizes.head_dim,
            "state_size": sizes.d_state,
            "n_groups": 1,
            "expand": sizes.d_inner // sizes.d_model,
            "chunk_size": 256,
        }
    else:
        room, kind = "bamba", "Bamba"
        own = {
            "intermediate_size": sizes.d_mlp,
            "num_attention_heads": sizes.attention_heads,
            "num_key_value_heads": sizes.kv_heads,
            "attn_layer_indices": sizes.attention_layers(),
            "mamba_n_heads": sizes.n_heads,
            "mamba_d_head": sizes.head_dim,
            "mamba_n_groups": 1,
            "mamba_d_state": sizes.d_state,
            "mamba_expand": sizes.d_inner // sizes.d_model,
            "mamba_chunk_size": 256,
        }
    transformers = importlib.import_module("transformers")
    modeling = importlib.import_module(f"transformers.models.{room}.modeling_{room}")
    if peers is not None:
        put_in_kernels(modeling, peers)
    config = getattr(transformers, f"{kind}Config")(**common, **own)
    with device:
        return getattr(modeling, f"{kind}ForCausalLM")._from_config(config, dtype=dtype)


def put_in_kernels(modeling: ModuleType, peers: Peers) -> None:
    """Let a model file of transformers call mamba_ssm's SSD and a fast convolution."""
    for name in ("mamba2_chunk_scan", "causal_conv1d_fn"):
        if not hasattr(modeling, name):
            raise Refusal(f"this transformers has no {name} to replace")
    scan = peers.mamba_ssm("ops.triton.ssd_combined").mamba_chunk_scan_combined
    conv = _convolution(peers)
    allowed = {
        "D", "z", "dt_bias", "initial_states", "seq_idx", "dt_softplus", "dt_limit",
        "return_final_states",
    }  # fmt: skip

    def chunk_scan(*args: Any, **given: Any) -> Any:
        return scan(*args, **{name: v for name, v in given.items() if name in allowed})

    modeling.__dict__.update(mamba2_chunk_scan=chunk_scan, causal_conv1d_fn=conv)
    tune_briefly()


def _convolution(peers: Peers) -> Callable[..., Tensor]:
    """[B, C, T] as transformers has it: causal-conv1d's where it can be built, else fla's."""
    try:
        call = peers.cuda_conv().load()
    except Exception:
        call = peers.fla_conv().load()

    def conv(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **_: Any,
    ) -> Tensor:
        if activation != "silu":
            raise Refusal(f"no convolution with {activation}")
        y, _last = call(x=hidden_states.mT, weight=weight, bias=bias)
        return y.mT

    return conv


def _compile_peer(row: Prefill | TrainStep, part: int, parts: int) -> None:
    """Run a share of the peers' configurations at a row's sizes, in two layers of it."""
    sizes = replace(row.sizes, n_layers=2, n_attention=min(1, row.sizes.n_attention), vocab=512)
    model: Any = peer_model(sizes, row.device, torch.bfloat16, row.peers)
    keep_share_of_configurations(part, parts)
    # Beyond this the chunks of a sequence change no kernel.
    ids = torch.zeros(row.batch, min(row.length, 8192), dtype=torch.long, device=row.device)
    if isinstance(row, Prefill):
        _last_logits(model.eval(), ids)
    else:
        _hidden(model.train(), ids)[0].float().square().sum().backward()
    torch.cuda.synchronize()


@dataclass(frozen=True)
class Prefill:
    """One prompt through the whole stack to the logits of its last token, with a cache."""

    id: str
    sizes: Sizes
    batch: int
    length: int
    device: torch.device
    peers: Peers
    bars: tuple[Bar, ...] = (Bar("mfu", 0.6), Bar(f"times:{PEER}", 1.5))
    rounds: int = 10

    def run(
        self, ceilings: Mapping[str, Any], rounds: int | None = None, seed: int = 0
    ) -> dict[str, Any]:
        """Both sides, taking turns on the same prompts."""
        torch.manual_seed(seed)
        prompts = [
            torch.randint(0, self.sizes.vocab, (self.batch, self.length), device=self.device)
            for _ in range(2)
        ]
        models, sides = _both(self.sizes, self.device, self.peers)
        for name, model in models.items():
            model.eval()
            try:
                _last_logits(model, prompts[0])  # compile and tune
                with peak_of(self.device) as peak:
                    _last_logits(model, prompts[0])
                sides[name]["peak_bytes"] = peak.bytes
            except Exception as error:
                sides[name]["reason"] = reason(error)
        works = {
            name: [lambda m=model, p=p: _last_logits(m, p) for p in prompts]
            for name, model in models.items()
            if "reason" not in sides[name]
        }
        clock = clock_for(self.device)
        for name, taken in take_turns(works, clock, rounds or self.rounds).items():
            sides[name] |= Times.of(taken, clock.name).microseconds()
        off = math.inf
        if OURS in works:
            off = _against_plain_float32(models[OURS], prompts[0])
        flops = self.sizes.flops(self.batch, self.length, logits=1)
        return _record(self, sides, flops, self.batch * self.length, ceilings, off, _LOGITS_BOUND)


@dataclass(frozen=True)
class TrainStep:
    """A step of distillation: forward, KL to a frozen twin, backward, fused AdamW."""

    id: str
    sizes: Sizes
    batch: int
    length: int
    device: torch.device
    peers: Peers
    bars: tuple[Bar, ...] = (
        Bar("mfu", 0.45),
        Bar(f"times:{PEER}", 1.5),
        Bar("peak_over_peer", 0.6),
    )
    steps: int = 4

    def run(
        self, ceilings: Mapping[str, Any], rounds: int | None = None, seed: int = 0
    ) -> dict[str, Any]:
        """Each side alone on the card: ours, peer, peer, ours; `rounds` steps each time.

        A side that does not fit takes the batch in halves, quarters and so on; its record says so.
        """
        sides: dict[str, dict[str, Any]] = {OURS: {}, PEER: {}}
        taken: dict[str, list[float]] = {OURS: [], PEER: []}
        for name in (OURS, PEER, PEER, OURS):
            if "reason" in sides[name]:
                continue
            parts = sides[name].get("parts", 1)
            while parts <= self.batch:
                try:
                    found = self._train(name, parts, rounds or self.steps, seed)
                    break
                except torch.OutOfMemoryError:
                    parts *= 2
                except Exception as error:
                    found = {"reason": reason(error)}
                    break
                finally:
                    _free()
            else:
                found = {"reason": "failed: out of memory with one row at a time"}
            taken[name] += found.pop("seconds", [])
            sides[name] |= found
        for name, seconds in taken.items():
            if seconds:
                sides[name] |= Times.of(seconds, clock_for(self.device).name).microseconds()
        flops = 4 * self.sizes.flops(self.batch, self.length, logits=self.length)
        losses = [sides[OURS].get(key, math.nan) for key in ("loss", "loss_in_plain_torch")]
        off = abs(losses[0] - losses[1]) / abs(losses[1]) if losses[1] else math.nan
        return _record(self, sides, flops, self.batch * self.length, ceilings, off, 0.02)

    def _train(self, name: str, parts: int, steps: int, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        student, teacher = (self._model(name) for _ in range(2))
        teacher.eval().requires_grad_(False)
        student.train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)
        ids = torch.randint(0, self.sizes.vocab, (self.batch, self.length), device=self.device)
        found: dict[str, Any] = {"parts": parts}
        if name == OURS:
            with torch.no_grad(), plain_torch():
                plain = _distil(student, teacher, ids[:1])
            with torch.no_grad():
                found |= {
                    "loss": float(_distil(student, teacher, ids[:1])),
                    "loss_in_plain_torch": float(plain),
                }

        def step() -> None:
            for part in ids.chunk(parts):
                (_distil(student, teacher, part) / parts).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        step()
        clock = clock_for(self.device)
        with peak_of(self.device) as peak:
            found["seconds"] = [clock(step) for _ in range(steps)]
        found["peak_bytes"] = peak.total
        return found

    def _model(self, name: str) -> nn.Module:
        if name == OURS:
            return our_model(self.sizes, self.device, torch.bfloat16)
        return peer_model(self.sizes, self.device, torch.bfloat16, self.peers)


PEER_WIDE, PEER_SHORT = "transformers, float32", "transformers, bfloat16 autocast"


@dataclass(frozen=True)
class CpuTrainStep:
    """A step of distillation on a CPU: forward, KL to a frozen twin, backward, AdamW.

    Weights are float32 on all sides. Ours computes its products in bfloat16; so does one peer,
    under autocast, and the other computes in float32. Peers take the divergence as their users do,
    from whole logits.
    """

    id: str
    sizes: Sizes
    batch: int
    length: int
    bars: tuple[Bar, ...] = (
        Bar("mfu", 0.5),
        Bar(f"times:{PEER_WIDE}", 4.0),
        Bar(f"times:{PEER_SHORT}", 1.5),
    )
    rounds: int = 4

    def run(
        self, ceilings: Mapping[str, Any], rounds: int | None = None, seed: int = 0
    ) -> dict[str, Any]:
        """All sides in turns, on the same text."""
        device = torch.device("cpu")
        make = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.sizes.vocab, (self.batch, self.length), generator=make)
        sides: dict[str, dict[str, Any]] = {OURS: {}, PEER_WIDE: {}, PEER_SHORT: {}}
        torch.manual_seed(seed)
        student, teacher = (our_model(self.sizes, device, torch.float32) for _ in range(2))
        works = {OURS: _cpu_step(_distil, student, teacher, ids, short=True)}
        with torch.no_grad():
            want = _distil_whole(student, teacher, ids[:1])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                off = float((_distil(student, teacher, ids[:1]) - want).abs() / want)
        try:
            student, teacher = (
                peer_model(self.sizes, device, torch.float32, None) for _ in range(2)
            )
            for name in (PEER_WIDE, PEER_SHORT):
                short = name == PEER_SHORT
                works[name] = _cpu_step(_distil_whole, student, teacher, ids, short=short)
        except Exception as error:
            for name in (PEER_WIDE, PEER_SHORT):
                sides[name]["reason"] = reason(error)
        clock = clock_for(device)
        turns = take_turns(
            {name: [work] for name, work in works.items()},
            clock,
            rounds or self.rounds,
            warm_up=1,
            patience=_PATIENCE,
        )
        for name, taken in turns.items():
            sides[name] |= Times.of(taken, clock.name).microseconds()
        flops = 4 * self.sizes.flops(self.batch, self.length, logits=self.length)
        rate = {"used": {"flops": _bfloat16_products()}}
        return _record(self, sides, flops, self.batch * self.length, rate, off, 0.02)


def _cpu_step(
    loss: Callable[[nn.Module, nn.Module, Tensor], Tensor],
    student: nn.Module,
    teacher: nn.Module,
    ids: Tensor,
    *,
    short: bool,
) -> Callable[[], None]:
    """One step of AdamW, its products in bfloat16 if `short`."""
    teacher.eval().requires_grad_(False)
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=short):
            value = loss(student, teacher, ids)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _distil_whole(student: nn.Module, teacher: nn.Module, ids: Tensor) -> Tensor:
    """The same divergence from all logits at once."""
    with torch.no_grad():
        log_p = teacher(ids, use_cache=False).logits.flatten(0, 1).float().log_softmax(-1)
    log_q = student(ids, use_cache=False).logits.flatten(0, 1).float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _bfloat16_products(n: int = 2048, tries: int = 7) -> float:
    """Operations a second of a large bfloat16 product on this CPU, at best."""
    a, b = (torch.randn(n, n).bfloat16() for _ in range(2))
    clock = clock_for(torch.device("cpu"))
    return 2.0 * n**3 / min(clock(lambda: a @ b) for _ in range(tries))


Row = Prefill | TrainStep | CpuTrainStep


def rows(at: torch.device, peers: Peers) -> list[Row]:
    """The suite of a device."""
    if at.type != "cuda":
        return [CpuTrainStep("cpu_train_step/hybrid-135m-B4-L512", HYBRID_135M, 4, 512)]
    return [
        Prefill("prefill_e2e/mamba2-2.7b-L8192", MAMBA2_2_7B, 1, 8192, at, peers),
        Prefill("prefill_e2e/mamba2-2.7b-L65536", MAMBA2_2_7B, 1, 65536, at, peers, rounds=4),
        TrainStep("train_step_gpu/hybrid-1.3b-B8-L2048", HYBRID_1_3B, 8, 2048, at, peers),
    ]


def _both(
    sizes: Sizes, device: torch.device, peers: Peers
) -> tuple[dict[str, nn.Module], dict[str, dict[str, Any]]]:
    models: dict[str, nn.Module] = {}
    sides: dict[str, dict[str, Any]] = {OURS: {}, PEER: {}}
    models[OURS] = our_model(sizes, device, torch.bfloat16)
    try:
        models[PEER] = peer_model(sizes, device, torch.bfloat16, peers)
    except Refusal as refusal:
        sides[PEER]["reason"] = str(refusal)
    except Exception as error:
        sides[PEER]["reason"] = reason(error)
    return models, sides


@torch.no_grad()
def _last_logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, use_cache=True, logits_to_keep=1).logits
    return logits


def _against_plain_float32(model: nn.Module, ids: Tensor) -> float:
    """Last logits against the same weights in float32 on plain-torch operators."""
    got = _last_logits(model, ids)
    wide = copy.deepcopy(model).float()
    with plain_torch():
        want = _last_logits(wide, ids)
    del wide
    return relative_rms(got, want)


def _distil(student: nn.Module, teacher: nn.Module, ids: Tensor) -> Tensor:
    """KL of next-token distributions in chunks of positions, the same code for both sides."""
    hidden, head = _hidden(student, ids)
    with torch.no_grad():
        teacher_hidden, teacher_head = _hidden(teacher, ids)
    return next_token_loss(
        hidden.flatten(0, 1),
        head,
        teacher_hidden=teacher_hidden.flatten(0, 1),
        teacher_head=teacher_head,
    )


def _hidden(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    body = model.get_submodule(model.base_model_prefix)
    return body(ids, use_cache=False).last_hidden_state, model.lm_head.weight


def _free() -> None:
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def _record(
    row: Row,
    sides: dict[str, dict[str, Any]],
    flops: float,
    tokens: int,
    ceilings: Mapping[str, Any],
    error: float,
    bound: float,
) -> dict[str, Any]:
    ours = sides[OURS]
    peers = {name: side for name, side in sides.items() if name != OURS}
    us = ours.get("us")
    void = None
    if us is None:
        void = ours.get("reason", "not timed")
    elif not error <= bound:
        void = f"wrong result: relative error {error:.1e}"
    for side in sides.values():
        if "us" in side:
            side["tokens_per_second"] = tokens / side["us"] * 1e6
            side["mfu"] = flops / (side["us"] / 1e6) / ceilings["used"]["flops"]
    floor = 1e6 * flops / ceilings["used"]["flops"]
    peaks = [side.get("peak_bytes") for side in (ours, *peers.values())]
    record: dict[str, Any] = {
        "id": row.id,
        "shape": {"B": row.batch, "L": row.length},
        "floor_us": floor,
        "floor_of": "flops",
        "ours_us": us,
        "ours_p20_us": ours.get("p20_us"),
        "ours_p80_us": ours.get("p80_us"),
        "floor_share": None if us is None else floor / us,
        "peers": {n: side.get("us", side.get("reason", "not timed")) for n, side in peers.items()},
        "ratios": {n: side["us"] / us for n, side in peers.items() if us and "us" in side},
        "tokens_per_second": ours.get("tokens_per_second"),
        "mfu": ours.get("mfu"),
        "error": error if math.isfinite(error) else None,
        "error_bound": bound,
        "void": void,
        "extra_bytes": ours.get("peak_bytes"),
        "input_bytes": None,
        "extra_over_inputs": None,
        "peak_over_peer": peaks[0] / peaks[1] if peaks[0] and peaks[1] else None,
        "repeatable": None,
        "sides": sides,
    }
    record["bars"] = [bar.judge(record) for bar in row.bars]
    return record


def _compile_share(folder: Path | None, ids: str, part: int, parts: int) -> None:
    """One of the processes that compile the peers' configurations beforehand."""
    for row in rows(torch.device("cuda"), Peers(folder, may_build=False)):
        if row.id in ids.split(",") and not isinstance(row, CpuTrainStep):
            with contextlib.suppress(Exception):  # the run itself says why
                _compile_peer(row, part, parts)
            _free()


if __name__ == "__main__":
    _folder = None if sys.argv[1] == "-" else Path(sys.argv[1])
    _compile_share(_folder, sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
