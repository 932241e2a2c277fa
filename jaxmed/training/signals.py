"""Ctrl-C and SIGTERM, which ask training to save and stop."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any


class StopSignal:
    """While entered, Ctrl-C or SIGTERM asks training to save and stop; the second one acts at once.

    Attributes:
        requested: whether to stop; may also be set by hand.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # others cannot have handlers
            self._former = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        self._restore()

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        self.requested = True
        self._restore()  # so that the second one does what it always does
        name = signal.Signals(number).name
        # Not print, which must not be entered twice, as a handler may.
        os.write(2, f"\n{name}: saving and stopping; once more to stop at once\n".encode())

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}
