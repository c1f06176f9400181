"""
Running the scripts as their users do.

A new Python needs seconds to import torch, and the suite runs some 150 scripts: on Linux, those of one rank are forks
of a process that has imported the libraries and nothing of the project.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = "--n_layer=2 --n_embd=32 --block_size=256 --batch_size=4 --warmup_iters=5 --device=cpu --compile=False".split()
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
PROCESSES.set_forkserver_preload(["pytest", "tiktoken", "torch", "torch._dynamo", "tqdm"])


def torchrun(*options):
    return ["-m", "torch.distributed.run", *options]


def command(script, *args, ranks=1, restarts=0):
    many = torchrun("--standalone", f"--nproc_per_node={ranks}", f"--max_restarts={restarts}")
    return [sys.executable, *(many if ranks > 1 else []), ROOT / script, *args]


def run(cwd, script, *args, ranks=1, restarts=0, ok=True, **env):
    """Run a script to its end, with `env` added to the environment; it must succeed, or fail if not `ok`."""
    start, env = command(script, *args, ranks=ranks, restarts=restarts), {**ENV, **env}
    if ranks > 1:
        done = subprocess.run(start, cwd=cwd, env=env, capture_output=True, text=True)
    else:
        with tempfile.TemporaryDirectory() as said:
            process = PROCESSES.Process(target=_run_script, args=(start[1:], cwd, env, said))
            process.start()
            process.join()
            outputs = (Path(said, name).read_text() for name in ("stdout", "stderr"))
            done = subprocess.CompletedProcess(start, process.exitcode, *outputs)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def _run_script(argv, cwd, env, said):
    """In the new process: become `python *argv`, whose output goes to files in the directory `said`."""
    import torch

    for fd, name in (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(os.path.join(said, name), os.O_WRONLY | os.O_CREAT), fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.argv = [str(arg) for arg in argv]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
