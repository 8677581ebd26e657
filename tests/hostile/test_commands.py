"""Command lines that ask for nonsense: one clear line, before anything is compiled, allocated or written."""

from __future__ import annotations

import functools
import importlib
import re
import resource
import sys
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import SQUARE, random_sam
from helpers.programs import program
from slimsam_jax import cli, limits
from slimsam_jax.compression.old_names import GONE, RENAMED
from slimsam_jax.compression.plan import describe, optimizer_steps
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.set_option import FIELDS, change
from slimsam_jax.errors import InputError

BIG, HUGE, DIGITS, LONG = str(10**12), str(10**400), "9" * 5000, "x" * 5000
EVIL = "a\x1b[31mb\nc\u202e"
# What `compress` says at once, before it has looked at files; the error stands alone on the other stream.
ANNOUNCED = r"(( +(teacher|images|recipe|to)  [^\n]+\n){4})?"
COMMANDS = {
    "compress": ("slimsam_jax.compress", ("Options", "compress_with"), "--teacher {m}/teacher --images {m}/images"),
    "evaluate": ("slimsam_jax.evaluate", ("main",), "--model {m}/teacher --data {m}/val"),
    "predict": ("slimsam_jax.predict", ("main",), "--model {m}/teacher --image {m}/val/0.png --out m.png"),
    "everything": (
        "slimsam_jax.everything",
        ("Options", "everything"),
        "--model {m}/teacher --images {m}/val --out e.json",
    ),
    "inspect": ("slimsam_jax.inspect", ("main",), "{m}/teacher --images {m}/images --out i.png"),
    "demo": ("slimsam_jax.demo.__main__", ("main",), "--port 0 --cache none"),
    "data": ("slimsam_jax.data.__main__", ("check", "prepare"), ""),
    "to_torch": ("converters.to_torch", ("main",), "{m}/teacher"),
    "from_torch": ("converters.from_torch", ("main",), "{m}/teacher"),
    "to_onnx": ("converters.to_onnx", ("main",), "{m}/teacher"),
    "train": ("experiments.train_reference", ("Options", "main"), "--images {m}/val --val {m}/val --out tr"),
}
# Of each command, lists of arguments (one string is split at spaces), which come behind those above.
HOSTILE = {
    "compress": [
        *(
            ["--set", choice]
            for choice in (
                *("rounds=1e9", "rounds=nan", "rounds=-1", "probes=1000000000", "multiple=1000000000000", "rounds="),
                *("passes=1000000000000", "validations=1000000000000", "points=1000000000", f"points={DIGITS}"),
                *(
                    "noise_std=nan",
                    "noise_std=1e308",
                    "noise_std=1e-320",
                    "pace=inf",
                    "pace=1e300",
                    "weight_decay=1e30",
                ),
                *(
                    "learning_rate=nan",
                    "learning_rate=1e300",
                    "clip=inf",
                    "ema=nan",
                    "crop=nan",
                    "crop=1e-320",
                    "=",
                    EVIL,
                ),
                *("least=nan", "polish=nan", "align=2", "cosine=1e300", "masks=inf", "criterion=", "rounds", LONG),
                *("tie_embedding=1", "flip=maybe", "__class__=1", "pruning=1", "ﬁelds=2"),
            )
        ),
        "--set rounds=1000000000 alternate=true",
        "--set rounds=2 rounds=3 alternate=true",
        *(f"--steps {value}" for value in (BIG, HUGE, DIGITS, "-1", "1e3", "nan")),
        *(f"--batch {value}" for value in (BIG, HUGE, "60000", "0", "-4", "4.5")),
        *(f"--accumulate {value}" for value in (BIG, "1000", "0")),
        *(f"--{name} {HUGE}" for name in ("limit", "importance-images", "save-every", "fsdp", "seed")),
        *("--seed -1", "--seed 1 --seed 2", "--max_broken 0.1 --max-broken 0.2", "--max-broken nan", "--max-broken 2"),
        *(f"--ratio {value}" for value in ("nan", "inf", "1", "0", "-0.5", "abc")),
        *(["--budget", value] for value in ("params=nan", "params=1e999M", "params=0", "macs=9" * 2000, EVIL, "x=1")),
        *(
            "--recipe nope",
            "--dtype float8",
            "--attention x",
            "--nonsense 3",
            "--rato 0.5",
            "--steps",
            "--images",
            "-x",
        ),
        *(f"--distributed {value}" for value in ("x", "a:b,c,d", "h:1,2,2", "h:1,99999999999999999999,0", "h:0,1,0")),
        *(f"--distributed {value}" for value in ("127.0.0.1:70000,2,0", "127.0.0.1:port,1,0", "a b:1,2,0", ":1,1,0")),
        *([name, ""] for name in ("--images", "--teacher", "--val", "--out", "--cache", "--budget", "--distributed")),
        *("--images=", "--out=", "--resume", "--resume --out {m}/teacher", "--out {m}/teacher", "--out {m}/val/0.png"),
        *(["--out", value] for value in (LONG, "a/" * 3000 + "b")),
        *("--images nowhere", "--images tfds:nowhere", "--teacher nowhere", "--teacher {m}/images", "--val nowhere"),
    ],
    "evaluate": [
        *(f"--clicks {value}" for value in (BIG, HUGE, "0", "1000000")),
        *(f"--points-per-side {value}" for value in ("1000000", HUGE, "0")),
        *(f"--resamples {value}" for value in (BIG, HUGE, "0")),
        *("--seed -1", "--max-broken nan", "--protocol x", "--protocol", "--protocol agreement", "--boxes nowhere"),
        *([name, ""] for name in ("--boxes", "--json", "--markdown", "--figure", "--data")),
        *(
            "--json {m}/val",
            "--json o.x --markdown o.x",
            "--json /dev/null",
            ["--json", LONG],
            "--json {m}/val/0.png/x",
        ),
    ],
    "predict": [
        "",
        *(
            ["--point", value]
            for value in ("nan,1", "inf,1", "1e400,1", "1", "1,2,3", "a,b", "-1,2", "31,2", ",", EVIL)
        ),
        *(
            ["--point", value]
            for value in ("1,2" * 5000, "١,٢", "1_0,1_0", "0x10,1", "1e9,1e9", "", "1,1;2,2", "1\x1f,2", "1\n,2")
        ),
        *(["--background", value] for value in ("nan,nan", "-5,5")),
        *(
            ["--box", value]
            for value in ("nan,0,1,1", "9,9,1,1", "1,1,1,1", "0,0,inf,inf", "1,2,3", "-9,-9,900,900", EVIL)
        ),
        ["--point", *["1,1"] * 2000],
        *(["--point", "3,3", "--out", value] for value in ("", "m.gif", "{m}/val", LONG + ".png", "{m}/val/0.png")),
        *(["--point", "3,3", "--image", value] for value in ("", "nowhere", "{m}/val", "{m}/val/0.json")),
        *(["--point", "3,3", "--model", value] for value in ("", "nowhere", "{m}/val")),
    ],
    "everything": [
        *(f"--points-per-side {value}" for value in ("1000000", "0", "-1", HUGE, "1.5")),
        *(f"--points-per-batch {value}" for value in (BIG, "0")),
        *(
            f"--{name}-thresh {value}"
            for name in ("pred-iou", "stability-score", "box-nms")
            for value in ("nan", "inf")
        ),
        *("--stability-score-thresh 2", "--stability-score-thresh -3", "--box-nms-thresh -1", "--box-nms-thresh 7"),
        *(f"--crop-n-layers {value}" for value in ("30", BIG, "-1", "12")),
        *("--crop-n-points-downscale-factor 0", f"--crop-n-points-downscale-factor {HUGE} --crop-n-layers 1"),
        *("--min-mask-region-area -1", f"--min-mask-region-area {HUGE}", "--covered-thresh 1"),
        *("--hierarchical --covered-thresh nan", "--hierarchical --points-per-side 1000000", "--sheet e.json"),
        *([name, ""] for name in ("--sheet", "--images", "--out", "--model")),
    ],
    "inspect": [
        *("--ratio nan", "--ratio 2", "--ratio 0", "--ratios nan", "--ratios 0.5 inf", "--ratios", f"--seed {BIG}"),
        *(f"--importance-images {value}" for value in (HUGE, "0")),
        *("--ratios " + " ".join(f"0.{i}" for i in range(1000, 1400)), "--set prune.ratio=1e9", "--recipe x", "extra"),
        *(["--images", value] for value in ("", "nowhere")),
    ],
    "demo": [
        *(
            "",
            "--threads 0",
            f"--threads {BIG}",
            "--threads -1",
            "--dtype x",
            "--against",
            "--port 1e3",
            "--cache /dev/null",
        ),
        *([name, ""] for name in ("--cache", "--model", "--against", "--port")),
    ],
    "data": [
        *(
            "",
            "chekc",
            "check",
            "prepare",
            "check nowhere",
            "check tfds:nowhere",
            "check {m}/teacher",
            "prepare {m}/val",
        ),
        *(["check", value] for value in ("", EVIL)),
        *(["check", "{m}/val", "--sheet", value] for value in ("", "{m}/val", LONG, "/dev/null")),
        *(["prepare", "{m}/val", "--out", value] for value in ("", "{m}/val", LONG)),
    ],
    "to_torch": ["", *(f"x.pth {rest}" for rest in ("--format zip", "extra")), [""], ["{m}/val"]],
    "from_torch": ["", "ft extra", [""], ["{m}/val"], [LONG]],
    "to_onnx": [
        *("", "tx --dtype", "tx --dtype int4", "tx --dtype int8 int8", "tx --layout x", "tx --image nowhere"),
        *("tx --layout transformers_js --return-single-mask", ["tx", "--image", ""], [LONG], "{m}/val"),
    ],
    "train": [
        *(f"--{name} {BIG}" for name in ("steps", "prompts", "corrections", "validations", "val-images", "embed-dim")),
        *(f"--{name} {BIG}" for name in ("batch", "depth", "heads", "mlp-dim", "image-size", "window", "accumulate")),
        *(
            f"--{name} 0"
            for name in ("steps", "batch", "prompts", "embed-dim", "depth", "heads", "learning-rate", "crop")
        ),
        *("--embed-dim 8160 --depth 128", "--embed-dim 7", "--heads 5", "--image-size 17", "--batch 60000", "--ema 1"),
        *(f"--{name} nan" for name in ("learning-rate", "weight-decay", "clip", "ema", "crop", "max-broken")),
        *("--learning-rate 1e30", "--weight-decay 1e30", "--crop 1e-320", "--corrections -1", "--freeze x", "--resume"),
        *(
            "--init nowhere",
            "--decoder nowhere",
            "--init {m}/teacher --preset small",
            "--objective x",
            "--distributed x",
        ),
        *(["--images", value] for value in ("", "nowhere", "{m}/images")),
    ],
}
LINES = [(name, given) for name, all_ in HOSTILE.items() for given in all_]


@pytest.fixture(scope="module")
def imported():
    """What commands import once they have looked at their options: not part of what a refusal takes."""
    for name in (
        "slimsam_jax.compression.pipeline",
        "slimsam_jax.evaluation.figures",
        "slimsam_jax.compression.analysis",
        "experiments.reference_run",
    ):
        importlib.import_module(name)
    for module, *_ in COMMANDS.values():
        importlib.import_module(module)
    random_sam(SQUARE)  # traces it
    with pytest.raises(InputError):
        change(RECIPES["default"], ["nothing=1"])  # builds the tables of names and types


def words(name: str, given: str | list[str], root) -> list[str]:
    """Arguments of a command; an option that is given takes the place of the usual one."""
    changed = [part.replace("{m}", str(root)) for part in (given.split() if isinstance(given, str) else given)]
    usual = [part.replace("{m}", str(root)) for part in COMMANDS[name][2].split()]
    kept = []
    while usual:
        count = 2 if usual[0].startswith("--") else 1
        if usual[0] not in [part.partition("=")[0] for part in changed]:
            kept += usual[:count]
        usual = usual[count:]
    return kept + changed


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(("name", "given"), LINES, ids=lambda value: str(value)[:50].encode("unicode_escape").decode())
def test_a_hostile_command_line_is_refused_in_one_line(imported, material, tmp_path, monkeypatch, capsys, name, given):
    module, functions, _ = COMMANDS[name]
    found = [getattr(importlib.import_module(module), function) for function in functions]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *words(name, given, material)])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(SystemExit) as stop:
        cli.run(*([dict(zip(functions, found, strict=True))] if name == "data" else found))
    seconds, grown = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and re.fullmatch(ANNOUNCED if name == "compress" else "", out), out
    assert error.startswith("error: ") and error.count("\n") == 1 and error[:-1].isprintable()
    assert len(error) < 1000 and seconds < 1 and grown < 500_000  # of processor time, on a machine that is busy
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "given", "part"),
    [
        ("everything", "--model nowhere --crop-n-layers 30", "--crop-n-layers 30 must be a number from 0 to 5"),
        ("evaluate", "--model nowhere --points-per-side 1000000", "--points-per-side 1000000 must be"),
        ("compress", f"--teacher nowhere --steps {BIG}", f"--steps {BIG} must be"),
        ("train", "--embed-dim 8160 --depth 128", "G parameters, too many to train"),
        ("predict", "--point 3,3 --out {m}/val/0.png", "would replace --image"),
        ("everything", "--out {m}/val/1.json", "val/1.json would replace a file of --images "),
        ("evaluate", "--json {m}/val/1.json", "val/1.json would replace a file of --data "),
    ],
)
def test_numbers_are_looked_at_before_models(imported, material, tmp_path, monkeypatch, capsys, name, given, part):
    found = [getattr(importlib.import_module(COMMANDS[name][0]), function) for function in COMMANDS[name][1]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *words(name, given, material)])
    with pytest.raises(SystemExit):
        cli.run(*found)
    assert part in capsys.readouterr().err


def test_there_are_as_many_as_were_asked_for():
    assert len(LINES) >= 115


CHOICES = [*FIELDS, *RENAMED, *GONE]
TEXTS = st.one_of(st.floats().map(str), st.integers().map(str), st.text(max_size=8), st.sampled_from(["true", "false"]))


@settings(max_examples=300, deadline=None)
@given(
    recipe=st.sampled_from(sorted(RECIPES)),
    changes=st.lists(st.tuples(st.sampled_from(CHOICES) | st.text(max_size=5), TEXTS).map("=".join), max_size=3),
    steps=st.integers(0, 10**30),
)
def test_any_choices_are_refused_or_make_a_plan_that_can_be_held(recipe, changes, steps):
    try:
        changed = change(RECIPES[recipe], changes)
        counts = optimizer_steps(changed, 10_000, 4, steps)
    except InputError as error:
        assert str(error).isprintable()
        return
    assert max(counts) <= 2 * limits.STEPS and steps <= limits.STEPS
    numbers = [leaf for leaf in jax.tree.leaves(describe(changed)) if isinstance(leaf, float)]
    assert np.isfinite(np.fromiter(numbers, np.float32)).all()


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20) | st.lists(st.floats() | st.integers(), max_size=4).map(lambda v: ",".join(map(str, v))))
def test_any_coordinates_are_refused_or_two_finite_numbers(text):
    try:
        x, y = program("predict").parse_numbers(text, "X,Y")
    except InputError:
        return
    assert np.isfinite([x, y]).all() and text.isascii() and (x, y) == tuple(map(float, text.split(",")))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["--images", "--images=", "--images=a", "--strict", "a", "", " ", "--", "-x"]), max_size=5)
)
def test_an_empty_value_is_never_the_folder_we_are_in(argv):
    def command(images: tuple[str, ...] = (), strict: bool = False) -> None: ...

    refused = "" in argv or " " in argv or "--images=" in argv
    refused |= any(b.startswith("--") for a, b in zip(argv, [*argv[1:], "--"], strict=False) if a == "--images")
    try:
        cli.check_values(argv, command)
    except InputError:
        assert refused
    else:
        assert not refused


def test_a_postponed_command_is_called_once_it_is_parsed(monkeypatch, capsys):
    """What it prints to standard error is its own, and not the parser's."""

    @functools.wraps(program("predict").main)
    def main(*arguments, **named):
        print(named["point"], file=sys.stderr)

    monkeypatch.setattr(sys, "argv", ["predict", "--model", "m", "--image", "i", "--out", "o", "--point", "1,2"])
    cli.run(main)
    assert capsys.readouterr().err == "('1,2',)\n"
