"""DescribedRun: one description of a training, for every command that asks about it.

From a TOML file, or from `module:callable` that returns the same names with objects. Objects of the
user's own code are named `module:name` and looked for beside the file first. Knows names and types;
no model is built here before it is asked for.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import pkgutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import _validate as check

_NAMES = ("module", "dataset", "held_out", "criterion", "loss_of", "collate_fn", "instance_ids")
_REQUIRED = ("module", "dataset", "checkpoints", "noise_multiplier", "max_grad_norm")
_NUMBERS = (
    "noise_multiplier", "max_grad_norm", "sample_rate", "batch_size", "steps", "delta",
    "loss_reduction", "before_first", "split", "seed", "name",
)  # fmt: skip

_HELP = "`opacus-pil account --help` shows a whole one, docs/audit.md all names."


@dataclass(frozen=True)
class DescribedRun:
    """A training, as far as it was described.

    Attributes:
        values: Name -> value or object, as `replay` and `audit` take them.
        base: Folder that relative files are in.
        name: Of the description, for messages.
    """

    values: dict[str, Any]
    base: Path
    name: str
    _made: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __getitem__(self, name: str) -> Any:
        """Return a value; a data set is built when it is first asked for."""
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value, or the default where none was described."""
        return self[name] if name in self.values else default

    @property
    def sample_rate(self) -> Any:
        """Poisson rate; from a batch size as Opacus takes it, 1 / ceil(rows / batch size)."""
        if ("sample_rate" in self.values) == ("batch_size" in self.values):
            raise ValueError(
                f"Expected sample_rate or batch_size in {self.name}, got both or none. Name one."
            )
        if "sample_rate" in self.values:
            return self["sample_rate"]
        return sample_rate_of(len(self["dataset"]), self["batch_size"])

    def training(self) -> dict[str, Any]:
        """Return the arguments that `replay` and `audit` share, but for the model."""
        found: dict[str, Any] = {
            name: self[name]
            for name in ("criterion", "loss_of", "collate_fn", "loss_reduction", "instance_ids",
                         "before_first", "steps")
            if name in self.values
        }  # fmt: skip
        return {
            **found, "checkpoints": self.checkpoints, "dataset": self["dataset"],
            "noise_multiplier": self["noise_multiplier"], "max_grad_norm": self["max_grad_norm"],
            "sample_rate": self.sample_rate,
        }  # fmt: skip

    @property
    def checkpoints(self) -> Any:
        """Checkpoints with files in place of patterns."""
        return self._files(self.values["checkpoints"])

    def _files(self, value: Any) -> Any:
        if isinstance(value, str):
            path = self.base / value
            if any(sign in value for sign in "*?["):
                found = sorted(glob.glob(str(path)))
                if not found:
                    raise ValueError(f"Expected files that match {path}, got none. Check the path.")
                return found
            return str(path)
        if isinstance(value, list):
            return [self._files(entry) for entry in value]
        if isinstance(value, Mapping) and all(str(key).isdigit() for key in value):
            return {int(key): self._files(entry) for key, entry in value.items()}
        return value

    def _make(self, name: str) -> Any:
        value = self.values[name]
        if name in _NAMES and isinstance(value, str):
            value = resolved(value, base=self.base, name=name)
        builds = name in ("dataset", "held_out", "instance_ids")
        if builds and callable(value) and not hasattr(value, "__len__"):
            with importable(self.base):
                value = value()
        if name == "criterion" and isinstance(value, type):
            value = value()
        return value


def sample_rate_of(rows: int, batch_size: int) -> float:
    """Return Opacus's Poisson rate: 1 / number of batches of a loader that drops none."""
    size = check.integer("batch_size", batch_size, low=1)
    return 1.0 / -(-rows // size)


def described_run(source: str | os.PathLike[str]) -> DescribedRun:
    """Read a description.

    Args:
        source: A TOML file, or "module:callable" that returns a mapping with the same names.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Not TOML, an unknown or missing name, an object that cannot be found.

    The objects that a description names are code of whoever wrote it, and are run.
    """
    text = os.fspath(source)
    if not text.endswith(".toml"):
        base = Path.cwd()
        found = resolved(text, base=base, name="the description")
        with importable(base):
            values = found() if callable(found) else found
        if not isinstance(values, Mapping):
            raise ValueError(
                check.expected(
                    text, "to be a TOML file or a function that returns a mapping",
                    type(values).__name__, _HELP,
                )
            )  # fmt: skip
        return _checked(dict(values), base, text)
    path = Path(text)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"Expected {path} to be TOML, got {error}. {_HELP}") from error
    return _checked(values, path.resolve().parent, str(path))


def _checked(values: dict[str, Any], base: Path, name: str) -> DescribedRun:
    known = (*_NAMES, *_REQUIRED, *_NUMBERS)
    unknown = [key for key in values if key not in known]
    missing = [key for key in _REQUIRED if key not in values]
    if unknown:
        cure = check.did_you_mean(unknown[0], known) or _HELP
        raise ValueError(
            f"Expected {name} to describe a training, got the unknown name {unknown[0]!r}. {cure}"
        )
    if missing:
        raise ValueError(
            f"Expected {name} to describe a training, got one that lacks {' and '.join(missing)}. "
            f"{_HELP}"
        )
    return DescribedRun(values, base, name)


def resolved(text: str, *, base: Path, name: str) -> Any:
    """Return the object that "module:name" names, looked for in `base` first.

    Raises:
        ValueError: There is none.
    """
    require_findable(text, base=base, name=name)
    try:
        with importable(base):
            return pkgutil.resolve_name(text)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"Expected {name}={text!r} to name an object of a module in {base} or installed, got "
            f"{type(error).__name__}: {error}. Check the name."
        ) from error


def require_findable(text: str, *, base: Path, name: str) -> None:
    """Raise unless "module:name" is of that form and there is such a module; none is run.

    Raises:
        ValueError: It is not, or there is none.
    """
    if ":" not in text:
        cure = "For example 'train:make_model'."
        if text.endswith(".toml"):
            cure = "A TOML file is what opacus-pil account and opacus-pil audit take."
        raise ValueError(check.expected(name, "to be 'module:name'", text, cure))
    top = text.partition(":")[0].partition(".")[0]
    with importable(base):
        importlib.invalidate_caches()
        found = top in sys.modules or (top and importlib.util.find_spec(top) is not None)
    if not found:
        raise ValueError(
            f"Expected {name}={text!r} to name an object of a module in {base} or installed, got "
            f"no module {top!r}. Check the name."
        )


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let modules of a folder be imported, before those installed, for as long as the block runs.

    Code of the user's imports its neighbours when it likes, within a function too.
    """
    text = str(folder)
    if text in sys.path:
        yield
        return
    sys.path.insert(0, text)
    try:
        yield
    finally:
        if text in sys.path:
            sys.path.remove(text)
