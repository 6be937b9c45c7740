"""The Jacobian J = ∂f/∂z at a fixed point: a training penalty and the spectral radius."""

import jax
import jax.numpy as jnp

from deq_fusion_jax.state import Map, PyTree, ravel, unraveler


def jacobian_penalty(
    f: Map, z: PyTree, *args: PyTree, key: jax.Array | None = None, probes: int | PyTree = 2
) -> jax.Array:
    r"""Hutchinson's estimate of $‖J‖_F^2 / (B N)$, J = ∂f/∂z and N the size of a sample's state:

    $$\frac{1}{P B N} ∑_{p=1}^P ‖v_p^⊤ J‖^2, \qquad v_p ∼ \mathcal{N}(0, I).$$

    Differentiable in `args` and in what f closes over; z is held constant, as in the paper's code.

        >>> import jax.numpy as jnp
        >>> from deq_fusion_jax import jacobian_penalty
        >>> f = lambda z: 0.5 * z  # J = I / 2, so ‖J‖_F² / (B·N) = 1/4
        >>> print(f"{jacobian_penalty(f, jnp.zeros((2, 3)), probes=jnp.ones((1, 2, 3))):.2f}")
        0.25

    Args:
      f: the map `(z, *args)` → z.
      z: pytree [B, …], usually the fixed point.
      key: PRNG key for the probes.
      probes: how many probes P, or the probes themselves: a pytree like z with a leading axis P.

    Returns:
      A scalar.

    Source: Bai, Koltun and Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization",
    2021, equation 8; paper §3.4.
    """
    z = jax.lax.stop_gradient(z)
    if isinstance(probes, int):
        if key is None:
            raise ValueError("jacobian_penalty needs a key to draw its probes; give key=….")
        shape = (probes, *ravel(z).shape)
        probes = jax.vmap(unraveler(z))(jax.random.normal(key, shape, ravel(z).dtype))
    _, vjp = jax.vjp(lambda z: f(z, *args), z)
    products = jax.vmap(lambda v: ravel(vjp(v)[0]))(probes)
    return jnp.mean(products**2)


def spectral_radius(f: Map, z: PyTree, *args: PyTree, key: jax.Array, steps: int = 50) -> jax.Array:
    r"""The spectral radius of J = ∂f/∂z per sample, by power iteration; below 1, Picard converges.

    It is the geometric mean of the growth over S, the second half of the steps:

    $$ρ ≈ \Big(∏_{k ∈ S} ‖J v_k‖ / ‖v_k‖\Big)^{1/|S|}, \qquad v_{k+1} = J v_k / ‖J v_k‖.$$

    Unlike a Rayleigh quotient it also settles where the dominant eigenvalues are a complex pair.
    No gradient.

        >>> import jax, jax.numpy as jnp
        >>> from deq_fusion_jax import spectral_radius
        >>> turn = 0.5 * jnp.array([[0.0, -1.0], [1.0, 0.0]])  # eigenvalues ± i / 2
        >>> rho = spectral_radius(lambda z: z @ turn.T, jnp.zeros((1, 2)), key=jax.random.key(0))
        >>> print(rho.round(3))
        [0.5]

    Args:
      f: the map `(z, *args)` → z, each sample for itself.
      z: pytree [B, …], usually the fixed point.
      key: PRNG key for the start vectors.
      steps: products with J, at least 2.

    Returns:
      [B], in float32 or wider.
    """
    if steps < 2:
        raise ValueError(f"spectral_radius(steps={steps}): at least 2 steps are needed.")
    z, args = jax.lax.stop_gradient((z, args))
    unravel = unraveler(z)
    _, jvp = jax.linearize(lambda z: f(z, *args), z)

    def step(v: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        product = ravel(jvp(unravel(v)))
        growth = jnp.linalg.norm(product, axis=1)
        return product / jnp.where(growth > 0, growth, 1)[:, None], growth

    v = jax.random.normal(key, ravel(z).shape, ravel(z).dtype)
    v = v / jnp.linalg.norm(v, axis=1, keepdims=True)
    _, growth = jax.lax.scan(step, v, None, length=steps)
    return jax.lax.stop_gradient(jnp.exp(jnp.mean(jnp.log(growth[steps // 2 :]), axis=0)))


def coupling(
    states: Map, inputs: PyTree, *, key: jax.Array, probes: int = 8
) -> dict[str, dict[str, jax.Array]]:
    r"""How much each state depends on each input, per sample, estimated by random probes:

    $$‖∂z_i / ∂x_j‖_F ≈ \Big(\frac{1}{P} ∑_{p=1}^P ‖v_p^⊤ ∂z_i / ∂x_j‖^2\Big)^{1/2}, \qquad
    v_p ∼ \mathcal{N}(0, I).$$

    A fusion whose $∂z_i / ∂x_j$ are near 0 for i ≠ j fuses nothing, however small its residual is.

        >>> import jax, jax.numpy as jnp
        >>> from deq_fusion_jax import coupling
        >>> states = lambda x: {"a": 2 * x["a"], "b": x["a"] + x["b"]}
        >>> inputs = {"a": jnp.ones((1, 1)), "b": jnp.ones((1, 1))}
        >>> found = coupling(states, inputs, key=jax.random.key(0), probes=5000)
        >>> print(found["a"]["a"].round(1), found["a"]["b"], found["b"]["a"].round(1))
        [2.] [0.] [1.]

    Args:
      states: {name: x_j [B, …]} → {name: z_i [B, …]}, each sample for itself, such as the
        `modalities` of a fusion's output.
      inputs: where it is looked at.
      key: PRNG key for the probes.
      probes: P, each of which costs a backward pass for every state.

    Returns:
      {i: {j: [B]}}.
    """
    z, vjp = jax.vjp(states, inputs)

    def square(i: str, key: jax.Array) -> dict[str, jax.Array]:
        drawn = jax.random.normal(key, z[i].shape, z[i].dtype)
        probe = {name: drawn if name == i else jnp.zeros_like(z[name]) for name in z}
        return {j: jnp.sum(ravel(x) ** 2, axis=1) for j, x in vjp(probe)[0].items()}

    keys = jax.random.split(key, probes)
    squares = {i: jax.lax.map(lambda key, i=i: square(i, key), keys) for i in z}
    return jax.tree.map(lambda x: jnp.sqrt(jnp.mean(x, axis=0)), squares)
