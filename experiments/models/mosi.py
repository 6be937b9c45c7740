"""The two models of `experiments.mosi`, and what they minimise."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.datasets import mosi
from experiments.models.encoders import TokenEncoder, UtteranceEncoder
from experiments.models.tokens import Tokens, fuse, takes_positions
from experiments.training.task import Prediction


class UtterancesModel(nn.Module):
    """An encoder per modality → fusion → linear: {modality: [N, W, d_i]} → logits [N, 2].

    `corruption` has the shares of text, audio and video.
    """

    fusion: nn.Module
    corruption: tuple[float, float, float]
    features: int
    hidden: int
    dropout: float

    @nn.compact
    def __call__(
        self, inputs: dict[str, jax.Array], train: bool = False, **start: Any
    ) -> Prediction:
        encoded, tokens = {}, takes_positions(self.fusion)
        sizes = self.features, self.hidden, self.dropout
        for modality, share in zip(mosi.MODALITIES, self.corruption, strict=True):
            encoder = UtteranceEncoder(*sizes, share, tokens, name=f"encode_{modality}")
            encoded[modality] = encoder(inputs[modality], train)
        out = fuse(self.fusion, encoded, train=train, **start)
        return Prediction(nn.Dense(2, name="head")(out.fused), out)


class AlignedModel(nn.Module):
    """Encoders → fusion at every position → mean → linear: {modality: [N, 50, …]} → [N, 1].

    "text" are tokens, 0 where there is none, or states [N, 50, d], which are 0 there. The mean is
    over the positions that hold a token. A fusion of positions has all of these at once, and needs
    no mean.
    """

    fusion: nn.Module
    vocabulary: int
    features: int
    dropout: float

    @nn.compact
    def __call__(
        self, inputs: dict[str, jax.Array], train: bool = False, **start: Any
    ) -> Prediction:
        text = inputs["text"]
        if text.ndim == 2:
            there = text > 0
            encoder = TokenEncoder(self.vocabulary, self.features, dropout=self.dropout)
            encoded = {"text": encoder(text, train)}
        else:
            there = jnp.any(text != 0, axis=-1)
            text = nn.Dropout(self.dropout, deterministic=not train)(text)
            encoded = {"text": nn.Dense(self.features, name="encode_text")(text)}
        if "audio" in inputs:
            encoded["audio"] = nn.Dense(self.features, name="encode_audio")(inputs["audio"])
        head = nn.Dense(1, name="head")
        if takes_positions(self.fusion):
            tokens = {name: Tokens(x, there) for name, x in encoded.items()}
            out = fuse(self.fusion, tokens, train=train, **start)
            return Prediction(head(out.fused), out)
        encoded = {name: jnp.where(there[..., None], x, 0) for name, x in encoded.items()}
        out = self.fusion(encoded, train=train, **start)
        return Prediction(head(jnp.mean(out.fused, axis=1, where=there[..., None])), out)


def half_squared_error(prediction: Prediction, labels: jax.Array) -> jax.Array:
    return 0.5 * jnp.mean((prediction.logits[:, 0] - labels) ** 2)


def scores(logits: jax.Array) -> jax.Array:
    return logits[:, 0]
