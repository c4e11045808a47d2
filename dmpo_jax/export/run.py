"""Exports a finished run: its pipeline, its adapters and their model cards."""

import logging

import jax

from dmpo_jax import diffusers_io
from dmpo_jax.export.model_card import Card, write_card
from dmpo_jax.export.pipeline import write_adapters, write_pipeline

LOG = logging.getLogger(__name__)


def write_run(card: Card, params: dict[str, jax.Array], *, step: int) -> None:
    """Writes the pipeline `card.workdir/export` and, for a LoRA run, the adapters' file in `lora`.

    params: the moving average's if the run keeps one.
    """
    workdir, ema = card.workdir, card.ema_decay > 0
    if card.trained.adapters:
        write_adapters(card.trained, params, workdir / "lora")
        write_card(card, workdir / "lora", step=step, ema=ema)
    write_pipeline(
        card.trained,
        params,
        workdir / "export",
        dtype="float32",
        shard_bytes=diffusers_io.SHARD_BYTES,
    )
    write_card(card, workdir / "export", step=step, ema=ema)
    LOG.info("exported to %s", workdir / "export")
