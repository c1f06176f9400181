"""
Running the scripts as their users do.

A new Python needs seconds to import torch, and the suite runs some 150 scripts. On Linux, most are therefore forks of a
server (server.py) that has imported the libraries, and nothing of the project.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from queue import Queue
from tempfile import NamedTemporaryFile

ROOT = Path(__file__).parents[1]
TINY = "--n_layer=2 --n_embd=32 --block_size=256 --batch_size=4 --warmup_iters=5".split()
TINY += "--device=cpu --dtype=float32 --compile=False --sample_prompts=0".split()
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(*options):
    return ["-m", "torch.distributed.run", *options]


def command(script, *args, ranks=1, restarts=0):
    many = torchrun("--standalone", f"--nproc_per_node={ranks}", f"--max_restarts={restarts}")
    return [sys.executable, *(many if ranks > 1 else []), ROOT / script, *args]


def run(cwd, script, *args, ranks=1, restarts=0, ok=True, **env):
    """
    Run a script to its end. It must succeed, or fail if `ok` is False, or either if None. `env` is added to the
    environment, but too late for what Python and torch read when they start; PLOTS="1" lets a fork find matplotlib. Two
    ranks do without torchrun, unless they are to fail or to start again.
    """
    start = command(script, *args, ranks=ranks, restarts=restarts)
    if sys.platform == "linux" and ranks == 1:
        done = forked(start, cwd, env)
    elif sys.platform == "linux" and ranks == 2 and ok is not False and not restarts:
        done = two_ranks(command(script, *args), (cwd, cwd), env)
    else:
        done = subprocess.run(start, cwd=cwd, env={**ENV, **env}, capture_output=True, text=True)
    assert ok is None or (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_ranks(start, places, env):
    """What subprocess.run would return for torchrun; each rank has its own directory to run in."""
    env = {**env, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    envs = ({**env, "RANK": rank, "LOCAL_RANK": rank} for rank in "01")
    servers()  # made once, before two ask at a time
    with ThreadPoolExecutor(2) as pool:
        both = [*pool.map(forked, (start, start), places, envs)]
    stdout, stderr = ("".join(texts) for texts in zip(*((done.stdout, done.stderr) for done in both)))
    return subprocess.CompletedProcess(start, max(abs(done.returncode) for done in both), stdout, stderr)


def forked(start, cwd, env):
    """What subprocess.run would return, from the server that has waited longest."""
    idle = servers()
    server = idle.get()
    with NamedTemporaryFile("r") as stdout, NamedTemporaryFile("r") as stderr:
        try:
            request = json.dumps([start[1:], cwd, env, stdout.name, stderr.name], default=str)
            print(request, file=server.stdin, flush=True)
            status = int(server.stdout.readline())
        except BaseException:  # Ctrl-C, say, which must not leave the script running
            os.killpg(server.pid, signal.SIGKILL)
            servers.cache_clear()
            raise
        idle.put(server)
        return subprocess.CompletedProcess(start, status, stdout.read(), stderr.read())


@cache
def servers():
    """Two, that two scripts may run at a time, and that the next has another order of sets than the one before."""
    idle = Queue()
    for seed in "12":
        start, env = [sys.executable, ROOT / "tests" / "server.py"], {**ENV, "PYTHONHASHSEED": seed}
        pipe = subprocess.PIPE
        idle.put(subprocess.Popen(start, env=env, stdin=pipe, stdout=pipe, text=True, start_new_session=True))
    return idle
