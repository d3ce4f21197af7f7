"""Kernels that do in one pass what transformers' modules and torch's operators do in several.

liger-kernel's RMS norm and cross-entropy, and torch's variable-length attention. Each is taken where it is
installed and, tried on random numbers on the device at hand, gives what it stands for; otherwise the log says why,
and units compute as they do on a CPU. Knows kernels and modules; does not know units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import structlog
import torch
from torch import Tensor

from harli_appliance.training.backbone import Backbone, Kernels
from harli_appliance.training.cross_entropy import cross_entropy_
from harli_appliance.training.kept_attention import attend
from harli_appliance.training.packed_attention import variable_length_attention
from harli_appliance.training.visibility import Visibility

log = structlog.get_logger()

ROWS = 8
"""That norms and losses are tried on."""
LENGTHS = (40, 3, 90, 27)
"""Tokens of the examples that attention is tried on; the window begins within the first."""
FROM = 16
CLOSE = 0.03
"""Largest difference from what a kernel stands for, as a share of the largest value: roundings of bfloat16."""


def fuse(model: Any) -> Kernels:
    """Put what there is into a model's norms; for the rest say what to compute with.

    Args:
        model: a transformers causal LM of one of `models.architectures.FINETUNABLE`.
    """
    uses = {
        "norms": _fuse_norms,
        "cross_entropy": _try_losses,
        "attention": _try_attention,
    }
    fused = tuple(name for name, use in uses.items() if _works(name, partial(use, model)))
    log.info("fused kernels of finetuning", kernels=fused)
    losses = liger_cross_entropy if "cross_entropy" in fused else cross_entropy_
    return Kernels(losses, packed_attention="attention" in fused, fused=fused)


def _works(name: str, use: Callable[[], None]) -> bool:
    try:
        use()
    except Exception as error:  # compilers and drivers raise what they like
        log.warning(
            "finetuning does without a fused kernel", kernel=name, why=str(error) or type(error).__name__
        )
        return False
    return True


def _fuse_norms(model: Any) -> None:
    from liger_kernel.ops import LigerRMSNormFunction

    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    fused = [partial(_normed, LigerRMSNormFunction, norm.weight, *_kind(norm)) for norm in norms]
    tried = set()
    for norm, forward in zip(norms, fused, strict=True):
        if (kind := (type(norm), norm.weight.shape)) not in tried:
            tried.add(kind)
            x = torch.randn(1, ROWS, *norm.weight.shape, dtype=norm.weight.dtype, device=norm.weight.device)
            _compare(forward, norm.forward, [x])
    for norm, forward in zip(norms, fused, strict=True):
        norm.forward = forward


def _kind(norm: Any) -> tuple[float, float, str]:
    """Epsilon, what is added to the weight, and where numbers are float32: Gemma's norms scale by 1 + w."""
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    return (
        (float(eps), 1.0, "gemma") if type(norm).__name__.startswith("Gemma") else (float(eps), 0.0, "llama")
    )


def _normed(function: Any, weight: Tensor, eps: float, offset: float, casting: str, x: Tensor) -> Tensor:
    """Gradients are not written in place: Gemma adds what comes before a norm to what comes after it."""
    out: Tensor = function.apply(x, weight, eps, offset, casting, False)
    return out


def liger_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
    """As `cross_entropy.cross_entropy_`."""
    from liger_kernel.ops import cross_entropy_forward

    logits.requires_grad_(weights is not None)  # only then is the gradient written
    ignored, no_smoothing = -100, 0.0
    losses: Tensor = cross_entropy_forward(
        logits, targets, None, ignored, no_smoothing, no_smoothing, "none", None, False
    )[0]
    if weights is not None:
        logits.detach().mul_(weights[:, None])
    return losses


def _try_losses(model: Any) -> None:
    weight = model.lm_head.weight
    logits = torch.randn(ROWS, int(model.config.vocab_size), device=weight.device)
    targets = torch.randint(logits.shape[1], (ROWS,), device=weight.device)
    weights = torch.rand(ROWS, device=weight.device)
    found, wanted = logits.clone(), logits.clone()
    losses = liger_cross_entropy(found, targets, weights)
    _close(losses, cross_entropy_(wanted, targets, weights))
    _close(found.detach(), wanted)


def _try_attention(model: Any) -> None:
    """A window of packed examples that has earlier keys, with the model's heads and each reach of its layers."""
    if model.config._attn_implementation != "sdpa":
        raise RuntimeError("the model caps its scores")
    if variable_length_attention() is None:
        raise RuntimeError(f"torch {torch.__version__} has none; 2.11 or newer has")
    masked, packed = Backbone(model), Backbone(model, Kernels(packed_attention=True))
    weight = model.get_input_embeddings().weight
    starts = torch.tensor([sum(LENGTHS[:at]) for at, length in enumerate(LENGTHS) for _ in range(length)])
    starts = starts.to(masked.device)
    tokens = len(starts)
    module = SimpleNamespace(
        num_key_value_groups=masked.heads // masked.kv_heads, is_causal=True, training=True
    )
    for layer in {masked.windows.index(window) for window in set(masked.windows)}:
        seen, told = (Visibility(backbone, starts) for backbone in (masked, packed))
        first = seen.first(layer, FROM)
        counts = ((masked.heads, tokens - FROM), *[(masked.kv_heads, tokens - first)] * 2)
        rows = [torch.randn(1, *count, masked.head_size).to(weight) for count in counts]

        def attention(visibility: Visibility, *rows: Tensor, layer: int = layer) -> Tensor:
            given = visibility.window(layer, FROM, tokens)
            query, key, value = rows
            scale = masked.head_size**-0.5
            return attend(module, query, key, value, **given, scaling=scale, dropout=0.0)[0]

        _compare(partial(attention, told), partial(attention, seen), rows)


def _compare(found: Callable[..., Tensor], wanted: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Raise unless outputs and gradients of the inputs are the same but for rounding."""
    results = []
    for function in (found, wanted):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            out = function(*leaves)
        upstream = torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, upstream)])
    for one, other in zip(*results, strict=True):
        _close(one, other)


def _close(found: Tensor, wanted: Tensor) -> None:
    difference = ((found - wanted).abs().max() / wanted.abs().max()).item()
    if not difference <= CLOSE:  # NaN is not
        raise RuntimeError(f"what it gives differs by {difference:.1%} on this device")
