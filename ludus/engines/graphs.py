"""CUDA graphs: a decode step is recorded once and then replayed, for its kernels run faster than they launch.

A recording fixes every address and every number that Python gives to a kernel. So a *static step* runs over
rows [first, end) of a coarse grid, and `_places` says which of them it is about: those of its segment stand
for themselves, and the others (free rows, rows of other weights) for one spare row past the last slot, where
whatever is computed for them ends up. What else shapes a step is its `Shape`. The draws come from the seeds
in the rows, as without graphs.

Weights that are loaded into the same tensors keep their graphs; those of weights that are gone go with them.

Shapes: R rows of the engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from ludus.engines.decoder import Cache, Decoder
from ludus.engines.rows import Rows
from ludus.engines.weights import Weights

Work = Callable[[], None]
Capture = Callable[[Work], Work]  # records some work without doing it; what it returns does it
Segment = tuple[Weights, int, int]  # whose rows [first, end) are
MOST = 256  # graphs held at once; five policies over 256 rows were seen to want 137
_FINEST = 8  # rows


class Shape(NamedTuple):
    """All that tells one static step of some weights from another."""

    first: int  # rows [first, end) are computed
    end: int
    span: int  # of the cache
    table: int  # of stop rules
    plain: bool
    filtered: bool


@dataclass(slots=True)
class _Graph:
    replay: Work
    used: int  # the clock when it last ran


class Graphs:
    """Decode steps over an engine's cache and rows, each with a spare row past the last slot.

    A shape that comes up runs step by step the first time, which is also the warm-up that a recording wants,
    is recorded the second time, and replayed from then on. At most `MOST` graphs are held, and the one that
    has not run for longest goes first. Without `capture` every step runs as it is, kernel by kernel.
    """

    def __init__(self, decoder: Decoder, cache: Cache, rows: Rows, capture: Capture | None) -> None:
        self._decoder, self._cache, self._rows, self._capture = decoder, cache, rows, capture
        self._slots = cache.slots - 1
        device = rows.token.device
        self._all = torch.arange(self._slots, device=device)
        self._places = torch.zeros_like(self._all)  # [R] what a static step reads its rows from
        self._placed: tuple[int, int, int, int] | None = None
        self._codes = torch.zeros(cache.slots, dtype=torch.int64, device=device)
        # None: the shape was seen, and no graph of it is held.
        self._held: WeakKeyDictionary[Weights, dict[Shape, _Graph | None]] = WeakKeyDictionary()
        self._clock = 0

    @property
    def count(self) -> int:
        """Graphs held."""
        return sum(graph is not None for shapes in self._held.values() for graph in shapes.values())

    def step(self, segments: Sequence[Segment]) -> list[int]:
        """Sample the next token of all rows of the segments, which follow one another from row 0 on.

        Returns a code per row, as `Rows.draw` does.
        """
        for weights, first, end in segments:
            shape = self._shape(first, end)
            self._place(shape, first, end)
            self._run(weights, shape)
        codes: list[int] = self._codes[: segments[-1][2]].tolist()
        return codes

    def _shape(self, first: int, end: int) -> Shape:
        start, stop = grid_down(first), min(grid_up(end), self._slots)
        rows = self._rows
        return Shape(start, stop, self._cache.span, rows.table, rows.plain, rows.filtered)

    def _place(self, shape: Shape, first: int, end: int) -> None:
        """Point the rows of [first, end) at themselves, and the rest of the shape's at the spare row."""
        wanted = shape.first, first, end, shape.end
        if wanted != self._placed:
            self._places[shape.first : first] = self._slots
            self._places[first:end] = self._all[first:end]
            self._places[end : shape.end] = self._slots
            self._placed = wanted

    def _static_step(self, weights: Weights, shape: Shape) -> None:
        rows, read = self._places[shape.first : shape.end], slice(shape.first, shape.end)
        token, position = self._rows.token[rows], self._rows.position[rows]
        logits = self._decoder.decode(weights, token, position, self._cache, rows, read)
        self._codes[rows] = self._rows.advance(logits, rows)

    def _run(self, weights: Weights, shape: Shape) -> None:
        self._clock += 1
        held = self._held.setdefault(weights, {})
        work = partial(self._static_step, weights, shape)
        if self._capture is None or shape not in held:
            held[shape] = None
            work()
            return
        graph = held[shape]
        if graph is None:
            graph = held[shape] = self._recorded(self._capture, work)
        if graph is None:
            work()
        else:
            graph.used = self._clock
            graph.replay()

    def _recorded(self, capture: Capture, work: Work) -> _Graph | None:
        """A graph of the work; None, and no further graphs, where it cannot be had."""
        if self.count >= MOST:
            self._drop_oldest()
        try:
            return _Graph(capture(work), self._clock)
        except RuntimeError as e:  # out of memory is one, and so is what CUDA refuses to record
            self._capture = None
            self._held.clear()
            said = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
            warnings.warn(
                f"a decode step could not be recorded as a CUDA graph ({said}); this engine goes on without "
                "graphs, which is slower; engine.graphs = false does so from the start, and a smaller "
                "engine.slots or engine.context leaves more memory for them",
                RuntimeWarning,
                stacklevel=2,
            )
            return None

    def _drop_oldest(self) -> None:
        held = [
            (graph.used, shape, shapes)
            for shapes in self._held.values()
            for shape, graph in shapes.items()
            if graph is not None
        ]
        _, shape, shapes = min(held, key=lambda graph: graph[0])
        shapes[shape] = None


class CudaCapture:
    """Records work on a CUDA device. All graphs share a pool of memory: they run one after the other, and
    what they compute lies outside of it."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Another thread may learn meanwhile, and allocate: "global" would forbid it that.
        recording = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with torch.cuda.device(self._stream.device):
            before = torch.cuda.current_stream()
            try:
                with recording:
                    work()
            finally:
                torch.cuda.set_stream(before)  # a recording that fails leaves its own stream behind
        return graph.replay


def grid_up(count: int) -> int:
    """The next of 8, 16, ... 64, 80, ... 128, 160, ...: at most a quarter more, and four to each doubling."""
    step = max(_FINEST, 1 << max((count - 1).bit_length() - 3, 0))
    return -(-count // step) * step


def grid_down(count: int) -> int:
    """The last of the same numbers, or 0, that is not beyond `count`."""
    step = max(_FINEST, 1 << max(count.bit_length() - 3, 0))
    return count // step * step
