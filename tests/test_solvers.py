"""The solvers against textbook implementations in numpy, and how they fail."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import jaxopt
import numpy as np
import pytest

from deq_fusion_jax import Anderson, Broyden, Picard, Status, deq_fixed_point
from deq_fusion_jax.mixing import mixing_weights, solve_positive
from deq_fusion_jax.solvers import as_solver

SOLVERS = [Picard, Anderson, Broyden]


def solve(f, z0, *args, solver):
    return jax.jit(lambda z0, *args: deq_fixed_point(f, z0, *args, solver=solver))(z0, *args)


def iterates(f, z0, solver):
    """Every z at which the solver evaluated f, in order."""
    seen = []

    def recorded(z):
        jax.debug.callback(lambda z: seen.append(np.array(z)), z, ordered=True)
        return f(z)

    out = solve(recorded, z0, solver=solver)
    jax.effects_barrier()
    return seen, *out


def linear_map(n, radius, seed=0, batch=3):
    """z → A z + b per sample, ‖A‖ = radius, and its fixed points."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(batch, n, n))
    A *= radius / np.linalg.norm(A, 2, axis=(1, 2))[:, None, None]
    b = rng.normal(size=(batch, n))
    fixed = np.linalg.solve(np.eye(n) - A, b[:, :, None])[:, :, 0]
    return (lambda z: jnp.einsum("bij,bj->bi", A, z) + b), A, b, fixed


# --- all of them -------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_linear_map_against_its_closed_form(solver, x64):
    f, _, _, fixed = linear_map(n=5, radius=0.8)
    z, stats = solve(f, jnp.zeros((3, 5)), solver=solver(tol=1e-12, max_steps=400))
    assert stats.converged.all()
    np.testing.assert_allclose(z, fixed, rtol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_are_evaluations(solver):
    """Each of them, and one more of what is returned when max_steps ends the solve."""
    for slope in (0.5, 0.99):
        options = {"tol": 1e-3, "max_steps": 15}
        f = partial(lambda z, a: a * jnp.sin(z) + jnp.arange(1.0, 5.0), a=slope)
        seen, _, stats = iterates(f, jnp.zeros((1, 4)), solver(**options))
        assert len(seen) == stats.steps[0] + (not stats.converged[0])
        assert stats.steps[0] == 15 or stats.converged[0]


def test_steps_of_each_sample_by_a_counter_in_the_state():
    """Picard copies f(z): a leaf that grows by one per evaluation, too small for the residual."""

    def f(z, slope):
        return {"z": slope * z["z"] + 1, "count": z["count"] + 1e-6}

    slope = jnp.array([[0.1], [0.5], [0.8], [0.99]])
    z0 = {"z": jnp.zeros((4, 1)), "count": jnp.zeros((4, 1))}
    z, stats = solve(f, z0, slope, solver=Picard(tol=1e-3, max_steps=40))
    # The state returned is the one at which the last evaluation was made.
    np.testing.assert_allclose(1e6 * z["count"][:, 0], stats.steps - 1, rtol=1e-3)
    assert sorted(set(stats.steps.tolist())) == stats.steps.tolist()
    assert stats.steps[-1] == 40


@pytest.mark.parametrize("solver", SOLVERS)
def test_trace_records_every_evaluation(solver):
    f, *_ = linear_map(n=6, radius=0.7)
    z, stats = solve(f, jnp.zeros((3, 6)), solver=solver(tol=1e-4, max_steps=60, trace=True))
    assert stats.trace.shape == (60, 3)
    for b, steps in enumerate(stats.steps):
        assert np.isfinite(stats.trace[:steps, b]).all()
        assert np.isnan(stats.trace[steps:, b]).all()
        assert stats.trace[steps - 1, b] == stats.residual[b] <= 1e-4
        assert (stats.trace[: steps - 1, b] > 1e-4).all()
    # At z0 = 0 the residual is 1, as f(0) − 0 is f(0).
    np.testing.assert_allclose(stats.trace[0], 1, rtol=1e-6)
    assert jnp.isfinite(z).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_damping_shortens_the_first_step(solver):
    f, _, b, _ = linear_map(n=4, radius=0.5)
    solver = solver(tol=1e-5, max_steps=2, damping=0.3)
    seen, *_ = iterates(f, jnp.zeros((3, 4)), solver)
    np.testing.assert_allclose(seen[1], 0.3 * b, rtol=1e-6)


def test_damping_makes_a_divergent_iteration_converge():
    def f(z):
        return -2 * z + 3

    assert not solve(f, jnp.zeros((1, 1)), solver=Picard())[1].converged[0]
    z, stats = solve(f, jnp.zeros((1, 1)), solver=Picard(damping=0.5))
    assert stats.converged[0]
    np.testing.assert_allclose(z, 1, rtol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solution_is_recognised_at_once(solver):
    f, _, _, fixed = linear_map(n=4, radius=0.5)
    z, stats = solve(f, jnp.float32(fixed), solver=solver(tol=1e-4))
    assert stats.steps.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(z, np.float32(fixed))


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_is_a_solution_like_any_other(solver):
    z, stats = solve(lambda z: 0.5 * z, jnp.zeros((2, 3)), solver=solver())
    assert not z.any() and stats.converged.all()
    assert stats.steps.tolist() == [1, 1] and stats.residual.tolist() == [0, 0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_tolerance_is_relative_at_every_scale(solver):
    """A small state is no smaller problem, though squares of 1e-25 underflow in float32."""
    _, A, b, fixed = linear_map(n=4, radius=0.5)
    scales = np.array([[1e-25], [1e-6], [1e6]], np.float32)
    A, b = jnp.float32(A), jnp.float32(b) * scales

    def f(z):
        return jnp.einsum("bij,bj->bi", A, z) + b

    z, stats = solve(f, jnp.zeros((3, 4)), solver=solver(tol=1e-4, atol=0.0))
    assert stats.converged.all()
    np.testing.assert_allclose(z / scales, fixed, atol=1e-3)
    assert (stats.steps > 3).all()
    # The default atol keeps that for scales of 1e-6 and more; below 1e-9 a state counts as zero.
    z, default = solve(f, jnp.zeros((3, 4)), solver=solver(tol=1e-4))
    np.testing.assert_allclose((z / scales)[1:], fixed[1:], atol=1e-3)
    np.testing.assert_array_equal(default.steps[1:], stats.steps[1:])
    assert default.converged[0] and default.steps[0] == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_options(solver):
    assert solver() == solver(tol=1e-4, max_steps=50, damping=1.0, trace=False)
    assert hash(solver(tol=1e-3)) == hash(solver(tol=1e-3)) and solver(tol=1e-3) != solver()
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver().tol = 1.0
    for option, value in [
        ("tol", 0),
        ("tol", -1e-3),
        ("tol", float("nan")),
        ("max_steps", 0),
        ("damping", 0),
        ("damping", 1.5),
    ]:
        with pytest.raises(ValueError, match=rf"{solver.__name__}\({option}={value}"):
            solver(**{option: value})
    with pytest.raises(TypeError, match="max_iter"):
        solver(max_iter=10)


def test_options_of_their_own():
    with pytest.raises(ValueError, match=r"Anderson\(history=1\)"):
        Anderson(history=1)
    for ridge in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"Anderson\(ridge="):
            Anderson(ridge=ridge)
    with pytest.raises(ValueError, match=r"Broyden\(history=0\)"):
        Broyden(history=0)
    with pytest.raises(TypeError):
        Picard(history=3)


# --- Anderson ----------------------------------------------------------------------------------


def ridge_least_squares(changes, r, ridge):
    """argmin ‖r − Σ γ_j Δ_j‖² + λ Σ γ_j² ‖Δ_j‖², by least squares on stacked rows."""
    weights = np.sqrt(ridge) * np.diag(np.linalg.norm(changes, axis=1))
    rows = np.concatenate([changes.T, weights])
    return np.linalg.lstsq(rows, np.concatenate([r, np.zeros(len(changes))]))[0]


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-2])
def test_mixing_weights(ridge, x64):
    rng = np.random.default_rng(0)
    m, batch, n = 5, 4, 9
    changes = rng.normal(size=(m, batch, n)) * 10.0 ** rng.integers(-6, 3, size=(m, batch, 1))
    r = rng.normal(size=(batch, n))
    valid = np.ones((m, batch), bool)
    valid[3:, 1], valid[[0, 2], 2], valid[1:, 3] = False, False, False
    changes[2, 0] = 0  # a change of nothing has no weight
    changes[~valid] = np.nan  # what is not valid must not be read
    gram = jnp.einsum("ibn,jbn->ijb", changes, changes)
    projection = jnp.einsum("ibn,bn->ib", changes, r)
    gamma = np.asarray(mixing_weights(gram, projection, jnp.asarray(valid), ridge))
    valid[2, 0] = False
    assert (gamma[~valid] == 0).all()
    for b in range(batch):
        want = ridge_least_squares(changes[valid[:, b], b], r[b], ridge)
        np.testing.assert_allclose(gamma[valid[:, b], b], want, rtol=1e-6, atol=1e-12)


def test_solve_positive(x64):
    rng = np.random.default_rng(0)
    for m in (1, 2, 5, 8):
        root = rng.normal(size=(3, m, m))
        a = root @ root.transpose(0, 2, 1) + 0.1 * np.eye(m)
        b = rng.normal(size=(3, m))
        want = np.linalg.solve(a, b[:, :, None])[:, :, 0]
        x = solve_positive(jnp.asarray(a.transpose(1, 2, 0)), jnp.asarray(b.T))
        np.testing.assert_allclose(x.T, want, rtol=1e-9)


def test_anderson_against_a_textbook_loop(x64):
    """Walker and Ni's algorithm, one sample at a time, on a nonlinear map."""
    rng = np.random.default_rng(0)
    W, b = 0.9 * rng.normal(size=(7, 7)) / np.sqrt(7), rng.normal(size=(2, 7))
    m, ridge, damping, count = 3, 1e-6, 0.8, 8

    def f(z):
        return jnp.tanh(z @ W) + b

    options = {"history": m, "ridge": ridge, "damping": damping}
    got, *_ = iterates(f, jnp.zeros((2, 7)), Anderson(tol=1e-14, max_steps=count, **options))
    for sample in range(2):
        z, zs, rs = np.zeros(7), [], []
        for k in range(count):
            np.testing.assert_allclose(got[k][sample], z, rtol=1e-7, atol=1e-9)
            zs.append(z)
            rs.append(np.tanh(z @ W) + b[sample] - z)
            z = z + damping * rs[-1]
            if k:
                dz, dr = np.diff(zs[-m:], axis=0), np.diff(rs[-m:], axis=0)
                z = z - ridge_least_squares(dr, rs[-1], ridge) @ (dz + damping * dr)


@pytest.mark.parametrize("n", [2, 4])
def test_anderson_is_exact_once_the_history_spans_the_space(n, x64):
    """On a linear map of dimension n, n + 1 residuals determine the solution."""
    f, *_ = linear_map(n=n, radius=0.95)
    solver = Anderson(tol=1e-9, max_steps=50, history=n + 1, ridge=1e-12)
    _, stats = solve(f, jnp.zeros((3, n)), solver=solver)
    assert stats.converged.all()
    assert stats.steps.max() <= n + 2
    _, plain = solve(f, jnp.zeros((3, n)), solver=Picard(tol=1e-9, max_steps=500))
    assert plain.steps.min() > 3 * (n + 2)


def test_anderson_survives_repeated_residuals():
    """Without a ridge the Gram matrix is singular: the plain step takes over."""

    def f(z):  # moves by the same vector until it is stopped
        return jnp.minimum(z + 0.25, 1.0)

    z, stats = solve(f, jnp.zeros((2, 3)), solver=Anderson(ridge=0.0))
    assert stats.converged.all() and jnp.isfinite(z).all()
    np.testing.assert_allclose(z, 1, rtol=1e-3)


def test_anderson_passes_a_minimum_of_the_residual():
    """f(z) − z has a minimum of 0.05 at z = 1, where mixing comes to rest; its root is beyond 3."""
    shift = np.poly1d([0.05]) + 0.2 * np.poly1d([1, -1]) ** 2 * np.poly1d([-1, 3])
    root = next(r.real for r in shift.roots if abs(r.imag) < 1e-12)

    def f(z):
        return z + 0.05 + 0.2 * (z - 1) ** 2 * (3 - z)

    z, stats = solve(f, jnp.linspace(-1, 4, 50)[:, None], solver=Anderson(max_steps=300))
    assert stats.converged.all()
    np.testing.assert_allclose(z, np.full((50, 1), root), rtol=1e-3)


def test_anderson_crosses_a_hump_of_the_residual():
    """From a minimum of 0.001 at z = 1 plain steps climb to 0.13 before they come down to z = 3."""

    def f(z):
        return z + 0.3 * (0.002 + (z - 1) ** 2) * (3 - z)

    z, stats = solve(f, jnp.zeros((1, 1)), solver=Anderson(max_steps=200, trace=True))
    assert stats.converged.all()
    np.testing.assert_allclose(z, 3, rtol=1e-3)
    trace = stats.trace[: stats.steps[0], 0]
    assert trace[:20].min() < 1.3e-3 and trace[20:].max() > 0.1  # it was there, and came over


# --- Broyden -----------------------------------------------------------------------------------


def test_broyden_against_a_dense_textbook_loop(x64):
    """Broyden's good method with a dense Jacobian estimate B: B += (Δg − B Δz) Δzᵀ / Δzᵀ Δz."""
    rng = np.random.default_rng(0)
    W, b = 0.8 * rng.normal(size=(5, 5)) / np.sqrt(5), rng.normal(size=(2, 5))
    damping, count = 0.9, 7

    def f(z):
        return jnp.tanh(z @ W) + b

    solver = Broyden(tol=1e-14, max_steps=count, damping=damping)
    got, *_ = iterates(f, jnp.zeros((2, 5)), solver)
    for sample in range(2):
        z, B = np.zeros(5), -np.eye(5)
        g = np.tanh(z @ W) + b[sample] - z
        for k in range(count):
            np.testing.assert_allclose(got[k][sample], z, rtol=1e-8, atol=1e-10)
            dz = -damping * np.linalg.solve(B, g)
            z = z + dz
            g, old = np.tanh(z @ W) + b[sample] - z, g
            B += np.outer(g - old - B @ dz, dz) / (dz @ dz)


def test_broyden_starts_afresh_when_its_memory_is_full(x64):
    f, _, _, fixed = linear_map(n=6, radius=0.9)
    z, stats = solve(f, jnp.zeros((3, 6)), solver=Broyden(tol=1e-10, max_steps=300, history=2))
    assert stats.converged.all() and (stats.steps > 6).all()
    np.testing.assert_allclose(z, fixed, rtol=1e-8)


# --- failure -----------------------------------------------------------------------------------


def test_divergence_is_reported():
    z, stats = solve(lambda z: 3 * z + 1, jnp.zeros((2, 2)), solver=Picard())
    assert not stats.converged.any() and jnp.isfinite(z).all()
    assert (stats.residual > 0.5).all() and (stats.steps > 20).all()


def test_overflow_is_reported():
    """At 3^k the norm overflows: the best finite iterate comes back."""
    z, stats = solve(lambda z: 3 * z + 1, jnp.zeros((1, 2)), solver=Picard(max_steps=300))
    assert not stats.converged.any() and jnp.isfinite(z).all()
    assert jnp.isfinite(stats.residual).all()


def test_a_cycle_is_reported():
    z, stats = solve(lambda z: 1 - z, jnp.zeros((1, 1)), solver=Picard())
    assert not stats.converged[0] and stats.steps[0] == 50
    assert z[0, 0] in (0, 1)
    np.testing.assert_allclose(stats.residual, 1)  # the better of 1 at z = 0 and ∞ at z = 1
    _, mixed = solve(lambda z: 1 - z, jnp.zeros((1, 1)), solver=Anderson())
    assert mixed.converged[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_nan_everywhere(solver):
    z0 = jnp.array([[1.0, 2.0]])
    z, stats = solve(lambda z: z * jnp.nan, z0, solver=solver())
    assert not stats.converged[0] and stats.residual[0] == jnp.inf
    np.testing.assert_array_equal(z, z0)
    assert stats.steps[0] == 1  # nothing else to try


@pytest.mark.parametrize("solver", SOLVERS)
def test_nan_behind_a_wall(solver):
    """Every way leads to z > 1, where f is NaN: the best iterate before it comes back."""
    z, stats = solve(
        lambda z: jnp.where(z > 1, jnp.nan, z + 0.3), jnp.zeros((1, 1)), solver=solver()
    )
    assert not stats.converged[0] and jnp.isfinite(z).all()
    # ‖f(z) − z‖ is the same everywhere: no iterate is better than the start.
    assert z[0, 0] == 0 and stats.status[0] == Status.DIVERGED
    np.testing.assert_allclose(stats.residual, 1, rtol=1e-5)


@pytest.mark.parametrize("solver", [Anderson, Broyden])
def test_a_proposal_into_nan_is_taken_back(solver):
    """An extrapolation that leaves the domain of f falls back to the plain step from the best."""

    def f(z):  # f(z) − z is concave, so every secant overshoots the fixed point at 1
        return jnp.where(z > 1, jnp.nan, z + 0.1 * (1 - z**2))

    seen, z, stats = iterates(f, jnp.zeros((1, 1)), solver(tol=1e-3, max_steps=300))
    assert any((s > 1).any() for s in seen)
    assert stats.converged[0] and 0.99 < z[0, 0] <= 1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("how", ["nan", "inf"])
def test_a_bad_sample_leaves_the_others_alone(solver, how):
    def f(z, a):
        return jnp.cos(a * z) + 0.1 * jnp.sin(z[:, ::-1])

    good = jnp.array([[0.3], [0.9], [0.6]])
    bad = good.at[1].set(float(how))
    run = jax.jit(lambda a: deq_fixed_point(f, jnp.ones((3, 4)), a, solver=solver(max_steps=40)))
    z, stats = run(bad)
    assert stats.converged.tolist() == [True, False, True]
    assert jnp.isfinite(z).all()
    want, want_stats = run(good)
    for b in (0, 2):
        np.testing.assert_array_equal(z[b], want[b])
        assert stats.steps[b] == want_stats.steps[b]
        assert stats.residual[b] == want_stats.residual[b]


# --- jaxopt's own solvers and strangers --------------------------------------------------------


@pytest.mark.parametrize(
    "theirs", [jaxopt.FixedPointIteration, jaxopt.AndersonAcceleration, jaxopt.Broyden]
)
def test_solvers_of_jaxopt(theirs):
    """Their configuration is kept, their function is ours; values, gradients and statistics."""
    _, A, b, fixed = linear_map(n=4, radius=0.5)
    A, b = jnp.float32(A), jnp.float32(b)
    solver = theirs(jnp.sin, maxiter=100, tol=1e-5)

    def f(z, b):
        return jnp.einsum("bij,bj->bi", A, z) + b

    def total(b):
        z, stats = deq_fixed_point(f, jnp.zeros((3, 4)), b, solver=solver)
        return z.sum(), (z, stats)

    (_, (z, stats)), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(b)
    np.testing.assert_allclose(z, fixed, rtol=1e-3, atol=1e-4)
    # ∂Σz/∂b = (I − A)⁻ᵀ 1
    want = np.linalg.solve(np.eye(4) - np.swapaxes(A, 1, 2), np.ones((3, 4, 1)))[:, :, 0]
    np.testing.assert_allclose(gradient, want, rtol=1e-3)
    image = f(z, b)
    residual = np.linalg.norm(image - z, axis=1) / np.linalg.norm(image, axis=1)
    np.testing.assert_allclose(stats.residual, residual, atol=1e-6)
    assert stats.steps.shape == (3,) and (stats.steps > 1).all()
    assert (stats.converged == (stats.residual <= 1e-5)).all()


def test_a_failed_solve_of_jaxopt_is_reported():
    solver = jaxopt.FixedPointIteration(jnp.sin, maxiter=100, tol=1e-5)
    slopes = jnp.array([[0.5], [-1e30]])
    z, stats = solve(lambda z, a: a * z + 1, jnp.zeros((2, 1)), slopes, solver=solver)
    assert not stats.converged[1]
    assert jnp.isfinite(z).all()


def test_what_is_no_solver():
    for stranger in ("anderson", None, jnp.cos, Anderson):
        with pytest.raises(TypeError, match="Picard, Anderson or Broyden"):
            deq_fixed_point(jnp.cos, jnp.zeros((1, 1)), solver=stranger)
    assert as_solver(Anderson()) == Anderson()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("step", [1.0, 0.1])
def test_no_leap_to_where_a_step_is_negligible(solver, step):
    """f(z) = z + c has no fixed point, and rounding is no secant."""
    _, stats = solve(lambda z: z + step, jnp.zeros((2, 3)), solver=solver(max_steps=200))
    assert not stats.converged.any()
