"""
The paper's questions on a laptop: how much is the recurrence, how much the mask and the objective,
and how much the credit assignment?

$ python -m tools.grid config/grid/laptop.py   # 72 runs; resumable

All cells have the same width, blocks and training FLOP. So a Transformer, which applies its blocks
once, sees more than twice the tokens of an HRM; and TRM, whose stacks share their weights, has half
of the weights in blocks.
"""

# tools/grid.py
out_dir = "out-grid"
_full = dict(bp_min=8, bp_max=8)  # backpropagation: H_cycles * (L_cycles + 1) steps
_causal = dict(prefix_lm=False)
_causal_all = dict(prefix_lm=False, loss_on="all")
cells = [
    # the recurrence, with PrefixLM and the loss of responses
    dict(name="hrm"),  # bp_steps rises from 2 to 5
    dict(name="trm", recurrence="trm"),
    dict(name="looped", recurrence="looped", **_full),
    dict(name="rins", recurrence="rins", **_full),
    dict(name="transformer", recurrence="transformer"),
    # the mask and the objective
    dict(name="hrm-causal", **_causal),
    dict(name="hrm-causal-all", against="hrm-causal", **_causal_all),
    dict(name="transformer-causal", against="transformer", recurrence="transformer", **_causal),
    dict(
        name="transformer-causal-all",
        against="transformer-causal",
        recurrence="transformer",
        **_causal_all,
    ),
    # the credit assignment
    dict(name="hrm-K2", bp_max=2),
    dict(name="hrm-K5", bp_min=5),
    dict(name="hrm-K8", **_full),
]
curves = ["hrm", "trm", "looped", "rins", "transformer"]
_puzzles = "python -m tools.puzzles --kind=lists --level=3 --out=puzzles-lists3"
_data = "python data.py --dataset=lists3 --source=puzzles-lists3 --val_split=val"
tasks = [
    # word problems, with their working; three operations on six digits, without
    dict(name="problems", dataset="problems", make=["python data.py"], flops=8e12),
    dict(name="lists3", dataset="lists3", make=[_puzzles, _data], flops=8e12),
]
seeds = [0, 1, 2]
points = 6
jobs = 2

# train.py
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
