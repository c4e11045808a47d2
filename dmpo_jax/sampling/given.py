"""Images and masks that prompts give to models that edit or inpaint."""

import io
import logging
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from dmpo_jax.data.prompt_files import Prompt
from dmpo_jax.errors import UserError
from dmpo_jax.families.family import Given
from dmpo_jax.sampling.images import read_image

LOG = logging.getLogger(__name__)
_COLUMN = {"source": "image", "mask": "mask"}  # field of RawPair -> field of Prompt


def check_given(prompts: Sequence[Prompt], given: Given | None) -> None:
    """Raises ValueError for the first prompt without a file that its model needs."""
    needed = [_COLUMN[field] for field in given.fields] if given else []
    for prompt in prompts:
        for part in needed:
            article = "an" if part == "image" else "a"
            if not getattr(prompt, part):
                raise UserError(
                    f"this model needs {article} {part} beside each prompt, but {prompt.text!r} "
                    f"has none: give a table or JSON of prompts with {' and '.join(needed)}"
                )
    if not needed and any(prompt.image or prompt.mask for prompt in prompts):
        LOG.warning("this model draws from text alone: the prompts' images are not looked at")


def read_source(path: epath.PathLike, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """Reads an image as pixels, resized to (height, width) like in diffusers."""
    resized = Image.fromarray(read_image(path)).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(resized)


def read_mask(path: epath.PathLike, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 1"]:
    """Reads a mask: 1 where the image is nearer to white, to be repainted; 0 elsewhere."""
    grey = np.asarray(Image.fromarray(read_source(path, size)).convert("L"))
    return (grey >= 128).astype(np.uint8)[..., None]


def given_columns(prompt: Prompt, size: tuple[int, int]) -> dict[str, bytes]:
    """Returns jpg_source and mask of a collected pair, as PNGs: what the model was shown."""
    columns = {}
    if prompt.image:
        columns["jpg_source"] = _to_png(read_source(prompt.image, size))
    if prompt.mask:
        columns["mask"] = _to_png(read_mask(prompt.mask, size).repeat(3, 2) * np.uint8(255))
    return columns


def _to_png(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    return content.getvalue()
