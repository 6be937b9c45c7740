"""Missing modalities: NaN is not there, and what training hides."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.models.missing import ModalityDropout, presence


def test_only_a_row_of_nan_is_missing():
    x = np.zeros((4, 2, 3), np.float32)
    x[1], x[2, 0], x[3, 0, 0] = np.nan, np.nan, np.nan
    here = presence({"a": jnp.asarray(x), "b": jnp.ones((4, 1))})
    assert here["a"].tolist() == [True, False, True, True] and here["b"].all()


def test_modality_dropout_hides_its_share_and_never_all():
    """Of two modalities one is hidden with r (1 − r): a row that would lose both keeps them."""
    here = {"a": jnp.ones(20_000, bool), "b": jnp.ones(20_000, bool)}
    rate, rngs = 0.3, {"dropout": jax.random.key(0)}
    kept = ModalityDropout(rate).apply({}, here, True, rngs=rngs)
    for name in here:
        assert abs(float(1 - kept[name].mean()) - rate * (1 - rate)) < 0.01
    assert bool((kept["a"] | kept["b"]).all())
    for unchanged in (
        ModalityDropout(rate).apply({}, here, False),
        ModalityDropout(0.0).apply({}, here, True),
    ):
        assert all(bool(unchanged[name].all()) for name in here)


def test_what_is_missing_stays_missing():
    here = {"a": jnp.zeros(1000, bool), "b": jnp.ones(1000, bool)}
    kept = ModalityDropout(0.9).apply({}, here, True, rngs={"dropout": jax.random.key(0)})
    assert not kept["a"].any() and kept["b"].all()
