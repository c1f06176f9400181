"""
Instruction/response pairs -> tokens -> the bins that loader.py reads.

$ python data.py                                        # the word problems below -> data/problems
$ python data.py --dataset=mine --source=pairs.jsonl    # or .jsonl.gz, .json, .parquet, a directory
$ python data.py config/gsm8k.py                        # from the Hugging Face hub
$ python data.py config/hrm1b.py                        # a mixture of hundreds of files

A pair is found by the names of its fields: see to_pair(). data/<dataset>/ then holds train.bin,
train.idx, val.bin and val.idx (see loader.py), tokenizer.json, and meta.json with the counts that
are printed. It replaces a dataset of the same name, whole or not at all. If it is killed, the same
command goes on with what is missing. docs/data.md has more.
"""

from configurator import configure

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase
from math import ceil
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from pyarrow.parquet import ParquetFile
from tqdm import tqdm

from tokenizer import CONDITIONS, get_tokenizer

# -----------------------------------------------------------------------------
dataset = "problems"  # the name of what is made: data/<dataset>
source = ""  # a file, a directory, or a dataset of the hub; "": the word problems
source_config = ""  # the hub dataset's configuration
split = "train"  # of the source; "": all files of a directory, or of a repository of the hub
val_split = ""  # of the source; "": val_fraction of the documents
val_fraction = 0.01  # by a hash of the instruction: all answers to one are in the same split
mixture = []  # rules for some of the files: see find_parts()
fields = {}  # the source's names for instruction, response, condition; {}: found, see to_pair()
condition = ""  # of rows that have none: direct, cot, synth, noisy, or several: "synth,cot"
skip_bad = False  # leave bad rows out and count them; otherwise the first one ends the preparation
tokenizer = "bytes"  # or tiktoken's gpt2, ..., or a directory or hub id with a tokenizer.json
block_size = 1024  # tokens of a row in train.py; a document may have one more
too_long = "truncate"  # longer documents; or "drop"
n_problems = 40000
n_val_problems = 1000
workers = 0  # processes; 0: one per core
batch_size = 0  # of train.py; with max_iters, the report says how often a document is seen
max_iters = 0
seed = 1337
settings = configure(globals())

SLICE = 2**25  # bytes of a source file that a process takes at a time; no line may be longer
ROWS = 16  # rows of a table that a process has in memory at a time
KINDS = (".jsonl", ".jsonl.gz", ".parquet", ".json")
BINS = ("train.bin", "train.idx", "val.bin", "val.idx")
FILES = (*BINS, "meta.json", "tokenizer.json", "tokenizer_config.json")

# -----------------------------------------------------------------------------
# word problems

NAMES = "Tom Anna Ben Mia Sam Lucy Omar Kate Leo Nina Max Ella Raj Zoe Hugo Ivy Paul Rosa Finn Mei".split()
THINGS = "apples books coins pens cards shells stamps eggs cakes balls stars nuts plums kites rings".split()
# a text and its steps; a step takes two of the numbers a, b, c and x, the result of the step before
PROBLEMS = [
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


def word_problems(split, n, seed):
    """
    Yields n rows whose response works the steps out and ends in "#### answer". One in ten
    combinations of numbers and steps is for val, and train has none of those.
    """
    rng = random.Random(f"{split} {seed}")
    draw = rng.randint
    for _ in range(n):
        text, steps = rng.choice(PROBLEMS)
        found = False
        while not found:
            a, b, c = draw(2, 20), draw(2, 20), draw(2, 10)
            if "*" in steps:
                a, b = draw(2, 10), draw(2, 10)
            if "a/b" in steps:
                b = draw(2, 10)
                a = b * draw(2, 10)
            if "x/c" in steps:
                c = draw(2, 10)
                a = c * draw(2, 10) - b
            number = {"a": a, "b": b, "c": c}
            used = [str(number[name]) for name in "abc" if name in steps]
            held_out = zlib.crc32(f"{steps}: {' '.join(used)}".encode()) % 10 == 0
            found = held_out == (split == "val") and a > 1
            working = []
            for left, sign, right in steps.split():
                a, b = number[left], number[right]
                x = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
                working.append(f"{a}{sign}{b}={x}")
                number["x"] = x
                found = found and x > 0
        name, other = rng.sample(NAMES, 2)
        instruction = text.format(n=name, m=other, t=rng.choice(THINGS), **number)
        response = "\n".join([*working, f"#### {x}"])
        yield {"instruction": instruction, "response": response, "condition": "cot"}


# -----------------------------------------------------------------------------
# a row -> a pair

LAYOUTS = [
    ("instruction", "response"),
    ("instruction", "output"),
    ("question", "answer"),
    ("prompt", "completion"),
    ("messages",),  # a turn of a user and one of an assistant
    ("conversations",),
]
OPTIONAL = ("input", "context", "system")  # joined to the rest of the instruction by a blank line


def to_pair(row):
    """A row -> (instruction, response, the fields they come from). Edit it for rows of your own."""
    found = [list(names) for names in LAYOUTS if row.keys() >= set(names)]
    if not found:
        example = dict(zip(["instruction", "response"], row))
        hint = f'name one as in --fields="{example}"'
        raise ValueError(f"no known pair of fields: {', '.join(row)}; {hint}")
    used = found[0]
    if len(used) == 1:
        turns = row[used[0]]
        roles = [turn.get("role") or turn.get("from") for turn in turns]
        texts = [turn.get("content") or turn.get("value") for turn in turns]
        names = " ".join(map(str, roles))
        if names.removeprefix("system ") not in ("user assistant", "human gpt"):
            raise ValueError(f"several turns, not one of a user and one of an assistant: {names}")
    else:
        if used[0] == "instruction":
            used[1:1] = [name for name in OPTIONAL[:2] if name in row]
        roles = used
        texts = [row[name] for name in used]
    parts = [(role, text) for role, text in zip(roles, texts) if text or role not in OPTIONAL]
    for role, text in parts:
        if not isinstance(text, str):
            raise ValueError(f"no text in the field {role}")
        if not text.strip():
            raise ValueError(f"empty {role}")
    *instruction, response = [text for _, text in parts]
    return "\n\n".join(instruction), response, used


def to_condition(value):
    """A condition as people write it -> "synth,cot". None and "" are none."""
    value = "" if value is None else value
    tags = [tag.strip() for tag in str(value).split(",")]
    if not isinstance(value, str) or not set(tags) <= {"", *CONDITIONS}:
        raise ValueError(f"unknown condition: {value!r}; there are {', '.join(CONDITIONS)}")
    return ",".join(tags)


def parse(item):
    """What read() yields -> a row, or None of a blank line. Raises any exception on a bad row."""
    if isinstance(item, Exception):
        raise item
    if isinstance(item, bytes):
        if not item.strip():
            return None
        item = json.loads(item.decode("utf-8-sig"))
    if not isinstance(item, dict):
        raise ValueError("not a JSON object")
    return item


def to_documents(row, rule):
    """A row, or None -> a list of (instruction, response, condition, fields used)."""
    rows = rule.rows(row) if row and rule.rows else row
    if isinstance(rows, dict):
        rows = [rows]
    documents = []
    for row in rows or []:
        if rule.fields:
            names = {"instruction": "instruction", "response": "response", **rule.fields}
            named = {key: row[name] for key, name in names.items()}
            row = {"condition": row.get("condition"), **named}
        instruction, response, used = to_pair(row)
        tags = to_condition(row.get("condition")) or to_condition(rule.condition)
        documents.append((instruction, response, tags, used))
    return documents


# -----------------------------------------------------------------------------
# the mixture and its files

PER_RULE = "source source_config split val_split fields condition skip_bad too_long".split()


def find_parts():
    """
    The source files, each with the first rule that fits its name. Rules stand in a config file:

        mixture = [
            dict(files="flan__*", cap=5000),  # at most 5,000 documents of each file per epoch
            dict(files=["gsm8k_*", "math_*"], repeat=10),
            dict(source="openai/gsm8k", source_config="main", rows=to_rows),  # a source of its own
        ]

    rows is a function: a row -> a row, a list of rows, or None. A rule may also have a name, and
    the settings in PER_RULE; with one of the first four it reads a source, or a split, of its own.
    A file without a rule gives all of its documents, once.
    """
    defaults = {"name": "", "files": ["*"], "cap": 0, "repeat": 1, "rows": None}
    for key in PER_RULE:
        defaults[key] = globals()[key]
    groups, shared = [], []
    for given in [*mixture, {}]:  # the last rule is for files without one
        for key in given.keys() - defaults.keys():
            sys.exit(f"a rule of mixture has no {key}; it may have {', '.join(defaults)}")
        rule = SimpleNamespace(**{**defaults, **given})
        if isinstance(rule.files, str):
            rule.files = [rule.files]
        rule.name = rule.name or given.get("source") or " ".join(rule.files)
        if rule.cap not in range(2**63) or rule.repeat not in range(1, 2**31):
            sys.exit(f"rule {rule.name}: cap must be 0 or more and repeat 1 or more, whole numbers")
        if rule.too_long not in ("truncate", "drop"):
            sys.exit(f"rule {rule.name}: too_long must be truncate or drop, not {rule.too_long}")
        if given.keys() & set(PER_RULE[:4]):
            groups.append([rule])
        else:
            shared.append(rule)
    if source or len(shared) > 1 or not groups:
        groups.append(shared)

    parts = []
    for rules in groups:
        for part in open_source(rules[-1]):
            for rule in rules:
                if any(fnmatchcase(f"/{part.name}", f"*/{pattern}") for pattern in rule.files):
                    part.rule = rule
                    parts.append(part)
                    break
        used = [part.rule for part in parts]
        for rule in rules:
            if rule not in used and rule is not shared[-1]:
                sys.exit(f"{rule.source} has no file, or none is left, for the rule {rule.name}")
    return parts


def open_source(rule):
    """
    Yields a source's files, or its splits on the hub. size counts what read() has slices of: bytes
    of a .jsonl, row groups of a .parquet, rows of the hub.
    """
    if not rule.source:
        sys.exit(f"--source=... tells what data/{dataset} is made of")
    path = Path(rule.source)
    if path.is_file() != path.name.endswith(KINDS):
        sys.exit(f"{path} is not there, or is none of {', '.join(KINDS)}")
    if rule.split == "" and not path.exists():
        path = Path(from_hub(rule, ""))
    splits = {rule.split: val_fraction}
    if rule.val_split:
        splits = {rule.split: 0, rule.val_split: 1}
    names = set()
    for split, val_share in splits.items():
        if path.exists():
            root = path.parent if path.is_file() else path
            parts = [open_file(root, name) for name in find_files(path, split)]
        else:
            part = SimpleNamespace(name=f"{rule.source} {rule.source_config} {split}", path=None)
            part.table = from_hub(rule, split).data.table
            part.schema, part.size = part.table.schema, part.table.num_rows
            part.n_bytes = part.table.nbytes
            parts = [part]
        for part in parts:
            if part.name in names:
                sys.exit(f"{part.name} is of both splits, '{rule.split}' and '{rule.val_split}'")
            names.add(part.name)
            part.val_share = val_share
            yield part


def open_file(directory, name):
    path = directory / name
    part = SimpleNamespace(name=name, path=path, schema=None)
    part.size = part.n_bytes = path.stat().st_size
    if path.suffix == ".parquet":
        try:
            file = ParquetFile(path)
        except Exception as error:
            sys.exit(f"{path} cannot be read: {error}")
        part.schema, part.size = file.schema_arrow, file.num_row_groups
    return part


def from_hub(rule, split):
    """The rows of a split, or the directory of all files if it is ""."""
    from datasets import load_dataset
    from huggingface_hub import snapshot_download

    try:
        if split:
            return load_dataset(rule.source, rule.source_config or None, split=split)
        patterns = ["*.json*", "*.parquet"]
        return snapshot_download(rule.source, repo_type="dataset", allow_patterns=patterns)
    except Exception as error:
        sys.exit(f"{rule.source} is not here, and the hub does not give it: {error}")


def find_files(path, split):
    """The names SPLIT.jsonl or SPLIT-00000-of-00002.parquet, else those that begin with the split."""
    if path.is_file():
        return [path.name]
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    named = [name for name in names if f"/{split}" in f"/{name}" and "/." not in f"/{name}"]
    kinds = KINDS if split else KINDS[:3]  # the .json files of a repository describe it
    found = [name for name in named if name.endswith(kinds)]
    exact = re.compile(rf"(.*/)?{re.escape(split)}(-\d+-of-\d+(-\w+)?)?\.[a-z.]+")
    found = [name for name in found if exact.fullmatch(name)] or found
    others = [name for name in named if name not in found]
    if not found:
        seen = short(others or names)
        sys.exit(f"{path} has no {', '.join(kinds)} for the split '{split}', only: {seen}")
    print(f"{path}: reading {short(found)}" + f"; not {short(others)}" * bool(others))
    return found


def short(names):
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


# -----------------------------------------------------------------------------
# reading


def slices(part):
    """The (start, stop) of read() that processes take in turn."""
    if part.schema is None and part.path.suffix != ".jsonl":
        return [(0, sys.maxsize)]
    step = max(1, part.size * SLICE // max(1, part.n_bytes))
    return [(i, min(i + step, part.size)) for i in range(0, max(1, part.size), step)]


def read(part, start, stop):
    """
    Yields (position, item): a row, a line of JSON, or an Exception for a bad row. Positions are
    bytes of lines, or rows. Exits where the file is damaged.
    """
    try:
        if part.path is None:
            rows = part.table.select(columns(part)).slice(start, stop - start)
            yield from read_table(rows.to_batches(ROWS), start)
        elif part.schema is not None:
            file = ParquetFile(part.path, buffer_size=2**20)
            first = sum(file.metadata.row_group(i).num_rows for i in range(start))
            batches = file.iter_batches(ROWS, range(start, stop), columns(part))
            yield from read_table(batches, first)
        elif part.path.suffix == ".json":  # a list, or lines; in memory as a whole
            text = part.path.read_text("utf-8-sig").strip()
            items = json.loads(text) if text.startswith("[") else text.encode().split(b"\n")
            yield from enumerate(items)
        else:
            yield from read_lines(part.path, start, stop)
    except Exception as error:
        sys.exit(f"{part.path or part.name} cannot be read: {type(error).__name__}: {error}")


def read_table(batches, position):
    for batch in batches:
        for i in range(len(batch)):
            try:
                item = batch.slice(i, 1).to_pylist()[0]
            except Exception as error:  # Python cannot hold a cell, such as the year 10000
                item = error
            yield position, item
            position += 1


def read_lines(path, start, stop):
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline(SLICE)  # the slice before has it
        position = file.tell()
        while position < stop:
            line = file.readline(SLICE)
            if len(line) == SLICE:
                raise ValueError(f"the line at byte {position:,} has {SLICE:,} bytes or more")
            if not line:
                break
            yield position, line
            position += len(line)


def columns(part):
    """The columns of a table that are read: all for a rule's rows, or if there is no known pair."""
    names = set(part.schema.names)
    wanted = {"condition", *OPTIONAL, *part.rule.fields.values()}.union(*LAYOUTS)
    known = part.rule.fields or any(names >= set(layout) for layout in LAYOUTS)
    return sorted(names & wanted if known and not part.rule.rows else names)


def where(part, position):
    if part.schema is not None or part.path.suffix == ".json":
        return f"{part.path or part.name}, row {position}"
    n_before = sum(1 for _ in read(part, 0, position))
    return f"{part.path}, line {n_before + 1}"


def describe(part):
    """The fields that are read of a file, and its first row, as text; "" if that is bad."""
    try:
        _, item = next(read(part, *slices(part)[0]))
        row = parse(item)
        instruction, response, _, used = to_documents(row, part.rule)[0]
    except Exception:
        return "", ""  # tokenize() says what is wrong
    names = row if part.schema is None else part.schema.names
    used = list(part.rule.fields.values()) or used
    others = [name for name in names if name not in [*used, "condition"]]
    text = " + ".join(used)
    if others and not part.rule.rows:
        text += f"; not used: {short(others)}"
    return text, f"{instruction[:80]!r} -> {response[:80]!r}"


# -----------------------------------------------------------------------------
# tokenizing


def no_counts():
    return {split: Counter(documents=0, tokens=0) for split in ("train", "val")}


def tokenize(number):
    """Write the shard of a slice: its bins, and at last its counts, which are returned."""
    part, start, stop, shard = jobs[number]
    done = Path(f"{shard}.json")
    if done.exists():
        return json.loads(done.read_text())
    counts = no_counts()
    out = {name: open(f"{shard}.{name}", "wb") for name in BINS}
    for position, item in read(part, start, stop):
        try:
            documents = to_documents(parse(item), part.rule)
            encoded = [encoder.document(*document[:3]) for document in documents]
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
            if not part.rule.skip_bad:
                place = where(part, position)
                sys.exit(f"{place}: {reason}; --skip_bad=True leaves such rows out")
            counts["train"][f"dropped: {reason.split(':')[0]}"] += 1
            continue
        for (instruction, _, condition, _), (ids, n_prefix) in zip(documents, encoded):
            digest = hashlib.blake2b(f"{seed} {instruction}".encode(), digest_size=8)
            is_val = int(digest.hexdigest(), 16) < part.val_share * 2**64
            split = "val" if is_val else "train"
            if n_prefix + 2 > block_size + 1:
                counts["train"]["dropped: instruction too long"] += 1
            elif len(ids) > block_size + 1 and part.rule.too_long == "drop":
                counts["train"]["dropped: too long"] += 1
            else:
                if len(ids) > block_size + 1:
                    counts["train"]["truncated: too long"] += 1
                    ids = ids[: block_size + 1]  # without eoa: it does not end there
                out[f"{split}.bin"].write(np.array(ids, dtype))
                out[f"{split}.idx"].write(np.array((len(ids), n_prefix)))
                counts[split]["documents"] += 1
                counts[split]["tokens"] += len(ids)
                counts[split][f"condition={condition}"] += 1
    for file in out.values():
        file.close()
    unnamed = Path(f"{shard}.tmp")
    unnamed.write_text(json.dumps(counts))
    unnamed.rename(done)  # whole or not there
    return counts


def start_worker():
    """Ctrl-C is for the parent; and when that is gone, so is the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# -----------------------------------------------------------------------------

if __name__ == "__main__":
    directory = Path("data", dataset)
    work = Path(f"{directory}.part")
    shards, new, old = work / "shards", work / "new", work / "old"
    if not 0 <= val_fraction < 1:
        sys.exit(f"val_fraction is a share of the documents, from 0 to 1, not {val_fraction}")
    if dataset == "problems" and (source or mixture):
        sys.exit("give this data a name of its own: --dataset=...")
    if old.exists() and not directory.exists():
        old.rename(directory)  # it was killed between the two renames at the end
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists() and not set(os.listdir(directory)) <= set(FILES):
        sys.exit(f"{directory} holds what data.py did not write; choose another --dataset")
    shards.mkdir(parents=True, exist_ok=True)
    if dataset == "problems":
        source, val_split = str(work), "val"
        for name, n in ("train", n_problems), ("val", n_val_problems):
            with open(work / f"{name}.jsonl", "w") as file:
                for row in word_problems(name, n, seed):
                    print(json.dumps(row), file=file)

    # a job per slice of a file; a shard that the same command made of the same slice stays
    encoder = get_tokenizer(tokenizer)
    encoder.save(shards)
    dtype = "uint16" if encoder.n_vocab <= 65536 else "uint32"
    args = [arg for arg in sys.argv[1:] if not arg.startswith("--workers")]
    configs = [arg for arg in args if not arg.startswith("--")]
    texts = [Path(path).read_text() for path in [*configs, __file__, shards / "tokenizer.json"]]
    recipe = hashlib.sha256(repr([args, texts]).encode()).hexdigest()
    parts = find_parts()
    jobs, described = [], {""}
    for part in parts:
        part.counts = no_counts()
        modified = part.path.stat().st_mtime_ns if part.path else 0
        for start, stop in slices(part):
            key = [recipe, len(jobs), part.name, part.n_bytes, modified, start, stop]
            key = hashlib.sha256(repr(key).encode()).hexdigest()
            jobs.append((part, start, stop, shards / key))
        taken, example = describe(part)
        if taken not in described:
            print(f"{part.name}: {taken}\n  {example}")
            described.add(taken)

    with ProcessPoolExecutor(workers or os.cpu_count(), get_context("fork"), start_worker) as pool:
        futures = [pool.submit(tokenize, number) for number in range(len(jobs))]
        bar = tqdm(futures, f"preparing {directory}", unit=" slices")
        try:
            results = [future.result() for future in bar]
        except KeyboardInterrupt:
            sys.exit(f"interrupted; {directory} is as it was, and the same command goes on")
        finally:
            bar.close()
            for child in active_children():
                child.terminate()

    # the shards in their order are the bins
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for name in BINS:
        end = 0
        with open(new / name, "wb") as out:
            for *_, shard in jobs:
                if name.endswith(".bin"):
                    with open(f"{shard}.{name}", "rb") as file:
                        shutil.copyfileobj(file, out)
                else:
                    index = np.fromfile(f"{shard}.{name}", np.int64).reshape(-1, 2)
                    index[:, 0] = end + index[:, 0].cumsum()  # lengths become ends
                    index.tofile(out)
                    if len(index):
                        end = index[-1, 0]

    # counts, and how much of each file an epoch draws
    for (part, *_), result in zip(jobs, results):
        for split, count in part.counts.items():
            count.update(result[split])
    total, groups, files = no_counts(), {}, []
    for part in parts:
        train, val, rule = part.counts["train"], part.counts["val"], part.rule
        n = train["documents"]
        share = min(1, rule.cap / n) if rule.cap and n else 1
        train["per_epoch"] = round(share * n) * rule.repeat
        val["per_epoch"] = ceil(share * val["documents"])  # so that val has the mixture of train
        train["tokens_per_epoch"] = train["tokens"] * train["per_epoch"] // max(1, n)
        for split, count in part.counts.items():
            total[split].update(count)
        groups.setdefault(rule.name, Counter()).update(train)
        file = {"name": part.name, "rule": rule.name, "repeat": rule.repeat, **part.counts}
        files.append(file)
    if not total["train"]["documents"]:
        sys.exit(f"no document is left to train on: {dict(total['train'])}")

    # the report
    per_epoch = total["train"]["tokens_per_epoch"]
    epochs = batch_size * block_size * max_iters / per_epoch or 1
    groups["all"] = total["train"]
    report = [f"{'rule':<40}{'documents':>12}{'tokens':>16}{'per epoch':>12}{'seen':>10}  truncated, dropped"]
    for name, count in groups.items():
        n, drawn = count["documents"], count["per_epoch"]
        line = f"{name[:39]:<40}{n:>12,}{count['tokens']:>16,}{drawn:>12,}"
        notes = ", ".join(f"{m:,} {key}" for key, m in count.items() if ":" in key)
        report.append(f"{line}{epochs * drawn / max(1, n):>10.2f}  {notes}")
    report.append(f"an epoch has {per_epoch:,} tokens; val has {total['val']['documents']:,} documents")
    print("\n".join(report))

    counted = total["train"].most_common()
    encoder.save(new, [key[10:] for key, _ in counted if key[:10] == "condition="], block_size)
    meta = {
        "vocab_size": encoder.n_vocab,
        "dtype": dtype,
        "block_size": block_size,
        "splits": total,
        "report": report,
        "files": files,
    }
    (new / "meta.json").write_text(json.dumps(meta, indent=1))
    for path in new.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    for done in shards.glob("*.json"):
        done.unlink()  # first, so that no shard without its bins looks whole after a kill
    shutil.rmtree(work)
