"""The table of families says what was measured, what papers say, and what is to be run."""

from __future__ import annotations

from experiments import families, results
from slimsam_jax.models.config import preset


def cell(line, column):
    names = [name.strip() for name in families.HEAD.strip("| ").split(" | ")]
    return [part.strip() for part in line.strip().removeprefix("|").removesuffix("|").split("|")][names.index(column)]


def test_every_model_has_its_line_and_nothing_is_invented(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "FILE", tmp_path / "families.jsonl")
    monkeypatch.setattr(families, "PLANNED", tmp_path / "planned.jsonl")
    assert set(families.PUBLISHED) == {*families.CONFIGS, *families.SAME}
    line = families.line_of("slimsam_77", families.cost_of("slimsam_77"))
    assert cell(line, "ms on this CPU") == cell(line, "float32 file") == "to be run"
    assert cell(line, "COCO AP, paper") == "41.3" and cell(line, "SA-1B mIoU, SlimSAM's paper") == "67.40"
    counts = {"parameters": 9_720_000, "encoder_parameters": 5_660_000}
    counts |= {"encoder_macs_linear": 20.93e9, "encoder_macs_attention": 25.67e9}
    for turn, milliseconds in enumerate((845.0, 850.0, 816.0)):
        entry = {"turn": turn, **counts, "encoder_memory": 100e6, "encoder_latency_ms": milliseconds}
        results.append(families.FILE, {"model": "slimsam_77", **entry})
    line = families.line_of("slimsam_77", families.cost_of("slimsam_77"))
    assert cell(line, "parameters, of the encoder") == "9.72 M, 5.66 M"
    assert cell(line, "encoder MACs, linear + attention") == "20.9 + 25.7 G"
    assert cell(line, "float32 file") == "39 MB" and cell(line, "ms on this CPU") == "816 to 850"
    assert cell(line, "planned on an H100") == "to be run"
    for on, mib in (("h100", 85), ("a100", 427)):
        results.append(families.PLANNED, {"model": "slimsam_77", "on": on, "peak": mib * 2**20})
    after = families.line_of("slimsam_77", families.cost_of("slimsam_77"))
    assert after == line.replace("to be run", "85 MiB")  # the H100's, beside all that was known before


def test_tiny_sam_is_mobile_sam_with_other_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "FILE", tmp_path / "families.jsonl")
    results.append(families.FILE, {"model": "mobile_sam", "parameters": 1})
    assert families.cost_of("tiny_sam")["parameters"] == 1


def test_each_model_is_timed_in_each_turn_once(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "FILE", tmp_path / "families.jsonl")
    monkeypatch.setattr(families, "COUNTED", ())
    monkeypatch.setattr(families, "MODELS", ("a", "b"))
    monkeypatch.setattr(families, "stand_ins", lambda folder: {"a": "A", "b": "B"})
    monkeypatch.setattr(results, "check_committed", lambda: None)
    asked = []
    monkeypatch.setattr(families.costs, "measure", lambda models: asked.append(models) or [{}] * len(models))
    results.append(families.FILE, {"model": "a", "turn": 0})
    results.append(families.FILE, {"model": "a", "turn": 2})
    families.run(tmp_path)
    assert asked == [["B"], ["A", "B"], ["B"]]
    families.run(tmp_path)
    assert len(asked) == 3


def test_what_is_counted_by_shapes():
    found = families.counted(preset("vit_b"))
    assert found["parameters"] == 93_735_472  # as segment_anything's
    assert round(found["encoder_macs_linear"] / 1e9, 2) == 368.86


def test_the_front_has_what_no_cheaper_one_equals():
    points = [(1.0, 40.0, "a"), (2.0, 40.0, "b"), (3.0, 42.0, "c"), (4.0, 41.0, "d"), (5.0, 43.0, "e")]
    assert families.front(points) == ([1.0, 3.0, 5.0], [40.0, 42.0, 43.0])
