"""Parity with the official PyTorch module: maps, fixed points and gradients, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_fusion_jax import Anderson, DEQFusion, FusionCell, Implicit, Picard
from deq_fusion_jax.injection import Inject
from deq_fusion_jax.official import params_from_official


def relative(got, want):
    return np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))


def official(golden, solver, **options):
    return DEQFusion.official(golden.features, solver=solver, gradient=Implicit(), **options)


def test_one_application(golden):
    injection = Inject(golden.features, lift=0.0).apply(
        {"params": golden.params["inject"]}, golden.inputs
    )
    assert relative(injection.fused, golden["fusion_feature"]) < 1e-14
    cell = FusionCell(golden.names, golden.features)
    z = golden.state(golden["f_z_in"])
    got = jax.jit(cell.apply)({"params": golden.params["cell"]}, z, injection)
    want = golden.state(golden["f_z_out"])
    assert max(jax.tree.leaves(jax.tree.map(relative, got, want))) < 1e-12


@pytest.mark.parametrize("schedule", ["joint", "staged"])
def test_fixed_point_and_gradients(golden, schedule):
    solver = Anderson(tol=1e-12, max_steps=2000)
    layer = official(golden, solver, schedule=schedule)

    def loss(params, inputs):
        out = layer.apply({"params": params}, inputs)
        return jnp.sum(out.fused * golden["c"]), out

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (value, out), got = gradient(golden.params, golden.inputs)

    assert out.stats.converged.all()
    z = golden.state(golden["z_star"])
    assert relative(out.fused, golden["fused"]) < 1e-9
    assert relative(out.fused, z.fused) < 1e-9
    assert max(relative(out.modalities[name], z.modalities[name]) for name in golden.names) < 1e-9
    assert float(value) == pytest.approx(float(golden["loss"]), rel=1e-9)
    gate = f"W:func_.branches.{len(golden.names)}.gate"
    for name in golden.names:  # α_i = W_g (z_i + z_f) + b_g
        alpha = (z.modalities[name] + z.fused) @ golden[f"{gate}.weight"].T + golden[f"{gate}.bias"]
        assert relative(out.gates[name], alpha) < 1e-9

    want = golden.tree("GU:"), golden.input_tree("GU:")
    if golden.features == 8:  # gradients through GroupNorm of two channels: plumbing only
        difference = jax.tree.map(np.subtract, got, want)
        for part in (0, 1):
            assert norm(difference[part]) / norm(want[part]) < 1e-6
    else:
        errors = jax.tree.map(relative, got, want)
        assert max(jax.tree.leaves(errors)) < 1e-6, errors


def test_anderson_needs_fewer_steps_than_picard(golden):
    if golden["rho_blocks_exact"].max() < 0.5:
        pytest.skip("plain iteration is done in five steps here")
    variables = {"params": golden.params}
    stats = {}
    for solver in (Picard, Anderson):
        layer = official(golden, solver(tol=1e-6, max_steps=1000))
        stats[solver] = jax.jit(layer.apply)(variables, golden.inputs).stats
        assert stats[solver].converged.all()
    anderson, picard = stats[Anderson].steps, stats[Picard].steps
    assert anderson.sum() < 0.75 * picard.sum()
    assert (anderson < picard).mean() > 0.8


# --- the state_dict ----------------------------------------------------------------------------


def random_state_dict(modalities=2, d=8):
    """All entries of an official state_dict, with values of our own."""
    rng = np.random.default_rng(0)
    linear = {"weight": (d, d), "bias": (d,)}
    affine = {"weight": (d,), "bias": (d,)}
    modality = {"conv1": linear, "conv2": linear, "gn1": affine, "gn2": affine, "gn3": affine}
    branches = [modality] * modalities + [{"gate": linear, "fuse": linear, "gn3": affine}]
    entries = {"bias": rng.normal(size=1)}
    for i, branch in enumerate(branches):
        for layer, arrays in branch.items():
            for array, shape in arrays.items():
                entries[f"func_.branches.{i}.{layer}.{array}"] = rng.normal(size=shape)
    return entries | {f"weights.{i}": rng.normal(size=1) for i in range(modalities)}


def test_parameters_have_the_layers_own_structure():
    params = params_from_official(random_state_dict(), ("text", "image"))
    layer = DEQFusion.official(features=8)
    inputs = {"image": jnp.ones((1, 8)), "text": jnp.ones((1, 8))}
    own = jax.eval_shape(layer.init, jax.random.key(0), inputs)["params"]
    assert jax.tree.structure(params) == jax.tree.structure(own)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, own)


def test_every_weight_arrives_where_it_belongs():
    entries = random_state_dict()
    params = params_from_official(entries, ("text", "image"))
    assert params["inject"]["weight_image"] == np.float32(entries["weights.1"][0])
    image = params["cell"]["blocks_image"]
    kernel = np.float32(entries["func_.branches.1.conv2.weight"]).T
    np.testing.assert_array_equal(image["dense2"]["kernel"], kernel)
    scale = np.float32(entries["func_.branches.0.gn3.weight"])
    np.testing.assert_array_equal(params["cell"]["blocks_text"]["norm3"]["scale"], scale)
    leaves = np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])
    values = np.concatenate([np.float32(x).ravel() for x in entries.values()])
    np.testing.assert_array_equal(np.sort(leaves), np.sort(values))


def test_a_wrong_state_dict_is_refused():
    entries = random_state_dict()
    missing = {k: v for k, v in entries.items() if k != "func_.branches.1.conv2.bias"}
    with pytest.raises(ValueError, match=r"no 'func_\.branches\.1\.conv2\.bias'"):
        params_from_official(missing, ("a", "b"))
    with pytest.raises(ValueError, match=r"\['classifier\.weight'\]"):
        params_from_official(entries | {"classifier.weight": np.ones(3)}, ("a", "b"))
    for names in (("a",), ("a", "b", "c")):
        with pytest.raises(ValueError, match=rf"{len(names)} modalities"):
            params_from_official(entries, names)
    with pytest.raises(ValueError, match="func_"):
        params_from_official({}, ("a", "b"))
    with pytest.raises(ValueError, match="once"):
        params_from_official(entries, ("a", "a"))


def test_official_is_the_papers_start():
    layer = DEQFusion.official(features=64, groups=8, dropout=0.1)
    assert (layer.gate_scale, layer.residual_scale, layer.lift) == (1, 1, 0)
    assert (layer.features, layer.groups, layer.dropout) == (64, 8, 0.1)
    ours = DEQFusion(features=64, groups=8, dropout=0.1)
    assert (ours.gate_scale, ours.residual_scale, ours.lift) == (0.25, 0.25, 2)
    # The two differ in nothing else.
    paper = {"gate_scale": 1.0, "residual_scale": 1.0, "lift": 0.0, "schedule": "joint"}
    assert layer == ours.clone(**paper)

    inputs = {"a": jnp.ones((1, 64)), "b": jnp.ones((1, 64))}
    start = jax.jit(layer.init)(jax.random.key(0), inputs)["params"]["cell"]
    small = jax.jit(ours.init)(jax.random.key(0), inputs)["params"]["cell"]
    for path, scale in {
        ("fusion", "gate"): 0.25,
        ("fusion", "fuse"): 1,
        ("blocks_a", "dense1"): 1,
        ("blocks_a", "dense2"): 0.25,
    }.items():
        kernel = start[path[0]][path[1]]["kernel"]
        assert 0.95 / 8 < jnp.abs(kernel).max() <= 1 / 8  # U(±1/√d), PyTorch's default
        np.testing.assert_allclose(small[path[0]][path[1]]["kernel"], scale * kernel, rtol=1e-6)
