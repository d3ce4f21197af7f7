"""SGLang's scheduler, in this process and stepped by hand.

Everything that touches SGLang's internals is in this package, written against one version (`internals`). Knows
SGLang; does not know training, HTTP or policies. All methods, the constructor too, run on the thread of the
inference lane.

A step is SGLang's own loop body taken apart (``Scheduler.event_loop_normal``): `plan` is
``get_next_batch_to_run``, `execute` is ``run_batch`` and ``process_batch_result``. Tokens are read from the
requests themselves, so the detokenizer process and its sockets are not needed.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harli_appliance.errors import UsageError
from harli_appliance.runtime import cpu_stand_ins
from harli_appliance.runtime.adapter_files import AdapterFiles, read_adapter
from harli_appliance.runtime.arguments import RuntimeOptions, server_arguments
from harli_appliance.runtime.protocol import (
    FinishReason,
    NewTokens,
    QueueDepth,
    StepOutcome,
    StepPlan,
    Submission,
)

if TYPE_CHECKING:
    from harli_appliance.runtime.partition_graphs import PartitionGraphs

cpu_stand_ins.install()
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
    # The prefix tree in Rust is built for torch 2.13 and takes an older one's tensors for something else.
    os.environ.setdefault("SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND", "python")

from sglang.srt.entrypoints.engine import _set_envs_and_config  # noqa: E402
from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.lora.lora_registry import LoRARef  # noqa: E402
from sglang.srt.managers.io_struct import (  # noqa: E402
    AbortReq,
    TokenizedGenerateReqInput,
    UnloadLoRAAdapterReqInput,
)
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH  # noqa: E402
from sglang.srt.managers.scheduler import Scheduler  # noqa: E402
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer  # noqa: E402
from sglang.srt.mem_cache.common import release_kv_cache  # noqa: E402
from sglang.srt.runtime_context import SpawnRanks, publish, spawn_world_rank  # noqa: E402
from sglang.srt.server_args import PortArgs, ServerArgs  # noqa: E402

from harli_appliance.runtime import sampler  # noqa: E402, F401  registers the sampling backend
from harli_appliance.runtime.penalties import count_answers  # noqa: E402
from harli_appliance.runtime.sampling import check, logprobs_of, sampling_params  # noqa: E402

GRAMMAR_WAIT_S = 0.0005
"""How long a plan may wait for grammars that other threads compile; SGLang's own default is ten times that."""
KEPT_GRAMMARS = 256
"""Compiled schemas kept for the next request with the same one; SGLang itself keeps all of them for ever."""
RID_END = "/"
"""Ends every id inside SGLang, which aborts by prefix: aborting 'a-1' must leave 'a-10' alone."""


class _Sink:
    """Takes the place of SGLang's sockets to the tokenizer and detokenizer processes."""

    socket = None

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def send_output(self, output: Any, request: Any = None) -> None:
        self.messages.append(output)


class _Discard(_Sink):
    def send_output(self, output: Any, request: Any = None) -> None:
        """Nothing that goes to the detokenizer process is needed."""


class _NoStreamer(SchedulerOutputStreamer):  # type: ignore[misc]  # SGLang is untyped here
    """Tokens are read from the requests, so that messages about them need not be written."""

    __slots__ = ()

    def stream_output(self, reqs: list[Any], return_logprob: bool, skip_req: Any = None) -> None:
        pass


class _Scheduler(Scheduler):  # type: ignore[misc]
    hold_prompts = False
    """Whether the next batch must not read prompts; one half read stays as it is."""

    def _should_defer_prefill(self) -> bool:
        # A request that was taken back is in the queue too, and its answer is under way.
        return self.hold_prompts and not any(request.output_ids for request in self.waiting_queue)

    def get_output_streamer_class(self) -> type[SchedulerOutputStreamer]:
        return _NoStreamer


@dataclass(slots=True)
class _Live:
    request: Any  # sglang Req
    sent: int = 0


class SglangRuntime:
    """One SGLang scheduler with the model's weights and KV cache."""

    def __init__(self, options: RuntimeOptions) -> None:
        arguments = ServerArgs(**server_arguments(options))
        arguments.resolve_once()
        _set_envs_and_config(arguments)
        ports = PortArgs.init_new(arguments)
        rank = spawn_world_rank(arguments, tp_rank=0, pp_rank=0)
        publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=0))
        if options.device == "cpu":
            import harli_appliance.runtime.attention_cpu  # registers the backend
        if options.lora and options.device == "cpu":
            cpu_stand_ins.unpin_lora()
            import harli_appliance.runtime.lora_cpu  # noqa: F401  registers the backend
        if options.lora and options.device != "cpu":
            from harli_appliance.runtime.lora_cuda import leave_out_unused

            leave_out_unused()
        if options.device == "cpu":
            # SGLang compiles a function of three lines for the CPU, which takes seconds in the middle of a step.
            torch.compiler.set_stance("force_eager")
            # Without graphs there are no buffers of theirs that a step's inputs would have to be copied to.
            envs.SGLANG_EAGER_INPUT_NO_COPY.set(True)
        self._scheduler = _Scheduler(arguments, ports)
        if options.device == "cpu":
            from harli_appliance.runtime import operators_cpu

            operators_cpu.install(self.model)
        self._sampler = self._scheduler.tp_worker.model_runner.sampler
        self._grammars = self._scheduler.grammar_manager
        self._grammars.SGLANG_GRAMMAR_POLL_INTERVAL = GRAMMAR_WAIT_S
        self._ends = _Sink()
        self._replace_sockets()
        self._live: dict[str, _Live] = {}
        self._options = options
        self._graphs: PartitionGraphs | None = None

    def _replace_sockets(self) -> None:
        # These dataclasses are frozen; their sockets were opened a moment ago and nobody listens.
        for owner, name, sink in (
            (self._scheduler.ipc_channels, "send_to_detokenizer", _Discard()),
            (self._scheduler.ipc_channels, "send_to_tokenizer", self._ends),
        ):
            object.__setattr__(owner, name, sink)

    # -- what others may see of SGLang ---------------------------------------------------------------

    @property
    def model(self) -> torch.nn.Module:
        """SGLang's module tree with the fused weights."""
        module: torch.nn.Module = self._scheduler.tp_worker.model_runner.model
        return module

    @property
    def scheduler(self) -> Any:
        """SGLang's scheduler, for the KV pool (`harli_appliance.runtime.kv`)."""
        return self._scheduler

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return int(self._scheduler.model_config.vocab_size)

    @property
    def context_length(self) -> int:
        # SGLang keeps one slot for a dummy token and cuts requests one token short of its limit.
        return int(self._scheduler.max_req_len) - 1

    # -- partitions of a GPU -------------------------------------------------------------------------

    def capture_graphs(self, streams: Sequence[Any]) -> None:
        """Capture decode graphs on these streams too, where there are graphs at all; before anything runs."""
        model_runner = self._scheduler.tp_worker.model_runner
        if streams and model_runner.decode_cuda_graph_runner is not None:
            from harli_appliance.runtime.partition_graphs import PartitionGraphs

            self._graphs = PartitionGraphs(model_runner, streams)

    def close_graphs(self) -> None:
        """Let go of those, which must be gone before the partitions are."""
        if self._graphs is not None:
            self._graphs.close()

    # -- requests ------------------------------------------------------------------------------------

    def check(self, submission: Submission) -> None:
        check(submission, self.vocabulary, self.context_length)

    def submit(self, submission: Submission) -> None:
        """Put a request in SGLang's queue; it has passed `check`.

        Raises:
            UsageError: SGLang refuses it all the same.
        """
        logprobs = submission.sampling.logprobs
        request = TokenizedGenerateReqInput(
            rid=submission.id + RID_END,
            input_text=None,
            input_ids=array("q", submission.prompt),
            input_embeds=None,
            mm_inputs=None,
            token_type_ids=None,
            sampling_params=sampling_params(submission.sampling, self._scheduler.tokenizer),
            return_logprob=logprobs is not None,
            logprob_start_len=-1,  # of the answer only
            top_logprobs_num=logprobs or 0,
            token_ids_logprob=None,
            stream=True,
            lora_id=submission.adapter,
        )
        if len(self._grammars.grammar_backend.cache) > KEPT_GRAMMARS:
            self._grammars.clear()
        self._scheduler.process_input_requests([request])
        for queued in (*reversed(self._scheduler.waiting_queue), *self._grammars.grammar_queue):
            if queued.rid == request.rid:
                self._live[submission.id] = _Live(queued)
                return
        raise UsageError(f"SGLang refuses the request: {self._refusal(request.rid)}")

    def _refusal(self, rid: str) -> str:
        for message in self._ends.messages:
            if isinstance(message, AbortReq) and message.rid == rid:
                return _reason(message)
        return "it does not say why"

    def abort(self, request_id: str) -> None:
        self._scheduler.abort_request(AbortReq(rid=request_id + RID_END))

    def drain(self) -> tuple[NewTokens, ...]:
        ended = []
        for message in self._ends.messages:
            if not isinstance(message, AbortReq):
                continue
            request_id = _id(message.rid)
            if self._live.pop(request_id, None) is not None:
                ended.append(NewTokens(request_id, (), "abort", error=_reason(message)))
        self._ends.messages.clear()
        return tuple(ended)

    def depth(self) -> QueueDepth:
        scheduler = self._scheduler
        # A prefill batch joins the running one at the next plan only.
        running = {request.rid for request in scheduler.collect_inflight_reqs() if not request.finished()}
        if scheduler.chunked_req is not None:
            running.add(scheduler.chunked_req.rid)
        compiling = len(self._grammars)
        return QueueDepth(len(running), len(scheduler.waiting_queue) + compiling, compiling)

    # -- stepping ------------------------------------------------------------------------------------

    def plan(self, *, prompts: bool = True) -> StepPlan | None:
        scheduler = self._scheduler
        batch = None
        if not prompts:
            batch = self._next_batch(hold_prompts=True)
            if batch is None:
                scheduler.last_batch = None  # is in the running batch by now
        if batch is None:
            batch = self._next_batch(hold_prompts=False)
        if batch is None:
            with torch.inference_mode():
                scheduler.on_idle()  # includes SGLang's own check that no slot leaked
            scheduler.last_batch = None
            return None
        prefill = batch.forward_mode.is_extend()
        return StepPlan(
            kind="prefill" if prefill else "decode",
            requests=tuple(_id(request.rid) for request in batch.reqs),
            prefill_tokens=int(batch.extend_num_tokens or 0) if prefill else 0,
            context_tokens=int(batch.seq_lens_cpu.sum()),
            handle=batch,
        )

    def _next_batch(self, *, hold_prompts: bool) -> Any:
        scheduler = self._scheduler
        scheduler.hold_prompts = hold_prompts
        with torch.inference_mode():
            following = scheduler.get_next_batch_to_run(
                running_batch=scheduler.running_batch, last_batch=scheduler.last_batch
            )
            batch = following.batch_to_run
            if batch is not None and batch.forward_mode.is_extend():
                count_answers(batch)
        scheduler.running_batch = following.running_batch
        scheduler.cur_batch_for_debug = batch
        return batch

    def execute(self, plan: StepPlan) -> StepOutcome:
        """Run the planned batch and collect its tokens."""
        batch: Any = plan.handle
        started = time.perf_counter()
        self._sampler.expect(batch.reqs)
        if self._graphs is not None:
            self._graphs.follow(torch.cuda.current_stream())
        with torch.inference_mode():
            result = self._scheduler.run_batch(batch)
            self._scheduler.process_batch_result(batch, result)
        self._scheduler.last_batch = batch
        seconds = time.perf_counter() - started
        return StepOutcome(seconds=seconds, tokens=tuple(self._new_tokens(plan.requests)))

    def recover(self, plan: StepPlan, error: Exception) -> tuple[NewTokens, ...]:
        """End the requests of a failed step and take back their slots; the others go on."""
        scheduler: Any = self._scheduler
        batch: Any = plan.handle
        reason = f"{type(error).__name__}: {error}"
        if scheduler.token_to_kv_pool_allocator.free_group is not None:  # it failed while freeing
            scheduler.token_to_kv_pool_allocator.free_group_end()
        ended = []
        for request in batch.reqs:
            if not request.finished():
                request.finished_reason = FINISH_ABORT(reason)
            if request.kv.holds_kv:
                release_kv_cache(request, scheduler.tree_cache, is_insert=False)
            if request is scheduler.chunked_req:
                scheduler.chunked_req = None
            request_id = _id(request.rid)
            if self._live.pop(request_id, None) is not None:
                ended.append(NewTokens(request_id, (), "error", error=reason))
        if batch is scheduler.running_batch:
            batch.filter_batch()
        scheduler.last_batch = None
        scheduler.running_batch.batch_is_full = False
        return tuple(ended)

    def _new_tokens(self, requests: Sequence[str]) -> Iterable[NewTokens]:
        for request_id in requests:
            live = self._live.get(request_id)
            if live is None:
                continue
            request = live.request
            finish = _finish(request)
            if finish == "abort":  # SGLang draws one more token, which nobody wants
                del self._live[request_id]
                yield NewTokens(request_id, (), finish, error=request.finished_reason.message)
                continue
            produced = request.output_ids_through_stop
            start, live.sent = live.sent, len(produced)
            if start == live.sent and finish is None:
                continue  # a middle chunk of a long prompt
            if finish is not None:
                del self._live[request_id]
            logprobs = logprobs_of(request, start, live.sent) if request.return_logprob else ()
            yield NewTokens(
                request_id, tuple(produced[start:]), finish, None, int(request.cached_tokens), logprobs
            )

    # -- adapters ------------------------------------------------------------------------------------

    def read_adapter(self, name: str, path: str) -> AdapterFiles:
        if not self._options.lora:
            raise UsageError(
                f"adapter {name!r} cannot be served: the model runs without LoRA", param="lora_path"
            )
        config = self._scheduler.model_config.hf_text_config
        return read_adapter(name, Path(path), config, self._options.max_lora_rank)

    def load_adapter(self, adapter_id: str, files: AdapterFiles) -> None:
        # SGLang wants names to be unique among what is loaded, and several versions may have this one.
        reference = LoRARef(
            lora_id=adapter_id, lora_name=adapter_id, lora_path=str(files.folder), pinned=False
        )
        model_runner = self._scheduler.tp_worker.model_runner
        result = model_runner.load_lora_adapter_from_tensors(
            reference, dict(files.tensors), dict(files.described)
        )
        if not result.success:
            raise UsageError(
                f"adapter {files.name!r} cannot be served: {result.error_message}",
                code="invalid_adapter",
                param="lora_path",
            )

    def unload_adapter(self, adapter_id: str, name: str) -> None:
        result = self._scheduler.unload_lora_adapter(
            UnloadLoRAAdapterReqInput(lora_name=adapter_id, lora_id=adapter_id)
        )
        if not result.success:
            raise UsageError(f"adapter {name!r} cannot be unloaded: {result.error_message}", param="model")


def _id(rid: str) -> str:
    return rid.removesuffix(RID_END)


def _reason(message: AbortReq) -> str:
    return str((message.finished_reason or {}).get("message") or "aborted")


def _finish(request: Any) -> FinishReason | None:
    if not request.finished():
        return None
    reason = request.finished_reason
    if isinstance(reason, FINISH_ABORT):
        return "abort"
    return "length" if isinstance(reason, FINISH_LENGTH) else "stop"
