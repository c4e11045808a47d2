"""Turns a scorer's published pickle into a folder that `make_scorer` reads.

PyTorch reads the file with `weights_only=True`: tensors and plain containers, no code.
"""

import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from dmpo_jax import storage
from dmpo_jax.diffusers_io import folders, reward_folders, tensor_files
from dmpo_jax.diffusers_io.layout import BUFFERS
from dmpo_jax.errors import MissingPackageError, UserError
from dmpo_jax.extras import install_hint
from dmpo_jax.models import blip
from dmpo_jax.scoring.named import KINDS, make_scorer
from dmpo_jax.scoring.published import PUBLISHED

HEAD_FILE = "aesthetic_head.safetensors"


def convert_scorer(spec: str, out: epath.PathLike, *, like: str = "") -> epath.Path:
    """Writes the weights of `KIND:FILE` as safetensors into `out`, with config and tokenizer.

    Args:
        spec: such as hpsv2:HPS_v2_compressed.pt. Tensors keep their names and dtypes.
        like: a folder or hub id whose tokenizer is copied: any CLIP model's, for ImageReward
            BERT's. For clip also its config; for aesthetic, whose file is the head alone, the
            complete CLIP-L model.

    Raises:
        ValueError: PyTorch is missing; the file would run code, or is not such a scorer's; `out`
            holds weights already; `like` is missing or lacks what is needed.
    """
    kind, _, file = spec.partition(":")
    if kind not in PUBLISHED or not file:
        raise UserError(f"--scorer must be KIND:FILE with a kind of {', '.join(KINDS)}: {spec!r}")
    path, out = pathlib.Path(file), epath.Path(out)
    if not path.is_file():
        raise UserError(f"{file} does not exist")
    if out.exists() and list(out.glob("*.safetensors*")):
        raise UserError(f"{out} holds weights already: choose another --out")
    copied, config = _copied(kind, like), _config(kind)
    weights = HEAD_FILE if kind == "aesthetic" else "model.safetensors"
    names = [*copied, weights, *(["config.json"] if config else [])]
    if present := [name for name in names if (out / name).exists()]:
        raise UserError(f"{out} holds {folders.some(present)} already: choose another --out")
    tensors = _read(kind, path)
    out.mkdir(parents=True, exist_ok=True)
    try:
        for name, source in copied.items():
            source.copy(out / name)
        _write(out / weights, tensors)
        if config:
            storage.write_json(out / "config.json", config)
        make_scorer(f"{kind}:{out}").check([])
    except BaseException:
        for name in names:
            (out / name).unlink(missing_ok=True)
        raise
    return out


def _config(kind: str) -> dict[str, Any]:
    """Returns the config.json to write; {} where it is copied."""
    if kind == "imagereward":
        return {"model_type": "imagereward", **blip.KEYS}
    return {} if kind in ("aesthetic", "clip") else dict(PUBLISHED[kind].config or {})


def _copied(kind: str, like: str) -> dict[str, epath.Path]:
    """Returns {name: file} to copy from `like`."""
    bert = kind == "imagereward"
    example = "bert-base-uncased" if bert else "openai/clip-vit-large-patch14"
    if not like:
        raise UserError(
            f"--like is needed: a folder or hub id whose tokenizer to copy, such as {example}"
        )
    source = folders.find_folder(like)
    wanted = list(reward_folders.TOKENIZER_FILES)
    if kind == "aesthetic":
        found = reward_folders.find_clip(source, PUBLISHED[kind].config)
        wanted += ["config.json", *(file.name for file in found.files)]
        wanted += [file.name for file in source.glob("*.safetensors.index.json")]
    if kind == "clip":
        wanted += ["config.json", "preprocessor_config.json"]
    present = {file.name: file for file in source.iterdir() if file.name in wanted}
    missing = reward_folders.missing_tokenizer(present.keys(), "bert" if bert else "clip")
    if missing and kind != "aesthetic":
        raise UserError(f"--like={like} lacks its tokenizer: {missing}, such as {example} has")
    if kind == "clip" and "config.json" not in present:
        raise UserError(f"--like={like} lacks config.json, which tells the model's sizes")
    return present


def _read(kind: str, path: pathlib.Path) -> dict[str, Any]:
    """Returns the tensors of a pickle, mapped from the disk where its format allows it."""
    try:
        import torch
    except ImportError as error:
        raise MissingPackageError(
            f"reading {path} needs PyTorch ({error}): {install_hint('eval')}"
        ) from error

    def load(mmap: bool) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            try:
                found = load(mmap=True)
            except (RuntimeError, ValueError):  # not of the zip format
                found = load(mmap=False)
        except Exception as error:  # torch, pickle and zipfile raise many types
            raise UserError(
                f"{path} cannot be read without running code of its own, or is damaged, and is "
                f"refused; safetensors are published as {PUBLISHED[kind].weights} "
                f"({folders.one_line(error)[:200]})"
            ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    tensors = dict(found) if isinstance(found, Mapping) else {}
    wrong = [name for name, x in tensors.items() if not isinstance(x, torch.Tensor)]
    if not tensors or wrong:
        raise UserError(f"{path} holds no state dict: {folders.some(sorted(map(str, wrong)))}")
    return {name: x for name, x in tensors.items() if not name.endswith(BUFFERS)}


def _write(file: epath.Path, tensors: Mapping[str, Any]) -> None:
    """Writes PyTorch's tensors to a safetensors file, one at a time."""
    specs = {
        name: jax.ShapeDtypeStruct(tuple(x.shape), np.dtype(str(x.dtype).removeprefix("torch.")))
        for name, x in tensors.items()
    }

    def produce(name: str) -> np.ndarray:
        tensor = tensors[name].detach().contiguous()
        if specs[name].dtype.name == "bfloat16":  # of which PyTorch makes no NumPy array
            return tensor.view(_int16()).numpy().view(specs[name].dtype)
        return tensor.numpy()

    with storage.replacing(file) as part:
        tensor_files.write(part, specs, produce)


def _int16() -> Any:
    import torch

    return torch.int16
