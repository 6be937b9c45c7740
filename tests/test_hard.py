"""Hard problems for the fusion layer: finite answers and gradients, and honest statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax import Anderson, DEQFusion

D, B = 32, 6
LAYER = DEQFusion(D, solver=Anderson(tol=1e-4, max_steps=60))
X = {
    name: jax.random.normal(key, (B, D))
    for name, key in zip("ab", jax.random.split(jax.random.key(0)), strict=True)
}
VARIABLES = LAYER.init(jax.random.key(1), X)


@jax.jit
def solved(variables, x):
    """Output, and the gradients of a loss in weights and inputs."""

    def loss(variables, x):
        out = LAYER.apply(variables, x, rngs={"jacobian": jax.random.key(2)})
        return jnp.sum(out.fused**2) + out.jacobian_penalty, out

    gradients, out = jax.grad(loss, (0, 1), has_aux=True)(variables, x)
    return out, gradients


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_inputs_of_every_scale(scale):
    out, gradients = solved(VARIABLES, {name: scale * x for name, x in X.items()})
    assert out.stats.converged.all() and finite(out) and finite(gradients)


@pytest.mark.parametrize("value", [0.0, 1.0, -1e6, 1e-6])
def test_constant_inputs(value):
    """Zero variance under the group normalisation."""
    out, gradients = solved(VARIABLES, {name: jnp.full_like(x, value) for name, x in X.items()})
    assert finite(out) and finite(gradients)
    np.testing.assert_array_equal(out.stats.converged, out.stats.residual <= 1e-4)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_sample_without_numbers_fails_alone(bad):
    whole, _ = solved(VARIABLES, X)
    out, _ = solved(VARIABLES, X | {"b": X["b"].at[2, 5].set(bad)})
    others = np.arange(B) != 2
    assert whole.stats.converged.all()
    np.testing.assert_array_equal(out.stats.converged, others)
    np.testing.assert_array_equal(out.stats.steps[others], whole.stats.steps[others])
    np.testing.assert_allclose(out.fused[others], whole.fused[others], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [30, 1e3, 1e6])
def test_weights_that_let_nothing_converge(factor):
    """Finite states of finite residual, none of them called converged that is not."""
    wild = jax.tree.map(partial(jnp.multiply, factor), VARIABLES)
    out, gradients = solved(wild, X)
    assert finite((out.fused, out.modalities, out.stats))
    assert finite(gradients) or factor == 1e6  # where squares overflow float32
    np.testing.assert_array_equal(out.stats.converged, out.stats.residual <= 1e-4)
