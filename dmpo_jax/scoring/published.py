"""Facts of the published scorers: what each computes, and where its weights are.

Sources: https://github.com/yuvalkirstain/PickScore (MIT), https://github.com/tgxs002/HPSv2,
https://github.com/THUDM/ImageReward and
https://github.com/christophschuhmann/improved-aesthetic-predictor (Apache-2.0).
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dmpo_jax import storage
from dmpo_jax.diffusers_io import reward_folders
from dmpo_jax.errors import UserError
from dmpo_jax.models import blip

_CLIP = {"architectures": ["CLIPModel"], "model_type": "clip"}
_TEXT = {"eos_token_id": 2}  # the end token is the largest id of a prompt
# laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which PickScore and HPSv2 were trained from.
VIT_H_14 = _CLIP | {
    "projection_dim": 1024,
    "vision_config": {
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 16,
        "num_hidden_layers": 32,
        "patch_size": 14,
    },
    "text_config": _TEXT
    | {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
    },
}
# openai/clip-vit-large-patch14
VIT_L_14 = _CLIP | {
    "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
    },
    "text_config": _TEXT
    | {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
    },
}
_MIRROR = "DiffSynth-Studio/ImageMetrics on modelscope.cn"
_L_14 = "openai/clip-vit-large-patch14 on the hub"


class Published(NamedTuple):
    """One kind of scorer.

    weights: where its safetensors are published.
    config: of a folder that has none; None: it must have one.
    temperature: of Bradley-Terry as it was trained; None if it was not trained on preferences.
    pixels: its preprocessing: "floor" or "even" as `pixels.cropped`, "padded" as `pixels.padded`.
    scaled: cosines are multiplied by exp(logit_scale). cleaned: prompts are cleaned first.
    """

    weights: str
    config: Mapping[str, Any] | None
    temperature: float | None
    pixels: str
    scaled: bool = False
    cleaned: bool = False
    uses_prompt: bool = True


# PickScore v1 is about 20, a cosine times its scale. HPS v2 and v2.1 are cosines, about 0.27, and
# do not compare with each other; their benchmark's tables are times 100. CLIPScore is the cosine.
# The aesthetic predictor (LAION, v2) is about 1 to 10, ImageReward about standard normal.
PUBLISHED = {
    "pickscore": Published(
        weights=f"yuvalkirstain/PickScore_v1 on the hub, or in {_MIRROR}",
        config=VIT_H_14,
        temperature=1.0,
        pixels="floor",
        scaled=True,
    ),
    "hpsv2": Published(
        weights=f"HPSv2 in {_MIRROR}",
        config=VIT_H_14,
        temperature=0.01,
        pixels="padded",
        cleaned=True,
    ),
    "hpsv21": Published(
        weights="HPS_v2 in DiffSynth-Studio/QualityMetric_reward_pretrained on modelscope.cn",
        config=VIT_H_14,
        temperature=0.01,
        pixels="padded",
        cleaned=True,
    ),
    "clip": Published(weights=_L_14, config=None, temperature=None, pixels="even"),
    "aesthetic": Published(
        weights=f"{_L_14} and, its head, in {_MIRROR}",
        config=VIT_L_14,
        temperature=None,
        pixels="even",
        uses_prompt=False,
    ),
    "imagereward": Published(
        weights=f"ImageReward in {_MIRROR}",
        config={},
        temperature=1 / blip.DEVIATION,
        pixels="even",
    ),
}


def find(kind: str, folder: str) -> reward_folders.RewardFolder:
    """Finds a scorer's folder and reads its config; no weights.

    Raises:
        ValueError: in one line; where there are no weights it says where they are published, and
            how a pickle becomes such a folder.
    """
    with naming(kind):
        if not folder:
            raise UserError(
                f"needs a folder, {kind}:FOLDER; its weights are published as "
                f"{PUBLISHED[kind].weights}"
            )
        try:
            if kind == "imagereward":
                return reward_folders.find_image_reward(folder)
            return reward_folders.find_clip(folder, PUBLISHED[kind].config)
        except reward_folders.NoWeightsError as error:
            how = f", or dmpo-jax convert --scorer={kind}:FILE reads the pickle"
            raise UserError(
                f"{error}; safetensors are published as {PUBLISHED[kind].weights}"
                f"{how if error.pickles else ''}"
            ) from error


@contextlib.contextmanager
def naming(kind: str) -> Iterator[None]:
    """Names the scorer in a user error."""
    try:
        yield
    except UserError as error:
        raise UserError(f"scorer {kind}: {error}") from error


def version_of(found: reward_folders.RewardFolder, kind: str, settings: Any) -> str:
    """Returns the sha256 of the weights, a digest of settings, and the preprocessing.

    settings: of the model, as far as the weights' shapes do not tell.
    """
    how = PUBLISHED[kind]
    read = ("cleaned" if how.cleaned else "plain") if how.uses_prompt else "no"
    about = f"{how.pixels} pixels, {read} prompts"
    return f"sha256 {found.digest}, model {storage.hash_json(settings)[:8]}, {about}"
