"""The command line: every wrong argument is one line on stderr, exit code 2, and no file."""

import stat
import subprocess
import sys

import pytest

from opacus_pil.certificates import read_public_key
from opacus_pil.cli import main


def fails(capsys, *arguments):
    code = main(["demo", "--quiet", *map(str, arguments)])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("opacus-pil: error: ")
    return code, error


def test_an_unknown_dataset_names_the_known_ones(capsys, tmp_path):
    code, error = fails(capsys, "--dataset", "cifar10", "--out", tmp_path / "out")
    assert code == 2
    assert "'cifar10'" in error
    assert "digits, mnist5k" in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_in_it_is_refused(capsys, tmp_path):
    (tmp_path / "a").write_text("x")
    code, error = fails(capsys, "--out", tmp_path)
    assert code == 2
    assert str(tmp_path) in error
    assert "--force" in error
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_where_the_folder_should_be_is_refused(capsys, tmp_path):
    (tmp_path / "a").write_text("x")
    code, error = fails(capsys, "--out", tmp_path / "a")
    assert code == 2
    assert "got the file" in error


def test_a_missing_parent_is_refused(capsys, tmp_path):
    code, error = fails(capsys, "--out", tmp_path / "missing" / "out")
    assert code == 2
    assert "to exist" in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_refused(capsys):
    # Not even the superuser can make a folder in /proc.
    code, error = fails(capsys, "--out", "/proc/opacus-pil-out")
    assert code == 2
    assert "/proc" in error


@pytest.mark.parametrize(("name", "value"), [("--seed", "-1"), ("--oracles", "0")])
def test_a_number_out_of_range_is_named_with_its_value(capsys, tmp_path, name, value):
    code, error = fails(capsys, name, value, "--out", tmp_path / "out")
    assert code == 2
    assert name[2:] in error
    assert value in error


@pytest.mark.parametrize("arguments", [["demo", "--seed", "x"], ["magic"], []])
def test_what_the_parser_refuses_exits_with_2_too(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_help_shows_a_command_that_can_be_copied(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["demo", "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "opacus-pil demo --dataset mnist5k --out out --seed 1" in text
    assert "private" in text


def test_a_key_pair_is_made_once_and_its_public_half_is_named(capsys, tmp_path):
    path = tmp_path / "issuer"
    assert main(["key", "--out", str(path)]) == 0
    out = capsys.readouterr().out
    assert read_public_key(f"{path}.pub") in out
    assert "private" in out
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    assert main(["key", "--out", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "not to exist" in error
    assert path.read_bytes() == before
    assert main(["key", "--out", str(tmp_path / "missing" / "issuer")]) == 2


def test_the_keys_help_says_where_to_keep_it(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["key", "--help"])
    assert exit_info.value.code == 0
    assert "opacus-pil key --out issuer" in capsys.readouterr().out


def test_the_parser_needs_no_torch():
    code = "import sys, opacus_pil.cli as cli; cli._parser(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("argv", "meant"),
    [(["repotr"], "report"), (["requests", "sumbit"], "submit"), (["--log", "inof", "x"], "info")],
)
def test_a_misspelt_word_is_told_what_was_meant_and_the_list_is_shown_once(capsys, argv, meant):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert f"Did you mean {meant!r}?" in error
    assert error.count("ledger") <= 1
