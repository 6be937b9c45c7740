"""The baselines against their formulas, and what all fusions have in common."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax import DEQFusion, FusionCell, FusionState, Picard
from deq_fusion_jax.baselines import (
    FUSIONS,
    GMU,
    Attention,
    Concat,
    LowRank,
    Sum,
    Unimodal,
    WeightTied,
    make_fusion,
)
from deq_fusion_jax.injection import Inject

WIDTHS = {"audio": 5, "image": 16, "text": 6}  # the image has the width of the fusion
FEATURES = 16
ALL = [*FUSIONS, "text", "gmu, tied"]
for other in ("deq", "tokens", "tokens_unrolled", "cross_attention"):  # have their own tests
    ALL.remove(other)


def draw(widths=WIDTHS, positions=(), batch=4, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=(batch, *positions, d)), dtype)
        for name, d in widths.items()
    }


def make(name, **options):
    if name == "gmu, tied":
        name, options = "gmu", {"tied": True, **options}
    if name == "weight_tied":
        options = {"steps": 3, **options}
    return make_fusion(name, FEATURES, list(WIDTHS), **options)


def parameters(fusion, inputs, seed=1):
    """Random variables of the right shapes, drawn in NumPy: `init` takes seconds to compile."""
    shapes = jax.eval_shape(fusion.init, jax.random.key(0), inputs)
    rng = np.random.default_rng(seed)

    def fill(path, a):
        name = path[-1].key
        centre = 1 if name == "scale" or name.startswith("weight_") else 0
        fan_in = a.shape[-2] if a.ndim > 1 else 10
        return jnp.asarray(centre + 0.6 * rng.normal(size=a.shape) / fan_in**0.5, a.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def build(name, inputs, **options):
    fusion = make(name, **options)
    return fusion, parameters(fusion, inputs)


def apply(fusion, variables, *args, **kwargs):
    return jax.jit(fusion.apply)(variables, *args, **kwargs)


@functools.cache
def example(name):
    """Inputs [B, T, d_i], variables, and the jitted (variables, inputs, mask) → output, gradients.

    The gradients are those of a squared error, with respect to variables and inputs.
    """
    inputs = draw(positions=(3,))
    fusion, variables = build(name, inputs)
    target = draw({"target": FEATURES}, (3,), seed=2)["target"]

    def loss(variables, inputs, mask):
        out = fusion.apply(variables, inputs, mask)
        return jnp.mean((out.fused - target) ** 2), out

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def run(variables, inputs, mask):
        (_, out), gradients = both(variables, inputs, mask)
        return out, gradients

    return inputs, variables, run


def close(a, b, rtol=1e-5, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


def wide(tree):
    """The tree in float64."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


EVERY = np.ones((4, 3))


# --- what all of them have in common ----------------------------------------------------------


@pytest.mark.parametrize("positions", [(), (3,), (2, 3)])
@pytest.mark.parametrize("name", ALL)
def test_shapes(name, positions):
    inputs = draw(positions=positions)
    out, variables = jax.eval_shape(make(name).init_with_output, jax.random.key(0), inputs)
    shape = (4, *positions, FEATURES)
    assert out.fused.shape == shape
    assert (out.gates is not None) == (name in ("weight_tied", "gmu", "gmu, tied"))
    assert (out.modalities is None) == (out.stats is None) == (name != "weight_tied")
    for by_modality in (out.gates, out.modalities):
        assert by_modality is None or {k: v.shape for k, v in by_modality.items()} == {
            k: shape for k in WIDTHS
        }
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves((out.fused, variables)))


@pytest.mark.parametrize("name", ALL)
def test_masked_is_dropped(name):
    inputs, variables, run = example(name)
    holes = inputs | {"audio": inputs["audio"].at[1].set(jnp.nan).at[3].set(jnp.inf)}
    masked, _ = run(variables, holes, np.array([[1, 1, 1], [0, 1, 1]] * 2))
    full, _ = run(variables, inputs, EVERY)
    without = {k: v for k, v in inputs.items() if k != "audio"}
    dropped = apply(make(name), variables, without)
    close(masked.fused[::2], full.fused[::2])
    close(masked.fused[1::2], dropped.fused[1::2])
    if name != "text":
        assert not np.allclose(full.fused, dropped.fused, atol=1e-3)
    if masked.gates is not None:
        assert not np.any(masked.gates["audio"][1::2])
        for other in without:
            close(masked.gates[other][1::2], dropped.gates[other][1::2])


@pytest.mark.parametrize("name", ALL)
def test_what_a_missing_modality_holds_touches_no_gradient(name):
    inputs, variables, run = example(name)
    mask = np.array([[0, 1, 1]] * 2 + [[1, 1, 0]] * 2)  # audio, image, text
    holes = inputs | {"audio": inputs["audio"].at[:2].set(jnp.nan)}
    holes["text"] = holes["text"].at[2:].set(jnp.nan)
    _, gradients = run(variables, holes, mask)
    _, by_inputs = gradients
    close(gradients, run(variables, inputs, mask)[1])
    assert not np.any(by_inputs["audio"][:2]) and not np.any(by_inputs["text"][2:])


@pytest.mark.parametrize("name", ALL)
def test_a_sample_without_any_modality_is_finite(name):
    inputs, variables, run = example(name)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(variables, inputs, 0 * EVERY)))


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_is_trained(name):
    inputs, variables, run = example(name)
    _, (gradient, _) = run(variables, inputs, EVERY)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    assert leaves
    for path, leaf in leaves:
        assert np.max(np.abs(leaf)) > 1e-6, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_the_dict_does_not_matter(name):
    inputs, variables, run = example(name)
    shuffled = {k: inputs[k] for k in ("text", "audio", "image")}
    apply = jax.jit(lambda v: make(name).apply(v, shuffled).fused)  # jit sorts what it is given
    close(apply(variables), run(variables, inputs, EVERY)[0].fused)


@pytest.mark.parametrize("name", ALL)
def test_dropout_is_for_training_only(name):
    inputs, variables, run = example(name)
    fusion = make(name, dropout=0.5)
    close(apply(fusion, variables, inputs).fused, run(variables, inputs, EVERY)[0].fused)
    train = jax.jit(lambda key: fusion.apply(variables, inputs, train=True, rngs={"dropout": key}))
    one, two = (train(jax.random.key(seed)).fused for seed in (0, 1))
    assert not np.allclose(one, two)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16(name):
    inputs, variables, run = example(name)
    out = apply(make(name, dtype=jnp.bfloat16), variables, inputs).fused
    assert out.dtype == jnp.bfloat16
    expected = run(variables, inputs, EVERY)[0].fused
    assert np.linalg.norm(out - expected) < 0.03 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", ALL)
def test_inputs_are_checked(name):
    fusion = make(name)
    inputs = draw()
    with pytest.raises(ValueError, match=r"'text' has shape \(3, 6\), but 'audio' has \(4, 5\)"):
        fusion.init(jax.random.key(0), inputs | {"text": jnp.zeros((3, 6))})
    with pytest.raises(ValueError, match=r"mask has shape \(4, 2\); expected \(4, 3\)"):
        fusion.init(jax.random.key(0), inputs, jnp.ones((4, 2)))


# --- the formulas -----------------------------------------------------------------------------


def linear(p, x):
    return x @ np.asarray(p["kernel"]) + np.asarray(p["bias"])


def on_concatenation(p, inputs):
    """W [x_1; …; x_M] + b with W put together from its blocks."""
    kernel = np.concatenate([p[f"kernel_{name}"] for name in sorted(inputs)])
    x = np.concatenate([inputs[name] for name in sorted(inputs)], axis=-1)
    return x @ kernel + np.asarray(p["bias"])


def test_unimodal_is_the_projected_modality():
    inputs = draw()
    fusion, variables = build("text", inputs)
    assert isinstance(fusion, Unimodal)
    out = apply(
        fusion,
        variables,
        inputs,
        {"audio": jnp.ones(4), "image": jnp.ones(4), "text": jnp.array([1, 1, 1, 0])},
    )
    expected = linear(variables["params"]["project_text"], inputs["text"])
    close(out.fused, expected * np.array([[1], [1], [1], [0]]))
    same, variables = Unimodal(FEATURES, "image").init_with_output(jax.random.key(0), inputs)
    close(same.fused, inputs["image"], 0, 0)
    assert not variables  # of the same width: no projection
    with pytest.raises(ValueError, match=r"no modality 'video' .* \['audio', 'image', 'text'\]"):
        Unimodal(FEATURES, "video").init(jax.random.key(0), inputs)


def test_sum():
    inputs = draw()
    fusion, variables = build("sum", inputs)
    p = variables["params"]
    expected = inputs["image"] + sum(
        linear(p[f"project_{i}"], inputs[i]) for i in ("audio", "text")
    )
    close(apply(fusion, variables, inputs).fused, expected)


def test_concat():
    inputs = draw()
    fusion, variables = build("concat", inputs)
    expected = np.maximum(on_concatenation(variables["params"]["dense"], inputs), 0)
    close(apply(fusion, variables, inputs).fused, expected)


def test_concat_starts_as_one_linear_layer():
    inputs = draw({"a": 300, "b": 100})
    p = Concat(512).init(jax.random.key(0), inputs)["params"]["dense"]
    for name in ("kernel_a", "kernel_b", "bias"):
        assert np.max(np.abs(p[name])) == pytest.approx(400**-0.5, rel=0.02)
        assert np.std(p[name]) == pytest.approx((3 * 400) ** -0.5, rel=0.1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("names", [("audio", "image"), ("audio", "image", "text")])
def test_gmu(names, tied):
    inputs = draw({name: WIDTHS[name] for name in names})
    fusion, variables = build("gmu", inputs, tied=tied)
    p = variables["params"]
    h = {i: np.tanh(linear(p[f"encode_{i}"], inputs[i])) for i in names}
    logits = {i: on_concatenation(p[f"gate_{i}"], inputs) for i in names}
    if tied:
        total = sum(np.exp(a) for a in logits.values())
        z = {i: np.exp(a) / total for i, a in logits.items()}
    else:
        z = {i: 1 / (1 + np.exp(-a)) for i, a in logits.items()}
    out = apply(fusion, variables, inputs)
    close(out.fused, sum(z[i] * h[i] for i in names))
    close(out.gates, z)


def test_gmu_of_two_modalities_is_the_bimodal_unit():
    inputs = draw({"audio": 5, "image": 8})
    fusion = make_fusion("gmu", FEATURES, ["audio", "image"])
    assert fusion == GMU(FEATURES, tied=True)
    variables = parameters(fusion, inputs)
    out, p = apply(fusion, variables, inputs), variables["params"]
    difference = jax.tree.map(jnp.subtract, p["gate_audio"], p["gate_image"])
    z = 1 / (1 + np.exp(-on_concatenation(difference, inputs)))
    h = {i: np.tanh(linear(p[f"encode_{i}"], inputs[i])) for i in inputs}
    close(out.fused, z * h["audio"] + (1 - z) * h["image"])
    assert make_fusion("gmu", FEATURES, list(WIDTHS)) == GMU(FEATURES, tied=False)
    assert make_fusion("gmu", FEATURES, ["a", "b"], tied=False) == GMU(FEATURES, tied=False)


@pytest.mark.parametrize("names", [("audio", "image"), ("audio", "image", "text")])
def test_low_rank_is_the_contraction_of_the_full_tensor(names):
    """Σ_r w_r W_1^r ⊗ … ⊗ W_M^r against [x_1; 1] ⊗ … ⊗ [x_M; 1], both formed in full."""
    with jax.enable_x64(True):
        inputs = draw({name: WIDTHS[name] for name in names}, dtype=jnp.float64)
        fusion, variables = build("lmf", inputs, rank=3)
        variables = wide(variables)
        p = variables["params"]
        assert p["factor_audio"].shape == (3, 6, FEATURES)
        letters = "ijk"[: len(names)]
        factors = [p[f"factor_{name}"] for name in names]
        subscripts = ",".join(f"r{a}o" for a in letters)
        tensor = np.einsum(f"r,{subscripts}->{letters}o", p["weights"], *factors)
        extended = [np.concatenate([inputs[n], np.ones((4, 1))], axis=1) for n in names]
        outer = np.einsum(",".join(f"b{a}" for a in letters) + f"->b{letters}", *extended)
        expected = np.einsum(f"b{letters},{letters}o->bo", outer, tensor) + p["bias"]
        out = apply(fusion, variables, inputs)
        assert out.fused.dtype == jnp.float64
        close(out.fused, expected, 1e-12, 1e-12)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_low_rank_starts_with_unit_variance(count):
    inputs = draw({f"m{i}": 50 for i in range(count)}, batch=200)
    out, _ = LowRank(64).init_with_output(jax.random.key(0), inputs)
    assert np.std(out.fused) == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("present", [("audio", "image", "text"), ("image", "text")])
def test_attention(present):
    inputs = draw(positions=(2,))
    fusion, variables = build("attention", inputs, heads=2)
    p = jax.tree.map(np.asarray, variables["params"])
    mask = {name: jnp.full(4, name in present) for name in inputs}
    project = {name: inputs[name] for name in ("image",)}
    project |= {name: linear(p[f"project_{name}"], inputs[name]) for name in ("audio", "text")}
    t = np.stack([project[name] + p[f"embedding_{name}"] for name in present], axis=-2)
    centred = t - t.mean(-1, keepdims=True)
    n = centred / np.sqrt(t.var(-1, keepdims=True) + 1e-6) * p["norm"]["scale"] + p["norm"]["bias"]
    q, k, v = (
        np.einsum("btmd,dhe->bthme", n, p["attention"][part]["kernel"])
        for part in ("query", "key", "value")
    )
    scores = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(FEATURES / 2))
    weights = scores / scores.sum(-1, keepdims=True)
    attended = np.einsum("bthme,hed->btmd", weights @ v, p["attention"]["out"]["kernel"])
    expected = (t + attended).mean(-2)
    close(apply(fusion, variables, inputs, mask).fused, expected)


def test_attention_stays_within_a_position():
    inputs = draw(positions=(2, 3))
    fusion, variables = build("attention", inputs)
    at_one = {name: x[:, 1, 2] for name, x in inputs.items()}
    full = apply(fusion, variables, inputs).fused
    close(full[:, 1, 2], apply(fusion, variables, at_one).fused)


@pytest.mark.parametrize("heads", [0, 3])
def test_heads_divide_the_features(heads):
    with pytest.raises(ValueError, match=f"features=16 is no multiple of heads={heads}"):
        Attention(FEATURES, heads).init(jax.random.key(0), draw())


# --- the weight-tied unroll -------------------------------------------------------------------


def test_weight_tied_has_the_fields_and_the_parameters_of_deq_fusion():
    def defaults(cls):
        return {f.name: f.default for f in dataclasses.fields(cls)}

    own = {"steps", "tol", "remat", "solver", "gradient", "schedule", "batch_axis"}
    theirs, ours = defaults(DEQFusion), defaults(WeightTied)
    assert {k: v for k, v in theirs.items() if k not in own} == {
        k: v for k, v in ours.items() if k not in own
    }
    fusions = [DEQFusion(FEATURES, groups=2), WeightTied(FEATURES, groups=2)]
    shapes = [jax.eval_shape(f.init, jax.random.key(0), draw()) for f in fusions]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_weight_tied_converges_to_the_equilibrium_and_its_gradient():
    with jax.enable_x64(True):
        inputs = draw({"audio": 5, "image": 16}, dtype=jnp.float64)
        deq = DEQFusion(FEATURES, solver=Picard(tol=1e-12, max_steps=500))
        unroll = WeightTied(FEATURES, steps=200, tol=1e-11)
        variables = wide(quiet(parameters(deq, inputs)))
        target = draw({"target": FEATURES}, seed=2, dtype=jnp.float64)["target"]
        rngs = {"jacobian": jax.random.key(3)}

        def run(fusion):
            def loss(variables):
                out = fusion.apply(variables, inputs, rngs=rngs)
                return jnp.mean((out.fused - target) ** 2) + out.jacobian_penalty, out

            return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)

        (_, equilibrium), implicit = run(deq)
        (_, out), gradient = run(unroll)
        assert out.stats.converged.all() and equilibrium.stats.converged.all()
        for field in ("fused", "modalities", "gates", "jacobian_penalty"):
            close(getattr(out, field), getattr(equilibrium, field), 1e-8, 1e-8)
        close(gradient, implicit, 1e-7, 1e-8)


def quiet(variables):
    """The variables with weights in the cell small enough that it contracts."""
    cell = dict(variables["params"]["cell"])
    for name, part in cell.items():
        layer = "gate" if name == "fusion" else "dense2"
        cell[name] = part | {layer: jax.tree.map(lambda a: a / 4, part[layer])}
    return {"params": variables["params"] | {"cell": cell}}


def test_weight_tied_is_a_loop_over_the_cell():
    inputs, mask = draw({"audio": 5, "image": 16}), jnp.array([[1, 1]] * 3 + [[0, 1]])
    options = {"groups": 2, "activation_last": True}
    fusion = WeightTied(FEATURES, steps=3, tol=0.1, lift=1.0, **options)
    variables = parameters(fusion, inputs)
    target = draw({"target": FEATURES}, seed=2)["target"]

    def loop(variables):
        p = variables["params"]
        injection = Inject(FEATURES, lift=1.0).apply({"params": p["inject"]}, inputs, mask)
        cell = FusionCell(tuple(sorted(inputs)), FEATURES, **options).bind({"params": p["cell"]})
        z = jax.tree.map(jnp.zeros_like, FusionState(injection.modalities, injection.fused))
        for _ in range(3):
            z = cell(z, injection)
        return z, cell(z, injection)

    def unroll(variables):
        out = fusion.apply(variables, inputs, mask)
        return FusionState(out.modalities, out.fused), out.stats

    def run(f):
        def loss(variables):
            z, rest = f(variables)
            return sum(jnp.mean(x * target) for x in jax.tree.leaves(z)), (z, rest)

        (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
        return *out, gradient

    def flat(state):
        return np.concatenate(jax.tree.leaves(state), axis=1)

    z, after, expected = run(loop)
    got, stats, gradient = run(unroll)
    close(got, z, 1e-4, 1e-4)
    close(gradient, expected, 1e-3, 1e-4)
    change = np.linalg.norm(flat(after) - flat(z), axis=1)
    residual = change / np.linalg.norm(flat(after), axis=1)
    close(stats.residual, residual, 1e-3)
    assert stats.converged.tolist() == (residual <= 0.1).tolist()
    assert stats.steps.tolist() == [3] * 4
    assert apply(fusion, variables, inputs).jacobian_penalty is None


def test_remat_stores_less_and_changes_nothing():
    inputs = draw({"audio": 5})
    _, variables = build("weight_tied", inputs)
    partial = functools.partial

    def loss(remat, variables):
        return jnp.mean(make("weight_tied", remat=remat).apply(variables, inputs).fused ** 2)

    def stored(remat):
        pullback = jax.eval_shape(lambda v: jax.vjp(partial(loss, remat), v)[1], variables)
        return sum(x.size for x in jax.tree.leaves(pullback))

    assert stored(True) < 0.5 * stored(False)
    plain, again = (jax.jit(jax.grad(partial(loss, remat)))(variables) for remat in (False, True))
    close(again, plain)


def test_statistics_of_the_unroll_have_no_gradient():
    inputs, variables, _ = example("weight_tied")
    fusion = make("weight_tied")
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(fusion.apply(v, inputs).stats.residual)))
    assert not any(np.any(g) for g in jax.tree.leaves(gradient(variables)))


@pytest.mark.parametrize("fusion", [WeightTied(FEATURES, steps=0), LowRank(FEATURES, rank=0)])
def test_counts_are_checked(fusion):
    with pytest.raises(ValueError, match=r"=0\): expected at least 1"):
        fusion.init(jax.random.key(0), draw())


# --- by name ----------------------------------------------------------------------------------


def test_make_fusion():
    solver = Picard(tol=1e-2)
    assert make_fusion("deq", 8, ["a", "b"], solver=solver) == DEQFusion(8, solver=solver)
    assert make_fusion("weight_tied", 8, ["a", "b"], steps=3) == WeightTied(8, steps=3)
    assert make_fusion("sum", 8, ["a", "b"], dropout=0.1) == Sum(8, dropout=0.1)
    assert make_fusion("b", 8, ["a", "b"]) == Unimodal(8, "b")
    listed = r"'lmf', 'attention', 'tokens', 'tokens_unrolled', 'cross_attention', 'a', 'b'\]"
    with pytest.raises(ValueError, match=f"'mean'; choose from .*{listed}"):
        make_fusion("mean", 8, ["a", "b"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'solver'"):
        make_fusion("sum", 8, ["a", "b"], solver=solver)
