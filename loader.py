"""Reading a prepared dataset, and packing its documents into rows. data.py writes it:

    <split>.bin    the ids of all documents back to back, uint16 or uint32
    <split>.idx    two int64 per document: where it ends in the bin, and the length of its prefix

Both stay on the disk, memory-mapped; this process holds the order of an epoch, 4 bytes per document.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import check_types, errors_name_file
from mixture import drawn
from model import IGNORE
from tokenizer import read_meta


# ---- the files of a split ----
def read_index(directory, split):
    """(n, 2) int64: where each document ends in the bin, and the length of its prefix."""
    path = Path(directory, f"{split}.idx")
    size = path.stat().st_size
    if size % 16:
        raise ValueError(f"{path} is damaged: its {size} bytes are not two int64 per document")
    return np.asarray(np.memmap(path, dtype="<i8", mode="r") if size else np.zeros(0, np.int64)).reshape(-1, 2)


def open_split(directory, split):
    """(tokens, ends, prefixes) of a split, memory-mapped: document d is tokens[ends[d - 1] : ends[d]], the first of all
    begins at 0, and prefixes[d] of its ids are the prefix. Raises ValueError if the files cannot be right."""
    meta, bin = read_meta(directory), Path(directory, f"{split}.bin")
    dtype, (ends, prefixes) = np.dtype(meta["dtype"]), read_index(directory, split).T
    if len(ends) != (want := meta["splits"][split]["documents"]):
        raise ValueError(f"{bin.with_suffix('.idx')} is damaged: it has {len(ends):,} documents, not {want:,}")
    for first, starts, stops in chunks(ends):
        n_prefix = prefixes[first : first + len(starts)]
        valid = (starts < stops) & (1 <= n_prefix) & (n_prefix < stops - starts)
        if not valid.all():
            i = int(valid.argmin())
            claim = f"from {starts[i]} to {stops[i]}, prefix {n_prefix[i]}"
            raise ValueError(f"{bin.with_suffix('.idx')} is damaged: document {first + i} cannot be {claim}")
    size, want = bin.stat().st_size, int(ends[-1]) * dtype.itemsize if len(ends) else 0
    if size != want:
        raise ValueError(f"{bin} is damaged: it has {size:,} bytes, not {want:,}")
    return np.asarray(np.memmap(bin, dtype=dtype, mode="r") if size else np.zeros(0, dtype)), ends, prefixes


def document(tokens, ends, prefixes, d):
    """The ids of open_split()'s document d, and the length of its prefix."""
    return tokens[ends[d - 1] if d else 0 : ends[d]].tolist(), int(prefixes[d])


def spans(ends, documents):
    """(starts, ends) in the bin, of documents (int64)."""
    return ends[documents - 1] * (documents > 0), ends[documents]


def chunks(ends, begin=0, stop=None, size=2**18):
    """(first document, starts, ends) of documents, all or a range, a chunk at a time: arrays would take gigabytes."""
    stop = len(ends) if stop is None else stop
    for first in range(begin, stop, size):
        last = min(first + size, stop)
        bounds = np.concatenate((ends[first - 1 : first] if first else [0], ends[first:last]))
        yield first, bounds[:-1], bounds[1:]


def draw(documents, n, epoch, seed):
    """The n documents that a file gives to an epoch, in no useful order: the next ones of a permutation of the file
    that every epoch goes on with, and of a fresh one whenever it is used up."""
    drawn, at = [], epoch * n
    while at < (epoch + 1) * n:
        turn, first = divmod(at, len(documents))
        taken = min(len(documents) - first, (epoch + 1) * n - at)
        rng = np.random.default_rng((*seed, turn + 1))  # a zero at the end would change nothing
        drawn.append(documents if taken == len(documents) else rng.permutation(documents)[first : first + taken])
        at += taken
    return np.concatenate(drawn) if drawn else documents[:0]


# ---- packing ----
class Batch(NamedTuple):
    """One rank's rows of a step, each (rows, T), and four facts of the whole step, all ranks included."""

    idx: torch.Tensor  # int64 tokens, 0 in padding
    targets: torch.Tensor  # int64, IGNORE in padding, and in prefixes unless the loss is on all tokens
    doc: torch.Tensor  # int64 number of the document within its row, -1 in padding
    prefix: torch.Tensor  # bool
    n_targets: int
    n_tokens: int
    documents: list  # their numbers in the split
    state: dict  # of the loader, after this step


class Loader:
    """Iterates over steps of `rows` rows of `block_size` tokens, packed from whole documents.

    An epoch is a seeded permutation of the documents; of a mixture, of those that each file gives by its rule. A step
    fills its rows from a pool of the next documents; those left in the pool wait for the next step, so none is lost or
    seen more often than an epoch has it. The plan depends on seed, rows and block_size only: rank r takes its share of
    the same rows. `epochs` limits the passes (the last step may then hold padding); without it, epochs overlap by a few
    documents. `state` is that after the last step taken."""

    LOOKAHEAD_DOCS = 128  # documents to choose from
    MAX_TOKENS = 2**27  # of a step; in memory they take 3.4 GB
    loss_on = "response"  # of documents; or "all" of them but boq, where no token sees the next (the paper's P(x))

    def __init__(self, directory, split, rows, block_size, seed=0, rank=0, world_size=1, epochs=None, state=None):
        if rows < world_size:
            raise ValueError(f"a step of {rows} rows is too small for {world_size} ranks: each needs at least one")
        if rows * block_size > self.MAX_TOKENS:
            raise ValueError(f"a step of {rows} rows of {block_size} tokens is too large: at most {self.MAX_TOKENS:,}")
        self.n_rows, self.block_size, self.seed, self.epochs = rows, block_size, seed, epochs
        self.own_rows = slice(rank, None, world_size)
        meta, self.bin = read_meta(directory), Path(directory, f"{split}.bin")
        self.tokens, self.ends, self.prefixes = open_split(directory, split)
        self.split, self.files, self.vocab_size = split, meta["files"], meta["vocab_size"]
        self.dtype = np.uint32 if len(self.ends) < 2**32 else np.int64  # of documents
        n_fitting = n_tokens = n_drawn = 0  # n_tokens: of an epoch
        for file, documents in zip(self.files, self._fitting()):
            n = drawn(file, split, len(documents))
            n_fitting, n_drawn = n_fitting + len(documents), n_drawn + n
            for chunk in np.array_split(documents, len(documents) // 2**18 + 1):
                n_tokens += self._lengths(chunk.astype(np.int64)).sum() * n / max(1, len(documents))
        self.left_out, self.n_tokens = len(self.ends) - n_fitting, round(n_tokens)
        if not n_drawn:
            raise ValueError(f"{directory}: no document of the {split} split fits into block_size = {block_size}")
        self.pool_tokens = rows * block_size + self.LOOKAHEAD_DOCS * n_tokens / n_drawn
        checksum, rules = str(meta["checksums"].get(self.bin.name)), [(f["cap"], f["repeat"]) for f in self.files]
        self.plan = {"seed": seed, "documents": n_drawn, "checksum": checksum}
        if {*rules} != {(0, 1)}:
            self.plan["rules"] = sha256(str(rules).encode()).hexdigest()[:16]  # their caps and repeats
        self.state = state or {"epoch": 0, "cursor": 0, "waiting": [], **self.plan}
        with errors_name_file("the loader's state"):
            check_types(self.state, epoch=int, cursor=int, waiting=list, seed=int, documents=int, checksum=str)
        for key in "seed", "documents", "checksum", "rules":
            if (old := self.state.get(key)) != (value := self.plan.get(key)):
                raise ValueError(f"{directory} is not the data that the run had: {key} is {value}, and was {old}")
        beyond = self.state["cursor"] >= n_drawn
        if beyond or any(type(d) is not int or not 0 <= d < len(self.ends) for d in self.state["waiting"]):
            raise ValueError(f"the loader's state is damaged: {directory} has no such place in it")
        self.order = self._permutation(self.state["epoch"])

    def _lengths(self, documents):
        """Input tokens of documents (int64): all but their last."""
        starts, ends = spans(self.ends, documents)
        return ends - starts - 1

    def _given(self, documents):
        """How many ids of each document are no targets: its prefix, or boq alone."""
        return self.prefixes[documents] if self.loss_on == "response" else np.ones_like(documents)

    def _fitting(self):
        """Yields, for each file, its documents that fit into a row: all, unless prepared for a larger block_size."""
        begin = 0
        for file in self.files:
            stop = begin + file[self.split]["documents"]
            found, n = np.empty(stop - begin, self.dtype), 0
            for first, starts, ends in chunks(self.ends, begin, stop):
                fits = first + np.flatnonzero(ends - starts <= self.block_size + 1)
                found[n : n + len(fits)] = fits
                n += len(fits)
            begin = stop
            yield found[:n]

    def _permutation(self, epoch):
        """The documents of an epoch, shuffled."""
        order, end = np.empty(self.plan["documents"], self.dtype), 0
        for i, (file, documents) in enumerate(zip(self.files, self._fitting())):
            begin, end = end, end + drawn(file, self.split, len(documents))
            order[begin:end] = draw(documents, end - begin, epoch, (self.seed, i))
        np.random.default_rng((self.seed, epoch)).shuffle(order)
        return order

    def _next_rows(self):
        """The next step's rows, each an array of documents. Raises StopIteration after the last epoch."""
        epoch, cursor, waiting = (self.state[key] for key in ("epoch", "cursor", "waiting"))
        pool = [np.array(waiting, dtype=np.int64)]
        lengths = [self._lengths(pool[0])]
        tokens = lengths[0].sum()
        while tokens < self.pool_tokens and (self.epochs is None or epoch < self.epochs):
            pool.append(self.order[cursor : cursor + 64].astype(np.int64))
            lengths.append(self._lengths(pool[-1]))
            tokens += lengths[-1].sum()
            cursor += len(pool[-1])
            if cursor == len(self.order):
                epoch, cursor = epoch + 1, 0
                self.order = self._permutation(epoch)
        pool, lengths = np.concatenate(pool), np.concatenate(lengths)
        if not len(pool):
            raise StopIteration
        rows, free = [], np.ones(len(pool), dtype=bool)
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
        n_tokens = int(self._lengths(documents).sum())
        n_targets = n_tokens + len(documents) - int(self._given(documents).sum())
        rows = rows[self.own_rows]
        shape = (len(rows), self.block_size)
        idx, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        doc, prefix = np.full(shape, -1, np.int64), np.zeros(shape, bool)
        for r, row in enumerate(rows):
            start = 0
            parts = zip(*spans(self.ends, row), self.prefixes[row], self._given(row))
            for number, (first, last, n_prefix, n_given) in enumerate(parts):
                document = self.tokens[first:last]
                end, response = start + len(document) - 1, start + n_prefix
                idx[r, start:end] = document[:-1]
                targets[r, start + n_given - 1 : end] = document[n_given:]  # the last given, such as eoq, predicts one
                doc[r, start:end] = number
                prefix[r, start:response] = True
                start = end
        largest = max(idx.max(), targets.max())
        if largest >= self.vocab_size:
            own = np.concatenate(rows)
            d = next(d for d, first, last in zip(own, *spans(self.ends, own)) if largest in self.tokens[first:last])
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


def prefetch(loader, device="cpu", depth=3):
    """The loader's batches, taken ahead by a thread, in pinned memory for a GPU. An error comes in its turn."""

    def take():
        batch = next(loader, None)
        if batch and device.startswith("cuda"):
            torch.cuda.set_device(device)  # of this thread, which would else take memory of the first GPU
            batch = batch._replace(**{name: getattr(batch, name).pin_memory() for name in batch._fields[:4]})
        return batch

    with ThreadPoolExecutor(1) as thread:
        jobs = deque(thread.submit(take) for _ in range(depth))
        while batch := jobs.popleft().result():
            jobs.append(thread.submit(take))
            yield batch
