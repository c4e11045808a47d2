"""Encoded pairs on disk: the schema, its writer and its reader.

A folder holds

    encoded_pairs-SPLIT.array_record-NNNNN  the pairs, with dataset_info.json and
                            features.json: a TFDS dataset, so that
                            `tfds.builder_from_directory(folder)` opens it too
    prompts.array_record-NNNNN  the embeddings of each prompt (`prompt_store`)
    encoded.json            the encode's settings and model, and every file's size

`encoded.json` is written last. If it or another file is missing or truncated, the folder is
incomplete and is not opened: ArrayRecord reads a truncated file as empty, without an error.
"""

import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.splits import SplitDict

from dmpo_jax import storage
from dmpo_jax.data.encoded import prompt_store
from dmpo_jax.data.encoded.examples import read_example
from dmpo_jax.data.encoded.meta import FORMAT, MARKER, REQUIRED, Arrays, EncodedMeta
from dmpo_jax.data.encoded.pair import (
    ARRAYS,
    EncodedPair,
    make_features,
)
from dmpo_jax.data.encoded.prompt_store import PromptStore
from dmpo_jax.data.encoded.shards import Shard, read_record
from dmpo_jax.data.tfds_folder import open_builder
from dmpo_jax.errors import MissingFileError, UserError

FEATURES = "features.json"
NAME = "encoded_pairs"
SPLITS = ("train", "validation")
# Keys of encoded.json that the writer fills in.
WRITTEN_META = {
    "format",
    "counts",
    "shapes",
    "prompt_shards",
    "files",
    "hashes",
    "flipped",
}
OURS = re.compile(
    rf"({NAME}-.*\.array_record-\d+|{prompt_store.FILE.pattern})({re.escape(storage.PART)})?"
    r"|(dataset_info|features)\.json"
)


class IncompleteError(UserError):
    """An incomplete folder: the encode, or the copy of the folder, did not finish."""


def shard_name(split: str, k: int) -> str:
    """Returns the name of a split's k-th file."""
    return f"{NAME}-{split}.array_record-{k:05d}"


def finish(
    folder: epath.Path,
    meta: Mapping[str, Any],
    splits: Mapping[str, Sequence[Shard]],
    prompts: Sequence[Shard],
    shapes: Mapping[str, Any],
) -> None:
    """Writes the TFDS metadata of existing files and, last, encoded.json.

    Args:
        meta: for encoded.json, JSON-serialisable. Requires `model` (its identity) and
            `scaling_factor` (of the VAE). Set `image_kind` if the pairs have images, and `moments`
            to "mean" if only means are stored. Counts, shapes and dtypes are added.
        splits: the files of each split, `shard_name(split, k)` for k from 0 on.
        prompts: the files of the prompt store.
        shapes: of the pairs' arrays, and of the prompts' `context` and `pooled`.
    """
    _check_meta(meta)
    _write_info(folder, splits, shapes)
    written = [*prompts, *itertools.chain.from_iterable(splits.values())]
    files = {shard.name: shard.size for shard in written}
    files |= {name: (folder / name).stat().length for name in ("dataset_info.json", FEATURES)}
    counts = {split: sum(s.records for s in of_split) for split, of_split in splits.items()}
    added = {
        "format": FORMAT,
        "counts": {"prompts": sum(shard.records for shard in prompts), **counts},
        "shapes": shapes,
        "prompt_shards": [shard.records for shard in prompts],
        "files": files,
        "hashes": {shard.name: shard.sha256 for shard in written},
    }
    EncodedMeta.from_json({**meta, **added}).save(folder)


def _check_meta(meta: Mapping[str, Any]) -> None:
    if missing := set(REQUIRED) - set(meta):
        raise UserError(f"meta needs {REQUIRED}, but {sorted(missing)} is missing")
    if reserved := WRITTEN_META & set(meta):
        raise UserError(f"meta may not set {sorted(reserved)}: the writer adds them")
    json.dumps(dict(meta))  # raises if it is not JSON-serialisable


def _write_info(
    folder: epath.Path, splits: Mapping[str, Sequence[Shard]], shapes: Mapping[str, Any]
) -> None:
    """Writes dataset_info.json and features.json."""
    with storage.local_folder(folder) as local:
        identity = DatasetIdentity(
            name=NAME,
            version=tfds.core.Version(f"{FORMAT}.0.0"),
            data_dir=os.fspath(local),
            module_name="",
        )
        info = tfds.core.DatasetInfo(
            builder=identity,
            description="Encoded preference pairs.",
            features=make_features(shapes),
        )
        info.set_file_format("array_record")
        info.set_splits(
            SplitDict(
                [
                    tfds.core.SplitInfo(
                        name=split,
                        shard_lengths=[shard.records for shard in of_split],
                        num_bytes=sum(shard.record_bytes for shard in of_split),
                        filename_template=tfds.core.ShardedFileTemplate(
                            data_dir=local,
                            dataset_name=NAME,
                            split=split,
                            filetype_suffix="array_record",
                            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
                        ),
                    )
                    for split, of_split in sorted(splits.items())
                ]
            )
        )
        info.write_to_directory(os.fspath(local))


def clear(folder: epath.Path) -> None:
    """Makes the folder, or deletes the files of an unfinished write; keeps files that are not ours.

    Raises:
        ValueError: the folder holds complete encoded pairs, or pairs of another format.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        load_meta(folder)
    except IncompleteError:
        pass
    except ValueError as error:  # of another format, or not ours
        raise UserError(f"{folder} already holds encoded pairs: {error}") from error
    else:
        raise UserError(f"{folder} already holds encoded pairs: delete it or choose another")
    (folder / MARKER).unlink(missing_ok=True)
    for path in folder.iterdir():
        if OURS.fullmatch(path.name):
            path.unlink()


def open_pairs(folder: epath.PathLike) -> "EncodedPairs":
    """Opens a folder of encoded pairs; reads only the metadata.

    Local and gs:// folders are read in place. Others, which ArrayRecord cannot open, are first
    copied to the machine's temporary folder, once.

    Raises:
        FileNotFoundError: the folder does not exist.
        IncompleteError: the folder is incomplete.
        ValueError: the folder has another format version.
    """
    folder = epath.Path(folder)
    meta = load_meta(folder)
    if storage.is_remote(folder) and not os.fspath(folder).startswith("gs://"):
        folder = storage.stage(folder, meta.files, NAME, _content(folder, meta))
    return EncodedPairs(folder, meta)


def _content(folder: epath.Path, meta: EncodedMeta) -> str:
    """Returns a hash of a folder's content; of samples where encoded.json has no hashes."""
    if meta.hashes:
        return storage.hash_json(meta.to_json())
    return storage.hash_json({name: storage.sample_file(folder / name) for name in meta.files})


def load_meta(folder: epath.PathLike) -> EncodedMeta:
    """Returns the metadata of a complete folder; raises as `open_pairs`."""
    folder = epath.Path(folder)
    if not folder.exists():
        raise MissingFileError(f"no encoded pairs at {folder}: run encode first")
    unfinished = f"{folder} is not complete: encoding did not finish: run encode again"
    meta = EncodedMeta.load(folder)
    if meta is None:
        raise IncompleteError(f"{unfinished} ({MARKER} is missing or cut short)")
    if name := storage.first_incomplete(folder, meta.files):
        raise IncompleteError(f"{unfinished}, or copy it again ({name} is not all there)")
    return meta


class EncodedPairs:
    """An open folder of encoded pairs.

    meta: its metadata. prompts: the store, `[j]` -> PromptEmbedding.
    """

    def __init__(self, folder: epath.Path, meta: EncodedMeta):
        self.meta = meta
        self.prompts = PromptStore(
            folder, meta.prompt_shards, total=meta.counts["prompts"], arrays=meta.arrays
        )
        self._builder = open_builder(folder)

    @property
    def identity(self) -> str:
        """A hash of what training reads."""
        return self.meta.identity

    def first_texts(self, count: int) -> list[str]:
        """Returns at most `count` prompts, from the first after the empty one on."""
        return [self.prompts[i].text for i in range(1, min(count + 1, len(self.prompts)))]

    def split(self, name: str) -> "PairSource":
        """Returns random access to the pairs of a split: len and `[i]` -> EncodedPair.

        Raises:
            ValueError: there is no such split.
        """
        if name not in self._builder.info.splits:
            names = sorted(self._builder.info.splits)
            raise UserError(f"there is no split {name!r}, only {names}")
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        source = self._builder.as_data_source(name, deserialize_method=raw)
        info = self._builder.info.splits[name]
        files = list(zip(info.filepaths, info.shard_lengths, strict=True))
        return PairSource(source, self.meta.arrays, files)


class PairSource:
    """Random access to the pairs of one split; nothing is kept in memory."""

    def __init__(self, source: Any, arrays: Arrays, files: Sequence[tuple[epath.PathLike, int]]):
        """source: records as bytes. arrays: specs of what they hold. files: of `read_record`."""
        self._source, self._arrays, self._files = source, arrays._asdict(), files

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> EncodedPair:
        record = read_record(self._source, i, self._files)
        values = read_example(record, self._arrays)
        return EncodedPair(
            id=values["id"].decode(),
            prompt=values["prompt"][0],
            preference=values["preference"][0],
            sizes=np.array(values["sizes"], np.int32).reshape(2, 6),
            **{name: values[name] for name in ARRAYS if name in values},
        )
