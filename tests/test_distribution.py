"""What ``python -m build`` makes: a source distribution, and a wheel that is built from it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT = (".venv", ".git", "build", "dist", "site", "outputs", ".*_cache", "__pycache__", "*.so", ".hypothesis")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the paths of a source distribution and a wheel, built without what the environment lacks."""
    for package in ("build", "hatchling", "hatch_vcs"):
        pytest.importorskip(package, reason="needs the packages that build distributions: the extra [dev]")
    source = tmp_path_factory.mktemp("source") / "embodichain-rl"  # building compiles the kernels in place
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*BUILT))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = (source / "dist").glob("*.tar.gz")
    (wheel,) = (source / "dist").glob("*.whl")
    return sdist, wheel


def test_the_wheel_has_every_file_of_the_package(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = set(archive.namelist())
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "embodichain_rl").rglob("*")
        if path.suffix in (".py", ".pyi", ".c", ".typed") or path.name == "py.typed"
    }
    assert "embodichain_rl/py.typed" in files
    assert files <= names
    assert all(name.startswith("embodichain_rl/") or ".dist-info/" in name for name in names)
    if shutil.which("cc"):
        assert "embodichain_rl/replay/kernels/kernels.compiled.so" in names
        assert distributions[1].name.endswith("-py3-none-linux_x86_64.whl") or sys.platform != "linux"


def test_the_source_distribution_has_what_the_repository_has(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "constraints.txt"):
        assert name in names
    for folder in ("docs", "examples", "tests", "benchmarks"):
        files = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
        assert files <= names
    assert not {name for name in names if name.endswith(".so")}
