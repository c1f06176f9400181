"""The puzzles: right answers, a dial that works, and no instance both in training and in validation."""

import sys
from collections import deque
from statistics import mean
from types import SimpleNamespace

import numpy as np
import pytest
from scripts import run

from data import prepare
from loader import document, open_split
from puzzles import PUZZLES, find_rows
from scorers import same_answer
from tokenizer import load_encoding


def rows(source, split="train", n=300, seed=0):
    return list(find_rows(source)(split, n, seed))


def bag(row):
    """The words of an instruction, in any order."""
    return tuple(sorted(row["instruction"].split()))


def list_answer(instruction):
    """By steps on a deque."""
    numbers, *steps = instruction.split(" | ")
    items = deque(numbers.split())
    for step in steps:
        if step == "reverse":
            items.reverse()
        elif step == "rotate":
            items.rotate(-1)
        elif step == "sort":
            items = deque(str(i) for i in range(10) for _ in range(items.count(str(i))))
        elif step == "dedupe":
            items = deque(item for i, item in enumerate(items) if item not in list(items)[:i])
        elif step == "swap" and len(items) > 1:
            first, second = items.popleft(), items.popleft()
            items.extendleft([first, second])
    return " ".join(items)


def product_of_matrices(instruction):
    """With a matrix for each arrangement."""
    result = np.arange(1, 6)
    for word in instruction.split()[1:]:
        result = np.eye(5, dtype=int)[[int(c) - 1 for c in word]] @ result
    return "".join(map(str, result))


def solutions(cells):
    """All of a Sudoku, {(row, column): digit or "."}, by trying."""
    place = next((place for place, digit in cells.items() if digit == "."), None)
    if place is None:
        return [" ".join("".join(cells[r, c] for c in range(4)) for r in range(4))]
    row, column = place
    near = [(r, c) for r, c in cells if r == row or c == column or (r // 2, c // 2) == (row // 2, column // 2)]
    near = {cells[other] for other in near}
    return [found for digit in {*"1234"} - near for found in solutions({**cells, place: digit})]


ANSWERS = {
    "addition": lambda text: str(eval(text)),
    "multiplication": lambda text: str(eval(text)),
    "arithmetic": lambda text: str(eval(text.removesuffix(" mod 10")) % 10),  # exact until the last step
    "lists": list_answer,
    "permutations": product_of_matrices,
    "sudoku4": lambda text: solutions({(r, c): d for r, row in enumerate(text.split()[1:]) for c, d in enumerate(row)}),
}


@pytest.mark.parametrize("name", PUZZLES)
def test_answers_are_right_and_the_dial_makes_puzzles_longer(name):
    _, _, least, most = PUZZLES[name]
    work = []
    for difficulty in least, least + 1, least + 4, most:
        made = rows(f"{name}:{difficulty}", n=100)
        for row in made:
            truth = ANSWERS[name](row["instruction"])
            assert [row["response"]] == truth if name == "sudoku4" else row["response"] == truth, row
            assert len(row["instruction"]) + len(row["response"]) < 1000
        work.append(mean(row["instruction"].count(".") or len(row["instruction"]) for row in made))
    assert work == sorted(work) and len({*work}) == 4


def test_the_last_digit_of_a_negative_number():
    found = [row for row in rows("arithmetic:2") if eval(row["instruction"].removesuffix(" mod 10")) < 0]
    assert len(found) > 30 and "7" in {row["response"] for row in found}


@pytest.mark.parametrize("name", PUZZLES)
def test_no_instance_is_in_both_splits(name):
    """At the least difficulty, of which there are the fewest; nor is 34 + 12 in one if 12 + 34 is in the other."""
    source = f"{name}:{PUZZLES[name][2]}"
    train, val = ({bag(row) for row in rows(source, split, 10_000)} for split in ("train", "val"))
    assert not train & val and len(val) > 200
    assert not train & {bag(row) for row in rows(source, "val", 1000, seed=1)}


@pytest.mark.parametrize("name", PUZZLES)
def test_seeds(name):
    source = f"{name}:{PUZZLES[name][2]}"
    for split in "train", "val":
        assert rows(source, split, 20) == rows(source, split, 20) == rows(source, split, 30)[:20]
        assert rows(source, split, 20) != rows(source, split, 20, seed=1)
    assert rows(source, n=0) == []


def test_the_held_out_are_like_the_others():
    """The hash picks no kind of puzzle: as many of each first digit and of each answer."""
    for source in "addition:3", "arithmetic:3", "permutations:3":
        shares = []
        for split in "train", "val":
            made = rows(source, split, 3000)
            shares.append(np.bincount([int(row["response"][-1]) for row in made], minlength=10) / 3000)
        assert abs(shares[0] - shares[1]).max() < 0.04


def test_as_a_source(tmp_path):
    """Alone, and several in a mixture; the task heldout tells right from wrong answers of each."""
    meta = prepare(tmp_path / "add", source="addition:6", n_problems=50, n_val_problems=7)
    assert [meta["splits"][split]["documents"] for split in ("train", "val")] == [50, 7]
    assert meta["splits"]["val"]["conditions"] == {"direct": 7}
    rules = [{"source": f"{name}:{PUZZLES[name][2]}", "repeat": 2} for name in PUZZLES] + [{"source": "problems"}]
    meta = prepare(tmp_path / "all", mixture=rules, n_problems=20, n_val_problems=5)
    assert meta["splits"]["train"]["documents"] == 20 * 7 and meta["files"][0]["name"] == "addition:2/train addition:2"
    encoding, split = load_encoding(tmp_path / "all"), open_split(tmp_path / "all", "val")
    for d in range(5 * len(PUZZLES)):
        ids, n_prefix = document(*split, d)
        question = SimpleNamespace(truth=encoding.decode(ids[n_prefix:-1]))
        wrong = question.truth[:-1] + str((int(question.truth[-1]) + 1) % 10)
        assert same_answer(question.truth, question) == {"score": 1.0, "invalid": False}
        assert same_answer(wrong, question)["score"] == same_answer(question.truth + " 1", question)["score"] == 0


@pytest.mark.parametrize(
    "source, sentence",
    [
        ("adition:6", "there is no puzzle 'adition' for the source adition:6, only addition, multiplication, "),
        ("addition", "addition has 2 to 100 digits, as in --source=addition:2, not ''"),
        ("addition:1", "addition has 2 to 100 digits, as in --source=addition:2, not '1'"),
        ("lists:999999999999", "lists has 1 to 100 steps"),
        ("sudoku4:-1", "sudoku4 has 2 to 12 blanks"),
        ("permutations:\u0663", "permutations has 2 to 100 permutations"),
        ("arithmetic:2:3", "arithmetic has 2 to 10 levels"),
    ],
)
def test_bad_names_and_difficulties(workplace, source, sentence):
    done = run(workplace, "data.py", "--dataset=x", f"--source={source}", ok=False)
    assert done.stderr.startswith("data.py: ") and sentence in done.stderr and done.stderr.count("\n") == 1
    with pytest.raises(ValueError, match=sentence[:30]):
        prepare(workplace / "y", mixture=[{"source": source}])


def test_paths_and_hub_ids_are_no_puzzles():
    assert not any(map(find_rows, ["openai/gsm8k", "x.jsonl", "C:\\x.jsonl", "C:/x.jsonl", "./addition", "mine"]))


def test_tasks_of_reasoning_gym(tmp_path, monkeypatch):
    """The package is an extra; here another stands in its place."""
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"^chain_sum needs the package reasoning-gym \(pip install reasoning-gym\): "):
        find_rows("reasoning_gym:chain_sum")

    class Task:
        def __init__(self, name, size, seed):
            if name != "coins":
                raise ValueError(f"Dataset '{name}' not registered")

        def __getitem__(self, i):
            return {"question": f"How many of {i % 40} coins?", "answer": str(i % 40)}

    monkeypatch.setitem(sys.modules, "reasoning_gym", SimpleNamespace(create_dataset=Task))
    with pytest.raises(ValueError, match="^reasoning_gym:nope cannot be made: Dataset 'nope' not registered$"):
        find_rows("reasoning_gym:nope")
    meta = prepare(tmp_path / "d", source="reasoning_gym:coins", n_problems=200, n_val_problems=20)
    assert meta["splits"]["train"]["documents"] == 200 and meta["splits"]["val"]["documents"] == 20
    train, val = ({row["response"] for row in rows("reasoning_gym:coins", split)} for split in ("train", "val"))
    assert val and not train & val and len(train | val) == 40
