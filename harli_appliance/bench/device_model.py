"""A model of given shapes with random weights on the device, and its decode step against the bandwidth floor.

Weights are made on the device, so that nothing is downloaded; their values change no time. The decode step is what
one would write by hand: one padded batch, a static cache. Knows torch and transformers; does not know SGLang.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from harli_appliance.bench.device_rig import Place, Rig
from harli_appliance.bench.device_shapes import Shapes
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.fused_kernels import fuse

EPS = 1e-5


class DeviceModel:
    """The model on the rig's device."""

    def __init__(self, rig: Rig, shapes: Shapes) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self._rig, self._shapes = rig, shapes
        config = LlamaConfig(
            vocab_size=shapes.vocabulary,
            hidden_size=shapes.hidden,
            intermediate_size=shapes.inner,
            num_hidden_layers=shapes.layers,
            num_attention_heads=shapes.heads,
            num_key_value_heads=shapes.kv_heads,
            max_position_embeddings=8192,
            rms_norm_eps=EPS,
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(rig.dtype)
        try:
            with torch.device(rig.device):
                self._model = LlamaForCausalLM(config).requires_grad_(False).eval()
        finally:
            torch.set_default_dtype(before)
        embedded = shapes.vocabulary * shapes.hidden
        self.parameters = sum(weight.numel() for weight in self._model.parameters()) - embedded
        """Those that are multiplied with: all but the embedding."""
        self.backbone = Backbone(self._model)

    def fuse(self) -> tuple[str, ...]:
        """Finetune with fused kernels from now on; those that work here."""
        self.backbone = Backbone(self._model, fuse(self._model))
        return self.backbone.kernels.fused

    # -- decoding ----------------------------------------------------------------------------------------

    def decode(self, place: Place, bandwidth: float) -> dict[str, Any]:
        """Milliseconds of a decode step by batch, against weights and cache read at `bandwidth` bytes a second."""
        found = {}
        for batch in self._shapes.batches:
            step = self._decode_step(batch)
            took = self._rig.alone(place, step, self._shapes.times)
            row = self._against_floor(took, batch, bandwidth)
            if self._rig.device.type == "cuda":
                captured = self._captured(place, step)
                row |= {
                    f"graph_{name}": value
                    for name, value in self._against_floor(
                        self._rig.alone(place, captured, self._shapes.times), batch, bandwidth
                    ).items()
                    if name != "floor_ms"
                }
            found[str(batch)] = row
        return found

    def _against_floor(self, took: float, batch: int, bandwidth: float) -> dict[str, float]:
        shapes = self._shapes
        head = shapes.hidden // shapes.heads
        cached = 2 * shapes.layers * batch * shapes.context * shapes.kv_heads * head
        floor = self._rig.dtype.itemsize * (self.parameters + cached) / bandwidth
        return {
            "ms": round(1e3 * took, 3),
            "floor_ms": round(1e3 * floor, 3),
            "over_floor": round(took / floor, 3),
        }

    def _captured(self, place: Place, step: Any) -> Any:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=place.where, capture_error_mode="thread_local"):
            step()
        return graph.replay

    def _decode_step(self, batch: int) -> Any:
        shapes, device, dtype = self._shapes, self._rig.device, self._rig.dtype
        head = shapes.hidden // shapes.heads
        shape = (batch, shapes.kv_heads, shapes.context, head)
        cache = [
            (torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
            for _ in range(shapes.layers)
        ]
        tokens = torch.zeros(batch, dtype=torch.int64, device=device)
        cos, sin = self.backbone.rotary(torch.full((1,), shapes.context - 1, device=device))[0]

        @torch.inference_mode()
        def step() -> Tensor:
            x = embedding(tokens, self._model.model.embed_tokens.weight)
            for layer, (keys, values) in zip(self._model.model.layers, cache, strict=True):
                attention, mlp = layer.self_attn, layer.mlp
                h = rms_norm(x, (shapes.hidden,), layer.input_layernorm.weight, EPS)
                q, k, v = (
                    linear(h, projection.weight).view(batch, -1, 1, head)
                    for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
                )
                keys[:, :, -1:] = _rotate(k, cos, sin)
                values[:, :, -1:] = v
                # The query heads of a KV head are rows of one query: K and V are read once.
                grouped = _rotate(q, cos, sin).view(batch, shapes.kv_heads, -1, head)
                attended = scaled_dot_product_attention(grouped, keys, values)
                x = x + linear(attended.reshape(batch, -1), attention.o_proj.weight)
                h = rms_norm(x, (shapes.hidden,), layer.post_attention_layernorm.weight, EPS)
                x = x + linear(
                    silu(linear(h, mlp.gate_proj.weight)) * linear(h, mlp.up_proj.weight),
                    mlp.down_proj.weight,
                )
            x = rms_norm(x, (shapes.hidden,), self._model.model.norm.weight, EPS)
            return linear(x, self._model.lm_head.weight).argmax(dim=-1)

        return step


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
