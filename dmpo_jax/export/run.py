"""Exports a finished run: its pipeline, its adapters and their model cards."""

import logging

import jax

from dmpo_jax import diffusers_io, storage
from dmpo_jax.export import record
from dmpo_jax.export.model_card import Card, write_card
from dmpo_jax.export.pipeline import write_adapters, write_pipeline

LOG = logging.getLogger(__name__)


def write_run(card: Card, params: dict[str, jax.Array], *, step: int) -> None:
    """Writes the pipeline `card.workdir/export` and, for a LoRA run, the adapters' file in `lora`.

    params: the moving average's if the run keeps one.
    """
    out = card.workdir / "export"
    if jax.process_index() == 0:
        (out / record.FILE).unlink(missing_ok=True)
    if card.trained.adapters:
        write_adapters(card.trained, params, card.workdir / "lora")
        file = card.workdir / "lora" / diffusers_io.LORA_FILE
        LOG.info("the LoRA file, for load_lora_weights: %s", file)
    write_pipeline(card.trained, params, out, dtype="float32", shard_bytes=diffusers_io.SHARD_BYTES)
    record.write_record(out, step=step, ema=card.ema_decay > 0)
    write_cards(card)
    LOG.info("the tuned pipeline is in %s; its README.md says how it was made", out)


def write_cards(card: Card) -> None:
    """Writes the cards of a run's export again, with what is known by now: the judges' results."""
    if made := storage.find_json(card.workdir / "export" / record.FILE):
        for folder in ("export", "lora") if card.trained.adapters else ("export",):
            write_card(card, card.workdir / folder, step=made["step"], ema=made["ema"])
