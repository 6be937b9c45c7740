"""Reading your own features: what is found out, and what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse

from experiments.common.errors import InputError
from experiments.datasets import Split
from experiments.datasets.columns import Known
from experiments.datasets.features import Table, missing, read, strata
from experiments.datasets.files import read_files
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


def csv(path, header, ids, columns, separator=","):
    """A .csv file of these lines; ids may be None."""
    lines = [[str(cell) for cell in line] for line in zip(*columns, strict=True)]
    lines = lines if ids is None else [[str(i), *line] for i, line in zip(ids, lines, strict=True)]
    lines = lines if header is None else [header, *lines]
    path.write_text("".join(separator.join(line) + "\n" for line in lines), encoding="utf-8")
    return path


IDS = np.array([f"p{i:02d}" for i in range(N)])
MIXED = np.random.default_rng(3).permutation(N)
WORDS = np.array(["cat", "dog", "emu"])[CLASSES]


def labels_of(table):
    return np.array(table.classes)[table.labels]


class TestIds:
    @pytest.mark.parametrize(
        ("name", "ids"),
        [
            ("", IDS),
            ("anything", IDS),
            ("", np.arange(N)),
            ("", np.arange(N) * 7 + 1),
            ("patient_id", np.arange(N) + 5),
            ("SampleID", np.arange(N) + 5),
            ("subject", np.arange(N) + 5),
            ("mouse", np.arange(N) + 5),  # as all files have them
            ("id", np.char.zfill(np.arange(N).astype(str), 3)),
        ],
    )
    def test_rows_are_joined_by_them(self, tmp_path, name, ids):
        paths = [
            csv(tmp_path / "a.csv", [name, "x", "y", "z"], ids, X.T),
            csv(tmp_path / "b.csv", [name, "u"], ids[MIXED], [X[MIXED, 0]]),
            csv(tmp_path / "labels.csv", [name, "label"], ids[::-1], [WORDS[::-1]]),
        ]
        table = read(paths)
        np.testing.assert_array_equal(table.modalities["a"], X[::-1])
        np.testing.assert_array_equal(table.modalities["b"], X[::-1, :1])
        assert labels_of(table).tolist() == WORDS[::-1].tolist()
        joined = [note for note in table.notes if "joined by" in note]
        assert len(joined) == 1 and "a.csv, b.csv, labels.csv: " in joined[0]
        assert not any("used as a feature" in note for note in table.notes)

    def test_ids_without_a_header(self, tmp_path):
        paths = [
            csv(tmp_path / "a.csv", None, IDS[MIXED], X[MIXED].T),
            csv(tmp_path / "labels.csv", None, IDS, [WORDS]),
        ]
        table = read(paths)
        np.testing.assert_array_equal(table.modalities["a"], X)
        assert labels_of(table).tolist() == WORDS.tolist()

    def test_an_id_beside_a_count_of_rows(self, tmp_path):
        """df.to_csv() of a frame that has an id of its own."""
        columns = [IDS[MIXED], *X[MIXED].T]
        paths = [
            csv(tmp_path / "a.csv", ["", "patient", "x", "y", "z"], range(N), columns),
            csv(tmp_path / "labels.csv", ["patient", "label"], IDS, [WORDS]),
        ]
        np.testing.assert_array_equal(read(paths).modalities["a"], X)

    def test_rows_that_some_files_lack(self, tmp_path):
        paths = [
            csv(tmp_path / "a.csv", ["id", "x", "y", "z"], IDS, X.T),
            csv(tmp_path / "b.csv", ["id", "u"], IDS[2:], [X[2:, 0]]),
            csv(tmp_path / "labels.csv", ["id", "label"], IDS[:-1], [WORDS[:-1]]),
        ]
        table = read(paths)
        np.testing.assert_array_equal(table.modalities["a"], X[:-1])
        assert np.flatnonzero(missing(table.modalities["b"])).tolist() == [0, 1]
        text = "\n".join(table.notes)
        assert "2 of 11 rows are missing in b: p00, p01" in text
        assert "1 of 12 rows of a have no labels and are left out: p11" in text

    def test_what_stands_beside_the_labels(self, tmp_path):
        beside = [WORDS, CLASSES, np.arange(N) // 3]
        paths = [
            csv(tmp_path / "a.csv", ["id", "x", "y", "z"], IDS[MIXED], X[MIXED].T),
            csv(tmp_path / "labels.csv", ["id", "label", "split", "groups"], IDS, beside),
            csv(tmp_path / "mask.csv", ["id", "a"], IDS[MIXED], [(MIXED > 0) * 1]),
        ]
        table = read(paths)
        np.testing.assert_array_equal(table.split, CLASSES[1:])
        np.testing.assert_array_equal(table.groups, (np.arange(N) // 3)[1:])
        assert labels_of(table).tolist() == WORDS[1:].tolist()
        assert "1 rows without any modality are left out" in table.notes
        table = read(
            [*paths[:1], csv(tmp_path / "labels.csv", ["id", "one", "two"], IDS, beside[:2])], "two"
        )
        assert table.classes == ("class 0", "class 1", "class 2")

    def test_several_columns_beside_the_ids(self, tmp_path):
        paths = [
            csv(tmp_path / "a.csv", ["id", "x", "y", "z"], IDS, X.T),
            csv(tmp_path / "labels.csv", ["id", "label", "age"], IDS, [WORDS, CLASSES]),
        ]
        with pytest.raises(
            InputError, match="has columns label, age; say which to learn, --labels"
        ):
            read(paths)
        csv(paths[1], ["id", *"abc"], IDS, MEMBERS.T)
        table = read(paths)
        assert table.kind == "multilabel" and table.classes == ("a", "b", "c")

    def test_ids_of_an_npz_file(self, tmp_path, npz):
        data = npz(a=X[MIXED], ids=IDS[MIXED])
        labels = csv(tmp_path / "labels.csv", ["id", "label"], IDS, [WORDS])
        np.testing.assert_array_equal(read([*data, labels]).modalities["a"], X)

    def test_the_columns_of_a_mask_are_known_by_name(self, tmp_path):
        mask = np.ones((N, 2), int)
        mask[0, 0] = 0
        paths = [
            csv(tmp_path / "a.csv", ["x", "y", "z"], None, X.T),
            csv(tmp_path / "b.csv", ["x", "y", "z"], None, X.T),
            csv(tmp_path / "labels.csv", ["label"], None, [WORDS]),
            csv(tmp_path / "mask.csv", ["b", "a"], None, mask.T),
        ]
        table = read(paths)
        assert (
            np.isnan(table.modalities["b"][0]).all() and not np.isnan(table.modalities["a"]).any()
        )

    def test_a_count_of_rows_beside_files_without_ids(self, tmp_path):
        labels = csv(tmp_path / "labels.csv", None, None, [WORDS])
        for start in (0, 1):
            a = csv(tmp_path / "a.csv", ["", "x", "y", "z"], np.arange(N) + start, X.T)
            np.testing.assert_array_equal(read([a, labels]).modalities["a"], X)

    @pytest.mark.parametrize(
        ("ids", "others", "complaint"),
        [
            (IDS, np.char.add("q", IDS), r"no id of a \(p00, p01, p02, …\) is among the others"),
            (np.where(IDS == "p03", "p01", IDS), IDS, r"a\.csv: the id 'p01' is in 2 rows"),
            (np.where(IDS == "p03", "", IDS), IDS, r"a\.csv, line 5 has no id"),
            (IDS, None, r"a has ids \(p00, .*\) and labels has none; give all files ids, or none"),
            (MIXED, None, "and labels has none"),
            (np.arange(N), np.arange(N) + 1, "a and labels count their rows from 0 and from 1"),
            (
                np.char.zfill(np.arange(N).astype(str), 3),
                np.char.zfill(np.arange(N).astype(str), 2),
                "the id '000' of a is '00' elsewhere; ids are text",
            ),
            (
                np.char.upper(IDS),
                np.where(CLASSES > 0, IDS, np.char.upper(IDS)),
                "'P01' of a is 'p01'",
            ),
        ],
    )
    def test_ids_that_do_not_fit(self, tmp_path, ids, others, complaint):
        paths = [
            csv(tmp_path / "a.csv", ["", "x", "y", "z"], ids, X.T),
            csv(
                tmp_path / "labels.csv",
                ["", "label"] if others is not None else ["label"],
                others,
                [WORDS],
            ),
        ]
        with pytest.raises(InputError, match=complaint):
            read(paths)


def test_a_feature_that_a_model_knows_holds_no_ids(tmp_path):
    columns = [np.arange(N) * 3 + 50, *X.T]
    paths = [csv(tmp_path / f"{n}.csv", ["time", "x", "y", "z"], None, columns) for n in "ab"]
    known = {name: Known(("time", "x", "y", "z"), {}) for name in "ab"}
    parts, _ = read_files(paths, known=known)
    assert all(part.ids is None and part.values.shape == (N, 4) for part in parts.values())
    parts, _ = read_files(paths)
    assert all(part.ids is not None for part in parts.values())
    one = csv(tmp_path / "a.csv", ["who", "time", "x", "y", "z"], None, [["p7"], *X[:4, :1]])
    parts, _ = read_files([one], known=known)
    assert parts["a"].ids.tolist() == ["p7"] and parts["a"].values.shape == (1, 4)


class TestWhatIsGuessedAndSaid:
    def read(self, tmp_path, text, labels=None):
        path = tmp_path / "a.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        if labels is None:
            labels = "".join(f"{word}\n" for word in WORDS)
        (tmp_path / "labels.csv").write_text(labels, encoding="utf-8")
        table = read([path, tmp_path / "labels.csv"])
        return table.modalities["a"], "\n".join(table.notes)

    def test_a_header_that_counts(self, tmp_path):
        """df.to_csv(index=False) of every file."""
        a = "0,1,2\n" + "4,5,6\n7,8,9\n" * 6
        x, said = self.read(tmp_path, a, "0\n" + "0\n1\n" * 6)
        np.testing.assert_array_equal(x, [[4, 5, 6], [7, 8, 9]] * 6)
        assert "a.csv, labels.csv: the first line is a header" in said
        x, said = self.read(tmp_path, a, "0\n1\n" * 6)
        assert len(x) == 12 and "labels.csv: there is no header" in said

    def test_what_only_the_other_files_tell(self, tmp_path):
        a = "x,y\n" + "4,5\n7,8\n" * 6
        for labels in ("cat\n" + "dog\nemu\n" * 5 + "emu\n", "pet\n" + "dog\nemu\n" * 6):
            assert len(self.read(tmp_path, a, labels)[0]) == 12
        with pytest.raises(InputError, match="the first line, 0, 1, may be a header or not"):
            self.read(tmp_path, "0,1\n" + "4,5\n7,8\n" * 6, "0\n" + "0\n1\n" * 6)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("x;y\n" + "1,5;2\n3;,25\n" * 6, "a.csv: the decimal sign is a comma"),
            ("x;y\n" + "1,5;2\n3;,25\n" * 6, "a.csv: cells are separated by semicolons"),
            ("x\ty\n" + "1.5\t2\n3\t.25\n" * 6, "a.csv: cells are separated by tabs"),
            ("1.5|2\n3|.25\n" * 6, "a.csv: cells are separated by bars"),
            ("1.5  2\n 3 .25\n" * 6, "a.csv: cells are separated by spaces"),
            ("x,y,\n" + "1.5,2,\n3,.25,\n" * 6, "the separator at the end of every line"),
            ("x,y\n" + "1.5,2,\n3,.25,\n" * 6, "the separator at the end of every line"),
            ("# of 2020\n# x,y\n" + "1.5,2\n3,.25\n" * 6, "lines with a # at the top are comments"),
            ("2001,2002,2003\n" * 0 + "x,y\r\n" + "1.5,2\r\n3,.25\r\n" * 6 + "\r\n", "is a header"),
            ('"x","y"\n' + '"1.5","2"\n\n"3",".25"\n' * 6, "is a header"),
            (("x,y\n" + "1.5,2\n3,.25\n" * 6).encode("utf-16"), "is a header"),
        ],
    )
    def test_forms(self, tmp_path, text, said):
        x, notes = self.read(tmp_path, text)
        np.testing.assert_array_equal(x, [[1.5, 2], [3, 0.25]] * 6)
        assert said in notes

    def test_words_for_unknown(self, tmp_path):
        words = ["?", "N/A", "NA", "null", "-", "None", "", "nan", "NaN", "#N/A", "<NA>", "1"]
        x, notes = self.read(tmp_path, "x,y\n" + "".join(f"{word},2\n" for word in words))
        assert np.isnan(x[:11, 0]).all() and x[11, 0] == 1
        assert "a.csv: read as not known: '#N/A' (1), '-' (1), '<NA>' (1), '?' (1)" in notes
        assert "'NaN'" not in notes

    def test_columns_of_words(self, tmp_path):
        lines = ["sex,age,kind,here", *["m,1,x,True", "f,2,y,False", "?,3,z,True", "m,4,,True"] * 3]
        x, notes = self.read(tmp_path, "\n".join(lines))
        nan = np.nan
        expected = [
            [1, 1, 1, 0, 0, 1],
            [0, 2, 0, 1, 0, 0],
            [nan, 3, 0, 0, 1, 1],
            [1, 4, nan, nan, nan, 1],
        ]
        np.testing.assert_array_equal(x, expected * 3)
        assert "a.csv: sex becomes 0 for 'f' and 1 for 'm'" in notes
        assert "kind becomes a column of zeros and ones for each of x, y, z" in notes

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("x,y\n" + "1,2\n3,low\n" * 6, r"a\.csv, line 3: 'low' is not a number"),
            ("x,y\n" + "1,1_0\n3,4\n" * 6, "'1_0' is not a number"),
            ("x,y\n" + "".join(f"1,w{i}\n" for i in range(12)), "y holds 12 words"),
            ("x,y\n" + "1,m\n" * 12, "y holds only the word 'm'"),
            ("x,x\n" + "1,2\n" * 12, "two columns are called 'x'"),
            (("é,y\n" + "1,2\n" * 12).encode("latin-1"), "line 1 is not UTF-8, perhaps Latin-1"),
            (("x,y\n" + "1,2\n" * 12).encode("utf-16-le"), "null bytes; save it as UTF-8"),
            ("x;y\n" + "1,5;2.5\n" * 12, "holds '1,5' and '2.5'"),
            ("x,y\n" + '"1,5",2\n' * 12, "holds '1,5' between commas"),
            ("1\n\n2\n" * 6, r"a\.csv, line 2 is blank; write NaN"),
            ("1,5\n2,05\n" * 6, "may be one number or two"),
            ("0,1,2\n" + "4,5,6\n" * 11, "is its first row none"),
            ("x,y,z\n" + "1,2\n" * 12, r"a\.csv, line 2: 2 cells; expected 3"),
            ("a;1,b\nc;2,d\n" * 6, "may be separated by commas or semicolons"),
            ('x,y\n"1,2\n' * 6, "cannot be read as a .csv file"),
        ],
    )
    def test_what_cannot_be_told(self, tmp_path, text, complaint):
        with pytest.raises(InputError, match=complaint):
            self.read(tmp_path, text)

    @pytest.mark.parametrize("start", [0, 40])
    def test_numbers_that_may_be_none(self, tmp_path, start):
        lines = ["nr,x,site,donor", *(f"{start + i},{i % 3},{i // 6},d{i // 6}" for i in range(N))]
        x, notes = self.read(tmp_path, "\n".join(lines))
        assert "donor is the same in several rows" in notes
        assert x.shape == (N, 4) and "nr is another whole number in every row" in notes
        assert "site is the same in several rows" in notes and "call it groups" in notes


class TestTheTask:
    @pytest.mark.parametrize(
        ("labels", "wanted", "kind", "said"),
        [
            (np.eye(3)[CLASSES], "auto", "multiclass", "--task several keeps columns"),
            (np.eye(3)[CLASSES], "several", "multilabel", None),
            (np.eye(3)[CLASSES], "classes", "multiclass", None),
            (MEMBERS, "auto", "multilabel", None),
            (CLASSES * 1.0, "auto", "multiclass", "--task regression predicts the number"),
            (CLASSES * 1.0, "regression", "regression", None),
            (np.arange(N) * 1.0, "auto", "regression", "--task classes if they are not"),
            (np.arange(N) * 1.0, "classes", "multiclass", None),
            (CLASSES - 1.0, "auto", "regression", "--task classes if they are not"),
            (CLASSES - 1, "classes", "multiclass", None),
            (CLASSES, "auto", "multiclass", None),
            (CLASSES, "regression", "regression", None),
            (WORDS, "classes", "multiclass", None),
        ],
    )
    def test_is_found_out_or_said(self, npz, labels, wanted, kind, said):
        table = read(npz(a=X, labels=labels), wanted=wanted)
        assert table.kind == kind
        assert bool(table.notes) == bool(said) and (not said or said in table.notes[-1])

    def test_ages(self, npz):
        ages = np.arange(134) % 67 + 18
        table = read(npz(a=np.ones(134), labels=ages))
        assert "taken as 67 classes; --task regression predicts the number" in table.notes[0]
        np.testing.assert_array_equal(labels_of(table), [f"class {age}" for age in ages])

    @pytest.mark.parametrize(
        ("labels", "wanted", "complaint"),
        [
            (WORDS, "regression", "--task regression: labels holds words"),
            (MEMBERS, "classes", "--task classes: rows of labels are not of one class each"),
            (MEMBERS, "regression", "--task regression: labels is"),
            (CLASSES, "several", "--task several: labels is"),
            (CLASSES / 2, "classes", "--task classes: labels has numbers with fractions"),
            (
                1.6e9 + CLASSES / 2,
                "auto",
                "float32, in which they are learned, cannot tell them apart",
            ),
        ],
    )
    def test_what_it_cannot_be(self, npz, labels, wanted, complaint):
        with pytest.raises(InputError, match=complaint):
            read(npz(a=X, labels=labels), wanted=wanted)


class TestFormats:
    def labels(self, tmp_path):
        return csv(tmp_path / "labels.csv", None, None, [WORDS])

    def test_sparse_matrices_and_arrays(self, tmp_path):
        thin = np.where(X > 0, X, 0)
        scipy.sparse.save_npz(tmp_path / "a.npz", scipy.sparse.csr_matrix(thin))
        scipy.sparse.save_npz(tmp_path / "b.npz", scipy.sparse.coo_array(thin))
        np.save(tmp_path / "c.npy", X)
        paths = [tmp_path / name for name in ("a.npz", "b.npz", "c.npy")]
        table = read([*paths, self.labels(tmp_path)])
        for name, expected in {"a": thin, "b": thin, "c": X}.items():
            np.testing.assert_array_equal(table.modalities[name], expected)

    def test_a_sparse_matrix_too_large_to_be_filled_up(self, tmp_path):
        wide = scipy.sparse.csr_matrix(([1.0], ([0], [5])), shape=(N, 2**40))
        scipy.sparse.save_npz(tmp_path / "a.npz", wide)
        with pytest.raises(InputError, match=r"zeros take 98304\.0 GiB, more than a"):
            read([tmp_path / "a.npz", self.labels(tmp_path)])

    @pytest.mark.parametrize(
        ("name", "what"),
        [
            ("a.mat", "scipy.io.loadmat"),
            ("a.xlsx", "pandas.read_excel"),
            ("a.json", "a file per modality"),
        ],
    )
    def test_other_formats(self, tmp_path, name, what):
        with pytest.raises(InputError, match=what):
            read([tmp_path / name])

    def test_the_lines_of_python_that_are_advised(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        scipy.io.savemat("data.mat", {"a": X, "labels": CLASSES[:, None]})
        with pytest.raises(InputError, match="what Python writes: ") as refused:
            read([Path("data.mat")])
        exec(str(refused.value).split("writes: ")[1], {"numpy": np, "scipy": scipy})
        np.testing.assert_array_equal(read([Path("data.npz")]).modalities["a"], X)

    def test_text_that_is_no_modality(self, npz):
        genes = np.array(["BRCA1", "TP53", "KRAS"])
        table = read(npz(a=X, labels=CLASSES, gene_names=genes))
        assert "data.npz: gene_names holds names of columns and is left out" in table.notes
        with pytest.raises(InputError, match=r"text is text, .*TfidfVectorizer"):
            read(npz(a=X, labels=CLASSES, text=np.array(["a sentence"] * N)))

    @pytest.mark.parametrize(
        ("arrays", "hint"),
        [
            ({"y": CLASSES, "a": X}, "rename y to labels"),
            ({"label": CLASSES, "a": X}, "rename label to labels"),
            ({"x_train": X, "y_train": CLASSES, "x_test": X}, "tell them apart by a key split"),
            ({"a": X}, "add a key labels, or a file called labels.csv"),
        ],
    )
    def test_other_names_of_the_labels(self, npz, arrays, hint):
        with pytest.raises(InputError, match=hint):
            read(npz(**arrays))

    def test_parquet(self, tmp_path):
        pandas = pytest.importorskip("pandas")
        pytest.importorskip("pyarrow")
        a = pandas.DataFrame(X, columns=list("xyz"), index=IDS)
        a["sex"] = pandas.Series(["f", "m", None] * 4, index=IDS, dtype="category")
        a.to_parquet(tmp_path / "a.parquet")
        counted = pandas.DataFrame({"n": pandas.array([1, None, 3] * 4, dtype="Int64"), "id": IDS})
        counted[["id", "n"]].iloc[MIXED].to_parquet(tmp_path / "b.parquet", index=False)
        labels = pandas.DataFrame({"label": WORDS}, index=IDS).iloc[MIXED]
        labels.to_parquet(tmp_path / "labels.parquet")
        table = read([tmp_path / f"{name}.parquet" for name in ("a", "b", "labels")])
        np.testing.assert_array_equal(table.modalities["a"][:, :3], X[MIXED])
        np.testing.assert_array_equal(
            table.modalities["a"][:, 3], np.tile([0, 1, np.nan], 4)[MIXED]
        )
        np.testing.assert_array_equal(
            table.modalities["b"][:, 0], np.tile([1, np.nan, 3], 4)[MIXED]
        )
        assert labels_of(table).tolist() == WORDS[MIXED].tolist()

    @pytest.mark.filterwarnings("ignore")
    def test_h5ad_and_h5mu(self, tmp_path):
        anndata = pytest.importorskip("anndata")
        mudata = pytest.importorskip("mudata")
        pandas = pytest.importorskip("pandas")
        obs = pandas.DataFrame({"cell": WORDS, "groups": WORDS}, index=IDS)
        rna = anndata.AnnData(X, obs=obs)
        some = MIXED[:9]
        thin = scipy.sparse.csr_matrix(np.where(X > 0, X, 0)[some])
        protein = anndata.AnnData(thin, obs=pandas.DataFrame(index=IDS[some]))
        rna.write_h5ad(tmp_path / "rna.h5ad")
        protein.write_h5ad(tmp_path / "protein.h5ad")
        mudata.MuData({"rna": rna, "protein": protein}).write_h5mu(tmp_path / "both.h5mu")
        expected = np.full(X.shape, np.nan)
        expected[some] = np.where(X > 0, X, 0)[some]
        for names in (["rna.h5ad", "protein.h5ad"], ["both.h5mu"]):
            table = read([tmp_path / name for name in names], "cell")
            np.testing.assert_array_equal(table.modalities["rna"], X)
            np.testing.assert_array_equal(table.modalities["protein"], expected)
            assert labels_of(table).tolist() == WORDS.tolist()
            assert table.groups.tolist() == CLASSES.tolist()
        known = {"rna": Known(("2", "0"), {})}  # the names are 0, 1 and 2
        parts, notes = read_files([tmp_path / "rna.h5ad"], known=known)
        np.testing.assert_array_equal(parts["rna"].values, X[:, [2, 0]])
        assert notes == [("rna.h5ad", "columns that the model does not read: 1")]
        with pytest.raises(InputError, match="--labels COLUMN"):
            read([tmp_path / "rna.h5ad"])
        with pytest.raises(InputError, match="no obs has a column age"):
            read([tmp_path / "rna.h5ad"], "age")
        (tmp_path / "bad.h5ad").write_bytes(b"no such thing")
        with pytest.raises(InputError, match=r"cannot be read as an \.h5ad file"):
            read([tmp_path / "bad.h5ad"])

    @pytest.mark.parametrize("name", ["a.parquet", "a.h5ad", "a.h5mu"])
    def test_without_the_libraries(self, tmp_path, monkeypatch, name):
        for library in ("pandas", "anndata", "mudata"):
            monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(InputError, match=r"files need pip install -e '\.\[omics\]'"):
            read([tmp_path / name])


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

    def test_small_differences_of_large_numbers(self):
        """Unix seconds: float32 cannot tell a minute from the next."""
        y = np.arange(200) % 2
        seconds = 1.6e9 + 60 * y + np.random.default_rng(0).standard_normal(200)
        train, test = standardise(
            *(Split({"x": seconds[s, None]}, y[s]) for s in np.split(np.arange(200), 2))
        )
        expected = (seconds - seconds[:100].mean()) / seconds[:100].std()
        got = np.concatenate([train.inputs["x"], test.inputs["x"]])[:, 0]
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=1e-6)

    @pytest.mark.parametrize("value", [0.1, 1 / 3 + 1e9, -7e-300])
    def test_a_constant_is_zero_whatever_it_is(self, value):
        train, test = standardise(
            Split({"x": np.full((999, 1), value)}, None), Split({"x": np.full((2, 1), value)}, None)
        )
        assert not train.inputs["x"].any() and not test.inputs["x"].any()

    def test_very_small_numbers(self):
        x = np.array([[1e-200], [3e-200]])
        (scaled,) = standardise(Split({"x": x}, x))
        np.testing.assert_allclose(scaled.inputs["x"], [[-1], [1]], rtol=1e-6)

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
