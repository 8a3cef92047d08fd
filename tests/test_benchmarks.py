"""The benchmark suite itself: what is measured is compared, kept, shown and watched over."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import compare
import contenders
import gpu_step_profile
import peers
import pytest
import report
import rows
import torch
import turns
from cases import Case, layers_of, work_of
from results import Results, load
from settings import add_options, read_options
from torch import nn

from s3d_kernels import BlockMask, BlockSparseTensor, to_sparse

ROOT = Path(__file__).resolve().parents[1]

MACHINE = {
    "device": "a machine",
    "slug": "a-machine",
    "instruction_set": "AVX2",
    "python": "3.11",
    "versions": {"torch": "2.14"},
}
CASE = Case("encoder", "", "tiny", 16, 1, 8, "blocks", 0.75, "float32")
LAYER = dataclasses.replace(CASE, question="layer", layer="stage 1 conv 3")


def entry(case: Case, contender: str, seconds: float, phase: str = "both", **figures: Any) -> dict[str, Any]:
    """As pytest-benchmark gives it."""
    known = {"visible_voxels": 1024, "voxels": 4096, "threads_used": 2, **figures}
    return {
        "name": f"{case.id}-{contender}-{phase}",
        "fullname": f"bench/bench_x.py::test[{case.id}-{contender}-{phase}]",
        "params": {"case": case},
        "options": {"timer": "x"},
        "extra_info": {**dataclasses.asdict(case), "contender": contender, "phase": phase, **known},
        "stats": {"median": seconds, "iqr": seconds / 10, "data": [seconds]},
    }


def write(folder: Path, case: Case, times: dict[str, float], run: str = "first", **figures: Any) -> None:
    results = Results(folder, MACHINE, run)
    for contender, seconds in times.items():
        for phase in turns.PHASES:
            results.add(case.question, case.id, entry(case, contender, seconds, phase, **figures))
    results.save()


# ---- measuring


def test_a_contender_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(contenders.Sparse):
        def prepare(self, case: Case, network: nn.Module, x: torch.Tensor, mask: BlockMask) -> contenders.Run:
            with torch.no_grad():
                network.weight.add_(0.01)  # type: ignore[operator]
            return super().prepare(case, network, x, mask)

    monkeypatch.setitem(contenders.CONTENDERS, "torch", Wrong("torch"))
    measured = turns.measure(LAYER, ["dense masked", "torch"], rounds=1, seconds=0.0, memory=False)
    assert re.search(r"the result of torch is wrong by .* its time means nothing", measured["torch"].error or "")
    assert measured["torch"].seconds["both"] == []
    assert measured["dense masked"].error is None
    assert len(measured["dense masked"].seconds["both"]) == 1


@pytest.mark.parametrize("question", ["layer", "encoder", "step"])
def test_wrong_gradients_are_found(question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(contenders.Sparse):
        def prepare(self, case: Case, network: nn.Module, x: torch.Tensor, mask: BlockMask) -> contenders.Run:
            run = super().prepare(case, network, x, mask)
            for parameter in run.network.parameters():
                parameter.register_hook(lambda gradient: 1.1 * gradient)
            return run

    monkeypatch.setitem(contenders.CONTENDERS, "torch", Wrong("torch"))
    case = LAYER if question == "layer" else dataclasses.replace(CASE, question=question)
    measured = turns.measure(case, ["dense masked", "torch"], rounds=1, seconds=0.0, memory=False)
    assert measured["dense masked"].error is None
    assert "the norm of the weights' gradients of torch is wrong by 1.0e-01" in (measured["torch"].error or "")


@pytest.mark.parametrize("fails", ["prepare", "round", "memory"])
def test_a_contender_that_fails_costs_the_others_nothing(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(contenders.Sparse):
        def prepare(self, case: Case, network: nn.Module, x: torch.Tensor, mask: BlockMask) -> contenders.Run:
            if fails == "prepare":
                raise ImportError("built for another torch")
            run = super().prepare(case, network, x, mask)
            calls = iter(range(9))
            forward = run.forward

            def fail_later() -> torch.Tensor:
                if fails == "round" and next(calls) == 2:
                    raise torch.OutOfMemoryError("no memory left")
                return forward()

            run.forward = fail_later
            return run

    def peak(case: Case, name: str) -> float:
        if name == "torch":
            raise RuntimeError("killed")
        return 7.0

    monkeypatch.setitem(contenders.CONTENDERS, "torch", Failing("torch"))
    monkeypatch.setattr(turns, "peak_of", peak)
    measured = turns.measure(LAYER, ["torch", "dense masked"], rounds=3, seconds=60.0, memory=fails == "memory")
    said = {"prepare": "ImportError: built", "round": "OutOfMemoryError: no memory", "memory": "RuntimeError: killed"}
    assert (measured["torch"].error or "").startswith(said[fails])
    assert measured["torch"].seconds["both"] == []
    assert len(measured["dense masked"].seconds["both"]) == 3


def test_every_phase_has_as_many_rounds() -> None:
    measured = turns.measure(LAYER, ["dense masked", "dense", "torch"], rounds=4, seconds=60.0, memory=False)
    for found in measured.values():
        assert [len(found.seconds[phase]) for phase in turns.PHASES] == [4, 4, 4]
        for forward, backward, both in zip(*(found.seconds[phase] for phase in turns.PHASES), strict=True):
            assert forward + backward == pytest.approx(both)
    assert turns.measure(LAYER, ["torch"], rounds=9, seconds=0.0, memory=False)["torch"].seconds["both"][2:] == []


def test_what_a_backend_cannot_compute_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "it has no float32 today"
    backend = contenders.REGISTRY["torch"]
    monkeypatch.setattr(type(backend), "why_not", lambda self, problem: reason)
    case = dataclasses.replace(LAYER, layer="stage 0 conv 3")
    assert turns.measure(case, ["torch"], rounds=1, seconds=0.0, memory=False)["torch"].why_not == reason


class Dense:
    """A package that convolves lists of voxels as any other would, though densely."""

    def __init__(self, wrong: float = 0.0) -> None:
        self.wrong = wrong

    def why_not(self, device: str) -> str | None:
        return None

    def prepare(
        self, coordinates: torch.Tensor, shape: tuple[int, int, int], batch: int, weight: nn.Parameter
    ) -> peers.Prepared:
        place = tuple(coordinates.long().T)

        def convolve(features: torch.Tensor) -> torch.Tensor:
            dense = features.new_zeros(batch, *shape, features.shape[1]).index_put(place, features + self.wrong)
            y = nn.functional.conv3d(dense.permute(0, 4, 1, 2, 3), weight, padding=1)
            return y.permute(0, 2, 3, 4, 1)[place]

        return peers.Prepared(convolve, weight)


def test_other_packages_get_the_visible_voxels_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders.PEERS, "fVDB", Dense())
    case = dataclasses.replace(LAYER, batch_size=2)
    assert "fVDB" in contenders.able(case, "cpu")
    assert "fVDB" not in contenders.able(dataclasses.replace(case, layer="stage 1 norm"), "cpu")
    assert turns.measure(case, ["fVDB"], rounds=1, seconds=0.0, memory=False)["fVDB"].seconds["both"]
    run = turns.prepare(case, "fVDB")
    run.forward().sum().backward()
    assert all(parameter.grad is not None for parameter in run.network.parameters())
    monkeypatch.setitem(contenders.PEERS, "fVDB", Dense(wrong=0.01))
    wrong = turns.measure(case, ["fVDB"], rounds=1, seconds=0.0, memory=False)["fVDB"]
    assert "the result of fVDB is wrong by" in (wrong.error or "")


@pytest.mark.parametrize(
    ("name", "pairs", "voxels"),
    [
        ("stage 1 conv 3", 10**3, 64),
        ("stage 1 conv 1", 4**3, 64),
        # Outputs 0 and 1 of each axis read 2 and 3 of the visible inputs 0 to 3.
        ("stage 2 conv 3 stride 2", 5**3, 8),
        ("stage 2 pool", 0, 8),
        ("stage 1 scatter", 0, 128),
    ],
)
def test_work_is_counted_from_the_mask(name: str, pairs: int, voxels: int) -> None:
    """Of one visible block of 4^3 beside a masked one."""
    mask = BlockMask.from_grid(torch.tensor([[[[True, False]]]]), 4)
    layer = layers_of("tiny")[name]
    x = BlockSparseTensor(torch.randn(1, 4, 4, 4, layer.channels), mask)
    made = layer.make()
    written, channels = turns.output_size(to_sparse(made), x)
    assert written == voxels
    flop, moved = work_of(made, x, written, channels)
    assert flop == 2 * pairs * layer.channels * channels
    assert moved == 4 * (64 * layer.channels + voxels * channels)


def test_depthwise_work_is_divided_by_groups() -> None:
    mask = BlockMask.from_grid(torch.ones(1, 1, 1, 1, dtype=torch.bool), 4)
    x = BlockSparseTensor(torch.randn(1, 4, 4, 4, 4), mask)
    flop, _ = work_of(layers_of("tiny")["stage 0 MedNeXt block"].make(), x, 64, 4)
    assert flop == 2 * (1000 * 4 + 2 * 64 * 4 * 16)


def test_random_voxels_are_masked_one_by_one() -> None:
    case = dataclasses.replace(CASE, mask_kind="voxels", patch_size=32)
    assert case.mask("cpu").num_blocks == 64
    assert int(case.mask("cpu").visible_voxels().sum()) == pytest.approx(0.25 * 32**3, rel=0.03)


# ---- files


def test_a_run_replaces_the_cases_that_it_measures_and_no_others(tmp_path: Path) -> None:
    other = dataclasses.replace(CASE, mask_ratio=0.5)
    write(tmp_path, CASE, {"native": 1.0, "torch": 2.0})
    write(tmp_path, other, {"native": 3.0})
    write(tmp_path, CASE, {"native": 4.0}, run="second")
    _, found = rows.read_rows(tmp_path, "encoder")
    assert {(row.case, row.contender): row.median["both"] for row in found} == {
        (other, "native"): 3.0,
        (CASE, "native"): 4.0,
    }
    assert list(tmp_path.iterdir()) == [tmp_path / "encoder.json"]
    with pytest.raises(ValueError, match="has results of a machine, and this is another: give another folder"):
        Results(tmp_path, {**MACHINE, "device": "another"}, "third").add("encoder", "x", entry(CASE, "native", 1.0))


def test_a_run_that_was_stopped_leaves_readable_results(tmp_path: Path) -> None:
    write(tmp_path, CASE, {"native": 1.0})
    results = Results(tmp_path, MACHINE, "second")
    results.add("encoder", "another", entry(dataclasses.replace(CASE, mask_ratio=0.5), "native", 1.0, "forward"))
    results.save()
    machine, found = report.read_all(tmp_path)
    assert [row.case for row in found["encoder"]] == [CASE]
    assert set(report.tables_of(machine, found, tmp_path)) == {"encoder", "encoder-summary"}


@pytest.mark.slow
def test_pytest_benchmark_reads_the_files(tmp_path: Path) -> None:
    """Its own command compares what a run of ours wrote."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "bench" / "bench_layers.py")]
    command += ["--benchmark", "--preset", "tiny", "--patch-size", "16", "--mask-blocks", "8", "--rounds", "2"]
    command += ["-k", "stage_0_conv_3 and 75masked", "--contenders", "torch,dense masked", "--results", str(tmp_path)]
    command += ["--benchmark-json", str(tmp_path / "own.json"), "--profile", str(tmp_path / "traces")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = load(tmp_path / "layer.json")
    assert len(content["benchmarks"]) == 6
    assert content["machine_info"]["versions"]["torch"] == torch.__version__
    traces = tmp_path / "traces" / "stage_0_conv_3-tiny-16-batch1-blocks8-75masked-float32"
    assert "conv" in (traces / "torch" / "table.md").read_text()
    assert (traces / "dense_masked" / "step.pt.trace.json").exists()
    own = json.loads((tmp_path / "own.json").read_text())
    assert [e["stats"]["median"] for e in own["benchmarks"]] == pytest.approx(
        [e["stats"]["median"] for e in content["benchmarks"]], rel=1e-6
    )
    compared = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(tmp_path / "layer.json"), str(tmp_path / "own.json")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "stage_0_conv_3-tiny-16-batch1-blocks8-75masked-float32-torch-forward" in compared.stdout


@pytest.mark.parametrize(
    ("option", "given", "message"),
    [
        ("--mask-ratios", "0.5,1.5", "--mask-ratios must be numbers in [0, 1), got '0.5,1.5'"),
        ("--contenders", "torch,nobody", "--contenders must be of dense masked"),
        ("--patch-size", "90", "--patch-size must be multiples of --mask-blocks (32,), got (90,)"),
        ("--preset", "huge", "--preset must be of resenc-l"),
        ("--dtypes", "int8", "--dtypes must be of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_bad_options_are_named(option: str, given: str, message: str) -> None:
    with pytest.raises(pytest.UsageError, match=re.escape(message)):
        read_options(configured("--benchmark", option, given))


def configured(*arguments: str) -> pytest.Config:
    """As far as options are read from it."""
    parser = pytest.Parser(_ispytest=True)
    add_options(parser)
    options = parser.parse(arguments)

    def getoption(name: str, default: Any = None) -> Any:
        return getattr(options, name.strip("-").replace("-", "_"), default)

    return SimpleNamespace(getoption=getoption)  # type: ignore[return-value]


def test_options_without_measuring_are_refused() -> None:
    with pytest.raises(pytest.UsageError, match=r"--patch-size, --profile go with --benchmark, which is not given"):
        read_options(configured("--patch-size", "160", "--profile", "traces"))
    assert read_options(configured()).measure is False
    assert read_options(configured("--benchmark", "--full")).blocks == (32, 16)


# ---- comparing


def test_what_became_slower_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    write(before, CASE, {"native": 1.0, "torch": 2.0})
    write(after, CASE, {"native": 1.3, "torch": 2.1})  # the spread is a tenth
    assert compare.main([str(before / "encoder.json"), str(after / "encoder.json")]) == 1
    said = capsys.readouterr().out
    assert said.count("slower: ") == 3
    assert "native-both]: 1 -> 1.3 s (+30 %, spread 13 %)" in said
    assert "torch" not in said
    assert compare.main([str(after / "encoder.json"), str(before / "encoder.json")]) == 0


def test_a_slower_machine_is_no_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    write(before, CASE, {"native": 1.0, "torch": 2.0, "dense": 8.0, "spconv": 3.0})
    write(after, CASE, {"native": 2.0, "torch": 6.0, "dense": 16.0})
    paths = [str(folder / "encoder.json") for folder in (before, after)]
    assert compare.main([*paths, "--relative-to", "dense"]) == 1
    said = capsys.readouterr().out
    assert said.count("slower: ") == 3
    assert "torch-both]: 0.25 -> 0.375 x dense" in said
    assert said.count("not measured again: ") == 3
    assert compare.main([*paths, "--relative-to", "nobody"]) == 2


def test_what_cannot_be_compared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", CASE, {"native": 1.0})
    write(tmp_path / "b", dataclasses.replace(CASE, patch_size=32), {"native": 1.0})
    paths = [str(tmp_path / name / "encoder.json") for name in "ab"]
    assert compare.main(paths) == 2
    assert "have no entry in common" in capsys.readouterr().err
    assert compare.main([paths[0], str(tmp_path / "c.json")]) == 2
    assert "there is no" in capsys.readouterr().err
    (tmp_path / "c.json").write_text("{")
    assert compare.main([paths[0], str(tmp_path / "c.json")]) == 2
    assert "c.json is no file of pytest-benchmark" in capsys.readouterr().err


# ---- showing


def test_tables_and_plots_come_from_the_files(tmp_path: Path) -> None:
    times = {"native": 0.5, "torch": 1.0, "dense masked": 4.0, "dense": 3.0, "dense channels-last": 2.0}
    write(tmp_path, CASE, times, peak_mebibytes=10.0)
    work = {"flop": 1e9, "forward_bytes": 1e6}
    rates = {"multiplication_flop_per_second": 1e11, "copy_bytes_per_second": 1e10}
    write(tmp_path, LAYER, times, **work, **rates)
    write(tmp_path, dataclasses.replace(LAYER, layer="stage 1 norm"), times, **{**work, "flop": 0.0}, **rates)
    for side in (16, 32, 64):
        curve = dataclasses.replace(CASE, question="curve", patch_size=side)
        write(tmp_path, curve, {"auto": side**3 / 1e5}, peak_mebibytes=side**2.0)
    machine, found = report.read_all(tmp_path)
    tables = report.tables_of(machine, found, tmp_path)
    assert set(tables) == {"encoder", "encoder-summary", "layers", "curve"}
    assert (
        "| 75 % | native | 500 ms ±5 % | 500 ms ±5 % | 500 ms ±5 % | 8.00x | 4.00x | 488281 | 10 | 1.00x |"
        in tables["encoder"]
    )
    assert (
        "| 75 % | 500 ms ±5 % | 1.00 s ±5 % | 4.00 s ±5 % | 2.00 s ±5 % | 8.00x | 4.00x | 1.00x |"
        in tables["encoder-summary"]
    )
    assert "| stage 1 conv 3 | 500 / 500 (2 GFLOP/s, 0.02) |" in tables["layers"]
    assert "| stage 1 norm | 500 / 500 (0.002 GB/s, 0.00) |" in tables["layers"]
    assert "| patch side | 16, 32, 64 | 0.041, 0.328, 2.62 | 3.00 | 256, 1024, 4096 | 2.00 |" in tables["curve"]
    assert tables["encoder"].endswith(f"a machine (AVX2), torch 2.14, Python 3.11; first; `{tmp_path}/encoder.json`.")
    report.draw(found, machine, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"encoder.png", "roofline.png", "curve.png"}


def test_documents_get_their_tables() -> None:
    document = "before\n<!-- table: a encoder -->\nold\n<!-- end of table -->\nafter\n"
    new = "before\n<!-- table: a encoder -->\nnew\n<!-- end of table -->\nafter\n"
    assert report.insert(document, {"a encoder": "new"}, "README.md") == new
    assert report.insert(new, {"a encoder": "new"}, "README.md") == new
    with pytest.raises(ValueError, match=r"README.md shows the table 'a encoder'; there are b step"):
        report.insert(document, {"b step": "new"}, "README.md")


def test_tables_in_the_documents_are_what_the_results_say() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "report.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "<!-- table: " in shown
    for path in (ROOT / "bench" / "results").glob("*/*.json"):
        assert json.loads(path.read_text())["machine_info"]["device"]


@pytest.mark.slow
def test_profile_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU all time is the host's, and the tables have its calls only."""
    monkeypatch.setattr(gpu_step_profile, "CASE", dataclasses.replace(CASE, question="step"))
    monkeypatch.setattr(gpu_step_profile, "WARM_UP", 1)
    result = gpu_step_profile.profile_step(turns.prepare(gpu_step_profile.CASE, "torch"))
    assert result.wall_ms >= result.host_ms > 0
    if not torch.cuda.is_available():
        assert (result.kernels_ms, result.peak_bytes) == (0, 0)
    assert "s3d_kernels::conv3d" in result.tables
    assert gpu_step_profile.main([str(tmp_path), "dense", "no such contender", "dense masked"]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed[1:]] == ["dense", "no such contender", "dense masked"]
    for name in ("dense", "dense_masked"):
        assert "aten::convolution" in (tmp_path / f"{name}.txt").read_text()
