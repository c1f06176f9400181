"""A grid of models, each trained on every task and from every seed within the same budget: a table, and two pictures.

    python grid.py config/grid/laptop.py                    # after Ctrl-C or a kill, it does what is left
    python grid.py config/grid/laptop.py --status=True      # the table and pictures of what is done so far

The config file holds a grid's settings, and those of train.py and data.py that all its runs share. A run is a cell, a
task and a seed: a process of train.py, then one of eval.py on held-out documents. In out_dir are

    results.jsonl                    a line for each run that is complete
    grid.md                          means over seeds with 95% intervals, per task and cell; differences of cells
    loss.svg, accuracy.svg           validation loss (that of responses) against training FLOP; accuracies
    <cell>-<task>-<seed>/ and .txt   a run, and what its processes say

FLOP are those of matrix products in training, padding included, attention scores and validation excluded.
"""

from configurator import configure

import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import fields
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import train
from common import (
    check_types,
    errors_name_file,
    exit_on_error,
    finish_rename,
    lock_file,
    one_line,
    read_json,
    replace_file,
)
from model import HRM, HRMConfig
from plot import new_figure, save_figure
from results import markdown_table, percent
from tokenizer import read_meta

# ---- settings ----
out_dir = "out-grid"
grid = [{"name": "hrm"}]  # cells: a name, settings of train.py, and which cell it is held `against` (else the first)
tasks = [{"dataset": "problems"}]  # settings of data.py, for a dataset that is not there
seeds = [0, 1, 2]  # of training; all have the same data
budget = 1e12  # of each run; widths are the cells' own, so that they may have the same parameters, too
budget_unit = "flops"  # of training; or tokens (padding included), or steps
points = 8  # of validation, at most, in a run
curves = []  # cells in the picture of losses; []: all
limit = 0  # questions per evaluation; 0: all, but at most 1,000
jobs = 1  # runs at a time
threads = 1  # CPU threads of a run, whatever else is at work, as another number changes results by rounding
status = False  # train nothing, and tell what there is
settings = configure(globals())
DEFAULTS = dict(train.settings)
SET_BY_GRID = dict(epochs=0.0, init_from="scratch", sample_prompts=0)  # and, for each run another,
SET_BY_GRID |= dict(dataset="", seed=0, out_dir="out", max_iters=1, eval_interval=0)
INTERRUPTED = "interrupted; the same command goes on with what is left"
T_95 = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262  # Student's t for 2, 3, ... seeds, 10 and more
stopping = []  # holds True once no more processes may start
# ----------------------------------------------------------------------------------------------------


def check_settings():
    """Raise ValueError, in one sentence, for a setting that would fail later."""
    for kind, dicts, key in ("grid", grid, "name"), ("tasks", tasks, "dataset"):
        names = [d.get(key) if isinstance(d, dict) else None for d in dicts]
        if wrong := [name for name in names if not isinstance(name, str) or not re.fullmatch(r"[\w.+=-]+", name)]:
            raise ValueError(f"{kind} is a list of dicts with a {key} of letters, digits and -_.+=, not {wrong[0]!r}")
        if not names or len({*names}) < len(names):
            raise ValueError(f"{kind} must not be empty, and each {key} in it another: {', '.join(names)}")
    if not seeds or len({*seeds}) < len(seeds) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"seeds are different whole numbers from 0 on, not {seeds}")
    if budget_unit not in ("flops", "tokens", "steps"):
        raise ValueError(f"budget_unit is flops, tokens or steps, not {budget_unit}")
    if wrong := {key for cell in grid for key in cell} & SET_BY_GRID.keys():
        raise ValueError(f"the grid sets {min(wrong)} itself, so no cell can")
    if unknown := {*curves, *(cell["against"] for cell in grid if "against" in cell)} - {cell["name"] for cell in grid}:
        raise ValueError(f"curves or against has {min(unknown)}, which is no cell of grid")
    for key, least in dict(budget=1, points=1, jobs=1, threads=1, limit=0).items():
        if not least <= settings[key] < math.inf:
            raise ValueError(f"{key} must be at least {least}, not {settings[key]}")


def flags(values):
    return [f"--{key}={value}" for key, value in values.items()]


def prepare_data(task, configs):
    """Make a task's dataset, unless it is there. Returns how many ids its tokenizer has."""
    directory = Path("data", task["dataset"])
    finish_rename(directory)
    if not (directory / "meta.json").exists():
        command = [sys.executable, Path(__file__).with_name("data.py"), *configs, *flags(task)]
        if subprocess.run(command).returncode:  # it has said why
            sys.exit(f"grid.py: {directory} could not be prepared")
    made = read_meta(directory)["prepare_args"]
    want = {key: value for key, value in task.items() if key not in ("dataset", "workers")}
    if differs := [f"{key} {made.get(key)!r}" for key, value in want.items() if made.get(key) != value]:
        raise ValueError(f"{directory} was made with {', '.join(differs)}; give the task's dataset another name")
    return read_meta(directory)["vocab_size"]


# ---- what the runs are ----
def plan_runs(configs):
    """The runs in the order of seeds, tasks and cells, so that a grid which is stopped has all of some seeds. Makes
    datasets that are not there. Raises ValueError for a cell that train.py would refuse before it reads its data."""
    vocab_sizes = [prepare_data(task, configs) for task in tasks]
    runs = []
    for cell in grid:
        own = {key: value for key, value in cell.items() if key not in ("name", "against")}
        for task, vocab_size in zip(tasks, vocab_sizes):
            vars(train).update(DEFAULTS)
            own |= SET_BY_GRID | {"dataset": task["dataset"]}
            shape = train.settings = configure(vars(train), [*configs, *flags(own)])
            with errors_name_file(f"the cell {cell['name']}", "cannot be trained"), torch.device("meta"):
                train.device = train.device.replace("auto", "cuda")  # whether attention fits a GPU is left to the run
                train.check_settings()
                kept = {f.name: shape[f.name] for f in fields(HRMConfig) if f.name in shape}
                model = HRM(HRMConfig(vocab_size, **kept))
                flops = flops_by_step(model)
            own |= {"max_iters": len(flops), "eval_interval": -(-len(flops) // points)}
            for seed in seeds:
                run = SimpleNamespace(cell=cell["name"], task=task["dataset"], seed=seed, flops=flops)
                run.out = Path(out_dir, f"{run.cell}-{run.task}-{seed}")
                last = {"seed": seed, "out_dir": str(run.out)}
                run.args, run.settings = [*configs, *flags(own | last)], shape | own | last | {"limit": limit}
                run.parameters = sum(p.numel() for p in model.parameters())
                runs.append(run)
    return sorted(runs, key=lambda run: seeds.index(run.seed))


def flops_by_step(model):
    """The FLOP of a run's first step, of the first two, and so on to the last that the budget allows, for a model of
    train.py's present settings."""
    per_step, per_token = train.batch_size * train.block_size, cache(model.flops_per_token)
    train.bp_max = train.bp_max or min(5, model.config.n_steps)  # as train.setup() does

    def count(n):
        train.max_iters = n  # on which the schedule depends
        return [*accumulate(per_step * per_token(train.bp_steps_at(step)) for step in range(n))]

    n = int(budget / {"flops": count(1)[0], "tokens": per_step, "steps": 1}[budget_unit])  # the first is the cheapest
    if budget_unit == "flops":
        while n and (flops := count(n))[-1] > budget:
            n = min(n - 1, int(n * budget / flops[-1]) + 1)
    if n < 1:
        raise ValueError(f"the budget of {budget:g} {budget_unit} is less than a step")
    return count(n)


# ---- doing them ----
def execute(run):
    """Train and evaluate a run, from where it stands. Returns its line of results.jsonl. Raises ValueError."""
    with open(f"{run.out}.txt", "ab") as said:
        while not stopping:  # processes of a grid that was killed go on, and hold this file
            with suppress(ValueError):
                lock_file(said, "")
                break
            time.sleep(1)
        resume = ["--init_from=resume"] * (run.out / "run.json").exists()
        how = {key: run.settings[key] for key in ("device", "dtype")}
        call(run, said, "train.py", *run.args, *resume)
        entries = [json.loads(line) for line in (run.out / "log.jsonl").read_text().splitlines()]
        losses = [entry for entry in entries if entry.get("val_loss") is not None]  # None: not finite
        if not losses or losses[-1]["iter"] < len(run.flops):
            raise ValueError(f"no validation loss after the last step, {len(run.flops):,}, is in {run.out}/log.jsonl")
        call(run, said, "eval.py", *flags(how | dict(out_dir=run.out, limit=limit)))
    tokens = max(entry.get("tokens", 0) for entry in entries)
    heldout = read_json(run.out / "eval.json")["tasks"]["heldout"]
    line = dict(cell=run.cell, task=run.task, seed=run.seed, parameters=run.parameters, max_iters=len(run.flops))
    line |= dict(flops=run.flops[-1], tokens=tokens, val_loss=losses[-1]["val_loss"])
    line |= dict(accuracy=heldout["accuracy"], questions=heldout["count"], settings=run.settings)
    return line | dict(losses=[[run.flops[entry["iter"] - 1], entry["val_loss"]] for entry in losses])


def call(run, said, script, *args):
    """Run a script, which writes to the file `said`. Raises ValueError if it fails, with its last line."""
    if stopping:
        raise ValueError(INTERRUPTED)
    command = [sys.executable, Path(__file__).with_name(script), *args]
    how = dict(stdout=said, stderr=said, start_new_session=True)  # Ctrl-C is for this process alone
    run.process = subprocess.Popen(command, env=os.environ | dict(OMP_NUM_THREADS=str(threads)), **how)
    if stopping:  # since the question above
        run.process.terminate()
    if run.process.wait():
        lines = Path(said.name).read_text(errors="replace").replace("\r", "\n").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no word")
        raise ValueError(f"status {run.process.returncode} of {script}: {last} (all of it: {said.name})")


def execute_all(runs, lines):
    """Execute the runs, several at a time, and append their lines to `lines` and results.jsonl as they are complete.
    Returns how many have failed. At its end, however it comes, no process is left."""
    begin, n_failed, pool = time.monotonic(), 0, ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(execute, run): run for run in runs}
        for n_done, future in enumerate(as_completed(futures), 1):
            run = futures[future]
            seconds = time.monotonic() - begin
            left = tqdm.format_interval(seconds / n_done * (len(runs) - n_done))
            try:
                lines.append(future.result())
            except (ValueError, OSError, KeyError) as e:
                n_failed += 1
                print(f"{run.out} failed: {one_line(e)}; {left} left", flush=True)
                continue
            replace_file(Path(out_dir, "results.jsonl"), "".join(json.dumps(x) + "\n" for x in lines).encode())
            scores = f"accuracy {percent(lines[-1]['accuracy'])}, validation loss {lines[-1]['val_loss']:.4f}"
            print(f"{n_done} of {len(runs)}: {run.out}: {scores}; {left} left", flush=True)
    except BaseException:  # Ctrl-C, or a full disk
        print("waiting for checkpoints", flush=True)
        raise
    finally:
        stopping.append(True)
        for run in runs:
            if hasattr(run, "process"):
                run.process.terminate()  # train.py finishes the step, and saves; one that has ended is past that
        pool.shutdown(cancel_futures=True)
    return n_failed


# ---- what comes out ----
def mean_and_half(values):
    """(mean, half of its 95% interval) over seeds, the half 0 for a single one."""
    if (n := len(values)) == 1:
        return values[0], 0.0
    return statistics.mean(values), T_95[min(n, len(T_95) + 1) - 2] * statistics.stdev(values) / n**0.5


def differences(found):
    """Rows of a table: how each cell differs from the one that it is held against, over all tasks and seeds."""
    rows = [("cell", "against", "pairs", "accuracy, points", "validation loss, times")]
    for name, base in ((cell["name"], cell.get("against", grid[0]["name"])) for cell in grid[1:]):
        lines = [[found.get((task["dataset"], cell), ()) for cell in (name, base)] for task in tasks]
        if pairs := [(a, b) for mine, theirs in lines for a in mine for b in theirs if a["seed"] == b["seed"]]:
            points, half = mean_and_half([100 * (a["accuracy"] - b["accuracy"]) for a, b in pairs])
            log, half_log = mean_and_half([math.log(a["val_loss"] / b["val_loss"]) for a, b in pairs])
            cells = [f"{points:+.1f}", f"{math.exp(log):.2f}"]
            if len(pairs) > 1:  # one alone has no interval
                cells[0] += f" ± {half:.1f}"
                cells[1] += f" ({math.exp(log - half_log):.2f} to {math.exp(log + half_log):.2f})"
            rows.append((name, base, len(pairs), *cells))
    return rows


def write_table(found):
    """Write and print grid.md, from {(task, cell): lines}."""
    text = ""
    for task in (task["dataset"] for task in tasks):
        rows = [(task, "parameters", "tokens", "training FLOP", "seeds", "accuracy", "validation loss")]
        for name in (cell["name"] for cell in grid):
            if not (lines := found.get((task, name))):
                rows.append((name, "", "", "", 0, "", ""))
                continue
            row = [name, f"{lines[0]['parameters']:,}", f"{statistics.mean(line['tokens'] for line in lines):,.0f}"]
            row += [f"{lines[0]['flops']:.3e}", len(lines)]
            for key, form in ("accuracy", "{:.2%}"), ("val_loss", "{:.4f}"):
                mean_half = mean_and_half([line[key] for line in lines])[: len(lines)]  # of one seed the mean alone
                row.append(" ± ".join(map(form.format, mean_half)))
            rows.append(row)
        text += f"{markdown_table(rows)}\n"
    text += f"{markdown_table(differences(found))}\nThe same {budget_unit} in training. Means over seeds, or over "
    text += "pairs of the same task and seed, with ± half of their 95% interval (Student's t), or that interval.\n"
    replace_file(Path(out_dir, "grid.md"), text.encode())
    print(text)


def draw(found):
    """Write loss.svg and accuracy.svg, from {(task, cell): lines}. Raises ValueError where matplotlib is missing."""
    names, cells = [task["dataset"] for task in tasks], [cell["name"] for cell in grid]
    figure, panels = new_figure(1, len(names), (1.5 + 4 * len(names), 4))
    for axes, task in zip(panels[0], names):
        for number, cell in enumerate(curves or cells):
            if lines := found.get((task, cell)):
                flops = [x for x, _ in lines[0]["losses"]]
                losses = [*zip(*([y for _, y in line["losses"]] for line in lines))]  # of a point, from each seed
                color, style = f"C{number}", "o-" if number < 10 else "s--"
                axes.plot(flops, [*map(statistics.mean, losses)], style, color=color, markersize=3, lw=1, label=cell)
                axes.fill_between(flops, [*map(min, losses)], [*map(max, losses)], color=color, alpha=0.15, lw=0)
        axes.set(title=task, xlabel="training FLOP", ylabel="validation loss (areas: all seeds)", yscale="log")
    handles = {label: h for axes in panels[0] for h, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False)
    save_figure(figure, Path(out_dir, "loss.svg"))
    figure, panels = new_figure(1, len(names), (1.5 + 4 * len(names), 1 + 0.3 * len(cells)))
    for axes, task in zip(panels[0], names):
        for y, cell in enumerate(cells):
            if lines := found.get((task, cell)):
                mean, half = mean_and_half([100 * line["accuracy"] for line in lines])
                axes.errorbar(mean, y, xerr=half, fmt="o", color="C0", capsize=3)
                axes.plot([100 * line["accuracy"] for line in lines], [y] * len(lines), "|", color="C1")
        axes.set(title=task, xlabel="accuracy, %, with its 95% interval (|: seeds)", xlim=(-2, 102))
        axes.set(yticks=range(len(cells)), ylim=(len(cells) - 0.5, -0.5))
        axes.set_yticklabels(cells if axes is panels[0, 0] else [])
    save_figure(figure, Path(out_dir, "accuracy.svg"))


def main():
    configs, out = [arg for arg in sys.argv[1:] if not arg.startswith("--")], Path(out_dir)
    check_settings()
    if status and not out.exists():
        raise ValueError(f"there is no grid in {out}")
    new_figure(1, 1, (1, 1))  # matplotlib may be missing, as is better known before hours of work
    out.mkdir(parents=True, exist_ok=True)
    runs, path = plan_runs(configs), out / "results.jsonl"
    with open(out / "lock", "wb") as file:
        if not status:
            lock_file(file, f"another grid.py is at work in {out}")
        with errors_name_file(path):
            lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            for line in lines:
                check_types(line, cell=str, task=str, seed=int, settings=dict, accuracy=float, losses=list)
        done = {(line["cell"], line["task"], line["seed"]): line for line in lines}
        for run in runs:
            with errors_name_file(run.out):
                line = done.get((run.cell, run.task, run.seed))
                begun = line or (run.out / "run.json").exists() and read_json(run.out / "run.json")
                old, new = begun["settings"] if begun else {}, run.settings
                keys = sorted(old.keys() & new.keys() - {"out_dir", "init_from"})
            if differs := [f"{k} {old[k]!r} and not {new[k]!r}" for k in keys if old[k] != new[k]]:
                raise ValueError(f"{run.out} was run with {', '.join(differs)}; choose another out_dir for this grid")
        remaining, n_failed = [run for run in runs if (run.cell, run.task, run.seed) not in done], 0
        print(f"{len(runs)} runs, of which {len(remaining)} are left to do", flush=True)
        if not status:
            n_failed = execute_all(remaining, lines)
        found = {}
        for line in lines:
            if line["seed"] in seeds:
                found.setdefault((line["task"], line["cell"]), []).append(line)
        write_table(found)
        draw(found)
        print(f"written to {out}: grid.md, loss.svg, accuracy.svg")
        if n_failed:
            sys.exit(f"grid.py: {n_failed} of {len(remaining)} runs failed; the same command tries them again")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with exit_on_error(INTERRUPTED):
        main()
