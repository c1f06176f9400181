"""
Compare two runs of eval.py, question by question.

$ python eval.py --out_dir=out-a --tasks=gsm8k --save_generations=True
$ python eval.py --out_dir=out-b --tasks=gsm8k --save_generations=True
$ python -m tools.compare --a=out-a --b=out-b

For each task of both: the mean scores, their difference with its standard error, how many questions
are better in one alone, and p, by a permutation test: how often the difference is as large if a
coin decides, for each question, which of its two scores is whose. For scores of 0 and 1 that is
McNemar's test.
"""

from configurator import configure

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

# -----------------------------------------------------------------------------
a = "out-a"  # directories with generations-<task>.jsonl
b = "out-b"
n_rows = 10  # to name per task, of questions whose scores differ
configure(globals())
# -----------------------------------------------------------------------------


def read_generations(path):
    """{(row, prompt, truth): the scores of the question's samples}."""
    found = defaultdict(list)
    with open(path, encoding="utf-8", newline="\n") as file:
        for text in file:
            line = json.loads(text)
            question = line["row"], line["prompt"], str(line["truth"])
            found[question].append(line["score"])
    return found


def permutation_test(differences, n_draws=10_000):
    """The two-sided p of a sum of differences whose signs are as likely to be the others."""
    differences = differences[differences != 0]
    rng = np.random.default_rng(0)
    n_as_large = 1  # the signs that they have
    for _ in range(n_draws):
        signs = rng.integers(2, size=len(differences)) * 2 - 1
        n_as_large += abs(signs @ differences) >= abs(differences.sum()) - 1e-9
    return n_as_large / (n_draws + 1)


def main():
    paths = [path for path in Path(a).glob("generations-*.jsonl") if Path(b, path.name).exists()]
    if not paths:
        sys.exit(f"{a} and {b} have no generations of the same task: see --save_generations=True")
    head = ["n", "a", "b", "b - a", "s.e.", "a better", "b better", "p"]
    print(f"{'task':<22}", *(f"{cell:>9}" for cell in head))
    for path in sorted(paths):
        task = path.stem.removeprefix("generations-")
        in_a, in_b = read_generations(path), read_generations(Path(b, path.name))
        common = [question for question in in_a if question in in_b]
        if len(common) < 2:
            sys.exit(f"{a} and {b} do not have the same questions of {task}")
        scores_a = np.array([np.mean(in_a[question]) for question in common])
        scores_b = np.array([np.mean(in_b[question]) for question in common])
        d = scores_b - scores_a
        error = d.std(ddof=1) / len(d) ** 0.5
        cells = [
            len(d),
            f"{scores_a.mean():.2%}",
            f"{scores_b.mean():.2%}",
            f"{d.mean():+.2%}",
            f"{error:.2%}",
            (d < 0).sum(),
            (d > 0).sum(),
            f"{permutation_test(d):.2g}",
        ]
        print(f"{task:<22}", *(f"{cell:>9}" for cell in cells))
        different = [common[i][0] for i in np.flatnonzero(d)]
        print("  rows that differ:", *different[:n_rows])


if __name__ == "__main__":
    main()
