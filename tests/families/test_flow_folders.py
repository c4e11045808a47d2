"""Folders of klein and Z-Image that do not fit: one line each, before anything compiles."""

import json
import shutil

import pytest
from etils import epath

from dmpo_jax import diffusers_io, families
from dmpo_jax.toy import debug


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name of a family -> its tiny folder."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("klein", "z_image")}
    for name, folder in made.items():
        debug.write_tiny_pipeline(epath.Path(folder), families.family_named(name))
    return made


def load(folder):
    pipeline = diffusers_io.load_pipeline(folder)
    pipeline.family.factors(pipeline.vae)
    model = diffusers_io.load_model(folder, abstract=True)
    pipeline.family.check_model(model.config, pipeline.vae.config.latent_channels)
    return pipeline


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "part", "changes", "match"),
    [
        ("klein", "text_encoder", {"num_hidden_layers": 27}, "text_encoder has 27 layers"),
        ("klein", "text_encoder", {"hidden_size": 24}, r"width 48 .* but 3 states .* 3 x 24 wide"),
        ("klein", "text_encoder", {"architectures": ["CLIPTextModel"]}, "should hold Qwen3"),
        ("klein", "transformer", {"caption_channels": 8}, "caption_channels=8"),
        ("klein", "transformer", {"axes_dims_rope": [8, 4, 4, 4]}, "axes_dims_rope=.*=16"),
        ("klein", "transformer", {"num_single_layers": 3}, "8 missing|missing"),
        ("klein", "vae", {"_class_name": "AutoencoderKL"}, "unexpected: bn.running_mean"),
        ("klein", "vae", {"patch_size": [4, 4]}, "patch_size"),
        ("klein", "scheduler", {"_class_name": "DDIMScheduler"}, "names DDIMScheduler"),
        ("z_image", "text_encoder", {"hidden_size": 24}, "cap_feat_dim.*gives 24"),
        ("z_image", "text_encoder", {"num_hidden_layers": 1}, "num_hidden_layers=1"),
        ("z_image", "transformer", {"all_patch_size": [2, 4]}, "all_patch_size"),
        ("z_image", "transformer", {"siglip_feat_dim": 8}, "siglip_feat_dim=8"),
        ("z_image", "transformer", {"axes_dims": [4, 6, 8]}, "axes_dims=.*add up to 16"),
        ("z_image", "scheduler", {"_class_name": "FlowMatchHeunDiscreteScheduler"}, "Heun"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(name, part, changes, match, folders, tmp_path):
    shutil.copytree(folders[name], tmp_path / "model")
    stem = "scheduler_config" if part == "scheduler" else "config"
    file = tmp_path / "model" / part / f"{stem}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=match) as raised:
        load(tmp_path / "model")
    assert "\n" not in str(raised.value)


def test_the_vae_of_another_family_is_refused(folders, tmp_path):
    shutil.copytree(folders["klein"], tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "vae")
    shutil.copytree(folders["z_image"] / "vae", tmp_path / "model" / "vae")
    with pytest.raises(ValueError, match="AutoencoderKLFlux2, but its VAE is an AutoencoderKL"):
        load(tmp_path / "model")


def test_a_tokenizer_that_pads_on_the_left_is_refused(folders, tmp_path):
    shutil.copytree(folders["z_image"], tmp_path / "model")
    file = tmp_path / "model" / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": "left"}))
    with pytest.raises(ValueError, match=r"pads on the left \(padding_side\)"):
        load(tmp_path / "model")


@pytest.mark.long
def test_a_distilled_model_is_warned_of_and_drawn_without_guidance(folders, tmp_path, caplog):
    assert load(folders["klein"]).family.guidance(4.0) == (4.0, -3.0)
    assert load(folders["z_image"]).family.guidance(4.0) == (5.0, -4.0)
    assert "distilled" not in caplog.text
    shutil.copytree(folders["klein"], tmp_path / "model")
    file = tmp_path / "model" / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "is_distilled": True}))
    assert load(tmp_path / "model").family.guidance(4.0) == (1.0, 0.0)
    assert caplog.text.count("is_distilled") == 1
