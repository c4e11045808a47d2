"""Image grids and PNG files."""

import bisect
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from dmpo_jax import storage
from dmpo_jax.data.sources import decode_image
from dmpo_jax.errors import UserError


def image_grid(
    images: UInt8[np.ndarray, "N H W 3"],
    columns: int,
    *,
    labels: Sequence[str] | None = None,
    scale: int = 1,
) -> Image.Image:
    """Arranges images in rows of `columns`, first row first, on white.

    Args:
        images: N may leave the last row incomplete.
        columns: images per row.
        labels: a caption over each row, such as its prompt; wrapped to fit.
        scale: integer factor of enlargement, each pixel a square; for very small images.

    Raises:
        ValueError: the number of labels is not the number of rows.
    """
    count, height, width = images.shape[0], images.shape[1] * scale, images.shape[2] * scale
    rows = -(-count // columns)
    if labels is not None and len(labels) != rows:
        raise ValueError(f"labels must have {rows} texts, but got {len(labels)}")

    size = min(max(width // 16, 13), 28)  # pixels: legible, but small beside the images
    font, gap = ImageFont.load_default(size=size), max(size // 3, 4)
    line = size + gap
    full = columns * (width + gap) + gap
    captions = [_wrap(text, font, full - 2 * gap) for text in labels or [""] * rows]
    heights = [height + gap + (line * len(c) if labels else 0) for c in captions]
    sheet = Image.new("RGB", (full, gap + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, texts: list[str]) -> int:
        for text in texts:
            draw.text((x, y), text, fill="black", font=font)
            y += line
        return y

    y = gap
    for row, (caption, row_height) in enumerate(zip(captions, heights, strict=True)):
        below = write(gap, y, caption) if labels else y
        for column, image in enumerate(images[row * columns : (row + 1) * columns]):
            tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + column * (width + gap), below))
        y += row_height
    return sheet


def _wrap(text: str, font: Any, width: int, most: int = 3) -> list[str]:
    """Wraps text to lines of `width` pixels; cuts it off, with dots, after `most` lines."""
    lines = [""]
    # No letter that shows is narrower than a pixel; a caption may have a million.
    for word in text[: most * width].split():
        joined = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(joined) > width:
            lines.append(word)
        else:
            lines[-1] = joined
    cut = len(lines) > most
    return [_shorten(t, font, width, cut and i == most - 1) for i, t in enumerate(lines[:most])]


def _shorten(text: str, font: Any, width: int, dots: bool) -> str:
    """Returns the text, or as much of it as fits before three dots."""
    if not dots and font.getlength(text) <= width:
        return text
    ends = range(1, len(text) + 1)
    fits = bisect.bisect_right(ends, width, key=lambda end: font.getlength(text[:end] + "..."))
    return text[:fits] + "..."


def save_png(path: epath.PathLike, image: Image.Image, about: dict[str, Any] | None = None) -> None:
    """Writes a PNG atomically and creates its folder.

    Args:
        about: settings embedded in the file, as JSON under the text key "parameters".
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    if about is not None:
        info.add_text("parameters", json.dumps(about))
    content = io.BytesIO()
    image.save(content, "PNG", pnginfo=info)
    storage.write_bytes(path, content.getvalue())


def read_image(path: epath.PathLike) -> UInt8[np.ndarray, "H W 3"]:
    """Reads an image file as RGB pixels.

    Raises:
        UserError: it is missing, damaged or of an unknown kind; names the file.
    """
    try:
        return decode_image(epath.Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"image {path} cannot be read: {error}") from error
