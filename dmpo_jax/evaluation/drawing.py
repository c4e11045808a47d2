"""Draws the images of every model that is compared: same prompts, same seeds."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.data.prompt_files import Prompt
from dmpo_jax.evaluation.models import Model, find_images
from dmpo_jax.sampling.gallery import draw_gallery
from dmpo_jax.sampling.sampler import Sampler, load_params, open_sampler
from dmpo_jax.sampling.seeds import evaluated_seeds
from dmpo_jax.sampling.store import Drawing, describe

IMAGES = "images"  # folder of a folder of each model's images


class Asked(NamedTuple):
    """The images to draw of every model: `each` of each prompt.

    Image i is the one of prompt `i % len(prompts)` and `seeds[i]`.
    """

    prompts: Sequence[Prompt]
    each: int
    seeds: Sequence[int]

    @property
    def every(self) -> list[Prompt]:
        """The prompt of each image."""
        return [*self.prompts] * self.each


def ask(prompts: Sequence[Prompt], each: int, seed: int, noise: str) -> Asked:
    """Returns the prompts with their seeds, which no training pair was drawn from.

    noise: "own" of each image, or "shared": the k-th images of all prompts have the same. A
        prompt's own seed, counted up, goes before either.
    """
    count = len(prompts)
    seeds = evaluated_seeds(seed, count * each)
    if noise == "shared":
        seeds = [seeds[i // count] for i in range(count * each)]
    for i in range(count * each):
        own = prompts[i % count].seed
        if own is not None:
            seeds[i] = (own + i // count) % 2**32
    return Asked(prompts, each, seeds)


class Drawer:
    """Draws one model after another. Models that differ in their weights alone share a sampler.

    how: arguments of `open_sampler` but for `variant`, which each model has of its own.
    """

    def __init__(self, how: Mapping[str, Any]):
        self._how, self._key = dict(how), ""
        self._sampler: Sampler | None = None

    @property
    def batch_size(self) -> int:
        return self._how["batch_size"]

    def _settings(self, model: Model) -> dict[str, Any]:
        return {**self._how, "variant": model.variant}

    def open(self, model: Model) -> Sampler:
        """Returns the sampler of a model; the last one's if it fits."""
        how = self._settings(model)
        key = _sampler_key(model.folder, str(how["vae"]), how["variant"])
        if self._sampler is None or key != self._key:
            self._sampler, self._key = open_sampler(model.folder, **how)[0], key
        return self._sampler

    def draw(
        self, model: Model, asked: Asked, out: epath.Path
    ) -> tuple[list[epath.Path], dict[str, Any]]:
        """Draws what is missing in `out`; returns the files and what determines the images."""
        sampler, how = self.open(model), self._settings(model)
        about = describe(model.folder, sampler, how)

        def load() -> Any:
            folder = diffusers_io.find_folder(model.folder)
            return load_params(folder, variant=how["variant"], dtype=how["dtype"])

        drawing = Drawing(sampler, load, asked.every, asked.seeds, about)
        settings = {name: how[name] for name in ("steps", "guidance_scale")}
        settings = {"model": model.folder, **settings}
        names = draw_gallery(out, drawing, settings, f"drawing {model.name}")
        return [out / name for name in names], about


def _sampler_key(folder: str, vae: str, variant: str | None) -> str:
    """Returns a digest of all parts of a pipeline but its model's weights."""
    path, family = diffusers_io.load_family(folder)
    read = diffusers_io.read_json
    configs = [read(path / part / "config.json") for part in (family.component,)]
    configs += [read(path / "scheduler" / "scheduler_config.json"), read(path / "model_index.json")]
    plain = [{k: v for k, v in config.items() if not k.startswith("_")} for config in configs]
    tokenizers = [
        storage.hash_file(file)
        for part in family.text
        for file in sorted((path / part.tokenizer).iterdir())
        if file.is_file()
    ]
    encoders = diffusers_io.digest_encoders(path, vae=vae, variant=variant)
    return storage.hash_json([family.name, plain, encoders, tokenizers])


def image_files(
    model: Model, drawer: Drawer, asked: Asked, out: epath.Path
) -> tuple[list[epath.Path], dict[str, Any]]:
    """Returns a model's images, drawn into `out/images/NAME` or found in its own folder.

    And what determines them; empty for a folder of images.
    """
    if model.drawn:
        return drawer.draw(model, asked, out / IMAGES / model.name)
    return find_images(model, asked.prompts, asked.each), {}
