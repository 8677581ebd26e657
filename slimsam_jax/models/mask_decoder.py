"""The mask decoder of SAM: embedding, tokens -> masks, predicted IoU."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from slimsam_jax.models.config import Config
from slimsam_jax.models.transformer import TwoWayTransformer


class MLP(nn.Module):
    """Dense layers with ReLU between them."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, name=f"layers_{i}")(x if i == 0 else jax.nn.relu(x))
        return x


class Doubling(nn.Module):
    """A transposed convolution of 2 x 2 with stride 2, [p, h, w, c] -> [p, 2h, 2w, features]."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (2, 2, self.features, x.shape[-1]))
        return double(x, kernel) + self.param("bias", nn.initializers.zeros, (self.features,))


@jax.custom_vjp
def double(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x: [p, h, w, c], kernel: [2, 2, f, c]. Returns [p, 2h, 2w, f].

    No windows overlap, so the gradient is two products. XLA's own takes ten times as long on a CPU; its forward pass
    half as long as a product.
    """
    # transpose_kernel gives PyTorch's definition: the gradient of a convolution.
    return jax.lax.conv_transpose(x, kernel, (2, 2), "VALID", transpose_kernel=True)


def _double_backward(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    p, h, w, _ = x.shape
    grad = grad.reshape(p, h, 2, w, 2, -1)
    return jnp.einsum("phiwjf,ijfc->phwc", grad, kernel), jnp.einsum("phwc,phiwjf->ijfc", x, grad)


double.defvjp(lambda x, kernel: (double(x, kernel), (x, kernel)), _double_backward)


class MaskDecoder(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, embedding, image_pe, sparse, dense, present=None):
        """Predicts all masks of p prompts.

        Args:
          embedding: [h, w, C] embedding of the one image, or [p, h, w, C] of each prompt's.
          image_pe: [h, w, C] from `PromptEncoder.dense_positions`.
          sparse, dense: from `PromptEncoder`.
          present: [p, n] bool, False for tokens of `sparse` that fill up and shall change nothing; None for all.

        Returns:
          masks: [p, 1 + multimask_outputs, 4h, 4w] logits; index 0 is the single-mask output.
          iou: [p, 1 + multimask_outputs], the model's own estimate.
        """
        c, normal = self.config, nn.initializers.normal(1.0)
        outputs, width = 1 + c.multimask_outputs, c.out_chans
        iou_token = self.param("iou_token", normal, (1, width))
        mask_tokens = self.param("mask_tokens", normal, (outputs, width))
        prompts, (h, w) = sparse.shape[0], c.grid

        learnt = jnp.concatenate([iou_token, mask_tokens])
        tokens = jnp.concatenate([jnp.tile(learnt[None], (prompts, 1, 1)), sparse], axis=1)
        if present is not None:
            present = jnp.concatenate([jnp.ones((prompts, 1 + outputs), bool), present], axis=1)
        image = (embedding + dense).reshape(-1, h * w, width)  # once, until the first tokens attend to it
        transformer = TwoWayTransformer(c.decoder_depth, c.decoder_heads, c.decoder_mlp_dim, name="transformer")
        tokens, image = transformer(image, image_pe.reshape(1, h * w, width), tokens, present)

        upscaled = self.upscale(image.reshape(prompts, h, w, width))
        hyper = [
            MLP((width, width, width // 8), name=f"output_hypernetworks_mlps_{i}")(tokens[:, 1 + i])
            for i in range(outputs)
        ]
        masks = jnp.einsum("pmc,pyxc->pmyx", jnp.stack(hyper, axis=1), upscaled)
        iou = MLP((c.iou_head_dim, c.iou_head_dim, outputs), name="iou_prediction_head")(tokens[:, 0])
        return masks, iou

    def upscale(self, x: jax.Array) -> jax.Array:
        """[p, h, w, C] -> [p, 4h, 4w, C/8] by two transposed convolutions."""
        width = x.shape[-1]
        gelu = lambda x: jax.nn.gelu(x, approximate=False)
        x = Doubling(width // 4, name="output_upscaling_0")(x)
        norm = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name="output_upscaling_1")  # of few channels
        return gelu(Doubling(width // 8, name="output_upscaling_3")(gelu(norm(x))))
