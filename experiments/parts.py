"""The parts that `experiments.remake` makes anew: commands, the hours that they take, and the rows that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

WORK = "--teacher {shipped} --images {images} --val {val}"
PLAN = "slimsam_jax.plan --ratio 0.77 --per-device 1 --teacher"
DISTILLERS = f"experiments.distillers run {WORK} --cache {{work}}/cache"
written = "--table {{work}}/{0}.md --out {{work}}/{0}.json".format  # by `slimsam plan`
# Files of results that no part makes: trainings of nights, and what compares rows with kept ones.
ARCHIVE = ("reference.jsonl", "spot_checks.jsonl")


class Part(NamedTuple):
    """What is run together.

    Attributes:
      hours: that it took, or would by counting, on two cores with little else to do.
      file: of results, which the commands add to; "" keeps what they print in `remade.jsonl`.
      commands: arguments of `python -m`, with options of `experiments.remake` in braces, and {shipped}, the SAM of the
        package. One that makes a model folder, --out, goes on where it was stopped, and is left out if it is there.
      rows: which of the file the commands make again: values of some fields, a set for each kind; all by default.
      needs: an extra of this package that the commands cannot do without, and a module that it brings.
    """

    hours: float
    file: str
    commands: tuple[str, ...]
    rows: tuple[Mapping[str, Any], ...] = ({},)
    needs: tuple[str, str] | None = None


# Hours: of slimming 300 s a run; of distillers 120 to 200 CPU seconds a run, of edge_sam 280, slimsam 330, tiny_sam
# 800; of teachers two minutes a row of cuts; of fair 120 s a run, and half a second for a step beyond 200; of others
# what they, or a first part, took.
PARTS = {
    "teacher_cache": Part(0.05, "", ("experiments.teacher_cache {shipped} {val} --limit 20",)),
    "first_minute": Part(0.06, "", ("experiments.first_minute",)),
    "how_it_works": Part(
        0.1,
        "how_it_works.jsonl",
        (
            "experiments.how_it_works --recipes taylor --steps 60",
            "experiments.how_it_works --recipes default --steps 48",
        ),
        ({"recipe": "taylor", "steps": 60}, {"recipe": "default", "steps": 48}),
    ),
    "thresholds": Part(0.1, "", ("experiments.thresholds --images {images} --model {shipped}",)),
    "hierarchical": Part(
        0.2,
        "hierarchical.jsonl",
        ("experiments.hierarchical run --teacher {shipped} --images {photos} {val}", "experiments.hierarchical table"),
        ({"teacher": "sam_small_v2"},),
    ),
    "families": Part(
        0.3, "families.jsonl", ("experiments.families run --folder {work}/stand_ins", "experiments.families table")
    ),
    "planned_families": Part(
        0.2,
        "planned_families.jsonl",
        ("experiments.planned_families", "experiments.families table"),
        needs=("plan-gpu", "jax_cuda12_plugin"),
    ),
    "plans": Part(
        1.0,
        "",
        (
            f"{PLAN} vit_b vit_l vit_h --only distill --early --on h100 v5e-1 v5e-16 v5e-256 {written('plans')}",
            f"{PLAN} vit_h --only distill --early --on h100x8 --fsdp 8 {written('split')}",
            f"{PLAN} vit_h --only prune --on h100 {written('prune')}",
            f"{PLAN} vit_p77 --only encode --on h100 v5e-1 a100 {written('encode')}",
        ),
        needs=("plan-gpu,plan-tpu", "libtpu"),
    ),
    "speed": Part(
        1.6,
        "",
        (
            "experiments.bench --what forward --preset vit_b --images 3 --turns 2",
            "experiments.bench --what forward --preset vit_p77 --images 3 --turns 2",
            "experiments.bench --what embedding-stage --preset vit_p77 --images 1 --batch 1 --turns 2",
            "experiments.bench --what bottleneck-stage --preset vit_p77 --images 1 --batch 1 --turns 2",
            "experiments.bench --what embedding-stage --preset small_p50 --images 40 --turns 2",
            "experiments.bench --what bottleneck-stage --preset small_p50 --images 40 --turns 2",
            "experiments.bench --what bottleneck-stage --preset small_p50 --images 40 --turns 2 --cached",
            "experiments.bench --what evaluation --preset small --images 30 --turns 3",
            "experiments.bench --what everything --preset small --images 3 --turns 2",
            "experiments.bench --what data --images 100 --turns 2",
            "experiments.bench.families --preset vit_t --images 4 --turns 3",
            "experiments.bench.families --preset rep_vit_m1 --images 4 --turns 3",
            "experiments.bench.families --preset efficient_sam_ti --images 2 --turns 3",
            "experiments.bench --preset vit_b --onnxruntime --images 2 --turns 2",
            "experiments.bench --preset vit_p77 --onnxruntime --images 3 --turns 3",
            "experiments.bench --preset small --onnxruntime --images 3 --turns 3",
            "experiments.bench --what forward --preset vit_p77 --images 3 --attention plain --side jax",
            "experiments.bench --what forward --preset vit_p77 --images 3 --attention folded --side jax",
            "experiments.bench.distillation --student efficient_sam_ti --batch 1 --images 2 --turns 2",
            "experiments.bench.distillation --student vit_t --batch 2 --images 4 --turns 2",
            "experiments.bench.distillation --student rep_vit_m1 --batch 2 --images 6 --turns 2",
        ),
    ),
    "estimators": Part(
        1.0,
        "estimators.jsonl",
        (f"experiments.estimators run {WORK}", "experiments.estimators table"),
        ({"teacher": "sam_small_v2"},),
    ),
    "quantization": Part(
        2.0,
        "quantization.jsonl",
        (
            "experiments.quantization run {shipped} --calibration {images} --images {val} --limit 12 --seeds 0 1 2",
            "experiments.quantization slim {shipped} --calibration {images} --images {val} --limit 12 --seeds 0 1 2 "
            "--steps 50 --folder {work}/slim_models",
            "experiments.quantization table",
        ),
        (
            {"model": "sam_small_v2", "images": 12},
            {"distilled": True, "teacher": "sam_small_v2", "steps": 50, "images": 12},
        ),
    ),
    "quantization_latency": Part(
        0.2,
        "quantization_latency.jsonl",
        (
            "experiments.quantization_latency run {shipped} --calibration {images}",
            "experiments.quantization_latency table",
        ),
        ({"model": "sam_small_v2"},),
    ),
    "hiera": Part(
        1.9,
        "hiera.jsonl",
        (
            "experiments.hiera_end_to_end make --teacher {shipped} --images {images} --out {work}/hiera_small",
            "experiments.hiera_end_to_end slim --teacher {work}/hiera_small --images {images} --val {val} --steps 80 "
            "--seeds 0 1 2",
            "experiments.teacher_card run {work}/hiera_small --images {val} --limit 60",
            "experiments.hiera_end_to_end table",
            "experiments.teacher_card table",
        ),
        ({"steps": 80},),
    ),
    "teachers": Part(
        1.3,
        "teachers.jsonl",
        (
            "experiments.isotropic {shipped} --images {images} --out {work}/isotropic",
            "experiments.teachers run --teachers {shipped} {work}/isotropic --images {images} --val {photos}",
            "experiments.teachers table",
        ),
        ({"teacher": "sam_small_v2"}, {"teacher": "isotropic"}),
    ),
    "fair": Part(
        4.8,
        "fair.jsonl",
        (
            "experiments.fair run --teachers {shipped} --images {images} --photos {photos} --val {val}",
            "experiments.fair run --teachers {shipped} --images {images} --photos {photos} --val {val} --ratios 0.77 "
            "--recipes default taylor --steps 24 100 400 1600",
            "experiments.fair table",
        ),
        ({"teacher": "sam_small_v2"},),
    ),
    "teacher_card": Part(
        0.05,
        "teacher_card.jsonl",
        ("experiments.teacher_card run {shipped} --images {val} --limit 60", "experiments.teacher_card table"),
        ({"teacher": "sam_small_v2", "data": "bsds_val", "images": 60},),
    ),
    "pruning": Part(
        0.9,
        "pruning.jsonl",
        (f"experiments.pruning run {WORK}", "experiments.pruning table"),
        ({"teacher": "sam_small_v2"},),
    ),
    "slimming": Part(
        5.2,
        "slimming.jsonl",
        (f"experiments.slimming run {WORK} --cache {{work}}/cache", "experiments.slimming table"),
        ({"teacher": "sam_small_v2"},),
    ),
    "distillers": Part(
        12.3,
        "distillers.jsonl",
        (
            f"{DISTILLERS} --steps 300",
            f"{DISTILLERS} --steps 300 --limits 30 --only 'default, 90 %' 'slimsam, 90 %'",
            f"{DISTILLERS} --steps 300 --limits 4 20 --rates 0.3333 --only 'default, 77 %'",
            f"{DISTILLERS} --steps 300 --limits 100 --rates 1 --only 'default, 77 %' 'default, 90 %' "
            "'mobile_sam, tiny_vit_small' 'mobile_sam, rep_vit_small'",
            f"{DISTILLERS} --steps 300 --limits 100 --rates 3 --only 'slimsam, 77 %' 'slimsam, 90 %' "
            "'mobile_sam, vit_small' 'tiny_sam, tiny_vit_small'",
            f"{DISTILLERS} --steps 300 --limits 100 --rates 0.3333 --only 'edge_sam, rep_vit_small'",
            f"{DISTILLERS} --steps 300 --limits 200 --rates 1 --only 'default, 90 %'",
            f"{DISTILLERS} --steps 300 --limits 200 --rates 3 --only 'slimsam, 90 %'",
            f"{DISTILLERS} --steps 1600 --rates 3 --only 'mobile_sam, vit_small'",
            f"{DISTILLERS} --steps 1600 --limits 30 --rates 0.3333 --only 'default, 77 %'",
            f"{DISTILLERS} --steps 1600 --limits 200 --rates 1 --only 'default, 77 %'",
            f"{DISTILLERS} --steps 100 --table weights --rates 1 --seeds 0",
            "experiments.distillers table",
        ),
        ({"steps": 300}, {"steps": 100}, {"steps": 1600}),
    ),
}
