"""Reads questions and answers from the files of VQA v2, as they are or gzipped.

    questions     {…, "questions": [{"image_id", "question", "question_id"}, …]}
    annotations   {…, "annotations": [{"question_id", "question_type", "answer_type",
                   "multiple_choice_answer", "answers": [{"answer", …} × 10]}, …]}

Source: the format of the downloads at visualqa.org.
"""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.common.errors import InputError
from experiments.datasets.vqa_answers import PEOPLE

KINDS = ("yes/no", "number", "other")
OF_QUESTION = {"image_id": int, "question": str, "question_id": int}
OF_ANNOTATION = {
    "question_id": int,
    "question_type": str,
    "answer_type": str,
    "multiple_choice_answer": str,
    "answers": list,
}


class Answers(NamedTuple):
    """What ten people answered to each of N questions.

    Attributes:
      ten: [N] tuples of ten answers, as they were given.
      most: [N] the answer that most gave.
      kinds: [N] numbers of answer types in KINDS.
      types: [N] question types, the words that a question begins with.
    """

    ten: tuple[tuple[str, ...], ...]
    most: tuple[str, ...]
    kinds: np.ndarray
    types: tuple[str, ...]


class Questions(NamedTuple):
    """N questions about pictures.

    Attributes:
      ids, images: [N] int64, numbers of the questions and of their pictures.
      texts: [N] the questions.
      answers: None where nobody's are known.
    """

    ids: np.ndarray
    images: np.ndarray
    texts: tuple[str, ...]
    answers: Answers | None


def read_questions(questions: Path, annotations: Path | None = None) -> Questions:
    """Questions in the order of their file, with the answers from another one, if it is given.

    Raises:
      InputError: a file cannot be read or is no such file, a field is missing or of another kind,
        there are two questions of one number, or the answers are not those of these questions. The
        message names the file and the first question concerned.
    """
    rows = _rows(questions, "questions", OF_QUESTION)
    ids = np.array([row["question_id"] for row in rows], np.int64)
    if len(set(ids.tolist())) < len(ids):
        values, counts = np.unique(ids, return_counts=True)
        raise InputError(f"{questions} has question {values[counts > 1][0]} more than once")
    images = np.array([row["image_id"] for row in rows], np.int64)
    texts = tuple(row["question"] for row in rows)
    answers = _answers(annotations, ids, questions) if annotations else None
    return Questions(ids, images, texts, answers)


def _answers(path: Path, ids: np.ndarray, questions: Path) -> Answers:
    """In the order of the questions `ids`."""
    by_id = {row["question_id"]: row for row in _rows(path, "annotations", OF_ANNOTATION)}
    if missing := [number for number in ids.tolist() if number not in by_id]:
        raise InputError(
            f"{path} has no answers to {len(missing):,} of the {len(ids):,} questions of "
            f"{questions}, {missing[0]} first; give the annotations of the same split"
        )
    rows = [by_id[number] for number in ids.tolist()]
    return Answers(
        tuple(_ten(row, path) for row in rows),
        tuple(row["multiple_choice_answer"] for row in rows),
        np.array([_kind(row, path) for row in rows], np.int32),
        tuple(row["question_type"] for row in rows),
    )


def _ten(row: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    given = [one.get("answer") if isinstance(one, dict) else None for one in row["answers"]]
    texts = [answer for answer in given if isinstance(answer, str)]
    if len(given) != PEOPLE or len(texts) != PEOPLE:
        raise InputError(
            f"{path}: question {row['question_id']} has {len(given)} answers, or some without "
            f"text; expected {PEOPLE} of them"
        )
    return tuple(texts)


def _kind(row: Mapping[str, Any], path: Path) -> int:
    kind = row["answer_type"]
    if kind not in KINDS:
        number = row["question_id"]
        raise InputError(
            f"{path}: question {number} is of answer type {kind!r}, not one of {KINDS}"
        )
    return KINDS.index(kind)


def _rows(path: Path, name: str, fields: Mapping[str, type]) -> Sequence[Mapping[str, Any]]:
    """The list `name` of a file, whose members have these fields."""
    whole = _read(path)
    rows = whole.get(name) if isinstance(whole, dict) else None
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} has no list {name!r}; expected the {name} of VQA v2")
    for number, row in enumerate(rows):
        for field, kind in fields.items():
            value = row.get(field) if isinstance(row, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(
                    f"{path}: {name[:-1]} {number + 1} has no {field!r} of type {kind.__name__}; "
                    f"expected the fields {', '.join(fields)}"
                )
    return rows


def _read(path: Path) -> Any:
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        return json.loads(text)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zlib.error, RecursionError) as error:
        raise InputError(f"{path} is damaged, or no JSON: {error}") from error
