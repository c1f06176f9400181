"""Which documents are drawn, and how often: the rules of a dataset's files.

    mixture = [                                  # in a config file; the first rule that fits a file's name counts
        dict(files="flan__*", cap=5000),         # at most 5,000 documents of each such file per epoch
        dict(files="gsm8k_train.jsonl", repeat=10),
        dict(source="openai/gsm8k", source_config="main", rows=to_rows),  # a source of its own
    ]

A rule may also hold, for its files alone, what data.py has as settings: see SETTINGS. A file without a rule gives all
its documents, once. A rule that names a source is for the files of that alone, so several may read the same files.
"""

from collections import Counter
from fnmatch import fnmatchcase
from functools import partial
from hashlib import blake2b
from inspect import getsource
from itertools import islice
from math import ceil, inf
from types import FunctionType, GeneratorType, ModuleType, NoneType, SimpleNamespace
from typing import NamedTuple

from common import brief, errors_name_file, one_line
from puzzles import find_rows
from sources import File, find_files, item_size, parse, to_pair
from tokenizer import MAX_TRAINING_CHARS, condition_tags

RULE = {
    "name": "",  # of the rule's rows in reports
    "files": "*",  # which files: a pattern of their names, or several
    "cap": 0,  # documents of a file per epoch, at most; 0: all
    "repeat": 1,  # how often an epoch has them
    "rows": None,  # a function: a row of the source -> a row, a list of rows, or None to leave it out
}
SETTINGS = ("source", "source_config", "split", "val_split", "fields", "condition", "answer", "strip_annotations")
SETTINGS += ("skip_bad", "too_long")


class Part(NamedTuple):
    """A File of a dataset, and what is done with its rows."""

    name: str
    group: str  # the rule's name
    file: File
    val_share: float  # of its documents; the others are trained on
    rule: SimpleNamespace  # with RULE and SETTINGS


def find_parts(o):
    """The Parts of a dataset, in the order of their documents, by data.py's settings. Raises ValueError or OSError."""
    default = {**RULE, **{key: getattr(o, key) for key in SETTINGS}}
    rules = [SimpleNamespace(**{**default, **checked(rule, default, i)}) for i, rule in enumerate(o.mixture)]
    for rule in SimpleNamespace(**default), *rules:
        check(rule)
    own = [rule for rule, given in zip(rules, o.mixture) if "source" in given]
    shared = [rule for rule, given in zip(rules, o.mixture) if "source" not in given]
    default, jobs = SimpleNamespace(**default), [(rule, [rule], f"{rule.name or rule.source}/") for rule in own]
    if shared or not own:
        jobs.insert(0, (default, [*shared, default], ""))
    parts = []
    for of, among, prefix in jobs:
        for file, val_share in files_of(of, o):
            if rule := next((rule for rule in among if fits(file.name, rule)), None):
                group = rule.name or prefix + " ".join(patterns(rule))
                parts.append(Part(prefix + file.name, group, file, val_share, rule))
        used = {id(part.rule) for part in parts} | {id(default)}
        if unused := [rule for rule in among if id(rule) not in used]:
            raise ValueError(f"{of.source} has no file, or none is left, for the rule {unused[0].files} of mixture")
    return parts


def checked(rule, default, number):
    """A rule of the setting mixture. Raises ValueError."""
    with errors_name_file(f"rule {number} of mixture", "is wrong"):
        if not isinstance(rule, dict) or not rule:
            raise ValueError(f"it is {brief(rule)}, and no dict such as {{'files': 'flan__*', 'cap': 5000}}")
        for key, value in rule.items():
            if key not in default:
                raise ValueError(f"it has no {key!r}, only {', '.join(default)}")
            several = key == "files" and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
            right = isinstance(value, FunctionType) if key == "rows" else type(value) is type(default[key])
            if not (several or right):
                raise ValueError(f"{key} cannot be {brief(value)}")
        if (alone := rule.keys() & {"source_config", "split", "val_split"}) and "source" not in rule:
            raise ValueError(f"{min(alone)} is of a source, and it names none")
        if rule.get("cap", 0) < 0 or rule.get("repeat", 1) < 1:
            raise ValueError("cap must be at least 0, and repeat at least 1")
    return rule


def check(rule):
    """Raise ValueError unless what a rule, or data.py, has for SETTINGS is possible."""
    if rule.too_long not in ("truncate", "drop", "stop"):
        raise ValueError(f"too_long must be truncate, drop or stop, not '{rule.too_long}'")
    if rule.answer not in ("", "cot", "direct"):
        raise ValueError(f"answer must be cot, direct or empty, not '{rule.answer}'")
    of_text = all(isinstance(name, str) for name in rule.fields.values())
    if not of_text or not rule.fields.keys() <= {"instruction", "response", "condition"}:
        raise ValueError(f"fields names a source's instruction, response, condition, and nothing else: {rule.fields}")
    condition_tags(rule.condition)


def patterns(rule):
    return [rule.files] if isinstance(rule.files, str) else rule.files


def fits(name, rule):
    """Whether a rule is for a file, by its name or its whole path in the source."""
    return any(fnmatchcase(text, pattern) for pattern in patterns(rule) for text in (name, name.rpartition("/")[2]))


def files_of(rule, o):
    """Yields (File, share of it that goes to val) for the files of a rule's source."""
    if rows := find_rows(rule.source):
        for n, split in (o.n_problems, "train"), (o.n_val_problems, "val"):
            items = partial(rows, split, n, o.seed)
            yield File(f"{split} {rule.source}", items, size=88 * n), float(split == "val")
        return
    for file in find_files(rule.source, rule.source_config, rule.split):
        yield file, 0.0 if rule.val_split else o.val_fraction
    for file in find_files(rule.source, rule.source_config, rule.val_split) if rule.val_split else ():
        yield file, 1.0


def split_of(part, instruction, seed):
    """The split of a document. It depends on the instruction: all that answer the same one are in the same split."""
    digest = blake2b(f"{seed} {instruction}".encode(), digest_size=8).digest() if 0 < part.val_share < 1 else bytes(8)
    return "val" if int.from_bytes(digest, "big") < part.val_share * 2**64 else "train"


def to_pairs(rule, item):
    """An item of a File -> its pairs, (instruction, response, condition) each, or what is wrong, as to_pair() says; for
    a blank line, None."""
    row = parse(item)
    if row is None:
        return None
    rows = [row]
    if rule.rows and isinstance(row, dict):
        try:
            made = rule.rows(row)
            made = [*made] if isinstance(made, (list, tuple, GeneratorType)) else [made]
            rows = [row if isinstance(row, dict) else f"rows() gave: {brief(row)}" for row in made if row is not None]
        except Exception as e:
            return [f"rows() fails: {type(e).__name__}: {one_line(e)}"]
    return [to_pair(row, rule.fields, rule.condition, rule.answer, rule.strip_annotations) for row in rows]


def source_of(value):
    """What a function of a config file does, as JSON: its source, and that of what it names."""
    if not isinstance(value, FunctionType):
        return repr(value)
    known = {name: value.__globals__.get(name) for name in value.__code__.co_names}
    named = {name: v for name, v in known.items() if not isinstance(v, (ModuleType, NoneType)) and v is not value}
    return [getsource(value), {name: source_of(v) for name, v in named.items()}]


def sample_texts(parts, seed):
    """Yields the texts of training documents for a tokenizer: all; of a file with a cap, ten caps' worth (published).
    Where that is more than a tokenizer is trained on, the same share of each file's."""
    sizes = []  # bytes to read
    parts = [part for part in parts if part.val_share < 1]
    for part in parts:
        sizes.append(part.file.size or 2**24)
        if part.rule.cap:
            first = [*map(item_size, islice(part.file.items(), 100))]
            sizes[-1] = min(sizes[-1], 10 * part.rule.cap * sum(first) / max(1, len(first)))
    share = min(1, MAX_TRAINING_CHARS / max(1, sum(sizes)))
    for part, size in zip(parts, sizes):
        left = size * share if part.rule.cap or share < 1 else inf  # sizes are estimates
        for item in part.file.items():
            for pair in to_pairs(part.rule, item) or ():
                if isinstance(pair, tuple) and split_of(part, pair[0], seed) == "train":
                    yield from pair[:2]
            if (left := left - item_size(item)) < 0:
                break


def no_counts():
    """Counts of documents and of what is in them."""
    counts = dict.fromkeys("rows documents tokens prefix_tokens truncated text_bytes text_tokens".split(), 0)
    return {**counts, "conditions": Counter(), "dropped": Counter()}


def add_counts(total, counts):
    """Add counts to others in place."""
    for key, n in no_counts().items():
        total[key] = type(n)(total[key]) + type(n)(counts[key])


def drawn(file, split, n=None):
    """How many documents an epoch draws of a file, an entry of meta.json's "files", if it has n. A cap is one on what
    of it is in train; val, which repeats nothing, is held to the same share."""
    n, n_train = file[split]["documents"] if n is None else n, file["train"]["documents"]
    if split == "train":
        return min(n, file["cap"] or n) * file["repeat"]
    return min(n, ceil(n * file["cap"] / n_train) if file["cap"] < n_train and file["cap"] else n)


# ---- the report ----
HEAD = ("rows", "documents", "tokens", "documents per epoch", "tokens per epoch", "share of it", "of all seen")
HEAD += ("prefix", "truncated", "bytes per token", "dropped")


def markdown(meta, budget):
    """report.md of a dataset: what each group of files and each file has, and what it gives to an epoch. `budget` is
    the tokens of the whole run, or 0."""
    files, groups = meta["files"], {}
    for file in files:
        groups.setdefault(file["group"], []).append(file)
    per_epoch = sum(map(drawn_tokens, files))
    epochs = budget / per_epoch if budget else 1.0
    text = f"An epoch has {sum(drawn(file, 'train') for file in files):,} documents and {per_epoch:,.0f} tokens. "
    text += f"The run takes {budget:,} tokens, {epochs:.2f} epochs. " * bool(budget)
    text += f'Documents are counted as seen after {epochs:.2f} epochs, "dropped" includes val, the rest is train.\n'
    for title, rows in ("group", [*groups.items()]), ("file", [(file["name"], [file]) for file in files]):
        table = [(title, *HEAD), ("---", *["---:"] * (len(HEAD) - 1), "---")]
        table += [cells(name, of, per_epoch, epochs) for name, of in [*rows, ("all", files)]]
        text += "\n" + "".join(f"| {' | '.join(line)} |\n" for line in table)
    return text


def drawn_tokens(file):
    """The tokens that an epoch draws of a file, on average."""
    return file["train"]["tokens"] * drawn(file, "train") / max(1, file["train"]["documents"])


def cells(name, files, per_epoch, epochs):
    """A line of the report, on some files."""
    c, both = no_counts(), no_counts()
    for file in files:
        add_counts(c, file["train"])
        add_counts(both, file["train"])
        add_counts(both, file["val"])
    tokens, numbers = sum(map(drawn_tokens, files)), [drawn(file, "train") for file in files]
    seen = sum(min(n * epochs, file["train"]["documents"]) for n, file in zip(numbers, files))
    counts = both["rows"], c["documents"], c["tokens"], sum(numbers), round(tokens)
    shares = (tokens, per_epoch), (seen, c["documents"]), (c["prefix_tokens"], c["tokens"])
    line = [name.replace("|", "\\|"), *map("{:,}".format, counts), *(f"{a / (b or 1):.1%}" for a, b in shares)]
    dropped = ", ".join(f"{n:,} {why}" for why, n in both["dropped"].items())
    return [*line, f"{c['truncated']:,}", f"{c['text_bytes'] / (c['text_tokens'] or 1):.2f}", dropped or "0"]
