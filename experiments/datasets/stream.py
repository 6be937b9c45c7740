"""Rows that stay on disk, for data sets larger than memory.

The order is the caller's, so it is reproducible and can start anywhere:

    for batch in stream.batches(np.split(order, steps)[done:]):
        …                                # the next ones are read meanwhile
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from experiments.datasets import Split


class OnDisk:
    """An input [N, …] of a split whose rows stay on disk; `x[rows]` reads them as a NumPy array.

    Args:
      shape, dtype: of all rows.
      read: from row numbers [B] to rows [B, …], from any thread.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        read: Callable[[np.ndarray], np.ndarray],
    ):
        self.shape, self.dtype, self._read = shape, dtype, read

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        return self._read(np.arange(len(self))[rows])


def stays_on_disk(split: Split) -> bool:
    return any(isinstance(x, OnDisk) for x in split.inputs.values())


class Stream:
    """The rows of a split that stay on disk, N of them, read by number from any thread.

    Args:
      rows: N.
      read_rows: from row numbers [B] to their Split.
    """

    def __init__(self, rows: int, read_rows: Callable[[np.ndarray], Split]):
        self._rows, self._read_rows = rows, read_rows

    def __len__(self) -> int:
        return self._rows

    def read(self, rows: np.ndarray) -> Split:
        """These rows [B], in this order, as NumPy arrays [B, …]."""
        if rows.ndim != 1 or not rows.size or rows.min() < 0 or rows.max() >= len(self):
            raise ValueError(f"expected rows from 0 to {len(self) - 1} as an array [B], not {rows}")
        return self._read_rows(rows)

    def batches(
        self, orders: Iterable[np.ndarray], ahead: int = 4, threads: int = 2
    ) -> Iterator[Split]:
        """`read` of every array of row numbers, in their order.

        While the caller works with one batch, `threads` threads prepare the next `ahead`; there are
        never more than ahead + 1. The error of a batch is raised in its place. The threads end with
        the iteration: at its end, at an error, or when it is closed.
        """
        if ahead < 1:
            raise ValueError(f"ahead is {ahead}; expected 1 or more")
        orders = iter(orders)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="stream")

        def start(count: int) -> Iterator[Future[Split]]:
            return (pool.submit(self.read, rows) for rows in itertools.islice(orders, count))

        try:
            waiting = deque(start(ahead))
            while waiting:
                waiting[0].result()  # before another is started
                waiting.extend(start(1))
                yield waiting.popleft().result()  # nothing here holds on to it
        finally:
            pool.shutdown(cancel_futures=True)

    def labels(self) -> np.ndarray:
        """The labels of all rows, [N, …] in the order of the source: one pass over the data."""
        rows = np.array_split(np.arange(len(self)), -(-len(self) // 256))
        return np.concatenate([batch.labels for batch in self.batches(rows)])
