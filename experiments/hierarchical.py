"""Ways to ask fewer points in everything mode, against the flat grid: what they keep of its masks, and what they save.

    python -m experiments.hierarchical run --teacher slimsam_jax/assets/sam_small_v2 --images photos bsds_val
    python -m experiments.hierarchical table

Every tenth image of each source from the sixth on (all of one with fewer than ten), at most 512 pixels wide and high.
Of each, one after the other: the flat grid of 32 x 32 points, then each way. Time is the CPU's, the encoder's included,
compilation not.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from converters.from_torch import load
from experiments import results
from experiments.bench.everything import FIELDS, Masks, encoded, partners
from slimsam_jax import cli, data
from slimsam_jax.imaging.prompts import clicks_at
from slimsam_jax.inference import amg
from slimsam_jax.inference.automatic_mask_generator import SamAutomaticMaskGenerator
from slimsam_jax.inference.candidates import enlarge
from slimsam_jax.inference.decode import decode_prompts
from slimsam_jax.inference.predictor import encode_images
from slimsam_jax.models.sam import Sam

FILE = results.FOLDER / "hierarchical.jsonl"
IMAGE = "picture"  # the key that results have had from the beginning
SIZE = 512


@dataclasses.dataclass(frozen=True)
class Way(SamAutomaticMaskGenerator):
    """Counts the points that it asks."""

    asked: list[int] = dataclasses.field(default_factory=list)

    def _decode(self, encoded: Any, points: np.ndarray) -> Any:
        self.asked.append(len(points))
        return super()._decode(encoded, points)


WAYS: dict[str, dict[str, float]] = {
    "not around the best masks (default)": {},
    **{f"covered by logits over {t} (TinySAM's way)": {"covered_thresh": t} for t in (8.5, 6.0, 4.0, 0.0)},
}


def run(teacher: Path, images: tuple[Path, ...]) -> None:
    """Measure what is not measured yet.

    Args:
      teacher: a SAM, called by the name of its file or folder.
      images: folders of photographs.
    """
    results.check_committed()
    sam, sources = load(teacher), [data.find([source]) for source in images]
    samples = [sample for source in sources for sample in (source[5::10] if len(source) >= 10 else source)]
    warm(sam, samples[0].image())
    for sample in samples:
        image = sample.image()
        image.thumbnail((SIZE, SIZE))
        key = {"teacher": teacher.stem, IMAGE: Path(sample.name).name}
        missing = [way for way in WAYS if not results.find(FILE, {**key, "way": way})]
        flat = measure(Way(sam, **FIELDS), image) if missing else None
        for way in missing:
            fewer = measure(Way(sam, hierarchical=True, **FIELDS, **WAYS[way]), image)
            entry = {**key, "way": way, **compare(flat, fewer)}
            results.append(FILE, entry)
            print(entry, flush=True)


def warm(sam: Sam, image: Image.Image) -> None:
    """Compiles every bucket."""
    image.thumbnail((SIZE, SIZE))
    (embedded,) = encode_images(sam, [image])
    low, _ = decode_prompts(sam, embedded, clicks_at(amg.build_point_grid(5)[:21] * SIZE))  # 16, 4 and 1
    enlarge(sam, embedded, low[:, 0])


def measure(generator: Way, image: Image.Image) -> dict[str, Any]:
    start = time.process_time()
    records = generator.generate(image)
    seconds = time.process_time() - start
    return {"masks": encoded([records])[0], "seconds": seconds, "prompts": sum(generator.asked)}


def compare(flat: dict[str, Any], fewer: dict[str, Any]) -> dict[str, Any]:
    """Counts masks on both sides and of those with a partner; prompts and seconds on both sides."""
    masks: list[Masks] = [flat["masks"], fewer["masks"]]
    numbers = {
        "flat_masks": len(masks[0]),
        "kept": int(partners(*masks).sum()),
        "masks": len(masks[1]),
        "known": int(partners(*masks[::-1]).sum()),
    }
    costs = {
        f"{prefix}{name}": side[name]
        for name in ("prompts", "seconds")
        for prefix, side in (("flat_", flat), ("", fewer))
    }
    return numbers | costs


def table() -> None:
    """Write experiments/tables/hierarchical.md, of each teacher's images that all ways are measured on."""
    lines = ["| teacher, images | points left out | of flat's masks kept | masks flat has not | prompts | time |"]
    lines.append("|---" * 6 + "|")
    for teacher in dict.fromkeys(entry["teacher"] for entry in results.read(FILE)):
        lines += lines_of(teacher)
    title, command = "Fewer points in everything mode", "python -m experiments.hierarchical table"
    results.write_table("hierarchical", title, lines, command, "../everything.md")


def lines_of(teacher: str) -> list[str]:
    """A line for each way; none before an image is measured in all of them."""
    of_way = {way: results.find(FILE, {"teacher": teacher, "way": way}) for way in WAYS}
    common = set.intersection(*({entry[IMAGE] for entry in entries} for entries in of_way.values()))
    lines = []
    for way, entries in of_way.items() if common else ():
        total = lambda name, entries=entries: sum(entry[name] for entry in entries if entry[IMAGE] in common)
        kept = f"{total('kept') / total('flat_masks'):.1%} of {total('flat_masks')}"
        prompts, seconds = (total(name) / total(f"flat_{name}") for name in ("prompts", "seconds"))
        cells = [f"{results.called(teacher)}, {len(common)}", way, kept, str(total("masks") - total("known"))]
        lines.append(f"| {' | '.join([*cells, f'{prompts:.3f}', f'{seconds:.2f}'])} |")
    return lines


if __name__ == "__main__":
    cli.run({"run": run, "table": table})
