"""The engine: greedy or sampled generation with static caches and continuous batching.

Each answer in work has a slot. Prompts enter free slots as one packed row (prefill); then every decode step chooses the
next id of all slots. Every block has a cache of its own at every step of the recurrence: 16 x 8 = 128 in the 1B model.
On CUDA a decode step is a CUDA graph, since launching its kernels one by one takes longer than running them.
"""

import math
import random
import warnings
from collections import deque
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from attention import attend, cache_mask, flex_mask, padded_batches, see_up_to
from common import local_directory, one_line
from devices import choose_device, compiled, cpu_threads, free_memory, upload
from model import HRM, output_and_mlp, project_gqkv, visible_keys
from tokenizer import choose_condition, load_encoding

MAX_PREFILL_TOKENS = 2**14  # of prompts read at a time, so that their activations fit
CUDA_GRAPH_DEVICES = {"cuda"}


def load_for_inference(
    name,
    average=True,
    device="auto",
    dtype="auto",
    compile=False,
    condition="",
    H_cycles=0,
    L_cycles=0,
    guidance=0.0,
    kl_threshold=0.0,
):
    """The model of a run, a directory or a hub id, ready to generate, its Encoding, and the condition of prompts.
    H_cycles and L_cycles: of the recurrence, 0 for as many as it was trained with; guidance: its w, 0 for none;
    kl_threshold: of adaptive depth (see Engine._recur), in nats, 0 for all cycles."""
    device, dtype = choose_device(device, dtype)
    source = local_directory(name)
    model, encoding = HRM.from_pretrained(source, average).to(device, dtype), load_encoding(source)
    if encoding.n_vocab > model.config.vocab_size:
        raise ValueError(f"{source}: the tokenizer has {encoding.n_vocab} ids and the model {model.config.vocab_size}")
    ban_ids_without_token(model, encoding)
    model.compute_dtype, model.compile_blocks = dtype, compile
    c = model.config
    model.config = replace(c, H_cycles=H_cycles or c.H_cycles, L_cycles=L_cycles or c.L_cycles)
    if not abs(guidance) <= 100:
        raise ValueError(f"guidance must be from -100 to 100, not {guidance}")
    if c.recurrence == "transformer" and (H_cycles or L_cycles):
        raise ValueError(f"{source} is a plain Transformer, which has neither H_cycles nor L_cycles")
    if (guidance or kl_threshold) and c.recurrence not in ("hrm", "trm"):
        raise ValueError(f"guidance and kl_threshold compare H-steps, and recurrence = {c.recurrence!r} has none")
    if guidance and model.config.H_cycles < 2:
        raise ValueError("guidance compares the last two H-steps, and with H_cycles=1 there is one")
    if not kl_threshold >= 0:
        raise ValueError(f"kl_threshold must be at least 0, not {kl_threshold}")
    if kl_threshold and model.config.H_cycles < 3:
        raise ValueError("kl_threshold compares two H-states and saves those that follow: H_cycles must be 3 or more")
    model.guidance, model.kl_threshold, condition = guidance, kl_threshold, choose_condition(condition, source)
    how = f"; H_cycles {model.config.H_cycles}, L_cycles {model.config.L_cycles}" if model.config != c else ""
    how += f"; guidance {guidance:g}" if guidance else ""
    how += f"; kl_threshold {kl_threshold:g}" if kl_threshold else ""
    print(f"{name}, on {device}, {str(dtype).removeprefix('torch.')}; condition: {condition or 'none'}{how}")
    return model, encoding, condition


def ban_ids_without_token(model, encoding):
    """Have generation choose none of the ids that have no token: a vocabulary may exceed its tokenizer."""
    ids = [i for i in range(model.config.vocab_size) if i not in encoding.tokens]
    model.banned_ids = torch.tensor(ids, device=model.embed.device) if ids else None


def cache_bytes_per_token(model):
    """Size of the keys and values of one token: those of every block at every step of the recurrence."""
    c = model.config
    return 2 * c.n_layer // 2 * c.n_steps * c.n_head * c.head_dim * model.compute_dtype.itemsize


def cache_length(model, longest):
    """For how many tokens an answer has room that may have `longest`. Only few lengths, as each has its own graphs."""
    if model.embed.device.type in CUDA_GRAPH_DEVICES or model.uses_flex():
        return min(rounded(longest, 256), model.config.block_size)
    return max(longest, 2)


def slots_in_memory(model, longest, most, cache_gb=0.0):
    """How many answers may be in work at a time: `most`, or as many as have room for the keys and values of `longest`
    tokens each in cache_gb, or for 0 in half of the free memory; at least 1."""
    model.engine = None  # whose memory is then free
    size = cache_gb * 1e9 or free_memory(model.embed.device) / 2
    return max(1, min(most, int(size / (cache_bytes_per_token(model) * (cache_length(model, longest) + 1)))))


@torch.inference_mode()
def stream(
    model,
    prompts,
    max_new_tokens,
    temperature=0.0,
    top_k=None,
    top_p=None,
    stop_token=None,
    seed=None,
    slots=None,
    is_end=None,
    spent=None,
):
    """Continue each prompt. prompts: lists of token ids, of any lengths, each the whole prefix of a document.
    max_new_tokens is one number, or a list of one per prompt. temperature 0 is greedy; top_k and top_p narrow the
    choice; seed makes sampling repeatable. Each prompt draws from a generator of its own, of this seed and its place,
    or of its own seed if `seed` is a list, so that its answer is the same whatever is beside it.
    At most `slots` prompts (None: all) are in work at a time; when one is complete, the next takes its place.
    is_end(number of a prompt, its next id) is asked after each id whether the answer ends with it.
    spent: a list per prompt, to which the H-cycles that each of its ids took are appended.
    Yields, step by step, a list of events (number of a prompt, its next id), where None for an id says that the answer
    is complete. The stop_token is no event; a document ends at block_size at the latest. Raises ValueError."""
    most = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
    if not (temperature >= 0 and 0 <= (top_p or 0) <= 1) or min(top_k or 0, slots or 0, *most) < 0:
        raise ValueError("temperature, top_k, max_new_tokens and slots must be at least 0, and top_p from 0 to 1")
    block_size, sizes = model.config.block_size, [len(p) for p in prompts]
    for n in sizes:
        if not 0 < n <= block_size:
            raise ValueError(f"a prompt must have 1 to block_size = {block_size} tokens; one has {n}")
    limits = [min(m, block_size + 1 - n) for m, n in zip(most, sizes)]  # a row of T tokens predicts one more
    n_slots = min(slots or len(prompts), len(prompts))
    seeds = seed if isinstance(seed, list) else [seed if seed is None else f"{seed} {i}" for i in range(len(prompts))]
    draw = [random.Random(s).random for s in seeds] if temperature else []

    def choose(logits):
        """Of the prompts `rows`, whose logits these are."""
        uniform = [0.0 if i is None else draw[i]() for i in rows] if temperature else None
        return choose_ids(model.banned_ids, temperature, top_k, top_p, uniform, logits)

    engine = take_engine(model, n_slots, max((n + limit - 1 for n, limit in zip(sizes, limits)), default=0), choose)
    # What may take longest comes first, so that few slots stay empty at the end.
    order = sorted(range(len(prompts)), key=lambda i: (-limits[i], -sizes[i]))
    waiting = deque(i for i in order if limits[i] > 0)
    in_slot, n_generated = [None] * n_slots, [0] * len(prompts)
    while waiting or any(i is not None for i in in_slot):
        cpu_threads().adapt(model.embed.device)
        free = [slot for slot, i in enumerate(in_slot) if i is None]
        if waiting and 16 * len(free) >= n_slots:  # refill when at least 1/16 of the slots are free
            active, n_tokens = [], 0
            while waiting and free and (not active or n_tokens + sizes[waiting[0]] <= MAX_PREFILL_TOKENS):
                active.append(free.pop(0))
                in_slot[active[-1]] = waiting.popleft()
                n_tokens += sizes[in_slot[active[-1]]]
            rows = [in_slot[slot] for slot in active]
            engine.prefill([prompts[i] for i in rows], active)
        else:
            rows = in_slot
            active = [slot for slot, i in enumerate(in_slot) if i is not None]
            engine.decode(max(sizes[in_slot[slot]] + n_generated[in_slot[slot]] for slot in active), active)
        events, ids = [], engine.ids.tolist()
        for slot, n in zip(active, engine.cycles[active].tolist()) if spent else ():
            spent[in_slot[slot]].append(n)
        if min(ids[slot] for slot in active) < 0:
            raise ValueError("the model's logits are not finite, so its weights cannot be right")
        for slot in active:
            i = in_slot[slot]
            n_generated[i] += 1
            if ids[slot] != stop_token:
                events.append((i, ids[slot]))
            if ids[slot] == stop_token or (is_end and is_end(i, ids[slot])) or n_generated[i] == limits[i]:
                events.append((i, None))
                in_slot[slot] = None
        yield events
    if engine.graphs:
        model.engine = engine  # for the next call


def generate(model, prompts, max_new_tokens, **options):
    """stream() to its end. Returns the new ids of each prompt, without the stop_token."""
    new = [[] for _ in prompts]
    for events in stream(model, prompts, max_new_tokens, **options):
        for i, id in events:
            if id is not None:
                new[i].append(id)
    return new


def choose_ids(banned_ids, temperature, top_k, top_p, uniform, logits):
    """The next ids (B,) from logits (B, vocab_size), none of banned_ids; -1 where the logits are not finite. uniform: B
    random numbers from 0 to 1, unless temperature is 0."""
    if banned_ids is not None:
        logits.index_fill_(-1, banned_ids, -math.inf)
    logits = logits if temperature == 0 else logits.float()
    largest, ids = logits.max(-1)
    if temperature == 0:
        return ids.where(largest.isfinite(), -1)
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:], -math.inf)
    logits = (logits - largest[:, None]) / min(max(temperature, 1e-30), 1e30)  # finite in fp32
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        ordered[:, 1:][(p.cumsum(-1) - p)[:, 1:] >= top_p] = -math.inf  # the ids before it already have top_p
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    cumulative = logits.softmax(-1).nan_to_num(1).cumsum(-1)
    below_1 = upload(torch.tensor(uniform).clamp(max=1 - 2**-24), logits.device)  # else fp32 rounds some to 1
    ids = torch.searchsorted(cumulative, below_1[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    return ids.where(largest.isfinite(), -1)


def rounded(length, first_power=64):
    """The next of 48, 64, 96, 128, 192, ..., so that something need be compiled or captured for few lengths only."""
    power = 2 ** (max(first_power, length) - 1).bit_length()
    return power // 4 * 3 if length <= power // 4 * 3 else power


def take_engine(model, n_slots, max_len, choose):
    """The engine that the model keeps, if it serves, or a new one; never the memory of both."""
    engine, model.engine = model.engine, None
    if engine and engine.max_len >= max_len and engine.made_for == made_for(model, n_slots):
        engine.update_weights()
    else:
        engine = None
        engine = Engine(model, n_slots, max_len)
    engine.choose = choose
    return engine


def made_for(model, n_slots):
    """What an engine serves alone: so many slots, and a model with its weights in the same places."""
    places, c = [p.data_ptr() for p in model.parameters()], model.config
    how = c.H_cycles, c.L_cycles, model.guidance, model.kl_threshold, model.compute_dtype, model.compile_blocks
    return n_slots, how, model.uses_flex(), places


class Engine:
    """Answers in `n_slots` slots, each of at most `max_len` tokens. `ids` are the newest of each slot, as the function
    `choose` (see take_engine) takes them from logits."""

    def __init__(self, model, n_slots, max_len):
        config, device = model.config, model.embed.device
        self.model, self.made_for, self.flex = model, made_for(model, n_slots), model.uses_flex()
        self.options = dict(device=device, dtype=model.compute_dtype)
        self.norms = config.norm_eps, config.norm == "post"
        self.weights, self.graphs = model.cast_weights(), {}
        # With a threshold, a step ends where its values say so, which no graph does.
        self.use_graphs = device.type in CUDA_GRAPH_DEVICES and not model.kl_threshold
        self.max_len = cache_length(model, max_len)
        shape = (n_slots, config.n_head, self.max_len + 1, config.head_dim)  # one more, so that every view is a part
        n_caches = config.n_steps * config.n_layer // 2
        self.caches = [[torch.zeros(shape, **self.options) for _ in "kv"] for _ in range(n_caches)]
        for tensor in (t for pair in self.caches for t in pair if model.compile_blocks and not self.flex):
            torch._dynamo.mark_dynamic(tensor, 2)  # other lengths need no compilation of their own
        self.slots = torch.arange(n_slots, device=device)
        self.cycles = torch.full_like(self.slots, config.H_cycles)  # H-cycles that the newest ids took
        self.ids, self.pos = torch.zeros_like(self.slots), torch.zeros_like(self.slots)  # newest ids; where they go
        self.mask = cache_mask(self.pos, self.max_len + 1) if self.flex else None

    def update_weights(self):
        """Cast them again into the same places, as they may have changed."""
        for old, new in zip(*map(all_tensors, (self.weights, self.model.cast_weights()))):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)

    def prefill(self, prompts, slots):
        """Read prompts into slots, as one packed row, and choose the first id of each answer."""
        config, device = self.model.config, self.ids.device
        lengths, slots = torch.tensor([len(p) for p in prompts]), torch.tensor(slots)
        n = int(lengths.sum())
        padding = (0, rounded(n, 512) - n if self.flex else 0)
        idx = F.pad(torch.tensor([id for p in prompts for id in p]), padding)[None]
        doc = F.pad(torch.arange(len(prompts)).repeat_interleave(lengths), padding, value=-1)[None]
        first, last = visible_keys(doc, torch.full_like(doc, config.prefix_lm, dtype=torch.bool))
        if self.flex:
            mask = flex_mask(upload(first, device), upload(last, device))
        else:
            mask = padded_batches(first, last, config.n_head, **self.options)
        inputs = idx, torch.arange(len(doc[0])) - first, slots[doc[0, :n]], slots, lengths, lengths.cumsum(0) - 1
        idx, pos, slot, slots, lengths, ends = (upload(t, device) for t in inputs)
        caches = iter(self.caches)

        def run_block(x, w, cos, sin):
            g, q, *kv = project_gqkv(x, w.gqkv_proj, cos, sin, *self.norms)
            for cache, new in zip(next(caches), kv):
                cache[slot, :, pos[0, :n]] = new[0, :n]
            return output_and_mlp(x, g, attend(q, *kv, mask), *w[1:], *self.norms)

        member = upload(doc[0, :n], device)
        self.ids[slots] = self.choose(self._recur(idx, pos, run_block, ends, slots, slice(None), member, slot))
        self.pos[slots] = lengths

    def decode(self, longest, active):
        """Choose the next id of every slot; the longest has `longest` tokens. In those that are not in the list
        `active` it means nothing."""
        length = self.max_len if self.flex else min(rounded(longest), self.max_len)
        if self.use_graphs and length not in self.graphs:
            try:
                pool = next((graph.pool() for _, graph in self.graphs.values()), None)  # its memory serves all
                self.graphs[length] = capture_cuda_graph(partial(self._logits, length, active), pool)
            except RuntimeError as e:
                self.use_graphs = False
                warnings.warn(f"generation goes on more slowly, without CUDA graphs: {one_line(e)}", stacklevel=2)
        if self.use_graphs:
            logits, graph = self.graphs[length]
            graph.replay()
        else:
            logits = self._logits(length, active)
        self.ids.copy_(self.choose(logits))
        self.pos.add_(1).clamp_(max=self.max_len - 1)

    def _logits(self, length, active):
        """Of the token after the newest of every slot, which sees the cache's positions up to its own."""
        caches, run = iter(self.caches), decode_block
        if self.flex:
            mask = see_up_to(self.mask, self.pos)
        else:
            seen = torch.arange(length, device=self.pos.device) <= self.pos[:, None]
            mask = torch.zeros(seen.shape, **self.options).masked_fill_(~seen, -math.inf)[:, None, None]
        if self.model.compile_blocks:
            run = compiled(decode_block, fixed_threads=self.flex)
            if not self.flex:
                torch._dynamo.mark_dynamic(mask, 3)

        def run_block(x, w, cos, sin):
            return run(x, w, cos, sin, *self.norms, *next(caches), self.slots, self.pos, mask)

        args = self.ids[:, None], self.pos[:, None], run_block
        return self._recur(*args, slice(None), self.slots, active, self.slots, self.slots)

    def _recur(self, idx, pos, run_block, at, slots, active, member, slot):
        """Logits (n, vocab_size) at the places `at` of the flattened tokens idx: one place for each prompt of `slots`.

        Adaptive depth (the paper's future work; the criterion is the logit lens between successive H-states): with
        model.kl_threshold, the H-cycles of a prompt end with the first, from the second on, whose prediction is less
        than that many nats from the one before, by KL(new || old). The embedding is no prediction to compare with.
        All go on until the last of those in `active` has settled, so a step saves what its slowest prompt allows; what
        others compute beyond their own end is dropped, so that an answer is the same whatever is beside it.

        What was read at once ends at once: a prompt, by its last token, and then each new token by itself. Later tokens
        may take more cycles, and look for keys and values there. They find copies of those of the last cycle, block by
        block: the blocks are the same in all cycles, so for a state that has settled those are what would come out.
        (Of a Transformer's other layers, CALM, Schuster et al. 2022, computes them from the state that was last.)
        member (m,): which of the n each token belongs to; slot (m,): where its keys and values stand."""
        model, lm_head, H_cycles = self.model, self.weights.lm_head, self.model.config.H_cycles
        if not model.kl_threshold:
            return F.linear(model.recurrence(idx, pos, self.weights, run_block).flatten(0, 1)[at], lm_head)
        new = chosen = None
        cycles, going = torch.ones_like(slots), torch.zeros_like(slots, dtype=torch.bool)
        going[active] = True

        def settled(z_H):
            nonlocal new, chosen, going, cycles
            old, new = new, F.linear(z_H.flatten(0, 1)[at], lm_head)
            if old is None:
                chosen = new
                return False
            guided = torch.lerp(old, new, 1 + model.guidance) if model.guidance else new
            chosen, cycles = torch.where(going[:, None], guided, chosen), cycles + going
            going = going & ~(divergence(new, old) < model.kl_threshold)  # not where it is no number
            return not going.any()

        model.recurrence(idx, pos, self.weights, run_block, settled=settled)
        pos, n = pos.flatten()[: len(slot)], len(self.caches) // H_cycles
        for h in range(2, H_cycles):
            ended = (cycles[member] <= h).nonzero().squeeze(1)
            place = slot[ended], slice(None), pos[ended]
            for pair, before in zip(self.caches[h * n : (h + 1) * n], self.caches[(h - 1) * n :]):
                for cache, other in zip(pair, before):
                    cache[place] = other[place]
        self.cycles[slots] = cycles
        return chosen


def divergence(logits, others):
    """KL(p || q) in nats, (...), of the predictions p of logits and q of others, both (..., vocab_size)."""
    log_p, log_q = (x.log_softmax(-1, dtype=torch.float32) for x in (logits, others))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def all_tensors(weights):
    """Those of HRM.cast_weights(), in one list."""
    return [*sum((*weights.H, *weights.L), ()), weights.lm_head]


def decode_block(x, w, cos, sin, eps, post_norm, k_cache, v_cache, slots, pos, mask):
    """A block on one new token per slot: x (n_slots, 1, n_embd); caches (n_slots, n_head, max_len + 1, head_dim); mask
    a BlockMask, or (n_slots, 1, 1, length), to be added to the scores."""
    g, q, k, v = project_gqkv(x, w.gqkv_proj, cos, sin, eps, post_norm, linear=linear)
    k_cache[slots, :, pos], v_cache[slots, :, pos] = k[:, 0], v[:, 0]
    q = q.transpose(1, 2)
    if isinstance(mask, BlockMask):
        y = flex_attention(q, k_cache, v_cache, block_mask=mask, scale=1.0).transpose(1, 2)  # it splits long keys
    else:
        y = cached_attention(q, *(cache[:, :, : mask.size(-1)] for cache in (k_cache, v_cache)), mask)
    return output_and_mlp(x, g, y, *w[1:], eps, post_norm, linear=linear)


# Two loops that Inductor makes fast on a CPU, where torch's kernels for one row and for one query are not.


def linear(x, weight):
    if x.is_cpu and x.numel() == x.size(-1) and torch.compiler.is_compiling():
        return (x.unsqueeze(-2) * weight).sum(-1)  # one prompt: half the time
    return F.linear(x, weight)


def cached_attention(q, k, v, bias):
    """q (B, n_head, 1, head_dim); k, v (B, n_head, length, head_dim); result (B, 1, n_head, head_dim)."""
    if not (q.is_cpu and torch.compiler.is_compiling()):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0).transpose(1, 2)
    weights = ((q * k).sum(-1) + bias[:, :, 0]).softmax(-1)[..., None]
    sums = [(weights * v16).sum(2) for v16 in v.split(16, -1)]  # 64 prompts in bf16: a third of the time
    return torch.cat(sums, -1)[:, None]


def capture_cuda_graph(function, pool=None):
    """Make function() a CUDA graph, in the memory pool of others. Returns its result, and the graph, whose replay()
    computes that again in the same place."""
    function()  # compiles, and chooses kernels
    graph, options = torch.cuda.CUDAGraph(), dict(pool=pool, capture_error_mode="thread_local")
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, **options):
        result = function()  # after a failure too, this goes on in the stream of before
    return result, graph
