"""How the models of experiments fuse vectors, or positions where the fusion takes them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from deq_fusion_jax import FusionOutput
from deq_fusion_jax.token_baselines import TOKEN_FUSIONS


class Tokens(NamedTuple):
    """What an encoder makes of positions.

    Attributes:
      x: [N, T, d].
      there: [N, T] bool, which positions there are.
    """

    x: jax.Array
    there: jax.Array


def takes_positions(fusion: nn.Module) -> bool:
    return isinstance(fusion, TOKEN_FUSIONS)


def fuse(
    fusion: nn.Module, encoded: Mapping[str, jax.Array | Tokens], *args: Any, **options: Any
) -> FusionOutput:
    """A fusion of encoded modalities, told which positions there are where they have any."""
    there = {name: x.there for name, x in encoded.items() if isinstance(x, Tokens)}
    inputs = {name: x.x if isinstance(x, Tokens) else x for name, x in encoded.items()}
    if there:
        options["lengths"] = there
    return fusion(inputs, *args, **options)
