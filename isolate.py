"""Functions that run in processes of their own, which may crash or hang without harm to the one that starts them."""

import signal
import sys
import time
from multiprocessing import get_context

from common import one_line


def rows_of(function, arguments, until, fork=False):
    """What the generator function(*arguments) yields in a process of its own, as it comes. Raises ValueError if it
    raises anything, if its process dies, or if it is still at work at `until`, a time of time.time(). The process is a
    new Python, as one that has used CUDA cannot be forked, or a fork, which needs no time to import torch."""
    context = get_context("fork" if fork and sys.platform == "linux" else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_rows, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, until - time.time())):
            kind, value = receiver.recv()
            if kind == "error":
                raise ValueError(value)
            yield value
        raise ValueError("its time was up")
    except EOFError:
        process.join(20)
        if process.exitcode:
            raise ValueError(f"its process ended with status {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def send_rows(sender, function, arguments):
    """In the new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that has started it
    try:
        for row in function(*arguments):
            sender.send(("row", row))
    except Exception as e:
        sender.send(("error", one_line(e)))
