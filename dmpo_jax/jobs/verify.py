"""Verifies a folder that a job has written: pairs, a run, a pipeline, drawn images."""

import logging
from collections.abc import Callable, Iterable

import pyarrow.parquet as pq
from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.data.encoded import records
from dmpo_jax.errors import UserError
from dmpo_jax.sampling.gallery import verify_images
from dmpo_jax.sampling.store import PLAN
from dmpo_jax.training.verify import verify_checkpoints

LOG = logging.getLogger(__name__)
Findings = Iterable[tuple[str, str]]  # (part of the folder, its fault or "")
Look = Callable[[epath.Path], Findings]


def verify(*, folder: epath.PathLike) -> list[str]:
    """Reads everything in a folder that one of our jobs wrote, and logs what is found.

    Returns:
        The parts that were verified.

    Raises:
        UserError: a part is damaged or incomplete, or the folder holds nothing of ours; lists
            the faults.
    """
    folder = epath.Path(folder)
    found = list(_findings(folder))
    for part, fault in found:
        LOG.log(logging.ERROR if fault else logging.INFO, "%s: %s", part, fault or "valid")
    if not found:
        kinds = ", ".join(name for name, _ in KINDS)
        raise UserError(f"{folder} holds nothing to verify; looked for {kinds}")
    if faults := [f"{part}: {fault}" for part, fault in found if fault]:
        raise UserError(
            f"{len(faults)} of {len(found)} parts of {folder} are not valid:\n  "
            + "\n  ".join(faults)
        )
    return [part for part, _ in found]


def _findings(folder: epath.Path) -> Findings:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder")
    for name, look in KINDS:
        if (folder / name).exists():
            yield from look(folder)
    inner = [folder / name for name in ("encoded", "export", "lora")]  # of a workdir
    for part in (*inner, *sorted(folder.glob("images/*"))):  # and of an evaluation
        if part.is_dir():
            yield from _findings(part)


def _encoded(folder: epath.Path) -> Findings:
    try:
        meta = records.load_meta(folder)
    except UserError as error:
        yield str(folder), str(error)
        return
    for name, digest in meta.hashes.items():
        same = storage.hash_file(folder / name) == digest
        yield str(folder / name), "" if same else "its bytes are not those that encode wrote"
    yield str(folder / records.MARKER), ""


def _unfinished(folder: epath.Path) -> Findings:
    if not (folder / records.MARKER).exists():
        yield str(folder), "encoding did not finish: run encode again"


def _pipeline(folder: epath.Path) -> Findings:
    _, family = diffusers_io.load_family(folder)
    for part in (family.component, "vae", *(text.name for text in family.text)):
        yield str(folder / part), _fault(lambda path=folder / part: diffusers_io.check_finite(path))
    yield str(folder), _fault(lambda: _load(folder))


def _load(folder: epath.Path) -> None:
    diffusers_io.load_pipeline(folder)
    diffusers_io.load_model(folder, abstract=True)


def _checkpoints(folder: epath.Path) -> Findings:
    for step, fault in verify_checkpoints(folder / "checkpoints"):
        yield str(folder / "checkpoints" / str(step)), fault


def _read_pairs(path: epath.Path) -> None:
    with path.open("rb") as file:
        for batch in pq.ParquetFile(file, page_checksum_verification=True).iter_batches(64):
            batch.validate(full=True)


def _one(name: str, read: Callable[[epath.Path], object]) -> tuple[str, Look]:
    return name, lambda folder: [(str(folder / name), _fault(lambda: read(folder / name)))]


def _fault(read: Callable[[], object]) -> str:
    try:
        read()
    except Exception as error:  # readers of files raise many types
        return (str(error).splitlines() or [type(error).__name__])[0]
    return ""


KINDS: tuple[tuple[str, Look], ...] = (
    (records.MARKER, _encoded),
    ("parts", _unfinished),
    ("model_index.json", _pipeline),
    ("checkpoints", _checkpoints),
    (PLAN, verify_images),
    _one(diffusers_io.LORA_FILE, lambda path: diffusers_io.check_finite(path.parent)),
    _one("pairs.parquet", _read_pairs),
    _one("config.json", storage.read_json),
    _one("result.json", storage.read_json),
)
