"""
Many models, each trained on the same tasks, from several seeds, within one budget: a table with
intervals over seeds, and two pictures (needs matplotlib).

$ python -m tools.grid config/grid/laptop.py   # after Ctrl-C or a kill, the same command goes on

The config file holds settings of train.py that all runs share, and

cells  dict(name="hrm", ...) with settings of train.py. against="name": the cell that it is compared
       with, seed by seed; otherwise the first
tasks  dict(name="x", dataset="x", flops=1e12), or tokens=1e6 in place of flops. make=[...]: the
       commands that make data/x, if it is not there. cells=["hrm"]: these alone
seeds  of training; cells and tasks may have seeds= of their own, of which the task's count

In out_dir are then grid.md, accuracy.svg, loss.svg, and for each run task/cell-seed/ and .txt, what
its processes say: train.py, then eval.py on held-out documents. In the table, ± is half of a 95%
interval over seeds (nan: there is one seed), and a ratio has its interval in brackets. FLOP and
tokens are those of training, with padding, and without attention scores.
"""

from configurator import configure, run_config, settings_of

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from bisect import bisect_right
from collections import defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import latest_checkpoint
from loader import read_meta
from model import HRM, HRMConfig

# -----------------------------------------------------------------------------
out_dir = "out-grid"
cells = [{"name": "hrm"}]
tasks = [{"name": "problems", "dataset": "problems", "make": ["python data.py"], "flops": 1e12}]
seeds = [0, 1, 2]
groups = ""  # a regular expression: what it finds in a prompt is the question's group
points = 8  # validations per run, at most
curves = []  # cells in the pictures; []: all
jobs = 1  # runs at a time
threads = 1  # per run; another number changes results by rounding
configure(globals())
# -----------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
T_95 = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365  # Student's t for 2 to 8 seeds


# args: of train.py; flops: a list, after each step
Run = namedtuple("Run", "seed task cell out args flops n_tokens n_params")


def is_done(run):
    last = run.out / f"step-{len(run.flops):07d}"
    return last.exists() and (run.out / "eval.json").exists()


# -----------------------------------------------------------------------------
# plans


def flops_after_steps(model, s, max_iters):
    """FLOP after each step with the settings s, by train.py's schedule of bp_steps."""
    bp_max = min(s["bp_max"], model.config.n_steps)
    n_warmup = s["bp_warmup"] * max_iters
    per_token = cache(model.flops_per_token)
    found = []
    for step in range(max_iters):
        progress = min(1.0, step / n_warmup) if n_warmup else 1.0
        bp_steps = s["bp_min"] + int(progress * (bp_max - s["bp_min"]))
        found.append(s["batch_size"] * s["block_size"] * per_token(bp_steps))
    return list(accumulate(found))


def steps_within(task, model, s):
    """How many steps the task's budget allows."""
    if "tokens" in task:
        return int(task["tokens"] / s["batch_size"] / s["block_size"])
    cheapest = flops_after_steps(model, s, 1)[0]
    counts = range(1, int(task["flops"] / cheapest) + 2)
    return bisect_right(counts, task["flops"], key=lambda n: flops_after_steps(model, s, n)[-1])


def plan(task, cell, shared):
    """The runs of a cell on a task. shared: settings of train.py."""
    s = {**shared, **cell, "dataset": task["dataset"]}
    for key in "name", "against", "seeds":  # the grid's own
        s.pop(key, None)
    shape = {key: s[key] for key in HRMConfig.__dataclass_fields__ if key in s}
    vocab_size = read_meta(Path("data", s["dataset"]))["vocab_size"]
    with torch.device("meta"):
        model = HRM(HRMConfig(vocab_size, **shape))
    n = steps_within(task, model, s)
    assert n, f"the budget of {task['name']} is less than one step of {cell['name']}"
    s.update(max_iters=n, epochs=0.0, sample_prompts=0)
    s["eval_interval"] = -(-n // points)
    n_tokens = n * s["batch_size"] * s["block_size"]
    n_params = sum(p.numel() for p in model.parameters())
    flops = flops_after_steps(model, s, n)
    runs = []
    for seed in task.get("seeds", cell.get("seeds", seeds)):
        out = Path(out_dir, task["name"], f"{cell['name']}-{seed}")
        s.update(seed=seed, out_dir=out)
        args = [f"--{key}={value}" for key, value in s.items()]
        names = task["name"], cell["name"]
        runs.append(Run(seed, *names, out, args, flops, n_tokens, n_params))
    return runs


def plan_all():
    shared = {}
    exec("\n".join(settings_of(ROOT / "train.py").values()), {}, shared)  # its defaults
    for path in sys.argv[1:]:
        if not path.startswith("--"):
            config = run_config(path)
            shared.update({key: config[key] for key in config if key in shared})
    runs = []
    for task in tasks:
        if not Path("data", task["dataset"]).exists():
            for command in task.get("make", []):
                subprocess.run([sys.executable, *command.split()[1:]], check=True)
        for cell in cells:
            if cell["name"] in task.get("cells", [cell["name"]]):
                runs += plan(task, cell, shared)
    for run in runs:
        path = run.out / "args.json"
        if path.exists() and json.loads(path.read_text()) != run.args:
            sys.exit(f"{run.out} has other settings: delete it, or choose another --out_dir")
    return sorted(runs)  # by seed: a grid that is stopped has some seeds of all cells


# -----------------------------------------------------------------------------
# runs

processes = []  # all that were started
stopping = False


def call(output, script, *args):
    command = [sys.executable, ROOT / script, *args]
    process = subprocess.Popen(command, stdout=output, stderr=output)
    processes.append(process)
    if stopping:  # execute_all() may not have seen this one
        process.terminate()
    if process.wait():
        raise RuntimeError(f"{script} failed: see {output.name}")


def execute(run):
    """Train and evaluate, from where the run stands. Raises RuntimeError."""
    run.out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run.out}.txt", "a") as output:
        fcntl.flock(output, fcntl.LOCK_EX)  # which processes of a killed grid hold until they end
        resume = ["--init_from=resume"]
        if not latest_checkpoint(run.out):
            resume = []
            shutil.rmtree(run.out, ignore_errors=True)
            run.out.mkdir()
            (run.out / "args.json").write_text(json.dumps(run.args))
        call(output, "train.py", *run.args, *resume)
        same = "--out_dir", "--device", "--dtype"
        args = [arg for arg in run.args if arg.startswith(same)]
        call(output, "eval.py", *args, "--save_generations=True")


def execute_all(runs):
    """Do the runs, several at a time. However it ends, no process is left."""
    global stopping
    pool = ThreadPoolExecutor(jobs)
    futures = {pool.submit(execute, run): run for run in runs}
    try:
        for future in tqdm(as_completed(futures), total=len(runs)):
            tqdm.write(f"{futures[future].out}: {future.exception() or 'done'}")
    finally:
        stopping = True
        for process in processes:
            process.terminate()  # train.py saves a checkpoint
        pool.shutdown(cancel_futures=True)


# -----------------------------------------------------------------------------
# results


def read_result(run):
    """{"loss": {FLOP: validation loss}, "val_loss": the last one, "accuracy": {group: accuracy},
    "score": their sum}."""
    losses = {}
    for text in (run.out / "log.jsonl").read_text().splitlines():
        entry = json.loads(text)
        if "val_loss" in entry:
            last = losses[run.flops[entry["iter"] - 1]] = entry["val_loss"]
    scores = defaultdict(list)
    with open(run.out / "generations-heldout.jsonl", encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            found = re.search(groups, line["prompt"])
            name = found[0] if found else "other"
            scores[name or run.cell].append(line["score"])
    accuracy = {name: np.mean(scores[name]) for name in sorted(scores)}
    return {
        "loss": losses,
        "val_loss": last,
        "accuracy": accuracy,
        "score": sum(accuracy.values()),
    }


def interval(values):
    """(the mean, half of its 95% interval); of one value, the half is NaN."""
    n = len(values)
    if n == 1:
        return values[0], np.nan
    error = np.std(values, ddof=1) / n**0.5
    return np.mean(values), T_95[min(n, 8) - 2] * error


def compare(ours, theirs):
    """The end of a row, from {seed: result} of two models, over the seeds that both have."""
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    if ours is theirs or not pairs:
        return "|"
    more, half = interval([a["score"] - b["score"] for a, b in pairs])
    log, half_log = interval([np.log(a["val_loss"] / b["val_loss"]) for a, b in pairs])
    low, times, high = np.exp([log - half_log, log, log + half_log])
    return f"{more:+.3f} ± {half:.3f} | {times:.3f} ({low:.3f} to {high:.3f})"


def table(task, runs, found):
    """Markdown. found: {(task, cell): {seed: result}}."""
    head = "weights | tokens | FLOP | seeds | score | validation loss | against | more | loss, times"
    text = f"| {task['name']} | {head} |\n{'|---' * 10}|\n"
    run_of = {run.cell: run for run in runs if run.task == task["name"]}
    for cell in cells:
        name = cell["name"]
        base = cell.get("against", cells[0]["name"])
        ours = found[task["name"], name]
        if not ours:
            continue
        run = run_of[name]
        score, half = interval([result["score"] for result in ours.values()])
        loss, half_loss = interval([result["val_loss"] for result in ours.values()])
        text += f"| {name} | {run.n_params:,} | {run.n_tokens:,} | {run.flops[-1]:.3e} "
        text += f"| {len(ours)} "
        text += f"| {score:.3f} ± {half:.3f} | {loss:.4f} ± {half_loss:.4f} | {base} "
        text += f"| {compare(ours, found[task['name'], base])} |\n"
    return text


def draw(key, found):
    """key: accuracy or loss. Lines are means over seeds, dots are seeds."""
    from matplotlib.figure import Figure  # pyplot would look for a screen

    figure = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks):
        for i, name in enumerate(curves or [cell["name"] for cell in cells]):
            results = found[task["name"], name].values()
            if not results:
                continue
            rows = []
            for result in results:
                x = list(result[key])
                rows.append(list(result[key].values()))
            y = np.array(rows)
            color = f"C{i}"
            axes.plot(x, y.mean(0), "o-", color=color, label=name)
            axes.plot(x, y.T, ".", color=color)
            axes.fill_between(x, y.min(0), y.max(0), color=color, alpha=0.15)
        axes.set(title=task["name"], ylabel=key)
        axes.legend()
        axes.tick_params(axis="x", rotation=30)
        if key == "loss":
            axes.set(xlabel="training FLOP", yscale="log")
    figure.savefig(Path(out_dir, f"{key}.svg"))


def main():
    if not find_spec("matplotlib"):  # better known before hours of work
        sys.exit("pictures need matplotlib: pip install matplotlib")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    os.environ["OMP_NUM_THREADS"] = str(threads)
    runs = plan_all()
    try:
        execute_all([run for run in runs if not is_done(run)])
    except KeyboardInterrupt:
        print("interrupted")
    found = defaultdict(dict)
    for run in runs:
        if is_done(run):
            found[run.task, run.cell][run.seed] = read_result(run)
    if found:
        text = "\n".join(table(task, runs, found) for task in tasks)
        Path(out_dir, "grid.md").write_text(text)
        print(text)
        draw("loss", found)
        draw("accuracy", found)
    if not all(map(is_done, runs)):
        sys.exit("some runs are left: the same command does them")


if __name__ == "__main__":
    main()
