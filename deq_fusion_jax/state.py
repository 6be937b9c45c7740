"""A pytree of batched arrays seen as one matrix: row b holds the whole state of sample b."""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import export

PyTree = Any
Class = TypeVar("Class")
Map = Callable[..., PyTree]  # f(z, *args)


def exportable(cls: type[Class]) -> type[Class]:
    """The dataclass of arrays as a pytree that `jax.export` can serialize; a decorator."""
    jax.tree_util.register_dataclass(cls)
    export.register_pytree_node_serialization(
        cls,
        serialized_name=f"deq_fusion_jax.{cls.__name__}",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: (),
    )
    return cls


def describe(tree: PyTree) -> str:
    """The tree with `dtype[shape]` in place of its arrays, for error messages."""
    text = str(jax.tree.structure(tree)).removeprefix("PyTreeDef(")[:-1].replace("'", "")
    for x in jax.tree.leaves(tree):
        text = text.replace("*", f"{x.dtype}{list(x.shape)}", 1)
    return text


def kind(tree: PyTree) -> tuple[Any, list[Any]]:
    """Structure, shapes and dtypes of the tree, to compare."""
    return jax.tree.structure(tree), [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def check_state(z: PyTree) -> None:
    """Raises ValueError unless all leaves are real floating point and share a leading axis."""
    leaves = jax.tree.leaves(z)
    if not leaves:
        raise ValueError("z0 has no arrays; expected a pytree of floating-point arrays [B, …].")
    if not all(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves):
        raise ValueError(f"z0 is {describe(z)}; expected real floating-point arrays only.")
    if any(jnp.finfo(x.dtype).bits < 16 for x in leaves):
        raise ValueError(
            f"z0 is {describe(z)}; expected a state of 16 bits or more: f may compute "
            "in 8, but what it iterates has to hold a residual."
        )
    if any(x.ndim == 0 for x in leaves) or len({x.shape[0] for x in leaves}) > 1:
        raise ValueError(f"z0 is {describe(z)}; expected one leading batch axis B for all leaves.")


def varying(tree: PyTree, avals: Iterable[Any]) -> PyTree:
    """The tree, typed as different on every device of a `shard_map` along the axes of `avals`."""
    axes = frozenset().union(*(aval.manual_axis_type.varying for aval in avals))

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def placed_like(tree: PyTree, like: Iterable[Any]) -> PyTree:
    """The tree, sharded as the types `like` say where a mesh has Explicit axes."""

    def place(x: jax.Array, aval: Any) -> jax.Array:
        same = jax.typeof(x).sharding == aval.sharding
        return x if same or aval.sharding.mesh.empty else jax.reshard(x, aval.sharding)

    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, [place(x, a) for x, a in zip(leaves, like, strict=True)])


def zeros_of_rows(matrix: jax.Array) -> jax.Array:
    """Zeros [B], sharded as the rows of the matrix are."""
    return jnp.sum(zeros_placed(matrix), axis=1)


def zeros_placed(x: jax.Array) -> jax.Array:
    """Zeros like x, Explicit sharding included; zeros_like forgets it where no mesh is set."""
    return jnp.where(False, x, jnp.zeros((), x.dtype))


def working_dtype(z: PyTree) -> jnp.dtype:
    """The type that residuals and mixing are computed in: the widest leaf's, at least float32."""
    return jnp.result_type(jnp.float32, *(x.dtype for x in jax.tree.leaves(z)))


def ravel(z: PyTree) -> jax.Array:
    """The state as a matrix [B, N] in the working dtype."""
    dtype = working_dtype(z)
    leaves = [
        x.astype(dtype).reshape(x.shape[0], math.prod(x.shape[1:])) for x in jax.tree.leaves(z)
    ]
    return leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves, axis=1)


def unraveler(z: PyTree) -> Callable[[jax.Array], PyTree]:
    """The inverse of `ravel` for states shaped like z: every leaf gets its shape and dtype back."""
    leaves, treedef = jax.tree.flatten(z)
    shapes = [(x.shape, x.dtype) for x in leaves]
    ends = [0]
    for shape, _ in shapes:
        ends.append(ends[-1] + math.prod(shape[1:]))

    def unravel(matrix: jax.Array) -> PyTree:
        parts = [
            matrix[:, start:end].reshape(shape).astype(dtype)
            for start, end, (shape, dtype) in zip(ends, ends[1:], shapes, strict=False)
        ]
        return jax.tree.unflatten(treedef, parts)

    return unravel
