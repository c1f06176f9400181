"""Instruction/response pairs -> tokens -> memory-mapped bins, and the loader that packs them into rows.

    python data.py                                   # the embedded word problems -> data/problems
    python data.py config/gsm8k.py                   # GSM8K from the Hugging Face hub -> data/gsm8k
    python data.py --dataset=mine --source=pairs.jsonl --tokenizer=gpt2

data/<dataset>/ holds, per split, <split>.bin (the ids of all documents back to back, uint16 or uint32) and <split>.idx
(two int64 per document: where it ends in the bin, and the length of its prefix); meta.json and tokenizer.tiktoken.
"""

import json
import os
import random
from array import array
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import chain, islice, starmap
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common import check_types, errors_name_file, exit_on_error, replace_file
from configurator import configure
from model import IGNORE
from sources import read_rows, to_pair, word_problems
from tokenizer import FILES, condition_tags, encode_document, fingerprint, make_encoding, read_meta, save_encoding

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
    `directory` never holds half of one. Returns the content of meta.json. Raises ValueError or OSError."""
    directory, o = Path(directory), SimpleNamespace(**{**settings, **changes})
    if vars(o).keys() != settings.keys():
        raise TypeError(f"there is no setting {min(changes.keys() - settings.keys())}")
    if directory.exists() and not (directory / "meta.json").exists():
        raise ValueError(f"{directory} exists and is no prepared dataset; choose another name with --dataset")
    if o.too_long not in ("truncate", "drop", "stop"):
        raise ValueError(f"too_long must be truncate, drop or stop, not '{o.too_long}'")
    if o.answer not in ("", "cot", "direct"):
        raise ValueError(f"answer must be cot, direct or empty, not '{o.answer}'")
    if not 0 <= o.val_fraction < 1:
        raise ValueError(f"val_fraction is a share below 1, not {o.val_fraction}")
    if not o.fields.keys() <= {"instruction", "response", "condition"}:
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
            dropped = ", ".join(f"{n:,} {why}" for why, n in splits["train"]["dropped"].items())
            raise ValueError(f"{o.source} holds no document to train on; dropped: {dropped or 'none'}")
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
    """Yields function(*item) for each item, in order."""
    items, jobs = iter(items), deque()
    with ThreadPoolExecutor(n_threads) as pool:
        while batch := list(islice(items, 500)):  # a job per text, as in tiktoken, takes more than twice as long
            jobs.append(pool.submit(list, starmap(function, batch)))
            if len(jobs) > 2 * n_threads:
                yield from jobs.popleft().result()
        for job in jobs:
            yield from job.result()


def fit_document(encoding, o, split, where, pair):
    """An item of read_pairs() -> (split, document): condition, ids, length of the prefix, whether the end is cut off.
    In place of a document that is dropped stands a text that says why."""
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
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(directory / name, "wb")) for name in FILES[:4]}
        for split, document in documents:
            c = counts[split]
            if isinstance(document, str):
                c["dropped"][document] += 1
                continue
            condition, ids, n_prefix, truncated = document
            c["documents"] += 1
            c["tokens"] += len(ids)
            c["prefix_tokens"] += n_prefix
            c["truncated"] += truncated
            c["conditions"][condition] += 1
            files[f"{split}.bin"].write(array(np.dtype(dtype).char, ids))
            files[f"{split}.idx"].write(array("q", (c["tokens"], n_prefix)))
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    points = {"min": 0, "p10": 10, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    for split, c in counts.items():
        lengths = np.diff(read_index(directory, split)[:, 0], prepend=0)
        c["length"] = {k: int(np.percentile(lengths, p)) for k, p in points.items()} if len(lengths) else {}
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


# ---- the packing loader ----
def read_index(directory, split):
    """(n, 2) int64: where each document ends in the bin, and the length of its prefix."""
    path = Path(directory, f"{split}.idx")
    size = path.stat().st_size
    if size % 16:
        raise ValueError(f"{path} is damaged: its {size} bytes are not two int64 per document")
    return np.memmap(path, dtype="<i8", mode="r").reshape(-1, 2) if size else np.zeros((0, 2), np.int64)


class Batch(NamedTuple):
    """One rank's rows of a step, each (rows, T), and four facts of the whole step, all ranks included."""

    idx: torch.Tensor  # int64 tokens, 0 in padding
    targets: torch.Tensor  # int64, IGNORE in prefixes and padding
    doc: torch.Tensor  # int64 number of the document within its row, -1 in padding
    prefix: torch.Tensor  # bool
    n_targets: int
    n_tokens: int
    documents: list  # their numbers in the split
    state: dict  # of the loader, after this step


class Loader:
    """Iterates over steps of `rows` rows of `block_size` tokens, packed from whole documents.

    An epoch is a seeded permutation of the documents. A step fills its rows from a pool of the next documents; those
    left in the pool wait for the next step, so every document is seen exactly once per epoch. The plan depends on
    seed, rows and block_size only: rank r takes its share of the same rows. `epochs` limits the passes (the last step
    may then hold padding); without it, epochs overlap by a few documents. `state` is that after the last step taken."""

    LOOKAHEAD_DOCS = 128  # documents to choose from

    def __init__(self, directory, split, rows, block_size, seed=0, rank=0, world_size=1, epochs=None, state=None):
        if rows < world_size:
            raise ValueError(f"a step of {rows} rows is too small for {world_size} ranks: each needs at least one")
        self.n_rows, self.block_size, self.seed, self.epochs = rows, block_size, seed, epochs
        self.own_rows = slice(rank, None, world_size)
        meta, index = read_meta(directory), read_index(directory, split)
        self.ends, self.prefixes = index[:, 0], index[:, 1]
        self.starts = np.concatenate(([0], self.ends[:-1])).astype(np.int64)
        lengths = self.ends - self.starts - 1  # input tokens: all of a document but its last
        valid = (1 <= self.prefixes) & (self.prefixes <= lengths)
        if not valid.all():
            d = int(valid.argmin())
            claim = f"from {self.starts[d]} to {self.ends[d]}, prefix {self.prefixes[d]}"
            raise ValueError(f"{Path(directory, split)}.idx is damaged: document {d} cannot be {claim}")
        self.lengths = lengths.astype(np.int32)
        self.eligible = np.flatnonzero(lengths <= block_size)  # all, unless prepared for a larger block_size
        self.left_out = len(lengths) - len(self.eligible)
        if not len(self.eligible):
            raise ValueError(f"{directory}: no document of the {split} split fits into block_size = {block_size}")
        self.vocab_size, self.bin = meta["vocab_size"], Path(directory, f"{split}.bin")
        size, want = self.bin.stat().st_size, int(self.ends[-1]) * np.dtype(meta["dtype"]).itemsize
        if size != want:
            raise ValueError(f"{self.bin} is damaged: it has {size:,} bytes, not {want:,}")
        self.tokens = np.memmap(self.bin, dtype=meta["dtype"], mode="r")
        checksum = str(meta["checksums"].get(self.bin.name))
        self.plan = {"seed": seed, "documents": len(self.eligible), "checksum": checksum}
        self.state = state or {"epoch": 0, "cursor": 0, "waiting": [], **self.plan}
        with errors_name_file("the loader's state"):
            check_types(self.state, epoch=int, cursor=int, waiting=list, seed=int, documents=int, checksum=str)
            for key, value in self.plan.items():
                if self.state[key] != value:
                    change = f"{key} is {value}, in the loader's state {self.state[key]}"
                    raise ValueError(f"{directory} gives another plan than the run had: {change}")
        self.order = self._permutation(self.state["epoch"])

    def _permutation(self, epoch):
        return np.random.default_rng((self.seed, epoch)).permutation(self.eligible)

    def _next_rows(self):
        """The next step's rows, each an array of documents. Raises StopIteration after the last epoch."""
        epoch, cursor, waiting = (self.state[key] for key in ("epoch", "cursor", "waiting"))
        pool = [np.array(waiting, dtype=np.int64)]
        want = self.n_rows * self.block_size + self.LOOKAHEAD_DOCS * self.lengths[self.eligible[:100000]].mean()
        tokens = self.lengths[pool[0]].sum()
        while tokens < want and (self.epochs is None or epoch < self.epochs):
            pool.append(self.order[cursor : cursor + 64])
            tokens += self.lengths[pool[-1]].sum()
            cursor += len(pool[-1])
            if cursor == len(self.order):
                epoch, cursor = epoch + 1, 0
                self.order = self._permutation(epoch)
        pool = np.concatenate(pool)
        if not len(pool):
            raise StopIteration
        lengths, free = self.lengths[pool], np.ones(len(pool), dtype=bool)
        rows = []
        for _ in range(self.n_rows):
            row, room = [], self.block_size
            while True:
                near = np.flatnonzero(free)[: self.LOOKAHEAD_DOCS]  # the oldest of all opens a row
                near = near[lengths[near] <= room]
                if not len(near):
                    break
                if not row or room - lengths[near[0]] >= 2 * lengths[near].mean():
                    chosen = near[:1]
                else:  # little room is left: close it with the one or two documents that fill it best
                    chosen = best_fit(near, lengths[near], room)
                free[chosen] = False
                row.extend(chosen)
                room -= lengths[chosen].sum()
            rows.append(pool[row])
        self.state = {"epoch": epoch, "cursor": cursor, "waiting": pool[free].tolist(), **self.plan}
        return rows

    def __iter__(self):
        return self

    def __next__(self):
        rows = self._next_rows()
        documents = np.concatenate(rows)
        n_tokens = int(self.lengths[documents].sum())
        n_targets = n_tokens + len(documents) - int(self.prefixes[documents].sum())
        rows = rows[self.own_rows]
        shape = (len(rows), self.block_size)
        idx, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        doc, prefix = np.full(shape, -1, np.int64), np.zeros(shape, bool)
        for r, row in enumerate(rows):
            start = 0
            for number, d in enumerate(row):
                document = self.tokens[self.starts[d] : self.ends[d]]
                end, response = start + len(document) - 1, start + self.prefixes[d]
                idx[r, start:end] = document[:-1]
                targets[r, response - 1 : end] = document[self.prefixes[d] :]  # eoq predicts the first
                doc[r, start:end] = number
                prefix[r, start:response] = True
                start = end
        largest = max(idx.max(), targets.max())
        if largest >= self.vocab_size:
            d = next(d for d in np.concatenate(rows) if largest in self.tokens[self.starts[d] : self.ends[d]])
            beyond = f"the id {largest}, beyond the vocabulary of {self.vocab_size}"
            raise ValueError(f"{self.bin}: document {d} has {beyond}")
        tensors = map(torch.from_numpy, (idx, targets, doc, prefix))
        return Batch(*tensors, n_targets, n_tokens, documents.tolist(), self.state)


def best_fit(items, lengths, room):
    """The one or two of `items` whose lengths come nearest to room without exceeding it."""
    order = np.argsort(lengths, kind="stable")
    items, lengths = items[order], lengths[order]
    partner = np.minimum(np.searchsorted(lengths, room - lengths, side="right") - 1, np.arange(len(items)) - 1)
    total = np.where(partner >= 0, lengths + lengths[partner], 0)
    best = int(total.argmax())
    return items[[best, partner[best]]] if total[best] > lengths[-1] else items[-1:]


def prefetch(loader, pin=False, depth=3):
    """The loader's batches, taken ahead by a thread, with `pin` in pinned memory. An error comes in its turn."""

    def take():
        batch = next(loader, None)
        if batch and pin:
            batch = batch._replace(**{name: getattr(batch, name).pin_memory() for name in batch._fields[:4]})
        return batch

    with ThreadPoolExecutor(1) as thread:
        jobs = deque(thread.submit(take) for _ in range(depth))
        while batch := jobs.popleft().result():
            jobs.append(thread.submit(take))
            yield batch


if __name__ == "__main__":
    directory = Path("data", dataset)
    with exit_on_error(f"interrupted; {directory} is as it was"):
        print(report(directory, prepare(directory)))
