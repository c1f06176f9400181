"""A small HRM that learns grade-school word problems on a CPU in minutes: python train.py config/demo.py"""

dataset = "problems"  # embedded; made on the spot
device = "cpu"

batch_size = 2
block_size = 1024
n_layer = 2  # one block in each stack, applied 2 and 6 times
n_head = 2
n_embd = 64
bp_max = 3  # instead of 5: quicker
bp_warmup = 0.05  # at 2 steps the embedding does not learn
max_iters = 2200
learning_rate = 4e-3
warmup_iters = 50
decay = 0.4
weight_decay = 0.2  # combinations of numbers not seen in training need it
ema = 0.99
log_interval = 100
eval_interval = 1100
checkpoint_interval = 200  # sample.py works while it trains
