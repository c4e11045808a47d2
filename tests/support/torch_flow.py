"""Pipeline folders of FLUX.2-klein and Z-Image as PyTorch diffusers writes them, tiny."""

import contextlib
import dataclasses

import diffusers
import torch
import transformers
from etils import epath

from dmpo_jax import families
from dmpo_jax.families import KLEIN, Z_IMAGE
from dmpo_jax.toy import debug, make
from tests.support.torch_models import randomise

SIDE = 32  # of the images; the VAE makes 8 of it
TOKENS = 64  # of a prompt, in place of 512


@contextlib.contextmanager
def short_prompts():
    """Inside, the families read fewer tokens of a prompt: the pipelines' max_sequence_length."""
    before = dict(families.FAMILIES)
    for family in (KLEIN, Z_IMAGE):
        text = tuple(part._replace(tokens=TOKENS) for part in family.text)
        families.FAMILIES[family.pipeline] = dataclasses.replace(family, text=text)
    yield
    families.FAMILIES.clear()
    families.FAMILIES.update(before)


def write(name: str, folder) -> str:
    """The pipeline of a family, its weights off their initialisation."""
    family = families.family_named(name)
    folder = epath.Path(folder)
    words = make.write_qwen2_tokenizer(folder.parent / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder.parent / "tokenizer"))
    config = dict(family.tiny.text["text_encoder"])
    kind = getattr(transformers, config.pop("architectures")[0])
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": randomise(kind(transformers.Qwen3Config(vocab_size=words, **config)), 1),
        "transformer": _transformer(family),
        "vae": _vae(family),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            **_public(debug.scheduler_config(family))
        ),
    }
    getattr(diffusers, family.pipeline)(**parts).save_pretrained(str(folder))
    return str(folder)


def _public(config: dict) -> dict:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _transformer(family: families.Family):
    made = getattr(diffusers, family.torch_class)(**_public(debug.model_config(family)))
    return randomise(made, 2)


def _vae(family: families.Family):
    made = getattr(diffusers, family.vae.__name__)(**_public(debug.vae_config(family)))
    if hasattr(made, "bn"):
        generator = torch.Generator().manual_seed(4)
        made.bn.running_mean.copy_(torch.randn(made.bn.num_features, generator=generator))
        made.bn.running_var.copy_(torch.rand(made.bn.num_features, generator=generator) + 0.5)
    return randomise(made, 3)
