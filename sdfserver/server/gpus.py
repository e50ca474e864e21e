"""Which GPUs there are for workers: found without PyTorch, which only their children load."""

import os
import shutil
import subprocess

VARIABLE = "CUDA_VISIBLE_DEVICES"
ANSWER_SECONDS = 20.0


def visible_gpus() -> list[str]:
    """The GPUs that processes started from here see, each by a name that CUDA_VISIBLE_DEVICES takes.

    Those that the variable names, or else all that the driver tells of; none where there is no driver to ask.
    """
    named = os.environ.get(VARIABLE)
    if named is not None:
        names = [name.strip() for name in named.split(",")]
        # As CUDA reads it: what cannot be a device ends the list.
        end = next((i for i, name in enumerate(names) if not name or name.startswith("-")), len(names))
        return names[:end]
    # By number CUDA may order them otherwise than the driver does.
    return [row[0] for row in _told("uuid")]


def gpu_figures() -> dict[str, float] | None:
    """Memory and use of the first GPU that this process sees; None where there is none, or no driver to ask."""
    seen = visible_gpus()
    rows = _told("uuid", "index", "memory.used", "memory.total", "utilization.gpu") if seen else []
    for uuid, index, used, total, busy in (row for row in rows if len(row) == len(_FIGURES) + 2):
        if seen[0] in (uuid, index):
            numbers = [float(value) if value.replace(".", "").isdigit() else 0.0 for value in (used, total, busy)]
            return {name: number * unit for (name, unit), number in zip(_FIGURES.items(), numbers, strict=True)}
    return None


_FIGURES = {"memory_used_bytes": 2.0**20, "memory_bytes": 2.0**20, "busy": 0.01}
"""What the driver tells of a GPU, and in which units."""


def _told(*what: str) -> list[list[str]]:
    """Of each GPU what the driver's tool tells; nothing where it is missing or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        told = subprocess.run(  # noqa: S603 - the driver's own tool
            [tool, f"--query-gpu={','.join(what)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=True,
            timeout=ANSWER_SECONDS,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [[value.strip() for value in line.split(",")] for line in told.splitlines() if line.strip()]
