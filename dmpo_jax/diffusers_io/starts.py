"""Weights of a pipeline's trained component that stand in place of its own.

They are another folder's, of the same architecture, or the pipeline's own with a LoRA file on top.
"""

import gc
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dmpo_jax import storage
from dmpo_jax.diffusers_io import components, folders, lora_file
from dmpo_jax.diffusers_io.digests import digest_part
from dmpo_jax.diffusers_io.weights import load_weights
from dmpo_jax.errors import UserError
from dmpo_jax.models import lora, parameters
from dmpo_jax.models.component_config import BOOKKEEPING

# Keys of config.json that say at which size a model was trained, and change no weight.
_SIZES = frozenset({"sample_size"})


class Start(NamedTuple):
    """Where weights of the trained component are found.

    option: which names them, for messages. name: as given. own: the component's folder in the
    pipeline. folder: of other weights; lora: a file of adapters on the pipeline's own. Both are
    None if nothing was named: the weights are the pipeline's own.
    """

    option: str
    name: str
    own: epath.Path
    variant: str | None
    model: Any  # the component's class
    component: str
    folder: epath.Path | None = None
    lora: epath.Path | None = None

    @property
    def weights(self) -> tuple[epath.Path, str | None]:
        """Folder and variant of the complete weights: other ones, or those below adapters."""
        return (self.own, self.variant) if self.folder is None else (self.folder, None)

    @property
    def in_pipeline(self) -> bool:
        """True if a pipeline was named, of which the other weights are a part."""
        return self.folder is not None and self.folder != epath.Path(self.name)

    def load(self, *, merge: bool = True, **kw: Any) -> Any:
        """Loads the component with these weights, under the config.json of the pipeline's own.

        Args:
            merge: fold the adapters of a LoRA file in; False leaves them out.
            kw: those of `load_weights`. A model of shapes (`abstract`) has nothing folded in.

        Raises:
            ValueError: besides those of `load_weights`, the adapters do not fit the model.
        """
        config = folders.read_json(self.own / "config.json")
        folder, variant = self.weights
        model = load_weights(
            self.model,
            folder,
            stem=components.DIFFUSERS_STEM,
            variant=variant,
            config=config,
            **kw,
        )
        if self.lora is None or not merge:
            return model
        structure, params = parameters.split(model)
        adapters = self.adapters(model)
        self.check_layers(adapters, parameters.shapes(model))
        if kw.get("abstract"):
            return model
        del model
        gc.collect()  # modules form reference cycles: each kernel would be held twice
        lora.fold_in(params, {path: _beside(params, path, x) for path, x in adapters.items()}, 1.0)
        return parameters.merge(structure, params)

    def adapters(self, model: Any) -> dict[str, np.ndarray]:
        """Returns the adapters of the LoRA file by our paths, the scale in B; {} without a file.

        model: that they are for, or its shapes.
        """
        if self.lora is None:
            return {}
        return lora_file.load_lora(self.lora, component=self.component, model=model)

    def check_layers(
        self, adapters: dict[str, np.ndarray], shapes: dict[str, jax.ShapeDtypeStruct]
    ) -> None:
        """Raises UserError unless the model has each adapted layer, in the adapter's shape.

        shapes: of the model's parameters.
        """
        named = f"--config.{self.option}={self.name}"
        lora_file.check_layers(adapters, shapes, named=named, folder=self.own)

    def digest(self) -> str:
        """Returns the digest of the weights in place of the pipeline's own, or of these."""
        if self.lora is not None:
            return storage.sample_file(self.lora)
        folder, variant = self.weights
        return digest_part(folder, components.DIFFUSERS_STEM, variant)


def find_start(
    folder: epath.PathLike, name: str, *, option: str, variant: str | None = None
) -> Start:
    """Finds the weights that an option names for the pipeline in `folder`.

    Args:
        folder: the pipeline's. name: a folder (a pipeline's, or the component's own), a hub id, a
            LoRA file or the folder of one; "" is the pipeline's own weights.
        option: dotted path of the leaf that names them.
        variant: of the pipeline's own weight files. Others are read without one.

    Raises:
        ValueError: nothing is there, or weights of another architecture; names the option.
    """
    path, family = components.load_family(folder)
    own = path / family.component
    start = Start(option, name, own, variant, family.model, family.component)
    if not name:
        return start
    given = epath.Path(name)
    if given.suffix == lora_file.SUFFIX or given.is_file():
        if given.suffix != lora_file.SUFFIX or not given.is_file():
            came = "is another file" if given.exists() else "does not exist"
            raise UserError(
                f"--config.{option}={name} should be a folder of weights or a LoRA file "
                f"({lora_file.SUFFIX}), but {came}"
            )
        return start._replace(lora=given)
    found = folders.find_folder(name)
    if (found / lora_file.FILE).exists():
        return start._replace(lora=found / lora_file.FILE)
    if (found / "model_index.json").exists():
        found = found / family.component
    if not (found / "config.json").exists():
        raise UserError(
            f"--config.{option}={name} should be a pipeline with a {family.component!r} part, that "
            f"part's own folder or a LoRA file, but there is neither {found / 'config.json'} nor "
            f"{lora_file.FILE}"
        )
    _check_same(start, found)
    return start._replace(folder=found)


def _check_same(start: Start, folder: epath.Path) -> None:
    """Raises UserError unless a folder's config.json describes the pipeline's architecture."""
    configs = [folders.read_json(path / "config.json") for path in (start.own, folder)]
    classes = [config.get("_class_name") for config in configs]
    said = ""
    if classes[0] != classes[1]:
        said = f"a {classes[1]}, but the pipeline's is a {classes[0]}"
    else:
        ours, theirs = (_complete(start.model, config) for config in configs)
        differing = [
            f"{key}={theirs.get(key)!r} (the pipeline's: {ours.get(key)!r})"
            for key in sorted({*ours, *theirs})
            if ours.get(key) != theirs.get(key)
        ]
        said = folders.some(differing)
    if said:
        raise UserError(
            f"--config.{start.option}={start.name} has another architecture than {start.own}: "
            f"{said}. Take weights that were trained from this model, or set model.folder to theirs"
        )


def _complete(model: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config with defaults filled in, without keys that change no parameter."""
    complete = dict(parameters.abstract(model, config).config)
    kept = {k: v for k, v in complete.items() if k not in BOOKKEEPING | _SIZES and k[0] != "_"}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items() if v is not None}


def _beside(params: dict[str, Any], path: str, adapter: np.ndarray) -> jax.Array:
    """Places an adapter on the devices of its layer's kernel, on each in full."""
    kernel = params[f"{path.partition('.lora_')[0]}.kernel"]
    sharding = kernel.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec()
        return jax.device_put(adapter, jax.sharding.NamedSharding(sharding.mesh, spec))
    return jnp.asarray(adapter)
