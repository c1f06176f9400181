"""
The paper's questions on a laptop: how much is the recurrence, how much the objective and the mask, and the credit?

    python grid.py config/grid/laptop.py        # 72 runs, under 3 hours on 2 cores; resumable at any moment

All cells have the demo's width and blocks and the same training FLOP, so a Transformer, which applies its blocks once,
sees more than twice the tokens of an HRM. TRM, whose stacks share their weights, has half of the weights in blocks.
"""

# grid.py
out_dir = "out-grid-laptop"
_credit = dict(bp_min=8, bp_max=8)  # full backpropagation: H_cycles * (L_cycles + 1) steps
_causal = dict(prefix_lm=False)
_transformer = dict(recurrence="transformer")
grid = [
    # recurrence: response-only, PrefixLM
    dict(name="hrm"),  # credit rises from K = 2 to 5
    dict(name="trm", recurrence="trm"),
    dict(name="looped", recurrence="looped", **_credit),
    dict(name="rins", recurrence="rins", **_credit),
    dict(name="transformer", **_transformer),
    # objective and mask
    dict(name="hrm-causal", **_causal),
    dict(name="hrm-causal-all", against="hrm-causal", loss_on="all", **_causal),
    dict(name="transformer-causal", against="transformer", **_transformer, **_causal),
    dict(name="transformer-causal-all", against="transformer-causal", **_transformer, loss_on="all", **_causal),
    # credit assignment
    dict(name="hrm-K2", bp_max=2),
    dict(name="hrm-K5", bp_min=5),
    dict(name="hrm-K8", **_credit),
]
curves = ["hrm", "trm", "looped", "rins", "transformer"]
_made = dict(n_problems=40000, n_val_problems=1000)
tasks = [
    dict(dataset="problems", source="problems", **_made),  # word problems, with working
    dict(dataset="lists3", source="lists:3", **_made),  # three operations on six digits, without
]
seeds = [0, 1, 2]
budget = 8e12  # FLOP: 3.2 million tokens of HRM, 8.5 million of the Transformer
points = 6
jobs = 2
threads = 1

# train.py, for all cells: config/demo.py's, but for rate, credit and intervals
device = "cpu"
batch_size = 2
block_size = 1024
n_layer = 2
n_head = 2
n_embd = 64
learning_rate = 3e-3
warmup_iters = 50
decay = 0.4
weight_decay = 0.2
ema = 0.99
log_interval = 50
checkpoint_interval = 500
