"""The typed record of `encoded.json`: the content of a folder of encoded pairs and its origin."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy)
import numpy as np
from etils import epath

from dmpo_jax import storage
from dmpo_jax.diffusion.noise import Factor
from dmpo_jax.errors import UserError
from dmpo_jax.families import FAMILIES, Family
from dmpo_jax.families.family import Facts
from dmpo_jax.types import Condition, PairBatch

# Format 3 adds how latents are packed, whether sizes and lengths are stored, and content hashes.
# Folders of format 2 are readable: the new keys get the only values possible in format 2.
FORMAT, READABLE = 3, (2, 3)
MARKER = "encoded.json"
MOMENTS = ("sample", "mean")
DIGEST = "digest"  # key of encoded.json: the hash of all others


class ArraySpec(NamedTuple):
    """Shape and dtype of an array of one pair, or of one prompt."""

    shape: tuple[int, ...]
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": self.dtype}


class Arrays(NamedTuple):
    """Specs of the arrays of a pair and of its prompt; None for absent arrays.

    moments: `[2, h, w, M]`. context: `[S, D]`. pooled: `[P]`. length: a scalar, the number of
    context positions that are text. image: `[h, w, E]`. flipped, flipped_image: moments and
    image of the mirrored pair.
    """

    moments: ArraySpec
    context: ArraySpec
    pooled: ArraySpec | None = None
    length: ArraySpec | None = None
    image: ArraySpec | None = None
    flipped: ArraySpec | None = None
    flipped_image: ArraySpec | None = None


@dataclasses.dataclass(frozen=True)
class EncodedMeta:
    """Metadata of encoded pairs. Field names are the keys of encoded.json, `arrays` as "shapes".

    model, vae: folders or hub ids of the encoding models; vae is "" for the model's own.
    scaling_factor, shift_factor: `(latent - shift) * scale`; a number, or one a channel.
    moments: "sample" (mean and log-variance) or "mean".
    image_kind: `Given.kind` of the image beside the prompt, or "".
    pack: latents are packed pack x pack before they are scaled and noised.
    told_sizes: True if the model is conditioned on the images' sizes (`Condition.sizes`).
    content: part of the pipeline -> sampled hash of its weights; empty if unknown.
    source_files: file of the source -> sampled hash; empty if unknown.
    source, resolution, validation_fraction, crop, ties: settings of `encode`.
    skipped: reason -> skipped records. tied_pairs: number of ties. split_by: unit of the splits.
    counts: split -> pairs, and "prompts". prompt_shards: prompts in each file of the store.
    files: name -> bytes. hashes: name -> sha256 of its bytes; empty if unknown.
    other: further keys, kept unchanged.
    """

    model: str
    scaling_factor: Factor
    arrays: Arrays
    shift_factor: Factor = 0.0
    moments: str = "sample"
    image_kind: str = ""
    pack: int = 1
    told_sizes: bool = False
    vae: str = ""
    content: Mapping[str, str] = dataclasses.field(default_factory=dict)
    source: str = ""
    source_files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    resolution: int | None = None
    validation_fraction: float | None = None
    crop: str = "center"
    ties: str = "keep"
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    tied_pairs: int | None = None
    split_by: str = ""
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    prompt_shards: tuple[int, ...] = ()
    files: Mapping[str, int] = dataclasses.field(default_factory=dict)
    hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    format: int = FORMAT
    other: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def mean_only(self) -> bool:
        """True if the moments are means without log-variances."""
        return self.moments == "mean"

    @property
    def identity(self) -> str:
        """A hash of what training reads: the same wherever the folder lies."""
        names = ("scaling_factor", "shift_factor", "moments", "image_kind", "pack", "told_sizes")
        about = self.to_json()
        return storage.hash_json(
            {name: about[name] for name in (*names, "shapes", "counts")}
            | {"files": self.hashes or self.files}
        )

    @property
    def moments_dtype(self) -> str:
        return self.arrays.moments.dtype

    @property
    def flipped(self) -> bool:
        """True if each pair is also stored mirrored."""
        return self.arrays.flipped is not None

    @property
    def latent_channels(self) -> int:
        """C of the VAE's latents: half of the moments' channels, or all of a mean's."""
        return self.arrays.moments.shape[-1] // (1 if self.mean_only else 2)

    @property
    def latents(self) -> tuple[int, int, int]:
        """Height, width and channels of the packed latents, the model's input."""
        _, height, width, _ = self.arrays.moments.shape
        channels = self.latent_channels * self.pack**2
        return height // self.pack, width // self.pack, channels

    @property
    def image_optional(self) -> bool:
        """True if training drops the image as it drops prompts (`Given.optional`)."""
        kinds = {f.given.kind: f.given for f in FAMILIES.values() if f.given is not None}
        return bool(self.image_kind) and kinds[self.image_kind].optional

    def map_batch(self, make: Callable[[tuple[int, ...], str], Any]) -> PairBatch:
        """Returns a PairBatch of `make(shape of one pair's array, dtype)`."""
        arrays = self.arrays
        specs = (arrays.moments, arrays.context, arrays.pooled, arrays.image, arrays.length)
        made: list[Any] = [spec and make(*spec) for spec in specs]
        moments, context, pooled, image, lengths = made
        condition = Condition(
            context=context,
            pooled=pooled,
            sizes=make((2, 6), "float32") if self.told_sizes else None,
            image=image,
            lengths=lengths,
        )
        preference: Any = make((), "float32")
        return PairBatch(moments, preference, condition)

    def empty(self, rows: int) -> PairBatch:
        """Returns a NumPy batch of `rows` pairs, uninitialised."""
        return self.map_batch(lambda shape, dtype: np.empty((rows, *shape), np.dtype(dtype)))

    def zeros(self, rows: int) -> PairBatch:
        """Returns a NumPy batch of `rows` pairs, all zeros."""
        return self.map_batch(lambda shape, dtype: np.zeros((rows, *shape), np.dtype(dtype)))

    def abstract_batch(self, rows: int, sharding: Any = None) -> PairBatch:
        """Returns ShapeDtypeStructs of a batch, as laid out by `mesh.shard_batch`."""

        def array(shape: tuple[int, ...], dtype: str) -> Any:
            return jax.ShapeDtypeStruct((rows, *shape), np.dtype(dtype), sharding=sharding)

        return self.map_batch(array)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of encoded.json, without unknown (None) values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        specs = values.pop("arrays")._asdict()
        shapes = {name: spec and spec.to_json() for name, spec in specs.items()}
        other = values.pop("other")
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        derived = {"moments_dtype": self.moments_dtype, "flipped": self.flipped, "shapes": shapes}
        return {**{k: v for k, v in plain.items() if v is not None}, **derived, **other}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "EncodedMeta":
        """Inverse of `to_json`; also reads format 2.

        Raises:
            ValueError: a key is missing, or its value has another type; names the key.
        """
        values = dict(values)
        arrays = _read_arrays(values.pop("shapes", None))
        for derived in ("moments_dtype", "flipped"):
            values.pop(derived, None)
        values.setdefault("told_sizes", arrays.pooled is not None)
        known = {f.name for f in dataclasses.fields(cls)} - {"arrays", "other"}
        found = {name: _read(name, values[name]) for name in known & set(values)}
        if missing := sorted(set(REQUIRED) - set(found)):
            raise UserError(f"{MARKER} needs {', '.join(REQUIRED)}, but {missing} is missing")
        other = {name: value for name, value in values.items() if name not in known}
        return cls(arrays=arrays, other=other, **found)

    @classmethod
    def load(cls, folder: epath.PathLike) -> "EncodedMeta | None":
        """Reads encoded.json of a folder; None if it is missing or truncated.

        Raises:
            ValueError: it has another format, or is damaged; names the folder and the key.
        """
        path = epath.Path(folder) / MARKER
        values = storage.find_json(path)
        if values is None:
            return None
        digest = values.pop(DIGEST, None) if isinstance(values, dict) else None
        if not isinstance(values, dict) or values.get("format") not in READABLE:
            found = values.get("format") if isinstance(values, dict) else None
            raise UserError(
                f"{folder} has format {found}, but this version reads "
                f"{' and '.join(map(str, READABLE))}: delete it and run encode again"
            )
        try:
            meta = cls.from_json(values)
        except ValueError as error:
            raise UserError(f"{path}: {error}: run encode again") from error
        if digest not in (None, storage.hash_json(values)):
            raise UserError(
                f"{path} is not as encode wrote it: it was edited or is damaged. Copy it again, or "
                f"run encode again; to keep an edit of your own, remove its {DIGEST!r}"
            )
        return meta

    def save(self, folder: epath.PathLike) -> None:
        """Writes encoded.json atomically."""
        values = self.to_json()
        digest = storage.hash_json(values)
        storage.write_json(epath.Path(folder) / MARKER, {**values, DIGEST: digest})

    @classmethod
    def expected(
        cls,
        family: Family,
        facts: Facts,
        *,
        size: tuple[int, int],
        latent_channels: int,
        tokens: int,
        scaling_factor: Factor,
        shift_factor: Factor = 0.0,
        moments: str = "sample",
        moments_dtype: str = "bfloat16",
    ) -> "EncodedMeta":
        """Returns the metadata that encode would write of pairs for a model of this family.

        Args:
            size: height and width of the VAE's latents. tokens: of a prompt.
        """
        beside = family.given.width(latent_channels) if family.given else 0
        channels = latent_channels * (1 if moments == "mean" else 2)
        pooled = ArraySpec((facts.pooled_width,), family.stored) if facts.pooled_width else None
        return cls(
            model="",
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            arrays=Arrays(
                moments=ArraySpec((2, *size, channels), moments_dtype),
                context=ArraySpec((tokens, facts.context_width), family.stored),
                pooled=pooled,
                length=ArraySpec((), "int32") if facts.lengths else None,
                image=ArraySpec((*size, beside), moments_dtype) if beside else None,
            ),
            moments=moments,
            image_kind=family.given_kind,
            pack=family.pack,
            told_sizes=family.told_sizes,
        )


REQUIRED = ("model", "scaling_factor")
_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "scaling_factor": (float, int, list, tuple),
    "shift_factor": (float, int, list, tuple),
    "moments": (str,),
    "image_kind": (str,),
    "pack": (int,),
    "told_sizes": (bool,),
    "vae": (str,),
    "content": (dict,),
    "source": (str,),
    "source_files": (dict,),
    "resolution": (int, type(None)),
    "validation_fraction": (float, int, type(None)),
    "crop": (str,),
    "ties": (str,),
    "skipped": (dict,),
    "tied_pairs": (int, type(None)),
    "split_by": (str,),
    "counts": (dict,),
    "prompt_shards": (list, tuple),
    "files": (dict,),
    "hashes": (dict,),
    "format": (int,),
}


def _read(name: str, value: Any) -> Any:
    kinds = _KINDS[name]
    if not isinstance(value, kinds):
        words = " or ".join(kind.__name__ for kind in kinds)
        raise UserError(f"{name} should be {words}, but is {value!r}")
    if name == "moments" and value not in MOMENTS:
        raise UserError(
            f'the encoded pairs\' moments should be "sample" or "mean", but are {value!r}'
        )
    if isinstance(value, list):
        return tuple(value)
    return float(value) if name in ("scaling_factor", "shift_factor") else value


def _read_arrays(shapes: Any) -> Arrays:
    """Parses `shapes` of encoded.json; raises ValueError if it is damaged."""

    def spec(name: str) -> Any:
        if name not in ("moments", "context") and shapes.get(name) is None:
            return None
        given: Any = shapes.get(name)
        try:
            shape, dtype = tuple(given["shape"]), given["dtype"]
            np.dtype(dtype)
            if not all(isinstance(n, int) and n > 0 for n in shape):
                raise ValueError(shape)
        except (TypeError, KeyError, ValueError):
            raise UserError(
                f"shapes.{name} should be a shape and a dtype, but is {given!r}"
            ) from None
        return ArraySpec(shape, dtype)

    if not isinstance(shapes, Mapping):
        raise UserError(f"shapes should say what each array is, but is {shapes!r}")
    arrays = Arrays(*[spec(name) for name in Arrays._fields])
    if len(arrays.moments.shape) != 4 or len(arrays.context.shape) != 2:
        raise UserError(
            "moments should be [2, h, w, M] and context [S, D], but are "
            f"{list(arrays.moments.shape)} and {list(arrays.context.shape)}"
        )
    return arrays


def differences(have: Mapping[str, Any], want: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns {name: (have, want)} of the wanted values that differ, by the keys of encoded.json.

    If both contents are known and equal, the names of model and VAE are ignored. If either content
    is unknown, only the names are compared.
    """
    contents = have.get("content"), want.get("content")
    left_out: tuple[str, ...] = ()
    if all(contents):
        left_out = ("model", "vae") if contents[0] == contents[1] else ()
    else:
        left_out = ("content",)
    if not have.get("source_files"):  # unknown to earlier versions
        left_out += ("source_files",)
    found = {name: (have.get(name), value) for name, value in want.items() if name not in left_out}
    differ = {name: (a, b) for name, (a, b) in found.items() if a != b}
    for name, words in (("content", "weights of"), ("source_files", "content of")):
        if name in differ:  # each part or file, by the start of its hash
            a, b = (values or {} for values in differ.pop(name))
            pairs = {key: (a.get(key, "none")[:12], b.get(key, "none")[:12]) for key in {**a, **b}}
            differ |= {f"{words} {key}": pair for key, pair in pairs.items() if len({*pair}) > 1}
    return differ
