"""What answers come to: the table of an evaluation, and the comparison of two.

A figure is a mean over questions, and its standard error that of such a mean (that of a sample of n, over sqrt(n)).
"""

import json
import math
from pathlib import Path

import numpy as np

from common import check_types, errors_name_file
from scorers import majority_at, pass_at

LINE = "row sample group prompt generation truth cut over_long shortened tokens score invalid loglikelihoods".split()
N_RESAMPLES = 10_000  # of the bootstrap


def mean_and_error(values):
    """[mean, standard error] of numbers, the error None for one."""
    n, mean = len(values), sum(values) / max(len(values), 1)
    variance = sum((x - mean) ** 2 for x in values) / (n - 1) if n > 1 else None
    return [mean, None if variance is None else math.sqrt(variance / n)]


def by_question(lines):
    """[the lines of each question]."""
    found = {}
    for line in lines:
        found.setdefault(line["row"], []).append(line)
    return [*found.values()]


def mean_of(lines, key):
    return sum(line.get(key, 0.0) for line in lines) / len(lines)


def figures_of(task, lines, tokens_per_sec):
    """A task's row of the table, from its lines."""
    questions = by_question(lines)
    accuracy, stderr = mean_and_error([mean_of(q, "score") for q in questions])
    row = {"accuracy": accuracy, "stderr": stderr, "count": len(questions)}
    row |= {key: mean_of(lines, key) if lines else 0.0 for key in ("invalid", "cut")}
    row |= {key: sum(q[0][key] > 0 for q in questions) for key in ("over_long", "shortened")}
    row |= {"tokens_per_sec": round(tokens_per_sec), "paper": task.paper, "figures": {}, "groups": {}}
    for key in sorted({key for line in lines for key in line} - {*LINE}):
        row["figures"][key] = mean_and_error([mean_of(q, key) for q in questions])
    for k in (k for k in (1, 10, 100) if 1 < len(lines) / max(len(questions), 1) and k <= min(map(len, questions))):
        row["figures"][f"pass@{k}"] = mean_and_error([pass_at(k, [line["score"] for line in q]) for q in questions])
        if all(str(q[0]["truth"]).isdecimal() for q in questions):  # it is of whole numbers
            majorities = [majority_at(k, [line["generation"] for line in q], q[0]["truth"]) for q in questions]
            row["figures"][f"maj@{k}"] = mean_and_error(majorities)
    for group in sorted({line["group"] for line in lines} - {""}):
        some = [line for line in lines if line["group"] == group]
        score, error = mean_and_error([mean_of(q, "score") for q in by_question(some)])
        row["groups"][group] = dict(accuracy=score, stderr=error, count=len(by_question(some)))
        row["groups"][group]["invalid"] = mean_of(some, "invalid")
    if task.macro and (groups := row["groups"].values()):
        macro = sum(group["accuracy"] for group in groups) / len(groups)
        row["figures"]["macro"] = [macro, macro_error([*groups])]
    return row


def macro_error(groups):
    """The standard error of the mean over groups, or None where each has one question. A group of one says nothing of
    how questions vary: for its variance stands that within the other groups, pooled."""
    larger = [group for group in groups if group["count"] > 1]
    if not larger:
        return None
    squares = sum(g["stderr"] ** 2 * g["count"] * (g["count"] - 1) for g in larger)
    pooled = squares / sum(g["count"] - 1 for g in larger)
    return math.sqrt(sum(g["stderr"] ** 2 if g["count"] > 1 else pooled for g in groups)) / len(groups)


# ---- tables ----
HEAD = "task", "n", "score", "s.e.", "1B", "0.6B", "invalid", "cut off", "over-long", "shortened", "tokens/s"


def percent(share, digits=2):
    return "-" if share is None else f"{share:.{digits}%}"


def cells(table):
    """Rows of text: one per task, and one per further figure of it."""
    for name, r in table.items():
        paper = [f"{x:.2f}%" for x in r["paper"]] or ["-", "-"]
        first = [name, f"{r['count']:,}", percent(r["accuracy"]), percent(r["stderr"]), *paper]
        counts = [f"{r[key]:,}" for key in ("over_long", "shortened", "tokens_per_sec")]
        yield [*first, percent(r["invalid"]), percent(r["cut"]), *counts]
        for key, (value, error) in r["figures"].items():
            yield [f"{name} {key}", f"{r['count']:,}", percent(value), percent(error), *[""] * (len(HEAD) - 4)]


def aligned(rows):
    """Rows of cells as lines of text, in columns: the first to the left, the others to the right."""
    rows = [[*map(str, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]).rstrip()


def markdown_table(rows):
    head, *rest = [[*map(str, row)] for row in rows]
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ruler, *rest))


def terminal(table):
    return "\n".join(aligned([HEAD, *cells(table)]))


def markdown(table, about):
    """eval.md: the table, and for tasks with groups one more of these."""
    text = f"{about}. 1B, 0.6B: the paper's scores.\n\n{markdown_table([HEAD, *cells(table)])}"
    for name, r in table.items():
        if r["groups"]:
            rows = [(name, "n", "score", "s.e.", "invalid")]
            for group, g in r["groups"].items():
                shares = (percent(g[key]) for key in ("accuracy", "stderr", "invalid"))
                rows.append([group.replace("|", "\\|"), f"{g['count']:,}", *shares])
            text += f"\n{markdown_table(rows)}"
    return text


# ---- two runs ----
def read_generations(directory):
    """{task: {row: the lines of a question}} of what eval.py has saved in a directory. Raises ValueError or OSError."""
    found = {}
    for path in sorted(Path(directory).glob("generations-*.jsonl")):
        with errors_name_file(path):
            lines = [json.loads(line) for line in path.read_bytes().splitlines()]
            for number, line in enumerate(lines, 1):
                check_types(line, row=int, prompt=str, generation=str)
                if "truth" not in line or not math.isfinite(line["score"]):
                    raise ValueError(f"line {number} has no truth or no score")
            found[path.stem.removeprefix("generations-")] = {q[0]["row"]: q for q in by_question(lines)}
    return found


def mcnemar(n_a, n_b):
    """The exact two-sided p of n_a questions that only a has right and n_b that only b has: as likely as of a coin."""
    n, total, term = n_a + n_b, 0, 1
    for i in range(min(n_a, n_b) + 1):
        total, term = total + term, term * (n - i) // (i + 1)
    return min(1.0, 2 * total / 2**n)


def bootstrap(differences, seed=0):
    """The two-sided p of a mean difference, by drawing questions anew: how often means differ from it by as much."""
    rng, n, mean = np.random.default_rng(seed), len(differences), np.mean(differences)
    means = np.array([differences[rng.integers(n, size=n)].mean() for _ in range(N_RESAMPLES)])
    return float((1 + (np.abs(means - mean) >= abs(mean)).sum()) / (N_RESAMPLES + 1))


def compare(a, b, n_examples=3):
    """A report, as text, of the runs whose answers are in the directories a and b. Raises ValueError or OSError."""
    runs = [read_generations(directory) for directory in (a, b)]
    names = [name for name in runs[0] if name in runs[1]]
    if not names:
        lacking = " and ".join(str(d) for d, run in zip((a, b), runs) if not run)
        what = f"{lacking} has no generations-*.jsonl" if lacking else f"{a} and {b} have no task in common"
        raise ValueError(f"{what}: run eval.py with --save_generations=True for both")
    head = ("task", "n", "a", "b", "b - a", "s.e.", "only a", "only b", "p", "test")
    rows, examples = [head], []
    for name in names:
        one, two = (run[name] for run in runs)
        common = sorted(one.keys() & two.keys())
        if other := [row for row in common if one[row][0]["truth"] != two[row][0]["truth"]]:
            raise ValueError(f"row {other[0]} of {name} is not the same question in {a} and {b}")
        if not common:
            raise ValueError(f"{a} and {b} have no question of {name} in common")
        scores = np.array([[mean_of(run[row], "score") for row in common] for run in (one, two)])
        d = scores[1] - scores[0]
        only = int((d < 0).sum()), int((d > 0).sum())
        exact = bool(np.isin(scores, (0, 1)).all())
        p, error = mcnemar(*only) if exact else bootstrap(d), mean_and_error(d.tolist())[1]
        means = [percent(x) for x in scores.mean(1)]
        test = "McNemar" if exact else "bootstrap"
        rows.append((name, f"{len(common):,}", *means, f"{d.mean():+.2%}", percent(error), *only, f"{p:.2g}", test))
        for sign, who in (-1, "a"), (1, "b"):
            for row in [row for row, x in zip(common, d) if x * sign > 0][:n_examples]:
                texts = [repr(run[row][0]["generation"][-100:]) for run in (one, two)]
                examples.append(f"{name} {row}, better in {who}: ...{one[row][0]['prompt'][-200:]!r}")
                examples.append(f"  truth {one[row][0]['truth']!r:.100}\n  a {texts[0]}\n  b {texts[1]}")
    about = [f"a: {a}", f"b: {b}"]
    return "\n".join([*about, *aligned(rows), "", *examples])
