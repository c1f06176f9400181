"""What only a CUDA card can show; bench_gpu.py runs the same checks on the shapes of a large model."""

import json
import subprocess

import pytest
import torch
from conftest import documents, pack, tiny_model
from scripts import ENV, command

import generate
from checkpoint import host_buffers
from checks import check_generation, check_optimizer, check_training, is_right

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


def small_model():
    return tiny_model(n_embd=128, block_size=512).cuda()


def test_packed_rows_by_flex():
    """Every kernel that runs here has the loss and gradients of fp32 SDPA over padded documents."""
    rows = (pack(documents([(9, 7), (1, 3), (100, 211), (40, 90)]), 512), pack(documents([(300, 200)]), 512))
    table = dict(check_training(small_model(), [torch.cat(pair) for pair in zip(*rows)]))
    assert all(map(is_right, table.values())), table
    assert "gradients" in table["float32, flex"] and "gradients" in table["bfloat16, flex"]


def test_generation_by_cuda_graphs():
    table = dict(check_generation(small_model(), [ids[:p].tolist() for ids, p in documents()], 40))
    assert all(map(is_right, table.values())), table
    assert "answers" in table["float32, CUDA graphs"] and "answers" in table["bfloat16, CUDA graphs"]


def test_compiled_optimizer():
    table = dict(check_optimizer("cuda"))
    assert all(map(is_right, table.values())), table


def test_the_same_weights_for_the_same_seed():
    with torch.device("cuda"):
        first, second = (tiny_model().state_dict().values() for _ in range(2))
    assert all(map(torch.equal, first, second)) and all(t.is_cuda for t in first)


def test_a_second_generation_records_no_graph(monkeypatch):
    recorded, capture = [], generate.capture_cuda_graph
    monkeypatch.setattr(generate, "capture_cuda_graph", lambda *args: recorded.append(args) or capture(*args))
    model, prompts = small_model(), [ids[:p].tolist() for ids, p in documents()]
    model.set_compute(torch.bfloat16, compile=True)
    first = model.generate(prompts, 20)
    assert recorded and model.engine
    before = len(recorded)
    assert model.generate(prompts, 20) == first and len(recorded) == before
    with torch.no_grad():
        model.lm_head.neg_()  # the graphs read the weights as they are now
    assert model.generate(prompts, 20) != first and len(recorded) == before


def test_memory_for_checkpoints_is_pinned():
    tensors = [torch.arange(n, device="cuda").to(dtype) for n in (1, 7, 1000) for dtype in (torch.float32, torch.int64)]
    buffers = host_buffers(tensors, True)
    assert all(buffer.is_pinned() for buffer in buffers)
    for buffer, tensor in zip(buffers, tensors):
        buffer.copy_(tensor, non_blocking=True)
    torch.cuda.synchronize()
    assert all(torch.equal(buffer, tensor.cpu()) for buffer, tensor in zip(buffers, tensors))


def test_train_resume_sample_and_evaluate(workplace):
    def run(script, *args):  # not forked, as a fork cannot use CUDA if its parent might have
        start = command(script, "--device=cuda", "--dtype=bfloat16", *args)
        done = subprocess.run(start, cwd=workplace, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    args = "--n_layer=2 --n_embd=32 --block_size=256 --batch_size=4 --warmup_iters=5 --log_interval=1".split()
    said = run("train.py", *args, "--max_iters=5")
    assert "finished at step 5" in said and "peak memory" in said
    said = run("train.py", *args, "--max_iters=8", "--init_from=resume")
    assert "resuming out at step 5" in said and "finished at step 8" in said
    lines = [json.loads(line) for line in (workplace / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in lines if "loss" in line] == list(range(1, 9))
    for script in "sample.py", "eval.py":
        assert "on cuda" in run(script, "--max_new_tokens=8")
