"""What is shipped: sdist and wheel are whole, need no extra to be imported, and bring their types.

The wheel is built from the sdist, and installed into a bare environment that sees nothing but the
core requirements of the one the tests run in. `.ci/package` does the same with what pip installs.
"""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

# Building, and type checking a script that imports torch: 20 s of processes.
pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.skipif(
            importlib.util.find_spec(tool) is None, reason=f"needs {tool}, of the extra 'dev'"
        )
        for tool in ("build", "twine", "mypy", "pip")
    ),
]

ROOT = Path(__file__).parents[1]
SHIPPED = ("pyproject.toml", "setup.cfg", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    # What is found must be what is installed, not what a path of the caller leads to.
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        command, cwd=cwd, env=clean, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel made from it; from a copy: setuptools writes into its source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in (*SHIPPED, "constraints.txt"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(
        ROOT / "opacus_pil", source / "opacus_pil", ignore=shutil.ignore_patterns("__pycache__")
    )
    # Without isolation nothing is downloaded: setuptools is in the extra "dev".
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def core_distributions() -> dict[str, metadata.Distribution]:
    """What the core requires, and what that requires, without any extra."""
    from packaging.requirements import Requirement

    found: dict[str, metadata.Distribution] = {}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^dependencies = \[(.*)\]$", text, flags=re.M)
    waiting = re.findall(r'"([^"]+)"', listed)
    while waiting:
        wanted = Requirement(waiting.pop())
        if wanted.name in found or (wanted.marker and not wanted.marker.evaluate({"extra": ""})):
            continue
        found[wanted.name] = metadata.distribution(wanted.name)
        waiting += found[wanted.name].requires or []
    return found


@pytest.fixture(scope="module")
def bare(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment: the wheel, and links to the core requirements."""
    folder = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
        "--no-index", built[1],
    )  # fmt: skip
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in core_distributions().values():
        tops = {path.parts[0] for path in distribution.files or []} - {"..", "__pycache__"}
        for top in tops:
            target = Path(str(distribution.locate_file(top)))
            if not (site / top).exists():
                (site / top).symlink_to(target, target_is_directory=target.is_dir())
    return python


def test_both_hold_the_whole_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "opacus_pil").rglob("*")
        if path.suffix in (".py", ".j2", ".typed")
    }
    assert "opacus_pil/py.typed" in package
    sdist, wheel = built
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in in_wheel if ".dist-info/" not in name} == package
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in in_wheel)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    files = {name for name in names if Path(name).suffix in (".py", ".j2", ".typed")}
    assert files - {"setup.py"} == package  # half of the tests would be worse than none
    assert set(SHIPPED) <= names


def test_the_metadata_renders(built: tuple[Path, Path]) -> None:
    assert run(sys.executable, "-m", "twine", "check", "--strict", *built).count("PASSED") == 2


def test_it_runs_in_a_bare_environment(bare: Path, tmp_path: Path) -> None:
    import opacus_pil

    code = f"""
        import importlib.metadata, importlib.util, opacus_pil
        from opacus_pil import PerInstancePrivacyEngine, UnlearningEngine
        assert opacus_pil.__file__.startswith({str(bare.parents[1])!r}), opacus_pil.__file__
        assert importlib.util.find_spec("matplotlib") is None
        assert importlib.metadata.version("opacus-pil") == opacus_pil.__version__
        print(opacus_pil.__version__)
    """
    (tmp_path / "check.py").write_text("if True:\n" + code)
    assert run(bare, "-I", tmp_path / "check.py").strip() == opacus_pil.__version__
    assert "demo" in run(bare.parent / "opacus-pil", "--help")


# Where a `type: ignore` is not needed, `--strict` says so: each of them is an assertion.
SCRIPT = """
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import assert_type

from opacus_pil import PerInstancePrivacyEngine, UnlearningEngine
from opacus_pil.accounting import PerInstanceAccountant

data = TensorDataset(torch.randn(64, 2), torch.randint(0, 2, (64,)))
model = nn.Sequential(nn.Linear(2, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = DataLoader(data, batch_size=8)
criterion = nn.CrossEntropyLoss()

engine = PerInstancePrivacyEngine(norm_policy="worst_case")
private, private_optimizer, private_loader = engine.make_private(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
)
private.eval()
for x, y in private_loader:
    private_optimizer.zero_grad()
# The idiom of Opacus, under the old names.
model, optimizer, loader = engine.make_private(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
)
ghost, ghost_optimizer, loss, ghost_loader = engine.make_private(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0,
    criterion=criterion, grad_sample_mode="ghost",
)
loss(ghost(x), y).backward()
three = engine.make_private_with_epsilon(
    module=model, optimizer=optimizer, data_loader=loader, target_epsilon=1.0, target_delta=1e-2,
    epochs=1, max_grad_norm=[1.0, 2.0], clipping="per_layer",
)
assert_type(three[2], DataLoader[Any])
mode = "hooks" if len(data) < 100 else "ghost"
made = engine.make_private(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0,
    grad_sample_mode=mode,
)

a, b = engine.make_private(  # type: ignore[misc]
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
)
c, d, e = engine.make_private(  # type: ignore[misc]
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0,
    grad_sample_mode="ghost",
)
engine.make_private(  # type: ignore[call-overload]
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier="1", max_grad_norm=1.0
)

assert_type(engine.per_instance, PerInstanceAccountant)
label: str = engine.get_per_instance_epsilon(1e-3).guarantee
number: int = engine.get_per_instance_epsilon(1e-3).guarantee  # type: ignore[assignment]
UnlearningEngine(model, optimizer=optimizer)  # type: ignore[call-arg]
"""


def test_a_strict_project_sees_the_types(bare: Path, tmp_path: Path) -> None:
    """py.typed works: what make_private returns is known, and misuse is an error."""
    (tmp_path / "script.py").write_text(SCRIPT)
    run(
        sys.executable, "-m", "mypy", "--strict", "--config-file=", "--python-executable", bare,
        "--cache-dir", tmp_path / "cache", "script.py", cwd=tmp_path,
    )  # fmt: skip
