"""Pytrees as matrices and back, and what is refused as a state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax.state import check_state, describe, ravel, unraveler, working_dtype


class Pair(NamedTuple):
    left: jax.Array
    right: tuple


def state():
    """Three samples of a nested state: a scalar, a vector and a [2, 2] array each."""
    scalar = jnp.array([1.0, 2.0, 3.0])
    vector = 10.0 + jnp.arange(6.0).reshape(3, 2)
    array = 100.0 + jnp.arange(12.0).reshape(3, 2, 2)
    return Pair(vector, ({"array": array, "scalar": scalar}, None))


def test_row_b_is_sample_b():
    want = [
        [10, 11, 100, 101, 102, 103, 1],
        [12, 13, 104, 105, 106, 107, 2],
        [14, 15, 108, 109, 110, 111, 3],
    ]
    np.testing.assert_array_equal(ravel(state()), want)


def test_unravel_gives_structure_shapes_and_values_back():
    z = state()
    back = unraveler(z)(ravel(z))
    assert jax.tree.structure(back) == jax.tree.structure(z)
    jax.tree.map(np.testing.assert_array_equal, back, z)
    other = unraveler(z)(2 * ravel(z))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 2 * y), other, z)


def test_every_leaf_keeps_its_dtype_and_the_matrix_has_the_widest(x64):
    z = {
        "brain": jnp.full((2, 1), 1.5, jnp.bfloat16),
        "half": jnp.full((2, 1), 2.5, jnp.float16),
        "double": jnp.full((2, 1), 1 / 3, jnp.float64),
    }
    assert ravel(z).dtype == working_dtype(z) == jnp.float64
    back = unraveler(z)(ravel(z))
    assert jax.tree.map(lambda x: x.dtype, back) == jax.tree.map(lambda x: x.dtype, z)
    jax.tree.map(np.testing.assert_array_equal, back, z)
    for narrow in ("brain", "half"):
        assert working_dtype(z[narrow]) == ravel({"z": z[narrow]}).dtype == jnp.float32


def test_describe():
    assert describe({"a": jnp.zeros((2, 3))}) == "{a: float32[2, 3]}"
    assert describe((jnp.zeros(2, jnp.bfloat16), None)) == "(bfloat16[2], None)"
    assert describe(jnp.zeros((), int)) == "int32[]"


@pytest.mark.parametrize("z", [state(), jnp.zeros((4, 2), jnp.bfloat16), (jnp.zeros(1),)])
def test_states_that_are_accepted(z):
    check_state(z)


@pytest.mark.parametrize(
    ("z", "message"),
    [
        ({}, "no arrays"),
        (None, "no arrays"),
        ({"n": jnp.zeros((2, 3), jnp.int32)}, r"int32\[2, 3\].*floating"),
        (jnp.zeros((2, 3), bool), r"bool\[2, 3\].*floating"),
        (jnp.zeros((2, 3), jnp.complex64), r"complex64\[2, 3\].*real"),
        (jnp.zeros(()), r"float32\[\].*batch axis"),
        ({"a": jnp.zeros((2, 3)), "b": jnp.zeros((3, 3))}, r"\[2, 3\].*\[3, 3\].*batch axis"),
        ((jnp.zeros((2, 3)), jnp.zeros(())), r"\[2, 3\].*\[\].*batch axis"),
    ],
)
def test_states_that_are_refused(z, message):
    with pytest.raises(ValueError, match=message):
        check_state(z)
