"""
GSM8K alone, on one GPU: a model of its size, which learns how such answers go and memorises more than it reasons.

    python data.py config/gsm8k.py       # from the hub; offline, --source=DIR, which holds train.jsonl
    python train.py config/gsm8k.py
    python eval.py --out_dir=out-gsm8k --tasks=gsm8k

With a BPE of the questions and answers in place of bytes, first (pip install tokenizers):

    python -m tools.train_tokenizer config/gsm8k.py --vocab_size=4096 --out=tokenizer-gsm8k
    python data.py config/gsm8k.py --tokenizer=tokenizer-gsm8k
"""

import re


def worked(row):
    """The working without the calculator's <<48/2=24>>, and "#### 72" at the end."""
    answer = re.sub(r"<<[^<>]*>>", "", row["answer"])
    return {"instruction": row["question"], "response": answer, "condition": "cot"}


# data.py
dataset = "gsm8k"
source = "openai/gsm8k"
source_config = "main"
mixture = [dict(rows=worked)]
val_fraction = 0.02

# train.py
out_dir = "out-gsm8k"
block_size = 2048
batch_size = 16
micro_batch_size = 4
n_layer = 8
n_head = 8
n_embd = 512
max_iters = 2000
learning_rate = 5e-4
warmup_iters = 100
decay = 0.25
ema = 0.998
eval_interval = 200
