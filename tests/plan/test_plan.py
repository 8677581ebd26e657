"""The program: what it prints and writes for the one device that is here, and what it refuses."""

from __future__ import annotations

import json

import jax
import pytest
import torch

from helpers.models import SQUARE
from helpers.peers import stock_sam
from slimsam_jax import sharding
from slimsam_jax.compression.budget import Target
from slimsam_jax.compression.plan import planned
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.errors import InputError, RunError
from slimsam_jax.plan import report, run
from slimsam_jax.plan.hardware import CHIPS, Hardware
from slimsam_jax.plan.measure import MOST, Needs
from slimsam_jax.plan.options import Options
from slimsam_jax.plan.programs import How

H100 = Hardware("h100", CHIPS["h100"], jax.devices()[:1])


def test_a_plan_for_this_machine(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "architecture", lambda name: SQUARE)
    out, table = tmp_path / "a new" / "plan.json", tmp_path / "another" / "plan.md"
    written = run.run(Options(on=("cpu",), only=("encode",), out=out, table=table, per_device=3))
    assert json.loads(out.read_text()) == json.loads(json.dumps(written))
    (entry,) = written
    assert (entry["batch"], entry["devices"], entry["hours"]) == (3, 1, None)
    whole, slim = entry["programs"]
    assert whole["name"] == "encode: the teacher" and slim["name"] == "encode: the slim model"
    assert 0 < slim["arguments"] < whole["arguments"] < whole["peak"]
    assert 0 < slim["flops"] < whole["flops"] and whole["fits"] is None and whole["collectives"] == {}
    assert "  encode: the teacher: peak" in capsys.readouterr().out
    assert table.read_text().count("\n| small | cpu | encode") == table.read_text().count(" | whole |") == 2
    assert report.table([entry | {"fsdp": 8}]).count("| cpu, `--fsdp 8` |") == 2
    assert sharding._target is None


def test_what_does_not_fit_is_a_row_and_no_end(monkeypatch, tmp_path, capsys):
    """The TPU's compiler gives up where it finds no room; another fault of a compiler is one in the end."""
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm."

    def traced(message):
        def lower(*_):
            raise jax.errors.JaxRuntimeError(message)

        return type("Traced", (), {"lower": lower, "jaxpr": jax.make_jaxpr(lambda: 0)()})()

    monkeypatch.setattr(run, "architecture", lambda name: SQUARE)
    function = type("Function", (), {"trace": lambda self, *args: traced(said)})()
    monkeypatch.setattr("slimsam_jax.plan.programs.encode", function)
    ((entry),) = run.run(Options(on=("cpu",), only=("encode",), out=tmp_path / "plan.json"))
    assert [(each["fits"], each["peak"]) for each in entry["programs"]] == [(False, 20 << 30)] * 2
    assert "the compiler gave up: RESOURCE_EXHAUSTED" in capsys.readouterr().out
    assert report.table([entry]).count("| **no** |") == report.table([entry]).count(" | no |") == 2
    said = "INTERNAL: a fault"
    with pytest.raises(RunError, match="2 of 2 programs were not compiled"):
        run.run(Options(on=("cpu",), only=("encode",), out=tmp_path / "plan.json"))
    assert "the compiler gave up: INTERNAL: a fault" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())[0]["programs"][0]["fits"] is None


@pytest.mark.parametrize(("fits", "said"), [(True, "fits"), (False, "does NOT fit"), (None, "not known whether it")])
def test_a_program_fits_or_does_not_or_nobody_knows(fits, said):
    assert f", {said}" in report.memory_of(Needs("distill", "distill", 4, 10, peak=None, fits=fits), H100)


def largest(monkeypatch, fits, counts=(0, 0, 10), hardware=H100):
    """Of the default recipe, where `fits` is the answer for so many images."""
    answer = lambda program, _: Needs(
        "distill", "distill", 4, 10, None, fits(program.images), problem="INTERNAL: a fault"
    )
    monkeypatch.setattr(run, "measure", answer)
    made = lambda steps, config, target, how, only: (
        [type("Program", (), {"images": how.batch})] * (only == ("distill",))
    )
    monkeypatch.setattr(run, "programs", made)
    how = How(4, jax.numpy.float32, 2, 1, "auto", 100)
    return run.largest_batch(hardware, planned(RECIPES["default"], counts), SQUARE, Target(0.5), how)


def test_a_try_ends_with_the_first_program_that_does_not_fit(monkeypatch):
    """Each is a compilation; one image fits, of two the first distillation does not, nor of four."""
    compiled = []

    def answer(program, _):
        compiled.append(program.images)
        return Needs("distill", "distill", 4, 10, None, program.images <= 1)

    monkeypatch.setattr(run, "measure", answer)
    made = lambda steps, config, target, how, only: [type("Program", (), {"images": how.batch})] * 2
    monkeypatch.setattr(run, "programs", made)
    how = How(4, jax.numpy.float32, 1, 1, "auto", 100)
    found = run.largest_batch(H100, planned(RECIPES["default"], (0, 0, 10)), SQUARE, Target(0.5), how)
    assert (found["largest_batch"], compiled) == (1, [1, 1, 2, 4])


@pytest.mark.parametrize("options", [{}, {"only": ("distill",)}, {"only": ("encode",), "largest": True}])
def test_what_learns_beside_integers_is_refused_before_anything_is_compiled(options, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("compiled"))
    with pytest.raises(InputError, match="distill-2, beside integers, is not planned: take --recipe default"):
        run.run(Options(on=("cpu",), recipe="integers", out=tmp_path / "plan.json", **options))
    assert not list(tmp_path.iterdir())


def test_the_largest_batch_is_one_that_fits(monkeypatch, capsys):
    found = largest(monkeypatch, lambda images: images <= 11)
    assert found == {"largest_batch": 10, "largest_batch_is_at_least": False}  # each step is taken in two parts
    report.print_whole({"hours": None, **found})
    found = largest(monkeypatch, lambda images: True)
    assert found == {"largest_batch": 2 * MOST, "largest_batch_is_at_least": True}
    report.print_whole({"hours": None, **found})
    assert [line for line in capsys.readouterr().out.splitlines() if "the largest" in line] == [
        "  the largest batch that fits: 10 images a step",
        f"  the largest batch that fits: at least {2 * MOST} images a step",
    ]


def test_no_batch_is_the_largest_where_there_is_no_answer(monkeypatch):
    nothing = {"largest_batch": None, "largest_batch_is_at_least": None}
    assert largest(monkeypatch, lambda images: True, counts=(0, 0, 0)) == nothing
    assert largest(monkeypatch, lambda images: True, hardware=Hardware("cpu", None, jax.devices()[:1])) == nothing
    with pytest.raises(RunError, match="--largest: distill was not compiled, so what fits is not known: INTERNAL"):
        largest(monkeypatch, lambda images: None)


def test_hours_name_what_they_are_of(capsys):
    report.print_whole({"hours": 0.5, "device_hours": 4.0, "images": 10000, "hours_of": ["distill"]})
    assert "at best 0.5 hours, 4 device hours, for 10000 images: distill (" in capsys.readouterr().out


@pytest.mark.parametrize(("hardware", "ended"), [(H100, True), (Hardware("cpu", None, ()), False)])
def test_compiling_ends_early_for_a_chip_and_not_for_the_cpu(hardware, ended, monkeypatch):
    made = lambda early: Needs("distill", "distill", 4, 10, None, None, early=early)
    monkeypatch.setattr(run, "measure_early", lambda listed, number, program, hardware: made(True))
    monkeypatch.setattr(run, "measure", lambda program, hardware: made(False))
    needs = list(run.measured(lambda: iter([object()]), hardware, early=True))
    assert [each.early for each in needs] == [ended]
    entry = {"teacher": "small", "on": hardware.name, "devices": 1, "fsdp": 1, "programs": [run.described(needs[0])]}
    assert report.table([entry]).count("| until memory |") == ended


def test_two_outputs_are_two_files(tmp_path):
    with pytest.raises(InputError, match="are one file; each output needs its own"):
        Options(out=tmp_path / "plan", table=tmp_path / "plan").check()


def test_a_published_file_is_planned_by_its_widths(tmp_path):
    torch.save(stock_sam(SQUARE).state_dict(), tmp_path / "sam.pth")
    assert run.architecture(str(tmp_path / "sam.pth")) == SQUARE


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": 4, "per_device": 1}, "--batch and --per-device both"),
        ({"budget": "latency=3ms"}, "cannot be planned"),
        ({"ratio": 1.0}, "0 < ratio < 1"),
        ({"limit": 0}, "--limit 0 must be at least 1"),
        ({"on": ("v5e-3",)}, "a slice of 3 v5e chips is not known"),
        ({"on": ("cpu",), "teacher": ("vit_x",)}, "no model, and no preset: vit_b"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_anything_is_compiled(given, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run.run(Options(**given, out=tmp_path / "plan.json"))
    assert not list(tmp_path.iterdir())
