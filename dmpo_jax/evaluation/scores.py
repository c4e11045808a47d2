"""Image files -> every scorer's scores and the diversity of each prompt's images, in parts.

A part is a few prompts with all their images. `OUT/scores/MODEL/NAME/00000.json` keeps its values
with a hash of the scorer and the images, so that a killed job, or one with another scorer, scores
only what is missing. Memory holds the images of one part.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Float32, UInt8

from dmpo_jax import storage
from dmpo_jax.errors import UserError
from dmpo_jax.evaluation.statistics import diversity, pixel_features
from dmpo_jax.parallel import processes
from dmpo_jax.progress import Progress
from dmpo_jax.sampling.images import read_image
from dmpo_jax.scoring import Scorer

LOG = logging.getLogger(__name__)
SCORES = "scores"
IMAGES_A_PART = 32
DIVERSITY = "diversity"
READERS = 4  # threads that decode images


def score_model(
    out: epath.Path,
    name: str,
    files: Sequence[epath.Path],
    prompts: Sequence[str],
    scorers: Mapping[str, Scorer],
) -> dict[str, Float[np.ndarray, " _"]]:
    """Returns each scorer's scores of a model's images, and the diversity of each prompt's.

    Several processes (jax.distributed) score a share each; `out` is a folder that all see.

    Args:
        files: image i is of prompt `i % len(prompts)`.

    Returns:
        {scorer: [N], "diversity": [P]}; diversity is absent where prompts have one image.

    Raises:
        UserError: an image cannot be read, or a scorer fails on it, gives too few scores or one
            that is not finite; names the image. Finished parts stay.
    """
    work = _Work(out / SCORES / name, files, prompts, scorers)
    index, count = jax.process_index(), jax.process_count()
    missing = [part for part in work.parts[index::count] if work.unscored(part)]
    total = sum(len(work.images(part)) for part in missing)
    with (
        Progress(total, description=f"scoring {name}") as progress,
        ThreadPoolExecutor(READERS) as readers,
    ):
        for part in missing:
            wanted = work.unscored(part)
            held = list(readers.map(read_image, (files[i] for i in work.images(part))))
            for kind in wanted:
                work.write(kind, part, held)
            progress.advance(len(held))
    processes.barrier(f"scored {name}")
    return work.gather()


class _Work:
    def __init__(
        self,
        folder: epath.Path,
        files: Sequence[epath.Path],
        prompts: Sequence[str],
        scorers: Mapping[str, Scorer],
    ):
        self.folder, self.files, self.prompts, self.scorers = folder, files, prompts, scorers
        self.each = len(files) // len(prompts)
        size = max(1, IMAGES_A_PART // self.each)
        self.parts = [range(i, min(i + size, len(prompts))) for i in range(0, len(prompts), size)]
        self.kinds = [*scorers, *([DIVERSITY] if self.each > 1 else [])]
        # The first scorer with features of images gives distances; else pixels do.
        self.eyes = next((s for s in scorers.values() if hasattr(s, "features")), None)
        self._contents: dict[int, list[str]] = {}

    def images(self, part: range) -> list[int]:
        """Numbers of a part's images, prompt after prompt."""
        return [k * len(self.prompts) + p for p in part for k in range(self.each)]

    def path(self, kind: str, part: range) -> epath.Path:
        return self.folder / kind / f"{part.start:06}.json"

    def key(self, kind: str, part: range) -> str:
        """Hash of the scorer, the images and their prompts."""
        scorer = self.eyes if kind == DIVERSITY else self.scorers[kind]
        version = [scorer.name, scorer.version] if scorer else ["pixels"]
        if part.start not in self._contents:
            contents = [storage.sample_file(self.files[i]) for i in self.images(part)]
            self._contents = {part.start: contents}  # asked for one kind after another
        texts = [self.prompts[p] for p in part]
        return storage.hash_json([kind, version, self._contents[part.start], texts])

    def unscored(self, part: range) -> list[str]:
        """The kinds of values that are not on disk."""
        return [kind for kind in self.kinds if self._found(kind, part) is None]

    def _found(self, kind: str, part: range) -> list[float] | None:
        held = storage.find_json(self.path(kind, part))
        valid = isinstance(held, dict) and held.get("key") == self.key(kind, part)
        return held["values"] if valid else None

    def write(self, kind: str, part: range, images: Sequence[UInt8[np.ndarray, "H W 3"]]) -> None:
        if kind == DIVERSITY:
            numbers = np.repeat(np.arange(len(part)), self.each)
            values = diversity(self._features(images), numbers)
        else:
            values = self._score(kind, part, images)
        path = self.path(kind, part)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {"key": self.key(kind, part), "values": [float(x) for x in values]}
        storage.write_json(path, found)

    def _score(
        self, kind: str, part: range, images: Sequence[UInt8[np.ndarray, "H W 3"]]
    ) -> Float32[np.ndarray, " N"]:
        texts = [self.prompts[p] for p in part for _ in range(self.each)]
        files = [self.files[i] for i in self.images(part)]
        scores = np.empty(len(images), np.float32)
        for rows in _of_one_size(images):
            together = np.stack([images[i] for i in rows])
            where = files[rows[0]] if len(rows) == 1 else f"{files[rows[0]]} or one after it"
            try:
                found = np.asarray(self.scorers[kind](together, [texts[i] for i in rows]))
            except UserError:
                raise
            except Exception as error:  # a user's own scorer may raise anything
                raise UserError(
                    f"scorer {kind!r} failed at image {where}: {type(error).__name__}: {error}; "
                    "scores so far are kept"
                ) from error
            if found.shape != (len(rows),):
                raise UserError(
                    f"scorer {kind!r} should give {len(rows)} scores for as many images, from "
                    f"{where}, but gave an array of shape {found.shape}"
                )
            scores[rows] = found
        for i in np.flatnonzero(~np.isfinite(scores)):
            raise UserError(
                f"scorer {kind!r} gave the score {scores[i]} to image {files[i]} (prompt "
                f"{texts[i]!r:.200}), which is neither a win nor a loss: look at that image, or "
                "leave the scorer out of --judges"
            )
        return scores

    def _features(self, images: Sequence[Any]) -> Float[np.ndarray, "N D"]:
        look: Any = self.eyes.features if self.eyes else pixel_features  # pyright: ignore
        rows = _of_one_size(images)
        found = np.concatenate([look(np.stack([images[i] for i in part])) for part in rows])
        return found[np.argsort([i for part in rows for i in part])]

    def gather(self) -> dict[str, Float[np.ndarray, " _"]]:
        """Reads all parts: scores by image, diversity by prompt."""
        values = {kind: np.empty(len(self.files)) for kind in self.scorers}
        if self.each > 1:
            values[DIVERSITY] = np.empty(len(self.prompts))
        for part, (kind, into) in itertools.product(self.parts, values.items()):
            found = self._found(kind, part)
            if found is None:
                raise UserError(f"{self.path(kind, part)} is missing: is it a shared folder?")
            into[list(part) if kind == DIVERSITY else self.images(part)] = found
        return values


def _of_one_size(images: Sequence[np.ndarray]) -> list[list[int]]:
    """Groups the numbers of images by their size."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.shape, []).append(i)
    return list(groups.values())
