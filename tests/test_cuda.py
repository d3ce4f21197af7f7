"""SM partitions and the lanes' streams, against a fake driver. Nothing here has run on a GPU."""

from __future__ import annotations

import threading
import time

import pytest

from harli_appliance.device.cuda import CudaLanes, CudaPartitions, LaneStream
from harli_appliance.device.driver import CudaDriver, Sms
from harli_appliance.device.sizes import MOST_SPLITS, split_sizes
from harli_appliance.engine.lanes import Lane
from harli_appliance.errors import PartitionsUnavailable
from harli_appliance.scheduling.names import without_partitions
from harli_appliance.scheduling.types import Decision
from harli_appliance.schema import Mode
from tests.fake_cuda import FakeBindings, FakeCuda, FakeStream


def partitions(api: FakeBindings) -> CudaPartitions:
    return CudaPartitions(CudaDriver(api=api), lambda address: FakeStream(str(address)))


# -- sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "least", "multiple"), [(132, 8, 8), (114, 8, 8), (108, 4, 2), (148, 8, 8)])
def test_sizes_are_what_the_driver_can_make(count: int, least: int, multiple: int) -> None:
    sizes = split_sizes(Sms(None, count, least, multiple))
    assert len(sizes) == MOST_SPLITS
    assert list(sizes) == sorted(set(sizes))
    for size in sizes:
        assert size % multiple == 0
        assert min(size, count - size) >= max(least, count // 8)


def test_small_devices_have_few_splits_or_none() -> None:
    assert split_sizes(Sms(None, 24, 8, 8)) == (8, 16)
    assert split_sizes(Sms(None, 16, 8, 8)) == (8,)
    assert split_sizes(Sms(None, 15, 8, 8)) == ()


# -- partitions --------------------------------------------------------------------------------------


def test_a_split_is_two_disjoint_halves_of_one_split() -> None:
    api = FakeBindings()
    made = partitions(api)
    assert [split.name for split in made.splits] == [
        "16+116", "32+100", "48+84", "64+68", "80+52", "96+36", "112+20"
    ]  # fmt: skip
    for split in made.splits:
        mine, theirs = (api.streams[int(stream.name)] for stream in made.streams(split))
        assert mine.split == theirs.split, "parts of two splits overlap"
        assert not mine.sms & theirs.sms
        assert mine.sms | theirs.sms == api.total
        assert len(mine.sms) % 8 == 0
        assert split.inference == len(mine.sms) / 132
        assert split.inference + split.training == pytest.approx(1)
    assert made.even.name == "64+68"


def test_two_splits_of_the_device_would_overlap() -> None:
    """Why a pair must come from one: the driver hands out the same SMs again."""
    driver = CudaDriver(api=FakeBindings())
    device = driver.device()
    first, second = driver.split(device, 64)[0], driver.split(device, 64)[0]
    assert first.handle.sms & second.handle.sms


@pytest.mark.parametrize("rubbish", [0, 1000])
def test_drivers_that_do_not_say_how_they_split_are_known_by_capability(rubbish: int) -> None:
    hopper = CudaDriver(api=FakeBindings(tells=rubbish)).device()
    assert (hopper.least, hopper.multiple) == (8, 8)
    ampere = CudaDriver(api=FakeBindings(108, major=8, tells=rubbish)).device()
    assert (ampere.least, ampere.multiple) == (4, 2)


def test_closing_destroys_streams_before_contexts_and_each_once() -> None:
    api = FakeBindings()
    made = partitions(api)
    assert len(api.living) == 2 * MOST_SPLITS
    made.close()
    assert not api.living
    made.close()
    assert api.calls.count("cuGreenCtxDestroy") == 2 * MOST_SPLITS


@pytest.mark.parametrize("call", ["cuGreenCtxCreate", "cuGreenCtxGetDevResource", "cuGreenCtxStreamCreate"])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_size_that_cannot_be_made_leaves_nothing_behind(call: str, after: int) -> None:
    api = FakeBindings()
    api.fails[call] = after
    if after < 2:
        with pytest.raises(
            PartitionsUnavailable, match=rf"{call} \(CUDA_ERROR_NOT_SUPPORTED\).*time slicing"
        ):
            partitions(api)
        assert not api.living
        return
    made = partitions(api)
    assert [split.name for split in made.splits] == ["16+116"]
    assert len(api.living) == 2
    made.close()
    assert not api.living


def test_a_device_too_small_to_split_says_so() -> None:
    with pytest.raises(PartitionsUnavailable, match="12 SMs are too few"):
        partitions(FakeBindings(12))


def test_an_old_driver_or_library_is_told_in_one_line() -> None:
    api = FakeBindings()
    api.fails["cuInit"] = 0
    with pytest.raises(PartitionsUnavailable, match="refuses cuInit"):
        CudaDriver(api=api)

    class Old:
        def cuInit(self, flags: int) -> tuple[int]:
            raise RuntimeError("Failed to dlopen libcuda.so.1")

    with pytest.raises(PartitionsUnavailable, match=r"libcuda\.so\.1.*time slicing"):
        CudaDriver(api=Old())
    with pytest.raises(PartitionsUnavailable, match=r"install 13\.0 or newer"):
        CudaDriver(api=object())


# -- streams -----------------------------------------------------------------------------------------


def test_work_runs_on_the_stream_in_force_and_is_over_when_left() -> None:
    cuda = FakeCuda()
    first, second = FakeStream("first"), FakeStream("second")
    lane = LaneStream(first, cuda=cuda)
    with lane.around():
        lane.use(second)  # for the next piece
        assert cuda.current is first
    with lane.around():
        assert cuda.current is second
    assert [event.stream for event in cuda.events] == [first, second]
    assert second.waited == []


def test_a_lane_that_waits_sleeps_until_its_work_is_done() -> None:
    cuda = FakeCuda(at_once=False)
    lane = LaneStream(FakeStream(), cuda=cuda)
    left = threading.Event()

    def work() -> None:
        with lane.around():
            pass
        left.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert not left.wait(0.05)
    cuda.events[0].done.set()
    assert left.wait(10)
    thread.join()


def test_one_ahead_waits_for_the_piece_before() -> None:
    cuda = FakeCuda(at_once=False)
    stream = FakeStream()
    lane = LaneStream(stream, ahead=1, cuda=cuda)
    with lane.around():
        pass  # left though its event is not done
    cuda.events[0].done.set()
    with lane.around():
        pass
    assert not cuda.events[1].done.is_set()
    cuda.events[1].done.set()
    lane.drain()


def test_drain_waits_for_what_is_ahead() -> None:
    cuda = FakeCuda(at_once=False)
    lane = LaneStream(FakeStream(), ahead=1, cuda=cuda)
    with lane.around():
        pass
    drained = threading.Event()
    thread = threading.Thread(target=lambda: (lane.drain(), drained.set()))
    thread.start()
    assert not drained.wait(0.05)
    cuda.events[0].done.set()
    assert drained.wait(10)
    thread.join()


def test_a_lane_is_busy_for_as_long_as_the_device_works_on_what_it_launched() -> None:
    cuda = FakeCuda(at_once=False)
    stream = LaneStream(FakeStream(), ahead=1, cuda=cuda)
    lane = Lane("training", around=stream.around, finish=stream.drain, works_on=stream.works)
    lane.submit(int).result()
    launched = lane.busy_s()
    time.sleep(0.05)  # the thread has nothing to do
    busy = lane.busy_s()
    assert busy >= launched + 0.05
    cuda.events[0].done.set()
    time.sleep(0.05)
    assert lane.busy_s() == busy
    lane.submit(int).result()
    cuda.events[1].done.set()
    assert lane.busy_s() < busy + 0.05, "it was idle in between"
    lane.close()


def test_pieces_keep_their_order_across_streams() -> None:
    cuda = FakeCuda()
    first, second = FakeStream("first"), FakeStream("second")
    lane = LaneStream(first, ahead=1, cuda=cuda)
    with lane.around():
        pass
    lane.use(second)
    with lane.around():
        pass
    assert second.waited == [cuda.events[0]]


def test_work_that_fails_is_waited_for() -> None:
    """Its tensors are freed as the error goes up, so nothing may still be using them."""
    cuda = FakeCuda()
    lane = LaneStream(FakeStream(), ahead=1, cuda=cuda)
    with pytest.raises(ValueError, match="broken"), lane.around():
        raise ValueError("broken")
    lane.drain()
    assert [event.done.is_set() for event in cuda.events] == [True]


# -- lanes -------------------------------------------------------------------------------------------


def decided(mode: Mode, **more: object) -> Decision:
    return Decision(mode, "because", units=1, **more)  # type: ignore[arg-type]


def where(lanes: CudaLanes, cuda: FakeCuda) -> tuple[str, str]:
    """Names of the streams that both lanes launch on."""
    names = []
    for lane in (lanes.inference, lanes.training):
        with lane.around():
            assert cuda.current is not None
            names.append(cuda.current.name)
    return names[0], names[1]


def test_lanes_go_where_the_decision_puts_them() -> None:
    cuda, api = FakeCuda(), FakeBindings()
    made = partitions(api)
    lanes = CudaLanes(made, cuda)
    assert lanes.splits == made.splits
    assert lanes.inference_streams == [made.streams(split)[0] for split in made.splits]
    for split in made.splits:
        lanes.arrange(decided("partition", split=split))
        assert where(lanes, cuda) == tuple(stream.name for stream in made.streams(split))
    lanes.arrange(decided("partition"))
    assert where(lanes, cuda) == tuple(stream.name for stream in made.streams(made.even))
    assert lanes.split == made.even
    modes: tuple[Mode, ...] = ("pause", "time_slice", "training", "idle")
    for mode in modes:
        lanes.arrange(decided(mode))
        assert where(lanes, cuda) == ("whole", "whole")
        assert lanes.split is None
    lanes.close()
    assert not api.living


def test_training_can_be_put_on_every_stream_that_it_may_run_on() -> None:
    cuda, made = FakeCuda(), partitions(FakeBindings())
    lanes = CudaLanes(made, cuda)
    seen = {split: where(lanes, cuda)[1] for split in lanes.training_places()}
    assert seen == {None: "whole"} | {split: made.streams(split)[1].name for split in made.splits}
    assert where(lanes, cuda) == ("whole", "whole")
    assert list(CudaLanes(None, cuda).training_places()) == [None]


@pytest.mark.parametrize(
    ("asked", "followed"),
    [
        ("adaptive", "time_slice"),
        ("naive", "time_slice"),
        ("time_slice", "time_slice"),
        ("time_slice:64", "time_slice:64"),
        ("serve_only", "serve_only"),
        ("train_only", "train_only"),
    ],
)
def test_policies_that_need_partitions_give_way_to_taking_turns(asked: str, followed: str) -> None:
    assert without_partitions(asked) == followed


def test_without_partitions_both_lanes_have_the_whole_device() -> None:
    cuda = FakeCuda()
    lanes = CudaLanes(None, cuda)
    assert lanes.splits == ()
    lanes.arrange(decided("partition"))
    assert where(lanes, cuda) == ("whole", "whole")
    lanes.close()
