"""SIGTERM, as schedulers send it before they kill: a run saves what it has and says so."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class StoppedError(Exception):
    """A run that was asked to stop has saved its state; the message says how to go on."""


class Sigterm:
    """While this is entered, SIGTERM is noted; calling it tells whether one came.

    The second one kills. Outside the main thread, where Python has no signals, none is noted.
    """

    def __init__(self) -> None:
        self.came = False
        self.before: Any = None

    def __call__(self) -> bool:
        return self.came

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
