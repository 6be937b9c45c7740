"""The layers that the maps are made of, started as PyTorch starts them."""

from typing import Any

import flax.linen as nn
import jax


def dense(
    features: int, scale: float = 1.0, dtype: Any = None, name: str | None = None
) -> nn.Dense:
    """Linear layer that starts with weights from `scale` × U(±1/√fan_in), biases U(±1/√d)."""

    def bias_init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1, 1) / features**0.5

    kernel_init = nn.initializers.variance_scaling(scale**2 / 3, "fan_in", "uniform")
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name=name)


def group_norm(groups: int, dtype: Any = None, name: str | None = None) -> nn.GroupNorm:
    """Affine group normalisation over channels and positions, as PyTorch's."""
    return nn.GroupNorm(groups, epsilon=1e-5, dtype=dtype, use_fast_variance=False, name=name)
