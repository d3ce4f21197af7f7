"""The simulator on a machine that was measured: its costs, its pace, and how well runs on it are predicted."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from harli_appliance.bench.compare_plan import ComparePlan, parse_slos, stretch
from harli_appliance.bench.compare_store import Basis, CompareStore, Moment, Request, RunFile
from harli_appliance.bench.comparison import RunResult, SloTarget
from harli_appliance.bench.predictor_errors import Observed
from harli_appliance.bench.traces import Trace, TraceRequest
from harli_appliance.bench.traces_synthetic import Bursts, synthetic_trace
from harli_appliance.cli.main import run as cli
from harli_appliance.errors import UsageError
from harli_appliance.planner.calibrated import Calibrated
from harli_appliance.planner.device import UnitMix, decode_work
from harli_appliance.planner.measured import Measured
from harli_appliance.planner.measured_steps import fit, known_tokens, read_steps, unit_mix
from harli_appliance.planner.paces import Paces, TrainingRates, paces_and_noise, paces_of, rates_of
from harli_appliance.planner.requests import Limits, SimulatedRequests
from harli_appliance.planner.scenario import Fleet, Scenario, run
from harli_appliance.planner.shapes import model_shape
from harli_appliance.planner.training import SimulatedTraining
from harli_appliance.scheduling.types import Step


def step_time(step: Step, measured_ms: float, corun: bool) -> Observed:
    return Observed(step, measured_ms, corun, split=None, fused_tokens=0)


STEPS = [
    step_time(
        Step(kind, batch, 100 * batch, prefill),  # type: ignore[arg-type]
        (40.0 + 6.0 * batch + 1.5 * prefill) * (1.25 if corun else 1.0),
        corun,
    )
    for corun in (False, True)
    for batch in range(1, 17)
    for kind, prefill in (("decode", 0), ("prefill", 8 * batch))
]
UNITS = {
    "forward": {"count": 60, "mean_ms": 10.0},
    "loss": {"count": 8, "mean_ms": 40.0},
    "backward": {"count": 60, "mean_ms": 20.0},
    "step": {"count": 1, "mean_ms": 5.0},
}
MIX = UnitMix(
    forward=30, backward=34, forward_share=600 / 2120, slowest=40 / (2120 / 128), slow_share=8 / 128
)


def two_cores(paces: Paces = Paces()) -> Fleet:  # noqa: B008
    rates = TrainingRates(60.0, 50.0)
    model = model_shape("smollm2-135m-instruct")
    device = Calibrated("two cores", model, fit(STEPS), rates, 16_384, 128, MIX, paces)
    return Fleet(device, limits=Limits(chunk_tokens=128, running=32), micro_batch_tokens=128)


def write_steps(path: Path, **units: object) -> Path:
    content = {"learned": STEPS[:32], "held_out": STEPS[32:]}
    content_json = {part: [asdict(one) for one in steps] for part, steps in content.items()}
    path.write_text(json.dumps(content_json | {"units": UNITS} | units))
    return path


# -- costs -------------------------------------------------------------------------------------------------


def test_a_calibrated_device_costs_what_was_measured() -> None:
    fleet, work = two_cores(), decode_work(4, 400)
    device = fleet.device
    assert isinstance(device, Calibrated)
    assert device.solo_ms(work) == pytest.approx(64.0, rel=0.01)
    assert device.corun_ms(work, None) == pytest.approx(80.0, rel=0.01)
    assert device.fused_ms(work, 6) == pytest.approx(64.0 + 1e3 * 6 * MIX.forward_share / 60, rel=0.01)
    trace = synthetic_trace(120.0, 3, Bursts(0.2)).with_lengths(prompt_scale=0.04, output_scale=0.25)
    found = run(Scenario(fleet, "static", trace, "slo", 400.0, 5000.0, 50, 0))
    beside = found.modes["partition"]
    assert 0.1 < beside < 0.9
    assert found.finetune_tokens_per_s == pytest.approx(50 * beside + 60 * (1 - beside), abs=1.0)
    with pytest.raises(UsageError, match="too few decode steps beside training"):
        replace(device, steps=fit(STEPS[:32])).corun_ms(work, None)


def test_a_window_goes_through_the_units_that_were_counted(tmp_path: Path) -> None:
    steps, mix = read_steps(write_steps(tmp_path / "steps.json"), layers=30)
    assert steps == STEPS
    assert asdict(mix) == pytest.approx(asdict(MIX))
    training = SimulatedTraining(two_cores().device, 256)
    training.leased = True
    assert training.outlook().micro_batch_units == 2 * 64
    assert training.amount_of(60) == pytest.approx(256 * MIX.forward_share)
    assert training.amount_of(128) == pytest.approx(256)
    assert training.unit_ms == pytest.approx(1e3 * MIX.slowest * (128 / 64) / 50), "beside requests at first"
    training.went(12_800.0, 30.0)
    assert training.unit_ms == pytest.approx(1e3 * MIX.slowest * (128 / 64) / 30, rel=0.01), (
        "as it went lately"
    )


def test_the_beginning_that_prompts_share_is_not_read_again() -> None:
    def prompt(tokens: int, known: int, batch: int = 1) -> Observed:
        return step_time(Step("prefill", batch, tokens + known, tokens), 50.0, corun=False)

    assert (
        known_tokens([prompt(9, 25), prompt(30, 25), prompt(9, 153), prompt(9, 26), prompt(9, 0, batch=2)])
        == 26
    )
    assert known_tokens(STEPS[:1]) == 0
    requests = SimulatedRequests(1000, Limits(chunk_tokens=64, running=4, known_tokens=25))
    for name, tokens in (("long", 100), ("short", 20)):
        assert requests.submit(name, TraceRequest(0.0, tokens, 3))
    steps = []
    while (work := requests.plan(lambda _: True)) is not None and work.step.kind == "prefill":
        steps.append((work.step.prefill_tokens, work.step.context_tokens))
        requests.complete()
    assert steps == [(64, 89), (11 + 1, 100 + 20)], "of the short one its last token, to answer from"


def test_a_file_that_is_no_calibration_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    with pytest.raises(UsageError, match="cannot be read"):
        read_steps(path, 30)
    for content, wrong in (
        ("{}", "'learned' is missing"),
        ("[]", "cannot be used"),
        ("no json", "cannot be used"),
        ('{"learned": [{"step": {"kind": "decode"}, "split": null}], "held_out": []}', "cannot be used"),
        ('{"learned": [], "held_out": []}', "'units' is missing"),
        (
            '{"learned": [], "held_out": [], "units": {"forward": {"count": 0, "mean_ms": 1}}}',
            "cannot be used",
        ),
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=f"{wrong}.*measure with 'harli bench predictor'"):
            read_steps(path, 30)
    assert unit_mix(UNITS, 30).forward == 30


# -- the pace of a shared machine --------------------------------------------------------------------------


def test_what_lasts_is_pace_and_what_does_not_is_noise() -> None:
    rng = random.Random(3)
    decode = Step("decode", 4, 400)
    usual = [step_time(decode, 64.0 * rng.choice((0.9, 1.0, 1.0, 1.0, 1.1)), corun=False) for _ in range(200)]
    slow = [replace(one, measured_ms=2.0 * one.measured_ms) for one in usual]
    prompt = step_time(Step("prefill", 1, 100, 100), 5000.0, corun=False)
    steps = fit(STEPS)
    found, noise = paces_and_noise([*usual, prompt, *slow], steps)
    assert len(found.factors) == 400, "prompts tell nothing"
    assert (found.at(5.0), found.at(25.0)) == pytest.approx((1.0, 2.0), rel=0.02)
    assert found.at(found.ends_s[-1] + 5.0) == found.at(5.0), "from the beginning again"
    assert sorted({round(one, 1) for one in noise[40:160] + noise[240:360]}) == [0.9, 1.0, 1.1]
    assert Paces().at(3.0) == 1.0


def moments(*parts: tuple[str, float, int, float | None, int]) -> list[Moment]:
    """Of mode, seconds, running requests, milliseconds of a step, training tokens of a moment; 4 in a second."""
    found: list[Moment] = []
    for mode, seconds, running, step_ms, tokens in parts:
        for _ in range(round(4 * seconds)):
            found.append(Moment(0.25 * (len(found) + 1), mode, running, step_ms, 0, tokens, 0, 100))
    return found


def run_file(found: Sequence[Moment], result: RunResult | None = None) -> RunFile:
    request = Request(0.0, 90, 20, 1.0, 1.0, 1.0, True, True, None)
    nothing = RunResult("naive", "slo", 60, 0, 1, 1, 0, 0.0, (), (), {})
    return RunFile(result or nothing, [request], found)


def test_a_run_s_own_steps_tell_how_fast_the_machine_was() -> None:
    """Steps of 4 requests with 100 rows each usually take 64 ms alone and 80 beside training."""
    steps = fit(STEPS)
    seen = moments(
        ("pause", 10.0, 4, 64.0, 0), ("partition", 10.0, 4, 160.0, 5), ("training", 10.0, 0, None, 10),
        ("partition", 10.0, 4, 80.0, 10),
    )  # fmt: skip
    run_ = run_file(seen)
    found = paces_of(run_, steps)
    assert [found.at(at) for at in (2.0, 15.0, 25.0, 37.0)] == pytest.approx([1.0, 2.0, 1.0, 1.0], rel=0.02)
    assert paces_of(run_file([]), steps) == Paces()
    rates = rates_of([(run_, found)])
    assert rates is not None
    # 5 tokens in 250 ms at half the speed are as many as 10: 40 a second.
    assert (rates.alone, rates.beside) == pytest.approx((40.0, 40.0), rel=0.05)
    assert rates_of([(run_file(seen[:60]), found)]) is None, "none without requests"
    turns = run_file(moments(*[("partition", 0.5, 4, 80.0, 1), ("pause", 0.5, 4, 64.0, 1)] * 20))
    assert rates_of([(run_, found), (turns, Paces())]) == rates, (
        "what changes from step to step tells nothing"
    )


def test_the_pace_of_a_shared_machine_is_replayed() -> None:
    fleet, slowed = two_cores(), two_cores(Paces((10.0, 20.0), (1.0, 2.0)))
    trace = synthetic_trace(200.0, 3, Bursts(0.05)).with_lengths(prompt_scale=0.04, output_scale=0.25)
    trained = run(Scenario(slowed, "train_only", trace, "slo", 400.0, 5000.0, 50, 0))
    assert trained.finetune_tokens_per_s == pytest.approx(60.0 * 0.75, rel=0.02), (
        "half as fast half of the time"
    )
    steady, served = (
        run(Scenario(which, "serve_only", trace, "slo", 400.0, 5000.0, 50, 0)) for which in (fleet, slowed)
    )
    assert max(served.tpot_ms) > 1.5 * max(steady.tpot_ms)
    one = Trace("one", (TraceRequest(0.5, 40, 20),), 8.0)
    fast, slow = (
        run(Scenario(slowed, "serve_only", one, "slo", 400.0, 5000.0, 50, 0, since_s=since_s))
        for since_s in (0.0, 10.0)
    )
    assert slow.tpot_ms[0] == pytest.approx(2.0 * fast.tpot_ms[0], rel=0.05)


# -- predicted and measured --------------------------------------------------------------------------------


def test_a_measured_comparison_is_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was "measured" is simulated, half of the runs on a machine of half the speed."""
    plan = ComparePlan(
        policies=("adaptive", "naive", "time_slice", "serve_only"), slos=parse_slos("400ms"), repetitions=1,
        model="smollm2-135m-instruct", loads=(60,), seconds=30.0,
    )  # fmt: skip
    store, target = CompareStore(tmp_path), SloTarget("400ms", 400.0, 5000.0, 1.5)
    store.begin(plan, resume=False)
    store.keep_basis(Basis(70.0, 60.0, (target,), (), 65.0))
    for asked in plan.runs():
        part = stretch(plan.load_trace(), plan, 0.9, 0)
        factor = 2.0 if asked.policy in ("naive", "time_slice") else 1.0
        fleet = two_cores(Paces((1.0,), (factor,)))
        made = Scenario(fleet, asked.policy, part, "400ms", 400.0, 5000.0, 60, 0, plan.lead_s)
        seen = moments(
            ("training", 20.0, 0, None, round(15 / factor)), ("pause", 20.0, 4, 64.0 * factor, 0),
            ("partition", 20.0, 4, 80.0 * factor, round(12.5 / factor)),
        )  # fmt: skip
        store.keep(asked, run_file(seen, run(made)))
    steps = write_steps(tmp_path / "steps.json")
    machine = Measured(tmp_path)
    fleet = machine.fleet(steps)
    assert isinstance(fleet.device, Calibrated)
    assert asdict(fleet.device.rates) == pytest.approx({"alone": 60.0, "beside": 50.0}, rel=0.1)
    assert fleet.device.units == MIX
    found = machine.validate(fleet)
    assert (found["within_goal"], len(found["cells"])) == (1.0, 4)
    assert found["median_error"] < 0.1

    wrong = next(asked for asked in plan.runs() if asked.policy == "time_slice")
    kept = store.read(wrong)
    assert kept is not None
    slower = replace(kept.result, finetune_tokens_per_s=0.5 * kept.result.finetune_tokens_per_s)
    store.keep(wrong, replace(kept, result=slower))
    arguments = ["plan", "--calibration", str(steps), "--measured", str(tmp_path), "--validate"]
    assert cli(arguments) == 1
    told = capsys.readouterr().out
    assert told.count("% *") == 1
    assert "75% of these within 15%" in told
    assert cli(["plan", "--measured", str(tmp_path / "no"), "--calibration", str(steps)]) == 2
    assert "holds no comparison" in capsys.readouterr().err


def test_a_comparison_without_training_beside_requests_is_no_machine(tmp_path: Path) -> None:
    plan = ComparePlan(
        policies=("serve_only",), slos=parse_slos("400ms"), repetitions=1,
        model="smollm2-135m-instruct", loads=(60,), seconds=30.0,
    )  # fmt: skip
    store = CompareStore(tmp_path)
    store.begin(plan, resume=False)
    store.keep_basis(Basis(70.0, 60.0, (SloTarget("400ms", 400.0, 5000.0, 1.5),), (), 65.0))
    store.keep(next(iter(plan.runs())), run_file(moments(("pause", 20.0, 4, 64.0, 0))))
    with pytest.raises(UsageError, match="measure policy naive as well"):
        Measured(tmp_path).fleet(write_steps(tmp_path / "steps.json"))
