"""Groups sampled images in pairs."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def in_pairs(
    batches: Iterable[np.ndarray], prompts: Sequence[str]
) -> Iterator[tuple[np.ndarray, Sequence[str]]]:
    """Yields (images, their prompts) of complete pairs.

    The last image of an odd batch waits for the next batch.
    """
    first, left = 0, None
    for batch in batches:
        images = batch if left is None else np.concatenate([left, batch])
        even = len(images) // 2 * 2
        left = images[even:]
        if even:
            yield images[:even], prompts[first : first + even]
        first += even
