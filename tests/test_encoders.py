"""Encoders of single modalities, and plots as tokens."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.datasets.text import PADDING, UNKNOWN, build_vocabulary, encode, words
from experiments.models.encoders import (
    Convolution,
    FeatureEncoder,
    MaxoutMLP,
    PlotEncoder,
    PosterCNN,
    TokenEncoder,
    UtteranceEncoder,
    mix_rows,
)


def trained(module, inputs):
    """Variables that look trained: no zero biases, no unit scales, running statistics of data."""
    variables = module.init(jax.random.key(0), inputs, False)
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda x: x + 0.3 * rng.random(x.shape, np.float32), variables)
    return moved


@pytest.fixture(scope="module")
def maxout():
    x = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    module = MaxoutMLP((6, 4), dropout=0.5, pieces=3)
    return module, trained(module, x), x


@pytest.fixture(scope="module")
def plots():
    tokens = np.array([[5, 3, 9, 2], [7, 0, 0, 0], [4, 6, 0, 0], [0, 0, 0, 0]], np.int32)
    module = PlotEncoder(vocabulary=10, features=6, embedding=5)
    return module, trained(module, tokens), tokens


class TestMaxoutMLP:
    def test_evaluation_equals_numpy(self, maxout):
        module, variables, x = maxout
        params, running = variables["params"], variables["batch_stats"]
        expected = x.astype(np.float64)
        for i, width in enumerate((6, 4)):
            norm, mean = params[f"BatchNorm_{i}"], running[f"BatchNorm_{i}"]["mean"]
            deviation = np.sqrt(running[f"BatchNorm_{i}"]["var"] + 1e-5)
            expected = (expected - mean) / deviation * norm["scale"] + norm["bias"]
            dense = params[f"Dense_{i}"]
            assert dense["kernel"].shape == (expected.shape[1], 3 * width)
            # Unit j of the layer is the largest of the columns 3 j, 3 j + 1 and 3 j + 2.
            columns = expected @ np.asarray(dense["kernel"], np.float64) + dense["bias"]
            pieces = [columns[:, 3 * j : 3 * j + 3].max(axis=1) for j in range(width)]
            expected = np.stack(pieces, axis=1)
        got = module.apply(variables, x, False)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)

    def test_training_normalises_by_the_batch_and_moves_the_running_statistics(self, maxout):
        module, variables, x = maxout
        module = module.clone(dropout=0.0)
        far = 100 + 7 * x  # batch normalisation undoes the move, running statistics would not
        out, near = (
            module.apply(variables, batch, True, mutable=["batch_stats"]) for batch in (far, x)
        )
        np.testing.assert_allclose(out[0], near[0], rtol=1e-3, atol=1e-3)
        before = variables["batch_stats"]["BatchNorm_0"]["mean"]
        after = out[1]["batch_stats"]["BatchNorm_0"]["mean"]
        np.testing.assert_allclose(after, 0.9 * before + 0.1 * far.mean(axis=0), rtol=1e-5)

    def test_dropout_acts_in_training_only(self, maxout):
        module, variables, x = maxout

        def run(seed, train):
            rngs = {"dropout": jax.random.key(seed)}
            return module.apply(variables, x, train, rngs=rngs, mutable=["batch_stats"])[0]

        assert not jnp.array_equal(run(0, True), run(1, True))
        assert jnp.array_equal(run(0, False), run(1, False))


class TestPosterCNN:
    @pytest.mark.parametrize("size", [(96, 64), (33, 17), (2, 2)])
    def test_posters_of_any_size(self, size):
        posters = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)
        module = PosterCNN(7, channels=(8, 16))
        shape = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), posters, False))
        out, variables = shape
        assert (out.shape, out.dtype) == ((3, 7), jnp.float32)
        assert variables["params"]["Dense_0"]["kernel"].shape == (16, 7)

    def test_a_poster_does_not_see_the_others_and_colours_count(self):
        posters = np.random.default_rng(0).integers(0, 256, (4, 16, 12, 3), np.uint8)
        module = PosterCNN(5, channels=(8, 8))
        variables = module.init(jax.random.key(0), posters, False)
        run = jax.jit(lambda x: module.apply(variables, x, False))
        out = np.asarray(run(posters))
        np.testing.assert_allclose(run(posters[[0, 0, 0, 0]]), out[[0, 0, 0, 0]], atol=1e-5)
        swapped = run(posters[..., ::-1])
        assert np.abs(swapped - out).max() > 1e-3


class TestPlotEncoder:
    @pytest.mark.parametrize("extra", [0, 1, 7])
    def test_padding_changes_nothing(self, plots, extra):
        module, variables, tokens = plots
        out = module.apply(variables, tokens, False)
        for row, expected in zip(tokens, out, strict=True):
            words = np.pad(row[row > 0], (0, extra))[None]
            alone = module.apply(variables, words, False)[0] if words.size else expected
            np.testing.assert_allclose(alone, expected, atol=1e-6)

    def test_words_and_their_order_change_the_result(self, plots):
        module, variables, tokens = plots
        out = module.apply(variables, tokens, False)
        assert out.shape == (4, 6) and np.isfinite(out).all()
        other = tokens.copy()
        other[0] = other[0, ::-1]  # the same words backwards
        other[2, 1] = 8
        changed = np.abs(module.apply(variables, other, False) - out).max(axis=1)
        assert changed[0] > 1e-4 and changed[2] > 1e-4
        np.testing.assert_allclose(changed[[1, 3]], 0, atol=1e-6)

    def test_equals_numpy(self, plots):
        """Convolution over three words, ReLU, largest value over the words, linear."""
        module, variables, tokens = plots
        p = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
        token, expected = p["TokenEncoder_0"], []
        conv = token["Convolution_0"]["Dense_0"]
        kernel = conv["kernel"].reshape(3, 5, 6)
        for row in tokens:
            vectors = [
                np.zeros(5),
                *(token["Embed_0"]["embedding"][t] for t in row if t),
                np.zeros(5),
            ]
            best = np.zeros(6)
            for i in range(1, len(vectors) - 1):
                window = sum(vectors[i + k - 1] @ kernel[k] for k in range(3))
                best = np.maximum(best, window + conv["bias"])
            expected.append(best @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
        np.testing.assert_allclose(module.apply(variables, tokens, False), expected, atol=1e-5)


class TestText:
    def test_words(self):
        assert words("It's a DÉJÀ-vu: 2001's Sci_Fi, isn't it?") == [
            "it's", "a", "déjà", "vu", "2001's", "sci", "fi", "isn't", "it",
        ]  # fmt: skip
        assert words(" … 'quoted' — !") == ["quoted"]

    def test_most_frequent_words_first_then_by_alphabet(self):
        texts = ["the cat the dog", "The bird, the cat.", "a dog"]
        expected = {"the": 2, "cat": 3, "dog": 4, "a": 5, "bird": 6}
        assert build_vocabulary(texts, 100) == expected
        assert build_vocabulary(reversed(texts), 100) == expected
        assert list(build_vocabulary(texts, 100)) == list(expected)

    def test_size_counts_the_two_special_ids(self):
        texts = ["the cat the dog", "The bird, the cat.", "a dog"]
        assert build_vocabulary(texts, 4) == {"the": 2, "cat": 3}
        assert build_vocabulary(texts, 2) == {}
        assert build_vocabulary(texts, 1) == {}

    def test_encode(self):
        vocabulary = {"the": 2, "cat": 3}
        tokens = encode(["The cat sat on the mat", "", "cat"], vocabulary, 4)
        assert tokens.dtype == np.int32
        assert tokens.tolist() == [[2, 3, UNKNOWN, UNKNOWN], [PADDING] * 4, [3, 0, 0, 0]]


class TestTokenEncoder:
    def test_equals_numpy(self):
        module = TokenEncoder(vocabulary=10, features=6, embedding=5)
        tokens = np.array([[5, 3, 9, 2], [7, 0, 0, 0], [4, 6, 0, 0]], np.int32)
        variables = trained(module, tokens)
        params = variables["params"]
        embedding = np.asarray(params["Embed_0"]["embedding"])
        conv = params["Convolution_0"]["Dense_0"]
        kernel = np.asarray(conv["kernel"]).reshape(3, 5, 6)
        got = module.apply(variables, tokens, False)
        for row, ids in zip(got, tokens, strict=True):
            words = [embedding[i] if i else np.zeros(5) for i in (0, *ids, 0)]
            for t in range(4):
                h = sum(words[t + k] @ kernel[k] for k in range(3)) + conv["bias"]
                expected = np.maximum(h, 0) if ids[t] else np.zeros(6)
                np.testing.assert_allclose(row[t], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def utterances():
    x = np.random.default_rng(0).standard_normal((4, 5, 3)).astype(np.float32)
    x[0, :2] = x[1, 4] = x[2, [0, 1, 3, 4]] = np.nan  # where the recording has no more
    module = UtteranceEncoder(features=6, hidden=4)
    return module, trained(module, x), x


class TestUtteranceEncoder:
    def test_equals_numpy(self, utterances):
        module, variables, x = utterances
        hidden, own, around = (variables["params"][f"Dense_{i}"] for i in range(3))
        logits = np.asarray(variables["params"]["places"])
        assert logits.shape == (5,) and np.ptp(logits) > 0
        for got, row in zip(module.apply(variables, x, False), x, strict=True):
            h = np.maximum(row @ hidden["kernel"] + hidden["bias"], 0)
            expected = h[2] @ own["kernel"] + own["bias"]
            others = [j for j in (0, 1, 3, 4) if not np.isnan(row[j]).any()]
            if others:
                a = np.exp(logits[others]) / np.exp(logits[others]).sum()
                expected = expected + (a @ h[others]) @ around["kernel"]
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)

    def test_gradients_are_finite_where_utterances_are_missing(self, utterances):
        module, variables, x = utterances

        def total(variables, x):
            return module.apply(variables, x, False).sum()

        for leaf in jax.tree.leaves(jax.grad(total)(variables, x)):
            assert np.isfinite(leaf).all()

    def test_alone(self, utterances):
        """Without neighbours there are no parameters for them."""
        module, _, x = utterances
        variables = module.init(jax.random.key(0), x[:, 2:3], False)
        assert set(variables["params"]) == {"Dense_0", "Dense_1"}

    def test_corruption_mixes_in_training_only(self, utterances):
        module, variables, x = utterances
        module = module.clone(dropout=0.0)
        mixed = module.clone(corruption=0.5)
        rngs = {"dropout": jax.random.key(0)}
        clean = module.apply(variables, x, True)
        np.testing.assert_array_equal(clean, mixed.apply(variables, x, False))
        first, other = (
            mixed.apply(variables, x, True, rngs={"dropout": jax.random.key(k)}) for k in (0, 1)
        )
        assert np.isfinite(first).all() and not np.allclose(first, other)
        assert not np.allclose(first, clean)
        one_row = np.repeat(x[2:3], 4, axis=0)  # a mixture of equal rows is that row
        np.testing.assert_allclose(
            mixed.apply(variables, one_row, True, rngs=rngs),
            module.apply(variables, one_row, True),
            rtol=1e-5,
        )


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_mix_rows(share):
    """A row of zeros with rows of ones mixed in shows the weight of those."""
    mixed = mix_rows(jax.random.key(0), jnp.zeros((2000, 4, 3)), jnp.ones((500, 4, 3)), share)
    weights = np.asarray(mixed)[:, 0, 0]
    np.testing.assert_array_equal(mixed, np.broadcast_to(weights[:, None, None], mixed.shape))
    low, high = max(0, 2 * share - 1), min(1, 2 * share)
    assert weights.min() >= low - 1e-6 and weights.max() <= high + 1e-6
    assert weights.mean() == pytest.approx(share, abs=0.02)
    assert np.ptp(weights) >= 0.95 * (high - low)


def test_mix_rows_draws_the_others_alike():
    others = jnp.arange(10.0)[:, None]
    drawn = mix_rows(jax.random.key(0), jnp.zeros((5000, 1)), others, 1.0)
    counts = np.bincount(np.round(np.asarray(drawn).ravel()).astype(int), minlength=10)
    assert (abs(counts - 500) < 120).all()


def test_mix_rows_leaves_alone_what_is_not_known():
    """Neither a value nor a whole row that the other lacks, nor one that is missing itself."""
    x, nan = jnp.array([[1.0, 2.0], [3.0, jnp.nan]]), jnp.nan
    for others in (jnp.full((4, 2), nan), jnp.array([[nan, 7.0]])):
        mixed = np.asarray(mix_rows(jax.random.key(0), x, others, 0.5))
        np.testing.assert_array_equal(mixed[:, 0], x[:, 0])
        assert np.isnan(mixed[1, 1]) and not np.isnan(mixed[0, 1])
        assert (mixed[0, 1] == 2) == np.isnan(others[0, 1])


class TestFeatureEncoder:
    """What a model of a small set sees of the order of positions."""

    @pytest.fixture
    def encoder(self):
        return FeatureEncoder(4, 8, 0.3)

    @pytest.mark.parametrize("shape", [(5,), (7, 3), (130, 3), (6, 5, 2), (9, 17, 2), (2, 2, 2, 3)])
    def test_any_shape(self, encoder, shape):
        x = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
        variables = trained(encoder, x)
        together = encoder.apply(variables, x, False)
        assert together.shape == (3, 4) and np.isfinite(together).all()
        alone = [encoder.apply(variables, x[i : i + 1], False) for i in range(3)]
        np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("shape", [(7, 3), (6, 5, 2)])
    @pytest.mark.parametrize("positions", ["ordered", "mean"])
    def test_the_order_of_positions(self, shape, positions):
        encoder = FeatureEncoder(4, 8, 0.3, positions)
        x = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
        variables = trained(encoder, x)
        one, other = (encoder.apply(variables, part, False) for part in (x, x[:, ::-1]))
        assert np.allclose(one, other, atol=1e-5) is (positions == "mean")

    @pytest.mark.parametrize("length", [6, 40])
    def test_padding_changes_nothing(self, encoder, length):
        rng = np.random.default_rng(0)
        x = rng.standard_normal((20, length, 3)).astype(np.float32)
        x[np.arange(length) >= rng.integers(1, length + 1, 20)[:, None]] = np.nan
        x[3] = np.nan
        longer = np.concatenate([x, np.full((20, 9, 3), np.nan, np.float32)], axis=1)
        variables = trained(encoder, x)
        expected = encoder.apply(variables, x, False)
        np.testing.assert_allclose(encoder.apply(variables, longer, False), expected, atol=1e-5)
        first = encoder.apply(variables, x[:1, : np.sum(~np.isnan(x[0, :, 0]))], False)
        np.testing.assert_allclose(first, expected[:1], atol=1e-5)

    def test_a_hole_in_an_image_is_not_a_black_spot(self, encoder):
        """What is NaN has no gradient, and counts as no value rather than as any."""
        x = np.random.default_rng(0).standard_normal((2, 6, 6, 2)).astype(np.float32)
        x[:, 2:4, 2:4] = np.nan
        variables = trained(encoder, x)
        gradient = jax.grad(lambda x: encoder.apply(variables, x, False).sum())(jnp.asarray(x))
        assert (gradient[:, 2:4, 2:4] == 0).all() and (gradient[:, 0, 0] != 0).any()

    @pytest.mark.parametrize("positions", ["ordered", "mean"])
    @pytest.mark.parametrize(
        ("shape", "count"), [((7, 3), 7), ((130, 3), 33), ((6, 5, 2), 9), ((2, 2, 2, 3), 8)]
    )
    def test_positions_kept_for_a_fusion_of_them(self, positions, shape, count):
        """A row is the same alone; one that ends early says so, and what it lacks is not read."""
        encoder = FeatureEncoder(4, 8, 0.3, positions, tokens=True)
        x = np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)
        x[1, shape[0] // 2 :] = np.nan
        variables = trained(encoder, x)
        tokens, there = encoder.apply(variables, x, False)
        if positions == "ordered" and len(shape) < 4:
            assert tokens.shape[1] == count
        assert there.shape == tokens.shape[:2] and there[0].all() and not there[1].all()
        for row in range(3):
            alone = encoder.apply(variables, x[row : row + 1], False)
            kept = there[row]
            np.testing.assert_allclose(tokens[row][kept], alone.x[0][kept], rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(kept, alone.there[0])

    def test_a_vector_is_no_position(self):
        encoder = FeatureEncoder(4, 8, 0.3, tokens=True)
        x = np.ones((3, 5), np.float32)
        assert encoder.apply(trained(encoder, x), x, False).shape == (3, 4)


@pytest.mark.parametrize("shape", [(2, 7, 3), (2, 8, 3), (2, 6, 5, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_flax_s(shape, stride):
    x, axes = jax.random.normal(jax.random.key(0), shape), len(shape) - 2
    variables = Convolution(4, stride).init(jax.random.key(1), x)
    kernel, bias = (variables["params"]["Dense_0"][name] for name in ("kernel", "bias"))
    convolution = nn.Conv(4, (3,) * axes, stride, padding=1)
    params = {"kernel": kernel.reshape(*[3] * axes, 3, 4), "bias": bias}
    expected = convolution.apply({"params": params}, x)
    np.testing.assert_allclose(Convolution(4, stride).apply(variables, x), expected, atol=1e-5)


class TestTokens:
    """Positions kept: what becomes one vector is read from them, one by one."""

    def test_of_a_poster(self):
        images = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), dtype=np.uint8)
        module = PosterCNN(6, (8, 16), tokens=True)
        params = trained(module, images)["params"]
        tokens = module.apply({"params": params}, images, False)
        assert tokens.x.shape == (2, 8 * 12, 6) and tokens.there.all()
        places = params.pop("Places_0")["places"]
        pooled = PosterCNN(6, (8, 16)).apply({"params": params}, images, False)
        marked = places.mean((0, 1)) @ params["Dense_0"]["kernel"]
        np.testing.assert_allclose(tokens.x.mean(1) - marked, pooled, rtol=1e-4, atol=1e-5)

    def test_of_a_plot(self):
        words = np.array([[5, 3, 9, 2], [7, 0, 0, 0]], np.int32)
        module = PlotEncoder(10, 6, 5, tokens=True)
        params = trained(module, words)["params"]
        tokens = module.apply({"params": params}, words, False)
        np.testing.assert_array_equal(tokens.there, words > 0)
        states = TokenEncoder(10, 6, 5).apply({"params": params["TokenEncoder_0"]}, words, False)
        read = params["Dense_0"]
        np.testing.assert_allclose(tokens.x, states @ read["kernel"] + read["bias"], rtol=1e-5)

    def test_of_utterances(self):
        x = np.random.default_rng(0).standard_normal((2, 3, 5)).astype(np.float32)
        x[1, 2] = np.nan  # there is none
        module = UtteranceEncoder(4, 6, tokens=True)
        params = trained(module, x)["params"]
        tokens = module.apply({"params": params}, x, False)
        assert tokens.there.tolist() == [[True] * 3, [True, True, False]]
        for place in range(3):
            one = {name: params[name] for name in ("Dense_0", "Dense_1")}
            marked = params["Places_0"]["places"][place] @ one["Dense_1"]["kernel"]
            alone = UtteranceEncoder(4, 6).apply({"params": one}, x[:, place : place + 1], False)
            there = ~np.isnan(x[:, place, 0])
            np.testing.assert_allclose(
                (tokens.x[:, place] - marked)[there], alone[there], rtol=1e-4, atol=1e-5
            )
