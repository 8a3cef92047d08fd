"""s3d profile: what the table, the trace and the plot say of a step, and that recording changes nothing in it."""

from __future__ import annotations

import copy
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from s3d.cli import main
from s3d.distributed import Processes
from s3d.layer_ranges import Layer, layer_ranges
from s3d.loss import masked_mse
from s3d.masking import MaskSampler
from s3d.model import S3D, build_unet
from s3d.pretext.registry import METHODS
from s3d.pretrain_config import PretrainConfig
from s3d.profiling import TRACE, Profile, ProfileConfig, profile, profile_steps
from s3d.step_trace import KINDS, StepTrace
from s3d.training_step import TrainingStep, build_training

TINY: dict[str, Any] = {"preset": "tiny", "patch_size": (32, 32, 32), "mask_block": 8, "batch_size": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, float]:
    """A profile of two steps, and the seconds that everything took."""
    folder = tmp_path_factory.mktemp("runs") / "profile"
    begin = time.perf_counter()
    return profile(ProfileConfig(output_dir=folder, steps=2, warmup=1, **TINY)), time.perf_counter() - begin


def events(folder: Path) -> list[dict[str, Any]]:
    """Complete events of the trace, outer ones first."""
    raw = json.loads((folder / TRACE).read_text())["traceEvents"]
    ranged = [e for e in raw if e["ph"] == "X" and e["cat"] in ("cpu_op", "user_annotation")]
    return sorted(ranged, key=lambda e: (e["ts"], -e["dur"]))


def with_ranges(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Name of each operator, and the names of the ranges and operators around it."""
    around: list[dict[str, Any]] = []
    for event in events(folder):
        while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"] + 5e-4:  # half a nanosecond of rounding
            around.pop()
        if event["cat"] == "cpu_op":
            yield event["name"], [outer["name"] for outer in around]
        around.append(event)


# ---- table


def test_rows_add_up_to_the_step(recorded: tuple[Profile, float]) -> None:
    result, seconds = recorded
    total = sum(row.total_ms for row in result.rows)
    assert total == pytest.approx(result.step_ms, rel=1e-3)
    steps = [e for e in events(result.folder) if e["name"].startswith("ProfilerStep#")]
    assert len(steps) == 2
    assert total == pytest.approx(sum(e["dur"] for e in steps) / 2 / 1000, rel=1e-3)
    assert 2 * result.step_ms < 1e3 * seconds
    assert all(row.forward_ms >= 0 and row.backward_ms >= 0 for row in result.rows)


def test_the_clock_agrees(tmp_path: Path) -> None:
    """The table's sum against a clock of our own."""
    weight = torch.randn(300, 300, requires_grad=True)
    measured: list[float] = []

    def step() -> None:
        begin = time.perf_counter()
        for _ in range(30):
            (weight @ weight).sum().backward()
        time.sleep(0.05)
        measured.append(1e3 * (time.perf_counter() - begin))

    result = profile_steps(step, tmp_path, warmup=1, steps=2)
    assert len(measured) == 4
    clock = sum(measured[-2:]) / 2
    assert result.step_ms == pytest.approx(clock, rel=0.05)
    assert sum(row.total_ms for row in result.rows) == pytest.approx(clock, rel=0.05)
    waiting = next(row for row in result.rows if row.kind == "waiting")
    assert waiting.total_ms >= 50


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_device_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step without a model, whose time on a GPU is that of kernels; without a GPU there are none."""
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    x = torch.ones(8)
    result = profile_steps(lambda: x + x, tmp_path / "gpu", warmup=1, steps=1, device="cuda:0")
    assert waited[:3] == [torch.device("cuda:0")] * 3
    assert result.device == "cuda:0"
    assert {row.kind for row in result.rows if row.total_ms} == {"waiting"}
    waited.clear()
    layer = torch.nn.Linear(8, 8, device="meta")
    result = profile_steps(lambda: x + x, tmp_path / "cpu", layer, warmup=1, steps=1, device="cpu")
    assert not waited
    assert "other" in {row.kind for row in result.rows}


def test_rows_of_a_model(recorded: tuple[Profile, float]) -> None:
    rows = {(row.stage, row.kind): row for row in recorded[0].rows}
    sparse = {(stage, kind) for stage in range(3) for kind in ("conv", "norm", "tokens")}
    whole = {(None, kind) for kind in ("gather", "decoder", "loss", "optimiser", "data", "waiting")}
    assert sparse | whole | {(1, "pool"), (2, "pool")} <= rows.keys()
    assert {kind for _, kind in rows} <= set(KINDS)
    for key in (*sparse, (None, "decoder"), (None, "loss"), (1, "pool")):
        assert rows[key].forward_ms > 0, key
        assert rows[key].backward_ms > 0, key
    for kind in ("optimiser", "data", "gather"):
        assert rows[None, kind].forward_ms > 0
        assert rows[None, kind].backward_ms == 0
    # Nothing of weight is left without a name.
    nameless = rows.get((None, "other"))
    assert nameless is None or nameless.total_ms < 0.1 * recorded[0].step_ms


def test_bytes_of_a_model(recorded: tuple[Profile, float]) -> None:
    rows = {(row.stage, row.kind): row for row in recorded[0].rows}
    voxels = 16 * 8**3  # visible, of 32^3 with floor(3/4 * 64) blocks masked
    # The stem and the two convolutions of the block, 4 channels of float32 each, and their gradients besides.
    assert rows[0, "conv"].allocated_bytes >= 3 * voxels * 4 * 4
    assert 2 * voxels * 4 * 4 <= rows[0, "conv"].kept_bytes <= rows[0, "conv"].allocated_bytes
    for row in rows.values():
        assert row.kept_bytes <= row.allocated_bytes
    assert rows[None, "waiting"].allocated_bytes == 0


def test_table(recorded: tuple[Profile, float]) -> None:
    result, _ = recorded
    lines = result.table().splitlines()
    assert len(lines) == len(result.rows) + 3
    assert len({len(line.split("|")) for line in lines}) == 1
    shares = [float(line.split("|")[5].strip(" %")) for line in lines[2:-1]]
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares) + 1e-6)
    assert lines[-1].split("|")[5].strip() == "100.0%"
    assert float(lines[-1].split("|")[3]) == pytest.approx(sum(r.forward_ms for r in result.rows), abs=0.1)


# ---- trace


def test_operators_of_forward_lie_in_ranges_of_their_layers(recorded: tuple[Profile, float]) -> None:
    operators = [
        (name, around)
        for name, around in with_ranges(recorded[0].folder)
        if name.startswith("s3d_kernels::") and "backward" not in around
    ]
    named = {(name.removeprefix("s3d_kernels::"), around[-1]) for name, around in operators}
    block = "encoder.stages.1.blocks.0"
    assert any(name.startswith("conv3d") and layer == f"{block}.conv1.conv" for name, layer in named)
    assert ("pool3d", f"{block}.skip.0") in named
    # Features of large blocks are a background and a correction, those of small ones dense.
    assert {("normalize", "mask_tokens.0"), ("scatter_blocks", "mask_tokens.2")} <= named
    assert {("conv3d", "densify.1"), ("conv3d", "decoder")} <= named
    # Training wants masked voxels alone.
    assert ("masked_head", "decoder") in named
    # Norms run within the activation or addition that follows; they bear their own names all the same.
    normalized = {layer for name, layer in named if name.startswith("normalize") and layer.startswith("encoder")}
    norms = {"stem.convs.0.norm", *(f"stages.{s}.blocks.0.{c}.norm" for s in range(3) for c in ("conv1", "conv2"))}
    assert {f"encoder.{norm}" for norm in norms} <= normalized
    assert all(layer.endswith((".norm", "skip.1")) for layer in normalized)
    # The input is gathered before the first layer.
    assert {name for name, layer in named if layer == "forward"} == {"gather_blocks"}


def test_operators_of_backward_lie_in_ranges_of_their_layers(recorded: tuple[Profile, float]) -> None:
    found: dict[str, set[str]] = {}
    for name, around in with_ranges(recorded[0].folder):
        if name.startswith("s3d_kernels::") and "backward" in around:
            layers = [outer.removesuffix(" (backward)") for outer in around if outer.endswith(" (backward)")]
            assert len(layers) == 1, (name, around)
            found.setdefault(name.removeprefix("s3d_kernels::"), set()).add(layers[0])
    convolutions = {f"encoder.stages.{s}.blocks.0.{c}.conv" for s in range(3) for c in ("conv1", "conv2")}
    assert convolutions <= found["conv3d_grad_weight"]
    assert convolutions <= found["conv3d_grad_input"]
    assert "encoder.stem.convs.0.conv" in found["conv3d_grad_weight"] - found["conv3d_grad_input"]
    norms = {layer.removesuffix("conv") + "norm" for layer in convolutions}
    assert norms <= found["norm_grad_sums"]
    assert found["pool3d_grad"] == {"encoder.stages.1.blocks.0.skip.0", "encoder.stages.2.blocks.0.skip.0"}
    assert {"mask_tokens.0", "mask_tokens.1"} <= found["norm_grad_sums"]
    assert "mask_tokens.2" in found["gather_blocks"]
    assert {"densify.1", "decoder"} <= found["conv3d_grad_weight"] & found["conv3d_grad_input"]


def test_every_gradient_belongs_to_a_layer(recorded: tuple[Profile, float]) -> None:
    for name, around in with_ranges(recorded[0].folder):
        if name == "torch::autograd::AccumulateGrad":
            assert any(outer.endswith(" (backward)") for outer in around)


def test_ranges_nest(recorded: tuple[Profile, float]) -> None:
    """torch-tb-profiler drops a trace whose ranges cross."""
    around: list[tuple[float, float]] = []
    for event in events(recorded[0].folder):
        begin, end = event["ts"], event["ts"] + event["dur"]
        while around and around[-1][1] <= begin + 5e-4:
            around.pop()
        assert not around or end <= around[-1][1] + 5e-4
        around.append((begin, end))


# ---- what is computed


def operators_called(model: S3D, named: bool) -> tuple[Counter[str], float, list[torch.Tensor]]:
    x = torch.randn(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))
    mask = MaskSampler((32, 32, 32), 8, 0.75, 0)(2, 0)

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = masked_mse(model(x, mask), x, mask)
        loss.backward()
        return loss

    step()  # tables that the mask keeps
    with torch_profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorder:
        if named:
            with layer_ranges(model):
                loss = step()
        else:
            loss = step()
    ranges = {name.removeprefix("unet.") for name, _ in model.named_modules()}
    ranges |= {f"mask_tokens.{stage}" for stage in range(3)}
    calls = Counter(e.name for e in recorder.events() if e.name not in ranges and not e.is_user_annotation)
    return calls, loss.item(), [p.grad for p in model.parameters() if p.grad is not None]


def test_names_change_nothing() -> None:
    """The same operators as often, the same bits; and no hook stays behind."""
    torch.manual_seed(0)
    model = S3D(build_unet("tiny"))
    attributes = {module: copy.copy(module.__dict__) for module in model.modules()}
    before = operators_called(model, named=False)
    named = operators_called(model, named=True)
    after = operators_called(model, named=False)
    assert any(name.startswith("s3d_kernels::conv3d") for name in before[0])
    assert before[0] == named[0] == after[0]
    assert before[1] == named[1] == after[1]
    for one, two in zip(before[2], named[2], strict=True):
        assert torch.equal(one, two)
    for module, values in attributes.items():
        assert module.__dict__.keys() == values.keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_hooks_go_when_the_step_fails() -> None:
    model = S3D(build_unet("tiny"))
    with pytest.raises(ValueError, match="mask"), layer_ranges(model):
        model(torch.zeros(1, 1, 16, 16, 16), MaskSampler((32, 32, 32), 8, 0.75, 0)(1, 0))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "_fill" not in model.__dict__


def test_profiled_steps_are_the_trainers(tmp_path: Path) -> None:
    """Losses and weights after profiled steps are those of a run that nobody watches."""
    config = PretrainConfig(images=(), output_dir=tmp_path, steps=4, **TINY)
    x = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    losses: dict[bool, list[float]] = {True: [], False: []}
    states = []
    for watched, mine in losses.items():
        alone = Processes(0, 1, torch.device("cpu"))
        pretext = METHODS[config.method](config)
        training = build_training(config, pretext, alone.device)
        train = TrainingStep(config, pretext, training, alone, **({"phase": record_function} if watched else {}))

        def step(train: TrainingStep = train, mine: list[float] = mine) -> None:
            mine.append(train([{"image": x}], len(mine)).loss)

        if watched:
            profile_steps(step, tmp_path / "profile", training.model, warmup=1, steps=2)
        else:
            for _ in range(4):
                step()
        states.append(training.model.state_dict())
    assert losses[True] == losses[False]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# ---- reading a trace


def launch(name: str, begin: float, length: float, category: str = "cpu_op", **arguments: Any) -> dict[str, Any]:
    thread = arguments.pop("tid", 1)
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 7,
        "tid": thread,
        "ts": begin,
        "dur": length,
        "args": arguments,
    }


def test_time_of_a_gpu_belongs_to_who_launched_it() -> None:
    """A made-up trace, as nothing of this was run on a GPU: backward on a thread of its own, kernels later."""
    step = launch("ProfilerStep#1", 0, 1000, "user_annotation")
    layer = launch("stages.0.conv", 10, 100, "user_annotation")
    forward = launch("s3d_kernels::conv3d", 20, 50, **{"Sequence number": 5})
    node = "autograd::engine::evaluate_function: X"
    backward = launch(node, 200, 100, tid=2, **{"Sequence number": 5, "Fwd thread id": 1})
    launches = [
        launch("cudaLaunchKernel", 30, 5, "cuda_runtime", correlation=11),
        launch("cudaLaunchKernel", 210, 5, "cuda_runtime", tid=2, correlation=12),
    ]
    kernels = [
        launch("k1", 40, 300, "kernel", tid=99, correlation=11),
        launch("k2", 400, 200, "kernel", tid=99, correlation=12),
    ]
    trace = {"traceEvents": [step, layer, forward, backward, *launches, *kernels]}
    rows = {r.kind: r for r in StepTrace(trace, {"stages.0.conv": Layer(0, "conv")}, "cuda").rows()}
    assert rows["conv"].stage == 0
    assert (rows["conv"].forward_ms, rows["conv"].backward_ms) == pytest.approx((0.3, 0.2))
    assert rows["waiting"].total_ms == pytest.approx(0.5)
    assert rows.keys() == {"conv", "waiting"}


def test_overlapping_kernels_share_the_time() -> None:
    """Made-up kernels on three streams: each moment counts once, for the kernel that began first."""
    step = launch("ProfilerStep#1", 100, 1000, "user_annotation")
    operators = [
        launch("s3d_kernels::conv3d", 110, 10),
        launch("s3d_kernels::pool3d", 130, 10),
        launch("s3d_kernels::norm_apply", 150, 10),
    ]
    launches = [launch("cudaLaunchKernel", 112 + 20 * i, 5, "cuda_runtime", correlation=i) for i in range(3)]
    kernels = [
        launch("k2", 500, 100, "kernel", tid=93, correlation=2),  # within k0
        launch("k1", 600, 400, "kernel", tid=92, correlation=1),  # 300 of it beside k0
        launch("k0", 200, 700, "kernel", tid=91, correlation=0),
        launch("k0", 1080, 50, "gpu_memcpy", tid=91, correlation=0),  # 30 of it after the step
    ]
    result = StepTrace({"traceEvents": [step, *operators, *launches, *kernels]}, {}, "cuda")
    rows = {row.kind: row.total_ms for row in result.rows()}
    assert rows == pytest.approx({"conv": 0.72, "pool": 0.1, "waiting": 0.18})
    assert sum(rows.values()) == pytest.approx(result.step_ms)


def test_memory_over_a_step(recorded: tuple[Profile, float]) -> None:
    lines = (recorded[0].folder / "memory.csv").read_text().splitlines()
    assert lines[0].startswith("ms,conv_bytes,norm_bytes")
    table = [[float(value) for value in line.split(",")] for line in lines[1:]]
    assert all(value >= 0 for row in table for value in row)
    assert [row[0] for row in table] == sorted(row[0] for row in table)
    peak = max(sum(row[1:]) for row in table)
    assert peak > 2 * sum(table[0][1:])
    kept = sum(row.kept_bytes for row in recorded[0].rows)
    assert peak >= kept > 0


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no step"):
        StepTrace({"traceEvents": []}, {})


# ---- files, command line, errors


def test_files(recorded: tuple[Profile, float]) -> None:
    result, _ = recorded
    assert {path.name for path in result.folder.iterdir()} == {
        TRACE,
        "memory.csv",
        "memory.png",
        "profile.json",
        "table.md",
    }
    assert (result.folder / "table.md").read_text() == result.table()
    data = json.loads((result.folder / "profile.json").read_text())
    assert data["steps"] == 2
    assert len(data["rows"]) == len(result.rows)
    assert (result.folder / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_command_line_prints_the_table_and_where_to_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--preset tiny --patch-size 16 16 16 --mask-block 4 --batch-size 1 --steps 1 --warmup 1 --device cpu"
    main(["profile", "--output-dir", str(tmp_path / "p"), *options.split(), "--precision", "bfloat16"])
    out = capsys.readouterr().out
    assert "| stage | kind " in out
    assert f"tensorboard --logdir {tmp_path / 'p'}" in out
    assert "perfetto" in out
    rows = json.loads((tmp_path / "p" / "profile.json").read_text())["rows"]
    assert {row["stage"] for row in rows if row["kind"] == "norm"} == {0, 1, 2}


def test_real_images_come_through_the_loader(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    volume = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "images" / "one.nii.gz")
    settings = {**TINY, "patch_size": (16, 16, 16), "images": (str(tmp_path / "images"),), "workers": 0}
    result = profile(ProfileConfig(output_dir=tmp_path / "p", steps=1, warmup=1, **settings))
    assert any(e["name"].startswith("enumerate(DataLoader)#") for e in events(result.folder))
    assert next(row for row in result.rows if row.kind == "data").forward_ms > 0


def test_options_are_frozen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["profile", "--help"])
    options = set(re.findall(r"--([a-z][a-z-]+)", capsys.readouterr().out))
    expected = """
        backend batch-size device help images mask-block mask-ratio output-dir patch-size precision preset steps
        warmup workers
    """.split()
    assert options == set(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"warmup": 0}, "warmup must be at least 1, got 0"),
        ({"preset": "huge"}, "preset must be one of .*, got 'huge'"),
        ({"mask_block": 3}, "mask_block must be a multiple of 4.*, got 3"),
        ({"backend": "no"}, "backend"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProfileConfig(**{**TINY, **settings})
