"""The baselines against their formulas, and what all fusions have in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax import Anderson, DEQFusion, FusionCell, FusionState
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
from deq_fusion_jax.fusion import Inject

WIDTHS = {"audio": 5, "image": 16, "text": 6}  # the image has the width of the fusion
FEATURES = 16
ALL = [*FUSIONS, "text", "gmu, tied"]
ALL.remove("deq")  # has its own tests


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


def build(name, inputs, **options):
    """A fusion and variables with every parameter away from its start."""
    fusion = make(name, **options)
    variables = jax.jit(fusion.init)(jax.random.key(0), inputs)
    rng = np.random.default_rng(1)

    def shift(a):
        return a + jnp.asarray(0.02 * rng.normal(size=a.shape), a.dtype)

    return fusion, jax.tree.map(shift, variables)


def apply(fusion, variables, *args, **kwargs):
    return jax.jit(fusion.apply)(variables, *args, **kwargs)


def close(a, b, rtol=1e-5, atol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol, atol), a, b)


def wide(tree):
    """The tree in float64."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


# --- what all of them have in common ----------------------------------------------------------


@pytest.mark.parametrize("positions", [(), (3,), (2, 3)])
@pytest.mark.parametrize("name", ALL)
def test_shapes(name, positions):
    inputs = draw(positions=positions)
    fusion, variables = build(name, inputs)
    out = apply(fusion, variables, inputs)
    shape = (4, *positions, FEATURES)
    assert out.fused.shape == shape
    assert np.isfinite(out.fused).all()
    assert (out.gates is not None) == (name in ("weight_tied", "gmu", "gmu, tied"))
    assert (out.modalities is None) == (out.stats is None) == (name != "weight_tied")
    for by_modality in (out.gates, out.modalities):
        assert by_modality is None or {k: v.shape for k, v in by_modality.items()} == {
            k: shape for k in WIDTHS
        }


@pytest.mark.parametrize("name", ALL)
def test_masked_is_dropped(name):
    inputs = draw(positions=(3,))
    fusion, variables = build(name, inputs)
    mask = {"audio": jnp.array([1, 0, 1, 0]), "image": jnp.ones(4), "text": jnp.ones(4)}
    holes = inputs | {"audio": inputs["audio"].at[1].set(jnp.nan).at[3].set(jnp.inf)}
    masked = apply(fusion, variables, holes, mask)
    full = apply(fusion, variables, inputs)
    without = {k: v for k, v in inputs.items() if k != "audio"}
    dropped = apply(fusion, variables, without)
    close(masked.fused[::2], full.fused[::2])
    close(masked.fused[1::2], dropped.fused[1::2])
    if name != "text":
        assert not np.allclose(full.fused, dropped.fused, atol=1e-3)
    if masked.gates is not None:
        assert not np.any(masked.gates["audio"][1::2])
        close(
            {k: masked.gates[k][1::2] for k in without},
            jax.tree.map(lambda a: a[1::2], dropped.gates),
        )


@pytest.mark.parametrize("name", ALL)
def test_what_a_missing_modality_holds_touches_no_gradient(name):
    inputs = draw()
    fusion, variables = build(name, inputs)
    mask = jnp.array([[0, 1, 1]] * 2 + [[1, 1, 0]] * 2)  # audio, image, text

    def loss(variables, inputs):
        return jnp.sum(fusion.apply(variables, inputs, mask).fused ** 2)

    holes = inputs | {"audio": inputs["audio"].at[:2].set(jnp.nan)}
    holes["text"] = holes["text"].at[2:].set(jnp.nan)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    by_variables, by_inputs = gradient(variables, holes)
    close((by_variables, by_inputs), gradient(variables, inputs))
    assert not np.any(by_inputs["audio"][:2]) and not np.any(by_inputs["text"][2:])


@pytest.mark.parametrize("name", ALL)
def test_a_sample_without_any_modality_is_finite(name):
    inputs = draw()
    fusion, variables = build(name, inputs)

    def loss(variables):
        return jnp.sum(fusion.apply(variables, inputs, jnp.zeros((4, 3))).fused ** 2)

    value, gradient = jax.jit(jax.value_and_grad(loss))(variables)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradient)))


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_is_trained(name):
    inputs = draw(positions=(3,))
    fusion, variables = build(name, inputs)
    target = draw({"target": FEATURES}, (3,), seed=2)["target"]

    def loss(variables):
        return jnp.mean((fusion.apply(variables, inputs).fused - target) ** 2)

    leaves = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(variables))
    assert leaves
    for path, gradient in leaves:
        assert np.max(np.abs(gradient)) > 1e-6, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_the_dict_does_not_matter(name):
    inputs = draw()
    shuffled = {k: inputs[k] for k in ("text", "audio", "image")}
    fusion = make(name)
    variables = fusion.init(jax.random.key(0), inputs)  # not jitted: jit sorts the keys
    close(fusion.init(jax.random.key(0), shuffled), variables, 0, 0)
    close(fusion.apply(variables, shuffled).fused, fusion.apply(variables, inputs).fused)


@pytest.mark.parametrize("name", ALL)
def test_dropout_is_for_training_only(name):
    inputs = draw()
    fusion, variables = build(name, inputs, dropout=0.5)
    plain, _ = build(name, inputs)
    close(apply(fusion, variables, inputs).fused, apply(plain, variables, inputs).fused)

    def train(key):
        return fusion.apply(variables, inputs, train=True, rngs={"dropout": key}).fused

    one, two = jax.vmap(train)(jax.random.split(jax.random.key(0)))
    assert not np.allclose(one, two)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16(name):
    inputs = draw()
    fusion, variables = build(name, inputs)
    low, _ = build(name, inputs, dtype=jnp.bfloat16)
    out = apply(low, variables, inputs).fused
    assert out.dtype == jnp.bfloat16
    close(out.astype(jnp.float32), apply(fusion, variables, inputs).fused, 0.1, 0.1)


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
    out, variables = fusion.init_with_output(jax.random.key(0), inputs)
    p = variables["params"]
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
    inputs = draw({f"m{i}": 50 + i for i in range(count)}, batch=200)
    for rank in (1, 8):
        out, _ = LowRank(64, rank).init_with_output(jax.random.key(0), inputs)
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


def test_weight_tied_converges_to_the_equilibrium_and_its_gradient():
    with jax.enable_x64(True):
        inputs = draw(dtype=jnp.float64)
        deq, variables = build("deq", inputs, solver=Anderson(tol=1e-12, max_steps=500))
        unroll = WeightTied(FEATURES, steps=200, tol=1e-11)
        variables = wide(variables)
        close(unroll.init(jax.random.key(0), inputs), deq.init(jax.random.key(0), inputs), 0, 0)
        target = draw({"target": FEATURES}, seed=2)["target"]

        def loss(fusion, variables):
            out = fusion.apply(variables, inputs)
            return jnp.mean((out.fused - target) ** 2), out

        def run(fusion):
            return jax.jit(jax.value_and_grad(lambda v: loss(fusion, v), has_aux=True))(variables)

        (_, equilibrium), implicit = run(deq)
        (_, out), gradient = run(unroll)
        assert out.stats.converged.all() and equilibrium.stats.converged.all()
        close(out.fused, equilibrium.fused, 1e-9, 1e-9)
        close(out.modalities, equilibrium.modalities, 1e-9, 1e-9)
        close(out.gates, equilibrium.gates, 1e-9, 1e-9)
        close(gradient, implicit, 1e-7, 1e-9)


@pytest.mark.parametrize("remat", [False, True])
def test_weight_tied_is_a_loop_over_the_cell(remat):
    inputs = draw(positions=(2,))
    fusion, variables = build("weight_tied", inputs, steps=3, remat=remat, tol=0.1)
    names, mask = tuple(sorted(inputs)), jnp.array([[1, 1, 1]] * 3 + [[0, 1, 1]])
    target = draw({"target": FEATURES}, (2,), seed=2)["target"]

    def loop(variables, steps):
        p = variables["params"]
        injection = Inject(FEATURES).apply({"params": p["inject"]}, inputs, mask)
        cell = FusionCell(names, FEATURES).bind({"params": p["cell"]})
        z = jax.tree.map(jnp.zeros_like, FusionState(injection.modalities, injection.fused))
        for _ in range(steps):
            z = cell(z, injection)
        return z

    def loss(state):
        return sum(jnp.sum(x * target) for x in (state.fused, *state.modalities.values()))

    def unrolled(variables):
        out = fusion.apply(variables, inputs, mask)
        return loss(out), out

    (_, out), gradient = jax.jit(jax.value_and_grad(unrolled, has_aux=True))(variables)
    z, after = jax.jit(loop, static_argnums=1)(variables, 3), loop(variables, 4)
    close(FusionState(out.modalities, out.fused), z)
    close(gradient, jax.jit(jax.grad(lambda v: loss(loop(v, 3))))(variables), 1e-3, 1e-4)

    def flat(state):
        return np.concatenate([np.reshape(x, (4, -1)) for x in jax.tree.leaves(state)], axis=1)

    change = np.linalg.norm(flat(after) - flat(z), axis=1)
    residual = change / np.linalg.norm(flat(after), axis=1)
    close(out.stats.residual, residual, 1e-3)
    assert out.stats.converged.tolist() == (residual <= 0.1).tolist()
    assert out.stats.steps.tolist() == [3] * 4
    jaxpr = jax.make_jaxpr(jax.grad(lambda v: unrolled(v)[0]))(variables)
    assert ("checkpoint" in str(jaxpr)) == remat


def test_statistics_of_the_unroll_have_no_gradient():
    inputs = draw()
    fusion, variables = build("weight_tied", inputs, steps=2)
    gradient = jax.grad(lambda v: jnp.sum(fusion.apply(v, inputs).stats.residual))(variables)
    assert not any(np.any(g) for g in jax.tree.leaves(gradient))


def test_jacobian_penalty_of_the_unroll_is_that_of_the_equilibrium():
    inputs = draw()
    deq, variables = build("deq", inputs, solver=Anderson(tol=1e-6, max_steps=200))
    unroll = WeightTied(FEATURES, steps=100)
    rngs = {"jacobian": jax.random.key(3)}
    expected = apply(deq, variables, inputs, rngs=rngs).jacobian_penalty
    close(apply(unroll, variables, inputs, rngs=rngs).jacobian_penalty, expected, 1e-3)
    assert apply(unroll, variables, inputs).jacobian_penalty is None

    def penalty(variables):
        return unroll.apply(variables, inputs, rngs=rngs).jacobian_penalty

    gradient = jax.jit(jax.grad(penalty))(variables)["params"]["cell"]
    assert any(np.any(g) for g in jax.tree.leaves(gradient))


def test_fields_reach_the_cell():
    inputs = draw()
    options = {"groups": 2, "activation_last": True, "lift": 0.0}
    options |= {"gate_scale": 0.5, "residual_scale": 0.5}
    solver = Anderson(tol=1e-5, max_steps=200)
    deq = DEQFusion(FEATURES, solver=solver, **options)
    unroll = WeightTied(FEATURES, steps=150, **options)
    out, variables = deq.init_with_output(jax.random.key(0), inputs)
    close(unroll.init(jax.random.key(0), inputs), variables, 0, 0)
    assert out.stats.converged.all()
    close(apply(unroll, variables, inputs).fused, out.fused, 1e-3, 1e-3)


@pytest.mark.parametrize("fusion", [WeightTied(FEATURES, steps=0), LowRank(FEATURES, rank=0)])
def test_counts_are_checked(fusion):
    with pytest.raises(ValueError, match=r"=0\): expected at least 1"):
        fusion.init(jax.random.key(0), draw())


# --- by name ----------------------------------------------------------------------------------


def test_make_fusion():
    solver = Anderson(tol=1e-2)
    assert make_fusion("deq", 8, ["a", "b"], solver=solver) == DEQFusion(8, solver=solver)
    assert make_fusion("weight_tied", 8, ["a", "b"], steps=3) == WeightTied(8, steps=3)
    assert make_fusion("sum", 8, ["a", "b"], dropout=0.1) == Sum(8, dropout=0.1)
    assert make_fusion("b", 8, ["a", "b"]) == Unimodal(8, "b")
    with pytest.raises(ValueError, match=r"'mean'; choose from .*'lmf', 'attention', 'a', 'b'\]"):
        make_fusion("mean", 8, ["a", "b"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'solver'"):
        make_fusion("sum", 8, ["a", "b"], solver=solver)
