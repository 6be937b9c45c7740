"""Equations of many kinds, on which `benchmarks.defaults` tries the settings of a solver."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deq_fusion_jax import Anderson, DEQFusion, FusionCell, FusionState, Implicit
from deq_fusion_jax.cell import as_map
from deq_fusion_jax.injection import Inject
from deq_fusion_jax.state import Map, PyTree
from experiments.benchmarks.problem import Shape

BATCH = 32
REFERENCE = Anderson(tol=1e-6, max_steps=1000, history=6, ridge=1e-4)


class Equation(NamedTuple):
    """z = f(z) for a batch of samples, with f = make(*args).

    Attributes:
      family: what kind of equation it is.
      linear: whether it is an adjoint equation, where `Implicit` has the ridge small.
    """

    name: str
    family: str
    make: Callable[..., Map]
    z0: PyTree
    args: tuple[PyTree, ...]
    linear: bool = False


def solution(equation: Equation) -> PyTree:
    """The fixed point as near as float32 comes to it, or the best iterate on the way there."""
    z0, args = equation.z0, equation.args
    return jax.jit(lambda z0, args: REFERENCE.solve(equation.make(*args), z0)[0])(z0, args)


def stages(name: str, family: str, layer: DEQFusion, params: PyTree, inputs: Any) -> list[Equation]:
    """Modalities and fused state of the staged solve."""
    cell = FusionCell(
        tuple(sorted(inputs)),
        layer.features,
        gate_scale=layer.gate_scale,
        residual_scale=layer.residual_scale,
    )
    variables = {"params": params["cell"]}
    inject = Inject(layer.features, layer.lift)
    injection: Any = jax.jit(inject.apply)({"params": params["inject"]}, inputs)
    z0 = jax.tree.map(jnp.zeros_like, FusionState(injection.modalities, injection.fused))

    def stage(method: str, z0: PyTree, *args: PyTree) -> Equation:
        step = as_map(cell, method)
        title = f"{name}, {'modalities' if method == 'step_modalities' else 'fused'}"
        return Equation(title, family, lambda *args: lambda z: step(z, *args), z0, args)

    first = stage("step_modalities", z0.modalities, variables, injection)
    held = cell.apply(variables, solution(first), injection, method="held_gates")
    return [first, stage("step_fused", z0.fused, variables, held, injection)]


def gaussian(key: jax.Array, shape: Shape, scale: float) -> dict[str, jax.Array]:
    batch, features, modalities = shape
    keys = jax.random.split(key, modalities)
    return {f"{i}": scale * jax.random.normal(k, (batch, features)) for i, k in enumerate(keys)}


def fusion() -> Iterator[Equation]:
    """The shapes of `experiments.benchmark` at both initialisations, in smaller batches."""
    for kind, make in (("default", DEQFusion), ("official", DEQFusion.official)):
        for features, modalities in ((64, 2), (256, 2), (512, 2), (500, 3)):
            inputs = gaussian(jax.random.key(1), (BATCH, features, modalities), 2.0)
            layer = make(features)
            params = jax.jit(layer.init)(jax.random.key(0), inputs)["params"]
            yield from stages(f"{kind} {features}×{modalities}", "fusion", layer, params, inputs)


def trained() -> Iterator[Equation]:
    """Layers after some hundred steps of Adam on products of features of the modalities."""
    for kind, make, features, modalities, steps in (
        ("default", DEQFusion, 64, 2, 600),
        ("official", DEQFusion.official, 64, 2, 600),
        ("default", DEQFusion, 128, 3, 400),
    ):
        rule = Implicit(on_failure="keep")  # as the experiments train
        layer = make(features, solver=Anderson(tol=1e-3), gradient=rule, schedule="staged")
        inputs = gaussian(jax.random.key(2), (1024, features, modalities), 1.0)
        params = train(layer, inputs, steps)
        some = {name: x[:BATCH] for name, x in inputs.items()}
        yield from stages(
            f"{kind} {features}×{modalities}, trained", "trained", layer, params, some
        )


def train(layer: DEQFusion, inputs: Any, steps: int, classes: int = 4) -> PyTree:
    """Parameters of the layer, trained with a linear classifier after it."""
    rows = next(iter(inputs.values())).shape[0]
    teacher, head, start, batches = jax.random.split(jax.random.key(0), 4)
    keys = jax.random.split(teacher, len(inputs))
    shape = (layer.features, classes, 4)
    features = [
        jnp.tensordot(x, jax.random.normal(k, shape), 1)
        for k, x in zip(keys, inputs.values(), strict=True)
    ]
    labels = jnp.argmax(jnp.sum(jnp.prod(jnp.stack(features), axis=0), axis=-1), axis=-1)
    optimiser = optax.adam(3e-3)

    def loss(params: PyTree, row: jax.Array) -> jax.Array:
        out: Any = layer.apply({"params": params[0]}, {name: x[row] for name, x in inputs.items()})
        logits = out.fused @ params[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[row]).mean()

    def step(carry: PyTree, key: jax.Array) -> tuple[PyTree, None]:
        params, state = carry
        gradient = jax.grad(loss)(params, jax.random.randint(key, (64,), 0, rows))
        updates, state = optimiser.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run() -> PyTree:
        weights = jax.random.normal(head, (layer.features, classes)) / layer.features**0.5
        params = (layer.init(start, inputs)["params"], weights)
        carry = (params, optimiser.init(params))
        return jax.lax.scan(step, carry, jax.random.split(batches, steps))[0][0][0]

    return run()


def affine(A: jax.Array, b: jax.Array) -> Map:
    return lambda z: jnp.einsum("bij,bj->bi", A, z) + b


def tanh_map(W: jax.Array, x: jax.Array) -> Map:
    return lambda z: jnp.tanh(jnp.einsum("bi,bij->bj", z, W) + x)


def tanh() -> Iterator[Equation]:
    """tanh(z W + x), every sample with a W of its own of spectral radius ρ."""
    draw = np.random.default_rng(0)
    for n, batch in ((48, 32), (256, 16)):
        W = draw.normal(size=(batch, n, n))
        W /= np.max(np.abs(np.linalg.eigvals(W)), axis=1)[:, None, None]
        x = draw.normal(size=(batch, n))
        for rho, scale in product((0.3, 0.6, 0.8, 0.9, 0.95, 0.98), (1.0, 0.1)):
            name = f"tanh of {n}, ρ = {rho:g}, x of size {scale:g}"
            args = _float32(rho * W, scale * x)
            yield Equation(name, "tanh", tanh_map, jnp.zeros((batch, n)), args)


def linear(name: str, family: str, A: np.ndarray, b: np.ndarray) -> Equation:
    return Equation(name, family, affine, jnp.zeros(b.shape), _float32(A, b))


def rotation() -> Iterator[Equation]:
    """ρ R z + b with random orthogonal R."""
    draw = np.random.default_rng(1)
    for n, rho in ((20, 0.5), (20, 0.9), (20, 0.98), (2, 0.98)):
        R = orthogonal(draw, BATCH, n)
        name = f"rotation of {n}, ρ = {rho:g}"
        yield linear(name, "rotation", rho * R, draw.normal(size=(BATCH, n)))


def orthogonal(draw: np.random.Generator, batch: int, n: int) -> np.ndarray:
    return np.linalg.qr(draw.normal(size=(batch, n, n)))[0]


def slow() -> Iterator[Equation]:
    """Linear maps with eigenvalues close to 1."""
    draw = np.random.default_rng(2)
    a = np.array([0.9, 0.99, 0.999])
    yield linear("a (z − 1) + 1, three samples", "slow", a[:, None, None], 1 - a[:, None])
    yield linear("a (z − 1) + 1, three channels", "slow", np.diag(a)[None], 1 - a[None])
    yield linear(".9999 z + 1", "slow", np.full((1, 1, 1), 0.9999), np.ones((1, 1)))
    n = 20
    spectra = {f"0 … {top:g}": np.linspace(0, top, n) for top in a}
    spectra["0 (17 times), .9, .99, .999"] = np.concatenate([np.zeros(n - 3), a])
    for name, eigenvalues in spectra.items():
        Q = orthogonal(draw, 16, n)
        A = (Q * eigenvalues) @ np.swapaxes(Q, 1, 2)
        yield linear(f"eigenvalues {name}", "slow", A, draw.normal(size=(16, n)))


def attention() -> Iterator[Equation]:
    """A block of attention, and a transformer's, for states [B, T, d]."""
    B, T, d = 16, 12, 32
    first, second = jax.random.split(jax.random.key(3))
    weights = jax.random.normal(first, (6, d, d)) / d**0.5
    x = jax.random.normal(second, (B, T, d))
    for block, scales in ((attention_block, (1.0, 2.0, 4.0)), (transformer_block, (0.3, 0.6, 1.0))):
        for scale in scales:
            name = f"{block.__name__.replace('_', ' ')}, scale {scale:g}"
            args = (x, weights, jnp.float32(scale))
            yield Equation(name, "attention", block, jnp.zeros((B, T, d)), args)


def attention_block(x: jax.Array, w: jax.Array, scale: jax.Array) -> Map:
    """LN(x + c · attention(z))."""
    return lambda z: layer_norm(x + scale * attend(z, w))


def transformer_block(x: jax.Array, w: jax.Array, scale: jax.Array) -> Map:
    """LN(h + c · MLP(h)) with h = LN(x + z + c · attention(z))."""

    def f(z: jax.Array) -> jax.Array:
        h = layer_norm(x + z + scale * attend(z, w))
        return layer_norm(h + scale * jax.nn.relu(h @ w[4]) @ w[5])

    return f


def attend(z: jax.Array, w: jax.Array) -> jax.Array:
    q, k, v = (z @ w[i] for i in range(3))
    scores = q @ jnp.swapaxes(k, -1, -2) / z.shape[-1] ** 0.5
    return jax.nn.softmax(scores, axis=-1) @ v @ w[3]


def layer_norm(z: jax.Array) -> jax.Array:
    z = z - jnp.mean(z, axis=-1, keepdims=True)
    return z / jnp.sqrt(jnp.mean(z * z, axis=-1, keepdims=True) + 1e-5)


def graph_map(A: jax.Array, W: jax.Array, x: jax.Array) -> Map:
    return lambda z: jnp.tanh(A @ z @ W + x)


def graph() -> Iterator[Equation]:
    """tanh(A z W + x) on random graphs, one for each sample: a state [N, d]."""
    draw = np.random.default_rng(4)
    graphs, nodes, d = 8, 60, 8
    edges = draw.random((graphs, nodes, nodes)) < 4 / nodes
    A = (edges | np.swapaxes(edges, 1, 2) | np.eye(nodes, dtype=bool)).astype(float)
    degree = np.sum(A, axis=2)
    A /= np.sqrt(degree[:, :, None] * degree[:, None, :])
    W, x = draw.normal(size=(graphs, d, d)), 0.3 * draw.normal(size=(graphs, nodes, d))
    W /= np.linalg.norm(W, 2, axis=(1, 2))[:, None, None]
    for kind, weights in (("random", W), ("orthogonal", orthogonal(draw, graphs, d))):
        for size in (0.5, 0.9, 0.98, 1.5):
            name = f"graph, {kind} W, ‖W‖ = {size:g}"
            args = _float32(A, size * weights, x)
            yield Equation(name, "graph", graph_map, jnp.zeros(x.shape), args)


def adjoint() -> Iterator[Equation]:
    """u = Jᵀu + g of the fusion, trained or not, and of the tanh maps, with random g."""
    for equation in (*equations("fusion"), *equations("trained"), *equations("tanh")):
        if not equation.name.endswith("x of size 0.1"):
            z = solution(equation)
            g = _normal_like(z)
            name, make = f"{equation.name}, adjoint", Transposed(equation.make)
            yield Equation(name, "adjoint", make, g, (z, g, *equation.args), linear=True)


@dataclass(frozen=True)
class Transposed:
    """(z, g, *args) → the map u → Jᵀu + g, with J the Jacobian at z of make(*args)."""

    make: Callable[..., Map]

    def __call__(self, z: PyTree, g: PyTree, *args: PyTree) -> Map:
        _, vjp = jax.vjp(self.make(*args), z)
        return lambda u: jax.tree.map(jnp.add, vjp(u)[0], g)


def _normal_like(z: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(z)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    drawn = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, drawn)


FAMILIES: dict[str, Callable[[], Iterable[Equation]]] = {
    made.__name__: made
    for made in (fusion, trained, tanh, rotation, slow, attention, graph, adjoint)
}


@cache
def equations(family: str) -> tuple[Equation, ...]:
    return tuple(FAMILIES[family]())


def _float32(*arrays: np.ndarray) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)
