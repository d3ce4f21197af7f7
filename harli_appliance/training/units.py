"""Exact gradients in work units: forward or backward of some decoder layers over a window of tokens.

Between units a micro-batch keeps, per token and layer, the layer's input, and of one layer at a time K and V, all
in leased rows; inside a unit the layer runs in the transformers code, unmodified, with a cache object that hands
it the keys and values of earlier windows. Forward finishes a layer before it begins the next; the backward pass of
a layer first computes its K and V again. Where windows shall go through all layers, one after the other, K and V
of all layers are kept. Backward recomputes a unit's forward with K and V as leaves, so that

    dL/dK, dL/dV of a token are summed over every later window that attended to it,

which makes the gradients those of ordinary backpropagation (chain rule; FlexLLM, arXiv 2402.18789, section 5,
does this for whole sequences in the backward pass), however the windows are cut: every unit may have another size.
Packed examples do not see each other.

Knows layers, windows and stages; does not know lanes, jobs or schedules.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from harli_appliance.training.activations import Activations, Buffers
from harli_appliance.training.adapter import Adapter
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.cross_entropy import cross_entropy_
from harli_appliance.training.kept_outputs import KeptOutputs
from harli_appliance.training.layer_cache import KvComputed, KvOnly, LayerCache
from harli_appliance.training.objectives import Objective
from harli_appliance.training.pace import BACKWARD, FORWARD
from harli_appliance.training.packing import PackedSequence
from harli_appliance.training.recompute import left_out, replaced

UnitKind = Literal["forward", "loss", "backward", "step"]
Gradients = Callable[[int], Sequence[Tensor]]
"""A layer's gradients, one tensor for each of its trained parameters. They may lie elsewhere at the next unit."""


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
        self._backbone = backbone
        self._adapter = adapter
        self._sequence = sequence.to(backbone.device)
        self._starts: list[int] = sequence.starts.tolist()
        self._learned: list[int] = torch.nonzero(sequence.weights)[:, 0].tolist()
        self._objective = objective
        self._loss_tokens = loss_tokens
        self._dropout_key = dropout_key
        self._keeps_kv = keeps_kv
        self._rows = Activations(backbone, buffers, slots, len(sequence), keeps_kv=keeps_kv)
        self._kept = KeptOutputs(backbone, adapter.projections, buffers, len(sequence))
        self.slots = len(slots)
        self.tokens = len(sequence)
        self.loss = 0.0
        self.worked = 0.0
        self.reference = reference
        self._gradients = gradients
        self._swapped: list[Tensor] = []
        self._log_probabilities = torch.zeros(0)
        self._stages = _stages(objective.needs_reference and reference is None, learns=gradients is not None)
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
        if self._gradients is None:
            return False
        if self._at == len(self._stages):
            return True
        begins = self._layer == len(self._backbone.layers) - 1 and self._to == self.tokens
        return self._stages[self._at].kind == "backward" and not begins

    def units_left(self, window: int) -> int:
        """Units still to come when each is one piece, with windows of `window` tokens."""
        return sum(
            self._units_of(stage.kind, window) if at else self._units_of_current(window)
            for at, stage in enumerate(self._stages[self._at :])
        )

    def _units_of(self, kind: str, window: int) -> int:
        layers, windows = len(self._backbone.layers), -(-self.tokens // window)
        if kind == "loss":
            return max(1, -(-len(self._learned) // self._loss_tokens))
        if kind == "backward":  # the last layer's K and V are there still
            return layers * windows + self._all_recalls(window, layers - 1)
        return layers * windows

    def _units_of_current(self, window: int) -> int:
        kind, layers = self._stages[self._at].kind, len(self._backbone.layers)
        windows = -(-self.tokens // window)
        if kind == "backward":
            others = self._layer * windows + self._all_recalls(window, self._layer)
            return others + self._recalls(self._layer, window, self._recalled) + -(-self._to // window)
        if kind == "loss":
            learned = len(self._learned) - bisect_left(self._learned, self._from)
            return max(1, -(-learned // self._loss_tokens))
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
            self._kept.lend(len(self._backbone.layers) - 1 - number, lent)

    def drop_outputs(self, number: int) -> None:
        """Do without those in `slots[number]` from the next unit on, which `next_unit` must be asked for again."""
        self._kept.drop(len(self._backbone.layers) - 1 - number)

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
        return self._layer + 1 if backward else len(self._backbone.layers)

    def _enter(self, stage: int) -> None:
        self._at = stage
        kind = self._stages[stage].kind if stage < len(self._stages) else None
        self._layer = len(self._backbone.layers) - 1 if kind == "backward" else 0
        self._from = 0
        self._to = self.tokens if kind == "backward" else 0
        self._recalled = self.tokens  # the forward pass ended with the layer that goes backward first
        if kind == "loss":
            self._log_probabilities = torch.zeros(len(set(self._starts)), dtype=torch.float64)

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
        layers = len(self._backbone.layers)
        if self._layer == 0 or not self._keeps_kv:
            self._to = min(self._from + window, self.tokens)
        self._forward(self._layer, self._from, self._to)
        if self._stages[self._at].tuned:
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
        stop = self._loss_end(self._from)
        self._loss(self._from, stop)
        self._from = stop
        if stop == self.tokens:
            self._settle()
            self._enter(self._at + 1)

    def _backward_piece(self, window: int) -> None:
        if self._recalled < self.tokens and self._layer in self._kept:
            self._rows.write_kv(self._layer, 0, *self._kept.kv(self._layer))
            self._recalled = self.tokens
        if self._recalled < self.tokens:
            stop = min(self._recalled + RECALLED * window, self.tokens)
            for start in range(self._recalled, stop, window):
                self._recall(self._layer, start, min(start + window, stop))
            self._recalled = stop
            return
        start = _window_start(self._to, window)
        self._backward(self._layer, start, self._to)
        self.worked += BACKWARD * (self._to - start) / len(self._backbone.layers)
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
        return tokens / len(self._backbone.layers)

    def _loss_end(self, start: int) -> int:
        """Where a range ends that begins at `start` and holds at most `loss_tokens` learned tokens."""
        following = bisect_left(self._learned, start) + self._loss_tokens
        return self._learned[following] if following < len(self._learned) else self.tokens

    # -- pieces ----------------------------------------------------------------------------------------

    def _forward(self, layer: int, a: int, b: int) -> None:
        keeping = self._kept.keeping(layer, a) if self._stages[self._at].learns else {}
        with torch.no_grad(), replaced(keeping):
            out, cache = self._run_layer(layer, self._layer_input(layer, a, b), self._past(layer, a), a, b)
            self._rows.write_kv(layer, a, cache.keys, cache.values)
            if keeping and not self._keeps_kv:
                self._kept.write_kv(layer, a, cache.keys, cache.values)
            self._rows.write_input(layer + 1, a, out)

    def _loss(self, a: int, b: int) -> None:
        """Log-probabilities of tokens [a, b). Where the stage learns, their final hidden states are replaced by
        the gradient of the weighted sum of -log p, times the objective's scale of tokens."""
        final = self._rows.output_gradient(a, b)
        weights = self._sequence.weights[a:b]
        learned = weights != 0
        learns = self._stages[self._at].learns
        gradient = torch.zeros_like(final) if learns else None
        if learned.any():
            hidden, weights = final[learned].requires_grad_(learns), weights[learned]
            with torch.set_grad_enabled(learns):
                logits = self._backbone.logits(hidden)
            by_logits = logits.detach().float()
            scale = weights * self._objective.token_scale if learns else None
            losses = weights * cross_entropy_(by_logits, self._sequence.targets[a:b][learned], scale)
            if gradient is not None:
                (gradient[learned],) = torch.autograd.grad(logits, hidden, by_logits.to(logits.dtype))
            members = _members(self._sequence.starts)[a:b][learned].cpu()
            self._log_probabilities.index_add_(0, members, -losses.double().cpu())
        if gradient is not None:
            self._rows.write_output_gradient(a, gradient)

    def _settle(self) -> None:
        """All log-probabilities are known: they are the reference, or give the loss and each example's factor."""
        stage = self._stages[self._at]
        if not stage.tuned:
            self.reference = self._log_probabilities
            return
        verdict = self._objective.judge(self._log_probabilities, self.reference)
        self.loss = verdict.loss
        if verdict.factors is None or not stage.learns:
            return
        factors = verdict.factors.to(self._sequence.weights)[_members(self._sequence.starts)]
        for a in range(0, self.tokens, self._loss_tokens):
            b = min(a + self._loss_tokens, self.tokens)
            self._rows.write_output_gradient(a, self._rows.output_gradient(a, b) * factors[a:b, None])

    def _recall(self, layer: int, a: int, b: int) -> None:
        """Compute K and V of tokens [a, b) again, and nothing else of the layer."""
        cache = KvOnly()
        queries = self._adapter.projections[layer].queries
        with torch.no_grad(), replaced(left_out(queries)), contextlib.suppress(KvComputed):
            self._call_layer(layer, self._layer_input(layer, a, b), cache, None, a, b)
        self._rows.write_kv(layer, a, cache.keys, cache.values)

    def _backward(self, layer: int, a: int, b: int) -> None:
        if b == self.tokens:  # first piece of this layer: nothing has attended to its keys and values yet
            self._rows.clear_kv_gradients()
        hidden = self._layer_input(layer, a, b).requires_grad_()
        past = self._past(layer, a)
        leaves = [hidden]
        if past is not None:
            leaves += [past[0].requires_grad_(), past[1].requires_grad_()]
        spared = {**left_out(self._adapter.projections[layer].unneeded), **self._kept.known(layer, a, b)}
        with torch.enable_grad(), replaced(spared):
            out, cache = self._run_layer(layer, hidden, past, a, b, self._rows.kv(layer, a, b))
        gradients = torch.autograd.grad(
            [out, cache.keys, cache.values],
            [*leaves, *self._adapter.parameters(layer)],
            [self._rows.output_gradient(a, b), *self._rows.kv_gradients(a, b)],
        )
        if layer > 0:
            self._rows.write_output_gradient(a, gradients[0])
        if past is not None:
            self._rows.add_kv_gradients(self._first(layer, a), gradients[1], gradients[2])
        self._accumulate(layer, gradients[len(leaves) :])

    def _accumulate(self, layer: int, gradients: Sequence[Tensor]) -> None:
        assert self._gradients is not None  # noqa: S101 - or there is no backward stage
        for total, gradient in zip(self._gradients(layer), gradients, strict=True):
            total.add_(gradient)

    # -- parts of pieces -------------------------------------------------------------------------------

    def _run_layer(
        self,
        layer: int,
        hidden: Tensor,
        past: tuple[Tensor, Tensor] | None,
        a: int,
        b: int,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, LayerCache]:
        cache = LayerCache(past, known)
        out = self._call_layer(layer, hidden, cache, self._mask(layer, a, b), a, b)
        return (out[0] if isinstance(out, tuple) else out)[0], cache

    def _call_layer(
        self, layer: int, hidden: Tensor, cache: LayerCache | KvOnly, mask: Tensor | None, a: int, b: int
    ) -> Any:
        # Drawn up again in every unit: kept, it would be memory outside the pool for every token.
        cos, sin = self._backbone.rotary(self._sequence.positions[a:b])[layer]
        with self._adapter.applied(layer, self._stages[self._at].tuned, self._dropout_key, a, b):
            return self._backbone.layers[layer](
                hidden[None],
                attention_mask=mask,
                position_ids=self._sequence.positions[None, a:b],
                past_key_values=cache,
                use_cache=True,
                position_embeddings=(cos, sin),
            )

    def _first(self, layer: int, a: int) -> int:
        """The first token that window [a, ...) attends to: where token a's example or attention window begins."""
        window = self._backbone.windows[layer]
        return self._starts[a] if window is None else max(self._starts[a], a - window + 1)

    def _mask(self, layer: int, a: int, b: int) -> Tensor:
        """Of shape [1, 1, b - a, b - first]: a token sees itself and earlier tokens of its own example, as far
        back as the layer's attention window reaches."""
        device = self._sequence.starts.device
        keys = torch.arange(self._first(layer, a), b, device=device)[None]
        queries = torch.arange(a, b, device=device)[:, None]
        seen = (keys <= queries) & (keys >= self._sequence.starts[a:b, None])
        window = self._backbone.windows[layer]
        if window is not None:
            seen &= keys > queries - window
        return self._backbone.attention_mask(seen)

    def _past(self, layer: int, a: int) -> tuple[Tensor, Tensor] | None:
        first = self._first(layer, a)
        return None if first == a else self._rows.kv(layer, first, a)

    def _layer_input(self, layer: int, a: int, b: int) -> Tensor:
        if layer == 0:  # an embedding is cheaper to look up again than to keep
            return self._backbone.embed(self._sequence.tokens[a:b]).detach()
        return self._rows.input(layer, a, b)


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


def _members(starts: Tensor) -> Tensor:
    """For each token the number of its example in the sequence; int64 of shape [tokens]."""
    begins = (starts[1:] != starts[:-1]).long()
    return torch.nn.functional.pad(begins.cumsum(0), (1, 0))
