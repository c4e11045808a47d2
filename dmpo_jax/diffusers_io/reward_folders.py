"""Folders of reward models: a complete CLIP model in either naming, or ImageReward's BLIP.

A folder is flat: weights in safetensors, a config, and the tokenizer's files beside them.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from dmpo_jax import storage
from dmpo_jax.diffusers_io import folders, tensor_files
from dmpo_jax.diffusers_io.folders import some
from dmpo_jax.diffusers_io.open_clip import CONFIG, transformers_config, transformers_names
from dmpo_jax.diffusers_io.tokenizers import read_tokenizer
from dmpo_jax.diffusers_io.weights import load_weights
from dmpo_jax.errors import UserError
from dmpo_jax.models import blip, clip, vit

STEM = "model"
HEAD = "layers.0.weight"  # a file with this tensor is of the aesthetic predictor's head
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Class in transformers, and the files that it reads: one of these sets.
TOKENIZERS = {
    "clip": ("CLIPTokenizer", (("tokenizer.json",), ("vocab.json", "merges.txt"))),
    "bert": ("BertTokenizer", (("tokenizer.json",), ("vocab.txt",))),
}
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt"),
)


class NoWeightsError(UserError):
    """A folder without safetensors; pickles: names of those that it has."""

    def __init__(self, message: str, pickles: Sequence[str]):
        super().__init__(message)
        self.pickles = tuple(pickles)


@dataclasses.dataclass(frozen=True)
class RewardFolder:
    """A folder whose weights and config are known, none of its weights read.

    stem: of the weight files, as `folders.weight_files` takes it. configs: of each model in it.
    head: the aesthetic predictor's file, if it has one.
    """

    path: epath.Path
    stem: str
    configs: Mapping[str, Mapping[str, Any]]
    head: epath.Path | None = None

    @property
    def files(self) -> list[epath.Path]:
        """Files of weights."""
        found = [*folders.weight_files(self.path, self.stem, None)]
        return found if self.head is None else [*found, self.head]

    @functools.cached_property
    def digest(self) -> str:
        """A sha256 of the weights: one file's own, or over those of several."""
        hashes = [storage.hash_file(file) for file in self.files]
        return hashes[0] if len(hashes) == 1 else storage.hash_json(hashes)


def find_weights(folder: epath.PathLike) -> tuple[epath.Path, str, epath.Path | None]:
    """Returns a reward model's folder, its weights' stem, and the file of a head or None.

    The weights are model.safetensors, its shards, or the only other safetensors file.

    Raises:
        ValueError: no such folder, a pipeline's, or one without or with too many weight files.
    """
    path = folders.find_folder(folder)
    if (path / "model_index.json").exists():
        raise UserError(f"{path} is a diffusers pipeline, not a reward model's folder")
    files = sorted(path.glob("*.safetensors"))
    heads = [file for file in files if _is_head(file)]
    files = [file for file in files if file not in heads]
    if len(heads) > 1:
        raise UserError(f"{path} holds {len(heads)} heads, {some([f.name for f in heads])}: one")
    head = heads[0] if heads else None
    own = (f"{STEM}.safetensors", f"{STEM}.safetensors.index.json")
    if any((path / name).exists() for name in own):
        return path, STEM, head
    if len(files) == 1:
        return path, files[0].name.removesuffix(".safetensors"), head
    names = sorted(file.name for file in path.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES)]
    if files:
        found = f"{len(files)} safetensors files, and none of them is {own[0]}"
        raise UserError(f"{path} holds {found}: leave one, or name it so")
    if pickles:
        found = f"{some(pickles)}, a pickle, which is never opened"
    else:
        found = some(names) or "nothing"
    raise NoWeightsError(f"{path} should hold {own[0]}, but holds {found}", pickles)


def _is_head(file: epath.Path) -> bool:
    # The head has a few megabytes; opening a remote file copies it.
    if file.stat().length > 2**26:
        return False
    with tensor_files.opened({file: frozenset()}) as tensors:
        return HEAD in tensors


# --- CLIP --------------------------------------------------------------------


def find_clip(folder: epath.PathLike, default: Mapping[str, Any] | None = None) -> RewardFolder:
    """Finds a complete CLIP model, in transformers' or open_clip's naming.

    Args:
        default: config of a folder that has none; None refuses it.

    Raises:
        ValueError: as `find_weights`; the config is missing or of another architecture.
    """
    path, stem, head = find_weights(folder)
    if (path / "config.json").exists():
        config = folders.read_json(path / "config.json")
        kind = config.get("model_type", "clip")
        if kind != "clip" or not {"text_config", "vision_config"} <= config.keys():
            named = config.get("architectures") or kind
            raise UserError(f"{path} holds a {named}, where a complete CLIPModel is needed")
    elif (path / CONFIG).exists():
        config = transformers_config(folders.read_json(path / CONFIG))
    elif default is None:
        raise UserError(f"{path} has neither config.json nor {CONFIG}: copy it from its source")
    else:
        config = default
    _check_pixels(path)
    # Files of transformers 4 may state a tower's config twice; the second is the one in force.
    towers = {
        side: {
            **(config[f"{side}_config"] or {}),
            **(config.get(f"{side}_config_dict") or {}),
            "projection_dim": config.get("projection_dim") or 512,
        }
        for side in ("text", "vision")
    }
    return RewardFolder(path, stem, towers, head)


def _check_pixels(path: epath.Path) -> None:
    """Raises ValueError if the model takes images that are normalised in another way."""
    stated = {"preprocessor_config.json": ("image_mean", "image_std"), CONFIG: ("mean", "std")}
    for name, keys in stated.items():
        if not (path / name).exists():
            continue
        given = folders.read_json(path / name)
        given = given.get("preprocess_cfg") or {} if name == CONFIG else given
        for key, wanted in zip(keys, (CLIP_MEAN, CLIP_STD), strict=True):
            if given.get(key) is not None and not np.allclose(given[key], wanted, atol=1e-4):
                raise UserError(
                    f"{path / name} normalises images by {key}={given[key]}; CLIP's {wanted} is "
                    "supported"
                )


# Of the pixels in [0, 1], a channel each: OpenAI's, which all models here were trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def load_vision_tower(found: RewardFolder, *, abstract: bool = False) -> vit.CLIPVisionTower:
    """Loads the vision tower in float32; `abstract` as in `weights.load_weights`."""
    return _load(vit.CLIPVisionTower, found, "vision", abstract)


def load_text_tower(found: RewardFolder, *, abstract: bool = False) -> vit.CLIPTextTower:
    """Loads the text tower in float32; `abstract` as in `weights.load_weights`."""
    return _load(vit.CLIPTextTower, found, "text", abstract)


def _load(make: Any, found: RewardFolder, which: str, abstract: bool) -> Any:
    return load_weights(
        make,
        found.path,
        stem=found.stem,
        abstract=abstract,
        config=found.configs[which],
        renamed=transformers_names,
    )


def read_logit_scale(found: RewardFolder) -> float:
    """Returns exp(logit_scale), by which CLIP multiplies cosines; about 100."""
    with tensor_files.opened(folders.weight_files(found.path, found.stem, None)) as files:
        if vit.LOGIT_SCALE not in files:
            raise UserError(f"weights in {found.path} have no {vit.LOGIT_SCALE}")
        file = files[vit.LOGIT_SCALE]
        shape = file.names[vit.LOGIT_SCALE]
        value = file.read(vit.LOGIT_SCALE, tuple((0, n) for n in shape))
    return float(np.exp(value.astype(np.float64)).reshape(()))


def read_head(found: RewardFolder) -> tuple[Float[np.ndarray, " D"], float]:
    """Returns (weights, bias) of the aesthetic predictor's head: one affine map of D features.

    Its linear layers have no activations between them; they are multiplied in float64.

    Raises:
        ValueError: there is no head, or its layers do not fit each other or the image tower.
    """
    if found.head is None:
        raise UserError(f"{found.path} lacks the head's safetensors file, with {HEAD}")
    with tensor_files.opened({found.head: frozenset()}) as files:

        def read(name: str) -> np.ndarray:
            if name not in files:
                raise UserError(f"{found.head} lacks {name}")
            shape = files[name].names[name]
            return files[name].read(name, tuple((0, n) for n in shape)).astype(np.float64)

        matrix, offset = np.eye(found.configs["vision"]["projection_dim"]), np.zeros(())
        for i in blip.HEAD:
            weight, bias = read(f"layers.{i}.weight"), read(f"layers.{i}.bias")
            if weight.shape[-1:] != matrix.shape[:1]:
                raise UserError(
                    f"{found.head}: layers.{i} takes {weight.shape[-1]} features, but gets "
                    f"{len(matrix)}: is it of another CLIP model?"
                )
            matrix, offset = weight @ matrix, weight @ np.broadcast_to(offset, len(matrix)) + bias
    return matrix[0].astype(np.float32), float(offset[0])


# --- ImageReward -------------------------------------------------------------


def find_image_reward(folder: epath.PathLike) -> RewardFolder:
    """Finds ImageReward's folder. Without a config of its own, the model is ImageReward 1.0.

    Raises:
        ValueError: as `find_weights`, or the config is of another architecture.
    """
    path, stem, _ = find_weights(folder)
    config: dict[str, Any] = {}
    if (path / "config.json").exists():
        config = folders.read_json(path / "config.json")
    kind = config.get("model_type", "bert")
    if kind not in ("bert", "blip", "imagereward"):
        raise UserError(f"{path} holds a {config.get('architectures') or kind}, not ImageReward")
    # BERT's config.json comes with its tokenizer.
    own = config if kind == "imagereward" else {}
    return RewardFolder(path, stem, {"model": own})


def load_image_reward(found: RewardFolder, *, abstract: bool = False) -> blip.ImageReward:
    """Loads the model in float32; `abstract` as in `weights.load_weights`."""
    return _load(blip.ImageReward, found, "model", abstract)


# --- tokenizers --------------------------------------------------------------


def missing_tokenizer(present: Collection[str], kind: str) -> str:
    """Names the tokenizer files that are missing among those present; '' if there are enough."""
    sets = TOKENIZERS[kind][1]
    if any(set(files) <= set(present) for files in sets):
        return ""
    return ", or ".join(" and ".join(files) for files in sets)


def load_tokenizer(path: epath.Path, kind: str, vocabulary: int) -> Any:
    """Loads the tokenizer of a reward model's folder.

    Args:
        kind: "clip" or "bert".
        vocabulary: number of tokens that the model knows.

    Raises:
        ValueError: its files are missing, not valid, or of another model.
    """
    if missing := missing_tokenizer([file.name for file in path.iterdir()], kind):
        example = {"clip": "openai/clip-vit-large-patch14", "bert": "bert-base-uncased"}[kind]
        raise UserError(f"{path} lacks its tokenizer: copy {missing} into it, as of {example}")
    tokenizer = read_tokenizer(path, TOKENIZERS[kind][0])
    if kind == "bert":  # as BLIP extends it
        tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"the tokenizer in {path} has {len(tokenizer)} tokens, but the model knows "
            f"{vocabulary}: it is another model's"
        )
    return tokenizer


def vocabulary(found: RewardFolder) -> int:
    """Returns the number of tokens that the folder's text model knows."""
    if "model" in found.configs:
        return int(found.configs["model"].get("vocab_size", blip.KEYS["vocab_size"]))
    return int(found.configs["text"].get("vocab_size", clip.KEYS["vocab_size"]))
