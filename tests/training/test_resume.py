"""A run that is stopped, killed or damaged ends where the uninterrupted one ends."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import from_torch
from experiments.recipes import decoder
from helpers.images import truncated
from helpers.runs import compiled_once, compress_options
from slimsam_jax import cli, sharding
from slimsam_jax.api import compress_with
from slimsam_jax.compression import distill, pipeline
from slimsam_jax.compression.distill import Distillation
from slimsam_jax.compression.options import Options
from slimsam_jax.compression.set_option import change
from slimsam_jax.compression.steps import Initialize, Prune
from slimsam_jax.distillation.step import TrainState, init_state, make_optimizer
from slimsam_jax.errors import InputError, RunError, Stopped
from slimsam_jax.training import checkpoints
from slimsam_jax.training.loop import Loop, Schedule, Trainer
from slimsam_jax.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("unmeasured", "programs")


@pytest.fixture(scope="module")
def programs():
    """Runs of the same shapes and step share a program; that each may compile its own is seen by processes, below."""
    with compiled_once(distill):
        yield


def assert_same_run(out: Path, finished: Path) -> None:
    chex.assert_trees_all_equal(from_torch.load(out).params, from_torch.load(finished).params)
    assert (out / "log.jsonl").read_text() == (finished / "log.jsonl").read_text()


@pytest.mark.parametrize("stop", [("distill", 3), ("distill-2", 1)])
def test_a_resumed_run_equals_an_uninterrupted_one(finished, material, tmp_path, monkeypatch, stop):
    def step(self, state, number, batch, whole=Distillation.step):
        if (self.planned.name, number - 1) == stop:
            raise RunError("pulled the plug")
        return whole(self, state, number, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "step", step)
        with pytest.raises(RunError, match="plug"):
            compress_with(compress_options(material, tmp_path / "slim"))
    assert not (tmp_path / "slim" / "model.safetensors").exists()
    with pytest.raises(InputError, match="options seed: 0 -> 7"):
        compress_with(compress_options(material, tmp_path / "slim", resume=True, seed=7))
    compress_with(compress_options(material, tmp_path / "slim", resume=True))
    assert_same_run(tmp_path / "slim", finished)


@pytest.mark.slow
def test_the_default_recipe_is_resumed(material, tmp_path, monkeypatch):
    """Its only distillation is guided by the model before the second cut, which was not distilled."""
    choices = {"set": ("distill.validations=2",), "steps": 2, "save_every": 1}
    compress_with(compress_options(material, tmp_path / "whole", **choices))

    def step(self, state, number, batch, whole=Distillation.step):
        if number == 2:
            raise RunError("pulled the plug")
        return whole(self, state, number, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "step", step)
        with pytest.raises(RunError, match="plug"):
            compress_with(compress_options(material, tmp_path / "slim", **choices))
    compress_with(compress_options(material, tmp_path / "slim", **choices, resume=True))
    assert_same_run(tmp_path / "slim", tmp_path / "whole")


@pytest.mark.slow
def test_the_stage_of_another_recipe_is_resumed_too(material, tmp_path, monkeypatch):
    """With everything that a step draws or carries along."""
    options = compress_options(material, tmp_path / "whole", set=("distill.validations=2", "distill.ema=0.5"))
    *cuts, _, last = decoder(0.5)
    recipe = change((*cuts, Initialize(), last), options.set)
    compress_with(options, recipe)

    def step(self, state, number, batch, whole=Distillation.step):
        if number == 2:
            raise RunError("pulled the plug")
        return whole(self, state, number, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "step", step)
        with pytest.raises(RunError, match="plug"):
            compress_with(dataclasses.replace(options, out=tmp_path / "slim"), recipe)
    compress_with(dataclasses.replace(options, out=tmp_path / "slim", resume=True), recipe)
    assert_same_run(tmp_path / "slim", tmp_path / "whole")
    decoders = (from_torch.load(folder).params["mask_decoder"] for folder in (material / "teacher", tmp_path / "slim"))
    assert not all(map(np.array_equal, *map(jax.tree.leaves, decoders)))


@pytest.mark.slow
def test_broken_images_are_named_and_skipped(material, tmp_path, monkeypatch, capsys):
    """Also those that were met before the run was stopped; each once a stage."""
    shutil.copytree(material / "images", tmp_path / "images")
    for name in ("a.jpg", "b.jpg"):
        truncated(tmp_path / "images" / name)
    options = compress_options(material, tmp_path / "slim", images=(tmp_path / "images",), max_broken=0.5)

    def step(self, state, number, batch, whole=Distillation.step):
        if (self.planned.name, number) == ("distill-2", 4):
            raise RunError("pulled the plug")
        return whole(self, state, number, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "step", step)
        with pytest.raises(RunError, match="plug"):
            compress_with(options)
    compress_with(dataclasses.replace(options, resume=True))
    log = [json.loads(line) for line in (tmp_path / "slim" / "log.jsonl").read_text().splitlines()]
    names = [(entry["stage"], Path(entry["skipped"]).name) for entry in log if "skipped" in entry]
    assert names == [(stage, name) for stage in ("distill", "distill-2") for name in ("a.jpg", "b.jpg")]
    assert "a.jpg is not a readable image" in capsys.readouterr().out


def test_what_another_process_cannot_read_counts_here(material, tmp_path, monkeypatch):
    """Before a stage's checkpoints, so that it is in the log; and after pruning, where it may be too much."""
    name = str(material / "images" / "3.png")
    monkeypatch.setattr(sharding, "gather_json", lambda own: [own, {name: "torn elsewhere"}])
    compress_with(compress_options(material, tmp_path / "slim", max_broken=0.2))
    log = [json.loads(line) for line in (tmp_path / "slim" / "log.jsonl").read_text().splitlines()]
    assert [entry["reason"] for entry in log if "skipped" in entry] == ["torn elsewhere"] * 2
    with pytest.raises(RunError, match=r"1 of 6 images cannot be used, more than --max-broken 0\.1; the last: torn"):
        compress_with(compress_options(material, tmp_path / "other"))
    assert not (tmp_path / "other" / "checkpoints" / "prune-embedding").exists()


def test_sigterm_saves_and_ends_cleanly(finished, material, tmp_path, monkeypatch, capsys):
    def step(self, state, number, batch, whole=Distillation.step):
        if (self.planned.name, number) == ("distill", 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, state, number, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Distillation, "step", step)
        with pytest.raises(Stopped, match="after step 3 of the step distill"):
            compress_with(compress_options(material, tmp_path / "slim", save_every=100))
    saved = tmp_path / "slim" / "checkpoints" / "distill" / "steps" / "3"
    assert saved.exists() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    compress_with(compress_options(material, tmp_path / "slim", resume=True))
    assert_same_run(tmp_path / "slim", finished)

    def stopped(_):
        raise Stopped("stopped after step 3")

    monkeypatch.setattr(sys, "argv", ["prog"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.run(Options, stopped)
    assert end.value.code == 143 and capsys.readouterr().err == "stopped after step 3\n"


def test_sigterm_while_pruning_says_how_to_go_on(material, tmp_path, monkeypatch):
    def killed(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("nobody listens")

    monkeypatch.setitem(pipeline.STEP_FUNCTIONS, Prune, killed)
    for resume in (False, True):  # the second finds the folder as the first one left it, and nobody at work in it
        with pytest.raises(Stopped, match="finished steps are kept: continue with --resume"):
            compress_with(compress_options(material, tmp_path / "slim", resume=resume))
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(InputError, match="not empty: --resume continues the unfinished run in it"):
        compress_with(compress_options(material, tmp_path / "slim"))


def test_an_interrupt_says_how_to_go_on(material, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(pipeline.STEP_FUNCTIONS, Prune, interrupted)
    with pytest.raises(KeyboardInterrupt, match="finished steps are kept: continue with --resume"):
        compress_with(compress_options(material, tmp_path / "slim"))


def small_state(value: float) -> TrainState:
    # Noise, which compression leaves alone: an altered byte is then an altered number and no broken archive.
    params = {"w": value * jax.random.normal(jax.random.key(0), (400, 30)), "b": jnp.arange(3.0) + value}
    return init_state(params, make_optimizer(), ema=0.9)


def shapes() -> TrainState:
    return checkpoints.shapes_of(small_state(0))


def test_a_state_that_is_not_finite_is_refused(tmp_path):
    with checkpoints.Steps(tmp_path / "steps") as saved:
        saved.check_finite(1, small_state(1))
        with pytest.raises(RunError, match="state after step 2 is not finite"):
            saved.check_finite(2, small_state(np.inf))


class Numbers:
    """What a loop asks of `data.Batches`, without an image."""

    def __init__(self):
        self.skipped: dict[str, str] = {}
        self.passed: set[str] = set()

    def __iter__(self):
        return iter([{"image": np.zeros(1, np.uint8)}] * 6)

    def agree_on_skipped(self) -> None:
        pass

    def samples_of(self, step: int) -> list:
        return []

    def close(self) -> None:
        pass


class Spoilt(Loop):
    """A training whose third step spoils the state, though its loss is finite."""

    weights = learning_rate = score = sam = result = lambda *_: None
    stream = lambda self, start: Numbers()

    def __init__(self, folder: RunFolder):
        def step(state, *_):
            params = state.params * (jnp.nan if state.step == 2 else 1.0)
            return state._replace(params=params, step=state.step + 1), {"loss": 0.0}

        start = TrainState(jnp.zeros(3), (), None, jnp.int32(0))
        trainer = Trainer(step, start, {}, sharding.make_mesh())
        super().__init__(folder, trainer, Schedule("spoilt", "the training", 6, 1, save_every=2, validations=0))


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    with pytest.raises(RunError, match="state after step 4 is not finite; the checkpoint before it is kept"):
        Spoilt(folder).run()
    with folder.steps("spoilt") as saved:
        assert list(saved.manager.all_steps()) == [2]


class Worse(Loop):
    """A training whose steps make the model worse, and whose start is judged; models are their steps' numbers."""

    weights = learning_rate = lambda *_: None
    stream = lambda self, start: Numbers()
    sam = lambda self, state: int(state.step)
    score = lambda self, sam, step: {"score": -float(sam)}

    def __init__(self, folder: RunFolder):
        step = lambda state, *_: (state._replace(step=state.step + 1), {"loss": 0.0})
        trainer = Trainer(step, TrainState(jnp.zeros(3), (), None, jnp.int32(0)), {}, sharding.make_mesh())
        super().__init__(folder, trainer, Schedule("worse", "the training", 6, 1, save_every=6, validations=6))
        self.validated.add(0)


def test_a_start_that_is_judged_stays_where_no_step_is_better(tmp_path, monkeypatch):
    """And is judged once, also in a run that was stopped before its first checkpoint."""
    folder, models = RunFolder(tmp_path / "run", {}), {}
    monkeypatch.setattr(folder, "save_model", lambda stage, part, sam: models.update({part: sam}))
    monkeypatch.setattr(folder, "load_model", lambda stage, part: models[part])
    monkeypatch.setattr(folder, "remove_model", lambda stage, part: models.pop(part, None))
    with monkeypatch.context() as patched:
        patched.setattr(Worse, "step", lambda *_: pytest.fail("pulled the plug"))
        with pytest.raises(pytest.fail.Exception):
            Worse(folder).run()
    assert Worse(folder).run() == 0 and models["last"] == 6
    assert [entry["step"] for entry in folder.read_log() if "score" in entry] == [*range(7)]


def test_the_best_model_is_there_whatever_a_repeated_validation_says(tmp_path, monkeypatch):
    """Killed between the best validation and its checkpoint; the repeated one gives less, as on another device."""
    folder, models = RunFolder(tmp_path / "run", {}), {}
    monkeypatch.setattr(folder, "save_model", lambda stage, part, sam: models.update({part: sam}))
    monkeypatch.setattr(folder, "remove_model", lambda stage, part: models.pop(part, None))
    run = Worse(folder)
    run.scores = {}
    monkeypatch.setattr(run, "score", lambda sam, step: {"score": scores[step]})
    scores = {0: 9.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 10.0}
    for step in scores:
        run.validate(TrainState(jnp.zeros(3), (), None, jnp.int32(step)), step)
    del run.scores[5]  # as after the checkpoint of step 4
    assert f"best-{run.best()}" in models


@pytest.mark.parametrize("damage", ["altered", "shortened", "emptied", "removed"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capfd, damage):
    with checkpoints.Steps(tmp_path / "steps") as saved:
        for step in (1, 2):
            saved.save(step, small_state(step), {"note": step})
    state = tmp_path / "steps" / "2" / "state"
    data = max((p for p in state.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 0xFF
    {
        "altered": lambda: data.write_bytes(content),
        "shortened": lambda: data.write_bytes(content[:middle]),
        "emptied": lambda: data.write_bytes(b""),
        "removed": data.unlink,
    }[damage]()
    with checkpoints.Steps(tmp_path / "steps") as saved:
        restored, notes = saved.restore(shapes())
        chex.assert_trees_all_equal(restored, small_state(1))
        assert notes == {"note": 1}
        saved.save(2, small_state(3))
    with checkpoints.Steps(tmp_path / "steps") as saved:
        chex.assert_trees_all_equal(saved.restore(shapes())[0], small_state(3))
    out = capfd.readouterr().out
    assert "checkpoint of step 2 is damaged" in out and out.count("\n") == 1


def test_what_cannot_be_read_is_never_removed(tmp_path, monkeypatch):
    """No memory, a disk that is away for a moment: not a reason to throw checkpoints away."""
    with checkpoints.Steps(tmp_path / "steps") as saved:
        assert saved.restore(shapes()) is None
        saved.save(1, small_state(1))
    with checkpoints.Steps(tmp_path / "steps") as saved, monkeypatch.context() as patched:
        patched.setattr(saved.manager, "restore", lambda *_, **__: jnp.ones(()).missing)
        with pytest.raises(RunError, match="remove it to start this step anew"):
            saved.restore(shapes())
    with checkpoints.Steps(tmp_path / "steps") as saved:
        chex.assert_trees_all_equal(saved.restore(shapes())[0], small_state(1))


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    with checkpoints.Steps(tmp_path / "steps") as saved:
        saved.save(1, small_state(1))
    (tmp_path / "steps" / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with checkpoints.Steps(tmp_path / "steps") as saved:
        chex.assert_trees_all_equal(saved.restore(shapes())[0], small_state(1))


def test_what_is_saved_is_the_state_at_that_moment(tmp_path):
    """Written in the background, while the next step has already taken the donated state."""
    bump = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = small_state(0)
    with checkpoints.Steps(tmp_path / "steps") as saved:
        expected = jax.tree.map(np.array, state)
        saved.save(1, state)
        for _ in range(3):
            state = bump(state)
    with checkpoints.Steps(tmp_path / "steps") as saved:
        chex.assert_trees_all_equal(saved.restore(shapes())[0], expected)


def test_checksums_see_every_bit_and_order():
    array = jnp.arange(6.0).reshape(2, 3)
    others = array.at[1, 2].set(jnp.nextafter(5.0, 6.0)), array.at[0].set(array[0, ::-1]), -array, jnp.int32(3)
    sums = {checkpoints._checksums({"x": other})[0] for other in (array, *others, jnp.int32(-3))}
    assert len(sums) == 6


def test_checksums_and_finiteness_are_the_same_on_the_host_and_on_devices():
    """Arrays of this process are read by numpy; those of an accelerator or of several processes by a program."""
    random = np.random.default_rng(0)
    leaves = [jnp.asarray(random.standard_normal((3, 5)), jnp.float32), jnp.int32(-7), jnp.float32(np.nan)]
    assert checkpoints._checksums(leaves) == [int(found) for found in checkpoints._all_checksums(leaves)]
    for some in (leaves[:2], leaves):
        assert checkpoints._finite(some) == bool(checkpoints._all_finite(some)) == (len(some) == 2)


@pytest.mark.slow
def test_killed_again_and_again(finished, material, tmp_path):
    """`kill -9` at moments that nobody chose, until the run comes through."""
    out, random, kills = tmp_path / "slim", np.random.default_rng(0), 0
    program = """
import sys, jax
jax.config.update("jax_compilation_cache_dir", sys.argv[3])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
from pathlib import Path
from helpers.runs import compress_options
from slimsam_jax.api import compress_with
out = Path(sys.argv[2])
compress_with(compress_options(Path(sys.argv[1]), out, resume=(out / "checkpoints" / "origin.json").exists()))
"""
    arguments = [str(material), str(out), jax.config.jax_compilation_cache_dir]
    while not (out / "report.json").exists() or (out / "checkpoints").exists():
        run = subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE)
        try:
            _, error = run.communicate(timeout=random.uniform(3, 7) + 6 * kills)
            assert run.returncode == 0, error.decode()
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.communicate()
            kills += 1
    assert kills > 0
    assert_same_run(out, finished)
    assert "checkpoints" not in {path.name for path in out.iterdir()}


def test_half_a_line_of_a_killed_run_costs_nothing_after_it(tmp_path):
    folder = RunFolder(tmp_path / "out", {})
    folder.log(step=1)
    with (tmp_path / "out" / "log.jsonl").open("a") as file:
        file.write('{"sta')
    folder.log(step=2)
    assert folder.read_log() == [{"step": 1}, {"step": 2}]
