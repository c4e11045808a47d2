"""The definition of an objective, and the table of all objectives.

Letters: n images of a pair (2, or 1 if the rejected one is not needed); l is the
policy's mean squared error over H, W, C, r the reference's; c chosen, x rejected.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dmpo_jax.errors import UserError
from dmpo_jax.objectives.interval import Interval
from dmpo_jax.objectives.pulls import NoPull, Pull, of_logit
from dmpo_jax.types import PerPair

Images = Float[Array, "B n H W C"]
# Of a function itself, which only computes with it; `Objective` takes Python numbers.
Beta = float | int | Float[Array, ""]
# Sizes of a hyperparameter for which every loss and its gradient stay inside float32.
SMALLEST, LARGEST = 1e-15, 1e15


class Hyperparameter(NamedTuple):
    """One keyword-only argument of an objective, as a config offers it.

    default: of the config's leaf; None is the default in the function's signature.
    meaning: a few words, shown in help and in errors. within: an `Interval`'s text.
    """

    default: float | int | None = None
    meaning: str = ""
    within: str = "(-inf, inf)"

    def check(self, name: str, value: float | int) -> None:
        """Raises ValueError unless `value` is a finite Python number in the interval."""
        interval = Interval(self.within)
        if not isinstance(value, int | float) or value not in interval:
            # Traced values are refused too: code branches on them before compiling.
            raise UserError(
                f"{name} must be a finite Python number {interval.words}".rstrip()
                + f", got {name}={value}"
                + (f"; {self.meaning}" if self.meaning else "")
            )
        if value and not SMALLEST <= abs(value) <= LARGEST:
            raise UserError(
                f"{name} must be 0 or between {SMALLEST} and {LARGEST:g} in size, or losses leave "
                f"float32's range, got {name}={value}"
            )


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss and its requirements. Hashable, so that it can be a static argument.

    Attributes:
        fn: `(policy, reference, target, preference, **hyperparameters) -> [B]`.
        name: the key in `OBJECTIVES`.
        needs_reference: the frozen model's predictions are used. If not, its forward pass
            can be left out and `reference` may be None.
        needs_rejected: image 1 is used. If not, n may be 1.
        couples_pairs: a pair's loss depends on the other pairs of the batch given.
        implied_logit: the loss is a function of u = beta/2 * margin, the logit of the
            preference that the policy implies.
        declared: `fn`'s keyword-only arguments by name, each with its default.
        calibration: hyperparameters -> `Pull`, how its loss depends on beta. None: as
            `pulls.of_logit()` for a loss of the implied logit with a beta, else unknown.
    """

    fn: Callable[..., PerPair]
    name: str
    needs_reference: bool
    needs_rejected: bool
    implied_logit: bool
    declared: Mapping[str, Hyperparameter] = dataclasses.field(hash=False, compare=False)
    couples_pairs: bool = False
    calibration: Callable[[Mapping[str, float | int]], Pull] | None = dataclasses.field(
        default=None, hash=False, compare=False
    )

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """Names of `fn`'s keyword-only arguments."""
        return tuple(self.declared)

    def __call__(
        self,
        policy: Images,
        reference: Images | None,
        target: Images,
        preference: PerPair | None = None,
        **hyperparameters: float | int,
    ) -> PerPair:
        """Computes one loss per pair, float32 `[B]`, not reduced.

        Pairs do not affect one another, unless an objective `couples_pairs` by a mean over B.

        Args:
            policy: predictions of the trained model, `[B, n, H, W, C]`, any float type.
            reference: the frozen model's predictions. Differentiate `policy` only.
            target: the correct predictions (epsilon, v, x0 or velocity).
            preference: the probability that image 0 is preferred; None is 1 everywhere. NaN marks
                a row that is padding: no mean over B counts it, and its loss has no meaning.
            **hyperparameters: Python numbers, checked before anything compiles.

        Raises:
            ValueError: if an argument that the objective needs is missing or out of range.
        """
        for name, value in hyperparameters.items():
            if name in self.declared:  # `fn` rejects unknown ones
                self.declared[name].check(name, value)
        if self.needs_reference and reference is None:
            raise UserError(
                f"objective {self.name!r} compares with a reference, got None; pass the frozen "
                "model's predictions or choose an objective with needs_reference=False"
            )
        if self.needs_rejected and policy.shape[1] != 2:
            raise UserError(
                f"objective {self.name!r} needs policy of shape [B, 2, H, W, C], got "
                f"{policy.shape}; pass the rejected images too"
            )
        if preference is None:
            label = jnp.ones(policy.shape[0], jnp.float32)
        else:
            label = preference.astype(jnp.float32)
        return self.fn(policy, reference, target, label, **hyperparameters)

    def check(self, **hyperparameters: float | int) -> None:
        """Raises ValueError if a hyperparameter is unknown, missing or out of range.

        Computes nothing: it checks a config's values before any model is loaded.
        """
        known = set(self.hyperparameters)
        needed = {p for p in known if self._default(p) is inspect.Parameter.empty}
        if not needed <= set(hyperparameters) <= known:
            raise UserError(
                f"objective {self.name!r} takes {sorted(known)}, got {sorted(hyperparameters)}"
            )
        pair = jax.ShapeDtypeStruct((1, 2, 1, 1, 1), jnp.float32)
        jax.eval_shape(lambda *x: self(*x, **hyperparameters), pair, pair, pair)

    def find_pull(self, **hyperparameters: float | int) -> Pull:
        """Returns the `Pull` with these hyperparameters; their beta is not read.

        Raises:
            UserError: beta has no scale that margins could tell, or there is none; says why, and
                what to set instead.
        """
        try:
            pull = self.calibration
            if pull is None and self.implied_logit and "beta" in self.declared:
                pull = of_logit()
            if pull is None:
                raise NoPull(
                    "it does not say how its loss depends on beta. If that is a function of "
                    "u = beta/2 * margin, declare it with implied_logit=True and a hyperparameter "
                    "beta; otherwise compare short runs"
                )
            return pull(hyperparameters)
        except NoPull as error:
            raise UserError(f"objective {self.name!r} cannot be calibrated: {error}") from None

    def _default(self, hyperparameter: str):
        return inspect.signature(self.fn).parameters[hyperparameter].default


OBJECTIVES: dict[str, Objective] = {}


def objective(
    *,
    needs_reference: bool,
    needs_rejected: bool,
    implied_logit: bool = False,
    couples_pairs: bool = False,
    calibration: Callable[[Mapping[str, float | int]], Pull] | None = None,
    **hyperparameters: Hyperparameter,
) -> Callable[[Callable[..., PerPair]], Objective]:
    """Registers a function as an objective that configs can select by its name.

    Args:
        calibration: as in `Objective`, of `pulls`.
        **hyperparameters: default, meaning and range of `fn`'s keyword-only arguments. Each
            becomes a config leaf `objectives.NAME.ARGUMENT`. An argument with a default in the
            signature needs none here.

    Raises:
        ValueError: another file's objective has that name; an argument has no default or two;
            or the signature has no argument of a name given here.
    """

    def register(fn: Callable[..., PerPair]) -> Objective:
        name = fn.__name__
        # The same file may register again: a config can be loaded more than once.
        if name in OBJECTIVES and _file(OBJECTIVES[name].fn) != _file(fn):
            raise UserError(f"objective {name!r} is already defined; give this one another name")
        declared = _declare(fn, hyperparameters)
        OBJECTIVES[name] = Objective(
            fn,
            name,
            needs_reference,
            needs_rejected,
            implied_logit,
            declared,
            couples_pairs,
            calibration,
        )
        return OBJECTIVES[name]

    return register


def _declare(
    fn: Callable[..., PerPair], given: Mapping[str, Hyperparameter]
) -> dict[str, Hyperparameter]:
    """Returns each keyword-only argument of `fn` with its single default."""
    parameters = inspect.signature(fn).parameters.values()
    arguments = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    if unknown := set(given) - set(arguments):
        raise UserError(
            f"objective {fn.__name__!r} declares {sorted(unknown)}, but its keyword-only arguments "
            f"are {sorted(arguments)}"
        )
    declared = {}
    for name, default in arguments.items():
        found = given.get(name, Hyperparameter())
        in_signature = default is not inspect.Parameter.empty
        if in_signature == (found.default is not None):
            raise UserError(
                f"objective {fn.__name__!r} needs one default for {name}, got "
                f"{'two' if in_signature else 'none'}: give it in the decorator, "
                f"{name}=Hyperparameter(default, meaning, interval), or in the signature"
            )
        declared[name] = found._replace(default=default) if in_signature else found
        declared[name].check(name, declared[name].default)
    return declared


def _file(fn: Callable[..., PerPair]) -> str:
    return inspect.unwrap(fn).__code__.co_filename
