"""Exports a run's parameters as a pipeline folder or adapter file that PyTorch diffusers opens."""

import functools
import gc
from typing import Any, NamedTuple

import jax
from etils import epath

from dmpo_jax import diffusers_io
from dmpo_jax.diffusers_io import kohya
from dmpo_jax.errors import UserError
from dmpo_jax.models import lora, parameters
from dmpo_jax.parallel import meshes

Params = dict[str, jax.Array]


class Trained(NamedTuple):
    """The model that a run trained. adapters: None if every parameter was trained.

    folder: the pipeline's, path or hub id. variant: of its weight files.
    vae: folder of the VAE that made the pairs, if it is not the pipeline's own; an export has it.
    start: what the run began with in place of the pipeline's own model: a folder or a LoRA file.
    """

    folder: str
    variant: str | None
    adapters: lora.Adapters | None
    vae: str = ""
    start: str = ""

    def begun(self) -> diffusers_io.Start:
        """Finds the weights that the run began with."""
        kw = {"option": "model.start", "variant": self.variant}
        return diffusers_io.find_start(self.folder, self.start, **kw)

    def load(self, **kw: Any) -> Any:
        """Loads the model as it was before training; with adapters, the one that they are on."""
        return self.begun().load(merge=self.adapters is None, **kw)


def abstract_params(trained: Trained) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a checkpoint's parameters, sharded over all devices."""
    model = trained.load(abstract=True)
    if trained.adapters:
        _, shapes = lora.partition(parameters.shapes(trained.adapters.attach(model)))
    else:
        shapes, _ = parameters.partition(model, parameters.shapes(model))
    shardings = meshes.parameter_sharding(meshes.make_mesh(fsdp=-1, data=1), shapes)
    return {
        path: jax.ShapeDtypeStruct(shape.shape, "float32", sharding=shardings[path])
        for path, shape in shapes.items()
    }


def write_adapters(
    trained: Trained, params: Params, out: epath.Path, *, keys: str = "diffusers"
) -> None:
    """Writes the adapters for PyTorch's `load_lora_weights`, always in float32.

    keys: one of `LORA_KEYS`, the names in the file.

    Raises:
        ValueError: as `check_keys`; the run trained every parameter.
    """
    if trained.adapters is None:
        raise UserError(f"{trained.folder} was trained whole: there are no adapters to write")
    check_keys(trained, keys)
    _, family = diffusers_io.load_family(trained.folder)
    names = kohya.written(trained.load(abstract=True)) if keys == "kohya" else None
    how = {"scale": trained.adapters.scale, "component": family.component}
    diffusers_io.save_lora(params, out, **how, keys=names)


def check_keys(trained: Trained, keys: str) -> None:
    """Raises UserError if programs that read these keys do not know the model by them."""
    _, family = diffusers_io.load_family(trained.folder)
    if keys == "kohya" and family.component != "unet":
        raise UserError(
            f"--lora_keys=kohya is written for UNets (SD 1, SD 2, SDXL), but {trained.folder} is "
            f"of the family {family.name} ({family.pipeline}): leave --lora_keys=diffusers"
        )


def write_pipeline(
    trained: Trained,
    params: Params,
    out: epath.Path,
    *,
    dtype: Any,
    shard_bytes: int,
) -> None:
    """Writes the source pipeline with these parameters, or with these adapters folded in.

    dtype: of the exported model. shard_bytes: largest weight file.
    """
    kw = {"dtype": dtype, "shard_bytes": shard_bytes, "vae": trained.vae}
    if trained.adapters is None:
        model = trained.load(abstract=True)
        diffusers_io.save_pipeline(model, trained.folder, out, params=params, **kw)
        return
    devices = meshes.make_mesh(fsdp=-1, data=1)
    # Reloaded, since the run may hold it in bfloat16, which would round the updates away.
    model = trained.load(sharding=functools.partial(meshes.parameter_sharding, devices))
    _, tuned = parameters.split(model)
    model = parameters.without_arrays(model)
    gc.collect()  # modules form reference cycles that keep their arrays alive
    lora.fold_in(tuned, jax.device_put(params, meshes.replicated(devices)), trained.adapters.scale)
    diffusers_io.save_pipeline(model, trained.folder, out, params=tuned, **kw)
