"""What a CUDA device gives, against the same code on the CPU. benchmarks/gpu_check.py runs these on a bare machine."""

import multiprocessing
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from shapes import bowl, sphere, torus

from sdfserver.attributes import colors_of
from sdfserver.cloud import Frame, PointCloud
from sdfserver.config import PRESETS, FitConfig, LocalConfig, MeshConfig, NetworkConfig, PoolConfig
from sdfserver.descent import Descent, Task
from sdfserver.extract import extract
from sdfserver.field import SignedDistanceField
from sdfserver.fit import FitJob, fit, fit_together
from sdfserver.local import PartitionOfUnity
from sdfserver.mesh import TriangleMesh
from sdfserver.metrics import closest_on_mesh, mesh_health
from sdfserver.neighbours import BlockedPoints, KdTree
from sdfserver.reconstruct import reconstruct
from sdfserver.refine import refine
from sdfserver.sampling import Samples, draw_samples, normals_of
from sdfserver.siren import Siren
from sdfserver.winding import DipoleTree, point_areas, winding_number

pytestmark = pytest.mark.gpu
NETWORK = NetworkConfig(hidden=64, layers=3, omega=12.0)
CONFIG = FitConfig(steps=120, pool=PoolConfig(size=5000))
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """All of the device's memory again, after a test that took some away."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def unit(cloud: PointCloud) -> PointCloud:
    return PointCloud(points=Frame.around(cloud.points).to_unit(cloud.points), normals=cloud.normals)


def samples_of(cloud: PointCloud, device: str | torch.device = "cpu", config: FitConfig = CONFIG) -> Samples:
    return draw_samples(unit(cloud), config.pool, np.random.default_rng(0), device)


def tasks_of(samples: list[Samples], network: NetworkConfig = NETWORK) -> list[Task]:
    return [
        Task(
            model=Siren(network, generator=torch.Generator().manual_seed(i)).to(one.points.device),
            samples=one,
            generator=torch.Generator().manual_seed(i),
        )
        for i, one in enumerate(samples)
    ]


def parameters(network: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()]).cpu()


def descended(samples: list[Samples], config: FitConfig, steps: int) -> list[torch.Tensor]:
    tasks = tasks_of(samples)
    descent = Descent(tasks, config, most_at_once=steps)
    descent.draw(steps)
    for _ in range(steps):
        descent.take()
    descent.look()
    descent.leave()
    return [parameters(task.model) for task in tasks]


@pytest.mark.parametrize("warm_start_share", [0.0, 0.05])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("count", [1, 3])
def test_recorded_steps_are_the_cpus_steps(count: int, warm_start_share: float, clip_norm: float | None) -> None:
    config = replace(CONFIG, warm_start_share=warm_start_share, clip_norm=clip_norm)
    samples = [samples_of(cloud) for cloud in (torus(3000), bowl(2000), sphere(900))[:count]]
    steps = 12
    before = [parameters(task.model) for task in tasks_of(samples)]
    here = descended(samples, config, steps)
    there = descended([one.to(CUDA) for one in samples], config, steps)
    for first, ours, theirs in zip(before, here, there, strict=True):
        moved = (ours - first).norm()
        assert moved > 0.01
        assert (theirs - ours).norm() < 0.01 * moved


def test_a_fit_on_the_device_is_as_good_as_on_the_cpu() -> None:
    cloud = unit(torus(5000))
    _, here = fit(cloud, NETWORK, CONFIG, device=torch.device("cpu"))
    _, there = fit(cloud, NETWORK, CONFIG, device=CUDA)
    assert there.restarts == here.restarts
    assert there.health.surface == pytest.approx(here.health.surface, rel=0.35)
    assert there.losses == pytest.approx(here.losses, rel=0.35)


def test_fits_together_are_those_alone() -> None:
    jobs = [FitJob(cloud_unit=unit(cloud), seed=i) for i, cloud in enumerate((torus(2000), sphere(1500), torus(900)))]
    together = fit_together(jobs, NETWORK, CONFIG, device=CUDA)
    for job, found in zip(jobs, together, strict=True):
        assert not isinstance(found, Exception)
        _, alone = fit(job.cloud_unit, NETWORK, CONFIG, device=CUDA, seed=job.seed)
        assert found[1].health.surface == pytest.approx(alone.health.surface, rel=0.35)


def test_the_same_seed_gives_the_same_network_to_the_bit() -> None:
    first, again = (refined(CUDA) for _ in range(2))
    assert torch.equal(parameters(first), parameters(again))
    points = torch.from_numpy(unit(torus(3000)).points).float().to(CUDA)
    assert torch.equal(first(points), again(points))


def test_samples_are_the_same() -> None:
    here, there = samples_of(torus(4000)), samples_of(torus(4000), CUDA)
    assert there.noise.least == pytest.approx(here.noise.least, rel=1e-6)
    assert there.spacing == pytest.approx(here.spacing, rel=1e-9)
    assert torch.equal(there.points.cpu(), here.points)
    assert torch.allclose(there.pool.signed_distance.cpu(), here.pool.signed_distance, atol=1e-6)
    assert (there.pool.trusted.cpu() != here.pool.trusted).float().mean() < 1e-3


def test_neighbours_are_the_trees() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(20_000, 3)) * np.exp(rng.normal(size=(20_000, 1)))
    queries = rng.normal(size=(5000, 3))
    for k in (1, 13, 25):
        ours, theirs = KdTree(points).query(queries, k)[0], BlockedPoints(points, CUDA).query(queries, k)[0]
        assert np.allclose(ours, theirs, rtol=1e-12)


def test_winding_numbers_are_the_cpus() -> None:
    cloud = torus(5000)
    assert cloud.normals is not None
    areas = point_areas(cloud.points, KdTree(cloud.points))
    queries = torch.rand((20_000, 3), generator=torch.Generator().manual_seed(0)) * 2 - 1
    here = winding_number(queries, DipoleTree(cloud.points, cloud.normals, areas))
    there = winding_number(queries.to(CUDA), DipoleTree(cloud.points, cloud.normals, areas, CUDA))
    assert torch.allclose(there.cpu(), here, atol=1e-4)


def refined(device: torch.device) -> PartitionOfUnity | Siren:
    samples = samples_of(torus(20_000), config=CONFIG).to(device)
    (task,) = tasks_of([samples])
    descent = Descent([task], CONFIG, most_at_once=60)
    descent.draw(60)
    for _ in range(60):
        descent.take()
    descent.leave()
    config = replace(LocalConfig(), steps=60)
    return refine(task.model, samples, config)[0]


def test_local_networks_are_as_good_as_the_cpus() -> None:
    here, there = refined(torch.device("cpu")), refined(CUDA)
    assert isinstance(here, PartitionOfUnity)
    assert isinstance(there, PartitionOfUnity)
    kept = [sum(len(level.cells) for level in field.levels) for field in (here, there)]
    assert kept[1] == pytest.approx(kept[0], rel=0.35)
    points = torch.from_numpy(unit(torus(3000)).points).float()
    errors = [float(field(points.to(next(field.parameters()).device)).abs().mean()) for field in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=0.35)


def test_the_same_field_has_the_same_mesh() -> None:
    frame = Frame(center=np.zeros(3), scale=1.0)
    network, _ = fit(unit(torus(5000)), NETWORK, CONFIG, device=torch.device("cpu"))
    # In float64: in float32 a node in ten thousand has another sign there.
    here = extract(SignedDistanceField(network.double(), frame), resolution=96, dtype=torch.float64)
    there = extract(SignedDistanceField(network.to(CUDA), frame), resolution=96, dtype=torch.float64)
    assert np.array_equal(here.faces, there.faces)
    assert np.abs(here.vertices_unit - there.vertices_unit).max() < 1e-5
    assert np.abs(here.normals - there.normals).max() < 1e-2


def test_measures_are_the_cpus() -> None:
    job = reconstruct(torus(3000), network=NETWORK, fit_config=CONFIG, mesh=MeshConfig(resolution=64), device="cuda")
    points = torus(2000, seed=1).points * 1.1
    here, there = (closest_on_mesh(points, job.mesh, device=device) for device in ("cpu", CUDA))
    assert np.allclose(here.distance, there.distance, atol=1e-12)
    assert mesh_health(job.mesh, device=CUDA) == mesh_health(job.mesh)
    assert mesh_health(job.mesh).watertight


def test_a_field_moves_between_devices(tmp_path: object) -> None:
    job = reconstruct(sphere(2000), network=NETWORK, fit_config=CONFIG, mesh=MeshConfig(resolution=48), device="cuda")
    path = f"{tmp_path}/field.safetensors"
    job.field.save(path)
    points = sphere(500, seed=2).points
    for device in ("cpu", "cuda"):
        values = SignedDistanceField.load(path, device=device).evaluate(points)
        assert np.allclose(values, job.field.evaluate(points), atol=1e-5)


def _limited(bytes_left: int) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + bytes_left) / total))


def test_fits_that_do_not_fit_together_go_in_halves_and_a_full_device_meshes_in_smaller_batches() -> None:
    jobs = [FitJob(cloud_unit=unit(torus(2000)), seed=i) for i in range(32)]
    network, config = PRESETS["standard"].network, replace(CONFIG, steps=80)
    _limited(500_000_000)
    found = fit_together(jobs, network, config, device=CUDA)
    assert not [one for one in found if isinstance(one, Exception)]
    first = found[0]
    assert not isinstance(first, Exception)
    _limited(150_000_000)
    surface = extract(SignedDistanceField(first[0], Frame(center=np.zeros(3), scale=1.0)), resolution=128)
    assert len(surface.faces) > 1000


def _fit_somewhere(queue: "multiprocessing.Queue[float]") -> None:
    _, report = fit(unit(torus(3000)), NETWORK, CONFIG, device=CUDA)
    queue.put(report.health.surface)


def test_two_processes_share_a_device() -> None:
    context = multiprocessing.get_context("spawn")
    queue: multiprocessing.Queue[float] = context.Queue()
    processes = [context.Process(target=_fit_somewhere, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=200) for _ in processes]
    for process in processes:
        process.join()
    assert found[0] == pytest.approx(found[1], rel=0.35)


def test_colours_of_vertices_are_those_of_the_cpu() -> None:
    cloud = replace(torus(20_000), colors=np.random.default_rng(0).integers(0, 256, (20_000, 3), dtype=np.uint8))
    noise = np.random.default_rng(1).normal(0, 0.01, (50_000, 3))
    around = torus(50_000)
    mesh = TriangleMesh(
        vertices=around.points + noise, faces=np.array([[0, 1, 2]]), normals=normals_of(around).astype(np.float32)
    )
    there, here = colors_of(mesh, cloud, "cuda"), colors_of(mesh, cloud, "cpu")
    assert there is not None
    assert here is not None
    # Equally near points may come in another order.
    assert (np.abs(there.astype(int) - here) <= 1).mean() > 0.9999
