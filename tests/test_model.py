"""The model against plain loops over single documents, and the rules it promises."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import documents, pack, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from checkpoint import hf_name, load_model
from model import RECURRENCES, HRMConfig, visible_keys
from optim import AdamATan2, MovingAverage

DOCS = documents((5, 4), (1, 3), (9, 2), (3, 7))


def plain_block(block, x, mask, config):
    def attend(x):
        T = len(x)
        g, q, k, v = (x @ block.attn.gqkv_proj.weight.T).view(T, 4, config.n_head, -1).unbind(1)
        half = config.head_dim // 2
        angle = torch.arange(T)[:, None] * config.rope_theta ** -(torch.arange(half) / half)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        q, k = (turn * torch.complex(t[..., :half], t[..., half:]) for t in (q, k))
        q, k = (torch.cat((t.real, t.imag), -1) for t in (q, k))
        scores = torch.einsum("qhc,khc->hqk", q, k) / config.head_dim**0.5
        p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        y = torch.einsum("hqk,khc->qhc", p, v) * g.sigmoid()
        return y.flatten(1) @ block.attn.o_proj.weight.T

    def mlp(x):
        a, b = (x @ block.mlp.gate_up_proj.weight.T).chunk(2, -1)
        return (a * a.sigmoid() * b) @ block.mlp.down_proj.weight.T

    if config.norm == "post":
        x = plain_norm(x + attend(x))
        return plain_norm(x + mlp(x))
    x = x + attend(plain_norm(x))
    return x + mlp(plain_norm(x))


def plain_norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def plain_steps(model, x, H, L, z):
    """The states, step by step, as (whether it is an H-step, function that makes it)."""
    c = model.config
    if c.recurrence in ("hrm", "trm"):
        z_H, z_L = x, z
        for _ in range(c.H_cycles):
            for _ in range(c.L_cycles):
                z_L = L(z_L + z_H, "L")
            z_H = H(z_H + z_L, "H")
        return z_H
    if c.recurrence == "rins":
        for _ in range(c.n_steps - 1):
            z = H(z + x, "H")
        return L(z, "L")
    z = 0 * x if c.recurrence == "transformer" else z
    for _ in range(c.n_steps // 2):
        z = L(H(z + x, "inner"), "L")
    return z


def plain_logits(model, ids, n_prefix, bp_steps):
    """A document alone; steps before the last bp_steps are detached."""
    c = model.config
    ids = ids[:-1]
    q, k = torch.arange(len(ids))[:, None], torch.arange(len(ids))
    mask = k <= q
    if c.prefix_lm:
        mask = mask | ((q < n_prefix) & (k < n_prefix))
    n = c.n_steps
    kinds = ["L"] * c.L_cycles + ["H"]
    carry = [i >= n - bp_steps for i in range(n)]
    if c.recurrence in ("hrm", "trm"):
        n_H = min(c.H_cycles, bp_steps - 1)
        kinds = kinds * c.H_cycles
        left = {"H": n_H, "L": bp_steps - n_H}
        for i in reversed(range(n)):
            carry[i] = left[kinds[i]] > 0
            left[kinds[i]] -= 1
    numbers = iter(range(n))

    def stack(module):
        def apply(z, kind):
            with torch.set_grad_enabled(carry[next(numbers)]):
                for block in module.layers:
                    z = plain_block(block, z, mask, c)
                return plain_norm(z) if c.norm == "magic" and kind != "inner" else z

        return apply

    x = F.embedding(ids, model.embed_tokens.weight) * c.embed_scale
    H = stack(model.H_module)
    L = stack(model.L_module or model.H_module)
    z = plain_steps(model, x, H, L, model.z_L_init.expand_as(x))
    if c.norm == "pre":
        z = plain_norm(z)
    return z @ model.lm_head.weight.T


CASES = [(r, "magic", k) for r in RECURRENCES for k in (2, 3, 5) if r != "transformer" or k == 2]
CASES += [("hrm", "pre", 5), ("hrm", "post", 5), ("looped", "post", 8), ("transformer", "pre", 2)]


@pytest.mark.parametrize("recurrence, norm, bp_steps", CASES)
def test_a_packed_row_equals_its_documents_alone(recurrence, norm, bp_steps):
    """Logits, loss and gradients are those of plain loops."""
    model = tiny_model(recurrence=recurrence, norm=norm)
    row = pack(DOCS, 40)
    logits = model(row[0], doc=row[2], prefix=row[3])[0][0]
    model(*row, bp_steps=bp_steps)[1].backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    losses, start = [], 0
    for ids, n_prefix in DOCS:
        plain = plain_logits(model, ids, n_prefix, bp_steps)
        end = start + len(plain)
        torch.testing.assert_close(logits[start:end], plain, rtol=1e-4, atol=1e-5)
        response = plain[n_prefix - 1 :]
        losses.append(F.cross_entropy(response, ids[n_prefix:], reduction="none"))
        start = end
    torch.cat(losses).mean().backward()
    for (name, p), grad in zip(model.named_parameters(), grads):
        if p.grad is None:
            assert grad is None, name
        else:
            torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_with_two_steps_the_embedding_has_no_gradient():
    model = tiny_model()
    model(*pack(DOCS, 40), bp_steps=2)[1].backward()
    assert model.embed_tokens.weight.grad is None and model.lm_head.weight.grad is not None


@pytest.mark.parametrize("bp_steps", [2, 3, 5, 8])
def test_gradients_in_bfloat16_agree_with_fp32(bp_steps):
    model = tiny_model()
    grads = []
    for model.dtype in torch.float32, torch.bfloat16:
        model.zero_grad()
        model(*pack(DOCS, 40), bp_steps=bp_steps)[1].backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads):
        assert b.dtype == torch.float32
        assert (a - b).norm() < 0.05 * a.norm()


def test_the_mask_rule():
    """Against the rule as a sentence: same document, and before or both in the prefix."""
    _, _, doc, prefix = pack(DOCS, 40)
    first, last = visible_keys(doc, prefix)
    for q in range(40):
        for k in range(40):
            same = doc[0, q] == doc[0, k]
            sees = same and (k <= q or (prefix[0, q] and prefix[0, k]))
            assert sees == (first[0, q] <= k < last[0, q]), (q, k)


def test_a_causal_model_does_not_see_the_rest_of_the_prefix():
    model = tiny_model(prefix_lm=False)
    ids = torch.arange(1, 9)[None]
    prefix = torch.ones_like(ids, dtype=torch.bool)
    logits = model(ids, prefix=prefix)[0]
    ids[0, -1] = 99
    changed = model(ids, prefix=prefix)[0]
    torch.testing.assert_close(logits[0, :-1], changed[0, :-1])


@pytest.mark.parametrize("what", ["chunks", "recompute"])
def test_what_saves_memory_changes_no_gradient(what, monkeypatch):
    model = tiny_model()
    row = pack(DOCS, 40)
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(*row, bp_steps=5)[1].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        if what == "chunks":
            monkeypatch.setattr(model_file, "MAX_LOGITS", 3 * 300)
        model.recompute = what == "recompute"
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_the_share_of_targets_predicted():
    model = tiny_model()
    idx, targets, doc, prefix = pack(DOCS, 40)
    best = model(idx, doc=doc, prefix=prefix)[0].argmax(-1)
    model(idx, targets, doc, prefix)
    assert model.correct.tolist() == (best == targets)[targets >= 0].tolist()


def test_guidance_combines_the_logits_of_two_H_steps():
    model = tiny_model()
    idx = torch.arange(9)[None]
    last = model(idx)[0]
    model.guidance = 0.5
    guided = model(idx)[0]
    model.guidance = -1.0  # the H-step before, alone
    before = model(idx)[0]
    torch.testing.assert_close(guided, 1.5 * last - 0.5 * before, rtol=1e-4, atol=1e-4)
    model = tiny_model(recurrence="looped")
    model.guidance = 0.5
    with pytest.raises(AssertionError, match="guidance compares H-steps"):
        model(idx)


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_flops_are_those_that_torch_counts(recurrence):
    """With every position a target; attention scores, in bmm, are not counted."""
    model = tiny_model(recurrence=recurrence)
    idx = torch.zeros(1, 64, dtype=torch.long)
    K = min(5, model.config.n_steps)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx, bp_steps=K)[1].backward()
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    head_again = 2 * 300 * 32  # the loss computes its logits twice
    first_input = model.config.n_embd * 4 * model.config.n_embd  # has no gradient if z is constant
    expected = 64 * (model.flops_per_token(K) + head_again)
    assert expected - 64 * 2 * first_input <= counted <= expected


WRONG = {
    "recurrence must be one of": dict(recurrence="gru"),
    "n_layer must be even": dict(n_layer=3),
    "n_embd must be a multiple of n_head": dict(n_head=3),
    "n_embd / n_head must be even": dict(n_head=32),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_an_impossible_shape_is_refused(sentence):
    with pytest.raises(AssertionError, match=sentence):
        tiny_model(**WRONG[sentence])


def test_what_is_too_long_or_too_deep_is_refused():
    with pytest.raises(AssertionError, match="exceed block_size 128"):
        tiny_model()(torch.zeros(1, 129, dtype=torch.long))
    with pytest.raises(AssertionError, match="bp_steps must be from 2 to 8, not 9"):
        tiny_model()(torch.zeros(1, 9, dtype=torch.long), bp_steps=9)


def test_weights_start_with_the_variance_of_their_inputs():
    model = tiny_model(n_embd=256)
    for weight in model.lm_head.weight, model.H_module.layers[0].attn.o_proj.weight:
        assert abs(weight.std() * 16 - 1) < 0.02 and weight.abs().max() * 16 < 3.05
    assert HRMConfig(n_embd=1536, n_head=12).n_ff == 4096


@pytest.mark.slow
def test_one_compilation_serves_all_blocks_and_documents():
    torch.compiler.reset()
    model = tiny_model(n_layer=6)
    counts = torch._dynamo.utils.counters["stats"]
    row = pack(DOCS, 40)
    plain = model(*row, bp_steps=5)[1].item()
    model.compile_blocks(dynamic=False)
    assert abs(model(*row, bp_steps=2)[1].item() - plain) < 1e-4
    model(*row, bp_steps=5)[1].backward()
    before = counts["unique_graphs"]
    for docs in documents((5, 4), (20, 9)), documents((3, 3), (2, 2), (7, 20)):
        for K in 2, 5, 3:
            model(*pack(docs, 40), bp_steps=K)[1].backward()
    assert counts["unique_graphs"] <= before + 3  # K = 2 and 3 begin with another input


@pytest.mark.skipif("HRM_REFERENCE" not in os.environ, reason="needs the published code's numbers")
def test_the_numbers_of_the_published_code():
    """HRM_REFERENCE: a directory with a tiny model and what the published code computes."""
    directory = Path(os.environ["HRM_REFERENCE"])
    model = load_model(str(directory))
    vectors = {k: torch.from_numpy(v) for k, v in np.load(directory / "vectors.npz").items()}
    idx, targets, doc, prefix = (vectors[k][None] for k in ("x", "y", "doc", "is_prefix"))
    row = idx.long(), targets.long(), doc, prefix.bool()

    def same(a, key):
        expected = vectors[key].float()
        torch.testing.assert_close(a, expected, rtol=1e-5, atol=1e-5, msg=key)

    logits = model(row[0], doc=row[2], prefix=row[3])[0][0]
    real = doc[0] >= 0
    torch.testing.assert_close(logits[real], vectors["logits"][real], rtol=1e-5, atol=1e-5)
    for K in 2, 3, 5:
        model.zero_grad()
        loss = model(*row, bp_steps=K)[1]
        same(loss.detach(), "loss")
        loss.backward()
        for name, p in model.named_parameters():
            key = f"grad_bp{K}/{hf_name(name)}"
            assert (p.grad is None) == (key not in vectors)
            if p.grad is not None:
                same(p.grad, key)
    optimizer, average = AdamATan2(model.parameters(), 3e-3), MovingAverage(model)
    for expected in vectors["train_losses"]:
        model.zero_grad()
        loss = model(*row, bp_steps=5)[1]
        assert abs(loss.item() - expected) < 1e-5
        loss.backward()
        optimizer.step()
        average.update(0.9)
    for name, p in model.named_parameters():
        same(p.detach(), f"param_after4/{hf_name(name)}")
        same(average.tensors[name], f"ema_after4/{hf_name(name)}")
