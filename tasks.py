"""Benchmarks: where the questions come from, and when an answer is right.

A task is an entry of TASKS. For one of your own, write a function that returns (question, reference) pairs, such as
def capitals(**_): return [("The capital of France?", "Paris")], and add a line below. A scorer of your own is
score(generation, reference) -> "right", "wrong" or "invalid"; an empty generation is "invalid".
"""

import re
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import errors_name_file, read_json
from loader import document, open_split
from sources import read_rows, to_pair, word_problems
from tokenizer import check_file, load_encoding, read_meta, special_id

N_HELDOUT = 1000  # documents, unless --limit says otherwise


class Question(NamedTuple):
    row: int
    prompt: object
    truth: object
    shots: tuple = ()
    choices: tuple = ()
    group: str = ""
    texts: tuple = ()


class Task(NamedTuple):
    questions: object
    score: object
    condition: str = ""
    context: int = 0
    max_new_tokens: int = 0
    samples: int = 1
    temperature: float = 0.0
    paper: tuple = ()
    macro: bool = False


# ---- questions ----
def heldout(source, limit, **_):
    """Validation documents of the dataset that the run `source` was trained on. A question is the ids of the whole
    prompt, with the condition of its own document."""
    advice = f"choose with --tasks from {', '.join(name for name in TASKS if name != 'heldout')}"
    if not (source / "run.json").exists():
        raise ValueError(f"{source} has no run.json, which names the dataset of held-out rows: {advice}")
    with errors_name_file(source / "run.json"):
        directory = Path("data", read_json(source / "run.json")["settings"]["dataset"])
    meta, encoding = read_meta(source), load_encoding(source)
    eoa = special_id(encoding, "eoa")
    if not (directory / "meta.json").exists() or read_meta(directory)["checksums"] != meta["checksums"]:
        raise ValueError(f"{directory}, on which {source} was trained, is not here or holds other data now: {advice}")
    for name in "val.bin", "val.idx":
        check_file(directory, name, meta)
    ids, ends, _ = split = open_split(directory, "val")
    with errors_name_file(directory / "val.bin"):
        whole = np.flatnonzero(ids[ends - 1] == eoa)  # the others were cut off by data.py
        n = min(limit or N_HELDOUT, len(whole))
        pairs = []
        for d in whole[np.arange(n) * len(whole) // max(n, 1)]:  # spread evenly
            found, n_prefix = document(*split, d)
            encoding.decode(found)  # raises where the tokenizer lacks an id
            pairs.append(Question(int(d), found[:n_prefix], encoding.decode(found[n_prefix:-1])))
    cut = f" ({len(ends) - len(whole):,} that data.py cut off are left out)" if len(whole) < len(ends) else ""
    if not pairs:
        sizes = "a larger --val_fraction" + " or --block_size" * bool(cut)
        raise ValueError(f"{directory} has no validation documents{cut}: prepare it with {sizes}, or {advice}")
    print(f"heldout: {n:,} of {len(whole):,} validation documents of {directory}, each with its own condition{cut}")
    return pairs


def problems(**_):
    """Word problems with combinations of numbers that no training problem has: the demo's validation split."""
    rows = enumerate(word_problems("val", 1000, 1337))
    return [Question(i, row["instruction"], row["response"]) for i, row in rows]


def gsm8k(data_dir="", **_):
    """The test set of grade-school mathematics (Cobbe et al. 2021)."""
    pairs = []
    for where, row in read_rows(str(Path(data_dir, "gsm8k")) if data_dir else "openai/gsm8k", "main", "test"):
        pair = to_pair(row, {"instruction": "question", "response": "answer"})
        if isinstance(pair, str):
            raise ValueError(f"{where}: {pair}")
        pairs.append(Question(len(pairs), *pair[:2]))
    return pairs


# ---- scorers ----
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


# 18, -2,000, $2.50, .5; not a part of a word or of another number, as in x2, 1e3 and 2.5.1
NUMBER = re.compile(r"(?<![\w.])[-+]?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?![\w.]*\d)", re.ASCII)


def numbers_in(text):
    return [Decimal(re.sub("[$,]", "", number)) for number in NUMBER.findall(text)]


def same_answer(generation, reference):
    """The scorer of most tasks. Answers are compared as numbers where the reference's is one: that of a generation is
    the only number in it, as in "24 apples", and is invalid with none or several. Other answers are compared as text,
    but for white space; invalid is then an empty one."""
    answer, truth = (" ".join(extract(text).replace("\u2212", "-").split()) for text in (generation, reference))
    if NUMBER.fullmatch(truth):
        found, [truth] = numbers_in(answer), numbers_in(truth)
        answer = found[0] if len(found) == 1 else None
    return "invalid" if answer in ("", None) else "right" if answer == truth else "wrong"


def same_whole_number(generation, reference):
    """GSM8K's scorer, as in the paper: int(float()) of the answers, commas and $ aside, so that 2.9 counts as 2."""
    answer, truth = to_whole_number(extract(generation)), to_whole_number(extract(reference))
    return "invalid" if answer is None else "right" if answer == truth else "wrong"


def to_whole_number(text):
    """The number that a text writes, without its decimals, or None."""
    try:
        return int(float(text.replace(",", "").replace("$", "")))
    except (ValueError, OverflowError):
        return None


def scored(verdict_of):
    def score(generation, question):
        verdict = verdict_of(generation, question.truth)
        return {"score": float(verdict == "right"), "invalid": verdict == "invalid"}

    return score


TASKS = {
    "heldout": Task(heldout, scored(same_answer)),
    "problems": Task(problems, scored(same_answer), max_new_tokens=64),
    "gsm8k": Task(gsm8k, scored(same_whole_number), "synth,cot", 3072, 1024, paper=(84.53, 78.39)),
}
PAPER = "gsm8k math drop mmlu arc hellaswag winogrande boolq".split()


def find_task(name):
    if name not in TASKS:
        raise ValueError(f"there is no task '{name}': --tasks names one or more of {', '.join(TASKS)}")
    return TASKS[name]
