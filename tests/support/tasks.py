"""Tasks for processes of their own, which import them by name."""

import os
import signal


def squared(number, progress):
    """The square; 0 ends its own process, as the system does when memory runs out."""
    progress.stage(1, 1, "squaring", None, None)
    if number == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


def lost(number, why):
    return f"{number}: {why}"
