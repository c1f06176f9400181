"""Both kinds of attention against a dense mask over whole rows."""

import pytest
import torch
import torch.nn.functional as F
from conftest import documents, pack

from attention import attend, flex_mask, padded_batches
from model import visible_keys

ROWS = [documents((90, 40), (30, 60), (20, 10)), documents((5, 1)), documents((200, 56))]


@pytest.fixture
def rows():
    """first, last, and q, k, v of rows whose second documents have no key in their first block."""
    packed = [pack(docs, 256) for docs in ROWS]
    doc, prefix = (torch.cat([row[i] for row in packed]) for i in (2, 3))
    first, last = visible_keys(doc, prefix)
    q, k, v = torch.randn(3, 3, 256, 2, 16, generator=torch.Generator().manual_seed(0))
    pos = torch.arange(256)
    mask = (first[:, :, None] <= pos) & (pos < last[:, :, None])
    q_, k_, v_ = (t.transpose(1, 2) for t in (q, k, v))
    dense = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask[:, None]).transpose(1, 2)
    return first, last, (q, k, v), dense


def test_padded_batches_see_the_keys_of_the_rule(rows):
    first, last, qkv, dense = rows
    mask = padded_batches(first, last, 2, "cpu", torch.float32)
    torch.testing.assert_close(attend(*qkv, mask), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_the_keys_of_the_rule(rows):
    """In padding, too, it gives no NaN."""
    first, last, qkv, dense = rows
    with torch.no_grad():
        flex = attend(*qkv, flex_mask(first, last, "cpu"))
    torch.testing.assert_close(flex, dense, rtol=1e-4, atol=1e-5)


def test_similar_lengths_share_a_batch_with_little_padding(rows):
    first, last, _, _ = rows
    mask = padded_batches(first, last, 2, "cpu", torch.float32)
    places = 2 * sum(len(bias) * bias.size(-1) for bias in mask.bias)
    assert len(mask.gather_idx) == places < 1.25 * 2 * 3 * 256
    assert mask.gather_idx[mask.scatter_idx].tolist() == list(range(2 * 3 * 256))
