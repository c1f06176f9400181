"""
The published 1B model: 60B tokens, 40B of them unique (46 hours on 16 H100 with the published code).

    python -m tools.train_tokenizer config/hrm1b.py --out=tokenizer-hrm1b     # pip install tokenizers
    python data.py config/hrm1b.py
    torchrun --standalone --nproc_per_node=8 train.py config/hrm1b.py
"""

# data.py
dataset = "hrm1b"
source = "sapientinc/HRM-Text-data-io-cleaned-20260515"  # columns condition, instruction, response
split = ""  # all its files
mixture = [  # documents of each file per epoch; the first rule that fits counts, and a file without one gives all
    dict(files="SYNTH__*", cap=20_000),
    dict(files="flan__cot_*"),
    dict(files="flan__*", cap=5_000),
    dict(files="dmmath__*", cap=100_000),
    dict(files="ampsmathematica__*", cap=10_000),
    dict(files="tasksource__*", cap=10_000),
    dict(files=("openmathinstruct2__*", "acereason__*"), cap=2_000_000),
    dict(files="openthoughts2__*", cap=500_000),
    dict(files="sudoku_extreme__*", cap=1_000_000),
    dict(files=("Platypus__*", "omnimath.jsonl", "gsm8k_train.jsonl", "math_train.jsonl"), repeat=10),
    dict(files=("webinstruct_verified.jsonl", "no_robots.jsonl"), repeat=10),
]
tokenizer = "tokenizer-hrm1b"  # of 65,536 ids, split and normalized as for the published model
val_fraction = 0.0001
skip_bad = True  # and count

# train.py
out_dir = "out-hrm1b"
block_size = 4096
batch_size = 48  # 196,608 tokens per step
micro_batch_size = 2  # for 80 GB: 63 GB; for 141 GB: 6, 136 GB; docs/gpus.md has a table (simulated)
n_layer = 32
n_head = 12
n_embd = 1536
max_iters = 305176  # 60B tokens
learning_rate = 2.2e-4
warmup_iters = 2000
ema = 0.9999
eval_interval = 2000
eval_iters = 50
checkpoint_interval = 1000
