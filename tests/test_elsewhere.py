"""`deq_fixed_point` inside other frameworks and transformations: a value and a gradient each.

The answer to compare with is NumPy's alone: a long plain iteration, and the adjoint equation as a
dense linear system for each sample.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deq_fusion_jax import Anderson, Implicit, deq_fixed_point

FEATURES, BATCH = 5, 8
SOLVER = Anderson(tol=1e-13, max_steps=200)
RNG = np.random.default_rng(0)
W = 0.3 * RNG.normal(size=(FEATURES, FEATURES))
BIAS = 0.5 * RNG.normal(size=FEATURES)
X, TARGET = RNG.normal(size=(2, BATCH, FEATURES))

pytestmark = pytest.mark.usefixtures("x64")


def numpy_answer(W=W, bias=BIAS, x=X, target=TARGET):
    """The loss ½ ‖z* − target‖² of z* = tanh(z* W + bias + x), and its gradient to W, bias, x."""
    z = np.zeros_like(x)
    for _ in range(500):
        z = np.tanh(z @ W + bias + x)
    slope, g = 1 - z**2, z - target
    # u = J u + g for rows: J = W diag(slope)ᵀ, one system for each sample.
    adjoint = [np.linalg.solve(np.eye(len(W)) - W * s, h) for s, h in zip(slope, g, strict=True)]
    at_sum = np.stack(adjoint) * slope
    return 0.5 * np.sum(g**2), (z.T @ at_sum, at_sum.sum(axis=0), at_sum)


def loss_of(z, target=TARGET):
    return 0.5 * jnp.sum((z - target) ** 2)


def step(z, W, bias, x):
    return jnp.tanh(z @ W + bias + x)


def solve(W, bias, x, **options):
    return deq_fixed_point(step, jnp.zeros_like(x), W, bias, x, solver=SOLVER, **options)[0]


def agree(value, gradients, expected=None):
    """`gradients`, as many as are given, are to W, to the bias and to x."""
    expected_value, expected_gradients = expected or numpy_answer()
    np.testing.assert_allclose(value, expected_value, rtol=1e-10)
    for found, wanted in zip(gradients, expected_gradients, strict=False):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


def test_the_answer_to_compare_with_is_right_itself():
    """Its gradient, by central differences of its own value."""
    _, (to_w, to_bias, to_x) = numpy_answer()
    d, h = np.random.default_rng(1).normal(size=(FEATURES, FEATURES)), 1e-6
    ahead, behind = (numpy_answer(W + s * d, BIAS + s * d[0], X + s * d[1])[0] for s in (h, -h))
    along = np.sum(to_w * d) + np.sum(to_bias * d[0]) + np.sum(to_x * d[1])
    np.testing.assert_allclose((ahead - behind) / (2 * h), along, rtol=1e-8)


# --- libraries of layers -------------------------------------------------------------------------


@pytest.fixture
def eqx():
    return pytest.importorskip("equinox")


@pytest.fixture
def cell(eqx):
    """An equinox module whose activation is a leaf of it, as equinox's own modules have it."""

    class Cell(eqx.Module):
        linear: eqx.nn.Linear
        activation: Callable

        def __call__(self, z, x):
            return self.activation(self.linear(z) + x)

    linear = eqx.nn.Linear(FEATURES, FEATURES, key=jax.random.key(0))
    weights = jnp.asarray(W.T), jnp.asarray(BIAS)
    return Cell(eqx.tree_at(lambda m: (m.weight, m.bias), linear, weights), jnp.tanh)


def test_equinox_arrays_only(eqx, cell):
    arrays, static = eqx.partition(cell, eqx.is_array)

    def f(z, arrays, x):
        return jax.vmap(eqx.combine(arrays, static))(z, x)

    def loss(arrays, x):
        return loss_of(deq_fixed_point(f, jnp.zeros_like(x), arrays, x, solver=SOLVER)[0])

    value, (to_cell, to_x) = jax.jit(jax.value_and_grad(loss, (0, 1)))(arrays, X)
    agree(value, (to_cell.linear.weight.T, to_cell.linear.bias, to_x))


def test_equinox_module_as_it_is(eqx, cell):  # non-array leaves
    def f(z, cell, x):
        return jax.vmap(cell)(z, x)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(cell, x):
        return loss_of(deq_fixed_point(f, jnp.zeros_like(x), cell, x, solver=SOLVER)[0])

    value, to_cell = loss(cell, jnp.asarray(X))
    agree(value, (to_cell.linear.weight.T, to_cell.linear.bias))


def test_equinox_module_closed_over(eqx, cell):
    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def loss(cell, x):
        return loss_of(deq_fixed_point(jax.vmap(cell), jnp.zeros_like(x), x, solver=SOLVER)[0])

    value, to_cell = loss(cell, jnp.asarray(X))
    agree(value, (to_cell.linear.weight.T, to_cell.linear.bias))


class NnxCell(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(FEATURES, FEATURES, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        self.linear.kernel[...], self.linear.bias[...] = jnp.asarray(W), jnp.asarray(BIAS)

    def __call__(self, z, x):
        return jnp.tanh(self.linear(z) + x)


def nnx_argument(cell, x):
    """The module is a pytree of arrays, so it may be an argument of f."""
    return deq_fixed_point(lambda z, m, x: m(z, x), jnp.zeros_like(x), cell, x, solver=SOLVER)[0]


def nnx_closure(cell, x):
    return deq_fixed_point(cell, jnp.zeros_like(x), x, solver=SOLVER)[0]


@pytest.mark.parametrize("solve", [nnx_argument, nnx_closure])
def test_flax_nnx(solve):
    @nnx.jit
    def both(cell, x):
        return nnx.value_and_grad(lambda cell: loss_of(solve(cell, x)))(cell)

    value, to_cell = both(NnxCell(), X)
    agree(value, (to_cell.linear.kernel[...], to_cell.linear.bias[...]))


def test_flax_nnx_split():
    graph, state = nnx.split(NnxCell())

    def f(z, state, x):
        return nnx.merge(graph, state)(z, x)

    def loss(state, x):
        return loss_of(deq_fixed_point(f, jnp.zeros_like(x), state, x, solver=SOLVER)[0])

    value, (to_state, to_x) = jax.jit(jax.value_and_grad(loss, (0, 1)))(state, X)
    agree(value, (to_state["linear"]["kernel"][...], to_state["linear"]["bias"][...], to_x))


def test_dm_haiku():
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform(lambda z, x: jnp.tanh(hk.Linear(FEATURES)(z) + x)))
    shapes = jax.tree.map(jnp.shape, net.init(jax.random.key(0), X, X))
    params = {"linear": {"w": jnp.asarray(W), "b": jnp.asarray(BIAS)}}
    assert shapes == jax.tree.map(jnp.shape, params)

    def f(z, params, x):
        return net.apply(params, z, x)

    def loss(params, x):
        return loss_of(deq_fixed_point(f, jnp.zeros_like(x), params, x, solver=SOLVER)[0])

    value, (to_params, to_x) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, X)
    agree(value, (to_params["linear"]["w"], to_params["linear"]["b"], to_x))


class LinenCell(nn.Module):
    @nn.compact
    def __call__(self, z, x):
        return jnp.tanh(nn.Dense(FEATURES, name="linear")(z) + x)


class LinenModel(nn.Module):
    """The fixed point inside a module: the cell makes its weights, then f is its `apply`."""

    @nn.compact
    def __call__(self, x):
        cell, z0 = LinenCell(name="cell"), jnp.zeros_like(x)
        if self.is_initializing():
            return cell(z0, x)
        cell, variables = cell.unbind()
        return deq_fixed_point(
            lambda z, v, x: cell.apply(v, z, x), z0, variables, x, solver=SOLVER
        )[0]


def test_flax_linen_outside_of_a_module():
    cell = LinenCell()
    params = {"linear": {"kernel": jnp.asarray(W), "bias": jnp.asarray(BIAS)}}

    def f(z, params, x):
        return cell.apply({"params": params}, z, x)

    def loss(params, x):
        return loss_of(deq_fixed_point(f, jnp.zeros_like(x), params, x, solver=SOLVER)[0])

    value, (to_params, to_x) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, X)
    agree(value, (to_params["linear"]["kernel"], to_params["linear"]["bias"], to_x))


def test_flax_linen_inside_of_a_module():
    model = LinenModel()
    made = model.init(jax.random.key(0), X)
    params = {"cell": {"linear": {"kernel": jnp.asarray(W), "bias": jnp.asarray(BIAS)}}}
    assert jax.tree.map(jnp.shape, made) == {"params": jax.tree.map(jnp.shape, params)}

    def loss(params, x):
        return loss_of(model.apply({"params": params}, x))

    value, (to_params, to_x) = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, X)
    to_linear = to_params["cell"]["linear"]
    agree(value, (to_linear["kernel"], to_linear["bias"], to_x))


# --- transformations ---------------------------------------------------------------------------


def test_vmap_over_weights():
    """An ensemble: three matrices, one batch of inputs."""
    ensemble = jnp.asarray([W, -W, 0.5 * W])

    def loss(W, bias, x):
        return loss_of(solve(W, bias, x))

    each = jax.vmap(jax.value_and_grad(loss, (0, 1, 2)), in_axes=(0, None, None))
    values, gradients = jax.jit(each)(ensemble, BIAS, X)
    for i, matrix in enumerate(ensemble):
        agree(values[i], [g[i] for g in gradients], numpy_answer(W=np.asarray(matrix)))


def test_scan_with_a_warm_start():
    """Every solve starts from the one before; inputs drift. Gradients do not run back in time."""
    drift = np.linspace(0, 0.1, 6)[:, None, None] + X

    def loss(W, bias, xs):
        def at(z, x):
            z, stats = deq_fixed_point(step, z, W, bias, x, solver=SOLVER)
            return z, (loss_of(z), stats.steps)

        losses, steps = jax.lax.scan(at, jnp.zeros_like(xs[0]), xs)[1]
        return jnp.sum(losses), steps

    both = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (value, steps), gradients = both(W, BIAS, drift)
    answers = [numpy_answer(x=x) for x in drift]
    to_w, to_bias, to_x = zip(*(gradient for _, gradient in answers), strict=True)
    agree(value, gradients, (sum(v for v, _ in answers), (sum(to_w), sum(to_bias), np.stack(to_x))))
    assert (steps[1:] <= steps[0]).all() and steps[1:].mean() < steps[0].mean()


def test_shard_map_over_the_batch():
    """Eight devices with one sample each; the gradient to the weights is summed over them."""
    mesh = jax.make_mesh((BATCH,), ("batch",), axis_types=(AxisType.Auto,))
    specs = (P(), P(), P("batch"))
    sharded = jax.shard_map(solve, mesh=mesh, in_specs=specs, out_specs=P("batch"))

    def loss(W, bias, x):
        return loss_of(sharded(W, bias, x))

    agree(*jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(W, BIAS, X))


def test_export_and_call_again():
    """The file has the gradient too, for any number of rows."""
    (rows,) = export.symbolic_shape("rows")
    shapes = (W.shape, BIAS.shape, (rows, FEATURES))
    given = [jax.ShapeDtypeStruct(shape, jnp.float64) for shape in shapes]
    rule = Implicit(on_failure="nan")  # a file cannot hold the warning of the default
    stored = export.export(jax.jit(partial(solve, gradient=rule)))(*given).serialize(vjp_order=1)
    again = export.deserialize(stored)

    def loss(W, bias, x, target):
        return loss_of(again.call(W, bias, x), target)

    both = jax.value_and_grad(loss, (0, 1, 2))
    for part in (slice(None), slice(3)):
        found = both(*map(jnp.asarray, (W, BIAS, X[part], TARGET[part])))
        agree(*found, numpy_answer(x=X[part], target=TARGET[part]))
