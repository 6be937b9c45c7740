"""`experiments.datasets.vqa_regions`: every published form comes to the same table."""

import base64
import pickle

import h5py
import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.datasets.vqa_regions import load_regions

RNG = np.random.default_rng(0)
WIDTH = 6
PICTURES = {9: 3, 42: 5, 7: 1}  # number: regions
FEATURES = {n: RNG.standard_normal((count, WIDTH)).astype("f4") for n, count in PICTURES.items()}
BOXES = {n: RNG.uniform(0, 100, (count, 4)).astype("f4") for n, count in PICTURES.items()}
SIZE = 200, 100  # width and height of a picture, in pixels


def base64_of(x):
    return base64.b64encode(x.tobytes()).decode()


def tsv_line(n, lxmert=False, **changed):
    cells = {"num_boxes": PICTURES[n], "boxes": base64_of(BOXES[n])}
    cells |= {"features": base64_of(FEATURES[n])} | changed
    w, h = SIZE
    first = [f"COCO_val2014_{n:012}", h, w, "", "", "", ""] if lxmert else [n, w, h]
    return "\t".join(map(str, [*first, *cells.values()])) + "\n"


def write_tsv(folder, lxmert=False):
    path = folder / "val.tsv"
    path.write_text("".join(tsv_line(n, lxmert) for n in PICTURES))
    return path


def write_npz(folder, transposed=False, told=True):
    w, h = SIZE
    for n in PICTURES:
        sizes = {"bbox": BOXES[n], "image_w": w, "image_h": h} if told else {"bbox": BOXES[n]}
        x = FEATURES[n].T if transposed else FEATURES[n]
        np.savez(folder / f"COCO_val2014_{n:012}.jpg.npz", x=x, **sizes)
    return folder


def write_hdf5(folder):
    """Which has as many regions in every picture; here all have those of picture 9."""
    with h5py.File(folder / "val36.hdf5", "w") as file:
        file["image_features"] = np.stack([FEATURES[9]] * len(PICTURES))
        file["spatial_features"] = np.stack([np.hstack([BOXES[9] / (*SIZE, *SIZE)] * 2)] * 3)
    rows = {n: i for i, n in enumerate(PICTURES)}
    (folder / "val36_imgid2idx.pkl").write_bytes(pickle.dumps(rows))
    return folder / "val36.hdf5"


@pytest.fixture
def load(tmp_path):
    def load(*files):
        return load_regions(files, tmp_path / "cache")

    return load


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "given").mkdir()
    return tmp_path / "given"


@pytest.mark.parametrize(
    "write",
    [
        write_tsv,
        lambda folder: write_tsv(folder, lxmert=True),
        write_npz,
        lambda folder: write_npz(folder, transposed=True),
    ],
    ids=["bottom-up", "LXMERT", "rows", "columns"],
)
def test_forms(load, folder, write):
    regions = load(write(folder))
    assert regions.most == 5 and regions.features.dtype == np.float16
    images = np.array([7, 9, 7, 42])
    gathered, counts = regions.gather(regions.rows_of(images))
    assert counts.tolist() == [1, 3, 1, 5]
    for n, x, count in zip(images.tolist(), gathered, counts, strict=True):
        np.testing.assert_array_equal(x[:count], FEATURES[n].astype(np.float16))
        assert not x[count:].any()
        first, row = regions.ends[regions.rows[n]], slice(None)
        boxes = regions.boxes[first : first + count][row]
        np.testing.assert_allclose(boxes, BOXES[n] / (*SIZE, *SIZE), rtol=1e-6)


def test_hdf5(load, folder):
    regions = load(write_hdf5(folder))
    x, counts = regions.gather(regions.rows_of(np.array([42])))
    np.testing.assert_array_equal(x[0], FEATURES[9].astype(np.float16))
    assert counts.tolist() == [3]
    np.testing.assert_allclose(regions.boxes[:3], BOXES[9] / (*SIZE, *SIZE), rtol=1e-6)


def test_boxes_without_a_size_are_not_told(load, folder):
    assert np.isnan(load(write_npz(folder, told=False)).boxes).all()


def test_made_once_and_anew_where_it_is_damaged(load, folder, tmp_path, capsys):
    path = write_tsv(folder)
    before = np.array(load(path).features)
    assert "preparing" in capsys.readouterr().out
    load(path)
    assert "preparing" not in capsys.readouterr().out
    (table,) = tmp_path.glob("cache/vqa_regions/*/regions.f16")
    table.write_bytes(table.read_bytes()[:-2])
    np.testing.assert_array_equal(load(path).features, before)
    assert "regions.f16 is damaged" in capsys.readouterr().err


def cut(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def without_index(folder):
    path = write_hdf5(folder)
    (folder / "val36_imgid2idx.pkl").unlink()
    return path


def text(content, name="val.tsv"):
    def write(folder):
        (folder / name).write_text(content)
        return folder / name

    return write


def arrays(**given):
    def write(folder):
        np.savez(folder / "COCO_9.npz", **given)
        return folder

    return write


@pytest.mark.parametrize(
    ("write", "complaint"),
    [
        (text(""), "val.tsv holds no picture"),
        (text("1\t2\n"), "line 1: 2 columns; expected 6 or 10"),
        (text(tsv_line(9) + tsv_line(7, features="AAA")), "line 2: it is cut short, or damaged"),
        (text(tsv_line(9, num_boxes=2)), "line 1: it is cut short, or damaged"),
        (text(tsv_line(9) + tsv_line(9)), "picture 9: val.tsv has that picture, too"),
        (text(tsv_line(9, features=base64_of(np.full((3, 4), np.nan, "f4")))), "are not finite"),
        (
            text(tsv_line(9) + tsv_line(7, features=base64_of(np.zeros(4, "f4")))),
            r"picture 7: features are \[1, 4\]; expected \[regions, 6\], as before",
        ),
        (text("", "x.txt"), "x.txt: expected region features, .tsv, .npz or .hdf5"),
        (lambda folder: folder / "none", "none is not there"),
        (lambda folder: folder, "holds no .npz files"),
        (arrays(y=np.zeros(3)), "no 'x' with the features of regions"),
        (arrays(x=np.array([None])), "is damaged, or holds objects"),
        (arrays(x=np.zeros(3)), r"features are \[3\]"),
        (lambda folder: cut(next(write_npz(folder).iterdir())), "cannot be read, or is cut short"),
        (lambda folder: cut(write_hdf5(folder)), "cannot be read, or is cut short"),
        (without_index, "needs val36_imgid2idx.pkl beside it"),
    ],
)
def test_what_is_no_features_is_refused(load, folder, tmp_path, write, complaint):
    with pytest.raises(InputError, match=complaint):
        load(write(folder))
    assert not list(tmp_path.glob("cache/vqa_regions/*"))  # nothing half made is left


def test_a_missing_picture_is_named(load, folder):
    regions = load(write_tsv(folder))
    with pytest.raises(InputError, match="no features of 1 of 2 pictures, 8 first"):
        regions.rows_of(np.array([9, 8, 9]))
