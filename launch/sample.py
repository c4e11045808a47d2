"""Draws images from a diffusers pipeline folder, in JAX.

    python launch/sample.py --model=FOLDER --prompts=FILE --out=DIR

Writes DIR/grid.png, a row a prompt, and one PNG an image with its settings inside.
"""

from absl import app, flags

from dmpo_jax import flags as command
from dmpo_jax.jobs.sample import sample

MODEL = flags.DEFINE_string("model", None, "diffusers pipeline folder or hub id", required=True)
PROMPTS = flags.DEFINE_string("prompts", None, "text file, a prompt a line", required=True)
OUT = flags.DEFINE_string("out", None, "folder for the images", required=True)
VARIANT = flags.DEFINE_string("variant", None, "'fp16' reads *.fp16.safetensors")
SEED = flags.DEFINE_integer("seed", 0, "of the first image; each next one has the next")
IMAGES = flags.DEFINE_integer("images_per_prompt", 1, "images of each prompt", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 50, "sampler steps an image", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance_scale", 7.5, "classifier-free guidance; 1 is none")
NEGATIVE = flags.DEFINE_string("negative_prompt", "", "what guidance leads away from")
BATCH = flags.DEFINE_integer("batch_size", 8, "images at a time, over all devices", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "to compute in")


def main(argv) -> None:
    del argv
    command.log_to_console()
    sample(
        model=MODEL.value,
        prompts=PROMPTS.value,
        out=OUT.value,
        variant=VARIANT.value,
        seed=SEED.value,
        images_per_prompt=IMAGES.value,
        steps=STEPS.value,
        guidance_scale=GUIDANCE.value,
        negative_prompt=NEGATIVE.value,
        batch_size=BATCH.value,
        dtype=DTYPE.value,
    )


if __name__ == "__main__":
    app.run(main)
