"""The parts of an encode, their sidecars once complete, and the store of prompts."""

import collections
import dataclasses
import functools
import gc
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.data import sources
from dmpo_jax.data.encoded import prompt_store
from dmpo_jax.data.encoded.prompt_store import PromptEmbedding
from dmpo_jax.data.sources.splits import hash_share
from dmpo_jax.encoding.given import Given
from dmpo_jax.errors import UserError
from dmpo_jax.models import parameters
from dmpo_jax.progress import Progress

LOG = logging.getLogger(__name__)
PARTS = "parts"  # folder of the plan and the sidecars


class Part(NamedTuple):
    """Units of a source whose pairs share one file of each split."""

    number: int
    units: tuple[sources.Unit, ...]

    @property
    def rows(self) -> int:
        return sum(unit.stop - unit.start for unit in self.units)


@dataclasses.dataclass(frozen=True)
class Work:
    """An encode as every process knows it. about: the content of encoded.json.

    load_text: returns the pipeline with its text encoders. given: embeddings in their place.
    devices: of this process. batch_size: a multiple of their number.
    """

    out: epath.Path
    source: Any
    parts: Sequence[Part]
    pipeline: diffusers_io.Pipeline
    load_text: Callable[[], diffusers_io.Pipeline]
    devices: jax.sharding.Mesh
    about: Mapping[str, Any]
    flip: bool
    batch_size: int
    num_threads: int
    max_bad: float | int
    given: Given | None = None

    def sidecar(self, kind: str, number: int) -> epath.Path:
        return self.out / PARTS / f"{kind}-{number:05d}.json"


class Table(NamedTuple):
    """Numbers of all distinct prompts, in order, and the prompts for validation.

    Only this table grows with the data, by some 200 bytes a prompt.
    """

    number: dict[str, int]
    held_out: frozenset[str]


def make_parts(units: Iterable[sources.Unit], rows: int) -> list[Part]:
    """Groups consecutive units into parts of up to `rows` rows; a larger unit is a part alone."""
    groups: list[list[sources.Unit]] = []
    held = 0
    for unit in units:
        if not groups or held + unit.stop - unit.start > rows:
            groups.append([])
            held = 0
        groups[-1].append(unit)
        held += unit.stop - unit.start
    return [Part(i, tuple(group)) for i, group in enumerate(groups)]


def list_prompts(work: Work, index: int, count: int) -> None:
    """Writes the distinct prompts of each of this process's parts."""
    for part in work.parts[index::count]:
        path = work.sidecar("prompts", part.number)
        if storage.find_json(path) is None:
            found = itertools.chain.from_iterable(map(work.source.prompts, part.units))
            storage.write_json(path, list(dict.fromkeys(found)))


def load_table(work: Work) -> Table:
    """Returns the prompts numbered by first occurrence over the parts; the empty prompt is 0.

    Prompts that given embeddings lack are left out.

    Raises:
        ValueError: a part's prompts are missing in this process's `out`.
    """
    number, missing = {"": 0}, set()
    for part in work.parts:
        for prompt in found_sidecar(work, "prompts", part.number):
            if work.given is None or prompt in work.given:
                number.setdefault(prompt, len(number))
            else:
                missing.add(prompt)
    if missing:
        LOG.warning(
            "%d of %d prompts have no embedding in %s, such as %r: their pairs are skipped",
            len(missing),
            len(missing) + len(number) - 1,
            work.given and work.given.folder,
            min(missing)[:60],
        )
    fraction = work.about["validation_fraction"]
    return Table(number, frozenset(held_out_prompts(number, fraction)))


def held_out_prompts(prompts: Iterable[str], fraction: float | int) -> set[str]:
    """Returns the prompts of the validation split: those held out by `splits.is_held_out`.

    A prompt is therefore on the same side in every data set, with one exception. If the fraction
    is above 0 and there are two non-empty prompts, neither side is empty: the prompt of lowest
    hash is held out, and the one of highest hash is not.
    """
    shares = {prompt: hash_share(prompt) for prompt in prompts}
    held = {prompt for prompt, share in shares.items() if share < fraction}
    texts = sorted(filter(None, shares), key=lambda prompt: shares[prompt])
    if fraction > 0 and len(texts) > 1:
        held |= {texts[0]}
        held -= {texts[-1]}
    return held


def write_prompts(work: Work, table: Table, index: int, count: int) -> None:
    """Writes this process's files of the prompt store."""
    starts = range(0, len(table.number), prompt_store.PER_SHARD)
    own = range(len(starts))[index::count]
    done = whole_sidecars(work, "store", own)
    mine = [k for k in own if k not in done]
    if not mine:
        return
    total = min(len(mine) * prompt_store.PER_SHARD, len(table.number))
    embed = _embed_by(work)
    with Progress(total, description="prompts") as progress:
        for k in mine:
            stop = starts[k] + prompt_store.PER_SHARD
            texts = list(itertools.islice(table.number, starts[k], stop))
            shard, shapes = prompt_store.write_prompts(work.out, k, embed(texts))
            about = {"files": {"store": shard._asdict()}, "shapes": shapes}
            storage.write_json(work.sidecar("store", k), about)
            progress.advance(len(texts))
    del embed
    gc.collect()  # modules form reference cycles that keep their arrays alive


def _embed_by(work: Work) -> Callable[[Sequence[str]], Iterable[PromptEmbedding]]:
    """Returns prompts -> their embeddings: the given ones, or the text encoders' own."""
    given = work.given
    if given is not None:
        LOG.info("prompts: embeddings of %s, no text encoder is loaded", given.folder)
        return lambda texts: (given[text] for text in texts)
    pipeline = work.load_text()
    LOG.info("%s", describe_memory(pipeline))
    return functools.partial(embed, pipeline)


def describe_memory(pipeline: diffusers_io.Pipeline) -> str:
    """Returns the bytes of the text encoders on each device, in words."""
    held = [x for encoder in pipeline.text_encoders for x in parameters.split(encoder)[1].values()]
    each: collections.Counter[Any] = collections.Counter()
    for array in held:
        for shard in array.addressable_shards:
            each[shard.device] += shard.data.nbytes
    return (
        f"text encoders: {sum(x.nbytes for x in held) / 1e9:.3g} GB, of which a device holds "
        f"{max(each.values(), default=0) / 1e9:.3g} GB ({len(each)} devices)"
    )


def embed(pipeline: diffusers_io.Pipeline, texts: Sequence[str]) -> Iterator[PromptEmbedding]:
    """Yields the texts' embeddings, in the family's dtype."""
    dtype = np.dtype(pipeline.family.stored)
    embedded: Any = diffusers_io.embed_prompts(pipeline, texts)  # NumPy arrays
    for text, (context, pooled, length) in zip(texts, embedded, strict=True):
        pooled = None if pooled is None else pooled.astype(dtype)
        yield PromptEmbedding(text, context.astype(dtype), pooled, length)


def whole_sidecars(work: Work, kind: str, numbers: Iterable[int]) -> dict[int, Any]:
    """Returns {number: sidecar} of the complete parts: their files exist in the recorded sizes."""
    whole, present = {}, storage.list_names(work.out)
    for number in numbers:
        found = storage.find_json(work.sidecar(kind, number))
        if found is None:
            continue
        files = {shard["name"]: shard["size"] for shard in found["files"].values()}
        if storage.first_incomplete(work.out, files, present) is None:
            whole[number] = found
    return whole


def found_sidecar(work: Work, kind: str, number: int) -> Any:
    """Reads a sidecar; raises ValueError if it is missing."""
    found = storage.find_json(work.sidecar(kind, number))
    if found is None:
        raise UserError(
            f"{work.sidecar(kind, number)} is missing: is {work.out} a folder that all processes "
            "share? Run encode again"
        )
    return found
