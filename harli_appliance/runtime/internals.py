"""The internals of SGLang that this package relies on, by name, and the check that they are there.

The appliance steps SGLang's scheduler from outside, which no release promises to keep working. So one version is
pinned, and before anything is started this list is looked up; what is missing is told by name.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect

from harli_appliance.errors import ApplianceUnavailable

SGLANG = "0.5.21"

RELIED_ON = (
    "sglang.srt.entrypoints.engine:_set_envs_and_config",
    "sglang.srt.managers.io_struct:AbortReq",
    "sglang.srt.managers.io_struct:TokenizedGenerateReqInput.lora_id",
    "sglang.srt.managers.io_struct:LoadLoRAAdapterReqInput.lora_id",
    "sglang.srt.managers.schedule_batch:FINISH_ABORT",
    "sglang.srt.managers.schedule_batch:Req.finished",
    "sglang.srt.managers.schedule_batch:Req.output_ids_through_stop",
    "sglang.srt.managers.schedule_batch:ReqLogprob.output_token_logprobs_val",
    "sglang.srt.managers.schedule_batch:ReqLogprob.output_top_logprobs_val",
    "sglang.srt.managers.schedule_batch:ReqLogprob.output_top_logprobs_idx",
    "sglang.srt.managers.schedule_batch:ScheduleBatch.filter_batch",
    "sglang.srt.managers.schedule_batch:ReqKvInfo.holds_kv",
    "sglang.srt.managers.scheduler:Scheduler.get_next_batch_to_run",
    "sglang.srt.managers.scheduler:Scheduler.run_batch",
    "sglang.srt.managers.scheduler:Scheduler.process_batch_result",
    "sglang.srt.managers.scheduler:Scheduler.process_input_requests",
    "sglang.srt.managers.scheduler:Scheduler.abort_request",
    "sglang.srt.managers.scheduler:Scheduler.collect_inflight_reqs",
    "sglang.srt.managers.scheduler:Scheduler.on_idle",
    "sglang.srt.managers.scheduler:Scheduler.load_lora_adapter",
    "sglang.srt.managers.scheduler:Scheduler.unload_lora_adapter",
    "sglang.srt.managers.scheduler_components.invariant_checker:SchedulerInvariantChecker.max_total_num_tokens",
    "sglang.srt.managers.scheduler_components.output_streamer:SchedulerOutputStreamer.send_to_detokenizer",
    "sglang.srt.managers.scheduler_components.pool_stats_observer:SchedulerPoolStatsObserver.max_total_num_tokens",
    "sglang.srt.mem_cache.allocator.token:TokenToKVPoolAllocator.alloc",
    "sglang.srt.mem_cache.allocator.token:TokenToKVPoolAllocator.free",
    "sglang.srt.mem_cache.allocator.token:TokenToKVPoolAllocator.available_size",
    "sglang.srt.mem_cache.base_prefix_cache:EvictParams.num_tokens",
    "sglang.srt.mem_cache.common:release_kv_cache",
    "sglang.srt.mem_cache.memory_pool:KVWriteLoc",
    "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.get_kv_size_bytes",
    "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.set_kv_buffer",
    "sglang.srt.constrained.base_grammar_backend:BaseGrammarBackend.get_cached_or_future_value",
    "sglang.srt.constrained.grammar_manager:GrammarManager.get_ready_grammar_requests",
    "sglang.srt.layers.sampler:SGLANG_RETURN_ORIGINAL_LOGPROB",
    "sglang.srt.layers.sampler:Sampler._sample_from_probs",
    "sglang.srt.layers.sampler:register_sampler_backend",
    "sglang.srt.lora.backend.lora_registry:register_lora_backend",
    "sglang.srt.lora.backend.base_backend:BaseLoRABackend.skip_inactive_lora_batches",
    "sglang.srt.layers.attention.attention_registry:register_attention_backend",
    "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend.forward_decode",
    "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend.forward_extend",
    "sglang.srt.layers.layernorm:RMSNorm.forward_native",
    "sglang.srt.layers.rotary_embedding.base:RotaryEmbedding.forward_native",
    "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod",
    "sglang.srt.lora.layers:BaseLayerWithLoRA",
    "sglang.kernels.fused_op:BaseFusedOp.dispatch_forward",
    "sglang.srt.runtime_context:publish",
    "sglang.srt.server_args:ServerArgs.resolve_once",
    "sglang.srt.server_args:PortArgs.init_new",
)
"""``module:name`` or ``module:Class.member``; a member may be a method, property or dataclass field."""


def check(relied_on: tuple[str, ...] = RELIED_ON) -> None:
    """Make sure that the installed SGLang is the one this package was written against.

    Raises:
        ApplianceUnavailable: another version is installed, or names are missing; says which and what to do.
    """
    installed = importlib.metadata.version("sglang")
    missing = [name for name in relied_on if not _exists(name)]
    if installed == SGLANG and not missing:
        return
    what = f"SGLang {installed} is installed; this appliance steps the internals of {SGLANG}"
    if missing:
        what += f", and {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''} cannot be found"
    raise ApplianceUnavailable(
        f"{what}; run 'make setup', or pip install --no-deps sglang=={SGLANG}", code="wrong_sglang"
    )


def _exists(name: str) -> bool:
    module, _, path = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError:
        return False
    owner, _, member = path.partition(".")
    thing = getattr(found, owner, None)
    if thing is None or not member:
        return thing is not None
    return hasattr(thing, member) or member in _fields(thing)


def _fields(thing: object) -> set[str]:
    """Fields of a dataclass or a msgspec struct, which need not be attributes of the class."""
    names = set(getattr(thing, "__struct_fields__", ()))
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing):
        names |= {field.name for field in dataclasses.fields(thing)}
    return names
