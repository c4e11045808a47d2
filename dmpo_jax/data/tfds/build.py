"""Writes parts of a source as shards of a TFDS dataset, and merges the workers' reports.

Every function depends only on its arguments and the source. One process and any number of
Beam workers therefore write the same bytes.
"""

import contextlib
import functools
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from dmpo_jax.data import sources
from dmpo_jax.data.encoded.shards import ShardWriter
from dmpo_jax.data.sources.bad_records import Tally, decode_pair
from dmpo_jax.data.sources.counts import PairCounts
from dmpo_jax.data.sources.splits import is_held_out

LOG = logging.getLogger(__name__)
SPLITS = ("train", "validation")


class Job(NamedTuple):
    """Settings that every worker receives: the source, its split and the output.

    validation_fraction: of the prompts. max_bad: largest share of the rows that may be bad.
    allow_outside: also read images outside the folder of the table that names them.
    folder: for the shards; any path that all workers reach.
    """

    source: str
    ties: str
    validation_fraction: float | int
    max_bad: float | int
    allow_outside: bool
    folder: str


class Shard(NamedTuple):
    """One worker's part: units of the source, and the file of each split."""

    units: tuple[sources.Unit, ...]
    files: dict[str, str]


class Report(NamedTuple):
    """Result of writing a shard.

    counts: pairs by split. sizes: bytes of records by split. tally: good and bad rows.
    """

    counts: dict[str, PairCounts]
    sizes: dict[str, int]
    tally: Tally


def make_features() -> tfds.features.FeaturesDict:
    """Returns the TFDS features of a pair, with images as bytes.

    `tfds.features.Image` without TensorFlow decodes to the file's own mode (palette, CMYK).
    `sources.decode_image` converts every mode to RGB.
    """

    def encoded(doc: str, *, optional: bool = False) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=(), dtype=np.object_, doc=doc, optional=optional)

    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(doc="of the pair in its source"),
            "prompt": tfds.features.Text(),
            "image_0": encoded("the first image, encoded"),
            "image_1": encoded("the second image, encoded"),
            "preference": tfds.features.Scalar(
                np.float32, doc="probability, in [0, 1], that image_0 is preferred; 0.5 is a tie"
            ),
            "source": encoded("the image that both edit or repaint, encoded", optional=True),
            "mask": encoded("white where the source is repainted, encoded", optional=True),
        }
    )


def to_example(pair: sources.RawPair) -> dict[str, Any]:
    """Returns the features of a pair."""
    image_0, image_1 = pair.images
    return {
        "id": pair.id,
        "prompt": pair.prompt,
        "image_0": image_0,
        "image_1": image_1,
        "preference": pair.preference,
        "source": pair.source,
        "mask": pair.mask,
    }


def serialize(pair: sources.RawPair) -> bytes:
    """Returns a pair's record, always the same bytes for the same pair.

    The order of the fields in `features.serialize_example` depends on the process's seed.
    """
    features, serializer = _serializer()
    example = serializer.get_tf_example(features.encode_example(to_example(pair)))
    return example.SerializeToString(deterministic=True)


@functools.lru_cache(maxsize=1)
def open_source(job: Job) -> sources.Source:
    """Opens the job's source once a process: opening lists files and may read their schemas."""
    return sources.open_source(job.source, ties=job.ties, allow_outside=job.allow_outside)


def count_rows(job: Job) -> int:
    """Returns an upper bound on the pairs of the job's source."""
    return len(open_source(job))


def plan_shards(units: Sequence[sources.Unit], shard_pairs: int) -> list[list[sources.Unit]]:
    """Groups consecutive units into shards of up to `shard_pairs` rows.

    No unit is split; a larger unit is a shard of its own.

    Raises:
        ValueError: there is no unit, or `shard_pairs` is below 1.
    """
    if not units or shard_pairs < 1:
        raise ValueError(
            f"a source of at least one part and shards of at least one row are needed, but got "
            f"{len(units)} and {shard_pairs}"
        )
    planned: list[list[sources.Unit]] = []
    rows = 0
    for unit in units:
        rows += unit.stop - unit.start
        if not planned or rows > shard_pairs:
            planned.append([])
            rows = unit.stop - unit.start
        planned[-1].append(unit)
    return planned


def write_shard(job: Job, shard: Shard) -> None:
    """Writes each file of a shard atomically, then its report beside them.

    A split without pairs gets no file. Idempotent: a second call writes the same bytes.

    Raises:
        TooManyBadError: this shard alone has more bad rows than the entire source may have.
    """
    source = open_source(job)
    tally = Tally(job.max_bad, total=count_rows(job))
    counts = {split: PairCounts() for split in SPLITS}
    with contextlib.ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for pair, record, shapes in _good_pairs(source, shard.units, tally):
            split = SPLITS[is_held_out(pair.prompt, job.validation_fraction)]
            if split not in writers:
                writer = ShardWriter(job.folder, shard.files[split])
                writers[split] = stack.enter_context(writer)
            writers[split].write(record)
            counts[split].add(pair.prompt, pair.preference, shapes)
        sizes = {split: writer.close().record_bytes for split, writer in writers.items()}
    report = {
        "counts": {split: count.to_json() for split, count in counts.items()},
        "sizes": {split: sizes.get(split, 0) for split in SPLITS},
        "tally": tally.to_json(),
    }
    _report_path(job, shard).write_text(json.dumps(report))


def take_report(job: Job, shard: Shard) -> Report:
    """Reads and deletes the report of `write_shard`."""
    path = _report_path(job, shard)
    stored = json.loads(path.read_text())
    path.unlink()
    return Report(
        {split: PairCounts.from_json(stored["counts"][split]) for split in SPLITS},
        stored["sizes"],
        Tally.from_json(stored["tally"]),
    )


def summarize(job: Job, reports: Sequence[Report]) -> dict[str, Any]:
    """Returns the content of statistics.json, merged over all shards.

    Raises:
        TooManyBadError: more rows are bad than `max_bad` allows.
        ValueError: there is no pair to train on.
    """
    tally = Tally(job.max_bad, total=count_rows(job))
    counts = {split: PairCounts() for split in SPLITS}
    for report in reports:
        tally.merge(report.tally)
        for split in SPLITS:
            counts[split].merge(report.counts[split])
    tally.check()
    if not counts["train"].pairs:
        prompts = len(counts["validation"].prompts)
        raise ValueError(
            f"{job.source} has no pair to train on: of its {prompts} prompts a "
            f"validation_fraction of {job.validation_fraction} holds out all: lower it"
            if prompts
            else f"{job.source} has no pair: all its rows were skipped ({dict(tally.counts)})"
        )
    if job.validation_fraction and not counts["validation"].pairs:
        LOG.warning("no prompt of %s falls into the validation split: there is none", job.source)
    return {
        "source": job.source,
        "given": sorted(open_source(job).given),
        "ties": job.ties,
        "validation_fraction": job.validation_fraction,
        "rows_at_most": count_rows(job),
        "splits": {split: c.summary() for split, c in counts.items() if c.pairs},
        "skipped": dict(sorted(tally.counts.items())),
    }


def _good_pairs(
    source: sources.Source, units: Sequence[sources.Unit], tally: Tally
) -> Iterator[tuple[sources.RawPair, bytes, list[tuple[int, int]]]]:
    """Yields (pair, record, its images' (height, width)) of each good pair; tallies every row."""
    for unit in units:
        for pair in source.read(unit):
            if isinstance(pair, sources.Skipped):
                tally.skip(pair)
                continue
            # A source or mask that is present must decode. A missing one is reported later.
            needs = frozenset(f for f in ("source", "mask") if getattr(pair, f) is not None)
            decoded = decode_pair(pair, needs)
            if isinstance(decoded, sources.Skipped):
                tally.skip(decoded)
                continue
            record = sources.guard(pair.id, functools.partial(serialize, pair))
            if isinstance(record, sources.Skipped):
                tally.skip(record)
                continue
            tally.ok(pair.preference)
            shapes = [(image.shape[0], image.shape[1]) for image in decoded.images]
            yield pair, record, shapes


@functools.cache
def _serializer() -> tuple[tfds.features.FeaturesDict, ExampleSerializer]:
    features = make_features()
    specs: Any = features.get_serialized_info()
    return features, ExampleSerializer(specs)


def _report_path(job: Job, shard: Shard) -> epath.Path:
    return epath.Path(job.folder) / f"{shard.files[SPLITS[0]]}.report.json"
