"""A PyTorch diffusers folder <-> nnx modules: one converter for every model, both ways.

Attribute paths are PyTorch's names, so converting is four layout rules (convolution,
linear, norm, embedding) and a short table of names that older folders carry. Only
safetensors are opened, never a pickle.
"""

import contextlib
import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save as serialise

from dmpo_jax.models import parameters
from dmpo_jax.models.clip import CLIPTextModel
from dmpo_jax.models.unet import UNet2DConditionModel
from dmpo_jax.models.vae import AutoencoderKL

DIFFUSERS_STEM, TRANSFORMERS_STEM = "diffusion_pytorch_model", "model"


class Legacy(NamedTuple):
    """Names that a real folder may carry instead of today's; undone again on save."""

    name: str
    applies: Callable[[set[str]], bool]
    load: Callable[[str], str]
    save: Callable[[str], str]


def _renamer(pairs: Mapping[str, str], scope: str) -> Callable[[str], str]:
    def rename(name: str) -> str:
        for old, new in pairs.items():
            name = re.sub(rf"({scope}){re.escape(old)}\.", rf"\g<1>{new}.", name)
        return name

    return rename


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_ATTENTION_SCOPE = r"mid_block\.attentions\.\d+\."
LEGACY = (
    Legacy(
        "vae_attention",
        lambda names: any(".attentions.0.proj_attn." in n for n in names),
        _renamer(_OLD_ATTENTION, _ATTENTION_SCOPE),
        _renamer({new: old for old, new in _OLD_ATTENTION.items()}, _ATTENTION_SCOPE),
    ),
    # transformers 5 writes CLIPTextModel bare; every folder made before it has the prefix.
    Legacy(
        "bare_text_model",
        lambda names: "final_layer_norm.weight" in names,
        lambda name: name if name.startswith("text_projection") else f"text_model.{name}",
        lambda name: name.removeprefix("text_model."),
    ),
)
BUFFERS = ("embeddings.position_ids",)  # stored by transformers < 4.31, holds 0, 1, 2, ...


def torch_name(path: str) -> str:
    """`conv1.kernel` -> `conv1.weight`: the state-dict name of a parameter's path."""
    head, _, leaf = path.rpartition(".")
    return f"{head}.{'weight' if leaf in ('kernel', 'scale', 'embedding') else leaf}"


def to_jax(path: str, tensor: np.ndarray) -> np.ndarray:
    """PyTorch's layout to ours: OIHW to HWIO, [out, in] to [in, out], the rest as it is."""
    if not path.endswith(".kernel"):
        return tensor
    return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def to_torch(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_jax`."""
    if not path.endswith(".kernel"):
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


# --- reading -----------------------------------------------------------------


def find_folder(folder: epath.PathLike) -> epath.Path:
    """A local or object-storage path as it is; a hub id (`org/name`), downloaded and cached.

    Raises:
        ValueError: neither a folder nor an id that the hub client could fetch.
    """
    path = epath.Path(folder)
    if path.is_dir():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) and not str(folder).startswith("."):
        from huggingface_hub import snapshot_download

        try:
            # Weights are safetensors alone: nothing else of a repository is code or pickle.
            patterns = ["*.json", "*.txt", "*.safetensors", "*.model"]
            return epath.Path(snapshot_download(str(folder), allow_patterns=patterns))
        except Exception as error:
            raise ValueError(
                f"{str(folder)!r} is no local folder, and fetching it as a hub id failed: {error}"
            ) from error
    raise ValueError(f"model folder {str(folder)!r} does not exist")


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON object; ValueError names the file where it is missing or broken."""
    if not path.exists():
        raise ValueError(f"{path} is missing: is {path.parent} a whole diffusers folder?")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold a JSON object, but holds a {type(value).__name__}")
    return value


def _component(folder: epath.PathLike, subfolder: str) -> epath.Path:
    """The pipeline's subfolder, or the folder itself where it already is the component's."""
    path = find_folder(folder)
    if (path / "model_index.json").exists() or (path / subfolder).is_dir():
        path = path / subfolder
    if not (path / "config.json").exists():
        raise ValueError(f"{path} has no config.json: the folder lacks its {subfolder!r} part")
    return path


def _weight_files(folder: epath.Path, stem: str, variant: str | None) -> list[epath.Path]:
    middle = f".{variant}" if variant else ""
    single = folder / f"{stem}{middle}.safetensors"
    if single.exists():
        return [single]
    index = folder / f"{stem}.safetensors.index{middle}.json"
    if index.exists():
        shards = sorted(set(read_json(index)["weight_map"].values()))
        if missing := [s for s in shards if not (folder / s).exists()]:
            raise ValueError(f"{index} names shards that are missing: {missing}")
        return [folder / s for s in shards]
    found = sorted(p.name for p in folder.iterdir() if "json" not in p.suffix)
    hint = (
        "; pickles (.bin, .ckpt) are never opened: save it again with safe_serialization=True"
        if any(name.endswith((".bin", ".ckpt", ".pt")) for name in found)
        else "; choose one of these with variant="
        if found
        else ""
    )
    raise ValueError(f"{single} (or its index) is missing in {folder}; found {found}{hint}")


@contextlib.contextmanager
def _opened(files: Iterable[epath.Path]) -> Iterator[dict[str, Any]]:
    """Tensor name -> a function that reads it, so that a caller never holds a file twice.

    Files on object storage are staged on the local disk: safetensors maps files.
    """
    with contextlib.ExitStack() as stack:
        tensors = {}
        for file in files:
            local = file
            if "://" in str(file):
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                local = file.copy(epath.Path(folder) / file.name)
            try:
                handle = stack.enter_context(safe_open(str(local), framework="numpy"))
                tensors |= {k: functools.partial(handle.get_tensor, k) for k in handle.keys()}  # noqa: SIM118, a handle is no mapping
            except Exception as error:
                raise ValueError(f"{file} cannot be read as safetensors: {error}") from error
        yield tensors


def load_model(
    make: Callable[..., Any],
    folder: epath.Path,
    *,
    stem: str,
    variant: str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> Any:
    """Builds `make(config, ...)` and fills it from the folder's safetensors.

    Raises:
        ValueError: a refused config key; or tensors that are missing, unexpected or
            misshapen, all of them in one message.
    """
    config = read_json(folder / "config.json")
    model = nnx.eval_shape(
        lambda: make(config, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
    )
    paths = {torch_name(path): path for path in parameters.shapes(model)}
    wanted = parameters.shapes(model)
    params, unexpected, misshapen, pointwise = {}, [], [], []
    with _opened(_weight_files(folder, stem, variant)) as tensors:
        layout = tuple(rule for rule in LEGACY if rule.applies(set(tensors)))
        for name, read in tensors.items():
            for rule in layout:
                name = rule.load(name)
            if name.endswith(BUFFERS):
                continue
            if name not in paths:
                unexpected.append(name)
                continue
            path, tensor = paths[name], read()
            if tensor.ndim == 4 and len(wanted[path].shape) == 2 and tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]  # a linear layer that was once a 1x1 convolution
                pointwise.append(path)
            array = to_jax(path, tensor)
            if array.shape != wanted[path].shape:
                shape = to_torch(path, np.broadcast_to(0, wanted[path].shape)).shape
                misshapen.append(f"{name} has {tensor.shape}, config.json says {shape}")
                continue
            params[path] = jnp.asarray(array, wanted[path].dtype)
    missing = sorted(set(paths) - {torch_name(path) for path in params})
    missing = [m for m in missing if not any(x.startswith(f"{m} ") for x in misshapen)]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"{folder}: weights do not fit config.json. Missing: {missing}. "
            f"Unexpected: {sorted(unexpected)}. Misshapen: {misshapen}."
        )
    structure, _ = nnx.split(model)
    model = parameters.merge(structure, params)
    model.layout = tuple(rule.name for rule in layout)
    model.pointwise = tuple(pointwise)
    return model


def load_unet(folder: epath.PathLike, *, variant=None, dtype=jnp.float32, param_dtype=jnp.float32):
    """The UNet of a pipeline folder, or of its unet/ folder."""
    return load_model(
        UNet2DConditionModel,
        _component(folder, "unet"),
        stem=DIFFUSERS_STEM,
        variant=variant,
        dtype=dtype,
        param_dtype=param_dtype,
    )


def load_vae(folder: epath.PathLike, *, variant=None, dtype=jnp.float32, param_dtype=jnp.float32):
    """The VAE of a pipeline folder, or of its vae/ folder."""
    return load_model(
        AutoencoderKL,
        _component(folder, "vae"),
        stem=DIFFUSERS_STEM,
        variant=variant,
        dtype=dtype,
        param_dtype=param_dtype,
    )


def load_text_encoder(
    folder, *, subfolder="text_encoder", variant=None, dtype=jnp.float32, param_dtype=jnp.float32
):
    """A text encoder of a pipeline folder (`subfolder` says which), or of its own folder."""
    path = _component(folder, subfolder)
    config = read_json(path / "config.json")
    kinds = {"CLIPTextModel": False, "CLIPTextModelWithProjection": True}
    kind = (config.get("architectures") or ["CLIPTextModel"])[0]
    if kind not in kinds:
        raise ValueError(f"{path} holds a {kind}; supported text encoders: {sorted(kinds)}")

    def make(config, **kw):
        return CLIPTextModel(config, projection=kinds[kind], **kw)

    return load_model(
        make,
        path,
        stem=TRANSFORMERS_STEM,
        variant=variant,
        dtype=dtype,
        param_dtype=param_dtype,
    )


# --- writing -----------------------------------------------------------------


def state_dict(model: nnx.Module) -> dict[str, np.ndarray]:
    """The model as PyTorch names and layouts, in the naming that its folder had."""
    rules = [rule for rule in LEGACY if rule.name in getattr(model, "layout", ())]
    tensors = {}
    for path, array in parameters.split(model)[1].items():
        name = torch_name(path)
        for rule in rules:
            name = rule.save(name)
        tensor = to_torch(path, np.asarray(jax.device_get(array)))
        if path in getattr(model, "pointwise", ()):
            tensor = tensor[:, :, None, None]
        tensors[name] = np.ascontiguousarray(tensor)
    return tensors


def save_model(
    model: Any,
    folder: epath.PathLike,
    *,
    stem: str,
    dtype: Any = None,
    shard_bytes: int = 5 * 2**30,
) -> None:
    """config.json and safetensors, sharded above `shard_bytes`; dtype None keeps the model's.

    config.json is the commit marker: it is taken away before the weights change
    and written last, so a killed save never leaves a folder that looks whole.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = state_dict(model)
    if dtype is not None:
        tensors = {name: array.astype(dtype) for name, array in tensors.items()}
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, array in sorted(tensors.items()):
        if shards[-1] and sum(a.nbytes for a in shards[-1].values()) + array.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = array
    count = len(shards)
    names = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    for stale in folder.glob("*.part"):  # of a killed save
        stale.unlink()
    for name, shard in zip(names, shards, strict=True):
        (folder / f"{name}.part").write_bytes(serialise(shard, metadata={"format": "pt"}))

    (folder / "config.json").unlink(missing_ok=True)
    for stale in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        stale.unlink()
    for name in names:
        (folder / f"{name}.part").replace(folder / name)
    if count > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        size = sum(array.nbytes for array in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2))
    write_json(folder / "config.json", model.config.given)


def write_json(path: epath.Path, value: Any) -> None:
    """Atomic on a file system, and on object storage, where a whole file is one write."""
    part = path.parent / f"{path.name}.part"
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(path)


def save_unet(unet: UNet2DConditionModel, folder, *, dtype=None, shard_bytes=5 * 2**30) -> None:
    """Writes the UNet as PyTorch diffusers reads it; `folder` is the component's own."""
    save_model(unet, folder, stem=DIFFUSERS_STEM, dtype=dtype, shard_bytes=shard_bytes)


def save_vae(vae: AutoencoderKL, folder, *, dtype=None, shard_bytes=5 * 2**30) -> None:
    """Writes the VAE as PyTorch diffusers reads it; `folder` is the component's own."""
    save_model(vae, folder, stem=DIFFUSERS_STEM, dtype=dtype, shard_bytes=shard_bytes)


def save_text_encoder(text: CLIPTextModel, folder, *, dtype=None, shard_bytes=5 * 2**30) -> None:
    """Writes a text encoder as transformers reads it; `folder` is the component's own."""
    save_model(text, folder, stem=TRANSFORMERS_STEM, dtype=dtype, shard_bytes=shard_bytes)


_ = ml_dtypes  # registers bfloat16 with NumPy, which safetensors needs to return it
