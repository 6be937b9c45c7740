"""The fusion modules against the paper's formulas in numpy, and what masks and inputs may be."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError
from jax.flatten_util import ravel_pytree

from deq_fusion_jax import Adjoint, DEQFusion, FusionCell, FusionState, Picard
from deq_fusion_jax.cell import ModalityBlock
from deq_fusion_jax.injection import Inject, Injection, lift_scale, presence

D = 64
LAYER = DEQFusion(D, solver=Picard(tol=1e-6, max_steps=100))  # compiles fastest


def features(batch=4, widths=(D, D), seed=0, inner=()):
    keys = jax.random.split(jax.random.key(seed), len(widths))
    return {
        name: jax.random.normal(key, (batch, *inner, d))
        for name, key, d in zip("abc", keys, widths, strict=False)
    }


@cache
def variables(widths=(D, D)):
    """Of `LAYER`, with every parameter moved away from its start."""
    start = jax.jit(LAYER.init)(jax.random.key(1), features(widths=widths))
    leaves, treedef = jax.tree.flatten(start)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, moved)


apply = jax.jit(LAYER.apply)


def relative(got, want):
    return float(jnp.linalg.norm(jnp.ravel(got - want)) / jnp.linalg.norm(jnp.ravel(want)))


# --- the maps ----------------------------------------------------------------------------------


def numpy_norm(x, params, groups=4):
    """Group normalisation over positions and the channels of a group."""
    grouped = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean = grouped.mean(axis=(1, 3), keepdims=True)
    variance = grouped.var(axis=(1, 3), keepdims=True)
    normalised = ((grouped - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
    return normalised * params["scale"] + params["bias"]


def numpy_cell(params, z, x, x_fused, present, dropout, activation_last):
    """The paper's map as it stands there: one gate α_i per modality, and their sum."""

    def linear(x, params):
        return x @ params["kernel"] + params["bias"]

    relu = partial(np.maximum, 0)
    modalities = {}
    for name in x:
        p = params[f"blocks_{name}"]
        h = relu(numpy_norm(linear(z.modalities[name], p["dense1"]), p["norm1"]))
        h = numpy_norm(linear(h, p["dense2"]) * dropout[name] + x[name], p["norm2"])
        h = numpy_norm(relu(h + z.modalities[name]), p["norm3"])
        modalities[name] = present[name] * h
    p = params["fusion"]
    total = 0
    for name in x:
        alpha = present[name] * linear(modalities[name] + z.fused, p["gate"])
        total = total + z.fused * alpha * dropout["fused"]
    h = linear(total, p["fuse"]) + x_fused
    fused = relu(numpy_norm(h, p["norm"])) if activation_last else numpy_norm(relu(h), p["norm"])
    return FusionState(modalities, fused)


@pytest.mark.parametrize("inner", [(), (3,), (2, 3)])
@pytest.mark.parametrize("activation_last", [False, True])
def test_cell_is_the_papers_map(inner, activation_last, x64):
    """Also with missing modalities, dropout, and one product in place of a gate per modality."""
    rng = np.random.default_rng(0)
    names, shape = ("a", "b", "c"), (5, *inner, 8)
    draw = partial(rng.normal, size=shape)
    z = FusionState({name: draw() for name in names}, draw())
    x, x_fused = {name: draw() for name in names}, draw()
    here = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 0, 0], [1, 1, 0]], float)
    ones = (1,) * (len(shape) - 1)
    present = {name: here[:, i].reshape(5, *ones) for i, name in enumerate(names)}
    dropout = {n: rng.integers(0, 2, size=shape) / 0.5 for n in (*names, "fused")}

    cell = FusionCell(names, 8, activation_last=activation_last)
    injection = Injection(x, x_fused, present, dropout)
    params = jax.eval_shape(cell.init, jax.random.key(0), z, injection)["params"]
    params = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
    got = jax.jit(cell.apply)({"params": params}, z, injection)
    want = numpy_cell(params, z, x, x_fused, present, dropout, activation_last)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), got, want)
    assert not got.modalities["b"][1].any()

    gates = cell.apply({"params": params}, z, injection, method="gates")
    gate = params["fusion"]["gate"]
    for name in names:
        alpha = (z.modalities[name] + z.fused) @ gate["kernel"] + gate["bias"]
        np.testing.assert_allclose(gates[name], present[name] * alpha, rtol=1e-9, atol=1e-11)


def test_injection(x64):
    """x_f = Σ_i w_i x_i + b over the modalities present."""
    x, mask = features(), np.array([[1, 1], [1, 0], [0, 1], [0, 0]])
    params = {"bias": 0.3, "weight_a": 2.0, "weight_b": -0.7}
    out = Inject(D, lift=0.0).apply({"params": params}, x, mask)
    want = 2.0 * mask[:, :1] * x["a"] - 0.7 * mask[:, 1:] * x["b"] + 0.3
    np.testing.assert_allclose(out.fused, want, rtol=1e-12)
    start = Inject(D).init(jax.random.key(0), x)["params"]
    assert start == {"bias": 0, "weight_a": 1, "weight_b": 1}


@pytest.mark.parametrize("inner", [(3,), (2, 3)])
def test_output_is_the_cells_fixed_point(inner):
    x = features(inner=inner)
    out = apply(variables(), x)
    assert out.stats.converged.all()
    assert out.fused.shape == out.gates["a"].shape == out.modalities["b"].shape == (4, *inner, D)
    assert set(out.modalities) == set(out.gates) == {"a", "b"}
    params = variables()["params"]
    injection = Inject(D).apply({"params": params["inject"]}, x)
    z = FusionState(out.modalities, out.fused)
    image = jax.jit(FusionCell(("a", "b"), D).apply)({"params": params["cell"]}, z, injection)
    assert max(jax.tree.leaves(jax.tree.map(relative, image, z))) < 1e-4
    gate = params["cell"]["fusion"]["gate"]
    alpha = (z.modalities["a"] + z.fused) @ gate["kernel"] + gate["bias"]
    np.testing.assert_allclose(out.gates["a"], alpha, rtol=1e-3, atol=1e-4)


# --- the scale of the inputs -------------------------------------------------------------------


@pytest.mark.parametrize("inner", [(), (3,)])
def test_lift_scale(inner):
    scale = np.array([1e-3, 1e-2, 1.0, 1e2, 1e6], np.float32).reshape(5, *(1,) * (len(inner) + 1))
    x = scale * jax.random.normal(jax.random.key(0), (5, *inner, 16))
    axes = tuple(range(1, x.ndim))

    def rms(x):
        return np.sqrt(np.mean(np.square(np.float64(x)), axis=axes))

    y = lift_scale(x, 2.0)
    np.testing.assert_allclose(rms(y), np.sqrt(rms(x) ** 2 + 4), rtol=1e-5)
    # The direction stays, and larger stays larger.
    np.testing.assert_allclose(
        y / y.max(axes, keepdims=True), x / x.max(axes, keepdims=True), rtol=1e-4
    )
    assert (np.diff(rms(y)) > 0).all()
    np.testing.assert_allclose(y[-1], x[-1], rtol=1e-6)
    np.testing.assert_array_equal(lift_scale(x, 0.0), x)
    assert lift_scale(x.astype(jnp.bfloat16), 2.0).dtype == jnp.bfloat16


def test_lift_scale_of_zero():
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(lift_scale(x, 2.0) ** 2))(
        jnp.zeros((2, 4))
    )
    assert value == 0 and jnp.isfinite(gradient).all()
    np.testing.assert_array_equal(lift_scale(jnp.zeros((2, 4)), 2.0), 0)


# --- missing modalities ------------------------------------------------------------------------


def test_masked_is_dropped():
    """Sample by sample, and whatever stands in the missing input."""
    params, x = variables((D, 5)), features(widths=(D, 5))
    mask = np.array([[1, 1], [1, 0], [0, 1], [0, 0]], bool)
    whole = apply(params, x, np.ones_like(mask))
    alone = {name: apply(params, {name: x[name]}) for name in "ab"}
    x["b"], x["a"] = x["b"].at[1].set(jnp.nan), x["a"].at[2].set(jnp.inf)
    out = apply(params, x, mask)
    assert out.stats.converged.all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    for sample, want, kept in [(0, whole, "ab"), (1, alone["a"], "a"), (2, alone["b"], "b")]:
        assert set(want.modalities) == set(want.gates) == set(kept)
        assert relative(out.fused[sample], want.fused[sample]) < 1e-5
        for name in kept:
            assert relative(out.modalities[name][sample], want.modalities[name][sample]) < 1e-5
            assert relative(out.gates[name][sample], want.gates[name][sample]) < 1e-5
        for name in set("ab") - set(kept):
            assert not out.modalities[name][sample].any() and not out.gates[name][sample].any()
    assert relative(out.fused[1], whole.fused[1]) > 0.01


@pytest.mark.slow
def test_masked_gradients_are_dropped_gradients():
    c = jax.random.normal(jax.random.key(5), (4, D))

    @partial(jax.jit, static_argnames="names")
    def gradient(variables, x, mask, names):
        def loss(variables, x):
            out = LAYER.apply(variables, x, mask)
            return jnp.sum(c * out.fused) + sum(jnp.sum(out.gates[n] * c) for n in names)

        return jax.grad(loss, (0, 1))(variables, x)

    x = features(widths=(D, 5))
    params = variables((D, 5))
    x["b"] = x["b"].at[0].set(jnp.nan)
    mask = {"a": jnp.ones(4), "b": jnp.zeros(4)}
    masked, to_x = gradient(params, x, mask, ("a",))
    dropped, to_a = gradient(params, {"a": x["a"]}, None, ("a",))
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves((masked, to_x)))
    assert relative(to_x["a"], to_a["a"]) < 1e-4 and not to_x["b"].any()
    got, want = masked["params"], dropped["params"]
    for part in ("blocks_a", "fusion"):
        for x, y in zip(*(jax.tree.leaves(g["cell"][part]) for g in (got, want)), strict=True):
            assert relative(x, y) < 1e-3
    for name in ("weight_a", "bias"):
        assert relative(got["inject"][name], want["inject"][name]) < 1e-3
    missing = got["cell"]["blocks_b"], got["inject"]["weight_b"], got["inject"]["project_b"]
    assert not any(g.any() for g in jax.tree.leaves(missing))


def test_mask_as_array_or_dict():
    """Columns are the names in alphabetical order, whatever the order of the dict."""
    x = features()
    swapped = dict(reversed(x.items()))
    columns = np.array([[1, 1], [1, 0], [0, 1], [0, 0]])
    want = {"a": [1, 1, 0, 0], "b": [1, 0, 1, 0]}
    for mask in (
        columns,
        columns.astype(bool),
        jnp.float32(columns),
        columns.tolist(),
        {"b": columns[:, 1], "a": columns[:, 0]},
    ):
        for inputs in (x, swapped):
            got = presence(inputs, mask)
            assert {name: v.ravel().tolist() for name, v in got.items()} == want
            assert got["a"].shape == (4, 1)
    assert all((v == 1).all() for v in presence(x, None).values())


# --- inputs ------------------------------------------------------------------------------------


def test_unequal_widths_are_projected():
    x = features(widths=(D, 5))
    params = variables((D, 5))["params"]
    out = apply({"params": params}, x)
    assert out.fused.shape == (4, D) and out.stats.converged.all()
    assert {n for n in params["inject"] if n.startswith("project")} == {"project_b"}
    p = params["inject"]["project_b"]
    x["b"] = x["b"] @ p["kernel"] + p["bias"]
    inject = {n: p for n, p in params["inject"].items() if not n.startswith("project")}
    by_hand = apply({"params": {"cell": params["cell"], "inject": inject}}, x)
    assert relative(out.fused, by_hand.fused) < 1e-4


@pytest.mark.parametrize(
    ("inputs", "mask", "message"),
    [
        ({"a": jnp.ones((2, D)), "b": jnp.ones((3, D))}, None, r"'b'.*\(3, 64\).*'a'.*\(2, 64\)"),
        ({"a": jnp.ones((2, 4, D)), "b": jnp.ones((2, D))}, None, r"'b'.*\(2, 64\).*\(2, 4, 64\)"),
        ({"a": jnp.ones((2, D)), "b": jnp.ones(D)}, None, r"'b' is float32\[64\]"),
        ({"a": jnp.ones((2, D)), "b": jnp.ones((2, D), int)}, None, r"'b' is int32\[2, 64\]"),
        (jnp.ones((2, D)), None, "dict"),
        ({}, None, "dict"),
        ({"a": jnp.ones((2, D)), "b": jnp.ones((2, D))}, jnp.ones((2, 3)), r"\(2, 3\).*\(2, 2\)"),
        ({"a": jnp.ones((2, D)), "b": jnp.ones((2, D))}, jnp.ones(2), r"\(2,\).*\(2, 2\)"),
        ({"a": jnp.ones((2, D))}, {"b": jnp.ones(2)}, r"\{b: float32\[2\]\}.*\[2\].*'a'"),
        ({"a": jnp.ones((2, D))}, {"a": jnp.ones(3)}, r"\{a: float32\[3\]\}.*\[2\]"),
    ],
)
def test_wrong_inputs_are_named(inputs, mask, message):
    with pytest.raises(ValueError, match=message):
        LAYER.init(jax.random.key(0), inputs, mask)


@pytest.mark.parametrize(("before", "after"), [(5, 7), (D, 5), (5, D)])
def test_another_width_than_at_the_start_is_named(before, after):
    """The modality and both widths."""
    params = variables((D, before))
    with pytest.raises(Exception, match=rf"(?s)(?=.*b)(?=.*\b{before}\b)(?=.*\b{after}\b)"):
        jax.eval_shape(LAYER.apply, params, features(widths=(D, after)))


def test_parameters_do_not_depend_on_the_order_of_the_dict():
    x = features(widths=(D, 5))
    swapped = dict(reversed(x.items()))
    key = jax.random.key(0)
    # The inputs are closed over: as arguments, their keys would be sorted.
    one, other = (jax.eval_shape(lambda key, x=x: LAYER.init(key, x), key) for x in (x, swapped))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, other)
    one, other = (Inject(D).init(key, x) for x in (x, swapped))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_bfloat16():
    layer = LAYER.clone(dtype=jnp.bfloat16, solver=Picard(tol=1e-2))
    x = features()

    @jax.jit
    def both(variables):
        def loss(variables):
            out = layer.apply(variables, x)
            return jnp.sum(out.fused.astype(jnp.float32) ** 2 * x["a"]), out

        return jax.value_and_grad(loss, has_aux=True)(variables)

    (_, out), gradient = both(variables())
    assert out.fused.dtype == out.gates["a"].dtype == out.modalities["b"].dtype == jnp.bfloat16
    assert out.stats.residual.dtype == jnp.float32 and out.stats.converged.all()
    assert relative(out.fused.astype(jnp.float32), apply(variables(), x).fused) < 0.05
    assert all(g.dtype == jnp.float32 and jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))


# --- the start, dropout and the penalty --------------------------------------------------------


@pytest.mark.parametrize("schedule", ["joint", "staged"])
def test_a_warm_start_takes_one_step(schedule):
    x, layer = features(), LAYER.clone(schedule=schedule)
    cold = jax.jit(layer.apply)(variables(), x)
    assert (cold.stats.steps > 5).all()
    modalities = {"b": cold.modalities["b"], "a": cold.modalities["a"]}  # in any order
    warm = layer.apply(variables(), x, z0=FusionState(modalities, cold.fused))
    assert warm.stats.steps.tolist() == [1] * 4
    np.testing.assert_allclose(warm.fused, cold.fused, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["joint", "staged"])
def test_the_adjoint_is_watched_and_warm_started(schedule):
    x, layer = features(), LAYER.clone(schedule=schedule)

    def loss(variables, adjoint0):
        out = layer.apply(variables, x, adjoint0=adjoint0)
        return jnp.sum(jnp.sin(out.fused)), FusionState(out.modalities, out.fused)

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (cold, adjoint), state = gradient(variables(), Adjoint.zeros(zeros_like_state(x)))
    assert adjoint.failed.tolist() == [0] * 4 and (adjoint.steps > 5).all()
    assert jax.tree.map(jnp.shape, adjoint.u) == jax.tree.map(jnp.shape, state)
    (warm, again), _ = gradient(variables(), adjoint)
    assert again.steps.tolist() == [1] * 4
    plain = jax.jit(jax.grad(lambda v: loss(v, None)[0]))(variables())
    for got in (warm, plain):
        got, want = (ravel_pytree(tree)[0] for tree in (got, cold))
        assert relative(got, want) < 1e-5


def zeros_like_state(x):
    zeros = {name: jnp.zeros((4, D)) for name in x}
    return FusionState(zeros, jnp.zeros((4, D)))


# --- the staged schedule -------------------------------------------------------------------------


@pytest.mark.slow
def test_staged_is_joint(x64):
    """The same fixed point and gradients, with dropout and missing modalities."""
    widths, inner = (D, 5, D), (2, 3)
    x = features(widths=widths, inner=inner)
    mask = jnp.array([[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 0]])
    c = jax.random.normal(jax.random.key(5), (4, *inner, D))
    results = []
    for schedule in ("joint", "staged"):
        solver = Picard(tol=1e-13, max_steps=500)
        layer = LAYER.clone(schedule=schedule, solver=solver, dropout=0.3)

        def loss(variables, x, layer=layer):
            rngs = {"dropout": jax.random.key(6), "jacobian": jax.random.key(7)}
            out = layer.apply(variables, x, mask, train=True, rngs=rngs)
            gates = sum(jnp.sum(c * gate) for gate in out.gates.values())
            return jnp.sum(c * out.fused) + gates + out.jacobian_penalty, out

        gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        wide = jax.tree.map(jnp.float64, variables(widths))
        (to_variables, to_x), out = gradient(wide, x)
        assert out.stats.converged.all()
        equilibrium = out.fused, out.modalities, out.gates, out.jacobian_penalty
        results.append((equilibrium, to_variables, to_x))
    errors = jax.tree.map(lambda got, want: jnp.abs(got - want).max(), *results)
    scales = jax.tree.map(lambda want: jnp.abs(want).max(), results[0])
    worst = jax.tree.map(lambda error, scale: error <= 1e-10 * (scale + 1), errors, scales)
    assert all(jax.tree.leaves(worst)), errors


@pytest.mark.parametrize("schedule", ["joint", "staged"])
def test_a_gradient_traces_every_map_once(schedule, monkeypatch):
    """Not again for the solver's loop, the linearisation or the adjoint."""
    traced = []
    call = ModalityBlock.__call__

    def noted(self, *inputs):
        traced.append(self.name)
        return call(self, *inputs)

    x, layer = features(), LAYER.clone(schedule=schedule)
    start = variables()
    monkeypatch.setattr(ModalityBlock, "__call__", noted)
    jax.jit(jax.grad(lambda v: jnp.sum(layer.apply(v, x).fused))).lower(start)
    assert sorted(traced) == ["blocks_a", "blocks_b"]


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(ValueError, match=r"'parallel'; expected \"staged\" or \"joint\""):
        LAYER.clone(schedule="parallel").apply(variables(), features())


# --- dropout -----------------------------------------------------------------------------------

DROPOUT = LAYER.clone(dropout=0.3)


def test_dropout_only_in_training():
    x = features()
    evaluated = jax.jit(DROPOUT.apply)(variables(), x)
    plain = apply(variables(), x)
    np.testing.assert_array_equal(evaluated.fused, plain.fused)
    with pytest.raises(InvalidRngError, match="dropout"):
        DROPOUT.apply(variables(), x, train=True)


def test_one_dropout_mask_per_solve():
    """A new mask at every step would leave nothing to converge to."""
    x = features()
    run = jax.jit(lambda key: DROPOUT.apply(variables(), x, train=True, rngs={"dropout": key}))
    one, same, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    assert one.stats.converged.all() and other.stats.converged.all()
    np.testing.assert_array_equal(one.fused, same.fused)
    assert relative(other.fused, one.fused) > 0.05
    assert relative(apply(variables(), x).fused, one.fused) > 0.05


def dropout_masks(x, seed=0, rate=0.25):
    inject = Inject(D, dropout=rate)
    params = {"params": variables()["params"]["inject"]}
    return inject.apply(params, x, None, True, rngs={"dropout": jax.random.key(seed)}).dropout


def test_dropout_masks():
    """0 or 1/keep at the rate asked for, another mask for every sample and modality."""
    masks = dropout_masks(features(batch=100, inner=(2,)))
    assert set(masks) == {"a", "b", "fused"}
    flat = np.stack([m.reshape(100, -1) for m in masks.values()]).reshape(300, -1)
    values = np.unique(flat)
    np.testing.assert_allclose(values, [0, 1 / 0.75], rtol=1e-6)
    assert flat.mean() == pytest.approx(1, abs=0.02)
    assert len(np.unique(flat, axis=0)) == 300


def test_dropout_does_not_depend_on_the_order_of_the_dict():
    """jit sorts the keys, so it would be another mask than without jit."""
    x = features()
    one, other = dropout_masks(x), dropout_masks(dict(reversed(x.items())))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_jacobian_penalty():
    """None unless asked for; ‖J‖_F² / (B N) of the cell at the equilibrium."""
    layer = DEQFusion(16, lift=4.0, solver=Picard(tol=1e-4, max_steps=200), jacobian_probes=500)
    x = features(batch=2, widths=(16, 16))
    params = jax.jit(layer.init)(jax.random.key(0), x)
    asked = jax.jit(lambda key: layer.apply(params, x, rngs={"jacobian": key}))(jax.random.key(0))
    silent = jax.jit(layer.apply)(params, x)
    assert silent.jacobian_penalty is None
    assert relative(asked.fused, silent.fused) < 1e-5

    cell, inject = FusionCell(("a", "b"), 16), Inject(16, lift=4.0)
    injection = inject.apply({"params": params["params"]["inject"]}, x)

    def f(z):  # [B, 48]
        z = FusionState({"a": z[:, :16], "b": z[:, 16:32]}, z[:, 32:])
        out = cell.apply({"params": params["params"]["cell"]}, z, injection)
        return jnp.concatenate([*out.modalities.values(), out.fused], axis=1)

    z = jnp.concatenate([*asked.modalities.values(), asked.fused], axis=1)
    jacobian = jax.jit(jax.jacrev(f))(z)
    assert float(asked.jacobian_penalty) == pytest.approx(
        float(jnp.sum(jacobian**2)) / 96, rel=0.15
    )
