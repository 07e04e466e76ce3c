"""The page of a serving: what is proved of each run, and what is missing in words."""

import stat

import pytest

from opacus_pil.certificates import read_certificate
from opacus_pil.errors import UnsupportedError
from opacus_pil.evaluation import oracle_gap
from opacus_pil.evaluation.gap import Metrics
from opacus_pil.unlearning.requests import RequestQueue
from opacus_pil.unlearning.requests.served import Served
from tests.report.runs import Page

from .kill_target import SIZE, trained_engine
from .runs import NOISY_GOAL, three_classes


@pytest.fixture(scope="module")
def dataset():
    return three_classes(SIZE)


@pytest.fixture
def engine(dataset, tmp_path):
    return trained_engine(dataset, requests=tmp_path / "requests")


def page_of(served, path, **options):
    served.write_report(path, **options)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    return Page(path.read_text(encoding="utf-8"))


def badges(page):
    """The claim of each deletion, by its first word; labels of the glossary are none."""
    found = [v for _, name, v in page.attributes if name == "class" and v.startswith("badge ")]
    claims = [one.removeprefix("badge ") for one in found]
    return [one for one in claims if one in ("certified", "predicted", "no")]


def test_one_run_is_the_page_of_its_deletion(engine, tmp_path):
    engine.submit([3, 7], request_id="ada")
    engine.submit([9], request_id="bob")
    served = engine.serve(**NOISY_GOAL)
    page = page_of(served, tmp_path / "p.html")
    record = read_certificate(served.certificates[0])
    for words in (
        "ada, bob: noisy_finetuning, 3 instances", "Deletion of 3 instances: certified", "3, 7, 9",
        record.model_before, record.model_after, "not measured here",
    ):  # fmt: skip
        assert words in page.text
    for sentence in NOISY_GOAL["certificate"].assumptions:
        assert sentence in page.text
    metrics = {"forget": Metrics(accuracy=0.9, loss=0.4)}
    gap = oracle_gap(metrics, oracles=[metrics, metrics])
    assert "never proof" in page_of(served, tmp_path / "gap.html", gap=gap).text


def test_runs_and_failures_stand_one_by_one_and_only_what_is_proved_is_certified(engine, tmp_path):
    engine.submit([3], request_id="ada")
    engine.submit([3], request_id="again")
    engine.submit([9], request_id="bob")
    RequestQueue(engine.requests.folder).submit("outside", [SIZE])
    served = engine.serve(**NOISY_GOAL, max_batch=1)
    page = page_of(served, tmp_path / "p.html")
    assert "4 deletion requests: 3 done, 1 failed" in page.text
    assert "Of the last run: After 2 steps" in page.text
    assert "which the data set does not have" in page.text
    assert "forgotten by runs before" in page.text
    assert badges(page) == ["certified", "no", "certified", "no"]


def test_a_run_of_another_process_is_claimed_from_its_file_and_says_what_is_missing(
    engine, tmp_path
):
    engine.submit([3], request_id="ada")
    engine.serve(**NOISY_GOAL)
    engine.submit([4], request_id="bob")
    engine.serve(steps=1)
    engine.submit([5], request_id="cyd")
    queue = RequestQueue(engine.requests.folder)
    later = Served(queue.requests(), folder=queue.folder)
    page = page_of(later, tmp_path / "p.html")
    record = read_certificate(later.certificates[0])
    assert "3 deletion requests: 2 done" in page.text
    assert page.text.count("kept no plan for the page") == 2
    assert record.model_after in page.text
    assert "waits in the queue" in page.text
    assert badges(page) == ["certified", "no", "no"]  # ada's by her file
    later.certificates[0].write_text("no certificate")
    page = page_of(later, tmp_path / "damaged.html")
    assert "cannot be read" in page.text
    assert badges(page) == ["no"] * 3
    later.certificates[0].unlink()
    assert "cannot be read" in page_of(later, tmp_path / "gone.html").text


def test_what_may_be_shown_of_two_runs_names_nobody(engine, tmp_path):
    pages = []
    for request, rows in (("ada", [3, 7]), ("bob", [9])):
        engine.submit(rows, request_id=request)
        served = engine.serve(**NOISY_GOAL)
        pages.append(page_of(served, tmp_path / f"{request}.html", public=True))
    one, other = pages
    for page in pages:
        assert "Constants only." in page.text
        assert "A deletion: certified" in page.text
        for told in ("ada", "bob", "3, 7", "3 instances", "2 steps"):
            assert told not in page.text
    assert one.text == other.text  # though others were forgotten


def test_nothing_served_makes_a_page_too_and_none_of_it_is_public(engine, tmp_path):
    served = engine.serve(**NOISY_GOAL)
    assert "0 deletion requests: none served" in page_of(served, tmp_path / "p.html").text
    with pytest.raises(UnsupportedError, match="Expected a run of this process"):
        served.write_report(tmp_path / "q.html", public=True)
    assert not (tmp_path / "q.html").exists()
