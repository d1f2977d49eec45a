"""The whole typed configuration of a run: what a recipe may say.

Loads without torch. Precedence: defaults < recipe < command line (`key=value`, dots for nesting, values in
TOML syntax; a bare word counts as a string). An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ludus.errors import UserError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


RESERVED = ("self", "judged")  # policy ids of what is trained
_BY_KIND = ("cluster",)  # sections that a word may stand for, which is their kind: cluster=ray
PAST = "past/"  # what policy ids of its past selves begin with
_PAST_RULE = re.compile(r"past/(0|uniform|hard|even|latest(:(?P<newest>[1-9]\d*))?)")
_PAST_SELF = re.compile(r"past/(0|[1-9]\d*)")


Product = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_PRODUCTS: tuple[Product, ...] = get_args(Product)


class Section(BaseModel):
    """A part of the recipe: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


S = TypeVar("S", bound=Section)


class ModelConfig(Section):
    """The policy that is trained."""

    path: str  # a Hugging Face directory (config.json, safetensors, tokenizer.json)
    # How a dialogue is written; auto: told from the directory's own chat template.
    template: Literal["auto", "qwen3", "llama3", "gemma3", "plain"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the learner's weights
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them
    trust_remote_code: bool = False  # run Python code that lies in the directory; read it before


class GameConfig(Section):
    """One game of the mix."""

    name: str  # registry name: `ludus games ls`
    label: str = ""  # what metrics and episodes call it; the name, unless a game is in the mix twice
    weight: Positive = 1.0  # share of the matches of a step, relative to the other games
    args: dict[str, Any] = {}  # passed to the game: rounds = 3, payoff = "sign", ...

    @model_validator(mode="before")
    @classmethod
    def _labelled(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and not data.get("label") and "name" in data:
            return {**data, "label": data["name"]}
        return data


class TextConfig(Section):
    """How observations become prompts and replies become actions."""

    context: Literal["board", "chat"] = "board"
    rules: bool = True  # whether the rules of the game are part of the prompt
    think: bool = True  # the reply opens with a private thought
    # How a reply marks its action: \boxed{ACTION} anywhere in it, or <answer>ACTION</answer> and nothing else
    # beside the thought, for games of free text.
    format: Literal["boxed", "answer"] = "boxed"
    stop_on_action: bool = True  # stop sampling at the first complete action after the thought


class VllmConfig(Section):
    """What vLLM alone wants to know."""

    tensor_parallel: Count = 1  # GPUs that share a model
    memory: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.4  # share of each GPU that weights and cache may fill
    eager: bool = False  # neither compile nor capture graphs: starts sooner, runs slower
    sleep: bool = False  # leave the GPU to the learner while it works
    # Adapters that are decoded together over one base; 0: each is merged, and they take turns
    adapters: Annotated[int, Field(ge=0)] = 8


class EngineConfig(Section):
    """Who samples."""

    kind: Literal["torch", "vllm"] = "torch"
    dtype: Literal["float32", "bfloat16"] = "float32"
    slots: Count = 256  # sequences decoded together
    context: Count = 512  # tokens per slot, prompt and reply together
    threads: Annotated[int, Field(ge=0)] = 0  # CPU threads of a product; 0 = the run's. A tiny model wants 1
    # float32 products of the torch engine, in torch's terms
    matmul: Literal["highest", "high", "medium"] = "highest"
    graphs: bool = True  # decode steps of the torch engine as CUDA graphs: faster, takes memory; CPU: nothing
    vllm: VllmConfig = VllmConfig()  # for kind = "vllm"


class RolloutConfig(Section):
    """How matches are played."""

    matches: Count = 128  # per step, over all games
    group_size: Count = 1  # matches that share game, seed and opponents
    in_flight: Count = 512  # matches alive at once
    # Versions that the weights of a match may lag behind the learner's when it is learnt from. 0: rollout and
    # learner take turns; above, the matches of so many further steps are played while the learner works.
    max_lag: Annotated[int, Field(ge=0)] = 0
    max_tokens: Count = 64  # per reply
    temperature: NonNegative = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    retries: Annotated[int, Field(ge=0)] = 0  # further attempts after an illegal reply, before the forfeit
    forfeit: Literal["zero_sum", "spiral"] = "zero_sum"  # payoffs of a forfeit, by name


class EndpointConfig(Section):
    """A model behind an OpenAI-compatible chat endpoint. The API key is named, never held."""

    base_url: str  # up to and including the version: "http://127.0.0.1:8000/v1"
    model: str
    key_env: str | None = None  # environment variable that holds the API key; left out: the server wants none
    timeout: Positive = 60.0  # seconds for one attempt, from its first byte out to its last byte in
    retries: Annotated[int, Field(ge=0)] = 4  # further attempts after the first
    backoff: NonNegative = 0.5  # seconds before the first retry; doubles, with jitter
    longest_wait: Positive = 60.0  # seconds; a Retry-After beyond it is not waited for
    concurrency: Count = 16  # requests in flight at once

    @field_validator("base_url")
    @classmethod
    def _http(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return url


class JudgeConfig(Section):
    """Who says whether a request or an answer is harmful, and whether an answer refuses (docs/judges.md)."""

    kind: Literal["chat", "classifier"] = "chat"

    # chat: a guard model behind OpenAI-compatible endpoints, all of which serve the same model
    endpoints: tuple[EndpointConfig, ...] = ()
    format: Literal["wildguard", "llama_guard", "qwen3guard"] = "wildguard"  # its prompt and its replies
    controversial: Literal["strict", "loose"] = "strict"  # qwen3guard: counts as harmful, or does not
    both: bool = True  # llama_guard, qwen3guard: a second call judges the request that an answer is to
    max_tokens: Count = 128  # of a reply
    strikes: Count = 5  # failures in a row after which an endpoint is left alone
    rest: Annotated[float, Field(gt=0.0, le=1.5)] = 1.0  # seconds until it is tried again by one question
    # Seconds that a question waits for endpoints which nobody gets a reply from, before it counts as failed.
    patience: NonNegative = 30.0
    check_model: bool = True  # a reply must name the endpoint's model, if it names any
    request_ids: bool = False  # a reply must repeat the X-Request-Id (vLLM: --enable-request-id-headers)

    # classifier: a Hugging Face sequence classifier in this process
    model: str | None = None  # its directory
    reads: Literal["request", "answer", "pair"] = "pair"
    # Which of the classifier's labels mean yes to "request_harmful", "answer_harmful", "refusal".
    labels: dict[Literal["request_harmful", "answer_harmful", "refusal"], tuple[str, ...]] = {}
    threshold: Fraction = 0.5  # of the probability of those labels; yes from here on
    context: Count | None = None  # tokens; a longer text gets no verdict. Left out: what the model can read
    batch: Count = 32  # texts per forward pass
    device: Literal["cpu", "cuda", "mps"] = "cpu"

    cache: Count = 65536  # verdicts kept in memory
    cache_file: str | None = None  # a JSONL file that keeps all of them
    window: Count = 200  # calls over which the next two are measured; they sound from the 20th on
    max_unparsed: Fraction = 0.1  # share of replies out of format, beyond which the run stops
    max_failed: Fraction = 0.2  # share of calls without a verdict, for whatever reason

    @property
    def identity(self) -> dict[str, Any]:
        """What its verdicts depend on: not where it is served, how it is asked, or what is kept."""
        own = {
            "kind",
            "format",
            "controversial",
            "both",
            "max_tokens",
            "model",
            "reads",
            "labels",
            "threshold",
        }
        served = sorted({endpoint.model for endpoint in self.endpoints})
        return self.model_dump(mode="json", include={*own, "context"}) | {"endpoints": served}

    @model_validator(mode="after")
    def _one_kind(self) -> JudgeConfig:
        if self.kind == "chat":
            if not self.endpoints:
                raise ValueError("a chat judge needs endpoints; name at least one base_url and model")
            urls = [endpoint.base_url.rstrip("/") for endpoint in self.endpoints]
            if twice := [url for url in dict.fromkeys(urls) if urls.count(url) > 1]:
                raise ValueError(f"endpoint {twice[0]!r} is there twice; raise its concurrency instead")
        elif self.model is None or not self.labels:
            raise ValueError("a classifier needs model (a directory) and labels (what its labels mean)")
        foreign = _OF_CLASSIFIER if self.kind == "chat" else _OF_CHAT
        for name in foreign:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name!r} says nothing to a judge of kind {self.kind!r}; leave it out")
        return self


_OF_CHAT = (
    *("endpoints", "format", "controversial", "both", "max_tokens"),
    *("strikes", "rest", "patience", "check_model", "request_ids"),
)
_OF_CLASSIFIER = ("model", "reads", "labels", "threshold", "context", "batch", "device")


class PolicyConfig(Section):
    """One of the policies that are trained. Without any, one policy plays every role."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    roles: tuple[
        str, ...
    ] = ()  # that it plays: ROLE, or GAME/ROLE; left out where it is the only policy: all
    model: str | None = None  # where it starts, if not at model.path; of the same architecture and tokenizer
    lr: Positive | None = None  # its own optim.lr


class AdapterConfig(Section):
    """Low-rank adapters (LoRA): the model stays as it is, and each policy learns a small change of it."""

    rank: Count = 16
    alpha: Count = 32  # the change is multiplied by alpha / rank
    targets: Annotated[tuple[Product, ...], Field(min_length=1)] = _PRODUCTS  # of every layer


class OpponentConfig(Section):
    """An opponent that does not learn and takes one seat in some of the matches: a past self, a program, a
    frozen model, or a server."""

    # A program's name, such as "random" (`ludus doctor` lists them); or, with a model or an endpoint, a name
    # of your choice; or past selves: "past/0" (before the first step), "past/latest:K" (the newest K),
    # "past/uniform" (all alike), "past/hard" (those it loses to), "past/even" (those that are its equals).
    policy: str
    weight: Positive = 1.0
    model: str | None = None  # a Hugging Face directory of the trained model's architecture and tokenizer
    endpoint: EndpointConfig | None = None
    games: tuple[str, ...] = ()  # labels of the games that it plays; left out: all
    # Roles that it always takes, such as "defender", or GAME/ROLE; the trained policy has the others. Left
    # out: the trained policy has one seat, each in turn, and this opponent all others.
    roles: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> OpponentConfig:
        if self.model is not None and self.endpoint is not None:
            raise ValueError(f"opponent {self.policy!r} has both a model and an endpoint; keep one")
        if self.policy in RESERVED:
            raise ValueError(f"{self.policy!r} names the trained policy itself; choose another name")
        if self.policy.startswith(PAST):
            if self.model is not None or self.endpoint is not None:
                raise ValueError(f"{self.policy!r} names a past self; choose another name for this model")
            if not _PAST_RULE.fullmatch(self.policy):
                raise ValueError(
                    f"{self.policy!r} is no rule for past selves; there are past/0, past/latest, "
                    "past/latest:K, past/uniform, past/hard and past/even"
                )
        return self


class LeagueConfig(Section):
    """Who plays whom."""

    self_weight: NonNegative = 1.0  # weight of plain self-play against the opponents' weights
    opponents: tuple[OpponentConfig, ...] = ()
    snapshot_every: Annotated[int, Field(ge=0)] = 0  # steps between snapshots of the trained policy; 0 = none
    # Snapshots that stay. The first always does, and the newest, or the newest K for "past/latest:K".
    keep: Annotated[int, Field(ge=2)] = 8
    resident: Count = 2  # past selves per opponent and step: so many sets of weights are in memory
    # Matches of each new snapshot, per game, with every other one and every opponent in this process: they
    # fill the payoff matrix, half of them in each seating.
    payoff_matches: Annotated[int, Field(ge=0)] = 32
    payoff_decay: Fraction = 0.9  # part of the trained policy's record against others that a step leaves

    @model_validator(mode="after")
    def _somebody(self) -> LeagueConfig:
        if self.self_weight == 0 and not self.opponents:
            raise ValueError("league.self_weight is 0 and there are no opponents: nobody to play against")
        names = [o.policy for o in self.opponents]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"league.opponents has {twice[0]!r} twice; give each a name of its own")
        rules = [name for name in names if name.startswith(PAST) and name != "past/0"]
        if rules and not self.snapshot_every:
            raise ValueError(f"{rules[0]!r} needs past selves to choose from; set league.snapshot_every")
        if self.keep <= self.newest:
            raise ValueError(
                f"'past/latest:{self.newest}' needs as many snapshots beside the first one; set league.keep "
                f"to at least {self.newest + 1}"
            )
        return self

    @property
    def newest(self) -> int:
        """How many of the newest snapshots always stay: as many as any opponent asks for."""
        rules = [_PAST_RULE.fullmatch(o.policy) for o in self.opponents]
        return max([1, *(int(rule["newest"] or 1) for rule in rules if rule)])


class AlgoConfig(Section):
    """Who gets the credit."""

    estimator: Literal["rae", "reinforce", "grpo", "rloo", "reinforce_pp", "marshal"] = "rae"
    decay: Fraction = 0.95  # of RAE's moving averages
    discount: Fraction = 1.0  # of a seat's later turn rewards


class LossConfig(Section):
    """What is minimised."""

    clip_low: Positive = 0.2
    clip_high: Positive = 0.2
    # Whose log-probabilities the clip compares with: the learner's own before the first of several updates
    # (one more forward pass), or the sampler's, which an engine in float32 gives just as exactly.
    proximal: Literal["learner", "sampler"] = "learner"
    is_cap: Positive = 2.0  # cap of the sampler-to-learner importance weight
    normaliser: Literal["dr_grpo", "token_mean", "turn_mean"] = "dr_grpo"
    reference_kl: NonNegative = 0.0  # weight of the KL to the frozen initial policy (k3 estimate)
    magnet_kl: NonNegative = 0.0  # weight of the exact KL to a slowly moving copy
    magnet_every: Count = 50  # steps between refreshes of that copy
    magnet_of: Literal["policy", "average"] = "policy"  # what is copied then: the weights or their average
    entropy: NonNegative = 0.0  # weight of the entropy bonus


class SftDataConfig(Section):
    """A file or directory of supervised data, as in docs/supervised.md. A bare path will do."""

    path: str
    weight: Positive = 1.0  # share of the supervised rows, relative to the other files
    only: Literal["all", "won"] = "all"  # of a run's episodes: every legal reply, or those of seats that won
    policies: tuple[str, ...] = ()  # those that learn from it; left out: all that are trained

    @model_validator(mode="before")
    @classmethod
    def _path(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str) else data


class SftConfig(Section):
    """Supervised rows beside self-play, so that format and helpfulness survive. Without data: none."""

    data: tuple[SftDataConfig, ...] = ()
    weight: Positive = 1.0  # of their mean cross-entropy, which is added to the loss of every optimizer step
    batch: Count = 8  # rows per optimizer step
    context: Count | None = None  # tokens of a row, prompt and replies; left out: engine.context
    too_long: Literal["refuse", "drop"] = "refuse"  # what happens where rows are longer than that


class OptimConfig(Section):
    """How weights move."""

    lr: Positive = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_lr: NonNegative = 0.0  # where linear and cosine end
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    grad_clip: Positive = 1.0
    epochs: Count = 1  # passes over a step's data
    minibatches: Count = 1  # optimizer steps per pass
    # How rows share a forward pass: those of similar length, padded, or end to end without padding.
    batching: Literal["sorted", "packed"] = "sorted"
    microbatch_tokens: Count = 8192  # tokens per forward pass, padding included
    average: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # decay of the weights' moving average; 0 = none


class TrainConfig(Section):
    """How long, and what is kept."""

    steps: Count = 100
    checkpoint_every: Count = 50
    keep: Count = 2  # newest checkpoints that stay on disk
    save_episodes: bool = True
    patience: Positive = 3600.0  # seconds that ranks of one run wait for each other before they give up


class EvalConfig(Section):
    """The truth, on a schedule. It is always measured before the first and after the last step."""

    every: Annotated[int, Field(ge=0)] = 0  # steps between measurements; 0 = only before and after
    matches: Count = 200  # per game and opponent, half in each seating
    final_matches: Count = 1000  # the same, before the first and after the last step
    opponents: tuple[str, ...] = ("random",)  # programs' names, or names out of league.opponents
    exploitability: bool = True  # for games small enough
    thoughts: Annotated[int, Field(ge=2)] = 32  # thoughts sampled per information set


AlarmName = Literal[
    "illegal",
    "truncated",
    "draws",
    "seat_gap",
    "thinking_collapse",
    "entropy",
    "gradient_vanished",
    "gradient_burst",
    "ignores_observation",
]


class AlarmsConfig(Section):
    """Where the alarms go off. A threshold bears its alarm's name; docs/truth.md gives the reasons."""

    window: Count = 10  # training steps that a figure is taken over
    illegal: Fraction = 0.2  # share of a role's replies that are refused, beyond which it sounds
    truncated: Fraction = 0.2  # share of a role's replies cut off at the token limit
    draws: Fraction = 0.95  # share of a role's matches without a winner
    seat_gap: NonNegative = 0.8  # difference of two roles' mean returns over the root mean square of a return
    thinking_collapse: Fraction = 0.5  # a role's reply length over that of the first steps; sounds below
    entropy: NonNegative = 0.005  # nats per token; sounds below
    gradient_vanished: NonNegative = 1e-4  # gradient norm; sounds below
    gradient_burst: Positive = 20.0  # gradient norm over the median of the steps before
    ignores_observation: Fraction = 0.1  # how much the policy differs between hands; sounds below,
    must_differ: Fraction = 0.2  # where an equilibrium differs by at least this
    stop: tuple[Literal[AlarmName, "any"], ...] = ()  # alarms that end the run, after a checkpoint


class ClusterConfig(Section):
    """Where matches are played: in this process, or by actors on a Ray cluster (docs/scale.md)."""

    kind: Literal["local", "ray"] = "local"
    # Of a cluster that runs: "auto" or HOST:PORT. Left out: one on this machine, for the length of the run.
    address: str | None = None
    actors: Count = 1  # each with an engine of its own
    cpus: NonNegative = 1.0  # of each actor
    gpus: NonNegative = 0.0  # of each actor; the learner's own must not be among those that Ray gives away
    learners: Annotated[int, Field(ge=0)] = 0  # ranks that Ray starts, and that learn; 0: who is called does
    learner_cpus: NonNegative = 1.0  # of each of them
    learner_gpus: Annotated[int, Field(ge=0)] = 0
    bucket_mib: Count = 64  # weights travel in pieces of this size
    # By Ray's object store, or by a broadcast to all actors: NCCL where learner and actors have whole GPUs,
    # else gloo. "auto" is the former, but where NCCL can be had.
    transport: Literal["auto", "objects", "collective"] = "auto"
    patience: Positive = 60.0  # seconds to wait for room on the cluster, and for an actor to come back

    @model_validator(mode="before")
    @classmethod
    def _by_kind(cls, data: Any) -> Any:
        return {"kind": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _of_ray(self) -> ClusterConfig:
        if self.kind == "local":
            for name, key in type(self).model_fields.items():
                if name != "kind" and getattr(self, name) != key.default:
                    raise ValueError(f"{name!r} says nothing without a cluster; set cluster.kind = 'ray'")
        return self


class RunConfig(Section):
    """A whole run."""

    name: str
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    threads: Annotated[int, Field(ge=0)] = 0  # of torch on the CPU; 0 = as many as there are cores
    needs: Literal["cpu", "gpu"] = "cpu"  # the least machine that this recipe is meant for
    model: ModelConfig
    games: Annotated[tuple[GameConfig, ...], Field(min_length=1)]
    judges: dict[str, JudgeConfig] = {}  # by the names that games ask them by
    policies: tuple[PolicyConfig, ...] = ()
    adapter: AdapterConfig | None = None  # left out: every weight of the model learns
    text: TextConfig = TextConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    league: LeagueConfig = LeagueConfig()
    algo: AlgoConfig = AlgoConfig()
    loss: LossConfig = LossConfig()
    sft: SftConfig = SftConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    alarms: AlarmsConfig = AlarmsConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        labels = [game.label for game in self.games]
        if len(set(labels)) < len(labels):
            raise ValueError(f"games: labels {labels} repeat; give each game of the mix its own label")
        if self.rollout.matches % self.rollout.group_size:
            raise ValueError(
                f"rollout.matches ({self.rollout.matches}) is no multiple of rollout.group_size "
                f"({self.rollout.group_size})"
            )
        if self.algo.estimator in ("grpo", "rloo") and self.rollout.group_size == 1:
            raise ValueError(
                f"algo.estimator = {self.algo.estimator!r} needs rollout.group_size of at least 2: "
                "a group of one has no baseline"
            )
        names = [policy.name for policy in self.policies]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"policies has {twice[0]!r} twice; give each a name of its own")
        if len(names) > 1:
            for policy in self.policies:
                if policy.name in (*RESERVED, *(o.policy for o in self.league.opponents)):
                    raise ValueError(f"policies: {policy.name!r} is somebody else's name; choose another")
                if not policy.roles:
                    raise ValueError(f"policies: {policy.name!r} has no roles; say which it plays")
        for data in self.sft.data:
            if unknown := [name for name in data.policies if name not in names]:
                raise ValueError(
                    f"sft.data: {data.path} is for policy {unknown[0]!r}, which is not in policies"
                )
        labels = [game.label for game in self.games]
        for opponent in self.league.opponents:
            for game in opponent.games:
                if game not in labels:
                    raise ValueError(
                        f"league.opponents: {opponent.policy!r} is to play {game!r}, which is not in this "
                        f"recipe; its games: {', '.join(labels)}"
                    )
        if self.league.self_weight == 0:
            for label in labels:
                if not any(label in (o.games or labels) for o in self.league.opponents):
                    raise ValueError(f"league.self_weight is 0 and nobody is there to play {label!r} against")
        if self.loss.magnet_of == "average" and self.optim.average == 0:
            raise ValueError("loss.magnet_of = 'average' needs an average of the weights; set optim.average")
        engine = self.engine
        exact = (engine.kind, engine.dtype, engine.matmul) == ("torch", "float32", "highest")
        if self.loss.proximal == "sampler" and not exact:
            raise ValueError(
                "loss.proximal = 'sampler' takes the sampler's log-probabilities as the learner's, which "
                "needs engine.kind = 'torch', engine.dtype = 'float32' and engine.matmul = 'highest'; set "
                "loss.proximal = 'learner'"
            )
        if self.rollout.max_lag:
            if self.loss.proximal == "sampler":
                raise ValueError(
                    "loss.proximal = 'sampler' takes the sampler's log-probabilities as the learner's, which "
                    "they are not with rollout.max_lag > 0; set loss.proximal = 'learner'"
                )
            if self.engine.vllm.sleep:
                raise ValueError(
                    "engine.vllm.sleep leaves the GPU to the learner, and with rollout.max_lag > 0 there are "
                    "always matches in play; set engine.vllm.sleep = false"
                )
            if self.engine.matmul != "highest" and self.cluster.kind == "local":
                raise ValueError(
                    f"engine.matmul = {self.engine.matmul!r} holds for the whole process, in which the "
                    "learner computes at the same time where rollout.max_lag > 0; set it to 'highest'"
                )
        if self.rollout.max_tokens >= self.engine.context:
            raise ValueError(
                f"rollout.max_tokens ({self.rollout.max_tokens}) leaves no room for a prompt in "
                f"engine.context ({self.engine.context})"
            )
        for name in self.eval.opponents:
            if name.startswith(PAST) and not _PAST_SELF.fullmatch(name):
                raise ValueError(
                    f"eval.opponents: {name!r} is no fixed opponent; a past self is named by its step: past/0"
                )
        return self

    @property
    def has_past(self) -> bool:
        """Whether past selves play any part in this run."""
        met = [*(o.policy for o in self.league.opponents), *self.eval.opponents]
        return self.league.snapshot_every > 0 or any(name.startswith(PAST) for name in met)


class TuneConfig(Section):
    """Supervised fine-tuning alone, by `ludus sft`: pass after pass over all rows, in an order of its own."""

    model: ModelConfig
    data: Annotated[tuple[SftDataConfig, ...], Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    threads: Annotated[int, Field(ge=0)] = 0  # of torch on the CPU; 0 = as many as there are cores
    epochs: Count = 1  # passes over the rows
    batch: Count = 32  # rows per optimizer step
    context: Count | None = None  # tokens of a row, prompt and replies; left out: what the model can see
    too_long: Literal["refuse", "drop"] = "refuse"  # what happens where rows are longer than that
    optim: OptimConfig  # here lr is 1e-5 and the schedule cosine, unless something else is said
    checkpoint_every: Count = 200  # optimizer steps
    keep: Count = 1  # newest checkpoints that stay on disk until the model is done

    @model_validator(mode="before")
    @classmethod
    def _optim(cls, data: Any) -> Any:
        given = data.get("optim", {})
        return (
            {**data, "optim": {"lr": 1e-5, "schedule": "cosine", **given}}
            if isinstance(given, dict)
            else data
        )

    @model_validator(mode="after")
    def _plain(self) -> TuneConfig:
        if self.optim.epochs > 1 or self.optim.minibatches > 1:
            raise ValueError("optim.epochs and optim.minibatches say nothing here; set epochs and batch")
        if wrong := [data.path for data in self.data if data.weight != 1.0 or data.policies]:
            raise ValueError(f"data: {wrong[0]} has a weight or policies, but every pass goes over all rows")
        return self


def load(recipe: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe, apply `key=value` overrides, validate. Raises UserError."""
    data = read_toml(recipe, "recipe", "; recipes lie in recipes/*.toml")
    return validate(override(data, overrides), where=str(recipe))


def validate(data: Mapping[str, Any], where: str) -> RunConfig:
    """A RunConfig from plain data. Raises UserError that names every bad key and a remedy."""
    return _validated(RunConfig, data, where)


def validate_tune(data: Mapping[str, Any], where: str) -> TuneConfig:
    """The same for a TuneConfig."""
    return _validated(TuneConfig, data, where)


def read_toml(path: Path, what: str, hint: str = "") -> dict[str, Any]:
    """The plain data of a TOML file; `what` it is, and where to look for it, for errors. Raises UserError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read {what} {path}: {e.strerror}{hint}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{what} {path} is not valid TOML: {e}") from e


def _validated(kind: type[S], data: Mapping[str, Any], where: str) -> S:
    try:
        return kind.model_validate(data)
    except ValidationError as e:
        problems = [_explain(x["loc"], x["type"], x["msg"], x.get("input"), kind) for x in e.errors()]
        raise UserError(f"{where}: " + "; ".join(problems)) from e


def dump(config: Section) -> str:
    """The resolved configuration as TOML that reads back to an equal one."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def override(data: dict[str, Any], items: Iterable[str]) -> dict[str, Any]:
    """Set each `key=value` in plain data, in place; returns the data. Raises UserError."""
    for item in items:
        _set(data, item)
    return data


def _set(data: dict[str, Any], item: str) -> None:
    key, eq, raw = item.partition("=")
    if not eq or not key:
        raise UserError(f"override {item!r} is not of the form key=value, such as optim.lr=3e-4")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw
    *parents, last = key.strip().split(".")
    node: Any = data
    for i, part in enumerate(parents):
        if isinstance(node, list):
            node = _item(node, part, key)
        else:
            if i == 0 and part in _BY_KIND and isinstance(node.get(part), str):
                node[part] = {"kind": node[part]}
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise UserError(f"override {item!r}: {'.'.join(parents[: i + 1])} is a value, not a section")
    if isinstance(node, list):
        _item(node, last, key)
        node[int(last)] = value
    elif key in _BY_KIND and isinstance(node.get(key), dict) and isinstance(value, str):
        node[key]["kind"] = value
    else:
        node[last] = value


def _item(node: list[Any], part: str, key: str) -> Any:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(f"override {key!r}: {part!r} is no index into a list of {len(node)} (0 is the first)")
    return node[int(part)]


def _explain(
    loc: tuple[int | str, ...],
    kind: str,
    message: str,
    value: Any,
    section: type[BaseModel],
) -> str:
    path = ".".join(str(p) for p in loc)
    if kind == "extra_forbidden":
        known = _fields_at(loc[:-1], section)
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
        return f"unknown key {path!r}; {hint}"
    if kind == "missing":
        return f"{path!r} is missing"
    text = message.removeprefix("Value error, ")
    if not path:
        return text
    return f"{path!r}: {text} (got {value!r})" if not isinstance(value, dict) else f"{path!r}: {text}"


def _fields_at(loc: tuple[int | str, ...], section: type[BaseModel]) -> list[str]:
    for part in loc:
        if isinstance(part, int):
            continue
        if part not in section.model_fields:
            continue  # a key of one's own choice, such as a judge's name
        field = section.model_fields[part]
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
