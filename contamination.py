"""How much of a benchmark stands in the training data: tokens of its questions, in n-grams that documents have, too.

    python contamination.py config/hrm1b.py --tasks=paper                       # the paper's eight, from the hub
    python contamination.py --dataset=gsm8k --tasks=gsm8k,arc --data_dir=DIR    # local files, as for eval.py
    python contamination.py --dataset=gsm8k --answers=out-gsm8k    # with the scores of eval.py --save_generations=True

As in the paper's section 4.2 and appendix A.6 of Llama 2 (arXiv 2307.09288). A question is a task's prompt, with its
choices and passage and without shots, stripped of white space, in the dataset's own tokens. A token of it counts as
contaminated if it lies in n consecutive ones that also stand in one training document, in its prefix or response. Clean
questions have less than 20% of such tokens, dirty ones at least 80%. Questions shorter than n tokens are in no subset;
they are counted. Nothing else is normalized: a reworded question is another one, and a copy within other text may lack
its first and last word, where the tokenizer joins them to what stands beside them.

Z = (mean score of a subset - that of all) / (sigma / sqrt(n of the subset)), with the standard deviation sigma of all.
Contamination has changed a score where Z is below -2 for clean and not dirty questions, and above 2 for the others.

Prints tables and examples, and writes out_dir/contamination.md and contamination-<task>.jsonl: for each question and n
the share, and the longest match: its length in tokens, the document's number in train.bin, and an excerpt. Of the
places where an n-gram stands, one in the longest run of such is looked at, so a longer match may be missed, if rarely.
"""

from configurator import configure

import json
import os
from bisect import bisect_right
from collections import Counter
from contextlib import closing
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common import exit_on_error, replace_files
from loader import chunks, open_split, spans
from results import aligned, markdown_table, mean_of, percent, read_generations
from tasks import find_tasks
from tokenizer import check_file, load_encoding, read_meta
from workers import in_order

# ---- settings ----
dataset = "problems"  # data/<dataset>, of data.py
tasks = "gsm8k"  # of tasks.py, with commas between; paper: its eight
data_dir = ""  # of local copies of the benchmarks, a directory for each; "": from the hub
limit = 0  # questions per task; 0: all
answers = ""  # a directory with eval.py's generations-<task>.jsonl: only what is answered there, and its scores
out_dir = "out"  # results go there
ngrams = (13, 20)  # n, in tokens
n_examples = 3  # per task, of the most contaminated questions
threads = 0  # 0: one per core
settings = configure(globals())
BASE = 0x9E3779B97F4A7C15  # of the hashes: odd, so it has an inverse modulo 2^64
BLOCK = 2**16  # tokens hashed at a time, which fit a core's cache
SIGNS = {"all": 0, "clean": -1, "not clean": 1, "not dirty": -1, "dirty": 1}  # of Z, where scores are contaminated
# ----------------------------------------------------------------------------------------------------


# ---- n-grams ----
class Grams(NamedTuple):
    """All n-grams of the questions. Equal ones have the same number, the place of their hash in `hashes`."""

    n: int
    places: np.ndarray  # where each begins in the questions' ids
    numbers: np.ndarray  # of each
    hashes: np.ndarray  # uint64, ascending; the last is the largest possible, of no n-gram
    first: np.ndarray  # the first of the places of each number


def make_grams(ids, ends, n):
    """The Grams of questions that end at `ends` in `ids` (at least n more ids follow the last). A hash is the sum of
    the tokens times BASE^0, BASE^1, ... modulo 2^64. If two n-grams that differ had the same, one would be taken for
    the other; with ten million of them, the odds are 1 to 10^5."""
    places = np.flatnonzero(np.arange(ends[-1]) + n <= np.repeat(ends, np.diff(ends, prepend=0)))
    hashes = np.zeros(len(places), np.uint64)
    for k in reversed(range(n)):
        hashes = hashes * np.uint64(BASE) + ids[places + k]
    hashes, first, numbers = np.unique(hashes, return_index=True, return_inverse=True)
    return Grams(n, places, numbers, np.append(hashes, np.uint64(2**64 - 1)), np.append(places[first], ends[-1]))


def scan(bin, dtype, ends, ids, question_ends, ns):
    """Look for the questions' n-grams in the documents of a bin. Returns ([(Grams, found)] by ascending n, best).
    found[number] says whether a document has the n-gram. best (2, numbers) is of the smallest n: how many in a row at
    most stand where the n-gram does, and its place in the bin there. Tokens are compared where hashes are
    equal. Memory grows with the questions, not with the bin."""
    grams = [make_grams(ids, question_ends, n) for n in sorted({*ns})]
    bits = min((32 * len(grams[0].hashes)).bit_length(), 28)
    shift, table = np.uint64(64 - bits), np.zeros(2**bits, bool)
    table[grams[0].hashes >> shift] = True  # a hash that is not in this table, as most of a text's, needs no search
    factors = (np.full(BLOCK + max(ns), x, np.uint64) for x in (BASE, pow(BASE, -1, 2**64)))
    powers, inverses = map(np.cumprod, factors)

    def look_up(block):
        """([(numbers, places in the block) that stand in it] for each n, tokens, start) of a block of the bin."""
        start, stop, ends = block
        tokens = np.fromfile(bin, dtype, stop - start, offset=start * dtype.itemsize)
        sums, found = np.zeros(len(tokens) + 1, np.uint64), []
        np.cumsum(tokens * powers[: len(tokens)], out=sums[1:])
        hashes = sums[grams[0].n :] - sums[: -grams[0].n]
        hashes *= inverses[: len(hashes)]
        at = np.flatnonzero(table.take((hashes >> shift).view(np.int64)))
        for n, _, _, known, first in grams:  # the longer begin where shorter ones are found
            document = np.searchsorted(ends, start + at, "right")
            at = at[start + at + n <= np.minimum(ends[document], stop)]
            hashes = (sums[at + n] - sums[at]) * inverses[at]
            numbers = np.searchsorted(known, hashes)
            for k in range(n):
                same = tokens[at + k] == ids[first[numbers] + k]
                at, numbers = at[same], numbers[same]
            found.append((numbers, at))
        return found, len(tokens), start

    def blocks():
        for _, starts, stops in chunks(ends):
            for start in range(int(starts[0]), int(stops[-1]), BLOCK):
                stop = min(start + BLOCK + max(ns) - 1, int(stops[-1]))
                yield stop - start, (start, stop, stops)

    found, best = [np.zeros(len(g.hashes), bool) for g in grams], np.zeros((2, len(grams[0].hashes)), np.int64)
    bar = tqdm(total=Path(bin).stat().st_size, desc=f"reading {bin}", unit="B", unit_scale=True)
    results = in_order(look_up, blocks(), threads or os.cpu_count(), processes=False)  # numpy releases Python's lock
    with bar, closing(results):
        for _, _, (hits, n_tokens, start) in results:
            for of_all, (numbers, _) in zip(found, hits):
                of_all[numbers] = True
            numbers, at = hits[0]
            runs = np.diff(np.append(np.flatnonzero(np.diff(at, prepend=-2) != 1), len(at)))
            runs = np.repeat(runs, runs)
            order = np.lexsort((-at, runs))  # of a number's places the last is kept: the longest run, the first of such
            order = order[runs[order] > best[0, numbers[order]]]
            best[:, numbers[order]] = runs[order], start + at[order]
            bar.update(min(n_tokens, BLOCK) * dtype.itemsize)
    return [*zip(grams, found)], best


def shares_of(grams, found, ends):
    """(questions,) The share of contaminated tokens, NaN for questions shorter than n."""
    lengths, change = np.diff(ends, prepend=0), np.zeros(ends[-1] + 1, np.int64)
    hits = grams.places[found[grams.numbers]]
    change[hits] += 1
    change[hits + grams.n] -= 1
    n_contaminated = np.add.reduceat((np.cumsum(change) > 0).astype(np.int64), ends - lengths)
    return np.where(lengths < grams.n, np.nan, n_contaminated / lengths)


def longest_match(question, tokens, ends, places):
    """(length, document, place in the bin) of the longest part of a question's ids in a document. Looked at are the
    documents of `places`, pairs of where the question, if it were there as a whole, would begin, and a place in it."""
    best = 0, 0, 0
    for begin, d in sorted({(begin, bisect_right(ends, place)) for begin, place in places}):
        start, stop = (int(x) for x in np.clip((begin, begin + len(question)), *spans(ends, d)))
        same = tokens[start:stop] == question[start - begin : stop - begin]
        for a, b in np.flatnonzero(np.diff(same, prepend=False, append=False)).reshape(-1, 2).tolist():
            best = max(best, (b - a, d, start + a), key=lambda match: match[0])
    return best


# ---- subsets ----
def subsets_of(shares, scores=None):
    """{subset: its questions, mean share, and with scores mean score and Z} of questions, by their shares."""
    chosen = [shares >= 0, shares < 0.2, shares >= 0.2, shares < 0.8, shares >= 0.8]
    table = {}
    for (name, sign), some in zip(SIGNS.items(), chosen):
        n = int(some.sum())
        table[name] = {"questions": n, "share": shares[some].mean() if n else None, "score": None, "z": None}
        if n and scores is not None:
            mean, sigma = scores[chosen[0]].mean(), scores[chosen[0]].std()
            table[name]["score"] = scores[some].mean()
            table[name]["z"] = (scores[some].mean() - mean) / (sigma / n**0.5) if sign and sigma else None
    return table


def cell(r):
    """The text of a subset."""
    score = "" if r["score"] is None else f": {percent(r['score'])}"
    return f"{r['questions']:,}{score}" + ("" if r["z"] is None else f", Z {r['z']:+.2f}")


def is_flagged(table):
    """Llama 2's criterion, of subsets_of()."""
    return all((table[name]["z"] or 0) * sign > 2 for name, sign in SIGNS.items() if sign)


# ---- the command ----
def read_questions(name, task, directory, answered):
    """(questions, scores): of the questions in `answered` {row: lines}, or if that is None all, and None."""
    questions = task.questions(source=directory, data_dir=data_dir, limit=limit)[: limit or None]
    n_all, questions = len(questions), [q for q in questions if answered is None or q.row in answered]
    if not questions:
        raise ValueError(f"the task {name} has no questions" + f" that are answered in {answers}" * bool(n_all))
    if answered is None:
        return questions, None
    print(f"{name}: {len(questions):,} of {n_all:,} questions are answered in {answers}")
    if other := [q.row for q in questions if not answered[q.row][0]["prompt"].endswith(q.prompt)]:
        raise ValueError(f"row {other[0]} of {name} is not the question that is answered in {answers}")
    return questions, np.array([mean_of(answered[q.row], "score") for q in questions])


def matches_of(asked, grams, best, tokens, ends, encoding, files):
    """Yields of each question what its lines say of its longest match. `files`: [(name, end of its documents)]."""
    end = 0
    for question in asked:
        begin, end = end, end + len(question)
        mine = slice(*np.searchsorted(grams.places, (begin, end)))
        runs, at = best[:, grams.numbers[mine]]
        places = zip((at - grams.places[mine] + begin)[runs > 0].tolist(), at[runs > 0].tolist())
        length, d, place = longest_match(question, tokens, ends, places)
        line = {"tokens": len(question), "match": length}
        if length:
            start, stop = np.clip((place - 8, place + length + 8), *spans(ends, d))
            line |= {"document": d, "file": next(name for name, end in files if d < end)}
            line["excerpt"] = encoding.decode(tokens[start:stop].tolist())[:500]
        yield line


def main():
    if not ngrams or not all(type(n) is int and 1 <= n <= 1000 for n in ngrams):
        raise ValueError(f"ngrams are numbers of tokens from 1 to 1,000, such as (13, 20), and not {ngrams}")
    if min(limit, n_examples, threads) < 0:
        raise ValueError("limit, n_examples and threads must be at least 0")
    directory, chosen = Path("data", dataset), find_tasks(tasks)
    meta, encoding = read_meta(directory), load_encoding(directory)
    for file in "train.bin", "train.idx":
        check_file(directory, file, meta)
    tokens, ends, _ = open_split(directory, "train")
    file_ends = accumulate(file["train"]["documents"] for file in meta["files"])
    files = [*zip((file["name"] or "train.bin" for file in meta["files"]), file_ends)]  # "": from before mixtures
    answered = read_generations(answers) if answers else dict.fromkeys(chosen)
    if lacking := [name for name in chosen if name not in answered]:
        raise ValueError(f"{answers} has no generations-{lacking[0]}.jsonl: run eval.py with --save_generations=True")
    found = {name: read_questions(name, task, directory, answered[name]) for name, task in chosen.items()}
    asked = [np.array(encoding.encode(q.prompt.strip()), tokens.dtype) for some, _ in found.values() for q in some]
    question_ends = np.cumsum([*map(len, asked)])
    ids = np.concatenate([*asked, np.zeros(max(ngrams), tokens.dtype)])
    by_n, best = scan(directory / "train.bin", tokens.dtype, ends, ids, question_ends, ngrams)
    shares = {grams.n: shares_of(grams, of_n, question_ends) for grams, of_n in by_n}
    matches = matches_of(asked, by_n[0][0], best, tokens, ends, encoding, files)

    rows, notes, examples, last = [["task", "n", "too short", "contaminated", *SIGNS]], [], [], 0
    with replace_files(out_dir) as part:
        for name, (questions, scores) in found.items():
            first, last = last, last + len(questions)
            for n, of_all in shares.items():
                table = subsets_of(of_all[first:last], scores)
                share, n_short = table["all"]["share"], len(questions) - table["all"]["questions"]
                rows.append([name, n, f"{n_short:,}", percent(share), *map(cell, table.values())])
                if is_flagged(table):
                    notes.append(f"{name}, n = {n}: all four |Z| are above 2: contamination has changed the score.")
            lines = [{"row": q.row, **line} for q, line in zip(questions, matches)]
            if top := Counter(line["file"] for line in lines if line["match"]).most_common(5):
                counts = ", ".join(f"{file} ({k:,})" for file, k in top)
                notes.append(f"{name}: files with the longest matches (of how many questions): {counts}.")
            share = shares[min(ngrams)][first:last]
            for i in sorted(np.flatnonzero(share > 0), key=lambda i: (-share[i], -lines[i]["match"]))[:n_examples]:
                line = lines[i]
                where = f"document {line['document']:,} of {line['file']}"
                match = f"{share[i]:.1%}, {line['match']} of {line['tokens']} tokens are in {where}"
                examples.append(f"{name} {line['row']}: {match}: {line['excerpt'][:200]!r}")
            with open(part / f"contamination-{name}.jsonl", "w") as file:
                for i, line in enumerate(lines, first):
                    for n in shares:
                        share = None if np.isnan(shares[n][i]) else shares[n][i]
                        print(json.dumps({"n": n, "share": share, **line}), file=file)
        about = f"Questions that stand in the training data of {directory}, `--tasks={tasks}`."
        text = "\n\n".join([about, markdown_table(rows).strip(), *notes]) + "\n"
        (part / "contamination.md").write_text(text, encoding="utf-8")
    print("\n".join([*aligned(rows), *notes, *examples]))
    print(f"written to {out_dir}/contamination.md and contamination-<task>.jsonl")


if __name__ == "__main__":
    with exit_on_error("interrupted; nothing is written"):
        main()
