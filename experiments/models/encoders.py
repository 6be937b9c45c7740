"""Encoders of single modalities: features, posters and plots to vectors [N, d], or `Tokens`."""

import itertools
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.models.tokens import Tokens


class MaxoutMLP(nn.Module):
    """Maxout layers, each with dropout and batch normalisation before it: [N, d] → [N, widths[-1]].

    A maxout layer is max_p (W_p x + b_p) over its `pieces` (Goodfellow et al., 2013), the encoder
    of features in Arevalo et al., 2017.
    """

    widths: tuple[int, ...]
    dropout: float = 0.3
    pieces: int = 2

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for width in self.widths:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
            x = nn.Dense(width * self.pieces)(x)
            x = jnp.max(x.reshape(*x.shape[:-1], width, self.pieces), axis=-1)
        return x


class PosterCNN(nn.Module):
    """A small convolutional network: posters [N, h, w, 3] uint8 → [N, features], or `Tokens`.

    Strided 3×3 convolutions with group normalisation, then the mean over positions; with `tokens`
    every position for itself, marked by a learned vector.
    """

    features: int
    channels: tuple[int, ...] = (16, 32, 64, 128)
    dropout: float = 0.3
    tokens: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array | Tokens:
        x = images.astype(jnp.float32) / 127.5 - 1
        for channels in self.channels:
            x = Halved(channels, groups=8)(x)
        x = Places()(x) if self.tokens else jnp.mean(x, axis=(1, 2))
        x = nn.Dense(self.features)(nn.Dropout(self.dropout, deterministic=not train)(x))
        return Tokens(x, jnp.ones(x.shape[:2], bool)) if self.tokens else x


class Convolution(nn.Module):
    """Over three positions an axis, 0 beyond the ends: [N, …, d] → [N, …, channels].

    With stride 2 an axis is half as long, rounded up. It is one product with shifted copies, since
    XLA's convolutions take 25 times as long on a CPU within a loop, as an epoch is.
    """

    channels: int
    stride: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes, step = x.ndim - 2, self.stride
        padded = jnp.pad(x, [(0, 0), *[(1, 1)] * axes, (0, 0)])
        shifts = itertools.product(range(3), repeat=axes)
        windows = [
            tuple(slice(i, i + n, step) for i, n in zip(shift, x.shape[1:-1], strict=True))
            for shift in shifts
        ]
        x = jnp.concatenate([padded[:, *window] for window in windows], axis=-1)
        return nn.Dense(self.channels, use_bias=self.use_bias)(x)


class Halved(nn.Module):
    """A `Convolution` of stride 2, group normalisation, ReLU: [N, …, d] → [N, …, channels]."""

    channels: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Convolution(self.channels, stride=2, use_bias=False)(x)
        return nn.relu(nn.GroupNorm(self.groups)(x))


class Places(nn.Module):
    """Positions [N, …, d] → [N, T, d] in rows, each marked by a learned vector of its own."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x += self.param("places", nn.initializers.normal(0.02), x.shape[1:])
        return x.reshape(len(x), -1, x.shape[-1])


class TokenEncoder(nn.Module):
    """A state for every token: tokens [N, T] int32, 0 where there is none → [N, T, features].

    Word embeddings and a convolution over three words; 0 where there is no word.
    """

    vocabulary: int
    features: int
    embedding: int = 128
    dropout: float = 0.3

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool) -> jax.Array:
        word = (tokens > 0)[..., None]
        x = jnp.where(word, nn.Embed(self.vocabulary, self.embedding)(tokens), 0)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.relu(Convolution(self.features)(x))
        return jnp.where(word, x, 0)


class PlotEncoder(nn.Module):
    """A small text encoder: words [N, T] int32, 0 where there is none → [N, features], or `Tokens`.

    The largest value over the positions that hold a word, of a `TokenEncoder` (Kim, 2014); with
    `tokens` every position for itself.
    """

    vocabulary: int
    features: int
    embedding: int = 128
    dropout: float = 0.3
    tokens: bool = False

    @nn.compact
    def __call__(self, words: jax.Array, train: bool) -> jax.Array | Tokens:
        encoder = TokenEncoder(self.vocabulary, self.features, self.embedding, self.dropout)
        x = encoder(words, train)
        x = x if self.tokens else jnp.max(x, axis=1)
        x = nn.Dense(self.features)(nn.Dropout(self.dropout, deterministic=not train)(x))
        return Tokens(x, words > 0) if self.tokens else x


class UtteranceEncoder(nn.Module):
    """An utterance among its neighbours: [N, W, d], itself in the middle → [N, features], or with
    `tokens` → `Tokens`, the h_j below through a linear layer, each marked by its place.

    h_j = ReLU(W x_j + b) for every utterance; the result is W' h_own + W'' Σ_j a_j h_j + b', with
    a = softmax over the neighbours that are there of a learned logit for each place. NaN marks a
    place where there is none. Without neighbours (W = 1) the second term is absent.

    In training the middle utterances of other rows are mixed into every x_j, by `mix_rows`: for
    features that are better in training than they will be later.
    """

    features: int
    hidden: int
    dropout: float = 0.3
    corruption: float = 0.0
    tokens: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array | Tokens:
        middle, there = x.shape[1] // 2, ~jnp.isnan(x).any(axis=-1)
        x = jnp.where(there[..., None], x, 0)
        if train and self.corruption:
            every, own = x.reshape(-1, x.shape[-1]), x[:, middle]
            x = mix_rows(self.make_rng("dropout"), every, own, self.corruption).reshape(x.shape)
        h = nn.relu(nn.Dense(self.hidden)(x))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        if self.tokens:
            return Tokens(nn.Dense(self.features)(Places()(h)), there)
        out = nn.Dense(self.features)(h[:, middle])
        if middle == 0:
            return out
        logits = self.param("places", nn.initializers.zeros, x.shape[1:2])
        neighbours = there.at[:, middle].set(False)
        weights = neighbours * jax.nn.softmax(jnp.where(neighbours, logits, -1e9))
        around = jnp.einsum("nw,nwd->nd", weights, h)
        return out + nn.Dense(self.features, use_bias=False)(around)


def mix_rows(key: jax.Array, x: jax.Array, others: jax.Array, share: float) -> jax.Array:
    """(1 − λ) x + λ x′ for every row x of [N, …], with x′ drawn from others [K, …].

    λ is uniform in the widest interval within 0 … 1 around its mean, the share. With 0.5, where it
    may be anything, what told one of two classes for certain tells it in about three rows of four.
    What is NaN in x′ is not mixed in.
    """
    whose, how_much = jax.random.split(key)
    rows = jax.random.randint(whose, (len(x),), 0, len(others))
    reach = min(share, 1 - share)
    shape = (len(x), *(1,) * (x.ndim - 1))
    mixed = jax.random.uniform(how_much, shape, minval=share - reach, maxval=share + reach)
    change = mixed * (others[rows] - x)
    return x + jnp.where(jnp.isnan(change), 0, change)


Positions = Literal["ordered", "mean"]
WAVELENGTHS = (4, 16, 64, 256, 1024)  # positions
COARSE = {1: 64, 2: 4}  # by number of axes, so many positions along each are left to be read


class FeatureEncoder(nn.Module):
    """Features of any shape, [N, …, d] → [N, features], or with `tokens` → `Tokens`.

    [N, d]: linear → ReLU → dropout → linear. Sequences [N, T, d] and images [N, H, W, d] go through
    `PositionEncoder`; with `positions="mean"`, and with more axes, every position for itself
    through what [N, d] goes through. What is left of an image is then read position by position, of
    all else the mean over positions, unless `tokens` keeps them. A NaN is not known, and counts as
    0; a position that is all NaN is not there.
    """

    features: int
    hidden: int
    dropout: float
    positions: Positions = "ordered"
    tokens: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array | Tokens:
        unknown, axes = jnp.isnan(x), x.ndim - 2
        there = ~jnp.all(unknown, axis=-1, keepdims=True)
        x = jnp.where(unknown, 0, x)
        drop = nn.Dropout(self.dropout, deterministic=not train)
        ordered = self.positions == "ordered" and axes in COARSE
        image, tokens = ordered and axes == 2, self.tokens and axes > 0
        if ordered:
            h, there = PositionEncoder(-(-self.hidden // 2))(x, there)
        else:
            h = drop(nn.relu(nn.Dense(self.hidden)(x)))
        if tokens:
            h = Places()(h) if image else h.reshape(len(h), -1, h.shape[-1])
            there = there.reshape(len(there), -1, 1)
        else:
            h = h.reshape(len(h), -1) if image else mean_over_positions(h, there)
        read = nn.Dense(self.features)(drop(h) if ordered else h)
        return Tokens(read, there[..., 0]) if tokens else read


class PositionEncoder(nn.Module):
    """Sequences [N, T, d] or images [N, H, W, d] → [N, …, channels], where order tells, and which
    positions of those there are, [N, …, 1].

    Two convolutions over three positions (an axis), each with ReLU, or more; of stride 2 while an
    axis is longer than COARSE. A sequence carries sines and cosines of its positions at WAVELENGTHS
    (Vaswani et al., 2017), or a mean could not tell first from last. Attention did no better on
    sequences, and took three times as long.

    `there` [N, …, 1] says which positions there are; the others change nothing.
    """

    channels: int

    @nn.compact
    def __call__(self, x: jax.Array, there: jax.Array) -> tuple[jax.Array, jax.Array]:
        axes = x.ndim - 2
        if axes == 1:
            x = jnp.concatenate([x, jnp.broadcast_to(waves(x.shape[1]), (*x.shape[:2], 10))], -1)
        h, done = jnp.where(there, x, 0), 0
        while done < 2 or max(h.shape[1:-1]) > COARSE[axes]:
            stride = 2 if max(h.shape[1:-1]) > COARSE[axes] else 1
            h = nn.relu(Convolution(self.channels, stride)(h))
            there = nn.max_pool(there, (stride,) * axes, (stride,) * axes, "SAME")
            h, done = jnp.where(there, h, 0), done + 1
        return h, there


def mean_over_positions(x: jax.Array, there: jax.Array) -> jax.Array:
    """[N, …, d] → [N, d], over the positions that are there; 0 where none is."""
    positions = range(1, x.ndim - 1)
    count = jnp.maximum(jnp.sum(there, axis=positions), 1)
    return jnp.sum(x * there, axis=positions) / count


def waves(length: int) -> jax.Array:
    """[length, 2 · WAVELENGTHS], sine and cosine of 2π t / λ for every position t."""
    angle = 2 * jnp.pi * jnp.arange(length)[:, None] / jnp.asarray(WAVELENGTHS)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)
