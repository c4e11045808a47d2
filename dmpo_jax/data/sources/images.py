"""Encodes and decodes images; every kind of bad image has a named reason."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from dmpo_jax.data.sources.rows import MAX_PIXELS, MAX_RATIO

# Excludes formats that Pillow passes to another program (EPS), and those unused for pairs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class BadImageError(ValueError):
    """An unusable image. reason: a few words, the same for every image of that kind."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes an image to RGB in [0, 255]; other modes are converted, alpha is dropped.

    Raises:
        BadImageError: the bytes are not a complete image of one of FORMATS, or it has no pixels,
            more than max_pixels, or sides of a ratio above MAX_RATIO (so that a small file cannot
            fill the memory, when it is decoded or when its shorter side is enlarged).
    """
    # Pillow raises any error of its format plugins, OverflowError and SyntaxError included.
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        pixels = image.width * image.height
        thin = max(image.size) > MAX_RATIO * min(image.size)
        if 0 < pixels <= max_pixels and not thin:
            return np.array(_to_8_bits(image).convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError("absurd size", f"{error}, over the limit of {max_pixels}") from error
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's message for an unknown format holds a memory address, different in every run.
        unknown = isinstance(error, UnidentifiedImageError)
        said = f"not one of {', '.join(FORMATS)}" if unknown else error
        raise BadImageError(
            "undecodable image", f"cannot decode an image of {len(data)} bytes: {said}"
        ) from error
    size = f"an image of {image.width} x {image.height} pixels"
    if not pixels:
        raise BadImageError("zero size", f"{size} shows nothing")
    if pixels <= max_pixels:
        raise BadImageError("absurd shape", f"{size} has sides of a ratio above {MAX_RATIO}")
    raise BadImageError("absurd size", f"{size} is over the limit of {max_pixels}")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit greys to 8 bits; `convert` would clip them at 255 instead."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode}; write 8 bits a channel")
    return image


def decode_mask(data: bytes, *, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 1"]:
    """Decodes a mask to 1 where it is nearer to white than to black, else 0.

    Raises:
        BadImageError: as `decode_image`.
    """
    grey = Image.fromarray(decode_image(data, max_pixels=max_pixels)).convert("L")
    return (np.asarray(grey) >= 128).astype(np.uint8)[..., None]


def encode_image(image: UInt8[np.ndarray, "H W 3"], *, quality: int = 95) -> bytes:
    """Encodes an image as a JPEG of full colour resolution, for `decode_image`."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
