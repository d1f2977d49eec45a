"""A Ray cluster to play on: one that runs already, or one on this machine for the length of the run.

Ray waits for minutes where nobody answers at an address, and for ever where actors do not fit. So both are
looked at first, and told. A cluster of our own asks whoever connects for a token that is never written to
disk, and has no dashboard; and nothing is reported to Ray's makers.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ludus.config import ClusterConfig
from ludus.errors import UserError

_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(
    [0, 0, 0, 4, 0, 0, 0, 0, 0]
)  # of HTTP/2, which gRPC speaks
_SETTINGS = 4  # type of the frame that every such server answers with
PLACED = "LUDUS_PLACED"  # variable of a rank that Ray has started: cluster, and name of its placement group
_NAMESPACE = "ludus"  # in which names are looked up
_ANSWER = 5.0  # seconds
_SILENT = 3.0  # seconds without an answer after which a cluster that was there is gone


def placed() -> bool:
    """Whether this process is a rank that Ray has started (`launch.py`)."""
    return PLACED in os.environ


def end_with_launcher() -> None:
    """Have this rank end, as by SIGKILL, when the process that started it is gone."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)  # nothing is ever written there
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def heed_interrupts() -> None:
    """Have this rank heed SIGINT, which Ray blocks in all that it starts, or a shell had it ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def connect(cluster: ClusterConfig) -> bool:
    """Have this process be the driver of a cluster; whether it is a cluster of our own, to be shut down.

    Where the process is connected already, that cluster is taken. Raises UserError where Ray is not
    installed, and where nobody answers at `cluster.address`, or not as Ray does.
    """
    ray = _ray()
    if ray.is_initialized():
        return False
    quiet = {"logging_level": "ERROR", "log_to_driver": False, "namespace": _NAMESPACE}
    where = None
    if placed():
        where = os.environ[PLACED].partition(" ")[0]
    elif cluster.address is not None:
        where = _address(cluster.address)
        _answers(where)
    try:
        if where is not None:
            ray.init(address=where, **quiet)
        else:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
            ray.init(address="local", num_cpus=_cores(), include_dashboard=False, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as e:
        raise UserError(f"cannot use Ray on {where or 'this machine'}: {_first_line(e)}") from e
    return True


def place(cluster: ClusterConfig, name: str = "") -> Any:
    """A placement group, called `name`, with one bundle per learner that Ray starts and then one per actor;
    of a rank that Ray has started, that in which it stands. Raises UserError where they do not fit.
    """
    ray = _ray()
    from ray.util.placement_group import get_placement_group, placement_group, remove_placement_group

    if placed():
        return get_placement_group(os.environ[PLACED].partition(" ")[2])
    learner = _bundle(cluster.learner_cpus, cluster.learner_gpus)
    actor = _bundle(cluster.cpus, cluster.gpus)
    bundles = [learner] * cluster.learners + [actor] * cluster.actors
    group = placement_group(bundles, strategy="PACK", name=name)
    total = ray.cluster_resources()
    asked = {kind: sum(bundle.get(kind, 0.0) for bundle in bundles) for kind in ("CPU", "GPU")}
    asked = {kind: n for kind, n in asked.items() if n}
    own = cluster.address is None  # it cannot grow
    never = own and any(total.get(kind, 0.0) < n for kind, n in asked.items())
    if not never and group.wait(timeout_seconds=cluster.patience):
        return group
    free = ray.available_resources()
    remove_placement_group(group)
    waited = "" if never else f", and {cluster.patience:g} s brought no more"
    learners, less = "", "cluster.actors, cluster.cpus or cluster.gpus"
    if cluster.learners:
        learners = f"cluster.learners = {cluster.learners} with {_words(learner)} each and "
        less = f"cluster.learners, {less}, or what each learner has"
    raise UserError(
        f"{learners}cluster.actors = {cluster.actors} with {_words(actor)} each do not fit: the cluster has "
        f"{_words({kind: total.get(kind, 0.0) for kind in asked})}, of which "
        f"{_words({kind: free.get(kind, 0.0) for kind in asked})} free{waited}; lower {less}"
    )


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {kind: n for kind, n in (("CPU", cpus), ("GPU", gpus)) if n}


def check_alive(address: str) -> None:
    """Raise UserError where the head of the cluster, HOST:PORT, is gone.

    Ray itself would end this process, in a minute or with the next object, and not say why.
    """
    host, _, port = address.rpartition(":")
    until = time.monotonic() + _SILENT
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER):
                return
        except OSError as e:
            if time.monotonic() > until:
                raise UserError(
                    f"the Ray cluster at {address} is gone ({e}). What was done is kept: start it again, and "
                    "go on with --resume"
                ) from e
        time.sleep(0.2)


def _ray() -> Any:
    # Before the import: Ray reads them then.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as e:
        raise UserError(
            "cluster.kind = 'ray' needs Ray, which is not installed: pip install 'ludus[ray]'"
        ) from e
    return ray


def _address(wanted: str) -> str:
    """HOST:PORT for "auto": by RAY_ADDRESS, or the cluster that was started last on this machine."""
    if wanted == "auto":
        noted = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
        wanted = os.environ.get("RAY_ADDRESS", "") or (noted.read_text().strip() if noted.is_file() else "")
        if not wanted:
            raise UserError(
                "cluster.address = 'auto' finds no Ray cluster on this machine: start one (ray start "
                "--head), name one (HOST:PORT), or leave it out for a cluster of the run's own"
            )
    host, colon, port = wanted.rpartition(":")
    if not colon or not host or "/" in host or not port.isdigit():
        raise UserError(
            f"cluster.address is {wanted!r}; it must be 'auto' or HOST:PORT, as `ray start --head` prints it "
            "(not ray://: run ludus on a machine of the cluster)"
        )
    return wanted


def _answers(address: str) -> None:
    """Raise UserError unless a server at `address` speaks as Ray's do."""
    host, _, port = address.rpartition(":")
    start = "start it (ray start --head), or leave cluster.address out for a cluster of the run's own"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER) as line:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            line.settimeout(_ANSWER)
            line.sendall(_HELLO)
            reply = line.recv(9)
    except (OSError, OverflowError) as e:
        raise UserError(f"no Ray cluster answers at {address} ({e}); {start}") from e
    if len(reply) < 4 or reply[3] != _SETTINGS:
        raise UserError(f"what answers at {address} is not Ray: another program uses that port; {start}")


def _cores() -> int:
    """Cores that this process may use: Ray would count all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _words(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{n:g} {name}" for name, n in resources.items()) or "nothing"


def _first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]
