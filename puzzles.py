"""Puzzles whose answer takes many steps and is asked for without working: what recurrence should help with.

    python data.py --dataset=add6 --source=addition:6     # 6-digit numbers -> data/add6
    mixture = [{"source": "permutations:4"}, {"source": "lists:3"}]     # in a config file: several at once

A puzzle of your own is a function of a random.Random and a difficulty that returns (instruction, response), and a line
in PUZZLES. Tasks of the reasoning-gym package are sources as well:
--source=reasoning_gym:basic_arithmetic.
"""

import random
import re
from functools import cache, partial, reduce
from itertools import islice
from operator import add, and_, eq, mul

from common import errors_name_file
from sources import held_out, word_problems


# ---- the puzzles ----
def two_numbers(rng, digits, sign, operation):
    """Two numbers of so many digits, and their sum or product. There are n * (n + 1) / 2 pairs of n = 9 * 10**(digits
    - 1) numbers, so 4,095 of 2 digits and 405,450 of 3."""
    a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
    return f"{a} {sign} {b}", str(operation(a, b))


def arithmetic(rng, depth):
    """Nested +, - and * of the digits 1 to 9, and the last digit of the value (that of -3 is 7). One side of the
    outermost operation has depth - 1 levels, the other any number below depth. 243 instances have depth 1, and 190,269
    depth 2. A guess is right for up to a fifth of them: 0 is the most frequent answer."""

    def expression(depth):
        if not depth:
            return str(digit := rng.randint(1, 9)), digit
        sides = [expression(depth - 1), expression(rng.randrange(depth))]
        rng.shuffle(sides)
        (left, a), (right, b) = sides
        sign, value = rng.choice([("+", a + b), ("-", a - b), ("*", a * b)])
        return f"({left}{sign}{right})", value % 10

    text, value = expression(depth)
    return f"{text} mod 10", str(value)


LIST_STEPS = {
    "reverse": lambda items: items[::-1],
    "rotate": lambda items: items[1:] + items[:1],  # the first goes to the end
    "swap": lambda items: items[1::-1] + items[2:],  # the first two change places
    "dedupe": lambda items: list(dict.fromkeys(items)),  # of equal digits the first stays
    "sort": sorted,  # only as the first step, since it undoes what reverse, rotate and swap did before
}


def lists(rng, steps):
    """Six digits, and what so many steps make of them, one after the other. 5 * 4**(steps - 1) * 10**6 instances."""
    items = rng.choices("0123456789", k=6)
    names = rng.choices([*LIST_STEPS], k=1) + rng.choices([*LIST_STEPS][:-1], k=steps - 1)
    instruction = " | ".join([" ".join(items), *names])
    for name in names:
        items = LIST_STEPS[name](items)
    return instruction, " ".join(items)


def permutations(rng, n):
    """n arrangements of five things, and what all of them do to 12345: 31245 puts the third first, the first second
    and the second third. 120**n instances. Composition in this group is complete for the complexity class
    NC1 (Barrington 1989), so no network of fixed depth is likely to do it for every n."""
    words, result = ["".join(rng.sample("12345", 5)) for _ in range(n)], "12345"
    for word in words:
        result = "".join(result[int(place) - 1] for place in word)
    return f"compose {' '.join(words)}", result


@cache
def solved_sudokus():
    """The 288 solved 4x4 Sudokus, 16 digits each, and {(cell, digit): those that have it, as the bits of a number}."""
    found, bits = [""], {(cell, digit): 0 for cell in range(16) for digit in "1234"}
    for cell in range(16):
        units = [(i // 4, i % 4, (i // 8, i % 4 // 2)) for i in range(cell + 1)]  # row, column and box
        peers = [i for i in range(cell) if any(map(eq, units[i], units[cell]))]
        found = [grid + digit for grid in found for digit in "1234" if all(grid[i] != digit for i in peers)]
    for i, grid in enumerate(found):
        for place in enumerate(grid):
            bits[place] |= 1 << i
    return found, bits


def sudoku4(rng, blanks):
    """A 4x4 Sudoku with so many blanks and one solution. What is held out are puzzles, of which 2 blanks make 34,560;
    their 288 solutions are in training, too."""
    found, bits = solved_sudokus()
    while True:
        grid, holes = rng.choice(found), {*rng.sample(range(16), blanks)}
        solutions = reduce(and_, (bits[cell, digit] for cell, digit in enumerate(grid) if cell not in holes))
        if solutions.bit_count() == 1:
            puzzle = "".join("." if cell in holes else digit for cell, digit in enumerate(grid))
            return "sudoku " + " ".join(re.findall("....", puzzle)), " ".join(re.findall("....", grid))


PUZZLES = {  # the function; what its difficulty counts; the least, with over 4,000 instances; the most, for 1,024 bytes
    "addition": (partial(two_numbers, sign="+", operation=add), "digits", 2, 100),
    "multiplication": (partial(two_numbers, sign="*", operation=mul), "digits", 2, 100),
    "arithmetic": (arithmetic, "levels", 2, 10),
    "lists": (lists, "steps", 1, 100),
    "permutations": (permutations, "permutations", 2, 100),
    "sudoku4": (sudoku4, "blanks", 2, 12),
}


# ---- puzzles as a source ----
def find_rows(source):
    """The function (split, n, seed) -> rows of a source that is made here: "problems", "addition:6" or, say,
    "reasoning_gym:chain_sum". None where it is something else. Raises ValueError."""
    if source == "problems":
        return word_problems
    name, _, difficulty = source.partition(":")
    if source not in PUZZLES and not re.fullmatch(r"\w+:[^/\\]*", source):
        return None
    if name == "reasoning_gym":
        return partial(puzzle_rows, source, gym_task(difficulty))
    if name not in PUZZLES:
        raise ValueError(f"there is no puzzle '{name}' for the source {source}, only {', '.join(PUZZLES)}")
    make, what, least, most = PUZZLES[name]
    if not (re.fullmatch("[0-9]{1,3}", difficulty) and least <= int(difficulty) <= most):
        raise ValueError(f"{name} has {least} to {most} {what}, as in --source={name}:{least}, not '{difficulty}'")
    return partial(puzzle_rows, source, lambda rng: make(rng, int(difficulty)))


def puzzle_rows(source, make, split, n, seed):
    """Yields n puzzles as {"instruction", "response", "condition"}; make(random.Random) makes one. The words of an
    instruction, in any order, decide its split, so no puzzle of "val" is in "train", nor 34 + 12 if 12 + 34 is. Yields
    fewer of a task of reasoning-gym of which too few differ."""
    rng = random.Random(f"{source} {split} {seed}")
    made = (make(rng) for _ in range(200 * n))  # of which about a tenth is for val
    kept = (pair for pair in made if held_out(" ".join(sorted(pair[0].split()))) == (split == "val"))
    for instruction, response in islice(kept, n):
        yield {"instruction": instruction, "response": response, "condition": "direct"}


def gym_task(name):
    """The function random.Random -> (instruction, response) of a task of reasoning-gym. Raises ValueError."""
    try:
        from reasoning_gym import create_dataset
    except ImportError as e:
        raise ValueError(f"{name} needs the package reasoning-gym (pip install reasoning-gym): {e}") from None
    with errors_name_file(f"reasoning_gym:{name}", "cannot be made"):
        task = create_dataset(name, size=2**31, seed=0)

    def make(rng):
        with errors_name_file(f"reasoning_gym:{name}", "fails"):
            row = task[rng.randrange(2**31)]
            return row["question"], row["answer"]

    return make
