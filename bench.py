"""Speed: ours, a peer's, and what the machine could do at most, measured in turns within one run.

    python bench.py train                             # whole training steps
    python bench.py decode                            # greedy generation
    python bench.py data                              # preparation of a dataset
    python bench.py compile                           # seconds to the first step and the first token
    python bench.py train config/hrm1b.py --vocab_size=65536 --batch_size=8        # the published 1B model

Prints tables and writes bench.json. The peer of train and decode is transformers (an extra: pip install transformers),
with the same weights and documents; that of data is tiktoken. Machines are noisy: trust the ratios, not the figures.
"""

from configurator import configure

import gc
import json
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from copy import copy
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from runpy import run_path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common import exit_on_error
from devices import choose_device, free_memory
from hf import save_hf
from loader import Loader
from model import HRM, IGNORE, HRMConfig
from optim import AdamATan2, adam_atan2
from sources import read_rows, to_pair, word_problems
from tokenizer import load_encoding, token_dtype
from train import train_step

# ---- settings ----
n_layer = 4
n_head = 4
n_embd = 256
vocab_size = 4096
block_size = 1024
batch_size = 8  # rows per step
micro_batch_size = 8
bp_steps = 5
n_prompts = 64
max_new_tokens = 96
data_file = ""  # texts for data: a .jsonl file with the fields of GSM8K; "": the embedded word problems
data_mb = 50  # the texts are repeated up to this size
tokenizer = "train:4096"  # for data, as data.py takes it
threads = 2  # of the tokenizer
rounds = 5  # of measurements, each of all variants in turn
profile = False  # list the ten operations, or on cuda kernels, that take longest in train and decode
peer = True  # measure transformers too
peer_batches = 8, 16, 32  # documents in a padded batch of the peer's, to find its best
device = "auto"  # cpu, cuda or mps
dtype = "auto"  # float32 or bfloat16, as in train.py
attention = "auto"  # as in train.py
compile = True
recompute = "none"  # as in train.py
seed = 1337
settings = configure(globals(), [arg for arg in sys.argv[1:] if not arg.isalpha()] if __name__ == "__main__" else [])

data = SimpleNamespace(**run_path(str(Path(__file__).with_name("data.py"))))  # `import data` might find the directory
STEPS = 2  # of training in a measurement, ours and the peer's


def measure(*makers):
    """Each maker makes variants {name: function} -> {name: median seconds of `rounds` calls after one to warm up},
    {name: result}, and with profile longest_operations() of "ours". On a GPU the variants of one maker are in memory at
    a time; on a CPU, whose speed changes from minute to minute, all take turns."""
    times, results, longest = {}, {}, {}
    for some in [[make] for make in makers] if on_cuda else [makers]:
        variants = {name: run for make in some for name, run in make().items()}
        for _ in tqdm(range(rounds + 1), desc="measuring", leave=False, disable=None):
            for name in variants:
                clock = time.perf_counter()
                results[name] = variants[name]()
                if device != "cpu":
                    torch.accelerator.synchronize()
                times.setdefault(name, []).append(time.perf_counter() - clock)
        longest |= longest_operations(variants["ours"]) if profile and "ours" in variants else {}
        variants.clear()
        gc.collect()
        torch.cuda.empty_cache()  # which does nothing where there is no card in use
    return {name: statistics.median(t[1:]) for name, t in times.items()}, results, longest


def bandwidth():
    """(GB/s of reading an array, its GB: 8 on a GPU where it fits, as its cache is large)."""
    x = torch.ones(min(2 * 10**9, free_memory(device) // 8) if on_cuda else 2**26, device=device)
    return x.nbytes / measure(lambda: {"read": x.sum})[0]["read"] / 1e9, x.nbytes / 1e9


def longest_operations(run):
    """A table of the ten operations in run(), or kernels on a GPU, that take longest, with their share of the time."""
    with torch.profiler.profile() as profiler:
        run()
    events, kind = profiler.key_averages(), "self_cpu_time_total"
    if on_cuda:  # kernels alone: an operation's time includes that of its kernels
        cuda, kind = torch.autograd.DeviceType.CUDA, "self_device_time_total"
        events = [e for e in events if e.device_type == cuda and not e.is_user_annotation]
    rows = sorted(((getattr(e, kind), e.count, e.key.removeprefix("## Call ")[:36]) for e in events), reverse=True)
    total = sum(row[0] for row in rows)
    if not total:
        return {"all": {"result": "the profiler sees no kernel"}}
    rows = [(total, sum(row[1] for row in rows), "all"), *rows[:10]]
    return {f"{i}. {key}": {"of the time": t / total, "ms": t / 1e3, "calls": n} for i, (t, n, key) in enumerate(rows)}


def documents(n, longer=1):
    """n documents (ids, length of the prefix) of random ids, with lengths spread like GSM8K's in a BPE of 4,096 ids,
    which are 166 on average, times `longer`."""
    rng = np.random.default_rng(seed)
    common, own = rng.normal(size=(2, n))
    prefixes = (longer * np.exp(4.175 + 0.348 * common)).astype(int)
    responses = (longer * np.exp(4.483 + 0.439 * (0.54 * common + 0.84 * own))).astype(int)
    sizes = np.minimum(prefixes + responses, block_size)
    return [(torch.from_numpy(rng.integers(4, vocab_size, n)), int(min(p, n - 1))) for p, n in zip(prefixes, sizes)]


def make_loader(docs):
    """A Loader of these documents."""
    with TemporaryDirectory() as directory:  # its files stay readable where they are mapped
        lengths, prefixes = np.array([(len(ids), n_prefix) for ids, n_prefix in docs]).T
        torch.cat([ids for ids, _ in docs]).numpy().astype(token_dtype(vocab_size)).tofile(f"{directory}/train.bin")
        np.stack((lengths.cumsum(), prefixes), axis=1).tofile(f"{directory}/train.idx")
        splits = {s: {"documents": n, "tokens": 0, "conditions": {}} for s, n in (("train", len(docs)), ("val", 0))}
        meta = {"vocab_size": vocab_size, "dtype": token_dtype(vocab_size), "splits": splits}
        meta |= {"tokenizer": dict(name="", pat_str="", special_tokens={}), "prepare_args": {}, "checksums": {}}
        Path(directory, "meta.json").write_text(json.dumps(meta))
        return Loader(directory, "train", batch_size, block_size, seed)


def new_model(where=None):
    """Our model, the same every time, on `device` or elsewhere."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=vocab_size, block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    with torch.device(where or device):
        model = HRM(HRMConfig(**shape))
    model.set_compute(compute, "auto" if where else attention, compile, recompute)
    return model


def peer_model(dtype, bytes_per_weight):
    """transformers' model with the weights of new_model() and, as far as its setting reaches, the same truncation. None
    without peer, or where so many bytes per weight do not fit, and a line says so."""
    need, free = bytes_per_weight * sum(p.numel() for p in new_model("meta").parameters()), free_memory(device)
    if not peer or need > free:
        return print(f"no peer: its model takes {need / 1e9:.1f} GB, {free / 1e9:.1f} are free") if peer else None
    from transformers import HrmTextForCausalLM

    model = new_model().to(dtype)
    H_cycles = model.config.H_cycles
    with TemporaryDirectory() as directory:
        save_hf(model, directory, L_bp_cycles=[0] * (H_cycles - 1) + [bp_steps - min(H_cycles, bp_steps - 1)])
        del model
        return HrmTextForCausalLM.from_pretrained(directory, attn_implementation="sdpa", dtype=dtype).to(device)


# ---- training ----
def bench_train():
    """Training steps on packed rows; tokens/s are those of documents, without padding."""
    docs = documents(max(512, 12 * batch_size * block_size // 128))
    loader = make_loader(docs)
    batches = [next(loader) for _ in range(STEPS)]
    n_tokens, n_targets = (sum(getattr(b, key) for b in batches) for key in ("n_tokens", "n_targets"))

    def ours():
        model = new_model()
        optimizer = AdamATan2(model.parameters(), lr=1e-4, ema=0.999, compile=compile)
        updates = {True: optimizer.update, False: adam_atan2}  # of one optimizer, to have its memory once

        def train(compiled):
            model.compile_blocks, optimizer.update = compiled, updates[compiled]
            for batch in batches:
                train_step(model, optimizer, batch, bp_steps, micro_batch_size)

        run_products = products(model, n_tokens, n_targets, STEPS * -(-batch_size // micro_batch_size))
        variants = {"ours": partial(train, compile), "products by F.linear": run_products}
        return variants | ({"ours, not compiled": partial(train, False)} if compile else {})

    def theirs():
        if not (model := peer_model(torch.float32, 16)):  # with gradients, and AdamW's two moments
            return {}
        own = [docs[d] for batch in batches for d in batch.documents]
        step = partial(peer_steps, model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))
        ways = [("transformers", size, compute) for size in peer_batches]
        ways += [("transformers in float32", peer_batches[0], torch.float32)] * (compute != torch.float32)
        return {f"{who}, batches of {size}": partial(step, padded(own, size), c) for who, size, c in ways}

    seconds, _, longest = measure(ours, theirs, lambda: {"loader": lambda: [next(loader) for _ in range(STEPS)]})
    table = {name: {"tokens/s": n_tokens / s} for name, s in seconds.items()}
    table["loader"]["of a step"] = seconds["loader"] / seconds["ours"]
    table["ours"]["GFLOP/s"] = new_model("meta").flops_per_token(bp_steps) * table["ours"]["tokens/s"] / 1e9
    table["ours"]["of the products' rate"] = seconds["products by F.linear"] / seconds["ours"]
    for who in "transformers", "transformers in float32":
        if found := [s for name, s in seconds.items() if name.startswith(f"{who}, ")]:
            table["ours"][f"of {who}"] = min(found) / seconds["ours"]
    kept = bytes_kept(new_model(), batches[0])
    row = {"MB": kept / 1e6, "KB/token": kept / 1e3 / (min(micro_batch_size, batch_size) * block_size)}
    return table | {"kept for the backward pass": row} | longest


def products(model, n_tokens, n_targets, n_micro):
    """
    A function that multiplies by each weight as often as training on these tokens and targets in n_micro micro-batches
    does, and nothing else. Attention, which depends on the documents, is left out.
    """
    random = partial(torch.randn, device=device, dtype=compute, requires_grad=True)
    uses = [(*p.shape, n_tokens // n_micro, model.config.n_steps, bp_steps) for p in model.H.parameters()]
    uses.append((*model.lm_head.shape, n_targets // n_micro, 1, 1))
    work = [(random(n, n_in), random(n_out, n_in), random(n, n_out), *times) for n_out, n_in, n, *times in uses]

    def run():
        for x, w, dy, forward, backward in work * n_micro:
            with torch.no_grad():
                for _ in range(forward - backward):
                    F.linear(x, w)
            for _ in range(backward):
                torch.autograd.grad(F.linear(x, w), (x, w), dy)

    return run


def bytes_kept(model, batch):
    """Memory that a micro-batch's forward pass keeps for its backward pass, weights aside."""
    kept, weights = [], model.cast_weights()
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(*(t[:micro_batch_size] for t in batch[:4]), bp_steps, weights)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    for w in (*model.parameters(), weights.lm_head, *sum(weights.H + weights.L, ())):
        sizes.pop(w.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def padded(docs, size):
    """[(batch, labels)], as a user of transformers would make them: `size` documents of similar length at a time."""
    docs, batches = sorted(docs, key=lambda doc: len(doc[0])), []
    for chunk in (docs[i : i + size] for i in range(0, len(docs), size)):
        ids = pad_sequence([ids for ids, _ in chunk], batch_first=True).to(device)
        n, p = torch.tensor([(len(ids) - 1, p) for ids, p in chunk], device=device)[:, :, None].unbind(1)
        place = torch.arange(ids.size(1) - 1, device=device)
        batch = dict(input_ids=ids[:, :-1], attention_mask=(place < n).long(), token_type_ids=(place < p).long())
        batches.append((batch, ids[:, 1:].masked_fill((place < p - 1) | (place >= n), IGNORE)))
    return batches


def peer_steps(theirs, optimizer, batches, compute):
    """STEPS training steps of transformers' model, each on its share of the batches."""
    per_step = -(-len(batches) // STEPS)
    for i in range(0, len(batches), per_step):
        optimizer.zero_grad(set_to_none=True)
        for batch, labels in batches[i : i + per_step]:
            with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=compute == torch.bfloat16):
                logits = theirs(**batch, use_cache=False).logits
            F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE).backward()
        optimizer.step()


# ---- decoding ----
def bench_decode():
    """Greedy generation from prompts of mixed lengths, all at once and one alone."""
    prompts = [ids[:p].tolist() for ids, p in documents(n_prompts)]
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > block_size + 1:
        raise ValueError(f"{max_new_tokens} new tokens after the longest prompt exceed block_size = {block_size}")
    table, median, model = {}, sorted(prompts, key=len)[n_prompts // 2], new_model("meta")
    n_weights = model.config.n_steps * sum(p.numel() for p in model.H.parameters()) + model.lm_head.numel()

    def ours(some):
        return {"ours": partial(new_model().to(compute).eval().generate, some, max_new_tokens)}

    def theirs(some):
        if not (model := peer_model(compute, 2 * compute.itemsize)):  # with ours, from which it gets them
            return {}
        variants, faster = {"transformers": partial(peer_generate, model, some)}, copy(model)
        variants["transformers, static cache"] = partial(peer_generate, model, some, "static")  # compiles on cuda
        if len(some) == 1 and not on_cuda:  # with many, slower than not compiled (transformers 5.23)
            faster.forward = torch.compile(model.forward)
            variants["transformers, static cache, compiled"] = partial(peer_generate, faster, some, "static")
        return variants

    for what, some in (f"{n_prompts} prompts", prompts), ("one prompt", [median]):
        seconds, answers, operations = measure(partial(ours, some), partial(theirs, some))
        for name, s in seconds.items():
            table[f"{what}: {name}"] = {"tokens/s": len(some) * max_new_tokens / s, "ms/step": 1e3 * s / max_new_tokens}
        row = table[f"{what}: ours"]
        row["GB/s of weights"] = n_weights * compute.itemsize * max_new_tokens / seconds["ours"] / 1e9
        if others := [s for name, s in seconds.items() if name != "ours"]:
            row["of transformers"] = min(others) / seconds["ours"]
            row["same answers"] = sum(len(set(map(tuple, a))) == 1 for a in zip(*answers.values())) / len(some)
        table |= {f"{what}: {name}": row for name, row in operations.items()}
    return table | {"memory": dict(zip(("GB/s", "GB"), bandwidth()))}


def peer_generate(theirs, prompts, cache=None):
    """transformers' greedy generation, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    options = dict(max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        new = theirs.generate(ids, attention_mask=mask, token_type_ids=mask, cache_implementation=cache, **options)
    return new[:, longest:].tolist()


# ---- data ----
def bench_data():
    """data.prepare(), from a file to a dataset, against tiktoken's encode_ordinary_batch on texts in memory."""
    with TemporaryDirectory() as directory:
        small, large, dataset = (Path(directory, name) for name in ("small.jsonl", "large.jsonl", "small"))
        rows = (json.dumps(row) + "\n" for row in word_problems("train", 10000, seed))
        text = Path(data_file).read_text(encoding="utf-8") if data_file else "".join(rows)
        small.write_text(text, encoding="utf-8")
        fields = {"instruction": "question", "response": "answer"} if data_file else {}
        options = dict(fields=fields, workers=threads, block_size=block_size)
        data.prepare(dataset, source=str(small), tokenizer=tokenizer, **options)
        repeats = -(-data_mb * 10**6 // small.stat().st_size)
        large.write_text(text * repeats, encoding="utf-8")
        options |= dict(source=str(large), tokenizer=str(dataset))
        encoding, pairs = load_encoding(dataset).tiktoken, [to_pair(row, fields) for _, row in read_rows(str(small))]
        texts = [text for pair in pairs for text in pair[:2]]
        variants = {
            "data.py": partial(data.prepare, Path(directory, "large"), **options),
            "tiktoken": partial(encoding.encode_ordinary_batch, texts, num_threads=threads),
        }
        seconds, _, _ = measure(lambda: variants)
    seconds["data.py"] /= repeats
    table = {name: {"documents/s": len(pairs) / s} for name, s in seconds.items()}
    table["data.py"]["of tiktoken"] = seconds["tiktoken"] / seconds["data.py"]
    return table


# ---- compilation ----
def bench_compile():
    """Seconds from the start of a Python process to the end of its first step or token."""
    here = settings | dict(device=device, compute=compute, on_cuda=on_cuda)
    table, ways = {}, {"not compiled": False, "compiled, cold cache": True, "compiled, warm cache": True}
    for what in "step", "token":
        with TemporaryDirectory() as cache:
            for way, compiled in ways.items():
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    job = pool.submit(first, what, time.time(), cache, here | {"compile": compiled})
                    table[f"first {what}, {way}"] = {"s": job.result()}
    return table


def first(what, begin, cache, values):
    """Seconds from `begin` until a model with these values of our globals has made its first step or token."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    globals().update(values)
    model = new_model()
    if what == "step":
        optimizer = AdamATan2(model.parameters(), lr=1e-4, ema=0.999, compile=compile)
        train_step(model, optimizer, next(make_loader(documents(512))), bp_steps, micro_batch_size)[0]["loss"].item()
    else:
        model.eval().generate([list(range(10, 40))], 2)
    return time.time() - begin


def main():
    global peer, device, compute, on_cuda
    run = {"train": bench_train, "decode": bench_decode, "data": bench_data, "compile": bench_compile}
    tasks = [arg for arg in sys.argv[1:] if arg.isalpha()] or ["all"]
    if unknown := set(tasks) - {"all", *run}:
        raise ValueError(f"there is no task {', '.join(unknown)}, only all, {', '.join(run)}")
    for key in "batch_size micro_batch_size n_prompts max_new_tokens data_mb threads rounds peer_batches".split():
        if np.min(settings[key]) < 1:
            raise ValueError(f"{key} must be at least 1")
    device, compute = choose_device(device, dtype)
    on_cuda = device.startswith("cuda")
    if peer and not find_spec("transformers"):
        peer = False
        print("without transformers (pip install transformers) there is no peer for train and decode")
    name = torch.cuda.get_device_name() if on_cuda else f"{device}, {torch.get_num_threads()} threads"
    print(f"{name}, {str(compute).removeprefix('torch.')}, torch {torch.__version__}; ratios: more is better")
    tables = {}
    for task in run if "all" in tasks else tasks:
        tables[task] = run[task]()
        print(f"\n{task}")
        for what, row in tables[task].items():
            print(f"  {what:<54}" + ", ".join(f"{key} {value:,.4g}" for key, value in row.items()))
        content = {"machine": name, "torch": torch.__version__, "settings": settings, "tables": tables}
        Path("bench.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print("\nwritten to bench.json")


if __name__ == "__main__":
    with exit_on_error("interrupted; bench.json holds the tables printed so far, if any"):
        main()
