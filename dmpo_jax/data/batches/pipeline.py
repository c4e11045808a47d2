"""Batches of encoded pairs: this process's share of every global batch.

Element i of the endless shuffled data is a function of (seed, i). Row r of global batch s is
element s * B + r, on any process. The step is therefore the position in the data: resuming is
O(1), and the batches do not depend on the number of processes.
"""

import concurrent.futures
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float

from dmpo_jax.data.batches.mixture import Mixture
from dmpo_jax.data.batches.order import Draws, Element, Order
from dmpo_jax.data.encoded.pair import OWN, uncropped_sizes
from dmpo_jax.data.encoded.records import EncodedPairs
from dmpo_jax.errors import UserError
from dmpo_jax.types import PairBatch

CACHED_PROMPTS = 512  # 160 MB at SDXL's [77, 2048] in float16
LAST_STEP = 2**40  # stands for "endless", as Grain requires a length


class Batches:
    """Random access to the batches of the endless data: `batches[s]` is a function of s alone.

    Args:
        pairs: from `open_pairs`, or several of them in a `Mixture`: each set then has its share
            of the elements, and its own epochs.
        split: name of the split.
        global_batch: B, rows over all processes.
        rows: the global rows that this process holds, in this order (`mesh.local_rows`).
        seed: of order, dropout and flips, in [0, 2**32).
        prompt_dropout: the probability that a pair gets the empty prompt, prompt 0. Images to
            edit are dropped with the same probability, half of the time together with the prompt.
            With p = prompt_dropout / 2, p of the pairs lose the prompt alone, p the image alone
            and p both, as in InstructPix2Pix with p = 0.05 (arXiv 2211.09800). A dropped image is
            zeros. Images to inpaint are never dropped.
        flip: half of the elements are the pair flipped horizontally, both images or neither.
        flip_each: then half of the images are, each by itself; not for pairs with given images.
        sizes: one of `pair.SIZES`, for `Condition.sizes`.
        num_threads: threads that read rows; 0 reads in the caller's thread.

    Raises:
        ValueError: rows are repeated or outside [0, B); the dropout is outside [0, 1] (with
            images to edit, above 2/3); the seed is outside [0, 2**32); or flips are requested
            but not stored.
    """

    def __init__(
        self,
        pairs: EncodedPairs | Mixture,
        split: str,
        *,
        global_batch: int,
        rows: Sequence[int] | np.ndarray,
        seed: int,
        prompt_dropout: float = 0.0,
        flip: bool = False,
        flip_each: bool = False,
        sizes: str = OWN,
        num_threads: int = 0,
    ):
        if not 0 <= prompt_dropout <= 1:
            raise UserError(f"prompt_dropout must lie in [0, 1], but got {prompt_dropout}")
        drops_images = pairs.meta.image_optional
        if drops_images and prompt_dropout > 2 / 3:
            raise UserError(
                "prompt_dropout must be at most 2/3 for pairs with images to edit, of which it "
                f"drops half as many again, but got {prompt_dropout}"
            )
        if not 0 <= seed < 2**32:
            raise UserError(f"seed must lie in [0, 2**32), but got {seed}")
        sets = _sets(pairs)
        if flip:
            _check_flipped(sets)
        self._rows = _checked_rows(rows, global_batch)
        self._global_batch = global_batch
        self._reader = _Reader(sets, split, num_threads, sizes)
        weights = pairs.weights if isinstance(pairs, Mixture) else [1]
        self._order = Order(self._reader.lengths, weights, seed=seed)
        self._draws = Draws(
            seed=seed,
            prompt_dropout=prompt_dropout,
            drops_images=drops_images,
            flip=flip,
            flip_each=flip_each,
        )

    def __getitem__(self, step: int) -> PairBatch:
        """Returns this process's rows of batch `step`, in the order of `rows`."""
        numbers = [step * self._global_batch + r for r in self._rows]
        return self._reader.batch([Element(*self._order[i], *self._draws(i)) for i in numbers])


def make_batches(
    pairs: EncodedPairs | Mixture,
    split: str,
    *,
    start_step: int = 0,
    num_threads: int = 4,
    prefetch: int = 4,
    **order: Any,
) -> Iterator[PairBatch]:
    """Returns an endless iterator over `Batches` from start_step on, read ahead in threads.

    Args:
        start_step: the first batch, reached in O(1).
        num_threads: threads that read rows; 0 reads in the caller's thread, without read-ahead.
        prefetch: number of batches held ready.
        order: the other arguments of `Batches`.

    Returns:
        An iterator of NumPy PairBatches, dtypes as stored. Moments are `[len(rows), 2, h, w, 2C]`,
        or C if only means are stored; the condition's arrays are those of `EncodedMeta.map_batch`.
    """
    batches = Batches(pairs, split, num_threads=num_threads, **order)
    steps = grain.MapDataset.range(start_step, LAST_STEP).map(batches.__getitem__)
    # The pool's threads read rows; Grain's threads keep the pool busy between batches.
    ahead = min(2, prefetch) if num_threads else 0
    return iter(steps.to_iter_dataset(grain.ReadOptions(ahead, prefetch if ahead else 0)))


def make_epoch(
    pairs: EncodedPairs | Mixture,
    split: str,
    *,
    global_batch: int,
    rows: Sequence[int] | np.ndarray,
    sizes: str = OWN,
) -> Iterator[tuple[PairBatch, Float[np.ndarray, " B"]]]:
    """Returns one pass in stored order, each pair once, for validation.

    The sets of a mixture follow one another, whatever their weights; sets without the split are
    ignored.

    Yields:
        (batch, weights): weights float32, 1 for a pair and 0 for padding. Padding fills the last
        batch, so that every process runs the same number of equal steps.
    """
    rows = _checked_rows(rows, global_batch)
    sets = _sets(pairs)
    if isinstance(pairs, Mixture):
        sets = [one for one in sets if split in one.meta.counts]
    reader = _Reader(sets, split, sizes=sizes)
    places = [Element(s, i) for s, length in enumerate(reader.lengths) for i in range(length)]

    def batches() -> Iterator[tuple[PairBatch, np.ndarray]]:
        for start in range(0, len(places), global_batch):
            numbers = [start + r for r in rows]
            weights = np.array([i < len(places) for i in numbers], np.float32)
            batch = reader.batch([places[i if i < len(places) else 0] for i in numbers])
            yield batch, weights

    return batches()  # rows are checked now, not at the first batch


class _Reader:
    """Fills batches with the pairs and prompts of data sets of equal shapes."""

    def __init__(
        self, sets: Sequence[EncodedPairs], split: str, num_threads: int = 0, sizes: str = OWN
    ):
        self._sources = [pairs.split(split) for pairs in sets]
        self.lengths = [len(source) for source in self._sources]
        # Prompts recur, the empty one most of all: a bounded cache, shared by the threads.
        cached = functools.lru_cache(maxsize=max(CACHED_PROMPTS // len(sets), 1))
        self._prompts = [cached(pairs.prompts.__getitem__) for pairs in sets]
        self._empty = sets[0].meta.empty
        self._own_sizes = sizes == OWN
        self._num_threads = num_threads
        self._pool = concurrent.futures.ThreadPoolExecutor(num_threads) if num_threads else None

    def batch(self, elements: Sequence[Element]) -> PairBatch:
        """Returns a batch of the elements, in the order given."""
        batch = self._empty(len(elements))
        rows, parts = range(len(elements)), min(self._num_threads, len(elements))
        fill = functools.partial(self._fill_rows, batch, elements)
        if self._pool is None:
            fill(rows)
        else:
            for _ in self._pool.map(fill, [rows[part::parts] for part in range(parts)]):
                pass  # raises the threads' errors
        return batch

    def _fill_rows(self, batch: PairBatch, elements: Sequence[Element], rows: range) -> None:
        for row in rows:
            self._fill(batch, row, elements[row])

    def _fill(self, batch: PairBatch, row: int, element: Element) -> None:
        # Each record is copied and freed before the next is read. Its memory is then reused while
        # still in the CPU cache; the kernel would have to clear memory for a batch of records.
        pair = self._sources[element.source][element.record]
        if element.flips_chosen or element.flips_rejected:
            pair = pair.flip((element.flips_chosen, element.flips_rejected))
        prompt = self._prompts[element.source](0 if element.drops_prompt else pair.prompt)
        arrays: Any = batch
        arrays.moments[row] = pair.moments
        arrays.preference[row] = pair.preference
        told = arrays.condition
        told.context[row] = prompt.context
        if told.pooled is not None:
            told.pooled[row] = prompt.pooled
        if told.lengths is not None:
            told.lengths[row] = prompt.length
        if told.sizes is not None:
            told.sizes[row] = pair.sizes if self._own_sizes else uncropped_sizes(pair.sizes)
        if told.image is not None:
            told.image[row] = 0 if element.drops_image else pair.image


def _sets(pairs: EncodedPairs | Mixture) -> Sequence[EncodedPairs]:
    return pairs.sets if isinstance(pairs, Mixture) else [pairs]


def _check_flipped(sets: Sequence[EncodedPairs]) -> None:
    for number, pairs in enumerate(sets):
        which = f"folder {number} of the mixture" if len(sets) > 1 else "the folder"
        if not pairs.meta.flipped:
            raise UserError(
                f"flips were asked for, but {which} of encoded pairs does not hold them: encode "
                "with flips, or train without"
            )


def _checked_rows(rows: Sequence[int] | np.ndarray, global_batch: int) -> list[int]:
    rows = [int(r) for r in rows]
    if not rows or len(set(rows)) < len(rows) or min(rows) < 0 or max(rows) >= global_batch:
        raise ValueError(
            f"rows must be distinct, at least one, in [0, {global_batch}), but got {rows}"
        )
    return rows
