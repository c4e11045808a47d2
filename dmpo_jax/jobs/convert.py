"""Converts a training checkpoint to a folder or file that PyTorch diffusers opens."""

import logging
from typing import Any

from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.config import arguments, configs
from dmpo_jax.errors import UserError
from dmpo_jax.export import pipeline
from dmpo_jax.export.model_card import write_card
from dmpo_jax.export.verify import verify as verify_export
from dmpo_jax.parallel import processes
from dmpo_jax.training import checkpoint
from dmpo_jax.training.provenance import content

LOG = logging.getLogger(__name__)


@processes.writes_out
def convert(
    *,
    workdir: epath.PathLike,
    out: epath.PathLike,
    at: int | None = None,
    weights: str = "auto",
    merge: bool = False,
    dtype: Any = "float32",
    shard_bytes: int = diffusers_io.SHARD_BYTES,
    verify: bool = False,
    lora_keys: str = "diffusers",
) -> epath.Path:
    """Exports a checkpoint of `workdir`, with a model card.

    Args:
        workdir: a run's folder, with config.json and checkpoints/.
        out: gets a pipeline folder: the run's source with the tuned model, all other parts
            unchanged. For a LoRA run it gets the adapters alone, for `load_lora_weights`.
        at: step of the checkpoint; None is the newest.
        weights: "policy", "ema", or "auto" for the moving average if the run kept one.
        merge: fold a LoRA run's adapters into the model and write the pipeline.
        dtype: of the exported model; adapters are always float32.
        shard_bytes: largest weight file.
        verify: also open the result in PyTorch and compare the predictions.
        lora_keys: names in the adapters' file, one of `diffusers_io.LORA_KEYS`.

    Returns:
        `out`.

    Raises:
        ValueError: there is no such run or checkpoint (the message lists the steps), the run
            lacks what `weights`, `merge` or `lora_keys` request, or verification found a
            difference.
    """
    workdir, out = epath.Path(workdir), epath.Path(out)
    config = configs.from_flat(diffusers_io.read_json(workdir / "config.json"))
    card = arguments.card(config, workdir)
    adapters = card.trained.adapters
    if merge and not adapters:
        raise UserError(f"{workdir} trained every parameter: there is no LoRA to merge")
    if lora_keys != "diffusers" and (merge or not adapters):
        raise UserError(
            f"--lora_keys={lora_keys} names what a LoRA file holds, but a pipeline is to be "
            "written: leave it, or give a LoRA run without --merge"
        )
    pipeline.check_keys(card.trained, lora_keys)
    if weights == "ema" and not card.ema_decay:
        raise UserError(f"{workdir} kept no moving average (train.ema_decay is 0)")
    if merge or not adapters:
        diffusers_io.check_export(card.trained.folder, out)
    field = "ema" if weights != "policy" and card.ema_decay else "params"
    with checkpoint.Checkpoints(
        workdir / "checkpoints",
        content=content(card.trained.begun()),
        read_only=True,
        **arguments.checkpoints(config),
    ) as checkpoints:
        wanted = {field: pipeline.abstract_params(card.trained)}
        at, restored = checkpoints.restore_part(wanted, step=at)
    if adapters and not merge:
        pipeline.write_adapters(card.trained, restored[field], out, keys=lora_keys)
    else:
        kw = {"dtype": dtype, "shard_bytes": shard_bytes}
        pipeline.write_pipeline(card.trained, restored[field], out, **kw)
    write_card(card, out, step=at, ema=field == "ema")
    made = out / diffusers_io.LORA_FILE if adapters and not merge else out
    LOG.info("step %d (%s) is in %s; %s says how it was made", at, field, made, out / "README.md")
    if verify:
        verify_export(out, card.trained)
    return out
