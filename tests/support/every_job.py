"""Every command that writes a folder, as small as can be: what it is given and what it wrote."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

from dmpo_jax.toy.digits import PIPELINE
from dmpo_jax.training.telemetry import MEASURED
from tests.support import launched, tiny

# With times, host names or paths of the run inside, or for people to look at alone.
UNCOMPARED = (
    ".lock",
    "tensorboard",
    "parts",
    "checkpoints",
    "fork.json",
    "config.json",
    "README.md",
)


class Given(NamedTuple):
    """The commands' inputs: a folder with the tiny model, its pairs and a run."""

    folder: pathlib.Path

    def command(self, job: str, out: pathlib.Path) -> list[str]:
        """[job, flags ...] of a job that writes `out`."""
        at, digits = self.folder, str(PIPELINE)
        if job == "convert":
            self.train()
        drawing = ["--steps=2", "--guidance_scale=1", "--batch_size=4", "--dtype=float32"]
        prompts = f"--prompts={at / 'prompts.txt'}"
        pairs = f"pickapic:{at / 'pairs.parquet'}"
        judge = "--judges=digits_svm"
        judged = ["--pairs=6", "--scorer=digits_svm"]
        encoding = [f"--source={pairs}", f"--model={at / 'model'}", "--dtype=float32"]
        arguments, where = {
            "collect": ([f"--model={digits}", prompts, *judged, *drawing], "out"),
            "encode": ([*encoding, "--batch_size=8"], "out"),
            "train": ([f"--config={at / 'config.py'}"], "workdir"),
            "sample": ([f"--model={digits}", prompts, *drawing], "out"),
            "evaluate": (
                [f"--a={digits}", f"--b={digits}", prompts, "--seeds=8", judge, *drawing],
                "out",
            ),
            "convert": ([f"--checkpoint={at / 'run'}"], "out"),
            "tfds": ([f"--config={json.dumps({'name': 'x', 'source': pairs})}"], "data_dir"),
        }[job]
        return [job, *arguments, f"--{where}={out}"]

    def reads(self, job: str) -> pathlib.Path:
        """A file that the job reads."""
        at = self.folder
        return {
            "encode": at / "pairs.parquet",
            "tfds": at / "pairs.parquet",
            "train": at / "encoded" / "encoded.json",
            "convert": at / "run" / "config.json",
        }.get(job, at / "prompts.txt")

    def train(self) -> None:
        """Takes the training run, if there is none."""
        if not (self.folder / "run" / "export").exists():
            said = self.start("train", self.folder / "run").communicate()[0]
            assert (self.folder / "run" / "export").exists(), said

    def environment(self) -> dict[str, str]:
        """The variables of a command, beside this process's own."""
        return {
            "PYTHONPATH": str(launched.ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(
        self, job: str, out: pathlib.Path, environment: dict | None = None, **more
    ) -> subprocess.Popen:
        """Starts a job. environment: further variables. more: further arguments of Popen."""
        name, *flags = self.command(job, out)
        module = ["dmpo_jax.data.tfds"] if job == "tfds" else ["dmpo_jax", name]
        return subprocess.Popen(
            [sys.executable, "-m", *module, *flags],
            env={**os.environ, **self.environment(), **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **{"cwd": self.folder, **more},
        )


JOBS = ("collect", "encode", "train", "sample", "evaluate", "convert", "tfds")


def make_given(folder: pathlib.Path) -> Given:
    """Writes what the commands read, but for the run that convert reads (`Given.train`)."""
    made = tiny.write(folder)
    (folder / "prompts.txt").write_text("a handwritten one\na handwritten two\n")
    launched.write_config(folder / "config.py", made, train__steps=6, log__tensorboard=True)
    return Given(folder)


def contents(out: pathlib.Path) -> dict[str, str]:
    """The hash of every file that a job wrote; of metrics without what the clock says."""
    found = {}
    for path in sorted(out.rglob("*")):
        parts = path.relative_to(out).parts
        if not path.is_file() or any(part in UNCOMPARED for part in parts):
            continue
        if any(
            part.startswith("incomplete.") for part in parts
        ):  # TFDS leaves it of a killed build
            continue
        content = path.read_bytes()
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in content.splitlines()]
            rows = [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]
            content = json.dumps(rows).encode()
        found[str(path.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return found
