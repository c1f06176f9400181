"""Functions that run in processes of their own, which may crash or hang without harm to the one that starts them."""

import signal
import sys
import time
from multiprocessing import get_context

from common import one_line
from report import row_text


def run_parts(function, parts, values, fork=False):
    """Runs each of parts {name: seconds}: function(name, values) yields (what, row) in a process of its own; they are
    printed as they come. A part may use what those before it have left of their seconds. The values that it gets hold
    its `begin` and `deadline`, too. Yields (name, {what: row}, seconds taken, why it failed or None)."""
    deadline = time.time()
    for name, limit in parts.items():
        begin, deadline, table, failed = time.time(), deadline + limit, {}, None
        print(f"\n{name}", flush=True)
        try:
            own = values | dict(begin=begin, deadline=deadline)
            for what, row in rows_of(function, (name, own), deadline, fork):
                table[what] = row
                print(f"  {what:<36}", ", ".join(f"{k} {v}" for k, v in row_text(row).items()), flush=True)
        except ValueError as e:
            failed = str(e)
            print(f"part {name} failed: {e}")
        taken = time.time() - begin
        print(f"  {taken:.0f} s", flush=True)
        yield name, table, taken, failed


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
