"""PyTorch's side of `experiments.bench`: the encoder of `segment_anything` in the loops of SlimSAM, batch 1.

Sources: prune_distill_step1.py:107-121 (importance), :153-171 (first stage), prune_distill_step2.py:186-222 (second).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import resource
from collections.abc import Callable

import torch
from torch.nn.functional import mse_loss

from experiments.bench.options import Options, Step, distillation_of
from slimsam_jax.compression.loss_terms import ALIGN, SAM
from slimsam_jax.models.config import GLOBAL, Config
from tests.helpers.peers import stock_sam

Features = dict[str, list[torch.Tensor]]
UPDATE_EVERY = 4  # images


def make_step(options: Options, slim: Config, previous: Config, teacher: Config) -> Step:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    image = torch.randn(1, 3, *slim.image_size, device=device)
    if options.what == "forward":
        run = forward(encoder(slim, device), image, options.compile)
    elif options.what == "importance":
        run = disturbed_gradient(encoder(slim, device), encoder(slim, device), image)
    else:
        models = (slim, previous, teacher) if options.what == "bottleneck-stage" else (previous, teacher)
        run = distillation([encoder(config, device) for config in models], models[-1], image, options.what)
    name = f"{cores} cores" if device.type == "cpu" else torch.cuda.get_device_name()
    return Step(
        lambda: (run(), wait(device)),
        1,
        lambda: peak(device),
        f"{name}, {'compiled bf16' if options.compile else 'fp32'}",
    )


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak(device: torch.device) -> int:
    """Returns the peak memory in bytes, of the device if it counts them, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def encoder(config: Config, device: torch.device) -> torch.nn.Module:
    """Builds the original's encoder, with layers of other widths where heads are not a share of the embedding."""
    block = config.blocks[0]
    inner = block.heads * block.head_dim
    module = stock_sam(dataclasses.replace(config, embed_dim=inner)).image_encoder
    if inner != config.embed_dim:
        width = config.embed_dim
        module.pos_embed = torch.nn.Parameter(module.pos_embed[..., :1].repeat(1, 1, 1, width))
        module.patch_embed.proj = torch.nn.Conv2d(3, width, config.patch_size, config.patch_size)
        module.neck[0] = torch.nn.Conv2d(width, config.out_chans, 1, bias=False)
        for layer in module.blocks:
            layer.norm1, layer.norm2 = (torch.nn.LayerNorm(width, eps=1e-6) for _ in range(2))
            layer.attn.qkv, layer.attn.proj = torch.nn.Linear(width, 3 * inner), torch.nn.Linear(inner, width)
            layer.mlp.lin1 = torch.nn.Linear(width, block.mlp_dim)
            layer.mlp.lin2 = torch.nn.Linear(block.mlp_dim, width)
    return module.to(device)


def forward(module: torch.nn.Module, image: torch.Tensor, compiled: bool) -> Callable[[], object]:
    if compiled:
        module, image = torch.compile(module.bfloat16()), image.bfloat16()
    return torch.no_grad()(lambda: module(image))


def disturbed_gradient(teacher: torch.nn.Module, student: torch.nn.Module, image: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            target = teacher(image)
        noise = torch.normal(mean=0, std=0.01, size=target.shape).to(image.device)
        mse_loss(student(image), target + noise).backward()

    return run


def watch(module: torch.nn.Module, config: Config, what: str) -> Features:
    """Lists that every pass of `module` appends its features to, under the names of our loss."""
    features: Features = {}
    keep = lambda name, tensor: features.setdefault(name, []).append(tensor)
    if what == "bottleneck-stage":
        module.blocks[0].register_forward_pre_hook(lambda _, inputs: keep("stream", inputs[0]))
    for layer, block in zip(module.blocks, config.blocks, strict=True):
        if what == "bottleneck-stage":
            layer.norm2.register_forward_pre_hook(lambda _, inputs: keep("stream", inputs[0]))
            layer.register_forward_hook(lambda _, inputs, output: keep("stream", output))
        else:
            kind = "qkv_global" if block.window == GLOBAL else "qkv_window"
            layer.attn.qkv.register_forward_hook(lambda _, inputs, output, kind=kind: keep(kind, output))
            layer.mlp.act.register_forward_hook(lambda _, inputs, output: keep("mlp", output))
    return features


def mean_square(student: list[torch.Tensor], target: list[torch.Tensor]) -> torch.Tensor:
    """Computes the MSE over all elements, as if concatenated. The reference does concatenate them."""
    total = sum(mse_loss(s, t, reduction="sum") for s, t in zip(student, target, strict=True))
    return total / sum(t.numel() for t in target)


def distillation(modules: list[torch.nn.Module], teacher: Config, image: torch.Tensor, what: str) -> Callable[[], None]:
    """Distils one image: student (modules[0]) towards the others, with the reference's weights at the start."""
    watched = [watch(module, teacher, what) for module in modules[:2]]
    step = distillation_of(what)
    weights = ALIGN[step.align](0.0, step, SAM)
    optimizer = torch.optim.Adam(modules[0].parameters(), lr=1e-4)
    count = itertools.count(1)

    def run() -> None:
        for features in watched:
            features.clear()
        with torch.no_grad():
            targets = [module(image) for module in modules[1:]]
        embedding = modules[0](image)
        student, target = watched
        terms = {name: mean_square(student[name], target[name]) for name in student}
        terms |= {"embedding": mse_loss(embedding, targets[-1]), "previous": mse_loss(embedding, targets[0])}
        sum(weight * terms[name] for name, weight in weights.items()).backward()
        if next(count) % UPDATE_EVERY == 0:
            optimizer.step()
            optimizer.zero_grad()

    return run
