"""The default initialisation converges at every width and input scale."""

import jax
import jax.numpy as jnp
import pytest

from deq_fusion_jax import DEQFusion

SCALES = jnp.array([0.01, 0.1, 1.0, 10.0, 100.0])


@pytest.mark.parametrize("modalities", [2, 3, 5])
@pytest.mark.parametrize("features", [64, 256, 512])
def test_every_sample_converges_within_30_steps(features, modalities):
    """64 samples of N(0, s²) and of its positive part, s from 0.01 to 100, tolerance 1e-4."""
    layer = DEQFusion(features)

    def solve(key, scale, positive):
        *keys, start = jax.random.split(key, modalities + 1)
        x = {f"m{i}": scale * jax.random.normal(k, (64, features)) for i, k in enumerate(keys)}
        x = {name: jnp.where(positive, jax.nn.relu(v), v) for name, v in x.items()}
        stats = layer.apply(layer.init(start, x), x).stats
        return stats.converged.all(), stats.steps.max()

    seeds = jax.random.split(jax.random.key(features + modalities), 2 if features == 64 else 1)
    over = jax.vmap(solve, in_axes=(None, None, 0))
    over = jax.vmap(jax.vmap(over, in_axes=(None, 0, None)), in_axes=(0, None, None))
    converged, steps = jax.jit(over)(seeds, SCALES, jnp.array([False, True]))
    assert steps.shape == (len(seeds), 5, 2)
    assert converged.all(), converged
    assert steps.max() <= 30, steps.max(axis=(0, 2))
