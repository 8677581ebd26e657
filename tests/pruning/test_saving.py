"""What was cut is written as safetensors and JSON, whole or not at all, and read as a stranger's."""

from __future__ import annotations

import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from slimsam_jax import pruning
from slimsam_jax.errors import InputError, RunError

PARAMS = {"in": {"a": np.arange(24, dtype=np.float32).reshape(3, 8)}, "b": [np.ones((8, 5), np.float32), np.float32(2)]}
X = np.ones((2, 3), np.float32)
KEEP = {"in/a:1": [1, 2, 6]}


def function(params, x):
    return jax.nn.relu(x @ params["in"]["a"]) @ params["b"][0]


@pytest.fixture(scope="module")
def grouping():
    return pruning.find_groups(function, PARAMS, X)


@pytest.fixture()
def folder(tmp_path, grouping):
    pruning.save(tmp_path / "slim", pruning.shrink(PARAMS, grouping, KEEP), grouping, KEEP)
    return tmp_path / "slim"


def test_what_could_not_be_read_again_is_not_written(tmp_path, grouping, monkeypatch):
    monkeypatch.setattr("slimsam_jax.pruning.saving.MOST_JSON", 100)
    with pytest.raises(InputError, match=r"grouping.json would have \d+ bytes, and at most 100 are read again"):
        pruning.save(tmp_path / "slim", pruning.shrink(PARAMS, grouping, KEEP), grouping, KEEP)
    assert not (tmp_path / "slim").exists()


def test_what_is_read_is_what_was_written_and_runs(folder, grouping):
    assert sorted(os.listdir(folder)) == ["grouping.json", "keep.json", "model.safetensors"]
    assert os.listdir(folder.parent) == ["slim"]
    slim = pruning.shrink(PARAMS, grouping, KEEP)
    saved = pruning.load(folder, like=PARAMS)
    jax.tree.map(np.testing.assert_array_equal, saved.params, slim)
    assert jax.tree.structure(saved.params) == jax.tree.structure(PARAMS)
    assert saved.grouping == grouping and saved.keep["in/a:1"].tolist() == KEEP["in/a:1"]
    again = pruning.find_groups(function, jax.eval_shape(lambda: PARAMS), X)
    assert saved.grouping == again
    np.testing.assert_allclose(again.run(saved.params, X, keep=saved.keep), function(slim, X))
    assert pruning.load(folder).params.keys() == {"in/a", "b/0", "b/1"}


def test_what_is_read_does_not_hang_on_the_file(folder, grouping):
    saved = pruning.load(folder)
    (folder / "model.safetensors").write_bytes(b"")
    np.testing.assert_array_equal(saved.params["in/a"], PARAMS["in"]["a"][:, KEEP["in/a:1"]])


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.bfloat16, np.float16, np.bool_])
def test_types_stay(tmp_path, grouping, dtype):
    params = {**PARAMS, "b": [PARAMS["b"][0].astype(dtype), np.zeros((), dtype)]}
    pruning.save(tmp_path / "slim", pruning.shrink(params, grouping, KEEP), grouping, KEEP)
    read = pruning.load(tmp_path / "slim").params
    assert read["b/0"].dtype == dtype and read["b/1"].shape == ()


def test_what_is_not_written(tmp_path, folder, grouping):
    slim = pruning.shrink(PARAMS, grouping, KEEP)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="slim is there already; name a new folder"):
        pruning.save(folder, slim, grouping, KEEP)
    assert (folder / "model.safetensors").read_bytes() == before
    with pytest.raises(InputError, match=r"array 'in/a' has shape \(3, 3\), not \(3, 8\)"):
        pruning.save(tmp_path / "new", slim, grouping, {})
    with pytest.raises(InputError, match="array 'b/1' holds key<fry>, which a safetensors file cannot"):
        pruning.save(tmp_path / "new", {**slim, "b": [slim["b"][0], jax.random.key(0)]}, grouping, KEEP)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write .*file/new"):
        pruning.save(tmp_path / "file" / "new", slim, grouping, KEEP)
    assert sorted(os.listdir(tmp_path)) == ["file", "slim"]
    (tmp_path / "empty").mkdir()
    pruning.save(tmp_path / "empty", slim, grouping, KEEP)


def rewrite(change, path="grouping.json"):
    """A change of a JSON file: a function of the data that changes it in place."""

    def apply(folder):
        data = json.loads((folder / path).read_text())
        change(data)
        (folder / path).write_text(json.dumps(data))

    return apply


def other_arrays(**arrays):
    return lambda folder: save_file(arrays, folder / "model.safetensors")


A, B, ONE = np.ones((3, 3), np.float32), np.ones((3, 5), np.float32), np.float32([2])
RIGHT = {"in/a": A, "b/0": B, "b/1": ONE}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "keep.json").unlink(), "keep.json does not exist"),
        (
            lambda folder: (folder / "grouping.json").write_text("{"),
            "grouping.json: this is not the JSON of",
        ),
        (lambda folder: (folder / "grouping.json").write_bytes(b"\xff"), "grouping.json: this is not the JSON"),
        (lambda folder: (folder / "keep.json").write_text("[1]"), "keep.json holds no JSON object"),
        (lambda folder: (folder / "keep.json").write_text("[" * 5000), "keep.json cannot be read"),
        (lambda folder: os.truncate(folder / "model.safetensors", 40), "model.safetensors cannot be read"),
        (lambda folder: os.truncate(folder / "keep.json", 1 << 40), "keep.json has .* bytes, and at most"),
        (rewrite(lambda keep: keep.update({"in/a:1": [1, 9, 12]}), "keep.json"), "keep.json: .*between 0 and 7"),
        (rewrite(lambda keep: keep.update({"in/a:1": 10**30}), "keep.json"), "keep.json: .*must be indices"),
        (rewrite(lambda keep: keep.update(x=[0]), "keep.json"), "keep.json: there is no group 'x'"),
        (rewrite(lambda keep: keep.clear(), "keep.json"), r"model.safetensors: array 'in/a' has shape \(3, 3\), not"),
        (other_arrays(**{**RIGHT, "in/a": A[:, :2]}), r"'in/a' has shape \(3, 2\), not \(3, 3\)"),
        (other_arrays(**{"in/a": A, "b/0": B}), "there is no array 'b/1'"),
        (other_arrays(**RIGHT, c=A), "array 'c' was not there"),
        (rewrite(lambda data: data["groups"][0].update(size=10**400)), "grouping.json: .*not a number of channels"),
        (rewrite(lambda data: data.update(axes={**data["axes"], "in/a": [3, {"sum": ["in/a:1"] * 9}]})), "not .3, 27"),
        (rewrite(lambda data: data["groups"][0].update(copies="in/a:1")), "which is no other group"),
    ],
)
def test_a_folder_that_was_damaged_or_made_up(folder, change, message):
    change(folder)
    with pytest.raises(InputError, match=message) as caught:
        pruning.load(folder)
    assert "\n" not in str(caught.value)


def test_a_tree_of_other_paths(folder):
    with pytest.raises(InputError, match=r"array 'b/2' is in the tree alone"):
        pruning.load(folder, like={**PARAMS, "b": [*PARAMS["b"], X]})
    with pytest.raises(InputError, match=r"array 'b/1' is in the file alone"):
        pruning.load(folder, like={**PARAMS, "b": PARAMS["b"][:1]})


def test_a_grouping_that_would_never_be_unfolded(grouping):
    data = json.loads(grouping.to_json())
    data["axes"]["in/a"] = [{"sum": [1, 2]}] * 40 + ["in/a:1"]
    with pytest.raises(InputError, match=r"in/a would fall into 1099511627776 pieces; at most 100000 are read"):
        pruning.Grouping.from_json(json.dumps(data))


def test_copies_that_stand_beside_nothing(grouping):
    data = json.loads(grouping.to_json())
    data["groups"].append({"name": "in/a:0", "size": 3, "crossed": [], "copies": None})
    data["axes"]["in/a"][0] = "in/a:0"
    data["groups"][0]["copies"] = "in/a:0"
    with pytest.raises(InputError, match="b/0: group 'in/a:1' has no 'in/a:0' beside it"):
        pruning.Grouping.from_json(json.dumps(data))
