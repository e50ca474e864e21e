"""A mesh in another format, in a process of its own: `python -m sdfserver.server.convert FROM TO`.

The API starts it, so that its own memory and its answers to others do not depend on the size of a mesh.
"""

import sys

from sdfserver.io import read_mesh, write_mesh

if __name__ == "__main__":
    write_mesh(read_mesh(sys.argv[1]), sys.argv[2])
