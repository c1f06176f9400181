"""
Grade-school and competition mathematics from where it is published, each problem with its working and without: how a
mixture maps sources of other shapes. For one GPU.

    python -m tools.train_tokenizer config/math.py --vocab_size=16384 --out=tokenizer-math
    python data.py config/math.py        # from the hub
    python train.py config/math.py
    python eval.py --out_dir=out-math --tasks=gsm8k,math
"""

import re


def worked_and_number(row):
    """GSM8K: the working without the calculator's <<48/2=24>>, and the number alone."""
    answer = re.sub(r"<<[^<>]*>>", "", row["answer"])
    number = answer.rpartition("####")[2].strip()
    working = {"instruction": row["question"], "response": answer, "condition": "cot"}
    return [working, {**working, "response": number, "condition": "direct"}]


def worked_and_boxed(row):
    """MATH: the solution, and the content of its last box alone."""
    _, box, boxed = row["solution"].rpartition("\\boxed{")
    depth, end = 1, 0
    while depth and end < len(boxed):
        depth += {"{": 1, "}": -1}.get(boxed[end], 0)
        end += 1
    working = {"instruction": row["problem"], "response": row["solution"], "condition": "cot"}
    direct = {**working, "response": f"\\boxed{{{boxed[: end - 1]}}}", "condition": "direct"}
    return [working, direct] if box and not depth else [working]


def without_thoughts(row):
    """OpenThoughts2: the first question and its answer, but for what the author only thought."""
    question, answer = (turn["value"] for turn in row["conversations"][:2])
    answer = re.sub(r"<think>.*?(</think>|\Z)", "", answer, flags=re.DOTALL).strip()
    return {"instruction": question, "response": answer, "condition": "synth,cot"} if answer else None


# data.py
dataset = "math"
_subjects = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus"
mixture = [
    dict(name="GSM8K", source="openai/gsm8k", source_config="main", rows=worked_and_number, repeat=3),
    *(
        dict(name=f"MATH {s}", source="EleutherAI/hendrycks_math", source_config=s, rows=worked_and_boxed, repeat=3)
        for s in _subjects.split()
    ),
    dict(name="thoughts", source="open-thoughts/OpenThoughts2-1M", rows=without_thoughts, cap=20_000),
]
tokenizer = "tokenizer-math"
val_fraction = 0.01
skip_bad = True  # and count

# train.py
out_dir = "out-math"
block_size = 2048
batch_size = 32
micro_batch_size = 4
n_layer = 12
n_head = 8
n_embd = 768
max_iters = 10000
learning_rate = 4e-4
warmup_iters = 500
decay = 0.25
ema = 0.999
