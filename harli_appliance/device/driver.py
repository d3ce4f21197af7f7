"""The CUDA driver's green contexts, as far as a device is split between two lanes.

`Driver` is what `cuda` needs of a driver; `CudaDriver` is NVIDIA's, through cuda.bindings. One split gives a group
of SMs and the remainder, which are disjoint; two splits of the same device are not. That is why torch's own
``GreenContext.create``, which splits anew for every context, cannot make a pair. Knows handles and counts; does
not know torch, lanes or sizes that make sense.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from harli_appliance.device.gpu import FALLBACK
from harli_appliance.errors import PartitionsUnavailable

NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: no implicit waiting for the legacy default stream."""
GREEN_CONTEXT_FLAGS = 1
"""CU_GREEN_CTX_DEFAULT_STREAM, the only flag there is and a required one."""

ALIGNMENT_BY_MAJOR = {6: (1, 1), 7: (2, 2), 8: (4, 2)}
"""(least SMs, multiple) by major compute capability, for drivers that do not say; newer devices have 8 and 8 (CUDA
driver API, green contexts)."""


@dataclass(frozen=True, slots=True)
class Sms:
    """SMs of the device, or of a part of it.

    Attributes:
        least: fewest that a group can have.
        multiple: the number of SMs in a group is a multiple of this.
    """

    handle: Any = field(repr=False)
    count: int
    least: int
    multiple: int


class Driver(Protocol):
    """Handles are the driver's own; every method raises `PartitionsUnavailable` when the driver refuses."""

    def device(self) -> Sms: ...
    def split(self, sms: Sms, count: int) -> tuple[Sms, Sms]:
        """A group of at least `count` SMs and all the others, disjoint."""
        ...

    def create(self, sms: Sms) -> Any:
        """A green context on these SMs. The device's primary context must exist: torch has been used before."""
        ...

    def sms_of(self, context: Any) -> int:
        """How many SMs a green context really has."""
        ...

    def stream(self, context: Any) -> int:
        """A new stream of a green context, as the address that torch takes."""
        ...

    def destroy_stream(self, stream: int) -> None: ...
    def destroy(self, context: Any) -> None:
        """Its streams must have been destroyed."""
        ...


class CudaDriver:
    """NVIDIA's driver through cuda.bindings, which comes with torch's CUDA build.

    Args:
        ordinal: the device, as torch counts.
        api: the module ``cuda.bindings.driver``; loaded when not given.
    """

    def __init__(self, ordinal: int = 0, api: Any = None) -> None:
        self._api = _bindings() if api is None else api
        self._ordinal = ordinal
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # cuda.bindings: there is no libcuda, or it lacks the function
            raise PartitionsUnavailable(f"the CUDA driver cannot be used ({error}); {FALLBACK}") from error
        self._device = self._call("cuDeviceGet", ordinal)

    def device(self) -> Sms:
        kind = self._api.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        return self._sms(self._call("cuDeviceGetDevResource", self._device, kind))

    def split(self, sms: Sms, count: int) -> tuple[Sms, Sms]:
        groups, made, rest = self._call("cuDevSmResourceSplitByCount", 1, sms.handle, 0, count)
        if int(made) != 1:
            raise PartitionsUnavailable(f"the CUDA driver makes no group of {count} SMs; {FALLBACK}")
        return self._sms(groups[0]), self._sms(rest)

    def create(self, sms: Sms) -> Any:
        description = self._call("cuDevResourceGenerateDesc", [sms.handle], 1)
        return self._call("cuGreenCtxCreate", description, self._device, GREEN_CONTEXT_FLAGS)

    def sms_of(self, context: Any) -> int:
        kind = self._api.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
        return int(self._call("cuGreenCtxGetDevResource", context, kind).sm.smCount)

    def stream(self, context: Any) -> int:
        return int(self._call("cuGreenCtxStreamCreate", context, NON_BLOCKING, 0))

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", self._api.CUstream(stream))

    def destroy(self, context: Any) -> None:
        self._call("cuGreenCtxDestroy", context)

    def _sms(self, resource: Any) -> Sms:
        sm = resource.sm
        least, multiple = self._alignment()
        count = int(sm.smCount)
        # A driver that is older than the bindings leaves these fields as they were, whatever that is.
        told = (int(getattr(sm, name, 0)) for name in ("minSmPartitionSize", "smCoscheduledAlignment"))
        plausible = [number if 0 < number <= count else 0 for number in told]
        return Sms(resource, count, least=plausible[0] or least, multiple=plausible[1] or multiple)

    def _alignment(self) -> tuple[int, int]:
        attribute = self._api.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        major = int(self._call("cuDeviceGetAttribute", attribute, self._device))
        return ALIGNMENT_BY_MAJOR.get(major, (8, 8))

    def _call(self, name: str, *arguments: Any) -> Any:
        """One call of the driver, which answers (status, *values): its value, or several as a tuple."""
        function = getattr(self._api, name, None)
        if function is None:
            raise PartitionsUnavailable(f"cuda.bindings has no {name}: install 13.0 or newer; {FALLBACK}")
        status, *values = function(*arguments)
        if int(status) != 0:
            raise PartitionsUnavailable(f"the CUDA driver refuses {name} ({status.name}); {FALLBACK}")
        return values[0] if len(values) == 1 else tuple(values)


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise PartitionsUnavailable(
            f"cuda.bindings is not installed: pip install 'cuda-bindings>=13.0'; {FALLBACK}"
        ) from error
    return driver
