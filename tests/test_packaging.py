"""What ships beside the code, migrations/ and themes/, is found from a wheel and from a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harli_appliance import assets
from harli_appliance.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]

SHOW = """
import sys
sys.path.insert(0, sys.argv[1])
import harli_appliance
from harli_appliance.assets import migrations_folder, themes_folder
print(harli_appliance.__file__, migrations_folder(), themes_folder(), sep="\\n")
"""


def folders_seen_from(installation: Path, cwd: Path) -> list[Path]:
    """Package file, migrations and themes as a process sees them that imports from `installation`."""
    # -P keeps the checkout out of the way; packages that the code needs come from this environment.
    shown = subprocess.run(
        [sys.executable, "-P", "-c", SHOW, str(installation)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
    )
    return [Path(line) for line in shown.stdout.splitlines()]


def names(folder: Path) -> list[str]:
    """The files that ship, not what running them left."""
    return sorted(path.name for path in folder.iterdir() if path.is_file())


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, installed without dependencies into a folder of its own."""
    work = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = work.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(work / "site"), str(wheel)], check=True, capture_output=True)
    return work / "site"


def test_a_wheel_carries_its_folders(installed: Path, tmp_path: Path):
    package, migrations, themes = folders_seen_from(installed, tmp_path)
    assert package.is_relative_to(installed)
    assert migrations == package.parent / "_assets" / "migrations"
    assert themes == package.parent / "_assets" / "themes"
    assert names(migrations) == names(ROOT / "migrations") != []
    assert names(themes) == names(ROOT / "themes") != []


def test_a_checkout_has_its_folders_beside_the_package(tmp_path: Path):
    package, migrations, themes = folders_seen_from(ROOT, tmp_path)
    assert package == ROOT / "harli_appliance" / "__init__.py"
    assert (migrations, themes) == (ROOT / "migrations", ROOT / "themes")


def test_an_installation_without_them_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(assets, "_PACKAGE", tmp_path)
    with pytest.raises(ConfigError, match=r"'themes' is missing .* install harli-appliance again"):
        assets.themes_folder()


def test_requirements_are_pinned_and_name_each_package_once():
    seen: set[str] = set()
    for name in ("cpu.txt", "dev.txt"):
        for line in (ROOT / "requirements" / name).read_text().splitlines():
            if line and not line.startswith("#"):
                package, version = line.split("==")
                assert version
                assert package.lower() not in seen
                seen.add(package.lower())
    assert "torch" not in seen  # installed first, by requirements/install.sh


@pytest.mark.parametrize("failing", ["", "ruff", "mypy", "lint-imports", "pytest"])
def test_make_test_runs_every_check_and_fails_when_one_does(tmp_path: Path, failing: str):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("ruff", "mypy", "lint-imports", "pytest"):
        (tools / tool).write_text(f"#!/bin/sh\necho ran {tool}\nexit {int(tool == failing)}\n")
        (tools / tool).chmod(0o755)
    (tmp_path / ".installed").touch()
    # A make that runs these tests is no parent of the one tested here.
    outside = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    made = subprocess.run(
        ["make", "test", f"VENV={tmp_path}"],
        cwd=ROOT,
        env=outside,
        capture_output=True,
        text=True,
        check=False,
    )
    ran = [line for line in made.stdout.splitlines() if line.startswith("ran")]
    assert ran == ["ran ruff", "ran ruff", "ran mypy", "ran lint-imports", "ran pytest"]
    assert made.stdout.splitlines()[-1] == "ran pytest"
    assert (made.returncode == 0) == (failing == "")
    assert ("failed already" in made.stdout) == (failing not in ("", "pytest"))
