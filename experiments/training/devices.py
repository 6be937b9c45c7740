"""Data parallelism: a batch is sharded over the devices of a mesh, all else is replicated.

    none        one device
    devices     all devices of this process
    processes   all devices of all processes that a launcher (SLURM, Open MPI, Kubernetes, TPU pod)
                has started; `jax.distributed` finds them

Training is one program for the whole batch, which jit divides (dropout, batch statistics and
gradients are those of one device, to rounding), except for the solver: see `batch_axis` of
`DEQFusion`. Every process holds the data; the first one alone writes and speaks.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deq_fusion_jax.iterated import Equilibrium
from experiments.common.errors import InputError, exit_cleanly

PyTree = Any
Result = TypeVar("Result")
Parallel = Literal["none", "devices", "processes"]
BATCH = "batch"  # the mesh's axis
LOST_SECONDS = 30  # without a sign of life, after which a process counts as lost


@contextlib.contextmanager
def joined(parallel: Parallel) -> Iterator[None]:
    """Among all processes, where there are several: they begin together and fail together."""
    if parallel == "processes":
        _join_processes()
    with _failing_together():
        yield


@contextlib.contextmanager
def mesh_of(parallel: Parallel) -> Iterator[None]:
    """The mesh within which to train; none for one device."""
    if parallel == "none":
        yield
        return
    mesh = jax.make_mesh((jax.device_count(),), (BATCH,), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        yield


def _join_processes() -> None:
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(
            heartbeat_timeout_seconds=LOST_SECONDS, shutdown_timeout_seconds=LOST_SECONDS
        )
    except ValueError as error:
        raise InputError(
            "--parallel processes: no launcher that JAX knows (SLURM, Open MPI, Kubernetes, TPU "
            f"pod) has started this process ({error}); start it with one, or use --parallel devices"
        ) from error
    # The end of the first process kills the others before Python can speak, so this comes early.
    print(
        f"Process {jax.process_index()} of {jax.process_count()} has joined. If another one is "
        'lost, this one ends too (JAX may say "another task died"); start all processes again '
        "with --resume.",
        file=sys.stderr,
    )


@contextlib.contextmanager
def _failing_together() -> Iterator[None]:
    """Among several processes, one that fails leaves at once, and so do those that lose it.

    Python's own way out would wait for the others, which wait for this one.
    """
    if jax.process_count() == 1:
        yield
        return
    status = 1
    try:
        with exit_cleanly():
            yield
        return
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except Exception as error:  # every one is told, and ends the process
        reason = f"another one has ended ({str(error).splitlines()[0]})"
        if not _is_lost(error):
            reason = "see above"
            traceback.print_exc()
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} cannot go on: "
            f"{reason}; checkpoints are kept: start all processes again with --resume",
            file=sys.stderr,
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_lost(error: Exception) -> bool:
    """Whether an error is that of a collective whose other side is gone."""
    return any(word in str(error) for word in ("Gloo", "NCCL", "Connection", "UNAVAILABLE"))


def _mesh() -> Any:
    return jax.sharding.get_abstract_mesh()


def device_count() -> int:
    """How many devices share a batch."""
    return 1 if _mesh().empty else _mesh().shape[BATCH]


def shard(tree: PyTree) -> PyTree:
    """Under jit: every array's first axis goes over the devices."""
    return tree if _mesh().empty else jax.lax.with_sharding_constraint(tree, PartitionSpec(BATCH))


def replicate(tree: PyTree) -> PyTree:
    """Under jit: every array whole on every device."""
    return tree if _mesh().empty else jax.lax.with_sharding_constraint(tree, PartitionSpec())


def put(tree: PyTree) -> PyTree:
    """Arrays, alike in all processes, whole on every device."""
    if _mesh().empty:
        return jax.device_put(tree)
    return jax.device_put(tree, NamedSharding(jax.sharding.get_mesh(), PartitionSpec()))


def own_rows(rows: np.ndarray) -> np.ndarray:
    """Those row numbers of every batch [steps, B] that this process reads."""
    return np.split(rows, jax.process_count(), axis=1)[jax.process_index()]


def put_batches(tree: PyTree, batch_size: int) -> PyTree:
    """Arrays [steps, batch_size, …] over the devices, from each process's own rows [rows, …]."""
    own = batch_size // jax.process_count()
    tree = jax.tree.map(lambda x: x.reshape(-1, own, *x.shape[1:]), tree)
    if _mesh().empty:
        return jax.device_put(tree)
    sharding = NamedSharding(jax.sharding.get_mesh(), PartitionSpec(None, BATCH))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def shard_model(model: nn.Module) -> nn.Module:
    """The model with every device's solver by itself."""
    fusion = getattr(model, "fusion", None)
    if _mesh().empty or not isinstance(fusion, Equilibrium):
        return model
    return model.clone(fusion=fusion.clone(batch_axis=BATCH))


def share_of(batch_size: int, rows: int) -> int:
    """Rows of a batch: batch_size, or all rows if there are fewer, shared out evenly.

    Raises:
      InputError: batch_size is no multiple of the devices, or there are fewer rows than devices.
    """
    devices = device_count()
    if rows < devices:
        raise InputError(f"{rows} training rows are too few for {devices} devices")
    if batch_size >= rows:
        return rows // devices * devices
    if batch_size % devices:
        raise InputError(
            f"--batch-size {batch_size}: {devices} devices share a batch; give a multiple of that"
        )
    return batch_size


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def log(text: str) -> None:
    """Prints, once for all processes."""
    if is_first():
        print(text)


def by_the_first(do: Callable[[], Result]) -> Result | None:
    """What `do` returns in the first process, for all of them; None in the others.

    Where it raises an InputError all end, and the first one says why.
    """
    done, refusal = None, None
    if is_first():
        try:
            done = do()
        except InputError as error:
            refusal = error
    if any_process(refusal is not None)[0]:
        raise refusal or SystemExit(2)
    return done


def any_process(*flags: bool) -> list[bool]:
    """For each flag whether it is set in any process; all have to ask."""
    if jax.process_count() == 1:
        return list(flags)
    of_each = multihost_utils.process_allgather(np.asarray(flags))
    return np.any(of_each, axis=0).tolist()


def wait_for_all(name: str) -> None:
    """Returns once all processes are here."""
    multihost_utils.sync_global_devices(name)
