"""What programs of experiments have measured they do not keep twice."""

from __future__ import annotations

import json

import pytest

from experiments import how_it_works, reference_results, results


@pytest.fixture(autouse=True)
def committed(monkeypatch):
    monkeypatch.setattr(results, "check_committed", lambda: None)


def test_a_learning_curve_is_kept_once(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_results, "FILE", tmp_path / "reference.jsonl")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"provenance": {"options": {"images": ["a/train"], "seed": 0}}}))
    score = {"step": 1, "score": 0.5, "point_miou": 0.4, "box_miou": 0.6}
    (folder / "log.jsonl").write_text(json.dumps(score) + "\n")
    for name in ("narrow", "narrow", "another"):
        reference_results.record(name, folder)
    assert [entry["row"] for entry in results.read(reference_results.FILE)] == ["narrow", "another"]
    (folder / "log.jsonl").write_text(json.dumps(score | {"point_miou": 0.5}) + "\n")
    reference_results.record("narrow", folder)
    assert len(results.read(reference_results.FILE)) == 3


def test_steps_that_are_drawn_are_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(how_it_works, "FILE", tmp_path / "how_it_works.jsonl")
    monkeypatch.setattr(results, "FIGURE_FOLDER", tmp_path)

    def slimmed(options, teacher):
        raise RuntimeError("slimmed")

    monkeypatch.setattr(how_it_works, "slimmed", slimmed)
    key = {"recipe": "taylor", "ratio": 0.5, "seed": 0, "steps": 60}
    (tmp_path / "steps_taylor.png").write_bytes(b"")
    stages = ["the SAM", *how_it_works.STAGES["taylor"].values()]
    for stage in stages[:-1]:
        results.append(how_it_works.FILE, key | {"stage": stage})
    with pytest.raises(RuntimeError, match="slimmed"):  # the last stage is missing
        how_it_works.main(("taylor",))
    results.append(how_it_works.FILE, key | {"stage": stages[-1]})
    how_it_works.main(("taylor",))
    with pytest.raises(RuntimeError, match="slimmed"):
        how_it_works.main(("taylor",), steps=40)
