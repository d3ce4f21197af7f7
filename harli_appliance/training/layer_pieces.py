"""One decoder layer over one window of tokens: forward, backward, or its K and V again.

The layer runs in the transformers code, unmodified, with projections of ours (`projections`) and a cache object
that hands it the keys and values of earlier windows. Backward computes the forward pass again with K and V as
leaves, so that

    dL/dK, dL/dV of a token are summed over every later window that attended to it,

which makes the gradients those of ordinary backpropagation (chain rule; FlexLLM, arXiv 2402.18789, section 5,
does this for whole sequences in the backward pass), however the windows are cut. Packed examples do not see each
other. Knows layers and windows; does not know in which order they come.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from harli_appliance.training.activations import Activations
from harli_appliance.training.adapter import Adapter
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.kept_attention import Attended
from harli_appliance.training.kept_outputs import KeptOutputs
from harli_appliance.training.layer_cache import KvComputed, KvOnly, LayerCache
from harli_appliance.training.packing import PackedSequence
from harli_appliance.training.projections import Forwards, Projection, replaced
from harli_appliance.training.visibility import Visibility

Gradients = Callable[[int], Sequence[Tensor]]
"""A layer's gradients, one tensor for each of its trained parameters. They may lie elsewhere at the next unit."""


class LayerPieces:
    """The layers of one micro-batch.

    Args:
        dropout_key: draws the masks of the adapter's dropout, see `dropout.sequence_key`; None drops nothing.
        gradients: where each layer's gradients are added up; None where nothing goes backward.

    Attributes:
        tuned: whether the layers are adapted; else they are the base model's.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapter: Adapter,
        sequence: PackedSequence,
        rows: Activations,
        kept: KeptOutputs,
        *,
        dropout_key: int | None,
        gradients: Gradients | None,
    ) -> None:
        self.tuned = True
        self._backbone = backbone
        self._adapter = adapter
        self._sequence = sequence
        self._visibility = Visibility(backbone, sequence.starts)
        self._rows = rows
        self._kept = kept
        self._dropout_key = dropout_key
        self._gradients = gradients

    def forward(self, layer: int, a: int, b: int, *, keep: bool) -> None:
        """Args: keep: what spares computing it again, where slots were lent for that."""
        keeping = self._kept.keeping(layer, a) if keep else {}
        with torch.no_grad(), replaced({**self._computed(layer), **keeping}):
            attended = self._kept.attended(layer, a, b, known=False) if keep else None
            past = self._past(layer, a)
            out, cache = self._run(layer, self._input(layer, a, b), past, a, b, attended=attended)
            self._rows.write_kv(layer, a, cache.keys, cache.values)
            if keeping and not self._rows.keeps_kv:
                self._kept.write_kv(layer, a, cache.keys, cache.values)
            self._rows.write_input(layer + 1, a, out)

    def recall(self, layer: int, a: int, b: int) -> None:
        """Compute K and V of tokens [a, b) again, and nothing else of the layer."""
        cache = KvOnly()
        spared = _left_out(self._adapter.projections[layer].queries)
        computed = {**self._computed(layer), **spared}
        with torch.no_grad(), replaced(computed), contextlib.suppress(KvComputed):
            self._call(layer, self._input(layer, a, b), cache, {"attention_mask": None}, a, b)
        self._rows.write_kv(layer, a, cache.keys, cache.values)

    def backward(self, layer: int, a: int, b: int) -> None:
        if b == len(
            self._sequence
        ):  # first piece of this layer: nothing has attended to its keys and values yet
            self._rows.clear_kv_gradients()
        hidden = self._input(layer, a, b).requires_grad_()
        past = self._past(layer, a)
        leaves = [hidden]
        if past is not None:
            leaves += [past[0].requires_grad_(), past[1].requires_grad_()]
        spared = {**_left_out(self._adapter.projections[layer].unneeded), **self._kept.known(layer, a)}
        with torch.enable_grad(), replaced({**self._computed(layer), **spared}):
            attended = self._kept.attended(layer, a, b, known=True)
            out, cache = self._run(layer, hidden, past, a, b, self._rows.kv(layer, a, b), attended)
        gradients = torch.autograd.grad(
            [out, cache.keys, cache.values],
            [*leaves, *self._adapter.parameters(layer)],
            [self._rows.output_gradient(a, b), *self._rows.kv_gradients(a, b)],
        )
        if layer > 0:
            self._rows.write_output_gradient(a, gradients[0])
        if past is not None:
            first = self._visibility.first(layer, a)
            self._rows.add_kv_gradients(first, gradients[1], gradients[2])
        self._accumulate(layer, gradients[len(leaves) :])

    def _accumulate(self, layer: int, gradients: Sequence[Tensor]) -> None:
        assert self._gradients is not None  # noqa: S101 - or there is no backward stage
        for total, gradient in zip(self._gradients(layer), gradients, strict=True):
            total.add_(gradient)

    def _computed(self, layer: int) -> Forwards:
        if not self.tuned:
            return {}
        return {
            projection.module: projection.value for projection in self._adapter.projections[layer].adapted
        }

    def _run(
        self,
        layer: int,
        hidden: Tensor,
        past: tuple[Tensor, Tensor] | None,
        a: int,
        b: int,
        known: tuple[Tensor, Tensor] | None = None,
        attended: Attended | None = None,
    ) -> tuple[Tensor, LayerCache]:
        cache = LayerCache(past, known)
        seen = self._visibility.window(layer, a, b)
        out = self._call(layer, hidden, cache, seen, a, b, attended)
        return (out[0] if isinstance(out, tuple) else out)[0], cache

    def _call(
        self,
        layer: int,
        hidden: Tensor,
        cache: LayerCache | KvOnly,
        seen: dict[str, Any],
        a: int,
        b: int,
        attended: Attended | None = None,
    ) -> Any:
        more = {"attended": attended or Attended()} if self._backbone.keeps_attention else {}
        # Drawn up again in every unit: kept, it would be memory outside the pool for every token.
        cos, sin = self._backbone.rotary(self._sequence.positions[a:b])[layer]
        with self._adapter.applied(layer, self.tuned, self._dropout_key, a, b):
            return self._backbone.layers[layer](
                hidden[None],
                position_ids=self._sequence.positions[None, a:b],
                past_key_values=cache,
                use_cache=True,
                position_embeddings=(cos, sin),
                **seen,
                **more,
            )

    def _past(self, layer: int, a: int) -> tuple[Tensor, Tensor] | None:
        first = self._visibility.first(layer, a)
        return None if first == a else self._rows.kv(layer, first, a)

    def _input(self, layer: int, a: int, b: int) -> Tensor:
        if layer == 0:  # an embedding is cheaper to look up again than to keep
            return self._backbone.embed(self._sequence.tokens[a:b]).detach()
        return self._rows.input(layer, a, b)


def _left_out(projections: Sequence[Projection]) -> Forwards:
    return {projection.module: projection.without_value for projection in projections}
