"""Where rows come from: the embedded word problems, local files, the Hugging Face hub."""

import codecs
import json
import random
import re
import zlib
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from common import errors_name_file, local_directory, one_line
from tokenizer import CONDITIONS, condition_tags

KINDS = (".jsonl", ".json", ".parquet")
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


def held_out(text):
    """Whether what a text stands for is kept for "val": one in ten."""
    return zlib.crc32(text.encode()) % 10 == 0


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
        if least > 0 and held_out(combination) == (split == "val"):
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
class File(NamedTuple):
    """Where rows come from: a file, or what one name on the hub stands for."""

    name: str
    items: Callable  # () -> an iterator of rows, of lines of JSON (bytes), and of texts that say what is wrong with one
    path: Path | None = None
    size: int = 0  # bytes of its rows, about; 0: unknown
    unit: str = "row"  # that an item is, for sentences
    first: int = 0  # number of the first item

    def where(self, number):
        return f"{self.path or self.name}, {self.unit} {number}"


def find_files(source, config="", split="train"):
    """The Files of a source: a .jsonl, .json or .parquet file; those of a directory whose path in it has a part that
    begins with the split; for a dataset on the hub, the rows of its configuration and split as one File. If split is
    "", all .jsonl and .parquet files of a directory, or of a repository on the hub, which is downloaded."""
    path = Path(source)
    if path.suffix in KINDS and not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_file():
        if path.suffix not in KINDS:
            raise ValueError(f"{path} is neither .jsonl, .json nor .parquet")
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty")
        return [open_file(path.name, path)]
    if not path.is_dir() and split:
        return [File(f"{source} {config} {split}".replace("  ", " "), partial(hub_rows, source, config, split))]
    path = local_directory(source, "*.jsonl", "*.parquet", repo_type="dataset")
    kinds = KINDS if split else (".jsonl", ".parquet")  # the .json of a repository describe it
    files = (file for file in path.rglob("*") if file.suffix in kinds and file.is_file())
    names = {file.relative_to(path).as_posix(): file for file in files}
    found = [name for name in sorted(names) if any(part.startswith(split) for part in name.split("/"))]
    if not found:
        named = f" named after the split '{split}'" if split else ""
        raise FileNotFoundError(f"there is no {', '.join(kinds[:-1])} or {kinds[-1]} file{named} in {source}")
    return [open_file(name, names[name]) for name in found]


def open_file(name, path):
    """The File of a path."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        with errors_name_file(path):
            meta = parquet.read_metadata(path)
            size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
            names = meta.schema.to_arrow_schema().names
            if len({*names}) < len(names):
                raise ValueError(f"two of its columns have the same name: {', '.join(names)[:99]}")
        return File(name, partial(parquet_rows, path), path, size)
    size = path.stat().st_size
    if path.suffix == ".json":
        with open(path, "rb") as file:
            if file.read(1000).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                return File(name, partial(json_rows, path), path, size)
    return File(name, partial(json_lines, path), path, size, "line", 1)


def json_lines(path):
    """The items of a file of lines; of one that is too long, only that it is."""
    with open(path, "rb") as file:
        for line in iter(lambda: file.readline(MAX_TEXT_BYTES + 1), b""):
            if len(line) > MAX_TEXT_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_TEXT_BYTES)
                line = f"longer than {MAX_TEXT_BYTES:,} bytes"
            yield line


def json_rows(path):
    """The items of a file that is one list."""
    with errors_name_file(path):
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    for row in rows:
        yield row if isinstance(row, dict) else "not a JSON object"


def parquet_rows(path):
    """The items of a Parquet file. Few are in memory at a time, however large they are."""
    with errors_name_file(path):
        import pyarrow.parquet as parquet

        file = parquet.ParquetFile(path, buffer_size=2**20)
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        row = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1)
        for batch in file.iter_batches(int(min(256, max(1, MAX_TEXT_BYTES / max(1, row))))):
            n = len(batch) if batch.nbytes < MAX_TEXT_BYTES else 1
            for first in range(0, len(batch), n):
                yield from batch.slice(first, n).to_pylist()


def hub_rows(source, config, split):
    """The items of a dataset on the hub, read as they come; no copy is written."""
    try:
        import datasets

        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # else it prints what it raises, too
        rows = datasets.load_dataset(source, config or None, split=split, streaming=True)
    except Exception as e:
        cause = e.__cause__ or e
        error = f"{type(cause).__name__}: {one_line(cause)}"
        raise ValueError(f"cannot load the dataset {source}, split {split}: {error}") from None
    with errors_name_file(f"{source} {split}"):
        yield from rows


def item_size(item):
    """Bytes of an item, about."""
    if isinstance(item, (dict, list)):
        return sum(map(item_size, item.values() if isinstance(item, dict) else item))
    return len(item) if isinstance(item, (str, bytes)) else 8


def parse(item):
    """An item of a File -> a row, a text that says what is wrong with it, or None for a blank line."""
    if not isinstance(item, bytes):
        return item
    if b"\0" in item:
        return "a NUL byte"
    if item.isspace():
        return None
    try:
        row = json.loads(item.decode("utf-8-sig"))
        return row if isinstance(row, dict) else "not a JSON object"
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "not a JSON object"


def read_rows(source, config="", split="train"):
    """Yields (where, row) of a source's Files; in place of a bad row, what is wrong with it."""
    for file in find_files(source, config, split):
        for number, item in enumerate(file.items(), file.first):
            if (row := parse(item)) is not None:
                yield file.where(number), row


# ---- a row -> a pair ----
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
            advice = f"; name them as in --fields=\"{example}\"" if len(example) > 1 else ""
            return f"no field '{name}': the row's fields are {there}{advice}"
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
        return f"unknown condition: {condition!r}; there are {', '.join(CONDITIONS)}"
    return instruction, response, condition
