"""Encoded images <-> arrays, with every way in which an image can be bad named."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 8192 * 8192
MAX_BYTES = 256 * 2**20  # of one encoded image
# No format that Pillow hands to another program (EPS) or that nobody keeps pairs in.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


class BadImageError(ValueError):
    """An image that cannot be used. reason: a few words, the same for every such image."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 3"]:
    """An encoded image -> RGB in [0, 255]; other modes are converted, alpha is dropped.

    Raises:
        BadImageError: if the bytes are no whole image of one of FORMATS, or it has more than
            max_pixels (so that a small file cannot fill the memory).
    """
    # Pillow raises whatever its format plugins do, OverflowError and SyntaxError among it.
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        pixels = image.width * image.height
        if 0 < pixels <= max_pixels:
            return np.array(_to_8_bits(image).convert("RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError("absurd size", f"{error}, over the limit of {max_pixels}") from error
    except Exception as error:
        # Pillow's words for what it does not know hold a memory address, another in every run.
        unknown = isinstance(error, UnidentifiedImageError)
        said = f"not one of {', '.join(FORMATS)}" if unknown else error
        raise BadImageError(
            "undecodable image", f"cannot decode an image of {len(data)} bytes: {said}"
        ) from error
    size = f"an image of {image.width} x {image.height} pixels"
    if not pixels:
        raise BadImageError("zero size", f"{size} shows nothing")
    raise BadImageError("absurd size", f"{size} is over the limit of {max_pixels}")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits as 8, which `convert` would cut off at 255 instead of scaling."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of mode {image.mode}; write 8 bits a channel")
    return image


def decode_mask(data: bytes, *, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W 1"]:
    """An encoded mask -> 1 where it is nearer to white than to black, else 0.

    Raises:
        BadImageError: as `decode_image`.
    """
    grey = Image.fromarray(decode_image(data, max_pixels=max_pixels)).convert("L")
    return (np.asarray(grey) >= 128).astype(np.uint8)[..., None]


def encode_image(image: UInt8[np.ndarray, "H W 3"], *, quality: int = 95) -> bytes:
    """The inverse of `decode_image`: a JPEG of full colour resolution."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
