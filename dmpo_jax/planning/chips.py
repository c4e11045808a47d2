"""Published specifications of chips, for MFU and plans.

Rates are those of one JAX device. Memory is in decimal gigabytes; if the maker means binary
ones (TPUs) a chip has up to 7 % more, of which the runtime reserves some.
"""

from typing import NamedTuple

from dmpo_jax.planning.cards import load_cards


class Chip(NamedTuple):
    """Specification of a chip.

    memory: bytes. flops: per second, dense bfloat16 with float32 sums. bandwidth: of the memory,
    bytes per second. interconnect: bytes per second that a chip sends to the others of its slice
    or host, over all its links in one direction. network: the same to other hosts, all chips of
    a host together; None if the links join hosts too (a TPU slice), or it is not known.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    interconnect: float
    network: float | None = None


# TPUs: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, where the interconnect is stated in both
# directions together (v5p 1200 GB/s) or in Gbit/s of one (v5p 4800). GPUs: cards/.
TPUS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32e9, 275e12, 1228e9, 300e9),
        Chip("v5e", 16e9, 197e12, 819e9, 200e9),
        Chip("v5p", 95e9, 459e12, 2765e9, 600e9),
        Chip("v6e", 32e9, 918e12, 1640e9, 400e9),
    )
}
CHIPS = TPUS | {
    card.name: Chip(
        card.name,
        card.memory,
        card.flops,
        card.bandwidth,
        card.interconnect,
        card.network and card.network * card.host,
    )
    for card in load_cards().values()
}
# Part of a lower-case `jax.Device.device_kind` -> name in CHIPS; the first match wins.
_KINDS = (
    ("tpu v4 lite", None),
    ("tpu v4", "v4"),
    ("tpu v5 lite", "v5e"),
    ("tpu v5e", "v5e"),
    ("tpu v5", "v5p"),
    ("tpu v6", "v6e"),
    ("a100-sxm4-40gb", "A100 40GB"),
    ("a100-sxm", "A100"),
    ("h100 pcie", None),
    ("h100 nvl", None),
    ("h100", "H100"),
    ("h200 nvl", None),
    ("h200", "H200"),
    ("l40s", "L40S"),
)


def lookup(device_kind: str) -> Chip | None:
    """Returns the chip that JAX calls `device_kind` ("TPU v5 lite", "NVIDIA H100 80GB HBM3").

    None if its rates are unknown: CPUs, and cards that only resemble those above.
    """
    kind = device_kind.lower()
    name = next((name for part, name in _KINDS if part in kind), None)
    return None if name is None else CHIPS[name]


def over_hosts(chip: Chip, hosts: int) -> Chip:
    """Returns the chip with its interconnect as a ring over several hosts meets it.

    The rings of a host's cards leave it over all its network cards at once (NCCL), so a card
    sends at the rate of its links or of the host's network, whichever is less.
    """
    if hosts == 1 or chip.network is None:
        return chip
    return chip._replace(interconnect=min(chip.interconnect, chip.network))
