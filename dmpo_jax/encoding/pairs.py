"""Encodes the raw pairs of each part and writes its files."""

import collections
import contextlib
import functools
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dmpo_jax import storage
from dmpo_jax.data import sources
from dmpo_jax.data.encoded import prompt_store, records
from dmpo_jax.data.encoded.pair import EncodedPair, PairSerializer, chosen_first
from dmpo_jax.data.encoded.shards import Shard, ShardWriter
from dmpo_jax.data.sources.bad_records import Tally
from dmpo_jax.encoding.given import Given
from dmpo_jax.encoding.parts import Part, Table, Work, found_sidecar, whole_sidecars
from dmpo_jax.encoding.pixels import Pixels, load_pixels
from dmpo_jax.encoding.threads import map_ahead
from dmpo_jax.encoding.vae import Device
from dmpo_jax.errors import UserError
from dmpo_jax.progress import Progress

LOG = logging.getLogger(__name__)
IN_FLIGHT = 2  # batches on the device or being written


def write_pairs(work: Work, table: Table, index: int, count: int) -> None:
    """Writes this process's parts: the files of each split, then the sidecar that describes them.

    Raises:
        TooManyBadError: more than the allowed share of this process's records are bad.
        ValueError: a prompt was not in the source when the prompts were listed.
    """
    own = work.parts[index::count]
    done = whole_sidecars(work, "pairs", [part.number for part in own])
    tally = sum_tallies(work, done.values())
    mine = [part for part in own if part.number not in done]
    settings = {name: work.about[name] for name in ("resolution", "crop")}
    settings["given"] = work.pipeline.family.given_fields
    read = functools.partial(_loaded, embedded=work.given, **settings)
    ahead = work.num_threads + IN_FLIGHT * work.batch_size
    with (
        contextlib.closing(
            map_ahead(read, _items(work.source, mine), threads=work.num_threads, ahead=ahead)
        ) as loaded,
        Device(
            work.pipeline,
            work.devices,
            batch_size=work.batch_size,
            moments=work.about["moments"],
            dtype=work.about["moments_dtype"],
            flip=work.flip,
        ) as device,
        Watch(work, device, table, own, mine) as watch,
        contextlib.closing(_Files(work, table, tally)) as files,
    ):
        pending: collections.deque[Any] = collections.deque()
        for batch in _batches(loaded, work.batch_size):
            future = device.submit(batch.pixels) if batch.pixels else None
            pending.append((batch, future))
            if len(pending) > IN_FLIGHT:
                watch.advance(files.add(*pending.popleft()))
        while pending:
            watch.advance(files.add(*pending.popleft()))


def finish(work: Work, table: Table) -> None:
    """Writes the metadata of all processes' files, encoded.json last.

    Raises:
        TooManyBadError: more than the allowed share of all records are bad.
        ValueError: a part is missing, or no pair is left to train on.
    """
    whole = [found_sidecar(work, "pairs", part.number) for part in work.parts]
    tally = sum_tallies(work, whole)
    splits: dict[str, list[Shard]] = {}
    for sidecar in whole:
        for split, shard in sidecar["files"].items():
            splits.setdefault(split, []).append(Shard(**shard))
    counts = {split: sum(shard.records for shard in files) for split, files in splits.items()}
    if not counts.get("train"):
        raise UserError(
            f"no pair of {work.about['source']} is left to train on; {counts.get('validation', 0)} "
            f"are for validation, and skipped were: {dict(tally.counts) or 'none'}"
        )
    if counts.get("validation") == 0:
        for shard in splits.pop("validation"):
            (work.out / shard.name).unlink(missing_ok=True)
    stored = [
        found_sidecar(work, "store", k)
        for k in range(-(-len(table.number) // prompt_store.PER_SHARD))
    ]
    shapes = _common([sidecar["shapes"] for sidecar in whole if sidecar["shapes"]])
    shapes |= _common([sidecar["shapes"] for sidecar in stored])
    about = {
        **work.about,
        "skipped": dict(tally.counts),
        "tied_pairs": tally.ties,
        "split_by": "prompt",
    }
    records.finish(
        work.out, about, splits, [Shard(**sidecar["files"]["store"]) for sidecar in stored], shapes
    )


def sum_tallies(work: Work, sidecars: Iterable[Any]) -> Tally:
    """Adds up the tallies of the parts; raises TooManyBadError above the limit of bad records."""
    tally = make_tally(work)
    for sidecar in sidecars:
        tally.merge(Tally.from_json(sidecar["tally"]))
    tally.check()
    return tally


def make_tally(work: Work) -> Tally:
    """Returns an empty tally, for a part or for the complete encode."""
    return Tally(limit=work.max_bad, total=sum(part.rows for part in work.parts))


class _Batch(NamedTuple):
    """Rows of one part. last: True for the last batch of the part."""

    part: Part
    pixels: list[Pixels]
    skipped: list[sources.Skipped]
    last: bool


def _items(source: Any, parts: Iterable[Part]) -> Iterator[tuple[Part, Any]]:
    """Yields (part, RawPair or Skipped) for every row, and (part, None) after a part's last."""
    for part in parts:
        for pair in itertools.chain.from_iterable(map(source.read, part.units)):
            yield part, pair
        yield part, None


def _loaded(
    item: tuple[Part, Any], resolution: int, given: Any, crop: Any, embedded: Given | None
) -> Any:
    """Loads a pair's pixels. embedded: the prompts that have an embedding; None: all."""
    part, pair = item
    if isinstance(pair, sources.RawPair) and embedded is not None and pair.prompt not in embedded:
        return part, sources.Skipped(pair.id, "no embedding", repr(pair.prompt[:40]))
    if isinstance(pair, sources.RawPair):
        pair = load_pixels(pair, given, resolution, crop)
    return part, pair


def _batches(loaded: Iterable[tuple[Part, Any]], size: int) -> Iterator[_Batch]:
    """Yields batches of up to `size` pairs, each of a single part.

    A part's output therefore does not depend on the process that encodes it.
    """
    pixels, skipped = [], []
    for part, row in loaded:
        if isinstance(row, Pixels):
            pixels.append(row)
        elif row is not None:
            skipped.append(row)
        if row is None or len(pixels) == size:
            yield _Batch(part, pixels, skipped, last=row is None)
            pixels, skipped = [], []


class _Files:
    """Writer of the files of one part at a time. `close` discards incomplete files.

    tally: of the parts done. Each part's tally is added to it, and checked, on completion.
    """

    def __init__(self, work: Work, table: Table, tally: Tally):
        self._work, self._table, self._whole_tally = work, table, tally
        self._splits = records.SPLITS if work.about["validation_fraction"] else records.SPLITS[:1]
        self._stack = contextlib.ExitStack()
        self._writers: dict[str, ShardWriter] = {}
        self._serialize: PairSerializer | None = None
        self._tally = make_tally(work)

    def close(self) -> None:
        self._stack.close()
        self._writers, self._serialize = {}, None

    def add(self, batch: _Batch, future: Any) -> int:
        """Writes a batch, and the sidecar after a part's last; returns the number of rows done."""
        work, number = self._work, batch.part.number
        if not self._writers:
            self._tally = make_tally(work)
            for split in self._splits:
                writer = ShardWriter(work.out, records.shard_name(split, number))
                self._writers[split] = self._stack.enter_context(writer)
        for skipped in batch.skipped:
            self._tally.skip(skipped)
        for pair, held_out in self._pairs(batch, future):
            self._serialize = self._serialize or self._make_serializer(pair)
            split = "validation" if held_out else "train"
            self._writers[split].write(self._serialize(chosen_first(pair)))
            self._tally.ok(pair.preference)
        if batch.last:
            shapes = self._serialize.shapes if self._serialize else None
            files = {split: writer.close()._asdict() for split, writer in self._writers.items()}
            units = [unit.name for unit in batch.part.units]
            about = {
                "units": units,
                "files": files,
                "shapes": shapes,
                "tally": self._tally.to_json(),
            }
            storage.write_json(work.sidecar("pairs", number), about)
            self.close()
            self._whole_tally.merge(self._tally)
            self._whole_tally.check()
        return len(batch.pixels) + len(batch.skipped)

    def _pairs(self, batch: _Batch, future: Any) -> Iterator[tuple[EncodedPair, bool]]:
        """Yields (pair, True if it is for validation)."""
        arrays = future.result() if future else ()
        for i, pixels in enumerate(batch.pixels):
            number = self._table.number.get(pixels.prompt)
            if number is None:
                raise UserError(
                    f"pair {pixels.id!r} has a prompt that was not there when the prompts were "
                    f"listed ({pixels.prompt[:40]!r}): encode data that does not change meanwhile"
                )
            rows: Any = [None if array is None else array[i] for array in arrays]
            moments, image, flipped, flipped_image = rows
            pair = EncodedPair(
                pixels.id,
                number,
                pixels.preference,
                moments,
                pixels.sizes,
                image,
                flipped,
                flipped_image,
            )
            yield pair, pixels.prompt in self._table.held_out

    def _make_serializer(self, first: EncodedPair) -> PairSerializer:
        return PairSerializer(
            first,
            prompts=len(self._table.number),
            imaged=bool(self._work.about["image_kind"]),
            moments=self._work.about["moments"],
        )


class Watch:
    """Logs the remaining work, the throughput after the first batches, and device idle time."""

    SPEED_AFTER = 4  # batches; the first of them compiles

    def __init__(
        self, work: Work, device: Device, table: Table, own: Sequence[Part], mine: Sequence[Part]
    ):
        total, self._left = (sum(part.rows for part in parts) for parts in (own, mine))
        self._device, self._batches, self._timed = device, 0, 0
        arrays = device.shapes(work.about["resolution"], work.pipeline.family.given_fields)
        held = [x.size * x.dtype.itemsize for x in arrays if x is not None]
        self._bytes = sum(held) // work.batch_size
        self._bytes *= 1 + work.flip
        LOG.info(
            "%d pairs, %d of them encoded before, %d prompts; %s to write, %s a pair, "
            "before compression",
            total,
            total - self._left,
            len(table.number),
            in_bytes(self._left * self._bytes),
            in_bytes(self._bytes),
        )
        self._progress = Progress(total, total - self._left, "encoding")

    def __enter__(self) -> "Watch":
        self._progress.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.close()
        if self._device.seconds and exception[0] is None:
            share = self._device.idle / self._device.seconds
            LOG.info("the devices waited for images %.1f %% of the time", 100 * share)

    def advance(self, pairs: int) -> None:
        """Counts the pairs of a batch, including skipped ones."""
        if not pairs:  # an empty last batch: the part ended with a full one
            return
        self._left -= pairs
        self._batches += 1
        if self._batches == 1:
            self._began = time.monotonic()
        else:
            self._timed += pairs
        self._progress.advance(pairs)
        if self._batches == self.SPEED_AFTER and self._timed:
            speed = self._timed / (time.monotonic() - self._began)
            if self._left / speed >= 60:
                LOG.info("%.1f pairs a second: %s to come", speed, in_time(self._left / speed))


def in_bytes(count: int) -> str:
    """Formats a number of bytes for people."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def in_time(seconds: float) -> str:
    """Formats a duration for people."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _common(shapes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the shapes that all files share; raises ValueError if two differ."""
    for other in shapes[1:]:
        if other != shapes[0]:
            raise ValueError(
                f"all files should hold arrays of the same shapes, but got {shapes[0]} and "
                f"{other}: delete the folder and encode again"
            )
    return dict(shapes[0])
