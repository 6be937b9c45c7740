"""MM-IMDB: the synthetic sample and its best score, the HDF5 and raw readers, bad input."""

import json
import shutil

import h5py
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import f1_score

from experiments.common.errors import InputError
from experiments.datasets import mmimdb, prepared
from experiments.datasets import mmimdb_hdf5 as hdf5
from experiments.datasets import mmimdb_sample as sample
from experiments.datasets.precomputed import read_features

SIZES = {"train": 40, "validation": 10, "test": 20}


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    """A small file in the real layout."""
    return sample.sample_file(tmp_path_factory.mktemp("small"), *SIZES.values(), seed=1)


@pytest.fixture
def copy(small_file, tmp_path):
    """A copy to do harm to."""
    return shutil.copy(small_file, tmp_path / hdf5.FILE_NAME)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


class TestSample:
    def test_default_load_is_deterministic_and_labelled(self, tmp_path, monkeypatch):
        first = mmimdb.load(cache_dir=tmp_path / "a")
        assert first.description == "MM-IMDB sample (synthetic)" and first.data == "sample"
        assert first.classes == sample.GENRE_NAMES and len(set(first.classes)) == 23
        monkeypatch.setattr(prepared, "_build", None)  # nothing may be built again
        again = mmimdb.load(cache_dir=tmp_path / "a")
        for split, rows in (("train", 2400), ("validation", 400), ("test", 800)):
            one, two = getattr(first, split), getattr(again, split)
            assert one.inputs["text"].shape == (rows, 300)
            assert one.inputs["image"].shape == (rows, 4096)
            assert one.labels.shape == (rows, 23) and one.labels.dtype == np.float32
            for modality in ("text", "image"):
                assert one.inputs[modality].dtype == np.float32
                np.testing.assert_array_equal(one.inputs[modality], two.inputs[modality])
        prevalence = first.train.labels.mean(axis=0)
        assert np.abs(prevalence - sample.PREVALENCE).max() < 0.04
        rms = {m: np.sqrt(np.mean(x**2)) for m, x in first.train.inputs.items()}
        assert 0.07 < rms["text"] < 0.14 and 0.7 < rms["image"] < 1.4
        assert first.train.inputs["image"].min() > 0

    def test_file_has_the_real_layout_and_is_deterministic(self, small_file, tmp_path):
        other = sample.sample_file(tmp_path, *SIZES.values(), seed=1)
        with h5py.File(small_file) as file, h5py.File(other) as twin:
            expected = {
                "features": ((70, 300), np.float32),
                "vgg_features": ((70, 4096), np.float32),
                "genres": ((70, 23), np.int32),
                "images": ((70, 3, 8, 5), np.int32),
                "imdb_ids": ((70,), np.dtype("S7")),
            }
            for key, (shape, dtype) in expected.items():
                assert (file[key].shape, file[key].dtype) == (shape, dtype), key
                np.testing.assert_array_equal(file[key][:], twin[key][:])
            assert h5py.check_vlen_dtype(file["sequences"].dtype) == np.int32
            assert json.loads(file["genres"].attrs["target_names"]) == list(sample.GENRE_NAMES)
            table = file.attrs["split"]
            fields = ("split", "source", "start", "stop", "indices", "available", "comment")
            assert table.dtype.names == fields
            spans = {(e["split"], e["source"]): (e["start"], e["stop"]) for e in table}
            assert spans[b"dev", b"vgg_features"] == (40, 50) and len(spans) == 3 * 6
            assert not any(e["indices"] for e in table) and table["available"].all()

    def test_large_one_is_drawn_block_by_block(self, small_file, tmp_path, monkeypatch):
        monkeypatch.setattr(sample, "_BLOCK", 32)  # 70 rows: 32, 32 and 6
        path = sample.sample_file(tmp_path / "70", *SIZES.values(), seed=1)
        first = sample.sample_file(tmp_path / "32", 20, 4, 8, seed=1)
        arrays = "features", "vgg_features", "genres", "images", "imdb_ids"
        with h5py.File(path) as file, h5py.File(small_file) as whole, h5py.File(first) as block:
            assert list(file) == list(whole)
            for key in arrays:
                assert (file[key].shape, file[key].dtype) == (whole[key].shape, whole[key].dtype)
                np.testing.assert_array_equal(file[key][:32], block[key][:])
            assert [i.decode() for i in file["imdb_ids"]] == [f"{i:07d}" for i in range(70)]
            assert all(5 <= len(words) < 20 for words in file["sequences"])
            for key in ("features", "vgg_features", "images"):
                assert len(np.unique(file[key][:].reshape(70, -1), axis=0)) == 70
            posterior = sample.bayes_posterior(file["features"][:], file["vgg_features"][:])
            assert ((posterior > 0.5) == file["genres"][:]).mean() > 0.9  # as labelled, each block
        data = mmimdb.load(path, tmp_path)
        assert [len(s.labels) for s in (data.train, data.validation, data.test)] == [40, 10, 20]

    def test_stated_scores_are_the_best_ones(self):
        """Integration, a draw scored with the closed-form posterior, and the docstring agree."""
        movies = sample.generate(6000, np.random.default_rng(5))
        for name, text, image in (("both", 1, 1), ("text", 1, 0), ("image", 0, 1)):
            best = sample.bayes_optimal_scores(bool(text), bool(image))
            assert f"    {name:14}{best.micro:.3f}     {best.macro:.3f}\n" in sample.__doc__
            posterior = sample.bayes_posterior(
                movies.text if text else None, movies.image if image else None
            )
            predicted = posterior > 0.5
            micro = f1_score(movies.labels, predicted, average="micro")
            macro = f1_score(movies.labels, predicted, average="macro", zero_division=0)
            assert abs(micro - best.micro) < 0.01 and abs(macro - best.macro) < 0.02, name
            # A posterior is calibrated: where it says p, a share p of the labels is 1.
            for low in np.arange(0, 1, 0.2):
                here = (posterior >= low) & (posterior < low + 0.2)
                error = movies.labels[here].mean() - posterior[here].mean()
                assert abs(error) < 4 * 0.5 / np.sqrt(here.sum()), (name, low)

    def test_joint_genres_need_both(self):
        movies = sample.generate(3000, np.random.default_rng(6))
        alone = sample.bayes_posterior(movies.text, None)[:, sample.JOINT]
        np.testing.assert_allclose(alone, np.tile(sample.PREVALENCE[sample.JOINT], (3000, 1)))
        both = sample.bayes_posterior(movies.text, movies.image)[:, sample.JOINT]
        assert ((both > 0.5) == movies.labels[:, sample.JOINT]).mean() > 0.99

    def test_there_is_no_raw_sample(self, cache):
        with pytest.raises(InputError, match="the sample has no raw form"):
            mmimdb.load(cache_dir=cache, variant="raw")


class TestFeatures:
    def check(self, data, path, rows):
        with h5py.File(path) as file:
            for split in SIZES:
                got, where = getattr(data, split), rows[split]
                np.testing.assert_array_equal(got.inputs["text"], file["features"][:][where])
                np.testing.assert_array_equal(got.inputs["image"], file["vgg_features"][:][where])
                np.testing.assert_array_equal(got.labels, file["genres"][:][where])

    def contiguous(self):
        edges = np.cumsum([0, *SIZES.values()])
        return {s: np.arange(edges[i], edges[i + 1]) for i, s in enumerate(SIZES)}

    def test_round_trip_from_file_and_folder(self, small_file, cache):
        data = mmimdb.load(small_file, cache)
        assert (data.description, data.data) == ("MM-IMDB", "real")
        self.check(data, small_file, self.contiguous())
        self.check(mmimdb.load(small_file.parent, cache), small_file, self.contiguous())

    def test_split_by_indices(self, copy, cache):
        rows = dict(
            zip(SIZES, np.split(np.random.default_rng(0).permutation(70), [40, 50]), strict=True)
        )
        with h5py.File(copy, "r+") as file:
            table = file.attrs["split"]
            for name in ("train", "dev", "test"):
                split = "validation" if name == "dev" else name
                file[f"rows_{name}"] = rows[split]
                for entry in table[table["split"] == name.encode()]:
                    where = (table["split"] == entry["split"]) & (
                        table["source"] == entry["source"]
                    )
                    table["indices"][where] = file[f"rows_{name}"].ref
            file.attrs["split"] = table.astype(
                [
                    (n, h5py.ref_dtype if n == "indices" else table.dtype[n])
                    for n in table.dtype.names
                ]
            )
        self.check(mmimdb.load(copy, cache), copy, rows)

    def test_published_row_ranges_are_the_fall_back(self, tmp_path):
        shape = {"features": 300, "vgg_features": 4096, "genres": 23}
        with h5py.File(tmp_path / "x.hdf5", "w") as file:
            for key, width in shape.items():  # no data is written: HDF5 stores nothing
                file.create_dataset(key, (25959, width), np.float32)
            file.create_dataset("imdb_ids", (25959,), "S7")
            file["genres"].attrs["target_names"] = list(sample.GENRE_NAMES)
            layout = hdf5.read_layout(file)
        assert {s: (r[0], r[-1] + 1) for s, r in layout.rows.items()} == hdf5.PUBLISHED_ROWS
        assert layout.genres == sample.GENRE_NAMES


def edit(change):
    def harm(path):
        with h5py.File(path, "r+") as file:
            change(file)

    return harm


def reshape(key, width):
    def change(file):
        del file[key]
        file[key] = np.zeros((70, width), np.float32)

    return edit(change)


def set_split(field, row, value):
    def change(file):
        table = file.attrs["split"]
        table[field][row] = value
        kind = [
            (n, h5py.ref_dtype if n == "indices" else table.dtype[n]) for n in table.dtype.names
        ]
        file.attrs["split"] = table.astype(kind)

    return edit(change)


def set_cell(key, row, column, value):
    return edit(lambda file: file[key].__setitem__((row, column), value))


BAD_FILES = {
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:50_000]), "cannot be read.*cut short"),
    "not HDF5": (lambda p: p.write_text("<html>"), "cannot be read as an HDF5 file"),
    "no key": (edit(lambda f: f.__delitem__("vgg_features")), "has no vgg_features: it has"),
    "text width": (reshape("features", 299), r"features has shape \(70, 299\), expected"),
    "image width": (reshape("vgg_features", 512), r"expected \(70, 4096\)"),
    "27 genres": (reshape("genres", 27), r"genres has shape \(70, 27\), expected \(70, 23\)"),
    "rows": (edit(lambda f: (f.__delitem__("imdb_ids"), f.create_dataset("imdb_ids", (69,), "S7"))),
             r"features has shape \(70, 300\), expected \(69, 300\): imdb_ids has 69 rows"),
    "text NaN": (set_cell("features", 41, 3, np.nan), "row 41 has a NaN or infinite text feature"),
    "image inf": (set_cell("vgg_features", 69, 0, np.inf), "row 69 has a NaN or infinite image"),
    "label 2": (set_cell("genres", 5, 0, 2), "row 5 of genres holds .*labels must be 0 or 1"),
    "no split": (edit(lambda f: f.attrs.__delitem__("split")), "no attribute 'split', and 70 rows"),
    "odd split": (edit(lambda f: f.attrs.__setitem__("split", [1, 2])), "is not Fuel's table"),
    "split too far": (set_split("stop", slice(12, 18), 71), "rows 0 to 70, but .* rows 0 to 69"),
    "split overlaps": (set_split("start", slice(6, 12), 39), "the same row in two places"),
    "split disagrees": (set_split("stop", 0, 39), r"train rows .* do not agree \(features: 39"),
    "split lacks": (set_split("available", 0, False), "'split' has no train rows for features"),
    "no names": (edit(lambda f: f["genres"].attrs.__delitem__("target_names")), "found 0: none"),
    "22 names": (edit(lambda f: f["genres"].attrs.__setitem__("target_names", '["a"]')), "1: a"),
    "bad names": (edit(lambda f: f["genres"].attrs.__setitem__("target_names", "[")), "not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_hdf5(copy, cache, case):
    harm, message = BAD_FILES[case]
    harm(copy)
    with pytest.raises(InputError, match=message) as caught:
        mmimdb.load(copy, cache)
    assert str(copy) in str(caught.value), "the message names the file"
    assert not list(cache.glob("*/*")), "a failed build left something behind"


@pytest.fixture
def raw(tmp_path):
    """The raw form: 23 genres over 30 movies, the four dropped ones, and posters of a colour."""
    folder = tmp_path / "mmimdb"
    (folder / "dataset").mkdir(parents=True)
    ids = [f"{i:07d}" for i in range(30)]
    for i, name in enumerate(ids):
        genres = [sample.GENRE_NAMES[i % 23], "Drama", "News"]
        if i == 29:
            genres = ["Adult", "Talk-Show", "Reality-TV", "News"]
        movie = {"plot": ["short", f"the longest plot, of déjà vu {i}", ""], "genres": genres}
        (folder / "dataset" / f"{name}.json").write_text(json.dumps(movie))
        Image.new("RGB", (40, 90), (8 * i, 100, 200)).save(folder / "dataset" / f"{name}.jpeg")
    split = {"train": ids[:20], "dev": ids[20:23], "test": ids[23:]}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


class TestRaw:
    @pytest.mark.parametrize("inner", [True, False])
    def test_round_trip(self, raw, cache, capsys, inner):
        data = mmimdb.load(raw if inner else raw.parent, cache, image_size=(12, 8))
        assert data.description == "MM-IMDB"
        assert data.classes[0] == "Drama" and set(data.classes) == set(sample.GENRE_NAMES)
        assert [len(s.labels) for s in (data.train, data.validation, data.test)] == [20, 3, 6]
        assert "1 test movies have no genre but Adult, News" in capsys.readouterr().err
        assert data.train.inputs["text"][3] == "the longest plot, of déjà vu 3"
        posters = data.train.inputs["image"]
        assert posters.shape == (20, 12, 8, 3) and posters.dtype == np.uint8
        assert np.abs(posters[5].astype(int) - [40, 100, 200]).max() <= 3
        expected = np.zeros(23)
        expected[[0, data.classes.index("Crime")]] = 1
        np.testing.assert_array_equal(data.train.labels[4], expected)

    def test_another_size_is_prepared_apart(self, raw, cache):
        assert mmimdb.load(raw, cache, image_size=(6, 4)).train.inputs["image"].shape[1:3] == (6, 4)
        assert mmimdb.load(raw, cache, image_size=(9, 6)).train.inputs["image"].shape[1:3] == (9, 6)
        with pytest.raises(InputError, match=r"image_size is \(0, 4\)"):
            mmimdb.load(raw, cache, image_size=(0, 4))

    def test_changed_plot_is_prepared_anew(self, raw, cache):
        mmimdb.load(raw, cache, image_size=(6, 4))
        path = raw / "dataset" / "0000000.json"
        path.write_text(json.dumps({"plot": ["new"], "genres": ["Drama"]}))
        assert mmimdb.load(raw, cache, image_size=(6, 4)).train.inputs["text"][0] == "new"

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("dataset/0000003.jpeg", None, r"poster .*0000003.jpeg cannot be read"),
            ("dataset/0000003.jpeg", b"no picture", r"poster .*0000003.jpeg cannot be read"),
            ("dataset/0000003.jpeg", "cut", r"poster .*0000003.jpeg cannot be read"),
            ("dataset/0000003.json", None, r"0000003.json cannot be read as JSON"),
            ("dataset/0000003.json", b"{", r"0000003.json cannot be read as JSON"),
            ("dataset/0000003.json", b"[]", r"0000003.json holds a list"),
            ("dataset/0000003.json", b'{"genres": ["War"]}', r"'plot', found nothing"),
            ("dataset/0000003.json", b'{"plot": ["x"], "genres": "War"}', r"'genres', found a str"),
            ("dataset/0000003.json", b'{"plot": [" "], "genres": ["War"]}', r"no text under"),
            ("dataset/0000003.json", b'{"plot": ["x"], "genres": ["Drama"]}',
             r"has 22 genres \(Drama, .*expected 23 besides Adult, News"),
            ("dataset/0000004.json", b'{"plot": ["x"], "genres": ["Opera"]}', r"24 genres .*Opera"),
            ("split.json", b'{"train": []}', r"split.json has no list dev, test"),
            ("split.json", b'{"train": ["0000001"], "dev": ["0000001"], "test": []}', r"than once"),
            ("split.json", b'{"train": ["../x"], "dev": ["2"], "test": ["3"]}', r"'\.\./x'"),
            ("split.json", b"[" * 200_000, r"split.json cannot be read as JSON .*too deeply"),
            ("split.json", b'{"train": ["0000001"], "dev": ["0000002"], "test": []}', r"no test"),
        ],
    )  # fmt: skip
    def test_bad_folder(self, raw, cache, name, content, message):
        path = raw / name
        before = path.read_bytes()
        if name == "dataset/0000003.json":  # the only other movie with this genre
            (raw / "dataset/0000026.json").write_text('{"plot": ["x"], "genres": ["Drama"]}')
        path.unlink()
        if content is not None:
            path.write_bytes(before[: len(before) // 2] if content == "cut" else content)
        with pytest.raises(InputError, match=message):
            mmimdb.load(raw, cache, image_size=(6, 4))
        assert not list(cache.glob("*/*")), "a failed build left something behind"


class TestFinding:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(InputError, match="holds no MM-IMDB; expected multimodal_imdb"):
            mmimdb.load(tmp_path)
        with pytest.raises(InputError, match="does not exist"):
            mmimdb.load(tmp_path / "nowhere")
        with pytest.raises(InputError, match="'pixels'; expected features or raw"):
            mmimdb.load(tmp_path, variant="pixels")

    def test_both_there(self, raw, copy, cache):
        with pytest.raises(InputError, match="holds both forms"):
            mmimdb.load(copy.parent, cache)
        assert mmimdb.load(copy.parent, cache, "features").train.labels.shape == (40, 23)
        assert mmimdb.load(copy.parent, cache, "raw", image_size=(6, 4)).train.labels.shape == (
            20,
            23,
        )

    def test_wrong_variant(self, raw, cache):
        with pytest.raises(InputError, match="no MM-IMDB of the variant features"):
            mmimdb.load(raw, cache, "features")

    def test_download_uses_the_file(self, small_file, tmp_path, monkeypatch):
        asked = []
        monkeypatch.setattr(mmimdb, "fetch", lambda *a: (asked.append(a), small_file)[1])
        data = mmimdb.load(cache_dir=tmp_path, download=True)
        assert data.data == "real" and data.train.labels.shape == (40, 23)
        ((remote, folder),) = asked
        assert remote.name == hdf5.FILE_NAME and tmp_path in folder.parents


class TestPrecomputed:
    def write(self, path, **arrays):
        np.savez(path, **arrays)
        return path

    def test_replaces_by_id(self, small_file, tmp_path, cache):
        order = np.random.default_rng(0).permutation(70)
        ids = np.array([f"{i:07d}" for i in order])
        text = np.stack([np.full(5, i) for i in order])
        npz = self.write(tmp_path / "bert.npz", ids=ids, text=text)
        data = mmimdb.load(small_file, cache, features_npz=npz)
        assert data.train.inputs["text"].dtype == np.float32
        np.testing.assert_array_equal(data.train.inputs["text"][:, 0], np.arange(40))
        np.testing.assert_array_equal(data.test.inputs["text"][:, 4], np.arange(50, 70))
        assert data.train.inputs["image"].shape == (40, 4096)

    def test_missing_ids(self, small_file, tmp_path, cache):
        ids = np.array([b"0000000", b"0000001"])
        npz = self.write(tmp_path / "f.npz", ids=ids, image=np.ones((2, 3)))
        with pytest.raises(InputError, match=r"no features for 38 of 40 ids \(0000002, "):
            mmimdb.load(small_file, cache, features_npz=npz)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"ids": ["a"], "text": [[np.nan]]}, "text features of id a hold NaN"),
            ({"ids": ["a"], "text": [1.0]}, r"float64 \(1,\); expected numbers of shape"),
            ({"ids": ["a", "b"], "image": [[1.0]]}, r"expected numbers of shape \(2, d\)"),
            ({"ids": ["a"], "image": [["x"]]}, "expected numbers"),
            ({"ids": [1], "text": [[1.0]]}, r"ids is int64 \(1,\); expected N strings"),
            ({"ids": ["a", "a"], "text": [[1.0], [2.0]]}, "2 entries, only 1 different"),
            ({"ids": ["a"]}, "holds ids; expected ids and text, image or both"),
            ({"text": [[1.0]]}, "holds text; expected ids and"),
            ({"ids": ["a"], "text": [[1.0]], "audio": [1]}, "audio has no use"),
            ({"ids": np.array(["a"], object), "text": [[1.0]]}, "plain arrays.*fixed-width"),
        ],
    )  # fmt: skip
    def test_bad_arrays(self, tmp_path, arrays, message):
        npz = self.write(tmp_path / "f.npz", **{k: np.asarray(v) for k, v in arrays.items()})
        with pytest.raises(InputError, match=message):
            read_features(npz)

    def test_bad_files(self, tmp_path):
        whole = self.write(
            tmp_path / "f.npz", ids=np.array(["a"]), text=np.ones((1, 9))
        ).read_bytes()
        for content in (whole[:50], b"", b"text"):
            (tmp_path / "f.npz").write_bytes(content)
            with pytest.raises(InputError, match=r"f.npz cannot be read as an .npz file"):
                read_features(tmp_path / "f.npz")
        with pytest.raises(InputError, match="cannot be read"):
            read_features(tmp_path / "none.npz")
        np.save(tmp_path / "one.npy", np.ones(3))
        with pytest.raises(InputError, match="cannot be read"):
            read_features(tmp_path / "one.npy")


class TestFullDisk:
    """2 MB do not hold 200 rows: one line that names the folder, and nothing left of them."""

    def test_for_the_sample(self, small_disk):
        with pytest.raises(InputError, match=f"no space is left on the disk for {small_disk}"):
            sample.sample_file(small_disk, train=180, validation=10, test=10)
        assert not list(small_disk.iterdir())
        assert sample.sample_file(small_disk, train=10, validation=1, test=1).exists()

    def test_for_prepared_data(self, small_disk, tmp_path):
        file = sample.sample_file(tmp_path, train=180, validation=10, test=10)
        with pytest.raises(InputError, match=f"no space is left on the disk for {small_disk}"):
            mmimdb.load(file, small_disk)
        assert not [path for path in small_disk.rglob("*") if path.parent != small_disk]
