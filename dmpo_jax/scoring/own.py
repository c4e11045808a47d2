"""A user's own scorer: a function, or an object with the protocol, in a Python file."""

import difflib
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from dmpo_jax import storage
from dmpo_jax.errors import UserError


class OwnScorer:
    """Scores by `given(images, prompts)`; what the protocol asks for besides has defaults.

    The name is the function's, the version the file's sha256, there is no temperature, the prompt
    is taken to count, and every prompt passes `check`. An object's own attributes are kept.
    """

    def __init__(self, given: Any, name: str, file: pathlib.Path):
        self._given = given
        self.name: str = getattr(given, "name", name)
        self.version: str = getattr(given, "version", f"sha256 {storage.hash_file(file)}")
        self.temperature: float | None = getattr(given, "temperature", None)
        self.uses_prompt: bool = getattr(given, "uses_prompt", True)
        if hasattr(given, "features"):
            self.features = given.features

    def check(self, prompts: Sequence[str]) -> None:
        """Calls the object's own check, if it has one."""
        if hasattr(self._given, "check"):
            self._given.check(prompts)

    def __call__(
        self, images: UInt8[np.ndarray, "N H W C"], prompts: Sequence[str]
    ) -> Float32[np.ndarray, "..."]:
        return np.asarray(self._given(images, prompts), np.float32)


def load_own(spec: str) -> OwnScorer:
    """Imports `path.py:function`, which runs the file.

    Raises:
        ValueError: there is no such file or function, or the file raises an error.
    """
    path, _, name = spec.rpartition(":")
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(f"scorer {spec!r}: there is no file {path}")
    described = importlib.util.spec_from_file_location(f"_scorer_{file.stem}", file)
    if described is None or described.loader is None:
        raise UserError(f"scorer {spec!r}: {path} is no Python file")
    module = importlib.util.module_from_spec(described)
    sys.modules[described.name] = module  # dataclasses look their module up
    try:
        described.loader.exec_module(module)
    except Exception as error:
        raise UserError(
            f"scorer {spec!r}: running {path} failed: {type(error).__name__}: {error}"
        ) from error
    given = getattr(module, name, None)
    if not callable(given):
        found = sorted(key for key, value in vars(module).items() if _is_own(value, module))
        near = difflib.get_close_matches(name, found, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"scorer {spec!r}: {path} has no function {name!r}, only "
            f"{', '.join(found) or 'none'}{hint}"
        )
    return OwnScorer(given, name, file)


def _is_own(value: Any, module: Any) -> bool:
    return callable(value) and getattr(value, "__module__", "") == module.__name__
