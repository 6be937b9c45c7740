"""The default initialisation converges at every width and input scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax import DEQFusion

SCALES = (0.01, 0.1, 1.0, 10.0, 100.0)
NAMES = ("a", "b", "c", "d", "e")
SAMPLES = 64


@pytest.mark.slow
@pytest.mark.parametrize(("features", "seeds"), [(64, (0, 1)), (256, (2,)), (512, (3,))])
def test_every_sample_converges_within_30_steps(features, seeds):
    """64 samples each of N(0, s²) and of its positive part, with 2, 3 and 5 modalities.

    Samples do not see each other and a masked modality is as good as none, so that all cases go
    as one batch.
    """
    layer = DEQFusion(features)
    scale, positive, present = np.meshgrid(SCALES, (False, True), (2, 3, 5), indexing="ij")
    scale, positive, present = (np.repeat(x.ravel(), SAMPLES) for x in (scale, positive, present))

    @jax.jit
    def solve(seed):
        start, *keys = jax.random.split(jax.random.key(seed), 1 + len(NAMES))
        x = {
            n: jax.random.normal(k, (len(scale), features))
            for n, k in zip(NAMES, keys, strict=True)
        }
        x = {
            n: scale[:, None] * jnp.where(positive[:, None], jax.nn.relu(v), v)
            for n, v in x.items()
        }
        mask = present[:, None] > jnp.arange(len(NAMES))
        return layer.apply(layer.init(start, x), x, mask).stats

    for seed in seeds:
        stats = solve(seed)
        slow = ~stats.converged | (stats.steps > 30)
        cases = {case[:3] for case in zip(scale, positive, present, strict=True)}
        assert len(cases) == 5 * 2 * 3
        failed = {
            c for c, s in zip(zip(scale, positive, present, strict=True), slow, strict=True) if s
        }
        assert not failed, f"{int(slow.sum())} samples of (scale, positive, modalities) {failed}"
