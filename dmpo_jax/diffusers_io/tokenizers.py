"""Tokenizers, through the transformers library."""

import os
from typing import Any

from etils import epath

from dmpo_jax import storage
from dmpo_jax.diffusers_io.folders import one_line
from dmpo_jax.errors import UserError


def read_tokenizer(folder: epath.Path, kind: str) -> Any:
    """Reads the tokenizer of a folder. kind: its class in transformers, such as CLIPTokenizer.

    Raises:
        ValueError: the folder's files are not valid.
    """
    # Or it advises to install PyTorch, which nothing here uses.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    with storage.local_copy(folder) as local:  # the library reads local folders only
        try:
            return getattr(transformers, kind).from_pretrained(str(local))
        except Exception as error:  # the libraries raise many types, some of them bare
            raise UserError(f"{folder} holds no valid tokenizer: {one_line(error)}") from error
