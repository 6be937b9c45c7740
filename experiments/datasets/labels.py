"""What is to be learned, found out from the labels, or as the user says."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from experiments.common.errors import InputError
from experiments.datasets.columns import UNKNOWN, first
from experiments.datasets.numbers import to_float32

Kind = Literal["multiclass", "multilabel", "regression"]
Wanted = Literal["auto", "classes", "several", "regression"]
FEWEST = 10  # rows; with fewer there is nothing to hold out
MANY = 20  # classes; of more, whole numbers are perhaps amounts


class Labels(NamedTuple):
    """Labels as they are learned.

    Attributes:
      values: [N] int32, [N, C] float32 or [N] float32, by `kind`.
      kind: what is to be predicted.
      classes: names; none for a regression.
      notes: what was guessed.
    """

    values: np.ndarray
    kind: Kind
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_labels(labels: np.ndarray, names: Sequence[str] | None, wanted: Wanted) -> Labels:
    """Labels [N] or [N, C]; `names` are those of the columns.

    Words are classes, and so are whole numbers [N], if they are integers or few; other numbers are
    a regression. Zeros and ones [N, C] are classes where each row has a single one, or else several
    classes a row.

    Raises:
      InputError: they are none of that, or not what was wanted.
    """
    form = f"labels is {labels.dtype} {labels.shape}"
    if labels.dtype.kind not in "biufUS" or labels.ndim not in (1, 2):
        raise InputError(
            f"{form}; expected integers or words [N], zeros and ones [N, C], or floats [N]"
        )
    if len(labels) < FEWEST:
        raise InputError(
            f"labels has {len(labels)} rows; at least {FEWEST} are needed to learn and test"
        )
    labels = labels[:, 0] if labels.shape[1:] == (1,) else labels
    labels = labels.astype(int) if labels.dtype.kind == "b" else labels
    if labels.dtype.kind in "US":
        return _words(labels, form, wanted)
    if (row := first(~np.isfinite(labels))) is not None:
        raise InputError(f"{form}, and row {row} is NaN or infinite; leave such rows out")
    if labels.ndim == 2:
        return _columns(labels, names, form, wanted)
    _refuse(wanted == "several", wanted, f"{form}, one number a row")
    if wanted == "regression":
        return _regression(labels, ())
    return _numbers(labels, wanted)


def _numbers(labels: np.ndarray, wanted: Wanted) -> Labels:
    distinct = len(np.unique(labels))
    if labels.dtype.kind == "f":
        whole = bool((labels == np.round(labels)).all())
        _refuse(wanted == "classes" and not whole, wanted, "labels has numbers with fractions")
        few = distinct <= MANY and 2 * distinct <= len(labels) and labels.min() >= 0
        if wanted == "auto" and not (whole and few):
            said = "labels are whole numbers, taken as a regression; --task classes if they are not"
            return _regression(labels, (said,) if whole else ())
        found = _classes(labels.astype(np.int64), "class {}")
        said = f"labels are whole numbers saved as floats, taken as {distinct} classes; --task "
        said += "regression predicts the number"
        return found if wanted == "classes" else found._replace(notes=(said,))
    if wanted == "auto" and (row := first(labels < 0)) is not None:
        raise InputError(
            f"labels: row {row} is {labels[row]}; classes are counted from 0, and numbers to be "
            "predicted are floats; or say --task classes or --task regression"
        )
    found = _classes(labels, "class {}")
    if wanted == "classes" or distinct <= MANY:
        return found
    said = (
        f"labels are integers, taken as {distinct} classes; --task regression predicts the number"
    )
    return found._replace(notes=(said,))


def _classes(labels: np.ndarray, name: str) -> Labels:
    _tell_apart(labels)
    found, index = np.unique(labels, return_inverse=True)
    return Labels(index.astype(np.int32), "multiclass", tuple(name.format(i) for i in found))


def _regression(labels: np.ndarray, notes: tuple[str, ...]) -> Labels:
    values = to_float32(labels)
    if (row := first(~np.isfinite(values))) is not None:
        raise InputError(f"labels: row {row} is {labels[row]:g}, too large for float32")
    _tell_apart(labels)
    lost = np.abs(values - labels.astype(np.float64)).max()
    if lost > 1e-3 * labels.std(dtype=np.float64):
        raise InputError(
            f"labels lie so close to {labels.mean(dtype=np.float64):.6g} that float32, in which "
            "they are learned, cannot tell them apart; subtract their mean"
        )
    return Labels(values, "regression", (), notes)


def _words(labels: np.ndarray, form: str, wanted: Wanted) -> Labels:
    if labels.ndim == 2:
        raise InputError(f"{form}; expected one word a row, [N], or zeros and ones [N, C]")
    try:
        labels = np.char.strip(labels.astype(str))
    except UnicodeError as error:
        raise InputError(f"{form}, and not ASCII; save text as str, not bytes") from error
    _refuse(wanted in ("several", "regression"), wanted, "labels holds words, as classes have")
    if (row := first(np.isin(np.char.lower(labels), UNKNOWN))) is not None:
        raise InputError(
            f"labels: row {row} is {str(labels[row])!r}; leave such rows out, or rename the class"
        )
    return _classes(labels, "{}")


def _columns(labels: np.ndarray, names: Sequence[str] | None, form: str, wanted: Wanted) -> Labels:
    if labels.shape[1] == 0 or not np.isin(labels, (0, 1)).all():
        raise InputError(
            f"{form}; two axes mean several classes a row, zeros and ones [N, C]; of several "
            "numbers predict one at a time, floats [N]"
        )
    if idle := np.flatnonzero(labels.min(axis=0) == labels.max(axis=0)).tolist():
        value = labels[0, idle[0]]
        raise InputError(f"labels: column {idle[0]} is {value:g} in every row; leave it out")
    single = bool((labels.sum(axis=1) == 1).all())
    _refuse(wanted == "regression", wanted, form)
    _refuse(wanted == "classes" and not single, wanted, "rows of labels are not of one class each")
    named = names and not all(map(str.isdigit, names))
    classes = tuple(names if named and names else map("class {}".format, range(labels.shape[1])))
    if not single or wanted == "several":
        return Labels(labels.astype(np.float32), "multilabel", classes)
    said = "every row of labels has a single one: taken as classes; --task several keeps columns"
    notes = (said,) if wanted == "auto" else ()
    return Labels(labels.argmax(axis=1).astype(np.int32), "multiclass", classes, notes)


def _refuse(wrong: bool, wanted: str, why: str) -> None:
    if wrong:
        raise InputError(f"--task {wanted}: {why}")


def _tell_apart(labels: np.ndarray) -> None:
    if (labels == labels[0]).all():
        raise InputError(f"labels are {labels[0]} in every row; there is nothing to tell apart")
