"""The command `slimsam`: one name for all programs, `slimsam compress ...` for `python -m slimsam_jax.compress ...`.

Neither JAX nor numpy nor the parser of options is imported before the program is known.
"""

from __future__ import annotations

import sys

import slimsam_jax

PROGRAMS = {  # subcommand: module, what it does
    "compress": ("slimsam_jax.compress", "a SAM and a folder of images in, a slim SAM out"),
    "evaluate": ("slimsam_jax.evaluate", "measure models on annotated images"),
    "predict": ("slimsam_jax.predict", "segment one object of an image"),
    "everything": ("slimsam_jax.everything", "find all masks of many images"),
    "inspect": ("slimsam_jax.inspect", "show a model's blocks, and what pruning would do to them"),
    "calibrate": ("slimsam_jax.calibrate", "choose a model's thresholds of everything mode"),
    "quantize": ("slimsam_jax.quantize", "put integers in the place of a model's weights"),
    "plan": ("slimsam_jax.plan", "what a compression needs on hardware that is not here"),
    "demo": ("slimsam_jax.demo", "click on images in the browser, models side by side"),
    "data": ("slimsam_jax.data", "check or convert a data set"),
    "from-torch": ("converters.from_torch", "convert a PyTorch or Hugging Face checkpoint into a model folder"),
    "to-torch": ("converters.to_torch", "convert a model folder for PyTorch or Hugging Face"),
    "to-onnx": ("converters.to_onnx", "convert a model into ONNX files"),
}


def main() -> None:
    """Runs the program that the command line names. Exit codes: see `cli.run`."""
    name, *arguments = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"slimsam_jax {slimsam_jax.__version__}")
    elif name in PROGRAMS:
        run(name, arguments)
    else:
        refuse(name)


def usage() -> str:
    """What `slimsam --help` prints."""
    width = max(map(len, PROGRAMS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in PROGRAMS.items()]
    return "\n".join(
        [
            "usage: slimsam PROGRAM [OPTIONS]",
            "",
            "Slim Segment Anything models: prune a SAM, distil it, measure it, use it.",
            "",
            "programs:",
            *lines,
            "",
            "`slimsam PROGRAM --help` lists the options of a program, `slimsam --version` prints the version.",
        ]
    )


def run(name: str, arguments: list[str]) -> None:
    """One of `PROGRAMS`, as `python -m` runs it, under its name here."""
    import runpy

    from slimsam_jax import cli

    cli.program = f"slimsam {name}"
    sys.argv = [sys.argv[0], *arguments]
    runpy.run_module(PROGRAMS[name][0], run_name="__main__", alter_sys=True)


def refuse(name: str) -> None:
    """Ends with exit code 2 and a line that says which programs there are."""
    import difflib

    from slimsam_jax import cli

    if not name:
        cli.fail(f"name a program, one of {', '.join(PROGRAMS)}; slimsam --help says what each does", 2)
    nearest = difflib.get_close_matches(name.replace("_", "-"), PROGRAMS, n=1)
    hint = f"; perhaps {nearest[0]}" if nearest else ""
    cli.fail(f"{cli.printable(name, 60)!r} is no program of slimsam{hint}; --help lists what there is", 2)


if __name__ == "__main__":
    main()
