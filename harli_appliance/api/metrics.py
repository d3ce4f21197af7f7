"""The status as Prometheus metrics. Knows names and units; keeps no numbers of its own.

Names follow Prometheus' rules (base units, so seconds; ``_total`` for counters). Quantiles are gauges over
the recent window, because the engine keeps samples rather than buckets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeVar, get_args

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from harli_appliance.schema import JobStatus, Mode, Percentiles, Status

Label = TypeVar("Label", bound=str)


def exposition(status: Status) -> bytes:
    """The text that Prometheus scrapes."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatusCollector(status))
    return generate_latest(registry)


class StatusCollector(Collector):
    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        yield from self._appliance()
        yield from self._latency()
        yield from self._work()
        yield from self._memory()
        yield from self._hardware()

    def _appliance(self) -> Iterator[Metric]:
        s = self._status
        info = GaugeMetricFamily(
            "harli_info", "What runs here; always 1.", labels=("version", "model", "device", "policy")
        )
        info.add_metric((s.version, s.model, s.device, s.policy), 1.0)
        yield info
        yield _gauge("harli_ready", "1 while requests are served.", float(s.state in ("ready", "degraded")))
        yield _gauge("harli_uptime_seconds", "Seconds since start.", s.uptime_s)
        modes = {mode: float(mode == s.mode) for mode in get_args(Mode)}
        yield _by("mode", "harli_mode", "1 for the mode of the last tick.", modes)
        decided = CounterMetricFamily(
            "harli_ticks", "Ticks since start, by why they did it.", labels=("reason",)
        )
        for reason, ticks in s.ticks.items():
            decided.add_metric((reason,), float(ticks))
        yield decided
        yield _gauge(
            "harli_partition_inference_ratio",
            "Share of the device's compute that the inference lane has.",
            s.partition.inference_share,
        )

    def _latency(self) -> Iterator[Metric]:
        serving, slo = self._status.serving, self._status.slo
        yield _quantiles("harli_tpot_seconds", "Time per output token of a request.", serving.tpot_ms)
        yield _quantiles("harli_itl_seconds", "Gap between two tokens of a request.", serving.itl_ms)
        yield _quantiles("harli_ttft_seconds", "Time to the first token.", serving.ttft_ms)
        yield _gauge("harli_slo_tpot_seconds", "Promised time per output token.", slo.tpot_ms / 1000)
        yield _gauge("harli_slo_ttft_seconds", "Promised time to the first token.", slo.ttft_ms / 1000)
        if slo.attainment is not None:
            yield _gauge(
                "harli_slo_attainment_ratio", "Share of recent requests that met both.", slo.attainment
            )
        kept = {part.name: part.attainment for part in slo.classes if part.attainment is not None}
        yield _by("class", "harli_slo_class_attainment_ratio", "The same for each class of requests.", kept)
        promised = {part.name: part.tpot_ms / 1000 for part in slo.classes}
        yield _by("class", "harli_slo_class_tpot_seconds", "Promised to each class of requests.", promised)
        asked = {part.name: float(part.requests) for part in slo.classes}
        yield _by("class", "harli_slo_class_requests", "Requests of each class since start.", asked)

    def _work(self) -> Iterator[Metric]:
        serving, training = self._status.serving, self._status.training
        yield _gauge("harli_requests_running", "Requests being decoded.", serving.running)
        yield _gauge("harli_requests_waiting", "Requests in the queue.", serving.waiting)
        yield _counter("harli_requests", "Requests since start.", serving.requests)
        yield _counter("harli_requests_failed", "Requests that failed since start.", serving.failed)
        yield _counter("harli_output_tokens", "Tokens served since start.", serving.output_tokens)
        yield _gauge(
            "harli_output_tokens_per_second",
            "Tokens served a second over the last 10 seconds.",
            serving.output_tokens_per_s,
        )
        yield _counter("harli_training_tokens", "Tokens trained since start.", training.tokens)
        yield _gauge(
            "harli_training_tokens_per_second",
            "Tokens trained a second over the last 10 seconds.",
            training.tokens_per_s,
        )
        yield _counter(
            "harli_training_dropped_micro_batches",
            "Micro-batches dropped to give memory back to serving.",
            training.dropped_micro_batches,
        )
        yield _counter(
            "harli_training_swapped_micro_batches",
            "Micro-batches copied to host memory, and back later, to give memory back to serving.",
            training.swapped_micro_batches,
        )
        yield from self._running_jobs()
        counts = Counter(job.status for job in self._status.jobs)
        by_status = {status: float(counts[status]) for status in get_args(JobStatus)}
        yield _by(
            "status",
            "harli_jobs",
            "Jobs that have not ended, then the most recent, twenty at most.",
            by_status,
        )

    def _running_jobs(self) -> Iterator[Metric]:
        jobs = self._status.training.running
        by_job: dict[str, tuple[str, dict[str, float]]] = {
            "harli_job_step": ("Optimizer steps made.", {job.job: job.step for job in jobs}),
            "harli_job_steps": ("Optimizer steps in all.", {job.job: job.total_steps for job in jobs}),
            "harli_job_loss": (
                "Loss of the last optimizer step.",
                {job.job: job.loss for job in jobs if job.loss is not None},
            ),
            "harli_job_device_ratio": (
                "Share of the device time that training had lately.",
                {job.job: job.device_share for job in jobs},
            ),
        }
        for name, (text, values) in by_job.items():
            yield _by("job", name, f"{text} Of each running job.", values)

    def _memory(self) -> Iterator[Metric]:
        pool = self._status.pool
        owners = {owner: float(getattr(pool, owner)) for owner in ("free", "serving", "cached", "leased")}
        yield _by("owner", "harli_pool_slots", "KV-cache slots by owner.", owners)
        yield _gauge("harli_pool_leased_max_slots", "Most slots leased at once.", pool.leased_max)
        yield _counter("harli_pool_reclaims", "Times that serving took slots back.", pool.reclaims)
        predictor = self._status.predictor
        if predictor.median_error is not None:
            yield _gauge(
                "harli_predictor_error_ratio",
                "Median relative error of predicted steps.",
                predictor.median_error,
            )
        if predictor.above_bound is not None:
            yield _gauge(
                "harli_predictor_above_bound_ratio",
                "Share of recent steps that outlasted their bound.",
                predictor.above_bound,
            )

    def _hardware(self) -> Iterator[Metric]:
        """What the device tells; what it does not is left out."""
        read = self._status.hardware
        if read is None:
            return
        shares = {"inference": read.inference, "training": read.training}
        by_lane = {lane: share for lane, share in shares.items() if share is not None}
        if by_lane:
            yield _by(
                "lane", "harli_device_lane_busy_ratio", "Share of a lane's cores that were busy.", by_lane
            )
        for name, text, value in (
            ("compute_ratio", "Share of cores or SMs that were busy.", read.compute),
            ("tensor_ratio", "Share of the time in which tensor cores were busy.", read.tensor),
            ("bandwidth_ratio", "Share of the memory bandwidth that was used.", read.bandwidth),
            ("memory_bytes", "Memory held: by the appliance on a CPU, by all on a GPU.", read.memory_bytes),
            ("memory_total_bytes", "Memory that the device has.", read.memory_total_bytes),
            ("power_watts", "Power drawn.", read.power_w),
            ("temperature_celsius", "Temperature.", read.temperature_c),
            ("clock_hertz", "Clock.", None if read.clock_mhz is None else 1e6 * read.clock_mhz),
        ):
            if value is not None:
                yield _gauge(f"harli_device_{name}", f"{text} Over the last second.", value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _by(label: str, name: str, text: str, values: Mapping[Label, float]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for label_value, value in values.items():
        family.add_metric((label_value,), value)
    return family


def _quantiles(name: str, text: str, values: Percentiles) -> Metric:
    """Seconds at the 0.5 and 0.99 quantile; no sample while there is no request to speak of."""
    found = {"0.5": values.p50, "0.99": values.p99}
    known = {quantile: ms / 1000 for quantile, ms in found.items() if ms is not None}
    return _by("quantile", name, f"{text} Over the recent window.", known)
