"""Published figures of the devices that can be simulated, and what of them is reached.

Sources: NVIDIA's data sheets. "NVIDIA H100 Tensor Core GPU" (SXM5: 989.4 TFLOP/s dense bf16, 3.35 TB/s, 80
GB) and the Hopper white paper (132 SMs); "NVIDIA H200 Tensor Core GPU" (989.4 TFLOP/s, 4.8 TB/s, 141 GB);
"NVIDIA A100 80GB" (SXM4: 312 TFLOP/s, 2,039 GB/s, 108 SMs); "NVIDIA L40S" (362 TFLOP/s dense, 864 GB/s, 48
GB, 142 SMs). How finely SMs can be split is in the CUDA driver API's text on green contexts: groups of at
least 8 in steps of 8 on compute capability 9.0, of at least 4 in steps of 2 on 8.x.

Nothing here was measured by us; what is reached of the figures is stated below, with why.
"""

from __future__ import annotations

from dataclasses import dataclass

from harli_appliance.device.driver import Sms
from harli_appliance.device.sizes import split_sizes
from harli_appliance.errors import UsageError
from harli_appliance.scheduling.types import Split

COMPUTE_EFFICIENCY = 0.55
"""Of the dense peak, over whole passes through the model. FlexLLM (arXiv 2402.18789) gives 2,352 finetune
tokens/s as 62% of what LLaMA-Factory reaches alone on an A100: 3,800 tokens/s of a Llama-3.1-8B, 6 FLOPs a
parameter, are 0.55 of its peak. One large matrix product alone reaches more (about 0.8 on an H100)."""
BANDWIDTH_EFFICIENCY = 0.9
"""Of the memory's bandwidth: large copies on an H100 move about 3.0 of 3.35 TB/s."""
SATURATION = 0.4
"""Share of the SMs that draws the whole bandwidth; with fewer, bandwidth falls in proportion. Published
measurements lie between 0.3 and 0.5."""
INTERFERENCE = 0.1
"""How much slower both lanes are beside each other for shared caches and power, beyond what they take of each
other's bandwidth (which is computed). Together they stay within the 24% that published co-runs lose at most."""
MEMORY_SHARE = 0.88
"""Of the device's memory for weights and KV cache; the rest is workspace, graphs and the allocator's."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device's published figures.

    Attributes:
        flops: dense bf16 FLOP/s.
        bandwidth: bytes/s.
        sm_grain, sm_least: SMs of a partition come in multiples of the one, and not below the other.
    """

    key: str
    name: str
    flops: float
    bandwidth: float
    memory_bytes: float
    sms: int
    sm_grain: int
    sm_least: int

    def splits(self) -> tuple[Split, ...]:
        """The ways to split the SMs that the appliance would make, with the names that it would give them."""
        sizes = split_sizes(Sms(None, self.sms, self.sm_least, self.sm_grain))
        return tuple(
            Split(f"{size}+{self.sms - size}", size / self.sms, 1.0 - size / self.sms) for size in sizes
        )


GPUS: dict[str, Gpu] = {
    gpu.key: gpu
    for gpu in (
        Gpu("h100", "NVIDIA H100 SXM5 80 GB", 989.4e12, 3.35e12, 80e9, 132, 8, 8),
        Gpu("h200", "NVIDIA H200 SXM5 141 GB", 989.4e12, 4.8e12, 141e9, 132, 8, 8),
        Gpu("a100-80", "NVIDIA A100 SXM4 80 GB", 312e12, 2.039e12, 80e9, 108, 2, 4),
        Gpu("l40s", "NVIDIA L40S 48 GB", 362.05e12, 0.864e12, 48e9, 142, 2, 4),
    )
}


def find_gpu(name: str) -> Gpu:
    """The device of that name.

    Raises:
        UsageError: it is not known; lists those that are.
    """
    found = GPUS.get(name.lower())
    if found is None:
        raise UsageError(f"no such GPU: '{name}'; choose one of {', '.join(GPUS)}", param="gpu")
    return found
