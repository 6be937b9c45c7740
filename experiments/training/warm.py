"""Warm starts: the equilibrium and adjoint of every training row, kept from the last epoch.

Between two visits of a row the weights move little, so both solves start near their solutions and
need fewer steps, unless the row's features change as well (dropout before the fusion). The solver's
tolerance is the same, so what is learned is the same up to that tolerance.
"""

import os
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_fusion_jax import Adjoint, FusionOutput, Implicit
from deq_fusion_jax.iterated import Equilibrium

PyTree = Any


class Warm(NamedTuple):
    """Starts of a batch of rows, or of all of them: `z0` and `adjoint0` of a fusion that solves."""

    z0: PyTree
    adjoint0: Adjoint


def solves_adjoint(model: nn.Module) -> bool:
    """Whether a model's fusion has a backward solve that can be watched and warm-started."""
    fusion = getattr(model, "fusion", None)
    return isinstance(fusion, Equilibrium) and isinstance(fusion.gradient, Implicit)


def cold_start(model: nn.Module, variables: PyTree, inputs: PyTree) -> Warm:
    """No guess, for every row of the inputs, be they a multiple of the devices or not."""
    if solves_adjoint(model):
        model = model.clone(fusion=model.fusion.clone(batch_axis=None))
    out = jax.eval_shape(model.apply, variables, inputs).fusion
    z0 = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state_of(model, out))
    return Warm(z0, Adjoint.zeros(z0))


def state_of(model: nn.Module, out: FusionOutput) -> PyTree:
    """What a model's fusion has solved for, from its output; None where it solves nothing."""
    fusion = getattr(model, "fusion", None)
    return fusion.state(out) if isinstance(fusion, Equilibrium) else None


def needed_bytes(model: nn.Module, inputs: PyTree) -> int:
    """What the starts of all rows take, on the device and in every checkpoint."""

    def starts(inputs: PyTree) -> Warm:
        return cold_start(model, model.init(jax.random.key(0), inputs), inputs)

    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(starts, inputs)))


def free_bytes() -> int | None:
    """What the device has left; None where nobody says."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def rows_of(warm: Warm, rows: jax.Array) -> Warm:
    return jax.tree.map(lambda x: x[rows], warm)


def put_rows(warm: Warm, rows: jax.Array, new: Warm) -> Warm:
    return jax.tree.map(lambda x, y: x.at[rows].set(y), warm, new)
