"""Images drawn with LoRA files: which weights draw them, and what they say of themselves."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dmpo_jax import diffusers_io
from dmpo_jax.config.configs import from_flat
from dmpo_jax.diffusers_io import kohya
from dmpo_jax.jobs.sample import sample as jobs_sample
from dmpo_jax.models import lora, parameters
from dmpo_jax.sampling import sampler
from dmpo_jax.toy import digits

FOLDER = digits.PIPELINE


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two LoRA files of the digits' UNet: a.safetensors in diffusers' keys, b in kohya's."""
    folder, unet = tmp_path_factory.mktemp("files"), diffusers_io.load_unet(FOLDER)
    rng = np.random.default_rng(0)
    for name, targets in (("a", ["to_q", "conv1"]), ("b", ["to_q", "to_out.0"])):
        adapted = lora.attach(unet, rank=2, alpha=2, targets=targets, seed=0)
        adapters = {
            path: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32)
            for path, x in lora.partition(parameters.split(adapted)[1])[1].items()
        }
        keys = kohya.written(unet) if name == "b" else None
        diffusers_io.save_lora(adapters, folder / name, scale=1.0, keys=keys)
        (folder / name / diffusers_io.LORA_FILE).rename(folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Returns `draw(lora, out)`: black images; gives what one says, and the weights given."""
    (tmp_path / "prompts.txt").write_text("a handwritten one\n")
    make, given = sampler.make_sampler, []

    def blackened(*args, **kw):
        made = make(*args, **kw)

        def run(params, *inputs):
            given.append({path: np.asarray(x) for path, x in params.items()})
            return jnp.zeros((made.batch_size, *made.size, 3), jnp.uint8)

        return dataclasses.replace(made, run=run)

    def draw(lora, out="out"):
        leaves = {"model.folder": str(FOLDER), "sample.steps": 1, "sample.batch_size": 8}
        config = from_flat({**leaves, "model.compute_dtype": "float32"})
        jobs_sample(config, prompts=tmp_path / "prompts.txt", out=tmp_path / out, lora=lora)
        with Image.open(tmp_path / out / "00000.png") as image:
            return json.loads(image.info["parameters"]), given[-1]

    monkeypatch.setattr(sampler, "make_sampler", blackened)
    return draw


def merged(*adapters):
    """The digits' parameters with (scale, adapters) added, by NumPy."""
    params = {
        path: np.asarray(x)
        for path, x in parameters.split(diffusers_io.load_unet(FOLDER))[1].items()
    }
    for scale, found in adapters:
        for path, down in found.items():
            if ".lora_A." in path:
                layer = path.removesuffix(".lora_A.kernel")
                up = found[f"{layer}.lora_B.kernel"].reshape(down.shape[-1], -1)
                params[f"{layer}.kernel"] = params[f"{layer}.kernel"] + scale * (down @ up)
    return params


def assert_close(got, want):
    assert got.keys() == want.keys()
    for path, x in want.items():
        np.testing.assert_allclose(got[path], x, rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.long
def test_files_are_merged_each_by_its_scale(files, draw):
    a, b = files / "a.safetensors", files / "b.safetensors"
    said, params = draw((f"{a}:0.5", str(b)))
    assert said["lora"] == [f"{a}:0.5", str(b)]
    unet = diffusers_io.load_unet(FOLDER)
    first, second = (diffusers_io.load_lora(file, model=unet) for file in (a, b))
    assert_close(params, merged((0.5, first), (1.0, second)))
    said, params = draw((), "plain")
    assert "lora" not in said
    assert_close(params, merged())


@pytest.mark.long
def test_files_and_scales_are_part_of_what_is_drawn(files, draw, tmp_path):
    a = files / "a.safetensors"
    draw((), "plain")
    drawn = tmp_path / "plain" / "drawn.json"
    earlier = {k: v for k, v in json.loads(drawn.read_text()).items() if k != "loras"}
    drawn.write_text(json.dumps(earlier))  # as versions without --lora wrote it
    draw((), "plain")
    with pytest.raises(ValueError, match=r"holds images of another drawing .*loras"):
        draw(str(a), "plain")
    draw(f"{a}:0.5")
    draw(f"{a}:0.50")  # the same images: nothing is drawn again
    for other in ((), f"{a}:0.6", f"{files / 'b.safetensors'}:0.5"):
        with pytest.raises(ValueError, match=r"holds images of another drawing .*loras"):
            draw(other)


def test_what_is_no_lora_file_of_the_model_is_refused(files, draw, tmp_path):
    with pytest.raises(ValueError, match=r"--lora=.*x\.safetensors:2 should be a LoRA file, but"):
        draw(f"{files / 'x.safetensors'}:2")
    with pytest.raises(ValueError, match="should be FILE or FILE:SCALE, SCALE a finite number"):
        draw(f"{files / 'a.safetensors'}:inf")
    wide = {"conv_in.lora_A.kernel": jnp.zeros((3, 3, 9, 2)), "conv_in.lora_B.kernel": None}
    wide["conv_in.lora_B.kernel"] = jnp.zeros((1, 1, 2, 7))
    diffusers_io.save_lora(wide, tmp_path / "wide", scale=1.0)
    with pytest.raises(ValueError, match=r"--lora=.*wide adapts the layer conv_in, .*take a LoRA"):
        draw(str(tmp_path / "wide"))
    assert not (tmp_path / "out" / "drawn.json").exists()
