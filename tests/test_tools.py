"""Grids keep to their budgets and survive kills; what is drawn and diagnosed is what was run."""

from configurator import run_config

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT, documents, pack, tiny_model

from checkpoint import load_model
from model import RECURRENCES
from tools import diagnose, grid

LAPTOP = str(ROOT / "config/grid/laptop.py")
DYING = """
import os, runpy, sys
import optim
update, steps = optim.AdamATan2.step, iter(range(5))
def step(self):
    next(steps, None) is None and os._exit(1)
    update(self)
optim.AdamATan2.step = step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_each_plan_is_within_one_step_of_the_budget(place, monkeypatch):
    for name in "cells", "curves":
        monkeypatch.setattr(grid, name, run_config(LAPTOP)[name])
    tasks = [{"name": "a", "flops": 3e11}, {"name": "b", "tokens": 2e5, "seeds": [5]}]
    monkeypatch.setattr(grid, "tasks", [{**task, "dataset": "problems"} for task in tasks])
    monkeypatch.setattr(sys, "argv", ["grid", LAPTOP])
    runs = grid.plan_all()
    assert [run.seed for run in runs] == [0] * 12 + [1] * 12 + [2] * 12 + [5] * 12
    for run in runs:
        last_step = run.flops[-1] - run.flops[-2]
        if run.task == "a":
            assert 0 <= 3e11 - run.flops[-1] < last_step
        else:
            assert 0 <= 2e5 - run.n_tokens < 2048


@pytest.mark.slow
def test_a_killed_grid_ends_in_the_same_table(place, monkeypatch, capfd):
    settings = dict(n_layer=2, n_embd=32, block_size=256, batch_size=4, device="cpu")
    settings.update(compile=False, log_interval=1, checkpoint_interval=2)
    (place / "tiny.py").write_text("\n".join(f"{k} = {v!r}" for k, v in settings.items()))
    task = {"name": "t", "dataset": "problems", "flops": 1e10}
    monkeypatch.setattr(sys, "argv", ["grid", "tiny.py"])
    monkeypatch.setattr(grid, "tasks", [task])
    monkeypatch.setattr(grid, "seeds", [0])
    call = grid.call

    def dying_call(output, script, *args):
        command = [sys.executable, "-c", DYING, ROOT / script, *args]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)

    def table(out_dir, call):
        monkeypatch.setattr(grid, "out_dir", out_dir)
        monkeypatch.setattr(grid, "call", call)
        monkeypatch.setattr(grid, "stopping", False)
        grid.main()
        return (place / out_dir / "grid.md").read_text()

    with pytest.raises(SystemExit, match="the same command does them"):
        table("killed", dying_call)
    assert table("killed", call) == table("whole", call)
    assert "resuming killed/t/hrm-0/step-0000004" in (place / "killed/t/hrm-0.txt").read_text()

    [run] = grid.plan_all()
    model = load_model(run.out)
    flops = 0
    for line in (run.out / "log.jsonl").read_text().splitlines():
        bp_steps = json.loads(line).get("bp_steps")  # none in lines of validation
        flops += 1024 * model.flops_per_token(bp_steps) if bp_steps else 0
    assert run.flops[-1] == flops


@pytest.mark.slow
def test_ctrl_c_leaves_no_process(tmp_path, monkeypatch):
    started = threading.Event()

    class Processes(list):
        def append(self, process):
            super().append(process)
            started.set()

    def interrupt(_):
        started.wait()
        raise KeyboardInterrupt

    script = tmp_path / "endless.py"
    script.write_text("import signal\nsignal.pause()")
    monkeypatch.setattr(grid, "stopping", False)
    monkeypatch.setattr(grid, "processes", Processes())
    monkeypatch.setattr(grid, "execute", lambda _: grid.call(None, script))
    monkeypatch.setattr(grid, "as_completed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        grid.execute_all([1, 2, 3])
    assert all(process.poll() for process in grid.processes)


def test_intervals_of_known_numbers():
    mean, half = grid.interval([1.0, 2.0, 6.0])
    assert mean == 3 and half == pytest.approx(4.303 * (7 / 3) ** 0.5)
    ours = {seed: {"score": seed, "val_loss": 2.0} for seed in (1, 2, 3)}
    theirs = {seed: {"score": 0.5, "val_loss": 1.0} for seed in (2, 3, 4)}
    half = 12.706 * 0.5  # of 1.5 and 2.5
    assert grid.compare(ours, theirs) == f"+2.000 ± {half:.3f} | 2.000 (2.000 to 2.000)"


def test_the_score_is_the_sum_over_groups(tmp_path, monkeypatch):
    run = grid.Run(0, "t", "c", tmp_path, [], [5, 9], 0, 0)
    (tmp_path / "log.jsonl").write_text('{"iter": 1, "val_loss": 3}\n{"iter": 2, "val_loss": 2}\n')
    text = '{"prompt": "1 01", "score": 1}\n{"prompt": "2 01", "score": 1}\n'
    text += '{"prompt": "2 11", "score": 0}\n'
    (tmp_path / "generations-heldout.jsonl").write_text(text)
    monkeypatch.setattr(grid, "groups", r"\d+")
    result = grid.read_result(run)
    assert result["accuracy"] == {"1": 1, "2": 0.5} and result["score"] == 1.5
    assert result["loss"] == {5: 3, 9: 2} and result["val_loss"] == 2


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_diagnosis_of_the_last_step_and_all_steps_is_the_model_itself(recurrence):
    model = tiny_model(recurrence=recurrence)
    batch = pack(documents((7, 9), (4, 5)), 32)
    steps, cosines = diagnose.trace(model, *batch)
    model(*batch)
    n = model.config.n_steps
    assert len(steps["step"]) == n and steps["accuracy"][-1] == model.correct.float().mean()
    assert torch.allclose(cosines.diagonal(), torch.ones(n))
    assert all(0 < share < 1 for share in steps["attention"])
    grads = diagnose.gradients(model, batch)
    assert grads["bp_steps"] == list(range(n, 1, -1))
    assert grads["H_module cosine"][0] == pytest.approx(1, abs=1e-5)


def test_plot_draws_a_long_run_in_a_small_picture(run, place):
    entries = [{"iter": i, "loss": 9 / i, "accuracy": 0.5} for i in range(1, 20000)]
    (place / "log.jsonl").write_text("\n".join(map(json.dumps, entries)))
    run("tools/plot.py", f"--out_dirs={place}")
    picture = (place / "loss.svg").read_text()
    assert "</svg>" in picture and len(picture) < 200_000
