"""
The engine: many prompts at a time, with static caches and continuous batching.

Each answer in work has a slot. Prompts enter free slots as one packed row (prefill); then each
decode step gives all slots their next id. Every block has a cache of its own at every step of the
recurrence: 16 x 8 = 128 in the 1B model. On CUDA a decode step is a CUDA graph, as launching its
kernels one by one takes longer than running them.

    model, tokenizer = load_for_inference("out")
    prompts = [tokenizer.prompt("What is 2+2?", "cot")]
    answers = generate(model, prompts, max_new_tokens=64, stop_token=tokenizer.id_of["eoa"])
"""

import os
import random
import sys
from collections import deque
from dataclasses import astuple

import torch

from attention import padded_batches, upload
from checkpoint import find_directory, load_model
from model import visible_keys
from tokenizer import load_tokenizer

MAX_PREFILL_TOKENS = 2**12  # of prompts read at a time, so that activations fit


def choose_device(device, dtype):
    """
    The settings device and dtype, either of which may be "auto" -> (this rank's device, torch
    dtype). auto is the first of cuda, mps and cpu, and bfloat16 where the device multiplies it.
    """
    if device == "auto":
        device = "cpu"
        if torch.backends.mps.is_available():
            device = "mps"
        if torch.cuda.is_available():
            device = "cuda"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK') or 0}"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        sys.exit(f"there is no device {device} here")
    fast = False
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans half a second for each new shape
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    dtypes["auto"] = dtypes["bfloat16" if fast else "float32"]
    if dtype not in dtypes:
        sys.exit(f"dtype must be auto, float32 or bfloat16, not {dtype}")
    return device, dtypes[dtype]


def load_for_inference(
    name, device="auto", dtype="auto", H_cycles=0, L_cycles=0, guidance=0.0, compile=False
):
    """
    (model, tokenizer) of a run, a directory or a hub id. H_cycles, L_cycles: of the recurrence,
    0 for those it was trained with. guidance: w of auto-guidance. compile: slow to start, then fast.
    """
    device, dtype = choose_device(device, dtype)
    directory = find_directory(name)
    tokenizer = load_tokenizer(directory)
    model = load_model(directory).to(device, dtype)  # cast once, and not in each forward pass
    config = model.config
    if tokenizer.n_vocab > config.vocab_size:
        n_ids = f"{tokenizer.n_vocab} ids, and the model {config.vocab_size}"
        sys.exit(f"{directory}: the tokenizer does not fit the model: it has {n_ids}")
    config.H_cycles = H_cycles or config.H_cycles
    config.L_cycles = L_cycles or config.L_cycles
    model.dtype, model.guidance = dtype, guidance
    model.banned_ids = [i for i in range(config.vocab_size) if i not in tokenizer.tokens]
    if compile:
        model.compile_blocks()
    print(f"{directory} on {device}, {dtype}")
    return model, tokenizer


# -----------------------------------------------------------------------------
# the engine


class Cache:
    """Keys and values, (n_slots, n_head, max_len, head_dim), of a block at one step."""

    def __init__(self, engine, shape, **options):
        self.engine = engine
        self.k = torch.zeros(shape, **options)
        self.v = torch.zeros(shape, **options)

    def update(self, k, v):
        """Store the new ones, (B, T, n_head, head_dim). Returns all that the queries may see."""
        slot, pos, length = self.engine.place
        self.k[slot, :, pos] = k.flatten(0, 1)
        self.v[slot, :, pos] = v.flatten(0, 1)
        if length is None:  # prefill: the packed row is all
            return k, v
        return self.k[:, :, :length].transpose(1, 2), self.v[:, :, :length].transpose(1, 2)


class Engine:
    def __init__(self, model, n_slots, max_len, with_caches=True):
        config = model.config
        device = model.lm_head.weight.device
        self.model = model
        self.max_len = min(round_up(max_len), config.block_size)
        shape = n_slots, config.n_head, self.max_len, config.head_dim
        n_caches = config.n_steps * config.n_layer // 2 if with_caches else 0
        options = dict(device=device, dtype=model.dtype)
        self.caches = [Cache(self, shape, **options) for _ in range(n_caches)]
        self.slots = torch.arange(n_slots, device=device)
        self.ids = torch.zeros_like(self.slots)  # the newest of each slot
        self.pos = torch.zeros_like(self.slots)  # where they go
        self.place = None  # (slot, pos) of each new token, and how many cached ones are read
        self.graphs = {}  # {length: (CUDA graph, its logits)}
        self.pool = None  # of memory, which all graphs share

    def prefill(self, prompts, slots):
        """Read prompts into slots. Returns the logits of the next ids, (len(prompts), vocab_size)."""
        device = self.ids.device
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        doc = torch.arange(len(prompts)).repeat_interleave(lengths)[None]
        prefix = torch.full_like(doc, self.model.config.prefix_lm, dtype=torch.bool)
        first, last = visible_keys(doc, prefix)
        n_head = self.model.config.n_head
        mask = padded_batches(first, last, n_head, device, self.model.dtype)
        idx = upload(torch.tensor([[id for prompt in prompts for id in prompt]]), device)
        pos = upload(torch.arange(doc.size(1)) - first, device)
        ends = upload(lengths.cumsum(0) - 1, device)
        slots = torch.tensor(slots)
        self.place = upload(slots[doc[0]], device), pos[0], None
        self.pos[upload(slots, device)] = upload(lengths.clamp(max=self.max_len - 1), device)
        z = self.model.hidden(idx, pos, mask, caches=self.caches)
        return self.model.lm_head(z[0, ends]).float()

    def decode(self, longest):
        """
        Read the newest id of each slot; the longest answer has `longest` tokens, prompt included.
        Returns the logits of the next ids, (n_slots, vocab_size).
        """
        length = min(round_up(longest), self.max_len)
        if not self.ids.is_cuda:
            logits = self.step(length)
        else:
            if length not in self.graphs:
                self.step(length)  # compiles, and chooses kernels
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool):
                    logits = self.step(length)
                self.graphs[length] = graph, logits
                self.pool = graph.pool()
            graph, logits = self.graphs[length]
            graph.replay()
        self.pos.add_(1).clamp_(max=self.max_len - 1)  # those of empty slots advance, too
        return logits

    def step(self, length):
        self.place = self.slots, self.pos, length
        visible = torch.arange(length, device=self.pos.device) <= self.pos[:, None]
        mask = visible[:, None, None]  # (n_slots, 1, 1, length)
        z = self.model.hidden(self.ids[:, None], self.pos[:, None], mask, caches=self.caches)
        return self.model.lm_head(z[:, 0]).float()


def round_up(length):
    """The next multiple of 128: each length has a graph of its own."""
    return -(-length // 128) * 128


def slots_in_memory(model, longest, most):
    """How many answers of `longest` tokens fit half of what the weights leave, at most `most`."""
    config = model.config
    device = model.lm_head.weight.device
    free = 16e9
    if device.type == "cuda":
        weights = sum(p.nbytes for p in model.parameters())
        free = torch.cuda.get_device_properties(device).total_memory - weights
    n_caches = config.n_steps * config.n_layer // 2
    per_token = n_caches * 2 * config.n_head * config.head_dim * model.dtype.itemsize
    return max(1, min(most, int(free / 2 / per_token / round_up(longest))))


def take_engine(model, n_slots, longest, with_caches):
    """The engine that the model keeps, with its CUDA graphs, if it serves; or a new one."""
    key = n_slots, with_caches, astuple(model.config), model.guidance, model.dtype
    engine = model.engine
    if engine is None or engine.key != key or engine.max_len < longest:
        model.engine = engine = None  # frees its memory first
        engine = Engine(model, n_slots, longest, with_caches)
        engine.key = key
        model.engine = engine
    return engine


# -----------------------------------------------------------------------------
# generation


def choose(logits, temperature, top_k, top_p, uniform):
    """The next ids (B,) from logits (B, vocab_size). uniform: B random numbers from 0 to 1."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        ordered, order = p.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= top_p, 0)
        p = torch.zeros_like(p).scatter(-1, order, ordered)
    cumulative = p.cumsum(-1)
    uniform = torch.tensor(uniform, device=p.device).clamp(max=1 - 2**-24)  # fp32 may round to 1
    at = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).squeeze(1)


@torch.inference_mode()
def stream(
    model,
    prompts,
    max_new_tokens,
    stop_token=None,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    slots=128,
):
    """
    Continue prompts, which are lists of ids, each a whole prefix. Yields (number of a prompt, its
    next id), and (number, None) when an answer is complete; the stop_token is not yielded, and an
    answer ends at block_size at the latest. max_new_tokens, seed: one number, or one per prompt.
    temperature 0 is greedy; top_k 0 and top_p 1 do not limit the choice. At most `slots` answers
    are in work at a time, fewer if memory is short; none depends on what is beside it.
    """
    block_size = model.config.block_size
    if isinstance(max_new_tokens, int):
        max_new_tokens = [max_new_tokens] * len(prompts)
    if not isinstance(seed, list):
        seed = [f"{seed} {i}" for i in range(len(prompts))]
    rngs = [random.Random(s) for s in seed]
    if not prompts:
        return
    most = max(map(len, prompts))
    if most > block_size:
        sys.exit(f"a prompt has {most:,} tokens; the model takes {block_size:,}")
    limits = [min(n, block_size + 1 - len(p)) for p, n in zip(prompts, max_new_tokens)]
    longest = max(len(prompt) + n for prompt, n in zip(prompts, limits))
    with_caches = max(limits) > 1  # answers of one token, as to multiple choice, need none
    if with_caches:
        slots = slots_in_memory(model, longest, slots)
    n_slots = min(slots, len(prompts))
    engine = take_engine(model, n_slots, longest, with_caches)
    device = engine.ids.device
    banned = torch.tensor(model.banned_ids, dtype=torch.long, device=device)

    # what may take longest comes first, so that few slots are empty at the end
    waiting = deque(sorted(range(len(prompts)), key=lambda i: (-limits[i], -len(prompts[i]))))
    in_slot = {}  # slot: the number of its prompt
    n_new = [0] * len(prompts)
    while waiting or in_slot:
        free = [slot for slot in range(n_slots) if slot not in in_slot]
        if waiting and 16 * len(free) >= n_slots:  # refill at least 1/16 of the slots at a time
            active, n_tokens = [], 0
            while waiting and free:
                n_tokens += len(prompts[waiting[0]])
                if active and n_tokens > MAX_PREFILL_TOKENS:
                    break
                active.append(free.pop(0))
                in_slot[active[-1]] = waiting.popleft()
            logits = engine.prefill([prompts[in_slot[slot]] for slot in active], active)
        else:
            active = sorted(in_slot)
            lengths = [len(prompts[i]) + n_new[i] for i in in_slot.values()]
            logits = engine.decode(max(lengths))
        at = upload(torch.tensor(active), device)
        if len(logits) > len(active):
            logits = logits[at]
        if not logits.isfinite().all():
            raise ValueError("the logits are not finite, so the weights cannot be right")
        logits.index_fill_(1, banned, -torch.inf)
        uniform = [rngs[in_slot[slot]].random() for slot in active] if temperature else None
        new = choose(logits, temperature, top_k, top_p, uniform)
        engine.ids[at] = new
        for slot, id in zip(active, new.tolist()):
            i = in_slot[slot]
            n_new[i] += 1
            if id != stop_token:
                yield i, id
            if id == stop_token or n_new[i] >= limits[i]:
                del in_slot[slot]
                yield i, None


def generate(model, prompts, max_new_tokens, **options):
    """stream() to its end: the new ids of each prompt."""
    new = [[] for _ in prompts]
    for i, id in stream(model, prompts, max_new_tokens, **options):
        if id is not None:
            new[i].append(id)
    return new
