"""What was judged before: bounded in memory, whole on disk after a kill."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ludus.errors import UserError
from ludus.judges.base import Verdict
from ludus.judges.cache import Cache, key

YES = Verdict(True, False, None, "Harmful request: yes")
NO = Verdict(False, None, True, "words")


def test_the_least_recently_asked_is_forgotten():
    cache = Cache(2)
    cache.add("a", YES)
    cache.add("b", NO)
    assert cache.get("a") == YES
    cache.add("c", NO)
    assert (cache.get("a"), cache.get("b"), cache.get("c")) == (YES, None, NO)
    assert len(cache) == 2


def test_keys_tell_all_apart():
    asked = [("j", "a", None), ("j", "a", "None"), ("j", "a", ""), ("k", "a", None)]
    asked += [("j", "ab", "c"), ("j", "a", "bc")]
    assert len({key(*one) for one in asked}) == len(asked)
    assert key("j", "a", None) == key("j", "a", None)


def test_a_file_outlives_the_process(tmp_path: Path):
    path = tmp_path / "deep" / "verdicts.jsonl"
    cache = Cache(2, path)
    for name, verdict in (("a", NO), ("b", YES), ("c", NO), ("a", YES)):
        cache.add(name, verdict)
    cache.close()
    again = Cache(10, path)
    assert [again.get(name) for name in "abc"] == [YES, YES, NO]
    again.close()
    assert path.stat().st_mode & 0o777 == 0o600


WRITER = """
import os, sys, signal
from pathlib import Path
from ludus.judges.base import Verdict
from ludus.judges.cache import Cache
cache = Cache(10, Path(sys.argv[1]))
cache.add("a", Verdict(True, None, None, "one"))
cache.add("b", Verdict(False, None, None, "two"))
cache._file.write(b'{"key": "c", "verd')
cache._file.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_costs_a_torn_line_and_nothing_else(tmp_path: Path):
    path = tmp_path / "verdicts.jsonl"
    done = subprocess.run([sys.executable, "-c", WRITER, str(path)], check=False)
    assert done.returncode == -9
    assert path.read_bytes().endswith(b"verd")
    cache = Cache(10, path)
    assert [cache.get(name) for name in "abc"] == [Verdict(True, raw="one"), Verdict(False, raw="two"), None]
    cache.add("c", NO)
    cache.close()
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "line",
    [
        '{"key": "b"',
        "[]",
        '{"key": "b", "verdict": [true, 1, null], "raw": ""}',
        '{"key": "b", "verdict": [true, null], "raw": ""}',
        '{"key": "b", "verdict": [true, "yes", null], "raw": ""}',
    ],
)
def test_a_damaged_line_is_named(line: str, tmp_path: Path):
    path = tmp_path / "verdicts.jsonl"
    cache = Cache(10, path)
    cache.add("a", YES)
    cache.close()
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"verdicts.jsonl, line 2: no verdict"):
        Cache(10, path)


def test_one_writer_at_a_time(tmp_path: Path):
    path = tmp_path / "verdicts.jsonl"
    cache = Cache(10, path)
    with pytest.raises(UserError, match="another process is writing"):
        Cache(10, path)
    cache.close()
    Cache(10, path).close()


def test_a_file_that_cannot_be_is_told(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another cache_file"):
        Cache(10, tmp_path / "file" / "verdicts.jsonl")


def test_a_full_disk_is_told_by_the_files_name(tmp_path: Path):
    cache = Cache(9, tmp_path / "verdicts.jsonl")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(UserError, match=r"cannot write to .*verdicts\.jsonl: "):
            cache.add("a", Verdict(True, False, None, raw="yes"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
