"""`Leaf`: one option, declared once. Help, checks, identity, flags and docs derive from it."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from dmpo_jax.objectives.interval import Interval

ITSELF = "."


class Check(NamedTuple):
    """A check that is not an interval: a predicate, and words to follow "must be"."""

    fits: Callable[[Any], bool]
    words: str


class OneOf:
    """A set of choices, read at each use: a table may grow, and a function is called again."""

    def __init__(self, choices: Iterable[str] | Callable[[], Iterable[str]]):
        self._choices = choices

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices() if callable(self._choices) else self._choices)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One option of a config.

    Attributes:
        default: None if unset; the type is then `kind`.
        meaning: a few words, for help and the reference page.
        check: an interval as text ("[0, 1)"), `OneOf` or `Check`; None accepts every value.
            An unset value passes.
        affects: "run" (must match to resume a run), "program" (the compiled step), both with a
            space between, or "nothing".
        counts_with: with "run": paths of leaves, one of which must differ from its default for
            this one to count. `ITSELF` is this leaf: a leaf added later counts with itself, so
            that earlier runs keep their identity.
        content: what the path in this leaf names. Two runs that both know this content
            compare it, and may name it by different paths.
        kind: bool, int, float, str or tuple.
        named: words for some of the values, which a command line takes too.
    """

    default: Any
    meaning: str
    check: str | OneOf | Check | None = None
    affects: str = "nothing"
    counts_with: str = ""
    content: str = ""
    kind: type = str
    named: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if isinstance(self.check, str):
            Interval(self.check)  # ValueError if it is not an interval
        if unknown := set(self.affects.split()) - {"run", "program", "nothing"}:
            raise ValueError(f"a leaf affects run, program or nothing, got {sorted(unknown)}")
        if self.default is not None:
            object.__setattr__(self, "kind", type(self.default))

    @property
    def words(self) -> str:
        """The accepted values, to follow "must be"; '' if all values of its type are accepted."""
        if isinstance(self.check, OneOf):
            return f"one of {', '.join(name or repr('') for name in self.check)}"
        if isinstance(self.check, Check):
            return self.check.words
        if self.check is None:
            return ""
        words = Interval(self.check).words
        if self.kind is not float or "inf" not in self.check:
            return words
        return f"{words} and finite" if words else "any finite number"

    def wrong(self, value: Any) -> str:
        """Returns what is wrong with a value that does not fit, to follow the option's name."""
        near = ""
        if isinstance(self.check, OneOf):
            choices = [name for name in self.check if name]
            named = [name for name in choices if str(value) in name.split("_")]
            named = named or difflib.get_close_matches(str(value), choices, n=1)
            near = f": did you mean {' or '.join(map(repr, named))}?" if named else ""
        return f"must be {self.words}, but got {value!r}{near}"

    def fits(self, value: Any) -> bool:
        if value is None:
            return True
        if isinstance(self.check, OneOf):
            return value in tuple(self.check)
        if isinstance(self.check, Check):
            return self.check.fits(value)
        return self.check is None or value in Interval(self.check)


def leaf(
    default: Any,
    meaning: str,
    check: str | OneOf | Check | None = None,
    *,
    affects: str = "nothing",
    counts_with: str = "",
    content: str = "",
    named: Mapping[str, Any] | None = None,
) -> Any:
    """Declares a `Leaf` in a section's body; the annotation beside it is its type."""
    return Leaf(default, meaning, check, affects, counts_with, content, named=named or {})


class Section:
    """Base of the classes that declare leaves.

    At run time a section is a `ConfigDict`. These classes only describe it to `read_leaves` and
    to a type checker, which rejects a leaf that is not declared.
    """

    if TYPE_CHECKING:

        def __getitem__(self, name: str) -> Any: ...
        def __setitem__(self, name: str, value: Any) -> None: ...
        def __contains__(self, name: str) -> bool: ...
        def __iter__(self) -> Iterator[str]: ...
        def __len__(self) -> int: ...
        def keys(self) -> Iterable[str]: ...
        def values(self) -> Iterable[Any]: ...
        def items(self) -> Iterable[tuple[str, Any]]: ...
        def get(self, name: str, default: Any = None) -> Any: ...
        def get_type(self, name: str) -> type: ...
        def to_dict(self) -> dict[str, Any]: ...


class Root(Section):
    """Base of the class that declares a complete config."""

    if TYPE_CHECKING:

        def lock(self) -> Any: ...
        def unlocked(self) -> Any: ...
        def copy_and_resolve_references(self) -> Any: ...
        def update_from_flattened_dict(self, values: dict[str, Any]) -> None: ...


def read_leaves(section: type[Section], prefix: str = "") -> dict[str, Leaf]:
    """Returns {dotted path: leaf} of a class and of the sections that it names."""
    found = {}
    for name, annotation in typing.get_type_hints(section).items():
        path = f"{prefix}{name}"
        declared = vars(section).get(name)
        if isinstance(declared, Leaf):
            found[path] = dataclasses.replace(declared, kind=_kind(annotation))
        elif isinstance(annotation, type) and issubclass(annotation, Section):
            found |= read_leaves(annotation, f"{path}.")
    return found


def _kind(annotation: Any) -> type:
    """Returns `int` for `int | None`, `tuple` for `tuple[str, ...]`."""
    if isinstance(annotation, types.UnionType):
        (annotation,) = (a for a in typing.get_args(annotation) if a is not type(None))
    return typing.get_origin(annotation) or annotation
