"""Several folders of encoded pairs, mixed by weight for training."""

import collections
import dataclasses
from collections.abc import Sequence

from dmpo_jax import storage
from dmpo_jax.data.batches.order import whole_parts
from dmpo_jax.data.encoded.meta import EncodedMeta, differences
from dmpo_jax.data.encoded.records import EncodedPairs, PromptStore, open_pairs
from dmpo_jax.errors import UserError

# Keys of encoded.json that must be equal in all sets, since the training step assumes them.
SAME = (
    "model",
    "vae",
    "content",
    "scaling_factor",
    "shift_factor",
    "image_kind",
    "moments",
    "pack",
    "told_sizes",
)
SAME_ARRAYS = ("moments", "context", "pooled", "length", "image")


class Mixture:
    """Open folders that one model can be trained on.

    sets: the folders. weights: of the elements, in any unit. meta: of the first set, with the
    counts of all sets summed. prompts: of the first set.

    Raises:
        ValueError: there is no set; a weight is missing, or not above 0; or the sets were encoded
            for different models or in different shapes; names the differences.
    """

    def __init__(self, sets: Sequence[EncodedPairs], weights: Sequence[float | int]):
        if not sets:
            raise UserError("a mixture needs at least one folder of encoded pairs, but got none")
        if len(weights) != len(sets):
            raise UserError(f"{len(sets)} folders need as many weights, but got {list(weights)}")
        whole_parts(weights)  # raises on an invalid weight
        for number, pairs in enumerate(sets[1:], start=1):
            _check_alike(sets[0].meta, pairs.meta, number)
        self.sets, self.weights = tuple(sets), tuple(weights)
        counts: collections.Counter[str] = collections.Counter()
        for pairs in sets:
            counts.update(pairs.meta.counts)
        self.meta = dataclasses.replace(sets[0].meta, counts=dict(counts))

    @property
    def identity(self) -> str:
        """A hash of what training reads, and in which proportion."""
        names = [pairs.identity for pairs in self.sets]
        return storage.hash_json([names, list(self.weights)])

    @property
    def prompts(self) -> PromptStore:
        return self.sets[0].prompts

    def first_texts(self, count: int) -> list[str]:
        """Returns the first prompts of the first set (`EncodedPairs.first_texts`)."""
        return self.sets[0].first_texts(count)


def open_mixture(parts: Sequence[tuple[str, float]]) -> Mixture:
    """Opens a mixture of (folder, weight) each; raises as `open_pairs` and `Mixture`."""
    folders, weights = zip(*parts, strict=True)
    return Mixture([open_pairs(folder) for folder in folders], weights)


def _check_alike(first: EncodedMeta, other: EncodedMeta, number: int) -> None:
    mine, theirs = first.to_json(), other.to_json()
    differing = differences(
        {name: mine[name] for name in SAME}, {name: theirs[name] for name in SAME}
    )
    shapes, others = mine["shapes"], theirs["shapes"]
    differing |= {
        f"shape of {name}": (shapes[name], others[name])
        for name in SAME_ARRAYS
        if shapes[name] != others[name]
    }
    if differing:
        said = "; ".join(f"{name}: {a!r} and {b!r}" for name, (a, b) in differing.items())
        raise UserError(
            f"encoded pairs that are mixed must be made by one model at one size, but folders 0 "
            f"and {number} of the mixture differ ({said}): encode them alike"
        )
