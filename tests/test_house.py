"""The house: a room imports itself and the rooms below it, never in a circle, and names exist.

The checker reads `import` statements with ast, so that nothing has to be imported to be judged. An
import of a package's name is followed through its façade (`__init__.py`) to the module the name
comes from; that is the room that is really entered.
"""

from __future__ import annotations

import ast
import graphlib
import importlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import LONGEST, TESTS

PACKAGE = "opacus_pil"
ROOT = Path(__file__).parents[1] / PACKAGE

# From the ground up. A room imports itself and rooms below it; what is in the root folder is one by
# itself. A new file in a room needs no line here; CONTRIBUTING.md says what each room is for.
ROOMS = (
    "errors",
    "atomic_file",
    "_validate",
    "accounting",
    "certificates",
    "capture",
    "files",
    "heads",
    "plots",
    "exposure",
    "report",
    "training",
    "privacy_engine",
    "unlearning",
    "sklearn",
    "integrations",
    "evaluation",
    "replaying",
    "image_files",
    "datasets",
    "auditing",
    "commands",
    "demo",
    "study",
    "cli",
)
NUMPY_ONLY = ("", "_validate", "errors", "accounting", "certificates")


@dataclass(frozen=True)
class Import:
    """One imported thing: "x.y" inside the package, or the top name of a foreign package."""

    target: str
    line: int
    inside: bool


@dataclass(frozen=True)
class House:
    """The modules below one package folder and what they import."""

    root: Path
    package: str = PACKAGE

    def modules(self) -> dict[str, Path]:
        """Return dotted name without the package -> file; a package is its __init__.py."""
        found = {}
        for path in sorted(self.root.rglob("*.py")):
            parts = path.relative_to(self.root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path
        return found

    def imports(self, name: str) -> list[Import]:
        """Return what a module imports, at the top or inside a function."""
        path = self.modules()[name]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        return [
            Import(target, node.lineno, inside)
            for node in ast.walk(tree)
            for inside, target in self._targets(node, name, is_package=path.stem == "__init__")
        ]

    def _targets(self, node: ast.AST, name: str, *, is_package: bool) -> Iterator[tuple[bool, str]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, _, rest = alias.name.partition(".")
                yield (top == self.package), (rest if top == self.package else top)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            top, _, rest = module.partition(".")
            if node.level == 0 and top != self.package:
                yield False, top
                return
            if node.level:
                here = name.split(".") if name else []
                up = node.level - (1 if is_package else 0)
                base = here[: len(here) - up]
                rest = ".".join([*base, *([module] if module else [])])
            for alias in node.names:
                yield True, self.home(rest, alias.name)

    def home(self, module: str, attribute: str) -> str:
        """Return the module that `from module import attribute` really enters."""
        modules = self.modules()
        inner = f"{module}.{attribute}" if module else attribute
        if module not in modules or modules[module].stem != "__init__":
            return module
        # A façade may export a name that is also a module's (`from .sweep import sweep`).
        tree = ast.parse(modules[module].read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                for alias in node.names:
                    if (alias.asname or alias.name) == attribute:
                        below = f"{module}.{node.module}" if module else node.module
                        return self.home(below, alias.name)
        return inner if inner in modules else module

    def room(self, name: str, rooms: Sequence[str]) -> str | None:
        """Return the room that a module is in: the longest name of one that it begins with."""
        inside = [room for room in rooms if name == room or name.startswith(f"{room}.")]
        return max(inside, key=len, default=None)

    def complaints(self, rooms: Sequence[str]) -> list[str]:
        """Return one sentence per broken rule; imports for types alone count like all others."""
        modules = [name for name in self.modules() if name]  # the façade is followed, not entered
        home = {name: self.room(name, rooms) for name in modules}
        found = [
            f"{self.package}.{name} is in no room: put it into one, or list it as a room"
            for name, room in home.items()
            if room is None
        ]
        found += [
            f"tests/test_house.py lists {room!r}, which does not exist: remove it"
            for room in rooms
            if room not in home.values()
        ]
        graph: dict[str, set[str]] = {}
        for name in modules:
            entered = [i for i in self.imports(name) if i.inside and i.target]
            graph[name] = {i.target for i in entered} - {name}
            for i in entered:
                mine, other = home[name], home.get(i.target)
                if i.target not in home:
                    found.append(f"{name}:{i.line} imports {i.target}, which does not exist")
                elif mine and other and rooms.index(other) > rooms.index(mine):
                    found.append(f"{name}:{i.line} imports {i.target}: imports point down")
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            found.append(f"imports run in a circle: {' -> '.join(error.args[1])}")
        return found


HOUSE = House(ROOT)


def test_imports_point_down_and_never_in_a_circle_not_even_for_types() -> None:
    assert HOUSE.complaints(ROOMS) == []


def test_few_files_are_in_no_room() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 12


# What may be longer than 400 lines, and why.
LONG = {
    "privacy_engine": "the engine as people read it: more than half is signatures and docstrings",
    "unlearning.engine": "likewise; whatever it does is done by the modules it asks",
}


def test_no_file_is_longer_than_a_reader_holds() -> None:
    long = {
        name: lines
        for name, path in HOUSE.modules().items()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert set(long) == set(LONG)


def test_the_lowest_rooms_use_neither_torch_nor_opacus() -> None:
    heavy = [
        (name, i.target)
        for name in HOUSE.modules()
        if name.split(".")[0] in NUMPY_ONLY
        for i in HOUSE.imports(name)
        if not i.inside and i.target in ("torch", "opacus", "tqdm")
    ]
    assert heavy == []


def test_capture_and_accounting_do_not_know_each_other() -> None:
    met = [
        (name, i.target)
        for name in HOUSE.modules()
        if name.split(".")[0] == "capture"
        for i in HOUSE.imports(name)
        if i.inside and i.target.split(".")[0] in ("accounting", "certificates")
    ]
    assert met == []  # they meet in privacy_engine, through plain arrays


def test_only_the_facade_imports_by_computed_name() -> None:
    dynamic = [
        name
        for name, path in HOUSE.modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and (getattr(node.func, "attr", None) or getattr(node.func, "id", None))
        in ("import_module", "__import__")
    ]
    assert set(dynamic) <= {""}  # such an import is invisible to the checker above


@pytest.mark.parametrize(
    "statement",
    [
        "import opacus_pil",
        "import opacus_pil.accounting, opacus_pil.certificates",
        "from opacus_pil import CertificateError, LedgerError, UnsupportedError",
    ],
)
def test_the_mathematics_loads_without_torch(statement: str) -> None:
    code = f"import sys\n{statement}\nprint({{'torch', 'opacus'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


@pytest.mark.parametrize("name", sorted(HOUSE.modules()))
def test_every_promised_name_exists(name: str) -> None:
    module = importlib.import_module(f"{PACKAGE}.{name}" if name else PACKAGE)
    promised = getattr(module, "__all__", [])
    assert [p for p in promised if not hasattr(module, p)] == []
    assert len(set(promised)) == len(promised)


def test_the_lazy_table_and_the_typed_imports_of_the_facade_agree() -> None:
    facade = importlib.import_module(PACKAGE)
    typed = {
        alias.asname: node.module
        for node in ast.walk(ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert typed == facade._HOME
    assert set(dir(facade)) == {*facade._HOME, *facade._ROOMS, "__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = facade.Nonsense


# --- the checker itself ---------------------------------------------------------------------------

_LOW_AND_HIGH = ("low", "high", "room")


def _plant(folder: Path, **files: str) -> House:
    """Write a package of which every module is empty except the given ones."""
    names = ["__init__", "low", "high", "room/__init__", "room/inner", "room/other"]
    for name in names:
        path = folder / PACKAGE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files.get(name.replace("/", "_"), ""), encoding="utf-8")
    return House(folder / PACKAGE)


def test_checker_accepts_imports_that_point_down(tmp_path: Path) -> None:
    house = _plant(
        tmp_path, high="from .low import x\nfrom . import low", room_inner="import numpy"
    )
    assert house.complaints(_LOW_AND_HIGH) == []


@pytest.mark.parametrize(
    "statement",
    [
        "from .high import x",
        "from . import high",
        "import opacus_pil.high",
        "from opacus_pil.high import x",
        "from opacus_pil import high as h",
        "def f():\n    from .high import x",
        "try:\n    from .room.inner import x\nexcept ImportError:\n    pass",
        "from .room import thing",  # through the façade, to room.inner
    ],
)
def test_checker_finds_an_import_that_points_up(tmp_path: Path, statement: str) -> None:
    house = _plant(tmp_path, low=statement, room___init__="from .inner import thing as thing")
    (complaint,) = house.complaints(_LOW_AND_HIGH)
    assert "imports point down" in complaint
    assert complaint.startswith("low:")


def test_checker_follows_a_facade_to_the_room_behind_it(tmp_path: Path) -> None:
    house = _plant(
        tmp_path,
        low="from .room import inner, unheard",
        room___init__="from .inner import y as inner",
    )
    assert [i.target for i in house.imports("low")] == ["room.inner", "room"]


def test_checker_counts_imports_for_types_too(tmp_path: Path) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .high import x"
    (complaint,) = _plant(tmp_path, low=text).complaints(_LOW_AND_HIGH)
    assert "imports point down" in complaint


def test_checker_finds_a_circle_inside_a_room(tmp_path: Path) -> None:
    house = _plant(tmp_path, room_inner="from .other import x", room_other="from .inner import y")
    (complaint,) = house.complaints(_LOW_AND_HIGH)
    assert "circle" in complaint
    assert "room.other" in complaint


def test_checker_asks_for_a_room_and_for_tidying_up(tmp_path: Path) -> None:
    house = _plant(tmp_path, low="from .gone import x")
    complaints = house.complaints(("low", "room", "past"))
    assert len(complaints) == 3
    assert "opacus_pil.high is in no room" in complaints[0]
    assert "lists 'past', which does not exist" in complaints[1]
    assert "imports gone, which does not exist" in complaints[2]


def test_checker_knows_a_room_within_a_room(tmp_path: Path) -> None:
    house = _plant(tmp_path)
    assert house.room("room.inner", ("room", "room.inner")) == "room.inner"
    assert house.room("room.innermost", ("room", "room.inner")) == "room"
    assert house.room("roomy", ("room",)) is None


def test_the_files_that_are_dealt_first_are_there() -> None:
    assert [name for name in LONGEST if not (TESTS / name).exists()] == []
