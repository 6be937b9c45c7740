"""The MM-IMDB sample: synthetic, in the layout of the real HDF5 file, with a known best score.

Every genre k has a label y_k (independent, with prevalences from 0.5 down to 0.03) and two latent
bits: t_k shows in the text, v_k in the image.

    joint genres (odd k):    v_k is a fair coin, t_k = v_k XOR y_k: either alone says nothing
    shared genres (even k):  t_k is y_k flipped with probability 0.10, v_k with 0.14

    text  = Q_t (A_t (2t - 1) + S_t ε) + R_t ξ                300 wide
    image = softplus(Q_v (A_v (2v - 1) + S_v ε) + R_v ξ)      4096 wide, positive like VGG's

with orthonormal columns in Q, standard normal ε and ξ, A/S = 3.5 and R = S/10. Softplus can be
undone, and off the columns of Q there is only noise, so the posterior has a closed form. Predicting
a genre iff its posterior exceeds 1/2 scores, by direct integration:

                micro-F1  macro-F1
    both          0.922     0.901
    text          0.542     0.242
    image         0.474     0.170

A movie may have no genre at all (about 1 in 100). Pixels, word sequences and ids say nothing.
"""

import functools
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from experiments.common.errors import naming_full_disk
from experiments.datasets.mmimdb_hdf5 import (
    FILE_NAME,
    IMAGE_WIDTH,
    TEXT_WIDTH,
    fuel_split,
)

VERSION = 1  # part of the file's folder name: raise it when anything generated here changes
GENRE_NAMES = (
    "Drama", "Comedy", "Romance", "Thriller", "Crime", "Action", "Adventure", "Horror",
    "Documentary", "Mystery", "Sci-Fi", "Fantasy", "Family", "Biography", "War", "History", "Music",
    "Animation", "Musical", "Western", "Sport", "Short", "Film-Noir",
)  # fmt: skip
K = len(GENRE_NAMES)
PREVALENCE = np.geomspace(0.5, 0.03, K)
JOINT = np.arange(K) % 2 == 1
TEXT_FLIP, IMAGE_FLIP = 0.10, 0.14
SEPARATION, OFF_PLANE = 3.5, 0.1  # A/S and R/S
TEXT_SCALE, IMAGE_SCALE = 0.1, 2.6  # S: word2vec means have an RMS near 0.1, VGG features near 1
_SEED = 2306
_BLOCK = 4096  # rows drawn and written at once, which bounds the memory of a large sample


class Scores(NamedTuple):
    """Micro- and macro-averaged F1 over the genres."""

    micro: float
    macro: float


class Rows(NamedTuple):
    """Generated movies."""

    text: np.ndarray  # [N, 300] float32
    image: np.ndarray  # [N, 4096] float32
    labels: np.ndarray  # [N, 23] bool


def sample_file(
    folder: Path, train: int = 2400, validation: int = 400, test: int = 800, seed: int = _SEED
) -> Path:
    """The sample as an HDF5 file somewhere under ``folder``; written if it is not there yet."""
    path = folder / f"v{VERSION}-{train}-{validation}-{test}-{seed}" / FILE_NAME
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (
            naming_full_disk(path),
            tempfile.TemporaryDirectory(prefix="incomplete-", dir=folder) as scratch,
        ):
            _write(Path(scratch) / FILE_NAME, (train, validation, test), seed)
            path.parent.mkdir(exist_ok=True)
            (Path(scratch) / FILE_NAME).replace(path)
    return path


def generate(rows: int, rng: np.random.Generator) -> Rows:
    """Draw movies from the process described above."""
    labels = rng.random((rows, K)) < PREVALENCE
    image_bits = np.where(JOINT, rng.random((rows, K)) < 0.5, _flip(labels, IMAGE_FLIP, rng))
    text_bits = np.where(JOINT, image_bits ^ labels, _flip(labels, TEXT_FLIP, rng))
    text = _embed(text_bits, TEXT_WIDTH, TEXT_SCALE, rng)
    image = np.logaddexp(_embed(image_bits, IMAGE_WIDTH, IMAGE_SCALE, rng), np.float32(0))
    return Rows(text, image, labels)


def bayes_posterior(text: np.ndarray | None, image: np.ndarray | None) -> np.ndarray:
    """P(y_k = 1 | what is given), [N, 23]; ``None`` for a modality that is not seen."""
    given = text if text is not None else image
    if given is None:
        raise ValueError("give text, image or both")
    nothing = np.ones((len(given), K, 2))
    seen_text = nothing if text is None else _bit_likelihood(text, TEXT_SCALE)
    seen_image = nothing
    if image is not None:
        seen_image = _bit_likelihood(_softplus_inverse(image), IMAGE_SCALE)
    joint = np.einsum("kytv,nkt,nkv->nky", _bit_table(), seen_text, seen_image)
    return joint[..., 1] / joint.sum(axis=-1)


def bayes_optimal_scores(text: bool = True, image: bool = True) -> Scores:
    """F1 of the rule ``posterior > 1/2``, integrated over what the modalities can show."""
    table = _bit_table()
    seen_text = _grid_likelihood() if text else np.ones((2, 1))
    seen_image = _grid_likelihood() if image else np.ones((2, 1))
    mass = np.einsum("kytv,tg,vh->kygh", table, seen_text, seen_image)
    # A tie, as a joint genre of prevalence 1/2 would give to one modality, is predicted absent.
    predicted = mass[:, 1] > mass[:, 0] * (1 + 1e-9)
    true_positive = (mass[:, 1] * predicted).sum(axis=(1, 2))
    false_positive = (mass[:, 0] * predicted).sum(axis=(1, 2))
    twice, total = 2 * true_positive, true_positive + false_positive + PREVALENCE
    return Scores(micro=float(twice.sum() / total.sum()), macro=float(np.mean(twice / total)))


def _flip(bits: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    return bits ^ (rng.random(bits.shape) < probability)


@functools.cache
def _directions(width: int) -> np.ndarray:
    """Q [width, 23], the same for every draw."""
    gaussian = np.random.default_rng(width).standard_normal((width, K))
    return np.linalg.qr(gaussian)[0].astype(np.float32)


def _embed(bits: np.ndarray, width: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    """scale · (Q (SEPARATION (2 bits - 1) + ε) + OFF_PLANE ξ), [N, width] float32."""
    inside = SEPARATION * (2.0 * bits - 1) + rng.standard_normal(bits.shape)
    noise = rng.standard_normal((len(bits), width), dtype=np.float32)
    return scale * (inside.astype(np.float32) @ _directions(width).T + OFF_PLANE * noise)


def _bit_likelihood(features: np.ndarray, scale: float) -> np.ndarray:
    """p(features | bit), up to a factor, [N, 23, 2]: a Gaussian along each column of Q."""
    along = (features.astype(np.float64) @ _directions(features.shape[1])) / scale
    distance = along[..., None] - SEPARATION * np.array([-1.0, 1.0])
    exponent = -0.5 * distance**2 / (1 + OFF_PLANE**2)
    return np.exp(exponent - exponent.max(axis=-1, keepdims=True))


def _grid_likelihood() -> np.ndarray:
    """p(position | bit) · step on a grid of positions along a column of Q, [2, G]."""
    deviation = np.sqrt(1 + OFF_PLANE**2)
    grid, step = np.linspace(-SEPARATION - 7, SEPARATION + 7, 601, retstep=True)
    distance = (grid - SEPARATION * np.array([[-1.0], [1.0]])) / deviation
    return np.exp(-0.5 * distance**2) / (deviation * np.sqrt(2 * np.pi)) * step


def _bit_table() -> np.ndarray:
    """P(y, t, v) of every genre, [23, 2, 2, 2]."""
    y, t, v = np.indices((2, 2, 2))
    joint = 0.5 * ((t ^ v) == y)
    shared = np.where(t == y, 1 - TEXT_FLIP, TEXT_FLIP) * np.where(
        v == y, 1 - IMAGE_FLIP, IMAGE_FLIP
    )
    prior = np.where(y == 1, PREVALENCE[:, None, None, None], 1 - PREVALENCE[:, None, None, None])
    return prior * np.where(JOINT[:, None, None, None], joint, shared)


def _softplus_inverse(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return values + np.log(-np.expm1(-values))


def _write(path: Path, sizes: tuple[int, int, int], seed: int) -> None:
    rng, total = np.random.default_rng(seed), sum(sizes)
    with h5py.File(path, "w") as file:
        for start in range(0, total, _BLOCK):
            _write_rows(file, slice(start, min(start + _BLOCK, total)), total, rng)
        train, validation, _ = np.cumsum(sizes).tolist()
        spans = {
            "train": (0, train),
            "validation": (train, validation),
            "test": (validation, total),
        }
        file.attrs["split"] = fuel_split(spans, tuple(file))


def _write_rows(file: h5py.File, rows: slice, total: int, rng: np.random.Generator) -> None:
    """Draw these rows of every array, and make the arrays, of `total` rows, with the first."""
    count = rows.stop - rows.start
    movies = generate(count, rng)

    def write(key: str, values: np.ndarray) -> None:
        shape = (total, *values.shape[1:])
        file.require_dataset(key, shape, values.dtype)[rows] = values

    write("features", movies.text)
    write("vgg_features", movies.image)
    write("genres", movies.labels.astype(np.int32))
    file["genres"].attrs["target_names"] = json.dumps(GENRE_NAMES)
    write("images", rng.integers(0, 256, (count, 3, 8, 5), dtype=np.int32))
    write("imdb_ids", np.array([f"{i:07d}" for i in range(rows.start, rows.stop)], dtype="S7"))
    words = file.require_dataset("sequences", (total,), h5py.vlen_dtype(np.int32))
    for i, length in enumerate(rng.integers(5, 20, count), rows.start):
        words[i] = rng.integers(1, 1000, length, dtype=np.int32)
