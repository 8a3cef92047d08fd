"""Reads a trace of torch.profiler: which layer, stage and kind each operator and each byte belongs to.

The trace is the JSON that ``export_chrome_trace`` writes. Events of a thread nest; an operator belongs to the innermost
range with the name of a layer around it. An operator of backward belongs to the layer whose operator made the node of
the graph that is computed: both bear the node's sequence number. The accumulation of a gradient has none; it belongs to
the node before it. What backward computes again (see ``s3d_kernels.recompute``) belongs to the layer that needed it.

A kind is that of the phase (data, loss, optimiser), else decoder or tokens by the layer, else that of the operator of
s3d_kernels (a norm that runs in a convolution's backward is a norm), else that of the layer.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from .layer_ranges import Layer

KINDS = ("conv", "norm", "pool", "gather", "tokens", "decoder", "loss", "optimiser", "data", "other", "waiting")

# Kinds of ranges: those of s3d.training_step.TrainingStep and those that torch opens itself.
_PHASES = {"data": "data", "loss": "loss", "clip": "optimiser", "optimiser": "optimiser"}
_TORCH_PHASES = {"enumerate(DataLoader)#": "data", "Optimizer.": "optimiser"}
_OPERATORS = {
    "conv3d": "conv",
    "conv3d_fused": "conv",
    "conv3d_grad_input": "conv",
    "conv3d_grad_weight": "conv",
    "norm_statistics": "norm",
    "norm_apply": "norm",
    "norm_grad_sums": "norm",
    "norm_grad_input": "norm",
    "normalize": "norm",
    "normalize_deferred": "norm",
    "compute_deferred": "norm",
    "gather_blocks": "gather",
    "scatter_blocks": "gather",
    "pool3d": "pool",
    "pool3d_grad": "pool",
}
_OF_LAYER = ("decoder", "tokens")  # kinds that take in all operators of a layer
_NODE = "autograd::engine::evaluate_function: "
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_HOST = ("cpu_op", "user_annotation", *_LAUNCHES)
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_STEP = re.compile(r"ProfilerStep#\d+$")


@dataclass(frozen=True)
class Place:
    """What an event belongs to.

    Attributes:
        stage: of the encoder, or None.
        kind: one of KINDS.
        layer: name of the layer, "" outside of all.
        backward: whether it is computed in backward.
        phase: kind of the phase (data, loss, optimiser), or "".
    """

    stage: int | None = None
    kind: str = "other"
    layer: str = ""
    backward: bool = False
    phase: str = ""


@dataclass
class Event:
    """An event of a thread of the host; times in nanoseconds.

    Attributes:
        self_ns: duration without the events inside it.
    """

    name: str
    category: str
    process: Any
    thread: Any
    start: int
    end: int
    arguments: dict[str, Any]
    parent: Event | None = None
    place: Place = field(default_factory=Place)
    self_ns: int = 0

    @property
    def is_range(self) -> bool:
        """Whether it is a named range, during whose own time no operator runs."""
        return self.category == "user_annotation"


@dataclass
class Row:
    """A line of the table; per step.

    Attributes:
        stage: of the encoder, None outside of it.
        kind: one of KINDS.
        forward_ms: time outside of backward.
        backward_ms: time in backward.
        allocated_bytes: that its operators took from torch's allocator, whether they were given back or not.
        kept_bytes: of those taken before backward, what was still there when backward began.
    """

    stage: int | None
    kind: str
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    allocated_bytes: float = 0.0
    kept_bytes: float = 0.0

    @property
    def total_ms(self) -> float:
        return self.forward_ms + self.backward_ms


@dataclass(frozen=True)
class Allocation:
    """Memory taken (bytes positive) or given back (negative), by whom it was taken; no place if before recording."""

    time: int
    size: int
    place: Place | None
    event: Event | None


class StepTrace:
    """A trace and the place of everything in it.

    Args:
        trace: the parsed JSON.
        layers: the names of ranges that stand for layers.
        device: "cpu" or "cuda": whose time and memory count. On a GPU the time is that of kernels and copies, which
            belong to the operator that launched them, and "waiting" is the time in which none ran. Where some overlap,
            the time is that of the one that began first.
    Raises:
        ValueError: no step was recorded.
    """

    def __init__(self, trace: dict[str, Any], layers: dict[str, Layer], device: str = "cpu") -> None:
        self.trace = trace
        self.layers = layers
        self.device = device
        raw = trace["traceEvents"]
        self.events = _read(raw)
        self.steps = [event for event in self.events if _STEP.match(event.name) and event.is_range]
        if not self.steps:
            raise ValueError("the trace holds no step: no range named ProfilerStep#")
        self._beginnings = [step.start for step in self.steps]
        self.allocations: list[Allocation] = []
        self._owners: dict[int, Place] = {}
        self._before: dict[Any, Place] = {}  # place of the last node of each thread
        self._busy = _busy(raw, self.steps) if device == "cuda" else []
        self._walk([event for event in raw if event.get("name") == "[memory]"])

    def _walk(self, memory: list[dict[str, Any]]) -> None:
        """Place all events, in the order of their beginnings, and what was allocated within them."""
        wanted = 1 if self.device == "cuda" else 0  # torch's number of the kind of device
        moments: list[tuple[int, int, int, Any]] = [(e.start, 0, e.start - e.end, e) for e in self.events]
        moments += [(_ns(m["ts"]), 1, 0, m) for m in memory if m["args"]["Device Type"] == wanted]
        stacks: dict[Any, list[Event]] = defaultdict(list)
        alive: dict[int, tuple[Place | None, Event | None]] = {}
        for time, _, _, moment in sorted(moments, key=lambda m: m[:3]):
            thread = moment.thread if isinstance(moment, Event) else moment["tid"]
            stack = stacks[thread]
            while stack and stack[-1].end <= time:
                stack.pop()
            if isinstance(moment, Event):
                moment.parent = stack[-1] if stack else None
                moment.self_ns = moment.end - moment.start
                if moment.parent is not None:
                    moment.parent.self_ns -= moment.self_ns
                moment.place = self._place(moment)
                stack.append(moment)
                continue
            address, size = moment["args"]["Addr"], moment["args"]["Bytes"]
            if size > 0:
                event = stack[-1] if stack else None
                place = event.place if event is not None else Place()
                alive[address] = (place, event)
                self.allocations.append(Allocation(time, size, place, event))
            else:
                self.allocations.append(Allocation(time, size, *alive.pop(address, (None, None))))

    def _place(self, event: Event) -> Place:
        around = event.parent.place if event.parent is not None else Place()
        if event.is_range:
            return self._place_of_range(event, around)
        if event.name.startswith(_NODE):
            # The accumulation of a gradient has no number, nor has an operator that no event stands for.
            place = self._owners.get(event.arguments.get("Sequence number", -1)) or self._before.get(event.thread)
            place = replace(place or Place(), backward=True)
            self._before[event.thread] = place
            return place
        own = _OPERATORS.get(event.name.removeprefix("s3d_kernels::")) if "s3d_kernels::" in event.name else None
        place = around
        if own is not None and not around.phase and around.kind not in _OF_LAYER:
            place = replace(around, kind=own)
        if not around.backward and "Sequence number" in event.arguments:
            self._owners[event.arguments["Sequence number"]] = place
        return place

    def _place_of_range(self, event: Event, around: Place) -> Place:
        if event.name == "backward":
            return replace(around, backward=True)
        layer = self.layers.get(event.name)
        if layer is not None:
            # What backward computes again belongs to who needs it.
            return around if around.backward else replace(around, stage=layer.stage, kind=layer.kind, layer=event.name)
        phase = _PHASES.get(event.name, "") or next(
            (kind for start, kind in _TORCH_PHASES.items() if event.name.startswith(start)), ""
        )
        return replace(around, phase=phase, kind=phase) if phase else around

    # ---- results

    @property
    def step_ms(self) -> float:
        """Time of a step, mean of those recorded."""
        return sum(step.end - step.start for step in self.steps) / len(self.steps) / 1e6

    def rows(self) -> list[Row]:
        """The table, by stage and kind; its times add up to the time of a step."""
        rows: dict[tuple[int | None, str], Row] = {}
        share_ns, share_bytes = 1e-6 / len(self.steps), 1 / len(self.steps)

        def row(place: Place, kind: str | None = None) -> Row:
            key = (None, kind) if kind else (place.stage, place.kind)
            return rows.setdefault(key, Row(*key))

        for place, time, busy in self._times():
            part = row(place, None if busy else "waiting")
            if place.backward:
                part.backward_ms += time * share_ns
            else:
                part.forward_ms += time * share_ns
        begins = self._backward_begins()
        for allocation in self.allocations:
            step = self._step_of(allocation.time)
            if step is None or allocation.event is None or allocation.place is None:
                continue
            part = row(allocation.place)
            part.allocated_bytes += max(0, allocation.size) * share_bytes
            # Not what was taken in a step before, such as a gradient, and is given back now.
            if allocation.time < begins[step] and allocation.event.start >= self.steps[step].start:
                part.kept_bytes += allocation.size * share_bytes
        order = {kind: number for number, kind in enumerate(KINDS)}
        return sorted(rows.values(), key=lambda r: (r.stage is None, r.stage or 0, order[r.kind]))

    def _times(self) -> Iterator[tuple[Place, float, bool]]:
        """Place and nanoseconds, and whether something was computed meanwhile, of all that happened in the steps."""
        threads = {step.thread for step in self.steps}
        if self.device == "cuda":
            idle = sum(step.end - step.start for step in self.steps)
            places = {e.arguments.get("correlation"): e.place for e in self.events if e.category in _LAUNCHES}
            for correlation, busy in self._busy:
                idle -= busy
                yield places.get(correlation, Place()), busy, True
            yield Place(), idle, False
            return
        for event in self.events:
            if event.thread in threads and self._step_of(event.start) is not None:
                yield event.place, event.self_ns, bool(event.place.phase) or not event.is_range

    def _step_of(self, time: int) -> int | None:
        number = bisect.bisect_right(self._beginnings, time) - 1
        return number if number >= 0 and time < self.steps[number].end else None

    def _backward_begins(self) -> list[int]:
        """When the first node of each step is computed; the step's end if none is."""
        nodes = [event.start for event in self.events if event.name.startswith(_NODE)]
        return [min((n for n in nodes if s.start <= n < s.end), default=s.end) for s in self.steps]

    def memory(self) -> tuple[list[float], dict[str, list[int]], list[tuple[str, float, float]]]:
        """Memory over the last step.

        Returns: milliseconds since its beginning; bytes that are there, by the kind that took them ("before": what was
            taken before recording began and is given back in it; torch does not tell of a CPU's); and name, begin and
            end of forward and backward. What was taken before and stays, such as weights, is not counted.
        """
        step = self.steps[-1]
        kinds = ("before", *KINDS)
        present = dict.fromkeys(kinds, 0)
        present["before"] = -sum(a.size for a in self.allocations if a.place is None)
        times: list[float] = []
        series: dict[str, list[int]] = {kind: [] for kind in kinds}
        for allocation in self.allocations:
            if allocation.time >= step.end:
                break
            if not times and allocation.time >= step.start:
                times.append(0.0)
                for kind in kinds:
                    series[kind].append(present[kind])
            present[allocation.place.kind if allocation.place is not None else "before"] += allocation.size
            if allocation.time >= step.start:
                times.append((allocation.time - step.start) / 1e6)
                for kind in kinds:
                    series[kind].append(present[kind])
        end = (step.end - step.start) / 1e6
        backward = (self._backward_begins()[-1] - step.start) / 1e6
        after = max((e.end for e in self.events if e.place.backward and e.start < step.end), default=step.end)
        phases = [("forward", 0.0, backward), ("backward", backward, min(end, (after - step.start) / 1e6))]
        return times, {kind: values for kind, values in series.items() if any(values)}, phases

    def with_backward_ranges(self) -> dict[str, Any]:
        """The trace, with a range around the nodes of backward that follow one another and belong to one layer."""
        added: list[dict[str, Any]] = []
        open_: dict[Any, tuple[str, int | None, dict[str, Any]]] = {}  # of each thread: layer, step, range
        for event in self.events:
            if not event.name.startswith(_NODE):
                continue
            layer, step = event.place.layer, self._step_of(event.start)
            before = open_.get(event.thread)
            if before is not None and before[:2] == (layer, step):
                before[2]["dur"] = _us(event.end) - before[2]["ts"]
                continue
            range_ = {
                "ph": "X",
                "cat": "user_annotation",
                "name": f"{layer} (backward)",
                "pid": event.process,
                "tid": event.thread,
                "ts": _us(event.start),
                "dur": _us(event.end - event.start),
                "args": {},
            }
            open_[event.thread] = (layer, step, range_)
            if layer:
                added.append(range_)
        # Before the events that they enclose: readers take the first of two that begin together for the outer one.
        return {**self.trace, "traceEvents": added + self.trace["traceEvents"]}


def _ns(microseconds: float) -> int:
    return round(microseconds * 1000)


def _us(nanoseconds: int) -> float:
    return nanoseconds / 1000


def _read(raw: list[dict[str, Any]]) -> list[Event]:
    """Events of the host's threads, in the order of their beginnings, outer ones first."""
    events = [
        Event(
            name=e["name"],
            category=e["cat"],
            process=e["pid"],
            thread=e["tid"],
            start=_ns(e["ts"]),
            end=_ns(e["ts"]) + _ns(e["dur"]),
            arguments=e.get("args", {}),
        )
        for e in raw
        if e.get("ph") == "X" and e.get("cat") in _HOST
    ]
    return sorted(events, key=lambda e: (e.start, -e.end))


def _busy(raw: list[dict[str, Any]], steps: list[Event]) -> list[tuple[int, int]]:
    """Kernels and copies: correlation number, which the call that launched them bears too, and nanoseconds in steps.

    Kernels of several streams overlap. Each gets the time that none which began before it covers, so that together they
    have the time in which any ran.
    """
    kernels = [
        (_ns(e["ts"]), _ns(e["ts"]) + _ns(e["dur"]), e["args"]["correlation"])
        for e in raw
        if e.get("cat") in _DEVICE and "correlation" in e.get("args", {})
    ]
    parts: list[tuple[int, int]] = []
    covered = 0  # until then
    for start, end, correlation in sorted(kernels):
        start, covered = max(start, covered), max(end, covered)
        inside = sum(max(0, min(end, step.end) - max(start, step.start)) for step in steps)
        if inside:
            parts.append((correlation, inside))
    return parts
