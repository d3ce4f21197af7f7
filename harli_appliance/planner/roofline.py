"""Costs from a device's published figures and a model's shape: whichever of compute and memory takes longer.

A pass over the model is two phases that follow each other in a stream: the matrices (weights read once, 2
FLOPs a parameter and token) and attention over the KV cache. Each takes the longer of its FLOPs and its
bytes, as the roofline model has it (Williams et al. 2009); a fixed launch overhead comes on top.

On a share f of the SMs there is f of the compute and min(1, f / `SATURATION`) of the bandwidth. Beside
training, both lanes' demands for bandwidth are added up; where they exceed what there is, both get slower in
proportion.

LoRA training takes 6 FLOPs a parameter and token: 2 forward, and backward 2 to compute the layer again and 2
for the gradient of its input (those of the adapter are small); attention takes 1 + 1 + 2.5 times its forward
FLOPs. Knows no clock and no schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from harli_appliance.planner.device import StepWork, UnitMix
from harli_appliance.planner.gpus import (
    BANDWIDTH_EFFICIENCY,
    COMPUTE_EFFICIENCY,
    INTERFERENCE,
    MEMORY_SHARE,
    SATURATION,
    Gpu,
)
from harli_appliance.planner.shapes import ModelShape
from harli_appliance.scheduling.types import Split

LAUNCH_MS = 0.5
"""Of a step: planning, sampling and a graph's launch, with the processor's part not hidden. An assumption."""
WINDOWS = (256, 512, 1024, 2048)
"""Tokens of a work unit that are considered; one layer of Llama-3-8B over 1,024 takes under 1 ms forward and 2 ms
backward on an H100."""
TRAFFIC = 0.25
"""Share of the bandwidth that training may take: the fewer tokens a unit has, the sooner it ends, and the more
often weights are read. The smallest window that stays below it is used, or the largest there is."""
ACTIVATION_BYTES = 100.0
"""Moved per training token and layer, in hidden sizes: the 34 hidden sizes of bytes that a layer keeps
(Korthikanti et al. 2022, arXiv 2205.05198), written forward, and written and read again backward."""
NOISE = 0.02
"""Standard deviation of a step's time around its cost, as a share of it. An assumption."""
UNCONTROLLED = Split("uncontrolled", 0.5, 0.5)
"""What two streams without partitions come to: neither has a right to more than the other. An assumption."""


@dataclass(frozen=True, slots=True)
class Roofline:
    """A GPU that serves and finetunes one model.

    Args:
        saturation: share of the SMs that draws the whole bandwidth, in (0, 1].
        sequence_tokens: of a training sequence; each token attends to half of them on average.
    """

    gpu: Gpu
    model: ModelShape
    saturation: float = SATURATION
    sequence_tokens: int = 2048
    _window: int = field(default=0, init=False, compare=False, repr=False)
    _rates: dict[str, float] = field(default_factory=dict, init=False, compare=False, repr=False)
    """Training rates that were computed already; a step asks for one each time."""

    def __post_init__(self) -> None:
        rate = self.flops / self.flops_per_training_token
        calm = (size for size in WINDOWS if rate * self._bytes_per_token(size) <= TRAFFIC * self.bandwidth)
        object.__setattr__(self, "_window", next(calm, WINDOWS[-1]))

    @property
    def flops(self) -> float:
        return self.gpu.flops * COMPUTE_EFFICIENCY

    @property
    def bandwidth(self) -> float:
        return self.gpu.bandwidth * BANDWIDTH_EFFICIENCY

    @property
    def splits(self) -> tuple[Split, ...]:
        return self.gpu.splits()

    @property
    def layers(self) -> int:
        return self.model.layers

    @property
    def window_tokens(self) -> int:
        return self._window

    @property
    def units(self) -> UnitMix:
        return UnitMix(self.layers, self.layers)

    @property
    def fuses(self) -> bool:
        return True

    @property
    def slots(self) -> int:
        """What the device's memory holds beside the weights; 0 or less when these do not fit."""
        return int((self.gpu.memory_bytes * MEMORY_SHARE - self.model.memory_bytes) // self.model.kv_bytes)

    def describe(self) -> dict[str, Any]:
        return {
            "device": self.gpu.name,
            "published": {
                "bf16_tflops": self.gpu.flops / 1e12,
                "bandwidth_tb_s": self.gpu.bandwidth / 1e12,
                "memory_gb": self.gpu.memory_bytes / 1e9,
                "sms": self.gpu.sms,
            },
            "assumed": {
                "compute_efficiency": COMPUTE_EFFICIENCY,
                "bandwidth_efficiency": BANDWIDTH_EFFICIENCY,
                "saturation": self.saturation,
                "interference": INTERFERENCE,
                "launch_ms": LAUNCH_MS,
            },
            "window_tokens": self.window_tokens,
            "splits": [split.name for split in self.splits],
            "slots": self.slots,
            "training_alone_tokens_per_s": round(self.training_rate(), 1),
        }

    def lease_slots(self, tokens: int) -> int:
        return self.model.lease_slots(tokens)

    def pace(self, at_s: float) -> float:
        return 1.0

    def noise(self, random: Random) -> float:
        return 1.0 + NOISE * random.gauss(0.0, 1.0)

    # -- serving -----------------------------------------------------------------------------------------

    def solo_ms(self, work: StepWork, split: Split | None = None) -> float:
        return self._pass_ms(work, split.inference if split else 1.0)

    def corun_ms(self, work: StepWork, split: Split | None) -> float:
        split = split or UNCONTROLLED
        alone = self._pass_ms(work, split.inference)
        return alone * self._crowding(self._bytes(work) / (alone / 1e3), split) * (1.0 + INTERFERENCE)

    def fused_ms(self, work: StepWork, tokens: int, split: Split | None = None) -> float:
        return self._pass_ms(work, split.inference if split else 1.0, tokens)

    def _pass_ms(self, work: StepWork, share: float, training: int = 0) -> float:
        model = self.model
        flops, bandwidth = self.flops * share, self.bandwidth * min(1.0, share / self.saturation)
        matrices = 2.0 * model.body_parameters * (work.tokens + training)
        matrices += 2.0 * model.head_parameters * (work.step.batch + training)
        pairs = work.pairs + training * self.sequence_tokens / 2
        rows = work.step.context_tokens + training
        seconds = max(matrices / flops, model.weight_bytes / bandwidth)
        seconds += max(model.attention_flops * pairs / flops, model.kv_bytes * rows / bandwidth)
        return 1e3 * seconds + LAUNCH_MS

    def _bytes(self, work: StepWork) -> float:
        return self.model.weight_bytes + self.model.kv_bytes * work.step.context_tokens

    # -- training ----------------------------------------------------------------------------------------

    @property
    def flops_per_training_token(self) -> float:
        parameters = self.model.body_parameters + self.model.head_parameters
        return 6.0 * parameters + 4.5 * self.model.attention_flops * self.sequence_tokens / 2

    @property
    def bytes_per_training_token(self) -> float:
        return self._bytes_per_token(self._window)

    def _bytes_per_token(self, window_tokens: int) -> float:
        """Weights are read three times for each window: forward, again, and for the gradient."""
        activations = ACTIVATION_BYTES * self.model.hidden * self.model.layers
        return 3.0 * self.model.weight_bytes / window_tokens + activations

    def training_rate(self, split: Split | None = None) -> float:
        name = split.name if split else ""
        if name not in self._rates:
            self._rates[name] = self._training_rate(split.training if split else 1.0)
        return self._rates[name]

    def _training_rate(self, share: float) -> float:
        bandwidth = self.bandwidth * min(1.0, share / self.saturation)
        return 1.0 / max(
            self.flops_per_training_token / (self.flops * share), self.bytes_per_training_token / bandwidth
        )

    def corun_training_rate(self, split: Split | None) -> float:
        """Beside decoding that draws what its share of the SMs can draw."""
        split = split or UNCONTROLLED
        decoding = self.bandwidth * min(1.0, split.inference / self.saturation)
        return self.training_rate(split) / self._crowding(decoding, split) / (1.0 + INTERFERENCE)

    def _crowding(self, serving_bytes_per_s: float, split: Split) -> float:
        training = self.bytes_per_training_token * self.training_rate(split)
        return max(1.0, (serving_bytes_per_s + training) / self.bandwidth)
