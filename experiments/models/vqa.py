"""The model of `experiments.vqa`: a picture and a question to an answer, and where they meet."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from deq_fusion_jax import FusionOutput, SolveStats
from experiments.models.encoders import Halved, Places, TokenEncoder, mean_over_positions
from experiments.models.tokens import Tokens, fuse, takes_positions
from experiments.training.task import Prediction

Place = Literal["late", "middle", "early"]


class VQAModel(nn.Module):
    """{"image" [N, 32, 32, 3] uint8, "question" [N, T] int32} → logits [N, answers].

    Convolutions leave 8 × 8 cells of the picture, then 4 × 4; a `TokenEncoder` makes states of the
    words. A fusion of positions takes the 4 × 4 cells and the words. The others take the question
    as one vector, from the mean over words, and meet the picture at a `place`:

    late: its cells as one vector, read one by one.
    middle: every one of 4 × 4 cells; then comes the mean over cells.
    early: every one of 8 × 8 cells; then come the last convolution and the mean.

    Middle and early, a picture is one sample: its cells share a residual, a lift and the statistics
    of group normalisation. With `alone` every cell is a sample of its own.
    """

    fusion: nn.Module
    answers: int
    vocabulary: int
    features: int
    dropout: float
    place: Place = "late"
    alone: bool = False

    def setup(self) -> None:
        d = self.features
        self.encode_question = TokenEncoder(self.vocabulary, d, d, self.dropout)
        self.fine = nn.Sequential([Halved(16, groups=4), Halved(32, groups=4)])
        self.coarse = Halved(d, groups=4)
        self.places = Places()
        self.read_question, self.read_image, self.head = (
            nn.Dense(d),
            nn.Dense(d),
            nn.Dense(self.answers),
        )
        self.drop = nn.Dropout(self.dropout)

    def __call__(
        self, inputs: dict[str, jax.Array], train: bool = False, **start: Any
    ) -> Prediction:
        question = inputs["question"]
        there = question > 0
        words = self.encode_question(question, train)
        cells = self.fine(inputs["image"].astype(jnp.float32) / 127.5 - 1)
        if takes_positions(self.fusion):
            cells = self.places(self.drop(self.coarse(cells), not train))
            every = jnp.ones(cells.shape[:2], bool)
            tokens = {"image": Tokens(cells, every), "question": Tokens(words, there)}
            out = fuse(self.fusion, tokens, train=train, **start)
            return Prediction(self.head(out.fused), out)
        mean = mean_over_positions(words, there[..., None])
        asked = self.read_question(self.drop(mean, not train))
        out, fused = getattr(self, f"_{self.place}")(cells, asked, train, start)
        return Prediction(self.head(fused), out)

    def _late(self, cells: jax.Array, asked: jax.Array, train: bool, start: Any) -> Any:
        cells = self.coarse(cells)
        seen = self.read_image(self.drop(cells.reshape(len(cells), -1), not train))
        out = self.fusion({"image": seen, "question": asked}, train=train, **start)
        return out, out.fused

    def _middle(self, cells: jax.Array, asked: jax.Array, train: bool, start: Any) -> Any:
        cells = self.drop(self.coarse(cells), not train)
        out, cells = self._at_cells(cells, asked, train, start)
        return out, jnp.mean(cells, axis=(1, 2))

    def _early(self, cells: jax.Array, asked: jax.Array, train: bool, start: Any) -> Any:
        out, cells = self._at_cells(self.drop(cells, not train), asked, train, start)
        return out, jnp.mean(self.coarse(cells), axis=(1, 2))

    def _at_cells(
        self, cells: jax.Array, asked: jax.Array, train: bool, start: Any
    ) -> tuple[FusionOutput, jax.Array]:
        """The fusion's output, and what it makes of cells [N, H, W, c] and vectors [N, d]."""
        if self.alone:
            every = jnp.ones(cells.shape[:-1], bool)
            return fuse_alone(self.fusion, cells, asked, every, train=train, **start)
        shape = (*cells.shape[:-1], self.features)
        encoded = {"image": cells, "question": jnp.broadcast_to(asked[:, None, None], shape)}
        out = self.fusion(encoded, train=train, **start)
        return out, out.fused


def fuse_alone(
    fusion: nn.Module, image: jax.Array, question: jax.Array, there: jax.Array, **options: Any
) -> tuple[FusionOutput, jax.Array]:
    """A fusion of every position of a picture, as a sample of its own, and the question.

    Args:
      image: [N, …, c] positions.
      question: [N, d] vectors.
      there: [N, …] bool, which positions there are.

    Returns:
      The output, with gates and statistics by picture, and what the fusion makes of the positions,
      [N, …, d], 0 where none is.
    """
    at_each = question.reshape(len(question), *(1,) * (image.ndim - 2), -1)
    encoded = {
        "image": image.reshape(-1, image.shape[-1]),
        "question": jnp.broadcast_to(at_each, (*image.shape[:-1], question.shape[-1])).reshape(
            -1, question.shape[-1]
        ),
    }
    mask = dict.fromkeys(encoded, there.reshape(-1).astype(jnp.float32))
    out = fusion(encoded, mask, **options)
    fused = out.fused.reshape(*image.shape[:-1], -1)
    gates = jax.tree.map(lambda x: x.reshape(fused.shape), out.gates)
    out = of_pictures(out._replace(gates=gates), len(image))
    return out, jnp.where(there[..., None], fused, 0)


def of_pictures(out: FusionOutput, pictures: int) -> FusionOutput:
    """Statistics and radius of pictures from those of their cells, [pictures · cells]: the worst of
    them; of a trace, the worst of those that were still going on."""

    def cells(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], pictures, -1)

    stats, radius = out.stats, out.spectral_radius
    if stats is not None:
        stats = SolveStats(
            cells(stats.steps).max(-1),
            cells(stats.residual).max(-1),
            cells(stats.converged).all(-1),
            None if stats.trace is None else jnp.nanmax(cells(stats.trace), axis=-1),
            None if stats.status is None else cells(stats.status).max(-1),
        )
    if radius is not None:
        radius = cells(radius).max(-1)
    return out._replace(stats=stats, spectral_radius=radius)
