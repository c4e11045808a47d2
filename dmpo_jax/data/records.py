"""Encoded pairs on disk: the schema, its writer and its reader.

A folder holds

    encoded_pairs-SPLIT.array_record-NNNNN  the pairs, with dataset_info.json and
                            features.json: a TFDS dataset, so that
                            `tfds.builder_from_directory(folder)` opens it too
    prompts.array_record    record j: the embeddings of prompt j; 0 is the empty prompt
    encoded.json            what was encoded, with which model, every file's size

`encoded.json` is written last. Without it, or with a file missing or cut short, the
folder is not whole and is not opened: a cut ArrayRecord file reads as an empty one,
without an error.
"""

import contextlib
import hashlib
import io
import itertools
import json
import math
import operator
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jaxtyping import Float, Int
from tensorflow_datasets.core.dataset_info import DatasetIdentity

# Still 1 with `image` and `image_kind`: folders without them read as they did, and a version
# that does not know `image` fails at a folder that has it.
FORMAT = 1
MARKER = "encoded.json"
PROMPTS = "prompts.array_record"
NAME = "encoded_pairs"
SPLITS = ("train", "validation")
REQUIRED_META = ("model", "scaling_factor")
OURS = re.compile(
    rf"{NAME}-.*\.array_record-\d+|{re.escape(PROMPTS)}|(dataset_info|features)\.json"
)
SHARD_BYTES = 256 * 2**20
DTYPES = ("float16", "float32")


class NotWholeError(ValueError):
    """The folder's encoding did not finish, or its copy did not."""


class EncodedPair(NamedTuple):
    """One record.

    id: where the pair came from. prompt: index into the prompt store. preference: the
    probability that image 0 is preferred. moments: of the VAE, unscaled: mean, then
    log-variance, on the last axis; float16 or float32. sizes: original height and width,
    crop top and left, target height and width, in pixels. image: what the UNet sees of a
    given image (`Conditioning.image`), of all pairs of a folder or of none.
    """

    id: str
    prompt: int
    preference: float
    moments: Float[np.ndarray, "2 h w M"]
    sizes: Int[np.ndarray, "2 6"]
    image: Float[np.ndarray, "h w E"] | None = None

    def swap_to_chosen(self) -> "EncodedPair":
        """The same pair with index 0 preferred: preference in [0.5, 1]."""
        if self.preference >= 0.5:
            return self
        return self._replace(
            preference=1 - self.preference, moments=self.moments[::-1], sizes=self.sizes[::-1]
        )


class PromptEmbedding(NamedTuple):
    """A prompt and what the text encoders made of it; float16 or float32."""

    text: str
    context: Float[np.ndarray, "S D"]
    pooled: Float[np.ndarray, "P"] | None = None


def write_pairs(
    folder: epath.PathLike,
    splits: Mapping[str, Iterable[EncodedPair]],
    prompts: Iterable[PromptEmbedding],
    meta: Mapping[str, Any],
) -> None:
    """Writes a whole folder of encoded pairs, swapped so that index 0 is chosen.

    Args:
        folder: local or remote. Leftovers of a write that did not finish are removed.
        splits: "train" and, if wanted, "validation". Read once, in order, after prompts.
        prompts: read once. The first is the empty prompt.
        meta: goes into encoded.json: at least `model` (its identity) and `scaling_factor`
            (of the VAE); `image_kind`, a `Family.image`, where the pairs have images;
            anything JSON can hold. Counts, shapes and dtypes are added.

    Raises:
        ValueError: if the folder is already whole; if a pair or a prompt is malformed, not
            finite or unlike the first, naming it. The folder is then not whole.
    """
    folder = epath.Path(folder)
    if unknown := set(splits) - set(SPLITS):
        raise ValueError(f"splits are {SPLITS}, but got {sorted(unknown)}")
    if "train" not in splits:
        raise ValueError(f"a 'train' split is needed, but got {sorted(splits)}")
    if missing := set(REQUIRED_META) - set(meta):
        raise ValueError(f"meta needs {REQUIRED_META}, but {sorted(missing)} is missing")
    if reserved := {"format", "counts", "shapes", "files"} & set(meta):
        raise ValueError(f"meta may not set {sorted(reserved)}: the writer adds them")
    json.dumps(dict(meta))  # fails here rather than after hours of encoding
    _clear(folder)
    with _local_copy_of(folder) as local:
        shapes = _write_prompts(local / PROMPTS, prompts)
        counts = {"prompts": shapes.pop("prompts")}
        imaged = bool(meta.get("image_kind"))
        for described, split, count in _write_splits(local, splits, counts["prompts"], imaged):
            counts[split] = count
            shapes |= described
        files = {p.name: p.stat().length for p in local.iterdir() if OURS.fullmatch(p.name)}
        if local != folder:
            for name in files:
                (local / name).copy(folder / name, overwrite=True)
    whole = {
        "image_kind": "",
        **meta,
        "format": FORMAT,
        "counts": counts,
        "shapes": shapes,
        "files": files,
    }
    (folder / MARKER).write_text(json.dumps(whole, indent=1))


def open_pairs(folder: epath.PathLike) -> "EncodedPairs":
    """Opens what `write_pairs` wrote; reads nothing but the metadata.

    Local and gs:// folders are read in place; others, which ArrayRecord cannot open, are
    first copied to the machine's temporary folder, once.

    Raises:
        FileNotFoundError: if there is no such folder.
        NotWholeError: if the folder is not whole.
        ValueError: if it has another format version.
    """
    folder = epath.Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"no encoded pairs at {folder}: run encode first")
    meta = _load_meta(folder)
    if meta["format"] != FORMAT:
        raise ValueError(
            f"{folder} has format {meta['format']}, but this version reads {FORMAT}: "
            "delete it and run encode again"
        )
    meta.setdefault("image_kind", "")  # folders made before there were images
    meta["shapes"].setdefault("image", None)
    if _is_remote(folder) and not os.fspath(folder).startswith("gs://"):
        folder = _staged(folder, meta["files"])
    return EncodedPairs(folder, meta)


def _load_meta(folder: epath.Path) -> dict[str, Any]:
    """encoded.json of a folder that is whole; NotWholeError otherwise."""
    unfinished = f"{folder} is not whole: encoding did not finish: run encode again"
    try:
        meta = json.loads((folder / MARKER).read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise NotWholeError(f"{unfinished} ({MARKER} is missing or cut short)") from error
    present = {path.name for path in folder.iterdir()}
    for name, size in meta["files"].items():
        # Remote files appear whole or not at all, and asking each for its size is slow.
        if name not in present or (
            not _is_remote(folder) and (folder / name).stat().length != size
        ):
            raise NotWholeError(f"{unfinished}, or copy it again ({name} is not all there)")
    return meta


class EncodedPairs:
    """An opened folder. `meta`: encoded.json. `prompts`: the store, `[j]` -> PromptEmbedding."""

    def __init__(self, folder: epath.Path, meta: dict[str, Any]):
        self.meta = meta
        self.prompts = PromptStore(folder, meta["counts"]["prompts"])
        self._builder: Any = tfds.builder_from_directory(folder)

    def split(self, name: str) -> "PairSource":
        """The pairs of a split, by random access: len and `[i]` -> EncodedPair.

        Raises:
            ValueError: if there is no such split.
        """
        if name not in self._builder.info.splits:
            names = sorted(self._builder.info.splits)
            raise ValueError(f"there is no split {name!r}, only {names}")
        return PairSource(self._builder.as_data_source(name))


class PairSource:
    """Random access to the pairs of one split; nothing is kept in memory."""

    def __init__(self, source: Any):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> EncodedPair:
        record = self._source[_checked(i, len(self))]
        return EncodedPair(**{**record, "id": record["id"].decode()})


class PromptStore:
    """Random access to prompt embeddings; nothing is kept in memory."""

    def __init__(self, folder: epath.Path, count: int):
        self._source = ArrayRecordDataSource([os.fspath(folder / PROMPTS)])
        if len(self._source) != count:
            raise ValueError(f"{folder / PROMPTS} holds {len(self._source)} prompts, not {count}")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, j: int) -> PromptEmbedding:
        record = self._source[_checked(j, len(self))]
        with np.load(io.BytesIO(record), allow_pickle=False) as arrays:
            text = arrays["text"].tobytes().decode()
            return PromptEmbedding(text, arrays["context"], arrays.get("pooled"))


def _checked(i: int, length: int) -> int:
    i = operator.index(i)
    if not 0 <= i < length:  # IndexError ends a for loop over a source
        raise IndexError(f"index {i} is outside [0, {length})")
    return i


def _write_prompts(path: epath.Path, prompts: Iterable[PromptEmbedding]) -> dict[str, Any]:
    """Returns their shapes, and under "prompts" their number."""
    first, count = None, 0
    # group_size 1: reading one record must not decompress its neighbours.
    open_writer: Any = ArrayRecordWriter
    with contextlib.closing(open_writer(os.fspath(path), "group_size:1")) as writer:
        for count, prompt in enumerate(prompts, start=1):
            what = f"prompt {count - 1} ({prompt.text[:40]!r})"
            described = {"context": _described(prompt.context), "pooled": None}
            arrays: dict[str, Any] = {"context": prompt.context}
            if prompt.pooled is not None:
                described["pooled"], arrays["pooled"] = _described(prompt.pooled), prompt.pooled
            if first is None:
                if prompt.text:
                    raise ValueError(f"prompt 0 must be the empty prompt, but got {what}")
                first = described
            if described != first or prompt.context.ndim != 2:
                raise ValueError(f"{what} should be {first}, context [S, D], but got {described}")
            for name, array in arrays.items():
                _check_floats(f"{what}: {name}", array)
            arrays["text"] = np.frombuffer(prompt.text.encode(), np.uint8)
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)
            writer.write(buffer.getvalue())
    if first is None:
        raise ValueError("prompts are needed, the empty prompt first, but got none")
    return {**first, "prompts": count}


def _write_splits(
    folder: epath.Path, splits: Mapping[str, Iterable[EncodedPair]], prompts: int, imaged: bool
) -> Iterator[tuple[dict[str, Any], str, int]]:
    """Writes the TFDS dataset; yields (shapes and dtypes, split, pairs in it).

    imaged: whether every pair must have an image, or none may.
    """
    writer = shapes = None
    per_write = 16  # TFDS rewrites its metadata at every call
    for split in sorted(splits):
        pairs, count = iter(splits[split]), 0
        while chunk := list(itertools.islice(pairs, per_write)):
            if shapes is None:
                shapes = _shapes(chunk[0])
            chunk = [_checked_pair(pair, shapes, prompts, imaged) for pair in chunk]
            if writer is None:  # only now are the shapes known to be legal
                writer = _make_writer(folder, shapes)
            if not count:
                writer.initialize_splits([split])
            writer.add_examples({split: [_present(pair) for pair in chunk]})
            count += len(chunk)
        if writer is None or shapes is None or not count:
            raise ValueError(f"split {split!r} needs at least one pair, but got none")
        writer.close_splits([split])
        yield shapes, split, count


def _shapes(pair: EncodedPair) -> dict[str, Any]:
    """Shape and dtype of the pair's arrays; None for an image that it does not have."""
    image = None if pair.image is None else _described(pair.image)
    return {"moments": _described(pair.moments), "image": image}


def _present(pair: EncodedPair) -> dict[str, Any]:
    return {name: value for name, value in pair._asdict().items() if value is not None}


def _make_writer(folder: epath.Path, shapes: dict[str, Any]) -> tfds.core.SequentialWriter:
    arrays = {name: described for name, described in shapes.items() if described}
    features = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "prompt": tfds.features.Scalar(np.int32),
            "preference": tfds.features.Scalar(np.float32),
            "sizes": tfds.features.Tensor(shape=(2, 6), dtype=np.int32),
        }
        # As bytes: tf.Example has no float16, and its float lists are slow to parse.
        | {
            name: tfds.features.Tensor(
                shape=tuple(described["shape"]),
                dtype=np.dtype(described["dtype"]),
                encoding="bytes",
            )
            for name, described in arrays.items()
        }
    )
    identity = DatasetIdentity(
        name=NAME,
        version=tfds.core.Version(f"{FORMAT}.0.0"),
        data_dir=os.fspath(folder),
        module_name="",
    )
    info = tfds.core.DatasetInfo(
        builder=identity, description="Encoded preference pairs.", features=features
    )
    size = sum(math.prod(d["shape"]) * np.dtype(d["dtype"]).itemsize for d in arrays.values())
    return tfds.core.SequentialWriter(
        info, max_examples_per_shard=max(1, SHARD_BYTES // size), file_format="array_record"
    )


def _checked_pair(
    pair: EncodedPair, shapes: dict[str, Any], prompts: int, imaged: bool
) -> EncodedPair:
    """The pair with index 0 chosen and the stored dtypes, or a ValueError naming it."""
    what = f"pair {pair.id!r}"
    if not 0 <= pair.preference <= 1:  # also refuses nan
        raise ValueError(f"{what}: preference must lie in [0, 1], but got {pair.preference}")
    if not 0 <= pair.prompt < prompts:
        raise ValueError(f"{what}: prompt must lie in [0, {prompts}), but got {pair.prompt}")
    _check_arrays(what, pair, shapes, imaged)
    if pair.sizes.shape != (2, 6) or pair.sizes.dtype.kind not in "iu":
        raise ValueError(f"{what}: sizes should be integers [2, 6], but got {pair.sizes!r}")
    return pair._replace(
        prompt=int(pair.prompt),
        preference=float(pair.preference),
        sizes=pair.sizes.astype(np.int32),
    ).swap_to_chosen()


def _check_arrays(what: str, pair: EncodedPair, shapes: dict[str, Any], imaged: bool) -> None:
    got, shape = _shapes(pair), pair.moments.shape
    legal = len(shape) == 4 and shape[0] == 2 and shape[3] % 2 == 0
    if got["moments"] != shapes["moments"] or not legal:
        raise ValueError(
            f"{what}: moments should be [2, h, w, 2C], {shapes['moments']}, but got "
            f"{got['moments']}"
        )
    _check_floats(f"{what}: moments", pair.moments)
    if imaged != (pair.image is not None):
        needed = "should have an image, as meta's image_kind says" if imaged else "has an image"
        said = "none" if imaged else "no image_kind in meta: name it"
        raise ValueError(f"{what} {needed}, but got {said}")
    if pair.image is not None:
        legal = pair.image.ndim == 3 and pair.image.shape[:2] == shape[1:3]
        if got["image"] != shapes["image"] or not legal:
            raise ValueError(
                f"{what}: image should be [h, w, E], {shapes['image']}, h and w as of the moments "
                f"{list(shape)}, but got {got['image']}"
            )
        _check_floats(f"{what}: image", pair.image)


def _check_floats(what: str, array: np.ndarray) -> None:
    if array.dtype.name not in DTYPES:
        raise ValueError(f"{what} should be one of {DTYPES}, but got {array.dtype.name}")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} is not finite")


def _described(array: np.ndarray) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": array.dtype.name}


def _clear(folder: epath.Path) -> None:
    """Makes the folder, removes what an unfinished write left, keeps what is not ours."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _load_meta(folder)
    except NotWholeError:
        pass
    else:
        raise ValueError(f"{folder} already holds encoded pairs: delete it or choose another")
    (folder / MARKER).unlink(missing_ok=True)
    for path in folder.iterdir():
        if OURS.fullmatch(path.name):
            path.unlink()


def _is_remote(folder: epath.Path) -> bool:
    return "://" in os.fspath(folder)


@contextlib.contextmanager
def _local_copy_of(folder: epath.Path) -> Iterator[epath.Path]:
    """Where to write: ArrayRecord writes local files only."""
    if not _is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as local:
        yield epath.Path(local)


def _staged(folder: epath.Path, files: Mapping[str, int]) -> epath.Path:
    """A local copy, kept between runs; files that are already there are not copied again."""
    key = hashlib.sha256(json.dumps([os.fspath(folder), files]).encode()).hexdigest()[:16]
    local = epath.Path(tempfile.gettempdir()) / f"dmpo_jax-{NAME}-{key}"
    local.mkdir(parents=True, exist_ok=True)
    for name, size in files.items():
        target = local / name
        if target.exists() and target.stat().length == size:
            continue
        # Under a name of its own until whole: processes of one machine stage at once.
        partial = (folder / name).copy(local / f"{name}.{os.getpid()}", overwrite=True)
        partial.replace(target)
    return local
