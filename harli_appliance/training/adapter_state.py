"""What a job keeps of its adapter between units: weights, gradients and AdamW's moments, in slots or on the host.

Per trained parameter four tensors of its shape: the value, the gradient of the optimizer step so far, and AdamW's
two moments. *Placed*, all of them are views of consecutive
leased slots of the KV buffers; *parked*, they are ordinary host memory. Moving copies bytes and changes no number,
and whoever holds the parameters or the optimizer notices nothing. Knows tensors and arenas; does not know leases,
nor when to move.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from harli_appliance.memory.arena import Arena, Form, slots_for

PER_PARAMETER = 4
"""value, gradient, exp_avg, exp_avg_sq"""


class AdapterState:
    """The state of one adapter; begins parked, with gradients and moments of zero.

    Args:
        layers: trained parameters of each decoder layer.
        optimizer: an AdamW over all of them; its moments become views of this state.
        buffers: K and V buffers of the slots, each of shape [all slots, kv_width].
    """

    def __init__(
        self,
        layers: Sequence[Sequence[nn.Parameter]],
        optimizer: torch.optim.AdamW,
        buffers: Sequence[Tensor],
    ) -> None:
        self._parameters = [parameter for layer in layers for parameter in layer]
        self._layer_starts = [0]
        for layer in layers:
            self._layer_starts.append(self._layer_starts[-1] + len(layer))
        self._optimizer = optimizer
        self._buffers = buffers
        shapes = [Form(tuple(parameter.shape), parameter.dtype) for parameter in self._parameters]
        self._forms = shapes * PER_PARAMETER
        self._placed = False
        # AdamW's counters stay on the host: 4 bytes a parameter tensor, whatever its size.
        self._steps = torch.zeros(len(self._parameters))
        values = [parameter.data.cpu() for parameter in self._parameters]  # PEFT puts them beside the weights
        zeros = [torch.zeros_like(value) for _ in range(PER_PARAMETER - 1) for value in values]
        self._use([*values, *zeros])

    @property
    def slots(self) -> int:
        """Consecutive slots that the state takes when placed."""
        return state_slots(self._forms[: len(self._parameters)], self._buffers)

    @property
    def bytes(self) -> int:
        """Bytes that a move copies."""
        return sum(form.bytes for form in self._forms)

    @property
    def placed(self) -> bool:
        return self._placed

    # -- moving ----------------------------------------------------------------------------------------------

    def place(self, slots: Tensor) -> None:
        """Move into the KV buffers, out of host memory.

        Args:
            slots: int64 of shape [`self.slots`], consecutive and ascending.
        """
        self._move(Arena(self._buffers, slots).carve(self._forms))
        self._placed = True

    def park(self) -> None:
        """Move to host memory; the slots are free for others when this returns."""
        self._move([torch.empty(form.shape, dtype=form.dtype) for form in self._forms])
        self._placed = False

    def _move(self, places: list[Tensor]) -> None:
        for place, tensor in zip(places, self._tensors, strict=True):
            place.copy_(tensor)
        self._use(places)

    def _use(self, tensors: list[Tensor]) -> None:
        count = len(self._parameters)
        values, gradients, first, second = (tensors[at : at + count] for at in range(0, len(tensors), count))
        self._tensors, self._gradients = tensors, gradients
        for index, parameter in enumerate(self._parameters):
            parameter.grad = None
            parameter.data = values[index]
            parameter.grad = gradients[index]
            self._optimizer.state[parameter] = {
                "step": self._steps[index],
                "exp_avg": first[index],
                "exp_avg_sq": second[index],
            }

    # -- gradients -------------------------------------------------------------------------------------------

    def gradients(self, layer: int) -> list[Tensor]:
        """Of the optimizer step so far, for the parameters of one layer: their `grad`. Ask again after a move."""
        return self._gradients[self._layer_starts[layer] : self._layer_starts[layer + 1]]

    def begin_step(self) -> None:
        """Set the gradients to zero."""
        for gradient in self._gradients:
            gradient.zero_()

    # -- checkpoints -----------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Values, moments and counters by name (views, not copies)."""
        found: dict[str, Tensor] = {}
        for index, parameter in enumerate(self._parameters):
            found[f"{index}.value"] = parameter.data
            for name, value in self._optimizer.state[parameter].items():
                found[f"{index}.{name}"] = value
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave.

        Raises:
            KeyError: one is missing.
        """
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])


def state_slots(parameters: Sequence[Form], buffers: Sequence[Tensor]) -> int:
    """Consecutive slots for the state of an adapter with parameters of these forms."""
    return slots_for([*parameters] * PER_PARAMETER, buffers)
