"""Writes a run's scalars to metrics.jsonl, and with its images to TensorBoard, W&B and its page.

None of these can end a run, and all but the first cannot block one (`background`).
"""

import functools
import hashlib
import importlib
import io
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from PIL import Image

from dmpo_jax import storage
from dmpo_jax.errors import MissingPackageError
from dmpo_jax.extras import install_hint
from dmpo_jax.training.background import CLOSE_SECONDS, Background

LOG = logging.getLogger(__name__)
IMAGE_SIDE = 2048  # pixels of the longer side of an image in TensorBoard and W&B


class Sink:
    """A destination of a run's scalars and images. Its methods are called in a thread of its own.

    name: for messages. once: after its first failure it is off for the rest of the run.
    """

    name = ""
    once = False

    def open(self) -> None:
        """Called first."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        raise NotImplementedError

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Takes an image of `name` after update `step`; steps may come later than their rows."""

    def close(self) -> None:
        """Called last."""


class MetricsWriter:
    """Writes metrics, a dict of scalars per step, to every requested destination.

    `metrics.jsonl` has one JSON object per line, "step" first; non-finite values are null, since
    JSON has no NaN. A file on object storage cannot be appended to, so there it is
    `metrics-<n>.jsonl`, a part every `PART_SECONDS` and one at the end. Lines that cannot be
    written, because the disk is full, are kept and tried again with the next.

    Only process 0 writes; on the others every method does nothing. A context manager.

    Args:
        workdir: the run's folder; created if missing.
        tensorboard: also write event files under `workdir/tensorboard`.
        wandb: also log to the Weights & Biases project of this name.
        resume_step: the step of the checkpoint that the run resumes from. Lines of later
            steps, written by a run that was killed after it, are dropped, so that no
            step appears twice: 0 for a fresh start drops all. None drops none.
        sinks: further destinations.

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
        sinks: Sequence[Sink] = (),
    ):
        self._file: Any = None
        self._sinks: list[tuple[Background, Sink]] = []
        self._unwritten = b""  # complete lines, or the rest of one
        self._warned = False
        self._active = jax.process_index() == 0
        if not self._active:
            return
        found = list(sinks)
        if wandb:  # first: nothing is dropped if it is not installed
            found.append(_Wandb(_import_wandb(wandb), wandb, workdir))
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
            # Unbuffered: a kill loses no line, `tail -f` shows it at once, and a write says how
            # much of a line has got onto a full disk.
            self._file = open(self._workdir / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115
        if tensorboard:
            found.append(_TensorBoard(os.fspath(self._workdir / "tensorboard"), resume_step))
        for sink in found:
            self._sinks.append((Background(sink.name, once=sink.once), sink))
            self._sinks[-1][0].call(sink.open)

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
        self._unwritten += line.encode()
        if not self._in_parts or time.monotonic() - self._part_began >= self.PART_SECONDS:
            self._write_lines()
        for background, sink in self._sinks:
            background.call(sink.write, int(step), {**scalars, **(detail or {})})

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Hands an image to TensorBoard, W&B and the further destinations; from any thread."""
        for background, sink in self._sinks:
            background.call(sink.image, int(step), name, image)

    def close(self) -> None:
        """Writes buffered lines and closes every destination, within CLOSE_SECONDS."""
        if self._unwritten:
            self._write_lines()
        if self._file is not None:
            self._file.close()
        deadline = time.monotonic() + CLOSE_SECONDS
        for background, sink in self._sinks:
            background.call(sink.close)
        for background, _ in self._sinks:
            background.close(deadline)
        self._file, self._sinks, self._active = None, [], False

    def _write_lines(self) -> None:
        try:
            if self._in_parts:
                part = self._workdir / f"metrics-{self._part:05d}.jsonl"
                part.write_bytes(self._unwritten)
                self._unwritten = b""
                self._part, self._part_began = self._part + 1, time.monotonic()
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._warned:
                LOG.warning("metrics.jsonl cannot be written, and is tried again: %s", error)
            self._warned = True


class _TensorBoard(Sink):
    """One event file. resume_step: TensorBoard drops what a killed run wrote after it."""

    name, once = "TensorBoard", True

    def __init__(self, folder: str, resume_step: int | None):
        self._folder, self._resume_step = folder, resume_step

    @functools.cached_property
    def _writer(self) -> Any:
        # tensorboardX's SummaryWriter writes in a thread of its own, and if that fails, blocks
        # in `add_scalar` for ever.
        from tensorboardX.event_file_writer import EventsWriter, directory_check
        from tensorboardX.proto import event_pb2

        events: Any = event_pb2  # generated: its names are not there to be read
        directory_check(self._folder)
        writer = EventsWriter(os.path.join(self._folder, "events"))
        if self._resume_step is not None:
            start = events.SessionLog(status=events.SessionLog.START)
            step = self._resume_step + 1
            writer.write_event(events.Event(wall_time=time.time(), step=step, session_log=start))
        return writer

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2

        events: Any = event_pb2
        for name, value in scalars.items():
            if math.isfinite(value):  # curves cannot show the others
                event = events.Event(wall_time=time.time(), step=step)
                event.summary.CopyFrom(summary.scalar(name, value))
                self._writer.write_event(event)
        self._writer.flush()

    def image(self, step: int, name: str, image: Image.Image) -> None:
        from tensorboardX.proto import event_pb2

        small, content = small_copy(image, IMAGE_SIDE), io.BytesIO()
        small.save(content, "PNG")
        events: Any = event_pb2
        event = events.Event(wall_time=time.time(), step=step)
        value = event.summary.value.add(tag=name)
        value.image.width, value.image.height = small.size
        value.image.colorspace = 3  # RGB
        value.image.encoded_image_string = content.getvalue()
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb(Sink):
    """One W&B run. Its id is derived from the folder: a resumed run continues its own curves."""

    name, once = "W&B", True

    def __init__(self, wandb: Any, project: str, workdir: epath.PathLike):
        self._wandb, self._project, self._path = wandb, project, storage.absolute(workdir)

    @functools.cached_property
    def _run(self) -> Any:
        run_id = hashlib.sha256(os.fspath(self._path).encode()).hexdigest()[:16]
        return self._wandb.init(
            project=self._project, name=self._path.name, id=run_id, resume="allow"
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        small = small_copy(image, IMAGE_SIDE)
        shown = self._wandb.Image(small, caption=f"update {step}")
        # W&B drops what is logged at an earlier step than it has; without one, the image goes
        # along with the next row.
        self._run.log({name: shown}, commit=False)

    def close(self) -> None:
        self._run.finish()


def small_copy(image: Image.Image, side: int) -> Image.Image:
    """Returns a copy in RGB of at most `side` pixels a side."""
    copy = image.convert("RGB") if image.mode != "RGB" else image.copy()
    copy.thumbnail((side, side))
    return copy


def _import_wandb(project: str) -> Any:
    try:
        return importlib.import_module("wandb")  # an extra
    except ImportError as error:
        raise MissingPackageError(
            f"logging to the W&B project {project!r} needs wandb, which is not installed: "
            f"{install_hint('wandb')}, or set log.wandb to ''"
        ) from error


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
