"""What every recorded run shares: digests, plain values, and a sheet for what was said and raised.

Knows JSON values; no training and no file.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

Story = Callable[[dict[str, Any]], Any]  # fills a sheet

DELTA = 1e-5
HEX_DIGITS = 32  # of a SHA-256: 128 bits tell any two arrays apart, and halve the file

# Said by Opacus and torch at nearly every training, about themselves.
FOREIGN = ("Secure RNG turned off", "Full backward hook is firing", "Optimal order is the")


@contextlib.contextmanager
def sheet(seed: int) -> Iterator[dict[str, Any]]:
    """Give a dictionary to be filled; an error ends the run and becomes part of it.

    Args:
        seed: Of torch's, numpy's and Python's global generators.
    """
    reseed(seed)
    found: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            yield found
        except Exception as error:  # an error is what is recorded here, whatever it is
            found["error"] = described_error(error)
    texts = [f"{w.category.__name__}: {plain_text(w.message)}" for w in said]
    ours = [text for text in texts if not any(notice in text for notice in FOREIGN)]
    if ours:
        found["warnings"] = {text: ours.count(text) for text in sorted(set(ours))}


def told(story: Story, *, seed: int = 3) -> dict[str, Any]:
    with sheet(seed) as found:
        story(found)
    return found


def reseed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 the global generators are what a user seeds
    random.seed(seed)


def refusal(call: Callable[[], Any]) -> dict[str, Any]:
    """Return the error of a call, or what it returned if there was none."""
    try:
        return {"returned": plain(call())}
    except Exception as error:  # whatever it is, it is what is recorded
        return {"error": described_error(error)}


def described_error(error: BaseException) -> dict[str, str]:
    return {"type": type(error).__name__, "text": plain_text(error)}


def plain_text(value: object) -> str:
    """Return a text without what differs between two runs: addresses and temporary folders."""
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/tmp\w+", "<folder>", str(value))
    return re.sub(r"0x[0-9a-f]{6,}", "0x...", text)


def plain(value: Any) -> Any:
    """Return nested values as JSON: arrays and tensors as digests, floats by every bit."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return digest(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value.hex()
    if value is None or isinstance(value, bool | int | str):
        return value
    return plain_text(value)


def digest(array: np.ndarray) -> str:
    """Return the first digits of the SHA-256 of dtype, shape and bytes."""
    found = np.ascontiguousarray(array)
    head = f"{found.dtype.str} {array.shape};".encode()
    return hashlib.sha256(head + found.tobytes()).hexdigest()[:HEX_DIGITS]


def weights(module: torch.nn.Module) -> str:
    """Return the first digits of the SHA-256 of a module's state, names included."""
    whole = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        whole.update(f"{name.removeprefix('_module.')} {plain(value)};".encode())
    return whole.hexdigest()[:HEX_DIGITS]


def spread(values: np.ndarray) -> dict[str, str]:
    """Return a digest of an array, and where it lies."""
    low, middle, high = np.quantile(values, [0.0, 0.5, 1.0], method="lower").tolist()
    return {
        "sha256": digest(values), "min": low.hex(), "median": middle.hex(), "max": high.hex()
    }  # fmt: skip


def losses(engine: Any) -> dict[str, Any]:
    """Return what an engine's two ledgers say and hold; what cannot be read as its error."""
    found: dict[str, Any] = {}
    for name, read in {
        "epsilon": lambda: float(engine.get_epsilon(DELTA)).hex(),
        "history": lambda: plain(engine.accountant.history),
        "norm_policy": lambda: engine.norm_policy,
    }.items():
        found[name] = _read(read)
    found["per_instance"] = _read(lambda: ledger(engine.per_instance))
    for name, read in {
        "engine_epsilon": lambda: spread(engine.get_per_instance_epsilon(DELTA).epsilon),
        # Norms as they were measured, before they are rounded up to a level.
        "measured": lambda: plain(without(engine.account.state()["per_instance"], "ledger")),
    }.items():
        found["per_instance"][name] = _read(read)
    return found


def without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def ledger(accountant: Any) -> dict[str, Any]:
    """Return what a per-instance accountant says and holds."""
    found: dict[str, Any] = {}
    for name in ("guarantee", "realised_guarantee", "steps", "unattributed_steps", "budgeted"):
        found[name] = _read(lambda name=name: getattr(accountant, name))
    for name in ("active", "forgotten", "caps", "sensitivities"):
        found[name] = _read(lambda name=name: plain(getattr(accountant, name)))
    found["out"] = _read(lambda: np.flatnonzero(~accountant.active).tolist())
    found["label"] = _read(lambda: accountant.get_epsilon(DELTA).guarantee)
    found["epsilon"] = _read(lambda: spread(accountant.get_epsilon(DELTA).epsilon))
    found["order"] = _read(lambda: digest(accountant.get_epsilon(DELTA).order))
    found["worst_case"] = _read(lambda: float(accountant.worst_case_epsilon(DELTA)).hex())
    found["spent"] = _read(lambda: digest(accountant.spent_rdp()))
    if _read(lambda: accountant.keeps_history) is True:
        found["group"] = _read(lambda: plain(accountant.group_rdp([0, 3, 5]).tolist()))
    found["state"] = _read(lambda: plain(accountant.state_dict()))
    return found


def _read(read: Any) -> Any:
    """Return what can be read, or the error: a changed name must not hide all the others."""
    try:
        return read()
    except Exception as error:  # see above
        return {"error": described_error(error)}


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return path -> leaf of nested dictionaries and lists; empty ones are leaves."""
    if isinstance(value, dict) and value:
        items = [(f"{path}/{key}" if path else str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        items = [(f"{path}/{number}", item) for number, item in enumerate(value)]
    else:
        return {path: value}
    return {name: leaf for key, item in items for name, leaf in flat(item, key).items()}


def beside(found: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return where `found` differs from `other`, by path; what it lacks is "absent".

    After an error nothing is expected any more: what came before it, and the error.
    """
    mine, theirs = flat(found), flat(other)
    changed = {p: leaf for p, leaf in mine.items() if p not in theirs or theirs[p] != leaf}
    lacking = {} if "error" in found else {p: "absent" for p in theirs if p not in mine}
    return changed | lacking
