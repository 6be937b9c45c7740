"""A long training run: whether memory and the time of a step stay as they are.

    python -m experiments.benchmarks.long                 20,000 steps on the sample (synthetic)

The run is that of `experiments.mmimdb`, checkpoints included. Writes `long.json`, `long.md` and
`long.png` into the folder `--out`.
"""

import dataclasses
import itertools
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.figures import long_run
from experiments.common.cli import parse
from experiments.common.errors import exit_cleanly
from experiments.common.files import versions, write_json, write_text
from experiments.common.memory import in_use, memory
from experiments.common.text import markdown_table, number
from experiments.run import experiment, train
from experiments.training.config import require
from experiments.training.run_directory import begin_run, opened_run, read_history

PARTS = 10  # of the run, which are compared
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True, kw_only=True)
class Config:
    """A long training run.

    Attributes:
      steps: at least so many, in whole epochs, which are 22 at least: two each to compare.
      features: d, the width of the fusion.
      cache_dir: where the sample is kept; by default ~/.cache/deq_fusion_jax.
      out: folder of the results; the run itself goes into a new folder in it.
    """

    steps: int = 20_000
    features: int = 128
    cache_dir: Path | None = None
    out: Path = Path("runs/long")

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", self.steps, "1 or more")


class Watch:
    """While `watching`: seconds, resident bytes, bytes in use; and when programs were compiled."""

    def __init__(self, every: float):
        self.every, self.start = every, time.monotonic()
        self.memory: list[tuple[float, int, int]] = []
        self.compiled: list[float] = []
        self.over = threading.Event()

    def now(self) -> float:
        return time.monotonic() - self.start

    def _sample(self) -> None:
        while not self.over.wait(self.every):
            self.memory.append((self.now(), memory("VmRSS"), in_use()))

    def _note(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == COMPILED and not self.over.is_set():
            self.compiled.append(self.now())


@contextmanager
def watching(every: float = 0.5) -> Iterator[Watch]:
    watch = Watch(every)
    jax.monitoring.register_event_duration_secs_listener(watch._note)
    thread = threading.Thread(target=watch._sample, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()


def measured(config: Config) -> dict[str, Any]:
    """Trains, and returns what was seen, by tenths of the run."""
    mmimdb = experiment("mmimdb")
    run_dir = config.out / time.strftime("run-%Y%m%d-%H%M%S")
    options = {"features": config.features, "cache_dir": config.cache_dir, "run_dir": run_dir}
    base = dataclasses.replace(mmimdb.SAMPLE, **options, patience=10**9)  # type: ignore[arg-type]
    job = mmimdb.job(base)
    batches = len(job.dataset.train.labels) // base.batch_size
    epochs = max(-(-config.steps // batches), 2 * PARTS + 2)
    job = job._replace(schedule=job.schedule._replace(epochs=epochs))
    whole = dataclasses.replace(base, epochs=epochs)
    with opened_run("mmimdb", whole), watching() as watch:
        begin_run(run_dir, "mmimdb", whole)
        train(job, base, run_dir)
    parts = by_parts(watch, read_history(run_dir))
    return {"steps": epochs * batches, "batches": batches, **parts}


def by_parts(watch: Watch, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Memory, time of an epoch and compilations in every tenth of the time after the first epoch.

    What is compiled in the second epoch still belongs to the start: the first checkpoint, say.
    """
    seconds = np.array([row["seconds"] for row in rows])
    edges = np.linspace(seconds[2], seconds[-1], PARTS + 1)
    begun = watch.memory[-1][0] - seconds[-1]  # the watch started before the first epoch
    when, resident, used = np.array(watch.memory).T
    when = when - begun
    compiled = np.array(watch.compiled) - begun
    epochs = np.diff(seconds)[2:]
    of_epoch = np.clip(np.searchsorted(edges, seconds[3:]) - 1, 0, PARTS - 1)
    parts = []
    for part, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = (when > low) & (when <= high)
        parts.append(
            {
                "resident": float(np.median(resident[inside])) if inside.any() else None,
                "in_use": float(np.median(used[inside])) if inside.any() else None,
                "seconds_per_epoch": median(epochs[of_epoch == part].tolist() or [float("nan")]),
                "compiled": int(((compiled > low) & (compiled <= high)).sum()),
            }
        )
    return {"parts": parts}


def report(results: Mapping[str, Any]) -> str:
    """long.md."""
    found, parts = results["found"], results["found"]["parts"]
    header = ["tenth of the run", "in use, MB", "resident, MB", "ms a step", "programs compiled"]
    lines = [header]
    for i, part in enumerate(parts, 1):
        ms = 1e3 * part["seconds_per_epoch"] / found["batches"]
        sizes = [number(part[kind] and part[kind] / 1e6, 1) for kind in ("in_use", "resident")]
        lines.append([str(i), *sizes, number(ms, 2), str(part["compiled"])])

    def change(key: str) -> float:
        return parts[-1][key] / parts[0][key] - 1

    about = (
        f"{found['steps']:,} steps of `experiments.mmimdb` on its sample (synthetic), d = "
        f"{results['config']['features']}, evaluations and checkpoints included; medians of each "
        f"tenth of the time after the second epoch. From the first tenth to the last: memory in "
        f"use {change('in_use'):+.1%}, resident {change('resident'):+.1%}, time of a step "
        f"{change('seconds_per_epoch'):+.1%}."
    )
    device = results["versions"]["device"]
    title = "# A long run"
    return "\n".join([title, "", about, "", markdown_table(lines), "", f"On {device}.", ""])


def parse_args(args: Sequence[str]) -> Config:
    return parse(Config(), args, "python -m experiments.benchmarks.long")


@exit_cleanly()
def main() -> None:
    config = parse_args(sys.argv[1:])
    memory("VmRSS"), in_use()  # or why there is none, before all the work
    results = {
        "config": {"steps": config.steps, "features": config.features},
        "found": measured(config),
        "versions": versions(),
    }
    write_json(config.out / "long.json", results)
    text = report(results)
    write_text(config.out / "long.md", text)
    long_run(results["found"]).savefig(config.out / "long.png", dpi=150)
    print(text)


if __name__ == "__main__":
    main()
