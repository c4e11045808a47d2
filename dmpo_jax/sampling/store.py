"""Draws images into a folder: in parts, resumable, shared between the processes of a run.

A part is a batch of the sampler. Its files are written atomically while the next one is drawn,
and a part is done when they exist: a killed job continues with the first missing part and ends
with the same bytes. `drawn.json` says what draws them; another drawing of the folder is refused.
Each process draws every count-th part on its own devices, so the number of processes changes
no byte.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8

from dmpo_jax import diffusers_io, storage
from dmpo_jax.data.encoded.meta import differences
from dmpo_jax.data.prompt_files import Prompt
from dmpo_jax.errors import UserError
from dmpo_jax.parallel import processes
from dmpo_jax.sampling.sampler import Sampler

LOG = logging.getLogger(__name__)
PLAN = "drawn.json"
_NAMED = ("sampler", "vae", "variant", "attention")  # settings that are told by what they lead to


@runtime_checkable
class Keeper(Protocol):
    """Keeps the images of a part in files of the folder."""

    def names(self, images: range) -> Sequence[str]:
        """Names of the files that keep these images, relative to the folder."""
        ...

    def write(self, numbers: range, images: UInt8[np.ndarray, "n H W 3"]) -> None:
        """Writes those files atomically, in a thread. numbers: of the images."""
        ...


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Images to draw: of each, its prompt and its seed.

    load: returns the model's parameters; called only if an image is missing.
    about: settings that determine the images, as `describe` returns them.
    """

    sampler: Sampler
    load: Callable[[], Any]
    prompts: Sequence[Prompt]
    seeds: Sequence[int]
    about: Mapping[str, Any]

    def plan(self) -> dict[str, Any]:
        """Returns the content of drawn.json."""
        return {
            **self.about,
            "count": len(self.prompts),
            "images": storage.hash_json([list(map(_content, self.prompts)), list(self.seeds)]),
        }

    def parts(self, even: bool) -> list[range]:
        """Returns the numbers of each part's images. even: an even number, but of the last."""
        size = self.sampler.batch_size * (2 if even and self.sampler.batch_size % 2 else 1)
        count = len(self.prompts)
        return [range(i, min(i + size, count)) for i in range(0, count, size)]


def describe(
    folder: epath.PathLike, sampler: Sampler, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns everything but prompts and seeds that determines the images of a model.

    settings: the other arguments of `open_sampler`.
    """
    path, variant = sampler.pipeline.folder, settings["variant"]
    scheduler = diffusers_io.read_json(path / "scheduler" / "scheduler_config.json")
    return {
        "weights": diffusers_io.digest_model(folder, variant),
        "encoders": diffusers_io.digest_encoders(folder, vae=settings["vae"], variant=variant),
        "sampler": sampler.name,
        "scheduler": {k: v for k, v in scheduler.items() if not k.startswith("_diffusers")},
        "zero_negative": sampler.pipeline.zero_negative,
        **{name: value for name, value in settings.items() if name not in _NAMED},
        "height": sampler.size[0],
        "width": sampler.size[1],
        "batch_size": sampler.batch_size,
        # Kernels round differently. None for plain: earlier versions had no other.
        "attention": None if sampler.attention == "plain" else sampler.attention,
    }


def _content(prompt: Prompt) -> dict[str, Any]:
    """Identity of a prompt; its files by their bytes, and neither its own seed nor its category."""
    files = {name: getattr(prompt, name) for name in ("image", "mask")}
    return {
        "text": prompt.text,
        "negative_prompt": prompt.negative_prompt,
        **{name: storage.sample_file(file) for name, file in files.items() if file},
    }


def draw(
    out: epath.Path, drawing: Drawing, keeper: Keeper, description: str, *, even: bool = False
) -> None:
    """Draws the images that `out` lacks; returns when every process has drawn its share.

    Args:
        out: folder; on several processes one that they all see.
        even: every part but the last has an even number of images.

    Raises:
        UserError: `out` holds images of another drawing, or files of those names that no drawing
            of ours explains. Before anything is drawn.
    """
    parts = drawing.parts(even)
    if jax.process_index() == 0:
        _begin(out, drawing.plan(), [name for part in parts for name in keeper.names(part)])
    processes.barrier(f"begun {out}")
    present = storage.list_names(out)
    own = parts[jax.process_index() :: jax.process_count()]
    missing = [part for part in own if not present.issuperset(keeper.names(part))]
    if missing:
        done = sum(map(len, own)) - sum(map(len, missing))
        if done:
            LOG.info("resuming %s: %d of %d images are drawn", out, done, sum(map(len, own)))
        _draw_parts(drawing, missing, keeper, description)
    processes.barrier(f"drawn {out}")


def _draw_parts(drawing: Drawing, parts: Sequence[range], keeper: Keeper, description: str) -> None:
    numbers = [i for part in parts for i in part]
    batches = drawing.sampler.batches(
        drawing.load(),
        [drawing.prompts[i] for i in numbers],
        [drawing.seeds[i] for i in numbers],
        description,
    )
    writing: Future[None] | None = None
    with ThreadPoolExecutor(1) as thread:
        for part in parts:
            images = next(batches)
            while len(images) < len(part):
                images = np.concatenate([images, next(batches)])
            if writing is not None:
                writing.result()
            writing = thread.submit(keeper.write, part, images)
        if writing is not None:
            writing.result()
    for _ in batches:  # ends its progress bar
        raise AssertionError("more images than asked")


def _begin(out: epath.Path, plan: dict[str, Any], names: Sequence[str]) -> None:
    """Writes drawn.json, or compares it with the plan."""
    out.mkdir(parents=True, exist_ok=True)
    found = storage.find_json(out / PLAN)
    if isinstance(found, dict):
        if said := differences(found, plan):
            words = "; ".join(f"{k} {a!r} there, {b!r} asked" for k, (a, b) in said.items())
            raise UserError(
                f"{out} holds images of another drawing ({words:.600}): delete it, or choose "
                "another folder"
            )
        return
    if strangers := sorted(storage.list_names(out) & set(names)):
        raise UserError(
            f"{out} holds {strangers[0]}, but no valid {PLAN} that says what drew it: choose "
            "another folder"
        )
    storage.write_json(out / PLAN, plan)
