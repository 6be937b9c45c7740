"""Two runs that should be the same: what to compare of them."""

import jax
import jax.numpy as jnp
import numpy as np


def bits(tree):
    """The bytes of every leaf, those of keys too."""

    def words(x):
        key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if key else x).tobytes()

    return [words(x) for x in jax.tree.leaves(tree)]


def timeless(history):
    """A history without what the clock says."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]
