"""Shared by all tests: how many workers, one thread in each, no timed tests.

Their models are tiny: threads within a test only wait for each other, and two workers with a thread
per core each would do it twice. What must be set before torch loads is set here, and the process
that only hands out files loads no torch at all.
"""

import os
from collections import Counter
from pathlib import Path

# Before torch loads, here and in whatever the tests start: kernels of notebooks, killed servers.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("package", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("package")

MOST_WORKERS = 4  # each loads torch, about 400 MB and five seconds; the longest file is the floor
# Files that last longest, though some have few tests: they are dealt first, or one worker ends with
# them alone. The others follow by their number of tests.
LONGEST = (
    "unlearning/test_kill.py", "test_tutorials.py", "unlearning/test_model_file.py",
    "test_demo.py", "auditing/test_loaders.py", "test_user_machine.py",
    "evaluation/test_ensemble.py", "study/test_run.py", "report/test_browser.py", "test_docs.py",
    "test_docs_site.py", "test_package.py", "test_distributed.py", "test_resume.py",
)  # fmt: skip
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put whole files into the order in which they are dealt."""
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda one: (places.get(one.path, len(places)), -sizes[one.path], one.path))


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
