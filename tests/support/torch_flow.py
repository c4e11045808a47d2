"""Pipeline folders of FLUX.2-klein and Z-Image as PyTorch diffusers writes them, tiny."""

import contextlib
import dataclasses
import functools

import diffusers
import torch
import transformers
from etils import epath

from dmpo_jax import families
from dmpo_jax.families import KLEIN, Z_IMAGE, family, flux2
from dmpo_jax.toy import debug, make
from tests.support.torch_models import randomise

SIDE = 32  # of the images; the VAE makes 8 of it
TOKENS = 64  # of a prompt, in place of 512
STATES = (1, 2, 3)  # of klein's text encoder, in place of 9, 18 and 27


@contextlib.contextmanager
def shortened():
    """Inside, the families read fewer tokens and layers, as the pipelines can be told to."""
    before = dict(families.FAMILIES)
    klein = dataclasses.replace(
        KLEIN,
        text=(KLEIN.text[0]._replace(tokens=TOKENS, layers=STATES[-1]),),
        embed=functools.partial(flux2.embed, states=STATES),
        check_text=family.no_check,
    )
    text = (Z_IMAGE.text[0]._replace(tokens=TOKENS),)
    for one in (klein, dataclasses.replace(Z_IMAGE, text=text)):
        families.FAMILIES[one.pipeline] = one
    yield
    families.FAMILIES.clear()
    families.FAMILIES.update(before)


def told(name: str) -> dict:
    """Returns the arguments that make PyTorch's pipeline read no more."""
    states = {"text_encoder_out_layers": STATES} if name == "klein" else {}
    return {"max_sequence_length": TOKENS, **states}


def write(name: str, folder) -> str:
    """The pipeline of a family, its weights off their initialisation."""
    kind = families.family_named(name)
    folder = epath.Path(folder)
    words = make.write_qwen2_tokenizer(folder.parent / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder.parent / "tokenizer"))
    config = {**kind.tiny.text["text_encoder"], "num_hidden_layers": 4}
    encoder = getattr(transformers, config.pop("architectures")[0])
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": randomise(encoder(transformers.Qwen3Config(vocab_size=words, **config)), 1),
        "transformer": _transformer(kind),
        "vae": _vae(kind),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(
            **_public(debug.scheduler_config(kind))
        ),
    }
    getattr(diffusers, kind.pipeline)(**parts).save_pretrained(str(folder))
    return str(folder)


def _public(config: dict) -> dict:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _transformer(kind: families.Family):
    made = getattr(diffusers, kind.torch_class)(**_public(debug.model_config(kind)))
    return randomise(made, 2)


def _vae(kind: families.Family):
    made = getattr(diffusers, kind.vae.__name__)(**_public(debug.vae_config(kind)))
    if hasattr(made, "bn"):
        generator = torch.Generator().manual_seed(4)
        made.bn.running_mean.copy_(torch.randn(made.bn.num_features, generator=generator))
        made.bn.running_var.copy_(torch.rand(made.bn.num_features, generator=generator) + 0.5)
    return randomise(made, 3)
