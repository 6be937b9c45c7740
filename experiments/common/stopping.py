"""Ctrl-C, and SIGTERM as schedulers send it before they kill: a run saves and says how to go on."""

import contextlib
import os
import signal
import socket
import sys
import threading
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(Exception):
    """A run that was asked to stop has saved its state.

    Attributes:
      saved: what, in words.
      command: what goes on from there.
      number: of the signal.
    """

    def __init__(self, saved: str, command: str = "", number: int = signal.SIGTERM):
        super().__init__(saved, command, number)
        self.saved, self.command, self.number = saved, command, number

    def __str__(self) -> str:
        return f"{self.saved}; {self.command} goes on" if self.command else self.saved


class StopRequest:
    """From `begin` on the first SIGINT or SIGTERM is noted; calling it tells whether one came.

    `answer` then stands on stderr at once, and a second signal ends the process at once. Python
    calls its own handlers between two of its steps, and a compiled epoch is a single one; so a
    thread listens. Outside the main thread, where Python has no signals, none is noted.
    """

    def __init__(self, answer: str):
        self.answer = answer
        self.number: int | None = None
        self.before: dict[int, Any] = {}
        self.thread: threading.Thread | None = None

    def __call__(self) -> bool:
        return self.number is not None

    def __enter__(self) -> Self:
        return self

    def begin(self) -> None:
        """There is something to save from now on; before, a signal may end the process."""
        if self.thread or threading.current_thread() is not threading.main_thread():
            return
        self.ear, self.mouth = socket.socketpair()
        self.mouth.setblocking(False)
        self.mouth_before = signal.set_wakeup_fd(self.mouth.fileno())
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._note) for number in heard}

    def __exit__(self, *_: object) -> None:
        if self.thread is None:
            return
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.mouth_before)
        self.mouth.close()  # which ends the thread
        self.thread.join()
        self.ear.close()

    def _note(self, number: int, frame: object) -> None:
        self.number = self.number or number

    def _listen(self) -> None:
        """Reads the numbers of the signals, as they come."""
        come = 0
        while heard := self.ear.recv(1):
            if heard[0] not in SIGNALS:
                continue
            come += 1
            if come > 1:
                if sys.__stdout__ and sys.__stdout__.isatty():  # a progress bar hides the cursor
                    print("\033[?25h", file=sys.__stdout__, flush=True)
                os._exit(128 + heard[0])
            with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
                print(f"stopping: {self.answer}", file=sys.stderr, flush=True)
