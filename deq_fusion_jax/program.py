"""A map, traced once, as a value that `jax.jit` can compare with another."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

from deq_fusion_jax.state import Map, PyTree, describe, kind, placed_like, varying


class Program:
    """The jaxpr of f(z, leaves), equal to another that does the same.

    So eager calls of `deq_fixed_point` with a new but equal f find what was compiled for the first.
    `leaves` are the arrays that f closes over, which are never remembered, and its arguments.
    """

    def __init__(self, closed: Any, treedef: Any):
        jaxpr, size = closed.jaxpr, treedef.num_leaves
        order = (*jaxpr.invars[:size], *jaxpr.constvars, *jaxpr.invars[size:])
        self.jaxpr = jaxpr.replace(constvars=(), invars=order)
        self.treedef = treedef
        self.axes = tuple(sorted(set(_collectives(jaxpr))))
        self.debug_nans = jax.debug_nans.value  # the solve differs; see `SolveStats.trace`

    def __call__(self, z: PyTree, leaves: list[Any]) -> PyTree:
        out = jax.core.eval_jaxpr(self.jaxpr, (), *jax.tree.leaves(z), *leaves)
        return jax.tree.unflatten(self.treedef, out)

    def __hash__(self) -> int:
        return hash(
            (self.treedef, self.debug_nans, tuple(str(e.primitive) for e in self.jaxpr.eqns))
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Program):
            return False
        if (self.treedef, self.debug_nans) != (other.treedef, other.debug_nans):
            return False
        return self.jaxpr is other.jaxpr or _same_jaxpr(self.jaxpr, other.jaxpr)


@dataclasses.dataclass(frozen=True)
class Bound:
    """A program with its integer leaves: f(z, theta), where theta are the others."""

    program: Program
    fixed: list[jax.Array | None]

    def __call__(self, z: PyTree, theta: list[jax.Array | None]) -> PyTree:
        pairs = zip(self.fixed, theta, strict=True)
        return self.program(z, [t if x is None else x for x, t in pairs])


def collective_axes(f: Any) -> tuple[str, ...]:
    """The named axes over which f communicates; a solve has to stop on all of them together."""
    return f.program.axes if isinstance(f, Bound) else ()


def trace(f: Map, z0: PyTree, arrays: list[jax.Array]) -> tuple[PyTree, Program, list[jax.Array]]:
    """z0, f as a program, and what it closes over.

    One trace of f serves every evaluation; a second one, on a mesh, if z0 is not placed as f(z0).

    Raises:
      ValueError: f(z0) is not like z0.
    """
    closed, out = jax.make_jaxpr(f, return_shape=True)(z0, arrays)
    if kind(out) != kind(z0):
        raise ValueError(
            f"f must map z to its like, but z0 is {describe(z0)} and f(z0) is {describe(out)}. "
            "The first axis of every array is the batch. If f returns (z, aux), give has_aux=True."
        )
    like = placed_like(varying(z0, closed.out_avals), closed.out_avals)
    if [*map(jax.typeof, jax.tree.leaves(like))] != [*map(jax.typeof, jax.tree.leaves(z0))]:
        return trace(f, like, arrays)
    return z0, Program(closed, jax.tree.structure(z0)), closed.consts


def _collectives(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name not in ("axis_index", "pvary", "pcast"):
            for key in ("axes", "axis_name"):
                names = eqn.params.get(key, ())
                names = names if isinstance(names, tuple | list) else (names,)
                yield from (name for name in names if isinstance(name, str))
        for value in jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from _collectives(getattr(value, "jaxpr", value))


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def _same_jaxpr(one: Any, two: Any) -> bool:
    """Whether two jaxprs compute the same, but for the names of their variables."""
    if len(one.eqns) != len(two.eqns):
        return False
    names: dict[Any, Any] = {}

    def define(first: Any, second: Any) -> bool:
        names.update(zip(first, second, strict=False))
        return len(first) == len(second) and all(
            a.aval == b.aval for a, b in zip(first, second, strict=True)
        )

    def same_atom(a: Any, b: Any) -> bool:
        if isinstance(a, core.Literal) and isinstance(b, core.Literal):
            return a.aval == b.aval and _same(a.val, b.val)
        return type(a) is type(b) and names.get(a) is b

    def same_atoms(first: Any, second: Any) -> bool:
        return len(first) == len(second) and all(map(same_atom, first, second))

    return (
        define((*one.constvars, *one.invars), (*two.constvars, *two.invars))
        and all(
            a.primitive is b.primitive
            and same_atoms(a.invars, b.invars)
            and _same(a.params, b.params)
            and define(a.outvars, b.outvars)
            for a, b in zip(one.eqns, two.eqns, strict=True)
        )
        and same_atoms(one.outvars, two.outvars)
    )


def _same(a: Any, b: Any) -> bool:
    """Equality of parameters of equations: nested containers, arrays and jaxprs; else ==."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, core.ClosedJaxpr):
        return _same(list(a.consts), list(b.consts)) and _same_jaxpr(a.jaxpr, b.jaxpr)
    if isinstance(a, core.Jaxpr):
        return _same_jaxpr(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, np.ndarray | np.generic | jax.Array):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if hasattr(a, "transforms"):
        return _rule(a) is _rule(b)
    return bool(a == b)


def _rule(wrapped: Any) -> Any:
    """The rule of a `jax.custom_jvp` function, which JAX wraps anew in every trace.

    Where it is not found the wrapper itself, which equals no other: f is compiled once more.
    """
    if hasattr(wrapped, "transforms"):
        if [transform.__name__ for transform, _ in wrapped.transforms] == ["_flatten_jvp"]:
            return wrapped.f
        inner = wrapped.f
    else:
        inner = wrapped
    for cell in getattr(inner, "__closure__", None) or ():
        value = cell.cell_contents
        if hasattr(value, "transforms") or hasattr(value, "__closure__"):
            rule = _rule(value)
            if rule is not value:
                return rule
    return wrapped
