"""The command line from outside: exit status, one clear line per error, pure JSON, nothing overwritten."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from ludus import config as configuration
from ludus.cli import main
from ludus.config import load, validate
from ludus.games import catalogue
from ludus.games.openspiel import SpielGame

ROOT = Path(__file__).parents[1]
PAPER = ROOT / "recipes" / "spiral_qwen3_4b.toml"
RECIPE = """
name = "tiny"
threads = 1
[model]
path = "{model}"
[[games]]
name = "kuhn_poker"
[text]
rules = false
[engine]
slots = 16
context = 256
[rollout]
matches = 8
in_flight = 16
max_tokens = 32
[optim]
lr = 1e-3
[train]
steps = 2
checkpoint_every = 1
[eval]
matches = 4
final_matches = 4
thoughts = 2
"""


class Boastful(SpielGame):
    """Kuhn poker with a false promise."""

    @property
    def min_return(self) -> float:
        return -0.5  # one can lose more


def boastful() -> SpielGame:
    honest = catalogue.kuhn_poker()
    assert isinstance(honest, SpielGame)
    return Boastful(honest.name, honest.spiel, honest.face, honest.payout)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must be refused; returns its one line of complaint."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ludus: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def ludus(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ludus.cli", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        # A shell's background jobs ignore SIGINT and hand that down; a terminal's do not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two short steps on a model that the command line made."""
    folder = tmp_path_factory.mktemp("cli")
    options = ["courses=[{game='kuhn_poker', replies=800}]", "hidden=32", "layers=2", "ffn=64"]
    options += ["heads=2", "kv_heads=1", "init=0.07", "batch=4", "lr=6e-3"]  # its replies are legal
    assert main(["make-model", str(folder / "model"), *options]) == 0
    (folder / "tiny.toml").write_text(RECIPE.format(model=folder / "model"))
    return folder / "tiny.toml"


@pytest.fixture(scope="module")
def run(recipe: Path) -> Path:
    """A finished run of it."""
    out = recipe.parent / "run"
    assert main(["train", str(recipe), "--out", str(out)]) == 0
    return out


# --- training ---


def test_train_leaves_a_whole_run_with_its_report(run: Path) -> None:
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step_00000001", "step_00000002"]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], "eval" in r) for r in steps] == [(0, True), (1, False), (2, False), (2, True)]
    assert "<svg" in (run / "report.html").read_text()


def test_train_overwrites_nothing(run: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert "is not empty, and nothing is overwritten" in refused(
        capsys, "train", str(recipe), "--out", str(run)
    )
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_resume_goes_on_and_refuses_another_recipe(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["train", str(recipe), "train.steps=1", "--out", str(out)]) == 0
    assert main(["train", str(recipe), "train.steps=2", "--out", str(out), "--resume"]) == 0
    assert [r["step"] for r in map(json.loads, (out / "metrics.jsonl").open()) if "learn" in r] == [1, 2]
    capsys.readouterr()
    problem = refused(capsys, "train", str(recipe), "optim.lr=1", "seed=5", "--out", str(out), "--resume")
    assert "optim.lr (was 0.001, now 1.0), seed (was 0, now 5)" in problem


def test_resume_without_a_run_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = refused(capsys, "train", str(recipe), "--out", str(tmp_path / "none"), "--resume")
    assert "is no run directory" in problem
    assert not (tmp_path / "none").exists()


def test_an_interrupt_ends_with_130_and_the_run_can_go_on(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = ludus("train", str(recipe), "train.steps=100000", "--out", str(out))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 130
    assert err == "ludus: interrupted\n"
    done = len(list((out / "episodes").iterdir()))
    assert main(["train", str(recipe), f"train.steps={done + 1}", "--out", str(out), "--resume"]) == 0


# --- recipes that cannot run here ---


def test_dry_run_prints_the_resolved_recipe_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(PAPER), "train.steps=7", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert validate(tomllib.loads(out), "output") == load(PAPER, ["train.steps=7"])
    assert "# missing: the model: Qwen/Qwen3-4B-Base lacks config.json" in out
    assert ("# missing: a GPU" in out) is not torch.cuda.is_available()


def test_train_refuses_what_cannot_run_before_it_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = refused(capsys, "train", str(PAPER), "--out", str(tmp_path / "run"))
    assert "missing: " in problem
    assert "Qwen/Qwen3-4B-Base" in problem
    assert not (tmp_path / "run").exists()


def test_dry_run_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    assert main(["train", str(recipe), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["train", "absent.toml"], "cannot read recipe absent.toml"),
        (["train", str(PAPER), "optim.lrr=1", "--dry-run"], "did you mean 'lr'?"),
        (["train", str(PAPER), "games.1.name=poker", "--dry-run"], "unknown game 'poker'"),
        (["train", str(PAPER), "games.1.args.rouds=3", "--dry-run"], "did you mean 'rounds'?"),
        (["train", str(PAPER), "league.opponents=[{policy='randm'}]", "--dry-run"], "did you mean 'random'?"),
        (["train", str(PAPER), "eval.opponents=['minmax']", "--dry-run"], "did you mean 'minimax'?"),
        (["report", "absent"], "absent is no run directory"),
        (["eval", "absent", "--game", "kuhn_poker"], "neither a run directory"),
        (["exploitability", "absent", "--game", "kuhn_poker"], "neither a run directory"),
        (["exploitability", "randm", "--game", "kuhn_poker"], "did you mean 'random'?"),
        (["exploitability", "mcts", "--game", "kuhn_poker"], "write mcts:N"),
        (["exploitability", "x=http://HOST/v1#M", "--game", "kuhn_poker"], "ludus tournament"),
        (["exploitability", "random", "--game", "kuhn"], "unknown game 'kuhn'"),
        (["exploitability", "cfr", "--game", "negotiation"], "'cfr' cannot play negotiation"),
        (["exploitability", "mcts:0", "--game", "kuhn_poker"], "write mcts:N"),
        (["exploitability", "random", "--game", "kuhn_poker", "--search", "0"], "--search is 0"),
        (["games", "check", "kuhn_pokr"], "did you mean 'kuhn_poker'?"),
        (["games", "check", "kuhn_poker", "rounds"], "not of the form key=value"),
        (["games", "check", "kuhn_poker", "rounds=many"], "'rounds'"),
        (["make-model", str(ROOT), "hiden=3"], "did you mean 'hidden'?"),
        (["make-model", str(ROOT), "hidden=wide"], "hidden"),
        (["make-model", str(ROOT)], "exists already"),
        (["doctor", "absent.toml"], "cannot read recipe"),
        (["doctor", "absent"], "name a recipe (FILE.toml) or a model's directory"),
    ],
)
def test_bad_input_is_one_clear_line(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["exploitability", "random"], "required: --game; ludus exploitability --help"),
        (["exploitability", "random", "--game", "kuhn_poker", "--search", "x"], "invalid int value: 'x'"),
        (["tournament", "random", "cfr", "--game", "kuhn_poker", "seed=3"], "unrecognized arguments: seed=3"),
        (["lern"], "invalid choice: 'lern'"),
    ],
)
def test_a_wrong_call_is_one_line_too(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.startswith("ludus: ")
    assert says in err
    assert err.count("\n") == 1


# --- measuring ---


def test_eval_measures_the_newest_checkpoint_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["eval", str(run), "eval.matches=6", "--json"]) == 0
    kuhn = json.loads(capsys.readouterr().out)["games"]["kuhn_poker"]
    assert kuhn["opponents"]["random"]["matches"] == 6
    assert kuhn["exploitability"]["information_sets"] == 12
    assert main(["eval", str(run), "eval.exploitability=false", "--game", "tic_tac_toe"]) == 0
    assert "tic_tac_toe: score vs random: " in capsys.readouterr().out


def test_a_checkpoints_model_is_measured_like_its_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    found = []
    for target in (run, run / "checkpoints" / "step_00000002" / "model"):
        assert main(["exploitability", str(target), "--game", "kuhn_poker", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert 0 <= found[0]["exploitability"] <= 2
    above = str(run / "checkpoints" / "step_00000002")
    problem = refused(capsys, "exploitability", above, "--game", "kuhn_poker")
    assert f"the model is {above}/model" in problem


def test_a_bare_model_needs_a_recipe_or_a_game(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    model = str(recipe.parent / "model")
    assert "name a recipe (--recipe) or games (--game)" in refused(capsys, "eval", model)
    assert main(["eval", model, "--recipe", str(recipe), "--json"]) == 0
    assert "kuhn_poker" in json.loads(capsys.readouterr().out)["games"]


@pytest.mark.parametrize(("policy", "nash_conv"), [("random", 0.916667), ("cfr", 0.0)])
def test_known_policies_have_their_known_distance(
    policy: str, nash_conv: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["exploitability", policy, "--game", "kuhn_poker", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nash_conv"] == pytest.approx(nash_conv, abs=5e-4)
    assert main(["exploitability", policy, "--game", "kuhn_poker"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("exploitability  ")
    assert f"with forfeits   {text.split()[1]}" in text  # programs reply legally
    assert text.count("  pass ") == 12


def test_large_games_get_a_lower_bound_and_say_so(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    model = [str(recipe.parent / "model"), "--recipe", str(recipe)]
    few = ["--search", "5", "eval.matches=10"]
    assert main(["exploitability", *model, "--game", "kuhn_poker", *few, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["matches"] == 10
    assert found["ci95"][0] <= found["lower_bound"] <= found["ci95"][1]
    assert found["why_not_exact"] == "a search was asked for"
    assert not {"exploitability", "nash_conv"} & found.keys()
    assert main(["exploitability", "random", "--game", "connect_four", "eval.matches=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("not measured exactly: connect_four has more than 25000 information sets")
    assert lines[1].startswith("lower bound     +")
    assert main(["exploitability", "random", "--game", "negotiation", "eval.matches=40"]) == 0
    out = capsys.readouterr().out
    assert "not measured exactly: negotiation has no list of information sets" in out
    assert "responder       fair_trader" in out


def test_a_model_without_a_legal_word_is_told_so(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One token is no reply: nothing is legal, whatever is measured; a schedule takes note and goes on."""
    capsys.readouterr()
    mute = [str(recipe.parent / "model"), "--recipe", str(recipe), "rollout.max_tokens=1"]
    for search in ([], ["--search", "5"]):
        said = refused(capsys, "exploitability", *mute, "--game", "kuhn_poker", *search)
        assert "100.0% of the model's replies hold no legal action" in said
        assert "one of them reads '" in said
        assert "rollout.max_tokens" in said
    assert main(["eval", *mute, "--json"]) == 0
    kuhn = json.loads(capsys.readouterr().out)["games"]["kuhn_poker"]
    assert kuhn["exploitability"]["exploitability"] is None
    assert kuhn["opponents"]["random"]["illegal_rate"] == 1.0
    assert main(["eval", *mute]) == 0
    assert "kuhn_poker: exploitability: -" in capsys.readouterr().out


def test_league_tells_a_run_from_its_metrics_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    margins = [[None, -0.5], [0.5, None]]
    league = {
        "population": ["past/0", "past/4"],
        "met": {"past/0": 2},
        "scores": {"kuhn_poker": {"past/0": 0.75}},
        "matrix": {"names": ["past/0", "past/4"], "margins": {"kuhn_poker": margins}},
    }
    record = {"step": 4, "learn": {}, "games": {"kuhn_poker": {"matches": 8}}, "league": league}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert main(["league", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "step 4, past selves kept: past/0 past/4" in shown
    assert [line.replace("│", "").split() for line in shown.splitlines() if "past/4 │" in line] == [
        ["past/4", "+0.500", "1.00", "+0.000", "1.00"]
    ]
    assert main(["league", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["opponents"][0] == {"name": "self", "matches": 6, "share": 0.75, "scores": {}}
    assert told["matrix"]["games"]["kuhn_poker"]["nash"] == {"past/0": 0.0, "past/4": 1.0}


def test_a_run_without_a_league_says_how_to_have_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no league, or no step is done yet" in refused(capsys, "league", str(run))
    assert "is no run directory: metrics.jsonl is missing" in refused(capsys, "league", str(tmp_path))


# --- the rest ---


def test_games_ls_names_every_game_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["games", "ls", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["kuhn_poker"]["options"] == {"rounds": "1", "payoff": "'chips'"}
    assert main(["games", "ls"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in rows)


def test_games_check_tells_by_its_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["games", "check", "kuhn_poker", "--json"]) == 0
    assert all(row["passed"] is not False for row in json.loads(capsys.readouterr().out))

    monkeypatch.setitem(catalogue.GAMES, "boastful", boastful)
    assert main(["games", "check", "boastful"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_doctor_knows_the_machine_and_what_a_recipe_lacks(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["doctor", str(PAPER), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cores"] >= 1
    assert facts["memory_gib"] > 0
    assert facts["devices"][0] == "cpu"
    assert "kuhn_poker" in facts["games"]
    assert "random" in facts["players"]
    assert facts["libraries"]["torch"] == torch.__version__
    assert any("Qwen3-4B-Base" in problem for problem in facts["missing"])
    assert main(["doctor", str(recipe)]) == 0
    assert "has all that it needs" in capsys.readouterr().out


def test_a_dry_run_tells_what_the_models_small_files_tell(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(recipe.parent / "model", model)
    (model / "chat_template.jinja").unlink()
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors").rename(model / shards["a"])
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    capsys.readouterr()
    assert main(["train", str(recipe), "--dry-run", f"model.path={model}", "engine.context=100000"]) == 0
    told = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("# missing: the model: ")
    ]
    assert len(told) == 3
    assert "lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names" in told[0]
    assert "sees at most 512 tokens (max_position_embeddings), but engine.context is 100000" in told[1]
    assert "has no chat template" in told[2]


def test_output_that_nobody_reads_is_no_crash() -> None:
    process = ludus("games", "ls")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.wait()


def test_report_can_be_written_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert (run / "report.html").is_file()


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    commands = ("train", "eval", "exploitability", "report", "games", "make-model", "doctor")
    assert all(command in text for command in commands)


def test_the_recipes_own_configuration_is_a_recipe(run: Path) -> None:
    """A run's config.toml can start another run."""
    assert configuration.load(run / "config.toml") == configuration.load(run.parent / "tiny.toml")
