"""Writes a run's scalars to metrics.jsonl, TensorBoard and W&B."""

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from dmpo_jax import storage
from dmpo_jax.errors import MissingPackageError
from dmpo_jax.extras import install_hint


class MetricsWriter:
    """Writes metrics, a dict of scalars per step, to every requested destination.

    `metrics.jsonl` has one JSON object per line, "step" first; non-finite values are null, since
    JSON has no NaN. A file on object storage cannot be appended to, so there it is
    `metrics-<n>.jsonl`, a part every `PART_SECONDS` and one at the end.

    Only process 0 writes; on the others every method does nothing. A context manager.

    Args:
        workdir: the run's folder; created if missing.
        tensorboard: also write event files under `workdir/tensorboard`.
        wandb: also log to the Weights & Biases project of this name.
        resume_step: the step of the checkpoint that the run resumes from. Lines of later
            steps, written by a run that was killed after it, are dropped, so that no
            step appears twice: 0 for a fresh start drops all. None drops none.

    Raises:
        ImportError: `wandb` is given and not installed.
    """

    PART_SECONDS = 60.0

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        tensorboard: bool = True,
        wandb: str | None = None,
        resume_step: int | None = None,
    ):
        self._file = self._events = self._wandb = None
        self._lines: list[str] = []  # of the part that is not yet written
        self._active = jax.process_index() == 0
        if not self._active:
            return
        if wandb:
            self._wandb = _start_wandb(wandb, workdir)  # first: nothing is dropped if it fails
        self._workdir = epath.Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._in_parts = storage.is_remote(self._workdir)
        for path in sorted(self._workdir.glob("metrics*.jsonl")):
            _drop_after(path, resume_step)
        if self._in_parts:
            taken = [p.stem.rpartition("-")[2] for p in self._workdir.glob("metrics-*.jsonl")]
            self._part = 1 + max((int(n) for n in taken if n.isdigit()), default=-1)
            self._part_began = time.monotonic()
        else:
            self._file = open(self._workdir / "metrics.jsonl", "a")  # noqa: SIM115
        if tensorboard:
            # Imported only if requested: it takes most of a second.
            from tensorboardX import SummaryWriter

            # purge_step makes TensorBoard drop what the killed run wrote after the checkpoint.
            self._events = SummaryWriter(
                os.fspath(self._workdir / "tensorboard"),
                purge_step=None if resume_step is None else resume_step + 1,
            )

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(
        self, step: int, metrics: Mapping[str, Any], detail: Mapping[str, float] | None = None
    ) -> None:
        """Writes one step's scalars: numbers, or arrays without axes (which are fetched).

        detail: further scalars for TensorBoard and W&B, not for metrics.jsonl.
        """
        if not self._active:
            return
        scalars = {name: float(value) for name, value in metrics.items() if name != "step"}
        finite = {k: v if math.isfinite(v) else None for k, v in scalars.items()}
        line = json.dumps({"step": int(step), **finite}, allow_nan=False) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()  # a kill loses no line, and `tail -f` shows it at once
        else:
            self._lines.append(line)
            if time.monotonic() - self._part_began >= self.PART_SECONDS:
                self._write_part()
        if self._events is not None:
            for name, value in {**scalars, **(detail or {})}.items():
                if math.isfinite(value):  # curves cannot show the others
                    self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**scalars, **(detail or {})}, step=int(step))

    def close(self) -> None:
        """Writes buffered lines and closes every destination."""
        if self._lines:
            self._write_part()
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._events = self._wandb = None
        self._active = False

    def _write_part(self) -> None:
        (self._workdir / f"metrics-{self._part:05d}.jsonl").write_text("".join(self._lines))
        self._lines.clear()
        self._part, self._part_began = self._part + 1, time.monotonic()


def _start_wandb(project: str, workdir: epath.PathLike) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError as error:
        raise MissingPackageError(
            f"logging to the W&B project {project!r} needs wandb, which is not installed: "
            f"{install_hint('wandb')}, or set log.wandb to ''"
        ) from error
    path = storage.absolute(workdir)
    # The id is derived from the folder, so that a resumed run continues its own curves.
    run_id = hashlib.sha256(os.fspath(path).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=path.name, id=run_id, resume="allow")


def _drop_after(path: epath.Path, last_step: int | None) -> None:
    """Rewrites a file of metrics without later steps and lines cut off by a kill."""
    kept, lines = [], path.read_text().splitlines(keepends=True)
    for line in lines:
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if (last_step is None or step <= last_step) and line.endswith("\n"):
            kept.append(line)
    if len(kept) < len(lines):
        storage.write_bytes(path, "".join(kept).encode())
