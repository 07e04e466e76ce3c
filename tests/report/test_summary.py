import base64
import copy
import hashlib
import html.parser
import io
import math
import re
import stat

import matplotlib.image
import pytest

from opacus_pil import plots, report

ACCURACY = {"forget_accuracy": 0.91, "retain_accuracy": 0.97, "test_accuracy": 0.94}


def forget_set(**changes):
    return {
        "name": "hard",
        "size": 12,
        "privacy_loss": 1.25,
        "certificate": "ContractionCertificate",
        "certified": True,
        "steps": 140,
        "steps_worst_case": 369,
        "steps_retrain": 839,
        "epsilon": 0.99991,
        **ACCURACY,
        "oracle": {**ACCURACY, "forget_accuracy": 0.85},
        **changes,
    }


UNCERTIFIED = {"certificate": None, "certified": False, "epsilon": None}


def summary(*sets, **changes):
    task = {
        "name": "Logistic regression",
        "dataset": "digits",
        "num_instances": 227,
        "delta": 1 / 227,
        "worst_case_epsilon": 5.43211,
        "per_instance_epsilon": {
            "min": 0.01, "q10": 0.2, "median": 0.5, "mean": 0.7, "q90": 1.5, "max": 4.5,
        },
        "guarantee": "estimate",
        "test_accuracy": 0.94,
        "forget_sets": list(sets) or [forget_set()],
        **changes,
    }  # fmt: skip
    return {"tasks": [task]}


class Page(html.parser.HTMLParser):
    """Collects tags, text and attributes, and checks that every tag is closed in order."""

    VOID = frozenset({"meta", "img", "link", "br", "hr"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page(data, *sections):
    return Page(report.render_report(title="Demo", summary=data, sections=sections))


def rows(text, heading):
    """The cells of each body row of the first table after a heading of the rendered page."""
    table = text.split(heading, 1)[1].split("<tbody>", 1)[1].split("</tbody>", 1)[0]
    found = []
    for row in table.split("<tr>")[1:]:
        cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL)
        found.append([" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in cells])
    return found


def claims(*sets):
    text = report.render_report(title="Demo", summary=summary(*sets))
    return rows(text, "what is claimed and what it costs")


def figure():
    return plots.epsilon_histogram([1.0, 2.0, 3.0], worst_case=4.0)


def test_page_loads_nothing_and_is_well_formed():
    sections = [
        report.Section("In the task", "One.\n\nTwo.", [report.Illustration(figure(), "c", "a")],
                       task="Logistic regression"),
        report.Section("Last", "Text."),
    ]  # fmt: skip
    text = report.render_report(title="Demo", summary=summary(), sections=sections)
    parsed = Page(text)
    for _, name, value in parsed.attributes:
        if name in {"src", "href", "action", "srcset", "data", "poster"}:
            assert value.startswith(("data:", "#"))
    assert not re.search(r"https?:|url\(|@import|<link|<iframe", text)
    (policy,) = [v for _, name, v in parsed.attributes if name == "content" and "-src" in v]
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The browser runs the one script that this hash names, and nothing that came in with a name.
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )


def test_figures_are_the_png_of_the_figure_with_caption_and_alt():
    drawing = figure()
    parsed = page(
        summary(), report.Section("S", "T", [report.Illustration(drawing, "A caption.", "An alt.")])
    )
    (source,) = [v for tag, name, v in parsed.attributes if (tag, name) == ("img", "src")]
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True)
    assert data == plots.to_png(drawing)
    assert matplotlib.image.imread(io.BytesIO(data)).ndim == 3
    assert ("img", "alt", "An alt.") in parsed.attributes
    assert "A caption." in parsed.text


def test_sections_stand_in_their_task_or_after_all_tasks():
    text = page(
        summary(),
        report.Section("Appendix", "End."),
        report.Section("Exposure", "First.\n\nSecond.", task="Logistic regression"),
    ).text
    assert text.index("Exposure") < text.index("what is claimed") < text.index("Appendix")
    with pytest.raises(ValueError, match=r"section\.task"):
        page(summary(), report.Section("Lost", "", task="another"))


def test_privacy_notice_comes_before_every_number():
    text = page(summary()).text
    assert text.index("This file is private.") < text.index("5.433")
    assert text.index("5.433") < text.index("What each number means")  # the glossary comes last
    assert "N is treated as public" in text
    assert "one instance is added or removed" in text


@pytest.mark.parametrize("label", list(report.LABELS))
def test_every_label_is_explained_and_stands_beside_its_numbers(label):
    text = report.render_report(title="Demo", summary=summary(guarantee=label))
    assert all(words in Page(text).text for entry in report.LABELS.values() for words in entry)
    worst, instances = rows(text, "Worst case beside the instances")
    assert worst == ["worst case, every instance", "5.433", "bound"]
    assert instances == ["per instance", "0.01", "0.2", "0.5", "0.7", "1.5", "4.5", label]
    not_guarantee = "They are not a privacy guarantee for anybody"
    assert (not_guarantee in Page(text).text) == (label == "estimate")


def test_estimate_never_reads_as_a_guarantee():
    words, claim = report.LABELS["estimate"]
    assert words == "estimate, no guarantee"
    assert "can be smaller than the true privacy loss" in claim


def test_printed_privacy_numbers_are_rounded_up():
    (row,) = claims(forget_set(epsilon=0.99991, privacy_loss=1.23401))
    assert row[2] == "1.235"
    assert row[4] == "1.000"


def test_a_run_without_certificate_has_no_epsilon():
    (row,) = claims(forget_set(**UNCERTIFIED, steps_worst_case=None))
    assert row[3:] == ["no certificate", "none", "140", "–", "839"]
    with pytest.raises(ValueError, match=r"forget_sets\[0\]\.epsilon to be null without a cert"):
        claims(forget_set(certificate=None, certified=False, epsilon=0.0))


def test_predicted_is_not_certified():
    (row,) = claims(forget_set(certified=False, epsilon=0.5))
    assert row[3] == "predicted, not guaranteed ContractionCertificate"
    assert row[4] == "0.5 not guaranteed"
    (row,) = claims(forget_set(certified=False, epsilon=None))
    assert row[4] == "–"


@pytest.mark.parametrize(
    "changes",
    [{"certificate": None, "epsilon": None}, {"epsilon": None}, {"certified": "predicted"},
     {"certified": 1}],
)  # fmt: skip
def test_certified_needs_a_certificate_an_epsilon_and_a_truth_value(changes):
    with pytest.raises(ValueError, match="certified"):
        claims(forget_set(**changes))


def test_confidence_is_named_and_rounded_down():
    (row,) = claims(forget_set(confidence=0.95))
    assert row[3].startswith("certified with confidence 95 %")
    (row,) = claims(forget_set(confidence=0.999999))
    assert row[3].startswith("certified with confidence 99.99 %")


def test_nulls_are_never_shown_as_zero():
    spread = dict.fromkeys(("min", "q10", "median", "mean", "q90", "max"))
    nothing = dict.fromkeys(ACCURACY)
    blank = forget_set(
        **UNCERTIFIED, privacy_loss=None, steps=None, steps_worst_case=None, steps_retrain=None,
    ) | nothing | {"oracle": nothing}  # fmt: skip
    text = report.render_report(
        title="Demo",
        summary=summary(
            blank, per_instance_epsilon=spread, worst_case_epsilon=None, test_accuracy=None
        ),
    )
    worst, instances = rows(text, "Worst case beside the instances")
    assert worst[1] == "–"
    assert instances[1:-1] == ["–"] * 6
    (claim,) = rows(text, "what is claimed and what it costs")
    assert claim == ["hard", "12", "–", "no certificate", "none", "–", "–", "–"]
    (measured,) = rows(text, "what was measured against retrained models")
    assert measured[1:-1] == ["–"] * 9


def test_infinite_epsilon_is_shown_as_infinite():
    (row,) = claims(forget_set(epsilon=math.inf))
    assert row[4] == "∞"


def test_gaps_are_signed_percentage_points():
    text = report.render_report(title="Demo", summary=summary())
    (row,) = rows(text, "what was measured against retrained models")
    assert row[1:7] == ["91.0 %", "85.0 %", "+6.0", "97.0 %", "97.0 %", "±0.0"]


def test_time_to_unlearn_tells_unmeasured_from_unreached():
    sets = [forget_set(), forget_set(time_to_unlearn=None), forget_set(time_to_unlearn=0)]
    text = report.render_report(title="Demo", summary=summary(*sets))
    last = [row[-1] for row in rows(text, "what was measured against retrained models")]
    assert last == ["not measured", "not reached", "0"]


def test_assumptions_are_listed_once_per_group_of_sets():
    shared = {"assumptions": ["full batch", "caps fixed before the run"]}
    text = page(
        summary(forget_set(**shared), forget_set(name="easy", **shared), forget_set(name="bare"))
    ).text
    assert text.count("caps fixed before the run") == 1
    assert "hard, easy: certified" in text
    assert "does not list the assumptions" in text


HOSTILE = "<script>alert('x')</script>\"><img src=https://example.org onerror=x> {{ 7 * 7 }} &amp;"


def test_hostile_strings_stay_text():
    data = summary(
        forget_set(name=HOSTILE, certificate=HOSTILE, assumptions=[HOSTILE]),
        name=HOSTILE,
        dataset=HOSTILE,
    )
    section = report.Section(
        HOSTILE, HOSTILE, [report.Illustration(figure(), HOSTILE, HOSTILE)], task=HOSTILE
    )
    parsed = Page(report.render_report(title=HOSTILE, summary=data, sections=[section]))
    assert parsed.tags.count("script") == 1  # the family's own
    assert parsed.tags.count("img") == 1  # the figure's own
    assert not any(name.startswith("on") for _, name, _ in parsed.attributes)
    assert parsed.text.count(HOSTILE) >= 8  # shown as it was written, nothing expanded
    assert ("img", "alt", HOSTILE) in parsed.attributes


def paths(record, prefix=()):
    for key, value in record.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


@pytest.mark.parametrize("path", list(paths(summary()["tasks"][0])), ids=".".join)
def test_missing_task_keys_are_named(path):
    data = copy.deepcopy(summary())
    place = data["tasks"][0]
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(ValueError, match=rf"tasks\[0\].*got none for {path[-1]}\."):
        page(data)


@pytest.mark.parametrize("path", list(paths(forget_set())), ids=".".join)
def test_missing_forget_set_keys_are_named(path):
    data = copy.deepcopy(forget_set())
    place = data
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(ValueError, match=rf"forget_sets\[0\].*got none for {path[-1]}\."):
        claims(data)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"guarantee": "certain"}, "guarantee"),
        ({"worst_case_epsilon": math.nan}, "worst_case_epsilon"),
        ({"worst_case_epsilon": -1.0}, "worst_case_epsilon"),
        ({"worst_case_epsilon": "0"}, "worst_case_epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"test_accuracy": 94.0}, "test_accuracy"),
        ({"num_instances": 0}, "num_instances"),
    ],
)
def test_values_outside_their_domain_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        page(summary(**change))


def test_summary_without_tasks_is_refused_by_name():
    with pytest.raises(ValueError, match=r"summary to have the keys tasks"):
        page({})


def test_file_is_private_and_whole(tmp_path):
    target = tmp_path / "report.html"
    report.write_report(target, title="Demo ε", summary=summary())
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    text = target.read_text(encoding="utf-8")
    assert text == report.render_report(title="Demo ε", summary=summary())
    assert text.lstrip().startswith("<!DOCTYPE html>")
    with pytest.raises(ValueError, match="tasks"):
        report.write_report(target, title="Demo", summary={})
    assert target.read_text(encoding="utf-8") == text  # a failed call leaves the old file
    assert list(tmp_path.iterdir()) == [target]
