"""Two preparations into one folder: the second is refused, a killed one is in nobody's way."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.prepare.archives import VOC, voc_archives
from wsis.cli import main
from wsis.errors import InputError
from wsis.prepare.lock import LOCK, alone_in

HOLD = """
import sys, time
from pathlib import Path
from wsis.prepare.lock import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that prepares into `data`."""
    line = [sys.executable, "-c", HOLD, str(tmp_path / "data")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def prepare(tmp_path):
    source = tmp_path / "downloads"
    if not source.is_dir():
        voc_archives(source)
    words = ["data", "prepare", "voc", str(source), "--out", str(tmp_path / "data")]
    return main([*words, "--partial", "true"])


def test_a_second_preparation_is_refused(holder, tmp_path, capsys):
    assert prepare(tmp_path) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'data'}: another wsis data prepare is at work there" in error
    assert [path.name for path in (tmp_path / "data").iterdir()] == [LOCK]


def test_a_killed_preparation_is_in_nobodys_way(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert (tmp_path / "data" / LOCK).exists()
    assert prepare(tmp_path) == 0
    assert (tmp_path / "data" / VOC / "prepare-voc.json").exists()
    assert not list((tmp_path / "data").rglob(LOCK))


def test_in_place_the_downloads_are_held(tmp_path, capsys):
    source = voc_archives(tmp_path / "downloads")
    with alone_in(source):
        assert main(["data", "prepare", "voc", str(source), "--partial", "true"]) == 2
    assert "another wsis data prepare" in capsys.readouterr().err
    assert main(["data", "prepare", "voc", str(source), "--partial", "true"]) == 0
    assert not (source / LOCK).exists()


def test_what_was_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(InputError, match="no"), alone_in(tmp_path / "data"):
        raise InputError("no")
    assert not (tmp_path / "data").exists()
    (tmp_path / "data").mkdir()
    with alone_in(tmp_path / "data"), alone_in(tmp_path / "other"):
        (tmp_path / "other" / "file").touch()
    assert (tmp_path / "data").is_dir() and (tmp_path / "other" / "file").exists()


def test_a_lock_that_its_holder_removes_is_not_taken(tmp_path, monkeypatch):
    """Opened before the holder has removed it, locked after: it keeps nobody out any more."""
    import wsis.prepare.lock as module

    flock, calls = module.fcntl.flock, []

    def removed_first(file, how):
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        flock(file, how)

    monkeypatch.setattr(module.fcntl, "flock", removed_first)
    with alone_in(tmp_path):
        assert len(calls) == 2
        with pytest.raises(InputError, match="another wsis data prepare"), alone_in(tmp_path):
            pass
