"""Missing modalities: one that is NaN all over a row is not there, and training may hide more."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_fusion_jax.injection import Modalities


def presence(inputs: Modalities) -> Modalities:
    """{name: [N] bool} of inputs [N, …]: False where a row is all NaN."""
    return {name: ~jnp.all(jnp.isnan(x), axis=range(1, x.ndim)) for name, x in inputs.items()}


class ModalityDropout(nn.Module):
    """Hides each modality of a row with probability `rate` in training: {name: [N] bool} → alike.

    A row that would lose all it has keeps it all. The randomness is the rng "dropout".

    Source: Neverova et al., "ModDrop: adaptive multi-modal gesture recognition", 2016.
    """

    rate: float

    @nn.compact
    def __call__(self, present: Modalities, train: bool) -> Modalities:
        if not train or self.rate == 0:
            return present
        here = jnp.stack(list(present.values()))
        kept = here & jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, here.shape)
        kept = jnp.where(kept.any(axis=0), kept, here)
        return dict(zip(present, kept, strict=True))
