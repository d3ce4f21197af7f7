"""Exact gradients in work units: forward or backward of some decoder layers over a window of tokens.

Between units a micro-batch keeps, per token and layer, the layer's input, and of one layer at a time K and V, all
in leased rows. Forward finishes a layer before it begins the next; the backward pass of a layer first computes its
K and V again. Where windows shall go through all layers, one after the other, K and V of all layers are kept.
What a piece of work is, a layer over a window, is in `layer_pieces` and `loss_pieces`; here is which comes next,
and every unit may have another size.

Knows layers, windows and stages; does not know lanes, jobs or schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from harli_appliance.training.activations import Activations, Buffers
from harli_appliance.training.adapter import Adapter
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.kept_outputs import KeptOutputs
from harli_appliance.training.layer_pieces import Gradients, LayerPieces
from harli_appliance.training.loss_pieces import LossPieces
from harli_appliance.training.objectives import Objective
from harli_appliance.training.pace import BACKWARD, FORWARD
from harli_appliance.training.packing import PackedSequence

UnitKind = Literal["forward", "loss", "backward", "step"]

RECALLED = 8
"""Windows whose K and V are computed again in one piece, one after the other. In SmolLM2-135M that is 6% of a
forward pass."""


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """The grain of preemption. `run` is called once, in order, on the training lane.

    `credit` is what the unit adds to the count of trained tokens: a token counts fully once its backward has
    gone through every layer.
    """

    kind: UnitKind
    run: Callable[[], None]
    credit: float = 0.0


@dataclass(frozen=True, slots=True)
class _Stage:
    """One way through the sequence: with the adapter or as the base model, for gradients or only to evaluate."""

    kind: Literal["forward", "loss", "backward"]
    tuned: bool = True
    learns: bool = True


class MicroBatch:
    """One packed sequence on its way through forward, loss and backward.

    An objective that compares with the base model sends it through forward and loss twice: first as the base, then
    with the adapter.

    Args:
        buffers: K and V buffers, one [slots, kv_width] tensor a layer each.
        slots: leased slot indices, `footprint(...)`.slots of them.
        keeps_kv: whether K and V are kept of every layer, and forward windows go through all layers one after the
            other, as fused steps need it; see `fusible_tokens`.
        objective: what is minimised.
        loss_tokens: learned tokens of a loss piece; logits of that many tokens exist at a time.
        dropout_key: draws the masks of the adapter's dropout, see `dropout.sequence_key`; None drops nothing.
        gradients: where each layer's gradients are added up; zero at the beginning. None only evaluates: there is
            no backward pass.
        reference: log-probabilities of the base model where the objective compares with them, float64 of shape
            [examples]; None lets units compute them.

    Attributes:
        loss: of the objective, once the loss units have run.
        slots: that it needs.
        worked: tokens' work done so far, in whole tokens: it ends at `tokens`.
        reference: as given or computed.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        sequence: PackedSequence,
        *,
        buffers: Buffers,
        slots: Tensor,
        objective: Objective,
        loss_tokens: int,
        dropout_key: int | None,
        gradients: Gradients | None,
        reference: Tensor | None = None,
        keeps_kv: bool = False,
    ) -> None:
        sequence = sequence.to(backbone.device)
        self._layers = len(backbone.layers)
        self._keeps_kv = keeps_kv
        self._rows = Activations(backbone, buffers, slots, len(sequence), keeps_kv=keeps_kv)
        self._kept = KeptOutputs(backbone, adapter.projections, buffers, len(sequence))
        self._pieces = LayerPieces(
            backbone, adapter, sequence, self._rows, self._kept, dropout_key=dropout_key, gradients=gradients
        )
        self._losses = LossPieces(backbone, sequence, self._rows, objective, loss_tokens)
        self.slots = len(slots)
        self.tokens = len(sequence)
        self.loss = 0.0
        self.worked = 0.0
        self.reference = reference
        self._learns = gradients is not None
        self._swapped: list[Tensor] = []
        self._stages = _stages(objective.needs_reference and reference is None, learns=self._learns)
        self._enter(0)

    # -- the order of work -----------------------------------------------------------------------------

    def next_unit(self, window: int, layers: int) -> WorkUnit | None:
        """The next unit, None when gradients and loss are complete. Until it has run it is the same work again.

        Args:
            window: tokens of the forward or backward windows that it begins, at least 1.
            layers: consecutive pieces (one layer over one window each) that it runs, at least 1; a piece of a
                loss unit is `loss_tokens` learned tokens. A unit ends with its stage.
        """
        if self._at == len(self._stages):
            return None
        kind = self._stages[self._at].kind
        credit = self._backward_credit(window, layers) if kind == "backward" else 0.0
        return WorkUnit(kind, partial(self._run, self._at, window, layers), credit)

    @property
    def fusible_tokens(self) -> int:
        """Tokens whose forward pass has not begun, where the next unit begins a forward window that goes through
        all layers before the next one; else 0."""
        begins = (
            self._at < len(self._stages) and self._stages[self._at].kind == "forward" and self._layer == 0
        )
        return self.tokens - self._from if begins and self._keeps_kv else 0

    @property
    def has_added(self) -> bool:
        """Whether gradients of it were added up already."""
        if not self._learns:
            return False
        if self._at == len(self._stages):
            return True
        begins = self._layer == self._layers - 1 and self._to == self.tokens
        return self._stages[self._at].kind == "backward" and not begins

    def units_left(self, window: int) -> int:
        """Units still to come when each is one piece, with windows of `window` tokens."""
        return sum(
            self._units_of(stage.kind, window) if at else self._units_of_current(window)
            for at, stage in enumerate(self._stages[self._at :])
        )

    def _units_of(self, kind: str, window: int) -> int:
        layers, windows = self._layers, -(-self.tokens // window)
        if kind == "loss":
            return self._losses.left(0)
        if kind == "backward":  # the last layer's K and V are there still
            return layers * windows + self._all_recalls(window, layers - 1)
        return layers * windows

    def _units_of_current(self, window: int) -> int:
        kind, layers = self._stages[self._at].kind, self._layers
        windows = -(-self.tokens // window)
        if kind == "backward":
            others = self._layer * windows + self._all_recalls(window, self._layer)
            return others + self._recalls(self._layer, window, self._recalled) + -(-self._to // window)
        if kind == "loss":
            return self._losses.left(self._from)
        begun = -(-(self.tokens - self._from) // window)
        if self._keeps_kv:
            return layers * begun - self._layer
        return (layers - self._layer - 1) * windows + begun

    def _recalls(self, layer: int, window: int, recalled: int) -> int:
        """Pieces in which a layer's K and V are computed again, from token `recalled` on."""
        if self._keeps_kv or layer in self._kept:
            return 0
        return -(-(self.tokens - recalled) // (RECALLED * window))

    def _all_recalls(self, window: int, layers: int) -> int:
        """Of the first `layers` layers."""
        return sum(self._recalls(layer, window, 0) for layer in range(layers))

    # -- memory that can be spared ---------------------------------------------------------------------

    def keep_outputs(self, slots: Sequence[Tensor]) -> None:
        """Keep what spares computing a layer again, of as many of the last layers as slots are given for.

        Args:
            slots: `kept_outputs.kept_slots` leased slot indices for each layer, the last layer's first. Call it
                before the first unit.
        """
        for number, lent in enumerate(slots):
            self._kept.lend(self._layers - 1 - number, lent)

    def drop_outputs(self, number: int) -> None:
        """Do without those in `slots[number]` from the next unit on, which `next_unit` must be asked for again."""
        self._kept.drop(self._layers - 1 - number)

    # -- moving away and back --------------------------------------------------------------------------

    @property
    def swap_bytes(self) -> int:
        """Bytes that `swap_out` copies."""
        return self._rows.live_bytes(self._live_layers)

    def swap_out(self) -> None:
        """Copy what is still needed to host memory; the slots are free for others when this returns."""
        self._kept.clear()
        self._swapped = self._rows.save(self._live_layers)

    def swap_in(self, slots: Tensor) -> None:
        """Go on in other slots, as many as before, where `swap_out` left off."""
        self._rows.restore(slots, self._live_layers, self._swapped)
        self._swapped = []

    @property
    def _live_layers(self) -> int:
        """The first so many layers are still to be read; the others have gone backward."""
        backward = self._at < len(self._stages) and self._stages[self._at].kind == "backward"
        return self._layer + 1 if backward else self._layers

    def _enter(self, stage: int) -> None:
        self._at = stage
        kind = self._stages[stage].kind if stage < len(self._stages) else None
        self._layer = self._layers - 1 if kind == "backward" else 0
        self._from = 0
        self._to = self.tokens if kind == "backward" else 0
        self._recalled = self.tokens  # the forward pass ended with the layer that goes backward first
        if kind == "loss":
            self._losses.begin()
        elif kind is not None:
            self._pieces.tuned = self._stages[stage].tuned

    def _run(self, stage: int, window: int, pieces: int) -> None:
        run: dict[str, Callable[[], None]] = {
            "forward": partial(self._forward_piece, window),
            "loss": self._loss_piece,
            "backward": partial(self._backward_piece, window),
        }
        for _ in range(pieces):
            if self._at == stage:
                run[self._stages[stage].kind]()

    def _forward_piece(self, window: int) -> None:
        layers = self._layers
        if self._layer == 0 or not self._keeps_kv:
            self._to = min(self._from + window, self.tokens)
        stage = self._stages[self._at]
        self._pieces.forward(self._layer, self._from, self._to, keep=stage.learns)
        if stage.tuned:
            self.worked += FORWARD * (self._to - self._from) / layers
        if self._keeps_kv:  # the window's next layer, or the next window
            self._layer += 1
            if self._layer == layers:
                self._layer, self._from = 0, self._to
            done = self._from == self.tokens
        else:  # the layer's next window, or the next layer
            self._from = self._to
            if self._from == self.tokens:
                self._layer, self._from = self._layer + 1, 0
            done = self._layer == layers
        if done:
            self._enter(self._at + 1)

    def _loss_piece(self) -> None:
        stage, stop = self._stages[self._at], self._losses.end(self._from)
        self._losses.run(self._from, stop, learns=stage.learns)
        self._from = stop
        if stop < self.tokens:
            return
        if stage.tuned:
            self.loss = self._losses.settle(self.reference, learns=stage.learns)
        else:
            self.reference = self._losses.log_probabilities
        self._enter(self._at + 1)

    def _backward_piece(self, window: int) -> None:
        if self._recalled < self.tokens and self._layer in self._kept:
            self._rows.write_kv(self._layer, 0, *self._kept.kv(self._layer))
            self._recalled = self.tokens
        if self._recalled < self.tokens:
            stop = min(self._recalled + RECALLED * window, self.tokens)
            for start in range(self._recalled, stop, window):
                self._pieces.recall(self._layer, start, min(start + window, stop))
            self._recalled = stop
            return
        start = _window_start(self._to, window)
        self._pieces.backward(self._layer, start, self._to)
        self.worked += BACKWARD * (self._to - start) / self._layers
        self._to = start
        if start == 0:
            self._layer, self._to = self._layer - 1, self.tokens
            self._recalled = self.tokens if self._keeps_kv else 0
            if self._layer < 0:
                self._enter(self._at + 1)

    def _backward_credit(self, window: int, pieces: int) -> float:
        tokens, layer, stop = 0, self._layer, self._to
        recalls = self._recalls(layer, window, self._recalled)
        for _ in range(pieces):
            if layer < 0:
                break
            if recalls:
                recalls -= 1
                continue
            start = _window_start(stop, window)
            tokens += stop - start
            if start == 0:
                layer, stop, recalls = layer - 1, self.tokens, self._recalls(layer - 1, window, 0)
            else:
                stop = start
        return tokens / self._layers


def _stages(reference: bool, learns: bool) -> list[_Stage]:
    """Args: reference, whether the base model's log-probabilities are computed first."""
    stages = [_Stage("forward", learns=learns), _Stage("loss", learns=learns)]
    if learns:
        stages.append(_Stage("backward"))
    if reference:
        stages[:0] = [_Stage("forward", tuned=False, learns=False), _Stage("loss", tuned=False, learns=False)]
    return stages


def _window_start(stop: int, window: int) -> int:
    """Where the window that ends at `stop` begins: those of the backward pass are those of the forward pass, so
    that what is computed again has the same values bit for bit."""
    return (stop - 1) // window * window
