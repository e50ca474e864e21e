"""GLB, binary glTF 2.0, through trimesh."""

import io
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdfserver.errors import CloudFormatError, MissingDependencyError
from sdfserver.files import reason
from sdfserver.formats.common import Colors, broken_promise, quote
from sdfserver.mesh import TriangleMesh

_DEPTH = 64
"""Nodes within each other, and lists within each other in what describes them."""


def trimesh_package() -> Any:
    """The package, or MissingDependencyError."""
    try:
        import trimesh
    except ImportError:
        raise MissingDependencyError("GLB meshes need trimesh: pip install trimesh") from None
    return trimesh


def read_glb(data: bytes) -> TriangleMesh:
    """All meshes of the scene together, each where its nodes put it.

    Normals, colours and confidence where all of them have them.
    """
    trimesh = trimesh_package()
    _check_scene(data)
    # As colours trimesh keeps 8 bits of light and knows no types; an attribute of one's own it leaves alone.
    end = 20 + int.from_bytes(data[12:16], "little")
    scene_text = data[20:end].replace(b'"COLOR_0"', f'"{_COLOR}"'.encode())
    data = b"".join([data[:20], scene_text, memoryview(data)[end:]])
    try:
        scene = trimesh.load_scene(
            io.BytesIO(data), file_type="glb", process=False, maintain_order=True, skip_materials=True
        )
        return _joined(scene)
    except CloudFormatError:
        raise
    except Exception as error:  # noqa: BLE001 - trimesh raises many kinds on a damaged file
        raise CloudFormatError(f"it is not a sound GLB file ({reason(error)}); export it again") from None


def _joined(scene: Any) -> TriangleMesh:
    vertices, faces, normals = [np.empty((0, 3))], [np.empty((0, 3), np.int64)], [np.empty((0, 3), np.float32)]
    colors: list[Colors] = []
    confidence: list[NDArray[np.float32]] = []
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        mesh = scene.geometry[name]
        if not hasattr(mesh, "faces"):
            continue  # lines and points
        corners = np.asarray(mesh.faces, dtype=np.int64).reshape(-1, 3)
        if corners.size and (corners.min() < 0 or corners.max() >= len(mesh.vertices)):
            raise CloudFormatError(f"a face refers to vertex {corners.max()}, of {len(mesh.vertices)}; export it again")
        faces.append(corners + sum(map(len, vertices)))
        vertices.append(np.asarray(mesh.vertices) @ transform[:3, :3].T + transform[:3, 3])
        if "vertex_normals" in mesh._cache:  # asking the mesh itself would compute them
            normals.append(np.asarray(mesh.vertex_normals @ transform[:3, :3].T, dtype=np.float32))
        light, shares = (_attribute(mesh, name, width) for name, width in ((_COLOR, 3), (CONFIDENCE, 1)))
        if light is not None:
            colors.append(screen_colors(light))
        if shares is not None:
            confidence.append(shares[:, 0].astype(np.float32))
    points = np.concatenate(vertices)

    def complete(parts: list[Any]) -> Any:
        return np.concatenate(parts) if 0 < len(points) == sum(map(len, parts)) else None

    return TriangleMesh(
        vertices=points,
        faces=np.concatenate(faces),
        normals=complete(normals),
        colors=complete(colors),
        confidence=complete(confidence),
    )


CONFIDENCE = "_CONFIDENCE"
_COLOR = "_COLOR0"
"""What COLOR_0 is called while trimesh has it: as long as the name that it stands for."""


def _attribute(mesh: Any, name: str, width: int) -> NDArray[np.float64] | None:
    """The first `width` columns of an attribute of the vertices, as shares of one; None where it is no such thing."""
    values = mesh.vertex_attributes.get(name)
    if values is None:
        return None
    values = np.asarray(values)
    values = values[:, None] if values.ndim == 1 else values
    fits = values.ndim == 2 and values.shape[1] >= width and len(values) == len(mesh.vertices)
    if not fits or values.dtype.kind not in "fu":
        return None
    whole = np.iinfo(values.dtype).max if values.dtype.kind == "u" else 1
    shares: NDArray[np.float64] = values[:, :width] / np.float64(whole)
    return shares if ((shares >= 0) & (shares <= 1)).all() else None


def screen_colors(light: NDArray[np.float64]) -> Colors:
    """Bytes (n, 3) as screens take them (sRGB, IEC 61966-2-1) for shares of light (n, 3), which glTF holds."""
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 0.0031308) ** (1 / 2.4) - 0.055)
    colors: Colors = np.rint(255 * encoded).astype(np.uint8)
    return colors


def light_of(colors: Colors) -> NDArray[np.float64]:
    """Shares of light (n, 3) for bytes as screens take them: the inverse of `screen_colors`."""
    share = np.arange(256) / 255
    table = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    light: NDArray[np.float64] = table[colors]
    return light


_COMPONENTS = {5120: 1, 5121: 1, 5122: 2, 5123: 2, 5125: 4, 5126: 4}
_NUMBERS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}


def _check_scene(data: bytes) -> None:
    """Refuse a scene that refers to other files, or of which the arrays are larger than the file."""
    length = int.from_bytes(data[12:16], "little")
    if data[:4] != b"glTF" or data[16:20] != b"JSON" or 20 + length > len(data):
        raise CloudFormatError(f"it starts with {quote(data[:20])}, which is no GLB, or it is cut off; export it again")
    try:
        scene = json.loads(data[20 : 20 + length])
        _check_parts(scene, len(data))
    except CloudFormatError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise CloudFormatError(f"its scene cannot be read ({reason(error)}); export it again") from None


def _check_parts(scene: Any, size: int) -> None:
    if any("uri" in part for kind in ("buffers", "images") for part in scene.get(kind, [])):
        raise CloudFormatError("it refers to other files; export it again with everything in it")
    for accessor in scene.get("accessors", []):
        count, width = int(accessor["count"]), _COMPONENTS[accessor["componentType"]] * _NUMBERS[accessor["type"]]
        if not 0 <= count * width <= size:
            raise broken_promise(count, size // width, "numbers")
    if any(not 0 <= int(view.get(key, 0)) <= size for view in scene.get("bufferViews", []) for key in _PLACES):
        raise CloudFormatError("a part of it is said to be outside of the file; it is corrupt: export it again")
    # Every node draws a mesh again: no more are drawn than the file would hold.
    meshes, nodes = scene.get("meshes", []), scene.get("nodes", [])
    accessors = scene.get("accessors", [])
    corners = [sum(_corners(accessors, primitive) for primitive in mesh["primitives"]) for mesh in meshes]
    drawn = sum(corners[node["mesh"]] for node in nodes if node.get("mesh") is not None)
    if drawn > size:
        raise CloudFormatError(f"its nodes draw {drawn} corners, for {size} bytes; export it again")
    _check_tree(nodes)


_PLACES = ("byteOffset", "byteLength", "byteStride")


def _corners(accessors: list[Any], primitive: Any) -> int:
    indices = primitive.get("indices")
    used = [primitive["attributes"]["POSITION"], *([] if indices is None else [indices])]
    return sum(int(accessors[index]["count"]) for index in used)


def _check_tree(nodes: list[Any]) -> None:
    """Refuse nodes that are their own children's children, or more than one node's child."""
    parent: dict[int, int] = {}
    for index, node in enumerate(nodes):
        for child in node.get("children") or []:
            if child in parent or not 0 <= child < len(nodes):
                raise CloudFormatError(f"its node {child} has two parents or does not exist; export it again")
            parent[child] = index
    for index in range(len(nodes)):
        depth = 0
        while index in parent:
            index, depth = parent[index], depth + 1
            if depth > _DEPTH:
                raise CloudFormatError(f"its nodes are more than {_DEPTH} within each other; export it again")
