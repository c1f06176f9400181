"""The model against its definition: a plain implementation, and the published code's numbers."""

import math
import os
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import close, documents, pack, plain_logits, tiny_model
from torch.fx.experimental.proxy_tensor import make_fx

from attention import flex_mask, padded_batches
from generate import stream
from model import HRM, HRMConfig, output_and_mlp, visible_keys
from optim import AdamATan2


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("prefix_lm", [True, False])
def test_packed_row_gives_each_document_its_own_logits(prefix_lm):
    model, docs = tiny_model(prefix_lm=prefix_lm), documents()
    idx, _, doc, prefix = pack(docs, 64)
    logits, loss = model(idx, doc=doc, prefix=prefix)
    assert loss is None and logits.isfinite().all()
    for number, (ids, p) in enumerate(docs):
        packed = logits[0, doc[0] == number]
        assert close(packed, plain_logits(model, ids[:-1], p))
        alone, _ = model(ids[None, :-1], prefix=torch.arange(len(ids) - 1)[None] < p)
        assert close(packed, alone[0])


def test_document_is_not_moved_by_its_neighbours():
    """Changing every token of one document leaves the others' logits the same, exactly."""
    model, docs = tiny_model(), documents()
    idx, _, doc, prefix = pack(docs, 64)
    before, _ = model(idx, doc=doc, prefix=prefix)
    after, _ = model(torch.where(doc == 1, (idx + 1) % 263, idx), doc=doc, prefix=prefix)
    others = (doc[0] != 1) & (doc[0] >= 0)
    assert torch.equal(before[0, others], after[0, others])
    assert not close(after[0, doc[0] == 1], before[0, doc[0] == 1])


def test_response_is_causal_and_prefix_is_not():
    model, (ids, p) = tiny_model(), documents([(10, 10)])[0]
    prefix = torch.arange(20)[None] < p
    before, _ = model(ids[None], prefix=prefix)
    for changed, first_moved in ((15, 15), (9, 0)):
        other = ids.clone()
        other[changed] = (other[changed] + 1) % 263
        moved = (model(other[None], prefix=prefix)[0] - before).abs().amax(-1)[0] > 1e-6
        assert moved.nonzero()[0].item() == first_moved


@pytest.mark.parametrize("bp_steps", range(2, 9))
def test_gradients_equal_a_plain_loop_with_detach(bp_steps):
    model, docs = tiny_model(), documents()
    idx, targets, doc, prefix = pack(docs, 64)
    model(idx, targets, doc, prefix, bp_steps)[1].backward()
    packed = gradients(model)
    model.zero_grad()
    n = sum(len(ids) - p for ids, p in docs)
    for ids, p in docs:
        logits = plain_logits(model, ids[:-1], p, bp_steps)
        (torch.nn.functional.cross_entropy(logits[p - 1 :], ids[p:], reduction="sum") / n).backward()
    plain = gradients(model)
    assert packed.keys() == plain.keys()
    assert ("embed" in packed) == (bp_steps > 2)
    for name in plain:
        assert close(packed[name], plain[name]), name


@pytest.mark.parametrize("bp_steps", [1, 9])
def test_bp_steps_out_of_range(bp_steps):
    with pytest.raises(ValueError, match="bp_steps must be from 2 to"):
        tiny_model()(torch.zeros(1, 4, dtype=torch.long), bp_steps=bp_steps)


def test_padding_changes_nothing():
    model, docs = tiny_model(), documents()
    results = []
    for T in (54, 64):
        model.zero_grad()
        loss = model(*pack(docs, T), bp_steps=5)[1]
        loss.backward()
        results.append((loss, gradients(model)))
    assert close(results[0][0], results[1][0])
    for name, g in results[0][1].items():
        assert close(g, results[1][1][name]), name


def test_rows_of_padding_alone_have_zero_loss_and_gradient():
    model = tiny_model()
    loss = model(*pack([], 16), bp_steps=5)[1]
    loss.backward()
    assert loss == 0 and all((g == 0).all() for g in gradients(model).values())
    assert len(gradients(model)) == len(list(model.parameters()))


def test_loss_in_chunks_and_recomputed_blocks_give_the_same_gradients(monkeypatch):
    model, row = tiny_model(), pack(documents(), 64)
    model(*row, bp_steps=5)[1].backward()
    plain = gradients(model)
    model.zero_grad()
    monkeypatch.setattr("model.LOGITS_PER_CHUNK", 3 * 263)
    model.recompute = "blocks"
    model(*row, bp_steps=5)[1].backward()
    for name, g in gradients(model).items():
        assert close(g, plain[name]), name


def test_predicted_targets_are_counted(monkeypatch):
    model, (idx, targets, *rest) = tiny_model(), pack(documents(), 64)
    likeliest, some = model(idx, None, *rest)[0].argmax(-1), (targets >= 0) & (torch.arange(64) % 3 == 0)
    targets = torch.where(some, likeliest, targets)
    monkeypatch.setattr("model.LOGITS_PER_CHUNK", 3 * 263)
    model(idx, targets, *rest)
    assert model.n_correct == (likeliest == targets).sum() >= some.sum() > 0


def test_recomputed_blocks_drop_the_same_values(monkeypatch):
    """With dropout, as the README suggests it, though nothing else draws numbers meanwhile."""
    grads = []
    monkeypatch.setattr("model.output_and_mlp", lambda *args: F.dropout(output_and_mlp(*args), 0.3))
    model, row = tiny_model(), pack(documents(), 64)
    for model.recompute in "none", "blocks":
        model.zero_grad()
        torch.manual_seed(0)
        model(*row, bp_steps=5)[1].backward()
        grads.append(gradients(model))
    assert all(torch.equal(g, grads[1][name]) for name, g in grads[0].items())


def test_a_document_of_more_than_1024_tokens():
    """Whose attention takes another way on a CPU."""
    model, [(ids, p)] = tiny_model(block_size=1300), documents([(60, 1100)])
    logits, _ = model(ids[None], prefix=torch.arange(len(ids))[None] < p)
    assert close(logits[0], plain_logits(model, ids, p))


@pytest.mark.parametrize("bp_steps", [2, 3, 4, 5])
def test_bf16_gradients_agree_with_fp32(bp_steps):
    model, row = tiny_model(n_embd=64), pack(documents(), 64)
    model(*row, bp_steps=bp_steps)[1].backward()
    fp32 = gradients(model)
    model.zero_grad()
    model.compute_dtype = torch.bfloat16
    model(*row, bp_steps=bp_steps)[1].backward()
    bf16 = gradients(model)
    assert bf16.keys() == fp32.keys()
    for name, g in bf16.items():
        assert g.dtype == torch.float32
        assert torch.cosine_similarity(g.flatten(), fp32[name].flatten(), dim=0) > 0.99, name


def test_compiled_blocks_equal_eager_ones_and_compile_once():
    """Every bp_steps and every length of documents runs on the code of the first two steps."""
    model = tiny_model()
    model.compile_blocks = True
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    cases = (2, ((9, 7), (3, 4))), (5, ((30, 20),)), (3, ((5, 5),) * 6), (4, ((1, 2),))
    for i, (bp_steps, lengths) in enumerate(cases):
        row = pack(documents(lengths), 64)
        model.zero_grad()
        model(*row, bp_steps=bp_steps)[1].backward()
        compiled = gradients(model)
        if i == 0:
            graphs = counters["stats"]["unique_graphs"]
        model.compile_blocks = False
        model.zero_grad()
        model(*row, bp_steps=bp_steps)[1].backward()
        model.compile_blocks = True
        for name, g in gradients(model).items():
            assert close(g, compiled[name]), name
    assert counters["stats"]["unique_graphs"] == graphs


def test_weights_cast_once_serve_all_micro_batches():
    model, rows = tiny_model(), [pack(documents(lengths), 64) for lengths in (((9, 7), (3, 4)), ((20, 13),))]
    model.compute_dtype, found = torch.bfloat16, []
    for weights in model.cast_weights(), None:
        model.zero_grad()
        for row in rows:
            model(*row, 3, weights)[1].backward()
        found.append(gradients(model))
    assert all(torch.equal(g, found[1][name]) for name, g in found[0].items())


def random_rows(B=8, T=96):
    """doc and prefix of packed rows: documents and prefixes of any lengths, then padding."""
    rng, doc, prefix = random.Random(0), torch.full((B, T), -1), torch.zeros(B, T, dtype=torch.bool)
    for r in range(B):
        start, number = 0, 0
        while (n := rng.randint(1, 30)) <= T - start:
            doc[r, start : start + n] = number
            prefix[r, start : start + rng.choice((1, rng.randint(1, n), n))] = True
            start, number = start + n, number + 1
    return doc, prefix


def test_a_query_sees_its_own_document_up_to_itself_and_in_the_prefix():
    (doc, prefix), place = random_rows(), torch.arange(96)
    first, last = visible_keys(doc, prefix)
    found = (first[:, :, None] <= place) & (place < last[:, :, None])  # (B, query, key)
    same_document = doc[:, :, None] == doc[:, None]
    plain = same_document & ((place <= place[:, None]) | prefix[:, None])
    real = doc >= 0
    assert torch.equal(found[real], plain[real]) and not real.all()
    assert not (found & (real[:, None] ^ real[:, :, None])).any()  # padding sees padding alone, but something:
    assert found.any(-1).all()  # else it would yield NaN


def test_both_masks_state_the_same_rule():
    """FlexAttention's, written out, shows each token what the padded batches of documents show it."""
    (doc, prefix), place, n_head = random_rows(), torch.arange(96), 2
    first, last = visible_keys(doc, prefix)
    b, q, k = torch.meshgrid(torch.arange(len(doc)), place, place, indexing="ij")
    flex = flex_mask(first, last).blocks.mask_mod(b, torch.zeros_like(b), q, k)
    mask, begin, seen = padded_batches(first, last, n_head, "cpu", torch.float32), 0, []
    for bias in mask.bias:
        D, _, L, _ = bias.shape
        keys = mask.gather_idx[begin : begin + D * n_head * L].view(D, n_head, 1, L).expand(-1, -1, L, -1)
        times = torch.zeros(D, n_head, L, doc.numel() * n_head)  # that a query at a place of the batch sees a key
        seen.append(times.scatter_add_(-1, keys, (bias == 0).float().expand_as(keys)).flatten(0, 2))
        begin += keys[:, :, 0].numel()
    once = torch.einsum("bqk,bc,hg->bqhckg", flex.float(), torch.eye(len(doc)), torch.eye(n_head))
    assert torch.equal(torch.cat(seen)[mask.scatter_idx], once.reshape(doc.numel() * n_head, -1))


def test_documents_of_all_lengths_share_a_row_at_little_cost():
    """One long document among many short ones does not make all of them as long."""
    docs = documents([(2, 3)] * 100 + [(150, 150)])
    idx, _, doc, prefix = pack(docs, 800)
    assert len(padded_batches(*visible_keys(doc, prefix), 1, "cpu", torch.float32).gather_idx) <= 1.2 * 800
    model = tiny_model(block_size=800)
    logits, _ = model(idx, doc=doc, prefix=prefix)
    for number in (0, 57, 100):
        assert close(logits[0, doc[0] == number], plain_logits(model, docs[number][0][:-1], docs[number][1]))


def test_flex_attention_gives_the_same_logits():
    model = tiny_model()
    idx, _, doc, prefix = pack(documents(), 64)
    with torch.no_grad():
        sdpa, _ = model(idx, doc=doc, prefix=prefix)
        model.attention = "flex"
        flex, _ = model(idx, doc=doc, prefix=prefix)
    assert close(flex[doc >= 0], sdpa[doc >= 0])


def test_an_attention_kernel_that_does_not_run_here_gives_way_to_flex(capsys):
    model = tiny_model()
    model.set_compute(attention="flash")
    assert model.attention == "flex" and "attention: flash does not run here (" in capsys.readouterr().out
    with pytest.raises(ValueError, match="attention must be auto, sdpa, flex, tma, tuned, flash, not x"):
        model.set_compute(attention="x")


# ----------------------------------------------------------------------------------------------------
# generation


@pytest.mark.parametrize("prefix_lm", [True, False])
def test_generation_with_cache_equals_full_forward_passes(prefix_lm):
    model = tiny_model(prefix_lm=prefix_lm)
    prompts = [ids.tolist() for ids, _ in documents(((5, 0), (1, 0), (23, 0)))]
    new = model.generate(prompts, max_new_tokens=12)
    for prompt, continuation in zip(prompts, new):
        ids = list(prompt)
        for _ in range(12):
            logits = plain_logits(model, torch.tensor(ids), len(prompt))
            ids.append(logits[-1].argmax().item())
        assert continuation == ids[len(prompt) :]


def test_generation_stops_at_the_stop_token_and_at_block_size():
    model, prompts = tiny_model(block_size=16), [[1, 2, 3], [5] * 14]
    free = model.generate(prompts, max_new_tokens=40)
    assert [len(new) for new in free] == [14, 3]  # a row of 16 tokens predicts a 17th
    stop = free[0][5]
    stopped = model.generate(prompts, max_new_tokens=40, stop_token=stop)
    assert stopped[0] == free[0][: free[0].index(stop)]
    with pytest.raises(ValueError, match="block_size = 16"):
        model.generate([[1] * 17], 1)


def test_waiting_prompts_take_the_places_of_complete_ones(monkeypatch):
    """Few slots give the answers of many."""
    monkeypatch.setattr("generate.MAX_PREFILL_TOKENS", 20)
    model = tiny_model(vocab_size=7, block_size=32)  # few ids, so that answers stop, each at its own length
    lengths = torch.randint(1, 31, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    prompts = [[(7 * i + j * j) % 7 for j in range(n)] for i, n in enumerate(lengths)]
    want = [model.generate([prompt], 10, stop_token=3)[0] for prompt in prompts]
    found = {len(new) for new in want}
    assert {0, 10} <= found and len(found) > 2  # which ones depends on torch's random numbers
    for slots in 1, 5, 40:
        assert model.generate(prompts, 10, stop_token=3, slots=slots) == want
        for most in 1, 2, 3:  # so few that some stop at the step that is their last
            assert model.generate(prompts, most, stop_token=3, slots=slots) == [new[:most] for new in want]
    ends = [i for events in stream(model, prompts, 10, stop_token=3, slots=5) for i, id in events if id is None]
    assert sorted(ends) == list(range(40))
    assert model.generate(prompts, 0) == [[]] * 40 and model.generate([], 5) == []


def test_decode_steps_can_be_graphs(monkeypatch):
    """Captured as a CUDA graph would be, as operations on the same memory without Python, they yield the same ids."""
    model = tiny_model(n_layer=2, block_size=128)
    prompts = [ids.tolist() for ids, _ in documents([(n, 0) for n in (3, 30, 9, 17, 5)])]
    first, *others = model.generate(prompts, 45)
    stop = next(t for t in first if any(t not in new for new in others))
    want, steps = model.generate(prompts, 45, stop_token=stop), []
    assert len(want[0]) < 45 and max(map(len, want)) == 45

    def operations(function, pool):
        play, result = make_fx(lambda: function())(), function()
        steps.append(pool)
        return result, SimpleNamespace(replay=lambda: result.copy_(play()), pool=lambda: "pool")

    def fails(function, pool):
        raise RuntimeError("no memory")

    monkeypatch.setattr("generate.CUDA_GRAPH_DEVICES", {"cpu"})
    monkeypatch.setattr("generate.capture_cuda_graph", fails)
    with pytest.warns(UserWarning, match="without CUDA graphs: no memory"):
        assert model.generate(prompts, 45, stop_token=stop) == want
    monkeypatch.setattr("generate.capture_cuda_graph", operations)
    for slots in 2, 5, 5:
        assert model.generate(prompts, 45, stop_token=stop, slots=slots) == want
    assert steps == [None, *["pool"] * 2] * 2  # for 48, 64 and 96 positions; the last call has those of before
    model.compute_dtype = torch.bfloat16  # whose weights are copies
    model.generate(prompts, 2, slots=5)
    with torch.no_grad():
        model.lm_head.copy_(model.lm_head.roll(1, 0))
    changed, engine = model.generate(prompts, 9, slots=5), model.engine
    model.engine = None
    assert changed == model.generate(prompts, 9, slots=5) and model.engine is not engine
    at_once = [*zip(stream(model, prompts, 9), stream(model, prompts, 9))]
    assert at_once and all(one == other for one, other in at_once)


def test_generation_by_flex_attention_gives_the_same_ids():
    """Prefill at rounded lengths, and decoding over blocks of the cache, beyond one block."""
    model = tiny_model(n_layer=2, block_size=300)
    prompts = [ids.tolist() for ids, _ in documents([(n, 0) for n in (120, 3, 129, 200)])]
    want = model.generate(prompts, 20)
    model.attention = "flex"  # decoding is not compiled here, as on a CPU its kernel must stand alone (torch 2.13)
    assert model.generate(prompts, 20) == want


def test_compiled_generation_equals_eager_and_compiles_once():
    """One graph for one prompt and one for several, whatever the prompts' lengths and the answers'."""
    model = tiny_model(n_layer=2)
    torch._dynamo.reset()
    stats = torch._dynamo.utils.counters["stats"]
    graphs = stats["unique_graphs"]
    for i, cases in enumerate((((13,), (22,), (9,)), ((3, 6, 9, 12, 15), (4, 6, 8, 10, 12), (5, 7, 9, 11, 20)))):
        for attempt, lengths in enumerate(cases):
            prompts = [ids.tolist() for ids, _ in documents([(n, 0) for n in lengths])]
            model.compile_blocks = True
            new = model.generate(prompts, 9 + attempt)
            model.compile_blocks = False
            assert new == model.generate(prompts, 9 + attempt)
        assert stats["unique_graphs"] == graphs + i + 1


def test_sampling_follows_its_seed_and_its_limits():
    model, prompt = tiny_model(), [[7, 8, 9]] * 200
    assert model.generate(prompt, 3, temperature=1.0, seed=5) == model.generate(prompt, 3, temperature=1.0, seed=5)
    with torch.no_grad():
        p = plain_logits(model, torch.tensor([7, 8, 9]), 3)[-1].softmax(-1)
    likely = p.argsort(descending=True).tolist()
    drawn = {new[0] for new in model.generate(prompt, 1, temperature=1.0, top_k=5, seed=0)}
    assert len(drawn) > 1 and drawn <= set(likely[:5])
    n = int((p.sort(descending=True).values.cumsum(0) < 0.3).sum()) + 1
    assert {new[0] for new in model.generate(prompt, 1, temperature=1.0, top_p=0.3, seed=0)} <= set(likely[:n])
    greedy = model.generate(prompt[:1], 4)
    extremes = dict(top_k=1), dict(top_p=1e-320), dict(top_p=0.0), dict(temperature=1e-40), dict(temperature=1e-320)
    for options in extremes:
        assert model.generate(prompt[:1], 4, **{"temperature": 1.0, "seed": 0, **options}) == greedy
    uniform = model.generate(prompt, 1, temperature=math.inf, top_k=10**30, top_p=0.999999, seed=-(10**30))
    assert len({new[0] for new in uniform}) > 100
    for options in dict(temperature=math.nan), dict(top_p=math.nan), dict(temperature=-math.inf), dict(top_k=-1):
        with pytest.raises(ValueError, match="temperature, top_k"):
            model.generate(prompt, 1, **options)


# ----------------------------------------------------------------------------------------------------
# depth and guidance


def guided(model, ids, n_prefix):
    w = model.guidance
    return (1 + w) * plain_logits(model, ids, n_prefix) - w * plain_logits(model, ids, n_prefix, earlier=True)


@pytest.mark.parametrize("H_cycles, w", [(2, -1.0), (3, 2.0)])
def test_guidance_combines_the_logits_of_the_last_two_H_steps(H_cycles, w, monkeypatch):
    """In packed rows, the loss, prefill and decoding, by CUDA graphs too."""
    model, docs = tiny_model(H_cycles=H_cycles), documents()
    idx, targets, doc, prefix = pack(docs, 64)
    plain, _ = model(idx, doc=doc, prefix=prefix)
    model.guidance = w
    with torch.no_grad():
        logits, _ = model(idx, doc=doc, prefix=prefix)
        want = torch.cat([guided(model, ids[:-1], p) for ids, p in docs])
        assert close(logits[doc >= 0], want) and not close(plain[doc >= 0], want, 1e-2)
        _, loss = model(idx, targets, doc, prefix)
        assert close(loss, F.cross_entropy(want, targets[doc >= 0]))
    prompts = [ids[:p].tolist() for ids, p in docs]
    new = model.generate(prompts, 12)
    for prompt, continuation in zip(prompts, new):
        for k, id in enumerate(continuation):
            assert guided(model, torch.tensor(prompt + continuation[:k]), len(prompt))[-1].argmax() == id
    monkeypatch.setattr("generate.CUDA_GRAPH_DEVICES", {"cpu"})
    steps = []

    def operations(function, pool):
        play, result = make_fx(lambda: function())(), function()
        steps.append(model.guidance)
        return result, SimpleNamespace(replay=lambda: result.copy_(play()), pool=lambda: "pool")

    monkeypatch.setattr("generate.capture_cuda_graph", operations)
    assert model.generate(prompts, 12) == new
    model.guidance = 0.0  # its graphs are others
    assert model.generate(prompts, 12) != new and steps == [w, 0.0]


def test_sampling_with_guidance_follows_its_seed():
    model, prompts = tiny_model(), [[7, 8, 9]] * 50
    options = dict(temperature=1.0, seed=5)
    without, model.guidance = model.generate(prompts, 4, **options), 1.5
    new = model.generate(prompts, 4, **options)
    assert new == model.generate(prompts, 4, **options) != without
    p = guided(model, torch.tensor([7, 8, 9]), 3)[-1].argsort(descending=True).tolist()
    assert {ids[0] for ids in model.generate(prompts, 1, top_k=3, **options)} <= set(p[:3])


def test_other_cycles_than_trained_are_those_of_the_same_weights():
    model, other = tiny_model(), tiny_model(H_cycles=3, L_cycles=1)
    prompts = [ids[:p].tolist() for ids, p in documents()]
    as_trained = model.generate(prompts, 9)
    model.config = replace(model.config, H_cycles=3, L_cycles=1)
    assert model.generate(prompts, 9) == other.generate(prompts, 9) != as_trained


def test_logits_of_some_positions_alone():
    model = tiny_model()
    idx, _, doc, prefix = pack(documents(), 64)
    at = torch.tensor([3, 40, 3])
    logits, _ = model(idx, doc=doc, prefix=prefix)
    assert close(model(idx, doc=doc, prefix=prefix, at=at)[0], logits[0, at])


def test_an_answer_may_end_by_what_it_holds():
    model, prompts = tiny_model(), [ids.tolist() for ids, _ in documents(((5, 0), (1, 0), (23, 0)))]
    free = model.generate(prompts, 12)
    ends = {(i, new[3 + i]) for i, new in enumerate(free)}
    seen = []

    def is_end(i, id):
        seen.append((i, id))
        return (i, id) in ends

    new = model.generate(prompts, 12, slots=2, is_end=is_end)
    assert new == [ids[: ids.index(ids[3 + i]) + 1] for i, ids in enumerate(free)]
    assert sorted(seen) == sorted((i, id) for i, ids in enumerate(new) for id in ids)


# ----------------------------------------------------------------------------------------------------
# configuration, initial weights, optimizer


def test_sizes_of_the_published_models():
    c = HRMConfig()
    assert (c.n_ff, c.head_dim, c.n_steps) == (4096, 128, 8)
    with torch.device("meta"):
        model = HRM(c)
    assert model.flops_per_token(5) == pytest.approx(18.3e9, rel=0.01)  # the paper's 1B
    block = sum(p.numel() for p in model.H[0].parameters())
    assert block == pytest.approx(30.7e6, rel=0.01)


IMPOSSIBLE = [dict(n_layer=3), dict(n_embd=33), dict(n_head=0), dict(L_cycles=0), dict(vocab_size=0), dict(n_head=True)]
IMPOSSIBLE += [dict(vocab_size=10**12), dict(H_cycles=10**9), dict(n_layer=20002), dict(n_ff=0), dict(head_dim=3)]
IMPOSSIBLE += [{key: x} for key in ("rope_theta", "norm_eps", "embed_scale", "expansion") for x in (0, -1.0, 10**400)]
IMPOSSIBLE += [dict(embed_scale=math.inf), dict(norm_eps=math.nan), dict(n_ff=2**31), dict(n_embd=10**400)]


@pytest.mark.parametrize("wrong", IMPOSSIBLE)
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ValueError, match=min(wrong)) as error:
        HRMConfig(**wrong)
    assert len(str(error.value)) < 150


def test_initial_weights():
    model = tiny_model(n_embd=128)
    for name, w in model.named_parameters():
        std = w.size(1) ** -0.5
        assert w.std().item() == pytest.approx(std, rel=0.03), name
        assert w.abs().max() < 3.05 * std
    assert "z_L_init" in model.state_dict() and not model.z_L_init.requires_grad


def test_optimizer_follows_the_formula():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(3, 5))
    idle = torch.nn.Parameter(torch.randn(4))
    late = torch.nn.Parameter(torch.randn(2))  # gets its first gradient at step 3, and then counts from 1
    optimizer = AdamATan2([p, idle, late], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, ema=0.8)
    want = {q: [q.detach().double().clone(), 0.0, 0.0, q.detach().double().clone(), 0] for q in (p, late)}
    idle_before = idle.detach().clone()
    for step in range(5):
        for q in want:
            q.grad = torch.randn_like(q) if q is p or step >= 2 else None
            if q.grad is None:
                continue
            q.grad.view(-1)[0] = 0.0  # a weight that never has a gradient only decays
            x, m, v, average, t = want[q]
            g, t = q.grad.double(), t + 1
            x = x * (1 - 0.01 * 0.1)
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            x = x - 0.01 / (1 - 0.9**t) * torch.atan2(m, v.sqrt() / (1 - 0.95**t) ** 0.5)
            want[q] = [x, m, v, 0.8 * average + 0.2 * x, t]
        optimizer.step()
    for q, (x, _, _, average, _) in want.items():
        assert close(q, x, 1e-6) and close(optimizer.state[q]["ema"], average, 1e-6)
    assert torch.equal(idle, idle_before) and torch.equal(optimizer.state[idle]["ema"], idle_before)
    with optimizer.averaged():
        assert close(p, want[p][3], 1e-6)
    assert close(p, want[p][0], 1e-6)


# ----------------------------------------------------------------------------------------------------
# independent implementations


def our_name(hf_name):
    name = hf_name.removeprefix("model.").removesuffix(".weight").replace("embed_tokens", "embed")
    return re.sub(r"([HL])_module\.layers\.(\d+)\.\w+\.", r"\1.\2.", name)


@pytest.mark.skipif(
    "HRM_REFERENCE" not in os.environ, reason="HRM_REFERENCE names no directory of the published code's numbers"
)
def test_published_code():
    """Logits, loss, gradients and four optimizer steps that the published code computed, to 1e-5."""
    from safetensors.torch import load_file

    directory = Path(os.environ["HRM_REFERENCE"])
    vectors = np.load(directory / "vectors.npz")
    weights = {our_name(k): v for k, v in load_file(directory / "model.safetensors").items()}
    idx, targets, doc, prefix = (torch.from_numpy(vectors[k])[None] for k in ("x", "y", "doc", "is_prefix"))
    prefix = prefix.bool()

    def section(name):
        return {our_name(k.partition("/")[2]): vectors[k] for k in vectors if k.startswith(name + "/")}

    model = HRM(HRMConfig(vocab_size=256, block_size=128, n_layer=4, n_head=2, n_embd=64))
    model.load_state_dict(weights)
    real = doc[0] >= 0
    assert close(model(idx, doc=doc, prefix=prefix)[0][0, real], vectors["logits"][real])
    for bp_steps in (2, 3, 5):
        model.zero_grad()
        loss = model(idx, targets, doc, prefix, bp_steps)[1]
        loss.backward()
        assert close(loss, vectors["loss"])
        want = section(f"grad_bp{bp_steps}")
        assert gradients(model).keys() == want.keys()
        for name, g in gradients(model).items():
            assert close(g, want[name]), name
    optimizer = AdamATan2(model.parameters(), lr=3e-3, weight_decay=0.1, ema=0.9)
    for want in vectors["train_losses"]:
        optimizer.zero_grad()
        loss = model(idx, targets, doc, prefix, 5)[1]
        assert close(loss, want)
        loss.backward()
        optimizer.step()
    params, averages = section("param_after4"), section("ema_after4")
    for name, p in model.named_parameters():
        assert close(p, params[name]) and close(optimizer.state[p]["ema"], averages[name]), name
