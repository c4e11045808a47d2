"""Collectives, memory traffic and kernels of a compiled program, from its text.

XLA's own cost analysis counts a loop's body once; here everything in a loop counts once per
trip. The text is `compiled.as_text()`, of TPU, GPU or CPU.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_OPCODE = re.compile(r"(?:^|[\]})]) ([a-z][a-z0-9\-]*)\(")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch|true|false)_computations?=\{?([^,}]+(?:, ?%[^,}]+)*)")
# Of cuBLAS and cuDNN: the last output is their workspace, whose use is not known.
_WORKSPACE = re.compile(r'custom_call_target="__cu(?:blas|dnn)\$')
# These move no data, or only data that is counted where it is produced.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all iota "
    "partition-id replica-id opt-barrier async-update async-done".split()
)
# These run each instruction of the computation that they call as a kernel of its own. Any other
# instruction is one kernel together with what it calls.
_CALLERS = frozenset({"call", "conditional", "async-start"})


class Instruction(NamedTuple):
    """One line of the text: `shape` and `rest` (operands, then attributes) are verbatim."""

    name: str
    shape: str
    opcode: str
    rest: str
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.rest)
        return found[1] if found else None


class Array(NamedTuple):
    """One array of a shape. on_chip: in a TPU's vector memory, so not HBM traffic."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        if self.dtype == "pred":
            return self.size
        bits = re.search(r"\d+", self.dtype)  # none: a token
        return -(-self.size * int(bits[0]) // 8) if bits else 0


class Collective(NamedTuple):
    """One instruction that moves data between chips.

    payload: bytes of the full array, when gathered or before it is scattered.
    moved: bytes that a chip sends, by the ring algorithms. trips: runs per step.
    moves: "parameters" (or their gradients), "activations", or "scalars" (below 4 KB, and the
    few numbers of each pair that `health` receives).
    """

    kind: str
    payload: int
    moved: int
    group: int
    trips: int
    moves: str
    dims: tuple[int, ...]
    source: str


class Program:
    """The computations of a compiled text, and how often each runs per step."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        here: dict[str, Instruction] = {}
        for line in text.splitlines():
            if found := _INSTRUCTION.match(line):
                root, name, rest = found.groups()
                if opcode := _OPCODE.search(rest):
                    shape, after = rest[: opcode.start(1) - 1], rest[opcode.end() :]
                    here[name] = Instruction(name, shape, opcode[1], after, bool(root))
            elif found := _HEADER.match(line):
                here = self.computations.setdefault(found[2], {})
                if found[1]:
                    self.entry = found[2]
        if not self.entry:
            raise ValueError("the text holds no ENTRY computation: give compiled.as_text()")
        devices = re.search(r"num_partitions=(\d+)", text[:100_000])
        replicas = re.search(r"replica_count=(\d+)", text[:100_000])
        self.devices = max(int(m[1]) if m else 1 for m in (devices, replicas))
        self.trips: Counter[str] = Counter()  # computation -> runs per step
        self.fused: set[str] = set()  # computations that run as one kernel
        self._users: dict[str, dict[str, list[Instruction]]] = {}
        self._follow(self.entry, 1)

    def _follow(self, name: str, times: int) -> None:
        self.trips[name] += times
        for line in self.computations.get(name, {}).values():
            if line.opcode == "while":
                body = line.attribute(r"body=%?([\w.\-]+)") or ""
                self._follow(body, times * self.loop_trips(name, line))
                continue
            if line.opcode in ("async-update", "async-done"):
                continue  # its computation is counted at the start
            for called in _calls(line):
                if line.opcode not in _CALLERS:
                    self.fused.add(called)
                self._follow(called, times)

    def users(self, computation: str, name: str) -> list[Instruction]:
        """Returns the instructions of a computation that use a value."""
        if computation not in self._users:
            users = self._users[computation] = {}
            for line in self.computations[computation].values():
                for operand in () if line.opcode in ("parameter", "constant") else operands(line):
                    users.setdefault(operand, []).append(line)
        return self._users[computation].get(name, [])

    def loop_trips(self, computation: str, loop: Instruction) -> int:
        """Returns a while loop's trips: as XLA states them, or by its counter; 1 if unknown."""
        known = loop.attribute(r'known_trip_count\D*"?n"?:\D*(\d+)')
        if known:
            return int(known)
        condition = self.computations.get(loop.attribute(r"condition=%?([\w.\-]+)") or "", {})
        test = [line for line in condition.values() if line.is_root]
        while test and test[0].opcode == "fusion":
            condition = self.computations[next(iter(_calls(test[0])))]
            test = [line for line in condition.values() if line.is_root]
        if not test or test[0].opcode != "compare":
            return 1
        limit = self._integers(condition)
        ends = [limit[name] for name in operands(test[0]) if name in limit]
        index = [
            int(line.attribute(r"index=(\d+)") or 0)
            for line in condition.values()
            if line.opcode == "get-tuple-element"
        ]
        if len(ends) != 1 or test[0].attribute(r"direction=(\w+)") not in ("LT", "LE"):
            return 1
        start = self._start(computation, loop, index[0]) if len(set(index)) == 1 else 0
        return max(ends[0] - start + (test[0].attribute(r"direction=(\w+)") == "LE"), 0)

    def _start(self, computation: str, loop: Instruction, index: int) -> int:
        """Returns the initial value of a loop's counter; 0 if the text does not state it."""
        lines = self.computations[computation]
        given = lines.get(next(iter(operands(loop)), ""))
        if given is None or given.opcode != "tuple":
            return 0
        return self._integers(lines).get(operands(given)[index], 0)

    @staticmethod
    def _integers(lines: dict[str, Instruction]) -> dict[str, int]:
        """Returns the integer constants, also through copies of them."""
        found: dict[str, int] = {}
        for name, line in lines.items():
            if line.opcode == "constant" and re.match(r"-?\d+\)", line.rest):
                found[name] = int(line.rest.split(")")[0])
            elif line.opcode in ("copy", "bitcast") and operands(line)[0] in found:
                found[name] = found[operands(line)[0]]
        return found


def operands(line: Instruction) -> list[str]:
    """Returns the names of an instruction's operands, in order."""
    depth, end = 1, 0
    for bracket in re.finditer(r"[(){}]", line.rest):
        depth += 1 if bracket[0] in "({" else -1
        if depth == 0:
            end = bracket.start()
            break
    inside = re.sub(r"/\*.*?\*/|\{[^}]*\}", "", line.rest[:end])
    if "%" in inside:
        return re.findall(r"%([\w.\-]+)", inside)
    return [part.split()[-1] for part in inside.split(", ") if part.strip()]


def arrays(shape: str) -> list[Array]:
    """Parses every array of a shape, those of tuples in order."""
    return [
        Array(dtype, tuple(int(d) for d in dims.split(",") if d), "S(" in (layout or ""))
        for dtype, dims, layout in _ARRAY.findall(shape)
    ]


def collectives(
    text: str | Program, parameters: Iterable[tuple[int, ...]] = ()
) -> list[Collective]:
    """Returns every collective of a compiled text that runs, each once, with its trips.

    Args:
        parameters: unsharded shapes of trained and frozen parameters; if blocks are stacked for
            a scan, also of one block's. An array counts as a parameter if it has as many elements
            as one of them, or as a `tensor` part of it that the caller adds: XLA transposes and
            reshapes freely.

    An asynchronous one counts at its start. An all-reduce fused with the slice that each chip
    keeps is how TPUs implement a reduce-scatter, and counts as one. If the slice is a separate
    kernel, the full array has been sent, and it counts as the all-reduce that it is.
    """
    program = text if isinstance(text, Program) else Program(text)
    sizes = {math.prod(shape) for shape in parameters}
    found, seen = [], set()
    for name, trips in program.trips.items():
        for line in program.computations.get(name, {}).values():
            kind = line.opcode.removesuffix("-start")
            if kind not in KINDS or trips == 0:
                continue
            # A fused collective may span several kernels, which share its channel.
            channel = line.attribute(r"channel_id=(\d+)")
            if name in program.fused and channel is not None:
                if (kind, channel) in seen:
                    continue
                seen.add((kind, channel))
            found += _collectives(program, name, line, kind, trips, sizes)
    return found


def _collectives(
    program: Program, computation: str, line: Instruction, kind: str, trips: int, sizes: set[int]
) -> Iterator[Collective]:
    """Yields one for each array: XLA joins arrays into one instruction, or into one array."""
    group = _group_size(line, program.devices)
    scattered = (
        kind == "all-reduce"
        and computation in program.fused
        and _is_sliced(program, computation, line.name, group)
    )
    results = arrays(_result(line))
    for array in _joined(program, computation, line, results) or results:
        if array.dtype == "u32" and not array.dims:
            continue  # a start's semaphores
        payload, size = array.bytes, array.size
        if kind == "reduce-scatter":
            payload, size = payload * group, size * group
        called = "reduce-scatter" if scattered else kind
        share = (group - 1) / group
        factor = {"all-reduce": 2 * share, "collective-permute": 1}.get(called, share)
        source = line.attribute(r'op_name="([^"]*)"') or ""
        # Small parameters are not sharded, so that of them only gradients travel, by all-reduce.
        known = size in sizes and (payload >= 4096 or kind == "all-reduce")
        small = payload < 4096 or "/health/" in source
        moves = "parameters" if known else "scalars" if small else "activations"
        moved = round(payload * factor)
        yield Collective(called, payload, moved, group, trips, moves, array.dims, source)


def _joined(
    program: Program, computation: str, line: Instruction, results: list[Array]
) -> list[Array]:
    """Returns the arrays that an all-reduce takes laid end to end, as XLA's GPU compiler does.

    [] if it takes its arrays as they are.
    """
    if not line.opcode.startswith("all-reduce") or len(results) != 1:
        return []
    lines = program.computations[computation]
    made = lines.get(next(iter(operands(line)), ""))
    if made is not None and made.opcode == "fusion":
        lines = program.computations[next(iter(_calls(made)))]
        made = next((inner for inner in lines.values() if inner.is_root), None)
    if made is None or made.opcode != "concatenate":
        return []
    parts = [array for name in operands(made) for array in arrays(lines[name].shape)]
    return parts if sum(part.size for part in parts) == results[0].size else []


def _result(line: Instruction) -> str:
    """Returns the output's shape; a start's shape also holds its inputs and semaphores."""
    if line.opcode in ("all-gather-start", "collective-permute-start"):
        return _parts(line.shape)[1]
    return line.shape


def _parts(shape: str) -> list[str]:
    """Splits a tuple's shape at its top level."""
    parts, depth = [""], 0
    for character in shape[1:-1]:
        depth += (character in "({[") - (character in ")}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _group_size(line: Instruction, devices: int) -> int:
    """Returns the number of chips that take part, from any of XLA's notations for groups."""
    if line.opcode.startswith("collective-permute"):
        return max(line.attribute(r"source_target_pairs=\{(.*?)\}\}").count("{"), 1)  # type: ignore
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line.rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        part = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(size or sizes[axis]) for axis, size in part)
    if iota := line.attribute(r"replica_groups=\[\d+,(\d+)\]"):
        return int(iota)
    listed = line.attribute(r"replica_groups=\{\{([\d,]*)\}")
    return len(listed.split(",")) if listed else devices


def _is_sliced(program: Program, computation: str, name: str, group: int) -> bool:
    """True if a value's only use is as slices that add up to 1/group of it."""
    lines = program.computations[computation]
    whole = sum(array.size for array in arrays(lines[name].shape))
    slices = _slices(program, computation, name)
    return bool(slices) and sum(array.size for array in slices) * group == whole


def _slices(program: Program, computation: str, name: str) -> list[Array] | None:
    """Returns the slices taken of a value; None if the full value is also used."""
    if program.computations[computation][name].is_root:
        return None
    found = []
    for user in program.users(computation, name):
        if user.opcode in ("dynamic-slice", "slice") and operands(user)[0] == name:
            found += arrays(user.shape)
            continue
        inner: list[Array] | None = None
        if user.opcode in ("bitcast", "reshape", "copy", "transpose"):
            inner = _slices(program, computation, user.name)
        elif user.opcode == "fusion":
            called = next(iter(_calls(user)))
            parameter = _parameter(program.computations[called], operands(user).index(name))
            inner = _slices(program, called, parameter) if parameter else None
        if inner is None:
            return None
        found += inner
    return found


def _parameter(lines: dict[str, Instruction], index: int) -> str | None:
    for name, line in lines.items():
        if line.opcode == "parameter" and line.rest.startswith(f"{index})"):
            return name
    return None


def _calls(line: Instruction) -> Collection[str]:
    found = _CALLED.findall(line.rest)
    for branches in _BRANCHES.findall(line.rest):
        found += re.findall(r"[\w.\-]+", branches)
    return found


def memory_traffic(text: str | Program) -> tuple[int, int]:
    """Returns (bytes a chip reads and writes in its memory, the same with every loop run once).

    Counts the inputs and outputs of each kernel, as XLA's own count does; of an array that a
    kernel slices, only the slice. A model: caches between kernels are ignored, except if a TPU
    program itself places an array on the chip.
    """
    program = text if isinstance(text, Program) else Program(text)
    total = once = 0
    for name, trips in program.trips.items():
        if name in program.fused or trips == 0:
            continue
        lines = program.computations.get(name, {})
        traffic = sum(_traffic(program, lines, line) for line in lines.values())
        total, once = total + trips * traffic, once + traffic
    return total, once


def kernels(text: str | Program) -> int:
    """Returns how many kernels, copies and collectives a step starts on a device.

    Those of a loop count once a trip. An asynchronous one counts at its start.
    """
    program = text if isinstance(text, Program) else Program(text)
    return sum(
        trips * sum(_is_kernel(line) for line in program.computations.get(name, {}).values())
        for name, trips in program.trips.items()
        if name not in program.fused
    )


def _is_kernel(line: Instruction) -> bool:
    moves_nothing = line.opcode in _FREE or line.opcode in _CALLERS
    return not moves_nothing and not line.opcode.endswith("-done")


def _traffic(program: Program, lines: dict[str, Instruction], line: Instruction) -> int:
    if line.opcode in _FREE or line.opcode.endswith("-done"):
        return 0
    out = arrays(line.shape)[:1] if line.opcode == "copy-start" else arrays(_result(line))
    if _WORKSPACE.search(line.rest):
        out = [array for array in out if array.dtype not in ("s8", "u8")]
    if line.opcode in ("dynamic-slice", "slice"):
        return 2 * sum(array.bytes for array in out if not array.on_chip)
    taken = operands(line)
    if line.opcode == "dynamic-update-slice":
        update = lines.get(taken[1])
        return 2 * sum(a.bytes for a in arrays(update.shape)) if update else 0
    inside = program.computations[next(iter(_calls(line)))] if line.opcode == "fusion" else {}
    total = sum(array.bytes for array in out if not array.on_chip)
    written = [x for x in inside.values() if x.is_root and x.opcode == "dynamic-update-slice"]
    if written:  # in place: the updated array is not read or written in full
        update = inside.get(operands(written[0])[1])
        total = sum(array.bytes for array in arrays(update.shape)) if update else 0
    for i, name in enumerate(taken):
        given = lines.get(name)
        if given is None or (written and _updated(inside, written[0], i)):
            continue
        sliced = None
        if inside and (parameter := _parameter(inside, i)):
            sliced = _slices(program, next(iter(_calls(line))), parameter)
        whole = arrays(given.shape)
        read = whole if sliced is None else sliced
        total += sum(a.bytes for a in read) if not any(a.on_chip for a in whole) else 0
    return total


def _updated(inside: dict[str, Instruction], update: Instruction, index: int) -> bool:
    """True if a kernel's operand is the array that its root updates in place."""
    name = operands(update)[0]
    while name in inside and inside[name].opcode in ("bitcast", "copy", "convert"):
        name = operands(inside[name])[0]
    return name == _parameter(inside, index)
