"""
A Python that has imported the libraries, and forks into the scripts that scripts.py asks for, one after the other.
A line of stdin is the JSON of [what follows `python`, directory, additions to the environment, files for stdout and for
stderr]; the answer is a line with the exit status.
"""

import gc
import json
import os
import resource
import runpy
import signal
import sys

import numpy
import tiktoken  # noqa: F401
import torch._dynamo  # noqa: F401 (the first optimizer imports it)
import tqdm  # noqa: F401

gc.freeze()  # else every fork would take a second at its end to look through the libraries
os.environ.pop("PYTHONHASHSEED")
for request in sys.stdin:  # noqa: B007
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        break
else:
    sys.exit()

# The child goes on from here to an end like any script's.
sys.argv, cwd, env, stdout, stderr = json.loads(request)
for fd, name in enumerate((os.devnull, stdout, stderr)):
    file = os.open(name, os.O_RDWR)
    os.dup2(file, fd)
    os.close(file)
os.chdir(cwd)
os.environ.update(env)
if "PLOTS" not in env:
    sys.modules["matplotlib"] = None  # to import it and to draw takes longer than most runs
if "SECONDS" in env:  # limits
    signal.alarm(int(env["SECONDS"]))
    resource.setrlimit(resource.RLIMIT_DATA, (int(env["MEMORY"]),) * 2)
numpy.random.seed()
sys.path[:1] = [os.path.dirname(sys.argv[0]), *env.get("PYTHONPATH", "").split()]
runpy.run_path(sys.argv[0], run_name="__main__")
