"""A training checkpoint -> a folder or file that PyTorch diffusers opens."""

import functools
import gc
import logging
from typing import Any

import jax
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.config import leaves as configs
from dmpo_jax.export.model_card import write_card
from dmpo_jax.export.verify import verify_unet
from dmpo_jax.models import lora, parameters
from dmpo_jax.parallel import mesh
from dmpo_jax.training import checkpoint

LOG = logging.getLogger(__name__)
Params = dict[str, jax.Array]


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
) -> None:
    """Writes what a checkpoint of `workdir` holds, with a model card.

    Args:
        workdir: a run's folder, with config.json and checkpoints/.
        out: gets a pipeline folder: the run's source with the tuned UNet, every other part
            as it was. A LoRA run's gets the adapters alone, for `load_lora_weights`.
        at: which step; None is the newest.
        weights: "policy", "ema", or "auto" for the moving average where the run kept one.
        merge: fold a LoRA run's adapters into the UNet and write the pipeline.
        dtype: of the UNet as written; adapters are always float32.
        shard_bytes: largest weight file.
        verify: also open the result in PyTorch and compare the predictions.

    Raises:
        ValueError: no such run or checkpoint, naming the steps there are; `weights` or
            `merge` ask for what the run has not; verified and different.
    """
    workdir, out = epath.Path(workdir), epath.Path(out)
    config = configs.from_leaves(diffusers_io.read_json(workdir / "config.json"))
    if merge and not config.lora.rank:
        raise ValueError(f"{workdir} trained every parameter: there is no LoRA to merge")
    if weights == "ema" and not config.train.ema_decay:
        raise ValueError(f"{workdir} kept no moving average (train.ema_decay is 0)")
    averaged = weights != "policy" and config.train.ema_decay > 0
    field = "ema" if averaged else "params"
    unet = diffusers_io.load_model(
        config.model.folder, variant=config.model.variant or None, abstract=True
    )
    adapted = adapt(unet, config)
    shapes, _ = parameters.partition(adapted, parameters.shapes(adapted))
    if config.lora.rank:
        _, shapes = lora.partition(shapes)
    devices = mesh.make_mesh(fsdp=-1, data=1)
    wanted = {
        path: jax.ShapeDtypeStruct(shape.shape, "float32", sharding=sharding)
        for (path, shape), sharding in zip(
            shapes.items(), mesh.parameter_sharding(devices, shapes).values(), strict=True
        )
    }
    identity = configs.identity(config)
    with checkpoint.Checkpoints(
        workdir / "checkpoints", keep=1, identity=identity, read_only=True
    ) as checkpoints:
        at, restored = checkpoints.restore_part({field: wanted}, step=at)
    write = write_lora if config.lora.rank and not merge else write_pipeline
    kw = {} if write is write_lora else {"dtype": dtype, "shard_bytes": shard_bytes}
    write(config, restored[field], out, **kw)
    write_card(config, workdir, out, step=at, ema=field == "ema")
    LOG.info("step %d (%s) is in %s", at, field, out)
    if verify:
        verify_unet(out, config)


def export(config: configs.Config, workdir: epath.Path, at: int, params: Params) -> None:
    """Writes `workdir/export`, a pipeline, and with LoRA also `workdir/lora`, the adapters."""
    ema = config.train.ema_decay > 0
    if config.lora.rank:
        write_lora(config, params, workdir / "lora")
        write_card(config, workdir, workdir / "lora", step=at, ema=ema)
    write_pipeline(config, params, workdir / "export")
    write_card(config, workdir, workdir / "export", step=at, ema=ema)
    LOG.info("exported to %s", workdir / "export")


def adapt(unet: Any, config: configs.Config) -> Any:
    """The UNet that a config trains: with adapters, where it asks for LoRA."""
    if not config.lora.rank:
        return unet
    return lora.attach(
        unet,
        rank=config.lora.rank,
        alpha=config.lora.alpha or config.lora.rank,
        targets=config.lora.targets,
        seed=config.seed,
    )


def write_lora(config: configs.Config, params: Params, out: epath.Path) -> None:
    """The adapters as PyTorch's `load_lora_weights` takes them."""
    scale = (config.lora.alpha or config.lora.rank) / config.lora.rank
    _, family = diffusers_io.load_family(config.model.folder)
    diffusers_io.save_lora(params, out, scale=scale, component=family.component)


def write_pipeline(config: configs.Config, params: Params, out: epath.Path, **kw: Any) -> None:
    """The source pipeline with these parameters, or with these adapters folded in."""
    source, variant = config.model.folder, config.model.variant or None
    devices = mesh.make_mesh(fsdp=-1, data=1)
    if not config.lora.rank:
        unet = diffusers_io.load_model(source, variant=variant, abstract=True)
        diffusers_io.save_pipeline(unet, source, out, params=params, **kw)
        return
    # Afresh, since the run may hold it in bfloat16, where what was learnt would be lost.
    unet = diffusers_io.load_model(
        source, variant=variant, sharding=functools.partial(mesh.parameter_sharding, devices)
    )
    _, tuned = parameters.split(unet)
    unet = parameters.without_arrays(unet)
    gc.collect()  # modules refer to one another in circles: their arrays would stay
    scale = (config.lora.alpha or config.lora.rank) / config.lora.rank
    lora.fold_in(tuned, jax.device_put(params, mesh.replicated(devices)), scale)
    diffusers_io.save_pipeline(unet, source, out, params=tuned, **kw)
