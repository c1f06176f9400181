"""One function on many jobs, by all cores, with the results in order."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait

MAX_BYTES = 2**25  # of the jobs in work


def in_order(function, jobs, n_workers, processes):
    """Yields (bytes, job, function(job)) for each (bytes, job). Jobs of at most 32 MB are in work, or a single one. The
    workers are processes, where asked for and there is fork, which hands them any function as it is; else threads."""
    waiting, in_work = deque(), 0
    if processes and sys.platform == "linux":
        pool = ProcessPoolExecutor(n_workers, multiprocessing.get_context("fork"), start_process, (function,))
        function = call_held
    else:
        pool = ThreadPoolExecutor(n_workers)

    def finish():
        nonlocal in_work
        size, job, future = waiting.popleft()
        in_work -= size
        return size, job, future.result()

    try:
        for size, job in jobs:
            while waiting and (len(waiting) > 4 * n_workers or in_work + size > MAX_BYTES):
                yield finish()
            waiting.append((size, job, pool.submit(function, job)))
            in_work += size
        while waiting:
            yield finish()
    except BrokenProcessPool:
        raise ValueError("a process was killed, perhaps because memory is short; --workers sets their number") from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_process(function):
    """Ctrl-C is for the parent alone; when that has gone, however it went, this process goes."""
    global held
    held = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: wait([parent]) and os._exit(1), daemon=True).start()


def call_held(job):
    return held(job)
