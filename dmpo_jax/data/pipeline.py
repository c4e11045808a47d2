"""From encoded pairs to this process's share of every batch.

Element i of the endless shuffled data is a function of (seed, i), and row r of global
batch s is element s * B + r, whichever process holds it. So the position in the data is
the step, resuming is O(1), and the batches do not depend on how many processes read them.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Float

from dmpo_jax.data.records import EncodedPairs
from dmpo_jax.types import Conditioning, PairBatch

CACHED_PROMPTS = 512  # 160 MB at SDXL's [77, 2048] in float16
LAST_STEP = 2**40  # stands for "endless" where Grain wants a length


class Batches:
    """Batch s of the endless data, as a function of s alone: `batches[s]`.

    Args:
        pairs: what `records.open_pairs` returns.
        split: name of the split.
        global_batch: B, rows over all processes.
        rows: the global rows that this process holds, in this order (`mesh.local_rows`).
        seed: of order and dropout, in [0, 2**32).
        prompt_dropout: the probability that a pair is given the empty prompt, prompt 0. Where
            the pairs have images to edit, it is the image's too: half of each come together,
            so that p = prompt_dropout / 2 of the pairs lose the prompt alone, p the image
            alone and p both, as InstructPix2Pix does with p = 0.05 (arXiv 2211.09800). A
            dropped image is zeros. What is to be inpainted is never dropped.
        shuffle: a fresh order each epoch; otherwise the stored order, again and again.

    Raises:
        ValueError: if rows are repeated or outside [0, B), or the dropout outside [0, 1] (with
            images to edit, above 2/3).
    """

    def __init__(
        self,
        pairs: EncodedPairs,
        split: str,
        *,
        global_batch: int,
        rows: Sequence[int] | np.ndarray,
        seed: int,
        prompt_dropout: float = 0.0,
        shuffle: bool = True,
    ):
        if not 0 <= prompt_dropout <= 1:
            raise ValueError(f"prompt_dropout must lie in [0, 1], but got {prompt_dropout}")
        self._drops_images = pairs.meta["image_kind"] == "edit"
        if self._drops_images and prompt_dropout > 2 / 3:
            raise ValueError(
                "prompt_dropout must be at most 2/3 for pairs with images to edit, of which it "
                f"drops half as many again, but got {prompt_dropout}"
            )
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32), but got {seed}")
        self._rows = _checked_rows(rows, global_batch)
        self._global_batch = global_batch
        self._seed = seed
        self._prompt_dropout = prompt_dropout
        self._reader = _Reader(pairs, split)
        order = grain.MapDataset.range(len(self._reader)).seed(seed)
        # Element numbers are shuffled, not records: Grain then knows no file.
        self._order = (order.shuffle() if shuffle else order).repeat()

    def __getitem__(self, step: int) -> PairBatch:
        """This process's rows of batch `step`, in the order of `rows`."""
        elements = [step * self._global_batch + r for r in self._rows]
        records: list[Any] = [self._order[i] for i in elements]
        return self._reader.batch(records, [self._drops(i) for i in elements])

    def _drops(self, element: int) -> tuple[bool, bool]:
        """Whether the element loses its prompt, and its image."""
        # Philox is a counter-based generator: a fresh stream for every (seed, element).
        key = np.array([self._seed, element], np.uint64)
        drawn = np.random.Generator(np.random.Philox(key=key)).random()
        # One draw for both: prompt alone below p, both below 2p, image alone below 3p.
        p = self._prompt_dropout / 2
        return drawn < self._prompt_dropout, self._drops_images and p <= drawn < 3 * p


def make_batches(
    pairs: EncodedPairs,
    split: str,
    *,
    global_batch: int,
    rows: Sequence[int] | np.ndarray,
    seed: int,
    start_step: int = 0,
    prompt_dropout: float = 0.0,
    shuffle: bool = True,
    num_threads: int = 4,
    prefetch: int = 4,
) -> Iterator[PairBatch]:
    """`Batches` from start_step on, without end, read ahead in threads.

    Args:
        start_step: the first batch, reached in O(1).
        num_threads: batches read at once; 0 reads in the caller's thread.
        prefetch: batches held ready.
        others: see `Batches`.

    Returns:
        An iterator of numpy PairBatches, dtypes as stored: moments `[len(rows), 2, h, w, 2C]`.
        pooled and time_ids (float32) are None unless the prompts carry pooled embeddings, and
        image `[len(rows), h, w, E]` unless the pairs do.
    """
    batches = Batches(
        pairs,
        split,
        global_batch=global_batch,
        rows=rows,
        seed=seed,
        prompt_dropout=prompt_dropout,
        shuffle=shuffle,
    )
    steps = grain.MapDataset.range(start_step, LAST_STEP).map(batches.__getitem__)
    return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads, prefetch)))


def make_epoch(
    pairs: EncodedPairs, split: str, *, global_batch: int, rows: Sequence[int] | np.ndarray
) -> Iterator[tuple[PairBatch, Float[np.ndarray, "B"]]]:
    """One pass in stored order, each pair once, for validation.

    Yields:
        (batch, weights): weights float32, 1 for a pair and 0 for the padding that fills
        the last batch, so that every process makes the same number of equal steps.
    """
    rows = _checked_rows(rows, global_batch)
    reader = _Reader(pairs, split)

    def batches() -> Iterator[tuple[PairBatch, np.ndarray]]:
        for start in range(0, len(reader), global_batch):
            elements = [start + r for r in rows]
            weights = np.array([i < len(reader) for i in elements], np.float32)
            records = [i if i < len(reader) else 0 for i in elements]
            yield reader.batch(records, [(False, False)] * len(rows)), weights

    return batches()  # rows are checked now, not at the first batch


class _Reader:
    """Stacks records and their prompts into batches."""

    def __init__(self, pairs: EncodedPairs, split: str):
        self._source = pairs.split(split)
        # Prompts recur (the empty one above all): a bounded cache, shared by the threads.
        self._prompt = functools.lru_cache(maxsize=CACHED_PROMPTS)(pairs.prompts.__getitem__)

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, records: Sequence[int], dropped: Sequence[tuple[bool, bool]]) -> PairBatch:
        """The records in the order given.

        dropped: (prompt, image), whether a record gets prompt 0, and zeros, for its own.
        """
        pairs = [self._source[i] for i in records]
        prompts = [
            self._prompt(0 if drop else pair.prompt)
            for pair, (drop, _) in zip(pairs, dropped, strict=True)
        ]
        pooled: Any = [prompt.pooled for prompt in prompts]
        time_ids: Any = None
        if pooled[0] is None:  # the store holds pooled embeddings for all prompts or none
            pooled = None
        else:
            pooled = np.stack(pooled)
            time_ids = np.stack([pair.sizes for pair in pairs]).astype(np.float32)
        context: Any = np.stack([prompt.context for prompt in prompts])
        image: Any = None
        if pairs[0].image is not None:  # as with pooled
            images: list[Any] = [pair.image for pair in pairs]
            image = np.stack(
                [
                    np.zeros_like(x) if drop else x
                    for x, (_, drop) in zip(images, dropped, strict=True)
                ]
            )
        moments: Any = np.stack([pair.moments for pair in pairs])
        preference: Any = np.array([pair.preference for pair in pairs], np.float32)
        conditioning = Conditioning(context, pooled, time_ids, image)
        return PairBatch(moments, preference, conditioning)


def _checked_rows(rows: Sequence[int] | np.ndarray, global_batch: int) -> list[int]:
    rows = [int(r) for r in rows]
    if not rows or len(set(rows)) < len(rows) or min(rows) < 0 or max(rows) >= global_batch:
        raise ValueError(
            f"rows must be distinct, at least one, in [0, {global_batch}), but got {rows}"
        )
    return rows
