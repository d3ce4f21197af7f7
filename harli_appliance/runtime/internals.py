"""The internals of SGLang that this package relies on, by name, and the check that they are there.

The appliance steps SGLang's scheduler from outside, which no release promises to keep working. So one version is
pinned, and before anything is started this list is looked up; what is missing is told by name.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import importlib
import importlib.metadata
import inspect

from harli_appliance.errors import ApplianceUnavailable

SGLANG = "0.5.21"

NAMES = {
    "sglang.kernels.fused_op": "BaseFusedOp.dispatch_forward BaseFusedOp._forward_method",
    "sglang.srt.constrained.base_grammar_backend": (
        "BaseGrammarBackend.get_cached_or_future_value BaseGrammarBackend.cache"
    ),
    "sglang.srt.constrained.grammar_manager": (
        "GrammarManager.get_ready_grammar_requests GrammarManager.clear GrammarManager.grammar_queue "
        "GrammarManager.grammar_backend GrammarManager.SGLANG_GRAMMAR_POLL_INTERVAL"
    ),
    "sglang.srt.entrypoints.engine": "_set_envs_and_config",
    "sglang.srt.environ": "envs.SGLANG_EAGER_INPUT_NO_COPY",
    "sglang.srt.layers.attention.attention_registry": "register_attention_backend",
    "sglang.srt.layers.attention.torch_native_backend": (
        "TorchNativeAttnBackend.forward_decode TorchNativeAttnBackend.forward_extend "
        "TorchNativeAttnBackend.init_forward_metadata TorchNativeAttnBackend.req_to_token_pool "
        "TorchNativeAttnBackend.token_to_kv_pool TorchNativeAttnBackend.use_sliding_window_kv_pool"
    ),
    "sglang.srt.layers.layernorm": (
        "RMSNorm.forward_native RMSNorm.hidden_size RMSNorm.variance_epsilon "
        "RMSNorm.variance_size_override RMSNorm.override_orig_dtype"
    ),
    "sglang.srt.layers.logits_processor": "should_apply_lm_head_quant_method",
    "sglang.srt.layers.quantization.unquant": "UnquantizedEmbeddingMethod.apply UnquantizedLinearMethod.apply",
    "sglang.srt.layers.radix_attention": (
        "AttentionType.DECODER RadixAttention.layer_id RadixAttention.is_cross_attention "
        "RadixAttention.attn_type RadixAttention.qk_head_dim RadixAttention.v_head_dim "
        "RadixAttention.tp_q_head_num RadixAttention.tp_k_head_num RadixAttention.scaling "
        "RadixAttention.logit_cap RadixAttention.sliding_window_size"
    ),
    "sglang.srt.layers.rotary_embedding.base": (
        "RotaryEmbedding.forward_native RotaryEmbedding.is_neox_style RotaryEmbedding.rotary_dim "
        "RotaryEmbedding.head_size RotaryEmbedding.cos_sin_cache"
    ),
    "sglang.srt.layers.sampler": (
        "SGLANG_RETURN_ORIGINAL_LOGPROB Sampler._sample_from_probs register_sampler_backend"
    ),
    "sglang.srt.lora.backend.base_backend": (
        "BaseLoRABackend.skip_inactive_lora_batches BaseLoRABackend.get_batch_info"
    ),
    "sglang.srt.lora.backend.lora_registry": "register_lora_backend",
    "sglang.srt.lora.backend.triton_backend": "TritonLoRABackend.skip_inactive_lora_batches",
    "sglang.srt.lora.backend.torch_backend": (
        "TorchNativeLoRABackend.prepare_lora_batch TorchNativeLoRABatchInfo.has_active_lora "
        "TorchNativeLoRABatchInfo.seg_lens_cpu TorchNativeLoRABatchInfo.weight_indices_cpu"
    ),
    "sglang.srt.lora.layers": (
        "BaseLayerWithLoRA.lora_backend BaseLayerWithLoRA.base_layer "
        "MergedColumnParallelLinearWithLoRA.forward QKVParallelLinearWithLoRA.forward "
        "RowParallelLinearWithLoRA.forward torch"
    ),
    "sglang.srt.lora.lora_registry": "LoRARef.lora_id LoRARef.lora_name LoRARef.lora_path LoRARef.pinned",
    "sglang.srt.lora.utils": "generate_sequence_lengths",
    "sglang.srt.managers.io_struct": (
        "AbortReq.rid AbortReq.finished_reason TokenizedGenerateReqInput.lora_id "
        "UnloadLoRAAdapterReqInput.lora_id"
    ),
    "sglang.srt.managers.schedule_batch": (
        "FINISH_ABORT.message FINISH_LENGTH Req.finished Req.finished_reason "
        "Req.output_ids_through_stop Req.output_ids Req.origin_input_ids Req.cached_tokens "
        "Req.return_logprob Req.sampling_params Req.rid Req.kv ReqKvInfo.holds_kv "
        "ReqKvInfo.kv_allocated_len ReqLogprob.output_token_logprobs_val "
        "ReqLogprob.output_top_logprobs_val ReqLogprob.output_top_logprobs_idx "
        "ReqLogprob.top_logprobs_num ScheduleBatch.filter_batch ScheduleBatch.batch_is_full "
        "ScheduleBatch.reqs ScheduleBatch.seq_lens_cpu ScheduleBatch.extend_num_tokens "
        "ScheduleBatch.forward_mode ScheduleBatch.sampling_info"
    ),
    "sglang.srt.managers.scheduler": (
        "Scheduler.get_next_batch_to_run Scheduler.run_batch Scheduler.process_batch_result "
        "Scheduler.process_input_requests Scheduler.abort_request Scheduler.collect_inflight_reqs "
        "Scheduler.on_idle Scheduler.unload_lora_adapter "
        "Scheduler.get_output_streamer_class Scheduler._should_defer_prefill "
        "Scheduler.waiting_queue Scheduler.running_batch Scheduler.last_batch Scheduler.chunked_req "
        "Scheduler.cur_batch_for_debug "
        "Scheduler.grammar_manager Scheduler.tree_cache Scheduler.tokenizer "
        "Scheduler.token_to_kv_pool_allocator Scheduler.invariant_checker "
        "Scheduler.pool_stats_observer Scheduler.ipc_channels Scheduler.max_req_len "
        "Scheduler.model_config Scheduler.tp_worker"
    ),
    "sglang.srt.managers.scheduler_components.invariant_checker": (
        "SchedulerInvariantChecker.max_total_num_tokens"
    ),
    "sglang.srt.managers.scheduler_components.ipc_channels": (
        "SchedulerIpcChannels.send_to_detokenizer SchedulerIpcChannels.send_to_tokenizer"
    ),
    "sglang.srt.managers.scheduler_components.output_streamer": "SchedulerOutputStreamer.stream_output",
    "sglang.srt.managers.scheduler_components.pool_stats_observer": (
        "SchedulerPoolStatsObserver.max_total_num_tokens"
    ),
    "sglang.srt.mem_cache.allocator.token": (
        "TokenToKVPoolAllocator.alloc TokenToKVPoolAllocator.free "
        "TokenToKVPoolAllocator.available_size TokenToKVPoolAllocator.get_kvcache "
        "TokenToKVPoolAllocator.free_group TokenToKVPoolAllocator.free_group_end "
        "TokenToKVPoolAllocator.free_pages TokenToKVPoolAllocator.release_pages "
        "TokenToKVPoolAllocator.size"
    ),
    "sglang.srt.mem_cache.base_prefix_cache": "EvictParams.num_tokens",
    "sglang.srt.mem_cache.common": "release_kv_cache",
    "sglang.srt.mem_cache.kv_index_translator": "KVIndexTranslator.bind_and_verify_backends",
    "sglang.srt.mem_cache.memory_pool": (
        "KVWriteLoc.loc MHATokenToKVPool.set_kv_buffer MHATokenToKVPool.get_kv_buffer "
        "MHATokenToKVPool.get_key_buffer MHATokenToKVPool.get_kv_size_bytes MHATokenToKVPool.k_buffer "
        "MHATokenToKVPool.v_buffer MHATokenToKVPool.kv_cache_layout MHATokenToKVPool.use_hnd "
        "MHATokenToKVPool.is_quantized_kv_cache MHATokenToKVPool.store_dtype MHATokenToKVPool.dtype "
        "ReqToTokenPool.req_to_token"
    ),
    "sglang.srt.mem_cache.radix_cache": "RadixCache.evict RadixCache.evictable_size",
    "sglang.srt.model_executor.forward_batch_info": (
        "ForwardBatch.seq_lens ForwardBatch.req_pool_indices ForwardBatch.out_cache_loc "
        "ForwardBatch.forward_mode ForwardBatch.extend_prefix_lens ForwardBatch.extend_seq_lens "
        "ForwardMode.is_decode ForwardMode.is_extend"
    ),
    "sglang.srt.model_executor.model_runner": (
        "ModelRunner.model ModelRunner.sampler ModelRunner.attn_backend "
        "ModelRunner.decode_cuda_graph_runner ModelRunner.decode_attn_backend_group "
        "ModelRunner.kv_index_translator ModelRunner.load_lora_adapter_from_tensors"
    ),
    "sglang.srt.model_executor.model_runner_components.attention_backend_setup": (
        "build_attention_backends AttentionBackends.attn_backend"
    ),
    "sglang.srt.model_executor.runner.decode_cuda_graph_runner": (
        "model_capture_mode get_stream_groups DecodeCudaGraphRunner.capture "
        "DecodeCudaGraphRunner.maybe_init_pdmux DecodeCudaGraphRunner.enable_pdmux "
        "DecodeCudaGraphRunner.record_nolora_graph"
    ),
    "sglang.srt.model_executor.runner_utils": "get_capture_lora_variant",
    "sglang.srt.models.registry": "ModelRegistry.is_arch_supported",
    "sglang.srt.model_executor.runner.shape_key": "ShapeKey.stream_idx",
    "sglang.srt.model_executor.runner_backend.full_cuda_graph_backend": (
        "FullCudaGraphBackend._graphs FullCudaGraphBackend._outputs"
    ),
    "sglang.srt.multiplex.pdmux_context": "STREAM_GROUPS set_current_stream_idx",
    "sglang.srt.runtime_context": "SpawnRanks get_server_args publish spawn_world_rank",
    "sglang.srt.sampling.penaltylib.frequency_penalty": (
        "BatchedFrequencyPenalizer.frequency_penalties BatchedFrequencyPenalizer.cumulated_frequency_penalties"
    ),
    "sglang.srt.sampling.penaltylib.min_new_tokens": "BatchedMinNewTokensPenalizer.len_output_tokens",
    "sglang.srt.sampling.penaltylib.orchestrator": (
        "BatchedPenalizerOrchestrator.penalizers BatchedPenalizerOrchestrator.device"
    ),
    "sglang.srt.sampling.penaltylib.presence_penalty": (
        "BatchedPresencePenalizer.presence_penalties BatchedPresencePenalizer.cumulated_presence_penalties"
    ),
    "sglang.srt.sampling.penaltylib.repetition_penalty": (
        "BatchedRepetitionPenalizer.repetition_penalties "
        "BatchedRepetitionPenalizer.cumulated_repetition_penalties BatchedRepetitionPenalizer.is_prepared"
    ),
    "sglang.srt.sampling.sampling_batch_info": (
        "SamplingBatchInfo.top_ks SamplingBatchInfo.top_ps SamplingBatchInfo.min_ps "
        "SamplingBatchInfo.penalizer_orchestrator"
    ),
    "sglang.srt.sampling.sampling_params": "SamplingParams.normalize SamplingParams.sampling_seed",
    "sglang.srt.server_args": "PortArgs.init_new ServerArgs.resolve_once",
    "sglang.srt.utils": "use_intel_amx_backend",
}
"""Of each module what is used: functions, classes, and as ``Class.member`` their members and attributes."""

RELIED_ON = tuple(f"{module}:{name}" for module, names in NAMES.items() for name in names.split())


def check(relied_on: tuple[str, ...] = RELIED_ON) -> None:
    """Make sure that the installed SGLang is the one this package was written against.

    Raises:
        ApplianceUnavailable: another version is installed, or names are missing; says which and what to do.
    """
    installed = importlib.metadata.version("sglang")
    broken: dict[str, str] = {}
    missing = [name for name in relied_on if not _exists(name, broken)]
    if installed == SGLANG and not missing:
        return
    what = f"SGLang {installed} is installed; this appliance steps the internals of {SGLANG}"
    if missing:
        what += f", and {', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''} cannot be found"
    if broken:
        what += f" ({next(iter(broken.values()))})"
    raise ApplianceUnavailable(
        f"{what}; run 'make setup', or pip install --no-deps sglang=={SGLANG}", code="wrong_sglang"
    )


def _exists(name: str, broken: dict[str, str]) -> bool:
    """Notes in `broken` why a module cannot be imported."""
    module, _, path = name.partition(":")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        broken[module] = str(error)
        return False
    owner, _, member = path.partition(".")
    thing = getattr(found, owner, None)
    if thing is None or not member:
        return thing is not None
    return hasattr(thing, member) or member in _fields(thing) or member in _assigned(thing)


def _fields(thing: object) -> set[str]:
    """Fields of a dataclass or a msgspec struct, which need not be attributes of the class."""
    names = set(getattr(thing, "__struct_fields__", ()))
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing):
        names |= {field.name for field in dataclasses.fields(thing)}
    return names


@functools.cache
def _assigned(thing: object) -> frozenset[str]:
    """Attributes that a class's methods, the inherited ones too, assign or register."""
    names: set[str] = set()
    for owner in inspect.getmro(thing) if inspect.isclass(thing) else ():
        for method in vars(owner).values():
            code = getattr(inspect.unwrap(method) if callable(method) else None, "__code__", None)
            if code is not None:
                names |= {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
                names |= {
                    value for value in code.co_consts if isinstance(value, str) and value.isidentifier()
                }
    return frozenset(names)
