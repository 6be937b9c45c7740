"""Features of a picture's regions, from the files they are published in to one table.

    *.tsv     a line a picture, the columns of bottom-up attention or of LXMERT; boxes and features
              are base64 of float32 [n, 4] and [n, d]
    *.npz     a file a picture, named after it: "x" [n, d] or [d, n], "bbox" [n, 4] and, where they
              are told, "image_h" and "image_w"
    *.hdf5    "image_features" [N, n, d], "image_bb" [N, n, 4], and beside it NAME_imgid2idx.pkl,
              {number of the picture: row}

The table is made once, in the cache: regions of all pictures one after another, [Σ n, d] float16 in
a file that is mapped into memory, so pictures with few regions take little room. A picture of 36
regions of 2,048 takes 147 kB, VQA v2's 123,287 of training and validation 18 GB.

Sources: Anderson et al., "Bottom-Up and Top-Down Attention", 2018; Tan and Bansal, "LXMERT", 2019;
Yu et al., "Deep Modular Co-Attention Networks", 2019, whose published features these are.
"""

import base64
import binascii
import csv
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from experiments.common.errors import InputError
from experiments.datasets.pickles import read_pickle
from experiments.datasets.prepared import fingerprint, prepared_folder

TABLE, INDEX, VERSION = "regions.f16", "index.npz", 1
COLUMNS = {  # of a tsv, by how many there are
    6: ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features"),
    10: (
        "img_id",
        "img_h",
        "img_w",
        "objects_id",
        "objects_conf",
        "attrs_id",
        "attrs_conf",
        "num_boxes",
        "boxes",
        "features",
    ),
}


class Picture(NamedTuple):
    """What a file says of one picture.

    Attributes:
      image: its number.
      features: [n, d].
      boxes: [n, 4] x1, y1, x2, y2, as shares of width and height; NaN where they are not told.
    """

    image: int
    features: np.ndarray
    boxes: np.ndarray


class Regions(NamedTuple):
    """The table of M pictures.

    Attributes:
      features: [Σ n, d] float16, mapped into memory.
      boxes: [Σ n, 4] float32, as in `Picture`.
      ends: [M + 1] int64; the regions of picture i are those from ends[i] to ends[i + 1].
      rows: {number of a picture: i}.
    """

    features: np.ndarray
    boxes: np.ndarray
    ends: np.ndarray
    rows: dict[int, int]

    @property
    def most(self) -> int:
        """R, the largest number of regions of a picture."""
        return int(np.diff(self.ends).max())

    def rows_of(self, images: np.ndarray) -> np.ndarray:
        """[N] int32, where the pictures with these numbers are.

        Raises:
          InputError: some are not there.
        """
        missing = [image for image in np.unique(images).tolist() if image not in self.rows]
        if missing:
            raise InputError(
                f"there are no features of {len(missing):,} of {len(np.unique(images)):,} "
                f"pictures, {missing[0]} first; give the files of the questions' split"
            )
        return np.array([self.rows[image] for image in images.tolist()], np.int32)

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features [B, R, d] float16 of rows [B], zero beyond a picture's own, and counts [B]."""
        counts = np.diff(self.ends)[rows].astype(np.int32)
        out = np.zeros((len(rows), self.most, self.features.shape[1]), np.float16)
        for regions, row, count in zip(out, rows, counts, strict=True):
            regions[:count] = self.features[self.ends[row] : self.ends[row] + count]
        return out, counts


def load_regions(files: Sequence[Path], cache_dir: Path | None = None) -> Regions:
    """The table of the pictures in these files, and in the .npz files of folders among them.

    Raises:
      InputError: a file cannot be read, is cut short or holds no such features; pictures differ in
        the width of their features, or one is there twice.
    """
    files = [path for given in files for path in _files(given)]
    key = fingerprint(files, VERSION)
    home = prepared_folder(lambda folder: _write(folder, files), "vqa_regions", key, cache_dir)
    with np.load(home / INDEX) as index:
        images, ends, boxes = index["images"], index["ends"], index["boxes"]
        shape = int(ends[-1]), int(index["width"])
    features = np.memmap(home / TABLE, np.float16, "r", shape=shape)
    return Regions(features, boxes, ends, {image: i for i, image in enumerate(images.tolist())})


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(f"{path} is not there; expected region features, .tsv, .npz or .hdf5")
    found = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not found:
        raise InputError(f"{path} holds no .npz files; expected one for every picture")
    return found


def _write(folder: Path, files: Sequence[Path]) -> Path:
    images: dict[int, Path] = {}
    boxes, ends, width = [], [0], 0
    with (folder / TABLE).open("wb") as table:
        for path in files:
            for picture in _pictures(path):
                _check(picture, path, width, images.get(picture.image))
                images[picture.image], width = path, picture.features.shape[1]
                table.write(np.ascontiguousarray(picture.features, np.float16).tobytes())
                boxes.append(np.asarray(picture.boxes, np.float32))
                ends.append(ends[-1] + len(picture.features))
                if len(images) % 1000 == 0:
                    print(f"\r{len(images):,} pictures", end="", file=sys.stderr)
    if not images:
        raise InputError(f"{files[0]} holds no picture")
    found, shares = np.array(list(images)), np.concatenate(boxes)
    np.savez(folder / INDEX, images=found, ends=np.array(ends), boxes=shares, width=width)
    return folder


def _check(picture: Picture, path: Path, width: int, before: Path | None) -> None:
    shape = picture.features.shape
    where = f"{path}, picture {picture.image}"
    if before is not None:
        raise InputError(f"{where}: {before.name} has that picture, too")
    if len(shape) != 2 or not all(shape) or shape[1] != (width or shape[1]):
        expected = f"[regions, {width}], as before" if width else "[regions, width]"
        raise InputError(f"{where}: features are {list(shape)}; expected {expected}")
    if picture.boxes.shape != (shape[0], 4):
        raise InputError(f"{where}: {shape[0]} regions and boxes {list(picture.boxes.shape)}")
    if not np.isfinite(picture.features).all():
        raise InputError(f"{where}: some features are not finite")


def _pictures(path: Path) -> Iterator[Picture]:
    readers = {".tsv": _of_tsv, ".npz": _of_npz, ".hdf5": _of_hdf5, ".h5": _of_hdf5}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: expected region features, .tsv, .npz or .hdf5")
    try:
        yield from reader(path)
    except (OSError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read, or is cut short: {error}") from error


def _number(name: str, path: Path) -> int:
    """Of a picture: 9 from COCO_train2014_000000000009.jpg, and from 9."""
    digits = re.findall(r"\d+", name)
    if not digits:
        raise InputError(f"{path}: {name!r} tells no picture's number")
    return int(digits[-1])


def _shares(boxes: np.ndarray, width: float, height: float) -> np.ndarray:
    return boxes / np.array([width, height, width, height])


# --- tsv ---------------------------------------------------------------------------------------


def _of_tsv(path: Path) -> Iterator[Picture]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="ascii", errors="replace", newline="") as file:
        for number, line in enumerate(csv.reader(file, delimiter="\t"), 1):
            names = COLUMNS.get(len(line))
            if names is None:
                known = " or ".join(map(str, COLUMNS))
                raise InputError(f"{path}, line {number}: {len(line)} columns; expected {known}")
            yield _of_line(dict(zip(names, line, strict=True)), f"{path}, line {number}", path)


def _of_line(line: dict[str, str], where: str, path: Path) -> Picture:
    try:
        name = line.get("image_id") or line["img_id"]
        size = (float(line.get(f"image_{s}") or line[f"img_{s}"]) for s in "wh")
        count = int(line["num_boxes"])
        boxes, features = (
            np.frombuffer(base64.b64decode(line[column], validate=True), np.float32)
            for column in ("boxes", "features")
        )
        boxes = _shares(boxes.reshape(count, 4), *size)
        return Picture(_number(name, path), features.reshape(count, -1), boxes)
    except (KeyError, ValueError, binascii.Error) as error:
        raise InputError(f"{where}: it is cut short, or damaged ({error})") from error


# --- npz ---------------------------------------------------------------------------------------


def _of_npz(path: Path) -> Iterator[Picture]:
    with path.open("rb") as data, np.load(data) as file:
        if "x" not in file:
            raise InputError(f"{path} has {sorted(file)}, no 'x' with the features of regions")
        try:
            x = np.asarray(file["x"], np.float32)
            told = {name: file[name] for name in ("bbox", "image_h", "image_w") if name in file}
        except ValueError as error:
            raise InputError(f"{path} is damaged, or holds objects: {error}") from error
    boxes = told.get("bbox")
    if x.ndim == 2 and boxes is not None and x.shape[0] != len(boxes) == x.shape[1]:
        x = x.T  # as MCAN's authors publish them
    if boxes is None or len(told) < 3:
        boxes = np.full((len(x), 4), np.nan)
    else:
        boxes = _shares(boxes, float(told["image_w"]), float(told["image_h"]))
    yield Picture(_number(path.name.split(".")[0], path), x, boxes)


# --- hdf5 --------------------------------------------------------------------------------------


def _of_hdf5(path: Path) -> Iterator[Picture]:
    pickled = path.with_name(f"{path.stem}_imgid2idx.pkl")
    if not pickled.exists():
        raise InputError(f"{path} needs {pickled.name} beside it, which tells its pictures")
    rows = read_pickle(pickled)
    with h5py.File(path) as file:
        if "image_features" not in file:
            raise InputError(f"{path} has {sorted(file)}, no 'image_features'")
        features, spatial = file["image_features"], file.get("spatial_features")
        if not isinstance(rows, dict) or any(not 0 <= row < len(features) for row in rows.values()):
            raise InputError(f"{pickled} is no dict {{picture: row}} of the rows of {path.name}")
        for image, row in sorted(rows.items(), key=lambda item: item[1]):
            x = features[row]
            boxes = np.full((len(x), 4), np.nan) if spatial is None else spatial[row][:, :4]
            yield Picture(int(image), x, boxes)
