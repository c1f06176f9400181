"""Several ranks: the same run as one rank's, which ends, and starts again, as a whole."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import documents, pack, tiny_model
from scripts import ENV, ROOT, TINY, command, free_port, run, torchrun, two_ranks
from test_crash import RUN, assert_same_run, crash
from test_train import averages, checkpoint, read_log

import ranks


def test_ranks_and_micro_batches_change_nothing(workplace):
    """20 steps on one process, on two ranks, on three (which share 4 rows unequally), and in two micro-batches."""
    args = [*TINY, "--bp_warmup=0.5", "--max_iters=20", "--log_interval=1"]
    ways = {"one": ([], 1), "two": ([], 2), "three": ([], 3), "micro": (["--micro_batch_size=2"], 1)}
    for name, (extra, n) in ways.items():
        run(workplace, "train.py", *args, *extra, f"--out_dir={name}", ranks=n)
    losses = read_log(workplace / "one")
    assert list(losses) == list(range(1, 21)) and losses[20] < 0.9 * losses[1]
    for name in list(ways)[1:]:
        assert read_log(workplace / name) == pytest.approx(losses, rel=1e-5)
        for key in "val_loss", "tokens":
            assert read_log(workplace / name, key) == pytest.approx(read_log(workplace / "one", key), rel=1e-5)
        other = averages(workplace / name)
        for key, w in averages(workplace / "one").items():
            assert (other[key] - w).abs().max() < 1e-4 * w.abs().max(), key


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_ranks_stop_together(workplace, sign):
    """SIGTERM, as schedulers send it, and Ctrl-C, which ranks get twice, end both after the same step."""
    args = [*TINY, "--max_iters=100000", "--log_interval=100000", "--eval_interval=0", "--checkpoint_interval=50"]
    start = command("train.py", *args, ranks=2)
    process = subprocess.Popen(start, cwd=workplace, env=ENV, stdout=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.time() + 60
    while not (workplace / "out" / "ckpt.pt").exists():
        assert time.time() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, sign) if sign == signal.SIGINT else process.send_signal(sign)
    said, _ = process.communicate(timeout=25)
    assert f"stopped at step {checkpoint(workplace / 'out')['iter']}" in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bp_steps", [2, 3, 5])
def test_each_gradient_is_summed_once_while_the_backward_pass_goes_on(monkeypatch, bp_steps, dtype):
    """In the same order on all ranks, with what earlier micro-batches left in it."""
    model, row = tiny_model(), pack(documents(), 64)
    model.set_compute(dtype)
    names, calls = {p: name for name, p in model.named_parameters()}, []
    for _ in range(2):
        model(*row, bp_steps=bp_steps)[1].backward()
    want = {names[p]: 2 * p.grad for p in names if p.grad is not None}
    model.zero_grad()

    def all_reduce(grad, async_op):
        calls.append((next(names[p] for p in names if p.grad is grad), model.embed.grad is None))
        grad.mul_(2)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(ranks, "world_size", 2)
    monkeypatch.setattr(ranks.dist, "all_reduce", all_reduce)
    for i in range(2):  # the second ends a step of two micro-batches
        with ranks.summing_gradients(model.backward_order() if i else ()):
            model(*row, bp_steps=bp_steps)[1].backward()
    assert [name for name, _ in calls] == [names[p] for p in model.backward_order() if names[p] in want]
    for p, name in names.items():
        assert p.grad is None if name not in want else torch.equal(p.grad, want[name]), name
    model.zero_grad()
    with ranks.summing_gradients(model.backward_order()):
        model(*row, bp_steps=bp_steps)[1].backward()
    assert [early for _, early in calls[len(want) :]] == [name != "embed" for name, _ in calls[: len(want)]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, problems_dir):
    """A run of two ranks that nothing happened to."""
    place = tmp_path_factory.mktemp("whole")
    (place / "data").mkdir()
    (place / "data" / "problems").symlink_to(problems_dir)
    run(place, "train.py", *RUN, "--sample_prompts=1", ranks=2)
    return place / "out"


def test_one_rank_dies_all_end_and_torchrun_starts_them_again(workplace, whole):
    """The run is that of two ranks left alone, and one rank can go on with it."""
    done = crash(workplace, "optimizer 105", *RUN, ranks=2, restarts=1, CRASH_RANK="1", ok=True)
    assert "resuming out at step 9" in done.stdout and "cannot go on with the other ranks" in done.stderr
    assert_same_run(workplace / "out", whole)
    (workplace / "out" / "ckpt.pt").unlink()
    again = run(workplace, "train.py", *RUN, TORCHELASTIC_RUN_ID="another", ok=False)  # it does not resume by itself
    assert "out holds another run already" in again.stderr
    assert "at step 21" in run(workplace, "train.py", *RUN, "--init_from=resume").stdout
    assert read_log(workplace / "out") == pytest.approx(read_log(whole), rel=1e-5)
    ours = averages(workplace / "out")
    for key, w in averages(whole).items():
        assert (ours[key] - w).abs().max() < 1e-4 * w.abs().max(), key


def test_two_nodes_start_again_and_only_the_first_needs_the_checkpoint(workplace, whole, tmp_path_factory):
    """Two torchrun agents, as on two machines. Steps are slow, so that the node of the rank that lives hears of the
    other's death from torchrun and not from its own rank."""
    other = tmp_path_factory.mktemp("node")
    (other / "data").symlink_to(workplace / "data")
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=7", "--max_restarts=1"]
    start = [sys.executable, *torchrun(*options, f"--rdzv_endpoint=127.0.0.1:{free_port()}")]
    start += [ROOT / "tests" / "crash.py", ROOT / "train.py", *RUN]
    env = {**ENV, "CRASH": "optimizer 45", "CRASH_RANK": "1", "CRASH_SLOW": "1"}
    pipes = dict(env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    agents = [subprocess.Popen(start, cwd=place, **pipes) for place in (workplace, other)]
    outputs = [agent.communicate(timeout=120)[0] for agent in agents]
    assert all(agent.returncode == 0 for agent in agents), outputs
    assert "resuming out at step" in "".join(outputs)
    place = workplace if (workplace / "out").exists() else other  # of the agent that had rank 0
    assert read_log(place / "out") == pytest.approx(read_log(whole), rel=1e-5)


def test_ranks_that_disagree_are_told_so(workplace, tmp_path_factory):
    other = tmp_path_factory.mktemp("node")
    run(other, "data.py", "--n_problems=300", "--n_val_problems=20", "--seed=2")
    done = two_ranks(command("train.py", *RUN), (workplace, other), {})
    assert done.returncode == 1 and "cannot go on" not in done.stderr
    assert done.stderr.count("train.py: rank 1: unlike on rank 0, data/problems/train.bin is") == 1
    assert not (workplace / "out").exists() and not (other / "out").exists()


AT_WORK = """
import time
import ranks

ranks.start("cpu")
stop = ranks.catch_stop_signals()
with ranks.abort_if_any():
    if ranks.rank == 1:
        raise ValueError("it is broken")
    while not stop():
        time.sleep(0.1)
"""


def test_a_rank_that_fails_ends_the_others_at_once(tmp_path):
    """One that is at work, and would be for long; nothing else is said."""
    (tmp_path / "work.py").write_text(AT_WORK)
    start = time.monotonic()
    said = run(tmp_path, tmp_path / "work.py", ranks=2, ok=False, PYTHONPATH=str(ROOT)).stderr
    assert said.count("work.py: rank 1: it is broken\n") == 1 and "cannot go on" not in said
    assert time.monotonic() - start < 60
