"""Batched scores and answers equal those of one plain pass for each request."""

from __future__ import annotations

import random

import pytest
import torch

from compare import assert_same
from models import STACKS, VOCAB, tiny_model
from tamba import decoding
from tamba.decoding import decode
from tamba.evaluate import scoring
from tamba.evaluate.scoring import loglikelihoods


def questions(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Contexts with one to four continuations, some of which begin alike, and lone ones."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(1, VOCAB) for _ in range(rng.randrange(low, high))]

    pairs = []
    for _ in range(5):
        context, common = tokens(3, 14), tokens(0, 3)
        pairs += [(context, common + tokens(1, 5)) for _ in range(rng.randrange(1, 5))]
    pairs += [([3], [4]), ([3], [5]), (tokens(9, 10), [7]), ([3], [4])]
    rng.shuffle(pairs)
    return pairs


def scored(model, pairs, **options):
    found = {}
    for batch in loglikelihoods(model, pairs, **options):
        assert not found.keys() & batch.keys()
        found |= batch
    return [found[i] for i in range(len(pairs))]


@torch.no_grad()
def check_scores(model, pairs, sizes=(10_000,)):
    """Whatever the tokens at once."""
    totals, greedy = [], []
    for context, target in pairs:
        logp = model(torch.tensor([[*context, *target]])).logits[0].log_softmax(-1)
        places = torch.arange(len(context) - 1, len(context) + len(target) - 1)
        wanted = torch.tensor(target)
        totals.append(logp[places, wanted].sum())
        greedy.append(bool((logp[places].argmax(-1) == wanted).all()))
    for tokens_at_once in sizes:
        got = scored(model, pairs, tokens_at_once=tokens_at_once)
        found = torch.tensor([g.total for g in got], dtype=torch.float64)
        assert_same(found, torch.stack(totals), "fp64")
        assert [g.greedy for g in got] == greedy
        assert [g.tokens for g in got] == [len(target) for _, target in pairs]


@pytest.mark.parametrize("stack", sorted(STACKS))
def test_scores_equal_one_pass_each(stack):
    model = tiny_model(stack, dtype=torch.float64)
    pairs = questions()
    # What is likeliest must come up: greedy continuations of two contexts.
    for context, _ in list(pairs[:2]):
        ids = model.generate(torch.tensor([context]), max_new_tokens=2, do_sample=False)
        pairs.append((context, ids[0, len(context) :].tolist()))
    check_scores(model, pairs, (1, 40, 10_000))


def test_order_and_batches_change_nothing():
    model, pairs = tiny_model("mixed", dtype=torch.float64), questions()
    want = {
        (tuple(c), tuple(t)): r.total for (c, t), r in zip(pairs, scored(model, pairs), strict=True)
    }
    for tokens_at_once in (7, 64):
        pairs.reverse()
        got = scored(model, pairs, tokens_at_once=tokens_at_once)
        for (context, target), result in zip(pairs, got, strict=True):
            assert result.total == pytest.approx(want[tuple(context), tuple(target)], rel=1e-10)


FAULTS = {
    "one token too many is shared": lambda patch: patch(
        scoring, "_common", lambda a, b, most: min(most, genuine_common(a, b, most) + 1)
    ),
    "rows of the state mixed up": lambda patch: patch(
        scoring.TambaCache, "batch_select_indices", lambda self, i: genuine_select(self, i.flip(0))
    ),
    "scores read one place early": lambda patch: patch(
        scoring,
        "_pick",
        lambda hidden, at: genuine_pick(hidden, [(row, max(t - 1, 0)) for row, t in at]),
    ),
}
genuine_common, genuine_pick = scoring._common, scoring._pick
genuine_select = scoring.TambaCache.batch_select_indices


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_in_sharing_are_seen(fault, monkeypatch):
    FAULTS[fault](monkeypatch.setattr)
    with pytest.raises((AssertionError, RuntimeError)):
        check_scores(tiny_model("mixed", dtype=torch.float64), questions())


def test_beginnings_are_shared_where_it_pays(monkeypatch):
    seen = []

    def pass_by(module, args, kwargs):
        seen.append(kwargs["input_ids"].numel())

    model = tiny_model("mixed")
    model.model.register_forward_pre_hook(pass_by, with_kwargs=True)
    context = list(range(1, 41))
    scored(model, [(context, [k, k + 1]) for k in range(41, 45)])
    assert sum(seen) == 40 + 4 * 1  # the last token of a continuation is never put in
    seen.clear()
    scored(model, [(context, [41]), (context, [42])])
    assert sum(seen) == 40
    seen.clear()
    scored(model, [([1, 2, *range(9, 19)], [3]), ([1, 2, *range(20, 30)], [3])])
    assert sum(seen) == 24  # two common tokens are not worth a second pass


def test_long_contexts_lose_their_beginning():
    model, context = tiny_model("attention", dtype=torch.float64), list(range(1, 30))
    (got,) = scored(model, [(context, [30, 31])], max_length=8)
    (want,) = scored(model, [(context[-7:], [30, 31])])
    assert got == want


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="need a token each"):
        scored(tiny_model("attention"), [([1], [])])


def check_answers(model, prompts, sizes=(10_000,)):
    """Whatever the tokens at once."""
    want = {}
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        answer = model.generate(
            ids, max_new_tokens=6, do_sample=False, eos_token_id=5, pad_token_id=0
        )
        want[i] = answer[0, len(prompt) :].tolist()
    lengths = [6] * len(prompts)
    for tokens_at_once in sizes:
        got = {}
        for batch in decode(model, prompts, lengths, ends={5}, tokens_at_once=tokens_at_once):
            got |= batch
        assert got == want


@pytest.mark.parametrize(
    "stack", ["mixed", *(pytest.param(s, marks=pytest.mark.slow) for s in STACKS if s != "mixed")]
)
def test_answers_equal_stock_generation(stack):
    model = tiny_model(stack, dtype=torch.float64)
    prompts = [context for context, _ in questions()]
    check_answers(model, prompts, (1, 60, 10_000))


def test_padding_that_is_seen_shows(monkeypatch):
    genuine = decoding._next

    def unmasked(model, ids, mask, *rest):
        return genuine(model, ids, None, *rest)

    monkeypatch.setattr(decoding, "_next", unmasked)
    with pytest.raises(AssertionError):
        check_answers(tiny_model("mixed", dtype=torch.float64), [c for c, _ in questions()])


def test_answers_end_where_they_are_told():
    model = tiny_model("mixed", dtype=torch.float64)
    prompts = [[1, 2, 3], [4, 5], [6]]
    free, stopped = {}, {}
    for batch in decode(model, prompts, [8, 8, 0]):
        free |= batch
    for batch in decode(model, prompts, [8, 3, 0], stop=lambda i, t: i == 0 and len(t) == 2):
        stopped |= batch
    assert stopped == {0: free[0][:2], 1: free[1][:3], 2: []}
