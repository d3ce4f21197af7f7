"""How the two lanes share a device: bandwidth and matmul for every way to split it, alone and beside each other.

Reading stands for decoding, which is bound by bandwidth; a matmul for finetuning, which is bound by compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from harli_appliance.bench.device_rig import Place, Rig, Work


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the work: bytes that are read, and m, k, n of the product."""

    read_bytes: int
    product: tuple[int, int, int]
    times: int


CPU_SIZES = Sizes(256 << 20, (512, 1024, 1024), 5)
GPU_SIZES = Sizes(4 << 30, (4096, 4096, 14336), 20)
"""Llama-3-8B's MLP over 4,096 tokens; the read buffer is many times a GPU's L2 cache."""


class Sharing:
    """The work, and the sections that time it."""

    def __init__(self, rig: Rig, sizes: Sizes) -> None:
        self._rig, self._sizes = rig, sizes
        # float32 also on a GPU: a sum of bfloat16 may be bound by conversion.
        self._buffer = torch.ones(sizes.read_bytes // 4, dtype=torch.float32, device=rig.device)
        self._sink = torch.empty((), dtype=torch.float32, device=rig.device)
        m, k, n = sizes.product
        self._left = torch.randn(m, k, device=rig.device, dtype=rig.dtype)
        self._right = torch.randn(k, n, device=rig.device, dtype=rig.dtype)
        self._out = torch.empty(m, n, device=rig.device, dtype=rig.dtype)

    def read(self) -> None:
        torch.sum(self._buffer, 0, out=self._sink)

    def multiply(self) -> None:
        torch.mm(self._left, self._right, out=self._out)

    def solo(self) -> dict[str, Any]:
        """GB/s and TFLOP/s of each place with nothing beside it."""
        places = [self._rig.whole]
        for way in self._rig.ways:
            places += [way.inference, way.training]
        return {
            place.name: {
                "share": round(place.share, 4),
                "read_gb_s": round(self.bandwidth(place) / 1e9, 2),
                "matmul_tflop_s": round(self.matmul_rate(place) / 1e12, 4),
            }
            for place in places
        }

    def corun(self) -> dict[str, Any]:
        """Reading on the inference side while the training side multiplies, and what each loses by it."""
        found = {}
        unsplit = [self._rig.unsplit] if self._rig.unsplit is not None else []
        for way in [*self._rig.ways, *unsplit]:
            read_s = self._alone(way.inference, self.read)
            multiply_s = self._alone(way.training, self.multiply)
            both = self._rig.together(
                way.inference, self.read, self._sizes.times, way.training, self.multiply
            )
            found[way.name] = {
                "read_slowdown": round(both[0] / read_s, 4),
                "matmul_slowdown": round(both[1] / multiply_s, 4),
                "read_gb_s": round(self._sizes.read_bytes / both[0] / 1e9, 2),
                "matmul_tflop_s": round(self.flop / both[1] / 1e12, 4),
            }
        return found

    def bandwidth(self, place: Place) -> float:
        """Bytes a second."""
        return self._sizes.read_bytes / self._alone(place, self.read)

    def matmul_rate(self, place: Place) -> float:
        """Floating point operations a second."""
        return self.flop / self._alone(place, self.multiply)

    @property
    def flop(self) -> float:
        m, k, n = self._sizes.product
        return 2.0 * m * k * n

    def _alone(self, place: Place, work: Work) -> float:
        return self._rig.alone(place, work, self._sizes.times)
