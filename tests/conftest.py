"""What the tests share: a tiny model, a tiny dataset, and the model once more, written as plainly as can be."""

import os
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # two files are tested at a time, and a number that changes compiles anew

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from scripts import ROOT  # noqa: E402

sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from model import HRM, HRMConfig  # noqa: E402


def tiny_model(**changes):
    torch.manual_seed(0)
    return HRM(HRMConfig(**{**dict(vocab_size=263, block_size=64, n_layer=4, n_head=2, n_embd=32), **changes}))


def documents(lengths=((9, 7), (1, 3), (17, 1), (4, 12)), vocab_size=263):
    """Random documents as (ids, length of the prefix), from (prefix, response) lengths."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(vocab_size, (p + r,), generator=generator), p) for p, r in lengths]


def pack(docs, T):
    """One row (1, T) of idx, targets, doc, prefix that holds documents one after the other, padded at the end."""
    idx, targets = torch.zeros(1, T, dtype=torch.long), torch.full((1, T), -100)
    doc, prefix = torch.full((1, T), -1), torch.zeros(1, T, dtype=torch.bool)
    at = 0
    for number, (ids, p) in enumerate(docs):
        n = len(ids) - 1
        idx[0, at : at + n] = ids[:-1]
        targets[0, at + p - 1 : at + n] = ids[p:]
        doc[0, at : at + n] = number
        prefix[0, at : at + p] = True
        at += n
    return idx, targets, doc, prefix


def close(a, b, tolerance=1e-5):
    """Whether the largest difference is small against the largest value."""
    a, b = torch.as_tensor(a).detach().double(), torch.as_tensor(b).detach().double()
    return ((a - b).abs().max() / b.abs().max()).item() < tolerance


def plain_logits(model, ids, n_prefix, bp_steps=None, earlier=False):
    """Logits (T, vocab_size) of one document from the model's weights alone: loops, one dense mask, explicit detach.
    earlier: those of z_H before the last H-step."""
    c, T, dim = model.config, len(ids), model.config.n_embd // model.config.n_head
    place = torch.arange(T)
    visible = place[None, :] <= place[:, None]
    if c.prefix_lm:
        visible = visible | (place[None, :] < n_prefix)
    theta = c.rope_theta ** (-torch.arange(0, dim, 2) / dim)
    turn = torch.polar(torch.ones(T, dim // 2), place[:, None] * theta)  # rotate-half pairs channel i with i + dim/2

    def rms(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt()

    def rope(x):
        pairs = torch.complex(x[:, : dim // 2], x[:, dim // 2 :]) * turn
        return torch.cat((pairs.real, pairs.imag), dim=-1)

    post = c.norm == "post"

    def block(x, b):
        y = x if post else rms(x)
        gate, q, k, v = (y @ w.T for w in b.gqkv_proj.chunk(4))
        heads = []
        for h in range(c.n_head):
            at = slice(h * dim, (h + 1) * dim)
            score = rope(q[:, at]) @ rope(k[:, at]).T / dim**0.5
            heads.append(score.masked_fill(~visible, -torch.inf).softmax(-1) @ v[:, at])
        x = x + (torch.sigmoid(gate) * torch.cat(heads, dim=-1)) @ b.o_proj.T
        x = rms(x) if post else x
        gate, up = ((x if post else rms(x)) @ w.T for w in b.gate_up_proj.chunk(2))
        x = x + (F.silu(gate) * up) @ b.down_proj.T
        return rms(x) if post else x

    def stack(x, blocks, ends=True):
        for b in blocks:
            x = block(x, b)
        return rms(x) if ends and c.norm == "magic" else x

    def logits(z):
        return (rms(z) if c.norm == "pre" else z) @ model.lm_head.T

    H, L = model.H, (model.H if c.recurrence == "trm" else model.L)
    K = bp_steps or c.n_steps
    if c.recurrence not in ("hrm", "trm"):
        n = c.H_cycles * (c.L_cycles + 1)
        names = {"transformer": "HL", "looped": "HL" * ((n + 1) // 2), "rins": "H" * (n - 1) + "L"}[c.recurrence]
        x = model.embed[ids] * c.n_embd**0.5
        z = torch.zeros_like(x) if c.recurrence == "transformer" else model.z_L_init.expand(T, -1)
        for i, name in enumerate(names):
            z = stack(z + x, H, ends=c.recurrence == "rins") if name == "H" else stack(z, L)
            z = z if i >= len(names) - K else z.detach()
        return logits(z)
    H_grad = min(c.H_cycles, K - 1)
    L_grad = K - H_grad
    H_left, L_left = c.H_cycles, c.H_cycles * c.L_cycles
    z_H, z_L = model.embed[ids] * c.n_embd**0.5, model.z_L_init.expand(T, -1)
    while H_left:
        for _ in range(c.L_cycles):
            z_L = stack(z_L + z_H, L)
            z_L = z_L if L_left <= L_grad else z_L.detach()
            L_left -= 1
        before, z_H = z_H, stack(z_H + z_L, H)
        z_H = z_H if H_left <= H_grad else z_H.detach()
        H_left -= 1
    return logits(before if earlier else z_H)


@pytest.fixture(scope="session")
def problems_dir(tmp_path_factory):
    """A small prepared dataset of word problems."""
    directory = tmp_path_factory.mktemp("data") / "problems"
    data.prepare(directory, n_problems=300, n_val_problems=20)
    return directory


@pytest.fixture
def workplace(tmp_path, problems_dir):
    """A directory to run in, with data/problems."""
    shutil.copytree(problems_dir, tmp_path / "data" / "problems")
    return tmp_path


def pytest_collection_modifyitems(items):
    """The files that take longest come first, or one of the two workers would end with nothing left to do."""
    slow = ["test_crash", "test_ranks", "test_model", "test_train"]
    items.sort(key=lambda item: slow.index(item.path.stem) if item.path.stem in slow else len(slow))


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=0, help="kills at random moments, per number of ranks (test_crash)")
    parser.addoption("--fuzz", type=int, default=4, help="cases per fuzzed kind of input (test_fuzz)")


def pytest_configure(config):
    from hypothesis import HealthCheck, settings

    cases, checks = config.getoption("--fuzz"), list(HealthCheck)
    settings.register_profile("fuzz", max_examples=cases, deadline=None, database=None, suppress_health_check=checks)
    settings.register_profile("suite", settings.get_profile("fuzz"), derandomize=True)  # the same cases every time
    settings.load_profile("suite" if cases == 4 else "fuzz")
