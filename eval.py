"""
Score a model on benchmarks, with its averaged weights.

$ python eval.py                                              # the model in out/, on held-out documents
$ python eval.py --tasks=gsm8k --limit=100                    # of GSM8K's test set, from the hub
$ python eval.py --tasks=arc,boolq --data_dir=DIR             # local files, in DIR/arc_challenge, ...
$ python eval.py --tasks=quiz.jsonl --save_generations=True   # your own prompts and answers
$ python eval.py --init_from=sapientinc/HRM-Text-1B --tasks=paper --out_dir=out-published
$ torchrun --nproc_per_node=8 eval.py --tasks=paper           # 8 GPUs share the questions

The table also goes to out_dir/eval.json, task by task. A task that is there, of the same model,
settings, questions and code, is not asked again; an interrupted one starts over. In the table:
invalid    answers without anything to compare
cut_off    answers that reach their limit of tokens
shortened  prompts that leave no room for an answer, and so lose their last shots
too_long   prompts that leave none even without shots; they count as wrong
"""

from configurator import configure

import hashlib
import json
import os
import signal
import sys
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from checkpoint import find_directory
from generate import load_for_inference, stream
from tasks import PAPER, find_task, load_questions, majority_at, pass_at
from tokenizer import known_conditions

# -----------------------------------------------------------------------------
out_dir = "out"  # of train.py; results go there, too
init_from = ""  # in place of its model: a directory or a hub id
tasks = "heldout"  # of tasks.py, with commas between; paper: the eight of the paper's table
data_dir = ""  # of local copies of the benchmarks, a directory for each; "": from the hub
limit = 0  # questions per task; 0: all, but 1,000 of heldout
condition = ""  # of prompts: direct, "synth,cot", ..., none; "": the task's, if trained on
samples = 0  # answers per question, of tasks with a temperature; 0: the task's own
max_new_tokens = 0  # per answer; 0: the task's own
batch_size = 128  # answers in work at a time; fewer where memory is short
save_generations = False  # every prompt, answer and score, in out_dir/generations-<task>.jsonl
H_cycles = 0  # of the recurrence; 0: as trained
L_cycles = 0
guidance = 0.0  # w of auto-guidance
device = "auto"  # cpu, cuda or mps
dtype = "auto"  # float32 or bfloat16
compile = False  # the blocks: takes a while, then runs faster
seed = 1337  # of samples
settings = configure(globals())
# -----------------------------------------------------------------------------

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends without a traceback

# ranks
rank = int(os.environ.get("RANK", 0))
world_size = int(os.environ.get("WORLD_SIZE", 1))
master = rank == 0
if world_size > 1:  # a rank may wait long for another's last answers
    dist.init_process_group("gloo", timeout=timedelta(days=9))
if not master:
    sys.stdout = open(os.devnull, "w")

# tasks
names = []
for name in tasks.split(","):
    names += PAPER if name.strip() == "paper" else [name.strip()]
chosen = {Path(name).stem: find_task(name) for name in names}
if len(chosen) < len(set(names)):
    sys.exit("two of the tasks have the same name")

# -----------------------------------------------------------------------------
# questions, of the tasks that are not finished

directory = find_directory(init_from or out_dir)
known = known_conditions(directory)


def condition_for(task):
    """What the setting says, or the task if the model knows that, or else the model's own."""
    if condition:
        return condition
    if task.condition and (not known or task.condition in known):
        return task.condition
    return known[0] if known else "synth,cot"  # as the published model


# what a result depends on, beside its questions
elsewhere = ("out_dir", "init_from", "tasks", "data_dir", "limit", "batch_size", "save_generations")
common = {key: value for key, value in settings.items() if key not in elsewhere}
for path in sorted(directory.glob("*.*")):
    common[path.name] = f"{path.resolve()} {path.stat().st_mtime}"
for name in ("attention", "model", "tokenizer", "generate", "tasks", "eval"):
    code = Path(__file__).with_name(f"{name}.py").read_bytes()
    common[f"{name}.py"] = hashlib.sha256(code).hexdigest()

table_path = Path(out_dir, "eval.json")
before = json.loads(table_path.read_text())["tasks"] if table_path.exists() else {}
results, questions, asked = {}, {}, {}
for name in dict.fromkeys(names):
    label, reason = Path(name).stem, "it has no questions"
    try:
        found = load_questions(name, directory, data_dir, limit)
    except OSError as error:  # no such file, no such dataset, no connection
        found, reason = [], error
    if not found:
        print(f"{label} is left out: {reason}")
        continue
    asked[label] = {**common, "condition": condition_for(chosen[label])}
    asked[label]["questions"] = hashlib.sha256(repr(found).encode()).hexdigest()
    old = before.get(label, {})
    if old.get("asked") == asked[label] and (old["saved"] or not save_generations):
        print(f"{label} is in {table_path} already")
        results[label] = old
    else:
        questions[label] = found
if not asked:
    sys.exit("there is nothing to ask")

# -----------------------------------------------------------------------------
# figures

COUNTED = ("invalid", "cut_off", "shortened", "too_long")


def mean_and_error(values):
    """The mean and its standard error, None for one value."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, None
    return mean, float(np.std(values, ddof=1) / len(values) ** 0.5)


def macro_mean(groups):
    """The mean over groups of values. A group of one has the variance within the others, pooled."""
    mean = float(np.mean([np.mean(group) for group in groups]))
    freedom = sum(len(group) - 1 for group in groups)
    if freedom == 0:
        return mean, None
    pooled = sum(np.var(group) * len(group) for group in groups) / freedom
    squares = 0.0
    for group in groups:
        variance = np.var(group, ddof=1) if len(group) > 1 else pooled
        squares += variance / len(group)
    return mean, float(squares**0.5 / len(groups))


def summarize(task, lines):
    """A task's row of the table, from the lines of its answers. Errors are over questions."""
    by_row = defaultdict(list)
    for line in lines:
        by_row[line["row"]].append(line)
    by_group = defaultdict(list)
    for row in by_row.values():
        by_group[row[0]["group"]].append(row)

    def values(key, rows):
        return [np.mean([line.get(key, 0.0) for line in row]) for row in rows]

    rows = list(by_row.values())
    accuracy, stderr = mean_and_error(values("score", rows))
    result = {"accuracy": accuracy, "stderr": stderr, "count": len(rows), "paper": task.paper}
    for key in COUNTED:
        result[key] = float(np.mean(values(key, rows)))

    # further figures, of the scorer and of samples
    figures = result["figures"] = {}
    found = {key for line in lines for key in line if type(line[key]) is float}
    for key in sorted(found - {"score", "truth"}):
        figures[key] = mean_and_error(values(key, rows))
    for k in (1, 10, 100):
        if 1 < len(rows[0]) >= k:
            passes, majorities = [], []
            for row in rows:
                passes.append(pass_at(k, [line["score"] for line in row]))
                texts = [line["generation"] for line in row]
                majorities.append(majority_at(k, texts, row[0]["truth"]))
            figures[f"pass@{k}"] = mean_and_error(passes)
            figures[f"maj@{k}"] = mean_and_error(majorities)

    # subjects or categories
    groups = result["groups"] = {}
    for group in sorted(set(by_group) - {""}):
        accuracy, stderr = mean_and_error(values("score", by_group[group]))
        count = len(by_group[group])
        groups[group] = {"accuracy": accuracy, "stderr": stderr, "count": count}
    if task.macro:
        figures["macro"] = macro_mean([values("score", group) for group in by_group.values()])
    return result


def percent(value):
    return "-" if value is None else f"{value:.2%}"


def print_table():
    rows = [["task", "n", "score", "s.e.", "1B", "0.6B", *COUNTED]]
    for label, r in results.items():
        row = [label, f"{r['count']:,}", percent(r["accuracy"]), percent(r["stderr"])]
        row += [f"{x:.2f}%" for x in r["paper"]] or ["-", "-"]
        rows.append(row + [percent(r[key]) for key in COUNTED])
        for key, (value, error) in r["figures"].items():
            rows.append([f"{label} {key}", "", percent(value), percent(error)])
    for first, *cells in rows:
        print(f"{first:<22}", *(f"{cell:>9}" for cell in cells))


# -----------------------------------------------------------------------------
# one task after the other

Path(out_dir).mkdir(parents=True, exist_ok=True)
if questions:
    how = (device, dtype, H_cycles, L_cycles, guidance, compile)
    model, tokenizer = load_for_inference(init_from or out_dir, *how)


def fit(question, tags, context):
    """(text and ids of a prompt, shots left out): the last shots go while there is no room."""
    if not isinstance(question.prompt, str):
        return tokenizer.decode(question.prompt), question.prompt, 0
    for n_shots in range(len(question.shots), -1, -1):
        prompt = "".join(question.shots[:n_shots]) + question.prompt
        ids = tokenizer.prompt(prompt, tags)
        if len(ids) <= context:
            break
    return prompt, ids, len(question.shots) - n_shots


for label in questions:
    task, tags = chosen[label], asked[label]["condition"]
    if task.condition and tags != task.condition:
        print(f"{label}: asked with '{tags}', not with the task's condition {task.condition}")

    # this rank's prompts
    context = min(task.context, model.config.block_size)
    most_new = task.max_new_tokens
    if most_new == 0:
        lengths = [len(tokenizer.encode(question.truth)) for question in questions[label]]
        most_new = 2 * max(lengths)
    if max_new_tokens and most_new > 1:
        most_new = max_new_tokens
    n_samples = (samples or task.samples) if task.temperature else 1
    n_answers = n_samples * len(questions[label])
    lines, waiting = [], []
    prompts, limits, seeds = [], [], []
    for i in range(rank, n_answers, world_size):
        row, sample = divmod(i, n_samples)
        question = questions[label][row]
        prompt, ids, n_left_out = fit(question, tags, context)
        room = context + 1 - len(ids)  # the last position predicts one more
        line = {
            "row": row,
            "sample": sample,
            "group": question.group,
            "prompt": prompt,
            "generation": "",
            "truth": question.truth,
            "score": 0.0,
            "invalid": False,
            "cut_off": False,
            "shortened": n_left_out > 0,
            "too_long": room < 1,
        }
        lines.append(line)
        if room >= 1:
            waiting.append(line)
            prompts.append(ids)
            limits.append(min(most_new, room))
            seeds.append(seed * 10**6 + i)  # its own, so that any rank and slot samples the same

    # answers
    answers = [[] for _ in prompts]
    total = 0.0
    form = {"desc": label, "unit": " answers", "disable": not master}
    if not sys.stderr.isatty():  # lines for a log file
        form.update(mininterval=30, bar_format="{l_bar}{bar:10}{r_bar}\n")
    bar = tqdm(total=len(prompts), **form)
    events = stream(
        model,
        prompts,
        limits,
        stop_token=tokenizer.id_of["eoa"],
        temperature=task.temperature,
        seed=seeds,
        slots=batch_size,
    )
    for i, id in events:
        if id is not None:
            answers[i].append(id)
            continue
        line = waiting[i]
        line["generation"] = tokenizer.decode(answers[i])
        line["cut_off"] = len(answers[i]) == limits[i] and most_new > 1
        question = questions[label][line["row"]]
        line.update(task.score(line["generation"], question))
        total += line["score"]
        bar.update()
        if master:
            bar.set_postfix(score=f"{total / bar.n:.1%}", refresh=False)
    bar.close()
    if world_size > 1:
        shares = [None] * world_size
        dist.all_gather_object(shares, lines)
        lines = [line for share in shares for line in share]
    lines.sort(key=lambda line: (line["row"], line["sample"]))

    # results
    results[label] = {
        **summarize(task, lines),
        "saved": save_generations,
        "asked": asked[label],
    }
    if master:
        if save_generations:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            path = Path(out_dir, f"generations-{label}.jsonl")
            path.write_text(text, encoding="utf-8")
        part = Path(out_dir, "eval.json.part")
        part.write_text(json.dumps({"tasks": {**before, **results}}, indent=1))
        part.replace(table_path)

print_table()
print(f"written to {table_path}")
