"""Interpretation of a row's columns: the images, and the preference between them."""

import collections
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dmpo_jax.data.sources import rows
from dmpo_jax.data.sources.rows import RawPair, SkipError, Skipped, check_text
from dmpo_jax.errors import UserError

LOG = logging.getLogger(__name__)
# Our name -> accepted column names; the first one present is read.
NAMES = {
    "prompt": ("prompt", "caption"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "image_0": ("image_0", "jpg_0"),
    "image_1": ("image_1", "jpg_1"),
    "label_0": ("label_0", "label"),
    "votes_0": ("votes_0",),
    "votes_1": ("votes_1",),
    "score_0": ("score_0",),
    "score_1": ("score_1",),
    "images": ("images", "image_path", "image_paths", "generations"),
    "ranks": ("ranks", "rank", "ranking"),
    "scores": ("scores", "human_preference"),
    "source": ("source", "jpg_source"),
    "mask": ("mask",),
}
MAX_IMAGES = 100  # of a prompt; K images make K (K - 1) / 2 pairs
# (images, preference): the first form whose columns are all present.
FORMS = (
    (("chosen", "rejected"), ()),
    (("image_0", "image_1"), ("label_0",)),
    (("image_0", "image_1"), ("votes_0", "votes_1")),
    (("image_0", "image_1"), ("score_0", "score_1")),
    (("images",), ("ranks",)),
    (("images",), ("scores",)),
)


class Preference(NamedTuple):
    """Image `first` is preferred to image `second` with probability `value`."""

    first: int
    second: int
    value: float


class Layout(NamedTuple):
    """Columns of a table that are read, and their meaning.

    images: two columns, or one that holds a list. values: the columns that state the preference;
    empty if the first image is chosen. Both use the names in NAMES; `columns` maps these, and "id"
    where rows have ids of their own, to the table's own.
    """

    images: tuple[str, ...]
    values: tuple[str, ...]
    columns: Mapping[str, str]

    @property
    def given(self) -> frozenset[str]:
        return frozenset(self.columns) & {"source", "mask"}

    def wanted(self, *, images: bool) -> list[str]:
        """Returns the table's columns to read, with or without those of images."""
        heavy = {*self.images, "source", "mask"}
        return [column for name, column in self.columns.items() if images or name not in heavy]

    def prompt(self, row: Mapping[str, Any]) -> str:
        return check_text(row.get(self.columns["prompt"]), "prompt")

    def preferences(self, row: Mapping[str, Any]) -> list[Preference]:
        """Returns the preference between every two images of a row.

        Raises:
            SkipError: the label is missing or invalid.
        """
        values = [row.get(self.columns[name]) for name in self.values]
        if any(value is None for value in values):
            raise SkipError("no label", bad=False)
        if len(self.images) == 1:
            return _compare_all(values[0], lower_is_better=self.values == ("ranks",))
        if not values:
            return [Preference(0, 1, 1.0)]
        numbers = [_number(value) for value in values]
        if self.values == ("label_0",):
            (label,) = numbers
            if not 0 <= label <= 1:
                raise SkipError("bad label", f"should lie in [0, 1], but is {label}")
            return [Preference(0, 1, label)]
        if self.values == ("votes_0", "votes_1"):
            return [Preference(0, 1, _share(*numbers))]
        return [Preference(0, 1, _better(*numbers))]

    def pairs(
        self, name: str, row: Mapping[str, Any], load: Callable[[Any], bytes], ties: str
    ) -> Iterator[RawPair | Skipped]:
        """Yields the pairs of a row; load: a cell -> its encoded image, or raises SkipError.

        Raises:
            SkipError: the row has no pair, or its images exceed MAX_BYTES.
        """
        if "id" in self.columns:
            name = check_text(row.get(self.columns["id"]), "id")
        prompt, preferences = self.prompt(row), self.preferences(row)
        cells = self._cells(row, 1 + max(p.second for p in preferences))
        wanted = [p for p in preferences if ties == "keep" or p.value != 0.5]
        needed = {i for p in wanted for i in (p.first, p.second)}
        load = _within_bytes(load)
        images = [_try(load, cell) if i in needed else None for i, cell in enumerate(cells)]
        # Only some models require these images, so a missing one is not an error here.
        given = {
            field: image if isinstance(image, bytes) else None
            for field in self.given
            if wanted and (image := _try(load, row.get(self.columns[field])))
        }
        for first, second, value in preferences:
            own = f"{name}:{first}-{second}" if len(self.images) == 1 else name
            if ties == "drop" and value == 0.5:
                yield Skipped(own, "tie", bad=False)
                continue
            a, b = images[first], images[second]
            if isinstance(a, bytes) and isinstance(b, bytes):
                yield RawPair(own, prompt, (a, b), value, **given)
            else:
                yield next(image.at(own) for image in (a, b) if isinstance(image, SkipError))

    def prompts(self, row: Mapping[str, Any], ties: str) -> Iterator[str]:
        """Yields the prompt of a row if its labels admit a pair, without reading images."""
        try:
            prompt, preferences = self.prompt(row), self.preferences(row)
        except SkipError:
            return
        if ties == "keep" or any(p.value != 0.5 for p in preferences):
            yield prompt

    def most_pairs(self, row: Mapping[str, Any]) -> int:
        """Returns an upper bound on the pairs of a row."""
        if len(self.images) == 2:
            return 1
        values = row.get(self.columns[self.values[0]])
        try:
            return max(math.comb(len(_as_list(values)), 2), 1)
        except SkipError:
            return 1

    def _cells(self, row: Mapping[str, Any], count: int) -> Sequence[Any]:
        if len(self.images) == 2:
            return [row.get(self.columns[name]) for name in self.images]
        cells = row.get(self.columns["images"])
        if cells is None:
            raise SkipError("no image")
        cells = _as_list(cells)
        if len(cells) != count:
            raise SkipError("uneven lists", f"{len(cells)} images, but {count} {self.values[0]}")
        return cells


def find_layout(names: Sequence[str], where: str) -> Layout:
    """Returns the layout of a table's columns.

    Raises:
        ValueError: the columns hold no known form of pairs, or one occurs twice; names the columns.
    """
    found, known = {}, set(names)
    for name, others in NAMES.items():
        present = [other for other in others if other in known]
        if present:
            found[name] = present[0]
    forms = [form for form in FORMS if all(name in found for name in itertools.chain(*form))]
    if "prompt" not in found or not forms:
        sets = "; ".join(", ".join([*images, *values]) for images, values in FORMS)
        raise UserError(
            f"{where} holds no pairs that are known: it needs the column prompt (or caption) and "
            f"one of these sets: {sets}. It has {sorted(names)}: rename its columns"
        )
    count = collections.Counter(names)
    if twice := sorted(name for name in found.values() if count[name] > 1):
        raise UserError(f"{where} has the columns {twice} twice: keep one of each")
    images, values = forms[0]
    if len(forms) > 1:
        LOG.info("%s: preferences are read from %s", where, list(values) or list(images))
    if found.get("label_0") == "label":
        LOG.warning("%s: label is read as the probability that image_0 is preferred", where)
    used = ("prompt", *images, *values, "source", "mask")
    return Layout(images, values, {name: found[name] for name in used if name in found})


def _number(value: Any) -> float:
    """Returns the value, or a CSV cell's text, as a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise SkipError("bad label", f"should be a number, but is {value!r:.80}")
    return number


def _share(first: float, second: float) -> float:
    if min(first, second) < 0:
        raise SkipError("bad label", f"votes should not be below 0, but are {first} and {second}")
    total = first + second
    if total == 0:
        raise SkipError("no label", "no votes", bad=False)
    if total == math.inf:
        raise SkipError("bad label", f"{first} and {second} votes")
    return first / total


def _better(first: float, second: float) -> float:
    return 0.5 if first == second else float(first > second)


def _compare_all(values: Any, *, lower_is_better: bool) -> list[Preference]:
    numbers = [_number(value) for value in _as_list(values)]
    if len(numbers) < 2:
        raise SkipError("uneven lists", f"a list of {len(numbers)} makes no pair")
    if lower_is_better:
        numbers = [-number for number in numbers]
    return [
        Preference(i, j, _better(numbers[i], numbers[j]))
        for i, j in itertools.combinations(range(len(numbers)), 2)
    ]


def _as_list(value: Any) -> Sequence[Any]:
    """Returns a list, parsed from JSON if it is a CSV's cell."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise SkipError("bad label", f"should be a list, but is {value!r:.80}") from error
    if not isinstance(value, list | tuple):
        raise SkipError("bad label", f"should be a list, but is {value!r:.80}")
    if len(value) > MAX_IMAGES:
        raise SkipError("uneven lists", f"should hold up to {MAX_IMAGES}, but holds {len(value)}")
    return value


def _try(load: Callable[[Any], bytes], cell: Any) -> bytes | SkipError:
    try:
        return load(cell)
    except SkipError as skip:
        return skip


def _within_bytes(load: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Wraps `load` to raise SkipError once the images of a row exceed MAX_BYTES."""
    total = 0

    def load_counted(cell: Any) -> bytes:
        nonlocal total
        image = load(cell)
        total += len(image)
        if total > rows.MAX_BYTES:
            raise SkipError("absurd size", f"encoded images of more than {rows.MAX_BYTES} bytes")
        return image

    return load_counted
