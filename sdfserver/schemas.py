"""What goes over the wire: the requests and answers of the HTTP interface, shared by server and client.

Times are ISO 8601 in UTC; lengths are in the cloud's own units; sdf < 0 inside.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from sdfserver.config import SurfaceKind
from sdfserver.questions import MEANS, RAYS_MEAN, What

Preset = Literal["draft", "standard", "fine", "paper"]
MeshFormat = Literal["ply", "glb", "obj", "stl", "off"]
SliceFormat = Literal["svg", "dxf"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Point = Annotated[list[Finite], Field(min_length=3, max_length=3)]

MAX_PRIORITY = 10
MAX_QUERY_POINTS = 100_000


class JobState(StrEnum):
    """Where a job stands; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing will happen to the job any more."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


class JobKind(StrEnum):
    """What a job makes: a field and its mesh out of a cloud, or another mesh of a field that is there."""

    RECONSTRUCTION = "reconstruction"
    MESH = "mesh"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MeshOptions(_Model):
    """How the surface is taken out of the field."""

    resolution: Annotated[
        int | None,
        Field(ge=8, le=4096, description="Cells of the grid along each side; by default by the field's detail."),
    ] = None
    level: Annotated[
        Finite, Field(description="Signed distance of the surface, in the cloud's units: above 0 is outside.")
    ] = 0.0
    shell: Annotated[
        Finite | None,
        Field(gt=0, description="Make a closed wall, from the surface this far inward, in the cloud's units."),
    ] = None
    surface: Annotated[
        SurfaceKind,
        Field(description="Leave the surface open where no points are, or closed; auto decides by the cloud."),
    ] = "auto"
    trim: Annotated[
        Finite | None,
        Field(gt=0, description="Cut away what is farther than this from every point, in the cloud's units."),
    ] = None
    min_component: Annotated[
        float, Field(ge=0, le=1, description="Drop parts with less than this share of the largest one's area.")
    ] = 0.0
    faces: Annotated[int | None, Field(ge=4, le=2**31 - 1, description="Simplify to about this many faces.")] = None
    sharp: Annotated[
        bool, Field(description="Keep the creases of the cloud sharp, along edges of the mesh; needs level 0.")
    ] = False

    @model_validator(mode="after")
    def _sharp_needs_level_zero(self) -> "MeshOptions":
        if self.sharp and self.level != 0:
            raise ValueError(f"sharp needs level 0, and level is {self.level}; leave one of them out")
        if self.sharp and self.shell is not None:
            raise ValueError("sharp keeps creases of the surface, not of a shell; leave one of them out")
        return self

    @model_validator(mode="after")
    def _a_shell_is_closed(self) -> "MeshOptions":
        if self.shell is not None and (self.trim is not None or self.surface == "open"):
            other = "surface=open leaves" if self.trim is None else "trim would cut"
            raise ValueError(f"shell makes a closed wall, which {other} open; leave one of them out")
        return self


class JobOptions(MeshOptions):
    """How a cloud is reconstructed, and how its job is treated."""

    preset: Annotated[Preset, Field(description="How much care to take.")] = "standard"
    device: Annotated[
        Literal["auto", "cpu", "cuda"], Field(description="Where to compute; auto takes the worker's own device.")
    ] = "auto"
    seed: Annotated[int, Field(ge=0, le=2**63 - 1, description="The same seed gives the same mesh.")] = 0
    normals: Annotated[
        Literal["file", "estimate"], Field(description="Take the normals from the file, or estimate them.")
    ] = "file"
    viewpoint: Annotated[
        Point | None, Field(description="Where the sensor stood: estimated normals point to its side.")
    ] = None
    remove_outliers: Annotated[bool, Field(description="Drop points unusually far from the others.")] = False
    priority: Annotated[
        int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="Larger runs first; equals run in order of arrival.")
    ] = 0
    max_seconds: Annotated[
        Finite | None, Field(gt=0, description="Fail the job when it has run for longer; the server has a limit too.")
    ] = None

    @model_validator(mode="after")
    def _viewpoint_needs_estimate(self) -> "JobOptions":
        if self.viewpoint is not None and self.normals != "estimate":
            raise ValueError("viewpoint has no effect without normals=estimate; set that or leave it out")
        return self


class MeshJobOptions(MeshOptions):
    """Another mesh of a field that has been fitted."""

    model_config = ConfigDict(strict=True, json_schema_extra={"examples": [{"resolution": 64, "level": 0.01}]})

    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0


class RestartOptions(JobOptions):
    """What to do otherwise when a job is done again; what is not given stays as it was."""

    model_config = ConfigDict(strict=True, json_schema_extra={"examples": [{"normals": "estimate", "seed": 1}]})


class Sample(BaseModel):
    """A cloud that comes with the server."""

    name: str
    summary: str
    bytes: int
    link: str


class SampleList(BaseModel):
    """The clouds that come with the server."""

    samples: list[Sample]


class Problem(BaseModel):
    """What went wrong, as RFC 9457 has it (application/problem+json)."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[str, Field(description="A stable name of the kind of problem.")] = "about:blank"
    title: str
    status: int
    detail: str
    instance: str | None = None


class Links(BaseModel):
    """Where the rest of a job is; what is not there yet is null."""

    self: str
    events: str
    cancel: str
    mesh: str | None = None
    preview: str | None = None
    points: str | None = None
    picture: str | None = None
    report: str | None = None
    field: str | None = None
    meshes: str | None = None
    sdf: str | None = None
    sdf_npz: str | None = None
    slice: str | None = None
    grid: str | None = None
    onnx: str | None = None
    restart: str | None = None
    parent: str | None = None


class Job(BaseModel):
    """A job as it stands."""

    id: str
    kind: JobKind
    parent_id: str | None = None
    name: Annotated[str, Field(description="The name of the uploaded file.")]
    state: JobState
    stage: Annotated[str | None, Field(description="prepare, fit, mesh, measure or publish, while it runs.")] = None
    progress: Annotated[float, Field(ge=0, le=1)] = 0.0
    step: int | None = None
    steps: int | None = None
    losses: dict[str, float] = {}
    eta_s: Annotated[float | None, Field(description="Seconds to the end, by measured speed; null if unknown.")] = None
    preview: Annotated[
        int | None, Field(description="How many surfaces it has shown while they form; each replaces the one before.")
    ] = None
    queue_position: Annotated[int | None, Field(description="1 is the next to run; null once it runs.")] = None
    priority: int = 0
    attempt: Annotated[int, Field(description="How many times it was started.")] = 0
    options: dict[str, Any]
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    expires_at: Annotated[datetime | None, Field(description="When its files will be removed.")] = None
    problem: Problem | None = None
    links: Links


class JobPage(BaseModel):
    """A page of jobs, newest first."""

    jobs: list[Job]
    next: Annotated[str | None, Field(description="The cursor of the next page; null on the last.")] = None


class SdfRequest(_Model):
    """What to ask a field: of points, of rays, or of both."""

    model_config = ConfigDict(
        strict=True,
        json_schema_extra={
            "examples": [
                {"points": [[0.0, 0.0, 0.5]], "what": ["distance", "gradient", "closest"]},
                {"origins": [[0.0, 0.0, 9.0]], "directions": [[0.0, 0.0, -1.0]]},
            ]
        },
    )

    points: Annotated[list[Point] | None, Field(min_length=1, max_length=MAX_QUERY_POINTS)] = None
    what: Annotated[
        list[What],
        Field(max_length=len(MEANS), description="Of the points. " + "; ".join(f"{k}: {v}" for k, v in MEANS.items())),
    ] = ["distance"]
    gradient: Annotated[bool, Field(description="The same as `gradient` in `what`.")] = False
    origins: Annotated[
        list[Point] | None,
        Field(min_length=1, max_length=MAX_QUERY_POINTS, description=f"Where rays begin; answered by {RAYS_MEAN}."),
    ] = None
    directions: Annotated[
        list[Point] | None,
        Field(min_length=1, max_length=MAX_QUERY_POINTS, description="Where they go, of any length but 0; as many."),
    ] = None
    max_distance: Annotated[
        Finite | None, Field(gt=0, description="Crossings farther from the origin of a ray do not count.")
    ] = None

    @model_validator(mode="after")
    def _asks_something(self) -> "SdfRequest":
        if self.points is None and self.origins is None:
            raise ValueError("there is nothing to answer; give points, or origins and directions of rays")
        if (self.origins is None) != (self.directions is None):
            raise ValueError("rays need both origins and directions; give both")
        if self.origins is not None and self.directions is not None and len(self.origins) != len(self.directions):
            raise ValueError(
                f"there are {len(self.origins)} origins and {len(self.directions)} directions; give as many"
            )
        return self


class DistanceError(BaseModel):
    """How far a field is from being a distance near its surface: | |grad phi| - 1 |, which is 0 for a distance."""

    mean: float
    p95: float
    max: float
    band: Annotated[float, Field(description="How near to the surface, on either side.")]
    samples: Annotated[int, Field(description="How many points were looked at.")]


Row = list[float]


class SdfResponse(BaseModel):
    """The answers to what was asked, one for each point or ray; the others are null, and so is what a ray missed."""

    distances: list[float] | None = None
    gradients: list[Row] | None = None
    true_distances: list[float] | None = None
    closest_points: list[Row] | None = None
    mean_curvatures: list[float | None] | None = None
    gaussian_curvatures: list[float | None] | None = None
    inside: list[bool] | None = None
    hits: list[bool] | None = None
    ray_distances: list[float | None] | None = None
    hit_points: list[Row | None] | None = None
    hit_normals: list[Row | None] | None = None
    distance_error: Annotated[
        DistanceError | None, Field(description="Measured on this field; null where it has no surface.")
    ] = None


class PresetInfo(BaseModel):
    """What a preset stands for."""

    summary: str
    steps: int
    resolution: int | Literal["auto"]


class ServerLimits(BaseModel):
    """What the server accepts."""

    upload_bytes: int
    points: int
    resolution: int
    steps: int
    queue_length: int
    jobs_per_key: int
    job_seconds: float
    query_points: Annotated[int, Field(description="Points or rays of a query in JSON.")]
    npz_query_points: Annotated[int, Field(description="The same as NPZ.")]
    grid_resolution: Annotated[int, Field(description="Nodes of a voxel grid along its longest side.")]
    retention_seconds: float


class OptionsInfo(BaseModel):
    """What may be asked for: presets, limits, formats, and the schemas of the options."""

    presets: dict[Preset, PresetInfo]
    default_preset: Preset
    devices: list[str]
    limits: ServerLimits
    cloud_formats: list[str]
    mesh_formats: list[MeshFormat]
    job_options: Annotated[dict[str, Any], Field(description="JSON Schema of the options of POST /v1/jobs.")]
    mesh_options: Annotated[dict[str, Any], Field(description="JSON Schema of POST /v1/jobs/{id}/meshes.")]


IdempotencyKey = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$")]
