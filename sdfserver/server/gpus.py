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
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        # By number CUDA may order them otherwise than the driver does.
        told = subprocess.run(  # noqa: S603 - the driver's own tool
            [tool, "--query-gpu=uuid", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=ANSWER_SECONDS,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in told.splitlines() if line.strip()]
