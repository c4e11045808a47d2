"""Encodes raw preference pairs, so that training needs neither VAE nor text encoder."""

import logging

from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.config import arguments
from dmpo_jax.config.configs import Config
from dmpo_jax.data.encoded.meta import EncodedMeta
from dmpo_jax.data.sources import SOURCES
from dmpo_jax.encoding import encode as encoding
from dmpo_jax.encoding.given import open_given
from dmpo_jax.errors import UserError
from dmpo_jax.parallel import processes

LOG = logging.getLogger(__name__)


@processes.writes_out
def encode(config: Config, *, source: str = "", out: epath.PathLike) -> epath.Path:
    """Encodes data.source with model.folder's VAE and text encoders; resumes an earlier encode.

    Args:
        source: raw pairs, KIND:PATH, if data.source is unset.
        out: folder for the encoded pairs, shared by all processes.

    Returns:
        The folder.

    Raises:
        ValueError: as `encoding.encode`, or a part of the model is missing.
    """
    check(config, source=source)
    settings = arguments.encoding(config, source)
    loading = {**arguments.pipeline(config), "text": False}  # which encoding loads when needed
    pipeline = diffusers_io.load_pipeline(config.model.folder, **loading)
    encoding.encode(settings, pipeline, out)
    if meta := EncodedMeta.load(out):
        LOG.info("%s: %s", out, described(meta))
    return epath.Path(out)


def described(meta: EncodedMeta) -> str:
    """Returns what a folder of encoded pairs holds, in words."""
    counts = meta.counts
    skipped = ", ".join(f"{count} {reason}" for reason, count in meta.skipped.items())
    return (
        f"{counts.get('train', 0)} pairs to train on and {counts.get('validation', 0)} for "
        f"validation, of {counts.get('prompts', 0)} prompts; skipped: {skipped or 'none'}"
    )


def check(config: Config, *, source: str = "") -> None:
    """Raises ValueError if a setting, the source's kind or the model's family is unknown."""
    named = arguments.encoding(config, source).source
    kind, _, path = named.partition(":")
    if kind not in SOURCES or not path:
        raise UserError(
            f"data.source must be KIND:PATH with KIND one of {', '.join(sorted(SOURCES))}, but "
            f"got {named!r}"
        )
    if config.data.prompts:
        with open_given(config.data.prompts, config.model.folder):
            return
    diffusers_io.check_text(config.model.folder)
