"""What a solve reports: plain arrays, and a failure that cannot be overlooked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from deq_fusion_jax import Anderson, Picard, SolveStats, deq_fixed_point
from deq_fusion_jax.stats import ConvergenceError, in_parts

SLOPES = jnp.array([[0.1], [3.0], [0.5], [2.0]])  # two of four samples diverge


def solve(slopes):
    """z → a z + 1 for every slope a."""
    z0 = jnp.zeros_like(slopes)
    return deq_fixed_point(lambda z, a: a * z + 1, z0, slopes, solver=Picard(max_steps=30))


def test_shapes_and_dtypes():
    stats = jax.jit(solve)(SLOPES)[1]
    assert (stats.steps.shape, stats.steps.dtype) == ((4,), jnp.int32)
    assert (stats.residual.shape, stats.residual.dtype) == ((4,), jnp.float32)
    assert (stats.converged.shape, stats.converged.dtype) == ((4,), bool)
    assert stats.trace is None
    assert stats.converged.tolist() == [True, False, True, False]
    assert stats.steps.tolist()[1::2] == [30, 30]


def test_they_pass_through_vmap_and_scan():
    want = jax.jit(solve)(SLOPES)[1]
    mapped = jax.vmap(lambda a: solve(a[None])[1])(SLOPES)
    _, scanned = jax.lax.scan(lambda carry, a: (carry, solve(a[None])[1]), None, SLOPES)
    for stats in (mapped, scanned):
        assert isinstance(stats, SolveStats)
        np.testing.assert_array_equal(stats.converged[:, 0], want.converged)
        np.testing.assert_array_equal(stats.steps[:, 0], want.steps)


def test_they_carry_no_gradient():
    assert not jax.grad(lambda a: solve(a)[1].residual.sum())(SLOPES).any()


def test_raise_if_failed_says_how_many_how_badly_and_what_to_try():
    stats = solve(SLOPES)[1]
    with pytest.raises(ConvergenceError) as error:
        stats.raise_if_failed()
    message = str(error.value)
    assert "2 of 4 samples" in message
    assert f"{float(stats.residual.max()):.2e}" in message
    for advice in ("2 moved away", "damping", "Anderson"):
        assert advice in message
    assert isinstance(error.value, RuntimeError)


def test_raise_if_failed_is_silent_when_all_converged():
    solve(SLOPES[::2])[1].raise_if_failed()


def test_raise_if_failed_sees_a_residual_without_a_finite_iterate():
    _, stats = deq_fixed_point(lambda z: z * jnp.nan, jnp.zeros((3, 1)))
    with pytest.raises(ConvergenceError, match=r"3 of 3 .*inf"):
        stats.raise_if_failed()


def test_under_jit_and_checkify_it_is_an_error_value():
    @jax.jit
    @checkify.checkify
    def checked(slopes):
        z, stats = solve(slopes)
        stats.raise_if_failed()
        return z

    error, _ = checked(SLOPES)
    with pytest.raises(checkify.JaxRuntimeError, match="2 of 4 samples did not converge"):
        error.throw()
    error, z = checked(jnp.array([[0.1], [0.2], [0.5], [0.75]]))
    error.throw()
    np.testing.assert_allclose(z.ravel(), [1 / 0.9, 1 / 0.8, 2, 4], rtol=1e-3)


def test_under_jit_it_does_not_pass_unnoticed_without_checkify():
    with pytest.raises(ValueError, match="checkify"):
        jax.jit(lambda a: solve(a)[1].raise_if_failed())(SLOPES)


def test_trace():
    """The residual of every evaluation, NaN after the last; against the closed form a^k."""

    @jax.jit
    def traced(slopes):
        solver = Picard(tol=1e-3, max_steps=20, trace=True)
        return deq_fixed_point(lambda z, a: a * z + 1, 0 * slopes, slopes, solver=solver)[1]

    slopes = np.array([[0.1], [0.5], [0.9]], np.float32)
    stats = traced(slopes)
    assert stats.trace.shape == (20, 3)
    for b, a in enumerate(slopes[:, 0]):
        steps = int(stats.steps[b])
        images = np.cumsum(a ** np.arange(20.0))  # f(z_k) = 1 + a + … + a^k
        residuals = a ** np.arange(20.0) / images
        np.testing.assert_allclose(stats.trace[:steps, b], residuals[:steps], rtol=1e-3)
        assert np.isnan(stats.trace[steps:, b]).all()
        assert stats.trace[steps - 1, b] == stats.residual[b]
        assert steps == (20 if residuals.min() > 1e-3 else 1 + np.argmax(residuals <= 1e-3))
    assert stats.converged.tolist() == [True, True, False]


def test_residual_belongs_to_the_returned_state():
    def f(z):
        return jnp.cos(z) * jnp.array([[1.0, 2.0], [0.5, 1.5]])

    z, stats = deq_fixed_point(f, jnp.zeros((2, 2)), solver=Anderson(tol=1e-3))
    residual = jnp.linalg.norm(f(z) - z, axis=1) / jnp.linalg.norm(f(z), axis=1)
    np.testing.assert_allclose(stats.residual, residual, rtol=1e-3, atol=1e-7)


def test_a_solve_in_two_parts():
    nan = np.nan
    first = SolveStats(
        steps=jnp.array([2, 3, 1]),
        residual=jnp.array([0.1, 0.2, 0.9]),
        converged=jnp.array([True, True, False]),
        trace=jnp.array([[5, 4, 0.9], [0.1, 3, nan], [nan, 0.2, nan]]),
    )
    second = SolveStats(
        steps=jnp.array([1, 3, 2]),
        residual=jnp.array([0.2, 0.4, 0.1]),
        converged=jnp.array([True, False, True]),
        trace=jnp.array([[0.2, 7, 6], [nan, 2, 0.1], [nan, 0.4, nan]]),
    )
    whole = in_parts(first, second)
    assert whole.steps.tolist() == [2, 3, 2]
    np.testing.assert_array_equal(whole.residual, np.float32([0.2, 0.4, 0.9]))
    assert whole.converged.tolist() == [True, False, False]
    np.testing.assert_array_equal(
        whole.trace.T, np.float32([[5, 0.1, nan], [7, 3, 0.4], [6, 0.1, nan]])
    )
    untraced = in_parts(first, SolveStats(second.steps, second.residual, second.converged))
    assert untraced.trace is None
