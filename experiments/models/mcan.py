"""Deep modular co-attention over a picture's regions and a question's words, and its fusion."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_fusion_jax.layers import layer_norm
from experiments.models.tokens import Tokens, fuse, takes_positions
from experiments.models.vqa import Place, fuse_alone
from experiments.training.task import Prediction


class MCAN(nn.Module):
    r"""{"image" [N, R, w], NaN where no region is, "question" [N, T] int32} → logits [N, answers].

    Words go through an LSTM and L layers of self-attention; regions, after a linear layer, through
    L layers of self-attention and attention to the words. Each side then becomes one vector,
    `AttentionFlat`. A fusion of vectors takes the place of the sum at a `place`:

    late: of the two vectors, $\mathrm{LN}(\mathrm{fusion}(r, w))$, where MCAN has LN(r + w).
    middle: of every region after its layers and the words' vector, before regions become one.
    early: of every region before its layers and a vector of the LSTM's states.

    Middle and early, every region is a sample of its own. A fusion of positions takes the place of
    all layers of attention.

    Attributes:
      features: d, the width; heads: of the attention, a divisor of it.
      layers: L.
      embedding: width of the words' vectors.
      dropout: rate within the layers.

    Source: Yu et al., "Deep Modular Co-Attention Networks for Visual Question Answering", 2019, §3.
    Their widths: d = 512, 8 heads, L = 6, embedding 300, vectors of 1,024 where ours are d wide.
    """

    fusion: nn.Module
    answers: int
    vocabulary: int
    features: int
    layers: int = 6
    heads: int = 8
    embedding: int = 300
    dropout: float = 0.1
    place: Place = "late"

    def setup(self) -> None:
        d = self.features
        self.embed = nn.Embed(self.vocabulary, self.embedding)
        self.read = nn.RNN(nn.OptimizedLSTMCell(d))
        self.see = nn.Dense(d)
        self.norm, self.head = layer_norm(), nn.Dense(self.answers)
        if takes_positions(self.fusion):
            return
        options = d, self.heads, self.dropout
        self.of_words = [CoAttention(*options) for _ in range(self.layers)]
        self.of_regions = [CoAttention(*options) for _ in range(self.layers)]
        self.flat_words, self.flat_regions = AttentionFlat(d), AttentionFlat(d)
        self.flat_asked = AttentionFlat(d)

    def __call__(
        self, inputs: dict[str, jax.Array], train: bool = False, **start: Any
    ) -> Prediction:
        question, image = inputs["question"], inputs["image"]
        asked, seen = question > 0, jnp.isfinite(image[..., 0])
        states: Any = self.read(self.embed(question), seq_lengths=jnp.sum(asked, axis=1))
        words = jnp.where(asked[..., None], states, 0)
        regions = self.see(jnp.where(seen[..., None], image, 0).astype(jnp.float32))
        if takes_positions(self.fusion):
            tokens = {"image": Tokens(regions, seen), "question": Tokens(words, asked)}
            out = fuse(self.fusion, tokens, train=train, **start)
            return Prediction(self.head(out.fused), out)
        if self.place == "early":
            vector = self.flat_asked(words, asked)
            out, regions = fuse_alone(self.fusion, regions, vector, seen, train=train, **start)
        for layer in self.of_words:
            words = layer(words, asked, None, None, train)
        for layer in self.of_regions:
            regions = layer(regions, seen, words, asked, train)
        vector = self.flat_words(words, asked)
        if self.place == "middle":
            out, regions = fuse_alone(self.fusion, regions, vector, seen, train=train, **start)
        fused = self.flat_regions(regions, seen)
        if self.place == "early":
            fused = fused + vector
        if self.place == "late":
            out = self.fusion({"image": fused, "question": vector}, train=train, **start)
            fused = out.fused
        return Prediction(self.head(self.norm(fused)), out)


class CoAttention(nn.Module):
    """Self-attention, attention to the other side where there is one, and an MLP, each with what it
    is given added and normalised: [N, T, d] → [N, T, d]."""

    features: int
    heads: int
    dropout: float

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        there: jax.Array,
        other: jax.Array | None,
        other_there: jax.Array | None,
        train: bool,
    ) -> jax.Array:
        drop = nn.Dropout(self.dropout, deterministic=not train)

        def attend(x: jax.Array, to: jax.Array, there: jax.Array, name: str) -> jax.Array:
            attention = nn.MultiHeadDotProductAttention(
                self.heads, dropout_rate=self.dropout, deterministic=not train, name=name
            )
            return attention(x, to, mask=there[:, None, None])

        x = layer_norm()(x + drop(attend(x, x, there, "self")))
        if other is not None and other_there is not None:
            x = layer_norm()(x + drop(attend(x, other, other_there, "guided")))
        hidden = drop(nn.relu(nn.Dense(4 * self.features)(x)))
        x = layer_norm()(x + drop(nn.Dense(self.features)(hidden)))
        return jnp.where(there[..., None], x, 0)


class AttentionFlat(nn.Module):
    r"""One vector of positions: $W ∑_t a_t x_t$ with a = softmax of an MLP of each, [N, T, d] → [N,
    d], over the positions that are there."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array, there: jax.Array) -> jax.Array:
        score = nn.Dense(1)(nn.relu(nn.Dense(self.features)(x)))[..., 0]
        weight = jnp.where(there, nn.softmax(jnp.where(there, score, -1e9)), 0)
        self.sow("intermediates", "weight", weight)
        return nn.Dense(self.features)(jnp.einsum("nt,ntd->nd", weight, x))
