"""Files of version 1 stay readable, and say what the constants give, not what they say.

The files in version1/ were written by the release that wrote that version: one of every class, and
two of a queue that was served with it, with their keys. free_text.json has a context in words of
its own, which that release allowed.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from opacus_pil import CertificateError, LedgerError
from opacus_pil.certificates import read_certificate, read_key, verify_certificate
from opacus_pil.certificates.derivation import derivation_mismatch
from opacus_pil.certificates.sentences import CONTEXT, OWN
from opacus_pil.certificates.version1 import FIELDS, upgraded
from opacus_pil.cli import main
from tests.certificates.records import failed

FOLDER = Path(__file__).parent / "version1"
FILES = sorted(FOLDER.glob("*.json"))
GOOD = [path for path in FILES if path.stem != "free_text"]


def resealed(record):
    return dataclasses.replace(record, checksum=record.computed_checksum())


def edited(path, **changes):
    """The record of a file of version 1 with other fields and a new checksum."""
    record = read_certificate(path)
    old = record.version1
    own = {name: changes.pop(name) for name in old._fields if name in changes}
    return resealed(dataclasses.replace(record, **changes, version1=old._replace(**own)))


def test_there_is_a_file_of_every_class() -> None:
    classes = {json.loads(path.read_text(encoding="utf-8"))["certificate_class"] for path in FILES}
    assert len(classes) == 7
    assert len(GOOD) >= 14


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_an_old_file_holds_and_its_words_are_generated(path, tmp_path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["version"], set(content) - {"format", "version"}) == (1, set(FIELDS))
    record = read_certificate(path)
    report = verify_certificate(record)
    assert report.holds, str(report)
    told = {words for _, words in report.assumptions}
    new = {words for words in told if words.endswith(OWN["not_adaptive"])}
    assert set(content["assumptions"]) - new == told - new
    assert derivation_mismatch(record.certificate) is None  # six digits are enough for this
    assert record.content() == content  # written again it would be the same file
    shutil.copy(path, tmp_path / "c")  # without the key
    assert main(["verify", str(tmp_path / "c")]) == 0


def test_free_text_is_not_shown_and_not_dropped() -> None:
    report = verify_certificate(read_certificate(FOLDER / "free_text.json"))
    assert not report.holds
    assert "Its words are not shown" in str(report)
    assert not report.assumptions
    with pytest.raises(CertificateError, match="another one"):
        _ = read_certificate(FOLDER / "free_text.json").assumptions


NEWER = {  # sentences that version 1 never wrote
    "separate_linear_outputs", "smooth_convex_losses", "capped_outputs", "clip_never_binds",
    "bounded_gradients", "noise_burst",
}  # fmt: skip


def test_old_context_sentences_are_codes_now() -> None:
    found = set()
    for path in GOOD:
        found |= {one.code for one in read_certificate(path).certificate.assumption_codes}
    with_numbers = {code for code in CONTEXT if "{" in CONTEXT[code]} - NEWER
    assert with_numbers <= found
    assert {"not_adaptive", "batches_fixed_before", "stationary_start"} <= found


def test_a_queue_that_was_served_before_is_verified_with_its_keys(capsys) -> None:
    for number, ids in ((1, ["0"]), (2, ["5", "7"])):
        path = FOLDER / f"served_{number}.json"
        record = read_certificate(path)
        key = read_key(f"{path}.key")
        assert verify_certificate(record, key=key, ids=ids).covers is True
        assert verify_certificate(record, key=key, ids=[11]).covers is False
        assert failed(record, key=bytes(32)) == {"key"}
        assert main(["verify", str(path), "--ids", *ids]) == 0
        assert main(["verify", str(path), "--ids", *ids, "11"]) == 3
    assert "how much of theirs the constants count is not told" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "changes", "check"),
    [
        # what used to hold
        ("one_output_glm", {"sentences": ("All is well.",) * 12}, "words"),
        ("one_output_glm", {"sentences": ()}, "words"),
        ("one_output_glm", {"method": "Finetuning"}, "run"),
        ("one_output_glm", {"method": "finetuning"}, "run"),
        ("one_output_glm", {"earlier_requests": 1, "training_steps": 201}, "run"),
        ("one_output_glm", {"earlier_requests": 1, "number_forgotten": 4}, "run"),
        ("one_output_glm", {"model_before": "0" * 63 + "b"}, "run"),
        ("one_output_glm", {"steps": 0}, "run"),
        ("sequential", {"training_steps": 41}, "run"),
        ("sequential", {"earlier_requests": 2}, "run"),
        ("sequential", {"earlier_requests": 0}, "run"),
        ("served_2", {"earlier_requests": 0}, "run"),
        ("served_2", {"training_steps": 111}, "run"),
        # and what did not
        ("one_output_glm", {"training_steps": 199}, "run"),
        ("poisson_glm", {"number_forgotten": 2}, "run"),
        ("langevin", {"direction": "both"}, "direction"),
        ("noise_schedule", {"epsilon": 0.1}, "epsilon"),
        ("noise_schedule", {"target_epsilon": 0.1}, "target"),
        ("served_1", {"key_sha256": None}, "forgotten"),
    ],
)
def test_an_edited_old_file_is_found(name, changes, check) -> None:
    false = edited(FOLDER / f"{name}.json", **changes)
    assert check in failed(false)
    assert not verify_certificate(false).statement


def test_fewer_steps_than_the_constants_count_are_true_after_earlier_requests() -> None:
    # A file of version 1 does not say how many steps the earlier requests took.
    assert verify_certificate(edited(FOLDER / "served_2.json", training_steps=59)).holds


@pytest.mark.parametrize("name", ["one_output_glm", "known_batches", "stationary", "sequential"])
def test_an_edited_number_in_an_old_context_is_found(name) -> None:
    path = FOLDER / f"{name}.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    sentences, context = content["assumptions"], content["constants"]["context"]
    found = []
    for old in context:
        new = old.translate(str.maketrans("0123456789", "1234567890"))
        if new == old:
            continue
        false = edited(
            path,
            sentences=tuple(new if one == old else one for one in sentences),
            constants={
                **content["constants"], "context": [new if one == old else one for one in context]
            },
        )  # fmt: skip
        if failed(false):
            found.append(old)
            continue
        # Other numbers that give the same constants: see `_SLACK` in test_assumptions.
        assert "features have norm" in old or "changes by at most" in old or "a convex" in old
    assert found


def test_a_sentence_with_words_between_its_numbers_is_no_code() -> None:
    for foreign in (
        "Weight decay 0.1 or so is decoupled from clipping; the step size is 2.",
        "Weight decay 0.10 is decoupled from clipping; the step size is 2.",  # not as it is written
        "Weight decay ٣ is decoupled from clipping; the step size is 2.",
        "weight decay 0.1 is decoupled from clipping; the step size is 2.",
        "Weight decay 0.1 is decoupled from clipping; the step size is 2.\n",
        "supplied_by_caller",
        "",
    ):
        with pytest.raises(CertificateError, match="got another one"):
            upgraded({"context": [foreign]})
    for odd in ({"runs": [["x", "y"]]}, [1], "x", 3, [["x"]]):
        with pytest.raises(CertificateError):
            upgraded({"context": odd})
    known = "Weight decay 0.1 is decoupled from clipping; the step size is 2."
    assert upgraded({"context": [known]}) == {
        "context": [{"code": "decoupled_decay", "weight_decay": 0.1, "step_size": 2.0}]
    }


def test_a_field_of_the_other_version_is_refused(tmp_path) -> None:
    content = json.loads((FOLDER / "contraction.json").read_text(encoding="utf-8"))
    for changes in ({"version": 2}, {"signature": None}, {"earlier_steps": 0}):
        (tmp_path / "c").write_text(json.dumps({**content, **changes}), encoding="utf-8")
        with pytest.raises(LedgerError, match="one missing or unknown"):
            read_certificate(tmp_path / "c")
