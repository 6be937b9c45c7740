"""The gradient rules against closed forms in numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax import (
    Adjoint,
    Anderson,
    Implicit,
    Phantom,
    Picard,
    Unrolled,
    deq_fixed_point,
)
from deq_fusion_jax.gradients import LINEAR_RIDGE

N = 4
RNG = np.random.default_rng(0)
A = RNG.normal(size=(N, N))
A *= 0.7 / np.abs(np.linalg.eigvals(A)).max()
B, Z0, C = RNG.normal(size=(3, 2, N))  # offsets, start and cotangent of two samples
SOLVER = Picard(tol=1e-13, max_steps=400)


def linear(z, A, b):
    return z @ A.T + b


def gradients(rule, solver=SOLVER):
    """∂⟨C, z*⟩/∂(A, b) for z* = A z* + b."""

    def loss(A, b):
        z, _ = deq_fixed_point(linear, jnp.asarray(Z0), A, b, solver=solver, gradient=rule)
        return jnp.sum(C * z)

    return jax.jit(jax.grad(loss, (0, 1)))(A, B)


def series(start, steps, damping=1.0):
    """(∂A, ∂b) through z ← (1 − λ) z + λ (A z + b) from `start`, by hand."""
    states = [start]
    for _ in range(steps - 1):
        states.append((1 - damping) * states[-1] + damping * linear(states[-1], A, B))
    to_A, to_b, u = np.zeros_like(A), np.zeros_like(B), C
    for z in reversed(states):
        to_A += damping * u.T @ z
        to_b += damping * u
        u = (1 - damping) * u + damping * u @ A
    return to_A, to_b


def assert_close(got, want, rtol):
    for x, y in zip(got, want, strict=True):
        assert np.linalg.norm(x - y) <= rtol * np.linalg.norm(y)


def test_implicit_is_the_adjoint_equation(x64):
    inverse = np.linalg.inv(np.eye(N) - A)
    u, z = C @ inverse, B @ inverse.T
    assert_close(gradients(Implicit()), (u.T @ z, u), 1e-11)


def test_implicit_is_what_unrolling_tends_to(x64):
    exact = gradients(Implicit())
    assert_close(gradients(Unrolled(200)), exact, 1e-10)
    short = gradients(Unrolled(5))
    assert np.linalg.norm(short[1] - exact[1]) > 0.01 * np.linalg.norm(exact[1])


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_unrolled_is_backpropagation_from_z0(steps, x64):
    assert_close(gradients(Unrolled(steps)), series(Z0, steps), 1e-12)


@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (5, 1.0), (3, 0.4)])
def test_phantom_is_the_truncated_series_at_the_solution(steps, damping, x64):
    z = B @ np.linalg.inv(np.eye(N) - A).T
    assert_close(gradients(Phantom(steps, damping)), series(z, steps, damping), 1e-11)
    # The gradient to b in closed form: λ Σ_k (λ Aᵀ + (1 − λ) I)^k C.
    M = damping * A + (1 - damping) * np.eye(N)
    closed = sum(damping * C @ np.linalg.matrix_power(M, k) for k in range(steps))
    assert_close(gradients(Phantom(steps, damping))[1:], (closed,), 1e-12)


def test_the_value_does_not_depend_on_the_rule(x64):
    def solve(rule):
        return deq_fixed_point(linear, jnp.asarray(Z0), A, B, solver=SOLVER, gradient=rule)[0]

    solve = jax.jit(solve, static_argnums=0)
    for rule in (Phantom(2), Unrolled(1)):
        np.testing.assert_array_equal(solve(rule), solve(Implicit()))


@pytest.mark.filterwarnings("ignore::deq_fusion_jax.ConvergenceWarning")
def test_implicit_takes_its_own_solver(x64):
    one = gradients(Implicit(Picard(tol=1e-13, max_steps=2), on_failure="keep"))
    jax.effects_barrier()
    # The second of two evaluations is at u = C + Aᵀ C.
    z = B @ np.linalg.inv(np.eye(N) - A).T
    u = C + C @ A
    assert_close(one, (u.T @ z, u), 1e-12)
    other = gradients(Implicit(solver=Anderson(tol=1e-12, max_steps=100, history=3)))
    assert_close(other, gradients(Implicit()), 1e-10)


def truncated(steps, damping=1.0):
    """∂z/∂b of `steps` damped iterations: S = λ Σ_k (λ A + (1 − λ) I)^k."""
    M = damping * A + (1 - damping) * np.eye(N)
    return sum(damping * np.linalg.matrix_power(M, k) for k in range(steps))


@pytest.mark.parametrize(
    ("rule", "S"),
    [
        (Implicit(), np.linalg.inv(np.eye(N) - A)),
        (Phantom(3, 0.7), truncated(3, 0.7)),
        (Unrolled(6), truncated(6)),
    ],
)
def test_every_rule_is_differentiable(rule, S, x64):
    """The Hessian of Σ z*² in b is 2 SᵀS, with S what the rule takes for ∂z*/∂b."""

    def loss(b):
        z, _ = deq_fixed_point(linear, jnp.zeros((1, N)), A, b[None], solver=SOLVER, gradient=rule)
        return jnp.sum(z**2)

    hessian = jax.jit(jax.jacrev(jax.grad(loss)))(B[0])
    np.testing.assert_allclose(hessian, 2 * S.T @ S, rtol=1e-10)


def test_rules_are_static_values():
    for rule, same, other in [
        (Implicit(), Implicit(), Implicit(solver=Picard())),
        (Phantom(5), Phantom(5, 1.0), Phantom(5, 0.5)),
        (Unrolled(30), Unrolled(), Unrolled(3)),
    ]:
        assert rule == same and hash(rule) == hash(same) and rule != other
        with pytest.raises(dataclasses.FrozenInstanceError):
            rule.steps = 3


def test_wrong_options():
    for rule in (Phantom, Unrolled):
        with pytest.raises(ValueError, match=rf"{rule.__name__}\(steps=0\)"):
            rule(steps=0)
        with pytest.raises(TypeError, match="depth"):
            rule(depth=3)
    for damping in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"Phantom\(damping="):
            Phantom(damping=damping)


# --- the adjoint, seen from outside ------------------------------------------------------------


def watched(adjoint, b=B, c=C, solver=SOLVER, rule=None):
    """(∂A, the adjoint solve) for the cotangent c."""

    def loss(A, adjoint):
        start, rule_ = jnp.asarray(Z0), rule or Implicit()
        z, _ = deq_fixed_point(linear, start, A, b, solver=solver, gradient=rule_, adjoint0=adjoint)
        return jnp.sum(c * z)

    return jax.jit(jax.grad(loss, (0, 1)))(A, adjoint)


def test_the_gradient_of_an_adjoint_is_the_adjoint_solution(x64):
    to_A, adjoint = watched(Adjoint.zeros(jnp.asarray(Z0)))
    np.testing.assert_array_equal(to_A, gradients(Implicit())[0])
    unit = C / np.abs(C).max(axis=1, keepdims=True)
    np.testing.assert_allclose(adjoint.u, unit @ np.linalg.inv(np.eye(N) - A), rtol=1e-11)
    # The same solve, done in the open.
    stats = deq_fixed_point(lambda u: u @ A + unit, jnp.asarray(unit), solver=SOLVER)[1]
    np.testing.assert_array_equal(adjoint.steps, stats.steps)
    np.testing.assert_allclose(adjoint.residual, stats.residual, rtol=1e-2)
    assert adjoint.failed.tolist() == [0, 0]


def test_a_warm_adjoint_takes_one_product_and_changes_nothing(x64):
    cold, adjoint = watched(Adjoint.zeros(jnp.asarray(Z0)))
    warm, again = watched(adjoint)
    assert again.steps.tolist() == [1, 1] and (adjoint.steps > 20).all()
    np.testing.assert_allclose(warm, cold, rtol=1e-11)
    # A far guess costs steps and nothing else.
    far = dataclasses.replace(adjoint, u=-3 * adjoint.u)
    np.testing.assert_allclose(watched(far)[0], cold, rtol=1e-10)


def test_a_backward_solve_that_fails_is_seen(x64):
    short = Implicit(Picard(tol=1e-13, max_steps=3))
    _, adjoint = watched(Adjoint.zeros(jnp.asarray(Z0)), rule=short)
    assert adjoint.failed.tolist() == [1, 1] and adjoint.steps.tolist() == [3, 3]
    assert (adjoint.residual > 1e-3).all()


def test_no_cotangent_means_no_adjoint_whatever_the_guess(x64):
    """0 = Jᵀ0 + 0 has no relative residual away from 0, so a guess would never come to rest."""
    _, guess = watched(Adjoint.zeros(jnp.asarray(Z0)))
    c = C * np.array([[0], [1]])
    to_A, adjoint = watched(guess, c=c)
    assert adjoint.failed.tolist() == [0, 0] and not adjoint.u[0].any()
    inverse = np.linalg.inv(np.eye(N) - A)
    np.testing.assert_allclose(to_A, (c @ inverse).T @ (B @ inverse.T), rtol=1e-10)


def test_the_statistics_of_two_solves_add_up(x64):
    def loss(b, adjoint):
        z, _ = deq_fixed_point(linear, Z0, A, b, solver=SOLVER, adjoint0=adjoint)
        z, _ = deq_fixed_point(linear, Z0, A, z, solver=SOLVER, adjoint0=adjoint)
        return jnp.sum(C * z)

    first = watched(Adjoint.zeros(jnp.asarray(Z0)))[1]
    twice = jax.grad(loss, 1)(B, Adjoint.zeros(jnp.asarray(Z0)))
    assert (twice.steps > 1.5 * first.steps).all() and twice.failed.tolist() == [0, 0]


def test_a_gradient_that_used_an_adjoint_has_a_gradient(x64):
    def slope(b, adjoint):
        def loss(b):
            z, _ = deq_fixed_point(curved, Z0, b, solver=SOLVER, adjoint0=adjoint)
            return jnp.sum(C * z)

        return jnp.sum(jnp.sin(jax.grad(loss)(b)))

    def curved(z, b):
        return jnp.tanh(z @ A.T + b)

    b, none = jnp.asarray(B), Adjoint.zeros(jnp.asarray(Z0))
    got = jax.grad(slope)(b, none)
    step = 1e-5 * jnp.asarray(C)
    change = (slope(b + step, none) - slope(b - step, none)) / 2e-5
    np.testing.assert_allclose(jnp.sum(got * C), change, rtol=1e-7)


@pytest.mark.parametrize("rule", [Phantom(), Unrolled()])
def test_rules_without_an_adjoint_refuse_one(rule, x64):
    with pytest.raises(ValueError, match=r"solves no adjoint equation; adjoint0 is for Implicit"):
        watched(Adjoint.zeros(jnp.asarray(Z0)), rule=rule)


def test_an_adjoint_of_another_state_is_refused(x64):
    other = Adjoint.zeros(jnp.zeros((2, N + 1)))
    with pytest.raises(ValueError, match=r"adjoint0.u is float64\[2, 5\], but z0 is .*\[2, 4\]"):
        watched(other)


def test_backward_ridge_is_the_linear_one():
    """Mixing a linear equation wants little ridge; a solver of one's own stays as it is."""
    matrix = jnp.asarray(A, jnp.float32)

    def steps(rule, ridge=1e-2):
        solver = Anderson(tol=1e-5, max_steps=100, ridge=ridge)

        def loss(b, adjoint):
            z, _ = deq_fixed_point(
                linear, jnp.zeros((2, N)), matrix, b, solver=solver, gradient=rule, adjoint0=adjoint
            )
            return jnp.sum(jnp.float32(C) * z)

        return jax.grad(loss, 1)(jnp.float32(B), Adjoint.zeros(jnp.zeros((2, N)))).steps

    small = Anderson(tol=1e-5, max_steps=100, ridge=LINEAR_RIDGE)
    np.testing.assert_array_equal(steps(Implicit()), steps(Implicit(small)))
    large = Anderson(tol=1e-5, max_steps=100, ridge=0.3)
    assert (steps(Implicit(large)) > steps(Implicit())).all()
