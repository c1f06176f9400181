"""
A Python that has imported the libraries, and forks into the scripts that scripts.py asks for, one after the other.
A line of stdin is the JSON of [what follows `python`, directory, additions to the environment, files for stdout and for
stderr]; the answer is a line with the exit status.
"""

import atexit
import gc
import json
import os
import resource
import runpy
import signal
import sys
import threading
import traceback

import numpy
import tiktoken  # noqa: F401
import torch._dynamo  # noqa: F401 (the first optimizer imports it)
import tqdm  # noqa: F401

gc.freeze()  # else every fork would look through the libraries
os.environ.pop("PYTHONHASHSEED")
for request in sys.stdin:  # noqa: B007
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        break
else:
    sys.exit()

# The child goes on from here.
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
status = None
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    status = end.code
except Exception:
    status = traceback.format_exc().rstrip()
if isinstance(status, str):
    print(status, file=sys.stderr)

# What Python does at its end, but for taking the libraries apart, which takes longer than most scripts.
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush(), sys.stderr.flush()
os._exit(status if isinstance(status, int) else int(status is not None))
