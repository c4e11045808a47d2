"""Several folders of encoded pairs, trained on together by weight."""

import collections
from collections.abc import Sequence
from typing import Any

from dmpo_jax.data.batches.order import whole_parts
from dmpo_jax.data.encoded.folder import EncodedPairs, PromptStore

# What the step takes for granted of every pair: entries of encoded.json, old folders' defaults.
SAME = {
    "model": None,
    "vae": "",
    "scaling_factor": None,
    "shift_factor": 0.0,
    "pack": 1,
    "told_sizes": None,
    "image_kind": "",
    "moments": "sample",
}


class Mixture:
    """Opened folders that one model can be trained on.

    sets: the folders. weights: of the elements, in any unit; in proportion to the sets'
    sizes, every pair equally often, where none are given. meta: the first's, with all
    sets' counts added up. prompts: the first's.

    Raises:
        ValueError: there is no set; a weight is missing, or not above 0; or the sets were
            encoded for different models, or differ in shapes, naming what differs.
    """

    def __init__(self, sets: Sequence[EncodedPairs], weights: Sequence[float | int] | None = None):
        if not sets:
            raise ValueError("a mixture needs at least one folder of encoded pairs, but got none")
        if weights is None:
            weights = [pairs.meta["counts"]["train"] for pairs in sets]
        if len(weights) != len(sets):
            raise ValueError(f"{len(sets)} folders need as many weights, but got {list(weights)}")
        whole_parts(weights)  # refuses what is no weight
        for number, pairs in enumerate(sets[1:], start=1):
            _check_alike(sets[0].meta, pairs.meta, number)
        self.sets, self.weights = tuple(sets), tuple(weights)
        counts: collections.Counter[str] = collections.Counter()
        for pairs in sets:
            counts.update(pairs.meta["counts"])
        self.meta: dict[str, Any] = {**sets[0].meta, "counts": dict(counts)}

    @property
    def prompts(self) -> PromptStore:
        return self.sets[0].prompts


def _check_alike(first: dict[str, Any], other: dict[str, Any], number: int) -> None:
    differing = {
        name: (first.get(name, default), other.get(name, default))
        for name, default in SAME.items()
        if first.get(name, default) != other.get(name, default)
    }
    shapes, others = first["shapes"], other["shapes"]
    differing |= {
        f"shape of {name}": (shapes.get(name), others.get(name))
        for name in ("moments", "context", "pooled", "length", "image")
        if shapes.get(name) != others.get(name)
    }
    if differing:
        said = "; ".join(f"{name}: {a!r} and {b!r}" for name, (a, b) in differing.items())
        raise ValueError(
            f"encoded pairs that are mixed must be made by one model at one size, but folders 0 "
            f"and {number} of the mixture differ ({said}): encode them alike"
        )
