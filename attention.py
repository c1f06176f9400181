"""
Attention under the mask rule of model.py: query q of a row sees the keys first[q] <= k < last[q].

Training on CUDA runs FlexAttention, which skips the blocks of keys that nobody sees. Elsewhere,
documents are gathered from the packed rows into padded batches of similar length: a dense (T, T)
mask would spend most of its work between different documents.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


@dataclass
class PaddedBatches:  # no tuple: torch.compile would look inside, and compile anew for each batch
    """Where the vectors of packed rows stand in padded batches, each (D, n_head, L, head_dim)."""

    gather_idx: torch.Tensor  # (N,): which of the B * T * n_head vectors is at each place
    scatter_idx: torch.Tensor  # (B * T * n_head,): the place of each vector
    bias: list  # per batch (D, 1, L, L): 0 where a query sees a key, else -inf


def upload(tensor, device):
    """The tensor on the device, without waiting for the device."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def flex_mask(first, last, device):
    """The mask rule for FlexAttention. first, last: (B, T) int64."""
    B, T = first.shape
    first, last = upload(first, device), upload(last, device)

    def rule(b, h, q, k):
        return (first[b, q] <= k) & (k < last[b, q])

    return create_block_mask(rule, B, None, T, T, device)


def padded_batches(first, last, n_head, device, dtype):
    """The mask rule for dense attention. first, last: (B, T) int64 in host memory."""
    B, T = first.shape
    start = (first == torch.arange(T)).flatten().nonzero().squeeze(1)  # of each document
    length = start.diff(append=torch.tensor([B * T]))
    n_visible = (last - first).flatten()  # a token sees so many of its document's first tokens
    size_class = (4 * length.clamp(min=16).log2()).ceil()  # lengths differ by less than a fifth

    head = torch.arange(n_head)[:, None]
    gather, real, bias = [], [], []
    for c in size_class.unique():
        s = start[size_class == c, None]
        n = length[size_class == c, None]
        place = torch.arange(int(n.max()))
        token = s + torch.minimum(place, n - 1)  # (D, L); the last token fills the padding
        gather.append((token[:, None] * n_head + head).flatten())  # of (D, n_head, L)
        real.append((place < n)[:, None].expand(-1, n_head, -1).flatten())
        visible = upload(place, device) < upload(n_visible[token], device)[:, :, None]
        zeros = torch.zeros(visible.shape, dtype=dtype, device=device)
        bias.append(zeros.masked_fill_(~visible, -math.inf)[:, None])

    gather, real = torch.cat(gather), torch.cat(real)
    scatter = torch.empty(B * T * n_head, dtype=torch.long)
    scatter[gather[real]] = real.nonzero().squeeze(1)
    return PaddedBatches(upload(gather, device), upload(scatter, device), bias)


def attend(q, k, v, mask):
    """
    softmax(q k / sqrt(head_dim)) v under a mask. q, k, v, result: (B, T, n_head, head_dim).
    mask: of flex_mask(), of padded_batches(), or a tensor for scaled_dot_product_attention.
    """
    if isinstance(mask, PaddedBatches):
        return attend_padded(q, k, v, mask)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if isinstance(mask, BlockMask):
        # No kernel_options: ROWS_GUARANTEED_SAFE wants a visible key in the first block of keys
        # that a row is given. A packed row's second document has none there: exp(-inf + inf) = NaN.
        y = flex_attention(q, k, v, block_mask=mask)
    elif q.is_cpu and q.size(2) == 1 and torch.compiler.is_compiling():
        y = attend_once(q, k, v, mask)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.transpose(1, 2)


def attend_once(q, k, v, mask):
    """One query, (B, n_head, 1, head_dim), to a cache: as loops, that Inductor makes fast."""
    scores = (q * k).sum(-1) * q.size(-1) ** -0.5
    p = scores.masked_fill(~mask[:, :, 0], -math.inf).softmax(-1)[..., None]
    y = [(p * part).sum(2, keepdim=True) for part in v.split(16, -1)]
    return torch.cat(y, -1)


def attend_padded(q, k, v, mask):
    n_head, head_dim = q.shape[2:]
    sizes = [len(bias) * n_head * bias.size(-1) for bias in mask.bias]
    batches = []
    for t in q, k, v:
        parts = t.reshape(-1, head_dim).index_select(0, mask.gather_idx).split(sizes)
        shapes = [(len(bias), n_head, -1, head_dim) for bias in mask.bias]
        batches.append([part.view(shape) for part, shape in zip(parts, shapes)])
    out = []
    for q_, k_, v_, bias in zip(*batches, mask.bias):
        out.append(attend_dense(q_, k_, v_, bias).reshape(-1, head_dim))
    return torch.cat(out).index_select(0, mask.scatter_idx).view(q.shape)


def attend_dense(q, k, v, bias):
    """q, k, v, result: (D, n_head, L, head_dim); bias (D, 1, L, L)."""
    if q.is_cpu and q.size(2) <= 1024:  # SDPA takes 1.25 times as long for short documents
        scores = (q * q.size(-1) ** -0.5) @ k.mT
        return scores.add_(bias).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
