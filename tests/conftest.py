"""Shared by all tests: how many workers, one thread in each, no timed tests.

Their models are tiny: threads within a test only wait for each other, and two workers with a thread
per core each would do it twice. What must be set before torch loads is set here, and the process
that only hands out files loads no torch at all.
"""

import os
from pathlib import Path

# Before torch loads, here and in whatever the tests start: kernels of notebooks, killed servers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("package", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("package")

MOST_WORKERS = 4  # each loads torch, about 400 MB and five seconds; the longest file is the floor


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Workers of a plain `pytest`: one per core, and none for a single file, which is not dealt."""
    paths = {Path(argument.split("::")[0]) for argument in config.args}
    if len(paths) == 1 and next(iter(paths)).suffix == ".py":
        return 0
    ours = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return min(len(ours(0)), MOST_WORKERS)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
