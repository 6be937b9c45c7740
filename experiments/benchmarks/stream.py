"""Training rows that stay on disk against rows in memory: throughput, and memory that it takes.

    python -m experiments.benchmarks.stream                      200,000 rows, 3.5 GB, once on disk
    python -m experiments.benchmarks.stream --rows 20000 --features 128

MM-IMDB's synthetic sample with more rows, and the model and batch of `experiments.mmimdb`. Each
contender trains in a process of its own, in turns, a few steps a round. After the first round,
which is not counted, the one that streams may take no more than LIMIT beyond what it has
(RLIMIT_DATA), or it dies. Writes `stream.json` and `stream.md`.
"""

import itertools
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.timing import Contender, interleaved
from experiments.common.cli import parse
from experiments.common.errors import InputError, exit_cleanly
from experiments.common.files import versions, write_json, write_text
from experiments.common.memory import memory
from experiments.common.text import markdown_table, number
from experiments.datasets.mmimdb_sample import sample_file
from experiments.datasets.prepared import cache_root
from experiments.run import Job, experiment
from experiments.training.config import require
from experiments.training.feed import Resident, feed, order_of_epoch, scan_steps
from experiments.training.step import init_state

STREAMED, RESIDENT = "from disk", "in memory"
LIMIT = 2 * 2**30  # bytes


@dataclass(frozen=True, kw_only=True)
class Config:
    """Streaming against training in memory.

    Attributes:
      rows: of the synthetic training split, 17.6 kB each.
      features: d, the width of the fusion.
      batch_size: rows a step.
      steps: a round.
      rounds: of each contender, after one to warm up.
      cache_dir: where the data are kept; by default ~/.cache/deq_fusion_jax.
      out: folder of the results.
    """

    rows: int = 200_000
    features: int = 512
    batch_size: int = 256
    steps: int = 20
    rounds: int = 5
    cache_dir: Path | None = None
    out: Path = Path("runs/stream")

    def __post_init__(self) -> None:
        for name in ("rows", "features", "batch_size", "steps", "rounds"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        least = self.batch_size * self.steps
        require(self.rows >= least, "rows", self.rows, f"at least a round's, {least}")


# --- the processes that train ------------------------------------------------------------------


def data_file(config: Config) -> Path:
    """The synthetic MM-IMDB of so many training rows."""
    return sample_file(cache_root(config.cache_dir) / "mmimdb_sample", config.rows, 256, 256)


def job_of(config: Config, stream: bool) -> Job:
    mmimdb = experiment("mmimdb")
    options = {"features": config.features, "batch_size": config.batch_size}
    where = {"data_dir": data_file(config), "cache_dir": config.cache_dir}
    return mmimdb.job(mmimdb.Config(**options, **where, stream=stream))  # type: ignore[arg-type]


def rounds_of(config: Config, stream: bool) -> Iterator[None]:
    """Trains `steps` steps every time it is asked."""
    job = job_of(config, stream)
    rows = feed(job.dataset.stream or job.dataset.train)
    state = init_state(job.task, job.optimiser, rows.examples, 0)
    what = job.task, job.optimiser
    trained = jax.jit(scan_steps, static_argnums=(0, 1), donate_argnums=2)
    batches = rows.rows // config.batch_size
    orders = np.asarray(order_of_epoch(state.key, 0, rows.rows))
    orders = orders[: batches * config.batch_size].reshape(batches, -1)
    for first in itertools.count(step=config.steps):
        if isinstance(rows, Resident):
            taken = orders[np.arange(first, first + config.steps) % batches]
            state, _ = trained(*what, state, rows.split, taken)
        else:
            end = first + config.steps
            *_, (_, state, _) = rows.steps(*what, state, config.batch_size, first, end)
        jax.block_until_ready(state)
        yield


def train(config: Config, stream: bool, asked: Connection) -> None:
    """Trains a round for every True it receives, and sends the memory that it has taken."""
    before = memory("VmRSS")
    rounds = rounds_of(config, stream)
    limited = False
    while asked.recv():
        next(rounds)
        if stream and not limited:  # the model is there, and its programs
            most = memory("VmData") + LIMIT
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
            limited = True
        asked.send({"before": before, "peak": memory("VmHWM")})


# --- the benchmark -----------------------------------------------------------------------------


class Trainer:
    """A process that trains a round when called."""

    def __init__(self, config: Config, stream: bool):
        context = multiprocessing.get_context("spawn")
        self.pipe, asked = context.Pipe()
        self.process = context.Process(target=train, args=(config, stream, asked), daemon=True)
        self.process.start()
        asked.close()  # the process's end of it, so that its death is seen here
        self.seen: dict[str, int] = {}

    def __call__(self) -> None:
        self.pipe.send(True)
        try:
            self.seen = self.pipe.recv()
        except EOFError:
            raise InputError("a training process has ended; what it printed is above") from None

    def end(self) -> None:
        if self.process.is_alive():
            self.pipe.send(False)
        self.process.join()


def compared(config: Config) -> dict[str, Any]:
    """Rows a second of both contenders in every round, and the memory that they took."""
    trainers = {name: Trainer(config, name == STREAMED) for name in (STREAMED, RESIDENT)}
    contenders = [Contender(name, trainer) for name, trainer in trainers.items()]
    try:
        seconds = interleaved(contenders, config.rounds)
    finally:
        for trainer in trainers.values():
            trainer.end()
    rows = config.steps * config.batch_size
    ratios = [a / b for a, b in zip(seconds[RESIDENT], seconds[STREAMED], strict=True)]
    return {
        "data": "MM-IMDB sample (synthetic)",
        "bytes": config.rows * 4 * (300 + 4096),
        "rows_per_second": {
            name: [rows / took for took in times] for name, times in seconds.items()
        },
        "ratio": median(ratios),
        "memory": {name: t.seen["peak"] - t.seen["before"] for name, t in trainers.items()},
    }


def table(results: dict[str, Any]) -> str:
    """stream.md."""
    config, found = results["config"], results["found"]
    lines = [["training rows", "rows/s, median", "lowest to highest", "memory, GB"]]
    for name, rates in found["rows_per_second"].items():
        span = f"{number(min(rates), 0)} to {number(max(rates), 0)}"
        memory = number(found["memory"][name] / 1e9, 2)
        lines.append([name, number(median(rates), 0), span, memory])
    about = (
        f"{found['data']}, {config['rows']:,} training rows, {found['bytes'] / 1e9:.2f} GB; d = "
        f"{config['features']}, batch {config['batch_size']}, {config['steps']} steps a round, "
        f"{config['rounds']} rounds in turns. From disk: {found['ratio']:.0%} of the throughput in "
        f"memory (median of the rounds), under a hard limit of {LIMIT / 1e9:.2f} GB beyond the "
        "model. Memory is the peak of the resident set, model and programs included, less what it "
        "was before data and model."
    )
    device = results["versions"]["device"]
    return "\n".join(["# From disk", "", about, "", markdown_table(lines), "", f"On {device}.", ""])


def parse_args(args: Sequence[str]) -> Config:
    return parse(Config(), args, "python -m experiments.benchmarks.stream")


@exit_cleanly()
def main() -> None:
    config = parse_args(sys.argv[1:])
    memory("VmRSS")
    start = time.monotonic()
    print(f"Data: {data_file(config)}")
    job_of(config, stream=True)  # prepared once, not by two processes at a time
    print(
        f"Ready after {time.monotonic() - start:.0f} s; training {config.rounds} rounds in turns …"
    )
    found = compared(config)
    results = {"config": {**asdict(config), "cache_dir": None, "out": None}}
    results |= {"versions": versions(), "found": found}
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / "stream.json", results)
    text = table(results)
    write_text(config.out / "stream.md", text)
    print(text)


if __name__ == "__main__":
    main()
