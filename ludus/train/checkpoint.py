"""Checkpoints that survive a kill, a full disk and a flipped bit.

    checkpoints/.tmp-step_00000120-4711/   everything is written, hashed and fsynced here
    checkpoints/step_00000120/             the same directory after one rename
        model/  trainer/  MANIFEST.json    SHA-256 and size of every file

A directory under its final name is therefore always whole, or else something damaged it later; then its
manifest says so and the checkpoint before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ludus.errors import UserError

MANIFEST = "MANIFEST.json"
_FORMAT = 1
_TEMPORARY = ".tmp-"
_REPLACED = ".old-"


def save(run: Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Write the checkpoint of `step`, then thin to the newest `keep`. Returns its directory.

    `write(directory)` puts the files in (model/ and trainer/). Raises UserError where the file system
    refuses (disk full, quota, permission); whatever goes wrong, the temporary directory is removed and
    the checkpoints that exist stay as they are.
    """
    final = run / "checkpoints" / _name(step)
    write_sealed(final, step, write)
    _thin(final.parent, step, keep)
    return final


def write_sealed(final: Path, step: int, write: Callable[[Path], None]) -> None:
    """Make the directory `final`, whole or not at all, with a manifest over all that `write` puts in.

    A directory of that name is replaced. Raises UserError where the file system refuses; then nothing of the
    new one is left, and whatever was there stays.
    """
    parent = final.parent
    temporary = parent / f"{_TEMPORARY}{final.name}-{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        write(temporary)
        _seal(temporary, step)
        _put_in_place(temporary, final)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write checkpoint {final}: {_reason(e)}; {_last_good(parent.parent)} "
            "Free space or mend the cause, then go on with --resume"
        ) from e
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def latest(
    run: Path,
    warn: Callable[[str], None] | None = None,
    lacking: Callable[[Path], str | None] = lambda _: None,
) -> Path | None:
    """The newest checkpoint whose every file matches its manifest; None where there is none at all.

    `lacking` tells what else it lacks, if anything: files that it needs and that lie elsewhere. Each damaged
    one on the way is named to `warn` (standard error by default): which file, and what differs. Raises
    UserError where there are checkpoints but none is whole.
    """
    tell = warn or _to_stderr
    problems = []
    for step, path in reversed(steps(run)):
        problem = verify(path, step) or lacking(path)
        if problem is None:
            return path
        problems.append(f"checkpoint {path} is damaged: {problem}")
        tell(problems[-1] + "; using the one before it")
    if problems:
        raise UserError(
            "; ".join(problems) + "; no whole checkpoint is left: restore one from a copy, or start anew "
            "with another --out"
        )
    return None


def drop_after(run: Path, step: int) -> None:
    """Remove the checkpoints beyond `step`, damaged ones that a resume steps back over.

    One that lacks a snapshot would be whole again as soon as the run has made that anew, and then be ahead
    of its metrics.
    """
    for number, path in steps(run):
        if number > step:
            remove(path)


def steps(run: Path) -> list[tuple[int, Path]]:
    """(step, directory) of a run's checkpoints, in order of steps, whole or not."""
    found = []
    for path in (run / "checkpoints").glob("step_*"):
        digits = path.name.removeprefix("step_")
        if digits.isdigit() and path.is_dir():
            found.append((int(digits), path))
    return sorted(found)


def verify(checkpoint: Path, step: int) -> str | None:
    """What is wrong with a checkpoint directory, or None if every file is as it was written.

    Files that the manifest does not name are no fault: other programs may leave some in model/.
    """
    try:
        raw = (checkpoint / MANIFEST).read_bytes()
    except OSError as e:
        return f"{MANIFEST} cannot be read ({e.strerror})"
    try:
        manifest = json.loads(raw)
        # One spelling only, so that a flipped bit anywhere in the manifest shows too.
        canonical = _manifest_bytes(manifest["step"], manifest["files"]) == raw
    except (ValueError, KeyError, TypeError):
        canonical = False
    if not canonical:
        return f"{MANIFEST} is not what was written"
    if manifest["step"] != step:
        return f"{MANIFEST} is that of step {manifest['step']}"
    for name, entry in manifest["files"].items():
        problem = _differs(checkpoint / name, entry)
        if problem is not None:
            return f"{name} {problem}"
    return None


def sweep(parent: Path) -> None:
    """Clear away what a killed writer left among the sealed directories in `parent`.

    Only the run's one writer may call it.
    """
    for path in list(parent.glob(f"{_REPLACED}*")):
        name = path.name.removeprefix(_REPLACED)
        if (parent / name).exists():
            shutil.rmtree(path)
        else:
            path.rename(parent / name)  # killed between the two renames of a replacement
    for path in list(parent.glob(f"{_TEMPORARY}*")):
        shutil.rmtree(path)


def remove(sealed: Path) -> None:
    """Remove a sealed directory; a kill on the way leaves no half of it in sight."""
    doomed = sealed.with_name(f"{_TEMPORARY}{sealed.name}")
    sealed.rename(doomed)
    shutil.rmtree(doomed)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _seal(directory: Path, step: int) -> None:
    """Hash every file into the manifest and force all of it to the disk."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    entries = {p.relative_to(directory).as_posix(): _fingerprint(p) for p in files}
    manifest = directory / MANIFEST
    manifest.write_bytes(_manifest_bytes(step, entries))
    for path in [*files, manifest]:
        fsync(path)
    for path in [*(p for p in directory.rglob("*") if p.is_dir()), directory]:
        fsync(path)


def _put_in_place(temporary: Path, final: Path) -> None:
    """One rename; two where a damaged checkpoint of the same step is in the way."""
    aside = final.parent / f"{_REPLACED}{final.name}"
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    fsync(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _thin(parent: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`.

    Later ones, if there are any, do not belong to what has led here; they must not count as kept.
    """
    for path in [path for s, path in steps(parent.parent) if s <= step][:-keep]:
        remove(path)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "size": path.stat().st_size}


def _differs(path: Path, entry: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"has {size} bytes, not the {entry['size']} that were written"
        if _fingerprint(path) != entry:
            return "has another SHA-256 than what was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as e:
        return f"cannot be read ({e.strerror})"
    return None


def _manifest_bytes(step: int, files: dict[str, Any]) -> bytes:
    """The manifest, with a hash of itself so that damage to it is not blamed on the files."""
    body = {"format": _FORMAT, "step": step, "files": files}
    seal = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "seal": seal}, indent=1, sort_keys=True).encode() + b"\n"


def fsync(path: Path) -> None:
    """Force a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError | SafetensorError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _last_good(run: Path) -> str:
    existing = steps(run)
    return f"the last one is {existing[-1][1]}." if existing else "there is none before it."


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)
