"""Settings: where they come from, what is refused, and that their reference says what they are."""

from __future__ import annotations

import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest

from harli_appliance.config import (
    ModelSettings,
    Promise,
    Settings,
    Sizes,
    SloSettings,
    StepLimits,
    TrainingSettings,
    assigned,
    load_settings,
    setting_names,
)
from harli_appliance.config_reference import markdown_text, settings_reference, toml_text
from harli_appliance.device.partition import Partition, cpu_partition
from harli_appliance.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
WRITE = "run `python -m harli_appliance.config_reference` in the checkout"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No harli.toml and no environment but the test's own."""
    monkeypatch.chdir(tmp_path)
    for setting in settings_reference():
        monkeypatch.delenv(setting.variable, raising=False)


# -- the reference -----------------------------------------------------------------------------------------


def test_the_default_file_says_what_the_settings_say():
    assert (ROOT / "harli.toml").read_text(encoding="utf-8") == toml_text(), WRITE


def test_the_reference_page_says_what_the_settings_say():
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == markdown_text(), WRITE


def test_every_setting_is_in_the_reference_with_its_sentence():
    documented = {".".join(filter(None, (s.section, s.name))): s for s in settings_reference()}
    assert list(documented) == setting_names()
    assert all(setting.sentence.endswith(".") for setting in documented.values())


def test_the_default_file_as_it_ships_changes_nothing():
    assert load_settings(ROOT / "harli.toml").model_dump() == load_settings().model_dump()


def test_every_setting_of_the_default_file_can_be_taken_out_of_its_comment(tmp_path: Path):
    (tmp_path / "all.toml").write_text(re.sub(r"(?m)^# (?=\w+ = )", "", toml_text()))
    taken, default = load_settings(tmp_path / "all.toml"), load_settings()
    # Only what has no default of its own differs from the default.
    assert taken.server.api_key is not None
    assert taken.server.model_copy(update={"api_key": None}) == default.server
    unset = dict.fromkeys(("served_name", "context_length", "chunked_prefill_tokens", "max_running_requests"))
    assert taken.model.model_copy(update=unset) == default.model
    assert taken.device.inference_cores == (0, 1)
    unset = {"window_tokens": None, "sequence_tokens": None}
    assert taken.training.model_copy(update=unset) == default.training
    assert taken.memory.model_copy(update={"pool_slots": None}) == default.memory
    unset = dict.fromkeys(("tpot_ms", "ttft_ms"))
    assert taken.slo.interactive.model_copy(update=unset) == default.slo.interactive
    assert taken.slo.batch.model_copy(update=unset) == default.slo.batch
    assert (taken.slo.tpot_ms, taken.slo.ttft_ms) == (200.0, 5000.0)
    for section in ("scheduling", "logging"):
        assert getattr(taken, section) == getattr(default, section)


@pytest.mark.parametrize("setting", settings_reference(), ids=lambda setting: setting.variable)
def test_every_setting_can_be_set_by_the_variable_that_the_reference_names(setting, monkeypatch):
    monkeypatch.setenv(setting.variable, setting.example.strip('"'))
    settings = load_settings()
    section = attrgetter(setting.section)(settings) if setting.section else settings
    assert setting.name in section.model_fields_set


# -- where settings come from ------------------------------------------------------------------------------


def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path, monkeypatch):
    assert load_settings().server.port == 8321
    (tmp_path / "harli.toml").write_text('[server]\nport = 1001\nhost = "::1"\nmax_queued_requests = 5\n')
    assert load_settings().server.port == 1001
    monkeypatch.setenv("HARLI_SERVER__PORT", "1002")
    monkeypatch.setenv("HARLI_SERVER__HOST", "::2")
    assert load_settings().server.port == 1002
    settings = load_settings(server={"port": 1003})
    assert (settings.server.port, settings.server.host, settings.server.max_queued_requests) == (
        1003,
        "::2",
        5,
    )


def test_units_and_steps_are_larger_on_a_gpu_unless_they_are_set():
    assert TrainingSettings().sizes(gpu=False) == Sizes(128, 512)
    assert TrainingSettings().sizes(gpu=True) == Sizes(1024, 2048)
    assert TrainingSettings(window_tokens=64).sizes(gpu=True) == Sizes(64, 2048)
    assert ModelSettings().limits(gpu=False) == StepLimits(128, 32)
    assert ModelSettings().limits(gpu=True) == StepLimits(2048, 256)
    assert ModelSettings(max_running_requests=8).limits(gpu=True) == StepLimits(2048, 8)


def test_a_gpu_promises_more_unless_it_is_said_what():
    assert SloSettings().promise(gpu=False) == Promise(250.0, 10_000.0)
    assert SloSettings().promise(gpu=True) == Promise(50.0, 2_000.0)
    assert SloSettings(tpot_ms=40.0).promise(gpu=True) == Promise(40.0, 2_000.0)
    for gpu in (False, True):
        slo = SloSettings()
        kinds = [section.promise(gpu=gpu) for section in (slo.interactive, slo, slo.batch)]
        assert kinds == sorted(kinds, key=lambda promise: promise.tpot_ms)
        assert kinds == sorted(kinds, key=lambda promise: promise.ttft_ms)


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("server.api_key=123456", "123456"),
        ("server.api_key=null", "null"),
        ("server.api_key=true", "true"),
        ("server.api_key=a=b", "a=b"),
        ("server.api_key=", ""),
        (" server.api_key =[[", "[["),
        ('server.api_key="quoted = text"', "quoted = text"),
        ('server.api_key="half', '"half'),
        ("server.api_key=[0, 1]", [0, 1]),
        ('server.api_key={"a": null}', {"a": None}),
    ],
)
def test_what_is_assigned_is_text_unless_it_is_written_as_json(assignment: str, value: object):
    assert assigned([assignment]) == {"server": {"api_key": value}}


def test_assignments_are_read_as_what_each_setting_is():
    assignments = ["server.api_key=123456", "server.port=1", "device.inference_cores=[0, 1]", "server.port=2"]
    assignments += [
        'model.served_name="tiny"',
        'slo.batch.api_keys=["7"]',
        "training.enabled=false",
        "home=here",
    ]
    settings = load_settings(None, **assigned(assignments))
    assert settings.server.api_key is not None
    assert settings.server.api_key.get_secret_value() == "123456"
    assert settings.server.port == 2, "the later one"
    assert settings.device.inference_cores == (0, 1)
    assert settings.model.served_name == "tiny"
    assert [key.get_secret_value() for key in settings.slo.batch.api_keys] == ["7"]
    assert settings.training.enabled is False
    assert settings.home == Path("here").absolute()


def test_home_comes_from_the_environment_or_the_users_data_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert load_settings().home == tmp_path / "data" / "harli"
    monkeypatch.setenv("HARLI_HOME", "relative/home")
    settings = load_settings()
    assert settings.home == tmp_path / "relative" / "home"
    assert settings.database.parent == settings.files.parent == settings.home


def test_a_secret_is_not_shown():
    assert "hunter2" not in repr(load_settings(server={"api_key": "hunter2"}))


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("[server]\nprot = 1\n", r"unknown setting 'server\.prot': did you mean 'server\.port'\?"),
        ("[servre]\nport = 1\n", r"unknown setting 'servre': did you mean 'server'\?"),
        ("zzz = 1\n", r"unknown setting 'zzz': docs/configuration\.md lists"),
        ("[server]\nport = 70000\n", r"setting 'server\.port' is wrong: .*65535 \(got 70000\)"),
        ('[server]\nport = "a"\n', r"setting 'server\.port' is wrong"),
        (
            '[scheduling]\npolicy = "fast"\n',
            r"'scheduling\.policy' is wrong: .*choose one of adaptive, harli, naive, ",
        ),
        ("[slo]\ntpot_ms = nan\n", r"'slo\.tpot_ms' is wrong"),
        ("[server\n", "not valid TOML"),
        ("server = 3\n", "setting 'server' is wrong"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_it(tmp_path: Path, toml, said):
    path = tmp_path / "my.toml"
    path.write_text(toml)
    with pytest.raises(ConfigError, match=said) as error:
        load_settings(path)
    assert error.value.message.startswith(f"{path}: ")
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("HARLI_SERVR__PORT", "unknown setting 'servr.port': did you mean 'server.port'?"),
        (
            "HARLI_SLOS__BATCH__TPOT_MS",
            "unknown setting 'slos.batch.tpot_ms': did you mean 'slo.batch.tpot_ms'?",
        ),
        ("harli_x__y", "unknown setting 'x.y': docs/configuration.md lists the valid ones"),
    ],
)
def test_a_variable_of_no_section_is_refused(monkeypatch: pytest.MonkeyPatch, variable, said):
    monkeypatch.setenv("HARLI_URL", "http://127.0.0.1:1")  # is for commands
    monkeypatch.setenv("OTHER__THING", "1")
    load_settings()
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigError) as error:
        load_settings()
    assert error.value.message == f"{variable} in the environment: {said}"


@pytest.mark.parametrize(
    ("assignments", "said"),
    [
        (["server.port"], "--set 'server.port' sets nothing; write e.g. --set memory.pool_slots=8192"),
        (["=5"], "--set '=5' sets nothing; write e.g. --set memory.pool_slots=8192"),
        (["server.port=1", "server.port.x=2"], "--set 'server.port.x=2': 'port' has a value already"),
        (["server=[]", "server.port=2"], "--set 'server.port=2': 'server' has a value already"),
    ],
)
def test_what_assigns_nothing_is_refused(assignments: list[str], said: str):
    with pytest.raises(ConfigError) as error:
        assigned(assignments)
    assert error.value.message == said


def test_a_file_that_is_named_must_exist(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file"):
        load_settings(tmp_path / "none.toml")


def test_settings_load_without_torch_and_cannot_be_changed():
    code = "import sys, harli_appliance.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    with pytest.raises(ValueError, match="frozen"):
        Settings().server.port = 1


def test_a_lane_whose_cores_are_not_said_has_the_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert cpu_partition() == Partition((0, 1), (2, 3))
    assert cpu_partition(inference=[2, 3]) == Partition((2, 3), (0, 1))
    assert cpu_partition(training=[0]) == Partition((1, 2, 3), (0,))
    assert cpu_partition(inference=[0, 1, 2, 3]) == Partition((0, 1, 2, 3), (0, 1, 2, 3))
    assert cpu_partition([0], [3]) == Partition((0,), (3,))
