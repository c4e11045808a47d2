"""Tests for dmpo_jax/sampling: what goes into the sampler, and what is written of it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from etils import epath
from PIL import Image

from dmpo_jax import diffusers_io
from dmpo_jax.config.configs import from_flat
from dmpo_jax.data.prompt_files import Prompt
from dmpo_jax.errors import UserError
from dmpo_jax.families import SD_INPAINT, SDXL
from dmpo_jax.jobs.sample import sample as jobs_sample
from dmpo_jax.models import parameters
from dmpo_jax.sampling import sampler as sample
from dmpo_jax.sampling import seeds
from dmpo_jax.toy import debug, digits
from dmpo_jax.types import Condition

FOLDER = digits.PIPELINE


@pytest.fixture(scope="module")
def loaded():
    return diffusers_io.load_pipeline(FOLDER), diffusers_io.load_unet(FOLDER)


@pytest.fixture(scope="module")
def contexts(loaded):
    """Returns the text encoder's embedding of each caption, and of no text."""
    texts = ["", *digits.CAPTIONS]
    return dict(
        zip(texts, (e.context for e in diffusers_io.embed_prompts(loaded[0], texts)), strict=True)
    )


def blackened(make, pipeline, unet, **kw):
    """A sampler that draws black images, and the list of what each batch was drawn from."""
    sampler, seen = make(pipeline, unet, **kw), []

    def run(params, *inputs):
        seen.append(inputs)
        return jnp.zeros((8, *sampler.size, 3), jnp.uint8)

    return dataclasses.replace(sampler, run=run), seen


def recorded(pipeline, unet, **kw):
    settings = {"steps": 2, "guidance_scale": 3.0, "batch_size": 8} | kw
    return blackened(sample.make_sampler, pipeline, unet, **settings)


def test_every_image_says_what_it_was_drawn_from(tmp_path, monkeypatch):
    rows = [{"prompt": f"a handwritten {word}"} for word in ("one", "two", "three")]
    rows[1] |= {"seed": 70, "negative_prompt": "a handwritten six"}
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    make = sample.make_sampler
    monkeypatch.setattr(sample, "make_sampler", lambda *a, **kw: blackened(make, *a, **kw)[0])
    leaves = {
        "model.folder": str(FOLDER),
        "model.compute_dtype": "float32",
        "seed": 3,
        "sample.images_per_prompt": 4,
        "sample.steps": 2,
        "sample.guidance_scale": 3.0,
        "sample.sampler": "dpmpp_2m",
        "sample.height": 32,
        "sample.width": 48,
    }
    out = jobs_sample(from_flat(leaves), prompts=tmp_path / "prompts.json", out=tmp_path / "out")
    assert out == tmp_path / "out"
    abouts = []
    for i in range(12):
        with Image.open(tmp_path / "out" / f"{i:05}.png") as image:
            assert image.size == (48, 32)
            abouts.append(json.loads(image.text["parameters"]))
    assert [about["seed"] for about in abouts] == [3, 4, 5, 6, 70, 71, 72, 73, 11, 12, 13, 14]
    assert abouts[4] == {
        "model": str(FOLDER),
        "sampler": "dpmpp_2m",
        "steps": 2,
        "guidance_scale": 3.0,
        "height": 32,
        "width": 48,
        "prompt": "a handwritten two",
        "negative_prompt": "a handwritten six",
        "seed": 70,
    }
    assert abouts[0]["negative_prompt"] == ""
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size[0] >= 4 * 48


def test_negative_prompts_are_the_prompts_own_or_the_runs(loaded, contexts):
    pipeline, unet = loaded
    sampler, seen = recorded(pipeline, unet, negative_prompt="a handwritten two")
    asked = ["a handwritten one", Prompt("a handwritten six", "a handwritten five")]
    assert sampler({}, asked, [1, 2]).shape == (2, 32, 32, 3)
    told, negative, images, masks, seeds = seen[0]
    want = [contexts[f"a handwritten {w}"] for w in ("one", "six", "two", "five")]
    np.testing.assert_array_equal(told.context[:2], want[:2])
    np.testing.assert_array_equal(negative.context[:2], want[2:])
    assert images is None
    assert masks is None
    assert list(seeds) == [1, 2, 0, 0, 0, 0, 0, 0]
    sampler, seen = recorded(pipeline, unet, guidance_scale=1.0)
    sampler({}, asked, [1, 2])
    assert seen[0][1] is None  # no guidance, no negative


def test_no_negative_prompt_is_zeros_only_where_the_pipeline_asks(loaded, contexts):
    pipeline, unet = loaded
    asked = ["a handwritten one", Prompt("a handwritten one", "")]
    for zeros in (True, False):
        sampler, seen = recorded(pipeline._replace(zero_negative=zeros), unet)
        sampler({}, asked, [0, 0])
        first, second = seen[0][1].context[:2]
        assert (first == 0).all() == zeros
        np.testing.assert_array_equal(second, contexts[""])


def test_prompts_are_embedded_in_parts(loaded, contexts, monkeypatch):
    monkeypatch.setattr(sample, "EMBED_AHEAD", 10)  # so 8, a batch
    pipeline, unet = loaded
    sampler, seen = recorded(pipeline, unet)
    words = digits.CAPTIONS
    sampler({}, words, range(10))
    assert set(sampler.embedded) == {*words[8:], ""}
    got = np.concatenate([seen[0][0].context, seen[1][0].context[:2]])
    np.testing.assert_array_equal(got, [contexts[text] for text in words])


def conditioning(value, image=None):
    image = None if image is None else jnp.full((2, 4, 4, 3), image)
    return Condition(jnp.full((2, 3, 5), value), image=image)


def test_guidance_parts():
    told, negative = conditioning(1.0), conditioning(0.0)
    parts, weights = sample.guidance_parts(told, negative, weights=(7.5, 1 - 7.5))
    assert [p.context.mean() for p in parts] == [1, 0]
    assert weights == (7.5, -6.5)
    assert sample.guidance_parts(told, None, weights=(1.0, 1 - 1.0))[1] == (1.0,)
    told, negative = conditioning(1.0, image=2.0), conditioning(0.0, image=2.0)
    parts, weights = sample.guidance_parts(told, negative, weights=(7.5, 1 - 7.5), image_scale=1.5)
    assert [(p.context.mean(), p.image.mean()) for p in parts] == [(1, 2), (0, 2), (0, 0)]
    assert weights == (7.5, -6.0, -0.5)
    for scale, image_scale, want in ((3.0, 3.0, (3.0, -2.0)), (3.0, 1.0, (3.0, -2.0))):
        got = sample.guidance_parts(
            told, negative, weights=(scale, 1 - scale), image_scale=image_scale
        )[1]
        assert got == want


def test_images_and_masks_reach_a_model_that_sees_them(loaded, tmp_path):
    pipeline, unet = loaded
    shade = np.repeat(np.arange(0, 256, 4, np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    Image.fromarray(shade).save(tmp_path / "a.png")
    Image.fromarray(shade[..., 0]).save(tmp_path / "m.png")
    image, mask = str(tmp_path / "a.png"), str(tmp_path / "m.png")
    painter = pipeline._replace(family=SD_INPAINT)
    sampler, seen = recorded(painter, unet)
    sampler({}, [Prompt("a handwritten one", image=image, mask=mask)], [0])
    _, _, images, masks, _ = seen[0]
    assert images.shape == (8, 32, 32, 3)
    assert masks.shape == (8, 32, 32, 1)
    assert abs(images[0].mean() - shade.mean()) < 2
    np.testing.assert_array_equal(masks[0, 0, :, 0], [0] * 16 + [1] * 16)
    for asked, message in (
        ("a handwritten one", "needs an image beside each prompt, but 'a handwritten one'"),
        (Prompt("no mask", image=image), "needs a mask beside each prompt, but 'no mask'"),
        (Prompt("lost", image=image + "x", mask=mask), r"a\.pngx cannot be read"),
        (Prompt("text", image=__file__, mask=mask), r"test_sample\.py cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            sampler({}, [asked], [0])


def test_images_that_no_model_looks_at_are_mentioned(loaded, caplog):
    sampler, _ = recorded(*loaded)
    sampler({}, [Prompt("a handwritten one", image="a.png")], [0])
    assert "not looked at" in caplog.text


def test_what_cannot_be_drawn_is_refused_before_compiling(loaded):
    pipeline, unet = loaded
    for kw, message in (
        ({"height": 30}, r"multiples of 4 pixels, got \(30, 32\)"),
        ({"sampler": "heun"}, "auto or one of"),
        ({"steps": 1001}, r"num_steps must be in 1\.\.1000"),
    ):
        with pytest.raises(ValueError, match=message):
            recorded(pipeline, unet, **kw)


def write_sdxl(folder):
    """A very small SDXL pipeline, whose folder names Euler."""
    small = {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": 1,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    tiny = SDXL.tiny._replace(model={**SDXL.tiny.model, **small})
    family = dataclasses.replace(SDXL, tiny=tiny)
    debug.write_tiny_pipeline(epath.Path(folder), family)
    for name in ("scheduler/scheduler_config.json", "model_index.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("DDIMScheduler", "EulerDiscreteScheduler"))


@pytest.mark.long
def test_the_model_draws_with_the_kernel_that_is_asked():
    """cuDNN's has no CPU, and says so where a model reaches it."""
    how = {"vae": "", "variant": None, "dtype": "bfloat16"}
    how |= {"steps": 1, "guidance_scale": 1.0, "batch_size": 1}
    assert sample.open_sampler(FOLDER, **how)[0].attention == "plain"  # the CPU's best
    sampler, load = sample.open_sampler(FOLDER, **how, attention="cudnn")
    with pytest.raises(UserError, match="needs NVIDIA GPUs"):
        sampler(load(), ["a handwritten one"], [0])


def test_only_sdxl_leads_away_from_zeros_and_its_index_may_say_no(loaded, tmp_path):
    assert not loaded[0].zero_negative
    write_sdxl(tmp_path)
    pipeline = diffusers_io.load_pipeline(tmp_path)
    assert pipeline.zero_negative
    assert pipeline.sampling.resolve() == "euler"
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = False
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert not diffusers_io.load_pipeline(tmp_path).zero_negative


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_sdxl_draws_what_pytorch_draws(tmp_path):
    """Both encoders, sizes, zeros for no negative prompt, and Euler as SDXL's folder has it."""
    from diffusers import StableDiffusionXLPipeline

    write_sdxl(tmp_path)
    pipe = StableDiffusionXLPipeline.from_pretrained(str(tmp_path), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    pipeline, unet = diffusers_io.load_pipeline(tmp_path), diffusers_io.load_unet(tmp_path)
    assert pipeline.zero_negative
    sampler = sample.make_sampler(pipeline, unet, steps=5, guidance_scale=5.0, batch_size=8)
    assert sampler.name == "euler"
    prompts = [Prompt("a handwritten one"), Prompt("a handwritten two", "a handwritten six")]
    ours = sampler(parameters.split(unet)[1], prompts, [0, 1])
    for prompt, seed, image in zip(prompts, (0, 1), ours, strict=True):
        noise = np.asarray(jax.random.normal(jax.random.key(seed), (1, 8, 8, 4)))
        theirs = pipe(
            prompt.text,
            negative_prompt=prompt.negative_prompt,
            latents=torch.tensor(noise.transpose(0, 3, 1, 2)),
            num_inference_steps=5,
            guidance_scale=5.0,
            output_type="np",
        ).images
        assert np.abs(image / 255.0 - theirs[0]).mean() <= 0.5 / 255
    assert np.ptp(ours) > 20


def test_long_prompts_are_cut_and_counted(loaded, caplog):
    """Never dropped: the tokens that fit are embedded, and the number of prompts is logged."""
    pipeline, _ = loaded
    limit = pipeline.tokenizers[0].model_max_length
    words = "a handwritten one " * limit
    ids = pipeline.tokenizers[0](words, max_length=limit, truncation=True)["input_ids"]
    fits = pipeline.tokenizers[0].decode(ids[1:-1])
    prompts = [words, "a handwritten two", fits]
    long, short, same = (e.context for e in diffusers_io.embed_prompts(pipeline, prompts))
    np.testing.assert_array_equal(long, same)
    assert np.abs(long - short).max() > 0.1
    assert "1 of 3 prompts are longer than the tokenizer takes and were cut" in caplog.text


def test_seeds_of_one_use_are_never_anothers():
    collected = [seeds.collected_seeds(run, 100) for run in (0, 1, 2047)]
    evaluated = [seeds.evaluated_seeds(run, 100) for run in (0, 1, 2047)]
    drawn = [seed for part in (*collected, *evaluated) for seed in part]
    assert len(set(drawn)) == len(drawn)
    assert max(drawn) < 2**32
    others = [seeds.collected_seeds(run, 100) for run in (2048, 31337, seeds.SEEDS - 1)]
    assert len({start for start, *_ in (*others, *collected)}) == 6
    assert max(map(max, others)) < seeds.EVALUATED <= min(seeds.evaluated_seeds(31337, 100))
    assert max(seeds.evaluated_seeds(31337, seeds.EACH)) < 2**32
    for run, count in ((seeds.SEEDS, 1), (-1, 1), (0, 2**20 + 1)):
        for give_out in (seeds.collected_seeds, seeds.evaluated_seeds):
            with pytest.raises(ValueError, match="at most 1048576 images and its seed is in"):
                give_out(run, count)
