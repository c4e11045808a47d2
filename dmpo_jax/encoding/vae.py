"""The VAE encoder on a mesh: maps batches of pixels to moments, one batch ahead."""

import concurrent.futures
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dmpo_jax import diffusers_io
from dmpo_jax.encoding.pixels import Pixels
from dmpo_jax.models import parameters
from dmpo_jax.parallel import meshes


class Device:
    """The VAE encoder on a mesh: maps batches of `Pixels` to moments, one batch ahead.

    Args:
        devices: of one process; `batch_size` is a multiple of their number.
        moments: "sample" keeps mean and log-variance, "mean" the mean alone.
        dtype: of the moments; images beside the latents are float16.
        flip: also encodes every image mirrored left to right.

    seconds: time from the end of the first batch (which compiles) to the end of the last one.
    idle: the part of it in which the devices had no work.
    """

    def __init__(
        self,
        pipeline: diffusers_io.Pipeline,
        devices: jax.sharding.Mesh,
        *,
        batch_size: int,
        moments: str,
        dtype: str,
        flip: bool,
    ):
        self._sharding, self._size = meshes.batch_sharding(devices), batch_size
        params = parameters.split(pipeline.vae)[1]
        self._params = jax.device_put(params, meshes.replicated(devices))
        self._run = make_run(pipeline, moments=moments, dtype=dtype)
        self._flip = jax.jit(mirrored) if flip else None
        # One thread waits for results, so that the caller can prepare the next batch.
        self._waiter = concurrent.futures.ThreadPoolExecutor(1)
        self._ready = self._first = None
        self.seconds = self.idle = 0.0

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *exception: object) -> None:
        self._waiter.shutdown(cancel_futures=True)

    def shapes(self, side: int, given: Sequence[str]) -> Any:
        """Returns ShapeDtypeStructs (moments, image) of one batch at `side` pixels."""
        pixels = jax.ShapeDtypeStruct((self._size, 2, side, side, 3), np.uint8)
        source = jax.ShapeDtypeStruct((self._size, side, side, 3), np.uint8)
        mask = jax.ShapeDtypeStruct((self._size, side, side, 1), np.uint8)
        return jax.eval_shape(
            self._run,
            self._params,
            pixels,
            source if "source" in given else None,
            mask if "mask" in given else None,
        )

    def submit(self, batch: Sequence[Pixels]) -> concurrent.futures.Future:
        """Returns a future of (moments, image, flipped, flipped_image) in NumPy, None if absent.

        Rows beyond the batch's own are padding.
        """
        inputs = [
            self._stacked([getattr(x, f) for x in batch]) for f in ("images", "source", "mask")
        ]
        inputs = jax.device_put(inputs, self._sharding)
        found = self._run(self._params, *inputs)
        mirror = (None, None)
        if self._flip is not None:
            mirror = self._run(self._params, *self._flip(inputs))
        return self._waiter.submit(self._fetch, (*found, *mirror), time.monotonic())

    def _stacked(self, arrays: list[np.ndarray | None]) -> np.ndarray | None:
        """Stacks the rows, padded to the full batch size, so that `run` compiles once."""
        rows = [x for x in arrays if x is not None]
        return np.stack(rows + rows[:1] * (self._size - len(rows))) if rows else None

    def _fetch(self, found: Any, submitted: float) -> Any:
        jax.block_until_ready(found)
        now = time.monotonic()
        if self._first is None or self._ready is None:
            self._first = now
        else:
            self.idle += max(0.0, submitted - self._ready)
            self.seconds = now - self._first
        self._ready = now
        return jax.tree.map(np.asarray, found)


def make_run(
    pipeline: diffusers_io.Pipeline, *, moments: str = "sample", dtype: str = "float32"
) -> Callable[..., Any]:
    """Returns `run(VAE's parameters, images [B, 2, R, R, 3], source, mask) -> (moments, image)`.

    Inputs are uint8, as in `Pixels`. Moments are in `dtype`, `[B, 2, h, w, 2C]`, or
    `[B, 2, h, w, C]` for "mean". The image is float16, or None if the family has none.
    """
    structure, _ = parameters.split(pipeline.vae)
    beside, (scaling, _) = pipeline.family.given, pipeline.family.factors(pipeline.vae)

    @jax.jit
    def run(params, images, source, mask):
        vae = parameters.merge(structure, params)

        def encode(x):
            return vae.encode(x).astype(np.float32)

        def in_range(x):
            return x.astype(np.float32) / 127.5 - 1

        flat = encode(in_range(images.reshape(-1, *images.shape[2:])))
        if moments == "mean":
            flat = flat[..., : flat.shape[-1] // 2]
        found = flat.reshape(*images.shape[:2], *flat.shape[1:]).astype(dtype)
        if beside is None:
            return found, None
        mask = None if mask is None else mask.astype(np.float32)
        image = beside.channels(encode, in_range(source), mask, scaling_factor=scaling)
        return found, image.astype(np.float16)

    return run


def mirrored(images: Any) -> Any:
    """Mirrors images `[..., H, W, C]` of a pytree left to right."""
    return jax.tree.map(lambda x: x[..., ::-1, :], images)
