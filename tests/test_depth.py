"""Adaptive depth against a plain loop, and the diagnostics of a checkpoint against what they must be."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import close, documents, pack, plain_logits, tiny_model
from scripts import TINY, run

import diagnose
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
        g, q, *kv = project_gqkv(x, w.gqkv_proj, cos, sin, c.norm_eps, False)
        if h:
            old = calls[(h - 1) * n_calls + k]
            kv = [torch.where((done <= h)[None, :, None, None], a, b) for a, b in zip(old, kv)]
        calls.append(kv)
        return output_and_mlp(x, g, attend(q, *kv, mask), *w[1:], c.norm_eps, False)

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


# ----------------------------------------------------------------------------------------------------
# diagnostics


@pytest.fixture(scope="module")
def rows():
    docs = [pack([d], 32) for d in documents()]
    return [torch.cat(tensors) for tensors in zip(*docs)]


SHAPES = [{}, dict(H_cycles=3, L_cycles=1, n_layer=2), dict(recurrence="trm", prefix_lm=False)]


@pytest.mark.parametrize("shape", SHAPES)
def test_states_of_the_steps(shape, rows):
    """The last is the model's own prediction; earlier ones are those of the plain model, cut short."""
    model = tiny_model(**shape)
    found, c = diagnose.trace(model, *rows), model.config
    H_steps = [(h + 1) * (c.L_cycles + 1) - 1 for h in range(c.H_cycles)]
    assert [i for i, name in enumerate(found["step"]) if name == f"{i + 1} H"] == H_steps
    assert found["KL"][-1] == 0 and found["agrees"][-1] == 1 and (found["KL"][:-1] > 0).all()
    assert close(found["cosine"].diagonal(), torch.ones(c.n_steps)) and close(found["cosine"], found["cosine"].T)
    assert found["change"].shape == found["entropy"].shape == (c.n_steps, c.n_layer // 2)
    assert (found["entropy"] < found["uniform"] + 1e-5).all() and (found["change"] > 0).all()
    kl, n = 0.0, 0
    for ids, p in documents():
        final, earlier = (plain_logits(model, ids[:-1], p, earlier=e)[p - 1 :].log_softmax(-1) for e in (False, True))
        kl, n = kl + F.kl_div(earlier, final, log_target=True, reduction="sum").item(), n + len(final)
    assert close(found["KL"][H_steps[-2]], kl / n, 1e-4)
    assert close(model(*rows)[1], tiny_model(**shape)(*rows)[1])  # it is as before


def test_attention_of_equal_scores_has_the_entropy_of_as_many_keys():
    first, last = torch.tensor([[0, 0, 0, 3]]), torch.tensor([[3, 3, 3, 4]])
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 1, 2, 8).expand(1, 4, 2, 8)
    assert close(diagnose.attention_entropy(q, k, first, last), torch.tensor([[3, 3, 3, 1.0]]).log())
    sharp = diagnose.attention_entropy(1e4 * q, torch.randn(1, 4, 2, 8), first, last)
    assert (sharp < 0.01).all() and sharp.isfinite().all()


def test_gradients_of_fewer_steps_against_all(rows):
    model = tiny_model()
    found, parts = diagnose.gradients(model, rows), len(rows[0])  # a document each
    for by_steps in found.values():
        assert [*by_steps] == [*range(2, 9)] and by_steps[8][2] == pytest.approx(1, abs=1e-5)
    assert found["embed"][2][0] == 0 and math.isnan(found["embed"][2][2])  # no path reaches it
    norms = []
    for part in zip(*(t.split(1) for t in rows)):
        model.zero_grad()
        model(*part, 3)[1].backward()
        norms.append(torch.cat([p.grad.flatten() for p in model.L.parameters()]).norm().item())
    want = torch.tensor(norms)
    assert found["L"][3][:2] == pytest.approx((want.mean().item(), (want.std(correction=0) / want.mean()).item()))
    assert len(norms) == parts and 0 < found["L"][3][2] < 1


def test_a_checkpoint_gets_a_picture_and_tables(workplace):
    run(workplace, "train.py", *TINY, "--max_iters=2")
    said = run(workplace, "diagnose.py", "--documents=9", "--device=cpu", PLOTS="1").stdout
    text = (workplace / "out" / "diagnose.md").read_text()
    assert "| 8 H | " in text and "| 0.000 | 100.00% | 1.000 |" in text and "bp_steps  embed norm" in said
    assert text.count("| - | - |") == 1 and (workplace / "out" / "diagnose.png").stat().st_size > 10000
    failed = run(workplace, "diagnose.py", "--documents=0", ok=False)
    assert failed.stderr == "diagnose.py: documents must be at least 1, not 0\n"
    failed = run(workplace, "diagnose.py", "--picture=x.abc", "--documents=1", ok=False, PLOTS="1")
    assert failed.stderr.startswith("diagnose.py: x.abc could not be written: Format 'abc' is not supported")
    failed = run(workplace, "diagnose.py", "--out_dir=nowhere", ok=False)
    assert failed.stderr == "diagnose.py: there is no directory nowhere with a model\n"
