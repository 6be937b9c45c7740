"""What a fusion is given: the features of named modalities, projected, lifted and masked."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_fusion_jax.layers import dense
from deq_fusion_jax.state import describe

Modalities = dict[str, jax.Array]
Mask = jax.Array | Modalities | None


class Injection(NamedTuple):
    """What the cell is given at every step of a solve; constant during the solve.

    Attributes:
      modalities: x_i [B, …, d] per modality.
      fused: x_f [B, …, d].
      present: [B, 1, …] per modality, 1 where the sample has it and 0 where it is missing.
      dropout: [B, …, d] per modality and for "fused": 0 or 1/keep; None without dropout.
    """

    modalities: Modalities
    fused: jax.Array
    present: Modalities
    dropout: Modalities | None = None


class Inject(nn.Module):
    """From the features of each modality to what the cell is given: (inputs, mask) → Injection.

    A modality of another width than d is projected by a linear layer; small inputs are lifted
    (`lift_scale`); x_f = Σ_i w_i x_i + b with learned scalars, w_i = 1 and b = 0 at the start.
    """

    features: int
    lift: float = 2.0
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, inputs: Modalities, mask: Mask = None, train: bool = False) -> Injection:
        present = presence(inputs, mask)
        fused = self.param("bias", nn.initializers.zeros, (), jnp.float32)
        modalities = {}
        for name in sorted(inputs):
            self._check_width(name, inputs[name].shape[-1])
            x = jnp.where(present[name] > 0, inputs[name], 0)  # a missing one may well be NaN
            if x.shape[-1] != self.features:
                x = dense(self.features, 1, self.dtype, f"project_{name}")(x)
            x = lift_scale(x, self.lift).astype(self.dtype or x.dtype)
            weight = self.param(f"weight_{name}", nn.initializers.ones, (), jnp.float32)
            fused = fused + weight * present[name] * x
            modalities[name] = x
        # Without a dtype of its own a layer computes in float32 or wider, as its parameters are.
        dtype = self.dtype or jnp.result_type(jnp.float32, *modalities.values())
        cast = partial(jax.tree.map, lambda x: x.astype(dtype))
        return cast(Injection(modalities, fused, present, self._dropout_masks(modalities, train)))

    def _check_width(self, name: str, width: int) -> None:
        """Raises ValueError where the parameters were made for other inputs than these."""
        if self.is_initializing():
            return
        params = self.variables["params"]
        if f"weight_{name}" not in params:
            known = [key.removeprefix("weight_") for key in params if key.startswith("weight_")]
            raise ValueError(f"modality {name!r} is unknown; the parameters are for {known}.")
        projection = params.get(f"project_{name}")
        expected = projection["kernel"].shape[0] if projection else self.features
        if width != expected:
            raise ValueError(
                f"modality {name!r} has {width} features; its parameters are for {expected}."
            )

    def _dropout_masks(self, modalities: Modalities, train: bool) -> Modalities | None:
        if self.dropout == 0 or not train:
            return None
        shape = next(iter(modalities.values())).shape
        shapes = dict.fromkeys((*modalities, "fused"), shape)
        return dropout_masks(self.dropout, shapes, partial(self.make_rng, "dropout"))


def dropout_masks(
    rate: float, shapes: Mapping[str, tuple[int, ...]], key: Callable[[], jax.Array]
) -> Modalities:
    """0 or 1/keep of each shape, by a new key for each."""
    keep = 1 - rate
    return {name: jax.random.bernoulli(key(), keep, shape) / keep for name, shape in shapes.items()}


def lift_scale(x: jax.Array, floor: float, axes: Sequence[int] | None = None) -> jax.Array:
    """x · √(1 + c²/r²): the root mean square r of each sample becomes √(r² + c²), c = `floor`.

    r is taken over all axes but the first, or over `axes`. Large inputs pass unchanged and small
    ones are raised to c, so that the injected x_i outweighs the recurrent part of f_i at every
    input scale; a larger r still comes out larger. 0 gives x itself, as in the paper.
    """
    if floor == 0:
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    over = range(1, x.ndim) if axes is None else axes
    mean_square = jnp.mean(wide * wide, axis=over, keepdims=True)
    return (wide * jnp.sqrt(1 + floor**2 / (mean_square + 1e-12))).astype(x.dtype)


def presence(inputs: Modalities, mask: Mask) -> Modalities:
    """[B, 1, …] float per modality, 1 where present, from a mask [B, M] or {name: [B]} or None.

    Raises:
      ValueError: inputs is no dict of floating-point arrays [B, …, features] alike but for the
        last axis, or the mask does not fit.
    """
    if not isinstance(inputs, Mapping) or not inputs:
        raise ValueError(
            f"inputs is a {type(inputs).__name__}; expected a dict {{modality: array}}."
        )
    first, *others = inputs
    for name, x in inputs.items():
        if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"modality {name!r} is {describe(x)}; expected floating point [B, …, features]."
            )
    for name in others:
        if inputs[name].shape[:-1] != inputs[first].shape[:-1]:
            raise ValueError(
                f"modality {name!r} has shape {inputs[name].shape}, but {first!r} has "
                f"{inputs[first].shape}; all axes except the last must agree."
            )
    batch, ones = inputs[first].shape[0], (1,) * (inputs[first].ndim - 1)
    present = parse_mask(mask, batch, inputs)
    return {name: x.reshape(batch, *ones) for name, x in present.items()}


def parse_mask(mask: Mask, batch: int, names: Iterable[str]) -> Modalities:
    """{name: [B] float}, 1 where present, from a mask [B, M] or {name: [B]} or None.

    Raises:
      ValueError: the mask does not fit.
    """
    names = list(names)
    if mask is None:
        return {name: jnp.ones(batch) for name in names}
    if not isinstance(mask, Mapping):
        mask = jnp.asarray(mask)
        if mask.shape != (batch, len(names)):
            raise ValueError(f"mask has shape {mask.shape}; expected {(batch, len(names))}.")
        mask = dict(zip(sorted(names), mask.T, strict=True))
    mask = {name: jnp.asarray(present) for name, present in mask.items()}
    if set(mask) != set(names) or any(m.shape != (batch,) for m in mask.values()):
        raise ValueError(
            f"mask has {describe(mask)}; expected an array [{batch}] for each of {sorted(names)}."
        )
    return {name: jnp.where(mask[name] > 0, 1.0, 0.0) for name in names}
