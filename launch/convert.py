"""Turns a training checkpoint into what PyTorch diffusers opens; or one file into a folder.

    python launch/convert.py --checkpoint=WORKDIR [--step=N] --out=DIR
    python launch/convert.py --checkpoint=WORKDIR --merge --dtype=float16 --verify --out=DIR
    python launch/convert.py --single_file=MODEL.safetensors --out=DIR

A checkpoint of every parameter becomes a pipeline folder; one of LoRA adapters a file for
`load_lora_weights`, or with --merge a pipeline folder too. A README.md says how it was made.
"""

from absl import app, flags

from dmpo_jax.config import command_line as command
from dmpo_jax.jobs.convert import convert
from dmpo_jax.jobs.single_file import single_file

CHECKPOINT = flags.DEFINE_string("checkpoint", "", "a run's --workdir")
SINGLE_FILE = flags.DEFINE_string("single_file", "", "a .safetensors file of a whole model")
OUT = flags.DEFINE_string("out", None, "folder to write", required=True)
STEP = flags.DEFINE_integer("step", None, "which checkpoint; default the newest")
WEIGHTS = flags.DEFINE_enum(
    "weights", "auto", ["auto", "policy", "ema"], "auto: the moving average where there is one"
)
MERGE = flags.DEFINE_bool("merge", False, "fold LoRA adapters into the UNet")
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "float16", "bfloat16"], "of the UNet as written"
)
SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "largest weight file, in GB", lower_bound=0.001)
VERIFY = flags.DEFINE_bool("verify", False, "compare with PyTorch diffusers; needs [eval]")
LIKE = flags.DEFINE_string("like", "", "with --single_file: a folder whose configs to take")
flags.register_multi_flags_validator(
    ["checkpoint", "single_file"],
    lambda given: bool(given["checkpoint"]) != bool(given["single_file"]),
    "give either --checkpoint or --single_file",
)


def main(argv) -> None:
    del argv
    command.log_to_console()
    if SINGLE_FILE.value:
        single_file(file=SINGLE_FILE.value, out=OUT.value, like=LIKE.value)
        return
    convert(
        workdir=CHECKPOINT.value,
        out=OUT.value,
        at=STEP.value,
        weights=WEIGHTS.value,
        merge=MERGE.value,
        dtype=DTYPE.value,
        shard_bytes=int(SHARD_GB.value * 10**9),
        verify=VERIFY.value,
    )


if __name__ == "__main__":
    app.run(command.in_words(main))
