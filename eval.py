"""
Exact-match accuracy of a trained model, by greedy generation with its averaged weights.

    python eval.py                                                   # the model in out/, on the task it was trained for
    python eval.py --out_dir=out-gsm8k --tasks=gsm8k --limit=100     # GSM8K's test set, from the hub
    python eval.py --tasks=gsm8k,problems --gsm8k_source=test.jsonl --save_generations=True
    python eval.py --init_from=sapientinc/HRM-Text-1B --condition=synth,cot --tasks=gsm8k --out_dir=out-published

Prints a table and writes out_dir/eval.json; with save_generations also out_dir/generations-<task>.jsonl. A generation
that holds no number counts as wrong and is reported as invalid; one that reaches max_new_tokens is reported as cut off.
"""

import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

import data
from configurator import configure
from model import choose_device, local_directory, reason

# ----------------------------------------------------------------------------------------------------
# settings
out_dir = "out"  # of train.py; results go there too
init_from = ""  # in place of its model, one in the Hugging Face layout: a directory or a hub id
tasks = ""  # problems, gsm8k, or both with a comma between; "": what the model was trained on, if that is one
limit = 0  # questions per task; 0: all
condition = ""  # of the prompts: a tag, several, or none; "": what most of the training documents have
gsm8k_source = "openai/gsm8k"  # on the hub, or a local .jsonl or .parquet file, or a directory
batch_size = 128  # answers in work at a time; where one is complete, the next question takes its place
max_new_tokens = 0  # per answer; 0: the task's own
cache_gb = 8.0  # the batch is made smaller where its keys and values would take more memory
average = True  # the weights' moving average; False: the weights themselves
save_generations = False  # every prompt, generation, reference and verdict, as jsonl
device = "auto"  # cpu, cuda or mps
dtype = "auto"  # float32 or bfloat16; auto is bfloat16 on cuda
compile = False  # the blocks, with torch.compile: takes a while, then runs faster
settings = configure(globals())
# ----------------------------------------------------------------------------------------------------
# tasks: {name: rows of (question, reference)}


def problems(made):
    """The validation split of the embedded word problems: that of the model's own dataset, if trained on them."""
    made = made if made.get("source") == "problems" else {"n_val_problems": 1000, "seed": 1337}
    return [
        (row["instruction"], row["response"]) for row in data.word_problems("val", made["n_val_problems"], made["seed"])
    ]


def gsm8k(made):
    """The test set of grade-school mathematics (Cobbe et al. 2021)."""
    fields = {"instruction": "question", "response": "answer"}
    try:
        pairs = [(where, data.to_pair(row, fields)) for where, row in data.read_rows(gsm8k_source, "main", "test")]
    except ValueError as e:
        raise ValueError(f"{e}; --gsm8k_source=FILE reads a local copy") from None
    for where, pair in pairs:
        if isinstance(pair, str):
            raise ValueError(f"{where}: {pair}")
    return [pair[:2] for _, pair in pairs]


TASKS = {"problems": (problems, 64), "gsm8k": (gsm8k, 1024)}  # and the most new tokens that an answer may take


# ----------------------------------------------------------------------------------------------------
# answers


def extract(text):
    """The answer in a text: what the last \\boxed{} holds, or what follows the last ####, or all of it."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for i in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : i]
    return text.rpartition("####")[2]


def to_number(text):
    """The whole number that a text writes, commas and $ aside, or None."""
    try:
        return int(float(text.replace(",", "").replace("$", "")))
    except (ValueError, OverflowError):
        return None


# ----------------------------------------------------------------------------------------------------
# running


def evaluate(name, rows, most_new, model, encoding, condition):
    """
    Answer (question, reference) rows. Returns a dict per row (prompt, generation, reference, verdict: right, wrong or
    invalid, and whether it was cut off) and the new tokens per second.
    """
    prompts = [data.encode_prompt(encoding, question, condition) for question, _ in rows]
    results, clock = [None] * len(rows), time.perf_counter()
    stop, answers = data.special_id(encoding, "eoa"), [[] for _ in rows]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) <= model.config.block_size]  # others: no answer
    longest = min(max((len(prompts[i]) for i in fits), default=0) + most_new, model.config.block_size)
    size = max(1, min(batch_size, len(fits), int(cache_gb * 1e9 / (model.cache_bytes_per_token() * (longest + 1)))))
    gb = size * model.cache_bytes_per_token() * (longest + 1) / 1e9
    print(f"{name}: {size} answers at a time, of up to {longest:,} tokens; their keys and values take {gb:.2f} GB")
    with tqdm(total=len(rows), desc=name, unit=" questions") as bar:

        def judge(i):
            text, (question, reference) = encoding.decode(answers[i]), rows[i]
            answer, truth = to_number(extract(text)), to_number(extract(reference))
            verdict = "invalid" if answer is None else "right" if answer == truth else "wrong"
            cut = len(answers[i]) == most_new
            results[i] = dict(prompt=question, generation=text, reference=reference, verdict=verdict, cut=cut)
            right.append(verdict == "right")
            bar.update()
            bar.set_postfix(accuracy=f"{sum(right) / len(right):.1%}", refresh=False)

        right = []
        for i in set(range(len(rows))) - set(fits):
            judge(i)
        for news in model.stream([prompts[i] for i in fits], most_new, stop_token=stop, slots=size):
            for k, new in news:
                if new is None:
                    judge(fits[k])
                else:
                    answers[fits[k]].append(new)
    n_new = sum(map(len, answers))
    return results, n_new / (time.perf_counter() - clock)


try:
    device, dtype = choose_device(device, dtype)
    source = local_directory(init_from) if init_from else Path(out_dir)
    model, encoding = data.load_for_inference(source, average, device, dtype)
    model.compile_blocks = compile
    condition = data.choose_condition(condition, source)
    made = data.read_meta(source)["made"] if (source / "meta.json").exists() else {}
    tasks = tasks or {"problems": "problems", "openai/gsm8k": "gsm8k"}.get(made.get("source"), "")
    names = [name.strip() for name in tasks.split(",")]
    if not set(names) <= TASKS.keys():
        raise ValueError(f"--tasks names one or more of {', '.join(TASKS)}, not '{tasks}'")
    if limit < 0:
        raise ValueError(f"limit must be at least 0, not {limit}")
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    print(f"{init_from or out_dir}, on {device}, {dtype}; condition: {condition or 'none'}")
    table = {}
    for name in names:
        questions, most_new = TASKS[name]
        rows = questions(made)[: limit or None]
        results, speed = evaluate(name, rows, max_new_tokens or most_new, model, encoding, condition)
        verdicts = [r["verdict"] for r in results]
        accuracy, invalid = (verdicts.count(v) / max(len(rows), 1) for v in ("right", "invalid"))
        cut = sum(r["cut"] for r in results) / max(len(rows), 1)
        table[name] = dict(accuracy=accuracy, invalid=invalid, cut=cut, count=len(rows), tokens_per_sec=round(speed, 1))
        if save_generations:
            path = Path(out_dir, f"generations-{name}.jsonl")
            path.write_text("".join(json.dumps(r) + "\n" for r in results), encoding="utf-8")
            print(f"generations: {path}")
except (ValueError, OSError) as e:
    sys.exit(f"eval.py: {reason(e)}")
except KeyboardInterrupt:
    sys.exit("eval.py: interrupted; nothing was written")

print(f"{'task':<12}{'accuracy':>10}{'invalid':>10}{'cut off':>10}{'count':>8}{'tokens/s':>10}")
for name, r in table.items():
    print(
        f"{name:<12}{r['accuracy']:>10.2%}{r['invalid']:>10.2%}{r['cut']:>10.2%}{r['count']:>8,}{r['tokens_per_sec']:>10,.0f}"
    )
path = Path(out_dir, "eval.json")
path.write_text(json.dumps({"tasks": table, "settings": settings}, indent=1) + "\n", encoding="utf-8")
print(f"written to {path}")
