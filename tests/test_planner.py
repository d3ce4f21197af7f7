"""The planner: its costs, the simulated appliance, the bound, and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from harli_appliance.bench.compare_plan import parse_slos
from harli_appliance.bench.traces import Trace, TraceRequest
from harli_appliance.bench.traces_synthetic import Bursts, synthetic_trace
from harli_appliance.cli.main import run as cli
from harli_appliance.errors import UsageError
from harli_appliance.planner.device import StepWork, decode_work
from harli_appliance.planner.fleet import replay
from harli_appliance.planner.gpus import GPUS, find_gpu
from harli_appliance.planner.limit import physical_limit
from harli_appliance.planner.plan import Question, simulate
from harli_appliance.planner.requests import Limits, SimulatedRequests
from harli_appliance.planner.roofline import Roofline
from harli_appliance.planner.scenario import Fleet, Scenario, run
from harli_appliance.planner.server import SimulatedServer
from harli_appliance.planner.shapes import BUILT_IN_MODELS, model_shape
from harli_appliance.planner.teach import taught
from harli_appliance.planner.training import SimulatedTraining
from harli_appliance.scheduling.names import POLICY_NAMES
from harli_appliance.scheduling.policies.policy import Policy, Situation, beside, pause
from harli_appliance.scheduling.scheduler import Scheduler
from harli_appliance.scheduling.slo import SloTracker
from harli_appliance.scheduling.types import Costs, Decision, Split, Step

LLAMA = model_shape("meta-llama/Llama-3.1-8B")
H100 = Roofline(find_gpu("h100"), LLAMA)
TRACE = synthetic_trace(16.0, 3, Bursts(rate_per_s=3.0, variation=0.3))
SPLITS = [f"static:{split.name}" for split in H100.splits]


def scenario(policy: str, tpot_ms: float = 9.0, **fleet: object) -> Scenario:
    return Scenario(Fleet(H100, **fleet), policy, TRACE, "slo", tpot_ms, 5000.0, 60, 0)  # type: ignore[arg-type]


def server(policy: str, slots: int | None = None) -> SimulatedServer:
    device = H100 if slots is None else Small(H100.gpu, H100.model, slots_=slots)
    predictor = taught(device, chunk_tokens=2048, seed=1)
    scheduler = Scheduler(predictor, policy, device.splits)
    training = SimulatedTraining(device, 2048)
    return SimulatedServer(device, scheduler, SloTracker(9, 5000), training, limits=Limits(), seed=1)


class Small(Roofline):
    """With so few slots that training and serving get in each other's way."""

    def __init__(self, *arguments: object, slots_: int) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        object.__setattr__(self, "_slots", slots_)

    @property
    def slots(self) -> int:
        return int(getattr(self, "_slots"))  # noqa: B009 - set past the frozen dataclass


# -- models and devices ----------------------------------------------------------------------------------


def test_shapes_are_those_that_are_published() -> None:
    for name, parameters, kv_bytes in (
        ("meta-llama/Llama-3.1-8B", 8.03e9, 131_072),
        ("Qwen/Qwen2.5-7B-Instruct", 7.62e9, 57_344),
        ("smollm2-135m", 134.5e6, 46_080 / 2),
    ):
        shape = model_shape(name)
        assert shape.memory_bytes / 2 == pytest.approx(parameters, rel=0.005), name
        assert shape.kv_bytes == kv_bytes, name
    assert model_shape("Llama-3-8B").name == "meta-llama/Meta-Llama-3-8B"
    assert LLAMA.lease_slots(2048) == 2048 * 3 + 2048 * 6 // 64
    with pytest.raises(UsageError, match=", ".join(BUILT_IN_MODELS)):
        model_shape("gpt-9")


def test_a_folder_s_config_is_a_shape(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100,
        "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = model_shape(str(tmp_path))
    assert shape.body_parameters == 2 * (2 * 64 * 32 * (4 + 2) + 3 * 64 * 96)
    assert (shape.head_parameters, shape.embedding_parameters, shape.kv_bytes) == (6400, 6400, 512)
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    with pytest.raises(UsageError, match="no decoder that can be planned for"):
        model_shape(str(tmp_path))


@pytest.mark.parametrize("gpu", GPUS)
def test_splits_are_what_the_driver_can_make(gpu: str) -> None:
    device = find_gpu(gpu)
    sizes = [int(split.name.partition("+")[0]) for split in device.splits()]
    assert sizes == sorted(set(sizes))
    assert len(sizes) >= 5
    for split, size in zip(device.splits(), sizes, strict=True):
        assert size % device.sm_grain == 0
        assert device.sm_least <= size <= device.sms - device.sm_least
        assert split.inference + split.training == pytest.approx(1.0)


def test_costs_follow_the_roofline() -> None:
    one, many = decode_work(1, 1000), decode_work(64, 64_000)
    floor = 1e3 * LLAMA.weight_bytes / H100.bandwidth
    assert floor < H100.solo_ms(one) < 1.2 * floor, "one request waits for the weights to be read"
    assert H100.solo_ms(many) < 2 * H100.solo_ms(one), "64 requests share that"
    prompt = StepWork(Step("prefill", 1, 2000, 2000), 2e6)
    assert H100.solo_ms(prompt) == pytest.approx(1e3 * 2 * LLAMA.body_parameters * 2000 / H100.flops, rel=0.1)
    alone = H100.training_rate()
    times, rates = [], []
    for split in H100.splits:
        assert H100.corun_ms(many, split) > H100.solo_ms(many, split) >= H100.solo_ms(many) - 1e-9
        assert H100.corun_training_rate(split) < split.training * alone * 1.01
        times.append(H100.corun_ms(many, split))
        rates.append(H100.corun_training_rate(split))
    assert rates == sorted(rates, reverse=True)
    assert times[0] > 1.5 * times[-1], "few SMs do not draw the whole bandwidth"
    assert H100.fused_ms(one, 64) == pytest.approx(H100.solo_ms(one), rel=0.01), (
        "reading weights has room for them"
    )
    assert H100.fused_ms(one, 1024) > 3 * H100.solo_ms(one)


# -- the simulated appliance -------------------------------------------------------------------------------


def test_units_are_as_small_as_the_bandwidth_allows() -> None:
    windows = {gpu: Roofline(find_gpu(gpu), LLAMA).window_tokens for gpu in GPUS}
    assert windows == {"h100": 1024, "h200": 1024, "a100-80": 512, "l40s": 2048}
    for gpu in GPUS:
        device = Roofline(find_gpu(gpu), LLAMA)
        assert device.bytes_per_training_token * device.training_rate() <= 0.25 * device.bandwidth


def test_every_token_is_accounted_for() -> None:
    requests = SimulatedRequests(100_000, Limits(chunk_tokens=512, running=8))
    wanted = {str(i): r for i, r in enumerate(TRACE.requests)}
    for name, request in wanted.items():
        assert requests.submit(name, request)
    read, tokens, first, ended = 0, dict.fromkeys(wanted, 0), set[str](), set[str]()
    running: set[str] = set()
    while (work := requests.plan(lambda needed: needed <= 100_000)) is not None:
        if work.step.kind == "prefill":
            assert work.step.prefill_tokens <= 512
            read += work.step.prefill_tokens
        else:
            assert work.step.batch == len(running) <= 8
            assert work.step.context_tokens == sum(wanted[n].prompt_tokens + tokens[n] for n in running)
            for name in running:
                tokens[name] += 1
        new, done = requests.complete()
        for name in new:
            tokens[name] += 1
        first |= set(new)
        ended |= set(done)
        running = first - ended
    assert read == sum(request.prompt_tokens for request in TRACE.requests)
    assert tokens == {name: request.output_tokens for name, request in wanted.items()}
    assert ended == set(wanted)
    assert (requests.reserved, requests.present, requests.running) == (0, 0, 0)


def test_held_prompts_wait_while_answers_go_on() -> None:
    requests = SimulatedRequests(10_000, Limits(chunk_tokens=100))
    for name in ("a", "b"):
        requests.submit(name, TraceRequest(0.0, 150, 3))

    def next_step(*, prompts: bool) -> tuple[str, int]:
        work = requests.plan(lambda _: True, prompts=prompts)
        assert work is not None
        requests.complete()
        return work.step.kind, work.step.prefill_tokens

    assert next_step(prompts=False) == ("prefill", 100), "there is no answer to go on with"
    assert next_step(prompts=True) == ("prefill", 100), "the rest of the first, and a part of the second"
    assert next_step(prompts=False) == ("decode", 0)
    assert next_step(prompts=True) == ("prefill", 100)
    assert next_step(prompts=False) == ("decode", 0)
    assert requests.running == 1, "the first has ended"


def test_a_request_that_can_never_fit_is_refused() -> None:
    requests = SimulatedRequests(1000, Limits())
    assert not requests.submit("long", TraceRequest(0.0, 900, 200))
    assert requests.present == 0


@pytest.mark.parametrize("slots", [None, 15_000])
def test_work_is_trained_or_under_way_or_lost(slots: int | None) -> None:
    made = server("adaptive", slots)
    found = replay(TRACE, [made])
    training = made.training
    assert training is not None
    assert training.worked > 2048
    assert training.trained <= training.worked - training.dropped
    assert training.worked - training.dropped - training.trained < 2048
    assert (training.dropped > 0) == (slots is not None), "serving takes slots back when it needs them"
    assert len(found.ended) == found.requests
    assert sum(found.modes.values()) == pytest.approx(1.0)


def test_without_elastic_memory_serving_waits_for_a_micro_batch_to_end() -> None:
    training = SimulatedTraining(H100, 2048)
    training.leased = True
    training.run(500.0)
    assert training.left == math.inf
    training.end_after_this()
    assert training.left == pytest.approx(1548.0)
    training.run(5000.0)
    assert (training.trained, training.worked, training.leased) == (pytest.approx(2048), 2048, False)
    made = server("adaptive-no-elastic-memory", 15_000)
    found = replay(TRACE, [made])
    assert made.training is not None
    assert made.training.dropped == 0
    assert made.training.trained > 2048
    assert len(found.ended) == found.requests


def test_units_add_up_to_micro_batches() -> None:
    training = SimulatedTraining(H100, 2048)
    training.leased = True
    units = training.outlook().micro_batch_units
    assert units == 2 * 32 * 2
    assert training.forward_tokens_left == 2048
    training.run(training.amount_of(units // 2))
    assert (training.forward_tokens_left, training.trained) == (0, 0)
    training.run(training.amount_of(1))
    assert training.forward_tokens_left == 0, "backward has begun"
    training.run(training.amount_of(units // 2 - 1))
    assert training.trained == pytest.approx(2048)
    training.forward(512)
    assert training.forward_tokens_left == 1536
    assert training.amount_of(3 * units) == pytest.approx(3 * 2048)
    training.drop()
    assert training.dropped == pytest.approx(512 / 3)
    assert not training.outlook().ready


@pytest.mark.parametrize("policy", [*(name for name in POLICY_NAMES if name != "static"), SPLITS[0]])
def test_a_run_is_the_same_every_time_and_within_the_limit(policy: str) -> None:
    found = run(scenario(policy))
    assert found == run(scenario(policy))
    alone = H100.training_rate()
    assert found.finetune_tokens_per_s <= alone
    if policy == "serve_only":
        assert found.finetune_tokens_per_s == 0
    if (found.attainment or 0) >= 0.99:
        limit = physical_limit(H100, TRACE, 9.0)
        assert 0 < limit.share < 1
        assert found.finetune_tokens_per_s < limit.tokens_per_s


def test_a_unit_that_a_step_waits_for_is_done_then() -> None:
    """Steps alone and beside training by turns: the unit that was begun beside one ends before the next."""
    turns = EveryOther()
    made = server("serve_only")
    made._scheduler._policy = turns
    made.submit("one", TraceRequest(0.0, 1000, 2000))
    made.advance(3.0)
    assert made.training is not None
    beside_steps = H100.corun_training_rate(turns.split) * made.modes["partition"]
    half_a_unit = made.training.amount_of(64) / 64 / 2
    assert made.training.worked - beside_steps == pytest.approx(turns.beside * half_a_unit, rel=0.4)
    work = decode_work(1, 2000)
    alone_ms, beside_ms = H100.solo_ms(work), H100.corun_ms(work, turns.split)
    took_ms = 1e3 * made.modes["pause"] / turns.alone_steps
    assert alone_ms < took_ms < beside_ms, "it has what serving had before, and then all"


class EveryOther(Policy):
    split = H100.splits[0]

    def __init__(self) -> None:
        self.beside = self.alone_steps = 0

    def share(self, step: Step, now: Situation, costs: Costs) -> Decision:
        if self.beside > self.alone_steps:
            self.alone_steps += 1
            return pause("its_turn", None)
        self.beside += 1
        return beside("its_turn", None, self.split)


def test_a_looser_promise_never_gives_less_finetuning() -> None:
    rates = [run(scenario("adaptive", tpot)).finetune_tokens_per_s for tpot in (7.5, 9.0, 12.0, 24.0, 48.0)]
    limits = [physical_limit(H100, TRACE, tpot).tokens_per_s for tpot in (7.5, 9.0, 12.0, 24.0, 48.0)]
    assert rates == sorted(rates)
    assert limits == sorted(limits)
    assert rates[-1] > 1.3 * rates[0]


def test_ours_trains_more_than_turns_and_keeps_a_tight_promise() -> None:
    ours, turns = run(scenario("adaptive", 14.0)), run(scenario("time_slice", 14.0))
    assert ours.attainment == 1.0 > (turns.attainment or 0.0)
    assert ours.finetune_tokens_per_s > 1.2 * turns.finetune_tokens_per_s
    assert {"partition", "fused"} <= set(ours.modes)


def test_prompts_that_are_read_elsewhere_cost_nothing_here() -> None:
    found, everything = run(scenario("adaptive", decode_only=True)), run(scenario("adaptive"))
    assert max(found.ttft_ms) < min(150.0, max(everything.ttft_ms))
    assert found.finetune_tokens_per_s > everything.finetune_tokens_per_s
    assert physical_limit(H100, TRACE, 9.0, decode_only=True).prompts == 0


def test_a_router_spreads_the_load() -> None:
    one, three = run(scenario("serve_only")), run(scenario("serve_only", replicas=3))
    assert (one.requests, one.failed, three.failed) == (three.requests, 0, 0)
    assert max(three.tpot_ms) < max(one.tpot_ms)
    servers = [server("serve_only") for _ in range(3)]
    replay(TRACE, servers)
    assert min(len(made.ended) for made in servers) > len(TRACE) / 6


# -- the question and the command --------------------------------------------------------------------------


def test_a_report_has_the_structure_of_measured_ones() -> None:
    question = Question(
        Fleet(H100), TRACE, parse_slos("40ms,2x"), 5000.0, ["adaptive", "static", "serve_only"], [50]
    )
    report = simulate(question, "harli plan")
    assert report["simulated"] is True
    assert list(report["policies"]) == ["adaptive", *SPLITS, "serve_only"]
    assert report["slo"]["tpot_ms"] == 40.0
    assert report["slos"]["2x"]["slo"]["tpot_ms"] < 40.0
    cell = report["policies"]["adaptive"]["50"]
    assert cell["attainment"] == 1.0
    reached = report["physical_limit"]["40ms"]["50"]["reached"]
    assert reached == pytest.approx(
        cell["finetune_tokens_per_s"] / report["physical_limit"]["40ms"]["50"]["tokens_per_s"], rel=1e-3
    )
    assert 0.5 < reached < 1
    json.dumps(report, allow_nan=False)


def test_a_promise_that_serving_alone_stepsbreaks_is_said_first() -> None:
    question = Question(Fleet(H100), TRACE, parse_slos("3ms"), 5000.0, ["adaptive"], [50])
    with pytest.raises(UsageError, match=r"serving alone cannot keep 3ms: it takes \d+\.\d ms"):
        simulate(question, "")


def test_a_model_that_does_not_fit_is_refused() -> None:
    gpu = replace(find_gpu("l40s"), memory_bytes=16e9)
    question = Question(Fleet(Roofline(gpu, LLAMA)), TRACE, parse_slos("40ms"), 5e3, ["adaptive"], [50])
    with pytest.raises(UsageError, match="leaves room for 0 tokens"):
        simulate(question, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "tpu"], "choose one of h100, h200, a100-80, l40s"),
        (["--model", "gpt-9"], "meta-llama/Llama-3.1-8B"),
        (["--policies", "best"], "choose from adaptive"),
        (["--policies", "static:7"], "no such split; choose static:16"),
        (["--slo-tpot", "fast"], "write a time such as 40ms"),
        (["--slo-ttft", "5000"], "write a time such as 800ms or 5s"),
        (["--validate"], "give both"),
        (["--loads", "half"], "shares of what can be served"),
        (["--start", "1e6", "--trace", "TRACE"], "no request arrives"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:00:00,100,20\n")
    assert cli(["plan", "--workers", "1", *(str(trace) if a == "TRACE" else a for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_command_prints_json_and_leaves_out_bad_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    rows = [f"2023-11-16 18:00:{second:02d},{300 + 7 * second},{20 + second}" for second in range(30)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, "2023-11-16 18:00:31,x,5"]))
    arguments = ["plan", "--trace", str(trace), "--slo-tpot", "20ms", "--loads", "0.5", "--workers", "1",
                 "--policies", "adaptive", "--duration", "20", "--lead", "5", "--json"]  # fmt: skip
    assert cli(arguments) == 2
    assert "row 32" in capsys.readouterr().err
    assert cli([*arguments, "--skip-bad", "--out", str(tmp_path / "plan")]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert "1 bad rows" in captured.err
    assert (report["simulated"], report["trace"]["skipped"]) == (True, 1)
    assert json.loads((tmp_path / "plan" / "report.json").read_text()) == report
    page = (tmp_path / "plan" / "report.html").read_text()
    assert "SIMULATED: finetuning beside serving on 1 x NVIDIA H100" in page
    assert page.count("<svg") == 2
    assert cli([*arguments[:-1], "--skip-bad"]) == 0
    assert "SIMULATED" in capsys.readouterr().out


def test_trace_type_is_what_the_simulator_takes() -> None:
    late = Trace("one", (TraceRequest(1.0, 100, 1),), 2.0)
    found = run(replace(scenario("adaptive"), trace=late))
    assert (found.requests, found.good, len(found.tpot_ms)) == (1, 1, 0)
    assert isinstance(H100.splits[0], Split)
