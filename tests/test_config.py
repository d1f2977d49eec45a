"""Recipes: what they may say, and what they are told when they say something else."""

from __future__ import annotations

import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ludus.config import RunConfig, dump, load, override, validate
from ludus.errors import Lacking, UserError

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.toml"))
MINIMAL = 'name = "t"\n[model]\npath = "m"\n[[games]]\nname = "kuhn_poker"\n'


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(MINIMAL)
    return path


# --- recipes that come with Ludus ---


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads_and_its_games_exist(path: Path) -> None:
    from ludus.games import registry

    config = load(path)
    assert config.name == path.stem
    for game in config.games:
        with suppress(Lacking):  # of seeds, which are to be had from their publishers
            assert registry.make(game.name, **game.args).roles


def test_the_papers_recipe_has_the_papers_numbers() -> None:
    config = load(next(p for p in RECIPES if p.stem == "spiral_qwen3_4b"))
    optim, loss, rollout = config.optim, config.loss, config.rollout
    assert (optim.lr, optim.schedule, optim.warmup_steps) == (1e-6, "constant", 0)
    assert (optim.epochs, optim.minibatches, config.train.steps) == (2, 1, 400)
    assert (loss.clip_low, loss.clip_high, loss.reference_kl) == (0.2, 0.2, 0.0)
    assert (rollout.temperature, rollout.max_tokens, rollout.forfeit) == (1.0, 4096, "spiral")
    assert (config.algo.estimator, config.algo.decay) == ("rae", 0.95)
    assert (config.model.dtype, config.engine.dtype, config.needs) == ("bfloat16", "bfloat16", "gpu")
    assert [g.name for g in config.games] == ["tic_tac_toe", "kuhn_poker", "negotiation"]


# --- round trip ---


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_dump_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load(path, ["seed=3", "league.opponents=[{policy='random', weight=0.5}]"])
    (tmp_path / "c.toml").write_text(dump(config))
    assert load(tmp_path / "c.toml") == config


@settings(max_examples=30, deadline=None)
@given(
    name=st.text(min_size=1),
    lr=st.floats(1e-12, 1.0),
    beta=st.floats(0.0, 1.0),
    args=st.dictionaries(
        st.text(min_size=1),
        st.integers(-(2**31), 2**31) | st.booleans() | st.text() | st.lists(st.integers(0, 9)),
        max_size=3,
    ),
)
def test_dump_reads_back_equal_whatever_the_values(
    name: str, lr: float, beta: float, args: dict[str, object]
) -> None:
    config = validate(
        {
            "name": name,
            "model": {"path": name},
            "games": [{"name": "g", "args": args}],
            "optim": {"lr": lr, "betas": [beta, 0.5]},
        },
        where="test",
    )
    assert validate(tomllib.loads(dump(config)), where="test") == config


# --- overrides ---


def test_overrides_win_over_the_recipe_and_over_defaults(recipe: Path) -> None:
    config = load(
        recipe,
        [
            "optim.lr=3e-4",
            "model.path=other/dir",  # a bare word is a string
            "games.0.name=leduc_poker",
            "games.0.args.rounds=3",
            'eval.opponents=["random", "minimax"]',
            "text.rules=false",
            "optim.betas=[0.8, 0.9]",
        ],
    )
    assert config.optim.lr == 3e-4
    assert config.model.path == "other/dir"
    assert (config.games[0].name, config.games[0].args) == ("leduc_poker", {"rounds": 3})
    assert config.eval.opponents == ("random", "minimax")
    assert config.text.rules is False
    assert config.optim.betas == (0.8, 0.9)
    assert config.rollout.matches == 128  # untouched default


def test_the_last_of_two_overrides_counts(recipe: Path) -> None:
    assert load(recipe, ["seed=1", "seed=2"]).seed == 2


def test_a_value_may_hold_an_equals_sign(recipe: Path) -> None:
    assert load(recipe, ["model.path=a=b"]).model.path == "a=b"


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("optim.lr", r"'optim.lr' is not of the form key=value"),
        ("=3", r"not of the form key=value"),
        ("name.first=x", r"name is a value, not a section"),
        ("games.1.name=x", r"'1' is no index into a list of 1"),
        ("games.first.name=x", r"'first' is no index into a list of 1"),
    ],
)
def test_overrides_that_fit_nowhere(item: str, says: str, recipe: Path) -> None:
    with pytest.raises(UserError, match=says):
        load(recipe, [item])


def test_a_word_stands_for_the_kind_of_a_cluster_before_and_after_its_other_keys(recipe: Path) -> None:
    for items in (["cluster=ray", "cluster.actors=2"], ["cluster.actors=2", "cluster=ray"]):
        cluster = load(recipe, items).cluster
        assert (cluster.kind, cluster.actors) == ("ray", 2)
    assert load(recipe, ["cluster=ray"]).cluster.actors == 1
    with pytest.raises(
        UserError, match=r"'actors' says nothing without a cluster; set cluster\.kind = 'ray'"
    ):
        load(recipe, ["cluster.actors=2"])
    with pytest.raises(UserError, match="should be 'local' or 'ray'"):
        load(recipe, ["cluster=rey"])


def test_override_makes_sections_that_are_not_there() -> None:
    assert override({}, ["a.b.c=1"]) == {"a": {"b": {"c": 1}}}


# --- what is refused, and how it is told ---


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (["optim.lrr=1"], r"unknown key 'optim.lrr'; did you mean 'lr'\?"),
        (["rolout.matches=1"], r"unknown key 'rolout'; did you mean 'rollout'\?"),
        (["games.0.nam=x"], r"unknown key 'games.0.nam'; did you mean 'name'\?"),
        (["algo.zzzzzz=1"], r"unknown key 'algo.zzzzzz'; known keys here: estimator, decay, discount"),
        (["league.opponents=[{policy='random', wieght=2}]"], r"'league.opponents.0.wieght'.*'weight'"),
        (["optim.lr=fast"], r"'optim.lr'.*number.*got 'fast'"),
        (["optim.lr=-1"], r"'optim.lr'.*greater than 0.*got -1"),
        (["rollout.matches=2.5"], r"'rollout.matches'.*integer.*got 2.5"),
        (["rollout.top_p=0"], r"'rollout.top_p'.*greater than 0"),
        (["algo.decay=1.5"], r"'algo.decay'.*less than or equal to 1"),
        (["algo.estimator=gae"], r"'algo.estimator'.*'rae'.*got 'gae'"),
        (
            ["alarms.stop=['entropie']"],
            r"'alarms.stop.0': Input should be 'illegal'.* or 'any' \(got 'entropie'\)",
        ),
        (["games=[]"], r"'games'.*at least 1"),
        (["optim=3"], r"'optim'"),
        (["algo.estimator=grpo"], r"'grpo' needs rollout.group_size of at least 2"),
        (["rollout.group_size=3"], r"rollout.matches \(128\) is no multiple of rollout.group_size \(3\)"),
        (["rollout.max_tokens=512"], r"max_tokens \(512\) leaves no room for a prompt in engine.context"),
        (["league.self_weight=0"], r"nobody to play against"),
        (["loss.magnet_of=average"], r"'average' needs an average of the weights; set optim.average"),
        (["engine.kind=vllm", "loss.proximal=sampler"], r"needs engine.kind = 'torch'"),
        (
            ["engine.kind=vllm", "engine.vllm.sleep=true", "rollout.max_lag=1"],
            r"set engine.vllm.sleep = false",
        ),
        (["games=[{name='kuhn_poker'}, {name='kuhn_poker'}]"], r"labels .* repeat"),
        (["seed=-1", "optim.lrr=1"], r"'seed'.*unknown key 'optim.lrr'|unknown key 'optim.lrr'.*'seed'"),
    ],
)
def test_refusals_name_the_key_and_the_remedy(items: list[str], says: str, recipe: Path) -> None:
    with pytest.raises(UserError, match=says):
        load(recipe, items)


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('name = "t"\n')
    with pytest.raises(UserError, match=r"'model' is missing; 'games' is missing"):
        load(tmp_path / "r.toml")


def test_recipes_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read recipe .*absent.toml: No such file"):
        load(tmp_path / "absent.toml")
    with pytest.raises(UserError, match=r"cannot read recipe .*: Is a directory"):
        load(tmp_path)
    (tmp_path / "r.toml").write_text("name = \n")
    with pytest.raises(UserError, match=r"r.toml is not valid TOML.*line 1"):
        load(tmp_path / "r.toml")
    (tmp_path / "b.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(UserError, match=r"b.toml is not valid TOML"):
        load(tmp_path / "b.toml")


def test_a_configuration_cannot_be_changed(recipe: Path) -> None:
    config: RunConfig = load(recipe)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_a_game_may_be_in_the_mix_twice_under_labels(recipe: Path) -> None:
    games = "games=[{name='kuhn_poker'}, {name='kuhn_poker', label='long', args={rounds=5}}]"
    assert [g.label for g in load(recipe, [games]).games] == ["kuhn_poker", "long"]
