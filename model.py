"""
HRM-Text (arXiv 2605.20613), the whole model in one file.

Notable features:
- two stacks of Transformer blocks, slow H and fast L, applied many times to every token
- MagicNorm: a stack is pre-norm inside and ends in one norm
- gradient through the last `bp_steps` steps of the recurrence only
- PrefixLM: the instruction attends to itself in both directions, the response is causal
- packed rows: many documents in a row, none of which sees another
- rotary positions, sigmoid-gated attention, SwiGLU; no biases, no learned norm scales
- fp32 weights, cast once per forward pass to `model.dtype`; no autocast

    model = HRM(HRMConfig(vocab_size=263, block_size=512, n_layer=4, n_head=2, n_embd=64))
    logits, loss = model(idx, targets, doc, prefix, bp_steps=5)
    new_ids = model.generate([[1, 2, 3], [4, 5]], max_new_tokens=32)
    model = HRM.from_pretrained("out")  # a run, a directory or a hub id
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import attention
from attention import attend, flex_mask, padded_batches, upload

IGNORE = -100  # the target of a position without loss
RECURRENCES = ("hrm", "trm", "looped", "rins", "transformer")  # side by side in HRM.recur()
MAX_LOGITS = 2**26  # at a time, in the loss: 256 MB in fp32
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12}  # dense bf16


@dataclass
class HRMConfig:
    vocab_size: int = 65536
    block_size: int = 4096  # tokens in a row, so also the longest document
    n_layer: int = 32  # blocks in all, half of them in each stack
    n_head: int = 12
    n_embd: int = 1536
    H_cycles: int = 2  # H-steps per forward pass
    L_cycles: int = 3  # L-steps before each H-step
    recurrence: str = "hrm"  # one of RECURRENCES
    norm: str = "magic"  # pre: one norm before lm_head, none at a stack's exit; post: after the sums
    prefix_lm: bool = True  # False: the instruction is causal too
    n_ff: int = 0  # MLP width; 0: 8/3 of n_embd, up to a multiple of 256
    head_dim: int = 0  # 0: n_embd / n_head
    embed_scale: float = 0.0  # of the embeddings; 0: sqrt(n_embd), for unit variance at the start
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        assert self.recurrence in RECURRENCES, f"recurrence must be one of {RECURRENCES}"
        assert self.norm in ("magic", "pre", "post"), "norm must be magic, pre or post"
        assert self.n_layer % 2 == 0, "n_layer must be even: each stack gets half of the blocks"
        if not self.head_dim:
            assert self.n_embd % self.n_head == 0, "n_embd must be a multiple of n_head"
            self.head_dim = self.n_embd // self.n_head
        assert self.head_dim % 2 == 0, "n_embd / n_head must be even: positions turn pairs"
        if not self.n_ff:
            self.n_ff = -(-round(self.n_embd * 8 / 3) // 256) * 256
        if not self.embed_scale:
            self.embed_scale = self.n_embd**0.5

    @property
    def n_steps(self):
        """How many times a forward pass applies a stack."""
        n = self.H_cycles * (self.L_cycles + 1)
        if self.recurrence == "transformer":
            return 2
        if self.recurrence == "looped":
            return n + n % 2
        return n


# -----------------------------------------------------------------------------
# the mask: packing and PrefixLM are one rule


def visible_keys(doc, prefix):
    """
    Query q of a row sees the keys first[q] <= k < last[q]: first is the start of its document;
    last is the end of the instruction for a query inside it, else the next position.
    doc (B, T) int numbers a row's documents, prefix (B, T) bool marks their instructions.
    Returns first, last (B, T) int64.
    """
    T = doc.size(1)
    pos = torch.arange(T, device=doc.device).expand_as(doc)
    starts = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0), value=True)
    first = torch.where(starts, pos, 0).cummax(1).values
    # an instruction ends at the next position that starts a document or is in no prefix
    ends = torch.where(starts | ~prefix, pos, T)
    next_end = ends[:, 1:].flip(1).cummin(1).values.flip(1)
    next_end = F.pad(next_end, (0, 1), value=T)
    return first, torch.where(prefix, next_end, pos + 1)


# -----------------------------------------------------------------------------
# a block


def norm(x, eps):
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def rotate(x, cos, sin):
    # x (B, T, n_head, head_dim); cos, sin (B, T, 1, head_dim / 2); in fp32
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def random_weight(n_out, n_in):
    # normal, cut at 3 sigma, with a standard deviation of n_in**-0.5 after the cut
    sigma = n_in**-0.5 / 0.98658
    weight = nn.init.trunc_normal_(torch.empty(n_out, n_in), std=sigma, a=-3 * sigma, b=3 * sigma)
    return nn.Parameter(weight)


class Linear(nn.Module):
    """Without bias. HRM.hidden() casts the fp32 weight once for its many uses in a pass."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = random_weight(n_out, n_in)

    def cast(self, dtype):
        # not as an attribute: in fp32 it is the parameter itself, which would be registered twice
        self.__dict__["cast_weight"] = self.weight.to(dtype)

    def forward(self, x):
        if x.is_cpu and x.numel() == x.size(-1) and torch.compiler.is_compiling():
            return (x[..., None, :] * self.cast_weight).sum(-1)  # one row: Inductor's loop is faster
        return F.linear(x, self.cast_weight)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.n_head * config.head_dim
        self.gqkv_proj = Linear(config.n_embd, 4 * width)  # gate, query, key, value
        self.o_proj = Linear(width, config.n_embd)

    def forward(self, x, cos, sin, mask, cache=None):
        B, T, _ = x.size()
        gqkv = self.gqkv_proj(x).view(B, T, 4, -1, self.head_dim)
        g, q, k, v = gqkv.unbind(2)  # each (B, T, n_head, head_dim)
        q = rotate(q, cos, sin)
        k = rotate(k, cos, sin)
        v = v.contiguous()  # of its own, or the backward pass keeps all of gqkv for it
        if cache is not None:
            k, v = cache.update(k, v)
        y = torch.sigmoid(g) * attend(q, k, v, mask)  # a gate for each channel
        return self.o_proj(y.flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = Linear(config.n_embd, 2 * config.n_ff)
        self.down_proj = Linear(config.n_ff, config.n_embd)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.eps = config.norm_eps
        self.post_norm = config.norm == "post"

    def forward(self, x, cos, sin, mask, cache=None):
        if self.post_norm:
            x = norm(x + self.attn(x, cos, sin, mask, cache), self.eps)
            return norm(x + self.mlp(x), self.eps)
        x = x + self.attn(norm(x, self.eps), cos, sin, mask, cache)
        return x + self.mlp(norm(x, self.eps))


class Stack(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer // 2))


# -----------------------------------------------------------------------------
# the model


class HRM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Module()
        self.embed_tokens.weight = random_weight(config.vocab_size, config.n_embd)
        self.H_module = Stack(config)
        self.L_module = None if config.recurrence == "trm" else Stack(config)  # TRM: L is H
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        z_L_init = nn.init.trunc_normal_(torch.empty(config.n_embd), a=-3, b=3)
        self.register_buffer("z_L_init", z_L_init)  # never trained
        self.dtype = torch.float32  # of activations and products
        self.recompute = False  # blocks in the backward pass: slower, less memory
        self.guidance = 0.0  # w of auto-guidance, for hrm and trm
        self.banned_ids = []  # never generated: they have no token
        self.engine = None  # of generate.py
        self.compiled = False

    def recur(self, x, apply, bp_steps=None):
        """
        Embeddings x (B, T, n_embd) -> the final z_H. apply(stack, z) applies a stack's blocks.

        hrm          L_cycles times z_L = L(z_L + z_H), then z_H = H(z_H + z_L); H_cycles times
        trm          the same, but H and L share their weights (arXiv 2510.04871)
        looped       z = L(H(z + x)), both stacks as one
        rins         z = H(z + x) in all steps but the last, which is L(z) (arXiv 2502.07503)
        transformer  L(H(x)), once

        Only the last bp_steps steps carry gradient; for hrm and trm, min(H_cycles, bp_steps - 1)
        of them are the last H-steps, the rest the last L-steps (the paper's). None: all steps.
        """
        config = self.config
        H = self.H_module
        L = self.L_module or H
        n = config.n_steps
        if bp_steps is None:
            bp_steps = n
        assert 2 <= bp_steps <= n, f"bp_steps must be from 2 to {n}, not {bp_steps}"
        grad_enabled = torch.is_grad_enabled()

        def step(stack, z, with_grad, is_exit=True):
            with torch.set_grad_enabled(grad_enabled and with_grad):
                z = apply(stack, z)
                if is_exit and config.norm == "magic":
                    z = norm(z, config.norm_eps)
                return z

        def read_out(z):
            return norm(z, config.norm_eps) if config.norm == "pre" else z

        z_before = None
        z = self.z_L_init.to(x.dtype).expand_as(x)
        if config.recurrence in ("hrm", "trm"):
            z_H, z_L = x, z
            H_grad = min(config.H_cycles, bp_steps - 1)
            L_grad = bp_steps - H_grad
            for rounds_left in range(config.H_cycles, 0, -1):
                for i in range(config.L_cycles):
                    L_left = rounds_left * config.L_cycles - i
                    z_L = step(L, z_L + z_H, L_left <= L_grad)
                z_before = z_H
                z_H = step(H, z_H + z_L, rounds_left <= H_grad)
            z = z_H
        elif config.recurrence == "rins":
            for i in range(n - 1):
                z = step(H, z + x, i >= n - bp_steps)
            z = step(L, z, True)
        else:
            if config.recurrence == "transformer":
                z = torch.zeros_like(x)
            for i in range(0, n, 2):
                z = step(H, z + x, i >= n - bp_steps, is_exit=False)
                z = step(L, z, i + 1 >= n - bp_steps)
        if self.guidance:  # the head is linear, so this combines the logits of both H-steps
            assert z_before is not None, "guidance compares H-steps, which this model does not have"
            return torch.lerp(read_out(z_before), read_out(z), 1 + self.guidance)
        return read_out(z)

    def hidden(self, idx, pos, mask, bp_steps=None, caches=None):
        """
        Tokens idx (B, T) at the positions pos (B, T) of their documents -> z_H (B, T, n_embd),
        which lm_head reads. caches: of generation, one for each block at each step, in order.
        """
        config = self.config
        for module in self.modules():
            if isinstance(module, Linear):
                module.cast(self.dtype)
        channel = torch.arange(0, config.head_dim, 2, device=pos.device)
        angle = pos[:, :, None, None] * config.rope_theta ** -(channel / config.head_dim)
        cos, sin = angle.cos(), angle.sin()  # (B, T, 1, head_dim / 2)
        caches = iter(caches or ())

        def apply(stack, x):
            for block in stack.layers:
                args = x, cos, sin, mask, next(caches, None)
                if self.recompute and torch.is_grad_enabled():
                    x = checkpoint(block, *args, use_reentrant=False)
                else:
                    x = block(*args)
            return x

        x = F.embedding(idx, self.embed_tokens.weight) * config.embed_scale
        return self.recur(x.to(self.dtype), apply, bp_steps)

    def forward(self, idx, targets=None, doc=None, prefix=None, bp_steps=None):
        """
        idx, targets (B, T) int64; doc (B, T) int, -1 for padding, None for one document per row;
        prefix (B, T) bool. Best in host memory: then nothing here waits for the device.
        Returns (logits (B, T, vocab_size), None) without targets, else (None, the mean loss over
        the targets that are not IGNORE); self.correct (N,) then tells which of
        targets[targets != IGNORE] are predicted.
        """
        T = idx.size(1)
        assert T <= self.config.block_size, f"{T} tokens exceed block_size {self.config.block_size}"
        device = self.lm_head.weight.device
        if doc is None:
            doc = torch.zeros_like(idx)
        if prefix is None or not self.config.prefix_lm:
            prefix = torch.zeros_like(doc, dtype=torch.bool)
        first, last = visible_keys(doc, prefix)
        pos = torch.arange(T, device=first.device) - first  # restarts in every document
        # uncompiled, flex_attention makes all (T, T) scores
        if device.type == "cuda" and self.compiled and targets is not None:
            mask = flex_mask(first, last, device)
        else:
            n_head = self.config.n_head
            mask = padded_batches(first.cpu(), last.cpu(), n_head, device, self.dtype)
        z = self.hidden(upload(idx, device), upload(pos, device), mask, bp_steps)
        if targets is None:
            return self.lm_head(z).float(), None
        at = (targets.flatten() != IGNORE).nonzero().squeeze(1)  # logits of targets only
        targets = upload(targets.flatten()[at], device)
        z = z.flatten(0, 1).index_select(0, upload(at, device))
        return None, self.loss_sum(z, targets) / max(len(at), 1)

    def loss_sum(self, z, targets):
        """The sum of the cross-entropies. All logits of a large vocabulary would fill the memory,
        so this works in chunks of positions, whose logits the backward pass computes again."""

        def chunk_loss(z, targets):
            logits = self.lm_head(z).float()
            correct = logits.argmax(-1) == targets
            return F.cross_entropy(logits, targets, reduction="sum"), correct

        size = max(1, MAX_LOGITS // self.config.vocab_size)
        options = dict(use_reentrant=False, preserve_rng_state=False)
        chunks = zip(z.split(size), targets.split(size))
        losses, correct = zip(*(checkpoint(chunk_loss, *chunk, **options) for chunk in chunks))
        self.correct = torch.cat(correct)
        return torch.stack(losses).sum()

    def compile_blocks(self, **options):
        """torch.compile on the block: one compilation serves all blocks and steps."""
        self.compiled = True
        # the shapes of padded batches change each time
        attention.attend_padded = torch.compiler.disable(attention.attend_padded)
        for module in self.modules():
            if isinstance(module, Block):
                module.compile(**options)

    def flops_per_token(self, bp_steps):
        """Of the products in a training step, without attention scores: 2 FLOP for a weight in
        each step forward, 4 backward. Each token counts as one that goes through the head."""
        config = self.config
        stack = sum(p.numel() for p in self.H_module.parameters())
        head = config.vocab_size * config.n_embd
        return stack * (2 * config.n_steps + 4 * bp_steps) + 6 * head

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, stop_token=None, temperature=0.0):
        """
        The new ids that continue each prompt, a list of ids. Plain, and slow: it reads all again
        for each id. generate.py does the same with caches, for many prompts at a time.
        """
        answers = []
        for prompt in prompts:
            ids = list(prompt)
            while len(ids) < len(prompt) + max_new_tokens and len(ids) <= self.config.block_size:
                idx = torch.tensor([ids])
                prefix = torch.arange(len(ids))[None] < len(prompt)
                logits = self(idx, prefix=prefix)[0][0, -1]
                if temperature == 0:
                    new = logits.argmax().item()
                else:
                    new = torch.multinomial((logits / temperature).softmax(-1), 1).item()
                if new == stop_token:
                    break
                ids.append(new)
            answers.append(ids[len(prompt) :])
        return answers

    @classmethod
    def from_pretrained(cls, name):
        """The averaged weights of a run's out_dir, or a directory or hub id in the HF layout."""
        from checkpoint import load_model

        return load_model(name)
