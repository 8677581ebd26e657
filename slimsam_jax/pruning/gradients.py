"""Computes the gradients that importance reads, reduced over images.

Disturbed Taylor importance (SlimSAM, section 3.3): the gradient is that of the MSE between a model's embedding and the
same embedding plus Gaussian noise, so no labels are needed and the goal of pruning is that of distilling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from slimsam_jax.errors import InputError
from slimsam_jax.pruning.groups import Tree

Reduce = Literal["rms", "sum"]
Gradients = Callable[[Tree, Any, jax.Array], Tree]  # params, a batch of one, key -> gradients [draws, ...]


def disturbed_loss(
    embed: Callable[[Tree, Any], jax.Array], params: Tree, batch: Any, target: jax.Array, noise: jax.Array
):
    """Computes the MSE between a model's embedding and a target plus noise; its gradient is the disturbed one.

    Of an embedding that is a tree of several maps, the sum of theirs.
    """
    error = lambda found, target, noise: jnp.mean(jnp.square(found - jax.lax.stop_gradient(target) - noise))
    return sum(jax.tree.leaves(jax.tree.map(error, embed(params, batch), target, noise)))


def disturbed_gradients(
    embed: Callable[[Tree, Any], jax.Array],
    params: Tree,
    batches: Iterable[Any],
    key: jax.Array,
    std: float = 0.01,
    reduce: Reduce = "rms",
    noise_samples: int = 1,
    mesh: Mesh | None = None,
) -> Tree:
    """Computes gradients of the disturbed loss of a model against itself, reduced over images and draws of noise.

    With target and model equal, the gradient is the noise pulled back through the Jacobian,
    -(2/N) Jᵀε: no second model is run, `std` only scales it, and several draws share one
    forward pass. It has mean zero, so the reference's sum over images is a random walk whose
    end is one draw. Squared for each image and draw by itself, the cross terms of independent
    noise vanish: "rms" is an unbiased estimate of Σ diag(JᵀJ) before its root.

    Args:
      embed: (params, batch) -> embeddings, an array or a tree of maps; compiled here, once per shape of batch.
      params: the model.
      batches: what `embed` takes, images along the first axis.
      key: of the noise; every image and draw has its own.
      std: of the noise (the paper's 0.01; only the scale depends on it).
      reduce, mesh: see `reduce_gradients`.
      noise_samples: draws of noise per image. Each takes the memory of a set of gradients per image of the batch.

    Returns:
      A tree like `params`; only its absolute values mean something.
    """

    return reduce_gradients(disturbed(embed, std, noise_samples), params, batches, key, reduce, mesh)


def disturbed(embed: Callable[[Tree, Any], jax.Array], std: float = 0.01, noise_samples: int = 1) -> Gradients:
    """Makes the function of one image's disturbed gradients, one for each draw of noise; see `disturbed_gradients`."""

    def gradients(params: Tree, item: Any, key: jax.Array) -> Tree:
        embedding, pull_back = jax.vjp(lambda p: embed(p, item), params)
        maps, tree = jax.tree.flatten(embedding)
        keys = [key] if len(maps) == 1 else jax.random.split(key, len(maps))
        noise = lambda key, x: std * jax.random.normal(key, (noise_samples, *x.shape), x.dtype)
        pulls = [-2.0 / x.size * noise(key, x) for key, x in zip(keys, maps, strict=True)]
        return jax.vmap(pull_back)(jax.tree.unflatten(tree, pulls))[0]

    return gradients


def loss_gradients(
    loss: Callable[[Tree, Any], jax.Array],
    params: Tree,
    batches: Iterable[Any],
    reduce: Reduce = "rms",
    mesh: Mesh | None = None,
) -> Tree:
    """Computes gradients of any loss of (params, batch), such as that of labelled masks, reduced over images."""
    return reduce_gradients(of_loss(loss), params, batches, jax.random.key(0), reduce, mesh)


def of_loss(loss: Callable[[Tree, Any], jax.Array]) -> Gradients:
    """Makes the function of one image's gradients of a loss of (params, batch)."""

    def gradients(params: Tree, item: Any, key: jax.Array) -> Tree:
        return jax.tree.map(lambda g: g[None], jax.grad(loss)(params, item))

    return gradients


def hessian_diagonal(
    loss: Callable[[Tree, Any], jax.Array], params: Tree, batches: Iterable[Any], key: jax.Array, draws: int = 1
) -> Tree:
    """Estimates the diagonal of the Hessian of a loss of (params, batch), for the criterion "obd".

    The mean of z * Hz over random signs z (Bekas et al., Applied Numerical Mathematics 2007):
    right on average, and exact where the Hessian is diagonal. Its cost is that of `draws`
    pairs of gradients per batch.

    Returns:
      a tree like `params`, the mean over the batches.

    Raises:
      InputError: there are no batches, or no draws.
    """

    @jax.jit
    def estimate(params: Tree, batch: Any, key: jax.Array) -> Tree:
        leaves, structure = jax.tree.flatten(params)
        keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))
        signs = jax.tree.map(lambda p, k: jax.random.rademacher(k, p.shape, p.dtype), params, keys)
        products = jax.jvp(jax.grad(lambda p: loss(p, batch)), (params,), (signs,))[1]
        return jax.tree.map(jnp.multiply, signs, products)

    params, total, count = jax.tree.map(jnp.asarray, params), None, 0
    for index, batch in enumerate(batches):
        for draw in range(draws):
            one = estimate(params, batch, jax.random.fold_in(jax.random.fold_in(key, index), draw))
            total, count = one if total is None else jax.tree.map(jnp.add, total, one), count + 1
    if total is None:
        raise InputError("a Hessian needs batches and draws: there are none")
    return jax.tree.map(lambda t: t / count, total)


def reduce_gradients(
    gradients: Gradients,
    params: Tree,
    batches: Iterable[Any],
    key: jax.Array,
    reduce: Reduce,
    mesh: Mesh | None = None,
) -> Tree:
    """Reduces the gradients of single images over batches. Returns a tree like `params`.

    Args:
      gradients: of one image.
      reduce: "rms" (root of the summed squares) or "sum" (the reference's).
      mesh: devices that a batch is split over, along its first axis; None for one device.
    """
    params, accumulate = jax.tree.map(jnp.asarray, params), accumulator(gradients, reduce, mesh)
    # Placed as the parameters are: placed otherwise, the second call would compile again.
    total = jax.tree.map(lambda p: jnp.zeros(p.shape, _wide(p.dtype), device=p.sharding), params)
    seen = 0
    for batch in batches:
        total = accumulate(total, params, batch, key, seen)
        seen += len(jax.tree.leaves(batch)[0])
    return jax.tree.map(jnp.sqrt, total) if reduce == "rms" else total


def _wide(dtype: Any) -> Any:
    """At least float32: squares of half precision vanish, and their sums stand still."""
    return jnp.promote_types(dtype, jnp.float32)


def image_keys(key: jax.Array, images: jax.Array) -> jax.Array:
    """Makes a key for each image, [n], of its number or seed, [n] integers."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, images)


def accumulator(
    gradients: Gradients, reduce: Reduce, mesh: Mesh | None = None
) -> Callable[[Tree, Tree, Any, jax.Array, int], Tree]:
    """Compiles the sum over images: (total, params, batch, key, images before) -> total. The total is donated.

    An image's key follows from how many came before it, not from its batch: so images may be split in batches, and
    these over devices, in any way. A batch takes the memory of a set of gradients for each of its images on a device,
    so one image per device is best where the model is large.
    """
    wide = lambda g: g.astype(_wide(g.dtype))
    power = (lambda g: jnp.square(wide(g))) if reduce == "rms" else wide

    def of_images(params: Tree, batch: Any, keys: jax.Array) -> Tree:
        of_one = lambda item, key: gradients(params, jax.tree.map(lambda x: x[None], item), key)
        return jax.tree.map(lambda g: power(g).sum((0, 1)), jax.vmap(of_one)(batch, keys))

    if mesh is not None:
        # Left to the compiler, gradients of single images with respect to convolutions come out wrong on
        # several CPU devices (jax 0.10.2). Here each device squares its own, and only their sum travels;
        # check_vma would sum the gradients themselves, before the square.
        axes, of_own = mesh.axis_names, of_images
        of_images = jax.shard_map(
            lambda *own: jax.lax.psum(of_own(*own), axes),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(axes), PartitionSpec(axes)),
            out_specs=PartitionSpec(),
            check_vma=False,
        )

    def accumulate(total: Tree, params: Tree, batch: Any, key: jax.Array, seen: int) -> Tree:
        keys = image_keys(key, seen + jnp.arange(jax.tree.leaves(batch)[0].shape[0]))
        return jax.tree.map(jnp.add, total, of_images(params, batch, keys))

    return jax.jit(accumulate, donate_argnums=0)
