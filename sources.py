"""Where rows come from: the embedded word problems, local files, the Hugging Face hub."""

import codecs
import json
import random
import re
import zlib
from itertools import chain, islice
from pathlib import Path

from common import errors_name_file, one_line
from tokenizer import condition_tags

MAX_TEXT_BYTES = 2**24  # of a line

# ---- word problems ----
NAMES = "Tom Anna Ben Mia Sam Lucy Omar Kate Leo Nina Max Ella Raj Zoe Hugo Ivy Paul Rosa Finn Mei".split()
THINGS = "apples books coins pens cards shells stamps eggs cakes balls stars nuts plums kites rings".split()
PROBLEMS = [  # a text and its steps; a step takes two of the numbers a, b, c and x, the result of the step before
    ("{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?", "a+b"),
    ("{n} has {a} {t}. {m} has {b}. How many {t} do they have together?", "a+b"),
    ("{n} had {a} {t} and gave {m} {b}. How many {t} are left?", "a-b"),
    ("There are {a} {t}. {n} takes {b} of them. How many are left?", "a-b"),
    ("{n} has {a} bags with {b} {t} in each. How many {t} is that?", "a*b"),
    ("A box holds {b} {t}. How many {t} are in {a} boxes?", "a*b"),
    ("{n} shares {a} {t} among {b} friends. How many does each get?", "a/b"),
    ("{n} puts {a} {t} into bags of {b}. How many bags is that?", "a/b"),
    ("{n} has {a} {t}, buys {b} and then eats {c}. How many {t} are left?", "a+b x-c"),
    ("{n} had {a} {t}, lost {b} and found {c}. How many {t} does {n} have now?", "a-b x+c"),
    ("{n} has {a} bags of {b} {t} and {c} more. How many {t} is that?", "a*b x+c"),
    ("{n} buys {a} packs of {b} {t} and gives {m} {c}. How many {t} are left?", "a*b x-c"),
    ("{n} shares {a} {t} among {b} boxes and adds {c} to one. How many are in it?", "a/b x+c"),
    ("{n} has {a} {t} and {m} {b}. They share them among {c} friends. How many does each get?", "a+b x/c"),
]
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}


def draw_numbers(rng, steps, split):
    """({"a", "b", "c", "x"}, the steps worked out), with every result a whole number above 0."""
    while True:
        number = {"a": rng.randint(2, 20), "b": rng.randint(2, 20), "c": rng.randint(2, 10)}
        if "*" in steps:
            number["a"], number["b"] = rng.randint(2, 10), rng.randint(2, 10)
        if "/" in steps:
            divisor = "b" if "a/b" in steps else "c"
            number[divisor] = rng.randint(2, 10)
            whole = number[divisor] * rng.randint(2, 10)
            number["a"] = whole - number["b"] if divisor == "c" else whole
        combination = f"{steps}: {' '.join(str(number[key]) for key in 'abc' if key in steps)}"
        working, least = [], number["a"] - 1
        for left, operation, right in steps.split():
            result = OPERATIONS[operation](number[left], number[right])
            working.append(f"{number[left]}{operation}{number[right]}={result}")
            number["x"], least = result, min(least, result)
        if least > 0 and (zlib.crc32(combination.encode()) % 10 == 0) == (split == "val"):
            return number, working


def word_problems(split, n, seed):
    """Yields n problems as {"instruction", "response", "condition"}; a response works the steps out and ends in
    "#### answer". One in ten combinations of numbers and operations is kept for "val": no "train" problem has it."""
    rng = random.Random(f"{split} {seed}")
    for _ in range(n):
        text, steps = rng.choice(PROBLEMS)
        number, working = draw_numbers(rng, steps, split)
        name, other = rng.sample(NAMES, 2)
        instruction = text.format(n=name, m=other, t=rng.choice(THINGS), **number)
        response = "\n".join([*working, f"#### {number['x']}"])
        yield {"instruction": instruction, "response": response, "condition": "cot"}


# ---- files and the hub ----
def read_rows(source, config="", split="train"):
    """Iterates over (where, row) of a .jsonl, .json or .parquet file, of a directory of such files named after the
    split, or of a dataset on the hub. A row is a dict, or for a bad line of .jsonl a text that says why."""
    path, kinds = Path(source), (".jsonl", ".json", ".parquet")
    if path.suffix in kinds and not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_file() and path.suffix not in kinds:
        raise ValueError(f"{path} is neither .jsonl, .json nor .parquet")
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    if path.is_dir() and not any(file.suffix in kinds for file in path.rglob(f"*{split}*")):
        raise FileNotFoundError(f"there is no .jsonl, .json or .parquet file named after the split '{split}' in {path}")
    files = sorted(path.glob(f"{split}*.jsonl")) if path.is_dir() else [path] if path.suffix in kinds[:2] else []
    if files:  # datasets would not say in which line an error is, and crashes where a .json file is just `null`
        yield from chain.from_iterable(map(read_lines, files))
        return
    try:
        import datasets

        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # else it prints what it raises, too
        tables = [path] if path.is_file() else sorted(path.glob(f"{split}*.parquet"))  # to datasets, `dev` is no name
        if tables:
            rows = datasets.load_dataset("parquet", data_files=[*map(str, tables)], split="train")
        else:
            rows = datasets.load_dataset(str(source), None if path.exists() else config or None, split=split)
    except Exception as e:
        cause = e.__cause__ or e
        error = f"{type(cause).__name__}: {one_line(cause)}"
        raise ValueError(f"cannot load the dataset {source}, split {split}: {error}") from None
    with errors_name_file(f"{source} {split}"):
        for number, row in enumerate(rows):
            yield f"{source} {split}, row {number}", row


def read_lines(file):
    """read_rows() of a .jsonl file, or of a .json file: that is one list, or such lines."""
    with open(file, "rb") as lines:
        if file.suffix == ".json" and lines.read(1000).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            with errors_name_file(file):
                rows = json.loads(file.read_text(encoding="utf-8-sig"))
            for number, row in enumerate(rows):
                yield f"{file}, row {number}", row if isinstance(row, dict) else "not a JSON object"
            return
        lines.seek(0)
        for number, line in enumerate(iter(lambda: lines.readline(MAX_TEXT_BYTES + 1), b""), 1):
            where = f"{file}, line {number}"
            if len(line) > MAX_TEXT_BYTES:
                while line and not line.endswith(b"\n"):
                    line = lines.readline(MAX_TEXT_BYTES)
                yield where, f"longer than {MAX_TEXT_BYTES:,} bytes"
            elif b"\0" in line:
                yield where, "a NUL byte"
            elif not line.isspace():
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                    yield where, row if isinstance(row, dict) else "not a JSON object"
                except UnicodeDecodeError:
                    yield where, "not UTF-8"
                except (ValueError, RecursionError):
                    yield where, "not a JSON object"


def text_fault(text, key):
    """What is wrong with a text: its kind, and details after a colon. None where nothing is."""
    if not text.strip():
        return f"empty {key}"
    if len(text) > MAX_TEXT_BYTES:
        return f"{key} longer than {MAX_TEXT_BYTES:,} characters"
    if "\0" in text:
        return f"a NUL character in the {key}"
    if not text.isascii() and re.search("[\ud800-\udfff]", text):  # "\\ud800" in JSON
        return f"half a surrogate pair in the {key}"
    return None


def to_pair(row, fields, condition="", gsm8k_answer="", strip_annotations=False):
    """A row of read_rows() -> (instruction, response, condition), or a text that says what is wrong with it: its kind,
    and details after a colon. `fields` has the row's names for these three, where they differ; such a field must be in
    every row. `condition` is for rows without one.
    `gsm8k_answer` is for responses that end in "#### N": "cot" keeps the working, "direct" only N."""
    if isinstance(row, str):
        return row
    names = {key: fields.get(key, key) for key in ("instruction", "response", "condition")}
    for key, name in names.items():
        if name not in row and (key, name) != ("condition", "condition"):
            there = ", ".join(map(repr, islice(row, 8))) or "none"
            example = dict(zip(("instruction", "response"), row))
            return f"no field '{name}': the row's fields are {there}; name them as in --fields=\"{example}\""
    for key in "instruction", "response":
        if not isinstance(row[names[key]], str):
            return f"no text in the field '{names[key]}'"
        if fault := text_fault(row[names[key]], key):
            return fault
    instruction, response = row[names["instruction"]], row[names["response"]]
    if strip_annotations:
        response = re.sub(r"<<[^<>]*>>", "", response)
    if gsm8k_answer and "####" not in response:
        return "no #### answer"
    if gsm8k_answer == "direct":
        response = response.rpartition("####")[2].strip()
    condition = row.get(names["condition"]) or condition or gsm8k_answer
    try:
        condition_tags(condition)
    except (ValueError, AttributeError):
        return f"unknown condition: {condition!r}"
    return instruction, response, condition
