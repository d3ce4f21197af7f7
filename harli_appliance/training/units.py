"""Exact gradients in work units: forward or backward of one decoder layer over one window of tokens.

Between units a micro-batch keeps, per token and layer, the layer's input and the token's K and V, all in leased
rows; inside a unit the layer runs in the transformers code, unmodified, with a cache object that hands it the
keys and values of earlier windows. Backward recomputes a unit's forward with those as leaves, so that

    dL/dK, dL/dV of a token are summed over every later window that attended to it,

which makes the gradients those of ordinary backpropagation (chain rule; FlexLLM, arXiv 2402.18789, section 5,
does this for whole sequences in the backward pass). Packed examples do not see each other.

Knows layers, windows and rows; does not know lanes, jobs or schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from harli_appliance.memory.rows import RowBlock
from harli_appliance.training.backbone import Adapter, Backbone
from harli_appliance.training.packing import PackedSequence

UnitKind = Literal["forward", "loss", "backward", "step"]


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
class Footprint:
    """Slots that a micro-batch of `tokens` tokens leases."""

    kv: int
    hidden: int
    scratch: int

    @property
    def slots(self) -> int:
        return self.kv + self.hidden + self.scratch


def footprint(backbone: Backbone, tokens: int) -> Footprint:
    """Per token: 1 slot of K and V, hidden/(2 kv_width) slots of layer inputs (rounded up to whole rows), and the
    gradients of one layer's input, K and V spread over the rows of all layers."""
    rows = -(-backbone.hidden_size // backbone.kv_width)
    all_layers = 2 * len(backbone.layers)
    return Footprint(
        kv=tokens,
        hidden=-(-tokens * rows // 2),
        scratch=-(-tokens * (rows + 2) // all_layers),
    )


class _Window:
    """Stands in for transformers' cache during one unit: earlier keys and values in, new ones out."""

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        self._keys = keys
        self._values = values
        self.new_keys: Tensor
        self.new_values: Tensor

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.new_keys, self.new_values = keys, values
        if self._keys is None or self._values is None:
            return keys, values
        return torch.cat([self._keys, keys], dim=2), torch.cat([self._values, values], dim=2)

    def get_seq_length(self, *args: object) -> int:
        return 0 if self._keys is None else self._keys.shape[2]


class MicroBatch:
    """One packed sequence on its way through forward, loss and backward.

    Args:
        buffers: K and V buffers, one [slots, kv_width] tensor a layer each.
        slots: leased slot indices, `footprint(...)`.slots of them.
        normaliser: the loss is the weighted sum of token losses divided by this.
        window: tokens of a forward or backward unit.
        loss_tokens: tokens of a loss unit; logits of that many tokens exist at a time.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        sequence: PackedSequence,
        *,
        buffers: tuple[Sequence[Tensor], Sequence[Tensor]],
        slots: Tensor,
        normaliser: float,
        window: int,
        loss_tokens: int,
    ) -> None:
        self._backbone = backbone
        self._adapter = adapter
        self._starts: list[int] = sequence.starts.tolist()
        self._sequence = sequence.to(backbone.device)
        self._normaliser = normaliser
        self._window = window
        self._loss_tokens = loss_tokens
        self._row_count = -(-backbone.hidden_size // backbone.kv_width)
        self._rotary = backbone.rotary(self._sequence.positions)
        self._lay_out(buffers, slots)
        self.tokens = len(sequence)
        self.loss = 0.0
        self.gradients: list[list[Tensor] | None] = [None] * len(backbone.layers)

    def _lay_out(self, buffers: tuple[Sequence[Tensor], Sequence[Tensor]], slots: Tensor) -> None:
        tokens = len(self._sequence)
        size = footprint(self._backbone, tokens)
        if len(slots) != size.slots:
            raise ValueError(f"{tokens} tokens need {size.slots} slots, got {len(slots)}")
        kv, hidden, scratch = torch.split(slots, [size.kv, size.hidden, size.scratch])
        k_buffers, v_buffers = buffers
        layers = range(len(self._backbone.layers))
        self._keys = [RowBlock([k_buffers[layer]], kv) for layer in layers]
        self._values = [RowBlock([v_buffers[layer]], kv) for layer in layers]
        self._inputs = [RowBlock([k_buffers[layer], v_buffers[layer]], hidden) for layer in layers]
        # One block holds, row after row: gradient (or final value) of the hidden states, of K, of V.
        self._scratch = RowBlock([*k_buffers, *v_buffers], scratch)
        self._grad_k = tokens * self._row_count
        self._grad_v = self._grad_k + tokens

    # -- the order of work -----------------------------------------------------------------------------

    def units(self) -> Iterator[WorkUnit]:
        """Every unit in order; gradients are complete after the last."""
        windows = self._windows()
        last = len(self._backbone.layers) - 1
        for a, b in windows:
            for layer in range(last + 1):
                yield WorkUnit("forward", partial(self._forward, layer, a, b))
        for a, b in self._loss_ranges():
            yield WorkUnit("loss", partial(self._loss, a, b))
        for layer in range(last, -1, -1):
            for a, b in reversed(windows):
                yield WorkUnit("backward", partial(self._backward, layer, a, b), (b - a) / (last + 1))

    def _windows(self) -> list[tuple[int, int]]:
        size = len(self._sequence)
        return [(a, min(a + self._window, size)) for a in range(0, size, self._window)]

    def _loss_ranges(self) -> list[tuple[int, int]]:
        """Consecutive ranges over all tokens, each with at most `loss_tokens` learned ones."""
        ranges, start, learned = [], 0, 0
        for token, weight in enumerate(self._sequence.weights.tolist()):
            if weight and learned == self._loss_tokens:
                ranges.append((start, token))
                start, learned = token, 0
            learned += bool(weight)
        return [*ranges, (start, len(self._sequence))]

    # -- units -----------------------------------------------------------------------------------------

    def _forward(self, layer: int, a: int, b: int) -> None:
        with torch.no_grad():
            hidden = self._layer_input(layer, a, b)
            past = self._past(layer, a)
            out, cache = self._run_layer(layer, hidden, past, a, b)
            self._keys[layer].write(a, _to_rows(cache.new_keys))
            self._values[layer].write(a, _to_rows(cache.new_values))
            if layer + 1 < len(self._backbone.layers):
                self._write_hidden(self._inputs[layer + 1], a, out)
            else:
                self._write_hidden(self._scratch, a, out)

    def _loss(self, a: int, b: int) -> None:
        """Cross-entropy of tokens [a, b); their final hidden states are replaced by the gradient."""
        final = self._read_hidden(self._scratch, a, b)
        weights = self._sequence.weights[a:b]
        learned = weights != 0
        gradient = torch.zeros_like(final)
        if learned.any():
            hidden = final[learned].requires_grad_()
            with torch.enable_grad():
                logits = self._backbone.logits(hidden).float()
                targets = self._sequence.targets[a:b][learned]
                losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                loss = (losses * weights[learned]).sum() / self._normaliser
                (gradient[learned],) = torch.autograd.grad(loss, hidden)
            self.loss += loss.item()
        self._write_hidden(self._scratch, a, gradient)

    def _backward(self, layer: int, a: int, b: int) -> None:
        size = len(self._sequence)
        if b == size:  # first unit of this layer: nothing has attended to its keys and values yet
            self._scratch.zero(self._grad_k, self._grad_k + 2 * size)
        parameters = self._adapter.parameters(layer)
        hidden = self._layer_input(layer, a, b).requires_grad_()
        past = self._past(layer, a)
        leaves = [hidden]
        if past is not None:
            leaves += [past[0].requires_grad_(), past[1].requires_grad_()]
        with torch.enable_grad():
            out, cache = self._run_layer(layer, hidden, past, a, b)
            outputs = [out, cache.new_keys, cache.new_values]
            gradients = torch.autograd.grad(
                outputs,
                [*leaves, *parameters],
                [
                    self._read_hidden(self._scratch, a, b),
                    self._from_rows(self._scratch.read(self._grad_k + a, self._grad_k + b)),
                    self._from_rows(self._scratch.read(self._grad_v + a, self._grad_v + b)),
                ],
            )
        if layer > 0:
            self._write_hidden(self._scratch, a, gradients[0])
        if past is not None:
            first = self._first(layer, a)
            self._scratch.add(self._grad_k + first, _to_rows(gradients[1]))
            self._scratch.add(self._grad_v + first, _to_rows(gradients[2]))
        self._accumulate(layer, gradients[len(leaves) :])

    def _accumulate(self, layer: int, gradients: Sequence[Tensor]) -> None:
        held = self.gradients[layer]
        if held is None:
            self.gradients[layer] = list(gradients)
        else:
            for total, gradient in zip(held, gradients, strict=True):
                total += gradient

    # -- pieces of units -------------------------------------------------------------------------------

    def _run_layer(
        self, layer: int, hidden: Tensor, past: tuple[Tensor, Tensor] | None, a: int, b: int
    ) -> tuple[Tensor, _Window]:
        cache = _Window(*past) if past is not None else _Window(None, None)
        cos, sin = self._rotary[layer]
        out: Any = self._backbone.layers[layer](
            hidden[None],
            attention_mask=self._mask(layer, a, b),
            position_ids=self._sequence.positions[None, a:b],
            past_key_values=cache,
            use_cache=True,
            position_embeddings=(cos[:, a:b], sin[:, a:b]),
        )
        return (out[0] if isinstance(out, tuple) else out)[0], cache

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
        if first == a:
            return None
        return (
            self._from_rows(self._keys[layer].read(first, a)),
            self._from_rows(self._values[layer].read(first, a)),
        )

    def _layer_input(self, layer: int, a: int, b: int) -> Tensor:
        if layer == 0:  # an embedding is cheaper to look up again than to keep
            return self._backbone.embed(self._sequence.tokens[a:b]).detach()
        return self._read_hidden(self._inputs[layer], a, b)

    def _read_hidden(self, block: RowBlock, a: int, b: int) -> Tensor:
        rows = block.read(a * self._row_count, b * self._row_count)
        return rows.view(b - a, -1)[:, : self._backbone.hidden_size]

    def _write_hidden(self, block: RowBlock, a: int, hidden: Tensor) -> None:
        width = self._row_count * self._backbone.kv_width
        padded = torch.nn.functional.pad(hidden, (0, width - hidden.shape[1]))
        block.write(a * self._row_count, padded.reshape(-1, self._backbone.kv_width))

    def _from_rows(self, rows: Tensor) -> Tensor:
        """[n, kv_width] rows to [1, kv heads, n, head size] as attention wants them."""
        return rows.view(1, len(rows), self._backbone.kv_heads, self._backbone.head_size).transpose(1, 2)


def _to_rows(states: Tensor) -> Tensor:
    """[1, kv heads, n, head size] to [n, kv_width] rows."""
    return states.detach()[0].transpose(0, 1).reshape(states.shape[2], -1)
