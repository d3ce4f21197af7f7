"""Probes, metrics, `/harli/v1`, models, authentication, and what every response has in common."""

from __future__ import annotations

import socket

import aiohttp
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from harli_appliance.api.app import create_app
from harli_appliance.api.metrics import exposition
from harli_appliance.api.server import serve
from harli_appliance.config import Settings
from harli_appliance.errors import ConfigError
from harli_appliance.schema import Percentiles, PolicyChange, Status, Timeline
from tests.fakes import BASE, FakeAppliance, listening, make_status


async def test_models(port: FakeAppliance) -> None:
    async with listening(port) as listener:
        base_url = f"{listener.url}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="x", max_retries=0) as client:
            assert [m.id async for m in client.models.list()] == [BASE, "ft:smollm2:harbour"]
            adapter = await client.models.retrieve("ft:smollm2:harbour")
            assert adapter.model_extra == {"harli": {"kind": "adapter", "parent": BASE, "job": "ftjob-done"}}
            with pytest.raises(openai.NotFoundError) as caught:
                await client.models.retrieve("gpt-5")
            assert caught.value.code == "model_not_found"
            assert (await client.models.delete("ft:smollm2:harbour")).deleted
            assert [m.id async for m in client.models.list()] == [BASE]


async def test_health_and_readiness(http: aiohttp.ClientSession, port: FakeAppliance) -> None:
    async with http.get("/ready") as response:
        assert response.status == 200
    port.is_ready = False
    async with http.get("/ready") as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
    async with http.get("/health") as response:
        assert response.status == 200


async def test_status_and_timeline(http: aiohttp.ClientSession, port: FakeAppliance) -> None:
    async with http.get("/harli/v1/status") as response:
        assert Status.model_validate(await response.json()) == port.status_now
    async with http.get("/harli/v1/timeline?since=6") as response:
        timeline = Timeline.model_validate(await response.json())
    assert ([sample.seq for sample in timeline.samples], timeline.next) == ([6, 7], 8)
    async with http.get("/harli/v1/timeline?since=-1") as response:
        assert response.status == 400


async def test_the_policy_can_be_changed(http: aiohttp.ClientSession, port: FakeAppliance) -> None:
    async with http.post("/harli/v1/policy", json={"policy": "time_slice", "slo_tpot_ms": 99}) as response:
        status = await response.json()
    assert (status["policy"], status["slo"]["tpot_ms"]) == ("time_slice", 99.0)
    assert port.changes == [PolicyChange(policy="time_slice", slo_tpot_ms=99.0)]
    for body in ({"policy": "best"}, {"slo_tpot_ms": 0}, {"polcy": "adaptive"}):
        async with http.post("/harli/v1/policy", json=body) as response:
            assert response.status == 400
            error = (await response.json())["error"]
            assert error["param"] == next(iter(body))
            assert ("choose one of adaptive, harli, naive, " in error["message"]) == ("policy" in body)


def values(status: Status) -> dict[tuple[str, str], float]:
    """Every sample of the exposition by name and its label values."""
    families = text_string_to_metric_families(exposition(status).decode())
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_metrics_say_what_the_status_says() -> None:
    found = values(make_status())
    assert found["harli_tpot_seconds", "0.99"] == pytest.approx(0.233)
    assert found["harli_ttft_seconds", "0.5"] == pytest.approx(0.4)
    assert found["harli_itl_seconds", "0.99"] == pytest.approx(0.26)
    assert found["harli_slo_tpot_seconds", ""] == pytest.approx(0.25)
    assert found["harli_slo_attainment_ratio", ""] == 0.995
    assert found["harli_slo_class_attainment_ratio", "batch"] == 0.75
    assert ("harli_slo_class_attainment_ratio", "interactive") not in found
    assert found["harli_slo_class_tpot_seconds", "interactive"] == pytest.approx(0.15)
    assert found["harli_ticks_total", "corun_keeps_pace"] == 300
    assert found["harli_output_tokens_total", ""] == 51_234
    assert found["harli_output_tokens_per_second", ""] == 33.4
    assert found["harli_training_tokens_per_second", ""] == 52.5
    assert [found["harli_pool_slots", o] for o in ("free", "serving", "cached", "leased")] == [
        4096,
        4096,
        2048,
        6144,
    ]
    assert (found["harli_mode", "partition"], found["harli_mode", "pause"]) == (1, 0)
    assert (found["harli_jobs", "running"], found["harli_jobs", "failed"]) == (1, 0)
    running = {
        name: found[f"harli_job_{name}", "ftjob-run"] for name in ("step", "steps", "loss", "device_ratio")
    }
    assert running == {"step": 31, "steps": 100, "loss": 1.734, "device_ratio": 1.0}


def test_metrics_leave_out_what_is_not_known_yet() -> None:
    serving = make_status().serving.model_copy(update={"tpot_ms": Percentiles()})
    slo = make_status().slo.model_copy(update={"attainment": None})
    found = values(make_status(serving=serving, slo=slo))
    assert not [key for key in found if key[0] in ("harli_tpot_seconds", "harli_slo_attainment_ratio")]


async def test_metrics_are_served(http: aiohttp.ClientSession) -> None:
    async with http.get("/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        assert "harli_uptime_seconds 3723.0" in await response.text()


async def test_unknown_paths_and_methods_have_the_same_shape(http: aiohttp.ClientSession) -> None:
    async with http.get("/v1/nothing") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "unknown_url"
    async with http.delete("/v1/chat/completions") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        assert (await response.json())["error"]["code"] == "method_not_allowed"
        first = response.headers["x-request-id"]
    async with http.get("/health") as response:
        assert response.headers["x-request-id"] not in ("", first)


async def test_a_key_is_asked_for_everywhere_but_at_the_probes(port: FakeAppliance) -> None:
    async with listening(port, api_key="s3cret") as listener, aiohttp.ClientSession(listener.url) as http:
        for path in ("/v1/models", "/metrics", "/harli/v1/status", "/v1/nothing"):
            async with http.get(path) as response:
                assert response.status == 401, path
                assert (await response.json())["error"]["code"] == "invalid_api_key"
                assert response.headers["WWW-Authenticate"] == "Bearer"
        for value in ("Bearer wrong", "Basic s3cret", "s3cret", "Bearer \u00fc", "Bearer "):
            async with http.get("/v1/models", headers={"Authorization": value}) as response:
                assert response.status == 401, value
        for path in ("/health", "/ready"):
            async with http.get(path) as response:
                assert response.status == 200
        async with http.get("/v1/models", headers={"Authorization": "Bearer s3cret"}) as response:
            assert response.status == 200


async def test_a_key_may_stand_for_a_class(port: FakeAppliance) -> None:
    slo = {"interactive": {"api_keys": ["quick"]}, "batch": {"api_keys": ["nightly", "weekly"]}}
    body = {"model": BASE, "messages": [{"role": "user", "content": "Hello"}]}
    asked = {"s3cret": "standard", "quick": "interactive", "nightly": "batch", "weekly": "batch"}
    async with (
        listening(port, slo=slo, api_key="s3cret") as listener,
        aiohttp.ClientSession(listener.url) as http,
    ):
        for key, slo_class in asked.items():
            headers = {"Authorization": f"Bearer {key}"}
            for tier, expected in ((None, slo_class), ("auto", slo_class), ("default", "standard")):
                async with http.post(
                    "/v1/chat/completions", json={**body, "service_tier": tier}, headers=headers
                ) as response:
                    assert response.status == 200
                assert port.calls[-1].slo_class == expected
        async with http.get("/v1/models") as response:
            assert response.status == 401


async def test_a_port_in_use_is_one_clear_line(port: FakeAppliance) -> None:
    app = create_app(port, Settings(home=port.folder))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {number} on 127.0.0.1 is in use"):
            await serve(app, "127.0.0.1", number)


async def test_an_address_of_another_machine_is_one_clear_line(port: FakeAppliance) -> None:
    app = create_app(port, Settings(home=port.folder))
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 is not an address of this machine"):
        await serve(app, "192.0.2.1", 0)
