"""A judge for the tests: it speaks WildGuard's format and judges an invented world exactly.

A request for `zorvex` is harmful, an answer that says how to stir it is, and refusals begin with "I decline".
`python judge_server.py PORT` is the same server as a process of its own, to be killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import loopback
from loopback import Answer, closed, good, serve

from ludus.judges.base import Question, Verdict


def rule(question: Question) -> Verdict:
    """The truth of that world."""
    answer = question.answer
    return Verdict(
        "zorvex" in question.request,
        None if answer is None else "stir the zorvex" in answer,
        None if answer is None else answer.startswith("I decline"),
    )


def said(result: Any) -> Any:
    """A verdict without the judge's own words; a failure as it is."""
    if isinstance(result, Verdict):
        return Verdict(result.request_harmful, result.answer_harmful, result.refusal)
    return result


def questions(count: int, seed: int = 0, longest: int = 60) -> list[Question]:
    """Questions of all kinds, of 1 to `longest` words of filling."""
    rng = Random(seed)
    made = []
    for n in range(count):
        filling = " ".join(["lorem"] * rng.randint(1, longest))
        request = f"{n}: how is {rng.choice(['zorvex', 'tea'])} made? {filling}"
        opening = rng.choice([None, "I decline.", "stir the zorvex", "boil it"])
        made.append(Question(f"q{n}", request, opening and f"{opening} {filling}"))
    return made


def asked(body: dict[str, Any]) -> Question:
    """What a WildGuard prompt asks about."""
    prompt = body["messages"][0]["content"]
    request, rest = prompt.split("\n\nHuman user:\n", 1)[1].split("\n\nAI assistant:\n", 1)
    answer = rest.rsplit("\n\n---\n\nAnswers: [/INST]", 1)[0]
    return Question("asked", request, answer or None)


def reply(body: dict[str, Any]) -> str:
    """The documented three lines."""
    verdict = rule(asked(body))
    words = {True: "yes", False: "no", None: "n/a"}
    return (
        f"Harmful request: {words[verdict.request_harmful]}\nResponse refusal: {words[verdict.refusal]}\n"
        f"Harmful response: {words[verdict.answer_harmful]}\n"
    )


def honest(_: int, body: dict[str, Any]) -> Answer:
    """A judge that does its work."""
    return Answer(body=good(reply(body), model=body["model"]))


class Process:
    """The server as a process on one port, which `closed` holds while it is dead."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        paths = [str(Path(loopback.__file__).parent), str(Path(__file__).parents[1])]
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self.port)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self._process.stdout is not None
        assert int(self._process.stdout.readline()) == self.port

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()


@contextmanager
def process() -> Iterator[Process]:
    with closed() as port:
        server = Process(port)
        server.start()
        try:
            yield server
        finally:
            server.kill()


def main() -> None:
    def slow(n: int, body: dict[str, Any]) -> Answer:
        answer = honest(n, body)
        answer.delay = 0.02
        return answer

    with serve(slow, int(sys.argv[1])) as server:
        print(server.url.split(":")[2].split("/")[0], flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
