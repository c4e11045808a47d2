"""Tiny reward models with random weights, in PyTorch and in the folders that ours reads."""

import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file

from dmpo_jax.toy import make
from tests.support.torch_models import randomise

TOKENIZER = pathlib.Path(make.__file__).parent / "pipeline" / "tokenizer"
SIDE = 28
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": SIDE,
    "patch_size": 7,
}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
}
WIDTH = 20


def clip_model(act: str = "gelu", seed: int = 0):
    """A transformers CLIPModel whose vocabulary is the digits' tokenizer's."""
    from transformers import CLIPConfig, CLIPModel

    vocabulary = json.loads((TOKENIZER / "vocab.json").read_text())
    special = {
        f"{k}_token_id": vocabulary[f"<|{t}|>"]
        for k, t in (("bos", "startoftext"), ("eos", "endoftext"), ("pad", "endoftext"))
    }
    text = {**TEXT, **special, "hidden_act": act, "vocab_size": len(vocabulary)}
    vision = {**VISION, "hidden_act": act}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    model = randomise(CLIPModel(config), seed)
    with torch.no_grad():  # embeddings that differ, as trained ones do
        for name, parameter in model.named_parameters():
            if "projection" in name or "embedding" in name:
                parameter.mul_(6)
    return model


def write_clip(folder, act: str = "gelu", seed: int = 0):
    """Writes a CLIP folder as transformers does; returns the model."""
    model = clip_model(act, seed)
    model.save_pretrained(folder)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return model


def write_open_clip(folder, model, *, file: str = "open_clip_model.safetensors", config=True):
    """Writes a transformers CLIPModel as open_clip would; returns its state dict."""
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    state = open_clip_state(model)
    save_file({k: v.contiguous() for k, v in state.items()}, pathlib.Path(folder) / file)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    if config:
        vision, text = model.config.vision_config, model.config.text_config
        described = {
            "model_cfg": {
                "embed_dim": WIDTH,
                "quick_gelu": text.hidden_act == "quick_gelu",
                "vision_cfg": {
                    "image_size": SIDE,
                    "layers": vision.num_hidden_layers,
                    "width": vision.hidden_size,
                    "head_width": vision.hidden_size // vision.num_attention_heads,
                    "patch_size": vision.patch_size,
                    "mlp_ratio": vision.intermediate_size / vision.hidden_size,
                },
                "text_cfg": {
                    "context_length": text.max_position_embeddings,
                    "vocab_size": text.vocab_size,
                    "width": text.hidden_size,
                    "heads": text.num_attention_heads,
                    "layers": text.num_hidden_layers,
                    "mlp_ratio": text.intermediate_size / text.hidden_size,
                },
            },
            "preprocess_cfg": {"mean": [0.48145466, 0.4578275, 0.40821073]},
        }
        path = pathlib.Path(folder) / "open_clip_config.json"
        path.write_text(json.dumps(described))
    return state


class Block(torch.nn.Module):
    """A transformer's block in open_clip's layout: PyTorch's own fused attention."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        fc, proj = torch.nn.Linear(width, inner), torch.nn.Linear(inner, width)
        self.mlp = torch.nn.ModuleDict({"c_fc": fc, "c_proj": proj})

    def forward(self, x, mask=None):
        seen = self.ln_1(x)
        x = x + self.attn(seen, seen, seen, need_weights=False, attn_mask=mask)[0]
        inner = torch.nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x)))
        return x + self.mlp["c_proj"](inner)


class Blocks(torch.nn.Module):
    def __init__(self, width: int, heads: int, inner: int, layers: int):
        super().__init__()
        self.resblocks = torch.nn.ModuleList(Block(width, heads, inner) for _ in range(layers))

    def forward(self, x, mask=None):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        width, patch = VISION["hidden_size"], VISION["patch_size"]
        self.conv1 = torch.nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = torch.nn.Parameter(torch.randn(width))
        count = (SIDE // patch) ** 2 + 1
        self.positional_embedding = torch.nn.Parameter(torch.randn(count, width))
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.transformer = Blocks(
            width,
            VISION["num_attention_heads"],
            VISION["intermediate_size"],
            VISION["num_hidden_layers"],
        )
        self.proj = torch.nn.Parameter(torch.randn(width, WIDTH))

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([first, x], 1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x))
        return self.ln_post(x[:, 0]) @ self.proj


class OpenClip(torch.nn.Module):
    """CLIP in open_clip's layout, written from its description; loads its state dicts."""

    def __init__(self, vocabulary: int):
        super().__init__()
        width, count = TEXT["hidden_size"], TEXT["max_position_embeddings"]
        self.visual = Visual()
        self.transformer = Blocks(
            width, TEXT["num_attention_heads"], TEXT["intermediate_size"], TEXT["num_hidden_layers"]
        )
        self.token_embedding = torch.nn.Embedding(vocabulary, width)
        self.positional_embedding = torch.nn.Parameter(torch.randn(count, width))
        self.ln_final = torch.nn.LayerNorm(width)
        self.text_projection = torch.nn.Parameter(torch.randn(width, WIDTH))
        self.logit_scale = torch.nn.Parameter(torch.tensor(2.0))

    def encode_text(self, ids):
        count = ids.shape[1]
        mask = torch.full((count, count), float("-inf")).triu(1)
        x = self.token_embedding(ids) + self.positional_embedding[:count]
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


def open_clip_state(model) -> dict[str, torch.Tensor]:
    """The state dict of an `OpenClip` that computes as a transformers CLIPModel does."""
    old = model.state_dict()

    def blocks(tower, prefix, layers):
        found = {}
        for i in range(layers):
            here, there = f"{tower}.encoder.layers.{i}", f"{prefix}transformer.resblocks.{i}"
            for kind in ("weight", "bias"):
                fused = [old[f"{here}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                found[f"{there}.attn.in_proj_{kind}"] = torch.cat(fused)
                found[f"{there}.attn.out_proj.{kind}"] = old[f"{here}.self_attn.out_proj.{kind}"]
                found[f"{there}.ln_1.{kind}"] = old[f"{here}.layer_norm1.{kind}"]
                found[f"{there}.ln_2.{kind}"] = old[f"{here}.layer_norm2.{kind}"]
                found[f"{there}.mlp.c_fc.{kind}"] = old[f"{here}.mlp.fc1.{kind}"]
                found[f"{there}.mlp.c_proj.{kind}"] = old[f"{here}.mlp.fc2.{kind}"]
        return found

    seen, read = "vision_model.embeddings", "text_model.embeddings"
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    return {
        "visual.conv1.weight": old[f"{seen}.patch_embedding.weight"],
        "visual.class_embedding": old[f"{seen}.class_embedding"],
        "visual.positional_embedding": old[f"{seen}.position_embedding.weight"],
        "visual.proj": old["visual_projection.weight"].T,
        "token_embedding.weight": old[f"{read}.token_embedding.weight"],
        "positional_embedding": old[f"{read}.position_embedding.weight"],
        "text_projection": old["text_projection.weight"].T,
        "logit_scale": old["logit_scale"],
        **{f"{new}.{k}": old[f"{o}.{k}"] for new, o in norms.items() for k in ("weight", "bias")},
        **blocks("vision_model", "visual.", model.config.vision_config.num_hidden_layers),
        **blocks("text_model", "", model.config.text_config.num_hidden_layers),
    }


def head_state(width: int = WIDTH, seed: int = 0) -> dict[str, torch.Tensor]:
    """The aesthetic predictor's state dict, on `width` features; ImageReward's is likewise."""
    generator = torch.Generator().manual_seed(seed)
    found, sizes = {}, {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
    for i, size in sizes.items():
        weight = torch.randn(size, width, generator=generator) * width**-0.5
        found[f"layers.{i}.weight"] = weight
        found[f"layers.{i}.bias"] = 0.1 * torch.randn(size, generator=generator)
        width = size
    return found


def apply_head(state, x):
    """The head's layers one after another."""
    for i in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    return x[:, 0]


WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a hand ##written ##writ two three cat , of".split()
REWARD = {  # the config of ours
    "model_type": "imagereward",
    "image_size": SIDE,
    "patch_size": 7,
    "vision_width": 24,
    "vision_heads": 3,
    "vision_layers": 2,
    "text_width": 32,
    "text_heads": 4,
    "text_layers": 2,
    "text_intermediate": 40,
    "text_positions": 40,
    "vocab_size": len(WORDS) + 2,
}


def blip_models(seed: int = 0):
    """(BlipVisionModel, BlipTextModel, the head's state dict) of a tiny ImageReward."""
    from transformers import BlipTextConfig, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    vision = BlipVisionConfig(
        hidden_size=24,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=7,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=REWARD["vocab_size"],
        hidden_size=32,
        encoder_hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=40,
        layer_norm_eps=1e-12,
        is_decoder=True,  # gives it the layers that attend to the image
        bos_token_id=0,
        pad_token_id=0,
        sep_token_id=3,
    )
    torch.manual_seed(seed)
    seen = randomise(BlipVisionModel(vision), seed)
    read = randomise(BlipTextModel(text, add_pooling_layer=False), seed + 1)
    with torch.no_grad():  # so small that a norm's epsilon tells
        for parameter in seen.embeddings.parameters():
            parameter.mul_(0.02)
        read.embeddings.word_embeddings.weight.mul_(0.02)
        read.embeddings.position_embeddings.weight.mul_(0.02)
    return seen, read, head_state(32, seed + 2)


def image_reward_state(seen, read, head) -> dict[str, torch.Tensor]:
    """The published state dict's names for the tensors of transformers' parts."""
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding": "patch_embed.proj",
        "post_layernorm": "norm",
        "encoder.layers": "blocks",
        "self_attn.qkv": "attn.qkv",
        "self_attn.projection": "attn.proj",
        "layer_norm": "norm",
    }
    found = {}
    for name, tensor in seen.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        found[f"blip.visual_encoder.{name}"] = tensor
    found |= {f"blip.text_encoder.{name}": x for name, x in read.state_dict().items()}
    found |= {f"mlp.{name}": x for name, x in head.items()}
    found["blip.vision_proj.weight"] = torch.zeros(2, 24)  # of a loss of pretraining
    return found


def write_bert_tokenizer(folder) -> None:
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')


def write_image_reward(folder, seed: int = 0):
    """Writes a tiny ImageReward; returns transformers' parts of it, as `blip_models`."""
    parts = blip_models(seed)
    write_bert_tokenizer(folder)
    state = {k: v.contiguous() for k, v in image_reward_state(*parts).items()}
    save_file(state, pathlib.Path(folder) / "ImageReward.safetensors")
    (pathlib.Path(folder) / "config.json").write_text(json.dumps(REWARD))
    return parts
