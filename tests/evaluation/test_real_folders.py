"""evaluate, end to end: folders like SD1.5's, SDXL's and an editing model's, judged by CLIP."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from PIL import Image

import dmpo_jax
from dmpo_jax import families
from dmpo_jax.toy import debug
from tests.support import launched
from tests.support.reward_folders import write_clip

DRAWING = {"steps": 2, "guidance_scale": 3.0, "batch_size": 4, "dtype": "float32"}


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    write_clip(folder / "clip")
    write_clip(folder / "pick", seed=1)
    return f"pickscore:{folder / 'pick'},clip:{folder / 'clip'}"


def make(folder, family):
    """Two models of one kind that differ in a weight."""
    debug.write_tiny_pipeline(epath.Path(folder / "base"), families.family_named(family))
    shutil.copytree(folder / "base", folder / "tuned")
    from safetensors.numpy import load_file, save_file

    file = folder / "tuned" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_out.weight"] = tensors["conv_out.weight"] * 1.5
    save_file(tensors, file)
    return folder / "base", folder / "tuned"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd_edit"])
def test_from_the_command_line_and_from_python(family, judges, tmp_path):
    base, tuned = make(tmp_path, family)
    rows = [{"prompt": f"a handwritten {w}", "negative_prompt": "two"} for w in ("one", "two")]
    for i, row in enumerate(rows):
        Image.fromarray(np.full((40, 40, 3), 90 * i, np.uint8)).save(tmp_path / f"{i}.png")
        row |= {"image": f"{i}.png"} if family == "sd_edit" else {}
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    given = {**DRAWING, "prompts": str(tmp_path / "prompts.json"), "images_per_prompt": 2}
    given |= {"a": str(base), "b": str(tuned), "judges": judges}
    if family == "sdxl":  # a base of which there is one variant only
        for file in base.rglob("*.safetensors"):
            file.rename(file.with_suffix(".fp16.safetensors"))
        given["variant"] = "fp16"
    flags = [f"--{name}={value}" for name, value in given.items()]
    done = subprocess.run(
        [sys.executable, "-m", "dmpo_jax", "evaluate", *flags, f"--out={tmp_path / 'shell'}"],
        env={**os.environ, "PYTHONPATH": str(launched.ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "policy, pickscore: win rate" in done.stdout
    result = dmpo_jax.evaluate(**given | {"judges": judges.split(",")}, out=tmp_path / "python")
    shell = tmp_path / "shell"
    rows, others = (
        [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]
        for folder in (shell, tmp_path / "python")
    )
    assert len(rows) == len(others) == 4
    for row, other in zip(rows, others, strict=True):  # this process has more devices: rounding
        assert row["images"] == other["images"]
        for name, scores in row["scores"].items():
            for model, score in scores.items():
                assert score == pytest.approx(other["scores"][name][model], abs=0.02)
    assert (shell / "report" / "index.html").exists()
    assert len(result["judges"]) == 2
    pixels = [Image.open(shell / "images" / m / "00000.png") for m in ("base", "policy")]
    assert (np.asarray(pixels[0]) != np.asarray(pixels[1])).any()
