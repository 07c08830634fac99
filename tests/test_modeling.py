"""A pass may be cut, padded, packed, beamed and rolled back in any way: the logits stay the same.

The independent truth is a single pass over one unpadded document without a cache.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import tamba  # noqa: F401  (registers the Auto classes)
from compare import assert_same
from models import STACKS, VOCAB, random_ids, tiny_model
from tamba.errors import UserError
from tamba.model import attention, modeling
from tamba.model.cache import RecurrentLayer, TambaCache
from tamba.model.config import TambaConfig
from tamba.model.modeling import TambaForCausalLM
from tamba.model.tokens import restart_positions, segments

STACK_NAMES = sorted(STACKS)


@torch.no_grad()
def logits_of(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def splits(length: int):
    yield [1] * length
    yield [length - 1, 1]
    yield [3, 7, 2, 1, length - 13]
    yield [2, length - 2]


@pytest.mark.parametrize("stack", STACK_NAMES)
def test_any_split_equals_one_pass(stack):
    model, ids = tiny_model(stack), random_ids(2, 21)
    want = logits_of(model, ids)
    for sizes in splits(21):
        cache, got = TambaCache(model.config), []
        for piece in ids.split(sizes, dim=1):
            got.append(logits_of(model, piece, past_key_values=cache))
        assert_same(torch.cat(got, dim=1), want, "decode")
        assert cache.get_seq_length() == 21


@pytest.mark.parametrize("stack", STACK_NAMES)
@pytest.mark.parametrize("make", [lambda c: DynamicCache(config=c), lambda c: DynamicCache()])
def test_stock_caches_work(stack, make):
    model, ids = tiny_model(stack), random_ids(2, 12)
    cache = make(model.config)
    got = torch.cat(
        [logits_of(model, p, past_key_values=cache) for p in ids.split([5, 4, 1, 2], 1)], 1
    )
    assert_same(got, logits_of(model, ids), "decode")


def test_static_cache_works():
    model, ids = tiny_model(["mamba2_gqa", "attention", "mamba1"]), random_ids(2, 12)
    cache = StaticCache(config=model.config, max_cache_len=16)
    got = torch.cat(
        [logits_of(model, p, past_key_values=cache) for p in ids.split([5, 4, 1, 2], 1)], 1
    )
    assert_same(got, logits_of(model, ids), "decode")


def padded_batch(lengths, side, extra_seed=0):
    """Rows of different length in one batch, with rubbish under the padding."""
    longest = max(lengths)
    ids = random_ids(len(lengths), longest, seed=99 + extra_seed)
    mask = torch.zeros_like(ids)
    rows = [random_ids(1, n, seed=n)[0] for n in lengths]
    for b, row in enumerate(rows):
        if side == "left":
            places = torch.arange(longest - len(row), longest)
        elif side == "right":
            places = torch.arange(len(row))
        else:  # scattered
            chosen = torch.randperm(longest, generator=torch.Generator().manual_seed(b))[: len(row)]
            places = chosen.sort().values
        ids[b, places], mask[b, places] = row, 1
    return ids, mask, rows


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
@pytest.mark.parametrize("stack", STACK_NAMES)
def test_padding_touches_nothing(stack, side):
    model = tiny_model(stack)
    if stack in ("sliding", "mixed") and side == "scattered":
        pytest.skip(
            "a sliding window counts places, not tokens, so holes move it (as in transformers)"
        )
    ids, mask, rows = padded_batch([11, 3, 8, 1], side)
    got = logits_of(model, ids, attention_mask=mask)
    assert got.isfinite().all()
    for b, row in enumerate(rows):
        assert_same(got[b, mask[b].bool()], logits_of(model, row[None])[0], "decode")


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("stack", ["attention", "mamba1", "mamba2"])
def test_continuing_a_padded_batch(stack, side, with_mask):
    model = tiny_model(stack)
    ids, mask, rows = padded_batch([9, 2, 5], side)
    more, more_mask, more_rows = padded_batch([3, 1, 4], side, extra_seed=7)
    cache = TambaCache(model.config)
    logits_of(model, ids, attention_mask=mask, past_key_values=cache)
    full = torch.cat([mask, more_mask], dim=1)
    got = logits_of(
        model, more, attention_mask=full if with_mask else more_mask, past_key_values=cache
    )
    for b in range(3):
        want = logits_of(model, torch.cat([rows[b], more_rows[b]])[None])[0, len(rows[b]) :]
        assert_same(got[b, more_mask[b].bool()], want, "decode")


@pytest.mark.parametrize("how", ["seq_idx", "positions", "seq_idx_padded"])
@pytest.mark.parametrize("stack", STACK_NAMES)
def test_packed_documents_do_not_meet(stack, how):
    model = tiny_model(stack)
    lengths = [[4, 1, 1, 9], [15]]
    docs = [
        [random_ids(1, n, seed=10 * b + i)[0] for i, n in enumerate(row)]
        for b, row in enumerate(lengths)
    ]
    ids = torch.stack([torch.cat(row) for row in docs])
    seq_idx = torch.stack(
        [torch.cat([torch.full((n,), i) for i, n in enumerate(row)]) for row in lengths]
    )
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    if how == "positions":
        got = logits_of(model, ids, position_ids=positions)
    elif how == "seq_idx":
        got = logits_of(model, ids, seq_idx=seq_idx)
    else:
        pad = torch.full((2, 3), 5)
        mask = torch.cat([torch.ones_like(ids), torch.zeros_like(pad)], dim=1)
        last = seq_idx[:, -1:].expand(-1, 3)
        got = logits_of(
            model,
            torch.cat([ids, pad], 1),
            seq_idx=torch.cat([seq_idx, last], 1),
            attention_mask=mask,
        )
    for b, row in enumerate(docs):
        at = 0
        for doc in row:
            assert_same(got[b, at : at + len(doc)], logits_of(model, doc[None])[0], "decode")
            at += len(doc)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("stack", STACK_NAMES)
def test_the_last_packed_document_can_be_continued(stack, padded):
    model, cache = tiny_model(stack), None
    lengths = [[4, 7], [9, 2]]
    docs = [[random_ids(1, n, seed=n)[0] for n in row] for row in lengths]
    ids = torch.stack([torch.cat(row) for row in docs])
    seq_idx = torch.tensor([[0] * a + [1] * b for a, b in lengths])
    mask = torch.ones_like(ids)
    if padded:
        rubbish = random_ids(2, 2, seed=77)
        ids, mask = torch.cat([ids, rubbish], 1), torch.cat([mask, torch.zeros_like(rubbish)], 1)
        seq_idx = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, 2)], 1)
    cache, more = TambaCache(model.config), random_ids(2, 5, seed=3)
    logits_of(model, ids, seq_idx=seq_idx, attention_mask=mask, past_key_values=cache)
    got = [logits_of(model, piece, past_key_values=cache) for piece in more.split([2, 3], dim=1)]
    if padded and stack in ("sliding", "mixed"):
        return  # a window counts places, and padding lies between
    for b in range(2):
        want = logits_of(model, torch.cat([docs[b][1], more[b]])[None])[0, -5:]
        assert_same(torch.cat(got, dim=1)[b], want, "decode")


def flash_by_loops(query, key, value, edges, of_keys, longest, _, *switches, **options):
    """What torch's flash kernel computes over sequences end to end, each [N, H, P]."""
    assert torch.equal(edges, of_keys)
    assert int(edges.diff().max()) <= longest
    assert switches == (0.0, True, False)  # dropout, causal, debugging
    groups = query.shape[1] // key.shape[1]
    left = options["window_size_left"]
    parts = []
    for begin, end in edges.unique().unfold(0, 2, 1).tolist():
        q, k, v = (
            query[begin:end],
            *(x[begin:end].repeat_interleave(groups, 1) for x in (key, value)),
        )
        scores = torch.einsum("thp,shp->hts", q, k) * options["scale"]
        back = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (back >= 0) & (back <= (end if left is None else left))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hts,shp->thp", weights, v))
    return torch.cat(parts), None


@pytest.mark.parametrize("how", ["seq_idx", "positions"])
@pytest.mark.parametrize("stack", ["attention", "sliding", "mixed"])
def test_documents_end_to_end_equal_a_mask(stack, how, monkeypatch):
    model, ids = tiny_model(stack, dtype=torch.float64), random_ids(3, 14)
    seq_idx = torch.tensor([[0] * 4 + [1] * 9 + [2], [0] * 14, [3] * 7 + [1] * 7])
    where = {"seq_idx": seq_idx} if how == "seq_idx" else {"position_ids": _restarting(seq_idx)}

    def run():
        model.zero_grad()
        logits = model(ids, **where).logits
        logits.square().mean().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    want = run()
    monkeypatch.setattr("tamba.model.modeling.takes_documents", lambda config, hidden: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_by_loops)
    for name, a, b in zip(["logits", *model.state_dict()], run(), want, strict=False):
        assert_same(a, b, "fp64", name)

    def late(starts):
        edges = segments(starts)
        edges[1] += 1
        return edges

    monkeypatch.setattr("tamba.model.modeling.segments", late)
    with pytest.raises(AssertionError):
        assert_same(run()[0], want[0], "fp64")


@pytest.mark.parametrize("stack", ["attention", "sliding", "mixed"])
def test_whole_rows_need_no_mask_while_a_graph_is_recorded(stack, monkeypatch):
    """transformers 5.17 asks whether one is, and then writes masks out."""
    model, made = tiny_model(stack, dtype=torch.float64), []
    for name in ("create_causal_mask", "create_sliding_window_causal_mask"):
        honest = getattr(modeling, name)
        monkeypatch.setattr(
            modeling, name, lambda honest=honest, **told: made.append(told) or honest(**told)
        )
    window = model.config.sliding_window
    short, long = random_ids(2, window or 9), random_ids(2, (window or 9) + 3)
    for use_cache in (False, True):
        found = [logits_of(model, ids, use_cache=use_cache) for ids in (short, long)]
        # A window that cuts something off has to be told.
        assert len(made) == (window is not None)
        for ids, got in zip((short, long), found, strict=True):
            everything = torch.ones_like(ids)
            assert_same(got, logits_of(model, ids, attention_mask=everything), "fp64")
        made.clear()
    model.config._attn_implementation = "eager"  # which knows nothing of an order by itself
    assert_same(logits_of(model, short), found[0], "fp64")
    assert made


def _restarting(seq_idx):
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx.diff(dim=1) != 0
    return restart_positions(starts)


def test_where_documents_begin_end_to_end():
    starts = torch.zeros(2, 10, dtype=torch.bool)
    starts[0, 4] = starts[1, 2] = starts[1, 3] = True
    assert segments(starts).tolist() == [0, 4, 10, 12, 13, 20, 20, 20, 20]
    starts[:] = True
    assert segments(starts).tolist() == [*range(20), *[20] * 13]  # 32 documents, 12 of no token
    assert not torch.is_floating_point(segments(starts)) and segments(starts).dtype == torch.int32


def test_what_the_flash_kernel_is_given_fits_its_schema():
    """Shapes alone, on no device: the operator's arguments and that it has a gradient."""
    q, k = (torch.zeros(2, h, 10, 16, device="meta", requires_grad=True) for h in (6, 2))
    edges = torch.zeros(9, dtype=torch.int32, device="meta")
    for window in (None, 3):
        mixed = attention._by_document(q.bfloat16(), k.bfloat16(), k.bfloat16(), edges, 0.5, window)
        assert mixed.shape == (2, 10, 96)
        mixed.sum().backward()
    assert q.grad.shape == q.shape and k.grad.shape == k.shape


def test_packed_rows_of_one_layout_and_stock_caches():
    model, ids = tiny_model("mixed"), random_ids(3, 9)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    got = logits_of(model, ids, position_ids=positions)
    assert_same(got, logits_of(model, ids, position_ids=positions.expand(3, -1)), "exact")
    assert_same(got[:, 4:], logits_of(model, ids[:, 4:]), "decode")
    with pytest.raises(ValueError, match="TambaCache"):
        logits_of(model, ids, seq_idx=positions, past_key_values=DynamicCache(config=model.config))


@pytest.mark.parametrize("stack", STACK_NAMES)
@pytest.mark.parametrize("window", [6, 30])
def test_rollback_equals_a_fresh_run(stack, window):
    model, ids = tiny_model(stack), random_ids(2, 20)
    tail = random_ids(2, 5, seed=3)
    for n in [0, 1, 3, 6] if window == 6 else [5, 9, 20]:
        cache = TambaCache(model.config, max_rollback=window)
        for piece in ids.split([11, 1, 5, 1, 2], dim=1):
            logits_of(model, piece, past_key_values=cache)
        cache.rollback(n)
        assert cache.get_seq_length() == 20 - n
        got = [logits_of(model, p, past_key_values=cache) for p in tail.split([2, 1, 2], dim=1)]
        want = logits_of(model, torch.cat([ids[:, : 20 - n], tail], dim=1))[:, 20 - n :]
        assert_same(torch.cat(got, dim=1), want, "decode")


@pytest.mark.parametrize("stack", STACK_NAMES)
def test_rollback_row_by_row_and_again(stack):
    model, ids = tiny_model(stack), random_ids(3, 18)
    rounds = [
        (torch.tensor([0, 4, 2]), 5),
        (torch.tensor([3, 0, 5]), 3),
        (torch.tensor([1, 1, 1]), 4),
    ]
    cache = TambaCache(model.config, max_rollback=8)
    logits_of(model, ids, past_key_values=cache)
    texts = [row for row in ids]
    for step, (counts, new) in enumerate(rounds):
        cache.rollback(counts)
        texts = [row[: len(row) - int(n)] for row, n in zip(texts, counts, strict=True)]
        more = random_ids(3, new, seed=20 + step)
        got = logits_of(model, more, past_key_values=cache)
        texts = [torch.cat([row, m]) for row, m in zip(texts, more, strict=True)]
        for b, row in enumerate(texts):
            assert_same(got[b], logits_of(model, row[None])[0, -new:], "decode")


def test_rollback_of_a_left_padded_batch():
    model = tiny_model("mixed")
    ids, mask, rows = padded_batch([9, 4], "left")
    cache = TambaCache(model.config, max_rollback=4)
    logits_of(model, ids, attention_mask=mask, past_key_values=cache)
    cache.rollback(torch.tensor([1, 3]))
    more = random_ids(2, 3, seed=5)
    got = logits_of(model, more, past_key_values=cache)
    for b, keep in enumerate((8, 1)):
        want = logits_of(model, torch.cat([rows[b][:keep], more[b]])[None])[0, -3:]
        assert_same(got[b], want, "decode")


def test_rollback_beyond_the_record_is_refused():
    model = tiny_model("mamba2")
    cache = TambaCache(model.config, max_rollback=3)
    logits_of(model, random_ids(1, 12), past_key_values=cache)
    with pytest.raises(ValueError, match="max_rollback=5"):
        cache.rollback(5)
    attention = TambaCache(tiny_model("attention").config)
    logits_of(tiny_model("attention"), random_ids(1, 4), past_key_values=attention)
    for n in (5, -1):
        with pytest.raises(ValueError, match="of 4 tokens"):
            attention.rollback(n)
    plain = TambaCache(model.config)
    logits_of(model, random_ids(1, 12), past_key_values=plain)
    with pytest.raises(ValueError, match="cannot take back 1"):
        plain.rollback(1)


def test_recording_holds_a_bounded_ring():
    model = tiny_model("mixed")
    cache = TambaCache(model.config, max_rollback=4)
    for token in random_ids(1, 60).split(1, dim=1):
        logits_of(model, token, past_key_values=cache)
        for layer in cache.layers:
            if isinstance(layer, RecurrentLayer):
                assert layer._ring[0].shape[1] <= 8  # twice the window, then the oldest are folded
            elif layer.is_sliding:
                assert layer.keys.shape[-2] <= 4 + 8


@pytest.mark.parametrize("stack", STACK_NAMES)
def test_rows_are_reordered_repeated_and_selected(stack):
    model, ids = tiny_model(stack), random_ids(3, 9)
    more = random_ids(4, 2, seed=8)
    for change, picked in (
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (
            lambda c: (c.batch_select_indices(torch.tensor([0, 2])), c.batch_repeat_interleave(2)),
            [0, 0, 2, 2],
        ),
    ):
        for window in (0, 4):
            cache = TambaCache(model.config, max_rollback=window)
            logits_of(model, ids, past_key_values=cache)
            change(cache)
            if window:
                cache.rollback(2)
            got = logits_of(model, more[: len(picked)], past_key_values=cache)
            kept = ids[picked][:, : 9 - (2 if window else 0)]
            want = logits_of(model, torch.cat([kept, more[: len(picked)]], 1))[:, -2:]
            assert_same(got, want, "decode")


def without_cache(model, ids, **options):
    return model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False, **options)


@pytest.mark.parametrize("stack", STACK_NAMES)
def test_generate_greedy_and_beams_equal_cacheless(stack):
    model, ids = tiny_model(stack), random_ids(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for beams, caches in ((1, ({}, {"cache_implementation": "static"})), (3, ({},))):
        given = {"attention_mask": mask, "num_beams": beams}
        want = without_cache(model, ids, **given)
        for cache in caches:
            got = model.generate(ids, max_new_tokens=12, do_sample=False, **given, **cache)
            assert torch.equal(got, want)


@pytest.mark.parametrize("stack", ["mamba2", "sliding"])
@pytest.mark.parametrize("by", ["lookup", "model"])
def test_drafts_of_any_length_can_be_refused(stack, by, monkeypatch):
    # As with drafts of more than 64 tokens, in less time.
    monkeypatch.setattr("tamba.model.cache.DEFAULT_ROLLBACK", 3)
    model, assistant = tiny_model(stack), tiny_model(stack, seed=1)
    ids = random_ids(1, 16).repeat(1, 2)
    options = {"prompt_lookup_num_tokens": 10}
    if by == "model":
        options = {"assistant_model": assistant}
        assistant.generation_config.num_assistant_tokens = 10
        assistant.generation_config.assistant_confidence_threshold = 0.0
    options |= {"max_new_tokens": 14, "do_sample": False}
    want = model.generate(ids, max_new_tokens=14, do_sample=False)
    assert torch.equal(model.generate(ids, **options), want)


@pytest.mark.parametrize("stack", STACK_NAMES)
def test_assisted_generation_is_lossless(stack):
    model, assistant = tiny_model(stack), tiny_model(stack)
    with torch.no_grad():  # a draft that is right often and wrong often
        for p in assistant.parameters():
            p.add_(0.02 * torch.randn_like(p))
    ids = random_ids(1, 9)
    want = without_cache(model, ids)
    assert torch.equal(
        model.generate(ids, assistant_model=assistant, max_new_tokens=12, do_sample=False), want
    )
    repeated = torch.cat([ids, ids], dim=1)
    assert torch.equal(
        model.generate(repeated, prompt_lookup_num_tokens=4, max_new_tokens=12, do_sample=False),
        without_cache(model, repeated),
    )


@pytest.mark.parametrize("stack", STACK_NAMES)
def test_a_cache_holds_what_it_says_and_no_more(stack):
    """A view into a long prompt would keep all of it in memory."""
    model = tiny_model(stack)
    cache = TambaCache(model.config)
    with torch.inference_mode():
        model.model(input_ids=random_ids(2, 100), past_key_values=cache)
    held = {}
    for layer in cache.layers:
        own = isinstance(layer, RecurrentLayer)
        for tensor in layer._tensors() if own else (layer.keys, layer.values):
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    assert sum(held.values()) == cache.nbytes


@pytest.mark.parametrize("stack", STACK_NAMES)
def test_early_exit_drafts_with_the_lower_layers_and_is_lossless(stack):
    model, ids = tiny_model(stack), random_ids(1, 9)
    total = model.config.num_hidden_layers
    passes = [0] * total
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: passes.__setitem__(i, passes[i] + 1))
    want = without_cache(model, ids)
    passes[:] = [0] * total
    got = model.generate(ids, assistant_early_exit=2, max_new_tokens=12, do_sample=False)
    assert torch.equal(got, want)
    # The first two wrote drafts and checked them, the others only checked.
    assert passes[0] == passes[1] > passes[2] and len(set(passes[2:])) == 1
    assert model.config.num_hidden_layers == total == len(model.config.layer_types)
    for n in (0, -1, total + 1):
        with pytest.raises(UserError, match=f"cannot be {n} in a model of {total} layers"):
            model.generate(ids, assistant_early_exit=n, max_new_tokens=3)
        assert model.config.num_hidden_layers == total


def test_implementations_of_attention_agree():
    model, ids = tiny_model("mixed"), random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    want = logits_of(model, ids, attention_mask=mask)
    model.set_attn_implementation("eager")
    assert_same(
        logits_of(model, ids, attention_mask=mask)[mask.bool()], want[mask.bool()], "decode"
    )
    recorded = model(ids, output_attentions=True, output_hidden_states=True)
    assert len(recorded.attentions) == 3 and len(recorded.hidden_states) == 8
    assert_same(recorded.attentions[0].sum(-1), torch.ones(2, 4, 12), "fp32")


def test_attention_that_writes_no_weights_says_so(monkeypatch, caplog):
    """Packed rows as documents end to end; the kernel itself takes a GPU."""

    def nothing(query, *_):
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1] * query.shape[3])

    monkeypatch.setattr(modeling, "takes_documents", lambda *_: True)
    monkeypatch.setattr(attention, "_by_document", nothing)
    packed = {"position_ids": torch.arange(6).repeat(2)[None], "use_cache": False}
    model, ids = tiny_model("mixed"), random_ids(1, 12)
    model(ids, **packed)
    assert not caplog.records
    assert model(ids, output_attentions=True, **packed).attentions == ()
    assert "`eager`" in caplog.text


def test_float32_parameters_survive_casts():
    model = tiny_model("mixed").to(torch.bfloat16)
    for name, p in model.named_parameters():
        short = name.rsplit(".", 1)[-1] in ("A_log", "dt_bias", "D")
        assert p.dtype == (torch.float32 if short else torch.bfloat16), name
    assert tiny_model("mixed").double().model.layers[0].mixer.A_log.dtype == torch.float64
    assert logits_of(model, random_ids(1, 5)).isfinite().all()


def test_gradient_checkpointing_changes_nothing():
    model, ids = tiny_model("mixed", dtype=torch.float64), random_ids(2, 11)
    model.train()
    model(ids, labels=ids).loss.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    # transformers 5.18 renamed it.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert_same(p.grad, want[name], "fp64")


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_auto_classes_round_trip(tmp_path, tied):
    model, ids = tiny_model("mixed", tie_word_embeddings=tied), random_ids(1, 6)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is TambaConfig
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is TambaForCausalLM
    assert_same(logits_of(again, ids), logits_of(model, ids), "exact")
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.layers[0].mixer.A_log.dtype == torch.float32


def test_loss_is_next_token_cross_entropy():
    model, ids = tiny_model("mixed"), random_ids(2, 10)
    output = model(ids, labels=ids)
    flat = output.logits[:, :-1].reshape(-1, VOCAB).double()
    want = torch.nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1))
    assert_same(output.loss.double(), want, "fp32")


def test_one_last_logit():
    model, ids = tiny_model("mixed"), random_ids(2, 10)
    assert_same(logits_of(model, ids, logits_to_keep=1), logits_of(model, ids)[:, -1:], "fp32")


# -- the tests above can fail ---------------------------------------------------------------------


def fails(test, *args):
    with pytest.raises(AssertionError):
        test(*args)


def test_a_forgotten_conv_state_is_seen(monkeypatch):
    step = RecurrentLayer._step

    def forget(self, *args):
        output = step(self, *args)
        self.conv_state = torch.zeros_like(self.conv_state)
        return output

    monkeypatch.setattr(RecurrentLayer, "_step", forget)
    fails(test_any_split_equals_one_pass, "mamba1")
    fails(test_any_split_equals_one_pass, "mamba2")


def test_a_rollback_one_short_is_seen(monkeypatch):
    rollback = RecurrentLayer.rollback

    def short(self, n):
        rollback(self, n)
        if n == 3:
            self._ring = [x[:, :-1] for x in self._ring]

    monkeypatch.setattr(RecurrentLayer, "rollback", short)
    fails(test_rollback_equals_a_fresh_run, "mamba2", 6)


def test_ignored_padding_and_boundaries_are_seen(monkeypatch):
    from tamba.model import modeling

    locate = modeling.locate

    def blind(*args, **kwargs):
        tokens = locate(*args, **kwargs)
        tokens.padding = tokens.order = tokens.starts = tokens.documents = None
        return tokens

    monkeypatch.setattr(modeling, "locate", blind)
    fails(test_padding_touches_nothing, "mamba2", "left")
    fails(test_packed_documents_do_not_meet, "mamba1", "seq_idx")
    fails(test_packed_documents_do_not_meet, "attention", "seq_idx")


def test_a_wrong_rotation_is_seen(monkeypatch):
    from tamba.model import attention

    rotate = attention.rotate
    monkeypatch.setattr(attention, "rotate", lambda x, cos, sin: rotate(x, cos, -sin[:, :1]))
    fails(test_any_split_equals_one_pass, "attention")
