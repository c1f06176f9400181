"""Instruction/response pairs -> tokens -> the bins that loader.py reads.

    python data.py                                   # the embedded word problems -> data/problems
    python data.py config/gsm8k.py                   # GSM8K from the Hugging Face hub -> data/gsm8k
    python data.py --dataset=mine --source=pairs.jsonl --tokenizer=gpt2

data/<dataset>/ then holds, for the splits train and val, <split>.bin and <split>.idx (see loader.py), and meta.json and
tokenizer.tiktoken. No file imports this one: a directory data/ with an __init__.py would be taken for it, and be run.
"""

from configurator import configure

import json
import os
import random
from array import array
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import chain, starmap
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from common import exit_on_error, finish_rename, replace_file
from sources import read_rows, to_pair, word_problems
from tokenizer import FILES, condition_tags, encode_document, fingerprint, make_encoding, save_encoding

# ---- settings ----
dataset = "problems"  # the name of what is made: data/<dataset>
source = "problems"  # embedded word problems; or a hub id, a .jsonl, .json or .parquet file, or a directory
source_config = ""  # the hub dataset's configuration
split = "train"  # of the source
val_split = ""  # of the source; "": val_fraction of the documents of split
val_fraction = 0.01  # drawn at random by seed
fields = {"instruction": "instruction", "response": "response", "condition": "condition"}  # names in the source
condition = ""  # of rows that have none: direct, cot, synth, noisy, or several, as synth,cot
answer = ""  # responses end in "#### N": "cot" keeps the working, "direct" only N; both become the condition
strip_annotations = False  # drop <<48/2=24>> from responses
skip_bad = False  # leave malformed and empty rows out and count them; otherwise the first one stops
n_problems = 40000  # how many word problems to make for training
n_val_problems = 1000  # and for validation
tokenizer = "bytes"  # or train:4096, a tiktoken encoding, a BPE file in its format, a model's directory or hub id
pat_str = ""  # how text is split before a BPE file's or a trained BPE's merges; "": words, digits, punctuation
block_size = 1024  # context: a document may have one token more
too_long = "truncate"  # longer documents; or "drop" (as always if the instruction alone is longer), or "stop"
threads = 0  # of the tokenizer; 0: one per core
seed = 1337
settings = configure(globals())


# ---- preparing a dataset ----
def prepare(directory, **changes):
    """Make a dataset in `directory`, by the settings above with `changes`. It is written beside and then renamed, so
    `directory` never holds half of one. It replaces a dataset, and nothing else. Returns the content of meta.json.
    Raises ValueError or OSError."""
    directory, o = Path(directory), SimpleNamespace(**{**settings, **changes})
    if vars(o).keys() != settings.keys():
        raise TypeError(f"there is no setting {min(changes.keys() - settings.keys())}")
    finish_rename(directory)
    held, written = {path.name for path in directory.glob("*")}, {*FILES, "meta.json"}
    if directory.exists() and not {"train.bin", "train.idx"} <= held <= written:
        other = ", ".join(sorted(held - written)[:3])
        what = f"holds what data.py did not write ({other})" if other else "is no prepared dataset"
        raise ValueError(f"{directory} exists and {what}; choose another name with --dataset")
    for key, least in dict(n_problems=1, n_val_problems=0, block_size=1, threads=0).items():
        if vars(o)[key] < least:
            raise ValueError(f"{key} must be at least {least}, not {vars(o)[key]}")
    if o.too_long not in ("truncate", "drop", "stop"):
        raise ValueError(f"too_long must be truncate, drop or stop, not '{o.too_long}'")
    if o.answer not in ("", "cot", "direct"):
        raise ValueError(f"answer must be cot, direct or empty, not '{o.answer}'")
    if not 0 <= o.val_fraction < 1:
        raise ValueError(f"val_fraction is a share below 1, not {o.val_fraction}")
    of_text = all(isinstance(name, str) for name in o.fields.values())
    if not of_text or not o.fields.keys() <= {"instruction", "response", "condition"}:
        raise ValueError(f"fields names a source's instruction, response and condition, and nothing else: {o.fields}")
    condition_tags(o.condition)
    pairs = (pair[:2] for split, _, pair in read_pairs(o) if split == "train" and isinstance(pair, tuple))
    encoding = make_encoding(o.tokenizer, o.pat_str, chain.from_iterable(pairs))
    directory.parent.mkdir(parents=True, exist_ok=True)
    documents = in_threads(partial(fit_document, encoding, o), read_pairs(o), o.threads or os.cpu_count())
    progress = tqdm(documents, desc=f"preparing {directory}", unit=" documents")
    prefix = f"{directory.name}.part-"
    with progress, TemporaryDirectory(prefix=prefix, dir=directory.parent, ignore_cleanup_errors=True) as part:
        old, new = Path(part, "old"), Path(part, "new")
        new.mkdir()
        meta = save_encoding(encoding, new)
        splits = write_bins(new, progress, meta["dtype"])
        if not splits["train"]["documents"]:
            dropped = ", ".join(f"{n:,} {why}" for why, n in splits["train"]["dropped"].items()) or "none"
            advice = "; --skip_bad=False tells where" if o.skip_bad else ""
            raise ValueError(f"{o.source} holds no document to train on; dropped: {dropped}{advice}")
        meta |= {"splits": splits, "checksums": {name: fingerprint(new / name) for name in FILES}}
        meta["prepare_args"] = {key: value for key, value in vars(o).items() if key not in ("dataset", "threads")}
        replace_file(new / "meta.json", json.dumps(meta, indent=1).encode())
        try:
            if directory.exists():
                directory.rename(old)
            new.rename(directory)
        finally:
            if old.exists() and not directory.exists():
                old.rename(directory)
    return meta


def read_pairs(o):
    """Yields (split, where, pair) for each row of the source; in place of a bad row's pair, what is wrong with it."""
    rng, read = random.Random(o.seed), partial(read_rows, o.source, o.source_config)
    if o.source == "problems":
        sizes = ("train", o.n_problems), ("val", o.n_val_problems)
        rows = ((split, ("a problem", row)) for split, n in sizes for row in word_problems(split, n, o.seed))
    elif o.val_split:
        names = ("train", o.split), ("val", o.val_split)
        rows = ((split, row) for split, name in names for row in read(name))
    else:
        rows = (("val" if rng.random() < o.val_fraction else "train", row) for row in read(o.split))
    for split, (where, row) in rows:
        pair = to_pair(row, o.fields, o.condition, o.answer, o.strip_annotations)
        if isinstance(pair, str) and not o.skip_bad:
            raise ValueError(f"{where}: {pair}; --skip_bad=True leaves such rows out")
        yield split, where, pair


def in_threads(function, items, n_threads):
    """Yields function(*item) for each item of read_pairs(), in order. At most 32 million characters are in work."""
    jobs, in_work = deque(), 0
    with ThreadPoolExecutor(n_threads) as pool:
        for size, batch in batches(items):
            while jobs and (len(jobs) > 2 * n_threads or in_work + size > 2**25):
                done, job = jobs.popleft()
                yield from job.result()
                in_work -= done
            jobs.append((size, pool.submit(list, starmap(function, batch))))
            in_work += size
        for _, job in jobs:
            yield from job.result()


def batches(items):
    """Yields (characters, items of read_pairs()) of 500 short texts or a few long ones. A job per text, as in tiktoken,
    takes more than twice as long."""
    size, batch = 0, []
    for item in items:
        size += sum(map(len, item[-1]))
        batch.append(item)
        if len(batch) == 500 or size > 2**17:
            yield size, batch
            size, batch = 0, []
    yield size, batch


def fit_document(encoding, o, split, where, pair):
    """An item of read_pairs() -> (split, document): condition, ids, length of the prefix, whether the end is cut off.
    In place of a document that is dropped stands a text that says why; it is counted by what comes before a colon."""
    if isinstance(pair, str):
        return split, pair
    try:
        ids, n_prefix = encode_document(encoding, *pair)
    except ValueError as e:
        if not o.skip_bad:
            raise ValueError(f"{where}: {e}; --skip_bad=True leaves such rows out") from None
        return split, str(e)
    limit = o.block_size + 1  # the last token of a document is never input
    if len(ids) > limit and o.too_long == "stop":
        raise ValueError(f"{where}: {len(ids)} tokens, longer than block_size = {o.block_size}")
    if n_prefix >= limit or (len(ids) > limit and o.too_long == "drop"):
        return split, "instruction too long" if n_prefix >= limit else "too long"
    return split, (pair[2], ids[:limit], n_prefix, len(ids) > limit)  # if cut, without eoa: it does not end there


def write_bins(directory, documents, dtype):
    """Write both splits' bins and indexes from what fit_document() returns. Returns {split: its counts}."""
    none = {"documents": 0, "tokens": 0, "prefix_tokens": 0, "truncated": 0}
    counts = {split: {**none, "conditions": Counter(), "dropped": Counter()} for split in ("train", "val")}
    lengths = {split: array("i") for split in counts}
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(directory / name, "wb")) for name in FILES[:4]}
        for split, document in documents:
            c = counts[split]
            if isinstance(document, str):
                c["dropped"][document.partition(":")[0]] += 1  # few kinds, however many rows there are
                continue
            condition, ids, n_prefix, truncated = document
            c["documents"] += 1
            c["tokens"] += len(ids)
            c["prefix_tokens"] += n_prefix
            c["truncated"] += truncated
            c["conditions"][condition] += 1
            lengths[split].append(len(ids))
            files[f"{split}.bin"].write(array(np.dtype(dtype).char, ids))
            files[f"{split}.idx"].write(array("q", (c["tokens"], n_prefix)))
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    points = {"min": 0, "p10": 10, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    for split, c in counts.items():
        c["length"] = {k: int(np.percentile(lengths[split], p)) for k, p in points.items()} if lengths[split] else {}
    return counts


def report(directory, meta):
    """What went into a dataset, as text."""
    stored = f"{meta['vocab_size']:,} ids, stored as {meta['dtype']}"
    lines = [f"{directory}: tokenizer {meta['tokenizer']['name']}, {stored}"]
    for split, c in meta["splits"].items():
        sizes = f"{c['documents']:,} documents, {c['tokens']:,} tokens ({c['prefix_tokens']:,} prefix)"
        lines.append(f"  {split}: {sizes}, {c['truncated']:,} truncated")
        for key in "length", "conditions", "dropped":
            counts = ", ".join(f"{n:,} ({what or 'none'})" for what, n in c[key].items())
            lines.append(f"    {key}: {counts or 0}")
    return "\n".join(lines)


if __name__ == "__main__":
    directory = Path("data", dataset)
    with exit_on_error(f"interrupted; {directory} is as it was"):
        if dataset == "problems" and source != "problems":
            raise ValueError(f"give the data of {source} a name of their own with --dataset")
        if directory.parent != Path("data") or dataset == "..":
            raise ValueError(f"dataset is the name of a directory in data/, not a path: '{dataset}'")
        print(report(directory, prepare(directory)))
