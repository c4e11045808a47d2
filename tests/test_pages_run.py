"""The commands of README.md and docs/, run as a page has them, on tiny models and few pairs.

Only sizes are changed, by flags at the end of a line, and what a reader fills in. Hub ids are in
the hub's cache, as after a download. LEFT_OUT names what is not run.
"""

import csv
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from dmpo_jax.data import sources
from dmpo_jax.families import family_named
from dmpo_jax.toy import debug
from dmpo_jax.toy.digits import CAPTIONS
from tests.support import reward_folders
from tests.test_words import CALL, PAGES, ROOT, blocks, name_of

pytestmark = pytest.mark.slow

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
HUB = {
    SDXL: "sdxl",
    "madebyollin/sdxl-vae-fp16-fix": "vae",
    "black-forest-labs/FLUX.2-klein-base-4B": "klein",
}
PAIRS = 24
# Marks of commands that are not run.
LEFT_OUT = {
    "plan": r" plan |/plan\.py",  # compiles full models, as tests/planning does
    "digits": r"config=(configs/)?digits",  # whole jobs of minutes, as tests/toy has them
    "pod": r"launch/tpu/train\.sh",  # tests/launch checks the script
    "two machines": r"SHARED/",  # tests/launch runs two processes
    "one file": r"--single_file|--scorer=hpsv2:FILE",  # of a full model
    "source images": r"instruct_pix2pix",  # other pairs than this page's
    "the hub's data": r"hf:ORG",  # tests/data fetches from a stand-in
    "the hub": r"--push=(?!.*--push_dry_run)",  # tests/export sends to a stand-in
}
FEW_UPDATES = (
    "--config.train.steps=2 --config.train.batch_size=8 --config.train.accumulation=1 "
    "--config.optimizer.warmup_steps=1 --config.data.num_threads=1 --config.data.resolution=64 "
    "--config.sample.steps=2 --config.sample.count=2"
)
FEW_STEPS = "--steps=2 --batch_size=4"
SMALLER = {
    "train": FEW_UPDATES,
    "calibrate": f"{FEW_UPDATES} --updates=4 --rates=1",
    "encode": "--resolution=64 --num_threads=1",
    "collect": f"--pairs=12 {FEW_STEPS}",
    "sample": FEW_STEPS,
    "evaluate": f"--seeds=2 {FEW_STEPS}",
}
# What a reader fills in.
FILLED = {
    "gs://BUCKET": "bucket",
    "/kaggle": "kaggle",
    "=FILE.safetensors": "=LORA_WORKDIR/lora/pytorch_lora_weights.safetensors",
    ",OTHER.safetensors": ",LORA_WORKDIR/lora/pytorch_lora_weights.safetensors",
    "prompts=FILE": "prompts=prompts.txt",
    "=WORKDIR --lora_keys": "=LORA_WORKDIR --lora_keys",
    "--step=1000": "--step=2",
    "folder=FOLDER": f"folder={SDXL}",
    "model=FOLDER": f"model={SDXL}",
    "model=DIR": f"model={SDXL}",
    "encoded=DIR": "encoded=encoded",
    "a=BASE": f"a={SDXL}",
    "b=TUNED": "b=WORKDIR/export",
    "PartiPrompts.tsv": "prompts.txt",
}
MADE = {  # before any page's commands
    "encoded": f"dmpo-jax encode --source=table:pairs.csv --flip --out=encoded --model={SDXL}",
    "WORKDIR": f"dmpo-jax train --config=sdxl_dmpo --workdir=WORKDIR --config.model.folder={SDXL} "
    "--config.data.encoded=encoded",
    "LORA_WORKDIR": "dmpo-jax train --config=sdxl_dmpo:lora --workdir=LORA_WORKDIR "
    f"--config.model.folder={SDXL} --config.data.encoded=encoded",
}


def lines(page: pathlib.Path) -> list[str]:
    """Complete commands of a page, in order, without comments."""
    found = []
    for block in blocks(page.read_text(), "bash|sh"):
        for line in block.replace("\\\n", " ").splitlines():
            command = " ".join(line.partition(" #")[0].split())
            if CALL.search(command) and not any(re.search(x, command) for x in LEFT_OUT.values()):
                found.append(command)
                if "--dry_run" in command:  # pages say to run it again without
                    found.append(command.replace(" --dry_run", ""))
    return found


def smaller(line: str, count: int = 0) -> str:
    """A command with what a reader fills in, and with few updates, pairs and steps."""
    match = CALL.search(line)
    assert match
    for place, what in FILLED.items():
        line = line.replace(place, what)
    line = line.replace("--out=DIR", f"--out=out{count}")
    line = line.replace(" ...", f" --config.data.encoded=encoded --config.model.folder={SDXL}")
    whole = "--inspect" in line or ":debug" in line
    return f"{line} {'' if whole else SMALLER.get(match['name'] or match['script'] or '', '')}"


def write_hub(cache: pathlib.Path) -> None:
    """The hub's cache with a tiny model under each id."""
    commit = "0" * 40
    for repository, kind in HUB.items():
        top = cache / f"models--{repository.replace('/', '--')}"
        folder = top / "snapshots" / commit
        (top / "refs").mkdir(parents=True)
        (top / "refs" / "main").write_text(commit)
        if kind == "vae":
            sdxl = cache / f"models--{SDXL.replace('/', '--')}" / "snapshots" / commit
            shutil.copytree(sdxl / "vae", folder)
        else:
            debug.write_tiny_pipeline(epath.Path(folder), family_named(kind))


def write_given(folder: pathlib.Path) -> None:
    """The reader's own files: pairs in the forms that pages name, prompts, reward models."""
    rng = np.random.default_rng(0)
    for place in (folder, folder / "kaggle" / "input" / "pairs"):
        (place / "img").mkdir(parents=True)
        with (place / "pairs.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("prompt", "chosen", "rejected"))
            for i in range(PAIRS):
                names = [f"img/{i:04}_{side}.png" for side in "ab"]
                for name in names:
                    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
                    (place / name).write_bytes(sources.encode_image(image))
                rows.writerow((CAPTIONS[i % 10], *names))
    pick_a_pic = folder / "bucket" / "pick-a-pic"
    pick_a_pic.mkdir(parents=True)
    sources.write_pick_a_pic(epath.Path(pick_a_pic / "0.parquet"), debug.synthetic_pairs(PAIRS))
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS[:4]) + "\n")
    for i, name in enumerate(("PICKSCORE_FOLDER", "CLIP_FOLDER")):
        reward_folders.write_clip(folder / name, seed=i)
    reward_folders.write_open_clip(folder / "HPSV21_FOLDER", reward_folders.clip_model(seed=2))


class Reader:
    """Someone who pastes commands in a folder. run: raises AssertionError with a failed one."""

    def __init__(self, cache: pathlib.Path, folder: pathlib.Path):
        self.folder = folder
        programs = pathlib.Path(sys.executable).parent
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))},
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": "1",
            "JAX_PLATFORMS": "cpu",
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        for name in ("launch", "configs"):
            if not (folder / name).exists():
                (folder / name).symlink_to(ROOT / name)

    def run(self, line: str) -> str:
        line = line.replace("dmpo-jax ", "python -m dmpo_jax ")
        ended = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, f"{line}\n{ended.stderr[-3000:]}"
        return ended.stderr + ended.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """(hub cache, folder with the reader's files and what MADE makes)."""
    cache, folder = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")
    write_hub(cache)
    write_given(folder)
    reader = Reader(cache, folder)
    for line in MADE.values():
        reader.run(smaller(line))
    return cache, folder


@pytest.mark.parametrize("page", [page for page in PAGES if lines(page)], ids=name_of)
def test_a_page_can_be_pasted(page, home, tmp_path):
    cache, made = home
    folder = tmp_path / "reader"
    shutil.copytree(made, folder, symlinks=True)
    text = page.read_text()
    for name in MADE:  # unless the page makes it
        if any(re.search(rf"(--out|--workdir)={name}(?![\w/])", line) for line in lines(page)):
            shutil.rmtree(folder / name)
    for name in ("pickapic", "ours"):
        if f"BUCKET/{name}=" in text:
            shutil.copytree(folder / "encoded", folder / "bucket" / name)
    if "--b=run/export" in text and "--workdir=run" not in text:
        shutil.copytree(folder / "WORKDIR", folder / "run")
    if "BUCKET/encoded" in text and "--out=gs://BUCKET/encoded" not in text:
        shutil.copytree(folder / "encoded", folder / "bucket" / "encoded")
    reader = Reader(cache, folder)
    for i, line in enumerate(lines(page)):
        reader.run(smaller(line, i))


def test_a_command_that_fails_is_found(home):
    with pytest.raises(AssertionError, match="no table at nothing"):
        Reader(*home).run("dmpo-jax encode --source=table:nothing.csv --inspect=look2")
