"""Encoders of single modalities, and plots as tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.datasets.text import PADDING, UNKNOWN, build_vocabulary, encode, words
from experiments.encoders import MaxoutMLP, PlotEncoder, PosterCNN


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
        expected = []
        for row in tokens:
            vectors = [np.zeros(5), *(p["Embed_0"]["embedding"][t] for t in row if t), np.zeros(5)]
            best = np.zeros(6)
            for i in range(1, len(vectors) - 1):
                window = sum(vectors[i + k - 1] @ p["Conv_0"]["kernel"][k] for k in range(3))
                best = np.maximum(best, window + p["Conv_0"]["bias"])
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
