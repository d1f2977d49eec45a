"""What a step's episodes say, worked out by hand."""

from __future__ import annotations

from ludus.train.metrics import masked, summarise
from ludus.types import Episode, Stop, Turn


def turn(
    seat: int, tokens: int, *, legal: bool = True, stop: Stop = Stop.ACTION, trainable: bool = True
) -> Turn:
    return Turn(
        seat=seat,
        role=f"player_{seat}",
        index=0,
        policy="self" if trainable else "random",
        version=0,
        prompt_ids=[1],
        completion_ids=[2] * tokens,
        logprobs=[-1.0] * tokens,
        stop=stop,
        action="x" if legal else None,
        legal=legal,
        trainable=trainable,
    )


def episode(
    game: str,
    turns: list[Turn],
    returns: tuple[float, ...],
    forfeit: int | None = None,
    masked: str | None = None,
) -> Episode:
    n = len(returns)
    roles = tuple(f"player_{i}" for i in range(n))
    return Episode(0, game, 0, ("self",) * n, roles, turns, returns, forfeit, masked)


def test_rates_and_means_of_two_games() -> None:
    episodes = [
        # Self-play: 3 + 5 + 4 = 12 tokens in three replies, one refused and cut off at the limit.
        episode(
            "kuhn",
            [turn(0, 3), turn(1, 5, legal=False, stop=Stop.LENGTH), turn(1, 4)],
            (2.0, -2.0),
        ),
        # A draw against a frozen opponent, whose reply counts in `turns` alone.
        episode("kuhn", [turn(0, 8), turn(1, 100, legal=False, trainable=False)], (0.0, 0.0)),
        # A forfeit with equal returns is no draw.
        episode("kuhn", [turn(0, 0, legal=False)], (-1.0, -1.0), forfeit=0),
        # Masked: counted as a match and nowhere else.
        episode("kuhn", [turn(0, 50, legal=False, stop=Stop.ABORTED)], (9.0, -9.0), masked="timeout"),
        episode("tic", [turn(1, 6)], (-1.0, 1.0)),
    ]
    found = summarise(episodes)
    assert list(found) == ["kuhn", "tic"]
    assert found["kuhn"] == {
        "matches": 4,
        "turns": 6,
        "tokens": 20,
        "returns": {"player_0": (2.0 + 0.0 - 1.0) / 3, "player_1": -2.0},
        "illegal_rate": 2 / 5,
        "forfeit_rate": 1 / 3,
        "draw_rate": 1 / 3,
        "truncated_rate": 1 / 5,
        "reply_tokens": 4.0,
        "roles": {
            "player_0": {
                "matches": 3,
                "replies": 3,
                "return_rms": (5 / 3) ** 0.5,
                "illegal_rate": 1 / 3,
                "draw_rate": 1 / 3,
                "truncated_rate": 0.0,
                "reply_tokens": 11 / 3,
            },
            "player_1": {
                "matches": 1,  # in the second match it was the opponent
                "replies": 2,
                "return_rms": 2.0,
                "illegal_rate": 1 / 2,
                "draw_rate": 0.0,
                "truncated_rate": 1 / 2,
                "reply_tokens": 4.5,
            },
        },
    }
    assert found["tic"].pop("roles") == {
        "player_1": {
            "matches": 1,
            "replies": 1,
            "return_rms": 1.0,
            "illegal_rate": 0.0,
            "draw_rate": 0.0,
            "truncated_rate": 0.0,
            "reply_tokens": 6.0,
        }
    }
    assert found["tic"] == {
        "matches": 1,
        "turns": 1,
        "tokens": 6,
        "returns": {"player_1": 1.0},
        "illegal_rate": 0.0,
        "forfeit_rate": 0.0,
        "draw_rate": 0.0,
        "truncated_rate": 0.0,
        "reply_tokens": 6.0,
    }
    assert masked(episodes) == {"timeout": 1}


def test_seats_of_one_role_are_averaged_together() -> None:
    three = Episode(
        0,
        "odd",
        0,
        ("self",) * 3,
        ("judge", "guest", "guest"),
        [turn(0, 1), turn(1, 1), turn(2, 1), turn(2, 1)],
        (-1.0, 3.0, -2.0),
    )
    found = summarise([three])["odd"]
    assert found["returns"] == {"guest": 0.5, "judge": -1.0}
    guest = found["roles"]["guest"]
    assert (guest["matches"], guest["replies"]) == (2, 3)
    assert guest["return_rms"] == ((9.0 + 4.0) / 2) ** 0.5


def test_a_game_whose_matches_are_all_masked_has_no_figures() -> None:
    lost = [
        episode("kuhn", [turn(0, 3)], (1.0, -1.0), masked=why) for why in ("timeout", "http_500", "timeout")
    ]
    found = summarise(lost)["kuhn"]
    assert found.pop("matches") == 3
    assert found.pop("returns") == found.pop("roles") == {}
    assert set(found.values()) == {0}
    assert masked(lost) == {"timeout": 2, "http_500": 1}


def test_nothing_played_is_nothing_said() -> None:
    assert summarise([]) == {}
    assert masked([]) == {}
