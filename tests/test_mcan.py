"""`experiments.models.mcan`: what is not there changes nothing, wherever the fusion is."""

import jax
import numpy as np
import pytest

from deq_fusion_jax import Anderson, DEQFusion, TokenFusion
from deq_fusion_jax.baselines import Sum
from experiments.models.mcan import MCAN

DEQ = DEQFusion(16, solver=Anderson(tol=1e-5, max_steps=100))
TOKENS = TokenFusion(16, solver=Anderson(tol=1e-5, max_steps=100))
SLOW = pytest.mark.slow


def inputs():
    rng = np.random.default_rng(0)
    image = rng.standard_normal((3, 5, 6)).astype(np.float32)
    image[0, 3:], image[2, 1:] = np.nan, np.nan
    question = np.array([[3, 4, 5, 2], [6, 2, 0, 0], [2, 0, 0, 0]], np.int32)
    return {"image": image, "question": question}


def made(fusion, place):
    model = MCAN(fusion, 7, 10, 16, layers=1, heads=4, embedding=8, place=place)
    variables = model.init(jax.random.key(0), inputs())
    return variables, jax.jit(lambda given: model.apply(variables, given))


@pytest.fixture(
    scope="module",
    params=[
        (Sum(16), "late"),
        (Sum(16), "middle"),
        (Sum(16), "early"),
        pytest.param((DEQ, "late"), marks=SLOW),
        pytest.param((DEQ, "middle"), marks=SLOW),
        pytest.param((DEQ, "early"), marks=SLOW),
        pytest.param((TOKENS, "late"), marks=SLOW),
    ],
    ids=lambda case: f"{type(case[0]).__name__}-{case[1]}",
)
def predict(request):
    return made(*request.param)[1]


def close(one, other):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing(predict):
    given = inputs()
    longer = {
        "image": np.pad(given["image"], ((0, 0), (0, 2), (0, 0)), constant_values=np.nan),
        "question": np.pad(given["question"], ((0, 0), (0, 3))),
    }
    out = predict(given)
    assert out.logits.shape == (3, 7) and np.isfinite(out.logits).all()
    close(predict(longer).logits, out.logits)


def test_regions_have_no_order(predict):
    given = inputs()
    turned = given | {"image": given["image"][:, ::-1]}
    close(predict(turned).logits, predict(given).logits)


def test_an_answer_does_not_depend_on_its_batch(predict):
    given = inputs()
    alone = {name: x[1:2] for name, x in given.items()}
    close(predict(alone).logits, predict(given).logits[1:2])


def test_words_have_an_order_and_pictures_count(predict):
    given = inputs()
    swapped = given | {"question": given["question"][:, [1, 0, 2, 3]]}
    other = given | {"image": given["image"] + 1}
    out = np.asarray(predict(given).logits)
    assert np.abs(np.asarray(predict(swapped).logits) - out)[:2].max() > 1e-3
    assert np.abs(np.asarray(predict(other).logits) - out).max() > 1e-3


def test_solves_are_told_by_picture():
    out = made(DEQ, "middle")[1](inputs()).fusion
    assert out.stats.steps.shape == (3,) and out.stats.converged.all()
    gates = np.asarray(out.gates["image"])
    assert gates.shape == (3, 5, 16) and not gates[0, 3:].any() and gates[1].any()


def test_parameters_are_those_of_the_published_sizes():
    """MCAN-small without its words' vectors, 51.6 million, but for vectors of 512, not of 1,024."""
    model = MCAN(Sum(512), 3129, 20_000, 512)
    shapes = {"image": np.zeros((1, 36, 2048), "f4"), "question": np.ones((1, 14), "i4")}
    params = jax.eval_shape(model.init, jax.random.key(0), shapes)["params"]
    sizes = {name: sum(x.size for x in jax.tree.leaves(of)) for name, of in params.items()}
    layers = sum(size for name, size in sizes.items() if name.startswith("of_"))
    assert layers == pytest.approx(18.9e6 + 25.2e6, rel=0.01)
    assert sizes["read"] == pytest.approx(1.7e6, rel=0.05)
    assert sizes["see"] == pytest.approx(1.0e6, rel=0.05)
