"""What torchrun needs: the processes (ranks) of one training run start together, agree, and end together."""

import os
import signal
import socket
import sys
import time
import uuid
from collections import deque
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import one_line

rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
master = rank == 0
run_id = os.environ.get("TORCHELASTIC_RUN_ID")
launch_id = run_id and f"{run_id} {socket.gethostname()} {os.getppid()}"  # the same when torchrun starts a run again
cpu_group = None  # to agree without waiting for the device
store = None  # of this start, see fresh_store()
advice = "--init_from=resume goes on from the checkpoint"
before_exit = []  # functions to call first, as the end of several ranks is abrupt


@contextmanager
def rank_failure_guard():
    """Inside, ranks wait for each other. If one is lost, the rest end."""
    try:
        yield
    except RuntimeError as e:
        if isinstance(e, torch.OutOfMemoryError):
            raise
        why = one_line(e).split(". ")[0]
        fail(f"rank {rank} cannot go on with the other ranks ({why}); {advice}")


@rank_failure_guard()
def start(device, patience=timedelta(minutes=30)):
    """Join the other ranks, which must come within 5 minutes. patience: for which they wait where they agree."""
    global cpu_group, store
    if world_size > 1:
        backend, timeout = "nccl" if device.startswith("cuda") else "gloo", timedelta(minutes=10)
        store = fresh_store(minutes=5)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        cpu_group = dist.new_group(backend="gloo", timeout=patience)


def fresh_store(minutes):
    """A key-value store for the ranks of this start alone. Torchrun's outlives a restart (torch 2.13) and then holds
    addresses of ranks that are gone, and its agents count restarts differently. So each rank sends a new nonce, which
    the first rank answers with the prefix of this start."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=minutes)))
    nonce, prefix = uuid.uuid4().hex, uuid.uuid4().hex
    if not master:
        store.set(f"nonce of rank {rank}", nonce)
        prefix = store.get(nonce).decode()  # waits for the answer
        store.add(prefix, 1)
    while master and store.add(prefix, 0) < world_size - 1:  # until all have come, as a nonce may be an old one
        for key in (f"nonce of rank {r}" for r in range(1, world_size)):
            if store.check([key]):
                store.set(store.get(key).decode(), prefix)
        time.sleep(0.02)
    return dist.PrefixStore(prefix, store)


def print0(*text, file=None):
    """Print, once for all ranks, without breaking the progress bar. To stdout, unless to `file`."""
    if master:
        tqdm.write(" ".join(map(str, text)), file=file)
        (file or sys.stdout).flush()  # into a file or a pipe too


def shutdown(sentence="", status=1):
    """End this process, with a sentence if something is wrong."""
    if sentence:
        tqdm.write(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if world_size == 1:
        sys.exit(status)
    for function in before_exit:
        function()
    os._exit(status)  # gloo's threads now and then abort a process that winds down in the ordinary way (torch 2.13)


def fail(sentence):
    """End all ranks. Each machine prints the sentence of the rank that fails first, once. Ranks that wait for this one
    hear of its end by their connection, and those at work by a signal of torchrun."""
    try:
        if store:
            sentence = store.compare_set("failure", "", sentence).decode()
            if store.add(f"failure is told on {socket.gethostname()}", 1) > 1:
                time.sleep(1)  # when a rank has ended, torchrun may end the one that is to speak
                sentence = ""
    except RuntimeError:
        pass  # the machine with the store is lost
    shutdown(sentence)


def catch_stop_signals():
    """Returns a function that tells whether SIGINT, SIGTERM or SIGUSR1 has come. A second one ends the process."""
    came = []

    def handler(signum, frame):
        if came and not (run_id and time.monotonic() - came[0] < 2):  # torchrun sends a copy of the first
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        came.append(time.monotonic())

    for name in "SIGINT", "SIGTERM", "SIGUSR1":
        if hasattr(signal, name):  # Windows lacks one
            signal.signal(getattr(signal, name), handler)
    return lambda: bool(came)


class Trouble(str):
    """A sentence that ends all ranks."""


@rank_failure_guard()
def gather(value):
    """[the value of each rank]. A rank that gives Trouble ends all, without waiting for the others."""
    if isinstance(value, Trouble):
        fail(f"rank {rank}: {value}" if rank else value)
    values = [value]
    if dist.is_initialized():
        values = [None] * world_size
        dist.all_gather_object(values, value, group=cpu_group)
    return values


def check_agreement(values):
    """End all ranks unless they have the same values {name: value}."""
    first = gather(values)[0]
    differs = [f"{k} is {v!r} and not {first.get(k)!r}" for k, v in values.items() if v != first.get(k)]
    sentence = f"unlike on rank 0, {'; '.join(differs)} (on {socket.gethostname()})"
    gather(Trouble(sentence) if differs else None)


@contextmanager
def abort_if_any():
    """Inside, an error that a user can cause ends all ranks at once, with a sentence. At its end they wait for all."""
    trouble = None
    try:
        yield
    except (ValueError, OSError) as e:
        trouble = Trouble(one_line(e))
    gather(trouble)


@rank_failure_guard()
def any_rank(*flags):
    """For each flag, whether it is set on any rank, so that all ranks do the same."""
    flags = torch.tensor([int(bool(flag)) for flag in flags])
    if world_size > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=cpu_group)
    return flags.bool().tolist()


@rank_failure_guard()
def sum_over_ranks(*tensors):
    """Sum each tensor over all ranks, in place."""
    for work in [dist.all_reduce(t, async_op=True) for t in tensors if world_size > 1]:
        work.wait()


@contextmanager
def summing_gradients(params):
    """Inside, one backward pass, whose gradients are summed over all ranks: each as soon as it is complete, while the
    pass goes on to others. All ranks sum them in the order of params, which should be that in which the pass completes
    them, and leave out the same ones: bp_steps decides which have none."""
    waiting, complete, works = deque(params), set(), []

    @rank_failure_guard()
    def start(p):
        complete.add(p)
        while waiting and waiting[0] in complete:
            works.append(dist.all_reduce(waiting.popleft().grad, async_op=True))

    hooks = [p.register_post_accumulate_grad_hook(start) for p in waiting if world_size > 1]
    yield
    for hook in hooks:
        hook.remove()
    if hooks:
        sum_over_ranks(*(p.grad for p in waiting if p.grad is not None))
    with rank_failure_guard():
        for work in works:
            work.wait()


@rank_failure_guard()
def copy_from_first(tensors):
    """Overwrite tensors by those of the first rank."""
    for t in tensors if world_size > 1 else ():
        dist.broadcast(t, 0)
