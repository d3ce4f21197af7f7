"""Norms, rotary embeddings and projections of SGLang's models on a CPU, in fewer calls.

Where SGLang has no kernel for a machine, its operators are written for clarity: casts that change nothing, K and Q
rotated one after the other in a dozen calls, adapters asked about in every projection. On a batch of small rows
these calls cost more than the arithmetic. What stands here computes the same numbers, bit for bit in float32, but
for projections of a few rows (`projections_cpu`).

Two places of SGLang's own are used. An operator (``BaseFusedOp``) keeps the implementation that it dispatches to
in ``_forward_method``, which SGLang itself presets where it wants a special one. A LoRA layer is an ordinary
module whose ``forward`` may be shadowed in the instance. Only layers that would run SGLang's plain torch code are
changed, so CPUs for which SGLang brings kernels, quantized weights and tensor parallelism keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.lora.layers import (
    BaseLayerWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from torch import Tensor, nn

from harli_appliance.runtime import projections_cpu
from harli_appliance.runtime.projections_cpu import FewRowsLinear, project

LORA_LINEARS = (MergedColumnParallelLinearWithLoRA, QKVParallelLinearWithLoRA, RowParallelLinearWithLoRA)


def install(model: nn.Module) -> None:
    """Change the layers of a model that SGLang has loaded, after its LoRA layers have been put in."""
    projections_cpu.install(model)
    for module in model.modules():
        _find_at_once(module)
        if isinstance(module, BaseFusedOp):
            plain = getattr(module.dispatch_forward(), "__func__", None)
            if plain is RMSNorm.forward_native and _normalizes_plainly(module):
                module._forward_method = FusedNorm(module)
            elif plain is RotaryEmbedding.forward_native and _rotates_plainly(module):
                module._forward_method = JointRotary(module)
        elif type(module) in LORA_LINEARS and _projects_plainly(module):
            module.forward = BareProjection(module)


def _find_at_once(module: nn.Module) -> None:
    """Children and parameters as plain attributes too: torch looks for those in Python, hundreds of times a step.

    Assigning one anew removes the plain one again (``nn.Module.__setattr__``), so nothing goes stale.
    """
    for name, value in (*module._modules.items(), *module._parameters.items()):
        if value is not None:
            module.__dict__[name] = value


def _normalizes_plainly(norm: Any) -> bool:
    return (
        norm.variance_size_override is None
        and norm.override_orig_dtype is None
        and norm.weight.dtype == torch.float32
    )


def _rotates_plainly(rotary: Any) -> bool:
    return (
        rotary.is_neox_style
        and rotary.rotary_dim == rotary.head_size
        and rotary.cos_sin_cache.dtype == torch.float32
        and not hasattr(rotary, "sin_cos_cache")
    )


def _projects_plainly(layer: Any) -> bool:
    base = layer.base_layer
    return type(base.quant_method) is FewRowsLinear and base.tp_size == 1 and not base.skip_bias_add


class FusedNorm:
    """RMSNorm of the sum of `x` and the residual, [tokens, hidden]; takes the place of a float32 ``RMSNorm``."""

    def __init__(self, norm: Any) -> None:
        self._weight: Tensor = norm.weight
        self._shape = (int(norm.hidden_size),)
        self._epsilon = float(norm.variance_epsilon)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        post_residual_addition: Tensor | None = None,
        quant_linear: nn.Module | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm, and with a residual the sum as well, which is the next layer's residual."""
        if residual is None:
            return torch.rms_norm(x, self._shape, self._weight, self._epsilon)
        x = x + residual
        if post_residual_addition is not None:
            x = x + post_residual_addition
        return torch.rms_norm(x, self._shape, self._weight, self._epsilon), x


class JointRotary:
    """Rotary embedding of queries and keys at once, in the place of a ``RotaryEmbedding`` of whole heads."""

    def __init__(self, rotary: Any) -> None:
        self._rotary = rotary
        self._size = int(rotary.head_size)
        self._positions: Tensor | None = None
        self._cos = self._sin = torch.empty(0)

    def __call__(
        self,
        positions: Tensor,
        query: Tensor,
        key: Tensor,
        offsets: Tensor | None = None,
        fused_set_kv_buffer_arg: object = None,
    ) -> tuple[Tensor, Tensor]:
        """Rotated copies of query and key, in their shapes; they may be views of one tensor.

        Args:
            positions: int64 [tokens].
            query, key: [tokens, heads * d] or [tokens, heads, d].
        """
        if offsets is not None:
            positions = positions + offsets
        # All layers of a step are at the same positions; comparing them costs less than looking angles up.
        if self._positions is None or not torch.equal(positions, self._positions):
            self._look_up(positions)
        joint = _joint(query, key)
        if joint is None:
            return self._rotate(query), self._rotate(key)
        width = query.shape[1]
        rotated = self._rotate(joint)
        return rotated[:, :width], rotated[:, width:]

    def _look_up(self, positions: Tensor) -> None:
        cos, sin = (
            self._rotary.cos_sin_cache.index_select(0, positions.flatten()).unsqueeze(1).chunk(2, dim=-1)
        )
        self._cos, self._sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        self._positions = positions.clone()

    def _rotate(self, x: Tensor) -> Tensor:
        heads = x.reshape(len(x), -1, self._size)
        first, second = heads.chunk(2, dim=-1)
        swapped = torch.cat((second, first), dim=-1)
        return (heads * self._cos).add_(swapped.mul_(self._sin)).view(x.shape)


def _joint(query: Tensor, key: Tensor) -> Tensor | None:
    """[tokens, all heads * d] when both are columns, side by side, of one matrix."""
    if query.dim() != 2 or query.stride() != key.stride() or query.stride(1) != 1:
        return None
    begin, width = query.storage_offset(), query.shape[1]
    beside = key.storage_offset() == begin + width and query.stride(0) >= width + key.shape[1]
    if not beside or query.untyped_storage().data_ptr() != key.untyped_storage().data_ptr():
        return None
    return query.as_strided((len(query), width + key.shape[1]), query.stride(), begin)


class BareProjection:
    """A LoRA layer's forward: nothing but the projection in batches in which no request has an adapter."""

    def __init__(self, layer: BaseLayerWithLoRA) -> None:
        base = layer.base_layer
        self._backend = layer.lora_backend
        self._weight: Tensor = base.weight
        self._bias: Tensor | None = base.bias
        self._method: FewRowsLinear = base.quant_method
        self._with_adapters: Callable[..., tuple[Tensor, Tensor | None]] = layer.forward

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Output and, as SGLang's linear layers do, the bias that is left to the caller, which is none."""
        batch = self._backend.get_batch_info()
        if batch is None or not batch.has_active_lora:
            return project(x, self._weight, self._bias, self._method.columns), None
        return self._with_adapters(x, *args, **kwargs)
