"""`experiments.datasets.vqa_answers`: the official accuracy, checked by hand and by brute force."""

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.datasets.vqa_answers import (
    WORTH,
    normalised,
    vocabulary,
    votes,
    vqa_accuracy,
)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.exists(), reason="there is no ../shared/data")


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("The  Cat.", "cat"),
        ("1,000", "1000"),
        ("black/white", "black white"),
        ("red, white", "red white"),
        ("t-shirt", "t shirt"),
        ("None", "0"),
        ("two dogs", "2 dogs"),
        ("no-one", "no 1"),
        ("yes!", "yes"),
        ("U.S.A.", "usa"),
        ("a", ""),
        ("5.", "5"),
        ("3.5", "3.5"),
        ("10:30", "10:30"),
        ("$5", "$5"),
        ("100%", "100%"),
        ("don't", "don't"),
        ("dont", "don't"),
        ("its", "its"),
        ("Im", "im"),
        ("hed've", "he'd've"),
        ("y'allll", "y'all'll"),
        ("somebody'd", "somebodyd"),
        ("a ten-year old", "10 year old"),
    ],
)
def test_normal_form(answer, form):
    assert normalised(answer) == form


@pytest.mark.parametrize(
    ("answer", "answers", "accuracy"),
    [
        ("0", ["none"] * 4 + ["0"] * 6, 1.0),
        ("none", ["none"] * 10, 1.0),
        ("0", ["none"] * 10, 0.0),
        ("2", ["two"] * 3 + ["2"] * 2 + ["many"] * 5, 1.0),
        ("Black.", ["black"] * 10, 0.0),  # nothing is normalised where all agree
        ("Black.", ["black"] * 9 + ["dark"], 1.0),
        (" black\n", ["black"] * 10, 1.0),
        *(("x", ["x"] * n + ["y"] * (10 - n), WORTH[n]) for n in range(11)),
    ],
)
def test_accuracy(answer, answers, accuracy):
    assert vqa_accuracy(answer, answers) == accuracy


def test_accuracy_is_the_mean_over_nine_of_ten():
    rng = np.random.default_rng(0)
    words = np.array(["no", "0", "none", "The dog", "dog.", "two", "2", "t-shirt", "t shirt", "a"])
    for _ in range(10_000):
        answers = rng.choice(words[: rng.integers(1, 11)], 10).tolist()
        answer = str(rng.choice(words))
        form = normalised if len(set(answers)) > 1 else str
        subsets = itertools.combinations(map(form, answers), 9)
        brute = np.mean([min(1, nine.count(form(answer)) / 3) for nine in subsets])
        assert vqa_accuracy(answer, answers) == pytest.approx(brute, abs=1e-12)


def test_other_than_ten_answers_are_refused():
    with pytest.raises(ValueError, match="3 answers to a question; expected 10"):
        vqa_accuracy("yes", ["yes"] * 3)


def best_possible(tens, numbers):
    """[N] accuracy of the best answer of a vocabulary."""
    found = (votes(ten, numbers).values() for ten in tens)
    return np.array([max((WORTH[n] for n in given), default=0.0) for given in found])


def test_votes_are_the_official_accuracy():
    numbers = {"yes": 0, "1 way": 1, "0": 2}
    assert votes(["yes"] * 7 + ["Yes!"] + ["no"] * 2, numbers) == {0: 8}
    assert votes(["one way"] * 10, numbers) == {}  # unanimous: "1 way" is worth nothing
    assert votes(["one way"] * 2 + ["maybe"] * 8, numbers) == {1: 2}
    assert best_possible([["one way"] * 2 + ["none"] + ["so"] * 7], numbers).tolist() == [0.6]


def test_vocabulary():
    answers = ["yes"] * 3 + ["No."] * 2 + ["no"] * 2 + ["maybe"]
    assert vocabulary(answers, common=2) == ("no", "yes")
    assert vocabulary(answers, common=4) == ("no",)


@shared
def test_published_vocabulary_is_in_normal_form():
    answers = json.loads((SHARED / "vqav2_sample" / "answer_dict.json").read_text())[0]
    assert len(answers) == 3129
    assert all(normalised(answer) == answer for answer in answers)


@shared
def test_three_real_questions():
    data = json.loads((SHARED / "vqav2_sample" / "annotations.json").read_text())["annotations"]
    ten = {one["question_id"]: [a["answer"] for a in one["answers"]] for one in data}
    first = {"net": 1.0, "netting": 0.3, "mesh": 0.3, "The net.": 1.0, "yes": 0.0}
    found = {answer: vqa_accuracy(answer, ten[458752000]) for answer in first}
    assert found == first
    assert vqa_accuracy("catcher", ten[458752001]) == 0.3
    assert vqa_accuracy("orange", ten[458752002]) == 1.0
    assert vqa_accuracy("Orange!", ten[458752002]) == 0.0


def annotations(part):
    path = SHARED / "vqav2_pairs" / f"vqa_annotations_{part}.json.gz"
    return json.loads(gzip.open(path).read())["annotations"]


@shared
def test_of_real_answers():
    rows = annotations("test")
    ten = [[one["answer"] for one in row["answers"]] for row in rows]
    always_yes = np.mean([vqa_accuracy("yes", answers) for answers in ten])
    assert always_yes == pytest.approx(0.224, abs=5e-4)
    published = json.loads((SHARED / "vqav2_sample" / "answer_dict.json").read_text())[0]
    best = best_possible(ten, published)
    assert 0.931 <= best.mean() <= 0.934
    kinds = np.array([row["answer_type"] for row in rows])
    assert best[kinds == "yes/no"].mean() > 0.99
