"""Draws images from a diffusers pipeline folder, in JAX.

    python launch/sample.py --model=FOLDER --prompts=FILE --out=DIR

Writes one PNG an image with its settings inside, and DIR/grid.png, a row a prompt.

FILE has a prompt a line, or is .json, .jsonl, .csv, .tsv or .parquet with `prompt` and, if
need be, `negative_prompt`, `seed`, `image` and `mask` of each; images are for models that edit
or inpaint, and their paths relative to FILE.
"""

from absl import app, flags

from dmpo_jax.config import command_line as command
from dmpo_jax.config.leaves import from_leaves
from dmpo_jax.diffusion.samplers import SAMPLERS
from dmpo_jax.jobs.sample import sample

MODEL = flags.DEFINE_string("model", None, "diffusers pipeline folder or hub id", required=True)
PROMPTS = flags.DEFINE_string("prompts", None, "file of prompts, see above", required=True)
OUT = flags.DEFINE_string("out", None, "folder for the images", required=True)
VARIANT = flags.DEFINE_string("variant", None, "'fp16' reads *.fp16.safetensors")
SEED = flags.DEFINE_integer("seed", 0, "of the first image; each next has the next")
SAMPLER = flags.DEFINE_enum(
    "sampler", "auto", ["auto", *SAMPLERS], "auto is the one that the model's folder names"
)
IMAGES = flags.DEFINE_integer("images_per_prompt", 1, "images of each prompt", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 50, "sampler steps an image", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance_scale", 7.5, "classifier-free guidance; 1 is none")
IMAGE_GUIDANCE = flags.DEFINE_float(
    "image_guidance_scale", 1.5, "towards the given image, for editing models; 1 is none"
)
NEGATIVE = flags.DEFINE_string(
    "negative_prompt", None, "what guidance leads away from, where a prompt names none itself"
)
HEIGHT = flags.DEFINE_integer("height", None, "pixels; default the model's own", lower_bound=8)
WIDTH = flags.DEFINE_integer("width", None, "pixels; default the model's own", lower_bound=8)
BATCH = flags.DEFINE_integer("batch_size", 8, "images at a time, over all devices", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "to compute in")


def main(argv) -> None:
    del argv
    command.log_to_console()
    leaves = {
        "model.folder": MODEL.value,
        "model.variant": VARIANT.value or "",
        "model.compute_dtype": DTYPE.value,
        "seed": SEED.value,
        "sample.images_per_prompt": IMAGES.value,
        "sample.steps": STEPS.value,
        "sample.guidance_scale": GUIDANCE.value,
        "sample.image_guidance_scale": IMAGE_GUIDANCE.value,
        "sample.negative_prompt": NEGATIVE.value,
        "sample.sampler": SAMPLER.value,
        "sample.height": HEIGHT.value,
        "sample.width": WIDTH.value,
        "sample.batch_size": BATCH.value,
    }
    sample(from_leaves(leaves), prompts=PROMPTS.value, out=OUT.value)


if __name__ == "__main__":
    app.run(command.in_words(main))
