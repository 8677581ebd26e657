"""The options of a compression run, for the command line and for `slimsam_jax.compress`."""

from __future__ import annotations

import dataclasses
import numbers
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from slimsam_jax import limits
from slimsam_jax.cli.checks import check_seed, check_share
from slimsam_jax.compression.plan import as_recipe
from slimsam_jax.compression.recipes import RECIPES
from slimsam_jax.compression.set_option import change, settled
from slimsam_jax.compression.steps import Prune, Recipe, Step
from slimsam_jax.errors import InputError
from slimsam_jax.limits import Range, quoted
from slimsam_jax.progress import say
from slimsam_jax.training.folder_lock import check_run_folder
from slimsam_jax.training.options import DeviceOptions, ImageOptions, RunOptions

COUNTED = {
    "steps": Range(0, limits.STEPS, True),
    "batch": Range(1, limits.BATCH, True),
    "limit": Range(1, limits.COUNT, True),
    "importance_images": Range(1, limits.COUNT, True),
    "save_every": Range(1, limits.COUNT, True),
    "accumulate": Range(1, limits.BATCH, True),
    "fsdp": Range(1, limits.BATCH, True),
}


@dataclasses.dataclass(frozen=True)
class CutOptions:
    """What is compressed, how far, and by which recipe."""

    teacher: Path | None = None
    """The SAM or FastSAM to compress: a .pth in segment_anything layout (fused qkv, or q, k and v apart), a Hugging
    Face SamModel or Sam2Model folder, or a model folder of ours. Default: the small SAM in the package."""
    ratio: float | None = None
    """Share of the channels to remove, between 0 and 1. Default: 0.5, which leaves 35 % of the parameters of the small
    SAM's encoder and about 27 % of SAM-B's; 0.77 leaves 18 % and about 7 %. Most weights fall with the square
    of the channels, positions and the neck linearly."""
    budget: str | None = None
    """Instead of --ratio, what the slim SAM may cost: params=9.1M (the whole SAM's), macs=47G (the image encoder's,
    attention included) or latency=120ms (of the image encoder, one image, measured on this machine)."""
    recipe: Literal[
        "default", "taylor", "slimsam", "mobile_sam", "edge_sam", "tiny_sam", "efficient_sam", "integers"
    ] = "default"
    """"default" chooses a basis before it cuts, and distils once; "integers" quantises the result as well, and distils
    a little more (docs/quantization.md); "taylor" cuts whole channels by Disturbed Taylor
    importance and distils after each cut, without the reference's known bugs; "slimsam" does what the original code
    does. The others cut nothing: they distil into another encoder (--student), as MobileSAM, EdgeSAM, TinySAM and
    EfficientSAM do (docs/distillers.md)."""
    student: Path | None = None
    """What recipes that begin with another encoder distil into: a preset (vit_t, rep_vit_m1, efficient_sam_ti,
    efficient_sam_s, vit_b, vit_p50, vit_p77; of 0.8 M parameters tiny_vit_small, rep_vit_small, efficient_sam_small,
    vit_small), with random weights, or a model as --teacher takes it, to begin with its own. Default: the recipe's."""
    set: tuple[str, ...] = ()
    """Single choices that differ from the recipe's, as NAME=VALUE: prune.round_to=8, prune.criterion=fisher,
    distill.epochs=20, ... (docs/recipes.md lists all of them)."""
    uniform: bool = False
    """Prune every block alike, so that the result loads into stock segment_anything and transformers."""
    steps: int | None = None
    """Half of all optimizer steps: those of each of the paper's two distillations. A recipe that distils once, as the
    default, takes both halves at once. 0 prunes without distilling. Default: as many as 12 passes over the images take
    (distill.epochs; slimsam: 20, as the paper), in each distillation that a recipe has. The recipe integers takes 100
    more, whatever is given but 0 (distill.steps)."""
    importance_images: int = 100
    """Images that importance or statistics are estimated from, before each pruning: of 8 and more as many eights."""

    def channel_ratio(self) -> float | None:
        """Returns the share of channels to remove, or None if a budget says how much."""
        return 0.5 if self.ratio is None and self.budget is None else self.ratio


@dataclasses.dataclass(frozen=True)
class Options(DeviceOptions, RunOptions, ImageOptions, CutOptions):
    """Compress a Segment Anything Model with unlabelled images.

    The default recipe chooses a basis for each cut, prunes the embedding, then the channels within heads and MLPs,
    and distils once. The recipes taylor and slimsam distil after each of the two cuts,
    as SlimSAM does (Chen et al., NeurIPS 2024). Without arguments a small SAM and the photographs that ship with the
    package are used, and a slim model appears in ./slim within a minute or two on a CPU.

    The output folder holds model.safetensors, config.json (architecture and provenance), report.json with every
    number of the table printed at the end, log.jsonl and report.png.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # numbers of NumPy, as a sweep over seeds gives: JSON takes none
            if isinstance(value := getattr(self, field.name), numbers.Number) and hasattr(value, "item"):
                object.__setattr__(self, field.name, value.item())

    def check(self) -> None:
        """Raises InputError for what is wrong without looking at files."""
        if self.ratio is not None and self.budget is not None:
            raise InputError("--ratio and --budget both say how much to cut; give one of them")
        if self.ratio is not None:
            check_ratio(self.ratio)
        self._check_words()
        if self.cache_as != "float16" and self.cache is None:
            raise InputError("--cache-as says how --cache holds embeddings: give --cache FOLDER, too")
        limits.check_options(self, COUNTED)
        check_share(self.max_broken)
        check_seed(self.seed)
        settled(RECIPES[self.recipe], self.set)
        check_run_folder(self.out, self.resume)

    def _check_words(self) -> None:
        """Raises InputError for a choice that is none; the command line's parser has refused it before."""
        for name, hint in typing.get_type_hints(type(self)).items():
            words = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
            if words and getattr(self, name) not in words:
                raise InputError(f"--{name} {quoted(getattr(self, name))} is none of {', '.join(words)}")

    def fixing_the_result(self) -> dict[str, Any]:
        """Returns the options that a resumed run must share with the run it continues."""
        fields = dataclasses.asdict(self)
        for name in ("out", "resume", "save_every", "fsdp", "distributed", "attention", "max_broken", "strict"):
            del fields[name]
        fields |= {name: str(path) if (path := fields[name]) else None for name in ("teacher", "student")}
        fields["cache"] = self.cache is not None
        fields["ratio"] = self.channel_ratio()
        return fields | {name: [str(path) for path in fields[name]] for name in ("images", "val", "set")}


def check_ratio(ratio: Any) -> None:
    number = isinstance(ratio, numbers.Real)
    if not number or not 0 < ratio < 1:
        shown = f"{ratio:g}" if number else quoted(ratio)
        hint = f" (for {shown} % give {ratio / 100:g})" if number and 1 < ratio < 100 else ""
        raise InputError(f"--ratio {shown} is not the share of channels to remove: 0 < ratio < 1{hint}")


def with_choices(options: Options, recipe: Sequence[Step] | None) -> tuple[Options, Recipe | None]:
    """A recipe that the options do not name, changed by their choices, and the options without these.

    Raises:
      InputError: it is none, or has no such choice.
    """
    if recipe is None:
        return options, None
    changed = change(as_recipe(recipe), options.set)
    return dataclasses.replace(options, recipe="default", set=()), changed


def announce(options: Options, recipe: Recipe | None = None) -> None:
    """Says what will be done before JAX is there, which takes seconds to come; `prepare.announce` goes on."""
    images = ", ".join(map(str, options.images)) or "the photographs in the package"
    val = ", ".join(map(str, options.val)) or "an eighth of them, held out"
    how_much = f"budget {options.budget}" if options.budget else f"{100 * options.channel_ratio():g} % of the channels"
    steps = settled(RECIPES[options.recipe], options.set) if recipe is None else recipe
    own = [step.ratio for step in steps if isinstance(step, Prune)]
    how_much = how_much if None in own else "what its steps say" if own else "nothing"
    named = f"{options.recipe}{''.join(f' {choice}' for choice in options.set)}"
    say("teacher", str(options.teacher or "the small SAM in the package"))
    say("images", f"{images}; to measure on: {val}")
    say("recipe", f"{named if recipe is None else f'{len(recipe)} steps of your own'}, to cut: {how_much}")
    say("to", f"{options.out}/{' (resumed)' if options.resume else ''}")
