"""Random maps: what says converged is converged, and has the right gradient.

They contract, creep, rotate, diverge, couple their rows, hold zeros and NaN, and have ties.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from deq_fusion_jax import Adjoint, Anderson, Broyden, Picard, deq_fixed_point

SOLVERS = {"Picard": Picard, "Anderson": Anderson, "Broyden": Broyden}
SHAPES = [(1, 3), (5, 4), (4, 1)]
TOLERANCE = {"float32": 1e-5, "float64": 1e-11}


def step(xp, z, p):
    """Saturating, linear and coupling parts of a map; numpy's and JAX's."""
    return p["bent"] * xp.tanh(z @ p["A"] + p["x"]) + z @ p["L"] + p["C"] @ z + p["shift"]


@lru_cache
def program(solver, shape, dtype):
    """(z, stats), and the gradient of ⟨g, z*⟩ in A, compiled once."""
    options = SOLVERS[solver](tol=TOLERANCE[dtype], max_steps=150)

    def objective(A, adjoint0, z0, p, g):
        f = lambda z, A: step(jnp, z, {**p, "A": A})  # noqa: E731
        z, stats = deq_fixed_point(f, z0, A, solver=options, adjoint0=adjoint0)
        return jnp.sum(jnp.where(stats.converged[:, None], g * z, 0)), (z, stats)

    def gradient(A, z0, p, g):
        return jax.grad(objective, (0, 1), has_aux=True)(A, Adjoint.zeros(z0), z0, p, g)

    return jax.jit(gradient)


@st.composite
def maps(draw):
    shape = draw(st.sampled_from(SHAPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    (batch, n), scale = shape, 10.0 ** draw(st.integers(-3, 3))
    radius = draw(st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0, 1.5, 10.0]))
    matrix = np.linalg.qr(rng.normal(size=(n, n)))[0]  # orthogonal: it rotates
    if draw(st.booleans()):
        matrix = rng.normal(size=(n, n)) / np.sqrt(n)
    linear, coupled = draw(st.booleans()), draw(st.sampled_from([0.0, 0.0, 0.3, 2.0]))
    zero = np.zeros((n, n))
    p = {
        "bent": scale * np.ones((1, 1)),
        "A": zero if linear else radius * matrix / scale,
        "L": radius * matrix if linear else zero,
        "C": coupled * rng.normal(size=(batch, batch)) / batch,
        "x": rng.normal(size=shape),
        "shift": scale * rng.normal(size=shape),
    }
    for name, row in (("x", 0), ("shift", batch - 1)):
        kind = draw(st.sampled_from(["as is", "as is", "zero", "nan", "inf", "ties"]))
        value = {"zero": 0.0, "nan": np.nan, "inf": np.inf, "ties": 1.0}.get(kind)
        if value is not None:
            p[name][row] = value
    z0 = draw(st.sampled_from([0.0, 1.0, 100.0])) * scale * rng.normal(size=shape)
    return shape, p, z0, rng.normal(size=shape)


def solved(z, p):
    """The fixed point near z by Newton's method in float64, and the condition of I − J."""
    size = z.size
    for _ in range(3):
        image = step(np, z, p)
        h = 1e-6 * max(np.abs(z).max(), 1e-6)
        shifts = h * np.eye(size).reshape(size, *z.shape)
        J = np.stack([(step(np, z + s, p) - step(np, z - s, p)).ravel() / (2 * h) for s in shifts])
        system = np.eye(size) - J.T
        if np.linalg.cond(system) > 1e6:
            return z, np.inf
        z = z + np.linalg.solve(system, (image - z).ravel()).reshape(z.shape)
    return z, np.linalg.cond(system)


def check_gradient(p, z, g, gradient):
    """Against a central difference of Newton's solutions along a random direction."""
    direction = np.random.default_rng(0).normal(size=p["A"].shape)
    h = 1e-5 * max(np.abs(p["A"]).max(), 1e-3)
    with np.errstate(all="ignore"):
        (plus, condition), (minus, _) = (
            solved(z, {**p, "A": p["A"] + s * h * direction}) for s in (1, -1)
        )
    if condition < 1e4:
        want = np.sum(g * (plus - minus)) / (2 * h)
        size = np.sum(np.abs(g * (plus - minus))) / (2 * h) + np.abs(z).max() / 1e3 + 1e-12
        rounding = 1e-15 * np.abs(z).max() * np.sum(np.abs(g)) / h  # of the difference
        got = np.sum(gradient * direction)
        assert abs(got - want) <= condition * (1e-5 * size + rounding), (got, want, condition, size)
        event("gradient compared")


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@given(case=maps())
def test_converged_is_the_truth(solver, dtype, case):
    shape, p, z0, g = case
    with jax.enable_x64(True):
        cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), (p["A"], z0, p, g))
        found = program(solver, shape, dtype)(*cast)
        (gradient, adjoint), (z, stats) = jax.device_get(found)
    p, z = jax.tree.map(lambda x: np.asarray(x, dtype).astype(np.float64), (p, z))
    with np.errstate(all="ignore"):
        image = step(np, z, p)
        size = np.linalg.norm(image, axis=1)
        residual = np.linalg.norm(image - z, axis=1)
        terms = size + sum(
            np.linalg.norm(x, axis=1)
            for x in (
                np.abs(z) @ np.abs(p["L"]),
                np.abs(p["C"]) @ np.abs(z),
                p["shift"],
                p["bent"] * np.tanh(z @ p["A"] + p["x"]),
            )
        )
    tol, eps = TOLERANCE[dtype], np.finfo(dtype).eps
    good = stats.converged
    assert (residual[good] <= tol * (size + 1e-9)[good] * (1 + 1e-3) + 8 * eps * terms[good]).all()
    assert (good == (stats.status == 0)).all() and np.isfinite(z).all()
    assert ((stats.steps >= 1) & (stats.steps <= 150)).all()
    event(f"converged: {'all' if good.all() else 'some' if good.any() else 'none'}")
    # Not where 1 is negligible, as at the end of z + 1.
    if good.all() and not adjoint.failed.any() and dtype == "float64" and np.abs(z).max() < 1e8:
        check_gradient(p, z, g, gradient)
