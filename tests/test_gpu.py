"""What only a GPU can show: `pytest -m gpu`. Skipped without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from harli_appliance.bench.device_rig import CudaRig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]


@pytest.fixture(scope="module")
def rig() -> Iterator[CudaRig]:
    made = CudaRig()
    yield made
    made.close()


def test_both_sides_of_a_split_run_on_different_sms(rig: CudaRig) -> None:
    from harli_appliance.bench.device_gpu import Facts
    from harli_appliance.bench.device_sharing import Sharing, Sizes

    if rig.refusal is not None:
        pytest.skip(rig.refusal)
    found = Facts(rig, Sharing(rig, Sizes(1 << 20, (64, 64, 64), 2))).overlap()
    for way in rig.ways:
        inference, training = map(int, way.name.split("+"))
        assert found[way.name] == {"inference": inference, "training": training, "both": 0}


def test_units_ask_the_driver_for_no_memory_once_they_have_run(rig: CudaRig) -> None:
    from harli_appliance.bench.device_finetune import Finetuning
    from harli_appliance.bench.device_model import DeviceModel
    from harli_appliance.bench.device_shapes import SHAPES

    model = DeviceModel(rig, SHAPES["tiny"])
    for place in [rig.whole, *(way.training for way in rig.ways)]:
        work = Finetuning(rig, model, SHAPES["tiny"], place)
        assert work.measure(matmul_rate=1e12)["device_allocations"] == 0, place.name
        work.close()


def test_the_state_of_a_new_adapter_takes_no_memory_of_the_device(rig: CudaRig) -> None:
    from harli_appliance.bench.device_model import DeviceModel
    from harli_appliance.bench.device_shapes import SHAPES
    from harli_appliance.training.adapter import Adapter
    from harli_appliance.training.adapter_state import AdapterState

    backbone = DeviceModel(rig, SHAPES["tiny"]).backbone
    before = torch.cuda.memory_allocated()
    adapter = Adapter(backbone, rank=16, alpha=16, seed=0)
    layers = [adapter.parameters(layer) for layer in range(len(backbone.layers))]
    rows = torch.zeros(16, backbone.kv_width)
    state = AdapterState(layers, torch.optim.AdamW(adapter.parameters()), [rows])
    assert {tensor.device.type for tensor in state.tensors().values()} == {"cpu"}
    assert torch.cuda.memory_allocated() == before
    adapter.detach()


def test_a_lane_runs_one_piece_ahead_and_drains(rig: CudaRig) -> None:
    from harli_appliance.device.cuda import LaneStream

    lane = LaneStream(rig.whole.where, ahead=1)
    data = torch.zeros(1 << 20, device=rig.device)
    torch.cuda.synchronize()
    for _ in range(50):
        with lane.around():
            data.add_(1)
    lane.drain()
    assert rig.whole.where.query()
    assert data.min() == 50


def test_every_fused_kernel_works_and_gives_the_same_gradients(rig: CudaRig) -> None:
    from harli_appliance.bench.device_finetune import Finetuning
    from harli_appliance.bench.device_model import DeviceModel
    from harli_appliance.bench.device_shapes import SHAPES

    model = DeviceModel(rig, SHAPES["tiny"])

    def gradients() -> list[torch.Tensor]:
        work = Finetuning(rig, model, SHAPES["tiny"], rig.whole)
        work.train()
        work.close()
        torch.cuda.synchronize()
        return [gradient for layer in work.gradients for gradient in layer]

    plain = gradients()
    assert model.fuse() == ("norms", "cross_entropy", "attention")
    for found, wanted in zip(gradients(), plain, strict=True):
        assert (found - wanted).norm() <= 0.05 * wanted.norm()
