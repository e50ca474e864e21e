"""On the path of every server that the tests start: `draft` becomes a fit of some seconds on one core.

It is a real fit, of a smaller network; what is tested here is what happens around it. And workers compute on one
thread: two would wait for each other all the time where others use the second core.
"""

import os
import sys
from dataclasses import replace
from typing import cast

from sdfserver.config import PRESETS, FitConfig, NetworkConfig, PoolConfig, Preset

cast(dict[str, Preset], PRESETS)["draft"] = replace(
    PRESETS["draft"],
    network=NetworkConfig(hidden=128, layers=3),
    fit=FitConfig(
        steps=int(os.environ.get("QUICK_STEPS", "600")),
        batch_surface=400,
        batch_space=400,
        pool=PoolConfig(size=10_000),
    ),
)

if sys.orig_argv[-1:] == ["worker"]:
    os.sched_getaffinity = lambda _process: {0}
