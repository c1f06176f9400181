"""A run ends in the same weights, whatever happens to it, and never loses what it has."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from safetensors.torch import load_file

import checkpoint
import model
import optim

RUN = [*TINY, "--max_iters=12", "--log_interval=2", "--checkpoint_interval=4", "--eval_interval=6"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, problems):
    """The out_dir of a run that nothing happens to."""
    place = tmp_path_factory.mktemp("whole")
    (place / "data").symlink_to(problems)
    subprocess.run([sys.executable, ROOT / "train.py", *RUN], cwd=place, check=True)
    return place / "out"


def assert_same(out, whole, exactly=True):
    for name in "model.safetensors", "train.safetensors":
        ours, theirs = (load_file(path / "step-0000012" / name) for path in (out, whole))
        assert ours.keys() == theirs.keys()
        for key in ours:
            if exactly:
                assert torch.equal(ours[key], theirs[key]), key
            else:
                torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=2e-6, msg=key)
    logs = []
    for path in out, whole:
        lines = (path / "log.jsonl").read_text().splitlines()
        logs.append([(e["iter"], "val_loss" in e, e.get("loss")) for e in map(json.loads, lines)])
    if exactly:
        assert logs[0] == logs[1]
    else:
        assert [entry[:2] for entry in logs[0]] == [entry[:2] for entry in logs[1]]


def die_at_call(monkeypatch, place, name, n):
    """The nth call of a function ends the run, as a kill would: nothing after it is done."""
    function, calls = getattr(place, name), []

    def dying(*args, **kwargs):
        calls.append(args)
        if len(calls) == n:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, dying)


MOMENTS = [
    (optim.MovingAverage, "update", 7),  # after the weights, before their average
    (model.HRM, "loss_sum", 5),
    (checkpoint, "save_file", 2),  # between the two files of the first checkpoint
    (checkpoint, "save_file", 4),
    (os, "fsync", 9),
    (Path, "rename", 2),
]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda m: f"{m[1]}-{m[2]}")
def test_a_run_that_ends_anywhere_goes_on_to_the_same_weights(run, place, whole, monkeypatch, moment):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_at_call(patch, *moment)
        run("train.py", *RUN)
    if checkpoint.checkpoints("out"):
        assert "resuming out/step-" in run("train.py", "--init_from=resume")
        assert_same(place / "out", whole)
    else:
        with pytest.raises(SystemExit, match="there is no checkpoint in out to resume from"):
            run("train.py", "--init_from=resume")


KILLED = """
import os, runpy, signal, sys
import {module}
function, n = {module}.{name}, 0

def dying(*args, **kwargs):
    global n
    n += 1
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if n == {n} and first and os.environ.get("RANK", "0") == "{rank}":
        os.kill(os.getpid(), signal.SIG{sign})
    return function(*args, **kwargs)

{module}.{name} = dying
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""


def start(place, *args, ranks=1, restarts=0, **killed):
    """train.py in processes of its own, one of which gets a signal at a call of a function."""
    script = str(ROOT / "train.py")
    if killed:
        options = {"rank": 0, "script": script, **killed}
        (place / "killed.py").write_text(KILLED.format(**options))
        script = "killed.py"
    command = [sys.executable, script]
    if ranks > 1:
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={ranks}"
        command = [sys.executable, *torchrun.split(), f"--max-restarts={restarts}", script]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *args], cwd=place, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_weights(place, whole):
    done = start(place, *RUN, module="optim", name="AdamATan2.step", n=10, sign="KILL")
    assert done.returncode == -signal.SIGKILL
    assert start(place, "--init_from=resume").returncode == 0
    assert_same(place / "out", whole)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_number_of_ranks_does_not_change_the_result(place, whole, ranks):
    done = start(place, *RUN, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved out/step-0000012") == 1
    assert_same(place / "out", whole, exactly=False)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_a_restart_resumes(place, whole):
    dies = dict(module="optim", name="AdamATan2.step", n=10, sign="KILL", rank=1)
    done = start(place, *RUN, ranks=2, restarts=1, **dies)
    assert done.returncode == 0 and "resuming out/step-0000008" in done.stdout, done.stderr
    assert_same(place / "out", whole, exactly=False)


@pytest.mark.slow
def test_ranks_stop_together(place, whole):
    """One of them gets the signal; all end after the same step."""
    stops = dict(module="optim", name="AdamATan2.step", n=5, sign="TERM", rank=1)
    done = start(place, *RUN, ranks=2, **stops)
    assert done.returncode == 0 and "stopped; to go on" in done.stdout, done.stderr
    assert checkpoint.latest_checkpoint(place / "out").name == "step-0000006"
    assert start(place, "--init_from=resume", ranks=2).returncode == 0
    assert_same(place / "out", whole, exactly=False)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_saves_and_stops(run, place, whole, monkeypatch, name):
    step = optim.AdamATan2.step

    def signalled(self):
        step(self)
        if self.state[self.param_groups[0]["params"][-1]]["step"] == 5:
            os.kill(os.getpid(), getattr(signal, name))

    with monkeypatch.context() as patch:
        patch.setattr(optim.AdamATan2, "step", signalled)
        said = run("train.py", *RUN)
    assert "saved out/step-0000005" in said and "stopped; to go on" in said
    run("train.py", "--init_from=resume")
    for key, value in load_file("out/step-0000012/model.safetensors").items():
        assert torch.equal(value, load_file(whole / "step-0000012" / "model.safetensors")[key])


@pytest.mark.parametrize("size", [1, 3])
def test_the_number_of_micro_batches_does_not_change_the_result(run, place, whole, size):
    run("train.py", *RUN, f"--micro_batch_size={size}")
    assert_same(place / "out", whole, exactly=False)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(run, place, whole):
    run("train.py", *RUN)
    path = place / "out" / "step-0000012" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    said = run("train.py", "--init_from=resume")
    assert "step-0000012 cannot be read" in said and "resuming out/step-0000008" in said
    assert_same(place / "out", whole)


def test_a_line_of_the_log_that_was_cut_does_not_stop_resuming(run, place, whole):
    run("train.py", *RUN)
    path = Path("out/log.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines) + '\n{"iter": 12, "lo')
    run("train.py", "--init_from=resume")
    assert path.read_text().splitlines() == lines


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(run, place, whole, monkeypatch):
    save, calls = checkpoint.save_file, []

    def full(*args):
        calls.append(args)
        if len(calls) == 4:  # in the second checkpoint
            raise OSError(28, "No space left on device")
        save(*args)

    monkeypatch.setattr(checkpoint, "save_file", full)
    said = run("train.py", *RUN)
    assert "out/step-0000008 cannot be written: [Errno 28] No space left" in said
    assert [path.name for path in checkpoint.checkpoints("out")] == ["step-0000004", "step-0000012"]
    assert_same(place / "out", whole)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_before_a_checkpoint_holds_it(run, place, monkeypatch, what):
    loss_sum, calls = model.HRM.loss_sum, []

    def spoiled(self, *args):
        loss = loss_sum(self, *args)
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 7 and what == "loss":
            loss = loss * torch.nan
        if sum(calls) == 7 and loss.requires_grad:
            loss.register_hook(lambda grad: grad * torch.inf)
        return loss

    monkeypatch.setattr(model.HRM, "loss_sum", spoiled)
    good = "the last good checkpoint is out/step-0000004"
    with pytest.raises(SystemExit, match=f"step 7: loss .*; {good}"):
        run("train.py", *RUN)
    assert [path.name for path in checkpoint.checkpoints("out")] == ["step-0000004"]


def test_a_huge_rate_ends_the_run(run, place):
    with pytest.raises(SystemExit, match="step .*: loss nan|step .*: loss inf|gradient norm"):
        run("train.py", *RUN, "--learning_rate=1e30", "--warmup_iters=0")


def test_a_run_is_never_overwritten(run, place):
    run("train.py", *RUN, "--max_iters=2")
    before = load_file("out/step-0000002/model.safetensors")
    with pytest.raises(SystemExit, match="out holds a run already: --init_from=resume continues"):
        run("train.py", *RUN, "--seed=2")
    after = load_file("out/step-0000002/model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_cannot_change_in_a_run_is_told(run, place):
    run("train.py", *RUN, "--max_iters=2")
    for change in "block_size=128", "n_layer=4", "dataset=other", "seed=2", "loss_on=all":
        key = change.partition("=")[0]
        with pytest.raises(SystemExit, match=f"the run in out has {key}=.*cannot go on with another"):
            run("train.py", "--init_from=resume", f"--{change}")
    said = run("train.py", "--init_from=resume", "--max_iters=3", "--learning_rate=1e-4")
    assert "saved out/step-0000003" in said


def test_a_mistake_ends_with_a_sentence(run, place):
    for arg, sentence in {
        "--dataset=none": "python data.py --dataset=... --source=...",
        "--device=tpu": "there is no device tpu",
        "--init_from=nowhere": "there is no model in nowhere",
        "--init_from=resume": "there is no checkpoint in out to resume from",
    }.items():
        with pytest.raises(SystemExit, match=sentence):
            run("train.py", *RUN, arg)
    assert not Path("out").exists()


def test_fine_tuning_starts_from_the_averaged_weights_of_another_run(run, place):
    run("train.py", *RUN, "--max_iters=2", "--out_dir=base")
    args = ["--max_iters=1", "--learning_rate=0.0", "--weight_decay=0.0", "--n_layer=8"]
    run("train.py", *RUN, *args, "--init_from=base", "--out_dir=tuned")
    base = load_file("base/step-0000002/model.safetensors")
    tuned = load_file("tuned/step-0000001/model.safetensors")
    assert base.keys() == tuned.keys()  # the shape is the base's
    assert all(torch.equal(base[key], tuned[key]) for key in base)
    with pytest.raises(SystemExit, match="block_size is 512, and base has 256"):
        run("train.py", *RUN, "--init_from=base", "--out_dir=tuned2", "--block_size=512")
    path = Path("base/step-0000002/tokenizer.json")
    path.write_text(path.read_text().replace("<|box_end|>", "<|another|>"))
    with pytest.raises(SystemExit, match="data/problems has another tokenizer than base"):
        run("train.py", *RUN, "--init_from=base", "--out_dir=tuned2")


def test_another_optimizer_takes_two_lines(run, place, monkeypatch):
    """torch's AdamW, with the average kept: checkpoints, resuming and sampling still work."""
    text = (ROOT / "train.py").read_text()
    line = re.search(r"optimizer = AdamATan2\((\n.*){5}\n\)", text)[0]
    new = line.replace("AdamATan2", "torch.optim.AdamW").replace("compile=compile", "fused=False")
    Path("train_adamw.py").write_text(text.replace(line, new))
    monkeypatch.syspath_prepend(str(ROOT))
    script = Path("train_adamw.py").absolute()
    run(script, *RUN, "--out_dir=whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_at_call(patch, optim.MovingAverage, "update", 10)
        run(script, *RUN)
    run(script, "--init_from=resume")
    assert_same(place / "out", place / "whole")
    assert "---" in run("sample.py", "--max_new_tokens=3", "--prompt=2+2?")


def test_the_schedules_in_the_log(run, place):
    args = ["--max_iters=20", "--log_interval=1", "--warmup_iters=4", "--decay=0.5", "--bp_warmup=0.5"]
    run("train.py", *RUN, *args, "--learning_rate=1.0e-3")
    entries = [json.loads(line) for line in Path("out/log.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if "loss" in entry]
    assert [e["bp_steps"] for e in entries] == [2] * 4 + [3] * 3 + [4] * 3 + [5] * 10
    rates = [e["lr"] / 1e-3 for e in entries]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[10:] == pytest.approx([1.0 - 0.1 * i for i in range(10)])


def test_validation_answers_held_out_questions(run, place):
    said = run("train.py", *RUN, "--max_iters=1", "--sample_prompts=2")
    assert len(re.findall(r"^  .* -> ", said, re.M)) == 2
    assert re.search(r"step 1: validation loss \d\.\d{4}, token accuracy", said)
