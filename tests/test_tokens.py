"""Fusion of positions, against NumPy, flax's attention, finite differences, and itself alone."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax import Anderson, TokenFusion
from deq_fusion_jax.baselines import FUSIONS
from deq_fusion_jax.diagnostics import coupling
from deq_fusion_jax.layers import layer_norm
from deq_fusion_jax.token_baselines import CrossAttention, TokensUnrolled
from deq_fusion_jax.token_cell import Attend

SHAPES = {"image": (5, 6), "sound": (3, 8), "text": (4, 7)}
LENGTHS = {"image": [5, 2, 3], "text": [4, 1, 3]}
TOKENS = ("tokens", "tokens_unrolled", "cross_attention")


def inputs_of(seed=0, batch=3, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal((batch, *shape)).astype(dtype) for name, shape in SHAPES.items()
    }


def lengths_of():
    return {name: jnp.array(length) for name, length in LENGTHS.items()}


SLOW = pytest.param("tokens_unrolled", marks=pytest.mark.slow)  # made of the same parts


@pytest.fixture(params=["tokens", "cross_attention", SLOW])
def layer(request):
    """A fusion, its variables, and how it is applied."""
    fusion = FUSIONS[request.param](8)
    if request.param == "tokens":
        fusion = fusion.clone(solver=Anderson(tol=1e-6, max_steps=100))
    variables = fusion.init(jax.random.key(0), inputs_of(), lengths=lengths_of())
    return jax.jit(partial(fusion.apply, variables))


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, atol=tolerance, rtol=tolerance)


class TestNothingChanges:
    """What is not there, and who else is, changes nothing."""

    @pytest.fixture
    def whole(self, layer):
        return layer(inputs_of(), lengths=lengths_of())

    @pytest.mark.parametrize("filling", [0.0, 1e6, np.nan, np.inf])
    def test_what_padding_holds(self, layer, whole, filling):
        inputs = inputs_of()
        for name, length in LENGTHS.items():
            for row, end in enumerate(length):
                inputs[name][row, end:] = filling
        got = layer(inputs, lengths=lengths_of())
        np.testing.assert_array_equal(got.fused, whole.fused)
        for name, z in got.modalities.items():
            np.testing.assert_array_equal(z, whole.modalities[name])
            for row, end in enumerate(LENGTHS.get(name, ())):
                assert not z[row, end:].any()

    def test_how_much_padding_there_is(self, layer, whole):
        padded = {
            name: np.pad(x, ((0, 0), (0, 4), (0, 0)), constant_values=np.nan)
            for name, x in inputs_of().items()
        }
        got = layer(padded, lengths=lengths_of() | {"sound": jnp.full(3, 3)})
        close(got.fused, whole.fused)
        for name, z in whole.modalities.items():
            close(got.modalities[name][:, : z.shape[1]], z)
        if got.stats:
            np.testing.assert_array_equal(got.stats.steps, whole.stats.steps)

    def test_lengths_as_bools(self, layer, whole):
        there = {name: np.arange(SHAPES[name][0]) < x[:, None] for name, x in lengths_of().items()}
        np.testing.assert_array_equal(layer(inputs_of(), lengths=there).fused, whole.fused)

    def test_the_axes_of_positions(self, layer, whole):
        """A grid is its positions row by row."""
        inputs, lengths = inputs_of(), lengths_of()
        inputs["text"] = inputs["text"].reshape(3, 2, 2, 7)
        lengths["text"] = (np.arange(4) < lengths["text"][:, None]).reshape(3, 2, 2)
        np.testing.assert_array_equal(layer(inputs, lengths=lengths).fused, whole.fused)

    def test_the_order_of_modalities(self, layer, whole):
        turned = dict(reversed(inputs_of().items()))
        np.testing.assert_array_equal(layer(turned, lengths=lengths_of()).fused, whole.fused)

    def test_batch_mates(self, layer, whole):
        for row in range(3):
            one = slice(row, row + 1)
            inputs = {name: x[one] for name, x in inputs_of().items()}
            got = layer(inputs, lengths={name: x[one] for name, x in lengths_of().items()})
            close(got.fused, whole.fused[one])
            if got.stats:
                assert got.stats.steps[0] == whole.stats.steps[row]

    def test_the_order_of_positions(self, layer, whole):
        """Nothing but the features tells a position from another."""
        inputs = inputs_of()
        inputs["sound"] = inputs["sound"][:, ::-1]
        got = layer(inputs, lengths=lengths_of())
        close(got.fused, whole.fused)
        close(got.modalities["sound"], whole.modalities["sound"][:, ::-1])

    @pytest.mark.parametrize("how", ["mask", "length", "no positions"])
    def test_a_modality_that_is_missing_is_one_that_was_never_there(self, layer, how):
        inputs, lengths = inputs_of(), lengths_of()
        without = {name: x for name, x in inputs.items() if name != "text"}
        expected = layer(without, lengths={"image": lengths["image"]})
        inputs["text"] = np.full_like(inputs["text"], np.nan)
        if how == "mask":
            mask = {"image": np.ones(3), "sound": np.ones(3), "text": np.zeros(3)}
            got = layer(inputs, mask, lengths=lengths)
        elif how == "length":
            got = layer(inputs, lengths=lengths | {"text": jnp.zeros(3, int)})
        else:
            inputs["text"] = inputs["text"][:, :0]
            got = layer(inputs, lengths={"image": lengths["image"]})
        close(got.fused, expected.fused)
        assert not got.modalities["text"].any()

    def test_nothing_at_all_is_zero(self, layer):
        got = layer(inputs_of(), np.zeros((3, 3)), lengths=lengths_of())
        assert not got.fused.any()


def attention(p, z, others, there, heads=4):
    """Of one sample: z [T, d], others [S, d], there [S]."""
    q, k, v = z @ p["query"]["kernel"], others @ p["key"]["kernel"], others @ p["value"]["kernel"]
    read, width = np.zeros_like(z), z.shape[1] // heads
    for head in range(heads):
        at = slice(head * width, (head + 1) * width)
        logits = q[:, at] @ k[there][:, at].T / np.sqrt(width)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        read[:, at] = weights / weights.sum(axis=1, keepdims=True) @ v[there][:, at]
    return read @ p["out"]["kernel"] + p["out"]["bias"]


def cell_step(params, z, x, there):
    """The formula of `TokenCell` for one sample, in NumPy."""
    new = {}
    for name in z:
        others = [other for other in z if other != name]
        tokens = np.concatenate([z[other] for other in others])
        here = np.concatenate([there[other] for other in others])
        own = attention(params[f"own_{name}"], z[name], z[name], there[name])
        cross = attention(params[f"others_{name}"], z[name], tokens, here)
        widen, narrow = params[f"widen_{name}"], params[f"narrow_{name}"]
        hidden = np.maximum(z[name] @ widen["kernel"] + widen["bias"], 0)
        y = x[name] + own + cross + hidden @ narrow["kernel"] + narrow["bias"]
        centred = y - y.mean(axis=1, keepdims=True)
        normal = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
        norm = params[f"norm_{name}"]
        new[name] = there[name][:, None] * (normal * norm["scale"] + norm["bias"])
    return new


def test_the_formula_in_numpy(x64):
    """The state is a fixed point of the map as written down, and the unroll is its first step."""
    inputs = {
        name: x[..., :1].repeat(8, -1) + x[..., :1] * np.arange(8)
        for name, x in inputs_of(dtype=float).items()
    }
    fusion = TokenFusion(8, lift=0.0, solver=Anderson(tol=1e-12, max_steps=500))
    variables = fusion.init(jax.random.key(0), inputs, lengths=lengths_of())
    out = fusion.apply(variables, inputs, lengths=lengths_of())
    once = TokensUnrolled(8, lift=0.0).apply(variables, inputs, lengths=lengths_of())
    params = jax.tree.map(np.asarray, variables["params"]["cell"])
    for row in range(3):
        there = {
            name: np.arange(len(x[row])) < (LENGTHS[name][row] if name in LENGTHS else 99)
            for name, x in inputs.items()
        }
        x = {name: there[name][:, None] * x[row] for name, x in inputs.items()}
        z = {name: np.asarray(z[row]) for name, z in out.modalities.items()}
        after = cell_step(params, z, x, there)
        first = cell_step(params, x, x, there)
        for name in inputs:
            close(after[name], z[name], 1e-9)
            close(first[name], once.modalities[name][row], 1e-9)


def test_attention_is_that_of_flax(x64):
    z, others = (np.random.default_rng(i).standard_normal((2, 3 + i, 8)) for i in range(2))
    there = np.array([[1, 1, 0, 1], [0, 1, 1, 1]], bool)
    attend = Attend(8)
    variables = attend.init(jax.random.key(0), z, others, there[..., None])
    peer = nn.MultiHeadDotProductAttention(4, use_bias=False)
    params = variables["params"]
    heads = {i: {"kernel": params[i]["kernel"].reshape(8, 4, 2)} for i in ("query", "key", "value")}
    heads["out"] = {"kernel": params["out"]["kernel"].reshape(4, 2, 8)}
    expected = peer.apply({"params": heads}, z, others, mask=there[:, None, None])
    got = attend.apply(variables, z, others, there[..., None])
    close(got, expected + params["out"]["bias"], 1e-12)


@pytest.mark.slow
def test_gradients_are_finite_differences(x64):
    """In every parameter and input, padding and a missing modality included."""
    inputs = inputs_of(dtype=np.float64)
    inputs["image"][1, 2:] = np.nan
    mask = {"image": np.ones(3), "sound": np.array([1, 0, 1]), "text": np.ones(3)}
    fusion = TokenFusion(8, solver=Anderson(tol=1e-13, max_steps=500))
    variables = fusion.init(jax.random.key(1), inputs, lengths=lengths_of())

    @jax.jit
    def loss(variables, inputs):
        out = fusion.apply(variables, inputs, mask, lengths=lengths_of())
        return jnp.sum(jnp.sin(out.fused)) + jnp.sum(out.modalities["text"] ** 3)

    known = {name: np.nan_to_num(x) for name, x in inputs.items()}
    grads = jax.grad(loss, argnums=(0, 1))(variables, inputs)
    rng = np.random.default_rng(0)
    for _ in range(3):
        way = jax.tree.map(lambda x: rng.standard_normal(x.shape), (variables, known))
        ahead, back = (
            loss(*jax.tree.map(lambda x, v, h=h: x + h * v, (variables, known), way))
            for h in (1e-6, -1e-6)
        )
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, v: np.sum(g * v), grads, way)))
        assert slope == pytest.approx(float(ahead - back) / 2e-6, rel=1e-5)
    assert not grads[1]["image"][1, 2:].any() and not grads[1]["sound"][1].any()


@pytest.mark.parametrize("probes", [2, 3, 8])
def test_the_norm_has_its_gradient_for_several_cotangents_at_once(probes):
    """Compiled, against the formula in NumPy; flax's LayerNorm fails this on jaxlib 0.10.2."""
    rng = np.random.default_rng(0)
    x, v = rng.standard_normal((200, 10, 8)), rng.standard_normal((probes, 200, 10, 8))
    norm = layer_norm()
    variables = norm.init(jax.random.key(0), jnp.asarray(x, jnp.float32))

    @jax.jit
    def products(x, v):
        vjp = jax.vjp(lambda x: norm.apply(variables, x), x)[1]
        return jax.vmap(lambda v: vjp(v)[0])(v)

    centred = x - x.mean(-1, keepdims=True)
    size = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    normal = centred / size
    along = (v * normal).mean(-1, keepdims=True) * normal
    expected = (v - v.mean(-1, keepdims=True) - along) / size
    close(products(jnp.asarray(x, jnp.float32), jnp.asarray(v, jnp.float32)), expected, 1e-4)


@pytest.mark.slow
def test_the_jacobian_penalty_does_not_see_padding():
    """Half the positions are padding: the mean over states would be half as large."""
    inputs = inputs_of(batch=200)
    fusion = TokenFusion(8, jacobian_probes=4)
    variables = fusion.init(jax.random.key(0), inputs)
    padded = {name: np.pad(x, ((0, 0), (0, x.shape[1]), (0, 0))) for name, x in inputs.items()}
    lengths = {name: jnp.full(200, x.shape[1]) for name, x in inputs.items()}
    apply = jax.jit(partial(fusion.apply, variables, rngs={"jacobian": jax.random.key(1)}))
    expected = apply(inputs).jacobian_penalty
    got = apply(padded, lengths=lengths).jacobian_penalty
    assert got == pytest.approx(float(expected), rel=0.05)


class TestThatItFuses:
    @pytest.mark.slow
    def test_gates_and_coupling_are_zero_where_the_map_has_closed_itself_off(self, x64):
        inputs = inputs_of(dtype=np.float64)
        fusion = TokenFusion(8, solver=Anderson(tol=1e-12, max_steps=500))
        variables = fusion.init(jax.random.key(0), inputs)

        @jax.jit
        def found(variables):
            out = fusion.apply(variables, inputs)
            states = lambda x: fusion.apply(variables, x).modalities  # noqa: E731
            return out, coupling(states, inputs, key=jax.random.key(1), probes=16)

        out, open_ = found(variables)
        closed = jax.tree.map(lambda x: x, variables)
        for name, params in closed["params"]["cell"].items():
            if name.startswith("others_"):
                params["out"] = jax.tree.map(jnp.zeros_like, params["out"])
        shut, none = found(closed)
        for i in inputs:
            assert (out.gates[i] > 0.01).all() and not shut.gates[i].any()
            for j in inputs:
                assert (none[i][j] > 0).all() == (i == j) and (open_[i][j] > 0).all()

    def test_coupling_of_a_linear_map(self):
        """‖A‖_F for every sample, from 2,000 probes."""
        a = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
        x = {"x": np.ones((5, 3), np.float32), "y": np.ones((5, 2), np.float32)}
        found = coupling(lambda x: {"z": x["x"] @ a.T}, x, key=jax.random.key(0), probes=2000)
        close(found["z"]["x"], np.full(5, np.linalg.norm(a)), 0.05)
        assert not found["z"]["y"].any()


@pytest.mark.parametrize("name", TOKENS)
def test_parameters_are_matched(name):
    inputs = {"image": np.ones((1, 3, 64), np.float32), "text": np.ones((1, 2, 64), np.float32)}
    variables = jax.eval_shape(FUSIONS[name](64).init, jax.random.key(0), inputs)
    count = sum(x.size for x in jax.tree.leaves(variables))
    deq = jax.eval_shape(TokenFusion(64).init, jax.random.key(0), inputs)
    assert count == pytest.approx(sum(x.size for x in jax.tree.leaves(deq)), rel=0.02)


def test_the_equilibrium_is_the_limit_of_the_unroll():
    inputs, lengths = inputs_of(), lengths_of()
    fusion = TokenFusion(8, solver=Anderson(tol=1e-6, max_steps=100))
    variables = fusion.init(jax.random.key(0), inputs, lengths=lengths)
    out = fusion.apply(variables, inputs, lengths=lengths)
    long = TokensUnrolled(8, steps=60).apply(variables, inputs, lengths=lengths)
    close(out.fused, long.fused, 1e-4)
    assert long.stats.converged.all() and out.stats.converged.all()
    assert not TokensUnrolled(8).apply(variables, inputs, lengths=lengths).stats.converged.any()


@pytest.mark.slow
@pytest.mark.parametrize("features", [32, 512])
@pytest.mark.parametrize("positions", [4, 196])
def test_every_scale_converges_at_the_start(features, positions):
    rng = np.random.default_rng(0)
    x = {i: rng.standard_normal((2, positions, features)).astype(np.float32) for i in "ab"}
    fusion = TokenFusion(features, solver=Anderson(tol=1e-3, max_steps=40))
    variables = fusion.init(jax.random.key(0), x)
    apply = jax.jit(fusion.apply)
    for scale in (0.01, 0.1, 1.0, 10.0, 100.0):
        stats = apply(variables, {i: scale * x[i] for i in x}).stats
        assert stats.converged.all(), (scale, stats)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"inputs": {"a": np.ones(3, np.float32)}}, "modality 'a' is float32[3]; expected"),
        ({"inputs": {"a": np.ones((3, 2), int)}}, "expected floating point [3, …, features]"),
        ({"inputs": [1]}, "inputs is a list; expected a dict"),
        ({"lengths": {"c": np.ones(2, int)}}, "lengths are given for ['c']; the modalities are"),
        ({"lengths": {"a": np.ones(3, int)}}, "lengths of 'a' are int"),
        ({"lengths": {"a": np.ones(2)}}, "expected integers [2], or bool [2, 3]"),
        ({"mask": np.ones((2, 3))}, "mask has shape (2, 3); expected (2, 2)"),
    ],
)
def test_what_cannot_be_used_is_refused(changed, complaint):
    x = {"a": np.ones((2, 3, 4), np.float32), "b": np.ones((2, 5, 4), np.float32)}
    with pytest.raises(ValueError) as error:
        TokenFusion(4).init(jax.random.key(0), **({"inputs": x} | changed))
    assert complaint in str(error.value)


@pytest.mark.parametrize("fusion", [TokenFusion(6), CrossAttention(6), TokensUnrolled(8, steps=0)])
def test_options_that_do_not_fit(fusion):
    x = {"a": np.ones((2, 3, 4), np.float32)}
    with pytest.raises(ValueError, match=r"no multiple of heads=4|expected at least 1"):
        fusion.init(jax.random.key(0), x)
