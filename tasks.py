"""Benchmarks: their questions, as the paper asks them, and the scorer that says when an answer is right.

A file of JSON lines with "prompt" and "answer" is a task without any code: eval.py --tasks=path/to/file.jsonl.
For another of your own, add a function that turns a row into a prompt and the truth, and a line to TASKS:

    @from_rows("me/capitals", "capitals", "test")
    def capitals(row):
        return dict(prompt=f"What is the capital of {row['country']}?", truth=row["capital"])

    "capitals": Task(capitals, scorers.same_answer, "direct"),

Its rows are those of DATA_DIR/capitals/test.jsonl (or .parquet), or without --data_dir those of me/capitals on the hub.
In place of from_rows(), any function will do that takes **options and returns a list of Questions.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import chain, islice
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

import numpy as np

import scorers
from common import brief, check_types, errors_name_file, read_json
from loader import document, open_split
from ranks import print0
from sources import read_rows, text_fault, word_problems
from tokenizer import check_file, load_encoding, read_meta, special_id

N_HELDOUT = 1000  # documents, unless --limit says otherwise


class Question(NamedTuple):
    row: int  # in the source's order
    prompt: object  # text, without the shots; or the ids of a whole prompt
    truth: object  # what the scorer compares with
    shots: tuple = ()  # texts before the prompt, each with a blank line at its end
    choices: tuple = ()  # the letters to choose from; none where the answer is free text
    group: str = ""  # subject or category
    texts: tuple = ()  # what the choices say


class Task(NamedTuple):
    questions: Callable  # (source, data_dir, limit, **others) -> list of Questions; source: the model's directory
    score: Callable  # a scorer of scorers.py
    condition: str = ""  # "": that of the model
    context: int = 0  # tokens of the longest prompt and answer; 0: the model's block_size
    max_new_tokens: int = 0  # 0: twice the longest truth's, and at least min_limit
    samples: int = 1  # answers to each question
    temperature: float = 0.0
    paper: tuple = ()  # its percentages for HRM 1B and 0.6B
    macro: bool = False  # report the mean over groups, too
    min_limit: int = 256  # as a truth may be a letter, and its answer have the working before it


# ---- rows ----
def from_rows(hub, directory="", split="train", configs=("",), shots=("", 0), pick=iter, check=lambda: None):
    """Makes the `questions` of a Task from make(row), which returns the fields of a Question, all but row and shots.
    Rows come from the hub, or from the first of these directories that data_dir has. The shots are the first rows of a
    split, (split, how many), from each group its own; pick(fields of all rows) may choose others. check() raises
    ValueError where a package is missing."""

    def questions(make, data_dir="", limit=0, **_):
        check()
        source, subsets = hub, configs
        if data_dir and directory:
            places = [Path(data_dir, name) for name in directory.split()]
            source, subsets = next(filter(Path.is_dir, places), None), [""]
            if not source:
                raise FileNotFoundError(f"there is no directory {places[0]}, for the rows of {hub}")

        def read(split):
            for where, row in chain.from_iterable(read_rows(source, subset, split) for subset in subsets):
                with errors_name_file(where, f"is no row for {make.__name__}()"):
                    if isinstance(row, str):
                        raise ValueError(row)
                    fields = make(row)
                    for key in "prompt", "truth":
                        if isinstance(fields[key], str) and (fault := text_fault(fields[key], key)):
                            raise ValueError(fault)
                yield fields

        found = defaultdict(list)  # shots by group
        for fields in pick(read(shots[0])) if shots[1] else ():
            group, truth = found[fields.get("group", "")], fields["truth"]
            if len(group) < n_shots(fields.get("group")):
                group.append(f"{fields['prompt']} {truth if isinstance(truth, str) else ', '.join(truth[0])}\n\n")
            elif "group" not in fields:
                break
        rows = enumerate(islice(read(split), limit or None))
        result = [Question(i, **fields, shots=tuple(found[fields.get("group", "")])) for i, fields in rows]
        if few := sum(len(q.shots) < n_shots(q.group) for q in result):
            print0(f"{few:,} questions have fewer than {shots[1]} shots: {source} has too few rows in '{shots[0]}'")
        return result

    def n_shots(group):
        return FEWER_SHOTS.get(group, shots[1])

    return lambda make: partial(questions, make)


def prompt_and_answer(row):
    check_types(row, prompt=str)
    if not isinstance(row["answer"], (str, int, float)):
        raise ValueError(f"its answer is {brief(row['answer'])}")
    return dict(prompt=row["prompt"], truth=str(row["answer"]))


@from_rows("openai/gsm8k", "gsm8k", "test", ["main"])
def gsm8k(row):
    """Grade-school mathematics (Cobbe et al. 2021)."""
    check_types(row, question=str, answer=str)
    truth = scorers.to_whole_number(scorers.extract(row["answer"]))
    if truth is None:
        raise ValueError("its answer does not end in #### and a number")
    return dict(prompt=row["question"], truth=truth)


MATH = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus".split()


@from_rows("EleutherAI/hendrycks_math", "math", "test", MATH, check=scorers.start_math_verify)
def math(row):
    """Competition mathematics (Hendrycks et al. 2021)."""
    check_types(row, problem=str, solution=str)
    bare = re.findall(r"\\boxed\s+([^\s${}]+)", row["solution"])  # \boxed 2, as a few rows have it
    truth = scorers.last_box(row["solution"])
    truth = bare[-1] if truth is None and bare else truth
    if truth is None:
        raise ValueError("its solution has no \\boxed{} answer")
    return dict(prompt=row["problem"], truth=truth or "\\text{none}")  # an empty box, which no answer equals


def aime(year):
    """A competition whose answers are whole numbers from 1 to 999."""

    @from_rows(f"math-ai/aime{year}", f"aime{year} aime", "test", check=scorers.start_math_verify)
    def competition(row):
        check_types(row, problem=str)
        answer = row["answer"] if row.get("answer") is not None else scorers.last_box(row["solution"])  # as in 2024's
        return dict(prompt=row["problem"], truth=str(int(answer)))

    return competition


DROP_SHOTS = {  # questions of its train split, and how their passages begin
    "How many points did the buccaneers need to tie in the first?": "To start the season, the Lions traveled south",
    "How many games had the Bills won before this game?": "Trying to snap a two-game skid, the Bills flew to",
    "How many years before Navarrase used the captivity of John II?": "The French king, John II, had been held",
}


def drop_shots(rows):
    """The three of the paper, in its order."""
    found = {}
    for fields in rows:
        passage, _, question = fields["prompt"].removesuffix("\nA:").rpartition("\nQ: ")
        passage, question = passage.strip(), question.strip()
        if question in DROP_SHOTS and passage.startswith(DROP_SHOTS[question]):
            found.setdefault(question, dict(fields, prompt=f"{passage}\nQ: {question}\nA:"))
        if len(found) == len(DROP_SHOTS):
            return map(found.get, DROP_SHOTS)
    question, passage = next(shot for shot in DROP_SHOTS.items() if shot[0] not in found)
    raise ValueError(f"DROP's train split lacks the question '{question}' on the passage '{passage} ...'")


@from_rows("EleutherAI/drop", "drop", "validation", shots=("train", 3), pick=drop_shots)
def drop(row):
    """Reading with discrete reasoning (Dua et al. 2019). The truth: for each annotator's answer its spans, of which a
    number or a date is one. The hub has one `answer` and a dict of lists, `validated_answers`; copies, `answers`."""
    check_types(row, passage=str, question=str)
    answers = []
    for found in (row["answer"] if "answers" not in row else row["answers"], row.get("validated_answers")):
        if isinstance(found, dict) and isinstance(found["number"], list):
            keys = "number", "spans", "date"
            found = [dict(zip(keys, values)) for values in zip(*(found[key] for key in keys))]
        answers += [found] if isinstance(found, dict) else found or []
    truth = []
    for answer in answers:
        date = " ".join(answer["date"][key] for key in ("day", "month", "year")).strip()
        truth.append([str(answer["number"])] if answer["number"] != "" else list(answer["spans"]) or [date])
    return dict(prompt=f"{row['passage']}\nQ: {row['question']}\nA:", truth=truth)


def multiple_choice(question, texts, right, **group):
    """The fields of a Question with the choices A, B, ..., of which `right` is a number from 0."""
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a choice is no text")
    texts, letters = tuple(text.strip() for text in texts), tuple(ascii_uppercase[: len(texts)])
    if type(right) is not int or not 0 <= right < len(letters):
        raise ValueError(f"the right one of its {len(texts)} choices is no. {brief(right)}, from 0")
    lines = [question.strip(), *map("{}. {}".format, letters, texts), "Answer:"]
    return dict(prompt="\n".join(lines), truth=letters[right], choices=letters, texts=texts, **group)


FEWER_SHOTS = {"high_school_european_history": 3}  # MMLU's: five do not fit 4,096 tokens


@from_rows("cais/mmlu", "mmlu", "test", ["all"], ("dev", 5))
def mmlu(row):
    check_types(row, question=str, choices=list, subject=str)
    return multiple_choice(row["question"], row["choices"], row["answer"], group=row["subject"])


@from_rows("allenai/ai2_arc", "arc_challenge", "test", ["ARC-Challenge"], ("validation", 25))
def arc(row):
    check_types(row, question=str, choices=dict)
    labels = row["choices"]["label"]  # A to E, or 1 to 5
    return multiple_choice(row["question"], row["choices"]["text"], labels.index(row["answerKey"]))


@from_rows("Rowan/hellaswag", "hellaswag", "validation", shots=("train", 10))
def hellaswag(row):
    check_types(row, ctx_a=str, ctx_b=str, endings=list)
    question = f"{row['ctx_a']} {row['ctx_b'].capitalize()}\nQuestion: Which is the most logical continuation?"
    return multiple_choice(question, row["endings"], int(row["label"]))


@from_rows("allenai/winogrande", "winogrande", "validation", ["winogrande_debiased"], ("train", 5))
def winogrande(row):
    check_types(row, sentence=str)
    return multiple_choice(row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1)


@from_rows("google/boolq", "boolq", "validation", shots=("train", 5))
def boolq(row):
    check_types(row, passage=str, question=str, answer=bool)
    question = f"{row['passage']}\nQuestion: {row['question'].capitalize()}?"
    return multiple_choice(question, ["Yes", "No"], int(not row["answer"]))


@from_rows("TIGER-Lab/MMLU-Pro", "mmlu_pro", "test")
def mmlu_pro(row):
    check_types(row, question=str, options=list, answer=str, category=str)
    letters = tuple(ascii_uppercase[: len(row["options"])])
    if row["answer"] not in letters:
        raise ValueError(f"its answer {brief(row['answer'])} is none of its {len(letters)} options")
    lines = [row["question"], "Options:", *map("({}) {}".format, letters, row["options"]), ""]
    texts = tuple(row["options"])
    return dict(prompt="\n".join(lines), truth=row["answer"], choices=letters, texts=texts, group=row["category"])


# ---- what is made here ----
def problems(**_):
    """Word problems with combinations of numbers that no training problem has: the demo's validation split."""
    rows = enumerate(word_problems("val", 1000, 1337))
    return [Question(i, row["instruction"], row["response"]) for i, row in rows]


def heldout(source, limit, **_):
    """Validation documents of the dataset that the run `source` was trained on. A question is the ids of the whole
    prompt, with the condition of its own document, and its row the number of the document."""
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
        questions = []
        for d in whole[np.arange(n) * len(whole) // max(n, 1)]:  # spread evenly
            found, n_prefix = document(*split, d)
            encoding.decode(found)  # raises where the tokenizer lacks an id
            questions.append(Question(int(d), found[:n_prefix], encoding.decode(found[n_prefix:-1])))
    cut = f" ({len(ends) - len(whole):,} that data.py cut off are left out)" if len(whole) < len(ends) else ""
    if not questions:
        sizes = "a larger --val_fraction" + " or --block_size" * bool(cut)
        raise ValueError(f"{directory} has no validation documents{cut}: prepare it with {sizes}, or {advice}")
    print0(f"heldout: {n:,} of {len(whole):,} validation documents of {directory}, each with its own condition{cut}")
    return questions


# ---- the tasks ----


AIME = dict(score=scorers.same_mathematics, condition="synth,cot", samples=256, temperature=0.6)
CHOICE = dict(score=scorers.one_letter, condition="direct", max_new_tokens=1)

# The paper's contexts: 3,072, or 4,096, which is all of its models'. An answer may fill what the prompt leaves.
TASKS = {
    "gsm8k": Task(gsm8k, scorers.same_whole_number, "synth,cot", 3072, 3072, paper=(84.53, 78.39)),
    "math": Task(math, scorers.same_mathematics, "synth,cot", 3072, 3072, paper=(56.16, 50.28)),
    "drop": Task(drop, scorers.drop, "direct", 3072, 3072, paper=(82.21, 78.07)),
    "mmlu": Task(mmlu, **CHOICE, paper=(60.73, 56.87), macro=True),
    "arc": Task(arc, **CHOICE, paper=(81.91, 74.32)),
    "hellaswag": Task(hellaswag, **CHOICE, paper=(63.42, 50.48)),
    "winogrande": Task(winogrande, **CHOICE, paper=(72.38, 66.38)),
    "boolq": Task(boolq, **CHOICE, paper=(86.18, 84.86)),
    "mmlu_pro": Task(mmlu_pro, scorers.last_letter, "direct", max_new_tokens=4096, macro=True),
    "aime24": Task(aime(24), **AIME, max_new_tokens=4096),
    "aime25": Task(aime(25), **AIME, max_new_tokens=4096),
    "heldout": Task(heldout, scorers.same_answer, min_limit=0),  # its truths are whole answers
    "problems": Task(problems, scorers.same_answer, max_new_tokens=64),
}
PAPER = "gsm8k math drop mmlu arc hellaswag winogrande boolq".split()  # its table


def find_task(name):
    """The Task of that name, or of a file of rows with prompt and answer. Raises ValueError where there is none."""
    if name not in TASKS and Path(name).suffix not in (".jsonl", ".json", ".parquet"):
        known = f"{', '.join(TASKS)}, paper (its {len(PAPER)}), or a .jsonl file of rows with prompt and answer"
        fault = f"there is no task '{name}'" if name else "no task is given"
        raise ValueError(f"{fault}: --tasks names one or more of {known}")
    return TASKS.get(name) or Task(from_rows(name)(prompt_and_answer), scorers.same_answer)


def find_tasks(tasks):
    """{the name that its files get: task} of a setting. Raises ValueError, where find_task() does."""
    asked = [name.strip() for name in tasks.split(",") if name.strip()]
    names = [name for some in asked for name in (PAPER if some == "paper" else [some])]
    found = {Path(name).stem: find_task(name) for name in names or [""]}  # one may be that of a file
    if len(found) < len({*names}):
        raise ValueError(f"two of the tasks have the same name: {tasks}")
    return found
