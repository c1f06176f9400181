"""The laptop's grid with 43 times the weights and 1,250 times the FLOP, on generated mathematics: a GPU's night.

    python grid.py config/grid/laptop.py config/grid/gpu.py     # the second file changes the first; 108 runs

It has not been run: the night is an estimate (1.1e18 FLOP at 5e13 a second), and the learning rate is not tuned.
"""

# grid.py
out_dir = "out-grid-gpu"
_made = dict(n_problems=1_000_000, n_val_problems=1000)
tasks = [
    dict(dataset="problems-1m", source="problems", **_made),
    dict(dataset="lists5-1m", source="lists:5", **_made),
    dict(dataset="arithmetic3-1m", source="arithmetic:3", **_made),
]
budget = 1e16  # FLOP: 77 million tokens of HRM, 225 million of the Transformer
points = 12
jobs = 1
threads = 8

# train.py
device = "cuda"
batch_size = 32
n_layer = 8
n_head = 4
n_embd = 256
learning_rate = 1e-3
warmup_iters = 100
