"""`auto` by measurement: what is measured and when, what is kept, and for whom."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import s3d_kernels as sk
from s3d_kernels import REGISTRY, BlockMask, BlockSparseTensor, backends
from s3d_kernels.backends import ConvProblem, measurements, selection
from s3d_kernels.backends.measurements import MeasurementStore, time_call
from s3d_kernels.backends.reference import ReferenceBackend
from s3d_kernels.backends.torch_gather import TorchGatherBackend

ONE = (1, 1, 1)
PROBLEM = ConvProblem("cpu", torch.float32, 4, 4, 1, ONE, ONE, (0, 0, 0), (4, 4, 4), partial=False)


class Delayed(TorchGatherBackend):
    """Takes so many milliseconds for zeros in the place of a convolution or its gradient, and counts its calls."""

    def __init__(self, name: str, conv3d: float = 0.0, grad_input: float = 0.0, fuses: bool = False) -> None:
        self.name = name
        self.delays = {"conv3d": conv3d, "grad_input": grad_input}
        self.calls: list[str] = []
        if fuses:
            self.fuses = lambda problem: True
            self.conv3d_fused = lambda *arguments: pytest.fail("it is not called here")

    def _delay(self, operation: str) -> None:
        self.calls.append(operation)
        time.sleep(self.delays[operation] / 1e3)

    def conv3d(self, x: Tensor, *others: object) -> Tensor:
        self._delay("conv3d")
        return torch.zeros_like(x)

    def conv3d_grad_input(self, grad: Tensor, *others: object) -> Tensor:
        self._delay("grad_input")
        return torch.zeros_like(grad)


class TooLarge(Delayed):
    """Has no memory for a convolution."""

    def conv3d(self, x: Tensor, *others: object) -> Tensor:
        self._delay("conv3d")
        raise torch.OutOfMemoryError("for 7 TiB")


class CountedReference(ReferenceBackend):
    """The slow oracle."""

    def __init__(self) -> None:
        self.calls = 0

    def conv3d(self, *arguments: object) -> Tensor:
        self.calls += 1
        return super().conv3d(*arguments)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def path(tmp_path: Path) -> Iterator[Path]:
    """The file of measurements of one test; all backends are as before behind it."""
    before = dict(REGISTRY)
    file = tmp_path / "measured" / "measurements.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurements, "_store", MeasurementStore(file))
        yield file
    REGISTRY.clear()
    REGISTRY.update(before)
    measurements.drop_dependents()


def use(*present: backends.Backend) -> None:
    """Have these backends only, in this order of `auto`."""
    REGISTRY.clear()
    for backend in present:
        backends.register(backend, first=False)


def features(mask_ratio: float = 0.5) -> BlockSparseTensor:
    mask = BlockMask.random(1, 2, 4, mask_ratio, torch.Generator().manual_seed(0))
    return BlockSparseTensor(torch.randn(mask.num_blocks, 4, 4, 4, 4, requires_grad=True), mask)


def step(mask_ratio: float = 0.5) -> None:
    """Forward and backward of PROBLEM."""
    sk.sparse_conv3d(features(mask_ratio), torch.ones(4, 4, *ONE)).blocks.sum().backward()


def forget() -> None:
    """Be as a new process with the same file."""
    measurements._use(MeasurementStore(measurements.store().path))


# ---- what is chosen


def test_each_operation_gets_the_fastest_that_was_measured(caplog: pytest.LogCaptureFixture) -> None:
    one, other = Delayed("one", conv3d=6), Delayed("other", grad_input=6)
    use(one, other)
    with caplog.at_level(logging.INFO), sk.tuning():
        step()
    assert {"conv3d", "grad_input"} == set(one.calls) == set(other.calls)
    said = [message for message in caplog.messages if " by measurement: " in message]
    assert [message.split(" computes ")[0] for message in said] == ["other", "one"]
    assert f"conv3d of {PROBLEM} by measurement: one " in said[0]

    for backend in (one, other):
        backend.calls.clear()
    with caplog.at_level(logging.INFO):
        step()
        step()
    assert (one.calls, other.calls) == (["grad_input"] * 2, ["conv3d"] * 2)
    assert [message for message in caplog.messages if " by measurement: " in message] == said, "it was said again"
    forget()
    step()
    assert (one.calls, other.calls) == (["grad_input"] * 3, ["conv3d"] * 3)


def test_nothing_is_measured_outside_of_tuning(path: Path) -> None:
    one, other = Delayed("one", conv3d=6), Delayed("other")
    use(one, other)
    step()
    with sk.tuning():
        pass
    step()
    assert one.calls == ["conv3d", "grad_input"] * 2
    assert not other.calls
    assert not path.exists()
    assert not measurements.is_tuning()


def test_a_choice_made_before_tuning_is_measured_in_it() -> None:
    one, other = Delayed("one", conv3d=6), Delayed("other")
    use(one, other)
    step()
    with sk.tuning():
        step()
    one.calls.clear()
    step()
    assert "conv3d" not in one.calls


def test_what_was_measured_is_not_measured_again_with_other_masks() -> None:
    one, other = Delayed("one", conv3d=6), Delayed("other", grad_input=6)
    use(one, other)
    with sk.tuning():
        step()
        one.calls.clear()
        step(mask_ratio=0.25)
    forget()
    with sk.tuning():
        step(mask_ratio=0.75)
    assert one.calls == ["grad_input"] * 2


def test_a_backend_that_was_not_there_is_measured_with_the_others() -> None:
    slow, medium, quick = Delayed("slow", conv3d=12), Delayed("medium", conv3d=6), Delayed("quick")
    use(slow, medium)
    with sk.tuning():
        step()
    use(slow, medium, quick)
    step()
    assert not quick.calls
    with sk.tuning():
        step()
    assert "conv3d" in quick.calls
    medium.calls.clear()
    step()
    assert "conv3d" not in medium.calls


def test_one_that_can_no_longer_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, medium, quick = Delayed("slow", conv3d=12), Delayed("medium", conv3d=6), Delayed("quick")
    use(slow, medium, quick)
    with sk.tuning():
        step()
    forget()
    monkeypatch.setattr(quick, "why_not", lambda problem: "it went away")
    medium.calls.clear()
    step()
    assert "conv3d" in medium.calls


def test_reference_is_never_measured(path: Path) -> None:
    reference = CountedReference()
    use(reference, Delayed("one"))
    with sk.tuning():
        step()
    assert not path.exists(), "the only candidate was measured"
    use(reference, Delayed("one", conv3d=6), Delayed("other"))
    with sk.tuning():
        step()
    assert reference.calls == 1  # as the first in the fixed order, where nothing was compared
    use(reference)
    with sk.tuning():
        step()
    assert reference.calls == 2


def test_one_without_enough_memory_is_not_chosen(caplog: pytest.LogCaptureFixture) -> None:
    large, small = TooLarge("large"), Delayed("small", conv3d=5)
    use(large, small)
    with sk.tuning():
        step()
    assert f"backend 'large' runs out of memory in conv3d of {PROBLEM} and is not chosen" in caplog.messages
    assert sk.explain(PROBLEM)["large"] == "it ran out of memory when it was measured"
    calls = large.calls.count("conv3d")
    forget()
    with sk.tuning():
        step()
    step()
    assert large.calls.count("conv3d") == calls


def test_other_exceptions_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = Delayed("faulty")
    use(Delayed("one"), faulty)
    monkeypatch.setattr(faulty, "conv3d", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError), sk.tuning():
        step()
    assert not measurements.is_tuning()


def test_named_backends_are_not_measured(path: Path) -> None:
    one, other = Delayed("one"), Delayed("other")
    use(one, other)
    with sk.tuning(), sk.use_backend("other"):
        step()
    assert other.calls == ["conv3d", "grad_input"]
    assert not one.calls
    assert not path.exists()


def test_nothing_is_measured_while_a_graph_is_captured(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Delayed("one", conv3d=6), Delayed("other")
    use(one, other)
    with sk.tuning():
        with monkeypatch.context() as patch:
            patch.setattr(selection, "_is_captured", lambda problem: True)
            step()
        assert not other.calls
        assert not path.exists()
        step()
    assert "conv3d" in other.calls


def test_convolutions_are_fused_where_the_chosen_backend_fuses() -> None:
    for fused, plain, expected in ((0.0, 6.0, True), (6.0, 0.0, False)):
        fuser, other = Delayed("fuser", conv3d=fused, fuses=True), Delayed("other", conv3d=plain)
        use(fuser, other)
        forget()
        measurements.store().path.unlink(missing_ok=True)
        assert backends.fusing("auto", PROBLEM) is fuser, "the first in the fixed order"
        with sk.tuning():
            assert backends.fusing("auto", PROBLEM) is None, "what is measured is the convolution by itself"
            step()
            assert backends.fusing("auto", PROBLEM) is (fuser if expected else None)
        assert backends.fusing("auto", PROBLEM) is (fuser if expected else None)
        assert backends.fusing("fuser", PROBLEM) is fuser


def test_explain_gives_milliseconds() -> None:
    use(Delayed("one", conv3d=6), Delayed("other", grad_input=6), ReferenceBackend())
    assert sk.explain(PROBLEM) == {"one": None, "other": None, "reference": None}
    with sk.tuning():
        step()
    forward, backward = sk.explain(PROBLEM), sk.explain(PROBLEM, "conv3d_grad_input")
    assert list(forward) == ["one", "other", "reference"]
    assert forward["reference"] is None
    assert isinstance(forward["one"], float)
    assert isinstance(forward["other"], float)
    assert forward["one"] > forward["other"] > 0
    assert backward["other"] > backward["one"]  # type: ignore[operator]


def test_ranks_of_a_distributed_run_do_not_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(RuntimeError, match=r"one of 4, .* call load_measurements with the same file"), sk.tuning():
        pass


# ---- what is kept


def test_measurements_of_another_machine_are_ignored(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Delayed("one", conv3d=6), Delayed("other")
    use(one, other)
    with sk.tuning():
        step()
    for change in (
        lambda patch: patch.setattr(measurements, "_processor", lambda: "another processor"),
        lambda patch: patch.setattr(torch, "get_num_threads", lambda: 77),
        lambda patch: patch.setattr(torch, "__version__", "77.0"),
        lambda patch: patch.setattr(measurements, "__version__", "77.0"),
    ):
        with monkeypatch.context() as patch:
            change(patch)
            forget()
            assert sk.explain(PROBLEM)["one"] is None
    forget()
    assert sk.explain(PROBLEM)["one"] is not None
    assert len(json.loads(path.read_text())["machines"]) == 1


def test_another_file(tmp_path: Path, path: Path) -> None:
    one, other = Delayed("one", conv3d=6), Delayed("other")
    use(one, other)
    shared = tmp_path / "shared.json"
    with sk.tuning(shared):
        step()
    assert shared.exists()
    assert not path.exists()
    one.calls.clear()
    step()
    assert "conv3d" not in one.calls, "the file is no longer used"
    measurements._use(MeasurementStore(path))
    step()
    assert "conv3d" in one.calls
    one.calls.clear()
    sk.load_measurements(shared)
    step()
    assert "conv3d" not in one.calls


def test_files_to_load_must_be_good(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        sk.load_measurements(tmp_path / "nothing.json")
    (tmp_path / "bad.json").write_text('{"format": 77}')
    with pytest.raises(ValueError, match=r"bad\.json is no file of measurements: no measurements in format 1"):
        sk.load_measurements(tmp_path / "bad.json")


@pytest.mark.parametrize("content", [b'{"format": 1, "machi', b"[]", b'{"format": 1, "machines": {"a": 3}}', b"\xff"])
def test_a_corrupt_file_is_named_once_and_left_alone(content: bytes, path: Path) -> None:
    one, other = Delayed("one", conv3d=6), Delayed("other")
    use(one, other)
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"measurements\.json is ignored: .*in memory only"):
        step()
    with sk.tuning():
        step()
    one.calls.clear()
    step()
    assert "conv3d" not in one.calls
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_named_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    one, other = Delayed("one", conv3d=6), Delayed("other")
    use(one, other)
    monkeypatch.setattr(os, "replace", refuse)
    message = r"measurements\.json cannot be written \(Permission denied\); measurements are kept in memory only"
    with pytest.warns(UserWarning, match=message) as caught, sk.tuning():
        step()
    assert len(caught) == 1
    one.calls.clear()
    step()
    assert "conv3d" not in one.calls
    assert [file.name for file in path.parent.iterdir()] == ["measurements.lock"]


def test_any_json_value_can_be_kept(path: Path) -> None:
    store = measurements.store()
    assert store.get("tiles", "cpu") is None
    store.put("tiles", {"tile_m": 64, "stages": [2, 3]}, "cpu")
    assert MeasurementStore(path).get("tiles", "cpu") == {"tile_m": 64, "stages": [2, 3]}
    store.put("tiles", {"tile_m": 32}, "cpu")
    assert MeasurementStore(path).get("tiles", "cpu") == {"tile_m": 32}


def test_caches_of_measurements_are_dropped_with_them(tmp_path: Path) -> None:
    cache = measurements.dropped_with_measurements({"key": 1})
    with sk.tuning():
        assert not cache
    cache["key"] = 2
    (tmp_path / "other.json").write_text('{"format": 1, "machines": {}}')
    sk.load_measurements(tmp_path / "other.json")
    assert not cache


def test_the_file_lies_in_the_cache_folder_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert measurements.default_path() == tmp_path / ".cache" / "s3d_kernels" / "measurements.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert measurements.default_path() == tmp_path / "xdg" / "s3d_kernels" / "measurements.json"


# ---- other processes


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *(str(argument) for argument in arguments)]
    root = Path(sk.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


CHOOSE = """
import os, sys
os.environ["XDG_CACHE_HOME"] = sys.argv[1]
import torch
torch.set_num_threads(int(sys.argv[2]))
import s3d_kernels as sk
from s3d_kernels.backends import register
from s3d_kernels.backends.torch_gather import TorchGatherBackend

class Named(TorchGatherBackend):
    def __init__(self, name): self.name = name
    def conv3d(self, *arguments):
        print(self.name)
        return super().conv3d(*arguments)

sk.REGISTRY.clear()
for name in ("one", "other"): register(Named(name), first=False)
mask = sk.BlockMask.random(1, 2, 4, 0.5)
x = sk.BlockSparseTensor(torch.zeros(mask.num_blocks, 4, 4, 4, 4), mask)
sk.sparse_conv3d(x, torch.ones(4, 4, 1, 1, 1))
"""

WRITE = """
import sys
from pathlib import Path
from s3d_kernels.backends.measurements import MeasurementStore
store = MeasurementStore(Path(sys.argv[1]))
for number in range(10):
    store.put(f"{sys.argv[2]} {number}", number, "cpu")
"""


def test_another_process_chooses_the_same(tmp_path: Path) -> None:
    use(Delayed("one", conv3d=6), Delayed("other"))
    with sk.tuning(tmp_path / "s3d_kernels" / "measurements.json"):
        step()
    printed, _ = start(CHOOSE, tmp_path, torch.get_num_threads()).communicate(timeout=120)
    assert printed == "other\n"


def test_processes_that_write_at_once_lose_nothing(path: Path) -> None:
    processes = [start(WRITE, path, name) for name in ("a", "b")]
    store = MeasurementStore(path)
    for number in range(10):
        store.put(f"here {number}", number, "cpu")
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    (values,) = MeasurementStore(path).read().values()
    assert values.keys() == {f"{name} {number}" for name in ("a", "b", "here") for number in range(10)}


# ---- the clock


@pytest.mark.parametrize(
    ("milliseconds", "batches"), [(0.1, [1, 1, *[20] * 6]), (1e-3, [1, 1, *[50] * 6]), (600, [1] * 3)]
)
def test_short_calls_are_timed_several_at_once(
    milliseconds: float, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, calls, counts = 0.0, 0, []

    def function() -> None:
        nonlocal now, calls
        now += milliseconds / 1e3
        calls += 1

    def clock() -> float:
        counts.append(calls)
        return now

    monkeypatch.setattr(measurements.time, "perf_counter", clock)
    assert time_call(function, torch.device("cpu")) == pytest.approx(milliseconds)
    assert [end - begin for begin, end in zip(counts[::2], counts[1::2], strict=True)] == batches
