#!/usr/bin/env python3
"""Run a script with autocast switched off: on a processor that emulates bfloat16 it is many times faster so.

python benchmarks/in_float32.py SCRIPT.py [ARGUMENT ...]
"""

import contextlib
import runpy
import sys

import torch


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    torch.autocast = lambda *_, **__: contextlib.nullcontext()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
