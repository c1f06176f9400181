"""What only a CUDA card can show: the same numbers as on the CPU."""

import pytest
import torch
from conftest import TINY, documents, pack, tiny_model

from generate import generate
from optim import AdamATan2

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


def small_model():
    return tiny_model(n_embd=128, block_size=512)


def loss_and_gradients(model, rows):
    model.zero_grad()
    loss = model(*rows, bp_steps=5)[1]
    loss.backward()
    return [loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters())]


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("compile", [False, True])
def test_packed_rows_have_the_loss_and_gradients_of_the_cpu(dtype, bound, compile):
    torch.compiler.reset()
    rows = (
        pack(documents((9, 7), (1, 3), (100, 211), (40, 90)), 512),
        pack(documents((300, 200)), 512),
    )
    rows = [torch.cat(pair) for pair in zip(*rows)]
    expected = loss_and_gradients(small_model(), rows)
    model = small_model().cuda()
    model.dtype = dtype
    if compile:
        model.compile_blocks(dynamic=False)
    for a, b in zip(loss_and_gradients(model, rows), expected):
        assert (a - b).norm() < bound * b.norm()


@pytest.mark.parametrize("compile", [False, True])
def test_cuda_graphs_give_the_answers_of_the_cpu_and_are_kept(compile):
    torch.compiler.reset()
    prompts = [ids[:p].tolist() for ids, p in documents((5, 1), (30, 1), (1, 1), (80, 1))]
    expected = generate(small_model(), prompts, 40)
    model = small_model().cuda()
    if compile:
        model.compile_blocks()
    assert generate(model, prompts, 40) == expected
    graphs = dict(model.engine.graphs)
    assert generate(model, prompts, 40) == expected
    assert graphs and model.engine.graphs == graphs
    with torch.no_grad():
        model.lm_head.weight.neg_()  # the graphs read the weights as they are now
    assert generate(model, prompts, 40) != expected


def test_the_compiled_optimizer():
    results = []
    for device in "cpu", "cuda":
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, 256).to(device)) for n in (256, 512)]
        optimizer = AdamATan2(params, lr=1e-2, compile=device == "cuda")
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape).to(device)
            optimizer.step()
        results.append(params)
    for a, b in zip(*results):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-5)


def test_the_same_weights_for_the_same_seed():
    with torch.device("cuda"):
        first, second = (tiny_model().state_dict().values() for _ in range(2))
    assert all(map(torch.equal, first, second)) and all(t.is_cuda for t in first)


def test_train_resume_and_sample(run):
    args = [*TINY, "--device=cuda", "--dtype=bfloat16", "--compile=True", "--log_interval=1"]
    said = run("train.py", *args, "--max_iters=5", "--sample_prompts=1")
    assert "saved out/step-0000005" in said and "peak memory" in said
    said = run("train.py", "--init_from=resume", "--max_iters=8")
    assert "resuming out/step-0000005" in said and "saved out/step-0000008" in said
    assert "on cuda:0, torch.bfloat16" in run("sample.py", "--max_new_tokens=8", "--prompt=2+2?")
