"""Checkpoints: whole or absent, and never trusted when a byte is wrong."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from harli_appliance.errors import ApplianceUnavailable
from harli_appliance.training import checkpoints
from harli_appliance.training.checkpoints import Progress


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 4), value), "step": torch.tensor(value)}


def test_the_newest_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoints.save(tmp_path, Progress(step, step * 5, 0.5), tensors(float(step)), keep=2)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-000020", "step-000030"]
    found = checkpoints.load_newest(tmp_path)
    assert found is not None
    progress, state = found
    assert progress == Progress(30, 150, 0.5)
    assert torch.equal(state["a"], torch.full((3, 4), 30.0))


def test_the_newest_is_that_of_the_highest_number(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        checkpoints.save(tmp_path, Progress(step, step, 0.5), tensors(1.0), keep=1)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-1000000"]


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80])
def test_any_flipped_byte_is_refused_and_the_one_before_is_used(tmp_path: Path, name: str, flip: int) -> None:
    checkpoints.save(tmp_path, Progress(1, 1, None), tensors(1.0), keep=2)
    newest = checkpoints.save(tmp_path, Progress(2, 2, 0.25), tensors(2.0), keep=2) / name
    whole = newest.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= flip
        newest.write_bytes(damaged)
        found = checkpoints.load_newest(tmp_path)
        assert found is not None
        assert found[0].step == 1, f"byte {position}"
    newest.write_bytes(whole)
    found = checkpoints.load_newest(tmp_path)
    assert found is not None
    assert found[0] == Progress(2, 2, 0.25)


@pytest.mark.parametrize("name", ["state.safetensors", "manifest.json"])
def test_a_file_that_is_cut_off_or_gone_is_refused(tmp_path: Path, name: str) -> None:
    checkpoints.save(tmp_path, Progress(1, 1, None), tensors(1.0), keep=2)
    newest = checkpoints.save(tmp_path, Progress(2, 2, 0.25), tensors(2.0), keep=2) / name
    whole = newest.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        newest.write_bytes(whole[:length])
        found = checkpoints.load_newest(tmp_path)
        assert found is not None
        assert found[0].step == 1
    newest.unlink()
    found = checkpoints.load_newest(tmp_path)
    assert found is not None
    assert found[0].step == 1


def test_a_half_written_one_is_never_seen(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "state.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(ApplianceUnavailable, match="disk full; make room") as error:
        checkpoints.write_atomically(tmp_path / "step-000001", fail)
    assert error.value.code == "storage_unavailable"
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_the_disk_refuses_are_no_fault_of_the_job(tmp_path: Path) -> None:
    """safetensors has an exception of its own for what is an OSError."""
    checkpoints.save(tmp_path, Progress(1, 1, None), tensors(1.0), keep=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(ApplianceUnavailable, match="cannot be written") as error:
            checkpoints.save(tmp_path, Progress(2, 2, None), {"a": torch.zeros(1 << 20)}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(error.value.__cause__, SafetensorError)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-000001"]


def test_none_is_none(tmp_path: Path) -> None:
    assert checkpoints.load_newest(tmp_path / "never") is None


def test_checkpoints_of_ended_jobs_are_swept(tmp_path: Path) -> None:
    for job in ("ftjob-ended", "ftjob-going-or-unknown"):
        checkpoints.save(tmp_path / job, Progress(1, 2, 3.0), tensors(1.0), keep=1)
    checkpoints.sweep(tmp_path, {"ftjob-ended", "ftjob-other"})
    assert [path.name for path in tmp_path.iterdir()] == ["ftjob-going-or-unknown"]
    checkpoints.sweep(tmp_path / "nowhere", set())


@pytest.mark.parametrize("keep", [1, 2])
def test_after_damage_the_steps_that_are_made_again_are_kept(tmp_path: Path, keep: int) -> None:
    home = tmp_path / "job"
    for step in (190, 200):
        checkpoints.save(home, Progress(step, 0, None), tensors(1.0), keep)
    for folder in home.glob("step-*"):
        (folder / "state.safetensors").write_bytes(b"damaged")
    assert checkpoints.load_newest(home) is None
    for step in (10, 20):
        checkpoints.save(home, Progress(step, 0, None), tensors(1.0), keep)
        found = checkpoints.load_newest(home)
        assert found is not None
        assert found[0].step == step


def test_one_that_cannot_be_read_now_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    checkpoints.save(tmp_path / "job", Progress(3, 0, None), tensors(1.0), 2)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ApplianceUnavailable, match="Too many open files"):
        checkpoints.load_newest(tmp_path / "job")
