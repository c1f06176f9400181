"""
Bins -> batches: documents packed into rows, and a state from which the same batches go on.

data/<name>/ has, for the splits train and val:
    <split>.bin    the ids of all documents back to back, uint16 or uint32
    <split>.idx    two int64 per document: where it ends in the bin, and the length of its prefix
    meta.json      per source file: how many documents it has here, and how many an epoch draws

- an epoch is a seeded permutation; a file that gives fewer documents than it has goes on where the
  last epoch stopped
- rows are packed by best fit: no document is cut, lost, or seen more often than the epoch has it
- the rows depend on the seed and their number in a step alone; the ranks share those of a step
- memory: up to 3 GB per rank for the 130 million documents of the published corpus; the bins are
  memory-mapped, and ranks share them
"""

import json
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model import IGNORE

LOOKAHEAD = 128  # documents from which a row is filled


class Batch(NamedTuple):
    """One rank's rows of a step, each (rows, T), and what all ranks share."""

    idx: torch.Tensor  # int64, 0 in padding
    targets: torch.Tensor  # int64, IGNORE in padding and where there is no loss
    doc: torch.Tensor  # int64, the number of the document within its row, -1 in padding
    prefix: torch.Tensor  # bool
    n_targets: int  # of the whole step, over all ranks
    n_tokens: int
    documents: list  # their numbers in the split
    state: dict  # of the loader after this step


def read_meta(directory):
    path = Path(directory, "meta.json")
    if not path.exists():
        sys.exit(f"there is no {path}; python data.py --dataset=... --source=... makes it")
    return json.loads(path.read_text())


class Loader:
    """
    Iterates over batches of `rows` rows (over all ranks) of `block_size` tokens. epochs: how many
    there are, the last batch padded (None: no end). state: of an earlier batch. loss_on:
    "response", or "all" tokens after boq.
    """

    def __init__(
        self,
        directory,
        split,
        rows,
        block_size,
        seed=0,
        rank=0,
        world_size=1,
        epochs=None,
        state=None,
        loss_on="response",
    ):
        if rows < world_size:
            sys.exit(f"a step of {rows} rows is too small for {world_size} ranks")
        assert loss_on in ("response", "all"), "loss_on must be response or all"
        self.rows, self.block_size, self.seed, self.epochs = rows, block_size, seed, epochs
        self.rank, self.world_size, self.loss_on = rank, world_size, loss_on
        meta = read_meta(directory)
        if not meta["splits"][split]["documents"]:
            sys.exit(f"{directory} has no documents in the split {split}")
        self.tokens = np.memmap(Path(directory, f"{split}.bin"), meta["dtype"], mode="r")
        self.index = np.memmap(Path(directory, f"{split}.idx"), np.int64, mode="r").reshape(-1, 2)
        # the last id of a document is never input
        self.lengths = np.diff(self.index[:, 0], prepend=0).astype(np.int32) - 1

        # for each source file: the documents that fit into a row, and how many an epoch draws
        self.files = []
        begin = 0
        for file in meta["files"]:
            end = begin + file[split]["documents"]
            fitting = begin + np.flatnonzero(self.lengths[begin:end] <= block_size)
            repeat = file["repeat"] if split == "train" else 1
            n = min(file[split]["per_epoch"], repeat * len(fitting))
            self.files.append((fitting.astype(np.uint32), n))
            begin = end
        self.left_out = len(self.lengths) - sum(len(fitting) for fitting, _ in self.files)
        self.n_documents = sum(n for _, n in self.files)  # of an epoch
        if self.n_documents == 0:
            sys.exit(f"{directory}: no document of {split} fits into block_size = {block_size}")
        # the input tokens of an epoch
        self.n_tokens = round(sum(n * self.lengths[fit].mean() for fit, n in self.files if n))

        data = [self.n_documents, len(self.tokens)]  # tells other data from that of the state
        self.state = state or {"epoch": 0, "cursor": 0, "waiting": [], "data": data}
        if self.state["data"] != data:
            sys.exit(f"{directory} is not the data that the run had")
        self.order = self.permutation(self.state["epoch"])

    def permutation(self, epoch):
        """The documents of an epoch, shuffled."""
        drawn = []
        for i, (fitting, n) in enumerate(self.files):
            drawn.append(draw(fitting, n, epoch, (self.seed, i)))
        order = np.concatenate(drawn)
        np.random.default_rng((self.seed, epoch)).shuffle(order)
        return order

    def document(self, d):
        """(its ids, the length of its prefix)."""
        end, n_prefix = self.index[d].tolist()
        start = end - 1 - int(self.lengths[d])  # int: a bin may have more than 2**31 tokens
        return self.tokens[start:end], n_prefix

    def next_rows(self):
        """The documents of the next rows, a list for each; afterwards self.state has moved on."""
        epoch, cursor = self.state["epoch"], self.state["cursor"]
        waiting = list(self.state["waiting"])  # the next documents of the epoch, oldest first
        rows = []
        for _ in range(self.rows):
            row, room = [], self.block_size
            while True:
                while len(waiting) < LOOKAHEAD and epoch != self.epochs:
                    more = self.order[cursor : cursor + LOOKAHEAD - len(waiting)]
                    waiting += more.tolist()
                    cursor += len(more)
                    if cursor == len(self.order):
                        epoch, cursor = epoch + 1, 0
                        self.order = self.permutation(epoch)
                lengths = self.lengths[waiting]
                fits = np.flatnonzero(lengths <= room)
                if not len(fits):
                    break
                chosen = fits[:1]  # the oldest; in the end, those that fill the row best
                if row and room - lengths[chosen[0]] < 2 * lengths[fits].mean():
                    chosen = fits[best_pair(lengths[fits], room)]
                row += [waiting[i] for i in chosen]
                room -= lengths[chosen].sum()
                for i in sorted(chosen, reverse=True):
                    del waiting[i]
            rows.append(row)
        # a new dict, for a copy of this loader has a state of its own
        self.state = {**self.state, "epoch": epoch, "cursor": cursor, "waiting": waiting}
        return rows

    def __iter__(self):
        return self

    def __next__(self):
        rows = self.next_rows()
        documents = [d for row in rows for d in row]
        if not documents:
            raise StopIteration
        n_tokens = int(self.lengths[documents].sum())
        n_given = self.index[documents, 1]  # ids of a document that are no targets
        if self.loss_on == "all":
            n_given = np.ones_like(n_given)
        n_targets = n_tokens + len(documents) - int(n_given.sum())

        rows = rows[self.rank :: self.world_size]
        shape = len(rows), self.block_size
        idx = np.zeros(shape, np.int64)
        targets = np.full(shape, IGNORE)
        doc = np.full(shape, -1)
        prefix = np.zeros(shape, bool)
        for r, row in enumerate(rows):
            start = 0
            for number, d in enumerate(row):
                ids, n_prefix = self.document(d)
                end = start + len(ids) - 1
                first = 1 if self.loss_on == "all" else n_prefix  # the id before it predicts it
                idx[r, start:end] = ids[:-1]
                targets[r, start + first - 1 : end] = ids[first:]
                doc[r, start:end] = number
                prefix[r, start : start + n_prefix] = True
                start = end
        tensors = [torch.from_numpy(array) for array in (idx, targets, doc, prefix)]
        return Batch(*tensors, n_targets, n_tokens, documents, self.state)


def draw(documents, n, epoch, seed):
    """
    The n documents that a file gives to an epoch: the next n of an endless row of permutations of
    the file, so that none comes again before all have come.
    """
    size = len(documents)
    if n in (0, size):
        return documents[:n]
    first = epoch * n
    permutations = []
    for turn in range(first // size, (first + n - 1) // size + 1):
        rng = np.random.default_rng((*seed, turn + 1))  # a 0 at the end would be no seed of its own
        permutations.append(rng.permutation(documents))
    return np.concatenate(permutations)[first % size :][:n]


def best_pair(lengths, room):
    """The one or two of these documents whose lengths come nearest to room within it."""
    total = lengths[:, None] + lengths
    np.fill_diagonal(total, lengths)  # one alone
    total[total > room] = 0
    i, j = divmod(total.argmax(), len(lengths))
    return [i, j] if i != j else [i]


def prefetch(loader, device="cpu", depth=3):
    """The loader's batches, made ahead by a thread, in pinned memory for a GPU."""

    def make():
        batch = next(loader, None)
        if batch and device.startswith("cuda"):
            torch.cuda.set_device(device)  # a thread has its own, the first GPU if nothing is said
            pinned = [tensor.pin_memory() for tensor in batch[:4]]
            batch = Batch(*pinned, *batch[4:])
        return batch

    with ThreadPoolExecutor(1) as thread:
        jobs = deque(thread.submit(make) for _ in range(depth))
        while batch := jobs.popleft().result():
            jobs.append(thread.submit(make))
            yield batch
