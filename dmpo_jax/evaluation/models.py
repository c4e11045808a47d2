"""The models that an evaluation compares: pipelines that it draws from, or folders of images."""

import collections
import json
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.data.prompt_files import Prompt
from dmpo_jax.errors import UserError
from dmpo_jax.sampling.gallery import LIST

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Lists of images by name, and the keys of the file's name and of the prompt in them.
LISTS = {LIST: ("file", "prompt"), "metadata.jsonl": ("file_name", "text")}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


class Model(NamedTuple):
    """One side of a comparison.

    drawn: False for a folder of images, which are only scored. variant: of its weight files.
    """

    name: str
    folder: str
    drawn: bool
    variant: str | None = None


def list_models(a: epath.PathLike, b: epath.PathLike | Sequence[epath.PathLike]) -> list[Model]:
    """Returns the baseline and the models to compare with it.

    Args:
        a: the baseline: a pipeline folder, a hub id, or a folder of images.
        b: the others: one, several, or a text with commas. FOLDER or NAME=FOLDER; a single one
            without a name is "policy", the baseline "base".

    Raises:
        UserError: two have the same name, or a name is no plain word.
    """
    texts = b.split(",") if isinstance(b, str) else [b] if isinstance(b, os.PathLike) else b
    others = [os.fspath(text) for text in texts]
    unnamed = "policy" if len(others) == 1 else ""
    models = [_named(os.fspath(a), "base"), *(_named(text, unnamed) for text in others)]
    count = collections.Counter(model.name for model in models)
    if twice := [name for name in count if count[name] > 1]:
        raise UserError(f"two models are called {twice[0]!r}: name each, as in --b=NAME=FOLDER,...")
    return models


def _named(text: str, unnamed: str) -> Model:
    name, equals, folder = text.partition("=")
    if not equals or "/" in name:
        name, folder = unnamed, text
    if not name:  # runs/dpo/export is "dpo"
        parts = [part for part in folder.rstrip("/").split("/") if part not in ("export", "lora")]
        name = parts[-1] if parts else folder
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name a model: use letters, digits, '_', '.' and '-', as in "
            "--b=NAME=FOLDER"
        )
    return Model(name, folder, not _holds_images(folder))


def _holds_images(folder: str) -> bool:
    """True for a folder that is no pipeline and holds images or a list of them."""
    path = epath.Path(folder)
    if not path.is_dir() or (path / "model_index.json").exists():
        return False
    names = storage.list_names(path)
    return any(name in LISTS or name.lower().endswith(SUFFIXES) for name in names)


def check_model(model: Model, asked: Sequence[Prompt], each: int) -> None:
    """Raises UserError if a model's folder is incomplete, or its images do not fit the prompts."""
    if model.drawn:
        diffusers_io.load_model(model.folder, variant=model.variant, abstract=True)
    else:
        find_images(model, asked, each)


def find_images(model: Model, asked: Sequence[Prompt], each: int) -> list[epath.Path]:
    """Returns the files of a folder of images: of every prompt the first, then the second, ...

    By images.jsonl (`file`, `prompt`), as `sample` writes it, or metadata.jsonl (`file_name`,
    `text`), as the hub's image folders have it. Without either, all images in natural order of
    their names, prompt after prompt.

    Raises:
        UserError: a prompt has fewer than `each` images, an image is not there, or there is no
            list and their number is not that of prompts times `each`.
    """
    folder = epath.Path(model.folder)
    there = storage.list_names(folder)
    for name, keys in LISTS.items():
        if name in there:
            return _listed(folder, name, keys, asked, each)
    # An overview of all is none of them.
    files = sorted(
        (name for name in there if name.lower().endswith(SUFFIXES) and name != "grid.png"),
        key=lambda name: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)],
    )
    if len(files) != len(asked) * each:
        raise UserError(
            f"{folder} holds {len(files)} images without {' or '.join(LISTS)}, but {len(asked)} "
            f"prompts of {each} images each need {len(asked) * each}: add a list of them, or set "
            "--images_per_prompt"
        )
    return [folder / files[p * each + k] for k in range(each) for p in range(len(asked))]


def _listed(
    folder: epath.Path, name: str, keys: tuple[str, str], asked: Sequence[Prompt], each: int
) -> list[epath.Path]:
    by_prompt: dict[str, list[str]] = {}
    for number, line in enumerate((folder / name).read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            file, prompt = str(row[keys[0]]), str(row[keys[1]])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder / name}, row {number} should be an object with {keys[0]!r} and "
                f"{keys[1]!r}, but is {line!r:.80}"
            ) from error
        by_prompt.setdefault(prompt.strip(), []).append(file)
    found: dict[tuple[int, int], epath.Path] = {}
    for p, prompt in enumerate(asked):
        files = by_prompt.get(prompt.text, [])
        if len(files) < each:
            raise UserError(
                f"{folder / name} lists {len(files)} images of {prompt.text!r}, but {each} are "
                "needed"
            )
        for k in range(each):  # a prompt that is asked twice takes the next ones
            found[k, p] = folder / files.pop(0)
    ordered = [found[k, p] for k in range(each) for p in range(len(asked))]
    if lost := next((file for file in ordered if not file.exists()), None):
        raise UserError(f"{folder / name} lists {lost}, which is not there")
    return ordered
