"""``harli bench device``: what this device can do and how two lanes share it; prints tables, writes device.json.

On a GPU all sections; on a CPU those that do not need one, with the lanes' cores in the place of SM partitions.
Runs as ``python -m harli_appliance.bench.device``, because the command line itself loads no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from harli_appliance.runtime import cpu_stand_ins

cpu_stand_ins.install()  # transformers, too, trips over a torchvision whose operators cannot load

from harli_appliance import __version__  # noqa: E402
from harli_appliance.bench.device_finetune import Finetuning  # noqa: E402
from harli_appliance.bench.device_model import DeviceModel  # noqa: E402
from harli_appliance.bench.device_rig import CpuRig, CudaRig, Place, Rig  # noqa: E402
from harli_appliance.bench.device_shapes import SHAPES  # noqa: E402
from harli_appliance.bench.device_sharing import CPU_SIZES, GPU_SIZES, Sharing  # noqa: E402
from harli_appliance.bench.machine import describe_machine  # noqa: E402
from harli_appliance.bench.sections import Section, run_sections  # noqa: E402
from harli_appliance.device.choose import choose_gpu  # noqa: E402
from harli_appliance.device.gpu import Gpu  # noqa: E402
from harli_appliance.device.partition import cpu_partition  # noqa: E402
from harli_appliance.errors import HarliError, UsageError  # noqa: E402


def run(out: Path, as_json: bool, shapes: str | None, only: list[str], budget_s: float) -> int:
    """Measure, print, and write ``device.json`` into `out`.

    Args:
        shapes: a name of `SHAPES`; Llama-3-8B's on a GPU and SmolLM2's on a CPU when None.
        only: names of sections; all when empty.

    Returns:
        The exit code: 1 when a section failed.

    Raises:
        UsageError: there are no such shapes, or no such section on this device.
    """
    gpu = choose_gpu("auto")
    shapes = shapes or ("smollm2-135m" if gpu is None else "llama-3-8b")
    if shapes not in SHAPES:
        raise UsageError(f"no shapes {shapes!r}; there are {', '.join(SHAPES)}", param="shapes")
    rig: Rig = CpuRig(cpu_partition()) if gpu is None else CudaRig()
    try:
        sections = _sections(rig, gpu, shapes)
        if unknown := sorted(set(only) - set(sections)):
            raise UsageError(
                f"no section {unknown[0]!r} on this device; there are {', '.join(sections)}", param="only"
            )
        chosen = {name: measure for name, measure in sections.items() if not only or name in only}
        header = {"version": __version__, "machine": describe_machine(), "shapes": shapes}
        report = run_sections(chosen, out / "device.json", header, budget_s=budget_s)
    finally:
        rig.close()
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        for table in _tables(report):
            Console(width=None if sys.stdout.isatty() else 160).print(table)
    return int(any(not section["ok"] for section in report["sections"].values()))


def _sections(rig: Rig, gpu: Gpu | None, shapes: str) -> dict[str, Section]:
    sharing = Sharing(rig, CPU_SIZES if gpu is None else GPU_SIZES)
    model: list[DeviceModel] = []

    def loaded() -> DeviceModel:
        """Made when first needed: an 8B model takes a while, and its failing must not end the other sections."""
        if not model:
            model.append(DeviceModel(rig, SHAPES[shapes]))
        return model[0]

    def decode() -> dict[str, Any]:
        found = loaded()
        return {place.name: found.decode(place, sharing.bandwidth(place)) for place in _serving_places(rig)}

    def finetuned(places: Sequence[Place]) -> dict[str, Any]:
        found = {}
        for place in places:
            work = Finetuning(rig, loaded(), SHAPES[shapes], place)
            try:
                found[place.name] = work.measure(sharing.matmul_rate(place))
            finally:
                work.close()
        return found

    def finetune() -> dict[str, Any]:
        places = _training_places(rig)
        if gpu is None:
            return finetuned(places)
        fused = ", ".join(loaded().fuse()) or "none"
        return {place: {**row, "fused": fused} for place, row in finetuned(places).items()}

    sections: dict[str, Section] = {"device": lambda: _device(rig, gpu)}
    if isinstance(rig, CudaRig):
        from harli_appliance.bench.device_gpu import Facts

        facts = Facts(rig, sharing)
        sections |= {
            "overlap": facts.overlap,
            "graphs": facts.graphs,
            "graph_matmul": facts.graph_matmul,
            "switching": facts.switching,
            "triton": facts.triton,
        }
    sections |= {"solo": sharing.solo, "corun": sharing.corun, "decode": decode}
    if gpu is not None:  # before `finetune`, which puts fused kernels into the model
        sections["finetune_unfused"] = lambda: finetuned([rig.whole])
    return sections | {"finetune": finetune}


def _device(rig: Rig, gpu: Gpu | None) -> dict[str, Any]:
    """What the device says of itself; on a GPU also what was asked of the driver and refused."""
    found: dict[str, Any] = {"ways": [way.name for way in rig.ways], "dtype": str(rig.dtype)}
    if gpu is not None:
        found |= {"gpu": asdict(gpu), "torch_cuda": torch.version.cuda}
    if isinstance(rig, CudaRig):
        found["partitions_refused"] = rig.refusal
    return found


def _serving_places(rig: Rig) -> list[Place]:
    return list(dict.fromkeys([rig.whole, *(way.inference for way in rig.ways)]))


def _training_places(rig: Rig) -> list[Place]:
    """The whole device, and the largest and smallest training side: units are timed for minutes at each."""
    ways = [rig.ways[0], rig.ways[-1]] if rig.ways else []
    return list(dict.fromkeys([rig.whole, *(way.training for way in ways)]))


def _tables(report: dict[str, Any]) -> list[Table]:
    """A table for each section: a row for each of its entries."""
    tables = []
    for name, section in report["sections"].items():
        title = f"{name} ({section['seconds']} s)"
        if not section["ok"]:
            table = Table(title=title, title_justify="left")
            table.add_column("failed")
            table.add_row(section["error"])
        else:
            table = _table(title, section["data"])
        tables.append(table)
    return tables


def _table(title: str, data: dict[str, Any]) -> Table:
    rows = {key: value if isinstance(value, dict) else {"": value} for key, value in data.items()}
    flat = {key: _flat(value) for key, value in rows.items()}
    columns = list(dict.fromkeys(column for row in flat.values() for column in row))
    table = Table("", *columns, title=title, title_justify="left")
    for key, row in flat.items():
        table.add_row(key, *(str(row.get(column, "")) for column in columns))
    return table


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a b": 1}."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        found |= _flat(value, f"{prefix}{key} ") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="harli bench device", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--budget", type=float, required=True)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        return run(options.out, options.json, options.shapes, options.only, options.budget)
    except HarliError as error:
        print(f"harli: {error.message}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
