"""A loop and its checkpoints: what is finite is kept, damaged ones give way, the best model stays."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.images import samples
from slimsam_jax import sharding
from slimsam_jax.data.batches import Batches
from slimsam_jax.distillation.step import TrainState, init_state, make_optimizer
from slimsam_jax.errors import RunError, Stopped
from slimsam_jax.training import checkpoints
from slimsam_jax.training.loop import Loop, Schedule, Trainer
from slimsam_jax.training.run_folder import RunFolder


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


@pytest.mark.parametrize("when", ["score", "save"])
def test_sigterm_after_the_last_step_ends_the_run_before_the_next_thing(tmp_path, monkeypatch, when):
    """While that is validated, or saved; what is resumed takes no step again."""
    folder = RunFolder(tmp_path / "run", {})
    for name in ("save_model", "remove_model", "load_model"):
        monkeypatch.setattr(folder, name, lambda *_: None)
    owner = {"score": Worse, "save": checkpoints.Steps}[when]
    taken, whole = [], getattr(owner, when)

    def terminated(self, first, second, *more):
        if 6 in (first, second):
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, first, second, *more)

    with monkeypatch.context() as patched:
        patched.setattr(owner, when, terminated)
        patched.setattr(Worse, "result", lambda *_: pytest.fail("it goes on"))
        with pytest.raises(Stopped, match="stopped after step 6 of the training; continue with --resume"):
            Worse(folder).run()
    monkeypatch.setattr(Worse, "step", lambda *_: taken.append(1))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(Worse, "result", lambda self, state: int(state.step))
    assert Worse(folder).run() == 6 and not taken
    folder.release()


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


def test_images_that_were_to_replace_broken_ones_are_named_too(tmp_path, capsys):
    paths = [tmp_path / f"{i}.png" for i in range(9)]
    batches = Batches(samples(paths), (8, 8), batch=1, seed=0)
    first = paths.index(Path(batches.samples_of(0)[0].name))
    chain, later = [paths[(first + i) % 9] for i in range(3)], paths[(first + 5) % 9]
    batches.skipped.update({str(path): f"{path.name} is torn" for path in (*chain, later)})
    spoilt = Spoilt(folder := RunFolder(tmp_path / "run", {}))
    spoilt.batches, spoilt.schedule = batches, spoilt.schedule._replace(steps=1)
    spoilt.name_skipped()
    assert [entry["skipped"] for entry in folder.read_log()] == sorted(map(str, chain))
    assert capsys.readouterr().out.count("is torn") == 3
    folder.release()
