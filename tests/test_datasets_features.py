"""Reading your own features: what is found out, and what is refused."""

import numpy as np
import pytest

from experiments.datasets import Split
from experiments.datasets.features import missing, read
from experiments.datasets.preprocess import draw_split, standardise
from experiments.errors import InputError

N = 12
X = np.random.default_rng(0).standard_normal((N, 3))
CLASSES = np.arange(N) % 3


@pytest.fixture
def npz(tmp_path):
    def write(**arrays):
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
        return [path]

    return write


class TestWhatIsFoundOut:
    def test_every_other_key_is_a_modality(self, npz):
        table = read(npz(b=X, a=X[:, None] + np.zeros((1, 4, 1)), c=X[:, 0], labels=CLASSES))
        assert {name: x.shape for name, x in table.modalities.items()} == {
            "a": (N, 4, 3),
            "b": (N, 3),
            "c": (N, 1),
        }
        assert all(x.dtype == np.float32 for x in table.modalities.values())
        assert table.name == "data" and table.split is None

    @pytest.mark.parametrize(
        ("labels", "kind", "classes"),
        [
            (CLASSES, "multiclass", ("class 0", "class 1", "class 2")),
            (CLASSES == 1, "multiclass", ("class 0", "class 1")),
            (CLASSES.astype(np.uint8) * 2, "multiclass", ("class 0", "class 2", "class 4")),
            (np.eye(3)[CLASSES], "multilabel", ("class 0", "class 1", "class 2")),
            (np.eye(2, dtype=bool)[CLASSES % 2], "multilabel", ("class 0", "class 1")),
            (CLASSES * 0.5, "regression", ()),
        ],
    )
    def test_the_kind_of_labels(self, npz, labels, kind, classes):
        table = read(npz(a=X, labels=labels))
        assert (table.kind, table.classes) == (kind, classes)
        if kind == "multiclass":
            np.testing.assert_array_equal(np.unique(labels)[table.labels], labels)
        else:
            np.testing.assert_array_equal(table.labels, np.float32(labels))

    def test_a_mask_and_rows_of_nan_are_missing(self, npz):
        b = X.copy()
        b[2], b[3, 0] = np.nan, np.nan
        mask = np.ones((N, 2))
        mask[0, 0] = mask[5, 1] = 0
        table = read(npz(b=b, a=X, mask=mask, labels=CLASSES))
        assert np.flatnonzero(missing(table.modalities["a"])).tolist() == [0]
        assert np.flatnonzero(missing(table.modalities["b"])).tolist() == [2, 5]

    def test_csv_files(self, tmp_path):
        np.savetxt(tmp_path / "a.csv", X, delimiter=",")
        np.savetxt(tmp_path / "labels.csv", CLASSES, fmt="%d")
        np.savetxt(tmp_path / "split.csv", CLASSES, fmt="%d")
        table = read([tmp_path / f"{name}.csv" for name in ("a", "labels", "split")])
        np.testing.assert_array_equal(table.modalities["a"], np.float32(X))
        assert table.kind == "multiclass" and table.name == tmp_path.name
        np.testing.assert_array_equal(table.split, CLASSES)
        np.savetxt(tmp_path / "labels.csv", CLASSES / 2)
        assert read([tmp_path / "a.csv", tmp_path / "labels.csv"]).kind == "regression"


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("arrays", "complaint"),
        [
            ({"a": X}, "has no labels, only a"),
            ({"labels": CLASSES}, "has no modality beside labels"),
            ({"a": X[1:], "labels": CLASSES}, r"a is float64 \(11, 3\); expected numbers \[12"),
            ({"a": X, "labels": CLASSES[:2]}, "labels has 2 rows; at least 10"),
            ({"a": np.full_like(X, np.nan), "labels": CLASSES}, "a is missing in every row"),
            ({"a": X * np.inf, "labels": CLASSES}, "a: row 0 is infinite"),
            ({"a": X.astype(str), "labels": CLASSES}, "a is <U32"),
            ({"a": X.astype(object), "labels": CLASSES}, "object arrays"),
            ({"a": X, "labels": np.zeros(N, int)}, "labels are 0 in every row"),
            ({"a": X, "labels": CLASSES - 1}, "row 0 is -1; classes are counted from 0"),
            ({"a": X, "labels": X}, "two axes mean several classes"),
            ({"a": X, "labels": np.where(X[:, 0] > 9, 1, np.nan)}, "row 0 is NaN"),
            ({"a": X, "labels": np.eye(4)[CLASSES]}, "column 3 is 0 in every row"),
            ({"a": X, "labels": CLASSES.astype(str)}, "labels is <U21"),
            ({"a": X, "labels": CLASSES, "mask": X > 0}, r"mask is bool \(12, 3\); expected"),
            (
                {"a": X, "labels": CLASSES, "split": CLASSES + 1},
                r"split is int64 \(12,\)",
            ),
            ({"a": X, "labels": CLASSES, "split": CLASSES % 2}, "split has no 2, so no test rows"),
        ],
    )
    def test_a_bad_key(self, npz, arrays, complaint):
        with pytest.raises(InputError, match=complaint):
            read(npz(**arrays))

    def test_a_bad_file(self, tmp_path):
        (tmp_path / "a.csv").write_text("1,2\n3,x\n", encoding="utf-8")
        (tmp_path / "data.npz").write_bytes(b"PK nothing")
        for path, complaint in [
            ("a.csv", "is not a table of numbers"),
            ("data.npz", "cannot be read as an .npz"),
            ("none.npz", "No such file"),
            ("data.txt", "expected one .npz file"),
        ]:
            with pytest.raises(InputError, match=complaint):
                read([tmp_path / path])
        with pytest.raises(InputError, match=r"two files are called a\.csv"):
            read([tmp_path / "a.csv", tmp_path / "b" / "a.csv"])


class TestPreparing:
    def test_standardise_by_numpy(self):
        rng = np.random.default_rng(1)
        x = (5 + 3 * rng.standard_normal((40, 6, 2))).astype(np.float32)
        x[:, :, 1] = 7
        x[0], x[1, 2, 0] = np.nan, np.nan
        train, other = standardise(Split({"x": x}, x), Split({"x": x[:5]}, x))
        values = x[..., 0].astype(float)
        expected = (values - np.nanmean(values)) / np.nanstd(values)
        expected[1, 2] = 0
        np.testing.assert_allclose(train.inputs["x"][..., 0], expected, atol=1e-5)
        assert (train.inputs["x"][1:, :, 1] == 0).all()
        assert np.isnan(train.inputs["x"][0]).all()
        np.testing.assert_array_equal(other.inputs["x"], train.inputs["x"][:5])

    def test_a_drawn_split(self):
        labels = np.repeat([0, 1], [80, 20])
        one, other = (draw_split(labels, True, seed) for seed in (0, 1))
        assert np.bincount(one).tolist() == [69, 16, 15]
        assert [labels[one == part].sum() for part in range(3)] == [14, 3, 3]
        np.testing.assert_array_equal(one == 2, other == 2)
        assert (one != other).any()
        with pytest.raises(InputError, match="give a split of your own"):
            draw_split(np.arange(20), True, 0)
