"""Attention under the mask rule of model.py: query q of a row sees the keys first[q] <= k < last[q], and no others.

On CUDA, FlexAttention does it. Elsewhere, the documents of the rows are sorted into padded batches of similar length: a
dense (T, T) mask per row would spend most of its work on pairs of tokens from different documents.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from devices import compiled, upload


class PaddedBatches(NamedTuple):
    """Where the vectors of packed rows stand in padded batches of documents, each (D, n_head, L, head_dim)."""

    gather_idx: torch.Tensor  # (N,) which of the B*T*n_head vectors of the rows stands at each place of all batches
    scatter_idx: torch.Tensor  # (B*T*n_head,) at which place each vector of the rows stands
    bias: tuple  # per batch (D, 1, L, L): 0 where a query (row) sees a key (column), else -inf


def flex_mask(first, last):
    """The mask rule for FlexAttention, which skips blocks of the (T, T) square where no query sees a key."""

    def rule(b, h, q, k):
        return (first[b, q] <= k) & (k < last[b, q])

    return create_block_mask(rule, len(first), None, first.size(1), first.size(1), device=first.device)


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
    if isinstance(mask, BlockMask):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        # On a CPU its kernel has memory for as many threads as there were when it was compiled (torch 2.13).
        flex = compiled(flex_attention, fixed_threads=True)
        return flex(q, k, v, block_mask=mask, scale=1.0).transpose(1, 2)
    n_head, head_dim = q.shape[2:]
    sizes = [len(bias) * n_head * bias.size(-1) for bias in mask.bias]
    batches = []
    for t in q, k, v:
        vectors = t.reshape(-1, head_dim).index_select(0, mask.gather_idx).split(sizes)
        batches.append([part.view(len(bias), n_head, -1, head_dim) for part, bias in zip(vectors, mask.bias)])
    out = [dense_attention(*qkv, bias).reshape(-1, head_dim) for *qkv, bias in zip(*batches, mask.bias)]
    return torch.cat(out).index_select(0, mask.scatter_idx).view(q.shape)
