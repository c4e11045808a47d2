"""GPUs as their vendor describes them: rates, and the target that XLA compiles for.

One file a card in cards/, each fact with its source. A card need not be in this machine.
"""

import functools
import pathlib
import tomllib
from typing import Any, NamedTuple

FOLDER = pathlib.Path(__file__).parent / "cards"
# Of a kernel's launch, the same on all of these; CUDA C++ Programming Guide, technical
# specifications by compute capability.
LAUNCH = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65_535,
    "block_dim_limit_z": 65_535,
    "registers_per_core_limit": 65_536,
    "registers_per_block_limit": 65_536,
    "shared_memory_per_block": 49_152,
}


class Compiler(NamedTuple):
    """Facts of a card that XLA's choices depend on; the names of XLA's proto are longer.

    cores: streaming multiprocessors. The other sizes are of one of them, in bytes;
    shared_memory_block: the most that a block may ask for.
    """

    compute_capability: str
    accelerated: bool
    cores: int
    float32_units: int
    clock_ghz: float
    l2_cache: int
    shared_memory: int
    shared_memory_block: int
    threads: int


class Card(NamedTuple):
    """A GPU. Rates as in `chips.Chip`: per second, dense bfloat16, bytes in one direction.

    device_kind: as the driver, and so JAX, calls it. host: cards of a host. network: bytes per
    second of a card to other hosts; None if the vendor sells no host that states it.
    """

    name: str
    device_kind: str
    memory: float
    bandwidth: float
    flops: float
    interconnect: float
    host: int
    compiler: Compiler
    network: float | None = None


@functools.cache
def load_cards() -> dict[str, Card]:
    """Reads every description; keys are the names that a topology takes, such as "h100"."""
    paths = sorted(FOLDER.glob("*.toml"), key=lambda path: path.stem)
    return {path.stem: parse_card(path.read_text()) for path in paths}


def parse_card(text: str) -> Card:
    """Parses a description.

    Raises:
        TypeError: a fact is missing, or one is there that nothing reads.
    """
    facts: dict[str, Any] = tomllib.loads(text)
    return Card(**{**facts, "compiler": Compiler(**facts["compiler"])})


def target_config(card: Card, *, cudnn: int, cuda: int) -> str:
    """Returns what XLA must know of a card to compile for it: the text of a GpuTargetConfigProto.

    Args:
        cudnn, cuda: versions of the libraries as they number them, 91200 and 13000.

    XLA's own such files are openxla/xla, xla/backends/gpu/target_config/specs.
    """
    facts = card.compiler
    major, _, minor = facts.compute_capability.partition(".")
    feature = "ACCELERATED_FEATURES" if facts.accelerated else "NONE"
    info = {
        **LAUNCH,
        "core_count": facts.cores,
        "fpus_per_core": facts.float32_units,
        "threads_per_core_limit": facts.threads,
        "shared_memory_per_core": facts.shared_memory,
        "shared_memory_per_block_optin": facts.shared_memory_block,
        "l2_cache_size": facts.l2_cache,
        "clock_rate_ghz": facts.clock_ghz,
        "memory_bandwidth": int(card.bandwidth),
        "device_memory_size": int(card.memory),
    }
    lines = "\n".join(f"  {name}: {value}" for name, value in info.items())
    return f"""gpu_device_info {{
{lines}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn // 10000} minor: {cudnn // 100 % 100} patch: {cudnn % 100} }}
runtime_version {{ major: {cuda // 1000} minor: {cuda // 10 % 100} patch: {cuda % 10} }}
device_description_str: "{card.device_kind}"
"""
