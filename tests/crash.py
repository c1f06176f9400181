"""
python crash.py SCRIPT ARGS: runs a script that kills itself, with SIGKILL or the signal that CRASH_SIGNAL names, at the
moment that CRASH="moment n" names: the nth time (counted from 1) that it comes by. In a run of several ranks, that of
CRASH_RANK alone does. Two moments do not kill: at "loss" the loss is nan, and at "gradient" the gradients are infinite.
Training waits for its checkpoints, so that each is written before the next.
"""

import io
import math
import os
import pathlib
import runpy
import signal
import sys
import time

import torch

SCRIPT, (MOMENT, N) = sys.argv[1], os.environ["CRASH"].split()
sys.path.insert(0, os.path.dirname(SCRIPT))
import checkpoint  # noqa: E402
import evaluate  # noqa: E402
import model  # noqa: E402
import optim  # noqa: E402

passed = 0


def die():
    os.kill(os.getpid(), getattr(signal, os.environ.get("CRASH_SIGNAL", "SIGKILL")))


def at_nth(function, counts=lambda *args: True):
    """The function, preceded by death at the nth call that counts."""

    def wrapped(*args, **kwargs):
        global passed
        passed += counts(*args)
        if passed == int(N):
            die()
        return function(*args, **kwargs)

    return wrapped


def at_nth_backward(function):
    """The function, whose result brings death when its gradient is the nth that backward passes reach."""

    def wrapped(*args):
        y = function(*args)
        if y.requires_grad:
            y.register_hook(at_nth(lambda grad: grad))
        return y

    return wrapped


def half_save(content, file):
    """torch.save(), of which half reaches the disk at the nth call."""
    global passed
    passed += 1
    whole = io.BytesIO()
    save(content, whole)
    if passed == int(N):
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        die()
    file.write(whole.getvalue())


def at_nth_spoiled(self, *args):
    """HRM.forward(), whose loss or gradient is spoiled at the nth call that is for training."""
    global passed
    logits, loss = forward(self, *args)
    passed += torch.is_grad_enabled()
    if torch.is_grad_enabled() and passed == int(N):
        loss = loss * (math.nan if MOMENT == "loss" else 1)
        loss.register_hook(lambda grad: grad * math.inf)
    return logits, loss


save, forward, save_run = torch.save, model.HRM.forward, checkpoint.RunFiles.save
checkpoint.RunFiles.save = lambda files, content, wait=True: save_run(files, content, True)
restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
if os.environ.get("CRASH_RANK", "0") == os.environ.get("RANK", "0") and not restarts:
    if MOMENT == "backward":  # with the gradients of some blocks
        model.output_and_mlp = at_nth_backward(model.output_and_mlp)
    elif MOMENT == "optimizer":  # with some weights updated and others not
        optim.adam_atan2 = at_nth(optim.adam_atan2)
    elif MOMENT in ("loss", "gradient"):
        model.HRM.forward = at_nth_spoiled
    elif MOMENT == "write":
        torch.save = half_save
    elif MOMENT == "fsync":
        os.fsync = at_nth(os.fsync)
    elif MOMENT == "rename":  # of a checkpoint
        os.replace = at_nth(os.replace, lambda source, target: "ckpt" in str(target))
    elif MOMENT == "answer":  # of an evaluation
        evaluate.text_of = at_nth(evaluate.text_of)
    elif MOMENT == "replace":  # a dataset: the old one goes, the new one comes
        pathlib.Path.rename = at_nth(pathlib.Path.rename)
if "CRASH_SLOW" in os.environ and not restarts:  # so many seconds more per step
    step = optim.AdamATan2.step
    optim.AdamATan2.step = lambda self: (time.sleep(float(os.environ["CRASH_SLOW"])), step(self))
sys.argv = sys.argv[1:]
runpy.run_path(SCRIPT, run_name="__main__")
