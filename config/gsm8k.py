"""
GSM8K alone, on one GPU: a model of its size, which learns how such answers go and memorises more than it reasons.

    python data.py config/gsm8k.py       # from the hub; offline, --source=DIR, which holds train.jsonl
    python train.py config/gsm8k.py
    python eval.py --out_dir=out-gsm8k --tasks=gsm8k
"""

# data.py
dataset = "gsm8k"
source = "openai/gsm8k"
source_config = "main"
fields = {"instruction": "question", "response": "answer"}
answer = "cot"  # the working and the answer; "direct": the number alone
strip_annotations = True  # the calculator's <<48/2=24>>
tokenizer = "bytes"  # train:4096 trains a BPE on the questions and answers (needs rustbpe)
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
