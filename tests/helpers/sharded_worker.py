"""Training for test_sharding.py: some steps on the devices that a process has, and what their program holds."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np

from helpers.models import random_images, random_sam, tiny_config
from slimsam_jax import sharding
from slimsam_jax.compression import trainer
from slimsam_jax.compression.loss_terms import terms as terms_of
from slimsam_jax.compression.steps import Distill, Losses, Optimizer
from slimsam_jax.data.prompted import random_clicks
from slimsam_jax.training import checkpoints, loop

DISTILL = Distill(
    "bottleneck",
    losses=Losses(direction=0.1, masks=0.5, points=2),
    optimizer=Optimizer(ema=0.5, clip=1.0, schedule="constant"),
)
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def make_trainer(fsdp: int, parts: int = 1) -> loop.Trainer:
    """Of a student with an odd embedding, as pruning leaves it: where 23 is the only long axis nothing can be split."""
    small = {"mlp_dim": 400, "decoder_depth": 1}
    teacher = random_sam(tiny_config(**small))
    student = random_sam(tiny_config(embed_dim=23, **small), seed=1)
    return trainer.make_trainer(student, teacher, teacher, DISTILL, parts=parts, fsdp=fsdp)


def host_batch(step: int) -> dict[str, np.ndarray]:
    """This process's rows of the step's eight images."""
    batch, random = random_images(tiny_config(), 8, seed=step), np.random.default_rng(step)
    clicks = [random_clicks(size, DISTILL.losses.points, random) for size in batch["size"]]
    batch |= {name: np.stack([each[name] for each in clicks]) for name in clicks[0]}
    share = 8 // jax.process_count()
    rows = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    return {name: value[rows] for name, value in batch.items()}


def collectives(text: str) -> dict[str, int]:
    """How often each collective occurs in a compiled program, and how many numbers all-reduce takes."""
    found = {name: re.findall(rf"= (.*?) {name}(?:-start)?\(", text) for name in COLLECTIVES}
    shapes = re.findall(r"f32\[([\d,]*)\]", " ".join(found["all-reduce"]))
    reduced = sum(int(np.prod([int(side) for side in shape.split(",") if side])) for shape in shapes)
    return {**{name: len(lines) for name, lines in found.items()}, "numbers reduced": reduced}


def main(fsdp: int, count: int, out: str, parts: int = 1, distributed: str | None = None) -> dict[str, int]:
    """Takes `count` steps from the last checkpoint in `out`, and writes parameters and what the compiled step holds."""
    Path(out).mkdir(exist_ok=True)
    if distributed:
        sharding.join_processes(distributed)
    folder, trainer, losses, compiled = Path(out), make_trainer(fsdp, parts), [], None
    terms = terms_of(DISTILL, 0, 100)
    with checkpoints.Steps(folder / "steps") as saved:
        state, _ = saved.restore(checkpoints.shapes_of(trainer.state)) or (trainer.state, None)
        for step in range(int(state.step), int(state.step) + count):
            batch = sharding.shard_batch(host_batch(step), trainer.mesh)
            arguments = state, trainer.frozen, batch, terms, 1e-4
            compiled = compiled or trainer.step.lower(*arguments).compile()
            state, found = compiled(*arguments)
            losses.append(float(found["loss"]))
            if (step + 1) % 5 == 0:
                params = flax.traverse_util.flatten_dict(sharding.gather(state.params), sep="/")
                if sharding.is_main():
                    np.savez(folder / f"{step + 1}.npz", losses=losses[-5:], **params)
        saved.save(int(state.step), state)
    split = lambda tree: [leaf.size for leaf in jax.tree.leaves(tree) if "fsdp" in leaf.sharding.spec]
    whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    facts = {
        **collectives(compiled.as_text()),
        "parameters": whole,
        "parameters split": sum(split(state.params)),
        "state split": sum(split((state.opt_state, state.average))),
    }
    if sharding.is_main():
        (folder / "facts.json").write_text(json.dumps(facts))
    return facts


if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        main(**arguments)
