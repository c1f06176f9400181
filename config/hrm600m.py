"""
The published 0.6B model, with the data of config/hrm1b.py (50 hours on 8 H100 with the published code).

    torchrun --standalone --nproc_per_node=8 train.py config/hrm600m.py
"""

dataset = "hrm1b"
out_dir = "out-hrm600m"
block_size = 4096
batch_size = 42  # 172,032 tokens per step; 6, 7 or 14 GPUs share these rows evenly, with 8 some wait for others
micro_batch_size = 3  # for 80 GB: 51 GB; for 141 GB: 6, 88 GB; see docs/gpus.md (simulated)
n_layer = 24
n_head = 10
n_embd = 1280
max_iters = 348772  # 60B tokens
learning_rate = 2.5e-4
warmup_iters = 2000
ema = 0.9999
eval_interval = 2000
eval_iters = 50
checkpoint_interval = 1000
