"""Weights of the paper's PyTorch module (github.com/jinhong-ni/DEQFusion) as our parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

__all__ = ["params_from_official"]

PyTree = Any


def params_from_official(state_dict: Mapping[str, Any], modalities: Sequence[str]) -> PyTree:
    """Parameters for `DEQFusion.official` from the state_dict of the official DEQFusion module.

    Args:
      state_dict: {name: array} with PyTorch's names: `func_.branches.i.*` for modality i,
        `func_.branches.M.*` for the fusion, `weights.i` and `bias`. Tensors must be on the CPU.
        Linear weights are (out, in) there and are transposed.
      modalities: our names of the modalities, in the official order.

    Raises:
      ValueError: an entry is missing or left over, the number of modalities differs, or a name
        comes twice.
    """
    if len(set(modalities)) < len(modalities):
        raise ValueError(f"modalities are {tuple(modalities)}; name every modality once.")
    arrays = {name: np.asarray(value) for name, value in state_dict.items()}
    fusion = f"func_.branches.{len(modalities)}"
    if f"{fusion}.gate.weight" not in arrays:
        raise ValueError(
            f"state_dict has no '{fusion}.gate.weight', which it must have for the "
            f"{len(modalities)} modalities {tuple(modalities)}."
        )

    def take(name: str) -> jnp.ndarray:
        if name not in arrays:
            raise ValueError(f"state_dict has no {name!r}; is it a DEQFusion state_dict?")
        return jnp.asarray(arrays.pop(name))

    def linear(name: str) -> PyTree:
        return {"kernel": take(f"{name}.weight").T, "bias": take(f"{name}.bias")}

    def norm(name: str) -> PyTree:
        return {"scale": take(f"{name}.weight"), "bias": take(f"{name}.bias")}

    cell, inject = {}, {"bias": take("bias").reshape(())}
    for i, modality in enumerate(modalities):
        branch = f"func_.branches.{i}"
        cell[f"blocks_{modality}"] = {
            "dense1": linear(f"{branch}.conv1"),
            "dense2": linear(f"{branch}.conv2"),
            "norm1": norm(f"{branch}.gn1"),
            "norm2": norm(f"{branch}.gn2"),
            "norm3": norm(f"{branch}.gn3"),
        }
        inject[f"weight_{modality}"] = take(f"weights.{i}").reshape(())
    cell["fusion"] = {
        "gate": linear(f"{fusion}.gate"),
        "fuse": linear(f"{fusion}.fuse"),
        "norm": norm(f"{fusion}.gn3"),
    }
    if arrays:
        raise ValueError(f"state_dict has entries that DEQFusion has not: {sorted(arrays)}.")
    return {"cell": cell, "inject": inject}
