"""What a GPU gives: first whether it computes right, then how fast each part is. Within 10 minutes on one card.

    python bench_gpu.py config/hrm1b.py

Each part runs in a process of its own, which ends when its time is up: one that fails, or hangs, costs no other.
Prints figures as they come, and at the end tables for a README; all is in bench_gpu.json too.
"""

from configurator import configure

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

import bench
import generate
import ranks
from attention import FLEX_KERNELS, attend, flex_mask, working_kernel
from checks import NEEDS_CUDA, check_generation, check_optimizer, check_training, is_right
from common import exit_on_error
from devices import choose_device, free_memory
from isolate import run_parts
from loader import prefetch
from model import visible_keys
from optim import AdamATan2
from report import markdown, peak_flops
from train import train_step

# ---- settings ----
parts = ""  # some of those at the end of this file, as gemm,step; "": all
vocab_size = 65536
block_size = 4096
n_layer = 32
n_head = 12
n_embd = 1536
bp_steps = 5
micro_batch_size = 2  # rows, where but one number of them is measured
sizes = 1, 2, 3, 4, 6, 8, 12, 16, 24, 32  # of micro-batches, where several are
rows = 6  # of a step, at least: with 8 cards, one card's share of the 1B recipe
n_prompts = 256  # that are answered at a time, if their caches fit
max_new_tokens = 64
device = "auto"  # cpu, cuda or mps
dtype = "auto"  # float32 or bfloat16, as in train.py
attention = "auto"  # as in train.py
compile = True
settings = configure(globals())
compute = on_cuda = peak = gemm_rate = begin = deadline = cache = None  # of a part that runs; see main()


def now():
    """The time when the device has done all its work."""
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def seconds(run, least=0.1):
    """Of one run(): the median of three measurements of about `least` seconds each, after two to warm up."""
    n, times = 1, []
    for _ in range(5):
        clock = now()
        for _ in range(n):
            run()
        times.append((now() - clock) / n)
        n = max(1, int(least / times[-1])) if len(times) == 2 else n
    return statistics.median(times[2:])


def rate(flops, seconds):
    """FLOP/s, and their shares of what the card can do."""
    units = {"TFLOP/s": 1e12, "of the peak": peak, "of the GEMM rate": gemm_rate}
    return {what: flops / seconds / unit for what, unit in units.items() if unit}


def make_batches(n, n_rows, longer=1):
    """n batches of documents whose lengths are those of GSM8K's, or `longer` times those."""
    bench.batch_size = n_rows
    loader = bench.make_loader(bench.documents(max(512, 12 * n_rows * block_size // 128), longer))
    return list(islice(prefetch(loader, device), n))


def make_step():
    """A model, and a function that trains it on a batch, in micro-batches of a size."""
    model = bench.new_model()
    optimizer = AdamATan2(model.parameters(), lr=1e-4, ema=0.999, compile=compile)
    return model, lambda batch, size: train_step(model, optimizer, batch, bp_steps, size)[0]["loss"]


# ---- the parts: each yields (what, {figure: its value}) ----
def correct():
    vars(bench).update(n_layer=2, vocab_size=min(vocab_size, 4096))  # with the shapes that the whole model has too
    model, [batch], bad = bench.new_model(), make_batches(1, micro_batch_size), []
    generation = check_generation(model, [ids[:p].tolist() for ids, p in bench.documents(8)], 32, compile)
    training = check_training(model, batch[:4], compile, deadline - 60)  # "tuned" needs a minute
    for what, row in chain(check_optimizer(device, compile), generation, training):
        yield what, row
        bad += [] if is_right(row) else [what]
    if bad:
        raise ValueError(f"not right: {'; '.join(bad)}")


def gemm():
    """How fast memory is read, and the products with each weight, and with all as often as a step has them."""
    yield "memory", dict(zip(("GB/s", "GB"), bench.bandwidth()))
    model, n, options = bench.new_model("meta"), micro_batch_size * block_size, dict(device=device, dtype=compute)
    for name, p in [*model.H[0].named_parameters(), ("head", model.lm_head)]:
        x, w, dy = (torch.randn(*shape, **options) for shape in ((n, p.size(1)), p.shape, (n, p.size(0))))
        tera, work = 2e-12 * n * p.numel(), {"y": (x, w.mT), "dx": (dy, w), "dw": (dy.mT, x)}
        rates = {f"{what} TFLOP/s": tera / seconds(partial(torch.mm, *pair)) for what, pair in work.items()}
        yield f"{name} {tuple(p.shape)}", rates
    yield "all", rate(n * model.flops_per_token(bp_steps), seconds(bench.products(model, n, n, 1)))


def flex():
    """Attention of a block, by each kernel. FLOP are those of the pairs of a query and a key that it sees."""
    if not on_cuda:
        yield "flex", NEEDS_CUDA
        return
    shape = micro_batch_size, block_size, n_head, bench.new_model("meta").config.head_dim
    *qkv, dy = (torch.randn(shape, device=device, dtype=compute) for _ in range(4))
    qkv, keys = [t.requires_grad_() for t in qkv], {}
    for what, longer in ("short documents", 1), ("long", 9):
        [batch] = make_batches(1, micro_batch_size, longer)
        keys[what] = [t.to(device) for t in visible_keys(batch.doc, batch.prefix)]
    for kernel in sorted(FLEX_KERNELS, key="tuned".__eq__):  # that last, as it takes longest
        if working_kernel(kernel, *shape[2:], device, compute) != kernel:
            yield kernel, {"result": "does not run here"}
            continue
        for what, (first, last) in keys.items():
            run, pairs = partial(attend, *qkv, flex_mask(first, last, kernel)), (last - first).sum().item()
            forward, both = seconds(run), seconds(lambda run=run: torch.autograd.grad(run(), qkv, dy))
            flops = 2 * pairs * shape[2] * shape[3]  # of a product with each of these pairs; backward has q k once more
            row = {"ms": 1e3 * forward, "pairs seen": pairs / (micro_batch_size * block_size**2)}
            yield f"{kernel}, {what}: forward", row | rate(2 * flops, forward)
            yield f"{kernel}, {what}: backward", {"ms": 1e3 * (both - forward)} | rate(5 * flops, both - forward)


def step(mode="none", least=1, most=10**9, longer=1):
    """Whole training steps with larger and larger micro-batches, until memory is full, with a mode of recompute. The
    first time to a first step counts from the start of the process."""
    bench.recompute, start, took = mode, begin, 0.0
    model, run = make_step()
    for size in (size for size in sizes if least <= size <= most):
        what = f"micro-batches of {size}"
        if time.time() + 1.2 * took > deadline:
            yield what, {"result": "no time left"}
            break
        try:
            torch.cuda.reset_peak_memory_stats() if on_cuda else None
            first, warm, *batches = make_batches(5, -(-rows // size) * size, longer)
            row = {"rows": len(first.idx), "loss": run(first, size).item(), "first step s": time.time() - start}
            run(warm, size)
            clock = now()
            for batch in batches:
                run(batch, size)
            s, n_tokens = now() - clock, sum(batch.n_tokens for batch in batches)
        except RuntimeError as e:
            if not any(sign in str(e) for sign in ("out of memory", "ALLOC_FAILED")):
                raise
            yield what, {"result": "out of memory"}
            break
        row |= {"ms": 1e3 * s / len(batches), "tokens/s": n_tokens / s}
        row |= {"peak GB": torch.cuda.max_memory_allocated() / 1e9} if on_cuda else {}
        yield what, row | rate(model.flops_per_token(bp_steps) * n_tokens, s)
        start, took = time.time(), time.time() - start


def profile():
    """A step of one micro-batch: its longest kernels."""
    (_, run), [batch] = make_step(), make_batches(1, micro_batch_size)
    yield "a step, by the clock", {"ms": 1e3 * seconds(partial(run, batch, micro_batch_size))}
    yield from bench.longest_operations(partial(run, batch, micro_batch_size)).items()


def decode():
    """One prompt, and many. The floor is the time to read each weight as often as it is used, and the caches once."""
    speed, model = bench.bandwidth()[0], bench.new_model().to(compute).eval()
    prompts = sorted((ids[:p].tolist() for ids, p in bench.documents(n_prompts)), key=len)
    longest, per_token = len(prompts[-1]) + max_new_tokens, generate.cache_bytes_per_token(model)
    weights = model.config.n_steps * sum(p.nbytes for p in model.H.parameters()) + model.lm_head.nbytes
    greedy = partial(generate.choose_ids, None, 0.0, None, None, None)

    @torch.inference_mode()
    def figures(some):
        engine = generate.take_engine(model, len(some), longest, greedy)
        slots = list(range(len(some)))
        n_tokens, prefill = sum(map(len, some)), partial(engine.prefill, some, slots)

        def decode_one(i):
            clock = now()
            engine.decode(len(some[-1]) + i, slots)
            engine.ids.tolist()
            return time.perf_counter() - clock

        row = {"prefill tokens/s": n_tokens / seconds(prefill, 0), "first step s": decode_one(1)}
        if engine.graphs:
            engine.graphs.clear()
            row["recording s"] = decode_one(2)
        s = statistics.median(decode_one(i) for i in range(3, max(4, max_new_tokens)))
        floor = (weights + per_token * (n_tokens + len(some) * max_new_tokens / 2)) / (1e9 * speed)
        return row | {"ms/token": 1e3 * s, "tokens/s": len(some) / s, "of the floor": floor / s}

    yield "one prompt", figures(prompts[n_prompts // 2 :][:1])
    torch.cuda.empty_cache()
    fit = int(0.8 * free_memory(device) / (per_token * (generate.cache_length(model, longest) + 1)))
    yield f"{min(fit, n_prompts)} prompts", figures(prompts[-fit:])


def all_reduce():
    """Starts torchrun, whose ranks come to time_all_reduce()."""
    if ranks.world_size > 1:
        time_all_reduce()
    if not on_cuda or torch.cuda.device_count() == 1:
        yield "all-reduce", {"result": "needs several cards"}
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=gpu"]
    with subprocess.Popen([*torchrun, __file__, *sys.argv[1:]], stdout=subprocess.PIPE, text=True) as process:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(1, deadline - time.time() - 10))
        process.terminate()  # and so the ranks, if they are still there
        tables = [json.loads(line) for line in process.stdout if line.startswith("{")]
    yield from (tables or [{"all-reduce": {"result": "failed"}}])[-1].items()


def time_all_reduce():
    """On each rank: a step of two micro-batches, with and without the sum of the gradients, and the sum alone."""
    ranks.start(device)
    (model, run), [batch] = make_step(), make_batches(1, 2 * micro_batch_size)
    step = partial(run, batch, micro_batch_size)
    overlapped = seconds(step, 0)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    alone = seconds(partial(ranks.sum_over_ranks, *gradients), 0)
    with patch.object(ranks, "summing_gradients", nullcontext):
        afterwards = seconds(lambda: (step(), ranks.sum_over_ranks(*gradients)), 0)
        times = {"overlapped": overlapped, "afterwards": afterwards, "none": seconds(step, 0)}
    table = {f"step of {ranks.world_size} ranks, all-reduce {what}": {"ms": 1e3 * s} for what, s in times.items()}
    table["all-reduce alone"] = {"ms": 1e3 * alone, "GB/s": sum(g.nbytes for g in gradients) / alone / 1e9}
    ranks.print0(json.dumps(table))
    ranks.shutdown(status=0)


# Each with its seconds; what a part leaves of them, the next may use. Together, on one card, they are 10 minutes.
PARTS = {"correct": (correct, 170), "gemm": (gemm, 25), "flex": (flex, 75), "step": (step, 110)}
PARTS |= {"inputs": (partial(step, "inputs", least=4), 55), "blocks": (partial(step, "blocks", least=8, most=8), 30)}
PARTS |= {"long": (partial(step, least=2, most=2, longer=9), 30), "profile": (profile, 25), "decode": (decode, 70)}
PARTS |= {"all-reduce": (all_reduce, 90)}  # on one card none


# ---- running them ----
def run_part(part, values):
    for place in globals(), vars(bench):  # of a process of its own
        place.update(values)
    if cache:  # of compiled code: a new one from "step" on, so that its first step takes as long as on a new machine
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/{part in ('correct', 'gemm', 'flex')}"
    choose_device(device, dtype)
    yield from PARTS[part][0]()


def main():
    chosen = parts.split(",") if parts else [*PARTS]
    if unknown := {*chosen} - {*PARTS}:
        raise ValueError(f"there is no part {', '.join(unknown)}, only {', '.join(PARTS)}")
    where, compute = choose_device(device, dtype)
    on_cuda = where.startswith("cuda")
    name = torch.cuda.get_device_name() if on_cuda else f"{where}, {torch.get_num_threads()} threads"
    values = settings | dict(device=where, compute=compute, on_cuda=on_cuda, peak=peak_flops(name))
    if ranks.world_size > 1:
        [*run_part("all-reduce", values)]
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = "unknown"
    with suppress(OSError):  # no git
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or commit
    about = ", ".join((name, f"{compute}, torch {torch.__version__}", time.strftime("%Y-%m-%d"), f"commit {commit}"))
    content = dict(about=about, settings=settings, seconds={}, failed={}, tables={})
    print(about)
    with TemporaryDirectory(ignore_cleanup_errors=True) as values["cache"]:
        for part, table, taken, why in run_parts(run_part, {p: PARTS[p][1] for p in chosen}, values, not on_cuda):
            content["tables"][part], content["seconds"][part] = table, taken
            content["failed"] |= {part: why} if why else {}
            if part == "gemm" and "all" in table:
                values["gemm_rate"] = 1e12 * table["all"]["TFLOP/s"]
            Path("bench_gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"\n{about}\n{markdown(content['tables'])}\n\nwritten to bench_gpu.json")
    if content["failed"]:
        sys.exit(f"bench_gpu.py: not all parts have run: {', '.join(content['failed'])}")


if __name__ == "__main__":
    with exit_on_error("interrupted; bench_gpu.json holds the figures of the parts before"):
        main()
