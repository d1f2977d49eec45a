"""Seeds by path: the same everywhere, different for different paths."""

from __future__ import annotations

import os
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from ludus.seeding import derive

part = st.one_of(st.integers(-(2**70), 2**70), st.text(alphabet="ab/\\:0str", max_size=6))
paths = st.lists(part, max_size=4)


def test_values_are_pinned_for_good() -> None:
    """Another value here means that no run of an earlier version can be repeated or resumed."""
    assert derive(0, "match", 0) == 6628547125880397652
    assert derive(7, "reply", 12) == 1272780668400789652  # b2sum -l 64 of int:7/str:reply/int:12, halved


def test_the_same_path_gives_the_same_seed_in_another_process() -> None:
    code = "from ludus.seeding import derive; print(derive(3, 'deal', 'past/120', -1))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert outputs == {f"{derive(3, 'deal', 'past/120', -1)}\n"}


@given(paths)
def test_seeds_are_what_a_request_may_carry(path: list[int | str]) -> None:
    assert 0 <= derive(*path) < 2**63


@given(paths, paths)
def test_different_paths_give_different_seeds(one: list[int | str], other: list[int | str]) -> None:
    assert (derive(*one) == derive(*other)) == (one == other)


def test_a_slash_in_a_name_is_no_step_in_the_path() -> None:
    alike = [("a", "b"), ("a/b",), ("a/str:b",), ("a\\/str:b",), ("a\\", "b"), ("a\\/", "b"), ("a", "/b")]
    assert len({derive(*path) for path in alike}) == len(alike)


def test_a_number_and_its_digits_are_two_paths() -> None:
    assert derive(1, 2) != derive("1", 2)
    assert derive(12) != derive(1, 2)


def test_bits_are_spread_evenly() -> None:
    """Each of the 63 bits is set in about half of 4,000 seeds (five standard deviations: 158)."""
    seeds = [derive("bits", i) for i in range(4000)]
    for bit in range(63):
        assert abs(sum(seed >> bit & 1 for seed in seeds) - 2000) < 158
