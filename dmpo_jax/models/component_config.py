"""A component's config.json: every key is supported or refused by name."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dmpo_jax.errors import UserError

# Keys that libraries write into every config.json; none of them affects the computation.
BOOKKEEPING = frozenset(
    "_class_name _diffusers_version _name_or_path architectures dtype model_type torch_dtype "
    "transformers_version".split()
)


# Largest number of layers or blocks: more are built for minutes, one by one, and then fit no file.
MOST_LAYERS = 512


class Only:
    """A key supported only at its default, or at equivalent values."""

    def __init__(self, *values: Any):
        self.values = values


class ModelConfig(Mapping[str, Any]):
    """An immutable, hashable config whose keys are also attributes.

    Args:
        given: the contents of config.json.
        keys: key -> default if the key is supported, `Only(...)` if it is supported at
            these values only (the first is the default).
        dead: keys of old or foreign configs that never change the result.

    Raises:
        ValueError: naming every key whose value is not supported.

    Unknown keys are accepted while unset (None or False): libraries add switches
    over the years, and an unset switch leaves the computation as it was.
    """

    def __init__(self, given: Mapping[str, Any], keys: Mapping[str, Any], dead: frozenset[str]):
        refused = []
        for key, value in given.items():
            if key in BOOKKEEPING or key in dead:
                continue
            rule = keys.get(key, Only(None, False))
            if isinstance(rule, Only) and not any(_same(value, v) for v in rule.values):
                allowed = " or ".join(repr(v) for v in rule.values)
                refused.append(f"{key}={_short(value)} (supported: {allowed})")
            elif not _kind_fits(value, rule):
                refused.append(f"{key}={_short(value)} (supported: values like {rule!r})")
            elif _depth(key, value) > MOST_LAYERS:
                refused.append(f"{key}={_short(value)} (supported: {MOST_LAYERS} layers at most)")
        if refused:
            name = given.get("_class_name") or given.get("architectures") or "this model"
            raise UserError(f"config.json of {name} asks for {'; '.join(refused)}")
        defaults = {k: v.values[0] if isinstance(v, Only) else v for k, v in keys.items()}
        self._values = {**defaults, **given}
        self.given = dict(given)
        self._hash = hash(json.dumps(self._values, sort_keys=True, default=str))

    def __getattr__(self, key: str) -> Any:
        try:
            return self.__dict__["_values"][key]
        except KeyError:
            raise AttributeError(key) from None

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelConfig) and self._values == other._values


def _depth(key: str, value: Any) -> float | int:
    """Returns the number of layers or blocks that a setting asks for; 0 for other settings.

    A list has one block an entry.
    """
    if isinstance(value, list | tuple):
        return max([len(value), *(_depth(key, v) for v in value)])
    return value if "layers" in key and _is_number(value, whole=False) else 0


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _same(a: Any, b: Any) -> bool:
    """True if two values are the same setting: 1 and 1.0 are, True and 1 are not."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def per_block(value: Any, blocks: int, key: str) -> list[Any]:
    """Expands a setting, given once or once per block, to one value per block."""
    values = list(value) if isinstance(value, list | tuple) else [value] * blocks
    if len(values) != blocks:
        raise UserError(f"{key} needs one value or {blocks} (one a block), got {value!r}")
    return values


def _kind_fits(value: Any, default: Any) -> bool:
    """True if a value has its default's type; a number may also be a list, one per block."""
    if value is None or default is None or isinstance(default, Only):
        return True  # unset, or checked by value
    if isinstance(default, bool | str):
        return type(value) is type(default)
    if isinstance(default, tuple):
        example = default[0] if default else 0  # the empty ones name layers
        return isinstance(value, list | tuple) and all(_kind_fits(v, example) for v in value)
    values = value if isinstance(value, list | tuple) else [value]
    return all(
        all(_kind_fits(v, default) for v in x)
        if isinstance(x, list | tuple)  # transformer_layers_per_block, once per layer
        else _is_number(x, whole=isinstance(default, int))
        for x in values
    )


def _is_number(value: Any, whole: bool) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (not whole or float(value).is_integer())
