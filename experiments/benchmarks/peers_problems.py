"""The fixed-point problems of other libraries' tests, as `experiments.benchmarks.peers` has them.

The maps are theirs, written anew; so are the points where they start, the tolerances and the most
steps. What is a constant in a test is an argument here, so that there is a gradient to compare.
Random numbers are drawn anew.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from deq_fusion_jax.state import PyTree

NEWTON_STEPS = 20


@dataclass(frozen=True, eq=False)
class Problem:
    """z = f(z, *args) for one state, without a batch axis.

    Attributes:
      source: the library whose tests have it.
      z0: where they start; in float64, as the arguments.
      tol: what the tests ask for.
      max_steps: the most steps that they allow.
      types: what the tests compute in, and float32.
      history, ridge: of jaxopt's Anderson, its defaults where its tests give none.
    """

    name: str
    source: str
    f: Callable[..., PyTree]
    z0: PyTree
    args: tuple[PyTree, ...]
    tol: float
    max_steps: int
    types: tuple[str, ...] = ("float32",)
    history: int = 5
    ridge: float = 1e-5


# --- references ------------------------------------------------------------------------------


class Reference(NamedTuple):
    """The answer in float64, in numpy.

    Attributes:
      gradient: of `loss`, by args.
      condition: κ = ‖(I − J)⁻¹‖, by which an error in f(z) − z is one of z.
      allowed: the error κ tol (1 + ‖z‖) of a value whose residual is at the tolerance.
      allowed_gradient: what follows from that, and from such an error of the adjoint u,
        ‖∂g/∂z‖ κ tol (1 + ‖z‖) + ‖∂f/∂θ‖ κ tol (1 + ‖u‖) with g = uᵀ ∂f/∂θ.
    """

    z: PyTree
    gradient: PyTree
    condition: float
    allowed: float
    allowed_gradient: float


def loss(z: PyTree) -> Any:
    """Σ z + z², whose gradient does not vanish where z does."""
    return sum(jnp.sum(x + x**2) for x in jax.tree.leaves(z))


@cache
def reference(problem: Problem) -> Reference:
    """z*, and its gradient by the implicit function theorem, with dense matrices."""

    @jax.jit
    def found(args: PyTree) -> tuple[Any, ...]:
        f, whole = flat_map(problem)
        z, (theta, unravel) = root(problem, args), ravel_pytree(args)

        def system(z: jax.Array) -> jax.Array:
            return jnp.eye(z.size) - jax.jacfwd(f)(z, args)

        def adjoint(z: jax.Array) -> jax.Array:
            return jnp.linalg.solve(system(z).T, jax.grad(lambda z: loss(whole(z)))(z))

        def image(theta: jax.Array, z: jax.Array) -> jax.Array:
            return f(z, unravel(theta))

        def gradient(z: jax.Array) -> jax.Array:
            return jax.vjp(partial(image, z=z), theta)[1](adjoint(z))[0]

        norm = jnp.linalg.norm
        condition = norm(jnp.linalg.inv(system(z)), 2)
        allowed = condition * problem.tol * (1 + norm(z))
        of_adjoint = condition * problem.tol * (1 + norm(adjoint(z)))
        changes = norm(jax.jacfwd(gradient)(z)) * allowed
        changes += norm(jax.jacrev(image)(theta, z)) * of_adjoint
        return whole(z), unravel(gradient(z)), condition, allowed, changes

    with jax.enable_x64(True):
        return Reference(*jax.device_get(found(arrays(problem.args))))


def root(problem: Problem, args: PyTree) -> jax.Array:
    """The fixed point, flat, by Newton's method from zero, which leads to the one that is meant."""
    f, _ = flat_map(problem)
    z0 = jnp.zeros(ravel_pytree(problem.z0)[0].size)

    def newton(_: Any, z: jax.Array) -> jax.Array:
        return z + jnp.linalg.solve(jnp.eye(z.size) - jax.jacfwd(f)(z, args), f(z, args) - z)

    return jax.lax.fori_loop(0, NEWTON_STEPS, newton, z0)


def flat_map(problem: Problem) -> tuple[Callable[..., jax.Array], Callable[..., PyTree]]:
    """f on flat states, and what makes a flat state whole."""
    _, whole = ravel_pytree(arrays(problem.z0))
    return lambda z, args: ravel_pytree(problem.f(whole(z), *args))[0], whole


def arrays(tree: PyTree, dtype: Any = np.float64) -> PyTree:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


# --- jaxopt ----------------------------------------------------------------------------------


def scaled(z: jax.Array, factor: jax.Array) -> jax.Array:
    return factor * z


def line(z: jax.Array, slope: jax.Array, height: jax.Array) -> jax.Array:
    return slope * z + height


def powers(z: PyTree) -> PyTree:
    """Zero attracts; the first part has another fixed point near 1.11."""
    first, second = z
    return jnp.sin(first) * first**2, second**3


def powers_and_flip(z: PyTree) -> PyTree:
    """Plain iteration never ends: the last part changes its sign for ever."""
    first, second, third = z
    return (*powers((first, second)), -third)


def shifted_cosine(z: jax.Array, shift: jax.Array) -> jax.Array:
    """With a shift of π/2 the slope at the fixed point is −1, and plain iteration creeps."""
    return jnp.cos(z) + shift


def affine(z: jax.Array, A: jax.Array, b: jax.Array) -> jax.Array:
    return A @ z + b


def turned(z: jax.Array, angles: jax.Array, centre: jax.Array) -> jax.Array:
    """Pairs of numbers turned about their centres: plain iteration circles."""
    x, y = (z - centre).reshape(-1, 2).T
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return centre + jnp.stack([cos * x - sin * y, sin * x + cos * y], axis=1).ravel()


def symmetric(n: int) -> tuple[np.ndarray, np.ndarray]:
    """A random symmetric matrix of spectral radius just below a half, and a vector."""
    draw = np.random.default_rng(n)
    A = draw.uniform(-1, 1, (n, n))
    A = A + A.T
    return A / (2 * np.abs(np.linalg.eigvalsh(A)).max() + 1e-4), draw.uniform(size=n)


def of_jaxopt() -> list[Problem]:
    def problem(name: str, f: Any, z0: PyTree, args: Any, tol: float, steps: int, **mixing: Any):
        return Problem(name, "jaxopt", f, z0, args, tol, steps, **mixing)

    half, small = np.array(0.5), {"ridge": 1e-6}
    rates, slopes = np.array([0.9, 0.99, 0.999]), np.array([0.05, 0.2])
    two = (np.array([0.6, 0.0, -0.1]), np.array([[0.7], [0.5]]))
    three = (*two, np.array([[-1.0, 0.0, 2.0, -0.4]]) / 3)
    shift, beside = np.array([0.0, np.pi / 2]), np.array([0.3, np.pi / 4])
    turns = np.pi / np.array([2, 3, 4, 5, 6, 1.27, 1.73]), np.arange(1.0, 15.0)
    around = np.random.default_rng(0).uniform(size=14)
    decay = np.array([1, 0.4, -0.2])
    short, long = {"history": 4, **small}, {"history": 10, "ridge": 1e-7}
    return [
        problem("geometric decay", scaled, decay, (rates,), 1e-5, 10_000, **small),
        problem("halfway to 1", line, np.array(0.0), (half, half), 1e-4, 10_000, **small),
        problem("powers", powers, two, (), 1e-6, 100),
        problem("powers and a flip", powers_and_flip, three, (), 1e-6, 100_000, history=3, **small),
        problem("shifted cosine", shifted_cosine, beside, (shift,), 1e-6, 4000, **short),
        problem("flat landscape", scaled, np.array([1, -0.5]), (slopes,), 1e-6, 10_000, **small),
        problem("affine 10", affine, np.zeros(10), symmetric(10), 1e-6, 100, **small),
        problem("affine 200", affine, np.zeros(200), symmetric(200), 1e-6, 100, **small),
        problem("rotations", turned, around, turns, 1e-4, 400, **long),
    ]


# --- optimistix ------------------------------------------------------------------------------


def cosine(z: PyTree, rate: jax.Array) -> PyTree:
    return jax.tree.map(lambda x: jnp.cos(rate * x), z)


def exponential(z: PyTree, rate: jax.Array) -> PyTree:
    return jax.tree.map(lambda x: jnp.exp(-rate * x), z)


def perceptron(z: PyTree, A: jax.Array, a: jax.Array, B: jax.Array, b: jax.Array) -> PyTree:
    flat, whole = ravel_pytree(z)
    return whole(0.1 * (B @ jax.nn.softplus(A @ flat + a) + b))


def trapezoid(z: jax.Array, factor: jax.Array) -> jax.Array:
    """A step of Crank and Nicolson's rule for y' = (1 − y) y, from x² on a grid.

    The test means to have (1 − y) Δy, but its Laplacian returns what it is given.
    """
    start = jnp.linspace(-1, 1, 100, dtype=z.dtype) ** 2
    return factor * (start + ((1 - z) * z + (1 - start) * start) / 2)


def midpoint(outer: float, slope: Callable[..., Any], inner: float, z: PyTree, *args: Any) -> Any:
    """The implicit midpoint rule for y' = slope(y) from zero, in one of three unknowns."""
    flat, whole = ravel_pytree(z)
    return whole(outer * slope(inner * flat, *args))


def linear(y: jax.Array, A: jax.Array) -> jax.Array:
    return A @ y


def robertson(y: jax.Array, slow: jax.Array, fast: jax.Array, middle: jax.Array) -> jax.Array:
    """Robertson's stiff chemical reaction."""
    first, second = slow * y[0] - middle * y[1] * y[2], fast * y[1] ** 2
    return jnp.stack([-first, first - second, second])


def of_optimistix() -> list[Problem]:
    def problem(name: str, f: Callable[..., PyTree], z0: PyTree, *args: np.ndarray) -> Problem:
        return Problem(name, "optimistix", f, z0, args, 1e-6, 10_000, ("float32", "float64"))

    def layer(rows: int, columns: int) -> list[np.ndarray]:
        return [draw.uniform(-1, 1, shape) / columns**0.5 for shape in ((rows, columns), (rows,))]

    draw = np.random.default_rng(1)
    one, halves = np.array(1.0), ({"a": np.full((3, 2, 4), 0.5)}, np.full(4, 0.5))
    matrix, ones = draw.normal(size=(28, 28)), (np.ones(2), {"b": np.array(1.0)})
    rates = np.array(0.04), np.array(3e7), np.array(1e4)
    return [
        problem("cosine", cosine, halves, one),
        problem("exponential", exponential, halves, one),
        problem("perceptron", perceptron, halves, *layer(8, 28), *layer(28, 8)),
        problem("trapezoid", trapezoid, np.ones(100), one),
        *(
            problem(f"midpoint {name}", partial(midpoint, outer, linear, inner), halves, matrix)
            for name, outer, inner in unknowns(1 / 16)
        ),
        *(
            problem(
                f"Robertson {unknown}", partial(midpoint, outer, robertson, inner), ones, *rates
            )
            for unknown, outer, inner in unknowns(1e-8)
        ),
    ]


def unknowns(step: float) -> list[tuple[str, float, float]]:
    """What a midpoint rule may be solved for, and the factors of `midpoint`."""
    return [("value", step, 0.5), ("slope", 1.0, step), ("increment", step, 1.0)]


# --- banax -----------------------------------------------------------------------------------


def lines(z: PyTree, slopes: PyTree, heights: PyTree) -> PyTree:
    return jax.tree.map(line, z, slopes, heights)


def saturated(z: jax.Array, weight: jax.Array, height: jax.Array) -> jax.Array:
    return jnp.tanh(weight * z + height)


def of_banax() -> list[Problem]:
    def problem(name: str, f: Any, z0: PyTree, *args: PyTree, tol: float = 1e-6, steps: int = 200):
        return Problem(name, "banax", f, z0, args, tol, steps)

    def numbers(*values: float) -> list[np.ndarray]:
        return [np.array(value) for value in values]

    def named(a: float, b: float) -> dict[str, np.ndarray]:
        return {"a": np.array(a), "b": np.array(b)}

    zero, one = numbers(0, 1)
    exchange = 0.25 * np.eye(2)[::-1]
    return [
        problem("line", line, zero, *numbers(0.5, 1)),
        problem("steep line", line, zero, *numbers(0.9, 1), tol=1e-4, steps=500),
        problem("affine 2", affine, np.zeros(2), exchange, np.array([1.0, 2.0])),
        problem("two lines", lines, named(0, 0), named(0.5, 0.25), named(1, 3)),
        problem("tanh 1", saturated, zero, *numbers(1, 0.5), steps=100),
        # There at 1e-7, which is less than float32 resolves.
        problem("tanh 0.7", saturated, zero, *numbers(0.7, 0.3)),
        problem("tenfold", scaled, one, *numbers(10)),
    ]


PROBLEMS = (*of_jaxopt(), *of_optimistix(), *of_banax())
