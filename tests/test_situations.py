"""What users met who tried `deq_fixed_point`: each was silently wrong, or ended in a traceback."""

import re
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_fusion_jax import (
    Adjoint,
    Anderson,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    DEQFusion,
    Implicit,
    Phantom,
    Picard,
    Status,
    Unrolled,
    deq_fixed_point,
)
from deq_fusion_jax.fixed_point import _compiled

SOLVERS = [Picard, Anderson, Broyden]
each_solver = pytest.mark.parametrize("solver", SOLVERS)


def in_slow(*values):
    """What takes long to compile, as further values of a parameter."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


one_now_and_the_others_in_slow = pytest.mark.parametrize(
    "solver", [Anderson, *in_slow(Picard, Broyden)]
)
RNG = np.random.default_rng(0)
W = jnp.asarray(0.2 * RNG.normal(size=(6, 6)), jnp.float32)
X = jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)
TIGHT = Anderson(tol=1e-5, max_steps=200)


def layer(z, W, x):
    return jnp.tanh(z @ W + x)


def loss(W, x, solver=TIGHT, **options):
    z, stats = deq_fixed_point(layer, jnp.zeros_like(x), W, x, solver=solver, **options)
    return jnp.sum(jnp.where(stats.converged[:, None], z, 0) ** 2)


def true_residual(f, z):
    """Of every row in float64, by one evaluation."""
    image = np.asarray(f(z), np.float64)
    step = np.linalg.norm(image - np.asarray(z, np.float64), axis=1)
    return step / np.linalg.norm(image, axis=1)


# --- converged is the truth ------------------------------------------------------------------


@each_solver
@pytest.mark.parametrize("scale", [0.05, 0.15, 0.5])
def test_rows_that_read_one_another(solver, scale):
    """A state without a batch axis, or the nodes of a graph: no row says converged that is not."""
    rng = np.random.default_rng(1)
    A = jnp.asarray(scale * rng.normal(size=(12, 12)), jnp.float32)
    B = jnp.asarray(0.4 * rng.normal(size=(3, 3)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(12, 3)), jnp.float32)
    f = lambda z: jnp.tanh(A @ z @ B + x)  # noqa: E731
    z, stats = deq_fixed_point(f, jnp.zeros((12, 3)), solver=solver(tol=1e-5, max_steps=200))
    residual = true_residual(f, z)
    np.testing.assert_allclose(stats.residual, residual, rtol=0.3, atol=1e-6)
    assert (residual[np.asarray(stats.converged)] < 1.2e-5).all()
    assert stats.converged.all() or scale > 0.1


def test_the_gradient_through_rows_that_read_one_another(x64):
    """Their cotangents have very different sizes, and some have none."""
    rng = np.random.default_rng(2)
    A = rng.normal(size=(6, 6)) / 8
    x = rng.normal(size=(6, 1))
    g = np.array([[1.0], [1e-8], [0], [1e8], [0], [1e-3]])

    def objective(A):
        f = lambda z: A @ z + x  # noqa: E731
        solver = Anderson(tol=1e-13, max_steps=500)
        z, stats = deq_fixed_point(f, jnp.zeros((6, 1)), solver=solver)
        return jnp.sum(g * z), stats.converged

    gradient, converged = jax.grad(objective, has_aux=True)(jnp.asarray(A))
    inverse = np.linalg.inv(np.eye(6) - A)
    assert converged.all()
    np.testing.assert_allclose(gradient, np.outer(inverse.T @ g, inverse @ x), rtol=1e-8)


def test_samples_that_read_nothing_are_not_changed_by_the_others():
    """A row at rest is measured again in every evaluation: the same answer, and no more steps."""
    alone = [deq_fixed_point(layer, jnp.zeros((1, 6)), W, X[b : b + 1])[1].steps for b in range(8)]
    together = deq_fixed_point(layer, jnp.zeros((8, 6)), W, X)[1].steps
    assert [int(steps[0]) for steps in alone] == together.tolist() and len(
        set(together.tolist())
    ) > 1


# --- zero, and the ends of solves ------------------------------------------------------------


@each_solver
def test_a_fixed_point_at_zero(solver):
    def solution(a):
        z, stats = deq_fixed_point(
            lambda z, a: a * z, jnp.ones((1, 1)), a, solver=solver(tol=1e-5, max_steps=60)
        )
        return z[0, 0], stats

    (z, stats), slope = jax.value_and_grad(solution, has_aux=True)(0.5)
    assert stats.converged[0] and abs(z) < 1e-12 and abs(slope) < 1e-11


@each_solver
def test_the_absolute_tolerance(solver):
    """‖f(z) − z‖ ≤ atol + tol ‖f(z)‖, as numpy's allclose."""
    for atol in (0.3, 1e-6):
        z, stats = deq_fixed_point(
            lambda z: 0.5 * z, jnp.ones((1, 4)), solver=solver(tol=1e-4, atol=atol)
        )
        assert stats.converged[0]
        step = jnp.linalg.norm(0.5 * z)
        assert step <= atol + 1e-4 * step
        if solver is Picard and atol == 0.3:  # steps of 1, 1/2, 1/4
            assert stats.steps[0] == 3
    with pytest.raises(ValueError, match="atol=-1"):
        solver(atol=-1)


def test_neither_the_start_nor_the_end_of_a_solve_that_fails():
    """Shrinking far too slowly, the last iterate is best; growing without end, the first."""
    z, stats = deq_fixed_point(lambda z: 0.9 * z, jnp.ones((1, 2)), solver=Picard(1e-5, 50))
    assert not stats.converged[0] and z[0, 0] == pytest.approx(0.9**49, rel=1e-4)
    for growing in (lambda z: 10 * z, lambda z: 1.5 * z + 1, lambda z: z + 0.3):
        z, stats = deq_fixed_point(growing, jnp.ones((1, 2)), solver=Picard(1e-5, 30))
        assert not stats.converged[0] and z[0, 0] == 1


def test_status_and_advice():
    x = jnp.array([[0.5], [0.999], [3.0], [jnp.nan]])
    _, stats = deq_fixed_point(lambda z: x * z + 1, jnp.zeros((4, 1)), solver=Picard(1e-5, 30))
    assert stats.status.tolist() == [*Status] and stats.converged.tolist() == [True] + 3 * [False]
    with pytest.raises(ConvergenceError) as error:
        stats.raise_if_failed()
    for words in (
        "3 of 4",
        "1 ran out of steps",
        "1 moved away",
        "1 met NaN",
        "Broyden",
        "history",
    ):
        assert words in str(error.value)


# --- defaults that need no expert ------------------------------------------------------------


def test_slow_modes_need_no_other_settings():
    """P15: against the closed form, in about as many evaluations as there are modes."""
    a, solver = jnp.array([[0.9], [0.99], [0.999]]), Anderson(tol=1e-6)
    for slopes, most in ((a, 6), (a.T, 12)):  # one mode a sample, then all of them in one
        f = lambda z, a: a * (z - 1) + 1  # noqa: E731
        z, stats = deq_fixed_point(f, jnp.zeros_like(slopes), slopes, solver=solver)
        assert stats.converged.all() and stats.steps.max() <= most
        np.testing.assert_allclose(z, 1, atol=1.5e-3)  # 1e-6 / (1 − .999)


def test_maps_near_the_edge_of_contraction():
    """Random tanh maps of 48 channels with a spectral radius of 0.95 at zero, tolerance 1e-5."""
    rng = np.random.default_rng(0)
    W = rng.normal(size=(64, 48, 48))
    W *= 0.95 / np.abs(np.linalg.eigvals(W)).max(axis=1)[:, None, None]
    x = jnp.float32(0.1 * rng.normal(size=(64, 48)))

    def steps(solver):
        f = lambda z, W, x: jnp.tanh(jnp.einsum("bij,bj->bi", W, z) + x)  # noqa: E731
        _, stats = deq_fixed_point(f, jnp.zeros_like(x), jnp.float32(W), x, solver=solver)
        assert stats.converged.all()
        return stats.steps

    mixed, plain = steps(Anderson(1e-5, 500)), steps(Picard(1e-5, 500))
    assert jnp.mean(mixed) < 0.6 * jnp.mean(plain) and mixed.max() < 0.6 * plain.max()


# --- gradients that say when they fail -------------------------------------------------------


def slow(a, **options):
    """z* = 100 at a = .99 in one step; the adjoint equation needs a thousand."""
    z0, solver = jnp.full((1, 1), 100.0), Picard(tol=1e-6, max_steps=50)
    return deq_fixed_point(lambda z, a: a * z + 1, z0, a, solver=solver, **options)[0][0, 0]


WARNED = [
    (jax.grad, "1 of 1"),
    (lambda f: jax.jit(jax.grad(f)), "1 of 1"),
    (lambda f: lambda a: jax.vmap(jax.grad(f))(jnp.array([0.1, a, a])), "2 of 3"),
    (lambda f: lambda a: jax.jvp(f, (a,), (1.0,)), "1 of 1"),
    (lambda f: jax.grad(jax.checkpoint(f)), "1 of 1"),
]


@pytest.mark.parametrize(("transformed", "count"), WARNED)
def test_a_backward_solve_that_failed_is_seen(transformed, count):
    with pytest.warns(ConvergenceWarning, match=f"{count} samples"):
        jax.block_until_ready(transformed(slow)(0.99))
        jax.effects_barrier()
    jax.block_until_ready(jax.grad(loss)(W, X))  # silent


def test_a_backward_solve_that_failed_is_seen_from_every_device():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    shards = jax.shard_map(
        lambda a: jax.vmap(jax.grad(slow))(a), mesh=mesh, in_specs=P("d"), out_specs=P("d")
    )
    with pytest.warns(ConvergenceWarning, match="1 of 1 samples"):
        jax.block_until_ready(shards(jnp.full(4, 0.99)))
        jax.effects_barrier()


def test_what_a_failed_sample_adds():
    assert np.isnan(jax.grad(partial(slow, gradient=Implicit(on_failure="nan")))(0.99))
    with pytest.warns(ConvergenceWarning, match="add nothing"):
        assert jax.grad(slow)(0.99) == 0
        jax.effects_barrier()
    with pytest.warns(ConvergenceWarning, match="as they are"):
        kept = jax.grad(partial(slow, gradient=Implicit(on_failure="keep")))(0.99)
        jax.effects_barrier()
    assert kept == pytest.approx(1e4 * (1 - 0.99**50), rel=1e-4)
    # With an Adjoint the caller is looking: no warning.
    adjoint0 = Adjoint.zeros(jnp.zeros((1, 1)))
    adjoint = jax.grad(lambda adjoint0: slow(0.99, adjoint0=adjoint0))(adjoint0)
    assert adjoint.failed.tolist() == [1] and adjoint.residual[0] > 1e-3
    with pytest.raises(ValueError, match="on_failure='ignore'"):
        Implicit(on_failure="ignore")


@each_solver
@pytest.mark.parametrize("rule", [Implicit(), Implicit(on_failure="keep"), Phantom(), Unrolled()])
def test_a_masked_sample_adds_exactly_nothing(solver, rule):
    def product(z, W, x):
        return jnp.tanh(z @ W + x * jnp.mean(x, axis=1, keepdims=True))

    def loss(W, x):
        z, stats = deq_fixed_point(
            product, jnp.zeros_like(x), W, x, solver=solver(1e-5, 200), gradient=rule
        )
        return jnp.sum(jnp.where(stats.converged[:, None], z, 0) ** 2)

    weights, inputs = jax.grad(loss, argnums=(0, 1))(W, X.at[3].set(jnp.nan))
    want, _ = jax.grad(loss, argnums=(0, 1))(W, X.at[3].set(0))
    np.testing.assert_allclose(weights, want, rtol=1e-5, atol=1e-6)
    assert jnp.isfinite(inputs[jnp.arange(8) != 3]).all()


@pytest.mark.parametrize("sizes", [(6, 6), *in_slow((12, 6), (1, 3))])
def test_a_masked_sample_where_other_axes_are_as_long_as_the_batch(sizes):
    batch, width = sizes
    W = 0.1 * jnp.eye(width) + 0.02
    x = jax.random.normal(jax.random.key(0), (batch, width))
    gradient = jax.grad(partial(loss, solver=Picard(1e-5, 200)))
    got = gradient(W, x.at[0].set(jnp.nan))
    want = gradient(W, x[1:]) if batch > 1 else jnp.zeros_like(W)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_an_unmasked_sample_that_fails_adds_exactly_nothing():
    """One is out of steps, one diverges, one is NaN: the gradient is that of the others."""
    x = X.at[0].set(jnp.nan)
    gain = jnp.ones((8, 1)).at[1].set(40.0).at[2].set(jnp.nan)

    def objective(W, x, gain):
        z, stats = deq_fixed_point(
            lambda z, W: gain * jnp.sin(z @ W) + x, jnp.zeros_like(x), W, solver=Anderson(1e-5, 40)
        )
        return jnp.sum(jnp.exp(z)), stats

    with pytest.warns(ConvergenceWarning, match="of 8 samples"):
        gradient, stats = jax.grad(objective, has_aux=True)(W, x, gain)
        jax.effects_barrier()
    good = np.asarray(stats.converged)
    assert good.sum() == 5
    want, _ = jax.grad(objective, has_aux=True)(W, x[good], gain[good])
    np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-5)


# --- every placement -------------------------------------------------------------------------


@one_now_and_the_others_in_slow
@pytest.mark.parametrize("kind", [AxisType.Explicit, *in_slow(AxisType.Auto)])
@pytest.mark.parametrize("ambient", [True, *in_slow(False)])
def test_meshes(solver, kind, ambient):
    want = jax.grad(loss)(W, X, solver(1e-5, 200))
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    w, x = jax.device_put((W, X), (NamedSharding(mesh, P()), NamedSharding(mesh, P("d"))))

    def got(transform):
        return transform(jax.grad(partial(loss, solver=solver(1e-5, 200))))(w, x)

    close = partial(np.testing.assert_allclose, desired=want, rtol=2e-4, atol=2e-4)
    if ambient:
        with jax.set_mesh(mesh):
            close(got(jax.jit))
            close(got(lambda f: f))
    else:
        close(got(jax.jit))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_start_that_is_not_sharded_as_f_is(kind):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
    x = jax.device_put(X, NamedSharding(mesh, P("d")))
    solve = jax.jit(lambda x: deq_fixed_point(layer, jnp.zeros(X.shape), W, x, solver=TIGHT)[0])
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(solve(x), solve(X), atol=1e-4)


@pytest.mark.parametrize("kind", [AxisType.Explicit, *in_slow(AxisType.Auto)])
@pytest.mark.parametrize("batch_axis", ["d", *in_slow(None)])
def test_a_fusion_on_a_mesh(kind, batch_axis):
    inputs = {"a": X, "b": X + 1}
    fusion = DEQFusion(features=8, solver=TIGHT)
    variables = fusion.init(jax.random.key(0), inputs)
    want = fusion.apply(variables, inputs)
    with jax.set_mesh(jax.make_mesh((4,), ("d",), axis_types=(kind,))):
        got = jax.jit(fusion.clone(batch_axis=batch_axis).apply)(
            variables, jax.device_put(inputs, P("d"))
        )
    np.testing.assert_allclose(got.fused, want.fused, atol=1e-4)
    np.testing.assert_array_equal(got.stats.steps, want.stats.steps)


@pytest.mark.parametrize("check", [True, False])
def test_shard_map_where_the_start_is_alike_on_all_devices(check):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    solve = jax.shard_map(
        lambda a: deq_fixed_point(lambda z, a: a * z + 1.0, jnp.zeros((1, 1)), a)[0],
        mesh=mesh,
        in_specs=P("d"),
        out_specs=P("d"),
        check_vma=check,
    )
    a = jnp.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(solve(a)[:, 0], 1 / (1 - a), rtol=1e-3)


@pytest.mark.slow
@one_now_and_the_others_in_slow
@pytest.mark.parametrize("check", [True, False])
def test_a_collective_in_f_stops_all_devices_together(solver, check):
    """The devices need different numbers of steps, and each reads the others' states."""
    a, x = jnp.array([[0.1], [0.5], [0.8], [0.2]]), jnp.linspace(0, 1, 4)[:, None]

    def solve(a, x):
        f = lambda z, a: jnp.tanh(a * z + x) + 0.1 * jax.lax.pmean(z, "d")  # noqa: E731
        z, stats = deq_fixed_point(f, jnp.zeros_like(x), a, solver=solver(1e-5, 200))
        return z, stats.converged

    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))
    shards = jax.jit(
        jax.shard_map(
            solve, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P("d"), check_vma=check
        )
    )
    z, converged = shards(a, x)
    f = lambda z, a: jnp.tanh(a * z + x) + 0.1 * jnp.mean(z)  # noqa: E731
    assert converged.all() and (true_residual(partial(f, a=a), z) < 1.2e-5).all()

    def whole(a):  # the four as one sample
        g = lambda z, a: f(z[0], a)[None]  # noqa: E731
        return jnp.sum(deq_fixed_point(g, jnp.zeros((1, 4, 1)), a, solver=TIGHT)[0] ** 2)

    got = jax.grad(lambda a: jnp.sum(shards(a, x)[0] ** 2))(a)
    np.testing.assert_allclose(got, jax.grad(whole)(a), rtol=2e-3)


def test_pmap():
    got = jax.pmap(lambda x: loss(W, x))(X.reshape(8, 1, 6))
    np.testing.assert_allclose(got.sum(), loss(W, X), rtol=1e-4)


# --- ordinary Python -------------------------------------------------------------------------


def test_eager_calls_compile_once():
    """A new but equal f finds what was compiled; what it closes over is never remembered."""

    def solve(offset):
        return deq_fixed_point(lambda z: jax.nn.relu(jnp.tanh(z @ W) + offset), jnp.zeros_like(X))[
            0
        ]

    first = solve(X)
    compiled = _compiled._cache_size()
    second = solve(X + 1)
    assert _compiled._cache_size() == compiled
    assert not np.allclose(first, second)
    deq_fixed_point(lambda z: jax.nn.relu(jnp.sin(z @ W) + X), jnp.zeros_like(X))
    assert _compiled._cache_size() == compiled + 1


@pytest.mark.parametrize("shape", [(0, 3), *in_slow((3, 0), (0, 0))])
@each_solver
def test_nothing_to_solve(shape, solver):
    def objective(z0):
        z, stats = deq_fixed_point(lambda z: jnp.cos(z + z0), z0, solver=solver())
        return jnp.sum(z), (z, stats)

    gradient, (z, stats) = jax.grad(objective, has_aux=True)(jnp.zeros(shape))
    assert z.shape == gradient.shape == shape and stats.steps.shape == shape[:1]
    assert stats.converged.all()


@pytest.mark.parametrize(
    "solver",
    [Anderson(1e-5, trace=True), *in_slow(*(make(1e-5, 200) for make in SOLVERS))],
)
def test_strict_modes(solver):
    def objective(W, x):
        z, stats = deq_fixed_point(layer, jnp.zeros_like(x), W, x, solver=solver)
        return jnp.sum(z**2), stats

    gradient = jax.grad(objective, has_aux=True)
    want, _ = gradient(W, X)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        f = lambda z, W, x: jnp.tanh(z @ W + x)  # noqa: E731
        z0 = jnp.zeros_like(X)
        jax.jit(jax.grad(lambda W: jnp.sum(deq_fixed_point(f, z0, W, X, solver=solver)[0])))(W)
    with jax.debug_nans(True):
        got, stats = jax.jit(gradient)(W, X)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert stats.trace is None or not jnp.isnan(stats.trace).any()


def test_leaves_that_are_no_arrays():
    """An equinox module with its activation, a string, a bool and an int."""
    module = eqx.nn.MLP(6, 6, 16, 1, activation=jax.nn.gelu, key=jax.random.key(0))
    module = jax.tree.map(lambda x: 0.3 * x if eqx.is_array(x) else x, module)

    def f(z, module, kind, flag, count):
        for _ in range(count):
            z = jax.vmap(module)(z) + (X if flag else 0)
        return z if kind == "plain" else jnp.tanh(z)

    def objective(module):
        z, stats = deq_fixed_point(f, jnp.zeros_like(X), module, "tanh", True, 2, solver=TIGHT)
        return jnp.sum(z), stats

    gradient, stats = eqx.filter_grad(objective, has_aux=True)(module)
    assert stats.converged.all()
    arrays, rest = eqx.partition(module, eqx.is_array)
    g = lambda z, arrays: f(z, eqx.combine(arrays, rest), "tanh", True, 2)  # noqa: E731
    want = jax.grad(lambda a: jnp.sum(deq_fixed_point(g, jnp.zeros_like(X), a, solver=TIGHT)[0]))
    for x, y in zip(jax.tree.leaves(gradient), jax.tree.leaves(want(arrays)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_no_constant_is_as_large_as_the_batch():
    """P19: XLA would fold it, for seconds, while it compiles."""
    batch = 99_991
    f = jax.jit(jax.grad(lambda x: loss(W, x)))
    text = f.lower(jax.ShapeDtypeStruct((batch, 6), jnp.float32)).compile().as_text()
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* constant\(", text)
    assert len(shapes) > 10
    assert not [shape for shape in shapes if str(batch) in shape.split(",")]


def test_auxiliary_output(x64):
    """It is that of f at z*, and has its gradient."""

    def f(z, a):
        y = jnp.cos(a * z)
        return y, {"twice": 2 * y}

    def twice(a):
        options = {"solver": Picard(1e-12, 500), "has_aux": True}
        z, _, aux = deq_fixed_point(f, jnp.zeros((1, 1)), a, **options)
        return aux["twice"][0, 0], 2 * z[0, 0]

    h = 1e-6
    slope, value = jax.grad(twice, has_aux=True)(0.9)
    assert float(value) == pytest.approx(float(twice(0.9)[0]), rel=1e-10)
    difference = (twice(0.9 + h)[0] - twice(0.9 - h)[0]) / (2 * h)
    assert float(slope) == pytest.approx(float(difference), rel=1e-6)
    with pytest.raises(ValueError, match="has_aux=True"):
        deq_fixed_point(f, jnp.zeros((1, 1)), 0.9)


@pytest.mark.slow
def test_export_of_statistics_and_of_gradients():
    rule = Implicit(on_failure="nan")  # a warning is a host callback, which no file can hold
    solve = jax.jit(lambda x: deq_fixed_point(layer, jnp.zeros_like(x), W, x, gradient=rule))
    data = jax.export.export(solve)(X).serialize(vjp_order=1)
    loaded = jax.export.deserialize(bytearray(data))
    z, stats = loaded.call(X)
    np.testing.assert_allclose(z, solve(X)[0], rtol=1e-6)
    assert stats.converged.all()
    fusion = DEQFusion(features=8)
    inputs = {"a": X, "b": X}
    variables = fusion.init(jax.random.key(0), inputs)
    data = jax.export.export(jax.jit(fusion.apply))(variables, inputs).serialize()
    out = jax.export.deserialize(bytearray(data)).call(variables, inputs)
    np.testing.assert_allclose(out.fused, fusion.apply(variables, inputs).fused, rtol=1e-5)


def test_types_too_coarse():
    with pytest.raises(ValueError, match=r"tol=0.0001 is below the resolution of float16"):
        deq_fixed_point(jnp.cos, jnp.zeros((2, 2), jnp.float16))
    with pytest.raises(ValueError, match="16 bits or more"):
        deq_fixed_point(jnp.cos, jnp.zeros((2, 2), jnp.float8_e4m3fn), solver=Picard(0.2))


@one_now_and_the_others_in_slow
def test_tolerance_and_budget_at_run_time(solver):
    traces = 0

    @jax.jit
    def solve(tol, max_steps, slope):
        nonlocal traces
        traces += 1
        options = solver(tol=tol, atol=1e-9 * tol, max_steps=max_steps, damping=tol / tol)
        f = lambda z, slope: jnp.cos(slope * z)  # noqa: E731
        go = lambda slope: deq_fixed_point(f, jnp.zeros((2, 2)), slope, solver=options)  # noqa: E731
        return go(slope)[1], jax.grad(lambda slope: jnp.sum(go(slope)[0]))(slope)

    for tol, max_steps in ((1e-3, 60), (1e-5, 60), (1e-5, 70)):
        stats, gradient = solve(tol, max_steps, 0.7)
        fixed = solver(tol=tol, max_steps=max_steps)
        want = deq_fixed_point(lambda z: jnp.cos(0.7 * z), jnp.zeros((2, 2)), solver=fixed)[1]
        assert stats.converged.all() and stats.steps.tolist() == want.steps.tolist()
        assert jnp.isfinite(gradient)
    assert traces == 1
    with pytest.raises(ValueError, match="Python int"):
        solver(max_steps=jnp.asarray(3), trace=True)
    with pytest.raises(ValueError, match=r"shape \[2\]"):
        solver(tol=jnp.ones(2))
