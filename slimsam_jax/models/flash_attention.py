"""Flash attention without a bias, as the devices have it: cuDNN's on an NVIDIA GPU, JAX's Pallas kernel on a TPU.

Shapes: b images or windows, t tokens, n heads, c channels of q and k per head, e of v.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from slimsam_jax import sharding

# Queries and keys of a tile on a TPU, at most: logits of a tile take 1 MiB in float32. Mosaic's lanes are 128.
TILE, LANES = 512, 128
ABSENT = -3e4  # logit of a key that is there to fill a tile: of its softmax nothing is left, in bfloat16 either


def obstacle(width: int, dtype: jnp.dtype, images: int, mesh: Mesh | None = None) -> str:
    """Returns why flash attention cannot be used; "" if it can.

    Args:
      width: channels c, with positions.
      images: b, over all devices.
      mesh: of the devices that images are split over; None for one device.
    """
    limits = {"gpu": lambda: _no_cudnn(width), "tpu": lambda: _no_splash(images, mesh)}
    platform = sharding.platform()
    if platform not in limits:
        return ""  # computed by XLA
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"flash attention takes bfloat16 and float16, not {jnp.dtype(dtype)}"
    return limits[platform]()


def _no_cudnn(width: int) -> str:
    """By the limits of jax/_src/cudnn/fused_attention_stablehlo.py, `check_is_flash_attention` (jax 0.10)."""
    capability = str(getattr(sharding.devices()[0], "compute_capability", ""))  # "9.0" is Hopper; ROCm has "gfx..."
    generation = int(capability.partition(".")[0]) if capability[:1].isdigit() else 0
    widest = 256 if generation >= 9 else 128 if generation >= 8 else 0
    if not widest:
        return f"cuDNN's flash attention needs compute capability 8.0, not {capability or 'unknown'!r}"
    if capability == "10.3" and _cudnn_version() < 91100:
        return "cuDNN's flash attention needs cuDNN 9.11 for compute capability 10.3"
    return f"{width} channels per head (with positions), at most {widest}" if width > widest else ""


def _cudnn_version() -> int:
    """Of the cuDNN that is here, 91100 say; 0 if there is none."""
    from jax._src.lib import cuda_versions

    try:
        return cuda_versions.cudnn_get_version()
    except (AttributeError, RuntimeError):  # None without the plug-in; or its library is not there
        return 0


def _no_splash(images: int, mesh: Mesh | None) -> str:
    if sharding.device_count() > 1 and (mesh is None or images % mesh.size):
        return f"{images} images are not split evenly over the {sharding.device_count()} devices"
    return ""


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """Computes softmax(q k) v, with q scaled already. q, k: [b, t, n, c], v: [b, t, n, e] -> [b, t, n, e].

    Raises:
      ValueError, NotImplementedError: an `obstacle`.
    """
    if sharding.platform() == "tpu":
        return splash(q, k, v, mesh)
    width, own = q.shape[-1], v.shape[-1]
    v = jnp.pad(v, ((0, 0),) * 3 + ((0, width - own),))  # cuDNN: of the width of q and k
    implementation = "cudnn" if sharding.platform() == "gpu" else "xla"
    return jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation=implementation)[..., :own]


def splash(q: jax.Array, k: jax.Array, v: jax.Array, mesh: Mesh | None = None, interpret: bool = False) -> jax.Array:
    """Computes the same by JAX's Pallas kernel for TPUs, with whatever mask, of which we need none.

    Args:
      mesh: the compiler cannot split a kernel, so each device runs it on its own images.
      interpret: as ordinary operations, on any device.
    """
    own = functools.partial(_of_images, interpret=interpret)
    if mesh is not None and mesh.size > 1:
        images = PartitionSpec(mesh.axis_names)
        # check_vma: the kernel's outputs do not say over which axes they differ.
        own = jax.shard_map(own, mesh=mesh, in_specs=(images,) * 3, out_specs=images, check_vma=False)
    heads_first = lambda x: x.transpose(0, 2, 1, 3)
    return heads_first(own(*map(heads_first, _whole_tiles(q, k, v))))[:, : q.shape[1]]


def _whole_tiles(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds tokens up to a multiple of `LANES`, as the 196 of a window, and a channel that no query sees the new by."""
    tokens = q.shape[1]
    if not (spare := -tokens % LANES):
        return q, k, v
    more = lambda x: jnp.pad(x, ((0, 0), (0, spare), (0, 0), (0, 0)))
    absent = jnp.where(jnp.arange(tokens + spare) < tokens, 0, ABSENT).astype(k.dtype)
    column = jnp.broadcast_to(absent[:, None, None], (*more(k).shape[:-1], 1))
    return jnp.concatenate([more(q), jnp.ones_like(column)], -1), jnp.concatenate([more(k), column], -1), more(v)


def _of_images(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool) -> jax.Array:
    """[b, n, t, c], [b, n, t, c], [b, n, t, e] -> [b, n, t, e]."""
    # Imported here: Pallas takes a second, which nobody waits for who has no TPU.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    heads, tokens = q.shape[1:3]
    tile = next(size for size in (TILE, TILE // 2, LANES) if tokens % size == 0)
    names = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")
    tiles = kernels.BlockSizes(**{f"block_{name}": tile for name in names})
    whole = masks.MultiHeadMask([masks.FullMask((tokens, tokens))] * heads)
    kernel = kernels.make_splash_mha_single_device(whole, block_sizes=tiles, interpret=interpret)
    return jax.vmap(kernel)(q, k, v)
