"""Prompts are the paper's to the character, and answers are scored by its rules."""

import json
import sys
from itertools import combinations
from types import SimpleNamespace

import pytest

import tasks
from tasks import PAPER, TASKS, Question, Task, last_box, load_questions

# -----------------------------------------------------------------------------
# prompts

DATE = {"day": "", "month": "", "year": ""}


def drop_row(passage, question, number="", spans=(), date=DATE):
    answer = {"number": number, "date": date, "spans": list(spans)}
    return {"passage": passage, "question": question, "answer": answer}


LIONS = " To start the season, the Lions traveled south to Tampa. "
BILLS = "Trying to snap a two-game skid, the Bills flew to Gillette.\n"
JOHN = "The French king, John II, had been held captive."
DROP_TRAIN = [
    drop_row(JOHN, "How many years before Navarrase used the captivity of John II?", "9"),
    drop_row("Another.", "How many games had the Bills won before this game?", "8"),
    drop_row(LIONS, "How many points did the buccaneers need to tie in the first?", "3"),
    drop_row(BILLS, "How many games had the Bills won before this game?", "0"),
]
DROP_PROMPT = """To start the season, the Lions traveled south to Tampa.
Q: How many points did the buccaneers need to tie in the first?
A: 3

Trying to snap a two-game skid, the Bills flew to Gillette.
Q: How many games had the Bills won before this game?
A: 0

The French king, John II, had been held captive.
Q: How many years before Navarrase used the captivity of John II?
A: 9

Été 
Q: Who?
A:"""
OTHERS = {
    "number": ["", "5"],
    "date": [{**DATE, "month": "May", "year": "1941"}, DATE],
    "spans": [[], []],
}
DROP_ROW = {**drop_row("Été ", "Who?", spans=["Tom", "Ann"]), "validated_answers": OTHERS}
HISTORY = "high_school_european_history"


def mmlu_row(subject, n):
    question = f"{subject} {n}?"
    return {"question": question, "subject": subject, "choices": list("abcd"), "answer": n % 4}


ABCD = "?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
ARC = {
    "question": " Why? ",
    "choices": {"text": ["up ", "dôwn"], "label": ["1", "2"]},
    "answerKey": "2",
}
HELLASWAG = {"ctx_a": "He.", "ctx_b": "the Dog", "endings": ["sits.", " , eats. "], "label": "1"}
CONTINUE = "Question: Which is the most logical continuation?\nA. sits.\nB. , eats.\nAnswer:"
AL = {"sentence": "Al met Bo; _ left.", "option1": "Al", "option2": "Bo"}
WET = {"question": "is the UK wet", "passage": "It is."}
IS_WET = "It is.\nQuestion: Is the uk wet?\nA. Yes\nB. No\nAnswer:"

CASES = {  # task: {file: rows}, the prompt of the last row with its shots, and the truth
    "gsm8k": (
        {"gsm8k/test": [{"question": "Two  and two?\n", "answer": "<<2+2=4>>\n#### 1,004"}]},
        "Two  and two?\n",
        1004,
    ),
    "math": (
        {"math/test": [{"problem": " $1+1$ ", "solution": "\\boxed{1}, \\boxed{\\frac{1}{2}}."}]},
        " $1+1$ ",
        "\\frac{1}{2}",
    ),
    "aime24": ({"aime/test": [{"problem": "n?", "solution": "\\boxed{024}"}]}, "n?", "24"),
    "aime25": ({"aime25/test": [{"problem": "n?", "answer": "70"}]}, "n?", "70"),
    "drop": (
        {"drop/train": DROP_TRAIN, "drop/validation": [DROP_ROW]},
        DROP_PROMPT,
        [["Tom", "Ann"], ["May 1941"], ["5"]],
    ),
    "mmlu": (
        {
            "mmlu/dev": [mmlu_row(subject, n) for n in range(6) for subject in ("art", HISTORY)],
            "mmlu/test": [mmlu_row("art", 7), mmlu_row(HISTORY, 9)],
        },
        "".join(f"{HISTORY} {n}{ABCD} {'ABC'[n]}\n\n" for n in range(3)) + f"{HISTORY} 9{ABCD}",
        "B",
    ),
    "arc": (
        {"arc_challenge/validation": [ARC] * 26, "arc_challenge/test": [{**ARC, "answerKey": "1"}]},
        "Why?\nA. up\nB. dôwn\nAnswer: B\n\n" * 25 + "Why?\nA. up\nB. dôwn\nAnswer:",
        "A",
    ),
    "hellaswag": (
        {"hellaswag/train": [HELLASWAG] * 11, "hellaswag/validation": [{**HELLASWAG, "ctx_b": ""}]},
        f"He. The dog\n{CONTINUE} B\n\n" * 10 + f"He. \n{CONTINUE}",
        "B",
    ),
    "winogrande": (
        {
            "winogrande/train": [{**AL, "answer": "2"}] * 9,
            "winogrande/validation": [{**AL, "answer": "1"}],
        },
        "Al met Bo; _ left.\nA. Al\nB. Bo\nAnswer: B\n\n" * 5
        + "Al met Bo; _ left.\nA. Al\nB. Bo\nAnswer:",
        "A",
    ),
    "boolq": (
        {
            "boolq/train": [{**WET, "answer": False}] * 6,
            "boolq/validation": [{**WET, "answer": True}],
        },
        f"{IS_WET} B\n\n" * 5 + IS_WET,
        "A",
    ),
    "mmlu_pro": (
        {
            "mmlu_pro/test": [
                {"question": "Why?", "options": ["no", "yes "], "answer": "B", "category": "law"}
            ]
        },
        "Why?\nOptions:\n(A) no\n(B) yes \n",
        "B",
    ),
}


@pytest.fixture(autouse=True)
def math_verify_runs(monkeypatch):
    """Questions are read without starting math-verify."""
    monkeypatch.setattr(tasks, "equal_in_mathematics", lambda *_: True)


def write_rows(place, files):
    for name, rows in files.items():
        path = place / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_task_has_a_case():
    assert set(TASKS) == {*CASES, "heldout", "problems"}
    assert all(TASKS[name].paper for name in PAPER) and len(PAPER) == 8


@pytest.mark.parametrize("name", CASES)
def test_prompts_to_the_character(name, tmp_path, monkeypatch):
    """From local files, and the same from the hub."""
    files, prompt, truth = CASES[name]
    write_rows(tmp_path, files)
    questions = load_questions(name, None, str(tmp_path))
    last = questions[-1]
    assert "".join(last.shots) + last.prompt == prompt and last.truth == truth
    assert load_questions(name, None, str(tmp_path), limit=1) == questions[:1]

    def load_dataset(hub, config, split, streaming):
        assert hub == TASKS[name].hub and str(config) in (TASKS[name].configs or "None")
        return next(rows for file, rows in files.items() if file.endswith(split))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_questions(name, None)[-1] == last


def test_parquet_is_read_as_jsonl(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name in "arc", "drop":
        files, prompt, truth = CASES[name]
        for file, rows in files.items():
            path = tmp_path / f"{file}-00000-of-00001.parquet"
            path.parent.mkdir(exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(path)
        last = load_questions(name, None, tmp_path)[-1]
        assert "".join(last.shots) + last.prompt == prompt and last.truth == truth


def test_a_task_of_ones_own(tmp_path, monkeypatch):
    """As tasks.py's docstring says; and a jsonl file needs no code."""

    def capitals(row):
        return Question(f"What is the capital of {row['country']}?", row["capital"])

    task = Task(capitals, tasks.same_answer, hub="me/capitals", max_new_tokens=64)
    monkeypatch.setitem(TASKS, "capitals", task)
    write_rows(tmp_path, {"capitals/test": [{"country": "Peru", "capital": "Lima"}]})
    [question] = load_questions("capitals", None, tmp_path)
    assert question == Question("What is the capital of Peru?", "Lima")
    rows = [{"prompt": "2+\u20282?", "answer": 4}, {"prompt": "Capital?", "answer": "Rome"}]
    (tmp_path / "quiz.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows))
    quiz = load_questions(f"{tmp_path}/quiz.jsonl", None)
    assert quiz == [Question("2+\u20282?", "4"), Question("Capital?", "Rome")]


def test_a_mistake_ends_with_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="there is no task 'gsm9k': choose gsm8k, math, .*paper"):
        load_questions("gsm9k", None)
    with pytest.raises(FileNotFoundError, match="there is no .*/boolq/train.jsonl or .parquet"):
        load_questions("boolq", None, tmp_path)
    with pytest.raises(FileNotFoundError):
        load_questions("none.jsonl", None)
    for name, row in {
        "gsm8k": {"question": "2?", "answer": "4 apples"},
        "math": {"problem": "1?", "solution": "\\boxed{1"},
        "mmlu_pro": {"question": "1?"},
    }.items():
        write_rows(tmp_path, {f"{name}/test": [row]})
        with pytest.raises(SystemExit, match=f"row 0 of {name} is no question: "):
            load_questions(name, None, tmp_path)
    write_rows(tmp_path, {"drop/train": DROP_TRAIN[:3]})
    with pytest.raises(SystemExit, match="only 2 of the three shots"):
        load_questions("drop", None, tmp_path)


# -----------------------------------------------------------------------------
# answers within a text


@pytest.mark.parametrize(
    "text, box",
    [
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{\\boxed{ 5 }}", "5"),
        ("\\boxed{\\frac{1}{2}}}", "\\frac{1}{2}"),
        ("\\boxed {7}", "7"),
        ("\\fbox{3} \\boxed{4} \\fbox{5}", "4"),
        ("\\fbox{3}", "3"),
        ("\\boxed{}", ""),
        ("\\boxed{4} is it. \\boxed{}", "4"),
        ("\\boxed{4} is it. \\boxed", "4"),
        ("\\boxed{4} is it. \\boxed{", None),
        ("so \\boxed 2, as \\frac{1}{2}", "2"),
        ("so \\boxed2.", "2"),
        ("so \\boxed -1,250.", "-1,250"),
        ("so \\boxed C.", "C"),
        ("\\boxed\\frac{1}{2}", None),
        ("\\boxed it", None),
        ("{3}", None),
    ],
)
def test_the_last_box(text, box):
    assert last_box(text) == box


def said(score):
    names = {1.0: "right", 0.0: "wrong"}
    return "invalid" if score["invalid"] else names.get(score["score"], score["score"])


def test_gsm8k_answers_are_whole_numbers():
    for number, texts in {
        72: ["so \\boxed{72}.", "\\boxed{1}, no: \\boxed{72}", "$72.00", "72.9", "#### 1\n#### 72"],
        -2000: ["#### -2,000"],
        None: ["24 apples", "", "#### ", "inf", "2+2=4", "1/2", "\\boxed{\\text{72}}"],
    }.items():
        for text in texts:
            score = tasks.same_whole_number(text, Question("", number or 72))
            assert said(score) == ("right" if number else "invalid"), text
    assert said(tasks.same_whole_number("71", Question("", 72))) == "wrong"


@pytest.mark.parametrize(
    "truth, right, wrong, invalid",
    [
        ("2.5", "2.50|#### 2.5|so \\boxed{2.5}.|$2.5|it is 2.5.", "2.9|25|-2.5", ""),
        ("1,000", "1000|$1,000.00|+1000|1000.", "1|1000.5", "1,00|1,0000|1 000"),
        ("3+4=7\n#### 7", "7|9-2=7 #### 7|#### $7 each", "8|#### 78", "7 or 8"),
        ("24", "24 apples|24kg|**24**", "25 apples|\u221224", "apples|x24|2e4|2.4.1|\u0662\u0664"),
        ("Paris", " Paris\n|#### Paris|\\boxed{Paris}", "paris|Paris, USA|5", " |####"),
        ("24 apples and\n 3 pears", "24  apples and 3 pears", "24 apples|24", ""),
    ],
)
def test_other_answers_are_numbers_or_text(truth, right, wrong, invalid):
    for verdict, texts in ("right", right), ("wrong", wrong), ("invalid", invalid):
        for text in texts.split("|") if texts else []:
            assert said(tasks.same_answer(text, Question("", truth))) == verdict, text


def test_choices():
    """What is no choice counts as a guess."""
    question = Question("", "B", choices="ABCD")
    for text, verdict in {" b\n": "right", "A": "wrong", "(B)": "invalid", "": "invalid"}.items():
        assert said(tasks.one_letter(text, question)) == verdict
    assert tasks.one_letter("AB", question) == {"score": 0.25, "invalid": True}


@pytest.mark.parametrize(
    "text, verdict, published",
    [
        ("The answer is B because I ...", "right", 0),
        ("The answer is (B), not (A).", "right", 0),
        ("The answer is A. No, the answer is B.", "right", 1),
        ("(A) or (B)", "right", 1),
        ("(B) A", "right", 1),
        ("I say B: A man", "wrong", 0),
        ("(A), so \\boxed{\\text{(B)}}", "right", 1),
        ("\\boxed{B} and then (A)", "right", 1),
        ("\\boxed{} (B)", "right", 1),
        ("BA", "invalid", 0.1),
        ("(K)", "invalid", 0.1),
    ],
)
def test_mmlu_pro(text, verdict, published):
    score = tasks.last_letter(text, Question("", "B", choices="ABCDEFGHIJ"))
    assert said(score) == verdict and score["published"] == published


@pytest.mark.parametrize(
    "truth, text, em, f1",
    [
        ([["5"]], " 5.0\n", 1, 1),
        ([["5"]], "5 yards", 0, 0.67),
        ([["5"]], "6 yards", 0, 0),
        ([["3000"]], "3,000", 1, 1),
        ([["12-yard run"]], "12 yard", 0, 0.8),
        ([["7 December 1941"]], "December 7, 1941", 0, 1),
        ([["The Buccaneers"]], "buccaneers.", 1, 1),
        ([["Tom", "Ann"]], "Tom, Ann", 0, 0.33),
        ([["Tom", "Ann"], ["Ann"]], "Ann", 1, 1),
        ([[""], ["5"]], "", 0, 0),
    ],
)
def test_drop(truth, text, em, f1):
    invalid = text == ""
    wanted = {"score": f1, "em": em, "invalid": invalid}
    assert tasks.drop_f1_em(text, Question("", truth)) == wanted


def test_samples_of_a_question():
    scores = [1.0, 0.0, 0.0, 1.0, 0.0]
    for k in range(1, 6):
        drawn = [max(some) for some in combinations(scores, k)]
        assert tasks.pass_at(k, scores) == pytest.approx(sum(drawn) / len(drawn))
    texts = ["\\boxed{7}", "7", "\\boxed{204}", " 204 ", "0204", "\\boxed{1000}", *["5000", "x"] * 9]
    assert [tasks.majority_at(k, texts, "204") for k in (1, 2)] == [1, 1]
    assert [tasks.majority_at(k, texts, 7) for k in (1, 2)] == [0, 1]
    assert tasks.majority_at(9, texts, "5000") == 0


@pytest.mark.slow
def test_mathematics(monkeypatch):
    """Other ways to write the same are right; what does not return in time is wrong."""
    pytest.importorskip("math_verify")
    monkeypatch.undo()
    for truth, right, wrong in (
        ("\\frac{1}{2}", "\\frac12|0.5|\\dfrac{1}{2}", "2|"),
        ("\\sqrt{51}", "51^{1/2}", "51"),
        ("1,234", "1234|\\$1,234", "1.234"),
        ("\\text{Evelyn}", "Evelyn", "\\text{Angela}"),
    ):
        for verdict, answers in ("right", right), ("wrong", wrong):
            for answer in answers.split("|"):
                text = f"\\boxed{{1}}, no: \\boxed{{{answer}}}"
                assert said(tasks.same_mathematics(text, Question("", truth))) == verdict, answer
    score = tasks.same_mathematics("so $204$", Question("", "204"))
    assert score == {"score": 1, "invalid": True, "unboxed": 1}
    score = tasks.same_mathematics("\\boxed{\\sqrt{5}}", Question("", "\\sqrt{5}"))
    assert score["unboxed"] == 0  # as the published code reads it
    assert not tasks.equal_in_mathematics("5", "\\boxed{9^{9^{9^9}}}", seconds=0.5)
    assert tasks.equal_in_mathematics("5", "5")


# -----------------------------------------------------------------------------
# held-out documents


def test_held_out_questions_are_the_validation_documents(place):
    def refusal(directory):
        with pytest.raises(SystemExit) as error:
            tasks.heldout(directory, 5)
        return str(error.value)

    dataset, run = place / "data" / "problems", place / "out"
    run.mkdir()
    assert "no run of train.py" in refusal(run)

    def write_run(n_tokens):
        state = {"settings": {"dataset": "problems"}, "loader": {"data": [300, n_tokens]}}
        (run / "train.json").write_text(json.dumps(state))

    tokenizer = (dataset / "tokenizer.json").read_text()
    n_tokens = json.loads((dataset / "meta.json").read_text())["splits"]["train"]["tokens"]
    for text, n in (tokenizer + " ", n_tokens), (tokenizer, n_tokens + 1):
        (run / "tokenizer.json").write_text(text)
        write_run(n)
        assert f"problems, on which {run} was trained, has changed" in refusal(run)
    write_run(n_tokens)
    tokenizer = tasks.load_tokenizer(dataset)
    rows = load_questions("problems", None)[:20]
    expected = [q._replace(prompt=tokenizer.prompt(q.prompt, "cot")) for q in rows]
    assert tasks.heldout(run, 1000) == expected
    assert tasks.heldout(run, 7) == [expected[i * 20 // 7] for i in range(7)]
