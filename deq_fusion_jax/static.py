"""Arrays apart from the rest, in arguments and configurations: only the rest is static in jit."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deq_fusion_jax.state import PyTree


def is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def known(value: Any) -> bool:
    """Whether an option is a number now; it may be an array, traced even, that is one later."""
    return isinstance(value, int | float | np.generic)


def split_arrays(args: PyTree) -> tuple[list[jax.Array], Callable[[list[jax.Array]], PyTree]]:
    """The arrays and floats among the leaves, and what puts them back among the others.

    Other leaves, such as functions, strings, bools and ints, are handed to f as they are.
    """
    leaves, treedef = jax.tree.flatten(args)
    dynamic = [is_array(x) or isinstance(x, np.generic | float | complex) for x in leaves]
    arrays = [jnp.asarray(x) for x, moves in zip(leaves, dynamic, strict=True) if moves]

    def whole(arrays: list[jax.Array]) -> PyTree:
        rest = iter(arrays)
        pairs = zip(leaves, dynamic, strict=True)
        return jax.tree.unflatten(treedef, [next(rest) if moves else x for x, moves in pairs])

    return arrays, whole


class _Slot(NamedTuple):
    """Where in a configuration an array was."""

    at: int


def lift(config: Any) -> tuple[Any, list[jax.Array]]:
    """A tuple of frozen dataclasses without the arrays in them, hence hashable, and the arrays."""
    arrays: list[jax.Array] = []

    def lifted(value: Any) -> Any:
        if is_array(value):
            arrays.append(jnp.asarray(value))
            return _Slot(len(arrays) - 1)
        return _mapped(lifted, value)

    return tuple(map(lifted, config)), arrays


def restore(config: Any, arrays: list[jax.Array]) -> Any:
    """The inverse of `lift`."""

    def restored(value: Any) -> Any:
        return arrays[value.at] if isinstance(value, _Slot) else _mapped(restored, value)

    return tuple(map(restored, config))


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """A frozen dataclass with `change` applied to its fields; anything else as it is."""
    frozen = dataclasses.is_dataclass(value) and type(value).__dataclass_params__.frozen  # type: ignore
    if not frozen:
        return value
    old = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    new = {name: change(field) for name, field in old.items()}
    same = all(new[name] is field for name, field in old.items())
    return value if same else dataclasses.replace(value, **new)
