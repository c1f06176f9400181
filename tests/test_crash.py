"""
Runs that are killed, and go on to the same bits.

    pytest tests/test_crash.py --kills=50        # besides, so many kills at random moments, on one rank and on two
"""

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scripts import ENV, ROOT, TINY, command, run
from test_train import checkpoint, read_log

from checkpoint import RunFiles
from common import Forgiving, exit_on_error
from loader import Loader

RUN = [*TINY, "--max_iters=24", "--log_interval=1", "--eval_interval=8", "--checkpoint_interval=3", "--bp_warmup=0.0"]


def assert_same_run(a, b):
    """Two out_dirs hold the same run: all of the checkpoint, and the log but for its speeds."""
    first, second = checkpoint(a), checkpoint(b)
    assert first.keys() == second.keys()
    for key in first.keys() - {"settings", "log_bytes", "wandb_id"}:
        assert_equal(first[key], second[key], key)
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (a, b)]
    for entry in logs[0] + logs[1]:
        entry.pop("tokens_per_sec", None), entry.pop("seconds", None)
    assert logs[0] == logs[1]


def assert_equal(a, b, where):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}, {key}")
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def whole(tmp_path_factory, problems_dir):
    """A run that nothing happened to."""
    place = tmp_path_factory.mktemp("whole")
    (place / "data").mkdir()
    (place / "data" / "problems").symlink_to(problems_dir)
    run(place, "train.py", *RUN, "--sample_prompts=1")  # answers change nothing
    return place / "out"


def crash(cwd, moment, *args, ok=False, **options):
    """Run train.py so that it kills itself, or spoils a step (tests/crash.py)."""
    return run(cwd, "tests/crash.py", ROOT / "train.py", *args, ok=ok, CRASH=moment, **options)


MOMENTS = [
    "fsync 1",  # the claim of out_dir
    "backward 4",  # before there is a checkpoint
    "write 1",
    "write 2",
    "fsync 9",
    "rename 2",  # of a second checkpoint: there is no ckpt.pt
    "optimizer 23",
    "backward 50",
    "rename 1",
]


def test_a_run_killed_at_any_moment_ends_in_the_same_bits(workplace):
    args, resume, found = [*RUN, "--bp_warmup=0.5", "--log_interval=4", "--eval_interval=3"], [], []
    run(workplace, "train.py", *args, "--out_dir=whole")
    for moment in MOMENTS:
        done = crash(workplace, moment, *args, *resume)
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        resume = ["--init_from=resume"] if (workplace / "out" / "run.json").exists() else []  # else nothing was begun
        found.append(sorted(path.name for path in (workplace / "out").iterdir()))
        if (workplace / "out" / "log.jsonl").exists():
            with open(workplace / "out" / "log.jsonl", "a") as log:
                log.write('{"iter": 99, "lo')  # as a line that a power cut ended
    for _ in range(2):  # the second time, it is complete but for the last validation, as after a kill there
        run(workplace, "train.py", *args, *resume)
        assert_same_run(workplace / "out", workplace / "whole")
    assert "ckpt.pt.part" in found[2] and "ckpt.pt" not in found[2]  # the kills came when they were meant to
    assert "ckpt.pt" not in found[5] and any(name.startswith("ckpt-") for name in found[5])


def test_pre_emption_saves_and_ends_well(workplace, whole):
    for sign, moment, resume in ("SIGINT", "backward 50", []), ("SIGUSR1", "optimizer 50", ["--init_from=resume"]):
        said = crash(workplace, moment, *RUN, *resume, CRASH_SIGNAL=sign, ok=True).stdout
        assert "stopped at step" in said and "finished" not in said
    run(workplace, "train.py", *RUN, "--init_from=resume")
    assert_same_run(workplace / "out", whole)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(workplace, whole):
    run(workplace, "train.py", *RUN, "--max_iters=12")
    path = workplace / "out" / "ckpt.pt"
    content = path.read_bytes()
    places = [5000, len(content) // 2, len(content) - 48]  # the last makes the zip module raise OSError
    for damaged in [content[:9999]] + [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in places]:
        path.write_bytes(damaged)
        said = run(workplace, "sample.py", "--max_new_tokens=1").stdout
        assert "ckpt.pt is damaged" in said and "ckpt-00000009.pt instead (step 9)" in said
    run(workplace, "train.py", *RUN, "--init_from=resume")
    assert_same_run(workplace / "out", whole)
    assert {p.name for p in (workplace / "out").glob("ckpt*")} == {"ckpt.pt", "ckpt-00000021.pt"}


WANDB = """
import json
class Error(Exception): pass
def put(**entry):
    with open("wandb.jsonl", "a") as file: file.write(json.dumps(entry) + "\\n")
def init(project, id, resume, config): put(id=id, resume=resume)
def log(entry, step): put(step=step, loss=entry.get("loss"))
def finish(): pass
"""


def test_a_resumed_run_goes_on_in_the_same_wandb_run(workplace):
    (workplace / "wandb.py").write_text(WANDB)
    for extra in ["--max_iters=3"], ["--max_iters=6", "--init_from=resume"]:
        args = [*RUN, "--wandb_log=True", "--eval_interval=0", *extra]
        run(workplace, "train.py", *args, PYTHONPATH=str(workplace))
    entries = [json.loads(line) for line in (workplace / "wandb.jsonl").read_text().splitlines()]
    first, second = (e["id"] for e in entries if "id" in e)
    assert first == second == checkpoint(workplace / "out")["wandb_id"]
    assert [e["step"] for e in entries if e.get("loss")] == [1, 2, 3, 4, 5, 6]


def test_two_processes_do_not_share_an_out_dir(workplace):
    (workplace / "out").mkdir()
    held = RunFiles(workplace / "out")
    held.load("scratch")
    for extra in [], ["--init_from=resume"]:
        done = run(workplace, "train.py", *RUN, *extra, ok=False)
        assert "another process is writing to out" in done.stderr and "Traceback" not in done.stderr
    with ThreadPoolExecutor(2) as pool:
        start = [workplace, "train.py", *RUN, "--max_iters=50", "--out_dir=new"]
        both = [pool.submit(run, *start, ok=None) for _ in range(2)]
    first, second = sorted((done.result() for done in both), key=lambda done: done.returncode)
    assert first.returncode == 0 and "another process is writing to new" in second.stderr


def test_the_newest_checkpoints_are_kept(workplace):
    for keep, names in (1, {"ckpt.pt"}), (3, {"ckpt.pt", "ckpt-00000009.pt", "ckpt-00000006.pt"}):
        args = [*RUN, f"--keep_checkpoints={keep}", f"--out_dir=keep{keep}", "--max_iters=12"]
        crash(workplace, "nothing 0", *args, ok=True)
        assert {p.name for p in (workplace / f"keep{keep}").glob("ckpt*")} == names


def test_checkpoints_by_the_clock(workplace):
    run(workplace, "train.py", *RUN, "--checkpoint_interval=0", "--checkpoint_minutes=0.001", "--keep_checkpoints=99")
    assert len(list((workplace / "out").glob("ckpt-*.pt"))) > 1


def test_a_directory_that_is_taken_away_is_left_alone(tmp_path, problems_dir, capsys):
    """rm -rf out, and a second run in its place: the first goes on in a directory of its own."""
    runs = []
    for _ in range(2):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        runs.append(RunFiles(tmp_path / "out"))
        runs[-1].load("scratch")
        runs[-1].claim(problems_dir, {}, "scratch")
        runs[-1].log(iter=1, loss=1.0)
    first, second = runs
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    first.log(iter=2, loss=2.0)
    first.save({"iter": 3, "model": torch.zeros(3)}, wait=True)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "out has been removed or replaced; this run goes on in" in capsys.readouterr().out
    there = tmp_path / "out-1"
    assert {path.name for path in there.iterdir()} == {*before, "ckpt.pt"} and read_log(there) == {2: 2.0}
    assert checkpoint(there)["iter"] == first.saved == 3 and second.directory == tmp_path / "out"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, as Linux has")
def test_printing_never_ends_a_run(workplace, whole):
    """Neither a full disk nor a closed stream, while it runs and at its end."""
    start = shlex.join(map(str, command("train.py", *RUN)))
    assert subprocess.run(f"{start} >&- 2>/dev/full", shell=True, cwd=workplace, env=ENV).returncode == 0
    assert_same_run(workplace / "out", whole)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, as Linux has")
def test_a_reader_that_leaves_ends_a_script_quietly(monkeypatch):
    """As head does; but a full disk under its output is told."""
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # to be put back
    for path, status in ("pipe", 1), ("/dev/full", "No space left on device"):
        read, write = os.pipe() if path == "pipe" else (None, os.open(path, os.O_WRONLY))
        if read:
            os.close(read)
        monkeypatch.setattr(sys, "stdout", open(write, "w"))
        with pytest.raises(SystemExit) as end, exit_on_error():
            print("text")
        assert str(status) in str(end.value)
        sys.stdout.flush()  # as Python does once more, and must not fail
    Forgiving(open("/dev/full", "w", buffering=1)).write("a line\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, as Linux has")
def test_a_full_disk_does_not_stop_training(workplace, whole):
    (workplace / "out").mkdir()
    (workplace / "out" / "ckpt.pt.part").symlink_to("/dev/full")  # which is removed with the first failure
    said = run(workplace, "train.py", *RUN).stdout
    assert said.count("could not be written") == 1
    assert "step 3: the checkpoint could not be written (" in said and "No space left on device" in said
    assert_same_run(workplace / "out", whole)


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(workplace):
    (workplace / "out").mkdir()
    (workplace / "out" / "ckpt.pt.part").symlink_to("/dev/full")
    done = run(workplace, "train.py", *RUN, "--checkpoint_interval=0", ok=False)
    assert done.returncode == 1 and "its checkpoint could not be written" in done.stderr


@pytest.mark.parametrize("what, ranks", [("loss", 1), ("gradient", 1), ("loss", 2)])
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run(workplace, whole, what, ranks):
    """It tells the step, the documents, the losses before and the checkpoint, which is as it was."""
    done = crash(workplace, f"{what} 5", *RUN, ok=None, ranks=ranks, CRASH_RANK=str(ranks - 1))
    sentence = next(line for line in done.stderr.splitlines() if line.startswith("train.py: "))
    told = "the loss is nan" if what == "loss" else "a gradient is not finite"
    loader = Loader(workplace / "data" / "problems", "train", 4, 256, 1337)
    documents = [next(loader).documents for _ in range(5)][4]
    for part in (
        f"step 5: {told}; its {len(documents)} documents of data/problems/train.bin ({documents[0]}, {documents[1]}, ",
        f"{read_log(whole)[4]:.4f} at 4",
        "out/ckpt.pt (step 3)",
    ):
        assert part in sentence
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert read_log(workplace / "out", "documents") == {5: documents}
    run(workplace, "train.py", *RUN, "--init_from=resume")
    if ranks == 1:
        assert_same_run(workplace / "out", whole)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_such_a_step_is_skipped_on_request(workplace, what):
    args = [*RUN, "--max_iters=8", "--checkpoint_interval=1", "--keep_checkpoints=9"]
    done = crash(workplace, f"{what} 5", *args, "--skip_nonfinite=1", ok=True)
    assert "skipped, 1 of at most 1" in done.stdout
    names = "ckpt-00000004.pt", "ckpt-00000005.pt", "ckpt.pt"
    before, after, end = (checkpoint(workplace / "out", name) for name in names)
    assert_equal(before["model"], after["model"], "model")
    assert_equal(before["optimizer"]["state"], after["optimizer"]["state"], "optimizer")
    assert (before["skipped"], after["skipped"]) == (0, 1) and before["loader"] != after["loader"]
    assert not torch.equal(after["model"]["lm_head"], end["model"]["lm_head"])
    assert read_log(workplace / "out")[5] == pytest.approx(None) or what == "gradient"


# ----------------------------------------------------------------------------------------------------
# by option


@pytest.mark.parametrize("ranks", [1, 2])
def test_random_kills(workplace, request, ranks):
    """As often as --kills says, at random moments, with random times of checkpoints."""
    kills = request.config.getoption("--kills")
    if not kills:
        pytest.skip("runs with --kills=N")
    args = [*TINY, "--max_iters=400", "--log_interval=7", "--eval_interval=50"]
    run(workplace, "train.py", *args, "--out_dir=whole", ranks=ranks)
    done = resumes = rounds = 0
    rng = random.Random(ranks)
    while done < kills:
        out = f"round{rounds}"
        rounds += 1
        resume = []
        while True:
            times = [f"--checkpoint_interval={rng.randint(1, 30)}", f"--checkpoint_minutes={rng.choice((0.0, 0.001))}"]
            start = command("train.py", *args, *times, f"--out_dir={out}", *resume, ranks=ranks)
            quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, text=True)
            process = subprocess.Popen(start, cwd=workplace, env=ENV, **quiet)
            try:
                _, said = process.communicate(timeout=rng.uniform(1, 8) + 4 * (ranks - 1))
            except subprocess.TimeoutExpired:
                kill_all(process.pid)
                process.communicate()
                done += 1
                resume = ["--init_from=resume"] if (workplace / out / "run.json").exists() else []
                resumes += bool(resume)
                continue
            assert process.returncode == 0, said
            break
        assert_same_run(workplace / out, workplace / "whole")
        print(f"{ranks} rank(s): {done} kills, {resumes} resumes, {rounds} runs, 0 mismatches", flush=True)


def kill_all(pid):
    """Kill a process and all below it, none of which can start another meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    below = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    for child in below:
        kill_all(int(child))
    os.kill(pid, signal.SIGKILL)
