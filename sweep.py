"""One setting at several values: an evaluation for each, and a table of them all."""

import json
from importlib.util import find_spec
from pathlib import Path

from common import errors_name_file, replace_file
from plot import new_figure, save_figure
from ranks import master, print0
from results import markdown_table, percent

KINDS = {"guidance": float, "H_cycles": int, "L_cycles": int, "kl_threshold": float}


def run_sweep(sweep, out_dir, evaluate):
    """evaluate(guidance=w, out_dir=...) for each w of "guidance=-0.5,0,0.5", or so for the others of KINDS. It works in
    a directory of its own, out_dir/guidance=w, and returns {task: results}. Prints a table of scores and speeds, and
    writes out_dir/sweep.md, with all results sweep.json, and of kl_threshold the curve sweep.svg. Raises ValueError."""
    name, _, values = sweep.partition("=")
    try:
        values = {f"{KINDS[name](value):g}": KINDS[name](value) for value in values.split(",")}
    except (KeyError, ValueError):
        want = f"one of {', '.join(KINDS)}, then = and numbers with commas between"
        raise ValueError(f"--sweep is {want}, such as guidance=-0.5,0,0.5, and not {sweep}") from None
    results = {}
    for text, value in values.items():
        print0(f"--- {name} = {text}")
        results[text] = evaluate(**{name: value, "out_dir": str(Path(out_dir, f"{name}={text}"))})
    if not master:  # the first rank alone has all results
        return
    rows = [["task", *(f"{name} = {text}" for text in values)]]
    for task in results[text]:
        found = [result[task] for result in results.values()]
        rows.append([task, *(percent(one["accuracy"]) for one in found)])
        if name == "kl_threshold":
            rows.append([f"{task} depth", *(percent(depth(one)) for one in found)])
            rows.append([f"{task} tokens/s", *(f"{one['tokens_per_sec']:,}" for one in found)])
    print0(table := markdown_table(rows))
    for file, text in ("sweep.md", table), ("sweep.json", json.dumps({name: results}, indent=1) + "\n"):
        path = Path(out_dir, file)
        with errors_name_file(path, "could not be written"):
            replace_file(path, text.encode())
        print0(f"written to {path}")
    if name == "kl_threshold" and find_spec("matplotlib"):
        draw(results, Path(out_dir, "sweep.svg"))


def depth(result):
    """The share of all H-cycles that an answer's tokens took, on average; a threshold of 0 spares none."""
    return result["figures"].get("depth", [1.0])[0]


def draw(results, path):
    """Scores against depth, a point per threshold: {threshold: {task: results}}."""
    figure, [[axes]] = new_figure(1, 1, (5, 3.2))
    for task in results[[*results][0]]:
        points = [(depth(result[task]), result[task]["accuracy"]) for result in results.values()]
        axes.plot(*zip(*sorted(points)), "o-", label=task, markersize=4)
        for text, point in zip(results, points):
            axes.annotate(text, point, (4, -9), textcoords="offset points", fontsize=7)
    axes.set(xlabel="H-cycles spent, as a share of all (numbers: kl_threshold)", ylabel="score")
    axes.legend(frameon=False)
    with errors_name_file(path, "could not be written"):
        save_figure(figure, path)
    print0(f"written to {path}")
