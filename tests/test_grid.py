"""
Grids: the same budget for all cells and, whatever happens to one, the same table.

    pytest tests/test_grid.py --kills=5        # besides, a grid of real processes that is killed 5 times
"""

from configurator import configure

import json
import random
import signal
import subprocess
import time
from functools import partial
from types import SimpleNamespace

import pytest
from scripts import ENV, ROOT, TINY, command, run

import grid
import train
from model import HRM, HRMConfig

SHARED = [arg[2:].partition("=") for arg in TINY]
CONFIG = "\n".join(f"{key} = {value if value[0].isdigit() else repr(value)}" for key, _, value in SHARED)
CONFIG = CONFIG.replace("'False'", "False") + """
log_interval = 2
checkpoint_interval = 2
grid = [dict(name="wide"), dict(name="deep", H_cycles=3, n_embd=16)]
tasks = [dict(dataset="problems")]
seeds = [0]
budget = 4e9
points = 3
limit = 1
"""
DEFAULTS = dict(grid.settings)


@pytest.fixture
def start(workplace, monkeypatch, capsys):
    """start(**settings) is `python grid.py c.py --key=value ...`, and returns what it prints. start.call(script, *args)
    runs a script; start.called has their names."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("sys.argv", ["grid.py", "c.py"])
    (workplace / "c.py").write_text(CONFIG)

    def call(_, said, script, *args):
        start.called.append(script)
        if grid.stopping or (done := start.call(script, *args)).returncode:
            raise ValueError(grid.INTERRUPTED if grid.stopping else done.stderr.splitlines()[-1])

    def start(**changes):
        vars(grid).update(DEFAULTS)
        grid.settings = configure(vars(grid), ["c.py", *grid.flags(changes)])
        grid.stopping.clear()
        start.called = []
        grid.main()
        return capsys.readouterr().out

    start.call = lambda *args: run(workplace, *args, ok=None)
    monkeypatch.setattr(grid, "call", call)
    yield start
    grid.stopping.clear()
    vars(grid).update(DEFAULTS)
    vars(train).update(grid.DEFAULTS)


def results(place):
    """What results.jsonl says, but for the settings, which say where it was."""
    lines = [json.loads(line) for line in (place / "results.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k != "settings"} for line in lines]
    return sorted(kept, key=lambda line: (line["cell"], line["task"], line["seed"]))


def test_a_grid_killed_at_any_moment_ends_in_the_same_table(start, workplace):
    start()
    assert start.called == ["train.py", "eval.py"] * 2
    whole = results(workplace / "out-grid"), (workplace / "out-grid" / "grid.md").read_bytes()
    assert [(line["cell"], len(line["losses"])) for line in whole[0]] == [("deep", 3), ("wide", 3)]

    def call(at, moment, script, *args):
        if len(start.called) != at:
            return run(workplace, script, *args, ok=None)
        if moment:
            run(workplace, "tests/crash.py", ROOT / script, *args, ok=False, CRASH=moment)
        grid.stopping.append(True)
        raise KeyboardInterrupt

    for kill in (1, "backward 10"), (2, ""), (3, "write 2"):  # a training, its evaluation, the other cell's training
        start.call = partial(call, *kill)
        with pytest.raises(KeyboardInterrupt):
            start(out_dir="killed")
    start.call = partial(call, 0, "")
    assert "2 runs, of which 1 are left to do" in start(out_dir="killed") and start.called == ["train.py", "eval.py"]
    for out in "killed", "out-grid":
        assert (results(workplace / out), (workplace / out / "grid.md").read_bytes()) == whole
        assert 0 < (workplace / out / "loss.svg").stat().st_size < 200_000
    assert "2 runs, of which 0 are left to do" in start(out_dir="killed", status=True) and not start.called


def test_a_cell_that_fails_does_not_stop_the_others(start, workplace):
    cells = [dict(name="bad", learning_rate=1e18), dict(name="good")]
    with pytest.raises(SystemExit, match="1 of 2 runs failed; the same command tries them again"):
        start(grid=cells, budget=2.0, budget_unit="steps", jobs=2)
    assert [line["cell"] for line in results(workplace / "out-grid")] == ["good"]
    assert "| bad |  |  |  | 0 |  |  |" in (workplace / "out-grid" / "grid.md").read_text()


def test_what_was_run_with_other_settings_is_not_mixed_in(start, workplace):
    start(budget=1.0, budget_unit="steps", grid=[dict(name="a")])
    for seeds in [0], [0, 1]:
        with pytest.raises(ValueError, match="a-problems-0 was run with learning_rate 0.001 and not 0.002; choose"):
            start(budget=1.0, budget_unit="steps", grid=[dict(name="a", learning_rate=0.002)], seeds=seeds)
    with pytest.raises(ValueError, match="data/problems was made with n_problems 300; give the task's dataset another"):
        start(tasks=[dict(dataset="problems", n_problems=301)])
    with pytest.raises(ValueError, match="a-problems-0 was run with limit 1 and not 2"):
        start(budget=1.0, budget_unit="steps", grid=[dict(name="a")], limit=2)


@pytest.mark.parametrize("unit, budget", [("flops", 1e9), ("flops", 7.7e10), ("tokens", 5000.0), ("steps", 7.0)])
def test_a_run_takes_no_more_than_the_budget_and_no_step_less(start, monkeypatch, unit, budget):
    monkeypatch.setattr(grid, "execute_all", lambda runs, lines: planned.extend(runs) or 0)
    planned = []
    start(budget=budget, budget_unit=unit)
    for plan in planned:
        shape = dict(n_embd=32, H_cycles=2) if plan.cell == "wide" else dict(n_embd=16, H_cycles=3)
        model = HRM(HRMConfig(vocab_size=263, block_size=256, n_layer=2, n_head=2, **shape))

        def cost(n, model=model):
            K = [2 + int(min(1, i / (0.2 * n)) * 3) for i in range(n)]
            return dict(flops=sum(1024 * model.flops_per_token(k) for k in K), tokens=1024 * n, steps=n)

        n = plan.settings["max_iters"]
        assert cost(n)[unit] <= budget < cost(n + 1)[unit] and plan.flops[-1] == cost(n)["flops"]
        assert plan.parameters == sum(p.numel() for p in model.parameters())


def test_the_grids_that_are_shipped_can_be_planned(start, monkeypatch):
    """Twelve cells, three tasks, three seeds, within the same budget, in the order of seeds."""
    monkeypatch.setattr(grid, "prepare_data", lambda task, configs: 263)
    configs = [str(ROOT / "config" / "grid" / name) for name in ("laptop.py", "gpu.py")]
    vars(grid).update(DEFAULTS)
    grid.settings = configure(vars(grid), configs)
    grid.check_settings()
    runs = grid.plan_runs(configs)
    assert len({(run.cell, run.task, run.seed) for run in runs}) == 108
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert all(0.99 * grid.budget < run.flops[-1] <= grid.budget for run in runs)


WRONG = {
    "grid=[]": "grid must not be empty",
    "grid=[{}]": "grid is a list of dicts with a name of letters, digits and -_.+=, not None",
    "grid=[dict(name='a/b')]": "not 'a/b'",
    "grid=[dict(name='a'),dict(name='a')]": "each name in it another: a, a",
    "grid=[dict(name='a',n_layers=2)]": "there is no setting 'n_layers'; did you mean 'n_layer'?",
    "grid=[dict(name='a',n_layer=3)]": "the cell a cannot be trained: n_layer .3. must be even",
    "grid=[dict(name='a',decay=2.0)]": "the cell a cannot be trained: decay must be at most 1, not 2.0",
    "tasks=[{}]": "tasks is a list of dicts with a dataset",
    "grid=[dict(name='a',epochs=2.0)]": "the grid sets epochs itself, so no cell can",
    "seeds=[1,1]": "seeds are different whole numbers",
    "budget_unit='time'": "budget_unit is flops, tokens or steps, not time",
    "budget=1e3": "the budget of 1000 flops is less than a step",
    "budget=float('nan')": "budget must be at least 1, not nan",
    "curves=['x']": "curves or against has x, which is no cell of grid",
    "grid=[dict(name='a',against='b')]": "curves or against has b, which is no cell of grid",
    "jobs=0": "jobs must be at least 1, not 0",
    "status=True;out_dir='none'": "there is no grid in none",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_meant_ends_with_a_sentence(start, workplace, wrong):
    (workplace / "c.py").write_text(f"{CONFIG}\n{wrong}\n")
    with pytest.raises((ValueError, SystemExit), match=WRONG[wrong]):
        start()
    assert not start.called


def test_a_script_that_fails_is_quoted(tmp_path):
    with open(tmp_path / "said.txt", "ab") as said:
        with pytest.raises(ValueError, match="status 1 of plot.py: --x=1: there is no setting 'x'"):
            grid.call(SimpleNamespace(), said, "plot.py", "--x=1")


def test_intervals():
    """Worked out by hand."""
    mean, half = grid.mean_and_half([1.0, 2.0, 6.0])
    assert mean == 3 and half == pytest.approx(4.303 * (7 / 3) ** 0.5)
    assert grid.mean_and_half([0.25]) == (0.25, 0.0)
    assert grid.mean_and_half([0.0, 1.0] * 10)[1] == pytest.approx(2.262 * (0.25 * 20 / 19) ** 0.5 / 20**0.5)


def test_differences_are_over_pairs_of_the_same_task_and_seed(monkeypatch):
    monkeypatch.setattr(grid, "grid", [dict(name="a"), dict(name="b"), dict(name="c", against="b"), dict(name="d")])
    monkeypatch.setattr(grid, "tasks", [dict(dataset="x"), dict(dataset="y")])
    lines = {("x", "a"): [(0, 0.5, 1.0), (1, 0.25, 2.0)], ("y", "a"): [(0, 0.5, 1.0)], ("x", "c"): [(1, 0.5, 6.0)]}
    lines |= {("x", "b"): [(2, 0.0, 9.0), (1, 0.5, 1.0), (0, 0.5, 1.0)], ("y", "b"): [(0, 0.0, 8.0)]}
    keys = "seed", "accuracy", "val_loss"
    rows = grid.differences({at: [dict(zip(keys, line)) for line in some] for at, some in lines.items()})
    half = 4.303 * (((25 - -25 / 3) ** 2 + (25 / 3) ** 2 + (50 - 25 / 3) ** 2) / 2) ** 0.5 / 3**0.5
    assert rows[1][:4] == ("b", "a", 3, f"-8.3 ± {half:.1f}") and rows[1][4].startswith("1.59 (")  # 4 ** (1/3)
    assert rows[2] == ("c", "b", 1, "+0.0", "6.00") and len(rows) == 3


def test_a_killed_grid_of_processes(tmp_path, problems_dir, pytestconfig):
    """At random moments, by SIGKILL (which leaves its processes at work), or as by Ctrl-C, which leaves none."""
    if not (kills := pytestconfig.getoption("--kills")):
        pytest.skip("--kills=N kills it N times")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "problems").symlink_to(problems_dir)
    (tmp_path / "c.py").write_text(CONFIG.replace("4e9", "2e11"))
    start = dict(cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    rng = random.Random(time.time_ns())
    for kill in range(kills):
        process = subprocess.Popen(command("grid.py", "c.py", "--out_dir=killed", "--jobs=2"), **start)
        time.sleep(rng.uniform(3, 30))
        process.send_signal([signal.SIGKILL, signal.SIGTERM][kill % 2])
        _, stderr = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL) or stderr.endswith(f"grid.py: {grid.INTERRUPTED}\n"), stderr
    for out in "killed", "whole":
        subprocess.run(command("grid.py", "c.py", f"--out_dir={out}"), check=True, **start)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert (tmp_path / "killed" / "grid.md").read_bytes() == (tmp_path / "whole" / "grid.md").read_bytes()


def test_a_picture_of_several_runs(tmp_path):
    for out in "one", "two":
        (tmp_path / out).mkdir()
        entries = [dict(iter=i, loss=9 / i, accuracy=i / 9, grad_norm=1.0, lr=1e-3, bp_steps=2) for i in range(1, 9)]
        lines = [json.dumps(entry) for entry in [*entries, dict(iter=8, val_loss=2.0, val_accuracy=0.5)]]
        (tmp_path / out / "log.jsonl").write_text("\n".join(lines))
    assert "written to both.png" in run(tmp_path, "plot.py", "one", "two", "--picture=both.png", PLOTS="1").stdout
    run(tmp_path, "plot.py", "--out_dirs=one,two", PLOTS="1")
    assert (tmp_path / "both.png").stat().st_size and 0 < (tmp_path / "one" / "loss.svg").stat().st_size < 200_000
    assert "plot.py: none/log.jsonl: No such file" in run(tmp_path, "plot.py", "none", ok=False, PLOTS="1").stderr
