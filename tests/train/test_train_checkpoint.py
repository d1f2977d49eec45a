"""Checkpoints under damage, kills and full disks: the last good one is always found."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ludus.errors import UserError
from ludus.train import checkpoint


def writer(seed: int, size: int = 4000) -> Callable[[Path], None]:
    """Writes a model and a trainer folder whose bytes follow from `seed`."""

    def write(directory: Path) -> None:
        (directory / "model").mkdir()
        (directory / "trainer").mkdir()
        rng = random.Random(seed)
        (directory / "model" / "model.safetensors").write_bytes(rng.randbytes(size))
        (directory / "model" / "config.json").write_text('{"a": 1}')
        (directory / "trainer" / "state.json").write_text(json.dumps({"seed": seed}))

    return write


def newest(run: Path) -> tuple[Path | None, list[str]]:
    warnings: list[str] = []
    return checkpoint.latest(run, warnings.append), warnings


def test_saved_checkpoint_is_whole_and_named_by_its_step(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 120, writer(1), keep=2)
    assert path == tmp_path / "checkpoints" / "step_00000120"
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest["step"] == 120
    assert sorted(manifest["files"]) == [
        "model/config.json",
        "model/model.safetensors",
        "trainer/state.json",
    ]
    entry = manifest["files"]["model/config.json"]
    assert entry == {"sha256": _sha256(b'{"a": 1}'), "size": 8}
    assert newest(tmp_path) == (path, [])
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000120"]


def test_no_checkpoint_is_none_and_not_an_error(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, writer(step), keep=2)
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [3, 4]


def test_steps_sort_as_numbers_past_eight_digits(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 99_999_999, writer(1), keep=5)
    path = checkpoint.save(tmp_path, 100_000_000, writer(2), keep=5)
    assert newest(tmp_path) == (path, [])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_in_any_file_is_caught(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("flip")
    before = checkpoint.save(run, 1, writer(1, size=300), keep=2)
    after = checkpoint.save(run, 2, writer(2, size=300), keep=2)
    files = sorted(p for p in after.rglob("*") if p.is_file())
    victim = data.draw(st.sampled_from(files), label="file")
    position = data.draw(st.integers(0, victim.stat().st_size - 1), label="byte")
    bit = data.draw(st.integers(0, 7), label="bit")
    raw = bytearray(victim.read_bytes())
    raw[position] ^= 1 << bit
    victim.write_bytes(raw)
    found, warnings = newest(run)
    assert found == before
    assert len(warnings) == 1
    assert str(after) in warnings[0]
    assert victim.name in warnings[0]
    shutil.rmtree(run)


def _truncate(path: Path) -> None:
    weights = path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def _lose(path: Path) -> None:
    (path / "trainer" / "state.json").unlink()


def _lose_manifest(path: Path) -> None:
    (path / "MANIFEST.json").unlink()


def _add_line(path: Path) -> None:
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"]["trainer/more.json"] = {"sha256": "0" * 64, "size": 3}
    (path / "MANIFEST.json").write_bytes(json.dumps(manifest, indent=1, sort_keys=True).encode() + b"\n")


def _drop_line(path: Path) -> None:
    raw = (path / "MANIFEST.json").read_text().splitlines(keepends=True)
    (path / "MANIFEST.json").write_text("".join(raw[:-2]))


def _swap_manifest(path: Path) -> None:
    shutil.copy(path.parent / "step_00000001" / "MANIFEST.json", path / "MANIFEST.json")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_truncate, "model/model.safetensors has 3999 bytes, not the 4000"),
        (_lose, "trainer/state.json is missing"),
        (_lose_manifest, "MANIFEST.json cannot be read"),
        (_add_line, "MANIFEST.json is not what was written"),
        (_drop_line, "MANIFEST.json is not what was written"),
        (_swap_manifest, "MANIFEST.json is that of step 1"),
    ],
)
def test_damage_is_named_and_the_one_before_is_used(
    damage: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    before = checkpoint.save(tmp_path, 1, writer(1), keep=3)
    after = checkpoint.save(tmp_path, 2, writer(2), keep=3)
    damage(after)
    found, warnings = newest(tmp_path)
    assert found == before
    assert len(warnings) == 1
    assert says in warnings[0]


def test_nothing_whole_left_is_an_error_that_names_each(tmp_path: Path) -> None:
    for step in (1, 2):
        _truncate(checkpoint.save(tmp_path, step, writer(step), keep=3))
    with pytest.raises(UserError, match=r"step_00000002.*step_00000001.*no whole checkpoint is left"):
        newest(tmp_path)


def test_files_that_other_programs_leave_in_the_model_are_no_damage(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, writer(1), keep=1)
    (path / "model" / "README.md").write_text("notes")
    assert newest(tmp_path) == (path, [])


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, writer(1), keep=1)
    _truncate(checkpoint.save(tmp_path, 2, writer(2), keep=2))
    path = checkpoint.save(tmp_path, 2, writer(2), keep=2)
    assert newest(tmp_path) == (path, [])
    assert [step for step, _ in checkpoint.steps(tmp_path)] == [1, 2]


def test_a_damaged_later_checkpoint_does_not_crowd_out_whole_ones(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 60, writer(1), keep=1)
    _truncate(checkpoint.save(tmp_path, 120, writer(2), keep=2))
    path = checkpoint.save(tmp_path, 90, writer(3), keep=1)  # resumed from 60
    assert newest(tmp_path)[0] == path


def test_a_failing_write_leaves_nothing_behind(tmp_path: Path) -> None:
    good = checkpoint.save(tmp_path, 1, writer(1), keep=1)

    def broken(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        checkpoint.save(tmp_path, 2, broken, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [good.name]
    assert newest(tmp_path) == (good, [])


def test_disk_full_keeps_the_last_good_checkpoint(small_disk: Path) -> None:
    good = checkpoint.save(small_disk, 1, writer(1), keep=1)
    with pytest.raises(UserError, match=r"No space left.*step_00000001.*--resume"):
        checkpoint.save(small_disk, 2, writer(2, size=4_000_000), keep=1)
    assert [p.name for p in (small_disk / "checkpoints").iterdir()] == [good.name]
    assert newest(small_disk) == (good, [])


def test_disk_full_while_writing_safetensors_is_told_alike(small_disk: Path) -> None:
    import numpy as np

    good = checkpoint.save(small_disk, 1, writer(1), keep=1)

    def write(directory: Path) -> None:
        save_file({"w": np.zeros(2_000_000, dtype=np.float32)}, directory / "w.safetensors")

    with pytest.raises(UserError, match=r"cannot write checkpoint.*step_00000002"):
        checkpoint.save(small_disk, 2, write, keep=1)
    assert newest(small_disk) == (good, [])


def test_a_file_size_limit_is_told_alike(tmp_path: Path) -> None:
    """The same without the right to mount: the kernel refuses bytes beyond RLIMIT_FSIZE."""
    good = checkpoint.save(tmp_path, 1, writer(1), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"File too large.*step_00000001"):
            checkpoint.save(tmp_path, 2, writer(2, size=200_000), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert newest(tmp_path) == (good, [])


_ENDLESS = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import numpy as np
    from safetensors.numpy import save_file
    from ludus.train import checkpoint
    run, step = Path(sys.argv[1]), int(sys.argv[2])
    while True:
        step += 1
        def write(directory):
            (directory / "model").mkdir()
            save_file({"w": np.full(60_000, step, dtype=np.float32)}, directory / "model" / "w.safetensors")
        checkpoint.save(run, step, write, keep=2)
        print(step, flush=True)
    """
)


def test_kill_at_any_moment_loses_no_finished_checkpoint(tmp_path: Path) -> None:
    rng = random.Random(7)
    finished = 0
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", _ENDLESS, str(tmp_path), str(finished)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None
        finished = int(process.stdout.readline())  # it runs: kill it somewhere after this
        time.sleep(rng.uniform(0.0, 0.05))
        process.kill()
        told = [int(line) for line in process.stdout.read().split()]
        process.wait()
        finished = max([finished, *told])
        checkpoint.sweep(tmp_path / "checkpoints")
        found, warnings = newest(tmp_path)
        assert warnings == []
        assert found is not None
        step = int(found.name.removeprefix("step_"))
        assert step >= finished
        assert load_file(found / "model" / "w.safetensors")["w"].tolist() == [step] * 60_000
        names = [p.name for p in (tmp_path / "checkpoints").iterdir()]
        assert all(name.startswith("step_") for name in names)
        finished = step


def test_a_kill_between_the_two_renames_of_a_replacement_is_mended(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 5, writer(5), keep=1)
    path.rename(path.parent / ".old-step_00000005")  # what such a kill leaves
    assert newest(tmp_path) == (None, [])
    checkpoint.sweep(tmp_path / "checkpoints")
    assert newest(tmp_path) == (path, [])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one MiB; skipped where the user may not mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting a small disk needs root; the file size limit stands in for it")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def _sha256(data: bytes) -> str:
    """By another program than the one under test."""
    done = subprocess.run(["sha256sum"], input=data, capture_output=True, check=True)
    return done.stdout.split()[0].decode()


def test_pid_reuse_cannot_block_a_writer(tmp_path: Path) -> None:
    """A leftover temporary directory under our own process id is cleared by `sweep`, as at each start."""
    leftover = tmp_path / "checkpoints" / f".tmp-step_00000001-{os.getpid()}"
    leftover.mkdir(parents=True)
    checkpoint.sweep(tmp_path / "checkpoints")
    assert checkpoint.save(tmp_path, 1, writer(1), keep=1).exists()
