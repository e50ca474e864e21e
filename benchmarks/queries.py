"""What each question to a field takes, as a multiple of its own value at as many points.

    python benchmarks/queries.py knot.safetensors [--points 1000000]

Points are spread over the cube that the field was fitted in; rays come from a sphere around it, towards points in its
middle. Seconds of the process, once each, after what is kept between calls has been made.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sdfserver.asking import ask, ask_rays
from sdfserver.questions import MEANS
from sdfserver.saved import read_field


def seconds(does: Callable[[], object]) -> float:
    start = time.process_time()
    does()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="What each question to a field takes.")
    parser.add_argument("field", type=Path)
    parser.add_argument("--points", type=int, default=1_000_000)
    options = parser.parse_args()
    field, rng = read_field(options.field), np.random.default_rng(0)
    size, middle = 1 / field.frame.scale, field.frame.center
    kept = seconds(lambda: ask(field, middle[None], ["closest"]) and field.distance_error)
    points = middle + size * rng.uniform(-1, 1, (options.points, 3))
    took = {what: seconds(lambda what=what: ask(field, points, [what])) for what in MEANS}  # type: ignore[misc]
    ways = rng.normal(size=points.shape)
    origins = middle + 2 * size * ways / np.linalg.norm(ways, axis=1, keepdims=True)
    targets = middle + 0.3 * size * rng.normal(size=points.shape)
    took["rays"] = seconds(lambda: ask_rays(field, origins, targets - origins))
    print(f"{options.points:,} points; made once: {kept:.1f} s")
    for name, value in took.items():
        print(f"{name:<14}{value / took['distance']:7.1f}{value:9.1f} s")


if __name__ == "__main__":
    main()
