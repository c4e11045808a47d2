"""Images of a raw pair at the model's resolution: resized and cropped, with SDXL's sizes."""

import hashlib
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from dmpo_jax.data.sources.bad_records import decode
from dmpo_jax.data.sources.rows import RawPair, SkipError, Skipped, guard

Place = tuple[float, float]  # of a crop: top and left as a share of the range possible; [0, 1)


class Pixels(NamedTuple):
    """A raw pair at the model's resolution R; source and mask only if its family requires them."""

    id: str
    prompt: str
    preference: float
    images: UInt8[np.ndarray, "2 R R 3"]
    sizes: Int[np.ndarray, "2 6"]
    source: UInt8[np.ndarray, "R R 3"] | None
    mask: UInt8[np.ndarray, "R R 1"] | None  # 1 where to repaint


def load_pixels(
    pair: RawPair, given: Collection[str], resolution: int, crop: str = "center"
) -> Pixels | Skipped:
    """Decodes, resizes and crops the images that a family requires of a pair: two, and `given`.

    All images of a pair are cropped at the same place, so that source and mask stay aligned with
    the images made from them. Returns Skipped, with the reason, for a bad pair or a mask of
    another aspect ratio than its source.
    """
    return guard(pair.id, lambda: _load_pixels(pair, given, resolution, crop), timed=True)


def _load_pixels(pair: RawPair, given: Collection[str], resolution: int, crop: str) -> Pixels:
    decoded: Any = decode(pair, frozenset(given))
    place = None if crop == "center" else draw_place(pair.id)
    ready = [prepare(image, resolution, place=place) for image in decoded.images]
    images, sizes = (np.stack(x) for x in zip(*ready, strict=True))
    source = mask = None
    if "source" in given:
        source, of_source = prepare(decoded.source, resolution, place=place)
        if "mask" in given:
            nearest = Image.Resampling.NEAREST
            mask, of_mask = prepare(decoded.mask, resolution, nearest, place=place)
            if of_mask[2:] != of_source[2:]:  # another aspect ratio is cropped elsewhere
                raise SkipError(
                    "mask's shape",
                    f"the mask should have its source's shape, {of_source[:2]}, or one of the "
                    f"same ratio, but got {of_mask[:2]}",
                )
    sizes = sizes.astype(np.int32)
    return Pixels(pair.id, pair.prompt, pair.preference, images, sizes, source, mask)


def draw_place(name: str) -> Place:
    """Returns a random place for a crop, a function of the pair's id alone."""
    digest = hashlib.sha256(b"crop " + name.encode()).digest()
    top, left = (int.from_bytes(digest[i : i + 4]) / 2**32 for i in (0, 4))
    return top, left


def prepare(
    image: UInt8[np.ndarray, "H W C"],
    resolution: int,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
    *,
    place: Place | None = None,
) -> tuple[UInt8[np.ndarray, "R R C"], tuple[int, int, int, int, int, int]]:
    """Returns the image at `[R, R]`, and SDXL's six sizes in pixels; C is 3 or 1.

    The shorter side is resized to R, then the image is cropped at `place`, by default the centre.
    The sizes hold the original height and width, the crop's top and left after resizing, and R
    twice.
    """
    height, width = image.shape[:2]
    scale = resolution / min(height, width)
    h, w = max(round(height * scale), resolution), max(round(width * scale), resolution)
    if (h, w) != (height, width):
        # Pillow takes no channel axis of 1.
        resized = Image.fromarray(np.squeeze(image, 2) if image.shape[2] == 1 else image)
        image = np.asarray(resized.resize((w, h), resampling)).reshape(h, w, -1)
    rest = (h - resolution, w - resolution)
    if place is None:
        top, left = (n // 2 for n in rest)
    else:
        top, left = (int(share * (n + 1)) for share, n in zip(place, rest, strict=True))
    image = image[top : top + resolution, left : left + resolution]
    return image, (height, width, top, left, resolution, resolution)
