"""What the appliance shows of itself: the wire types of `schema.py`, filled from engine, scheduler and trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TypedDict

from harli_appliance.api.ports import Job
from harli_appliance.device.cuda import CudaLanes
from harli_appliance.device.monitor import Reading
from harli_appliance.device.partition import Partition, describe_cores
from harli_appliance.engine.engine import Engine
from harli_appliance.engine.telemetry import pool_view
from harli_appliance.scheduling.scheduler import Scheduler
from harli_appliance.scheduling.slo import Quantiles, SloTracker
from harli_appliance.schema import (
    HardwareView,
    JobView,
    Mode,
    PartitionView,
    Percentiles,
    PoolView,
    PredictorView,
    RunningJobView,
    ServingView,
    SloClassView,
    SloView,
    TrainingView,
    waits_for,
)
from harli_appliance.training.trainer import Trainer


class EngineViews(TypedDict):
    """The fields of `Status` that come from what runs."""

    policy: str
    mode: Mode
    reason: str
    ticks: dict[str, int]
    slo: SloView
    serving: ServingView
    training: TrainingView
    pool: PoolView
    predictor: PredictorView


def engine_views(engine: Engine, scheduler: Scheduler, trainer: Trainer) -> EngineViews:
    now, training, slo, predictor = engine.state(), trainer.state(), engine.slo, scheduler.predictor
    return EngineViews(
        policy=scheduler.policy_name,
        mode=now.decision.mode,
        reason=now.decision.reason,
        ticks={str(reason): count for reason, count in now.ticks.items()},
        slo=_slo(slo),
        serving=ServingView(
            running=now.depth.running,
            waiting=now.depth.waiting,
            requests=slo.requests,
            failed=slo.failed,
            tpot_ms=_percentiles(slo.tpot),
            itl_ms=_percentiles(slo.itl),
            ttft_ms=_percentiles(slo.ttft),
            output_tokens=now.output_tokens,
            output_tokens_per_s=now.output_tokens_per_s,
        ),
        training=TrainingView(
            tokens=training.tokens,
            tokens_per_s=now.training_tokens_per_s,
            running=[
                RunningJobView(
                    job=job.id,
                    step=job.step,
                    total_steps=job.total_steps,
                    loss=job.loss,
                    device_share=job.share,
                    remaining_s=job.remaining_s,
                )
                for job in training.running
            ],
            dropped_micro_batches=training.dropped_micro_batches,
            swapped_micro_batches=training.swapped_micro_batches,
        ),
        pool=pool_view(now.pool),
        predictor=PredictorView(
            samples=predictor.samples,
            median_error=predictor.median_error,
            above_bound=predictor.above_bound,
        ),
    )


def partition_view(cores: Partition, cuda: CudaLanes | None) -> PartitionView:
    """Who has which part of the device now.

    Args:
        cores: which the lanes have where there is no GPU.
    """
    if cuda is None:
        inference, training = describe_cores(cores.inference), describe_cores(cores.training)
        share = cores.inference_share
    elif cuda.split is None:
        inference, training, share = "all SMs", "all SMs", 0.5
    else:
        inference, training = (f"{count} SMs" for count in cuda.split.name.split("+"))
        share = cuda.split.inference
    return PartitionView(inference=inference, training=training, inference_share=share)


def hardware_view(reading: Reading | None) -> HardwareView | None:
    return None if reading is None else HardwareView(**asdict(reading))


def job_views(jobs: Sequence[Job], trainer: Trainer, served: str) -> list[JobView]:
    running = {job.id: job for job in trainer.state().running}
    shares = {name: job.share for name, job in running.items()}
    left = {name: job.remaining_s for name, job in running.items()}
    return [
        JobView(
            id=job.id,
            status=job.status,
            model=job.model,
            fine_tuned_model=job.fine_tuned_model,
            step=job.step,
            total_steps=job.total_steps,
            loss=job.loss,
            priority=job.priority,
            device_share=shares.get(job.id),
            remaining_s=left.get(job.id),
            waits_for=waits_for(job.status, job.model, served),
            suffix=job.suffix,
            created_at=job.created_at,
            error=job.error_message,
        )
        for job in jobs
    ]


def _slo(slo: SloTracker) -> SloView:
    return SloView(
        tpot_ms=slo.target.tpot_ms,
        ttft_ms=slo.target.ttft_ms,
        attainment=slo.attainment,
        classes=[
            SloClassView(
                name=name,
                tpot_ms=ledger.target.tpot_ms,
                ttft_ms=ledger.target.ttft_ms,
                requests=ledger.requests,
                attainment=ledger.attainment.share,
                tpot_p99_ms=ledger.tpot.at(99),
                ttft_p99_ms=ledger.ttft.at(99),
            )
            for name, ledger in slo.classes.items()
        ],
    )


def _percentiles(values: Quantiles) -> Percentiles:
    return Percentiles(p50=values.at(50), p99=values.at(99), last=values.last)
