"""The Jacobian penalty and the spectral radius against dense Jacobians and the goldens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax import FusionCell, FusionState, jacobian_penalty, spectral_radius
from deq_fusion_jax.injection import Inject

KEY = jax.random.key(0)


def golden_map(golden):
    """f(z, params, inputs) of the official module."""
    cell = FusionCell(golden.names, golden.features)
    inject = Inject(golden.features, lift=0.0)

    def f(z, params, inputs):
        injection = inject.apply({"params": params["inject"]}, inputs)
        return cell.apply({"params": params["cell"]}, z, injection)

    return f


def test_penalty_of_the_official_module(golden):
    f, z = golden_map(golden), golden.state(golden["z_star"])
    probes = golden.state(golden["jac_probes"])

    def penalty(params, inputs):
        return jacobian_penalty(f, z, params, inputs, probes=probes)

    value, got = jax.jit(jax.value_and_grad(penalty, (0, 1)))(golden.params, golden.inputs)
    assert float(value) == pytest.approx(float(golden["jac_loss"]), rel=1e-9)
    want = golden.tree("GJ:"), golden.input_tree("GJ:")
    size = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(want)))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if not np.any(y):
            assert np.linalg.norm(x) <= 1e-12 * size
        else:
            assert np.linalg.norm(x - y) <= 1e-6 * np.linalg.norm(y)  # some are float32


def test_spectral_radius_of_the_official_module(golden):
    f, z = golden_map(golden), golden.state(golden["z_star"])

    def radius(params, inputs):
        return spectral_radius(f, z, params, inputs, key=KEY, steps=400)

    got = jax.jit(radius)(golden.params, golden.inputs)
    np.testing.assert_allclose(got, golden["rho_blocks_exact"].max(axis=1), rtol=0.01)


def linear(z, A):
    return jnp.einsum("bij,bj->bi", A, z)


def matrices(batch=3, n=6):
    return np.random.default_rng(0).normal(size=(batch, n, n))


def test_penalty_is_the_frobenius_norm(x64):
    A, z = matrices(), jnp.zeros((3, 6))
    basis = jnp.broadcast_to(jnp.eye(6)[:, None], (6, 3, 6))  # Σ_p ‖e_pᵀ A‖² = ‖A‖_F²
    exact = np.sum(A**2) / (3 * 6)
    got = jacobian_penalty(linear, z, A, probes=basis)
    assert float(got) * 6 == pytest.approx(exact, rel=1e-12)
    many = jacobian_penalty(linear, z, A, key=KEY, probes=4000)
    assert float(many) == pytest.approx(exact, rel=0.05)


def test_penalty_with_two_probes_by_default(x64):
    A, z = matrices(), jnp.zeros((3, 6))
    probes = jax.random.normal(KEY, (2, 3, 6))
    products = np.einsum("pbi,bij->pbj", probes, A)
    got = jacobian_penalty(linear, z, A, key=KEY)
    assert float(got) == pytest.approx(np.sum(products**2) / (2 * 3 * 6), rel=1e-12)
    assert got == jacobian_penalty(linear, z, A, key=KEY, probes=2)
    assert got != jacobian_penalty(linear, z, A, key=KEY, probes=3)


def test_penalty_gradient_by_finite_differences(x64):
    rng = np.random.default_rng(1)
    W, z = rng.normal(size=(4, 4)), rng.normal(size=(2, 4))
    probes = rng.normal(size=(3, 2, 4))

    def penalty(W, z):
        # W is both an argument and closed over.
        return jacobian_penalty(lambda z, V: jnp.tanh(z @ V) @ W, z, W, probes=probes)

    got, to_z = jax.grad(penalty, (0, 1))(W, z)
    direction, h = rng.normal(size=W.shape), 1e-6
    want = (penalty(W + h * direction, z) - penalty(W - h * direction, z)) / (2 * h)
    assert np.sum(got * direction) == pytest.approx(float(want), rel=1e-7)
    assert not np.any(to_z)


def test_penalty_counts_the_whole_state():
    """A pytree state has the penalty of the same state in one array."""
    A = jnp.float32(matrices())

    def f(z, A):
        out = linear(jnp.concatenate([z["u"], z["v"]], axis=1), A)
        return {"u": out[:, :2], "v": out[:, 2:]}

    parts = {"u": jnp.zeros((3, 2)), "v": jnp.zeros((3, 4))}
    whole = jacobian_penalty(linear, jnp.zeros((3, 6)), A, key=KEY)
    np.testing.assert_allclose(jacobian_penalty(f, parts, A, key=KEY), whole, rtol=1e-6)


def test_penalty_needs_a_key():
    with pytest.raises(ValueError, match="key"):
        jacobian_penalty(jnp.cos, jnp.zeros((1, 2)))


def test_spectral_radius_per_sample(x64):
    A = matrices(batch=4, n=6)
    A[0] = A[0] + A[0].T  # symmetric, with real eigenvalues
    angle = 0.3
    A[1] = 0.0
    A[1][:2, :2] = 0.9 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    A[2] *= 1e-8
    A[3] = 0  # no Jacobian at all
    want = np.abs(np.linalg.eigvals(A)).max(axis=1)
    got = jax.jit(lambda A: spectral_radius(linear, jnp.ones((4, 6)), A, key=KEY, steps=400))(A)
    np.testing.assert_allclose(got, want, rtol=0.02)


def test_spectral_radius_is_taken_at_z():
    """The derivative of z² is 2z."""
    z = jnp.array([[0.1, 0.2], [0.3, -0.4]])
    got = spectral_radius(lambda z: z**2, z, key=KEY)
    np.testing.assert_allclose(got, [0.4, 0.8], rtol=1e-3)


def test_spectral_radius_of_a_mixed_state_in_bfloat16():
    z = FusionState({"a": jnp.zeros((2, 3), jnp.bfloat16)}, jnp.zeros((2, 3), jnp.bfloat16))

    def f(z):
        return FusionState({"a": 0.25 * z.modalities["a"]}, z.modalities["a"] + 0.5 * z.fused)

    got = spectral_radius(f, z, key=KEY)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 0.5, rtol=0.02)


def test_spectral_radius_has_no_gradient():
    def total(a):
        return spectral_radius(lambda z, b: a * b * z, jnp.ones((2, 3)), a, key=KEY).sum()

    np.testing.assert_allclose(total(0.5), 2 * 0.25, rtol=1e-5)
    assert jax.grad(total)(0.5) == 0


def test_spectral_radius_needs_two_steps():
    with pytest.raises(ValueError, match="at least 2"):
        spectral_radius(jnp.cos, jnp.zeros((1, 2)), key=KEY, steps=1)
