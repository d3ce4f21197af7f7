"""Calibration: what the sweep covers, what the predictor knows after it, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from harli_appliance.engine.calibration import DECODES, Calibration, Round, rounds
from harli_appliance.engine.lanes import Lane
from harli_appliance.runtime.protocol import NewTokens, StepOutcome, StepPlan, Submission
from harli_appliance.runtime.weights import shared_model
from harli_appliance.scheduling.predictor import Predictor
from harli_appliance.scheduling.types import Decision, Split, Step
from harli_appliance.training.backbone import Backbone
from harli_appliance.training.exercise import Exercise
from tests.conftest import Serving

CHUNK = 128


class CountedRuntime:
    """Processes prompts in chunks of `CHUNK` tokens, then decodes; takes 10 + 2 x batch, or 5 + tokens, ms."""

    def __init__(self) -> None:
        self.prompts: dict[str, int] = {}
        self.answers: dict[str, int] = {}

    def submit(self, submission: Submission) -> None:
        assert max(submission.prompt) < 50
        self.prompts[submission.id] = len(submission.prompt)
        self.answers[submission.id] = submission.sampling.max_tokens

    def plan(self, *, prompts: bool = True) -> StepPlan | None:
        if self.prompts:
            name, left = next(iter(self.prompts.items()))
            tokens = min(left, CHUNK)
            return StepPlan("prefill", (name,), tokens, tokens, None)
        running = tuple(self.answers)
        return StepPlan("decode", running, 0, 50 * len(running), None) if running else None

    def execute(self, plan: StepPlan) -> StepOutcome:
        if plan.kind == "prefill":
            (name,) = plan.requests
            self.prompts[name] -= plan.prefill_tokens
            ended = self.prompts[name] == 0
            if ended:
                del self.prompts[name]
            return StepOutcome((5 + plan.prefill_tokens) / 1e3, (NewTokens(name, (1,)),) if ended else ())
        for name in plan.requests:
            self.answers[name] -= 1
            if self.answers[name] == 0:
                del self.answers[name]
        return StepOutcome((10 + 2 * len(plan.requests)) / 1e3, ())


@pytest.fixture
async def lanes() -> AsyncIterator[tuple[Lane, Lane]]:
    made = Lane("inference"), Lane("training")
    yield made
    for lane in made:
        lane.close()


async def test_the_predictor_knows_steps_alone_and_beside_training(lanes: tuple[Lane, Lane]) -> None:
    runtime, predictor, units, told = CountedRuntime(), Predictor(), [], []
    calibration = Calibration(
        runtime,  # type: ignore[arg-type]
        predictor,
        *lanes,
        lambda: units.append(1),
        vocabulary=50,
        on_progress=told.append,
    )
    sweep = rounds(slots=16_384, context=2048, most_running=32)
    assert [len(part.prompts) for part in sweep] == [1, 2, 4, 8, 16]
    await calibration.run(sweep)
    assert runtime.plan() is None, "every made-up request has ended"
    for step, expected in ((Step("decode", 6, 300), 22.0), (Step("prefill", 1, 90, 90), 95.0)):
        for bound in (predictor.solo(step), predictor.corun(step)):
            assert bound is not None
            assert bound.expected_ms == pytest.approx(expected, rel=0.02)
    assert units
    assert told == sorted(told)
    assert told[-1] == 1.0


async def test_without_finetuning_steps_are_only_run_alone(lanes: tuple[Lane, Lane]) -> None:
    predictor = Predictor()
    calibration = Calibration(
        CountedRuntime(),  # type: ignore[arg-type]
        predictor,
        *lanes,
        None,
        vocabulary=50,
        on_progress=lambda _: None,
    )
    await calibration.run([Round((20, 30), 12)])
    assert predictor.solo(Step("decode", 2, 100)) is not None
    assert predictor.corun(Step("decode", 2, 100)) is None


async def test_every_split_is_measured_and_the_whole_device_only_alone(lanes: tuple[Lane, Lane]) -> None:
    predictor, halves = Predictor(), Split("half", 0.5, 0.5)
    arranged: list[Decision] = []
    calibration = Calibration(
        CountedRuntime(),  # type: ignore[arg-type]
        predictor,
        *lanes,
        lambda: None,
        unit_tokens=0.5,
        vocabulary=50,
        splits=(halves,),
        arrange=arranged.append,
        on_progress=lambda _: None,
    )
    await calibration.run([Round((20, 30), 20)])
    assert predictor.training_rate() > 0
    assert predictor.training_rate(halves) > 0
    step = Step("decode", 2, 100)
    known = [predictor.solo(step), predictor.solo(step, halves), predictor.corun(step, halves)]
    assert None not in known
    assert predictor.corun(step) is None
    assert [decision.split for decision in arranged] == [None, None, None, halves]


@pytest.mark.parametrize(
    ("slots", "context", "most_running", "batches"),
    [
        (4096, 2048, 32, [1, 2, 4, 8]),
        (16_384, 2048, 4, [1, 2, 4]),
        (128, 2048, 32, [1]),
        (16_384, 64, 2, [1, 2]),
        (16_384, 2048, 64, [1, 2, 4, 8, 16, 32]),
        (400_000, 8192, 256, [1, 2, 4, 8, 16, 32, 64, 128]),
    ],
)
def test_the_sweep_fits_pool_context_and_batch(
    slots: int, context: int, most_running: int, batches: list[int]
) -> None:
    sweep = rounds(slots, context, most_running)
    assert [len(part.prompts) for part in sweep] == batches
    for part in sweep:
        assert max(part.prompts) + DECODES + 1 <= context
        assert sum(part.prompts) + len(part.prompts) * (DECODES + 1) <= slots / 2


async def test_real_steps_and_units_teach_it_and_leave_nothing_behind(
    serving: Serving, lanes: tuple[Lane, Lane]
) -> None:
    predictor = Predictor()
    backbone = Backbone(shared_model(serving.runtime.model, serving.folder))
    calibration = Calibration(
        serving.runtime,
        predictor,
        serving.lane,
        lanes[1],
        Exercise(backbone, 32),
        vocabulary=serving.runtime.vocabulary,
        on_progress=lambda _: None,
    )
    await calibration.run([Round((24, 40), 40)])
    assert predictor.solo(Step("decode", 2, 80)) is not None
    assert predictor.corun(Step("decode", 2, 80)) is not None
    assert (serving.runtime.depth().running, serving.runtime.depth().waiting) == (0, 0)
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
