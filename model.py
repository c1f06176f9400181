"""
HRM-Text (arXiv 2605.20613), the whole model in one file.

Notable features:
- two stacks of Transformer blocks, slow H and fast L, applied many times per token
- MagicNorm: a stack is pre-norm inside and ends in one RMSNorm, so the recurrent state is renormalised at every step
- gradient through the last `bp_steps` steps of the recurrence only
- PrefixLM: a document's prefix (the instruction) attends to itself in both directions, its response causally
- packed rows: many documents per row, which neither see nor move each other
- precision is explicit: fp32 weights are cast once per forward pass to `model.compute_dtype`; there is no autocast

    model = HRM(HRMConfig(vocab_size=263, block_size=512, n_layer=4, n_head=2, n_embd=64))
    logits, loss = model(idx, targets, doc, prefix, bp_steps=5)     # all (B, T)
    new_ids = model.generate([[1, 2, 3], [4, 5]], max_new_tokens=32)
    model = HRM.from_pretrained("sapientinc/HRM-Text-1B")           # or a directory, or train.py's out_dir

As a script it exports a run to the Hugging Face layout, for transformers and all that reads it:

    python model.py --out_dir=out --export_dir=out-hf
"""

import ctypes
import json
import math
import os
import sys
import warnings
import zipfile
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cache, partial
from itertools import islice, repeat
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # target of positions that carry no loss
LOGITS_AT_ONCE = 2**28  # of the loss: 1 GB in fp32, and twice as much again for what becomes of them
PREFILL = 2**14  # tokens of prompts read at a time, so that their activations fit
PASSES_AHEAD = {"cuda": 1}  # generation begins so many passes before it looks at the ids of the one before
RECORDED = {"cuda"}  # where a step of generation becomes a CUDA graph: to launch its kernels singly takes longer
REFILL = 16  # generation takes up waiting prompts when so many-th part of the slots is free

# ----------------------------------------------------------------------------------------------------
# configuration


@dataclass
class HRMConfig:
    """Shape of a model; what is None follows from the rest. An impossible one raises ValueError, in one sentence."""

    vocab_size: int = 65536
    block_size: int = 4096  # context: tokens in a row, so also the longest document
    n_layer: int = 32  # blocks in all, half of them in each stack
    n_head: int = 12
    n_embd: int = 1536
    H_cycles: int = 2  # H-steps per forward pass
    L_cycles: int = 3  # L-steps before each H-step
    prefix_lm: bool = True  # False: attention is causal in the prefix too
    expansion: float = 4.0  # MLP width of a plain MLP, as a multiple of n_embd
    n_ff: int | None = None  # MLP width; None: 2/3 of that (a gated MLP has three matrices), up to a multiple of 256
    head_dim: int | None = None  # None: n_embd / n_head
    embed_scale: float | None = None  # factor of the embeddings; None: sqrt(n_embd), for unit variance at the start
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, field.type) and not (type(value) is int and field.type in (float, float | None)):
                raise ValueError(f"{field.name} of a model cannot be {value!r}")
        if self.n_ff is None:
            self.n_ff = -(-round(self.expansion * self.n_embd * 2 / 3) // 256) * 256
        if self.embed_scale is None:
            self.embed_scale = self.n_embd**0.5
        for name in "vocab_size", "block_size", "n_head", "n_embd", "H_cycles", "L_cycles":
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a model must be at least 1, not {getattr(self, name)}")
        if self.n_layer < 2 or self.n_layer % 2:
            raise ValueError(f"n_layer ({self.n_layer}) must be even: half of the blocks go into each stack")
        if self.head_dim is None:
            if self.n_embd % (2 * self.n_head):
                raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of 2 * n_head ({2 * self.n_head})")
            self.head_dim = self.n_embd // self.n_head

    @property
    def n_steps(self):
        """Stack applications in one forward pass."""
        return self.H_cycles * (self.L_cycles + 1)


# ----------------------------------------------------------------------------------------------------
# masks


class PackedMask(NamedTuple):
    """Rows of documents as padded batches of documents of similar length, for attention without waste."""

    token: torch.Tensor  # which of the B*T*n_head vectors of the rows stands at each place of all batches
    slot: torch.Tensor  # (B*T*n_head,) and the place of each
    bias: tuple  # per batch (D, 1, L, L): 0 where a query (row) sees a key (column), else -inf


def upload(tensor, device):
    """The tensor on `device`, which is not waited for."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)
    return tensor.to(device)


def download(tensor):
    """Begin to copy a tensor to the host. Returns a function that waits for no more than that, and returns the copy."""
    copy = tensor.to("cpu", non_blocking=tensor.is_cuda, copy=True)
    event = torch.cuda.Event() if tensor.is_cuda else None
    if event:
        event.record(torch.cuda.current_stream(tensor.device))

    def wait():
        if event:
            event.synchronize()
        return copy

    return wait


def record(function):
    """
    Make function(), which returns a tensor, a CUDA graph. Returns that tensor, and a function that computes it again
    from what then is in the memory which the first call used.
    """
    result = function()  # compiles, and chooses kernels
    if result.is_cuda and result.device.index == torch.cuda.current_device():
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        options = dict(stream=torch.cuda.Stream(), capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(here), torch.cuda.graph(graph, **options):  # back to `here` after a failure too
                recorded = function()
            return recorded, graph.replay
        except RuntimeError as e:
            RECORDED.clear()
            warnings.warn(f"generation goes on more slowly, without CUDA graphs: {reason(e)}", stacklevel=2)
    return result, lambda: result.copy_(function())


def may_see(query_pos, key_pos, key_in_prefix):
    """The mask rule within one document: what lies behind, and the whole prefix."""
    return (key_pos <= query_pos) | key_in_prefix


def document_positions(doc):
    """(B, T) document numbers -> (first, pos): is a token the first of its document, and its place in the document."""
    first = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0), value=True)
    place = torch.arange(doc.size(1), device=doc.device).expand_as(doc)
    return first, place - torch.where(first, place, 0).cummax(1).values


def packed_mask(doc, prefix, n_head, device="cpu", dtype=torch.float32):
    """
    Mask of packed rows, for where FlexAttention is not. One dense (T, T) mask per row would spend most of its work on
    pairs from different documents; here attention runs over padded batches of documents of similar length. Padding of
    a row (doc -1) is cut into short documents of its own; that of a batch sees, and is seen by, itself alone.
    The shapes depend on doc, which is thus best in host memory; the mask is made on `device`.
    """
    place, head = torch.arange(doc.size(1), device=doc.device), torch.arange(n_head, device=doc.device)
    first, pos = document_positions(torch.where(doc < 0, -1 - place // 64, doc))
    number = first.flatten().cumsum(0) - 1  # of the token's document
    lengths = torch.bincount(number)
    size_class = (4 * lengths.clamp(min=16).log2()).ceil()  # above 16 tokens, lengths within one differ by at most 19%
    classes = [(size_class == c).nonzero().squeeze(1) for c in size_class.unique()]
    start, width, begin = torch.zeros_like(lengths), torch.zeros_like(lengths), 0
    for members in classes:
        start[members] = begin + torch.arange(len(members), device=doc.device) * n_head * lengths[members].max()
        width[members] = lengths[members].max()
        begin += int(len(members) * n_head * width[members[0]])
    slot = ((start[number] + pos.flatten())[:, None] + head * width[number][:, None]).flatten()
    token = torch.zeros(begin, dtype=torch.long, device=doc.device)
    token[slot] = torch.arange(len(slot), device=doc.device)
    bias = []
    for members in classes:
        place = torch.arange(int(width[members[0]]), device=doc.device)
        in_prefix = prefix.flatten()[token[start[members][:, None] + place] // n_head]
        inside = place < lengths[members][:, None]
        place, in_prefix, inside = (upload(t, device) for t in (place, in_prefix, inside))
        visible = may_see(place[:, None], place, in_prefix[:, None]) & inside[:, None] & inside[:, :, None]
        visible |= torch.eye(len(place), dtype=torch.bool, device=device) & ~inside[:, None]
        zeros = torch.zeros(visible.shape, dtype=dtype, device=device)
        bias.append(zeros.masked_fill_(~visible, -math.inf)[:, None])
    return PackedMask(upload(token, device), upload(slot, device), tuple(bias))


def flex_mask(doc, prefix):
    """Mask of packed rows for FlexAttention: blocks of the (T, T) square that no document touches are skipped."""

    def rule(b, h, q, k):
        return (doc[b, q] == doc[b, k]) & may_see(q, k, prefix[b, k])

    return create_block_mask(rule, doc.size(0), None, doc.size(1), doc.size(1), device=doc.device)


# ----------------------------------------------------------------------------------------------------
# blocks


@cache
def compiled(function, dynamic=False):
    torch._dynamo.config.recompile_limit = 64  # one per number of slots, say; what is beyond would run uncompiled
    return torch.compile(function, dynamic=dynamic)


def mkl_is_slow():
    """Whether torch's own fp32 matmul (by MKL, which keeps to AVX2 on AMD) is slower than oneDNN's with AVX-512."""
    with suppress(OSError):
        avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
        return avx512 and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return False


MKL_IS_SLOW = mkl_is_slow()


def uses_onednn(tensor, rows):
    return MKL_IS_SLOW and tensor.is_cpu and tensor.dtype == torch.float32 and rows >= 8


def linear(x, weight):
    """F.linear, in the fastest way for where x is: x (..., n_in), weight (n_out, n_in) -> (..., n_out)."""
    rows = x.numel() // x.size(-1)
    if x.is_cpu and rows == 1 and torch.compiler.is_compiling():
        return (x.unsqueeze(-2) * weight).sum(-1)  # Inductor's loop reads a weight at the speed of memory, MKL does not
    if uses_onednn(x, rows):
        return onednn_linear(x, weight)
    return F.linear(x, weight)


# Operators of our own around two of oneDNN's, for torch.compile to leave alone: its product, best for few rows, and for
# many rows and for gradients its convolution, with kernels of one pixel, of an image one pixel high.


def as_images(*tensors):
    """(..., channels) -> (1, channels, 1, pixels), the same memory."""
    return [t.reshape(1, 1, -1, t.size(-1)).permute(0, 3, 1, 2) for t in tensors]


@torch.library.custom_op("hrm::linear", mutates_args=())
def onednn_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if x.numel() // x.size(-1) >= 1024 and weight.is_contiguous():
        return F.conv2d(*as_images(x), weight[:, :, None, None])[0, :, 0].T.reshape(*x.shape[:-1], len(weight))
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@torch.library.custom_op("hrm::linear_backward", mutates_args=())
def onednn_linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    geometry = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    images = (*as_images(grad, x), weight[:, :, None, None])
    dx, dweight, _ = torch.ops.aten.convolution_backward(*images, *geometry, [True, True, False])
    return dx[0, :, 0].T.reshape(x.shape), dweight[:, :, 0, 0].contiguous()


@onednn_linear.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:-1], weight.size(0))


@onednn_linear_backward.register_fake
def _(grad, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


onednn_linear.register_autograd(
    lambda ctx, grad: onednn_linear_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def in_first(weight):
    """The same weight (n_out, n_in), in memory as (n_in, n_out), which oneDNN need not reorder at every use."""
    return weight.T.contiguous().T


def norm(x, eps):
    """RMSNorm without a learned scale."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def rotate(x, cos, sin):
    """Rotary position embedding, rotate-half, in fp32. x (B, T, n_head, head_dim); cos, sin (B, T, 1, head_dim/2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class KVCache(NamedTuple):
    """Keys and values of one block at one recurrent step, and where this call's tokens (B, T) go in it."""

    k: torch.Tensor  # (slots, n_head, S, head_dim)
    v: torch.Tensor
    slot: torch.Tensor  # (B, T)
    pos: torch.Tensor  # (B, T)

    def update(self, k, v):
        self.k[self.slot, :, self.pos] = k
        self.v[self.slot, :, self.pos] = v


class Permute(torch.autograd.Function):
    """x[there], whose gradient is that of the result at [back]: cheaper than the sum which an index may need."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.save_for_backward(back)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, *ctx.saved_tensors), None, None


def packed_attention(q, k, v, mask):
    """Attention over padded batches of documents. q, k, v, result: (B, T, n_head, head_dim)."""
    n_head, head_dim = q.shape[2:]
    *others, bias = mask.bias
    if not others and bias.size(0) * bias.size(-1) == q.size(0) * q.size(1):  # all of one length: they stand in place
        shape = (len(bias), -1, n_head, head_dim)
        return dense_attention(*(t.view(shape).transpose(1, 2) for t in (q, k, v)), bias).transpose(1, 2)
    parts = [n_head * bias.size(0) * bias.size(-1) for bias in mask.bias]
    q, k, v = (Permute.apply(t.reshape(-1, head_dim), mask.token, mask.slot).split(parts) for t in (q, k, v))
    out = []
    for bias, *qkv in zip(mask.bias, q, k, v):
        y = dense_attention(*(t.view(len(bias), n_head, -1, head_dim) for t in qkv), bias)
        out.append(y.reshape(-1, head_dim))
    return Permute.apply(torch.cat(out), mask.slot, mask.token)


def dense_attention(q, k, v, bias):
    """q, k, v, result: (D, n_head, L, head_dim); bias (D, 1, L, L)."""
    if q.is_cpu and q.size(2) <= 1024:  # there as fast as SDPA in fp32; in bf16, scores too, three times as fast
        return (q @ k.mT).add_(bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


class CacheMask(NamedTuple):
    """What one new token per slot sees of the cache, for groups of slots: it may be less in one than in another."""

    bias: tuple  # per group (n, 1, 1, S): 0 up to the slot's newest token, -inf after


def cached_attention(q, keys, values, mask):
    """One query per slot: q, result (B, 1, n_head, head_dim); keys, values (B, n_head, room, head_dim)."""
    out, start = [], 0
    for bias in mask.bias:
        slots, S = slice(start, start + bias.size(0)), bias.size(-1)
        some, k, v = q[slots].transpose(1, 2), keys[slots, :, :S], values[slots, :, :S]
        if q.is_cpu and torch.compiler.is_compiling():  # a loop over k and one over v, near the speed of memory
            weights = ((some * k).sum(-1) + bias[:, :, 0]).softmax(-1)[..., None]
            sums = [(weights * v16).sum(2) for v16 in v.split(16, -1)]  # (weights * v) would be several loops
            out.append(torch.cat(sums, -1)[:, None])
        else:
            out.append(F.scaled_dot_product_attention(some, k, v, attn_mask=bias, scale=1.0).transpose(1, 2))
        start = slots.stop
    return torch.cat(out)


def attend(q, k, v, mask, kv):
    """softmax(q k) v under any of the masks. q, k, v, result: (B, T, n_head, head_dim)."""
    if kv is not None:
        kv.update(k, v)
    if isinstance(mask, PackedMask):
        return packed_attention(q, k, v, mask).reshape(q.shape)
    if isinstance(mask, BlockMask):
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return compiled(flex_attention)(q, k, v, block_mask=mask, scale=1.0).transpose(1, 2)
    return cached_attention(q, kv.k, kv.v, mask)


# A block is two functions of its weights with attention between, and not one method of a module: in training the two
# have static shapes while attention's follow the documents, and one compiled version serves every block of both stacks.


def before_attention(x, gqkv_proj, cos, sin, eps):
    """x (B, T, n_embd) -> gate, query, key, value, each (B, T, n_head, head_dim)."""
    B, T, _ = x.shape
    gqkv = linear(norm(x, eps), gqkv_proj)
    g, q, k, v = gqkv.view(B, T, 4, -1, 2 * cos.size(-1)).unbind(2)
    scale = q.size(-1) ** -0.5  # of the scores, here where it costs nothing
    return g, rotate(q, cos * scale, sin * scale), rotate(k, cos, sin), v


def after_attention(x, g, y, o_proj, gate_up_proj, down_proj, eps):
    """Add the gated output of attention to x, then that of the MLP."""
    x = x + linear((torch.sigmoid(g) * y).flatten(2), o_proj)
    a, b = linear(norm(x, eps), gate_up_proj).chunk(2, dim=-1)
    return x + linear(F.silu(a) * b, down_proj)


def block(x, matrices, cos, sin, eps, mask, kv=None, before=None, after=None):
    """One pre-norm Transformer block on x (B, T, n_embd). before, after: compiled versions of its two halves."""
    gqkv_proj, *others = matrices
    g, q, k, v = (before or before_attention)(x, gqkv_proj, cos, sin, eps)
    return (after or after_attention)(x, g, attend(q, k, v, mask, kv), *others, eps)


def consecutive_blocks(x, other, stack, cos, sin, eps, mask, caches, is_end):
    """
    A step of the recurrence, or where a stack is deep a part of one, for decoding: a block's work on a token or two is
    so little that to call a compiled function for it would take as long.
    """
    x = x if other is None else x + other
    for matrices, kv in zip(stack, caches):
        x = block(x, matrices, cos, sin, eps, mask, kv)
    return norm(x, eps) if is_end else x


class CrossEntropy(torch.autograd.Function):
    """
    Sum of the cross-entropies of linear(h, weight), a chunk of rows at a time: all logits of a large vocabulary would
    fill the memory. Each chunk's gradient is made with its loss, so that its logits need not be kept or made again.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, with_gradient):
        rows = max(LOGITS_AT_ONCE // len(weight), 1)
        total, dh = torch.zeros((), device=h.device), []
        dweight = torch.zeros_like(weight, dtype=torch.float32) if with_gradient else None
        for some, ids in zip(h.split(rows), targets[:, None].split(rows)):
            with torch.set_grad_enabled(with_gradient):
                inputs = [t.detach().requires_grad_(with_gradient) for t in (some, weight)]
                output = linear(*inputs)
            log_p = output.detach().log_softmax(-1, dtype=torch.float32)
            total -= log_p.gather(1, ids).sum()
            if with_gradient:
                dlogits = log_p.exp_().scatter_add_(1, ids, torch.full_like(ids, -1, dtype=torch.float32))
                part, dw = torch.autograd.grad(output, inputs, dlogits.to(output.dtype))
                dh.append(part)
                dweight += dw
        if with_gradient:
            ctx.save_for_backward(torch.cat(dh), dweight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        dh, dweight = ctx.saved_tensors
        return dh * grad, dweight * grad, None, None


def random_weight(n_out, n_in):
    """Normal, truncated at 3 sigma, with a standard deviation of n_in**-0.5 after the truncation."""
    sigma = n_in**-0.5 / 0.98658  # cutting a normal at 3 sigma leaves 0.98658 of its deviation
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(n_out, n_in), std=sigma, a=-3 * sigma, b=3 * sigma))


class Block(nn.Module):
    """The weights of a block, each (out, in); block() is what it does."""

    def __init__(self, config):
        super().__init__()
        self.gqkv_proj = random_weight(4 * config.n_head * config.head_dim, config.n_embd)  # rows: gate, q, k, v
        self.o_proj = random_weight(config.n_embd, config.n_head * config.head_dim)
        self.gate_up_proj = random_weight(2 * config.n_ff, config.n_embd)  # rows: gate, up
        self.down_proj = random_weight(config.n_embd, config.n_ff)

    def cast(self, dtype):
        return tuple(w.to(dtype) for w in (self.gqkv_proj, self.o_proj, self.gate_up_proj, self.down_proj))


class Weights(NamedTuple):
    """The weights in the dtype of computation, made once for all uses in a step; gradients reach the originals."""

    H: list  # per block, its four matrices
    L: list
    lm_head: torch.Tensor


# ----------------------------------------------------------------------------------------------------
# the model


class HRM(nn.Module):
    """The hierarchical recurrent language model. `compute_dtype`, `attention` and the like may be set at any time."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = random_weight(config.vocab_size, config.n_embd)
        self.H = nn.ModuleList(Block(config) for _ in range(config.n_layer // 2))
        self.L = nn.ModuleList(Block(config) for _ in range(config.n_layer // 2))
        self.lm_head = random_weight(config.vocab_size, config.n_embd)
        self.register_buffer("z_L_init", nn.init.trunc_normal_(torch.empty(config.n_embd), a=-3, b=3))
        self.compute_dtype = torch.float32  # of activations and matmuls; weights are stored in their own
        self.attention = "auto"  # "flex" (FlexAttention), "sdpa", or "auto": flex if compiled on CUDA, else sdpa
        self.usable_ids = None  # if set, generation yields lower ids only: a vocabulary may exceed its tokenizer
        self.recompute_blocks = False  # activation checkpointing: less memory for one more forward pass
        self.compile_blocks = False  # compile one block for all: the unrolled recurrence would take minutes

    def weights(self):
        H, L = ([block.cast(self.compute_dtype) for block in stack] for stack in (self.H, self.L))
        return Weights(H, L, self.lm_head.to(self.compute_dtype))

    def hidden(self, idx, pos, mask, weights, bp_steps=None, caches=None):
        """
        The recurrence: tokens (B, T) at positions (B, T) -> final z_H (B, T, n_embd).

        With bp_steps = K, the last min(H_cycles, K - 1) H-steps and the last L-steps, up to K in all, carry gradient
        and the earlier ones run without (the paper's deep credit assignment); None: all carry gradient. `caches` has
        one KVCache per (step, block), in the order in which they run.
        """
        config, dtype = self.config, self.compute_dtype
        K = config.n_steps if bp_steps is None else bp_steps
        if not 2 <= K <= config.n_steps:
            raise ValueError(f"bp_steps must be from 2 to H_cycles * (L_cycles + 1) = {config.n_steps}, not {K}")
        H_steps, L_steps = config.H_cycles, config.H_cycles * config.L_cycles
        first_H = H_steps - min(H_steps, K - 1)  # the first step of each kind to carry gradient
        first_L = L_steps - (K - min(H_steps, K - 1))

        frequency = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device=idx.device) / config.head_dim)
        angle = pos[:, :, None, None] * frequency  # (B, T, 1, head_dim/2), fp32
        cos, sin = angle.cos(), angle.sin()
        args, run = (cos, sin, config.norm_eps, mask), block
        if self.compile_blocks and not isinstance(mask, CacheMask):
            dynamic = caches is not None  # prompts bring a new shape every time
            run = partial(block, before=compiled(before_attention, dynamic), after=compiled(after_attention, dynamic))
        caches = iter(caches) if caches else repeat(None)
        grad = torch.is_grad_enabled()

        def step(stack, z, other, carries_grad):
            with torch.set_grad_enabled(grad and carries_grad):
                kvs = list(islice(caches, len(stack)))
                if self.compile_blocks and isinstance(mask, CacheMask):
                    for i in range(0, len(stack), 4):
                        some, part = (stack[i : i + 4], *args, kvs[i : i + 4]), compiled(consecutive_blocks)
                        z = part(z, None if i else other, *some, is_end=i + 4 >= len(stack))
                    return z
                x = z + other
                if torch.is_grad_enabled() and not x.requires_grad:
                    x.requires_grad_()  # spares a compilation: a block's input is then always of one kind
                for matrices, kv in zip(stack, kvs):
                    if self.recompute_blocks and torch.is_grad_enabled():
                        options = dict(use_reentrant=False, preserve_rng_state=False)
                        x = checkpoint(run, x, matrices, *args, kv, **options)
                    else:
                        x = run(x, matrices, *args, kv)
                return norm(x, config.norm_eps)

        z_H = (F.embedding(idx, self.embed) * config.embed_scale).to(dtype)
        z_L = torch.zeros_like(z_H) + self.z_L_init.to(dtype)
        for h in range(H_steps):
            for l in range(h * config.L_cycles, (h + 1) * config.L_cycles):
                z_L = step(weights.L, z_L, z_H, l >= first_L)
            z_H = step(weights.H, z_H, z_L, h >= first_H)
        return z_H

    def forward(self, idx, targets=None, doc=None, prefix=None, bp_steps=None, weights=None):
        """
        idx, targets: (B, T) int64, targets IGNORE where there is no loss; doc: (B, T) int, the document of each token,
        -1 for padding (None: a row is one document); prefix: (B, T) bool (None: all causal).
        All may be in host memory, so that the device need not be waited for; doc and prefix must be in the same.
        weights: self.weights(), if it is to serve several micro-batches. This pass computes the gradients too, unless
        under torch.no_grad().
        Returns (logits (B, T, vocab_size) fp32, None) without targets, else (None, mean loss over targets).
        Raises ValueError if T exceeds block_size or bp_steps is out of range.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"rows of {T} tokens exceed the model's block_size of {self.config.block_size}")
        weights = weights or self.weights()
        device = self.embed.device
        if doc is None:
            doc = torch.arange(B, device=idx.device)[:, None].repeat(1, T)
        if prefix is None or not self.config.prefix_lm:
            prefix = torch.zeros_like(doc, dtype=torch.bool)
        flex_by_default = device.type == "cuda" and self.compile_blocks and self.config.head_dim >= 16
        if self.attention == "flex" or (self.attention == "auto" and flex_by_default):
            mask = flex_mask(upload(doc, device), upload(prefix, device))
        else:
            mask = packed_mask(doc, prefix, self.config.n_head, device, self.compute_dtype)
        pos = upload(document_positions(doc)[1], device)
        h = self.hidden(upload(idx, device), pos, mask, weights, bp_steps)
        if targets is None:
            return linear(h, weights.lm_head).float(), None
        at = (targets.flatten() != IGNORE).nonzero().squeeze(1)
        h, targets = h.flatten(0, 1).index_select(0, upload(at, device)), upload(targets.flatten()[at], device)
        total = CrossEntropy.apply(h, weights.lm_head, targets, torch.is_grad_enabled())
        return None, total / max(len(at), 1)

    def flops_per_token(self, bp_steps):
        """
        Matrix-multiply FLOP of one training step per token, attention scores excluded: 2 per weight and use forward,
        4 backward, where every position counts as one that goes through the head.
        """
        c = self.config
        stack = sum(p.numel() for p in self.H.parameters())
        return stack * (2 * c.n_steps + 4 * bp_steps) + 6 * c.vocab_size * c.n_embd

    def cache_bytes_per_token(self):
        """Size of the generation cache: keys and values of every block at every step."""
        c = self.config
        return 2 * c.n_layer // 2 * c.n_steps * c.n_head * c.head_dim * self.compute_dtype.itemsize

    # ------------------------------------------------------------------------------------------------
    # weights from elsewhere, and for elsewhere

    @classmethod
    def from_pretrained(cls, name, average=True):
        """
        A model from a directory that train.py wrote (with its averaged weights unless `average` is False), or from a
        directory or a hub id in the Hugging Face layout. Weights become fp32.
        Raises ValueError or FileNotFoundError, in one sentence, on anything that is not exactly this model.
        """
        directory = local_directory(name)
        if checkpoints(directory):
            ckpt = load_checkpoint(directory)
            model = cls(HRMConfig(**ckpt["config"]))
            model.load_state_dict({**ckpt["model"], **(ckpt["ema"] if average else {})})
            return model
        if not (directory / "config.json").exists():
            raise FileNotFoundError(f"{directory} has neither ckpt.pt nor config.json")
        config, tensors, state = read_hf_config(directory / "config.json"), read_safetensors(directory), {}
        with blamed_on(directory / "config.json"):
            shapes = shapes_of(config, len(tensors))
        for ours, want in shapes.items():
            names = [hf_name(ours)]
            if names[0] not in tensors and not tensors.keys().isdisjoint(hf_split_names(ours)):
                names = hf_split_names(ours)
            shape = (want[0] // len(names), *want[1:])
            for name in names:
                if name not in tensors:
                    raise ValueError(f"{directory} lacks the tensor {name}")
                if tensors[name].shape != shape:
                    raise ValueError(f"{directory}: {name} has shape {tuple(tensors[name].shape)}, not {shape}")
            state[ours] = torch.cat([tensors.pop(name) for name in names]).float()
        if tensors:
            raise ValueError(f"{directory} has a tensor that is not of this model: {min(tensors)}")
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(state, assign=True)
        return model

    def save_pretrained(self, directory, **config):
        """
        Write config.json and model.safetensors, in the Hugging Face layout, for transformers and all that reads it.
        `config` adds to config.json and generation_config.json: eos_token_id, say.
        """
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {hf_name(name): t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        ours = self.config
        hf = {theirs: getattr(ours, name) for theirs, name in HF_CONFIG.items()}
        fixed = {**HF_FIXED, "num_hidden_layers": ours.n_layer // 2, "num_key_value_heads": ours.n_head}
        kind = {"architectures": ["HrmTextForCausalLM"], "dtype": str(self.embed.dtype).removeprefix("torch.")}
        rest = {"initializer_range": ours.n_embd**-0.5}
        text = json.dumps({**kind, **hf, **fixed, **rest, **config}, indent=2) + "\n"
        (directory / "config.json").write_text(text, encoding="utf-8")
        text = json.dumps({"do_sample": False, **config}, indent=2) + "\n"
        (directory / "generation_config.json").write_text(text, encoding="utf-8")

    # ------------------------------------------------------------------------------------------------
    # generation

    @torch.inference_mode()
    def stream(
        self, prompts, max_new_tokens, temperature=0.0, top_k=None, top_p=None, stop_token=None, seed=None, slots=None
    ):
        """
        generate(), step by step: yields lists of (number of a prompt, its next id), where None for an id says that the
        prompt's answer is complete.
        """
        config, sizes = self.config, [len(p) for p in prompts]
        if temperature < 0 or (top_k or 0) < 0 or not 0 <= (top_p or 0) <= 1:
            raise ValueError("temperature and top_k must be at least 0, and top_p from 0 to 1")
        if max_new_tokens < 0 or (slots or 0) < 0:
            raise ValueError("max_new_tokens and slots must be at least 0")
        for n in sizes:
            if not 0 < n <= config.block_size:
                raise ValueError(f"a prompt must have 1 to block_size = {config.block_size} tokens; one has {n}")
        limits = [min(max_new_tokens, config.block_size + 1 - n) for n in sizes]  # a row of T tokens predicts one more
        room = max((n + limit - 1 for n, limit in zip(sizes, limits)), default=0)
        n_slots = min(slots or len(prompts), len(prompts))
        generator = None if seed is None else torch.Generator(self.embed.device).manual_seed(seed)
        decoder = Decoder(self, n_slots, room, partial(pick, temperature, top_k, top_p, generator, self.usable_ids))
        lag = PASSES_AHEAD.get(self.embed.device.type, 0)
        waiting = deque(sorted((i for i in range(len(prompts)) if limits[i] > 0), key=lambda i: sizes[i]))
        passes = deque()
        owner, made, stopped = [None] * n_slots, [0] * len(prompts), set()
        while waiting or passes or any(i is not None for i in owner):
            used = [slot for slot, i in enumerate(owner) if i is not None]
            free = [slot for slot, i in enumerate(owner) if i is None]
            if waiting and len(free) * REFILL >= n_slots:
                used, n = [], sizes[waiting[0]]
                while waiting and len(used) < len(free) and (not used or n <= PREFILL):
                    used.append(free[len(used)])
                    owner[used[-1]] = waiting.popleft()
                    n += sizes[waiting[0]] if waiting else 0
                decoder.prefill([prompts[owner[slot]] for slot in used], used)
            elif used:
                decoder.decode([0 if i is None else sizes[i] + made[i] for i in owner])
            if used:
                entries = []
                for slot in used:
                    i = owner[slot]
                    made[i] += 1
                    if made[i] == limits[i]:
                        owner[slot] = None
                    entries.append((slot, i, made[i] == limits[i]))
                passes.append((download(decoder.last), entries))
            if len(passes) > lag or not used:
                ids, entries = passes.popleft()
                ids, news = ids().tolist(), []
                for slot, i, is_last in entries:
                    if i in stopped:  # since this pass began
                        continue
                    if ids[slot] != stop_token:
                        news.append((i, ids[slot]))
                    else:
                        stopped.add(i)
                        owner[slot] = None if owner[slot] == i else owner[slot]
                    if is_last or i in stopped:
                        news.append((i, None))
                yield news

    def generate(
        self, prompts, max_new_tokens, temperature=0.0, top_k=None, top_p=None, stop_token=None, seed=None, slots=None
    ):
        """
        Continue each prompt. prompts: lists of token ids, of any lengths, each the whole prefix of a document.
        temperature 0 is greedy; top_k and top_p narrow the choice; seed makes sampling repeatable.
        At most `slots` prompts (None: all) are in work at a time; when one is complete, the next takes its place.
        Returns the new ids of each, without the stop_token; a document ends at block_size at the latest.
        """
        new = [[] for _ in prompts]
        for news in self.stream(prompts, max_new_tokens, temperature, top_k, top_p, stop_token, seed, slots):
            for i, t in news:
                if t is not None:
                    new[i].append(t)
        return new


class Decoder:
    """The part of generation that is on the device: answers in `n_slots` slots, each of at most `room` tokens."""

    def __init__(self, model, n_slots, room, pick):
        config, device = model.config, model.embed.device
        self.model, self.pick = model, pick
        self.kind = dict(dtype=model.compute_dtype, device=device)
        self.room, self.recorded = max(room, 2), {}
        shape = (n_slots, config.n_head, self.room + 1, config.head_dim)  # a slice that is never all compiles but once
        n_caches = config.n_steps * config.n_layer // 2
        self.caches = [tuple(torch.zeros(shape, **self.kind) for _ in "kv") for _ in range(n_caches)]
        for tensor in (t for pair in self.caches for t in pair):
            torch._dynamo.mark_dynamic(tensor, 2)
        self.every = torch.arange(n_slots, device=device)
        self.last, self.pos = torch.zeros_like(self.every), torch.zeros_like(self.every)  # newest ids; where they go
        self.weights = model.weights()
        if uses_onednn(self.weights.lm_head, n_slots):
            H, L = ([tuple(map(in_first, matrices)) for matrices in stack] for stack in self.weights[:2])
            self.weights = Weights(H, L, in_first(self.weights.lm_head))

    def prefill(self, prompts, slots):
        """Read prompts into slots, all in one packed row, and choose the first id of each answer."""
        config, device = self.model.config, self.kind["device"]
        lengths, slots = torch.tensor([len(p) for p in prompts]), torch.tensor(slots)
        idx = torch.tensor([t for p in prompts for t in p])[None]
        doc = torch.arange(len(prompts)).repeat_interleave(lengths)[None]
        prefix = torch.full_like(doc, config.prefix_lm, dtype=torch.bool)
        mask = packed_mask(doc, prefix, config.n_head, **self.kind)
        place = slots[doc], document_positions(doc)[1]
        slots, ends, lengths = (upload(t, device) for t in (slots, lengths.cumsum(0) - 1, lengths))
        h = self._hidden(upload(idx, device), *(upload(t, device) for t in place), mask)
        self.last[slots] = self.pick(linear(h[0, ends], self.weights.lm_head))
        self.pos[slots] = lengths

    def decode(self, sizes):
        """Choose the next id of every slot, whose answers have so many tokens. In free slots it means nothing."""
        if self.pos.device.type in RECORDED:  # for few numbers of positions: 48, 64, 96, 128, 192, ...
            power = 2 ** (max(64, *sizes) - 1).bit_length()
            seen = min(power // 4 * 3 if max(sizes) <= power // 4 * 3 else power, self.room)
            if seen not in self.recorded:
                self.recorded[seen] = record(partial(self._logits, [seen]))
            logits, again = self.recorded[seen]
            again()
        else:
            n_groups = 1 if self.pos.is_cuda else 4  # a GPU would rather have one call than less work
            group = -(-len(sizes) // n_groups)
            logits = self._logits([max(sizes[i : i + group]) for i in range(0, len(sizes), group)])
        self.last.copy_(self.pick(logits))
        self.pos.add_(1).clamp_(max=self.room - 1)

    def _logits(self, seen):
        """After the newest id of every slot. The slots, in groups, look at so many positions of their caches."""
        group, biases = -(-len(self.pos) // len(seen)), []
        for pos, n in zip(self.pos[:, None].split(group), seen):
            unseen = torch.arange(max(2, n), device=pos.device) > pos
            biases.append(torch.zeros(unseen.shape, **self.kind).masked_fill_(unseen, -math.inf)[:, None, None])
            torch._dynamo.mark_dynamic(biases[-1], 3)
        h = self._hidden(self.last[:, None], self.every[:, None], self.pos[:, None], CacheMask(tuple(biases)))
        head = compiled(linear) if self.model.compile_blocks else linear
        return head(h[:, 0], self.weights.lm_head)

    def _hidden(self, idx, slot, pos, mask):
        caches = [KVCache(k, v, slot, pos) for k, v in self.caches]
        return self.model.hidden(idx, pos, mask, self.weights, caches=caches)


# ----------------------------------------------------------------------------------------------------
# files, which may be damaged, or a stranger's: tensors and plain values are read from them, never code


def reason(error):
    """What an exception says, in one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def blamed_on(path):
    """Whatever fails within is the fault of this file's content: it becomes a ValueError that names the file."""
    try:
        yield
    except OSError:
        raise  # names its file already
    except Exception as e:
        raise ValueError(reason(e) if str(path) in str(e) else f"{path} is damaged: {reason(e)}") from None


def read_json(path):
    """The object in a JSON file. Raises FileNotFoundError, or ValueError that names the file."""
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no {path}")
    with blamed_on(path):
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        return content


def check_kinds(content, **kinds):
    """Raise KeyError or ValueError unless `content` is a dict that has these keys, with values of these types."""
    if not isinstance(content, dict):
        raise ValueError(f"{str(content)[:40]!r} stands where a dict of {', '.join(kinds)} should")
    for key, kind in kinds.items():
        if type(content[key]) is not kind:
            raise ValueError(f"{key} is {str(content[key])[:40]!r}, of type {type(content[key]).__name__}")


def replace_file(path, content):
    """Write bytes beside `path` and rename, so that after a crash the file is the old one or the new one, whole."""
    part = Path(f"{path}.part")
    with open(part, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_directory(Path(path).parent)


def sync_directory(directory):
    """Flush a directory's names to the disk, where the system can."""
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        with suppress(OSError):
            os.fsync(handle)
        os.close(handle)


def checkpoints(directory):
    """A run's checkpoints, newest first: ckpt.pt, and the ones before it."""
    older = sorted(Path(directory).glob(f"ckpt-{'[0-9]' * 8}.pt"), reverse=True)
    return [path for path in (Path(directory, "ckpt.pt"), *older) if path.exists()]


def older_checkpoint(directory, step):
    """What ckpt.pt is called when a newer one takes its place."""
    return Path(directory, f"ckpt-{step:08d}.pt")


def load_checkpoint(directory):
    """
    The newest checkpoint of a run that is whole, on the CPU; says so in a line if that is not ckpt.pt.
    Raises FileNotFoundError or ValueError, in one sentence.
    """
    paths, damage = checkpoints(directory), []
    for path in paths:
        try:
            ckpt = read_checkpoint(path)
        except (ValueError, OSError) as e:
            damage.append(str(e) if str(path) in str(e) else f"{path} is damaged: {reason(e)}")
            continue
        if path.name != "ckpt.pt":
            print(f"{'; '.join(damage) or f'{directory} has no ckpt.pt'}; using {path} instead (step {ckpt['iter']})")
        return ckpt
    if damage:
        raise ValueError("; ".join(damage))
    raise FileNotFoundError(f"there is no checkpoint {Path(directory, 'ckpt.pt')}; train.py writes it to its out_dir")


CHECKPOINT = {"model": dict, "ema": dict, "optimizer": dict, "config": dict, "settings": dict, "loader": dict}
CHECKPOINT |= {"origin": str, "iter": int, "tokens": int, "best_val_loss": float, "validated": int, "skipped": int}
CHECKPOINT |= {"log_bytes": int, "wandb_id": str}  # see train.py


def read_checkpoint(path):
    """The content of one checkpoint, all of it checked against its checksums, its keys and its own configuration."""
    with blamed_on(path):
        wrong = zipfile.ZipFile(path).testzip()  # torch itself ignores the CRC32 that it writes with every tensor
        if wrong:
            raise ValueError(f"the checksum of {wrong} is wrong")
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check_kinds(ckpt, **CHECKPOINT)
        config = HRMConfig(**ckpt["config"])
        want = shapes_of(config, len(ckpt["model"]))
        for name, tensor in (*ckpt["model"].items(), *ckpt["ema"].items()):
            if tensor.shape != want.get(name) or tensor.dtype != torch.float32:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not float32 {want.get(name)}")
        if ckpt["model"].keys() != want.keys() or ckpt["ema"].keys() not in (set(), set(want) - {"z_L_init"}):
            raise ValueError("it lacks weights")
        return ckpt


def shapes_of(config, n_tensors):
    """{name: shape} of the weights of a model, which is to have n_tensors of them."""
    if config.n_layer > n_tensors:  # before so many blocks are made
        raise ValueError(f"it has {n_tensors} tensors, too few for {config.n_layer} blocks")
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in HRM(config).state_dict().items()}


# ----------------------------------------------------------------------------------------------------
# the Hugging Face layout

HF_CONFIG = {  # theirs: ours
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "intermediate_size": "n_ff",
    "num_attention_heads": "n_head",
    "head_dim": "head_dim",
    "H_cycles": "H_cycles",
    "L_cycles": "L_cycles",
    "max_position_embeddings": "block_size",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "embedding_scale": "embed_scale",
    "prefix_lm": "prefix_lm",
}
HF_FIXED = {"model_type": "hrm_text", "hidden_act": "silu", "tie_word_embeddings": False}  # nothing else is built here
HF_FIXED |= {"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "rope_scaling": None}


def read_hf_config(path):
    """config.json -> HRMConfig. Raises ValueError that names any setting which this model does not have."""
    hf = {key: value for key, value in read_json(path).items() if value is not None}
    if hf.get("model_type") != "hrm_text":
        raise ValueError(f"{path}: model_type is {hf.get('model_type')!r}, not 'hrm_text'")
    rope = hf.get("rope_parameters", {})
    rope = rope if isinstance(rope, dict) else {"type": rope}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        hf["rope_scaling"] = rope
    theirs = {"head_dim": 128, "prefix_lm": True, "H_cycles": 2, "L_cycles": 3, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    hf = {**theirs, **hf, **({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})}
    for key, only in {**HF_FIXED, "num_key_value_heads": hf.get("num_attention_heads")}.items():
        if hf.get(key, only) != only:
            raise ValueError(f"{path}: {key} = {hf[key]!r} is not supported, only {only!r}")
    per_stack = "num_layers_per_stack" if "num_layers_per_stack" in hf else "num_hidden_layers"  # see save_pretrained
    if "embedding_scale" not in hf:
        hf["embedding_scale"] = 1 / checked_number(path, {"initializer_range": 0.02, **hf}, "initializer_range", float)
    kinds = {"rms_norm_eps": float, "rope_theta": float, "embedding_scale": float, "prefix_lm": bool}
    values = {ours: checked_number(path, hf, key, kinds.get(key, int)) for key, ours in HF_CONFIG.items()}
    return HRMConfig(n_layer=2 * checked_number(path, hf, per_stack, int), **values)


def checked_number(path, hf, key, kind):
    """hf[key], if it is a bool or a number above 0 of the kind asked for."""
    if key not in hf:
        raise ValueError(f"{path} lacks {key}")
    value = float(hf[key]) if kind is float and type(hf[key]) is int else hf[key]
    if type(value) is not kind or (kind is not bool and not value > 0):
        raise ValueError(f"{path}: {key} = {hf[key]!r} is no {'true or false' if kind is bool else 'number that fits'}")
    return value


def read_safetensors(directory):
    """{name: tensor} of model.safetensors, or else of the files that model.safetensors.index.json lists."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = ["model.safetensors"]
    index = directory / "model.safetensors.index.json"
    if index.exists() and not (directory / files[0]).exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"{index} is damaged: it has no weight_map of files")
        files = sorted(set(weight_map.values()))
    tensors = {}
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index} names a file outside its directory: {file}")
        if not (directory / file).exists():
            raise FileNotFoundError(f"there is no {directory / file}")
        try:
            tensors.update(load_file(directory / file))
        except SafetensorError as e:
            raise ValueError(f"{directory / file} is damaged: {e}") from None
    return tensors


def hf_name(ours):
    """H.0.o_proj -> model.H_module.layers.0.attn.o_proj.weight, and so on."""
    if "." not in ours:
        outside = {"embed": "model.embed_tokens.weight", "lm_head": "lm_head.weight", "z_L_init": "model.z_L_init"}
        return outside[ours]
    stack, i, weight = ours.split(".")
    part = "attn" if weight in ("gqkv_proj", "o_proj") else "mlp"
    return f"model.{stack}_module.layers.{i}.{part}.{weight}.weight"


def hf_split_names(ours):
    """The names of a weight's parts in the layout with separate projections, in the order of its rows."""
    parts = {"gqkv_proj": ("gate_proj", "q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    weight = ours.rpartition(".")[2]
    name = hf_name(ours).replace(".attn.", ".self_attn.")
    return [name.replace(weight, part) for part in parts.get(weight, (weight,))]


def local_directory(name, *patterns):
    """The directory `name`, or a local copy of the hub's model of that name, downloaded if need be."""
    if Path(name).is_dir():
        return Path(name)
    if str(name).count("/") != 1 or str(name).startswith((".", "/")):
        raise FileNotFoundError(f"there is no directory {name} with a model")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=patterns or ["*.json", "*.safetensors"]))
    except ImportError:
        raise ValueError(f"to download {name}, pip install huggingface_hub") from None
    except Exception as e:
        raise ValueError(
            f"{name} is no directory and cannot be had from the hub: {type(e).__name__}: {reason(e)}"
        ) from None


# ----------------------------------------------------------------------------------------------------
# loading and sampling


def choose_device(device, dtype):
    """The settings device and dtype, either of which may be "auto" -> (device, torch dtype). Or raises ValueError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    kind, _, index = device.partition(":")
    if not counts.get(kind) or (index and not (index.isdecimal() and int(index) < counts[kind])):
        there = ", ".join(f"{d}{f':0 to {n - 1}' * (n > 1)}" for d, n in counts.items() if n)
        raise ValueError(f"device {device} is not available here; there is {there}")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be auto, float32 or bfloat16, not {dtype}")
    if kind == "cpu":
        keep_freed_memory()
    if kind == "cuda" and index:
        torch.cuda.set_device(device)
    return device, getattr(torch, dtype)


def multiplies_bf16():
    """Whether this CPU has instructions for products of bfloat16."""
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(check() for check in checks if check)


def keep_freed_memory():
    """
    Have glibc keep for reuse what this process frees. It would hand large blocks back to the system, and get each page
    of the next one by a fault: up to a tenth of the time on a CPU.
    """
    with suppress(OSError, AttributeError, TypeError):  # another system's C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def pick(temperature, top_k, top_p, generator, usable_ids, logits):
    """The next ids (B,) from logits (B, vocab_size)."""
    logits = logits[:, :usable_ids].float()
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        logits[logits < logits.topk(min(top_k, logits.size(-1))).values[:, -1:]] = -math.inf
    if top_p and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        ordered[p.cumsum(-1) - p >= top_p] = -math.inf  # what comes before already has top_p; the first always stays
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


# ----------------------------------------------------------------------------------------------------
# the optimizer


class AdamATan2(torch.optim.Optimizer):
    """
    Adam with atan2 in place of the division (Everett et al. 2024), which needs no epsilon and bounds every update,
    with decoupled weight decay on all weights and, if `ema` is a decay rate, their exponential moving average.
    A parameter without gradient is left untouched: weights, moments, average and its own count of steps.
    """

    def __init__(self, params, lr, betas=(0.9, 0.95), weight_decay=0.1, ema=None):
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, ema=ema))
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"step": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                if ema is not None:
                    self.state[p]["ema"] = p.detach().clone()

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_step = {}  # bias correction depends on the count: the embedding, say, has no gradient at bp_steps 2
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["step"] += 1
                    by_step.setdefault(self.state[p]["step"], []).append(p)
            for t, params in by_step.items():
                self._update(t, params, **{k: group[k] for k in ("lr", "betas", "weight_decay", "ema")})

    def _update(self, t, params, lr, betas, weight_decay, ema):
        grads = [p.grad for p in params]
        m, v = ([self.state[p][key] for p in params] for key in "mv")
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_lerp_(m, grads, 1 - betas[0])
        torch._foreach_mul_(v, betas[1])
        torch._foreach_addcmul_(v, grads, grads, 1 - betas[1])
        # atan2(m, s) is atan(m / s), as s = sqrt(v) is not negative; the floor makes it 0 where m and s are 0.
        s = torch._foreach_sqrt(v)
        torch._foreach_div_(s, math.sqrt(1 - betas[1] ** t))
        torch._foreach_clamp_min_(s, torch.finfo(s[0].dtype).tiny)
        update = torch._foreach_div(m, s)
        torch._foreach_atan_(update)
        torch._foreach_add_(params, update, alpha=-lr / (1 - betas[0] ** t))
        if ema is not None:
            torch._foreach_lerp_([self.state[p]["ema"] for p in params], params, 1 - ema)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                check_kinds(state, step=int, m=torch.Tensor, v=torch.Tensor)
                if any(t.shape != p.shape or t.dtype != p.dtype for key, t in state.items() if key != "step"):
                    raise ValueError("the optimizer's state does not fit its parameters")

    @contextmanager
    def averaged(self):
        """Within, the parameters hold their moving averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self):
        for p, state in self.state.items():
            p.data, state["ema"] = state["ema"], p.data


# ----------------------------------------------------------------------------------------------------
# exporting a training run

if __name__ == "__main__":
    import data
    from configurator import configure

    out_dir = "out"  # of train.py
    export_dir = "out-hf"  # where to write config.json, model.safetensors, tokenizer.json and tokenizer_config.json
    average = True  # the weights' moving average; False: the weights themselves
    dtype = "float32"  # of the weights written, or bfloat16
    configure(globals())
    try:
        model = HRM.from_pretrained(out_dir, average).to(choose_device("cpu", dtype)[1])
        encoding, eoa = data.load_encoding(out_dir), data.special_id(data.load_encoding(out_dir), "eoa")
        model.save_pretrained(export_dir, eos_token_id=eoa, pad_token_id=eoa)
        data.save_hf_tokenizer(encoding, export_dir, data.usual_condition(out_dir), model.config.block_size)
    except (ValueError, OSError) as e:
        sys.exit(f"model.py: {reason(e)}")
