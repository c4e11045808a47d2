"""One encoded pair: its fields, mirroring, checks and serialisation."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, Int
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from dmpo_jax.data.encoded.prompt_store import check_floats, described
from dmpo_jax.errors import UserError

ARRAYS = ("moments", "image", "flipped", "flipped_image")
OWN = "own"
SIZES = (OWN, "resolution")  # what a model that is told images' sizes is told


class EncodedPair(NamedTuple):
    """One record.

    id: of the raw pair. prompt: index into the prompt store. preference: the probability that
    image 0 is preferred. moments: of the VAE, unscaled; bfloat16, float16 or float32. Their last
    axis holds the mean, then the log-variance (M = 2C), or the mean alone (M = C) if the folder's
    `meta.moments` is "mean". sizes: original height and width, crop top and left, target height
    and width, in pixels. image: channels of a given image (`Condition.image`). flipped,
    flipped_image: moments and image of the pair mirrored left to right. Each of image, flipped and
    flipped_image is present in all pairs of a folder or in none.
    """

    id: str
    prompt: int
    preference: float
    moments: Float[np.ndarray, "2 h w M"]
    sizes: Int[np.ndarray, "2 6"]
    image: Float[np.ndarray, "h w E"] | None = None
    flipped: Float[np.ndarray, "2 h w M"] | None = None
    flipped_image: Float[np.ndarray, "h w E"] | None = None

    def flip(self, which: tuple[bool, bool] = (True, True)) -> "EncodedPair":
        """Returns the mirrored pair: its images, the given image, and SDXL's crop.

        Args:
            which: of the two images; one alone only where there is no given image.

        Raises:
            ValueError: the mirrored variant was not stored, or the given image would be that of
                one image and the mirrored one that of the other.
        """
        if not any(which):
            return self
        if self.flipped is None:
            raise UserError(
                f"pair {self.id!r} has no flipped variant: encode with flip, or train without"
            )
        if not all(which):
            return self._flip_one(which.index(True))
        return self._replace(
            moments=self.flipped,
            flipped=self.moments,
            sizes=flip_sizes(self.sizes),
            image=self.flipped_image,
            flipped_image=self.image,
        )

    def _flip_one(self, image: int) -> "EncodedPair":
        if self.image is not None:
            raise UserError(
                f"pair {self.id!r} has a given image, which both of its images share: flip both"
            )
        moments, flipped, sizes = (np.array(x) for x in (self.moments, self.flipped, self.sizes))
        moments[image], flipped[image] = flipped[image], self.moments[image]
        sizes[image] = flip_sizes(sizes[image])
        return self._replace(moments=moments, flipped=flipped, sizes=sizes)


def chosen_first(pair: EncodedPair) -> EncodedPair:
    """Returns the pair, swapped if needed so that index 0 is the preferred image.

    The preference is then in [0.5, 1]; a tie keeps its order.

    Raises:
        ValueError: the preference is not a probability; names the pair.
    """
    if not 0 <= pair.preference <= 1:  # also rejects NaN
        raise UserError(
            f"pair {pair.id!r}: preference must lie in [0, 1], but got {pair.preference}"
        )
    if pair.preference >= 0.5:
        return pair
    return pair._replace(
        preference=1 - pair.preference,
        moments=pair.moments[::-1],
        sizes=pair.sizes[::-1],
        flipped=None if pair.flipped is None else pair.flipped[::-1],
    )


def flip_sizes(sizes: Int[np.ndarray, "*n 6"]) -> Int[np.ndarray, "*n 6"]:
    """Returns SDXL's sizes, in pixels, of the same crop in the mirrored image.

    As in diffusers' SDXL training, the image is mirrored before it is cropped, so the crop's left
    edge is measured from the original right edge. The function is its own inverse.
    """
    sizes = np.array(sizes)
    _, width = np.moveaxis(resized_size(sizes[..., :2], sizes[..., 4:]), -1, 0)
    sizes[..., 3] = width - sizes[..., 5] - sizes[..., 3]
    return sizes


def uncropped_sizes(sizes: Int[np.ndarray, "*n 6"]) -> Int[np.ndarray, "*n 6"]:
    """Returns SDXL's sizes, in pixels, of an image that had the target's size from the start."""
    target = sizes[..., 4:]
    return np.concatenate([target, np.zeros_like(target), target], axis=-1)


def resized_size(
    original: Int[np.ndarray, "*n 2"], target: Int[np.ndarray, "*n 2"]
) -> Int[np.ndarray, "*n 2"]:
    """Returns height and width after resizing the shorter side to the (square) target's side."""
    scale = target[..., :1] / original.min(-1, keepdims=True)
    return np.maximum(np.round(original * scale).astype(np.int64), target)


class PairSerializer:
    """Checks pairs, index 0 chosen (`chosen_first`), and serialises them as records.

    Args:
        first: a pair whose shapes and dtypes all others must match.
        prompts: number of prompts.
        imaged: True if every pair must have an image, False if none may.
        moments: "sample" (mean and log-variance) or "mean".

    Raises (when called):
        ValueError: a pair is malformed, not finite or unlike the first; names the pair.
    """

    def __init__(self, first: EncodedPair, *, prompts: int, imaged: bool, moments: str = "sample"):
        self.shapes = _shapes(first)
        self._prompts, self._imaged, self._mean = prompts, imaged, moments == "mean"
        self._features: Any = None
        self._serializer: Any = None

    def __call__(self, pair: EncodedPair) -> bytes:
        pair = self._checked(pair)
        if self._features is None:  # the shapes are checked only now
            self._features = make_features(self.shapes)
            self._serializer = ExampleSerializer(self._features.get_serialized_info())
        given = {name: value for name, value in pair._asdict().items() if value is not None}
        example = self._serializer.get_tf_example(self._features.encode_example(given))
        # A plain SerializeToString orders the fields differently in every process.
        return example.SerializeToString(deterministic=True)

    def _checked(self, pair: EncodedPair) -> EncodedPair:
        """Returns the pair in the stored dtypes; raises ValueError, naming an invalid pair."""
        what = f"pair {pair.id!r}"
        if not 0.5 <= pair.preference <= 1:  # also rejects NaN
            raise ValueError(
                f"{what}: preference must lie in [0.5, 1], index 0 preferred, but got "
                f"{pair.preference}: swap it first (chosen_first)"
            )
        if not 0 <= pair.prompt < self._prompts:
            raise ValueError(
                f"{what}: prompt must lie in [0, {self._prompts}), but got {pair.prompt}"
            )
        self._check_arrays(what, pair)
        if pair.sizes.shape != (2, 6) or pair.sizes.dtype.kind not in "iu":
            raise ValueError(f"{what}: sizes should be integers [2, 6], but got {pair.sizes!r}")
        return pair._replace(
            prompt=int(pair.prompt),
            preference=float(pair.preference),
            sizes=pair.sizes.astype(np.int32),
        )

    def _check_arrays(self, what: str, pair: EncodedPair) -> None:
        got, shapes, shape = _shapes(pair), self.shapes, pair.moments.shape
        layout = "[2, h, w, C]" if self._mean else "[2, h, w, 2C]"
        legal = len(shape) == 4 and shape[0] == 2 and (self._mean or shape[3] % 2 == 0)
        if got["moments"] != shapes["moments"] or not legal:
            raise ValueError(
                f"{what}: moments should be {layout}, {shapes['moments']}, but got {got['moments']}"
            )
        check_floats(f"{what}: moments", pair.moments)
        if self._imaged != (pair.image is not None):
            needed = "should have an image, as meta's image_kind says" if self._imaged else None
            said = "none" if needed else "no image_kind in meta: name it"
            raise ValueError(f"{what} {needed or 'has an image'}, but got {said}")
        if pair.image is not None:
            legal = pair.image.ndim == 3 and pair.image.shape[:2] == shape[1:3]
            if got["image"] != shapes["image"] or not legal:
                raise ValueError(
                    f"{what}: image should be [h, w, E], {shapes['image']}, h and w as of the "
                    f"moments {list(shape)}, but got {got['image']}"
                )
            check_floats(f"{what}: image", pair.image)
        for name, like in (("flipped", "moments"), ("flipped_image", "image")):
            # Every pair has the arrays of the first, in the shape of the array that each mirrors.
            wanted = shapes[like] if shapes["flipped"] else None
            if got[name] != wanted:
                raise ValueError(f"{what}: {name} should be {wanted}, but got {got[name]}")
            if wanted:
                check_floats(f"{what}: {name}", getattr(pair, name))


def _shapes(pair: EncodedPair) -> dict[str, Any]:
    """Returns shape and dtype of the pair's arrays; None for an absent array."""
    arrays = {name: getattr(pair, name) for name in ARRAYS}
    return {name: None if x is None else described(x) for name, x in arrays.items()}


def make_features(shapes: Mapping[str, Any]) -> tfds.features.FeaturesDict:
    """Returns the TFDS features (the schema) of a record with arrays of these shapes and dtypes."""
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "prompt": tfds.features.Scalar(np.int32),
            "preference": tfds.features.Scalar(np.float32),
            "sizes": tfds.features.Tensor(shape=(2, 6), dtype=np.int32),
        }
        # Stored as bytes: tf.Example has no 16-bit floats, and its float lists are slow to parse.
        | {
            name: tfds.features.Tensor(
                shape=tuple(shapes[name]["shape"]),
                dtype=np.dtype(shapes[name]["dtype"]),
                encoding="bytes",
            )
            for name in ARRAYS
            if shapes.get(name)
        }
    )
