"""deq_fixed_point: derivatives, transformations, states, precision, and one sample for itself."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax import (
    Anderson,
    Broyden,
    ConvergenceWarning,
    DEQFusion,
    Implicit,
    Phantom,
    Picard,
    Unrolled,
    deq_fixed_point,
)

TIGHT = [
    Picard(tol=1e-13, max_steps=300),
    Anderson(tol=1e-13, max_steps=300, history=3),
    Broyden(tol=1e-13, max_steps=300),
]
RNG = np.random.default_rng(0)
W = 0.3 * RNG.normal(size=(4, 4))
BIAS, C = RNG.normal(size=(2, 3, 4))


def f(z, W, b):
    return jnp.tanh(z @ W) + jnp.sin(z) * b / 4 + b


def by_argument(W, b, **options):
    return deq_fixed_point(f, jnp.zeros_like(b), W, b, **options)[0]


def by_closure(W, b, **options):
    return deq_fixed_point(lambda z: f(z, W, b), jnp.zeros_like(b), **options)[0]


def slope(function, at, direction, h=1e-6):
    """Central difference of function(*at) along a direction."""
    ahead, behind = (
        function(*(x + s * h * d for x, d in zip(at, direction, strict=True))) for s in (1, -1)
    )
    return (ahead - behind) / (2 * h)


# --- derivatives -------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", TIGHT, ids=lambda s: type(s).__name__)
def test_gradients_by_finite_differences(solver, x64):
    """To the arguments and to what f closes over."""
    gradients = {}
    for solve in (by_argument, by_closure):

        def loss(W, b, solve=solve):
            return jnp.sum(C * solve(W, b, solver=solver) ** 2)

        both = jax.jit(jax.value_and_grad(loss, (0, 1)))
        gradients[solve] = both(W, BIAS)[1]
        direction = np.random.default_rng(1).normal(size=W.shape), C
        for v in ((direction[0], 0 * C), (0 * W, direction[1])):
            got = sum(float(jnp.sum(g * d)) for g, d in zip(gradients[solve], v, strict=True))
            want = slope(lambda *at, both=both: both(*at)[0], (W, BIAS), v)
            assert got == pytest.approx(float(want), rel=1e-7)
    for x, y in zip(*gradients.values(), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10)


@pytest.mark.parametrize(("solve", "solver"), [(by_argument, TIGHT[0]), (by_closure, TIGHT[1])])
def test_second_derivative_by_finite_differences(solve, solver, x64):
    def loss(W, b):
        return jnp.sum(C * solve(W, b, solver=solver) ** 2)

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    rng = np.random.default_rng(1)
    v, w = [(rng.normal(size=W.shape), rng.normal(size=BIAS.shape)) for _ in range(2)]

    def along_v(W, b):
        return sum(jnp.sum(g * d) for g, d in zip(gradient(W, b), v, strict=True))

    got = jax.jit(jax.grad(along_v, (0, 1)))(W, BIAS)
    got = sum(float(jnp.sum(g * d)) for g, d in zip(got, w, strict=True))
    assert got == pytest.approx(float(slope(along_v, (W, BIAS), w)), rel=1e-7)


def test_derivatives_of_every_order_in_closed_form(x64):
    """z = a z + b has z* = b / (1 − a), and ∂³z*/∂a³ = 6 b / (1 − a)⁴."""

    def solution(a, b):
        z, _ = deq_fixed_point(lambda z: a * z + b, jnp.zeros((1, 1)), solver=TIGHT[0])
        return z[0, 0]

    a, b = 0.4, 1.7
    d1 = jax.grad(solution)
    d2 = jax.grad(d1)
    d3 = jax.grad(d2)
    for order, derivative in enumerate((solution, d1, d2, d3)):
        want = [1, 1, 2, 6][order] * b / (1 - a) ** (order + 1)
        assert float(jax.jit(derivative)(a, b)) == pytest.approx(want, rel=1e-9)
    assert float(jax.jit(jax.grad(d1, 1))(a, b)) == pytest.approx(1 / (1 - a) ** 2, rel=1e-9)


@pytest.mark.parametrize("rule", [Implicit(), Phantom(2), Unrolled(3)])
def test_gradient_to_z0_is_zero(rule):
    def loss(z0):
        z, _ = deq_fixed_point(
            lambda z: jax.tree.map(jnp.cos, z), z0, solver=Picard(), gradient=rule
        )
        return sum(x.sum() for x in jax.tree.leaves(z))

    gradient = jax.jit(jax.grad(loss))({"a": jnp.ones((2, 3)), "b": (jnp.zeros(2),)})
    assert gradient["a"].shape == (2, 3) and gradient["b"][0].shape == (2,)
    assert not any(x.any() for x in jax.tree.leaves(gradient))


@pytest.mark.parametrize("rule", [Implicit(), Phantom(3, 0.7), Unrolled(20)])
def test_forward_mode_is_the_transpose_of_reverse_mode(x64, rule):
    """⟨g, J v⟩ = ⟨Jᵀ g, v⟩, by jvp, linearize and jacfwd."""

    def solution(b):
        z = by_argument(W, b, solver=TIGHT[1], gradient=rule)
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(z)])

    v = jnp.asarray(np.random.default_rng(3).normal(size=BIAS.shape))
    value, tangent = jax.jvp(solution, (BIAS,), (v,))
    g = jnp.cos(jnp.arange(value.size))
    want = jnp.vdot(jax.vjp(solution, BIAS)[1](g)[0], v)
    assert float(jnp.vdot(g, tangent)) == pytest.approx(float(want), rel=1e-10)
    _, linear = jax.linearize(solution, BIAS)
    np.testing.assert_allclose(linear(v), tangent, rtol=1e-10)
    np.testing.assert_allclose(
        jax.jacfwd(solution)(BIAS), jax.jacrev(solution)(BIAS), rtol=1e-9, atol=1e-12
    )


@pytest.mark.slow
def test_second_derivatives_in_every_order_of_modes(x64):
    """z = a z + b: ∂²z*/∂a² = 2 b / (1 − a)³, ∂²z*/∂a∂b = 1 / (1 − a)²."""

    def solution(ab):
        f = lambda z: ab[0] * z + ab[1]  # noqa: E731
        return deq_fixed_point(f, jnp.zeros((1, 1)), solver=TIGHT[0])[0][0, 0]

    a, b = 0.4, 1.7
    want = [[2 * b / (1 - a) ** 3, 1 / (1 - a) ** 2], [1 / (1 - a) ** 2, 0]]
    for outer in (jax.jacfwd, jax.jacrev):
        for inner in (jax.jacfwd, jax.jacrev):
            got = outer(inner(solution))(jnp.array([a, b]))
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-15, 1e20])
def test_the_gradient_is_linear_in_the_loss(scale):
    """A loss of 1e-30 has a gradient of 1e-30, not 0; squares of that underflow in float32."""

    def gradient(scale):
        def loss(b):
            z, _ = deq_fixed_point(lambda z: 0.9 * z + b, jnp.zeros((2, 1)), solver=Anderson())
            return scale * z.sum()

        return jax.jit(jax.grad(loss))(jnp.ones((2, 1)))

    np.testing.assert_allclose(gradient(scale), scale * 10, rtol=1e-3)


def test_a_samples_gradient_is_its_own():
    """Also where other samples have larger cotangents: after a softmax they range this far."""
    c = jnp.array([[1.0], [1e-12], [1e-20], [1e-30]])

    def loss(b):
        z, _ = deq_fixed_point(lambda z: 0.9 * z + b, jnp.zeros((4, 1)), solver=Anderson())
        return jnp.sum(c * z)

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(jnp.ones((4, 1))) / c, 10, rtol=1e-3)


# --- transformations ---------------------------------------------------------------------------


def test_eager_jit_vmap_scan_and_checkpoint_agree(x64):
    solver = TIGHT[0]
    problems = jnp.stack([BIAS, -BIAS, 0.1 * C])

    def loss(b):
        return jnp.sum(C * by_argument(W, b, solver=solver))

    both = jax.value_and_grad(loss)
    compiled = jax.jit(both)
    want = jax.tree.map(lambda *x: np.stack(x), *[compiled(b) for b in problems])
    eager = jax.tree.map(lambda x: x[None], both(problems[0]))
    assert_close = partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
    jax.tree.map(assert_close, eager, jax.tree.map(lambda x: x[:1], want))
    mapped = jax.jit(jax.vmap(both))(problems)
    _, scanned = jax.lax.scan(lambda carry, b: (carry, both(b)), None, problems)
    remat = jax.jit(jax.vmap(jax.value_and_grad(jax.checkpoint(loss))))(problems)
    for got in (mapped, scanned, remat):
        jax.tree.map(assert_close, got, want)


def test_gradient_through_a_scan_of_warm_starts(x64):
    """z_k = f(z_k, z_{k-1}): the chain rule through a recurrence of equilibria."""

    def loss(b):
        def step(z, _):
            following, stats = deq_fixed_point(
                lambda u: 0.5 * jnp.tanh(u) + 0.3 * z + b, z, solver=TIGHT[0]
            )
            return following, stats.steps

        z, steps = jax.lax.scan(step, jnp.zeros_like(b), length=4)
        return jnp.sum(C * z), steps

    (_, steps), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(BIAS)
    assert steps.shape == (4, 3) and (steps > 1).all()
    want = slope(jax.jit(lambda b: loss(b)[0]), (BIAS,), (C,))
    assert float(jnp.sum(gradient * C)) == pytest.approx(float(want), rel=1e-7)


def test_vmap_over_weights_with_a_shared_state(x64):
    slopes = jnp.linspace(0.1, 0.9, 5)
    solver = Anderson(tol=1e-10, history=2)

    def steps(a):
        z, stats = deq_fixed_point(lambda z: a * jnp.cos(z), jnp.zeros((2, 1)), solver=solver)
        return z, stats.steps

    z, count = jax.jit(jax.vmap(steps))(slopes)
    one = jax.jit(steps)
    for i, a in enumerate(slopes):
        np.testing.assert_allclose(z[i], one(a)[0], rtol=1e-12)
        np.testing.assert_array_equal(count[i], one(a)[1])
    np.testing.assert_allclose(z[:, 0, 0], slopes * np.cos(z[:, 0, 0]), rtol=1e-9)


@pytest.mark.slow
def test_no_tracer_leaks():
    """Of closures and their gradients, of first and second order."""

    def loss(a, b):
        z, stats = deq_fixed_point(lambda z: a * jnp.cos(z) + b, jnp.zeros((2, 1)), solver=Picard())
        return jnp.sum(z**2), stats

    def second(a, b):
        return jnp.sum(jax.grad(lambda a: loss(a, b)[0])(a) ** 2)

    with jax.checking_leaks():
        jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(0.5, 1.0)
        gradient = jax.jit(jax.grad(second, (0, 1)))(0.5, 1.0)
    assert all(jnp.isfinite(g) for g in gradient)


def test_f_is_traced_few_times_and_never_again():
    calls = 0

    def counted(z, b):
        nonlocal calls
        calls += 1
        return jnp.cos(z) * b

    def loss(b):
        return deq_fixed_point(counted, jnp.zeros_like(b), b, solver=Picard())[0].sum()

    compiled = jax.jit(jax.value_and_grad(loss))
    compiled(jnp.ones((2, 3)))
    assert 1 <= calls <= 4
    once = calls
    compiled(0.5 * jnp.ones((2, 3)))
    assert calls == once


def test_memory_does_not_grow_with_max_steps():
    def temporaries(max_steps):
        solver = Anderson(max_steps=max_steps, history=2)

        def loss(b):
            z, _ = deq_fixed_point(lambda z: jnp.cos(z) * b, jnp.zeros_like(b), solver=solver)
            return z.sum()

        compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((16, 64))).compile()
        return compiled.memory_analysis()

    few, many = temporaries(50), temporaries(500)
    if few is None:
        pytest.skip("this backend has no memory analysis")
    assert few.temp_size_in_bytes > 0
    assert many.temp_size_in_bytes <= few.temp_size_in_bytes


# --- states and arguments ----------------------------------------------------------------------


class Nested(NamedTuple):
    level: jax.Array  # [B]
    parts: dict


def test_nested_state_is_the_same_problem_as_a_flat_one(x64):
    """Scalars per sample, sequences and nesting, against one matrix."""
    rng = np.random.default_rng(0)
    A, b = 0.1 * rng.normal(size=(9, 9)), rng.normal(size=(3, 9))

    def flat(z, A):
        return jnp.tanh(z @ A) + b

    def pack(z):
        level, (sequence, more) = z.level, z.parts["deep"]
        return jnp.concatenate([level[:, None], sequence.reshape(3, 6), more["x"]], axis=1)

    def unpack(z):
        return Nested(z[:, 0], {"deep": (z[:, 1:7].reshape(3, 2, 3), {"x": z[:, 7:]})})

    def nested(z, A):
        return unpack(flat(pack(z), A))

    def loss(A, f, z0, out):
        z, stats = deq_fixed_point(f, z0, A, solver=TIGHT[0])
        return jnp.sum(out(z) ** 3), stats

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 3))
    (value, stats), gradient = run(A, nested, unpack(jnp.zeros((3, 9))), pack)
    (want, want_stats), want_gradient = run(A, flat, jnp.zeros((3, 9)), lambda z: z)
    assert float(value) == pytest.approx(float(want), rel=1e-11)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(stats.steps, want_stats.steps)


def test_the_order_of_a_dicts_keys_does_not_matter():
    """f may build its dict in another order than z0."""

    def f(z):
        return {"b": 0.5 * z["b"] + z["a"], "a": 0.5 * z["a"] + 1}

    z, _ = deq_fixed_point(f, {"a": jnp.zeros((1, 1)), "b": jnp.zeros((1, 1))}, solver=Picard())
    np.testing.assert_allclose([z["a"][0, 0], z["b"][0, 0]], [2, 4], rtol=1e-3)


def test_integers_and_keys_as_arguments_and_closures():
    table, index, key = jnp.eye(3), jnp.array([2, 0]), jax.random.key(0)
    mask = jnp.array([True, False])

    def f(z, problem):
        noise = jax.random.normal(problem["key"], z.shape) + jax.random.uniform(key, z.shape)
        picked = problem["table"][problem["index"]] + table[index]
        return 0.5 * z + picked + 0.1 * noise + jnp.where(mask[:, None], 1.0, 0.0)

    @partial(jax.jit, static_argnames="rule")
    def gradient(floats, rule):
        def loss(floats):
            problem = {**floats, "index": index, "key": key}
            solver = Picard(tol=1e-6, max_steps=60)
            return deq_fixed_point(f, jnp.zeros((2, 3)), problem, solver=solver, gradient=rule)[
                0
            ].sum()

        return jax.grad(loss)(floats)

    for rule in (Implicit(), Phantom(30), Unrolled(30)):
        got = gradient({"table": table}, rule)["table"]
        np.testing.assert_allclose(got, [[2] * 3, [0] * 3, [2] * 3], rtol=1e-4)


def test_z0_is_where_it_starts():
    """The square root has two fixed points, and both are found by starting there."""
    z, stats = deq_fixed_point(jnp.sqrt, jnp.array([[1.0], [0.0]]), solver=Picard())
    assert z.ravel().tolist() == [1, 0] and stats.steps.tolist() == [1, 1]


class Box:
    """A node type whose repr shows nothing of what is inside."""

    def __init__(self, x):
        self.x = x

    def __repr__(self):
        return "Box"


jax.tree_util.register_pytree_node(Box, lambda box: ((box.x,), None), lambda _, x: Box(*x))


@pytest.mark.parametrize(
    ("z0", "f", "shown"),
    [
        (jnp.zeros((2, 3)), lambda z: z[:, :1], ["float32[2, 3]", "float32[2, 1]"]),
        (jnp.zeros((2, 3)), lambda z: z.astype("float16"), ["float32[2, 3]", "float16[2, 3]"]),
        (jnp.zeros((2, 3)), lambda z: {"z": z}, ["is float32[2, 3]", "{z: float32[2, 3]}"]),
        ({"a": jnp.zeros((2, 3))}, lambda z: {"b": z["a"]}, ["{a: ", "{b: "]),
        ((jnp.zeros((2, 3)),), lambda z: [z[0]], ["(float32[2, 3],)", "[float32[2, 3]]"]),
        (Box(jnp.zeros((2, 3))), lambda z: Box(z.x[:, :1]), ["[2, 3]", "[2, 1]"]),
    ],
)
def test_f_must_map_z_to_its_like(z0, f, shown):
    with pytest.raises(ValueError) as error:
        deq_fixed_point(f, z0)
    for text in shown:
        assert text in str(error.value)


class Opaque:
    """A node type with Python's own repr, which shows an address."""

    alive = ()  # all of them, so that no address is used twice

    def __init__(self, x):
        self.x = x
        Opaque.alive += (self,)


jax.tree_util.register_pytree_node(Opaque, lambda o: ((o.x,), None), lambda _, x: Opaque(*x))


def test_any_registered_node_type_is_a_state():
    z0 = Opaque(jnp.zeros((2, 1)))
    z, stats = deq_fixed_point(lambda z: Opaque(jnp.cos(z.x)), z0, solver=Picard())
    assert stats.converged.all()
    np.testing.assert_allclose(z.x, 0.739085, rtol=1e-3)


@pytest.mark.parametrize(
    ("z0", "message"),
    [
        (jnp.zeros((2, 3), int), r"int32\[2, 3\]"),
        ({"a": jnp.zeros((2, 3)), "b": jnp.zeros((4, 3))}, r"\[2, 3\].*\[4, 3\]"),
        (1.0, "batch axis"),
        ((), "no arrays"),
    ],
)
def test_what_is_no_state(z0, message):
    with pytest.raises(ValueError, match=message):
        deq_fixed_point(lambda z: z, z0)


def test_unknown_options_are_errors():
    for option in ("tol", "max_iter", "damping"):
        with pytest.raises(TypeError, match=option):
            deq_fixed_point(jnp.cos, jnp.zeros((1, 1)), **{option: 1})


# --- precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden])
def test_bfloat16(solver):
    """f runs in bfloat16, norms and mixing in float32."""
    W16, b16 = jnp.bfloat16(0.5 * W), jnp.bfloat16(BIAS)

    def run(W, b):
        def checked(z):
            assert z.dtype == jnp.bfloat16
            return f(z, W, b)

        z, stats = deq_fixed_point(checked, jnp.zeros_like(b), solver=solver(tol=1e-2))
        return jnp.sum(z.astype(jnp.float32) * C), (z, stats)

    (_, (z, stats)), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(W16, b16)
    assert z.dtype == jnp.bfloat16 and gradient.dtype == jnp.bfloat16
    assert stats.residual.dtype == jnp.float32 and stats.converged.all()
    # The residual is finer than bfloat16 could count, so it was taken in float32.
    assert (stats.residual != stats.residual.astype(jnp.bfloat16)).any()
    W32, b32 = W16.astype(jnp.float32), b16.astype(jnp.float32)
    exact, pullback = jax.vjp(lambda W: by_argument(W, b32, solver=Picard(1e-6, 200)), W32)
    assert jnp.abs(z - exact).max() < 0.05
    want = pullback(jnp.float32(C))[0]
    assert jnp.linalg.norm(gradient - want) < 0.05 * jnp.linalg.norm(want)


def test_bfloat16_residual_is_that_of_the_state_returned():
    """Not of an iterate between two numbers of bfloat16."""

    def f(z):  # rounded once, with and without jit
        return 0.5 * z + 1

    z0 = jnp.zeros((3, 2), jnp.bfloat16) + jnp.array([[0.0], [0.3], [0.8]], jnp.bfloat16)
    z, stats = deq_fixed_point(f, z0, solver=Picard(tol=1e-2, max_steps=4, damping=0.7))
    image, z = f(z).astype(jnp.float32), z.astype(jnp.float32)
    residual = jnp.linalg.norm(image - z, axis=1) / jnp.linalg.norm(image, axis=1)
    np.testing.assert_allclose(stats.residual, residual, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "tol"), [("bfloat16", 1e-4), ("float16", 1e-4), ("float32", 1e-8)]
)
@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden])
def test_a_tolerance_below_the_resolution_is_refused(dtype, tol, solver):
    with pytest.raises(ValueError, match=rf"tol={tol}.*resolution of {dtype}"):
        deq_fixed_point(jnp.cos, jnp.zeros((1, 1), dtype), solver=solver(tol=tol))
    with pytest.raises(ValueError, match=dtype):  # the coarsest leaf counts
        z0 = {"a": jnp.zeros((1, 1)), "b": jnp.zeros((1, 1), dtype)}
        deq_fixed_point(partial(jax.tree.map, jnp.cos), z0, solver=solver(tol=tol))


def test_float64_reaches_what_float32_cannot(x64):
    z, stats = deq_fixed_point(jnp.cos, jnp.zeros((1, 1)), solver=Picard(1e-14, 200))
    assert stats.converged.all() and stats.residual.dtype == jnp.float64
    np.testing.assert_allclose(z, 0.7390851332151607, rtol=1e-13)


# --- a sample for itself -----------------------------------------------------------------------


def assert_same_alone_and_in_the_batch(batched, alone, tol):
    """Answers to 1e-5, and the same step counts unless the residual is tol to rounding."""
    z, stats = batched
    z_alone, alone_stats = alone[0], dataclasses.replace(alone[1], trace=None)
    z_alone, alone_stats = jax.tree.map(lambda x: np.asarray(x)[:, 0], (z_alone, alone_stats))
    assert stats.converged.all() and alone_stats.converged.all()
    error = np.linalg.norm(z - z_alone, axis=1) / np.linalg.norm(z, axis=1)
    differ = np.flatnonzero(stats.steps != alone_stats.steps)
    assert len(differ) <= 2
    for b in differ:
        assert abs(int(stats.steps[b]) - int(alone_stats.steps[b])) == 1
        last = min(int(stats.steps[b]), int(alone_stats.steps[b])) - 1
        assert stats.trace[last, b] == pytest.approx(tol, rel=0.02)
    assert np.delete(error, differ).max() < 1e-5


@pytest.mark.parametrize("solver", [Picard, Anderson, Broyden])
def test_random_maps_alone_and_in_a_batch(solver):
    """100 random contractions, each in a batch of 100 and by itself."""
    rng = np.random.default_rng(0)
    A = rng.normal(size=(100, 8, 8)).astype(np.float32)
    A *= rng.uniform(0.1, 0.9, size=(100, 1, 1)) / np.linalg.norm(A, 2, axis=(1, 2), keepdims=True)
    b = rng.normal(size=(100, 8)).astype(np.float32) * 10.0 ** rng.integers(-3, 4, size=(100, 1))
    solver = solver(tol=1e-4, max_steps=120, trace=True)

    def solve(A, b):
        def f(z):
            size = jnp.max(jnp.abs(b), axis=1, keepdims=True)
            return size * jnp.tanh(jnp.sum(A * (z / size)[:, None], axis=2)) + b

        return deq_fixed_point(f, jnp.zeros_like(b), solver=solver)

    batched = jax.jit(solve)(A, jnp.float32(b))
    one_by_one = partial(jax.lax.map, lambda p: solve(p[0][None], p[1][None]))
    alone = jax.jit(one_by_one)((A, jnp.float32(b)))
    assert len(set(batched[1].steps.tolist())) > 5
    assert_same_alone_and_in_the_batch(batched, alone, tol=1e-4)


def test_random_fusions_alone_and_in_a_batch():
    """5 random layers with 20 samples each of every scale."""
    layer = DEQFusion(64, solver=Anderson(tol=1e-4, max_steps=60, trace=True))
    kx, kp, ks = jax.random.split(jax.random.key(0), 3)
    scale = 10 ** jax.random.uniform(ks, (5, 20, 2, 1), minval=-2, maxval=2)
    x = scale * jax.random.normal(kx, (5, 20, 2, 64))
    example = {"a": x[0, :, 0], "b": x[0, :, 1]}
    init = jax.jit(layer.clone(solver=Picard()).init)
    params = [init(key, example) for key in jax.random.split(kp, 5)]
    params = jax.tree.map(lambda *p: jnp.stack(p), *params)

    def solve(variables, x):
        out = layer.apply(variables, {"a": x[:, 0], "b": x[:, 1]})
        parts = (out.fused, *out.modalities.values(), *out.gates.values())
        return jnp.concatenate(parts, axis=1), out.stats

    @jax.jit
    def batched(params, x):
        return jax.lax.map(lambda p: solve(*p), (params, x))

    @jax.jit
    def alone(params, x):
        return jax.lax.map(lambda p: jax.lax.map(lambda x: solve(p[0], x[None]), p[1]), (params, x))

    together, single = batched(params, x), alone(params, x)
    for i in range(5):
        pair = [jax.tree.map(lambda v, i=i: v[i], side) for side in (together, single)]
        assert_same_alone_and_in_the_batch(*pair, tol=1e-4)


def test_a_finished_sample_is_frozen():
    """Bit for bit: the steps that the others still take do not touch it."""
    slopes = jnp.array([[0.3], [0.95], [0.6]])

    def run(max_steps):
        solver = Anderson(tol=1e-3, max_steps=max_steps, history=2)

        def f(z, a):
            return a * jnp.sin(z) + jnp.arange(1.0, 4.0)

        return jax.jit(lambda a: deq_fixed_point(f, jnp.zeros((3, 3)), a, solver=solver))(slopes)

    z, stats = run(50)
    assert stats.steps[0] < stats.steps.max()
    early, early_stats = run(int(stats.steps[0]))
    np.testing.assert_array_equal(z[0], early[0])
    assert early_stats.steps[0] == stats.steps[0]
    assert early_stats.residual[0] == stats.residual[0]


def test_a_bad_sample_leaves_the_others_gradients_alone():
    @jax.jit
    def gradient(a):
        def loss(a):
            solver = Anderson(history=3)
            return deq_fixed_point(lambda z: jnp.cos(a * z), jnp.ones((3, 2)), solver=solver)[
                0
            ].sum()

        return jax.grad(loss)(a)

    good = jnp.array([[0.3], [0.9], [0.6]])
    with pytest.warns(ConvergenceWarning, match="1 of 3 samples"):
        got = jax.block_until_ready(gradient(good.at[1].set(jnp.nan)))
        jax.effects_barrier()
    want = gradient(good)
    assert got[1] == 0
    np.testing.assert_array_equal(got[::2], want[::2])
    assert jnp.isfinite(want).all()
