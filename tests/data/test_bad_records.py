"""Bad records are named, counted and skipped up to a share."""

import io
import json
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dmpo_jax.data import sources
from dmpo_jax.data.sources.bad_records import (
    HANDFUL,
    MAX_LOGGED,
    Decoded,
    Tally,
    TooManyBadError,
    decode_pair,
)
from tests.support.raw_pairs import image


def pair(**changes):
    given = {"id": "x:0", "prompt": "a", "images": (image(0), image(1)), "preference": 1.0}
    return sources.RawPair(**{**given, **changes})


def png_header(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT\x35\xaf\x06\x1e"


def other_file_of_the_same_pixels():
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image(0))).save(buffer, "BMP")
    return buffer.getvalue()


def test_a_good_pair_is_decoded():
    decoded = decode_pair(pair(source=image(2), mask=image(3)), frozenset())
    assert isinstance(decoded, Decoded)
    for i, array in enumerate(decoded.images):
        np.testing.assert_array_equal(array, np.array(Image.open(io.BytesIO(image(i)))))
    assert (decoded.source, decoded.mask) == (None, None)
    needs = frozenset({"source", "mask"})
    decoded = decode_pair(pair(source=image(2), mask=image(3, size=(4, 4))), needs)
    assert decoded.source.shape == (6, 8, 3)
    assert decoded.mask.shape == (4, 4, 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"preference": 1.5}, "bad label"),
        ({"preference": -0.1}, "bad label"),
        ({"preference": float("nan")}, "bad label"),
        ({"images": (b"", image(1))}, "no image"),
        ({"images": (image(0), b"no image")}, "undecodable image"),
        ({"images": (image(0), image(1)[:-30])}, "undecodable image"),
        ({"images": (image(0, "JPEG", (99, 99))[:2000], image(1))}, "undecodable image"),
        ({"images": (image(0), png_header(0, 5))}, "undecodable image"),
        ({"images": (image(0), png_header(9000, 9000))}, "absurd size"),
        ({"images": (image(0), png_header(2**31 - 1, 2**31 - 1))}, "absurd size"),
        ({"images": (image(0), image(0))}, "identical images"),
        ({"images": (image(0), other_file_of_the_same_pixels())}, "identical images"),
        ({"mask": image(3)}, "no source"),
        ({"source": image(3)}, "no mask"),
        ({"source": b"", "mask": image(3)}, "no source"),
        ({"source": b"what", "mask": image(3)}, "undecodable image"),
    ],
)
def test_bad_pairs_are_named(changes, reason):
    needs = frozenset({"source", "mask"} if {"source", "mask"} & set(changes) else ())
    skipped = decode_pair(pair(**changes), needs)
    assert isinstance(skipped, sources.Skipped)
    assert (skipped.id, skipped.reason, skipped.bad) == ("x:0", reason, True)


def test_no_other_program_is_asked_to_decode():
    """Pillow would run Ghostscript."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "EPS")
    skipped = decode_pair(pair(images=(image(0), buffer.getvalue())))
    assert skipped.detail.endswith("not one of JPEG, PNG, WEBP, GIF, BMP, TIFF")  # and no address


def test_16_bit_greys_are_scaled():
    """Pillow's convert would cut them off at 255."""
    grey = np.arange(0, 65536, 1024, np.uint16).reshape(8, 8)
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    np.testing.assert_array_equal(sources.decode_image(buffer.getvalue())[..., 0], grey // 256)
    buffer = io.BytesIO()
    Image.fromarray(grey.astype(np.float32)).save(buffer, "TIFF")
    with pytest.raises(sources.BadImageError, match="8 bits a channel"):
        sources.decode_image(buffer.getvalue())


def bad_record(i=0):
    return sources.Skipped(f"x:{i}", "no image", "no file y.png")


def test_the_limit_stops_and_says_why(caplog):
    tally = Tally(0.01, total=1000)
    for i in range(10):
        tally.skip(bad_record(i))
    assert "x:9 is skipped: no image: no file y.png" in caplog.text
    for _ in range(500):
        tally.skip(sources.Skipped("x:1", "no label", bad=False))
    with pytest.raises(
        TooManyBadError,
        match=r"11 of 1000 .*limit of 1\.00% \(500 no label, 11 no image\).*x:10: no image: no",
    ):
        tally.skip(bad_record(10))
    assert issubclass(TooManyBadError, ValueError)


def test_a_handful_never_stops_a_small_job():
    tally = Tally(total=5)
    for _ in range(HANDFUL):
        tally.skip(bad_record())
    with pytest.raises(TooManyBadError, match="4 of 5"):
        tally.skip(bad_record())


def test_the_log_has_an_end(caplog):
    tally = Tally(1.0, total=1000)
    with caplog.at_level(logging.WARNING):
        for i in range(500):
            tally.skip(bad_record(i))
    assert len(caplog.records) == MAX_LOGGED
    assert tally.counts == {"no image": 500}


def test_tallies_add_up_and_are_stored():
    parts = [Tally(0.01, total=100) for _ in range(3)]
    for part in parts:
        part.ok(0.5)
        part.ok(1.0)
        part.ok()
        part.skip(bad_record())
        part.skip(bad_record())
    whole = Tally(0.01, total=100)
    for part in parts:
        read = Tally.from_json(json.loads(json.dumps(part.to_json())))
        assert read == part
        assert whole.merge(read) is whole
    assert (whole.good, whole.ties, whole.bad, whole.counts) == (9, 3, 6, {"no image": 6})
    with pytest.raises(TooManyBadError, match="6 of 100"):
        whole.check()
    with pytest.raises(ValueError, match="share from 0 to 1, but is 2"):
        Tally(2, total=1)
