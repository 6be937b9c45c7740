"""MM-IMDB as plots and posters: reader and TFDS builder of the raw folder.

    split.json           {"train": [id, …], "dev": […], "test": […]}
    dataset/ID.json      "plot": list of texts (the longest is used), "genres": list of names
    dataset/ID.jpeg      the poster

Label rule: News, Adult, Talk-Show and Reality-TV are dropped, and with them the movies that have no
other genre. 23 genres are left, ordered from the most to the least frequent (ties by name).
Posters are cropped about their centre to the wanted proportions and resized (bilinear).
"""

import functools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from experiments.common.errors import InputError
from experiments.common.files import read_json
from experiments.datasets.prepared import SourceBuilder

DROPPED = frozenset({"News", "Adult", "Talk-Show", "Reality-TV"})
GENRES = 23
_SPLITS = {"train": "train", "validation": "dev", "test": "test"}


class RawSource(NamedTuple):
    """What to read, and the size to give the posters: (height, width)."""

    folder: Path
    image_size: tuple[int, int]


class Movie(NamedTuple):
    """One movie after the label rule; ``poster`` is a path."""

    id: str
    plot: str
    genres: frozenset[str]
    poster: Path


class MmimdbRaw(SourceBuilder):
    """TFDS builder; ``source`` is a RawSource."""

    VERSION = tfds.core.Version("1.0.0")
    source: RawSource

    @functools.cached_property
    def movies(self) -> dict[str, list[Movie]]:
        return read_movies(self.source.folder)

    @functools.cached_property
    def genres(self) -> tuple[str, ...]:
        return genre_names(self.source.folder, self.movies)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="MM-IMDB: plots and posters, 23 genres (multi-label).",
            homepage="https://github.com/johnarevalo/gmu-mmimdb",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "text": tfds.features.Text(),
                    "image": tfds.features.Image(
                        shape=(*self.source.image_size, 3), encoding_format="png"
                    ),
                    "genres": tfds.features.Tensor(shape=(GENRES,), dtype=np.int8),
                }
            ),
            metadata=tfds.core.MetadataDict({"classes": list(self.genres)}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
        return {split: self._generate_examples(self.movies[split]) for split in self.movies}

    def _generate_examples(self, movies: list[Movie]) -> Iterator[tuple[int, dict]]:
        for row, movie in enumerate(movies):
            yield (
                row,
                {
                    "id": movie.id,
                    "text": movie.plot,
                    "image": read_poster(movie.poster, self.source.image_size),
                    "genres": np.array([name in movie.genres for name in self.genres], np.int8),
                },
            )


def read_movies(folder: Path) -> dict[str, list[Movie]]:
    """The movies of each split that keep a genre."""
    ids = _read_split(folder / "split.json")
    movies = {
        split: [_read_movie(folder / "dataset", name) for name in names]
        for split, names in ids.items()
    }
    kept = {split: [movie for movie in movies[split] if movie.genres] for split in movies}
    for split in kept:
        lost = len(movies[split]) - len(kept[split])
        if lost:
            print(
                f"{folder}: {lost} {split} movies have no genre but {', '.join(sorted(DROPPED))}; "
                "left out",
                file=sys.stderr,
            )
        if not kept[split]:
            raise InputError(f"{folder / 'split.json'}: no {split} movie with a genre is left")
    return kept


def genre_names(folder: Path, movies: dict[str, list[Movie]]) -> tuple[str, ...]:
    """All genres, the most frequent first; anything but 23 is an InputError."""
    counts = Counter(
        genre for split in movies.values() for movie in split for genre in movie.genres
    )
    names = sorted(counts, key=lambda name: (-counts[name], name))
    if len(names) != GENRES:
        raise InputError(
            f"{folder} has {len(names)} genres ({', '.join(names)}); expected {GENRES} besides "
            f"{', '.join(sorted(DROPPED))}: is the data complete?"
        )
    return tuple(names)


def read_poster(path: Path, size: tuple[int, int]) -> Image.Image:
    """The poster as RGB, cropped and resized to (height, width)."""
    height, width = size
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            return ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BILINEAR)
    # Pillow reports some broken files as SyntaxError, and absurd sizes by an error of its own.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"the poster {path} cannot be read ({error}): get it again") from error


def _read_split(path: Path) -> dict[str, list[str]]:
    content = _read_json(path)
    missing = [name for name in _SPLITS.values() if not isinstance(content.get(name), list)]
    if missing:
        raise InputError(
            f"{path} has no list {', '.join(missing)}; it has {', '.join(content) or 'nothing'}"
        )
    ids = {split: [str(movie) for movie in content[name]] for split, name in _SPLITS.items()}
    counts = Counter(movie for names in ids.values() for movie in names)
    outside = [movie for movie in counts if Path(movie).name != movie]
    if outside:
        raise InputError(f"{path} names the movie {outside[0]!r}, which is no file of dataset/")
    twice = [movie for movie, count in counts.items() if count > 1]
    if twice:
        raise InputError(f"{path} names {len(twice)} movies more than once, the first: {twice[0]}")
    return ids


def _read_movie(folder: Path, name: str) -> Movie:
    path = folder / f"{name}.json"
    content = _read_json(path)
    plots, genres = _texts(path, content, "plot"), _texts(path, content, "genres")
    if not any(plot.strip() for plot in plots):
        raise InputError(f"{path}: there is no text under 'plot'")
    return Movie(name, max(plots, key=len), frozenset(genres) - DROPPED, path.with_suffix(".jpeg"))


def _read_json(path: Path) -> dict:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def _texts(path: Path, content: dict, key: str) -> list[str]:
    value = content.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise InputError(f"{path}: expected a list of texts under {key!r}, found {kind}")
    return value
