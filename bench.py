"""
Speed: ours, a peer's, and what the machine could do at most, measured in turns in one run.

    python bench.py train                             # whole training steps
    python bench.py decode                            # greedy generation
    python bench.py data                              # preparation, and the loader
    python bench.py compile                           # seconds to the first step and the first token
    python bench.py all config/gsm8k.py --dtype=bfloat16 --micro_batch_size=1

Prints tables and writes bench.json. The peer of train and decode is transformers (an extra: pip install transformers),
with the same weights and documents; that of data is tiktoken. Machines are noisy: trust the ratios, not the figures.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

import data
from configurator import configure
from model import HRM, IGNORE, AdamATan2, HRMConfig, choose_device, linear, reason

# ----------------------------------------------------------------------------------------------------
# settings
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
source = ""  # texts for data: a .jsonl file with the fields of GSM8K; "": the embedded word problems
data_mb = 200  # of them, repeated
tokenizer = "train:4096"  # for data, as data.py takes it
threads = 2  # of the tokenizer
rounds = 5  # of measurements in train and decode, each of ours and then of the peer's
profile = False  # tell the ten operations, or kernels, that take longest in train and decode
peer = True  # measure transformers too
peer_batches = "8,16,32"  # documents in a padded batch of the peer's, to find its best
device = "auto"  # cpu, cuda or mps
dtype = "auto"  # float32 or bfloat16; auto is bfloat16 on cuda
attention = "auto"  # as in train.py
compile = True
recompute_blocks = False
seed = 1337
settings = configure(globals(), [arg for arg in sys.argv[1:] if not arg.isalpha()])
# ----------------------------------------------------------------------------------------------------

STEPS = 2  # of training in a measurement, ours and the peer's


def measure(contestants, rounds):
    """{name: seconds} of {name: function}: each called once to warm up, then `rounds` times in turns; the median."""
    times = {name: [] for name in contestants}
    with tqdm(total=(rounds + 1) * len(contestants), desc="measuring", leave=False) as bar:
        for turn in range(rounds + 1):
            for name, run in contestants.items():
                clock = time.perf_counter()
                run()
                synchronize()
                if turn:
                    times[name].append(time.perf_counter() - clock)
                bar.update()
    return {name: statistics.median(t) for name, t in times.items()}


def synchronize():
    if device != "cpu":
        getattr(torch, device.partition(":")[0]).synchronize()


def longest_operations(run):
    """{name: share of the time} of the ten operations in run(), or kernels on a GPU, that take longest; as a table."""
    with torch.profiler.profile() as profiler:
        run()
        synchronize()
    events, kind = profiler.key_averages(), "self_cpu_time_total"
    if on_cuda:  # kernels alone: operations hold the time of theirs once more
        cuda, kind = torch.autograd.DeviceType.CUDA, "self_device_time_total"
        events = [event for event in events if event.device_type == cuda and not event.is_user_annotation]
    events = sorted(events, key=lambda event: -getattr(event, kind))
    total, table = sum(getattr(event, kind) for event in events), {}
    for i, event in enumerate(events[:10], 1):
        name = f"{i}. {event.key.removeprefix('## Call ')[:36]}"
        table[name] = {"of the time": getattr(event, kind) / total, "calls": event.count}
    return table


def documents(n):
    """n documents (ids, length of the prefix) of random ids, with lengths spread like GSM8K's in a BPE of 4,096 ids."""
    rng = np.random.default_rng(seed)
    common, own = rng.normal(size=(2, n))
    prefixes = np.exp(4.175 + 0.348 * common).astype(int)
    responses = np.exp(4.483 + 0.439 * (0.54 * common + 0.84 * own)).astype(int)
    sizes = np.minimum(prefixes + responses, block_size)
    return [(rng.integers(4, vocab_size, size), min(int(p), size - 1)) for p, size in zip(prefixes, sizes)]


def make_dataset(directory, docs):
    """Write documents as data.py does, without a tokenizer."""
    kind = data.token_dtype(vocab_size)
    ends = np.cumsum([len(ids) for ids, _ in docs])
    np.concatenate([ids for ids, _ in docs]).astype(kind).tofile(directory / "train.bin")
    np.stack([ends, [p for _, p in docs]], axis=1).astype("<i8").tofile(directory / "train.idx")
    counts = {"documents": len(docs), "tokens": int(ends[-1]), "conditions": {}}
    meta = {"vocab_size": vocab_size, "dtype": kind.name, "splits": {"train": counts, "val": counts}}
    meta |= {"tokenizer": {"name": "none", "pat_str": "", "special_tokens": {}}, "made": {}, "checksums": {}}
    (directory / "meta.json").write_text(json.dumps(meta))


def new_model(**changes):
    torch.manual_seed(seed)
    shape = dict(vocab_size=vocab_size, block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    model = HRM(HRMConfig(**{**shape, **changes})).to(device)
    model.compute_dtype, model.attention = compute, attention
    model.compile_blocks, model.recompute_blocks = compile, recompute_blocks
    return model


# ----------------------------------------------------------------------------------------------------
# training


def needed_flops(model, docs):
    """FLOP that documents need in training: of the weights, of the head on targets, of attention within a document."""
    tokens = sum(len(ids) - 1 for ids, _ in docs)
    targets = sum(len(ids) - p for ids, p in docs)
    config, uses = model.config, 2 * model.config.n_steps + 4 * bp_steps
    weights = sum(p.numel() for p in model.H.parameters()) * uses * tokens
    pairs = sum(p * p + (len(ids) - 1 - p) * (len(ids) + p) / 2 for ids, p in docs)
    head = 6 * config.vocab_size * config.n_embd * targets
    return weights + head + 2 * pairs * uses * config.n_layer // 2 * config.n_head * config.head_dim


def products(model, n_tokens, n_targets, multiply):
    """A function that does the products of a training step's weights and nothing else, and their FLOP."""
    uses = [(p.shape, n_tokens, model.config.n_steps, bp_steps) for p in model.H.parameters()]
    uses.append((model.lm_head.shape, n_targets, 1, 1))
    work, flops = [], 0
    for (n_out, n_in), n, forward, backward in uses:
        x, w, y = (
            torch.randn(*shape, device=device, dtype=compute) for shape in ((n, n_in), (n_out, n_in), (n, n_out))
        )
        work.append((forward, backward, x.requires_grad_(), w.requires_grad_(), y))
        flops += 2 * n * n_out * n_in * (forward + 2 * backward)

    def run():
        for forward, backward, x, w, y in work:
            with torch.no_grad():
                for _ in range(forward - backward):
                    multiply(x, w)
            for _ in range(backward):
                torch.autograd.grad(multiply(x, w), (x, w), y)

    return run, flops


def train_step(model, optimizer, batch):
    """As in train.py."""
    optimizer.zero_grad(set_to_none=True)
    weights = model.weights()
    for parts in zip(*(t.split(micro_batch_size) for t in batch[:4])):
        share = int((parts[1] != IGNORE).sum()) / batch.n_targets
        (model(*parts, bp_steps, weights)[1] * share).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    torch.stack(torch._foreach_norm(grads, float("inf"))).sum().isfinite()
    optimizer.step()


def bytes_saved(model, batch):
    """Memory that a micro-batch's forward pass keeps for its backward pass, weights aside."""
    own, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = model.weights()
    own |= {w.untyped_storage().data_ptr() for matrices in (*weights.H, *weights.L) for w in matrices}
    with saved_tensors_hooks(pack, lambda t: t):
        loss = model(*(t[:micro_batch_size] for t in batch[:4]), bp_steps, weights)[1]
    del loss
    return sum(size for pointer, size in found.items() if pointer not in own)


def bench_train():
    docs = documents(max(512, 12 * batch_size * block_size // 128))
    with tempfile.TemporaryDirectory() as directory:
        make_dataset(Path(directory), docs)
        loader = data.Loader(directory, "train", batch_size, block_size, seed)
        batches = [next(loader) for _ in range(STEPS)]
        clock = time.perf_counter()
        for _ in range(20):
            next(loader)
        loader_seconds = (time.perf_counter() - clock) / 20
    model = new_model()
    optimizer = AdamATan2(model.parameters(), lr=1e-4, ema=0.999)
    docs = [docs[d] for batch in batches for d in batch.documents]
    n_tokens = sum(batch.n_tokens for batch in batches)
    contestants = {"ours": lambda: [train_step(model, optimizer, batch) for batch in batches]}
    rows = min(micro_batch_size, batch_size) * block_size
    shape = model, rows, round(rows * sum(batch.n_targets for batch in batches) / n_tokens)
    contestants["products by F.linear"], product_flops = products(*shape, F.linear)
    contestants["products by linear()"], _ = products(*shape, linear)
    eager = new_model()
    eager.compile_blocks, slower = False, AdamATan2(eager.parameters(), lr=1e-4, ema=0.999)
    contestants["ours, not compiled"] = lambda: [train_step(eager, slower, batch) for batch in batches]
    kept = bytes_saved(model, batches[0])
    train_step(model, optimizer, batches[0])
    peak = torch.cuda.max_memory_allocated() if on_cuda else 0
    if peer:
        for size in map(int, peer_batches.split(",")):
            contestants[f"transformers, batches of {size}"] = peer_steps(model, docs, size, compute)
        if compute != torch.float32:
            size = int(peer_batches.split(",")[0])
            contestants[f"transformers in float32, batches of {size}"] = peer_steps(model, docs, size, torch.float32)
    seconds = measure(contestants, rounds)
    flops, table = needed_flops(model, docs), {}
    for name, s in seconds.items():
        if name.startswith("products"):
            table[name] = {"GFLOP/s": product_flops / s / 1e9}
        else:
            table[name] = {"tokens/s": n_tokens / s, "GFLOP/s": flops / s / 1e9}
    limit = max(row["GFLOP/s"] for name, row in table.items() if name.startswith("products"))
    table["ours"]["of F.linear's rate"] = table["ours"]["GFLOP/s"] / table["products by F.linear"]["GFLOP/s"]
    table["ours"]["of the limit"] = table["ours"]["GFLOP/s"] / limit
    if peer:
        best = max(row["tokens/s"] for name, row in table.items() if name.startswith("transformers, "))
        table["ours"]["of transformers"] = table["ours"]["tokens/s"] / best
        for name, row in table.items():
            if "float32" in name:
                table["ours"]["of transformers in float32"] = table["ours"]["tokens/s"] / row["tokens/s"]
    step, n = seconds["ours"] / STEPS, n_tokens / STEPS
    table["loader"] = {"tokens/s": n / loader_seconds, "of a step": loader_seconds / step}
    table["kept for the backward pass"] = {"MB": kept / 1e6, "KB/token": kept / 1e3 / rows}
    if on_cuda:
        table["kept for the backward pass"]["peak GB"] = peak / 1e9  # another model's weights included
    if profile:
        table |= longest_operations(contestants["ours"])
    return table


def peer_model(model):
    """transformers' model with the same weights and, as far as its setting reaches, the same truncation."""
    from transformers import HrmTextForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as directory:
        n_H = min(model.config.H_cycles, bp_steps - 1)
        model.save_pretrained(directory, L_bp_cycles=[0] * (model.config.H_cycles - 1) + [bp_steps - n_H])
        return HrmTextForCausalLM.from_pretrained(directory, attn_implementation="sdpa").to(device)


def peer_steps(model, docs, size, compute):
    """Training steps as a user of transformers would make them: padded batches of documents sorted by length."""
    theirs = peer_model(model)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, fused=True)
    order, batches = sorted(docs, key=lambda doc: len(doc[0])), []
    for chunk in (order[i : i + size] for i in range(0, len(order), size)):
        longest = max(len(ids) for ids, _ in chunk) - 1
        names = "input_ids", "attention_mask", "token_type_ids"
        batch = {name: torch.zeros(len(chunk), longest, dtype=torch.long) for name in names}
        labels = torch.full((len(chunk), longest), IGNORE)
        for i, (ids, p) in enumerate(chunk):
            n = len(ids) - 1
            batch["input_ids"][i, :n] = torch.from_numpy(ids[:-1])
            batch["attention_mask"][i, :n] = 1
            batch["token_type_ids"][i, :p] = 1
            labels[i, p - 1 : n] = torch.from_numpy(ids[p:])
        batches.append(({name: t.to(device) for name, t in batch.items()}, labels.to(device)))

    per_step = -(-len(batches) // STEPS)

    def run():
        for i, (batch, labels) in enumerate(batches):
            if i % per_step == 0:
                optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, compute) if compute != torch.float32 else nullcontext():
                logits = theirs(**batch, use_cache=False).logits
            F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE).backward()
            if (i + 1) % per_step == 0 or i + 1 == len(batches):
                optimizer.step()

    return run


# ----------------------------------------------------------------------------------------------------
# decoding


def bench_decode():
    """Greedy generation from prompts of mixed lengths, all at once and one alone."""
    model = new_model().to(compute).eval()
    prompts = [ids[:p].tolist() for ids, p in documents(n_prompts)]
    one = sorted(prompts, key=len)[n_prompts // 2 :][:1]
    if max(map(len, prompts)) + max_new_tokens > block_size + 1:
        raise ValueError(
            f"{max_new_tokens} new tokens do not fit into block_size = {block_size} after the longest prompt"
        )
    table = decode_table(model, f"{n_prompts} prompts", prompts) | decode_table(model, "one prompt", one)
    x = torch.ones(2**26, device=device)
    s = measure({"read": x.sum}, rounds)["read"]
    speed = x.numel() * 4 / s / 1e9
    table["memory"] = {"GB/s": speed, "ms/step for the weights": bytes_per_step(model) / speed / 1e6}
    return table


def decode_table(model, what, prompts):
    contestants, answers, table = {"ours": lambda: model.generate(prompts, max_new_tokens)}, {}, {}
    if peer:
        theirs, faster = peer_model(model).to(compute), peer_model(model).to(compute)
        faster.forward = torch.compile(faster.forward)
        contestants["transformers"] = lambda: peer_generate(theirs, prompts)
        contestants["transformers, static cache"] = lambda: peer_generate(theirs, prompts, "static")
        if len(prompts) == 1 or on_cuda:  # with many it was slower than uncompiled on a CPU (transformers 5.23)
            contestants["transformers, static cache, compiled"] = lambda: peer_generate(faster, prompts, "static")

    def run(name):
        answers[name] = contestants[name]()

    seconds = measure({name: lambda name=name: run(name) for name in contestants}, rounds)
    for name, s in seconds.items():
        same = sum(a == b for a, b in zip(answers["ours"], answers[name])) / len(prompts)
        row = {"tokens/s": len(prompts) * max_new_tokens / s, "ms/step": 1e3 * s / max_new_tokens}
        table[f"{what}: {name}"] = row if name == "ours" else row | {"answers like ours": same}
    ours = table[f"{what}: ours"]
    if peer:
        ours["of transformers"] = min(s for name, s in seconds.items() if name != "ours") / seconds["ours"]
    ours["GB/s of weights"] = bytes_per_step(model) * max_new_tokens / seconds["ours"] / 1e9
    longest = max(map(len, prompts)) + max_new_tokens
    ours["cache MB"] = len(prompts) * longest * model.cache_bytes_per_token() / 1e6
    if profile:
        table |= {f"{what}: {name}": row for name, row in longest_operations(contestants["ours"]).items()}
    return table


def bytes_per_step(model):
    """Weights that a step must read, those of a stack at each of its uses."""
    L, H = (sum(p.numel() for p in stack.parameters()) for stack in (model.L, model.H))
    n_H = model.config.H_cycles
    return (L * n_H * model.config.L_cycles + H * n_H + model.lm_head.numel()) * model.lm_head.element_size()


def peer_generate(theirs, prompts, cache=None):
    """transformers' greedy generation, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    options = dict(max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        new = theirs.generate(ids, attention_mask=mask, token_type_ids=mask, cache_implementation=cache, **options)
    return new[:, longest:].tolist()


# ----------------------------------------------------------------------------------------------------
# data


def bench_data():
    """Preparation of a large file, against tiktoken alone on a part of it; the loader."""
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        if source:
            text = Path(source).read_text(encoding="utf-8")
        else:
            rows = data.word_problems("train", 10000, seed)
            rows = ({"question": row["instruction"], "answer": row["response"]} for row in rows)
            text = "".join(json.dumps(row) + "\n" for row in rows)
        once, large = directory / "once.jsonl", directory / "large.jsonl"
        once.write_text(text, encoding="utf-8")
        n_lines, repeats = text.count("\n"), -(-data_mb * 1_000_000 // len(text.encode()))
        with open(large, "w", encoding="utf-8") as file:
            for _ in range(repeats):
                file.write(text)
        fields = {"instruction": "question", "response": "answer"}
        options = dict(fields=fields, threads=threads, block_size=block_size)
        data.prepare(directory / "small", str(once), tokenizer=tokenizer, **options)
        encoding = data.load_encoding(directory / "small")
        texts = [row[key] for row in map(json.loads, text.splitlines()) for key in fields.values()]

        def tiktoken_alone():
            encoding.encode_ordinary_batch(texts, num_threads=threads)

        def tiktoken_in_threads():
            parts = [texts[i : i + 1000] for i in range(0, len(texts), 1000)]
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda part: [encoding.encode_ordinary(text) for text in part], parts))

        ways = {"tiktoken": tiktoken_alone, "in threads": tiktoken_in_threads}
        before = measure(ways, 3)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        clock = time.perf_counter()
        options |= dict(tokenizer=str(directory / "small"))
        meta = data.prepare(directory / "large", str(large), **options)
        seconds = time.perf_counter() - clock
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
        after = measure(ways, 3)
        alone, in_threads = ((before[way] + after[way]) / 2 for way in ways)
        loader = data.Loader(directory / "large", "train", batch_size, block_size, seed)
        next(loader)
        clock, n_tokens = time.perf_counter(), 0
        while time.perf_counter() < clock + 3:
            n_tokens += next(loader).n_tokens
        loader_seconds = time.perf_counter() - clock
    n = n_lines * repeats
    table = {"data.py": {"documents/s": n / seconds, "tokens/s": meta["splits"]["train"]["tokens"] / seconds}}
    table["tiktoken's encode_ordinary_batch alone"] = {"documents/s": n_lines / alone}
    table["tiktoken alone, 1,000 texts per job"] = {"documents/s": n_lines / in_threads}
    table["data.py"] |= {"of tiktoken": n / seconds * alone / n_lines, "more memory, MB": memory}
    table["loader"] = {"tokens/s": n_tokens / loader_seconds}
    return table


# ----------------------------------------------------------------------------------------------------
# compilation


def first(what):
    """Say when what has been done for the first time; the parent process looks at the clock."""
    model = new_model()
    if what == "token":
        model.eval().generate([list(range(10, 40))], 2)
        print("first token", flush=True)
        return
    with tempfile.TemporaryDirectory() as directory:
        make_dataset(Path(directory), documents(256))
        loader = data.Loader(directory, "train", batch_size, block_size, seed)
        optimizer = AdamATan2(model.parameters(), lr=1e-4, ema=0.999)
        global bp_steps
        print("ready", flush=True)
        for bp_steps in (5, 2, 3, 4):
            train_step(model, optimizer, next(loader))
            synchronize()
            print(f"K = {bp_steps}", flush=True)
        train_step(model, optimizer, next(loader))
        synchronize()
        print("warm", flush=True)


def seconds_of(what, cache, **changes):
    """{line: seconds from the start of the process} of first(what) in a process of its own."""
    args = [f"--{key}={value}" for key, value in (settings | changes).items()]
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "BENCH_FIRST": what}
    clock, seen = time.perf_counter(), {}
    with subprocess.Popen([sys.executable, __file__, *args], env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            seen[line.strip()] = time.perf_counter() - clock
    if process.returncode:
        raise ValueError(f"the process for the first {what} ended with {process.returncode}")
    return seen


def bench_compile():
    table = {}
    with tempfile.TemporaryDirectory() as directory, tqdm(total=8, desc="measuring", leave=False) as bar:

        def row(name, what, cache, **changes):
            seen = seconds_of(what, str(Path(directory, cache)), **changes)
            bar.update()
            if what == "token":
                table[name] = {"s": seen["first token"]}
            else:
                work = (seen["warm"] - seen["K = 4"]) if "warm" in seen else 0
                one, every = seen["K = 5"] - seen["ready"] - work, seen["K = 4"] - seen["ready"] - 4 * work
                table[name] = {"s": seen["K = 5"], "compiling K = 5, s": one, "compiling K = 2 to 5, s": every}

        row("first step, not compiled", "step", "none", compile=False)
        row("first step, compiled, cold cache", "step", "a")
        row("first step, compiled, warm cache", "step", "a")
        small = dict(n_embd=64, n_head=2, batch_size=1, micro_batch_size=1)  # a short step: most is compiling
        row("first step, 4 layers of width 64, cold", "step", "b", n_layer=4, **small)
        row("first step, 32 layers of width 64, cold", "step", "c", n_layer=32, **small)
        row("first token, not compiled", "token", "none", compile=False)
        row("first token, compiled, cold cache", "token", "d")
        row("first token, compiled, warm cache", "token", "d")
    few, many = (table[f"first step, {n} layers of width 64, cold"] for n in (4, 32))
    many["of 4 layers"] = many["compiling K = 5, s"] / few["compiling K = 5, s"]
    cold = table["first step, compiled, cold cache"]
    cold["K = 2 to 5 of K = 5"] = cold["compiling K = 2 to 5, s"] / cold["compiling K = 5, s"]
    return table


# ----------------------------------------------------------------------------------------------------

TASKS = {"train": bench_train, "decode": bench_decode, "data": bench_data, "compile": bench_compile}
tasks = [arg for arg in sys.argv[1:] if arg.isalpha()] or ["all"]
tables = {}
try:
    for key in ("batch_size", "micro_batch_size", "n_prompts", "max_new_tokens", "data_mb", "threads", "rounds"):
        if globals()[key] < 1:
            raise ValueError(f"{key} must be at least 1")
    if not all(size.isdecimal() and int(size) for size in peer_batches.split(",")):
        raise ValueError(f"peer_batches must be numbers such as 8,16,32, not {peer_batches!r}")
    device, compute = choose_device(device, dtype)
    on_cuda = device.startswith("cuda")
    if "BENCH_FIRST" in os.environ:
        first(os.environ["BENCH_FIRST"])
        sys.exit()
    if unknown := set(tasks) - {"all", *TASKS}:
        raise ValueError(f"there is no task {', '.join(unknown)}, only all, {', '.join(TASKS)}")
    if peer:
        try:
            import transformers  # noqa: F401
        except ImportError:
            peer = False
            print("without transformers (pip install transformers) there is no peer for train and decode")
    name = torch.cuda.get_device_name() if on_cuda else f"{device}, {torch.get_num_threads()} threads"
    print(f"{name}, {str(compute).removeprefix('torch.')}, torch {torch.__version__}; ratios: more is better")
    for task in TASKS if "all" in tasks else tasks:
        tables[task] = TASKS[task]()
        print(f"\n{task}")
        for what, row in tables[task].items():
            print(f"  {what:<54}" + ", ".join(f"{key} {value:,.4g}" for key, value in row.items()))
        content = {"machine": name, "torch": torch.__version__, "settings": settings, "tables": tables}
        Path("bench.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
except (ValueError, OSError) as e:
    sys.exit(f"bench.py: {reason(e)}")
except KeyboardInterrupt:
    told = "bench.json holds the tables above" if tables else "nothing was written"
    sys.exit(1 if "BENCH_FIRST" in os.environ else f"bench.py: interrupted; {told}")
print("\nwritten to bench.json")
