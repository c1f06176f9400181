"""
Puzzles whose answer takes many steps and is asked for without working: what recurrence should help
with. Writes train.jsonl and val.jsonl into a directory, which data.py reads.

$ python -m tools.puzzles --kind=addition --level=6 --out=add6
$ python data.py --dataset=add6 --source=add6 --val_split=val

A puzzle of your own is a function (random.Random, level) -> (instruction, response), and a line in
PUZZLES. No puzzle of val is in train, nor 34 + 12 if val has 12 + 34.
"""

from configurator import configure

import json
import random
import re
import sys
import zlib
from itertools import islice
from pathlib import Path

from data import word_problems

# -----------------------------------------------------------------------------
kind = "addition"  # multiplication, arithmetic, lists, permutations, sudoku4, or data.py's problems
level = 4  # digits, depth, steps, permutations or blanks: see PUZZLES
out = "puzzles"  # the directory
n_train = 40000
n_val = 1000
seed = 1337
settings = configure(globals())
# -----------------------------------------------------------------------------


def two_numbers(rng, digits):
    least = 10 ** (digits - 1)
    return rng.randrange(least, 10 * least), rng.randrange(least, 10 * least)


def addition(rng, digits):
    a, b = two_numbers(rng, digits)
    return f"{a} + {b}", str(a + b)


def multiplication(rng, digits):
    a, b = two_numbers(rng, digits)
    return f"{a} * {b}", str(a * b)


def expression(rng, depth):
    """(text, its value mod 10) of nested +, - and * of digits; one side has depth - 1 levels."""
    if depth == 0:
        digit = rng.randint(1, 9)
        return str(digit), digit
    sides = [expression(rng, depth - 1), expression(rng, rng.randrange(depth))]
    rng.shuffle(sides)
    (left, a), (right, b) = sides
    values = [
        ("+", a + b),
        ("-", a - b),
        ("*", a * b),
    ]
    sign, value = rng.choice(values)
    return f"({left}{sign}{right})", value % 10


def arithmetic(rng, depth):
    """The last digit of an expression; that of -3 is 7."""
    text, value = expression(rng, depth)
    return f"{text} mod 10", str(value)


LIST_STEPS = {
    "reverse": lambda items: items[::-1],
    "rotate": lambda items: items[1:] + items[:1],
    "swap": lambda items: items[1::-1] + items[2:],  # the first two change places
    "dedupe": lambda items: list(dict.fromkeys(items)),
    "sort": sorted,  # only as the first step, since it undoes the others
}


def lists(rng, steps):
    """Six digits, and what the steps make of them, one after the other."""
    items = rng.choices("0123456789", k=6)
    names = rng.choices(list(LIST_STEPS))
    names += rng.choices(list(LIST_STEPS)[:-1], k=steps - 1)
    instruction = " | ".join([" ".join(items), *names])
    for name in names:
        items = LIST_STEPS[name](items)
    return instruction, " ".join(items)


def permutations(rng, n):
    """
    What n arrangements do to 12345; 31245 puts the third first. Composition in this group is
    complete for NC1 (Barrington 1989), so no network of fixed depth is likely to do it for every n.
    """
    words = ["".join(rng.sample("12345", 5)) for _ in range(n)]
    result = "12345"
    for word in words:
        result = "".join(result[int(place) - 1] for place in word)
    return f"compose {' '.join(words)}", result


def solved_sudokus():
    """The 288 of 4x4, 16 digits each."""
    found = [""]
    for cell in range(16):
        peers = []
        for i in range(cell):
            same_box = (i // 8, i % 4 // 2) == (cell // 8, cell % 4 // 2)
            if i // 4 == cell // 4 or i % 4 == cell % 4 or same_box:
                peers.append(i)
        longer = [grid + digit for grid in found for digit in "1234"]
        found = [grid for grid in longer if all(grid[i] != grid[cell] for i in peers)]
    return found


SOLVED = solved_sudokus()


def sudoku4(rng, blanks):
    """A 4x4 Sudoku with one solution. Puzzles are held out; all solutions are in train, too."""
    while True:
        grid = rng.choice(SOLVED)
        holes = rng.sample(range(16), blanks)
        puzzle = "".join("." if i in holes else digit for i, digit in enumerate(grid))
        if len(re.findall(puzzle, "\n".join(SOLVED))) == 1:
            rows = re.findall("....", puzzle)
            solved = re.findall("....", grid)
            return f"sudoku {' '.join(rows)}", " ".join(solved)


PUZZLES = {  # the function, the least level with thousands of puzzles, the most for 1,024 bytes
    "addition": (addition, 2, 100),
    "multiplication": (multiplication, 2, 100),
    "arithmetic": (arithmetic, 2, 10),
    "lists": (lists, 2, 100),
    "permutations": (permutations, 2, 100),
    "sudoku4": (sudoku4, 2, 12),
}


def puzzles(split):
    """Yields rows without end. The words of an instruction, in any order, decide its split."""
    make, _, _ = PUZZLES[kind]
    rng = random.Random(f"{kind}:{level} {split} {seed}")
    while True:
        instruction, response = make(rng, level)
        words = " ".join(sorted(instruction.split()))
        held_out = zlib.crc32(words.encode()) % 10 == 0
        if held_out == (split == "val"):
            yield {"instruction": instruction, "response": response, "condition": "direct"}


if __name__ == "__main__":
    if kind not in (*PUZZLES, "problems"):
        sys.exit(f"there is no kind {kind}, only {', '.join(PUZZLES)} and problems")
    _, least, most = PUZZLES.get(kind, (None, level, level))
    if not least <= level <= most:
        sys.exit(f"the level of {kind} is from {least} to {most}, not {level}")
    Path(out).mkdir(parents=True, exist_ok=True)
    for split, n in ("train", n_train), ("val", n_val):
        rows = islice(puzzles(split), n)
        if kind == "problems":
            rows = word_problems(split, n, seed)
        with open(Path(out, f"{split}.jsonl"), "w") as file:
            for row in rows:
                print(json.dumps(row), file=file)
    print(f"{out} has {n_train:,} rows in train.jsonl and {n_val:,} in val.jsonl")
