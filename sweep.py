"""One setting at several values: an evaluation for each, and a table of them all."""

import json
from pathlib import Path

from common import errors_name_file, replace_file
from ranks import master, print0

KINDS = {"guidance": float, "H_cycles": int, "L_cycles": int}


def run_sweep(sweep, out_dir, evaluate):
    """evaluate(guidance=w, out_dir=...) for each w of "guidance=-0.5,0,0.5", or so for the others of KINDS. It works in
    a directory of its own, out_dir/guidance=w, and returns {task: results}. Prints a table of the scores, and writes
    out_dir/sweep.md, and with all results sweep.json. Raises ValueError."""
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
    lines = [["task", *(f"{name} = {text}" for text in values)], ["---", *["---:"] * len(values)]]
    for task in results[text]:
        lines.append([task, *(f"{result[task]['accuracy']:.2%}" for result in results.values())])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    print0(table)
    for file, text in ("sweep.md", table), ("sweep.json", json.dumps({name: results}, indent=1) + "\n"):
        path = Path(out_dir, file)
        with errors_name_file(path, "could not be written"):
            replace_file(path, text.encode())
        print0(f"written to {path}")
