"""`experiments.datasets.vqa_json`: real questions, and files that are not what they should be."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from experiments.common.errors import InputError
from experiments.datasets.vqa_answers import vqa_accuracy
from experiments.datasets.vqa_json import KINDS, read_questions

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
shared = pytest.mark.skipif(not SHARED.exists(), reason="there is no ../shared/data")


def question(number, **changed):
    return {"image_id": number // 1000, "question": "Is it red?", "question_id": number} | changed


def annotation(number, **changed):
    answers = [{"answer": "yes", "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]
    return {
        "question_id": number,
        "image_id": number // 1000,
        "question_type": "is it",
        "answer_type": "yes/no",
        "multiple_choice_answer": "yes",
        "answers": answers,
    } | changed


@pytest.fixture
def read(tmp_path):
    """Reads lists of questions and annotations, or other texts, from files."""

    def read(questions, annotations=None):
        paths = []
        for name, rows in (("questions", questions), ("annotations", annotations)):
            if rows is not None:
                paths.append(tmp_path / f"{name}.json")
                whole = rows if isinstance(rows, str) else json.dumps({name: rows})
                paths[-1].write_text(whole)
        return read_questions(*paths)

    return read


def test_answers_come_in_the_order_of_the_questions(read):
    first = annotation(7001, answer_type="number", question_type="how many")
    found = read(
        [question(7001), question(8002, question="Is it blue?")], [annotation(8002), first]
    )
    assert found.ids.tolist() == [7001, 8002] and found.images.tolist() == [7, 8]
    assert found.texts == ("Is it red?", "Is it blue?")
    assert [KINDS[kind] for kind in found.answers.kinds] == ["number", "yes/no"]
    assert found.answers.types == ("how many", "is it") and found.answers.most == ("yes", "yes")
    assert found.answers.ten == (("yes",) * 10,) * 2


def test_nobody_has_answered(read):
    assert read([question(7001)]).answers is None


@pytest.mark.parametrize(
    ("questions", "annotations", "complaint"),
    [
        ("{", None, "questions.json is damaged, or no JSON"),
        ("[1]", None, "has no list 'questions'"),
        ([], None, "has no list 'questions'"),
        (
            [{"question_id": 1}],
            None,
            "question 1 has no 'image_id' of type int; expected",
        ),
        ([question(1), question(2, question=5)], None, "question 2 has no 'question' of type str"),
        ([question(5), question(5)], None, "has question 5 more than once"),
        ([question(1), question(2)], [annotation(1)], "no answers to 1 of the 2 questions of"),
        ([question(1)], [{"question_id": 1, "answers": []}], "has no 'question_type' of type str"),
        ([question(1)], [annotation(1, answers=[])], "question 1 has 0 answers, or some without"),
        ([question(1)], [annotation(1, answers=[{}] * 10)], "has 10 answers, or some without text"),
        ([question(1)], [annotation(1, answer_type="x")], "of answer type 'x', not one of"),
    ],
)
def test_what_is_no_such_file_is_refused(read, questions, annotations, complaint):
    with pytest.raises(InputError, match=complaint):
        read(questions, annotations)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nothing.json: No such file"):
        read_questions(tmp_path / "nothing.json")


@shared
def test_the_sample_says_what_it_lacks():
    folder = SHARED / "vqav2_sample"
    found = read_questions(folder / "questions.json")
    assert len(found.texts) == 3
    with pytest.raises(InputError, match="annotation 1 has no 'question_type' of type str"):
        read_questions(folder / "questions.json", folder / "annotations.json")


@shared
def test_real_questions_and_what_can_be_had_without_a_picture():
    """The most frequent answer to each type of question, of training rows, on test rows."""
    folder = SHARED / "vqav2_pairs"
    names = "vqa_questions_{}.json.gz", "vqa_annotations_{}.json.gz"
    train, test = (
        read_questions(*(folder / name.format(part) for name in names))
        for part in ("train", "test")
    )
    assert (len(train.ids), len(test.ids)) == (48_061, 2_962)
    assert len(np.unique(np.concatenate([train.images, test.images]))) <= 39_423
    counts = defaultdict(Counter)
    for kind, answer in zip(train.answers.types, train.answers.most, strict=True):
        counts[kind][answer] += 1
    usual = {kind: answers.most_common(1)[0][0] for kind, answers in counts.items()}
    accuracies = np.array(
        [
            vqa_accuracy(usual[kind], ten)
            for kind, ten in zip(test.answers.types, test.answers.ten, strict=True)
        ]
    )
    assert accuracies.mean() == pytest.approx(0.3364, abs=1e-4)
    of_kind = [accuracies[test.answers.kinds == kind].mean() for kind in range(len(KINDS))]
    assert of_kind == pytest.approx([0.646, 0.265, 0.083], abs=1e-3)
