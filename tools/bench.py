"""
The speed of training, decoding and tokenizing: ours, a peer's, and the most that is possible.

$ python -m tools.bench
$ python -m tools.bench config/hrm1b.py --vocab_size=65536 --batch_size=6 --parts=train,sizes

The rows of a table take turns: trust the ratios, as machines are noisy. For a limit, "ours / this"
is the share of it that ours reaches. Writes bench.json.
"""

from configurator import configure

import gc
import json
import os
import random
import subprocess
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as in train.py
import torch
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence

from attention import attend, flex_mask
from checkpoint import save_model
from generate import choose_device, generate
from model import HRM, IGNORE, PEAK_FLOPS, HRMConfig, visible_keys
from optim import AdamATan2, MovingAverage
from tokenizer import get_tokenizer

# -----------------------------------------------------------------------------
parts = "train,decode,data,products"  # and, for cuda, sizes and attention
rounds = 5  # of measurements, whose median counts
peer = True  # measure transformers, if it is installed
vocab_size = 4096
block_size = 1024
n_layer = 4
n_head = 4
n_embd = 256
bp_max = 5  # steps of the recurrence that carry gradient, at least 3
batch_size = 8  # rows in a step of train
micro_batch_size = 8
micro_batch_sizes = (1, 2, 4, 6, 8, 12, 16, 32)  # of sizes, until memory is full
peer_batches = (8, 16, 32)  # documents in a padded batch of transformers
max_new_tokens = 96
tokenizer = "bytes"  # of data, as data.py takes it; a BPE tells more
device = "auto"  # cpu, cuda or mps
dtype = "auto"
compile = True
settings = configure(globals())
# -----------------------------------------------------------------------------

device, compute = choose_device(device, dtype)
machine = torch.cuda.get_device_name() if "cuda" in device else device
new = partial(torch.randn, device=device, dtype=compute, requires_grad=True)
peer = peer and find_spec("transformers")
if peer:
    from transformers import CompileConfig, HrmTextForCausalLM
torch._dynamo.config.recompile_limit = 64


def clock(run, n=1):  # seconds of each of n calls
    wait = torch.zeros(1, device=device).item  # until the device has done its work
    wait()
    start = time.perf_counter()
    for _ in range(n):
        run()
    wait()
    return (time.perf_counter() - start) / n


def measure(variants):
    """{name: (amount, function that does it)} -> {name: amount per second}, without what fails."""
    times = {}
    for name, (_, run) in variants.items():
        try:
            clock(run)  # compiles
            times[name] = [clock(run)]
        except Exception as error:
            print(f"{name} fails: {error!r}"[:150])
    for _ in range(rounds):
        for name, seconds in times.items():
            n = 1 + int(0.1 / seconds[0])
            seconds.append(clock(variants[name][1], n))
    return {name: variants[name][0] / median(seconds[1:]) for name, seconds in times.items()}


def show(title, values):
    print(f"\n| {title} | | ours / this |\n|---|---:|---:|")
    ours = values.get("ours", float("nan"))
    for name, value in values.items():
        print(f"| {name} | {value:,.1f} | {ours / value:.2f} |")
    content[title] = values


def make_documents(n_tokens):
    """[(ids, which are of the prefix)]: no id is 0; lengths are like GSM8K's in a small BPE."""
    random.seed(0)
    documents = []
    while n_tokens:
        n_prefix = int(random.lognormvariate(4.175, 0.348))
        n = min(n_tokens, n_prefix + int(random.lognormvariate(4.483, 0.439)))
        documents.append((torch.randint(1, vocab_size, [n]), torch.arange(n) < n_prefix))
        n_tokens -= n
    return documents


def pack(documents):
    """(idx, targets, doc, prefix) as from loader.py, but that a row's end cuts a document."""
    ids, prefixes = zip(*documents)
    idx = torch.cat(ids)
    prefix = torch.cat(prefixes)
    doc = torch.cat([torch.full_like(t, i) for i, t in enumerate(ids)])
    targets = idx.roll(-1).masked_fill(prefix, IGNORE)
    return [t.view(-1, block_size) for t in (idx, targets, doc, prefix)]


def new_model(**options):
    with torch.device(device):
        model = HRM(HRMConfig(vocab_size, block_size, n_layer, n_head, n_embd))
    model.dtype = compute
    if compile:
        model.compile_blocks(**options)
    return model


def peer_model(model):
    options = {"dtype": model.lm_head.weight.dtype, "L_bp_cycles": [0, bp_max - 2]}
    with TemporaryDirectory() as directory:
        save_model(directory, model)
        return HrmTextForCausalLM.from_pretrained(directory, **options).to(device)


def step(optimizer, loss_of, batches):
    optimizer.zero_grad()
    for batch in batches:
        loss_of(batch).backward()
    optimizer.step()


def our_step(model, documents, size):
    """A step of train.py, in micro-batches of `size` rows."""
    optimizer = AdamATan2(model.parameters(), 1e-4, compile=compile)
    average = MovingAverage(model)
    optimizer.register_step_post_hook(lambda *_: average.update(0.999))
    batches = list(zip(*(t.split(size) for t in pack(documents))))
    return partial(step, optimizer, lambda part: model(*part, bp_steps=bp_max)[1], batches)


def peer_batch(documents):  # padded, as a user of transformers makes it
    ids, prefix = (pad_sequence(t, batch_first=True).to(device) for t in zip(*documents))
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(prefix | (ids == 0), IGNORE),
        "attention_mask": (ids > 0).long(),
        "token_type_ids": prefix.long(),
    }


def train():
    n = batch_size * block_size
    documents = make_documents(n)
    model = new_model(dynamic=False)
    variants = {"ours": (n, our_step(model, documents, micro_batch_size))}
    if peer:
        theirs = peer_model(model)
        optimizer = torch.optim.AdamW(theirs.parameters(), 1e-4, fused=True)
        autocast = torch.autocast(device.partition(":")[0], compute, compute != torch.float32)
        loss_of = autocast(lambda batch: theirs(**batch, use_cache=False).loss)
        documents.sort(key=lambda document: len(document[0]))
        for size in peer_batches:
            batches = [peer_batch(documents[i : i + size]) for i in range(0, len(documents), size)]
            run = partial(step, optimizer, loss_of, batches)
            variants[f"transformers, batches of {size}"] = n, run
    flops = model.flops_per_token(bp_max)
    gflop, runs = zip(*block_products(model).values())
    variants["limit: products"] = 1e9 * sum(gflop) / flops, lambda: [run() for run in runs]
    speeds = measure(variants)
    for card, peak in PEAK_FLOPS.items():
        if card in machine:
            speeds[f"limit: {card} (MFU)"] = peak / flops
    show("training, tokens/s", speeds)


def sizes():
    """Two micro-batches in a step, as a second finds the gradients of the first in memory."""
    model = new_model(dynamic=False)
    speeds = {}
    for recompute in False, True:
        model.recompute = recompute
        for size in micro_batch_sizes:
            n = 2 * size * block_size
            torch.cuda.reset_peak_memory_stats()
            speed = measure({size: (n, our_step(model, make_documents(n), size))})
            if not speed:
                break
            gigabytes = torch.cuda.max_memory_allocated() / 1e9
            speeds[f"{size} rows, recompute {recompute}, {gigabytes:.1f} GB"] = speed[size]
    show("micro-batches, tokens/s", speeds)


def peer_generate(theirs, cache, prompts):
    ids = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(ids, batch_first=True, padding_side="left").to(device)
    mask = (ids > 0).long()
    how = CompileConfig()
    how._compile_all_devices = True  # CPUs, too
    options = {"cache_implementation": cache, "compile_config": how, "disable_compile": not compile}
    options.update(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    theirs.generate(ids, attention_mask=mask, token_type_ids=mask, **options)


def decode():
    """Greedy. The limit: to read each weight for each use, and the caches once per token."""
    model = new_model().to(compute).eval()
    theirs = peer_model(model) if peer else None
    prompts = [ids[prefix].tolist() for ids, prefix in make_documents(10**5)[:64]]
    array = torch.ones(2**28, device=device)
    n_steps = model.config.n_steps
    weights = n_steps * sum(p.nbytes for p in model.H_module.parameters())
    weights += model.lm_head.weight.nbytes
    per_token = n_steps * n_layer * n_embd * compute.itemsize  # of the caches
    for some in prompts[:1], prompts:
        n = len(some) * max_new_tokens
        variants = {"ours": (n, partial(generate, model, some, max_new_tokens))}
        for cache in ("dynamic", "static") if peer else ():
            run = partial(peer_generate, theirs, cache, some)
            variants[f"transformers, {cache} cache"] = n, run
        n_cached = sum(map(len, some)) + n / 2
        n_bytes = max_new_tokens * (weights + n_cached * per_token)
        variants["limit: memory"] = n * array.nbytes / n_bytes, array.sum
        show(f"decoding {len(some)} prompts, tokens/s", measure(variants))


def data():
    """Word problems on one core, one after the other, and in tiktoken's own batches."""
    from data import word_problems
    encoder = get_tokenizer(tokenizer)
    texts = [row["instruction"] for row in word_problems("train", 2000, 0)]
    theirs = partial(encoder.bpe.encode_ordinary_batch, texts, num_threads=1)
    variants = {"ours": (2000, lambda: [encoder.encode(text) for text in texts])}
    variants["tiktoken"] = 2000, theirs
    show("tokenizing, texts/s", measure(variants))


def with_backward(forward, inputs):
    y = forward()
    torch.autograd.grad(y, inputs, y.detach())


def block_products(model):
    """{a block's weight: (GFLOP, function)}: the products of a micro-batch, backward too."""
    n = micro_batch_size * block_size
    variants = {}
    for name, weight in model.H_module.layers[0].named_parameters():
        x, w = new(n, weight.size(1)), new(*weight.shape)
        run = partial(with_backward, partial(linear, x, w), (x, w))
        variants[name] = 6e-9 * n * w.numel(), run
    return variants


def products():
    show("products, GFLOP/s", measure(block_products(new_model())))


def attention():
    """Of a block. A pair of query and key counts for two products forward and five backward."""
    qkv = [new(micro_batch_size, block_size, n_head, n_embd // n_head) for _ in range(3)]
    run = torch.compile(attend)
    variants = {}
    doc, prefix = pack(make_documents(micro_batch_size * block_size))[2:]
    for name, is_short in ("short", True), ("long", False):
        first, last = visible_keys(doc * is_short, prefix & is_short)
        gflop = 2e-9 * n_embd * (last - first).sum().item()
        forward = partial(run, *qkv, flex_mask(first, last, device))
        variants[f"{name}, forward"] = 2 * gflop, forward
        variants[f"{name}, with backward"] = 7 * gflop, partial(with_backward, forward, qkv)
    show("attention, GFLOP/s", measure(variants))


commit = subprocess.getoutput(f"git -C {Path(__file__).parent} describe --always --dirty")
about = f"{machine}, {torch.get_num_threads()} threads, {compute}, torch {torch.__version__}, "
about += f"{commit}, {time.strftime('%Y-%m-%d')}"
print(about)
content = {"about": about, "settings": settings}
for part in parts.split(","):
    try:
        globals()[part]()
    except (Exception, SystemExit) as error:
        print(f"{part} fails: {error!r}"[:150])
    Path("bench.json").write_text(json.dumps(content, indent=1))
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
