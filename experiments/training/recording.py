"""What a training writes into its run directory while it goes on, and how it is stopped."""

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.common.files import append_text, plain, set_aside, write_text
from experiments.common.stopping import StoppedError, StopRequest
from experiments.training.checkpoint import Checkpoints
from experiments.training.devices import is_first, log
from experiments.training.progress import Bar
from experiments.training.schedule import Schedule

SAVE_SECONDS = 30  # between two checkpoints; what a crash may cost


def checkpoints(run_dir: Path, folder: str, *written: str) -> Checkpoints:
    """Those of a training; where there are none, the files it has written before are kept aside."""
    found = Checkpoints(run_dir / folder, every=SAVE_SECONDS)
    before = [path for name in written if (path := run_dir / name).exists()]
    if before and is_first() and not found.steps():
        kept = ", ".join(f"{path.name} as {set_aside(path).name}" for path in before)
        log(f"Note: {found} holds no checkpoint, so training begins at epoch 0; kept: {kept}.")
    return found


@contextlib.contextmanager
def stopping(schedule: Schedule, streamed: bool, run_dir: Path) -> Iterator[StopRequest]:
    """Whether Ctrl-C or SIGTERM came; says how to go on with a run that it stopped."""
    every = schedule.evaluate_every
    epochs = "this epoch" if every == 1 else f"at most {every} epochs"
    when = "this step" if streamed else epochs
    answer = f"saving after {when}; once more ends at once, without saving"
    with StopRequest(answer) as asked:
        try:
            yield asked
        except StoppedError as stopped:
            how = f"the same command with --resume --run-dir {shlex.quote(str(run_dir))}"
            number = asked.number or stopped.number
            raise StoppedError(stopped.saved, how, number) from None


def recorder(path: Path, show: Bar, begin: Callable[[], None]) -> Callable[..., None]:
    """What writes a row of the history to a file and shows it; before the first one it calls begin.

    A resumed run hands its old rows over again. They stand in the file already; what follows them
    there is of epochs that are trained again.
    """
    lines = path.read_bytes().splitlines(keepends=True) if is_first() and path.exists() else []
    old, same = iter(lines), ""

    def report(row: dict[str, Any]) -> None:
        nonlocal old, same
        begin()
        if is_first():
            line, before = json.dumps(plain(row)) + "\n", next(old, None)
            if before == line.encode():
                same += line
            elif before is None:
                append_text(path, line)
            else:
                write_text(path, same + line)
                old = iter(())
        show(row)

    return report
