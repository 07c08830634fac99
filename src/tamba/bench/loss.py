"""The rows `distill_loss`: what a step of distillation pays between the last norm and the gradient.

The floor is measured in the same run, in turns with the others: the products that nothing can
leave out (the teacher's logits, the student's, the gradient of what the student's head is given;
where the head learns, its gradient too), each in one call and on all positions, with nothing in
between. Extra memory is the peak above the arguments and results. Errors are to float64 on our
plain-torch path, which the tests hold to the definition; logits are bfloat16 on every side.

Shape letters: `n` positions, `D` d_model, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tamba.bench.kernels import OURS, Inputs, plain_torch, record_of
from tamba.bench.measure import (
    Bar,
    Times,
    clock_for,
    peak_of,
    poison,
    reason,
    relative_rms,
    take_turns,
)
from tamba.bench.peers import Peers, Refusal, Side
from tamba.ops.losses import Top, Weights, most_likely, next_token_loss

PRODUCTS = "products alone"
# Logits in bfloat16 are off by some thousandths of a nat, their gradient by a percent. A peer
# further off computes something else.
_BOUND, _PEER_BOUND = 2e-2, 1e-1
_ROUNDS = 10


@dataclass(frozen=True)
class LossRow:
    """One loss at one size.

    Args:
        id: ``distill_loss/what``.
        shape: ``n``, ``D`` and ``V``.
        device: where.
        weights: of the parts.
        peers: by name; each takes our argument names and gives the loss first.
        head_learns: whether the gradient of the head is part of the work.
        stored: whether the teacher is its `weights.top_k` most likely tokens, known beforehand.
        bars: what was asked for.
        rounds: most turns.
    """

    id: str
    shape: dict[str, int]
    device: torch.device
    weights: Weights
    peers: dict[str, Side] = field(default_factory=dict)
    head_learns: bool = False
    stored: bool = False
    bars: tuple[Bar, ...] = ()
    rounds: int = _ROUNDS

    def run(self, rounds: int, seed: int) -> dict[str, Any]:
        """Check, time and measure every side; the record says what each could not do."""
        rounds = min(rounds, self.rounds)
        inputs = self.make(seed)
        input_bytes = sum(t.nbytes for t in inputs.values())
        sides = {OURS: Side(lambda: self.loss), **self.peers}
        reports: dict[str, dict[str, Any]] = {name: {} for name in sides}
        want = self.truth(inputs)
        works: dict[str, Callable[[], Any]] = {}
        for name, side in sides.items():
            try:
                work = self.work(side.load(), inputs)
                reports[name] |= self._checked(work, want, again=name == OURS)
                if not reports[name]["error"] <= (_BOUND if name == OURS else _PEER_BOUND):
                    raise Refusal(f"wrong result: error {reports[name]['error']:.1e}")
                works[name] = work
            except Refusal as refusal:
                reports[name]["reason"] = str(refusal)
            except Exception as error:
                reports[name]["reason"] = reason(error)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        del want
        works[PRODUCTS] = self.products(inputs)
        clock = clock_for(self.device)
        taken = take_turns({name: [work] for name, work in works.items()}, clock, rounds)
        times = {name: Times.of(seconds, clock.name) for name, seconds in taken.items()}
        floor = times.pop(PRODUCTS).median
        for name, summary in times.items():
            reports[name] |= summary.microseconds()
        return record_of(self, reports, (floor, "products"), _BOUND, input_bytes, rounds)

    def make(self, seed: int) -> Inputs:
        """Arguments as they are early in training: logits of a few nats' spread on both sides."""
        random = torch.Generator(self.device).manual_seed(seed)
        n, d, words = (self.shape[name] for name in ("n", "D", "V"))

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=self.device)

        hidden, head = draw(n, d), draw(words, d).mul_(2.5 * d**-0.5).bfloat16()
        targets = torch.randint(words, (n,), generator=random, device=self.device)
        other = (hidden + 0.7 * draw(n, d)).bfloat16()
        found = {"hidden": hidden.bfloat16(), "head": head, "targets": targets}
        teacher_head = head.clone()
        if not self.stored:
            return found | {"teacher_hidden": other, "teacher_head": teacher_head}
        assert self.weights.top_k is not None
        top = most_likely(other, teacher_head, self.weights.top_k, self.weights.temperature)
        return found | dict(zip(("indices", "log_probs", "log_rest"), top, strict=True))

    def loss(self, **t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Ours."""
        top = None
        if self.stored:
            top = Top(t.pop("indices"), t.pop("log_probs"), t.pop("log_rest"))
        return next_token_loss(**t, teacher_top=top, weights=self.weights), None

    def truth(self, inputs: Inputs) -> list[Tensor]:
        """Loss and gradients in float64 on plain torch."""
        exact = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
        with plain_torch():
            return [t.detach() for t in self.work(self.loss, exact)()]

    def work(self, call: Callable[..., tuple[Tensor, Any]], inputs: Inputs) -> Callable[[], Any]:
        """The loss, and the gradients of what learns."""
        learns = ["hidden", "head"] if self.head_learns else ["hidden"]
        leaves = {n: t.detach().requires_grad_() if n in learns else t for n, t in inputs.items()}

        def both() -> list[Tensor]:
            loss, _ = call(**leaves)
            return [loss.detach(), *torch.autograd.grad(loss, [leaves[n] for n in learns])]

        return both

    def products(self, inputs: Inputs) -> Callable[[], Any]:
        """The products alone, into memory that is there."""
        hidden, head = inputs["hidden"], inputs["head"]
        logits = hidden @ head.mT
        grad = logits @ head
        grad_head = torch.empty_like(head) if self.head_learns else None
        teacher = torch.empty_like(logits) if "teacher_head" in inputs else None

        def run() -> None:
            if teacher is not None and self.weights.kl:
                torch.mm(inputs["teacher_hidden"], inputs["teacher_head"].mT, out=teacher)
            torch.mm(hidden, head.mT, out=logits)
            torch.mm(logits, head, out=grad)
            if grad_head is not None:
                torch.mm(logits.mT, hidden, out=grad_head)

        return run

    def _checked(
        self, work: Callable[[], Any], want: list[Tensor], *, again: bool
    ) -> dict[str, Any]:
        """Errors on poisoned memory, extra memory, and whether a second run gives the same bits."""
        got = work()  # compiles what there is to compile
        del got
        poison(self.device, 1 << 30)
        with peak_of(self.device) as peak:
            got = work()
        names = ["loss", "grad of hidden", "grad of head"][: len(want)]
        errors = {n: relative_rms(a, b) for n, a, b in zip(names, got, want, strict=True)}
        same = None
        if again:
            same = all(torch.equal(a, b) for a, b in zip(got, work(), strict=True))
        found: dict[str, Any] = {"error": max(errors.values()), "errors": errors}
        if self.device.type == "cuda":
            found["extra_bytes"] = max(0, peak.bytes - sum(t.nbytes for t in got))
        return found | {"repeatable": same}


LLAMA = {"n": 8192, "D": 4096, "V": 128_256}
SMOL = {"n": 8192, "D": 576, "V": 49_152}
PYTHIA = {"n": 8192, "D": 2048, "V": 50_277}


def rows(at: torch.device, peers: Peers) -> list[LossRow]:
    """Rows of a CUDA device; nothing on others, where training steps are measured whole."""
    if at.type != "cuda":
        return []
    kl = LossRow(
        "distill_loss/kl",
        LLAMA,
        at,
        Weights(),
        peers={
            "torch": peers.torch_loss(),
            "liger": peers.liger_loss(),
            "fla": peers.fla_loss(),
        },
        bars=(Bar("floor_share", 1 / 1.25), Bar("extra_mib", 400)),
    )
    both = Weights(kl=1.0, ce=0.5)
    return [
        kl,
        replace(
            kl, id="distill_loss/kl+ce", weights=both, peers={"torch": peers.torch_loss(ce=0.5)}
        ),
        replace(kl, id="distill_loss/kl-head", head_learns=True, bars=()),
        replace(
            kl,
            id="distill_loss/js",
            weights=Weights(divergence="js"),
            peers={"liger": peers.liger_loss(0.5)},
        ),
        replace(
            kl,
            id="distill_loss/reverse",
            weights=Weights(divergence="reverse"),
            peers={"liger": peers.liger_loss(1.0)},
        ),
        replace(kl, id="distill_loss/top64", weights=Weights(top_k=64), peers={}, bars=()),
        replace(
            kl,
            id="distill_loss/stored64",
            weights=Weights(top_k=64),
            peers={},
            bars=(),
            stored=True,
        ),
        replace(
            kl,
            id="distill_loss/ce",
            weights=Weights(kl=0.0, ce=1.0),
            peers={"liger": peers.liger_ce(), "cut_cross_entropy": peers.cut_cross_entropy()},
        ),
        replace(kl, id="distill_loss/kl-smollm2", shape=SMOL, bars=(), rounds=20),
        replace(kl, id="distill_loss/kl-pythia", shape=PYTHIA, bars=(), rounds=20),
    ]
