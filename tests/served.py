"""What the processes of test_workers.py do: in a file of its own, which they can import."""

import os
import signal
import time


def serve(task):
    """What a process is told to do: (result, fit)."""
    what, _, rest = str(task).partition(":")
    if what == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exit":
        os._exit(7)
    if what == "hang":
        time.sleep(600)
    if what == "spoil":
        return (os.getpid(), rest), False
    return (os.getpid(), rest), True
