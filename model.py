"""HRM-Text (arXiv 2605.20613), the whole model in one file.

Notable features:
- two stacks of Transformer blocks, slow H and fast L, applied many times per token
- MagicNorm: a stack is pre-norm inside and ends in one RMSNorm, so the recurrent state is renormalised at every step
- for comparison, other recurrences over the same stacks (HRM.recurrence), and blocks with plain pre-norm or post-norm
- gradient through `bp_steps` steps of the recurrence only: the last H-steps and the last L-steps
- PrefixLM: a document's prefix (the instruction) attends to itself in both directions, its response causally
- packed rows: many documents per row, which neither see nor move each other
- precision is explicit: fp32 weights are cast once per step to `model.compute_dtype`; there is no autocast

    model = HRM(HRMConfig(vocab_size=263, block_size=512, n_layer=4, n_head=2, n_embd=64))
    logits, loss = model(idx, targets, doc, prefix, bp_steps=5)     # all (B, T)
    new_ids = model.generate([[1, 2, 3], [4, 5]], max_new_tokens=32)
    model = HRM.from_pretrained("sapientinc/HRM-Text-1B")           # or a directory, or train.py's out_dir
"""

from dataclasses import dataclass, fields
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._functorch import config as functorch
from torch.utils.checkpoint import checkpoint

from attention import FLEX_KERNELS, attend, flex_mask, padded_batches, working_kernel
from common import brief
from devices import compiled, upload

IGNORE = -100  # target of positions that carry no loss
RECURRENCES = ("hrm", "trm", "looped", "rins", "transformer")  # HRM.recurrence() tells what each is
NORMS = ("magic", "pre", "post")
LOGITS_PER_CHUNK = 2**28  # of the loss; a chunk takes 1 GB in fp32, and the peak is about 3 times that
MAX_DEPTH = 10**4  # blocks that a forward pass may apply; the largest published model applies 288


# ---- configuration ----
@dataclass
class HRMConfig:
    """Shape of a model; what is None follows from the rest. An impossible one raises ValueError, in one sentence."""

    vocab_size: int = 65536
    block_size: int = 4096  # context: tokens in a row, so also the longest document
    n_layer: int = 32  # blocks in all, half of them in each stack; of trm, whose stacks share weights, half exist
    n_head: int = 12
    n_embd: int = 1536
    H_cycles: int = 2  # H-steps per forward pass
    L_cycles: int = 3  # L-steps before each H-step
    recurrence: str = "hrm"  # one of RECURRENCES
    norm: str = "magic"  # pre-norm blocks, a norm at a stack's exit; "pre": before lm_head instead; "post": after sums
    prefix_lm: bool = True  # False: attention is causal in the prefix too; packed rows and caches follow
    expansion: float = 4.0  # MLP width of a plain MLP, as a multiple of n_embd
    n_ff: int | None = None  # MLP width; None: 2/3 of that (a gated MLP has three matrices), rounded up to 256s
    head_dim: int | None = None  # None: n_embd / n_head
    embed_scale: float | None = None  # factor of the embeddings; None: sqrt(n_embd), for unit variance at the start
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        for field in fields(self):
            value, as_float = getattr(self, field.name), field.type in (float, float | None)
            fits = isinstance(value, field.type) or (as_float and isinstance(value, int))
            if not fits or (isinstance(value, bool) and field.type is not bool):
                raise ValueError(f"{field.name} of a model cannot be {brief(value)}")

        def check(low, high, *names):
            for name in names:
                if not low <= getattr(self, name) <= high:
                    raise ValueError(f"{name} of a model must be {low} to {high}, not {brief(getattr(self, name))}")

        for name, known in dict(recurrence=RECURRENCES, norm=NORMS).items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {', '.join(known)}, not {brief(getattr(self, name))}")
        size, factor = (1, 2**31 - 1), (1e-15, 1e15)  # a factor's square fits into fp32
        check(*size, "vocab_size", "block_size", "n_layer", "n_head", "n_embd", "H_cycles", "L_cycles")
        check(*factor, "expansion", "rope_theta", "norm_eps")
        if self.n_ff is None:
            self.n_ff = -(-round(self.expansion * self.n_embd * 2 / 3) // 256) * 256
        if self.embed_scale is None:
            self.embed_scale = self.n_embd**0.5
        if self.head_dim is None:
            if self.n_embd % (2 * self.n_head):
                raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of 2 * n_head ({2 * self.n_head})")
            self.head_dim = self.n_embd // self.n_head
        check(*size, "n_ff", "head_dim")
        check(*factor, "embed_scale")
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary positions turn pairs of channels")
        if self.n_layer % 2:
            raise ValueError(f"n_layer ({self.n_layer}) must be even: half of the blocks go into each stack")
        if self.n_layer // 2 * self.n_steps > MAX_DEPTH:
            depth = f"by n_layer, H_cycles and L_cycles, {self.n_layer // 2 * self.n_steps:,}"
            raise ValueError(f"{depth} blocks follow each other in this model, and {MAX_DEPTH:,} may")

    @property
    def n_steps(self):
        """Stacks that one forward pass applies, each of n_layer / 2 blocks."""
        n = self.H_cycles * (self.L_cycles + 1)
        return {"transformer": 2, "looped": n + n % 2}.get(self.recurrence, n)


# ---- the mask rule ----
def visible_keys(doc, prefix):
    """Packing and PrefixLM in one rule: query q of a row sees the keys first[q] <= k < last[q]. `first` is the start of
    its document; `last` is the end of the prefix for a query in the prefix, and q + 1 for one in the response. Without
    prefix_lm, forward() and the engine's prefill call nothing a prefix, so that packed rows and caches are causal.
    doc (B, T) int, -1 for padding, prefix (B, T) bool -> first, last (B, T) int64."""
    T = doc.size(1)
    place = torch.arange(T, device=doc.device).expand_as(doc)
    doc = torch.where(doc < 0, -1 - place // 64, doc)  # padding forms short documents, which cost little attention
    starts = F.pad(doc[:, 1:] != doc[:, :-1], (1, 0), value=True)
    first = torch.where(starts, place, 0).cummax(1).values
    ends = torch.where(starts | ~prefix, place, T)  # places before which a prefix ends: documents' starts, responses
    prefix_end = F.pad(ends[:, 1:].flip(1).cummin(1).values.flip(1), (0, 1), value=T)
    return first, torch.where(prefix, prefix_end, place + 1)


# ---- a block ----
# Two functions with attention between, compiled once for all blocks and steps: their shapes are static, and only
# attention's follow the documents.


def norm(x, eps):
    """RMSNorm without a learned scale."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def rotate(x, cos, sin):
    """Rotary position embedding, rotate-half, in fp32. x (B, T, n_head, head_dim); cos, sin (B, T, 1, head_dim/2)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def project_gqkv(x, gqkv_proj, cos, sin, eps, post_norm, linear=F.linear):
    """x (B, T, n_embd) -> gate, query, key, value, each (B, T, n_head, head_dim)."""
    gqkv = linear(x if post_norm else norm(x, eps), gqkv_proj)
    g, q, k, v = gqkv.view(*x.shape[:2], 4, -1, 2 * cos.size(-1)).unbind(2)
    scale = q.size(-1) ** -0.5  # of the attention scores; here it costs nothing, and attend() does not scale
    # Of its own, so that the backward pass keeps a gate and a value and not all of gqkv for them.
    return g.contiguous(), rotate(q, cos * scale, sin * scale), rotate(k, cos, sin), v.contiguous()


def output_and_mlp(x, g, y, o_proj, gate_up_proj, down_proj, eps, post_norm, linear=F.linear):
    """Add to x the gated output y of attention, then the MLP's."""
    x = x + linear((torch.sigmoid(g) * y).flatten(2), o_proj)
    normed = norm(x, eps)
    a, b = linear(normed, gate_up_proj).chunk(2, dim=-1)
    x = (normed if post_norm else x) + linear(F.silu(a) * b, down_proj)
    return norm(x, eps) if post_norm else x


def block(x, w, cos, sin, eps, post_norm, mask, compile=False):
    """One Transformer block: x (B, T, n_embd), w a BlockWeights -> (B, T, n_embd). Its norms stand before attention and
    MLP, or with post_norm after the sums."""
    project, finish = (compiled(f) if compile else f for f in (project_gqkv, output_and_mlp))
    g, q, k, v = project(x, w.gqkv_proj, cos, sin, eps, post_norm)
    return finish(x, g, attend(q, k, v, mask), w.o_proj, w.gate_up_proj, w.down_proj, eps, post_norm)


class BlockWeights(NamedTuple):
    """The four matrices of a block, each (out, in), in the dtype of computation."""

    gqkv_proj: torch.Tensor  # rows: gate, query, key, value
    o_proj: torch.Tensor
    gate_up_proj: torch.Tensor  # rows: gate, up
    down_proj: torch.Tensor


# ---- the loss ----
def loss_of_logits(logits, ids, with_gradient):
    """logits (N, vocab_size), ids (N, 1) -> the sum of the cross-entropies, how many ids have the largest logit, and
    the gradient of the sum in the logits' dtype, or None. Compiled, it reads the logits twice and writes them once."""
    log_p = logits.log_softmax(-1, dtype=torch.float32)
    loss, n_correct = -log_p.gather(1, ids).sum(), (log_p.argmax(-1, keepdim=True) == ids).sum()
    if not with_gradient:
        return loss, n_correct, None
    is_target = torch.arange(logits.size(-1), device=ids.device) == ids
    return loss, n_correct, log_p.exp_().sub_(is_target.to(logits.dtype)).to(logits.dtype)


class CrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of h @ weight.T, and the number of targets whose logit is the largest.
    h (N, n_embd), weight (vocab_size, n_embd), targets (N,). It works in chunks, as all logits of a large vocabulary
    would fill the memory. A chunk's gradient is computed with its loss, so its logits need neither be kept nor
    computed again."""

    @staticmethod
    def forward(ctx, h, weight, targets, with_gradient, compile):
        rows = max(LOGITS_PER_CHUNK // len(weight), 1)
        total, n_correct, dh = torch.zeros((), device=h.device), torch.zeros((), device=h.device), []
        dweight = torch.zeros_like(weight, dtype=torch.float32) if with_gradient else None
        for x, ids in zip(h.split(rows), targets[:, None].split(rows)):
            logits = x @ weight.T
            if compile:
                torch._dynamo.maybe_mark_dynamic(logits, 0)
                torch._dynamo.maybe_mark_dynamic(ids, 0)
            loss, right, dlogits = (compiled(loss_of_logits) if compile else loss_of_logits)(logits, ids, with_gradient)
            total, n_correct = total + loss, n_correct + right
            if with_gradient:
                dh.append(dlogits @ weight)
                dweight += dlogits.T @ x
        if with_gradient:
            ctx.save_for_backward(torch.cat(dh), dweight.to(weight.dtype))
        ctx.mark_non_differentiable(n_correct)
        return total, n_correct

    @staticmethod
    def backward(ctx, grad, _):
        dh, dweight = ctx.saved_tensors
        return dh * grad, dweight * grad, None, None, None


# ---- the model ----
def random_weight(n_out, n_in):
    """Normal, truncated at 3 sigma, with a standard deviation of n_in**-0.5 after the truncation."""
    sigma = n_in**-0.5 / 0.98658  # cutting a normal at 3 sigma leaves 0.98658 of its deviation
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(n_out, n_in), std=sigma, a=-3 * sigma, b=3 * sigma))


class Block(nn.Module):
    """The weights of a block, stored in fp32, in the order of BlockWeights; block() applies them."""

    def __init__(self, config):
        super().__init__()
        self.gqkv_proj = random_weight(4 * config.n_head * config.head_dim, config.n_embd)
        self.o_proj = random_weight(config.n_embd, config.n_head * config.head_dim)
        self.gate_up_proj = random_weight(2 * config.n_ff, config.n_embd)
        self.down_proj = random_weight(config.n_embd, config.n_ff)


class HRM(nn.Module):
    """The hierarchical recurrent language model, whose weights are fp32. set_compute() tells how it computes."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = random_weight(config.vocab_size, config.n_embd)
        self.H = nn.ModuleList(Block(config) for _ in range(config.n_layer // 2))
        self.L = nn.ModuleList(Block(config) for _ in range(config.n_layer // 2) if config.recurrence != "trm")
        self.lm_head = random_weight(config.vocab_size, config.n_embd)
        self.register_buffer("z_L_init", nn.init.trunc_normal_(torch.empty(config.n_embd), a=-3, b=3))
        self.set_compute()
        self.guidance = 0.0  # w of auto-guidance, which recurrence() applies
        self.kl_threshold = 0.0  # of adaptive depth, which generation applies
        self.engine = None  # of generation, which keeps its CUDA graphs
        self.banned_ids = None  # a tensor of the ids that generation never yields: those without a token

    def set_compute(self, dtype=torch.float32, attention="auto", compile=False, recompute="none"):
        """How to compute; may be called at any time. dtype: of activations and products; weights keep their own.
        attention: "sdpa", one of FLEX_KERNELS, or "auto": flex if compiled on CUDA, else sdpa. compile: the blocks,
        one for all, as the unrolled recurrence would take minutes. recompute: what the backward pass computes anew, to
        save memory: with "inputs", if compiled, what the norms and gates give to the products, with "blocks" all; what
        has been compiled before keeps its own."""
        known = dict(attention=("auto", "sdpa", *FLEX_KERNELS), recompute=("none", "inputs", "blocks"))
        for name, value in dict(attention=attention, recompute=recompute).items():
            if value not in known[name]:
                raise ValueError(f"{name} must be {', '.join(known[name])}, not {value}")
        if attention in FLEX_KERNELS and attention != "flex":
            attention = working_kernel(attention, self.config.n_head, self.config.head_dim, self.embed.device, dtype)
        self.compute_dtype, self.attention, self.compile_blocks, self.recompute = dtype, attention, compile, recompute
        functorch.ban_recompute_materialized_backward = recompute != "inputs"

    def cast_weights(self):
        """The weights in the dtype of computation, for all uses in a step; gradients reach the originals."""

        def cast(w):
            w = w.to(self.compute_dtype)
            if w.grad_fn is not None:  # else autograd leaves the casts, its oldest nodes, to the end of its pass
                w.grad_fn._set_sequence_nr(2**63 - 1)
            return w

        H, L = ([BlockWeights(*map(cast, block.parameters())) for block in stack] for stack in (self.H, self.L))
        return SimpleNamespace(H=H, L=L or H, lm_head=cast(self.lm_head))  # those of trm are the same

    def backward_order(self):
        """The parameters, in the order in which a backward pass completes their gradients."""
        return [self.lm_head, *reversed([*self.L.parameters()]), *reversed([*self.H.parameters()]), self.embed]

    def recurrence(self, idx, pos, weights, run_block, bp_steps=None, settled=None):
        """Tokens idx (B, T) at positions pos (B, T) of their documents -> final z_H (B, T, n_embd), what lm_head reads.
        run_block(x, block_weights, cos, sin) applies one block; H and L apply the blocks of a stack, one step each:

        hrm          L_cycles times z_L = L(z_L + z_H), then z_H = H(z_H + z_L), all that H_cycles times
        trm          the same, where H and L share their weights (arXiv 2510.04871)
        looped       z = L(H(z + x)), both stacks as one, for the next even number of steps
        rins         z = H(z + x) in all steps but the last, that is L(z) (arXiv 2502.07503: r = n_steps - 1, x once)
        transformer  L(H(x)), both stacks as one, in two steps

        Here x, or the first z_H, are the embeddings, and the first z, or z_L, is z_L_init. All but the last take
        H_cycles * (L_cycles + 1) steps, and so, of one shape and bp_steps, the same FLOP per token.

        With bp_steps = K, the last K steps carry gradient, but of hrm and trm the last min(H_cycles, K - 1) H-steps and
        the last L-steps, up to K in all (the paper's deep credit assignment). None: all, which is full backpropagation.

        Auto-guidance (the paper's), of hrm and trm, gives (1 + w) z_H - w z_H of the H-step before: as the head is
        linear, the logits are then combined just so. settled(z_H), of hrm and trm, is asked after each H-step, and ends
        the recurrence by returning True."""
        config = self.config
        n, K = config.n_steps, config.n_steps if bp_steps is None else bp_steps
        if not 2 <= K <= n:
            raise ValueError(f"bp_steps must be from 2 to {n}, the steps of this recurrence, not {K}")
        frequency = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device=pos.device) / config.head_dim)
        angle = pos[:, :, None, None] * frequency  # (B, T, 1, head_dim/2), fp32
        cos, sin = angle.cos(), angle.sin()
        grad_enabled = torch.is_grad_enabled()

        def apply_stack(stack, z, injection, requires_grad, ends=True):
            with torch.set_grad_enabled(grad_enabled and requires_grad):
                x = z + injection
                if torch.is_grad_enabled() and not x.requires_grad:
                    x.requires_grad_()  # a block's input then always requires gradient, which spares a compilation
                for block_weights in stack:
                    x = run_block(x, block_weights, cos, sin)
                return norm(x, config.norm_eps) if ends and config.norm == "magic" else x

        def read_out(z):
            return norm(z, config.norm_eps) if config.norm == "pre" else z

        H, L = weights.H, weights.L
        x = (F.embedding(idx, self.embed) * config.embed_scale).to(self.compute_dtype)
        z = self.z_L_init.to(self.compute_dtype).expand_as(x)
        if config.recurrence in ("hrm", "trm"):
            z_H, z_L, H_grad = x, z, min(config.H_cycles, K - 1)
            first_H = config.H_cycles - H_grad  # the first of each kind that carries gradient, counted over all rounds
            first_L = config.H_cycles * config.L_cycles - (K - H_grad)
            for h in range(config.H_cycles):
                for l in range(h * config.L_cycles, (h + 1) * config.L_cycles):
                    z_L = apply_stack(L, z_L, z_H, l >= first_L)
                before, z_H = z_H, apply_stack(H, z_H, z_L, h >= first_H)
                if settled and settled(read_out(z_H)):
                    break
            return torch.lerp(read_out(before), read_out(z_H), 1 + self.guidance) if self.guidance else read_out(z_H)
        if config.recurrence == "rins":
            for i in range(n - 1):
                z = apply_stack(H, z, x, i >= n - K)
            return read_out(apply_stack(L, z, 0, True))
        z = z if config.recurrence == "looped" else 0
        for i in range(0, n, 2):
            z = apply_stack(H, z, x, i >= n - K, ends=False)
            z = apply_stack(L, z, 0, i + 1 >= n - K)
        return read_out(z)

    def forward(self, idx, targets=None, doc=None, prefix=None, bp_steps=None, weights=None, at=None):
        """idx, targets: (B, T) int64, targets IGNORE where there is no loss; doc: (B, T) int, each token's document,
        -1 for padding (None: a row is one document); prefix: (B, T) bool, from a document's start (None: all causal).
        All are best in host memory: nothing here then waits for the device. weights: self.cast_weights(), if several
        micro-batches share them. This pass computes the head's gradient too, unless under torch.no_grad(). at: (N,)
        int64, positions in the flattened rows whose logits are wanted, where there are no targets (None: all).
        Returns (logits (B, T, vocab_size), or (N, vocab_size), fp32, None) without targets, else (None, mean loss over
        targets); then self.n_correct is the number of targets predicted, on the device.
        Raises ValueError if T exceeds block_size or bp_steps is out of range."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"rows of {T} tokens exceed the model's block_size of {self.config.block_size}")
        weights = weights or self.cast_weights()
        device = self.embed.device
        if doc is None:
            doc = torch.zeros_like(idx)
        if prefix is None or not self.config.prefix_lm:
            prefix = torch.zeros_like(doc, dtype=torch.bool)
        first, last = visible_keys(doc, prefix)
        pos = upload(torch.arange(T, device=first.device) - first, device)
        if self.uses_flex():
            kernel = "flex" if self.attention == "auto" else self.attention
            mask = flex_mask(upload(first, device), upload(last, device), kernel)
        else:
            mask = padded_batches(first.cpu(), last.cpu(), self.config.n_head, device, self.compute_dtype)
        norms = dict(eps=self.config.norm_eps, post_norm=self.config.norm == "post")
        run_block = partial(block, **norms, mask=mask, compile=self.compile_blocks)
        if self.recompute == "blocks":
            run_block = partial(checkpoint, run_block, use_reentrant=False)
        h = self.recurrence(upload(idx, device), pos, weights, run_block, bp_steps)
        if targets is None:
            h = h if at is None else h.flatten(0, 1).index_select(0, upload(at, device))
            return F.linear(h, weights.lm_head).float(), None
        at = (targets.flatten() != IGNORE).nonzero().squeeze(1)  # logits of targets only
        h, targets = h.flatten(0, 1).index_select(0, upload(at, device)), upload(targets.flatten()[at], device)
        options = torch.is_grad_enabled(), self.compile_blocks
        total, self.n_correct = CrossEntropy.apply(h, weights.lm_head, targets, *options)
        return None, total / max(len(at), 1)

    def uses_flex(self):
        """Whether attention runs by FlexAttention, and not over padded batches of documents."""
        by_default = self.embed.device.type == "cuda" and self.compile_blocks and self.config.head_dim >= 16
        return self.attention in FLEX_KERNELS or (self.attention == "auto" and by_default)

    def flops_per_token(self, bp_steps):
        """Matrix-multiply FLOP of one training step per token, attention scores excluded: 2 per weight and use forward,
        4 backward, where every position counts as one that goes through the head."""
        c = self.config
        stack = sum(p.numel() for p in self.H.parameters())  # what a step applies
        return stack * (2 * c.n_steps + 4 * bp_steps) + 6 * c.vocab_size * c.n_embd

    @classmethod
    def from_pretrained(cls, name, average=True):
        """The fp32 model of a directory that train.py wrote (its averaged weights, unless `average` is False), or of a
        directory or hub id in the Hugging Face layout. Raises ValueError or OSError if it is not exactly this model."""
        from checkpoint import load_pretrained

        return load_pretrained(name, average).eval()

    def generate(self, prompts, max_new_tokens, **options):
        """The new ids that continue each of the prompts, which are lists of ids. Options: see generate.stream()."""
        from generate import generate

        return generate(self, prompts, max_new_tokens, **options)


def weight_shapes(config, n_tensors):
    """{name: shape} of a model's weights. Raises ValueError if n_tensors, found in a file, cannot be all of them."""
    if config.n_layer > n_tensors:  # found before memory is spent on that many blocks
        raise ValueError(f"it has {n_tensors} tensors, too few for {config.n_layer} blocks")
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in HRM(config).state_dict().items()}
