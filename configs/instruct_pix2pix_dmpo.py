"""Aligns InstructPix2Pix (SD1.5 that edits an image as a prompt says) with DMPO.

    python launch/train.py --config=configs/instruct_pix2pix_dmpo.py --workdir=DIR \\
        --config.model.folder=timbrooks/instruct-pix2pix \\
        --config.data.encoded=ENCODED   # made by launch/encode.py

A pair is two edits of one image (column jpg_source), labelled by people. No DMPO on editing is
published: the settings are SD1.5's, with the dropout that InstructPix2Pix was trained with
(arXiv 2211.09800: 5 % lose the prompt, 5 % the image, 5 % both).
Inpainting models train in the same way, from `configs/sd15_dmpo.py` or `sdxl_dmpo.py`,
with a column mask.
`configs/instruct_pix2pix_dmpo.py:debug` runs the same path at tiny width, without any file.
"""

from dmpo_jax import config as base


def get_config(variant: str = ""):
    config = base.defaults()
    config.objective = "dmpo"
    config.objectives.dmpo.beta = 2000.0
    config.objectives.dmpo.alpha = 0.01
    config.data.prompt_dropout = 0.1
    config.optimizer.learning_rate = 2.048e-5
    if variant not in ("", "debug"):
        raise ValueError(f"this config has the variant 'debug', but got {variant!r}")
    return base.debug(config, "sd_edit") if variant else config
