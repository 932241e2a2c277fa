"""Ctrl-C and SIGTERM, which ask training to save and stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any


class StopSignal:
    """While entered, Ctrl-C or SIGTERM asks training to save and stop; the second one acts at once.

    What follows within `SAME_SECONDS` is the same signal: terminals and cluster managers send it to
    a program and to its parent, which hands it on.

    Attributes:
        requested: whether to stop; may also be set by hand.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    SAME_SECONDS = 0.5

    def __init__(self) -> None:
        self.requested = False
        self._since: float | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            self._former = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self._since is not None:
            if now - self._since >= self.SAME_SECONDS:
                former = self._former[number]
                self._restore()  # to do what it always does
                if callable(former):
                    former(number, frame)
                else:
                    os.kill(os.getpid(), number)
            return
        self.requested, self._since = True, now
        name = signal.Signals(number).name
        # Not print, which must not be entered twice, as a handler may.
        os.write(2, f"\n{name}: saving and stopping; once more to stop at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}
