"""Opens TFDS folders without trusting their metadata."""

import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from dmpo_jax import storage
from dmpo_jax.errors import UserError

# TFDS imports the module of any other class that features.json names, one in the folder included.
CLASSES = {
    f"{feature.__module__}.{feature.__qualname__}"
    for feature in (
        tfds.features.FeaturesDict,
        tfds.features.Scalar,
        tfds.features.Tensor,
        tfds.features.Text,
    )
}
_CLASS_KEYS = ("type", "pythonClassName", "python_class_name")
_NAME_KEYS = ("name", "fileFormat", "file_format", "filepathTemplate", "filepath_template")
_NAME = re.compile(r"[\w{}.-]*")  # a file in the folder: no separator


def open_builder(folder: epath.Path) -> Any:
    """Returns `tfds.builder_from_directory(folder)`, of files in that folder and known features.

    Raises:
        UserError: features.json or dataset_info.json is damaged, names another class, which TFDS
            would import, or files elsewhere.
    """
    try:
        _check(folder / "features.json", _CLASS_KEYS, CLASSES.__contains__)
        _check(folder / "dataset_info.json", _NAME_KEYS, _NAME.fullmatch)
        return tfds.builder_from_directory(folder)
    except UserError:
        raise
    except Exception as error:  # of any kind: TFDS checks little of what it parses
        raise UserError(
            f"{folder} cannot be opened as a TFDS dataset: {type(error).__name__}: {error}"
        ) from error


def _check(file: epath.Path, keys: Collection[str], allowed: Callable[[str], Any]) -> None:
    for key, value in _texts(storage.read_json(file)):
        if key in keys and not allowed(value):
            raise UserError(
                f"{file} is refused: {key} is {value!r:.80}, but pairs need features of "
                f"{', '.join(sorted(CLASSES))}, and files in their own folder"
            )


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """Yields (key, text) of all texts in a JSON value, at any depth."""
    if isinstance(value, list):
        value = {str(i): item for i, item in enumerate(value)}
    for key, item in value.items() if isinstance(value, dict) else ():
        if isinstance(item, str):
            yield key, item
        else:
            yield from _texts(item)
