"""Attention under the mask rule of model.py: query q of a row sees the keys first[q] <= k < last[q], and no others.

On CUDA, FlexAttention does it. Elsewhere, the documents of the rows are sorted into padded batches of similar length: a
dense (T, T) mask per row would spend most of its work on pairs of tokens from different documents.
"""

import math
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from common import one_line
from devices import compiled, upload

BLOCK = 128  # queries, or keys, in a block of FlexAttention's
FLEX_KERNELS = {  # the kernel's options
    "flex": {},
    "tma": {"USE_TMA": True},  # Hopper's copy engine
    "tuned": {},  # with sizes of blocks that are measured at the start, which takes a minute or more
    "flash": {"BACKEND": "FLASH"},  # FlashAttention's kernel, by its package flash-attn-4
}


class FlexMask(NamedTuple):
    """The mask rule for FlexAttention, and with which of its kernels it runs."""

    blocks: BlockMask
    kernel: str


class PaddedBatches(NamedTuple):
    """Where the vectors of packed rows stand in padded batches of documents, each (D, n_head, L, head_dim)."""

    gather_idx: torch.Tensor  # (N,) which of the B*T*n_head vectors of the rows stands at each place of all batches
    scatter_idx: torch.Tensor  # (B*T*n_head,) at which place each vector of the rows stands
    bias: tuple  # per batch (D, 1, L, L): 0 where a query (row) sees a key (column), else -inf


def flex_mask(first, last, kernel="flex"):
    """The mask rule for FlexAttention, which skips what no query of a block sees. first, last: (B, T), on its device.
    Documents follow each other without a gap, and so do the keys that a block of queries sees: they reach from its
    least `first` to its greatest `last`. All its queries see those from the greatest `first` to the least `last`: for
    blocks of such keys, which are called full, the rule is not asked."""
    B, T = first.shape
    n = -(-T // BLOCK)
    at_first, at_last = first.int().flatten(), last.int().flatten()

    def rule(b, h, q, k):
        at = b * T + q  # to the kernel, [b, q] would be dearer
        return (at_first[at] <= k) & (k < at_last[at])

    start = torch.arange(0, n * BLOCK, BLOCK, device=first.device)
    query = torch.arange(n * BLOCK, device=first.device).clamp(max=T - 1)
    first, last = (x[:, query].view(B, n, BLOCK) for x in (first, last))
    seen = (first.amin(-1, True) < start + BLOCK) & (start < last.amax(-1, True))  # (B, blocks of queries, of keys)
    full = (first.amax(-1, True) <= start) & (start + BLOCK <= last.amin(-1, True))
    lists = []
    for blocks in (x.int()[:, None] for x in (seen & ~full, full)):
        lists += [blocks.sum(-1, dtype=torch.int32), blocks.argsort(dim=-1, descending=True, stable=True).int()]
    return FlexMask(BlockMask.from_kv_blocks(*lists, BLOCK, rule, (T, T)), kernel)


def cache_mask(pos, n_keys):
    """A mask for FlexAttention: one query per slot sees a cache's keys up to pos[slot] (see_up_to() follows pos)."""
    number = torch.ones_like(pos, dtype=torch.int32)[:, None, None]
    indices = torch.arange(-(-n_keys // BLOCK), dtype=torch.int32, device=pos.device).repeat(len(pos), 1, 1, 1)
    return BlockMask.from_kv_blocks(number, indices, None, None, BLOCK, lambda b, h, q, k: k <= pos[b], (1, n_keys))


def see_up_to(mask, pos):
    """The cache_mask(), with all blocks of keys up to pos."""
    mask.kv_num_blocks.copy_((pos // BLOCK + 1)[:, None, None])
    return mask


def padded_batches(first, last, n_head, device, dtype):
    """The mask rule for dense attention. first, last: (B, T) in host memory, as shapes depend on them; `first` must be
    the start of a token's document. The result is on `device`, with a bias of `dtype`."""
    B, T = first.shape
    start = (first == torch.arange(T)).flatten().nonzero().squeeze(1)  # of each document, in the rows end to end
    length = start.diff(append=torch.tensor([B * T]))
    n_visible = (last - first).flatten()  # a token sees this many of its document's first tokens
    size_class = (4 * length.clamp(min=16).log2()).ceil()  # above 16 tokens, lengths in a class differ by at most 19%
    gather, real, bias = [], [], []
    for members in (size_class == c for c in size_class.unique()):
        s, n = start[members, None], length[members, None]
        place = torch.arange(int(n.max()))
        token = s + torch.minimum(place, n - 1)  # (D, L); a document's last token fills its padding
        gather.append((token[:, None] * n_head + torch.arange(n_head)[:, None]).flatten())
        real.append((place < n)[:, None].expand(-1, n_head, -1).flatten())
        visible = upload(place, device) < upload(n_visible[token], device)[:, :, None]
        zeros = torch.zeros(visible.shape, dtype=dtype, device=device)
        bias.append(zeros.masked_fill_(~visible, -math.inf)[:, None])
    gather, real = torch.cat(gather), torch.cat(real)
    scatter = torch.empty(B * T * n_head, dtype=torch.long)
    scatter[gather[real]] = real.nonzero().squeeze(1)
    return PaddedBatches(upload(gather, device), upload(scatter, device), tuple(bias))


def dense_attention(q, k, v, bias):
    """q, k, v, result: (D, n_head, L, head_dim); bias (D, 1, L, L)."""
    if q.is_cpu and q.size(2) <= 1024:  # with SDPA, a step in bf16 took 1.25 times as long
        return (q @ k.mT).add_(bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)


def attend(q, k, v, mask):
    """softmax(q k) v under either mask. q (scaled already), k, v, result: (B, T, n_head, head_dim)."""
    if isinstance(mask, FlexMask):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        # On a CPU its kernel has memory for as many threads as there were when it was compiled (torch 2.13).
        flex = compiled(flex_attention, fixed_threads=True, tune=mask.kernel == "tuned")
        # Never ROWS_GUARANTEED_SAFE: torch then wants a visible key in the first block of keys that a row is given. A
        # query of a packed row's second document sees none there, and exp(-inf + inf) makes its row NaN.
        options = FLEX_KERNELS[mask.kernel]
        return flex(q, k, v, block_mask=mask.blocks, scale=1.0, kernel_options=options).transpose(1, 2)
    n_head, head_dim = q.shape[2:]
    sizes = [len(bias) * n_head * bias.size(-1) for bias in mask.bias]
    batches = []
    for t in q, k, v:
        vectors = t.reshape(-1, head_dim).index_select(0, mask.gather_idx).split(sizes)
        batches.append([part.view(len(bias), n_head, -1, head_dim) for part, bias in zip(vectors, mask.bias)])
    out = [dense_attention(*qkv, bias).reshape(-1, head_dim) for *qkv, bias in zip(*batches, mask.bias)]
    return torch.cat(out).index_select(0, mask.scatter_idx).view(q.shape)


def working_kernel(kernel, n_head, head_dim, device, dtype):
    """This one of FLEX_KERNELS if a forward and a backward pass run with it here, else "flex", and a line says so."""
    if kernel == "tuned":  # the same kernel; a pass would measure sizes for a row that nobody has
        return kernel
    try:
        q, k, v = torch.randn(3, 1, 2 * BLOCK, n_head, head_dim, device=device, dtype=dtype).requires_grad_()
        place = torch.arange(2 * BLOCK, device=device)[None]
        attend(q, k, v, flex_mask(torch.zeros_like(place), place + 1, kernel)).sum().backward()
        return kernel
    except Exception as e:
        if os.environ.get("RANK", "0") == "0":
            print(f"attention: {kernel} does not run here ({one_line(e)}); flex does in its place")
        return "flex"
