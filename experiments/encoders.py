"""Encoders of single modalities: features, posters and plots to vectors [N, d]."""

import flax.linen as nn
import jax
import jax.numpy as jnp


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
    """A small convolutional network: posters [N, h, w, 3] uint8 → [N, features].

    Strided 3×3 convolutions with group normalisation, then the mean over positions.
    """

    features: int
    channels: tuple[int, ...] = (16, 32, 64, 128)
    dropout: float = 0.3

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        x = images.astype(jnp.float32) / 127.5 - 1
        for channels in self.channels:
            x = nn.Conv(channels, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(jnp.mean(x, axis=(1, 2)))
        return nn.Dense(self.features)(x)


class PlotEncoder(nn.Module):
    """A small text encoder: tokens [N, T] int32, 0 where there is none → [N, features].

    Word embeddings, a convolution over three words, and the largest value over the positions that
    hold a word (Kim, 2014).
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
        x = nn.relu(nn.Conv(self.features, (3,))(x))
        x = jnp.max(jnp.where(word, x, 0), axis=1)
        return nn.Dense(self.features)(nn.Dropout(self.dropout, deterministic=not train)(x))
