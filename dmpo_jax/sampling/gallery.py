"""A folder of drawn images: a PNG each with its settings inside, a list, and a sheet of all."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from dmpo_jax import storage
from dmpo_jax.errors import UserError
from dmpo_jax.sampling.images import image_grid, read_image, save_png
from dmpo_jax.sampling.store import PLAN, Drawing, draw

LOG = logging.getLogger(__name__)
LIST = "images.jsonl"  # a line an image: its file, prompt and seed
GRID_IMAGES = 256  # on one grid; more would exhaust memory and fit on no screen


class Pngs:
    """Keeps each image as NNNNN.png. settings: embedded in each, beside its prompt and seed."""

    def __init__(self, out: epath.Path, drawing: Drawing, settings: Mapping[str, Any]):
        self._out, self._drawing = out, drawing
        sampler = drawing.sampler
        self._settings = {**settings, "sampler": sampler.name}
        self._settings |= {"height": sampler.size[0], "width": sampler.size[1]}

    def names(self, images: range) -> list[str]:
        return [f"{i:05}.png" for i in images]

    def write(self, numbers: range, images: UInt8[np.ndarray, "n H W 3"]) -> None:
        for i, name, image in zip(numbers, self.names(numbers), images, strict=True):
            save_png(self._out / name, Image.fromarray(image), {**self._settings, **self.about(i)})

    def about(self, i: int) -> dict[str, Any]:
        """Prompt and seed of image i."""
        prompt, drawing = self._drawing.prompts[i], self._drawing
        about = {"prompt": prompt.text, "negative_prompt": drawing.sampler.negative_of(prompt)}
        about |= {k: v for k, v in prompt._asdict().items() if k in ("image", "mask") and v}
        return {**about, "seed": drawing.seeds[i]}


def draw_gallery(
    out: epath.Path, drawing: Drawing, settings: Mapping[str, Any], description: str = ""
) -> list[str]:
    """Draws `out/NNNNN.png` and, once all are drawn, `out/images.jsonl`.

    settings: written into every PNG, with the prompt, the seed, the sampler's name and the size.

    Returns:
        The names of the images.

    Raises:
        UserError: as `store.draw`.
    """
    keeper = Pngs(out, drawing, settings)
    draw(out, drawing, keeper, description)
    names = keeper.names(range(len(drawing.prompts)))
    if jax.process_index() == 0:
        rows = [{"file": name, **keeper.about(i)} for i, name in enumerate(names)]
        storage.write_bytes(out / LIST, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
    return names


def verify_images(folder: epath.Path) -> Iterator[tuple[str, str]]:
    """Yields each drawn image of a folder and the folder itself, each with its fault or ""."""
    plan, there = storage.find_json(folder / PLAN), storage.list_names(folder)
    count = plan.get("count", 0) if isinstance(plan, dict) else 0
    names = [f"{i:05}.png" for i in range(count)]
    for name in filter(there.__contains__, names):
        try:
            read_image(folder / name)
        except UserError as error:
            yield str(folder / name), str(error)
        else:
            yield str(folder / name), ""
    lost = len(set(names) - there)
    undone = f"{lost} of {count} images are not drawn: run the same command again"
    yield str(folder), undone if lost or not count else ""


def write_grid(out: epath.Path, names: Sequence[str], prompts: Sequence[str]) -> epath.Path:
    """Writes `out/grid.png`, one row a prompt, as many as `GRID_IMAGES` allow; process 0 does.

    names: of the images, the same number for each prompt, prompt after prompt.
    """
    path = out / "grid.png"
    if jax.process_index() == 0:
        columns = len(names) // len(prompts)
        rows = max(GRID_IMAGES // columns, 1)
        images = np.stack([read_image(out / name) for name in names[: rows * columns]])
        if rows < len(prompts):
            LOG.info("grid.png shows the first %d of %d prompts", rows, len(prompts))
        save_png(path, image_grid(images, columns, labels=list(prompts[:rows])))
    return path
