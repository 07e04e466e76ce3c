"""The house: imports point to the same or a lower floor, never in a circle, and names exist.

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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "opacus_pil"
ROOT = Path(__file__).parents[1] / PACKAGE

FLOORS: dict[int, tuple[str, ...]] = {
    # mathematics, and what everybody needs
    0: (
        "",  # the façade itself loads nothing; its names are followed to their homes
        "_validate",
        "atomic_file",
        "errors",
        "accounting.bounded_mean",
        "accounting.calibration",
        "accounting.compact_orders",
        "accounting.composition",
        "accounting.gram",
        "accounting.groups",
        "accounting.holder_sums",
        "accounting.mixtures",
        "accounting.pld",
        "accounting.quadrature",
        "accounting.rdp",
        "accounting.repeated_runs",
    ),
    # state of the accountant, certificates
    1: (
        "accounting",
        "accounting.account_state",
        "accounting.accountant",
        "accounting.balances",
        "accounting.charge_checks",
        "accounting.charging",
        "accounting.filter",
        "accounting.forget_set",
        "accounting.guarantee",
        "accounting.history",
        "accounting.instance_ids",
        "accounting.ledger",
        "accounting.ledger_rows",
        "accounting.levels",
        "accounting.offsets",
        "accounting.readings",
        "accounting.shards",
        "auditing.canary_record",
        "auditing.checked",
        "auditing.claim",
        "auditing.comparison",
        "auditing.conformance",
        "auditing.error_test",
        "auditing.family",
        "auditing.guesses",
        "auditing.losses",
        "auditing.lower_bound",
        "auditing.measurements",
        "auditing.one_run",
        "auditing.exposed",
        "auditing.pairs",
        "auditing.power",
        "auditing.sampling",
        "certificates",
        "certificates.assumptions",
        "certificates.batch_laws",
        "certificates.best",
        "certificates.causal_plan",
        "certificates.certificate_file",
        "certificates.certificate_record",
        "certificates.chien2024",
        "certificates.contraction",
        "certificates.counted",
        "certificates.data_processing",
        "certificates.derivation",
        "certificates.fields",
        "certificates.gaussian",
        "certificates.hull",
        "certificates.known_batches",
        "certificates.langevin",
        "certificates.log_sobolev",
        "certificates.methods",
        "certificates.mini_batches",
        "certificates.noisy_finetuning",
        "certificates.record",
        "certificates.run_record",
        "certificates.sentences",
        "certificates.sequential",
        "certificates.signature",
        "certificates.verification",
        "certificates.verification_report",
        "certificates.version1",
    ),
    # adapters to torch and Opacus
    2: (
        "auditing.gradient_canaries",
        "auditing.ledger",
        "auditing.seams",
        "auditing.shadow_step",
        "auditing.step_meter",
        "auditing.watching",
        "capture",
        "capture.averaged_clip",
        "capture.clipping",
        "capture.collate",
        "capture.draws",
        "capture.fixed_batches",
        "capture.ghost",
        "capture.indices",
        "capture.memory",
        "capture.norms",
        "capture.passes",
        "capture.randomness",
        "capture.recorder",
        "capture.row_losses",
        "capture.shards",
        "capture.sweep",
    ),
    # engines
    3: (
        "checkpoint",
        "content_digest",
        "dataset_fingerprint",
        "distributed",
        "ledger_table",
        "ledgers",
        "norm_policy",
        "plain_checkpoint",
        "privacy_engine",
        "recording_engine",
        "resuming_engine",
        "step_accounting",
        "training",
        "training.evidence",
        "training.probe",
        "training.row_gradients",
        "training.task",
        "training.weights",
        "training_kernel",
        "training_state",
        "unlearning",
        "unlearning.applicable",
        "unlearning.averaged",
        "unlearning.calibration",
        "unlearning.carrying_out",
        "unlearning.certified_record",
        "unlearning.described",
        "unlearning.engine",
        "unlearning.engine_state",
        "unlearning.extra_terms",
        "unlearning.feature_norm",
        "unlearning.glm",
        "unlearning.grounds",
        "unlearning.methods",
        "unlearning.model_hash",
        "unlearning.observer",
        "unlearning.optimizer_copy",
        "unlearning.phase",
        "unlearning.plan",
        "unlearning.planning",
        "unlearning.queued_model",
        "unlearning.rehearsal",
        "unlearning.request_database",
        "unlearning.request_server",
        "unlearning.requests",
        "unlearning.result",
        "unlearning.running",
        "unlearning.saved_run",
        "unlearning.search",
        "unlearning.serving",
        "unlearning.serving_lock",
        "unlearning.step_size",
        "unlearning.trained_data",
        "unlearning.trained_model",
        "worst_case_accountant",
    ),
    # evidence
    4: (
        "auditing",
        "auditing.natural_canaries",
        "evaluation",
        "evaluation.attack",
        "evaluation.bootstrap",
        "evaluation.calibrate",
        "evaluation.class_outputs",
        "evaluation.complete_cases",
        "evaluation.deciles",
        "evaluation.difficulty",
        "evaluation.ensemble",
        "evaluation.estimate_convergence",
        "evaluation.gap",
        "evaluation.loss_barrier",
        "evaluation.margins",
        "evaluation.membership",
        "evaluation.oracle",
        "evaluation.rank_correlation",
        "evaluation.task_metrics",
        "evaluation.visits",
        "replaying",
        "replaying.composed",
        "replaying.described_run",
        "replaying.replay",
        "replaying.row_norms",
        "replaying.saved_weights",
        "replaying.trajectory",
    ),
    # surface
    5: (
        "account_command",
        "audit_command",
        "auditing.audit",
        "auditing.audit_page",
        "auditing.audit_record",
        "auditing.membership_test",
        "check_command",
        "cli",
        "datasets",
        "demo",
        "demo.cnn",
        "demo.forgetting",
        "demo.logistic",
        "demo.run",
        "demo.table",
        "demo.task",
        "plots",
        "report",
        "study",
        "study.certified",
        "study.claims",
        "study.figures",
        "study.forget_sets",
        "study.measures",
        "study.privacy",
        "study.run",
        "study.settings",
        "study.sweeps",
        "study.training",
        "study.trials",
        "study.words",
    ),
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
NUMPY_ONLY = ("", "_validate", "errors", "accounting", "certificates")
NUMPY_HALF = [name for name in FLOORS[1] if name.startswith("auditing.")]


@dataclass(frozen=True)
class Import:
    """One imported thing: "x.y" inside the package, or the top name of a foreign package."""

    target: str
    line: int
    inside: bool
    running: bool  # False under `if TYPE_CHECKING:`, where nothing is loaded


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
        silent = {
            id(node)
            for test in ast.walk(tree)
            if isinstance(test, ast.If) and _is_type_checking(test.test)
            for branch in test.body
            for node in ast.walk(branch)
        }
        return [
            Import(target, node.lineno, inside, id(node) not in silent)
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

    def complaints(self, floor: dict[str, int]) -> list[str]:
        """Return one sentence per broken rule."""
        modules = self.modules()
        found = [
            f"{self.package}.{name} is on no floor: give it a floor in tests/test_house.py"
            for name in modules
            if name not in floor
        ]
        found += [
            f"tests/test_house.py lists {name!r}, which does not exist: remove it"
            for name in floor
            if name not in modules
        ]
        graph: dict[str, set[str]] = {}
        for name in modules:
            entered = [i for i in self.imports(name) if i.inside and i.running]
            graph[name] = {i.target for i in entered} - {name}
            found += [
                f"{name or self.package}:{i.line} (floor {floor[name]}) imports "
                f"{i.target} (floor {floor[i.target]}): imports point down"
                for i in entered
                if name in floor and i.target in floor and floor[i.target] > floor[name]
            ]
            found += [
                f"{name or self.package}:{i.line} imports {i.target}, which does not exist"
                for i in entered
                if i.target not in modules
            ]
        try:
            graphlib.TopologicalSorter(graph).prepare()
        except graphlib.CycleError as error:
            found.append(f"imports run in a circle: {' -> '.join(error.args[1])}")
        return found


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


HOUSE = House(ROOT)


def test_imports_point_down_and_never_in_a_circle() -> None:
    assert HOUSE.complaints(FLOOR) == []


@pytest.mark.parametrize("room", ["accounting", "certificates"])
def test_no_circle_runs_inside_a_room_not_even_for_types(room: str) -> None:
    graph = {
        name: {i.target for i in HOUSE.imports(name) if i.inside} - {name}
        for name in HOUSE.modules()
        if name.split(".")[0] == room
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises on a circle


def test_the_lower_floors_use_neither_torch_nor_opacus() -> None:
    heavy = [
        (name, i.target)
        for name in HOUSE.modules()
        if name.split(".")[0] in NUMPY_ONLY or name in NUMPY_HALF
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
        "from opacus_pil.auditing import one_run_lower_bound, conformance, Claim",
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
    assert set(dir(facade)) == {*facade._HOME, "__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        _ = facade.Nonsense


# --- the checker itself ---------------------------------------------------------------------------

_LOW_AND_HIGH = {"": 0, "low": 0, "high": 1, "room": 1, "room.inner": 1}


def _plant(folder: Path, **files: str) -> House:
    """Write a package of which every module is empty except the given ones."""
    names = ["__init__", "low", "high", "room/__init__", "room/inner"]
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
        low="from .room import inner, other",
        room___init__="from .inner import y as inner",
    )
    assert [i.target for i in house.imports("low")] == ["room.inner", "room"]


def test_checker_ignores_imports_for_types_only(tmp_path: Path) -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .high import x"
    assert _plant(tmp_path, low=text).complaints(_LOW_AND_HIGH) == []


def test_checker_finds_a_circle_on_one_floor(tmp_path: Path) -> None:
    house = _plant(tmp_path, high="from .room.inner import x", room_inner="from ..high import y")
    (complaint,) = house.complaints(_LOW_AND_HIGH)
    assert "circle" in complaint
    assert "high" in complaint


def test_checker_asks_for_a_floor_and_for_tidying_up(tmp_path: Path) -> None:
    house = _plant(tmp_path, low="from .gone import x")
    complaints = house.complaints({"": 0, "low": 0, "room": 1, "room.inner": 1, "past": 1})
    assert len(complaints) == 3
    assert "opacus_pil.high is on no floor: give it a floor" in complaints[0]
    assert "lists 'past', which does not exist" in complaints[1]
    assert "imports gone, which does not exist" in complaints[2]
