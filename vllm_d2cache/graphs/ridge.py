"""Up to how many rows padding costs nothing on a card: while reading the weights takes longer than multiplying by them.

A matrix product of N rows by weights of b bytes each does 2 N operations for every b bytes it reads. It is bound by
memory up to N = b / 2 * (operations a second) / (bytes a second), the card's *ridge* (the roofline model, Williams,
Waterman and Patterson, CACM 52(4), 2009). All ranks must choose the same form of a step, so the ridge is looked up
and not measured.
"""

from __future__ import annotations

import re

CARDS = (
    ("B200", 2250, 8000), ("GB200", 2250, 8000), ("GH200", 989, 4000), ("H200", 989, 4800), ("H100 PCIe", 756, 2000),
    ("H100 NVL", 835, 3900), ("H100", 989, 3350), ("H800", 989, 3350), ("H20", 148, 4000),
    ("A100-SXM4-80GB", 312, 2039), ("A100 80GB", 312, 1935), ("A100", 312, 1555), ("A800", 312, 2039),
    ("A40", 150, 696), ("A10G", 70, 600), ("A10", 125, 600), ("RTX A6000", 155, 768), ("RTX 3090", 71, 936),
    ("L40S", 362, 864), ("L40", 181, 864), ("L4", 121, 300), ("RTX 4090", 165, 1008), ("RTX 6000 Ada", 364, 960),
    ("RTX 5090", 209, 1792), ("RTX PRO 6000", 503, 1792),
)  # fmt: skip
"""Words of the device's name, 10^12 operations a second on dense bf16 matrices with fp32 sums, and 10^9 bytes a second,
from the vendor's data sheets. The first that matches counts, so longer names of a kind stand before shorter ones."""
OTHERS = {8: 76, 9: 206, 10: 281, 12: 117}
"""Ridge of 16-bit weights by major compute capability, for other cards: the lowest of those above,
but for the H20, which has little arithmetic for its memory."""
LEAST = 64
"""Of any card."""


def ridge(device_name: str, capability: tuple[int, int], weight_bytes: int) -> int:
    """Rows up to which a product with the model's weights is bound by memory.

    Args:
        device_name: as PyTorch gives it, "NVIDIA H100 80GB HBM3".
        capability: compute capability, (9, 0).
        weight_bytes: of one weight; what is multiplied is taken to be 16-bit numbers.
    """
    sixteen = next(
        (round(1000 * tera / giga) for part, tera, giga in CARDS if re.search(rf"\b{part}\b", device_name)), None
    )
    if sixteen is None:
        sixteen = OTHERS.get(capability[0], LEAST)
    return max(1, sixteen * min(weight_bytes, 2) // 2)
