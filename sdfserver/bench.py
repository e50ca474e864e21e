"""How long each stage of a reconstruction takes here, and how long it would have to.

A stage's floor is the time that its floating-point operations take at the rate of this machine's own matrix products,
or that its bytes take at the rate at which memory is copied, whichever is longer. Operations and bytes are counted from
the sizes of the networks and batches and from what the run reports that it did, not measured. A floor is not what could
be reached: elementwise functions, trees and sorting have none of their own here.

Symbols: n samples of a step; h and L a network's width and number of sine layers. Multiply-adds count as two.
"""

import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdfserver.cloud import Frame, PointCloud
from sdfserver.config import PRESETS, FitConfig, NetworkConfig, PoolConfig, Preset
from sdfserver.errors import CommandError, ConfigError, DivergenceError, NoSurfaceError, Stopped
from sdfserver.files import open_cloud, reason
from sdfserver.io import read_cloud, read_mesh, write_mesh
from sdfserver.mesh import TriangleMesh
from sdfserver.metrics import MeshDistances, compare_meshes
from sdfserver.neighbours import neighbours_of
from sdfserver.reconstruct import choose_device, fit_field, reconstruct
from sdfserver.sampling import normals_of, pool_positions, sketch_rows
from sdfserver.winding import DipoleTree, point_areas, winding_number

FITS = ("coarse fit", "local fits")
STAGES = ("read", "prepare", "pool", "k-d trees", "winding number", *FITS, "mesh", "measure", "write")
"""In order; the two after `pool` are parts of it, and run once more by themselves to be timed."""
PARTS = frozenset({"k-d trees", "winding number"})
TRIAL_STEPS = 40
"""Steps of a fit by which it is told how long one takes."""
FLOAT32 = 4
"""Bytes of a number."""
TERM_FLOPS = 17
"""Operations of one dipole's share of a winding number."""
LEAF_POINTS = 16
"""Points in a leaf of SciPy's k-d tree: a query reads one at least."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What this machine can do: operations a second in matrix products, bytes a second copied."""

    device: str
    threads: int
    float32: float
    bfloat16: float
    copy: float


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: its seconds, and what it had to do. `flops` are of the precision that the stage computes in."""

    name: str
    seconds: float
    flops: float = 0.0
    bytes: float = 0.0
    floor: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One reconstruction, from file to file."""

    cloud: str
    preset: str
    steps: int
    stages: tuple[Stage, ...]
    distances: MeshDistances | None

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages if stage.name not in PARTS)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A whole command as a process of its own, once."""

    cloud: str
    name: str
    seconds: float
    distances: MeshDistances | None


def measured_rates(device: torch.device, *, seconds: float = 0.3) -> Rates:
    """The rates of `device`: on a CPU of products at the sizes of a fit, elsewhere of such as fill it."""
    n, m, k = (2048, 256, 256) if device.type == "cpu" else (8192, 4096, 4096)
    a, b = torch.rand(n, m, device=device), torch.rand(m, k, device=device)
    low_a, low_b = a.bfloat16(), b.bfloat16()
    block, copy = torch.rand(2**24, device=device), torch.empty(2**24, device=device)
    flops = 2 * n * m * k
    return Rates(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        float32=flops * _per_second(lambda: a @ b, device, seconds),
        bfloat16=flops * _per_second(lambda: low_a @ low_b, device, seconds),
        copy=2 * block.nbytes * _per_second(lambda: copy.copy_(block), device, seconds),
    )


def _per_second(work: Callable[[], Tensor], device: torch.device, seconds: float) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        wait()
        count += 1
    return count / (time.perf_counter() - start)


def products(network: NetworkConfig) -> int:
    """Multiply-adds of one pass through a network 3 -> h x L -> 1, for one sample."""
    h = network.hidden
    return 3 * h + (network.layers - 1) * h * h + h


def step_flops(network: NetworkConfig, samples: int, *, gradient: bool = True) -> float:
    """Operations in the matrix products of one step.

    The value takes one pass, its backward pass two. With the field's gradient: two passes, and four back.
    """
    return 2.0 * (6 if gradient else 3) * products(network) * samples


def step_bytes(network: NetworkConfig, samples: int, *, gradient: bool = True) -> float:
    """Bytes that a step has to write and read again: what each sine layer keeps for the way back, twice.

    With the field's gradient a layer keeps four arrays (sines, cosines, and two of the adjoint sweep), else two.
    """
    return 2.0 * (4 if gradient else 2) * network.layers * network.hidden * samples * FLOAT32


def evaluation_flops(network: NetworkConfig, values: float, gradients: float) -> float:
    """Operations of asking a network at `values` points, and for the gradient as well at `gradients`."""
    return 2.0 * products(network) * (values + 2 * gradients)


def fit_work(network: NetworkConfig, config: FitConfig, steps: int, warm_steps: int) -> tuple[float, float]:
    """Operations and bytes of a fit of one network with so many steps, the first `warm_steps` without a gradient."""
    n = config.batch_surface + config.batch_space
    full = steps - warm_steps
    return (
        full * step_flops(network, n) + warm_steps * step_flops(network, n, gradient=False),
        full * step_bytes(network, n) + warm_steps * step_bytes(network, n, gradient=False),
    )


def preset_work(preset: Preset) -> tuple[float, float]:
    """Operations and bytes of a preset's first stage, as it runs where no local networks are expected to pay."""
    return fit_work(preset.network, preset.fit, preset.fit.steps, preset.fit.warm_start_steps)


def run(
    path: Path,
    preset: str,
    rates: Rates,
    *,
    seed: int,
    device: str,
    reference: TriangleMesh | None = None,
    budget_s: float | None = None,
) -> Run:
    """Reconstructs the cloud in `path` and accounts for the seconds.

    With `budget_s` the fit gets as many steps as take so many seconds: what the published recipe comes to in the time
    of another preset.
    """
    settings: dict[str, Any] = {"preset": preset, "device": device, "seed": seed}
    config = PRESETS[preset].fit
    with tempfile.TemporaryDirectory() as folder:
        read_s, cloud = _timed(lambda: read_cloud(path))
        if budget_s is not None:
            config = replace(config, steps=max(1, int(budget_s / _seconds_a_step(cloud, settings))))
            settings |= {"network": PRESETS[preset].network, "fit_config": config}
        result = reconstruct(cloud, **settings)
        out = Path(folder) / "mesh.ply"
        write_s, _ = _timed(lambda: write_mesh(result.mesh, out))
        moved = {"read": 2.0 * path.stat().st_size, "write": 2.0 * out.stat().st_size}
    seconds = {"read": read_s, "write": write_s} | _seconds_of(result.report)
    work = _work_of(result.report, PRESETS[preset], config) | {name: (0.0, size) for name, size in moved.items()}
    trees = _tree_stages(cloud, config.pool, seed, choose_device(device))
    seconds |= {name: took for name, (took, _, _) in trees.items()}
    work |= {name: (flops, size) for name, (_, flops, size) in trees.items()}
    low = bool(result.report["fit"]["low_precision_steps"])

    def stage(name: str) -> Stage:
        flops, size = work.get(name, (0.0, 0.0))
        rate = rates.bfloat16 if low and name == "coarse fit" else rates.float32
        # What a step keeps stays in the cache where it fits: its bytes are told, and the floor is that of arithmetic.
        floor = max(flops / rate, 0.0 if name in FITS else size / rates.copy)
        return Stage(name=name, seconds=seconds[name], flops=flops, bytes=size, floor=floor)

    return Run(
        cloud=path.stem,
        preset=preset,
        steps=result.report["fit"]["steps"],
        stages=tuple(stage(name) for name in STAGES),
        distances=None if reference is None else compare_meshes(result.mesh, reference),
    )


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def _seconds_a_step(cloud: PointCloud, settings: dict[str, Any]) -> float:
    """Of the first steps of a fit that is then stopped."""
    preset, began = PRESETS[settings["preset"]], list[float]()

    def enough() -> bool:
        began.append(time.perf_counter())
        return len(began) > TRIAL_STEPS

    with suppress(Stopped):
        fit_field(cloud, network=preset.network, fit_config=preset.fit, should_stop=enough, **settings)
    return (began[-1] - began[0]) / (len(began) - 1)


def _seconds_of(report: dict[str, Any]) -> dict[str, float]:
    """The seconds of the stages that a report knows of."""
    seconds, local = report["seconds"], report["fit"]["local"]
    local_s = local["seconds"] if local else 0.0
    return {
        "prepare": seconds["prepare"],
        "pool": seconds["pool"],
        "coarse fit": seconds["fit"] - seconds["pool"] - local_s,
        "local fits": local_s,
        "mesh": seconds["mesh"],
        "measure": seconds["measure"],
    }


def _work_of(report: dict[str, Any], preset: Preset, config: FitConfig) -> dict[str, tuple[float, float]]:
    """Operations and bytes of the stages, from what a report says that they did."""
    fit, mesh, local = report["fit"], report["mesh"], report["fit"]["local"]
    network = preset.network
    work = {"coarse fit": fit_work(network, config, fit["steps"], fit["warm_start_steps"])}
    if local and preset.local is not None:
        n = preset.local.batch_surface + preset.local.batch_space
        each = step_flops(preset.local.network, n), step_bytes(preset.local.network, n)
        work["local fits"] = local["cell_steps"] * each[0], local["cell_steps"] * each[1]
        network = preset.local.network if local["cells_kept"] else network
    flops = evaluation_flops(network, mesh["field_evaluations"], mesh["gradient_evaluations"])
    return work | {"mesh": (flops, 2.0 * 24 * (mesh["vertices"] + mesh["faces"]))}


def _tree_stages(
    cloud: PointCloud, config: PoolConfig, seed: int, device: torch.device
) -> dict[str, tuple[float, float, float]]:
    """Seconds, operations and bytes of the two larger parts of the pool, each run once more by itself."""
    frame = Frame.around(cloud.points, margin=0.0)
    rng = np.random.default_rng(seed)
    rows = sketch_rows(len(cloud.points), rng)
    points, normals = frame.to_unit(cloud.points)[rows], normals_of(cloud)[rows]
    positions = pool_positions(points, config, rng)

    def nearest() -> NDArray[np.float64]:
        among = neighbours_of(points, device)
        among.query(positions, 1)
        return point_areas(points, among)

    nearest_s, areas = _timed(nearest)
    queries = torch.tensor(positions, dtype=torch.float32, device=device)

    def winding() -> DipoleTree:
        tree = DipoleTree(points, normals, areas, device)
        winding_number(queries, tree)
        return tree

    winding_s, tree = _timed(winding)
    leaves = 24.0 * LEAF_POINTS * (len(points) + len(positions))
    return {"k-d trees": (nearest_s, 0.0, leaves), "winding number": (winding_s, float(TERM_FLOPS * tree.terms), 0.0)}


def run_command(name: str, command: str, cloud: Path, reference: TriangleMesh | None = None) -> Command:
    """Runs `command`, with {cloud} and {mesh} filled in, as a process of its own, from its start to its end.

    Raises CommandError where it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        mesh = Path(folder) / "mesh.ply"
        arguments = shlex.split(command.format(cloud=shlex.quote(str(cloud)), mesh=shlex.quote(str(mesh))))
        try:
            seconds, done = _timed(lambda: _process(arguments))
        except OSError as error:
            raise CommandError(f"{name} cannot be started: {reason(error)}") from None
        if done.returncode or not mesh.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CommandError(f"{name} failed with exit code {done.returncode} on {cloud.name}: {last}")
        distances = None if reference is None else compare_meshes(read_mesh(mesh), reference)
    return Command(cloud=cloud.stem, name=name, seconds=seconds, distances=distances)


def _process(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    # The command is the user's own, given to be run.
    return subprocess.run(arguments, capture_output=True, text=True, check=False)  # noqa: S603


def own_command(preset: str, *, seed: int, device: str) -> str:
    """The command line of a reconstruction, for `run_command`."""
    options = f"--preset {preset} --seed {seed} --device {device} --quiet"
    return f"{shlex.quote(sys.executable)} -m sdfserver reconstruct {{cloud}} -o {{mesh}} {options}"


def bench(
    clouds: Sequence[Path],
    presets: Sequence[str],
    *,
    beside: Mapping[str, str],
    reference: Path | None,
    runs: int,
    seed: int,
    device: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Measures `presets` on `clouds`, and whole commands in turn if any are to run `beside`; all of it as plain data.

    `say` gets a table, as text, as soon as there is one. Distances need a `reference`. `paper` takes as many steps as
    fit into the seconds of the preset before it; when it comes first, all of its own.

    Raises CloudError and ConfigError where a file cannot be read, CommandError where another program fails.
    """
    torch_device = choose_device(device)
    for path in clouds:
        open_cloud(path).close()  # before the rates, which take seconds
    truth = None if reference is None else reference_mesh(reference)
    rates = measured_rates(torch_device)
    say(rates_text(rates))
    for name in presets:
        say(work_text(name, rates))
    measured: list[Run] = []
    commands: list[Command] = []
    for cloud in clouds:
        before: float | None = None
        for preset in presets:
            budget_s = before if preset == "paper" else None
            try:
                one = run(cloud, preset, rates, seed=seed, device=device, reference=truth, budget_s=budget_s)
            except (DivergenceError, NoSurfaceError) as error:
                say(f"\n{cloud.stem}, {preset}: no surface; {error}")
                continue
            measured.append(one)
            before = sum(stage.seconds for stage in measured[-1].stages if stage.name in FITS)
            say(run_text(measured[-1]))
        if beside:
            ours = {name: own_command(name, seed=seed, device=device) for name in presets if name != "paper"}
            for _ in range(runs):
                in_turn = [run_command(name, command, cloud, truth) for name, command in {**ours, **beside}.items()]
                commands.extend(in_turn)
                say(commands_text(in_turn, next(iter(beside))))
    return {
        "rates": asdict(rates),
        "runs": [{**asdict(one), "seconds": one.seconds} for one in measured],
        "commands": [asdict(command) for command in commands],
    }


def reference_mesh(path: Path) -> TriangleMesh:
    """The mesh in a file, as a reference. Raises CloudError and ConfigError where it cannot be read."""
    open_cloud(path).close()
    try:
        return read_mesh(path)
    except Exception as error:  # noqa: BLE001 - whatever a library of many formats raises
        raise ConfigError(f"the reference {path} cannot be read as a mesh: {reason(error)}") from None


def rates_text(rates: Rates) -> str:
    """The rates on one line."""
    return (
        f"{rates.device}, {rates.threads} threads: float32 {rates.float32 / 1e9:.0f} GFLOP/s, "
        f"bfloat16 {rates.bfloat16 / 1e9:.0f} GFLOP/s, copying {rates.copy / 1e9:.1f} GB/s"
    )


def work_text(name: str, rates: Rates) -> str:
    """What the first stage of a preset has to do, and the floors of it in float32 and in bfloat16."""
    flops, size = preset_work(PRESETS[name])
    floors = f"{flops / rates.float32:.1f} s in float32, {flops / rates.bfloat16:.1f} s in bfloat16"
    return f"{name}: {flops / 1e12:.2f} TFLOP, {size / 1e9:.0f} GB kept for the way back; {floors}"


def run_text(run: Run) -> str:
    """A table of the stages: seconds, floor, and how many times longer than the floor."""
    lines = [
        "",
        f"{run.cloud}, {run.preset}, {run.steps} steps: {run.seconds:.1f} s{_distances_text(run.distances)}",
        f"{'stage':18}{'seconds':>9}{'floor':>9}{'times':>7}{'GFLOP':>9}{'GB':>8}",
    ]
    for stage in run.stages:
        name = f"  {stage.name}" if stage.name in PARTS else stage.name
        times = f"{stage.seconds / stage.floor:.1f}" if stage.floor and stage.seconds else ""
        counts = [f"{x / 1e9:.3g}" if x else "" for x in (stage.flops, stage.bytes)]
        floor = f"{stage.floor:.3f}" if stage.floor else ""
        lines.append(f"{name:18}{stage.seconds:9.3f}{floor:>9}{times:>7}{counts[0]:>9}{counts[1]:>8}".rstrip())
    return "\n".join(lines)


def commands_text(commands: Sequence[Command], yardstick: str) -> str:
    """Whole commands on one cloud, and their seconds as a share of the `yardstick`'s."""
    whole = next(command.seconds for command in commands if command.name == yardstick)
    lines = ["", f"{commands[0].cloud}, whole commands in turn"]
    lines += [
        f"{one.name:18}{one.seconds:9.1f} s{one.seconds / whole:9.3f}{_distances_text(one.distances)}"
        for one in commands
    ]
    return "\n".join(lines)


def _distances_text(distances: MeshDistances | None) -> str:
    if distances is None:
        return ""
    return f", chamfer {distances.chamfer:.5g}, hausdorff {distances.hausdorff:.4g}"
