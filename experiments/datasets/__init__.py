"""Data sets for the experiments: every loader returns a :class:`Dataset` of NumPy arrays.

``mmimdb.load`` and ``multiomics.load`` build a TFDS data set (array_record, no TensorFlow) from
the source files once, keep it in a cache directory, and read it back.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from experiments.datasets.stream import Stream


class Split(NamedTuple):
    """N samples: one array per modality, and their labels."""

    inputs: dict[str, np.ndarray]  # modality name → [N, …]
    labels: np.ndarray  # [N, C] float32 multi-hot, or [N] int32 classes


class Dataset(NamedTuple):
    """A data set with its published split; no validation split means: carve it from train.

    Where the training rows stay on disk, they are those of `stream`, and `train` has a few of them
    that show what they look like.
    """

    name: str
    data: Literal["sample", "real"]
    classes: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split
    stream: "Stream | None" = None

    @property
    def description(self) -> str:
        """The name as tables show it: a synthetic sample is never taken for the real thing."""
        return f"{self.name} sample (synthetic)" if self.data == "sample" else self.name
