"""Settings of the service, from the environment: every field is SDFSERVER_ and its name in capitals."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from sdfserver.errors import ConfigError

MIB = 2**20
GIB = 2**30


class Settings(BaseSettings):
    """Where the service keeps its things, and what it accepts."""

    model_config = SettingsConfigDict(env_prefix="SDFSERVER_", frozen=True)

    host: Annotated[str, Field(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="port to listen on; 0 takes a free one")] = 8000
    data_dir: Annotated[Path, Field(description="folder for clouds, meshes and the embedded database")] = Path(
        "sdfserver-data"
    )
    database_url: Annotated[
        str | None, Field(description="postgresql://..., or a SQLite file in the data folder if unset")
    ] = None
    artifacts_url: Annotated[
        str | None,
        Field(description="s3://BUCKET/PREFIX or file:///FOLDER for clouds and meshes, or the data folder if unset"),
    ] = None
    presigned_seconds: Annotated[
        float,
        Field(
            ge=0,
            le=7 * 86_400,
            description="how long a link to a result in S3 is good, to which downloads are sent; 0 sends the file",
        ),
    ] = 0.0
    device: Annotated[str, Field(description="device of a worker: auto, cpu, cuda or cuda:N")] = "auto"
    workers: Annotated[
        int | None,
        Field(ge=0, le=64, description="worker processes that serve starts; unset, one for each GPU, or one"),
    ] = None
    batch: Annotated[
        int,
        Field(
            ge=1,
            le=64,
            description="small fits that workers take at once, and fit together: for GPUs; one for all of them",
        ),
    ] = 1
    log_format: Annotated[
        Literal["text", "json"], Field(description="lines for people, or objects with ids of requests and jobs")
    ] = "text"
    allow_public_without_keys: Annotated[
        bool, Field(description="listen on a public address although anyone may then use the server")
    ] = False

    max_upload_bytes: Annotated[int, Field(ge=1, description="largest cloud file")] = 2 * GIB
    max_points: Annotated[int, Field(ge=1, description="most points in a cloud")] = 20_000_000
    max_resolution: Annotated[int, Field(ge=8, le=4096, description="finest grid of a mesh")] = 1024
    max_steps: Annotated[int, Field(ge=1, description="most steps of a fit: bars presets that take more")] = 100_000
    max_npz_query_points: Annotated[int, Field(ge=1, description="most points of one query of a field as NPZ")] = (
        1_000_000
    )
    max_grid_resolution: Annotated[
        int, Field(ge=2, le=2048, description="most nodes of a voxel grid along its longest side")
    ] = 256
    max_queue: Annotated[int, Field(ge=1, description="most jobs waiting, of all users together")] = 1000
    max_jobs_per_key: Annotated[int, Field(ge=1, description="most unfinished jobs of one API key")] = 100
    max_job_seconds: Annotated[float, Field(gt=0, description="longest an attempt at a job may run")] = 3600.0
    max_child_bytes: Annotated[int, Field(ge=256 * MIB, description="most memory of a job's process")] = 16 * GIB
    max_attempts: Annotated[int, Field(ge=1, description="starts of a job whose process dies")] = 3
    min_free_bytes: Annotated[int, Field(ge=0, description="uploads are refused when less disk is free")] = GIB
    retention_seconds: Annotated[float, Field(gt=0, description="how long finished jobs and their files are kept")] = (
        7 * 86_400.0
    )
    gone_seconds: Annotated[float, Field(gt=0, description="how long a removed job then answers 410")] = 7 * 86_400.0

    beat_seconds: Annotated[float, Field(gt=0, description="how often a worker says that it is alive")] = 0.5
    beat_file: Annotated[
        Path | None, Field(description="file that a worker touches whenever it has said so: for a health check")
    ] = None
    lease_seconds: Annotated[float, Field(gt=0, description="silence after which its job goes to another")] = 4.0
    sweep_seconds: Annotated[float, Field(gt=0, description="how often expired jobs and stray files are removed")] = 5.0
    drain_seconds: Annotated[float, Field(ge=0, description="how long a running job may go on after SIGTERM")] = 30.0

    @model_validator(mode="after")
    def _lease_outlasts_beats(self) -> Self:
        if self.lease_seconds < 3 * self.beat_seconds:
            raise ValueError(
                f"lease_seconds is {self.lease_seconds}; it must be at least three beats of {self.beat_seconds} s"
            )
        return self

    @field_validator("artifacts_url")
    @classmethod
    def _known_scheme(cls, url: str | None) -> str | None:
        if url is not None and not re.match("s3://[^/]|file:///.", url):
            raise ValueError("it must begin with s3://BUCKET or file:///FOLDER")
        return url

    @property
    def database_file(self) -> Path:
        """Where the embedded database is."""
        return self.data_dir / "sdfserver.sqlite3"

    @property
    def database(self) -> str:
        """The SQLAlchemy URL of the database."""
        if self.database_url is None:
            return f"sqlite:///{self.database_file.absolute()}"
        return self.database_url.replace("postgres://", "postgresql://").replace(
            "postgresql://", "postgresql+psycopg://"
        )


def load_settings(**overrides: Any) -> Settings:
    """The environment's settings, with those of `overrides` that are not None on top. Raises ConfigError."""
    try:
        return Settings(**{name: value for name, value in overrides.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{where} is {first['input']!r}: {message}" if where else message) from None
