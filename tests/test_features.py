"""`python -m experiments.features` on data made here, at first with no option but the file."""

import json
from functools import partial

import numpy as np
import pytest

from experiments import features
from experiments.common.errors import InputError
from experiments.datasets.features import read, strata
from experiments.datasets.found import what_was_found
from experiments.datasets.preprocess import draw_split
from experiments.training.run_directory import (
    begin_run,
    check_same_run,
    command_line,
    opened_run,
    saved_config,
)

N = 240


@pytest.fixture
def main(run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return partial(run_command, features.main)


@pytest.fixture
def results(main, tmp_path):
    """results.json of a run on these arrays, and what it printed."""

    def run(*options, **arrays):
        np.savez(tmp_path / "made_up.npz", **arrays)
        status, out, err = main("made_up.npz", *options)
        assert status == 0, err
        (run_dir,) = (tmp_path / "runs" / "features").iterdir()
        return json.loads((run_dir / "results.json").read_text(encoding="utf-8")), out, run_dir

    return run


RNG = np.random.default_rng(0)
SIGN = {name: RNG.choice([-1.0, 1.0], N) for name in "abc"}


BRIEF = ("--fusion", "concat", "--epochs", 12)


def around(sign, *shape):
    """Rows of noise whose mean tells the sign."""
    return sign.reshape(-1, *(1 for _ in shape)) + 0.7 * RNG.standard_normal((N, *shape))


@pytest.mark.slow
def test_classes_that_show_in_both_modalities_together(results):
    """An exclusive or: one modality alone is worth a coin."""
    labels = (SIGN["a"] * SIGN["b"] > 0).astype(int)
    x = {"a": around(SIGN["a"], 8), "b": around(SIGN["b"], 6, 4)}
    got, out, run_dir = results("--epochs", 15, **x, labels=labels)
    assert got["test"]["accuracy"] > 0.9 and got["data"] == "real"
    assert got["dataset"] == "made_up" and got["solver"]["converged"] == 1
    assert "made_up: 240 rows, multiclass, 2 classes" in out and "b [6, 4]" in out
    assert "168 train, 36 validation, 36 test rows, drawn" in out
    report = (run_dir / "report.md").read_text(encoding="utf-8")
    assert "python -m experiments.features made_up.npz --fusion deq" in report
    assert "the most frequent class" in report and "logistic regression" in report


@pytest.mark.slow
def test_the_order_of_positions_is_seen(results):
    """Which half of an image is bright, and a number of its own in another modality."""
    bright = RNG.standard_normal((N, 8, 8, 1))
    bright[SIGN["a"] > 0, :, :4] += 1
    bright[SIGN["a"] < 0, :, 4:] += 1
    labels = 2 * (SIGN["a"] > 0) + (SIGN["b"] > 0)
    small = "--hidden", 16, "--epochs", 10  # convolutions are slow as the tests compile them
    got, *_ = results(*small, a=bright, b=around(SIGN["b"], 6), labels=labels)
    assert got["test"]["accuracy"] > 0.9 and got["selection"] == "cross-validation"


@pytest.mark.slow
def test_a_linear_model_far_above_is_said_first(results):
    """The mean over positions, as asked for, shows nothing of what a linear model reads."""
    bright = RNG.standard_normal((N, 6, 6, 1))
    bright[:, :, :3] += SIGN["a"][:, None, None, None]
    bright[:, :, 3:] -= SIGN["a"][:, None, None, None]
    options = "--positions", "mean", "--fusion", "concat", "--epochs", 10
    got, out, run_dir = results(*options, a=bright, labels=(SIGN["a"] > 0).astype(int))
    assert got["test"]["accuracy"] < 0.8 < got["floors"]["logistic regression"]["accuracy"]
    said = "Warning: logistic regression is far better"
    assert said in out and out.index(said) < out.index("validation  ")
    report = (run_dir / "report.md").read_text(encoding="utf-8")
    assert report.index(said[9:]) < report.index("## Results")


@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["cross_attention", "tokens", "tokens_unrolled"])
def test_a_fusion_of_positions(results, fusion):
    """Which of four words names the colour of one of three objects: only together they tell."""
    colours, named = RNG.integers(0, 2, (N, 3)), RNG.integers(0, 3, N)
    objects = np.concatenate([np.eye(2)[colours], np.tile(np.eye(3), (N, 1, 1))], axis=2)
    word = np.repeat(np.eye(3)[named][:, None], 2, axis=1)
    word[::2, 1] = np.nan  # shorter sentences
    noisy = objects + 0.1 * RNG.standard_normal(objects.shape)
    small = "--features", 16, "--hidden", 16, "--epochs", 20, "--learning-rate", 1e-2
    options = "--fusion", fusion, "--positions", "mean", "--mixing", 0, *small
    labels = colours[np.arange(N), named]
    got, *_ = results(*options, objects=noisy, word=word, labels=labels)
    assert got["test"]["accuracy"] > 0.9 > got["floors"]["logistic regression"]["accuracy"]
    if got["solver"] and fusion == "tokens":
        assert got["solver"]["converged"] > 0.95


@pytest.mark.slow
def test_several_classes_a_row(results):
    x = {name: around(sign, 5) for name, sign in SIGN.items()}
    labels = np.stack([SIGN["a"] > 0, SIGN["b"] > 0, SIGN["c"] * SIGN["a"] > 0], axis=1)
    got, out, _ = results(*BRIEF, **x, labels=labels)
    assert got["test"]["micro_f1"] > 0.9
    assert "multilabel, 3 classes" in out and "always the frequent classes" in out
    assert "logistic regression" in out


def test_a_regression_with_missing_rows(results):
    x = {name: around(SIGN[name], 5) for name in "ab"}
    x["a"][::4] = np.nan
    y = 100 + 10 * SIGN["a"] + 30 * SIGN["b"] + RNG.standard_normal(N)
    got, out, _ = results(*BRIEF, **x, labels=y)
    assert got["test"]["r2"] > 0.85 and got["test"]["mae"] < 12
    assert "regression" in out and "a [5], missing in 60 rows" in out
    assert "ridge regression" in out


X, CLASSES = RNG.standard_normal((12, 3)), np.arange(12) % 3


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"a": X, "labels": CLASSES[:11]}, "a is float64 (12, 3); expected numbers [11, …]"),
        ({"a": X, "labels": CLASSES.astype(object)}, "labels is an object array"),
        ({"a": X, "b": np.full((12, 2), np.nan), "labels": CLASSES}, "b is missing in every row"),
        ({"a": X, "labels": np.ones(12, int)}, "labels are 1 in every row"),
        ({"a": X, "labels": CLASSES - 1}, "row 0 is -1; classes are counted from 0"),
        ({"a": X[:2], "labels": CLASSES[:2]}, "labels has 2 rows; at least 10"),
        ({"a": X, "labels": np.arange(12)}, "'class 0' has 1 of 12 rows"),
        ({"a": X, "labels": X}, "of several numbers predict one at a time"),
        ({"a": X + 1j, "labels": CLASSES}, "a is complex128"),
        ({"a/b": X, "labels": CLASSES}, "a modality is called 'a/b'; use letters"),
        ({"": X, "labels": CLASSES}, "a modality is called ''"),
        ({"sum": X, "labels": CLASSES}, "a modality is called sum, as a fusion is"),
        ({"a": X, "labels": CLASSES, "split": np.minimum(CLASSES + 2 * (CLASSES > 0), 2)}, "split"),
        ({"a": X, "labels": (CLASSES > 0) * 1, "split": CLASSES}, "all training rows are of"),
        ({"a": X, "labels": CLASSES / 2, "split": (CLASSES + 1) % 3}, "the training rows all have"),
        (
            {"a": X, "labels": np.eye(2)[CLASSES % 2] * (CLASSES > 0)[:, None], "split": CLASSES},
            "no training row",
        ),
    ],
)
def test_a_bad_file(main, tmp_path, arrays, complaint):
    np.savez(tmp_path / "bad.npz", **arrays)
    status, _, err = main("bad.npz")
    assert status == 2 and complaint in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "nothing to read"),
        (["none.npz"], "none.npz cannot be read"),
        (["none.npz", "--data-dir", "x"], "--help lists the options"),
        (["none.npz", "--data-sha256", "x"], "--help lists the options"),
        (["none.npz", "--task", "ranking"], "--help lists the options"),
    ],
)
def test_a_bad_command(main, words, complaint):
    status, _, err = main(*words)
    assert status == 2 and complaint in err and err.count("\n") == 1


def test_the_modalities_are_named_by_the_reading_of_the_run(tmp_path):
    """`compare` asks for them: with the labels in one of several columns they were not found."""
    rows = "\n".join(f"p{i},{i % 2},{i}" for i in range(12))
    (tmp_path / "labels.csv").write_text(f"id,diagnosis,age\n{rows}\n")
    (tmp_path / "a.csv").write_text("id,x\n" + "\n".join(f"p{i},0.{i}" for i in range(12)))
    words = [str(tmp_path / name) for name in ("a.csv", "labels.csv")]
    config = features.parse_args([*words, "--labels", "diagnosis"])
    assert features.modalities(config) == ("a",)


def test_only_a_run_on_the_same_data_is_resumed(main, tmp_path):
    words = ["data.npz", "--run-dir", "run"]
    np.savez(tmp_path / "data.npz", a=X, labels=CLASSES)
    config = features.parse_args(words)
    with opened_run("features", config) as run_dir:
        begin_run(run_dir, "features", config)
    again = features.parse_args([*words, "--resume"])
    check_same_run(run_dir, saved_config(run_dir), "features", again)
    np.savez(tmp_path / "data.npz", a=X + 1, labels=CLASSES)
    status, _, err = main(*words, "--resume")
    assert status == 2 and "was run with data_sha256 = " in err and err.count("\n") == 1
    assert "sha256" not in command_line("features", config)


class TestWhatIsSaid:
    @pytest.fixture
    def said(self, tmp_path):
        def lines(**arrays):
            np.savez(tmp_path / "data.npz", **arrays)
            table = read([tmp_path / "data.npz"])
            dataset, _ = features.prepare(table, features.split_of(table, 0))
            return "\n".join(what_was_found(table, dataset))

        return lines

    def test_classes_and_what_is_unknown(self, said):
        a = RNG.standard_normal((60, 5, 2))
        a[0], a[1, 3:], a[2, 0, 0] = np.nan, np.nan, np.nan
        labels = np.repeat(["cat", "dog", "owl"], [40, 18, 2])
        assert said(a=a, b=np.ones(60), labels=labels).splitlines() == [
            "data: 60 rows, multiclass, 3 classes",
            "  a [5, 2], missing in 1 rows, padded at 2 positions, 1 unknown values take the mean",
            "  b [1]",
            "  42 train, 9 validation, 9 test rows, drawn with equal shares of the labels",
            "  cat: 40, dog: 18, owl: 2",
            "Note: rows of classes with fewer than 3 (1 classes) stay in train.",
        ]

    def test_what_may_be_wrong(self, said):
        text = said(a=np.zeros((30, 300)), labels=np.arange(30) * 2.0)
        assert "labels 0 to 58, mean 29" in text
        assert "--task classes if they are not" in " ".join(text.split())
        assert "Note: 300 features of 20 training rows" in text
        split = np.repeat([0, 1, 2], 10)
        text = said(a=np.zeros((30, 3)), labels=np.repeat([0, 1, 2], [5, 15, 10]), split=split)
        assert "as given" in text and "Note: no training row is of class 2." in text

    def test_rows_of_one_group_stay_together(self, said, tmp_path):
        """Five rows of a patient, labelled by patient at random."""
        patient = np.repeat(np.arange(40), 5)
        labels = RNG.permutation(np.arange(40) % 2)[patient]
        text = said(a=RNG.standard_normal((200, 3)), labels=labels, groups=patient)
        assert "drawn with equal shares of the labels, groups kept together" in text
        table = read([tmp_path / "data.npz"])
        split = draw_split(strata(table), 0, table.groups)
        assert [len(part.labels) for part in features.prepare(table, split)[0][3:6]] == [
            *np.bincount(split)
        ]
        assert (np.bincount(np.unique(np.stack([patient, split]), axis=1)[0]) == 1).all()
        text = said(a=RNG.standard_normal((200, 3)), labels=labels, patient=patient)
        assert "patient is the same in several rows" in text and "call it groups" in text
        split = np.arange(200) % 3
        text = said(a=np.ones(200), labels=labels, groups=patient, split=split)
        assert "Note: the split parts 40 of 40 groups; scores may be too good to be true." in text

    def test_too_few_groups(self, said):
        with pytest.raises(InputError, match="there are 2 groups; at least 3 are needed"):
            said(a=np.ones(40), labels=np.arange(40) % 2, groups=np.arange(40) // 20)
        labels = np.arange(40) // 20
        with pytest.raises(InputError, match="'class 0' has 2 of 4 groups"):
            said(a=np.ones(40), labels=labels, groups=np.arange(40) // 10)

    def test_what_is_missing_where(self, said):
        a, b, split = np.ones((60, 2)), np.ones((60, 2)), np.repeat([0, 1, 2], 20)
        b[split == 2], a[:3], b[:3] = np.nan, np.nan, np.nan
        text = " ".join(said(a=a, b=b, labels=np.arange(60) % 2, split=split).split())
        assert "data: 57 rows" in text and "17 train, 20 validation, 20 test rows" in text
        assert "Note: 3 rows without any modality are left out." in text
        count = "0 of 17 train, 0 of 20 validation, 20 of 20 test rows"
        assert f"Note: b is missing in {count}" in text and "a is missing" not in text
