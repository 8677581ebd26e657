"""Images per second and peak memory, ours against the original PyTorch modules, taking turns.

    python -m experiments.bench --what forward --preset vit_b
    python -m experiments.bench --what forward --preset vit_p77 --onnxruntime

PyTorch's side is the encoder of `segment_anything` (needs `pip install -e '.[test]'`) in the loops of SlimSAM:
`original.py`; ours is what `slimsam_jax.compress` runs: `ours.py`. Weights are random, which changes no time.
What is timed, for one image:

- forward: the encoder.
- importance: the disturbed gradient. SlimSAM runs a teacher beside the student; ours needs none.
- embedding-stage: distilling a student of which the embedding alone is narrow;
- bottleneck-stage: distilling the slim model (`--preset`) towards the teacher and the embedding-pruned one;
- evaluation: mIoU by point and by box of 19 annotations (`evaluation.py`);
- everything: all masks of a photograph (`everything.py`), and how many of them both sides find;
- data: no model, but JPEGs decoded, resized and batched (`data.py`).

Every turn is a process of its own, so that peak memory is that of one side; compilation and the first step are not
counted. Both sides take the GPU if there is one, else all cores that this process may use.
"""

from __future__ import annotations

import sys

import tyro

from experiments.bench import turns
from experiments.bench.options import STAGES, Options, Step, architectures


def main(options: Options) -> None:
    slim, _, teacher = architectures(options.preset)
    if options.what in STAGES and slim == teacher:
        sys.exit(f"--preset {options.preset} is no slim model: the stages need vit_p50, vit_p77 or small_p50")
    if options.compile and options.what != "forward":
        sys.exit("--compile is for --what forward alone")
    if options.onnxruntime and options.what != "forward":
        sys.exit("--onnxruntime is for --what forward alone")
    turns.take(options, make_step, compare)


def make_step(options: Options) -> Step:
    if options.what == "data":
        from experiments.bench import data

        return data.make_step(options, architectures(options.preset)[0].image_size)
    if options.what == "evaluation":
        from experiments.bench import evaluation

        return evaluation.make_step(options, architectures(options.preset)[0])
    if options.what == "everything":
        from experiments.bench import everything

        return everything.make_step(options)
    # Imported here: PyTorch and JAX in one process would share its threads and its memory.
    if options.side == "jax":
        from experiments.bench import ours as side
    elif options.side == "onnxruntime":
        from experiments.bench import exported

        return exported.make_step(options, architectures(options.preset)[0])
    else:
        from experiments.bench import original as side
    return side.make_step(options, *architectures(options.preset))


def compare(options: Options) -> None:
    what = f"{options.what}, {options.preset}, attention {options.attention}"
    ours, theirs, *others = turns.taken("experiments.bench", options, *["onnxruntime"] * options.onnxruntime)
    print(turns.summary(what, ours, theirs))
    for exported in others:
        print(turns.summary(what, ours, exported, "onnxruntime"))
    if options.what == "everything":
        from experiments.bench import everything

        print(everything.agreement(ours[0]["outcome"], theirs[0]["outcome"]))


if __name__ == "__main__":
    main(tyro.cli(Options))
