"""What is said about the device, its driver and the model's memory: by `harli doctor`, and when serving starts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from harli_appliance.cli import checks
from harli_appliance.cli.checks_device import (
    check_gpu,
    check_kernels,
    check_model_memory,
    check_partitions,
    device_checks,
    judge_memory,
)
from harli_appliance.config import load_settings
from harli_appliance.device.choose import choose_gpu, torch_cuda
from harli_appliance.device.driver import Sms
from harli_appliance.device.gpu import Gpu, find_gpu, partition_obstacle, serving_obstacle
from harli_appliance.errors import ConfigError, HarliError, PartitionsUnavailable
from harli_appliance.models.size import ModelSize, fitting_slots, model_size, suitable_slots
from tests.fake_nvml import FakeNvml

H100 = Gpu("NVIDIA H100 80GB HBM3", "580.65.06", (13, 0), (9, 0), 80 << 30, 79 << 30)
TURING = Gpu("Tesla T4", "580.65.06", (13, 0), (7, 5), 15 << 30, 14 << 30)
OLD_DRIVER = Gpu("NVIDIA H100 80GB HBM3", "535.183.01", (12, 2), (9, 0), 80 << 30, 79 << 30)


# -- finding it --------------------------------------------------------------------------------------


def test_a_gpu_is_described_from_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = FakeNvml()
    assert find_gpu(nvml) == H100
    assert nvml.open == 0


@pytest.mark.parametrize(("visible", "asked"), [("3,1", 3), ("GPU-1234", "GPU-1234"), ("0", 0)])
def test_the_gpu_is_the_one_that_torch_sees(
    visible: str, asked: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNvml()
    find_gpu(nvml)
    assert nvml.asked == asked


def test_no_driver_and_hidden_gpus_are_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_gpu(FakeNvml(init="NVMLError_LibraryNotFound")) is None
    for hidden in ("", "-1", "none"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert find_gpu(FakeNvml()) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_gpu(FakeNvml()) is None


@pytest.mark.parametrize("fault", [{"init": "NVMLError_DriverNotLoaded"}, {"lacks": "nvmlDeviceGetName"}])
def test_a_driver_that_does_not_work_is_an_error_in_one_line(
    fault: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError, match=r"device\.kind = 'cpu'") as raised:
        find_gpu(FakeNvml(**fault))
    assert "\n" not in raised.value.message


# -- judging it --------------------------------------------------------------------------------------


def test_a_hopper_gpu_with_a_current_driver_has_no_obstacle() -> None:
    assert serving_obstacle(H100, (13, 0)) is None
    assert partition_obstacle(H100) is None


def test_obstacles_name_the_cause_and_what_works() -> None:
    assert "compute capability 7.5" in (serving_obstacle(TURING, (13, 0)) or "")
    assert "driver 580 or newer" in (serving_obstacle(OLD_DRIVER, (13, 0)) or "")
    assert serving_obstacle(OLD_DRIVER, (12, 8)) is None  # minor versions are compatible
    assert "without CUDA" in (serving_obstacle(H100, None) or "")
    why = partition_obstacle(OLD_DRIVER) or ""
    assert "driver 550" in why
    assert "time slicing needs no partitions" in why


def test_torch_tells_what_it_is_built_for(tmp_path: Path) -> None:
    init = tmp_path / "__init__.py"
    assert torch_cuda(init) is None
    version = tmp_path / "version.py"
    version.write_text("debug = False\ncuda: Optional[str] = '13.0'\n")
    assert torch_cuda(init) == (13, 0)
    version.write_text("debug = False\ncuda: Optional[str] = None\n")
    assert torch_cuda(init) is None


def test_serving_takes_the_gpu_only_when_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Gpu | None:
        raise ConfigError("the driver does not work")

    monkeypatch.setattr("harli_appliance.device.choose.torch_cuda", lambda: (13, 0))
    assert choose_gpu("auto", lambda: H100) is H100
    assert choose_gpu("cpu", broken) is None
    for find in (lambda: None, lambda: TURING, broken):
        assert choose_gpu("auto", find) is None
        with pytest.raises(ConfigError):
            choose_gpu("cuda", find)


# -- what doctor says --------------------------------------------------------------------------------


class FakeSms:
    """As much of a driver as doctor asks."""

    def __init__(self, sms: Sms | HarliError) -> None:
        self._sms = sms

    def device(self) -> Sms:
        if isinstance(self._sms, HarliError):
            raise self._sms
        return self._sms


def partitions(gpu: Gpu, sms: Sms | HarliError) -> Any:
    return check_partitions(gpu, lambda: FakeSms(sms))  # type: ignore[arg-type,return-value]


def test_partitions_are_listed_with_their_sizes() -> None:
    check = partitions(H100, Sms(None, 132, 8, 8))
    assert check.level == "ok"
    assert check.found.startswith("132 SMs in steps of 8: 16+116, 32+100")


def test_without_partitions_time_slicing_is_named() -> None:
    refused = PartitionsUnavailable("the CUDA driver refuses cuInit; time slicing needs no partitions")
    for check in (
        partitions(OLD_DRIVER, Sms(None, 132, 8, 8)),
        partitions(H100, refused),
        partitions(H100, Sms(None, 8, 8, 8)),
    ):
        assert check.level == "warn"
        assert "turns" in check.advice or "time slicing" in check.advice


def test_gpu_levels() -> None:
    assert check_gpu(None, None, wanted=False).level == "ok"
    assert check_gpu(None, None, wanted=True).level == "fail"
    assert check_gpu(H100, (13, 0), wanted=True).level == "ok"
    check = check_gpu(TURING, (13, 0), wanted=False)
    assert check.level == "fail"
    assert "use a newer GPU" in check.advice


def test_missing_kernels_are_told_by_name() -> None:
    from importlib.metadata import PackageNotFoundError

    def none(name: str) -> str:
        raise PackageNotFoundError(name)

    assert [(check.name, check.level) for check in check_kernels(none)] == [
        ("sglang-kernel", "fail"),
        ("flashinfer-python", "warn"),
        ("liger-kernel", "warn"),
    ]
    assert {check.level for check in check_kernels(lambda name: "1.0")} == {"ok"}


def test_a_broken_driver_does_not_end_the_checks(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    def broken() -> Gpu | None:
        raise ConfigError("the NVIDIA driver does not work")

    monkeypatch.setattr("harli_appliance.cli.checks_device.find_gpu", broken)
    found = {
        check.name: check.level for check in device_checks(load_settings(model={"path": str(tiny_model)}))
    }
    assert found == {"gpu": "fail", "model": "ok"}


def test_internals_say_the_last_line_of_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: no libcudart\n")

    monkeypatch.setattr(subprocess, "run", run)
    check = checks._internals()
    assert (check.level, check.found) == ("fail", "ImportError: no libcudart")


# -- memory ------------------------------------------------------------------------------------------

LLAMA_8B = ModelSize(parameters=8_030_000_000, kv_per_slot=2 * 32 * 8 * 128)


def test_size_is_read_from_headers(tiny_model: Path, reference: Any) -> None:
    size = model_size(tiny_model)
    assert size is not None
    assert size.parameters == sum(p.numel() for p in reference.parameters())
    assert size.kv_per_slot == 2 * 4 * 2 * 16


def test_bytes_and_slots_agree() -> None:
    assert LLAMA_8B.bytes(1, 2) - LLAMA_8B.bytes(0, 2) == 128 << 10  # 128 KiB a token in bfloat16
    fitting = LLAMA_8B.slots_in(40 << 30, 2)
    assert LLAMA_8B.bytes(fitting, 2) <= 40 << 30 < LLAMA_8B.bytes(fitting + 1, 2)
    assert LLAMA_8B.slots_in(10 << 30, 2) == 0


def test_a_gpu_s_memory_is_used_where_no_slots_are_set() -> None:
    assert suitable_slots(LLAMA_8B, 79 << 30, gpu=False) == 16_384
    assert suitable_slots(None, 79 << 30, gpu=True) == 16_384
    slots = suitable_slots(LLAMA_8B, 79 << 30, gpu=True)
    assert LLAMA_8B.bytes(slots, 2) == pytest.approx(0.8 * (79 << 30), rel=1e-4)
    assert suitable_slots(LLAMA_8B, 10 << 30, gpu=True) == 256, "too few to fit, which is refused then"
    assert suitable_slots(ModelSize(10_000, 64), 79 << 30, gpu=True) == 1 << 20


def test_memory_levels_and_advice() -> None:
    def judge(slots: int, free: int) -> Any:
        return judge_memory("llama", LLAMA_8B, slots, 2, free, "H100")

    assert judge(16_384, 79 << 30).level == "ok"
    tight = judge(16_384, 20 << 30)
    assert tight.level == "warn"
    assert "memory.pool_slots = " in tight.advice
    assert judge(400_000, 40 << 30).level == "fail"
    assert "choose a smaller model" in judge(16_384, 8 << 30).advice


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tiny_model: Path) -> None:
    assert fitting_slots(tiny_model, 4096, 1 << 30, "this machine", gpu=False) == 4096
    with pytest.raises(ConfigError, match="weights alone are too large"):
        fitting_slots(tiny_model, 4096, 1 << 10, "this machine", gpu=False)


def test_a_damaged_weights_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    check = check_model_memory(load_settings(model={"path": str(tmp_path)}), None)
    assert check.level == "fail"
    assert "not a safetensors file" in check.found


def test_a_model_that_is_not_there_yet_is_not_fetched(tmp_path: Path) -> None:
    check = check_model_memory(load_settings(home=tmp_path), None)
    assert (check.level, list(tmp_path.iterdir())) == ("ok", [])
