"""What the design assumes of SM partitions and only a GPU can tell: which SMs work runs on, whether a captured
graph keeps its partition, what changing streams costs, and whether Triton's kernels follow a partition's stream.

SMs are read from the hardware register %smid by a small kernel, compiled with NVRTC and launched through the
driver.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from typing import Any

import torch

from harli_appliance.bench.device_rig import CudaRig, Place
from harli_appliance.bench.device_sharing import Sharing

SOURCE = b"""
extern "C" __global__ void note_sm(unsigned int* seen, long long spin) {
  unsigned int sm; asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  long long since = clock64(); while (clock64() - since < spin) {}
  if (threadIdx.x == 0) atomicAdd(seen + sm, 1u);
}
"""
BLOCKS, THREADS, SPIN = 4096, 32, 20_000
MOST_SMS = 256
SWITCHES = 64


class Kernels:
    """The kernel that notes its SM; its handle belongs to no context, so that any stream can launch it."""

    def __init__(self) -> None:
        from cuda.bindings import driver, nvrtc

        self._driver = driver
        major, minor = torch.cuda.get_device_capability()
        program = _checked(nvrtc.nvrtcCreateProgram(SOURCE, b"note_sm.cu", 0, [], []))
        options = [f"--gpu-architecture=sm_{major}{minor}".encode()]
        _checked(nvrtc.nvrtcCompileProgram(program, len(options), options))
        code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        self._library = _checked(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        kernel = _checked(driver.cuLibraryGetKernel(self._library, b"note_sm"))
        self._function = driver.CUfunction(int(kernel))

    def launch(self, stream: Any, seen: torch.Tensor) -> None:
        """Note in `seen`, int32 of `MOST_SMS`, how many blocks ran on each SM."""
        arguments = ((seen.data_ptr(), SPIN), (ctypes.c_void_p, ctypes.c_longlong))
        _checked(
            self._driver.cuLaunchKernel(
                self._function, BLOCKS, 1, 1, THREADS, 1, 1, 0, stream.cuda_stream, arguments, 0
            )
        )


def _checked(answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if int(status) != 0:
        raise RuntimeError(f"{status.name}")
    return values[0] if values else None


class Facts:
    """The sections that need a GPU."""

    def __init__(self, rig: CudaRig, sharing: Sharing) -> None:
        self._rig, self._sharing = rig, sharing

    def overlap(self) -> dict[str, Any]:
        """SMs that each side of each split runs on, and how many both do (0 is what partitions promise)."""
        kernels = Kernels()
        found: dict[str, Any] = {"whole device": len(self._sms(kernels, self._rig.whole))}
        for way in self._rig.ways:
            inference, training = self._sms(kernels, way.inference), self._sms(kernels, way.training)
            found[way.name] = {
                "inference": len(inference),
                "training": len(training),
                "both": len(inference & training),
            }
        return found

    def _sms(self, kernels: Kernels, place: Place) -> set[int]:
        seen = self._nothing_seen()
        kernels.launch(place.where, seen)
        return self._noted(seen)

    def _nothing_seen(self) -> torch.Tensor:
        seen = torch.zeros(MOST_SMS, dtype=torch.int32, device=self._rig.device)
        torch.cuda.synchronize()
        return seen

    def _noted(self, seen: torch.Tensor) -> set[int]:
        torch.cuda.synchronize()
        return set(seen.nonzero().flatten().tolist())

    def graphs(self) -> dict[str, Any]:
        """SMs of a graph captured on one partition and replayed there, on another one and on the whole device."""
        kernels, way = Kernels(), self._rig.ways[len(self._rig.ways) // 2]
        seen = self._nothing_seen()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=way.inference.where, capture_error_mode="thread_local"):
            kernels.launch(way.inference.where, seen)
        found: dict[str, Any] = {"captured on": way.inference.name}
        for place in (way.inference, way.training, self._rig.whole):
            seen.zero_()
            torch.cuda.synchronize()
            with self._rig.on(place):
                graph.replay()
            found[f"replayed on {place.name}"] = len(self._noted(seen))
        return found

    def switching(self) -> dict[str, Any]:
        """Microseconds of a tiny kernel in a chain that changes partition at every step, and in one that stays."""
        places = [way.inference for way in self._rig.ways]
        if len(places) < 2:
            raise RuntimeError("fewer than two splits")
        hopping = [places[step % len(places)] for step in range(SWITCHES)]
        self._chain(hopping)
        hop, stay = self._chain(hopping), self._chain(places[:1] * SWITCHES)
        return {
            "hopping_us": hop,
            "staying_us": stay,
            "switch_us": {name: round(hop[name] - stay[name], 2) for name in hop},
        }

    def _chain(self, places: list[Place]) -> dict[str, float]:
        number = torch.zeros(32, device=self._rig.device)
        events = [torch.cuda.Event() for _ in places]  # type: ignore[no-untyped-call]
        host, whole = [], []
        for _ in range(5):
            torch.cuda.synchronize()
            began = time.perf_counter()
            for step, place in enumerate(places):
                if step and place is not places[step - 1]:
                    place.where.wait_event(events[step - 1])
                with self._rig.on(place):
                    number.add_(1)
                events[step].record(place.where)
            host.append(time.perf_counter() - began)
            torch.cuda.synchronize()
            whole.append(time.perf_counter() - began)
        return {
            name: round(1e6 * statistics.median(times) / len(places), 2)
            for name, times in (("host", host), ("total", whole))
        }

    def triton(self) -> dict[str, Any]:
        """Whether a Triton kernel runs in a partition: its time there against the whole device's."""
        from harli_appliance.bench.device_triton import scale

        data = torch.ones(1 << 26, device=self._rig.device)
        whole = self._rig.alone(self._rig.whole, lambda: scale(data), 20)
        found: dict[str, Any] = {"whole device": {"ms": round(1e3 * whole, 4)}}
        for way in self._rig.ways:
            took = self._rig.alone(way.inference, lambda: scale(data), 20)
            found[way.name] = {"ms": round(1e3 * took, 4), "slowdown": round(took / whole, 3)}
        return found

    def graph_matmul(self) -> dict[str, Any]:
        """TFLOP/s of a product captured on each partition, against the same one launched there."""
        found = {}
        for way in self._rig.ways:
            place = way.inference
            eager = self._sharing.matmul_rate(place)
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=place.where, capture_error_mode="thread_local"):
                self._sharing.multiply()
            replay = self._sharing.flop / self._rig.alone(place, graph.replay, 20)
            found[way.name] = {
                "eager_tflop_s": round(eager / 1e12, 2),
                "graph_tflop_s": round(replay / 1e12, 2),
            }
        return found
