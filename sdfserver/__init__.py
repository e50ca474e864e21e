"""From an oriented point cloud to its surface: a signed distance field and a mesh.

The import is light: torch and the rest are loaded by the modules that need them.
"""

__version__ = "0.1.0"
