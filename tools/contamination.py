"""
How much of the benchmarks' questions stands in the training data.

$ python -m tools.contamination --dataset=gsm8k --tasks=gsm8k,arc --data_dir=DIR
$ python -m tools.contamination --dataset=hrm --tasks=paper           # the paper's eight, from the hub
$ python -m tools.contamination --dataset=gsm8k --answers=out-gsm8k   # with eval.py's scores

As in the paper's section 4.2 and appendix A.6 of Llama 2 (arXiv 2307.09288). A question is a task's
prompt without shots, in the dataset's tokens. A token of it counts as contaminated if it lies in n
consecutive ones that also stand in one training document. Clean questions have less than 20% of
such tokens, dirty ones at least 80%. Questions shorter than n tokens are in no subset. Nothing else
is normalized: a reworded question is another one, and a copy within other text may lack its first
and last word, where the tokenizer joins them to what stands beside them.

With the answers of eval.py --save_generations=True, Z = (mean score of a subset - that of all) /
(sigma / sqrt(its questions)), sigma being the standard deviation of all scores. Contamination has
changed a score where Z is below -2 for clean and not dirty questions, and above 2 for the others.

Prints a table and examples; out_dir/contamination-<task>.jsonl has a line per question and n.
"""

from configurator import configure

import json
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from loader import Loader, read_meta
from tasks import PAPER, load_questions
from tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
dataset = "problems"  # data/<dataset>, of data.py
tasks = "gsm8k"  # of tasks.py, with commas between; paper: the eight of the paper's table
data_dir = ""  # of local copies of the benchmarks; "": from the hub
limit = 0  # questions per task; 0: all
answers = ""  # a directory with generations-<task>.jsonl: only what is answered there
out_dir = "out"  # results go there
ngrams = (13, 20)  # n, in tokens
n_examples = 3  # per task, of the most contaminated questions
configure(globals())
# -----------------------------------------------------------------------------

BASE = 0x9E3779B97F4A7C15  # of the hashes: odd, so it has an inverse modulo 2**64
BLOCK = 2**16  # tokens hashed at a time: they fit a core's cache


def scan(tokens, document_ends, ids, question_ends, n):
    """
    Look for the questions' n-grams in the documents. tokens, ids: of all documents, of all
    questions; the ends are theirs. Returns (starts of all n-grams in ids, a place of each in
    tokens, or -1). Memory grows with the questions, not with the documents.
    """
    # a hash is the sum of the tokens times BASE**0, BASE**1, ... modulo 2**64
    ends = np.repeat(question_ends, np.diff(question_ends, prepend=0))
    starts = np.flatnonzero(np.arange(len(ids)) + n <= ends)
    hashes = np.zeros(len(starts), np.uint64)
    for k in reversed(range(n)):
        hashes = hashes * np.uint64(BASE) + ids[starts + k]
    known, first, numbers = np.unique(hashes, return_index=True, return_inverse=True)
    first = starts[first]
    place = np.full(len(known), -1)
    if len(known) == 0:  # all questions are shorter
        return starts, place

    # most hashes of a text are not in this table, and need no search
    bits = min((32 * len(known)).bit_length(), 28)
    shift = np.uint64(64 - bits)
    table = np.zeros(2**bits, bool)
    table[known >> shift] = True
    factors = np.full(BLOCK + n, BASE, np.uint64)
    powers = np.cumprod(factors)
    factors[:] = pow(BASE, -1, 2**64)
    inverses = np.cumprod(factors)

    def look_up(start):
        """(numbers of n-grams, where each stands) in a block."""
        block = np.array(tokens[start : start + BLOCK + n - 1])
        sums = np.zeros(len(block) + 1, np.uint64)
        np.cumsum(block * powers[: len(block)], out=sums[1:])
        hashes = sums[n:] - sums[:-n]
        hashes *= inverses[: len(hashes)]
        at = np.flatnonzero(table[hashes >> shift])
        number = np.searchsorted(known, hashes[at])
        number = number.clip(max=len(known) - 1)
        for k in range(n):
            same = block[at + k] == ids[first[number] + k]
            at, number = at[same], number[same]
        document = np.searchsorted(document_ends, start + at, "right")
        inside = start + at + n <= document_ends[document]
        return number[inside], start + at[inside]

    n_threads = os.cpu_count()  # numpy releases Python's lock while it works
    block_starts = range(0, len(tokens), BLOCK)
    with ThreadPoolExecutor(n_threads) as pool:
        for i in tqdm(range(0, len(block_starts), n_threads), f"{n}-grams"):
            some = block_starts[i : i + n_threads]
            for number, at in pool.map(look_up, some):
                place[number] = at
    return starts, place[numbers]


def shares_of(starts, place, question_ends, n):
    """The share of contaminated tokens of each question, NaN if it is shorter than n."""
    lengths = np.diff(question_ends, prepend=0)
    change = np.zeros(question_ends[-1] + 1, int)
    begins = starts[place >= 0]
    change[begins] += 1
    change[begins + n] -= 1
    contaminated = (np.cumsum(change) > 0).astype(int)
    n_contaminated = np.add.reduceat(contaminated, question_ends - lengths)
    shares = n_contaminated / lengths
    shares[lengths < n] = np.nan
    return shares


def subsets_of(shares, scores=None):
    """{subset: (questions, mean score, Z)}; without scores the latter are NaN."""
    subsets = {
        "all": shares >= 0,
        "clean": shares < 0.2,
        "not clean": shares >= 0.2,
        "not dirty": shares < 0.8,
        "dirty": shares >= 0.8,
    }
    found = {}
    for name, chosen in subsets.items():
        n = int(chosen.sum())
        mean = z = np.nan
        if n and scores is not None:
            whole = scores[subsets["all"]]
            error = whole.std() / n**0.5
            mean = scores[chosen].mean()
            if error:
                z = (mean - whole.mean()) / error
        found[name] = n, mean, z
    return found


def read_scores(path):
    """{row: mean score over samples} of the answers that eval.py has saved."""
    scores = defaultdict(list)
    with open(path, encoding="utf-8", newline="\n") as file:
        for text in file:
            line = json.loads(text)
            scores[line["row"]].append(line["score"])
    return {row: np.mean(scores[row]) for row in scores}


def report(label, n, shares, scores):
    print(f"{label}, n = {n}: {np.nanmean(shares):.2%} of a question, on average")
    table = subsets_of(shares, scores)
    for name in table:
        count, mean, z = table[name]
        line = f"  {name:<10}{count:>8,}"
        if scores is not None:
            line += f"{mean:>9.2%}  Z {z:+.2f}"
        print(line)
    print(f"  too short {np.isnan(shares).sum():>8,}")


def main():
    directory = Path("data", dataset)
    loader = Loader(directory, "train", rows=1, block_size=2**30)
    document_ends = np.ascontiguousarray(loader.index[:, 0])
    files = read_meta(directory)["files"]
    file_ends = np.cumsum([file["train"]["documents"] for file in files])
    tokenizer = load_tokenizer(directory)
    Path(out_dir).mkdir(parents=True, exist_ok=True)

    for task in PAPER if tasks == "paper" else tasks.split(","):
        label = Path(task).stem
        questions = dict(enumerate(load_questions(task, directory, data_dir, limit)))
        scores = None
        if answers:
            path = Path(answers, f"generations-{label}.jsonl")
            found = read_scores(path)
            questions = {row: questions[row] for row in questions if row in found}
            scores = np.array([found[row] for row in questions])
        asked = []
        for question in questions.values():
            asked.append(tokenizer.encode(question.prompt.strip()))
        question_ends = np.cumsum([len(ids) for ids in asked])
        ids = np.concatenate(asked).astype(loader.tokens.dtype)

        lines = []
        for n in ngrams:
            starts, place = scan(loader.tokens, document_ends, ids, question_ends, n)
            shares = shares_of(starts, place, question_ends, n)
            report(label, n, shares, scores)
            for i, row in enumerate(questions):
                if np.isnan(shares[i]):
                    continue
                line = {"row": row, "n": n}
                line["share"] = float(shares[i])
                question = question_ends[i] - len(asked[i]), question_ends[i]
                first, last = np.searchsorted(starts, question)
                at = int(place[first:last].max())
                if at >= 0:  # in a document that has one of the n-grams
                    d = int(np.searchsorted(document_ends, at, "right"))
                    file = np.searchsorted(file_ends, d, "right")
                    excerpt = loader.tokens[at : at + n].tolist()
                    line["file"] = files[file]["name"]
                    line["document"] = d
                    line["excerpt"] = tokenizer.decode(excerpt)
                lines.append(line)
        worst = sorted(lines, key=lambda line: -line["share"])
        print(*worst[:n_examples], sep="\n")
        path = Path(out_dir, f"contamination-{label}.jsonl")
        with open(path, "w") as file:
            for line in lines:
                print(json.dumps(line), file=file)


if __name__ == "__main__":
    main()
