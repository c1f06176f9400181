"""Whether a device computes right: packed rows, captured generation, the compiled optimizer. For bench_gpu.py and the
tests. Each check yields (what, {what differs: by how much, relatively; "bound": the most that any of them may}), or
(what, {"result": why there is none})."""

import math
import time
import warnings
from functools import partial
from unittest.mock import patch

import torch

import generate
from attention import FLEX_KERNELS
from common import one_line
from optim import AdamATan2

NEEDS_CUDA = {"result": "needs cuda"}


def is_right(row):
    """Whether a check's row is as it should be; NaN is not."""
    failed = str(row.get("result")).startswith("failed")
    return not failed and all(x <= row["bound"] for x in row.values() if "bound" in row)


def tried(function, *args):
    """function(*args), or a row that says why it has failed, so that others go on."""
    try:
        return function(*args)
    except Exception as e:
        return {"result": f"failed: {one_line(e)}"}


def check_training(model, batch, compile=True, deadline=math.inf):
    """Losses and gradients of packed rows against those in fp32 by SDPA over padded documents, not compiled. In bf16,
    a kernel may differ from them little more than SDPA does. batch: idx, targets, doc, prefix, as the model takes.
    "tuned" starts before the deadline, a time of time.time(), or not at all."""

    def loss_and_gradients(dtype, kernel, compile):
        model.set_compute(dtype, kernel, compile)
        model.zero_grad()
        loss = model(*batch, bp_steps=min(5, model.config.n_steps))[1]
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    reference, on_cuda = loss_and_gradients(torch.float32, "sdpa", False), model.embed.is_cuda
    kernels = sorted(FLEX_KERNELS, key="tuned".__eq__)  # that last, as it takes longest
    for dtype, bound in (torch.float32, 1e-4), (torch.bfloat16, 0.1):
        for kernel in ("sdpa", *(k for k in kernels if k != "tuned" or dtype != torch.float32)):
            what = f"{str(dtype).removeprefix('torch.')}, {kernel}"
            if kernel != "sdpa" and not on_cuda:
                yield what, NEEDS_CUDA
                continue
            if kernel == "tuned" and time.time() > deadline:
                yield what, {"result": "no time left"}
                continue
            values = tried(loss_and_gradients, dtype, kernel, compile)
            if isinstance(values, dict) or model.attention != kernel:
                yield what, values if isinstance(values, dict) else {"result": "does not run here"}
                continue
            loss, *gradients = (((a - b).norm() / b.norm()).item() for a, b in zip(values, reference))
            yield what, {"loss": loss, "gradients": max(gradients), "bound": bound}
            if kernel == "sdpa" and dtype == torch.bfloat16:
                bound = 1.5 * max(gradients)


def check_generation(model, prompts, max_new_tokens, compile=True):
    """Shares of answers that differ: with CUDA graphs from those without, and in fp32 from the plain way."""

    def answers(dtype, kernel, compile, graphs):
        model.set_compute(dtype, kernel, compile)
        model.engine = None  # of before
        with patch.object(generate, "CUDA_GRAPH_DEVICES", {"cuda"} if graphs else set()), warnings.catch_warnings():
            warnings.filterwarnings("error", message="generation goes on more slowly")
            return model.generate(prompts, max_new_tokens)

    def row(a, b, bound):
        failed = [x for x in (a, b) if isinstance(x, dict)]
        return failed[0] if failed else {"answers": sum(map(list.__ne__, a, b)) / len(prompts), "bound": bound}

    plain, on_cuda = answers(torch.float32, "sdpa", False, False), model.embed.is_cuda
    for dtype in torch.float32, torch.bfloat16:
        name, without = str(dtype).removeprefix("torch."), tried(answers, dtype, "auto", compile, False)
        if dtype == torch.float32:
            yield f"{name} from the plain way", row(without, plain, 0.1)  # two logits may be all but equal
        with_graphs = tried(answers, dtype, "auto", compile, True) if on_cuda else None
        yield f"{name}, CUDA graphs", row(with_graphs, without, 0) if on_cuda else NEEDS_CUDA


def check_optimizer(device, compile=True):
    """Weights and moments after three steps of the compiled optimizer, from those of the one that is not."""
    results = []
    for compiled in False, compile:
        generator = torch.Generator(device).manual_seed(1)
        random = partial(torch.randn, generator=generator, device=device)
        params = [torch.nn.Parameter(random(n, 256)) for n in (256, 512)]
        optimizer = AdamATan2(params, lr=1e-3, ema=0.99, compile=compiled)
        for lr in 1e-3, 2e-3, 3e-3:
            optimizer.param_groups[0]["lr"] = lr
            for p in params:
                p.grad = random(*p.shape)
            optimizer.step()
        results.append([*params, *(optimizer.state[p][key] for p in params for key in ("m", "v", "ema"))])
    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(*results))
    yield "optimizer, compiled", {"weights and moments": difference, "bound": 1e-6}
