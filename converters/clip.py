"""A CLIP that somebody has in a folder, for FastSAM's text prompts: `transformers`' CLIPModel, which runs in PyTorch.

Nothing is downloaded, and nothing foreign is run: weights are read from safetensors alone. Images are prepared as by
CLIP's own code: the shorter side to the model's size (bicubic), the middle cut out, CLIP's mean and deviation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slimsam_jax import limits, safetensors_file
from slimsam_jax.cli.checks import as_path
from slimsam_jax.errors import InputError, printable
from slimsam_jax.files import read_json

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of openai/CLIP
BATCH = 32  # crops at a time
FILES = ("config.json", "model.safetensors")
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either; without, transformers makes up an empty one
# A description is foreign: what it asks for is allocated layer by layer. The largest CLIP has 48 layers, 577 patches.
LAYERS, PIXELS, PATCHES = limits.Range(1, 64, True), limits.Range(1, 1024, True), limits.Range(1, 4096, True)
MOST = 2**18  # of any whole number: the vocabulary has 49408


class Clip:
    """Compares images with texts. `slimsam_jax.inference.fast_sam_prompts.Clip` is what is asked of it.

    Args:
      model: `transformers.CLIPModel`.
      tokenizer: its `CLIPTokenizer`, or what is called as that.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model.eval(), tokenizer

    def similarity(self, images: Iterable[np.ndarray], text: str) -> np.ndarray:
        """Cosine [n] of the embeddings of images [h, w, 3] uint8 RGB and that of a text.

        Raises:
          InputError: the text has more tokens than the model reads.
        """
        import torch

        tokens = self.tokenizer([text], return_tensors="pt")
        most, length = self.model.config.text_config.max_position_embeddings, tokens["input_ids"].shape[1]
        if length > most:
            raise InputError(f"a text of {length} tokens is longer than this CLIP reads, {most}: use fewer words")
        side, found = self.model.config.vision_config.image_size, [np.zeros(0, np.float32)]
        images = iter(images)
        with torch.inference_mode():
            while batch := [prepared(image, side) for image in itertools.islice(images, BATCH)]:
                out = self.model(**tokens, pixel_values=torch.from_numpy(np.stack(batch)))  # embeddings of length 1
                found.append((out.image_embeds @ out.text_embeds[0]).float().numpy())
        return np.concatenate(found)


def prepared(image: np.ndarray, side: int) -> np.ndarray:
    """[h, w, 3] uint8 -> [3, side, side] float32, as CLIP's own preprocessing."""
    height, width = image.shape[:2]
    short = min(height, width)
    whole = (side * width // short, side * height // short)
    left, top = (round((length - side) / 2) for length in whole)
    # The middle is cut out before it is enlarged: the whole of a mask one pixel wide would take gigabytes. Across, then
    # down: in one call Pillow begins with either, at times with another than for the whole, and clips between the two.
    x0, x1 = (x * width / whole[0] for x in (left, left + side))
    y0, y1 = (y * height / whole[1] for y in (top, top + side))
    across = Image.fromarray(image).resize((side, height), Image.Resampling.BICUBIC, box=(x0, 0, x1, height))
    middle = across.resize((side, side), Image.Resampling.BICUBIC, box=(0, y0, side, y1))
    pixels = np.asarray(middle, np.float32) / 255
    return ((pixels - np.float32(MEAN)) / np.float32(DEVIATION)).transpose(2, 0, 1)


def load_clip(folder: Path | str) -> Clip:
    """Loads the CLIP that FastSAM's text prompts need, from a folder as `transformers` saves it; nothing is downloaded.

    Example:
      ```python
      import slimsam_jax

      clip = slimsam_jax.load_clip("clip-vit-base-patch32")
      predictor = slimsam_jax.FastSamPredictor(slimsam_jax.load("FastSAM-s.pt"), clip=clip)
      predictor.set_image("truck.jpg")
      masks, similarities, _ = predictor.text("the yellow truck")
      ```

    Raises:
      InputError: transformers or PyTorch is not installed (`pip install 'slimsam_jax[clip]'`), or the folder holds no
        whole CLIP.
    """
    folder = as_path(folder, "folder")
    check(folder)
    try:
        import torch  # noqa: F401
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    except ImportError:
        raise InputError("text prompts need transformers and PyTorch: pip install 'slimsam_jax[clip]'") from None
    how = {"local_files_only": True}
    try:
        config = CLIPConfig.from_pretrained(folder, **how)
        check_sizes(folder, config)
        tokenizer = CLIPTokenizer.from_pretrained(folder, **how)
        if (last := max(tokenizer.get_vocab().values())) >= (known := config.text_config.vocab_size):
            raise InputError(
                f"{printable(folder)} has another CLIP's tokenizer: token {last}, and its CLIP knows {known}"
            )
        kept = {"config": config, "use_safetensors": True, "output_loading_info": True}
        model, info = CLIPModel.from_pretrained(folder, **kept, **how)
    except InputError:
        raise
    except Exception as error:  # of whatever kind: it is what transformers says of a broken file
        raise InputError(f"{printable(folder)} is no CLIP that transformers reads: {printable(error, 200)}") from None
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{printable(folder)} lacks {len(missing)} arrays of its CLIP: {printable(missing[0])}, ...")
    return Clip(model, tokenizer)


def check(folder: Path) -> None:
    """Raises InputError unless a folder has the files of a CLIP; imports nothing heavy."""
    if not folder.is_dir():
        raise InputError(f"{printable(folder)} is no folder; --clip takes one that transformers has saved a CLIP in")
    if absent := [name for name in FILES if not (folder / name).is_file()]:
        raise InputError(f"{printable(folder)} holds no CLIP: there is no {absent[0]}")
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
        raise InputError(f"{printable(folder)} holds no tokenizer: no tokenizer.json, nor vocab.json and merges.txt")
    description = read_json(folder / FILES[0])
    if description.get("model_type") != "clip":
        raise InputError(f"{printable(folder)} holds no CLIP: its config.json does not say so")
    if (largest := _largest(description)) > MOST:
        raise InputError(
            f"{printable(folder)} holds no CLIP: {limits.quoted(largest)} in its config.json is above {MOST}"
        )


def check_sizes(folder: Path, config: Any) -> None:
    """Raises InputError unless a `CLIPConfig` asks for about as many numbers as are in the folder's file."""
    import torch
    from transformers import CLIPModel

    for part in ("text_config", "vision_config"):
        limits.check(f"{part}.num_hidden_layers", getattr(config, part).num_hidden_layers, LAYERS)
    image, patch = config.vision_config.image_size, config.vision_config.patch_size
    limits.check("vision_config.image_size", image, PIXELS)
    limits.check("vision_config.patch_size", patch, PIXELS)
    limits.check("the number of its patches", (image // patch) ** 2, PATCHES)
    with torch.device("meta"):  # allocates nothing
        needed = sum(array.numel() for array in CLIPModel(config).parameters())
    there = sum(array.size for array in safetensors_file.read(folder / FILES[1]).values())
    if needed > 2 * there:  # beyond what a few that are lacking, which are named later, can explain
        raise InputError(f"{printable(folder)} has {there} numbers, and the CLIP of its config.json has {needed}")


def _largest(content: Any) -> int:
    """The largest whole number in what JSON holds; 0 if there is none above it."""
    largest, rest = 0, [content]  # a list, for what is nested deeper than Python calls
    while rest:
        value = rest.pop()
        if isinstance(value, dict | list):
            rest.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, int):
            largest = max(largest, value)
    return largest
