"""`recipe="slimsam"` against the original code, on the part of its golden vectors that the repository holds.

With the whole of them tests/parity/test_reference.py compares the rest, the first step's gradients, and
tests/parity/test_reference_steps.py the losses and two steps of training. Tolerances are the same.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from helpers import golden as subset
from helpers.reference import (
    BOTTLENECK,
    DEPTH,
    FULL,
    HEADS,
    SECOND,
    assert_removed,
    choose,
    embed,
    encoder_rows,
    gradients,
    model,
    removed,
    scores_of,
)
from helpers.shared import shared
from slimsam_jax.compression import prune, reference, vit_groups
from slimsam_jax.compression.loss_terms import ALIGN, SAM
from slimsam_jax.pruning import importance

KINDS = {"attn": ("gs1", HEADS, 8), "mlp": ("gs2", 1, 384)}  # the original's name of a run, copies, channels of a copy


@pytest.fixture(scope="module")
def golden():
    return subset.read()


def test_it_is_cut_from_the_whole(golden):
    whole = dict(np.load(shared("golden/tiny_slimsam.npz")))
    wanted = subset.cut(whole)
    assert set(golden) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(golden[name], array, err_msg=name)


def test_members_of_the_embedding(golden):
    """Every kernel on the side that the original traces, all of its votes, and what follows without one."""
    named, found = {row.path: row for row in encoder_rows()}, set()
    grouping = vit_groups.groups_of(FULL)
    (embedding,) = (group for group in grouping.groups if group.name == "embedding")
    for place in embedding.members:
        row = named[place.path]
        last = place.axis == len(row.pattern.split(" -> ")[1].split()) - 1
        side = "uncounted" if place.path not in grouping.kernels else "out" if last else "in"
        if not row.name.endswith(".bias"):  # the original has modules
            found.add(f"{row.name.removesuffix('.weight')}:{side}")
    assert found == set(golden["step1/members"].tolist())


def stored(golden, prefix: str, kind: str) -> dict[str, np.ndarray]:
    """The original's scores of every block, of one of the heads, which it repeats for all."""
    _, copies, _ = KINDS[kind]
    found = [golden[f"{prefix}/{kind}{block}"] for block in range(DEPTH)]
    return {f"blocks_{block}/{kind}": scores[: len(scores) // copies] for block, scores in enumerate(found)}


@pytest.mark.parametrize(("name", "by"), [("Disturb", "all"), ("mag", "all"), ("taylor", "first")])
def test_first_step_from_its_scores(golden, name, by):
    score = golden[f"step1/{name}/imp_raw"]
    normal = importance.NORMALIZERS["mean"](score)
    np.testing.assert_allclose(normal, golden[f"step1/{name}/imp"], rtol=2e-6)
    # The original has summed the scores of tied channels already, and repeated them: summing again changes no order.
    keep = reference.keep_local_tied({"g": normal}, 0.5, HEADS, HEADS, decided_by=by)["g"]
    np.testing.assert_array_equal(removed(keep, 96), golden[f"step1/{name}/pruned"])


@pytest.mark.parametrize("prefix", ["step2/global", "r77fix/step2/global"])
@pytest.mark.parametrize("kind", KINDS)
def test_global_selection_from_its_scores(golden, prefix, kind):
    run, copies, size = KINDS[kind]
    normal = reference.normalize(stored(golden, f"{prefix}/{run}/imp_raw", kind), "gaussian", copies)
    for name, expected in stored(golden, f"{prefix}/{run}/imp", kind).items():
        np.testing.assert_allclose(normal[name], expected, atol=5e-5)
    ratio = 0.77 if prefix.startswith("r77") else 0.5
    keep = reference.keep_global(normal, ratio, HEADS, copies)
    for block in range(DEPTH):
        gone = golden[f"{prefix}/{run}/pruned/{kind}{block}"]
        np.testing.assert_array_equal(removed(keep[f"blocks_{block}/{kind}"], size, copies), gone)


@pytest.mark.parametrize("prefix", ["step2/local", "r77fix/step2/local"])
@pytest.mark.parametrize("kind", KINDS)
def test_local_selection_from_its_scores(golden, prefix, kind):
    _, copies, size = KINDS[kind]
    normal = reference.normalize(stored(golden, f"{prefix}/imp_raw", kind), "mean", copies)
    for name, expected in stored(golden, f"{prefix}/imp", kind).items():
        np.testing.assert_allclose(normal[name], expected, rtol=5e-5)
    keep = reference.keep_local(normal, 0.77 if prefix.startswith("r77") else 0.5, 1 if kind == "attn" else HEADS)
    for block in range(DEPTH):
        gone = golden[f"{prefix}/pruned/{kind}{block}"]
        np.testing.assert_array_equal(removed(keep[f"blocks_{block}/{kind}"], size, copies), gone)


@pytest.mark.parametrize("percent", [50, 77])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_would_vanish_are_skipped(golden, percent, kind):
    run, copies, size = KINDS[kind]
    raw = stored(golden, f"step2/global/{run}/imp_raw", kind)
    keep = reference.keep_global(reference.normalize(raw, "none", copies), percent / 100, HEADS, copies)
    for block in range(DEPTH):
        gone = golden[f"quirk_norm_none/r{percent}/{run}/pruned/{kind}{block}"]
        np.testing.assert_array_equal(removed(keep[f"blocks_{block}/{kind}"], size, copies), gone)


@pytest.fixture(scope="module")
def step2(golden):
    student = model(golden, subset.MODEL)
    return student, *gradients(golden, student, golden["noise2"])


def test_encoder(golden, step2):
    assert step2[0].config == dataclasses.replace(FULL, embed_dim=12)
    np.testing.assert_allclose(embed(golden, step2[0])[:2], golden["r77fix/step1/out"], atol=5e-5)


def test_disturbed_gradients_and_importance(golden, step2):
    student, losses, grads = step2
    np.testing.assert_allclose(losses, golden["r77fix/step2/grad_loss"], rtol=1e-5)
    for kind in KINDS:
        raw = stored(golden, f"r77fix/step2/global/{KINDS[kind][0]}/imp_raw", kind)
        scored = scores_of(student, grads, kind)
        assert len(scored) == DEPTH
        for name, scores in scored.items():
            np.testing.assert_allclose(scores, raw[name], rtol=5e-5)


@pytest.mark.parametrize("allocation", ["global", "local"])
def test_second_step(golden, step2, allocation):
    student, _, grads = step2
    keep = choose(student, grads, dataclasses.replace(BOTTLENECK, allocation=allocation), 0.77)
    where = "r77fix/step2/local" if allocation == "local" else "r77fix/step2/global"
    of = {kind: where if allocation == "local" else f"{where}/{run}" for kind, (run, *_) in KINDS.items()}
    assert_removed(golden, of, keep, student.config)
    slim = prune.cut(student, keep, BOTTLENECK)
    np.testing.assert_allclose(embed(golden, slim)[:2], golden[f"{where}/out"], atol=5e-5)


def test_weights_of_the_features(golden):
    weights = [ALIGN[SECOND.align]((epoch + 0.5) / 20, SECOND, SAM)["stream"] for epoch in range(20)]
    np.testing.assert_allclose(weights, golden["distill2/a_weight_by_epoch"], atol=1e-9)
