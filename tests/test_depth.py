"""Adaptive depth against a plain loop, and the diagnostics of a checkpoint against what they must be."""

import pytest
import torch
import torch.nn.functional as F
from conftest import documents, tiny_model

from attention import attend, padded_batches
from generate import choose_ids, generate
from model import output_and_mlp, project_gqkv, visible_keys


def adaptive_logits(model, ids, n_prefix):
    """Logits of a document's last token, and how many H-cycles each token takes, when the prefix as one, and then each
    token, ends with the first cycle whose prediction is less than model.kl_threshold from the one before, and shows the
    keys and values of its last cycle to those that take more."""
    c, T, H_state, calls = model.config, len(ids), [], []
    prefix = torch.arange(T)[None] < n_prefix
    mask = padded_batches(*visible_keys(torch.zeros_like(ids)[None], prefix), c.n_head, "cpu", torch.float32)
    done, n_calls = torch.full((T,), c.H_cycles), (c.L_cycles + 1) * c.n_layer // 2
    result = torch.zeros(T, c.vocab_size)

    def run_block(x, w, cos, sin):
        h, k = divmod(len(calls), n_calls)
        g, q, *kv = project_gqkv(x, w.gqkv_proj, cos, sin, c.norm_eps)
        if h:
            old = calls[(h - 1) * n_calls + k]
            kv = [torch.where((done <= h)[None, :, None, None], a, b) for a, b in zip(old, kv)]
        calls.append(kv)
        return output_and_mlp(x, g, attend(q, *kv, mask), *w[1:], c.norm_eps)

    def settled(z_H):
        H_state.append((z_H[0] @ model.lm_head.T).log_softmax(-1))
        h = len(H_state)
        result[done >= h] = H_state[-1][done >= h]
        if h > 1:
            new, old = H_state[-1], H_state[-2]
            small = F.kl_div(old, new, log_target=True, reduction="none").sum(-1) < model.kl_threshold
            small[:n_prefix] = small[n_prefix - 1].clone()
            done[small & (done > h)] = h

    model.recurrence(ids[None], torch.arange(T)[None], model.cast_weights(), run_block, settled=settled)
    return result[-1], done


@pytest.mark.parametrize("threshold", [1e-9, 0.02, 0.05, 0.1, 1e9])
@torch.no_grad()
def test_cycles_end_where_the_prediction_settles(threshold):
    """Each answer is that of a plain loop, whatever is beside it and in however many slots."""
    model = tiny_model(H_cycles=4, L_cycles=1)
    prompts = [ids.tolist() for ids, _ in documents([(n, 0) for n in (5, 1, 23, 9, 14)])]
    full, two = model.generate(prompts, 10), tiny_model(H_cycles=2, L_cycles=1).generate(prompts, 10)
    model.kl_threshold, taken = threshold, set()
    for slots in 1, 3, 5:
        spent = [[] for _ in prompts]
        new = generate(model, prompts, 10, slots=slots, spent=spent)
        for prompt, continuation, cycles in zip(prompts, new, spent):
            logits, done = adaptive_logits(model, torch.tensor(prompt + continuation[:-1]), len(prompt))
            assert done[len(prompt) - 1 :].tolist() == cycles and logits.argmax() == continuation[-1]
            taken |= {*cycles}
    assert {1e-9: new == full and taken == {4}, 1e9: new == two and taken == {2}}.get(threshold, len(taken) > 1)


@torch.no_grad()
def test_without_a_threshold_depth_is_fixed_bit_by_bit(monkeypatch):
    """The recurrence is asked nothing, and where no prediction ever settles the logits are the same bits."""
    model, seen = tiny_model(H_cycles=3), []
    prompts = [ids.tolist() for ids, _ in documents([(n, 0) for n in (5, 1, 23)])]
    choose = choose_ids
    monkeypatch.setattr("generate.choose_ids", lambda *args: seen[-1].append(args[-1].clone()) or choose(*args))
    for threshold in 0.0, 1e-45:
        seen.append([])
        model.kl_threshold = threshold
        model.generate(prompts, 8)
    assert len(seen[0]) == 8 and all(torch.equal(a, b) for a, b in zip(*seen))
