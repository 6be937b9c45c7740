"""ROSMAP and BRCA: a diagnosis from mRNA, DNA methylation and miRNA (paper §4, BRCA).

    python -m experiments.multiomics --dataset rosmap --data-dir DIR
    python -m experiments.multiomics --dataset brca --download

The encoders are those of MM-Dynamics (Han et al., CVPR 2022): x ⊙ σ(W x) → linear → ReLU → dropout,
times a scalar confidence that is trained to be the probability of the true class. The fusion
follows, then one linear layer. Beside the result stands the logistic regression of the same
features. ROSMAP's shipped split has 245 + 106 patients: one patient is about 0.01 of accuracy.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.cli import parse
from experiments.config import PublishedConfig, build_fusion, require
from experiments.datasets import Dataset, Split, multiomics
from experiments.datasets.preprocess import carve_validation, min_max
from experiments.errors import InputError, exit_cleanly
from experiments.evaluate import Metrics, Results, binary_metrics, multiclass_metrics
from experiments.run import Job, execute
from experiments.task import Prediction, Task, softmax
from experiments.train import Schedule


@dataclass(frozen=True, kw_only=True)
class Config(PublishedConfig):
    """A diagnosis from three omics.

    Attributes:
      epochs: optimiser steps on the whole training set.
      dataset: rosmap (Alzheimer's disease, 2 classes) or brca (breast cancer, 5 subtypes).
      dropout: rate in the encoders.
      learning_rate: of Adam.
      weight_decay: added to the gradient (L2).
      validation: share of the training rows that selects the epoch.
      evaluate_every: epochs between two looks at the validation rows.
      patience: looks without a better validation score before training stops.
    """

    epochs: int = 300
    dataset: Literal["rosmap", "brca"] = "rosmap"
    features: int = 300
    dropout: float = 0.5
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    jacobian_weight: float = 20.0
    validation: float = 0.2
    evaluate_every: int = 10
    patience: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.validation < 1, "validation", self.validation, "a share between 0 and 1")
        require(self.evaluate_every >= 1, "evaluate_every", self.evaluate_every, "1 or more")


def modalities(config: Config) -> tuple[str, ...]:
    return multiomics.MODALITIES


def parse_args(args: Sequence[str]) -> Config:
    return parse(Config(), args, "python -m experiments.multiomics")


class OmicsModel(nn.Module):
    """MM-Dynamics encoders → fusion → linear: {omics: [N, d_i]} → logits [N, C].

    `extras` are, per modality, the feature gates [N, d_i], the confidence [N] and the modality's
    own logits [N, C].
    """

    fusion: nn.Module
    features: int
    classes: int
    dropout: float = 0.5

    @nn.compact
    def __call__(
        self, inputs: dict[str, jax.Array], train: bool = False, **start: Any
    ) -> Prediction:
        encoded, extras = {}, {}
        # A confidence is a probability of the true class: it starts where chance is, not at 0,
        # where its sign would be left to the random weights.
        chance = nn.initializers.constant(1 / self.classes)
        for name, x in inputs.items():
            gate = nn.sigmoid(nn.Dense(x.shape[-1], name=f"gate_{name}")(x))
            h = nn.relu(nn.Dense(self.features, name=f"encode_{name}")(x * gate))
            h = nn.Dropout(self.dropout, deterministic=not train)(h)
            confidence = nn.Dense(1, bias_init=chance, name=f"confidence_{name}")(h)
            logits = nn.Dense(self.classes, name=f"classify_{name}")(h)
            encoded[name] = h * confidence
            extras[name] = (gate, confidence[:, 0], logits)
        out = self.fusion(encoded, train=train, **start)
        return Prediction(nn.Dense(self.classes, name="head")(out.fused), out, extras)


def loss(prediction: Prediction, labels: jax.Array) -> jax.Array:
    """Cross-entropy of the fused logits, plus for each modality its own cross-entropy, the mean
    feature gate, and the squared error of its confidence as the true class's probability."""
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    total = cross_entropy(prediction.logits, labels).mean()
    for gate, confidence, logits in prediction.extras.values():
        true_class = jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], axis=1)[:, 0]
        total += jnp.mean((confidence - true_class) ** 2)
        total += jnp.mean(gate) + cross_entropy(logits, labels).mean()
    return total


def metrics(labels: np.ndarray, probabilities: np.ndarray) -> Metrics:
    """Accuracy, F1 and AUC for two classes; accuracy, weighted and macro F1 for more."""
    if probabilities.shape[1] == 2:
        return binary_metrics(labels, probabilities[:, 1])
    return multiclass_metrics(labels, probabilities)


def prepare(dataset: Dataset, config: Config) -> Dataset:
    """The data with a validation split carved from train, scaled to 0 … 1 on the training rows."""
    train, validation = carve_validation(dataset.train, config.validation, config.seed)
    train, validation, test = min_max(train, validation, dataset.test)
    return dataset._replace(train=train, validation=validation, test=test)


def logistic_regression(train: Split, test: Split) -> Metrics:
    """scikit-learn's logistic regression of all features side by side, standardised.

    Its penalty is chosen among C = 0.001 … 1 by five-fold cross-validation on train.
    """
    patients = np.bincount(train.labels)
    if np.count_nonzero(patients) < 2 or patients[patients > 0].min() < 2:
        raise InputError(
            f"the training rows have {patients.tolist()} patients by class; expected at least two "
            "classes, and two patients in each"
        )
    choice = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
        {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1.0]},
        scoring="neg_log_loss",
        cv=min(5, patients[patients > 0].min()),
    )
    choice.fit(np.hstack(list(train.inputs.values())), train.labels)
    return metrics(test.labels, choice.predict_proba(np.hstack(list(test.inputs.values()))))


def run(config: Config) -> Results:
    """The whole job: data, training, one look at the test rows, report."""
    source = multiomics.load(config.dataset, config.data_dir, config.cache_dir, config.download)
    dataset = prepare(source, config)
    fusion = build_fusion(config, tuple(dataset.train.inputs))
    binary = len(dataset.classes) == 2
    task = Task(
        OmicsModel(fusion, config.features, len(dataset.classes), config.dropout),
        loss,
        metrics,
        softmax,
        monitor="auc" if binary else "macro_f1",
        jacobian_weight=config.jacobian_weight,
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(30.0),
        optax.add_decayed_weights(config.weight_decay),
        optax.adam(config.learning_rate),
    )
    schedule = Schedule(
        config.epochs, len(dataset.train.labels), config.evaluate_every, config.patience
    )
    floors = {"logistic regression": logistic_regression(source.train, source.test)}
    return execute(Job("multiomics", dataset, task, optimiser, schedule, floors), config)


@exit_cleanly()
def main() -> None:
    run(parse_args(sys.argv[1:]))


if __name__ == "__main__":
    main()
