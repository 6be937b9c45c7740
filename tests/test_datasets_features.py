"""Reading your own features: what is found out, and what is refused."""

import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.datasets import Split
from experiments.datasets.features import Table, missing, read, strata
from experiments.datasets.preprocess import draw_split, folds, standardise

N = 12
X = np.random.default_rng(0).standard_normal((N, 3))
CLASSES = np.arange(N) % 3
MEMBERS = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 1]])[CLASSES]


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
        assert all(x.dtype == np.float64 for x in table.modalities.values())
        assert table.name == "data" and table.split is None

    @pytest.mark.parametrize(
        ("labels", "kind", "classes"),
        [
            (CLASSES, "multiclass", ("class 0", "class 1", "class 2")),
            (CLASSES == 1, "multiclass", ("class 0", "class 1")),
            (CLASSES.astype(np.uint8) * 2, "multiclass", ("class 0", "class 2", "class 4")),
            (MEMBERS, "multilabel", ("class 0", "class 1", "class 2")),
            (MEMBERS[:, :2] > 0, "multilabel", ("class 0", "class 1")),
            (np.array(["dog", "cat ", "emu"])[CLASSES], "multiclass", ("cat", "dog", "emu")),
            (np.array([b"x", b"y"])[CLASSES % 2][:, None], "multiclass", ("x", "y")),
            (CLASSES * 0.5, "regression", ()),
            (CLASSES[:, None] * 0.5, "regression", ()),
        ],
    )
    def test_the_kind_of_labels(self, npz, labels, kind, classes):
        table = read(npz(a=X, labels=labels))
        assert (table.kind, table.classes) == (kind, classes)
        if kind == "multiclass":
            np.testing.assert_array_equal(np.unique(labels)[table.labels], labels.reshape(N))
        else:
            expected = labels if kind == "multilabel" else labels.reshape(N)
            np.testing.assert_array_equal(table.labels, np.float32(expected))

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
        np.testing.assert_array_equal(table.modalities["a"], X)
        assert table.kind == "multiclass" and table.name == tmp_path.name
        np.testing.assert_array_equal(table.split, CLASSES)
        np.savetxt(tmp_path / "labels.csv", CLASSES / 2)
        assert read([tmp_path / "a.csv", tmp_path / "labels.csv"]).kind == "regression"


CSV = {  # name: (text of a.csv, text of labels.csv), all of the same content
    "plain": ("\ufeff" + "1,2\n,4\n" * 6, "0\n1\n" * 6),
    "a header": ("x,y\n" + "1,2\nNA,4\n" * 6, "class\n" + "0\n1\n" * 6),
    "words": ("x,y\r\n" + "1,2\r\nnan,4\r\n" * 6, "0x\r\n1x\r\n" * 6 + "\r\n"),
    "words under a header": ("1, 2\n ,4\n" * 6, '"class"\n' + '"0, x"\n"1, y"\n' * 6),
    "pandas": (
        ",x,y\n" + "".join(f"{i},1,2\n{i + 1},,4\n" for i in range(0, 12, 2)),
        ",class\n" + "".join(f"{i},no\n{i + 1},yes\n" for i in range(0, 12, 2)),
    ),
    "pandas without names": (
        ",0,1\n" + "".join(f"{i},1,2\n{i + 1},,4\n" for i in range(0, 12, 2)),
        ",0\n" + "".join(f"{i},0\n{i + 1},1\n" for i in range(0, 12, 2)),
    ),
}


@pytest.mark.parametrize("form", CSV)
def test_forms_of_csv_files(tmp_path, form):
    paths = [tmp_path / "a.csv", tmp_path / "labels.csv"]
    for path, text in zip(paths, CSV[form], strict=True):
        path.write_bytes(text.encode())
    table = read(paths)
    np.testing.assert_array_equal(table.modalities["a"], [[1, 2], [np.nan, 4]] * 6)
    np.testing.assert_array_equal(table.labels, [0, 1] * 6)
    assert table.kind == "multiclass" and len(table.classes) == 2


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
            ({"a": X.astype(str), "labels": CLASSES}, "a is text, <U32"),
            ({"a": X.astype(object), "labels": CLASSES}, "a is an object array"),
            ({"a": X, "labels": np.zeros(N, int)}, "labels are 0 in every row"),
            ({"a": X, "labels": CLASSES - 1}, "row 0 is -1; classes are counted from 0"),
            ({"a": X, "labels": X}, "two axes mean several classes"),
            ({"a": X, "labels": np.where(X[:, 0] > 9, 1, np.nan)}, "row 0 is NaN"),
            ({"a": X, "labels": np.eye(4)[CLASSES]}, "column 3 is 0 in every row"),
            ({"a": X, "labels": np.where(CLASSES > 0, "x", "")}, "row 0 is ''; leave such rows"),
            ({"a": X, "labels": np.array(["é".encode(), b"x"])[CLASSES % 2]}, "not ASCII"),
            ({"a": X, "labels": X.astype(str)}, "one word a row"),
            ({"a": X * 1e300, "labels": CLASSES}, "a: row 0 is infinite"),
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
        (tmp_path / "data.npz").write_bytes(b"PK nothing")
        for path, complaint in [
            ("a.csv", "No such file"),
            ("data.npz", "cannot be read as an .npz"),
            ("none.npz", "No such file"),
            ("data.json", "expected one .npz file, or a file per modality"),
        ]:
            with pytest.raises(InputError, match=complaint):
                read([tmp_path / path])
        with pytest.raises(InputError, match="two files are called a;"):
            read([tmp_path / "a.csv", tmp_path / "b" / "a.csv"])

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            (b"1,2\n3,x\n5,6\n", r"a\.csv, line 2: 'x' is not a number"),
            (b"1,2\n\n3,4,5\n", r"a\.csv, line 3: 3 cells; expected 2, as in the first line"),
            (b"", "holds no line of numbers"),
            (b"x,y\n", "holds no line of numbers"),
            (b"\xff\xfe1", "cannot be read as a .csv file"),
            (b"3,1\n" * 13, "is its first row a header"),
        ],
    )
    def test_a_bad_csv_file(self, tmp_path, text, complaint):
        (tmp_path / "a.csv").write_bytes(text)
        (tmp_path / "labels.csv").write_text("0\n1\n" * 6, encoding="utf-8")
        with pytest.raises(InputError, match=complaint):
            read([tmp_path / "a.csv", tmp_path / "labels.csv"])


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

    def test_standardise_keeps_positions_that_are_all_unknown(self):
        x = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
        x[0, 1:], x[1, 0, 0] = np.nan, np.nan
        (scaled,) = standardise(Split({"x": x}, x))
        np.testing.assert_array_equal(np.isnan(scaled.inputs["x"][0]).all(axis=1), [0, 1, 1])
        assert np.isfinite(scaled.inputs["x"][1:]).all() and scaled.inputs["x"][1, 0, 0] == 0

    def test_standardise_large_values(self):
        x = np.full((2500, 1), 1e20, np.float32) * (1 + np.arange(2500)[:, None] % 2)
        (scaled,) = standardise(Split({"x": x}, x))
        np.testing.assert_allclose(scaled.inputs["x"][:, 0], [-1, 1] * 1250, rtol=1e-5)


def table(labels, kind):
    classes = {"multiclass": labels.max() + 1, "multilabel": labels.shape[-1], "regression": 0}
    names = tuple(f"class {i}" for i in range(int(classes[kind])))
    return Table("data", {}, labels, kind, names, None)


class TestTheDrawnSplit:
    @pytest.mark.parametrize("seed", range(5))
    def test_parts_have_the_proportions_of_the_whole(self, seed):
        rng = np.random.default_rng(seed)
        rows = rng.integers(100, 400)
        classes = rng.choice(5, rows, p=[0.5, 0.3, 0.1, 0.07, 0.03])
        several = (rng.random((rows, 4)) < [0.5, 0.3, 0.1, 0.05]).astype(np.float32)
        for labels, kind, slack in [(classes, "multiclass", 1), (several, "multilabel", 4)]:
            split = draw_split(strata(table(labels, kind)), seed)
            members = labels[:, None] == np.arange(5) if kind == "multiclass" else labels
            for part, share in enumerate((0.7, 0.15, 0.15)):
                got, expected = members[split == part].sum(axis=0), share * members.sum(axis=0)
                assert np.abs(got - expected).max() <= slack + 1, (kind, part)
        values = rng.exponential(size=rows)
        split = draw_split(strata(table(values, "regression")), seed)
        for part in range(3):
            below = [
                np.mean(values[split == part] < q) for q in np.quantile(values, (0.2, 0.5, 0.8))
            ]
            np.testing.assert_allclose(below, (0.2, 0.5, 0.8), atol=0.1)

    def test_its_sizes_and_seeds(self):
        groups = np.repeat([0, 1], [80, 20])
        one, other = (draw_split(groups, seed) for seed in (0, -1))
        assert np.bincount(one).tolist() == np.bincount(other).tolist() == [70, 15, 15]
        assert [groups[one == part].sum() for part in range(3)] == [14, 3, 3]
        np.testing.assert_array_equal(one == 2, other == 2)
        assert (one != other).any()
        assert np.bincount(draw_split(np.zeros(10, int), 0)).tolist() == [6, 2, 2]

    def test_rare_classes_stay_in_train(self):
        labels = np.repeat([0, 1, 2], [30, 1, 3])
        for seed in range(20):
            split = draw_split(strata(table(labels, "multiclass")), seed)
            assert split[30] == 0 and (split[31:] == 0).any()
        several = np.stack([np.arange(34) % 2, labels == 1], axis=1).astype(np.float32)
        assert draw_split(strata(table(several, "multilabel")), 0)[30] == 0
        with pytest.raises(InputError, match="'class 0' has 2 of 20 rows, and only 0 rows are of"):
            strata(table(np.arange(20) // 2, "multiclass"))


class TestGroups:
    @pytest.mark.parametrize("seed", range(4))
    def test_a_drawn_split_keeps_them_together(self, seed):
        rng = np.random.default_rng(seed)
        groups = rng.integers(0, 60, 400) * 7
        strata = (groups % 3 + (rng.random(400) < 0.2)) % 3
        split = draw_split(strata, seed, groups)
        assert all(len(np.unique(split[groups == group])) == 1 for group in np.unique(groups))
        for part, share in enumerate((5 / 7, 1 / 7, 1 / 7)):
            count = np.bincount(strata[split == part], minlength=3)
            np.testing.assert_allclose(count, share * np.bincount(strata), atol=10)
        np.testing.assert_array_equal(split == 2, draw_split(strata, seed + 9, groups) == 2)

    def test_few_groups_and_too_few(self):
        strata, groups = np.arange(30) % 2, np.repeat([5, 1, 9], 10)
        assert np.bincount(draw_split(strata, 0, groups)).tolist() == [10, 10, 10]
        with pytest.raises(InputError, match="2 groups can be held out, in 3 parts"):
            draw_split(strata, 0, np.minimum(groups, 5))

    def test_a_large_group_is_not_the_test_rows(self):
        groups = np.where(np.arange(90) < 50, 0, np.arange(90))
        split = draw_split(np.zeros(90, int), 0, groups)
        assert (split[:50] == 0).all() and 5 < (split == 2).sum() < 20


def check_folds(found, rows, count, repeats, never=()):
    assert len(found) == count * repeats
    for kept, held_out in found:
        both = np.concatenate([kept, held_out])
        np.testing.assert_array_equal(np.sort(both), np.arange(rows))
        assert (np.diff(kept) > 0).all() and (np.diff(held_out) > 0).all()
    for start in range(0, len(found), count):
        held_out = np.concatenate([held_out for _, held_out in found[start : start + count]])
        np.testing.assert_array_equal(np.sort(held_out), np.setdiff1d(np.arange(rows), never))


class TestFolds:
    def test_of_classes_and_of_rare_ones(self):
        labels = np.repeat([0, 1, 2, 3], [50, 31, 2, 17])
        groups = strata(table(labels, "multiclass"))
        found = folds(groups, None, 5, 3, 0)
        check_folds(found, 100, 5, 3, never=np.flatnonzero(labels == 2))
        for _, held_out in found:
            assert len(held_out) in (19, 20)
            count = np.bincount(labels[held_out], minlength=4)
            assert (np.abs(count - [10, 6.2, 0, 3.4]) < 1).all()
        assert (found[0][1] != found[5][1]).any()
        again, other = folds(groups, None, 5, 3, 0), folds(groups, None, 5, 3, -1)
        assert all((a[1] == b[1]).all() for a, b in zip(found, again, strict=True))
        assert not all(np.array_equal(a[1], b[1]) for a, b in zip(found, other, strict=True))

    def test_of_several_classes_and_of_numbers(self):
        rng = np.random.default_rng(0)
        several = (rng.random((100, 3)) < [0.5, 0.3, 0.1]).astype(np.float32)
        values = rng.exponential(size=100)
        for labels, kind in ((several, "multilabel"), (values, "regression")):
            found = folds(strata(table(labels, kind)), None, 4, 2, 7)
            check_folds(found, 100, 4, 2)
            assert {len(held_out) for _, held_out in found} == {25}
            for _, held_out in found:
                np.testing.assert_allclose(
                    labels[held_out].mean(axis=0), labels.mean(axis=0), atol=0.2
                )

    def test_of_groups(self):
        rng = np.random.default_rng(0)
        groups = rng.integers(0, 40, 200)
        labels = groups % 2
        labels[[0, 1]] = 2  # rare: their groups are always trained on
        found = folds(strata(table(labels, "multiclass")), groups, 5, 2, 0)
        check_folds(found, 200, 5, 2, never=np.flatnonzero(np.isin(groups, groups[:2])))
        for kept, held_out in found:
            assert not np.intersect1d(groups[kept], groups[held_out]).size
            assert 25 < len(held_out) < 55 and 0.3 < labels[held_out].mean() < 0.7

    def test_too_few(self):
        with pytest.raises(InputError, match="4 rows can be held out, in 5 parts"):
            folds(np.array([0, 0, 0, 1, -1]), None, 5, 1, 0)
        with pytest.raises(InputError, match="3 groups can be held out, in 5 parts"):
            folds(np.arange(30) % 2, np.arange(30) % 3, 5, 1, 0)
