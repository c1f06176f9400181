"""Prompts as the published code makes them, answers read out of texts, and held-out rows."""

import json
import os
import shutil
from itertools import combinations
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

import scorers
import tasks
from tasks import PAPER, TASKS, Question, find_task
from tokenizer import encode_prompt, fingerprint, load_encoding, special_id

# ----------------------------------------------------------------------------------------------------
# prompts

ARC = {"question": " Why? ", "choices": {"text": ["up ", "dôwn"], "label": ["1", "2"]}, "answerKey": "2"}
HELLASWAG = {"ctx_a": "He runs.", "ctx_b": "the Dog", "endings": ["sits.", " , eats. "], "label": "1"}
PASSAGES = [
    "The French king, John II, had been held captive in Calais. ",
    "An other passage.",
    " To start the season, ",
]
PASSAGES[2] += "the Lions traveled south to Tampa, Florida."
DATE = {"day": "", "month": "", "year": ""}


def drop_row(passage, question, number="", spans=(), date=DATE):
    answer = {"number": number, "date": date, "spans": list(spans)}
    return {"passage": passage, "question": question, "answer": answer, "section_id": "1", "query_id": "2"}


DROP_TRAIN = [
    drop_row(PASSAGES[0], "How many years before Navarrase used the captivity of John II?", "9"),
    drop_row(PASSAGES[1], "How many games had the Bills won before this game?", "8"),
    drop_row(PASSAGES[2], "How many points did the buccaneers need to tie in the first?", "3"),
    drop_row("Trying to snap a two-game skid, the Bills flew to Gillette.\n", PASSAGES[1], "7"),
    drop_row(
        "Trying to snap a two-game skid, the Bills flew to Gillette.\n",
        "How many games had the Bills won before this game?",
        "0",
    ),
]
DROP_PROMPT = """To start the season, the Lions traveled south to Tampa, Florida.
Q: How many points did the buccaneers need to tie in the first?
A: 3

Trying to snap a two-game skid, the Bills flew to Gillette.
Q: How many games had the Bills won before this game?
A: 0

The French king, John II, had been held captive in Calais.
Q: How many years before Navarrase used the captivity of John II?
A: 9

Été 
Q: Who?
A:"""
OTHERS = {
    "number": ["", "5"],
    "date": [DATE | {"month": "May", "year": "1941"}, DATE],
    "spans": [[], []],
    "hit_id": ["", ""],
}
DROP_ROW = drop_row("Été ", "Who?", spans=["Tom", "Ann"]) | {"validated_answers": OTHERS}


def mmlu_row(subject, n):
    return {"question": f"{subject} {n}?", "subject": subject, "choices": ["a", "b", "c", "d"], "answer": n % 4}


HISTORY, LETTERS = "high_school_european_history", ("A", "B", "C", "D")
MMLU_DEV = [mmlu_row(subject, n) for n in range(6) for subject in ("art", HISTORY)]
MMLU_CHOICES = "?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
CASES = {  # (the rows of each split, what is asked in full, the fields of the last question)
    "gsm8k": (
        {"gsm8k/test": [{"question": "Two  and two?\n", "answer": "<<2+2=4>>\n#### 1,004"}]},
        "Two  and two?\n",
        dict(truth=1004),
    ),
    "math": (
        {"math/test": [{"problem": " $1+1$ ", "solution": "\\boxed{1} so \\boxed{\\frac{1}{2}}.", "level": "Level 1"}]},
        " $1+1$ ",
        dict(truth="\\frac{1}{2}"),
    ),
    "aime24": ({"aime/test": [{"id": 6, "problem": "n?", "solution": "\\boxed{024}"}]}, "n?", dict(truth="24")),
    "aime25": ({"aime25/test": [{"problem": "n?", "answer": "70"}], "aime/test": []}, "n?", dict(truth="70")),
    "drop": (
        {"drop/train": DROP_TRAIN, "drop/validation": [DROP_ROW]},
        DROP_PROMPT,
        dict(truth=[["Tom", "Ann"], ["May 1941"], ["5"]]),
    ),
    "mmlu": (
        {"mmlu/dev": MMLU_DEV, "mmlu/test": [mmlu_row("art", 7), mmlu_row(HISTORY, 9)]},
        "".join(f"{HISTORY} {n}{MMLU_CHOICES} {'ABCD'[n]}\n\n" for n in range(3)) + f"{HISTORY} 9{MMLU_CHOICES}",
        dict(truth="B", group=HISTORY, choices=LETTERS, texts=("a", "b", "c", "d")),
    ),
    "arc": (
        {"arc_challenge/validation": [ARC] * 26, "arc_challenge/test": [{**ARC, "answerKey": "1"}]},
        "Why?\nA. up\nB. dôwn\nAnswer: B\n\n" * 25 + "Why?\nA. up\nB. dôwn\nAnswer:",
        dict(truth="A", choices=("A", "B"), texts=("up", "dôwn")),
    ),
    "hellaswag": (
        {"hellaswag/train": [HELLASWAG] * 11, "hellaswag/validation": [{**HELLASWAG, "ctx_b": ""}]},
        "He runs. The dog\nQuestion: Which is the most logical continuation?\nA. sits.\nB. , eats.\nAnswer: B\n\n" * 10
        + "He runs. \nQuestion: Which is the most logical continuation?\nA. sits.\nB. , eats.\nAnswer:",
        dict(truth="B"),
    ),
    "winogrande": (
        {
            f"winogrande/{split}": [
                {"sentence": "Al met Bo; _ left.", "option1": "Al", "option2": "Bo", "answer": right}
            ]
            * n
            for split, right, n in (("train", "2", 9), ("validation", "1", 1))
        },
        "Al met Bo; _ left.\nA. Al\nB. Bo\nAnswer: B\n\n" * 5 + "Al met Bo; _ left.\nA. Al\nB. Bo\nAnswer:",
        dict(truth="A"),
    ),
    "boolq": (
        {
            f"boolq/{split}": [{"question": "is the UK wet", "passage": "It is.", "answer": right}] * n
            for split, right, n in (("train", False, 6), ("validation", True, 1))
        },
        "It is.\nQuestion: Is the uk wet?\nA. Yes\nB. No\nAnswer: B\n\n" * 5
        + "It is.\nQuestion: Is the uk wet?\nA. Yes\nB. No\nAnswer:",
        dict(truth="A"),
    ),
    "mmlu_pro": (
        {"mmlu_pro/test": [{"question": "Why?", "options": ["no", "yes "], "answer": "B", "category": "law"}]},
        "Why?\nOptions:\n(A) no\n(B) yes \n",
        dict(truth="B", group="law", choices=("A", "B")),
    ),
}


@pytest.fixture(autouse=True)
def without_math_verify(monkeypatch):
    """The questions that it scores can be read without it, as where it runs already."""
    monkeypatch.setattr(scorers, "worker", object())


def write_rows(directory, splits):
    for name, rows in splits.items():
        path = directory / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def refusal(name, data_dir):
    with pytest.raises((ValueError, OSError)) as error:
        find_task(name).questions(data_dir=data_dir)
    return str(error.value)


def test_every_task_is_here():
    assert PAPER == "gsm8k math drop mmlu arc hellaswag winogrande boolq".split()
    assert {*TASKS} == {*CASES, "heldout", "problems"} and all(TASKS[name].paper for name in PAPER)


@pytest.mark.parametrize("name", CASES)
def test_prompts_to_the_character(name, tmp_path, capsys):
    splits, asked, fields = CASES[name]
    write_rows(tmp_path, splits)
    questions = TASKS[name].questions(source=None, data_dir=str(tmp_path), limit=0)
    last = questions[-1]
    assert "".join(last.shots) + last.prompt == asked
    assert [q.row for q in questions] == [*range(len(questions))]
    assert {key: getattr(last, key) for key in fields} == fields
    assert json.loads(json.dumps(last.truth)) == last.truth
    assert TASKS[name].questions(data_dir=str(tmp_path), limit=1) == questions[:1]
    assert "shots" not in capsys.readouterr().out


@pytest.mark.skipif(
    "HRM_REFERENCE" not in os.environ, reason="HRM_REFERENCE names no directory of the published code's"
)
@pytest.mark.parametrize("name", [name for name in PAPER if name != "drop"])
def test_prompts_of_the_published_code(name):
    shared = Path(os.environ["HRM_REFERENCE"]).parents[1]
    data_dir = shared / "data" / ("benchmarks" if name != "gsm8k" else "")
    questions = TASKS[name].questions(data_dir=data_dir)
    lines = (shared / "reference" / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 2
    for line in map(json.loads, lines):
        question, truth = questions[line["row"]], line["truth"]
        assert "".join(question.shots) + question.prompt == line["prompt"]
        assert question.truth == (truth["gold"] if isinstance(truth, dict) else truth)
        assert list(question.choices) == (truth["valid_set"] if isinstance(truth, dict) else [])


def test_drop_answers_of_other_copies(tmp_path):
    """`answers` as a dict of lists, a list of dicts, or a single one."""
    one = {"number": "", "date": DATE, "spans": ["Tom", "Ann"]}
    row = {key: DROP_ROW[key] for key in ("passage", "question")}
    for answers, truth in (
        (OTHERS, [["May 1941"], ["5"]]),
        ([one, one | {"spans": [], "number": 5}], [["Tom", "Ann"], ["5"]]),
        (one, [["Tom", "Ann"]]),
    ):
        write_rows(tmp_path, {"drop/train": DROP_TRAIN, "drop/validation": [row | {"answers": answers}]})
        assert TASKS["drop"].questions(data_dir=tmp_path)[0].truth == truth
    write_rows(tmp_path, {"drop/validation": [row]})
    assert "drop/validation.jsonl, line 1 is no row for drop(): it lacks 'answer'" in refusal("drop", tmp_path)
    write_rows(tmp_path, {"drop/train": DROP_TRAIN[:4]})
    assert "train split lacks the question 'How many games had the Bills won before this game?' on" in refusal(
        "drop", tmp_path
    )


def test_rows_of_parquet(tmp_path):
    """In a split named `dev`, for which datasets has another name; several files; lists and dicts within rows."""
    from datasets import Dataset

    for name in "arc", "mmlu", "drop":
        for split, rows in CASES[name][0].items():
            path = tmp_path / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            Dataset.from_list(rows).to_parquet(path)
        last = TASKS[name].questions(data_dir=tmp_path)[-1]
        assert "".join(last.shots) + last.prompt == CASES[name][1] and last.truth == CASES[name][2]["truth"]


@pytest.mark.parametrize(
    "name, splits, sentence",
    [
        ("arc", {}, "there is no directory {}/arc_challenge, for the rows of allenai/ai2_arc"),
        ("aime24", {}, "there is no directory {}/aime24, "),
        ("arc", {"arc_challenge/test": [ARC]}, "named after the split 'validation' in {}/arc_challenge"),
        ("mmlu", {"mmlu/dev": MMLU_DEV}, "named after the split 'test' in {}/mmlu"),
        (
            "gsm8k",
            {"gsm8k/test": [{"question": "2?"}]},
            "{}/gsm8k/test.jsonl, line 1 is no row for gsm8k(): it",
        ),
        ("gsm8k", {"gsm8k/test": [{"question": "2?", "answer": "4 apples"}]}, "does not end in #### and a number"),
        ("gsm8k", {"gsm8k/test": [{"question": "\ud800", "answer": "4"}]}, "half a surrogate pair in the prompt"),
        ("gsm8k", {"gsm8k/test": [{"question": None, "answer": "4"}]}, "question is of type NoneType"),
        ("gsm8k", {"gsm8k/test": [[1]]}, "line 1 is no row for gsm8k(): not a JSON object"),
        ("math", {"math/test": [{"problem": "1?", "solution": "\\boxed{1"}]}, "its solution has no \\boxed{{}} answer"),
        ("aime25", {"aime/test": [{"problem": "1?", "answer": "x"}]}, "line 1 is no row for competition()"),
        ("boolq", {"boolq/train": [{"passage": "", "question": "", "answer": 1}]}, "answer is 1"),
        (
            "hellaswag",
            {"hellaswag/train": [{**HELLASWAG, "label": ""}]},
            "hellaswag/train.jsonl, line 1 is no row for",
        ),
        (
            "hellaswag",
            {"hellaswag/train": [{**HELLASWAG, "label": 2}]},
            "the right one of its 2 choices is no. 2, from 0",
        ),
        ("mmlu", {"mmlu/dev": [mmlu_row("art", 0) | {"choices": ["a", 2]}]}, "a choice is no text"),
        (
            "mmlu",
            {"mmlu/dev": [mmlu_row("art", 0) | {"answer": "A"}]},
            "the right one of its 4 choices is no. 'A', from 0",
        ),
        (
            "mmlu_pro",
            {"mmlu_pro/test": [dict(question="1?", options=["x"], answer="B", category="")]},
            "none of its 1 opt",
        ),
    ],
)
def test_rows_that_are_no_questions(name, splits, sentence, tmp_path):
    write_rows(tmp_path, splits)
    said = refusal(name, tmp_path)
    assert sentence.format(tmp_path) in said and "\n" not in said


def test_fewer_shots_are_told(tmp_path, capsys):
    write_rows(tmp_path, CASES["arc"][0] | {"arc_challenge/validation": [ARC] * 3})
    assert len(TASKS["arc"].questions(data_dir=tmp_path)[0].shots) == 3
    assert "1 questions have fewer than 25 shots" in capsys.readouterr().out
    write_rows(tmp_path, CASES["mmlu"][0] | {"mmlu/dev": MMLU_DEV[1::2]})  # no art
    assert [len(q.shots) for q in TASKS["mmlu"].questions(data_dir=tmp_path)] == [0, 3]
    assert "1 questions have fewer than 5 shots" in capsys.readouterr().out


def test_odd_boxes_of_math_are_answers(tmp_path, monkeypatch):
    monkeypatch.setattr("scorers.worker", object())  # math-verify is there
    solutions = {"so $\\boxed 2$.": "2", "$\\boxed{}$": "\\text{none}", "\\boxed{\\frac 12}": "\\frac 12"}
    write_rows(tmp_path, {"math/test": [{"problem": "1?", "solution": text} for text in solutions]})
    assert [q.truth for q in find_task("math").questions(data_dir=tmp_path)] == [*solutions.values()]


def test_a_task_of_ones_own(tmp_path):
    """As the docstring of tasks.py says."""

    @tasks.from_rows("me/capitals", "capitals", "test")
    def capitals(row):
        return dict(prompt=f"What is the capital of {row['country']}?", truth=row["capital"])

    write_rows(tmp_path, {"capitals/test": [{"country": "Italy", "capital": "Rome"}, {"country": "Peru"}]})
    task = tasks.Task(capitals, scorers.same_answer, "direct")
    [question] = task.questions(data_dir=tmp_path, limit=1)
    assert question.prompt == "What is the capital of Italy?" and say(task.score("Rome", question)) == "right"
    with pytest.raises(ValueError, match="line 2 is no row for capitals.*: it lacks 'capital'"):
        task.questions(data_dir=tmp_path)


HUB = {  # what is asked of it: (repository, configuration, split)
    "gsm8k": ["openai/gsm8k main test"],
    "math": [f"EleutherAI/hendrycks_math {subject} test" for subject in tasks.MATH],
    "drop": ["EleutherAI/drop None train", "EleutherAI/drop None validation"],
    "mmlu": ["cais/mmlu all dev", "cais/mmlu all test"],
    "arc": ["allenai/ai2_arc ARC-Challenge validation", "allenai/ai2_arc ARC-Challenge test"],
    "hellaswag": ["Rowan/hellaswag None train", "Rowan/hellaswag None validation"],
    "winogrande": [f"allenai/winogrande winogrande_debiased {split}" for split in ("train", "validation")],
    "boolq": ["google/boolq None train", "google/boolq None validation"],
    "mmlu_pro": ["TIGER-Lab/MMLU-Pro None test"],
    "aime24": ["math-ai/aime24 None test"],
    "aime25": ["math-ai/aime25 None test"],
}


@pytest.mark.parametrize("name", HUB)
def test_rows_of_the_hub(name, monkeypatch):
    import datasets

    def load_dataset(*where, split, streaming):
        asked.append(f"{where[0]} {where[1]} {split}")
        return next(rows for place, rows in CASES[name][0].items() if place.endswith(f"/{split}"))

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    questions = TASKS[name].questions()
    assert asked == HUB[name] and "".join(questions[-1].shots) + questions[-1].prompt == CASES[name][1]
    assert [q.row for q in questions] == [*range(7 if name == "math" else len(questions))] and len(tasks.MATH) == 7


def test_a_file_is_a_task(tmp_path):
    write_rows(tmp_path, {"quiz": [{"prompt": "2+2?", "answer": 4}, {"prompt": "Capital?", "answer": "Rome"}]})
    task = find_task(f"{tmp_path}/quiz.jsonl")
    quiz = task.questions(source=None, data_dir="elsewhere", limit=0)
    assert quiz == [Question(0, "2+2?", "4"), Question(1, "Capital?", "Rome")]
    assert [task.score(text, quiz[0])["score"] for text in ("4", "so 4.0", "5")] == [1, 1, 0]
    for row, sentence in (
        ({"prompt": "2?"}, "it lacks 'answer'"),
        ({"prompt": "2?", "answer": None}, "its answer is of type NoneType"),
        ({"prompt": "2?", "answer": " "}, "empty truth"),
        ({"prompt": 2, "answer": "2"}, "prompt is 2"),
    ):
        write_rows(tmp_path, {"quiz": [row]})
        assert f"{tmp_path}/quiz.jsonl, line 1 is no row for" in (said := refusal(f"{tmp_path}/quiz.jsonl", ""))
        assert said.endswith(sentence)
    assert refusal("no/such.jsonl", "") == "there is no file no/such.jsonl"
    with pytest.raises(ValueError, match="there is no task 'gsm9k': --tasks names one or more of gsm8k, math, .*paper"):
        find_task("gsm9k")


# ----------------------------------------------------------------------------------------------------
# scorers


def say(score):
    return "invalid" if score["invalid"] else {1.0: "right", 0.0: "wrong"}.get(score["score"], score["score"])


@pytest.mark.parametrize(
    "text, box",
    [
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{\\boxed{ 5 }}", "5"),
        ("\\boxed{\\frac{1}{2}}}", "\\frac{1}{2}"),
        ("\\boxed {7}", "7"),
        ("\\fbox{3}", "3"),
        ("\\fbox{3} \\boxed{4}  \\fbox{5}", "4"),
        ("\\boxed{}", ""),
        ("\\boxed{3", None),
        ("\\boxed 3", None),
        ("{3}", None),
        ("", None),
    ],
)
def test_last_box(text, box):
    assert scorers.last_box(text) == box


@pytest.mark.parametrize(
    "text, number",
    [
        ("so \\boxed{72}.", 72),
        ("\\boxed{1} and then \\boxed{1,234}", 1234),
        ("\\boxed{\\text{5}}", None),
        ("\\boxed{ $18 }", 18),
        ("\\boxed{3", None),
        ("2+2=4\n#### 4", 4),
        ("#### 1\n#### -2,000", -2000),
        ("18", 18),
        ("$18.00", 18),
        ("18.9", 18),
        ("-7", -7),
        ("24 apples", None),
        ("eighteen", None),
        ("", None),
        ("#### ", None),
        ("inf", None),
        ("nan", None),
        ("2+2=4", None),
        ("1/2", None),
        ("0.5", 0),
        ("3 or 4", None),
    ],
)
def test_gsm8k_answers_are_whole_numbers(text, number):
    assert scorers.to_whole_number(scorers.extract(text)) == number
    assert say(scorers.same_whole_number(text, Question(0, "", number))) == ("invalid" if number is None else "right")
    assert say(scorers.same_whole_number(text, Question(0, "", 5))) == ("invalid" if number is None else "wrong")


@pytest.mark.parametrize(
    "truth, verdicts",
    [
        ("2.5", {"right": "2.50|#### 2.5|so \\boxed{2.5}.|$2.5|it is 2.5.", "wrong": "2.9|2|25|-2.5"}),
        ("1,000", {"right": "1000|$1,000.00|+1000|1000.", "wrong": "1|1000.5", "invalid": "1,00|1,0000|1 000"}),
        ("3+4=7\n#### 7", {"right": "7|9-2=7 #### 7|#### $7 each|\\boxed{\\text{7}}", "wrong": "8|#### 78"}),
        ("24", {"right": "24 apples|24kg|**24**", "wrong": "25 apples", "invalid": "apples|24 or 25|x24|2e4|2.4.1|"}),
        ("5", {"right": "=5|H2O: 5", "wrong": "-5|\u22125", "invalid": "inf|nan|Infinity|\u0665|1e5|5/1|#### "}),
        (f"{10**400 + 1}", {"right": f"{10**400 + 1}.0", "wrong": f"{10**400}", "invalid": "1e400"}),
        (".5", {"right": "0.50|$.5", "wrong": ".05", "invalid": "1/2"}),
        ("Paris", {"right": " Paris\n|#### Paris|\\boxed{Paris}", "wrong": "paris|Paris, USA|5", "invalid": " |####"}),
        ("24 apples and\n 3 pears", {"right": "24  apples and 3 pears", "wrong": "24 apples|24"}),
        ("1/2", {"right": "1/2", "wrong": "0.5|1/20"}),
        ("inf", {"right": "inf", "wrong": "nan|1"}),
    ],
)
def test_answers_are_numbers_or_text(truth, verdicts):
    for verdict, generations in verdicts.items():
        for generation in generations.split("|"):
            assert say(scorers.same_answer(generation, Question(0, "", truth))) == verdict, generation


def test_one_letter():
    question = Question(0, "", "A", choices=LETTERS)
    for verdict, texts in {"right": ["A", " a", "a\n"], "wrong": ["B", " d "]}.items():
        assert {say(scorers.one_letter(text, question)) for text in texts} == {verdict}
    for text in "(A)", "A.", "", "E", "AB", "1", "Α":  # the last is Greek
        assert scorers.one_letter(text, question) == {"score": 0.25, "invalid": True}


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("(A) or (B)", "right"),
        ("\\boxed{B}", "right"),
        ("(A), so \\boxed{\\text{(B)}}", "right"),
        ("The answer is B.", "right"),
        ("I say B: A man", "wrong"),
        ("(B) A", "right"),
        ("\\boxed{} (B)", "right"),
        ("\\boxed{B} and then (A)", "right"),
        ("b", "invalid"),
        ("BA", "invalid"),
        ("(F)", "invalid"),
        ("", "invalid"),
    ],
)
def test_last_letter(text, verdict):
    score = scorers.last_letter(text, Question(0, "", "B", choices=("A", "B", "C", "D", "E")))
    assert say(score) == verdict and (verdict != "invalid" or score["score"] == 0.2)


@pytest.mark.parametrize(
    "answers, text, em, f1",
    [
        ([["5"]], " 5\n", 1, 1),
        ([["5"]], "5.0", 1, 1),
        ([["5"]], "$5", 1, 1),
        ([["5"]], "5 yards", 0, 0.67),
        ([["5"]], "6 yards", 0, 0),
        ([["3000"]], "3,000", 1, 1),
        ([["0.5"]], "1/2", 0, 0),
        ([["12-yard run"]], "12 yard", 0, 0.8),
        ([["7 December 1941"]], "December 7, 1941", 0, 1),
        ([["7 December 1941"]], "1941", 0, 0.5),
        ([["The Buccaneers"]], "buccaneers.", 1, 1),
        ([["theory"]], "the ory", 0, 0),
        ([["Tom", "Ann"]], "Tom, Ann", 0, 0.33),
        ([["Tom", "Ann"]], "Ann", 0, 0.5),
        ([["Tom", "Ann"], ["Ann"]], "Ann", 1, 1),
        ([["Tampa Bay"], ["5"]], "bay", 0, 0.67),
        ([[""], ["5"]], "", 0, 0),
        ([[""]], "5", 0, 0),
        ([["the"]], "a", 1, 1),
        ([["5"]], "", 0, 0),
    ],
)
def test_drop_scores(answers, text, em, f1):
    assert scorers.drop(text, Question(0, "", answers)) == {"score": f1, "em": em, "invalid": text == ""}


def test_samples_of_a_question():
    scores = [1.0, 0.0, 0.0, 1.0, 0.0]
    for k in range(1, 6):
        drawn = [float(max(some)) for some in combinations(scores, k)]
        assert scorers.pass_at(k, scores) == pytest.approx(sum(drawn) / len(drawn))
    assert scorers.pass_at(1, [0.0] * 256) == 0 and scorers.pass_at(100, [1.0] + [0.0] * 255) == pytest.approx(
        100 / 256
    )
    texts = ["\\boxed{7}", "7", "\\boxed{204}", " 204 ", "\\boxed{204}", "\\boxed{1000}"] + ["5000", "x", "", "-3"] * 9
    assert [scorers.majority_at(k, texts, "204") for k in (1, 2)] == [1, 1]
    assert [scorers.majority_at(k, texts, "7") for k in (1, 2)] == [0, 1]
    assert scorers.majority_at(9, texts, "5000") == scorers.majority_at(9, [], "7") == 0


def test_math_verify_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(scorers, "worker", None)
    (tmp_path / "math_verify.py").write_text("import no_such_module")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in "math", "aime24", "aime25":
        assert refusal(name, "") == "MATH and AIME are scored by math-verify: pip install math-verify"


def test_mathematics(monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(scorers, "worker", None)

    def verdict(text, truth):
        return say(scorers.same_mathematics(text, Question(0, "", truth)))

    for truth, right, wrong in (
        ("\\frac{1}{2}", "\\frac12|0.5|1/2|\\dfrac{1}{2}|\\boxed{\\frac{1}{2}}", "2|\\frac{1}{3}||("),
        ("\\sqrt{51}", "\\sqrt{51}|51^{1/2}", "51"),
        ("6 - 5i", "-5i+6", "5"),
        ("1,234", "1234|\\$1,234|1,\\!234", "1.234|234"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)", "3"),
        ("\\text{Evelyn}", "\\text{Evelyn}|Evelyn", "\\text{Angela}"),
        ("204", "204|n = 204|204.0", "205|402"),
    ):
        for expected, answers in (("right", right), ("wrong", wrong)):
            for answer in answers.split("|"):
                assert verdict(f"\\boxed{{1}}, no: \\boxed{{{answer}}}", truth) == expected, (truth, answer)
    for text, score in (("so 204", 1), ("so $204$", 1), ("205", 0), ("", 0), ("\\boxed{204", 0), ("\ud800\0", 0)):
        assert scorers.same_mathematics(text, Question(0, "", "204")) == {
            "score": score,
            "invalid": True,
            "unboxed": score,
        }
    # as the published code scores: without its box, no root is read
    assert scorers.same_mathematics("\\boxed{\\sqrt{5}}", Question(0, "", "\\sqrt{5}"))["unboxed"] == 0
    # it needs no main thread, what ends it is wrong, and the next answer finds it well
    found = []
    thread = Thread(target=lambda: found.append(verdict("\\boxed{0.5}", "\\frac{1}{2}")))
    thread.start()
    thread.join()
    assert found == ["right"]
    monkeypatch.setattr(scorers, "SECONDS", 0.01)
    assert verdict("\\boxed{9^{9^{9^9}}}", "5") == "wrong"
    monkeypatch.setattr(scorers, "SECONDS", 20)
    assert verdict("\\boxed{5}", "5") == "right"
    scorers.worker.kill()


# ----------------------------------------------------------------------------------------------------
# held-out rows


@pytest.fixture
def run_dir(workplace, monkeypatch):
    """What heldout needs of a run on data/problems."""
    monkeypatch.chdir(workplace)
    shutil.copytree(workplace / "data" / "problems", workplace / "out")
    (workplace / "out" / "run.json").write_text(json.dumps({"settings": {"dataset": "problems"}}))
    return workplace / "out"


def change_val(run_dir, name, content):
    """Put content into a file of data/problems, as if the run had been trained on that."""
    path = run_dir.parent / "data" / "problems" / name
    path.write_bytes(content)
    meta = json.loads((run_dir / "meta.json").read_text())
    meta["checksums"][name] = fingerprint(path)
    if name == "val.idx":
        meta["splits"]["val"]["documents"] = meta["files"][1]["val"]["documents"] = len(content) // 16
    for directory in run_dir, path.parent:
        (directory / "meta.json").write_text(json.dumps(meta))


def test_heldout_rows_are_the_validation_documents(run_dir, capsys):
    encoding = load_encoding(run_dir)
    asked = [q._replace(prompt=encode_prompt(encoding, q.prompt, "cot")) for q in tasks.problems()[:20]]
    assert tasks.heldout(source=run_dir, limit=0) == asked
    assert tasks.heldout(source=run_dir, limit=7) == [asked[i * 20 // 7] for i in range(7)]
    assert "7 of 20 validation documents of data/problems" in capsys.readouterr().out
    # a document that data.py cut off has no eoa
    ids = np.fromfile("data/problems/val.bin", dtype=np.uint16)
    third = np.flatnonzero(ids == special_id(encoding, "eoa"))[2]
    ids[third] = 65
    change_val(run_dir, "val.bin", ids.tobytes())
    assert tasks.heldout(source=run_dir, limit=0) == asked[:2] + asked[3:]
    assert "19 of 19 validation documents" in (said := capsys.readouterr().out) and "(1 that data.py cut off" in said


def test_heldout_rows_that_are_not_there(run_dir):
    def refusal():
        with pytest.raises(ValueError) as error:
            tasks.heldout(source=run_dir, limit=0)
        assert "choose with --tasks from gsm8k, math, drop, " in str(error.value)
        return str(error.value)

    bin, index = (run_dir.parent / "data" / "problems" / name for name in ("val.bin", "val.idx"))
    kept = bin.read_bytes(), index.read_bytes()
    change_val(run_dir, "val.bin", b"")
    change_val(run_dir, "val.idx", b"")
    assert "data/problems has no validation documents: prepare it with a larger --val_fraction" in refusal()
    change_val(run_dir, "val.bin", kept[0].replace(kept[0][-2:], b"A\0"))
    change_val(run_dir, "val.idx", kept[1])
    assert "(20 that data.py cut off are left out): prepare it" in (said := refusal()) and "--block_size" in said
    change_val(run_dir, "val.bin", b"\xff\xff" + kept[0][2:])  # in a prefix
    with pytest.raises(ValueError, match="val.bin is damaged: the tokenizer bytes has no token"):
        tasks.heldout(source=run_dir, limit=0)
    shutil.copy(run_dir / "meta.json", run_dir / "other.json")
    change_val(run_dir, "val.bin", kept[0])
    shutil.copy(run_dir / "other.json", run_dir / "meta.json")
    assert "holds other data now" in refusal()
    shutil.rmtree("data")
    assert f"data/problems, on which {run_dir} was trained, is not here" in refusal()
    (run_dir / "run.json").write_text('{"settings": {"dataset": 5}}')
    with pytest.raises(ValueError, match="run.json is damaged"):
        tasks.heldout(source=run_dir, limit=0)
    (run_dir / "run.json").unlink()
    assert "has no run.json, which names the dataset of held-out rows: choose" in refusal()
