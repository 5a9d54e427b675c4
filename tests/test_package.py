"""The files of a wheel and an sdist, and the cost and needs of `import regfast`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "regfast",
    "kernels",
    "tests",
    "bench",
    "examples",
)
PACKAGES = ("regfast", "regfast/_core", "regfast/kernels", "regfast/ops", "regfast/reference")


def run(*command: str | Path, cwd: Path) -> str:
    """The standard output of `command`; a failure shows its output in the test."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(code: str, cwd: Path) -> str:
    return run(sys.executable, "-c", code, cwd=cwd)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with its links, so that no build writes into the checkout."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, copy / name)
    return copy


def build(source: Path, kind: str) -> Path:
    run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        f"--{kind}",
        "--outdir",
        source / "dist",
        source,
        cwd=source,
    )
    return next((source / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return build(source, "wheel")


@pytest.fixture(scope="module")
def sdist(source: Path) -> Path:
    return build(source, "sdist")


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def project_files() -> set[str]:
    modules = (path for package in PACKAGES for path in (ROOT / package).glob("*.py"))
    return {"regfast/py.typed", *(path.relative_to(ROOT).as_posix() for path in modules)}


def test_wheel_holds_regfast_and_nothing_else(wheel: Path) -> None:
    files = contents(wheel)
    assert files == project_files()
    assert any(name.startswith("regfast/kernels/") for name in files)
    with zipfile.ZipFile(wheel) as archive:
        links = [
            entry.filename
            for entry in archive.infolist()
            if (entry.external_attr >> 16) & 0o170000 == 0o120000
        ]
        assert any(name.endswith("LICENSE") for name in archive.namelist())
    assert not links


def test_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert not (unpacked / "kernels").exists()
    assert contents(build(unpacked, "wheel")) == contents(wheel)


def test_wheel_installs_and_imports(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
    )
    run(*pip, "--target", target, wheel, cwd=tmp_path)
    assert sorted(path.name for path in target.iterdir() if path.suffix != ".dist-info") == [
        "regfast"
    ]
    code = f"""
import sys
sys.path.insert(0, {str(target)!r})
import importlib.metadata, pathlib, regfast, torch
assert pathlib.Path(regfast.__file__).is_relative_to({str(target)!r}), regfast.__file__
assert importlib.metadata.version("regfast") == regfast.__version__
assert regfast.MaxPool2dAA(2)(torch.ones(1, 1, 4, 4)).shape == (1, 1, 2, 2)
"""
    # Isolated: neither the working directory nor PYTHONPATH can stand in for the wheel.
    run(sys.executable, "-I", "-c", code, cwd=tmp_path)


def test_editable_install_finds_no_top_level_kernels(tmp_path: Path) -> None:
    code = "import importlib.util, regfast.kernels; print(importlib.util.find_spec('kernels'))"
    assert str(ROOT) not in python(code, cwd=tmp_path)


def modules_after(statement: str, cwd: Path) -> set[str]:
    return set(
        json.loads(
            python(f"{statement}; import json, sys; print(json.dumps(sorted(sys.modules)))", cwd)
        )
    )


def test_import_adds_only_regfast_to_what_torch_imports(tmp_path: Path) -> None:
    added = modules_after("import torch, regfast", tmp_path) - modules_after(
        "import torch, json", tmp_path
    )
    roots = {name.partition(".")[0] for name in added} - set(sys.stdlib_module_names)
    assert "regfast" in roots
    assert roots <= {"regfast", "torch"}
    heavy = (
        "torch._dynamo",
        "torch._inductor",
        "torch.fx",
        "torch.onnx",
        "torch.export",
        "torch.distributed",
    )
    assert not [name for name in added if name.startswith((*heavy, "regfast.kernels."))]


def test_import_cost_beyond_torch_is_shown(tmp_path: Path) -> None:
    """The budget is 30 ms. The time is printed but not checked: a loaded machine is slower."""
    code = (
        "import torch, time; t = time.perf_counter(); import regfast; "
        "print(1e3 * (time.perf_counter() - t))"
    )
    times = sorted(float(python(code, tmp_path)) for _ in range(3))
    print(f"import regfast, beyond torch: {times[0]:.1f} ms (best of {len(times)})")


WITHOUT_TRITON = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
"""


def test_works_where_triton_is_not_installed(tmp_path: Path) -> None:
    code = """
import torch, regfast
x = torch.randn(2, 3, 8, 8, requires_grad=True)
y = regfast.MaxPool2dAA(2)(x)
y.sum().backward()
assert y.shape == (2, 3, 4, 4) and x.grad.isfinite().all()
assert regfast.BlurPool2d()(x).shape == (2, 3, 4, 4)
"""
    python(WITHOUT_TRITON + code, tmp_path)


def test_info_runs_with_and_without_triton(tmp_path: Path) -> None:
    import torch

    import regfast

    for prelude in ("", WITHOUT_TRITON):
        text = python(
            f"{prelude}\nimport runpy; runpy.run_module('regfast.info', run_name='__main__')",
            tmp_path,
        )
        assert regfast.__version__ in text
        assert torch.__version__ in text
