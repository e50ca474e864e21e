"""Valid files made wrong: bits, lengths, lines, numbers, types and the structures that each format's header promises.

mutated(kind, seeds, rng) is one file; the same rng gives the same bytes. Where a format guards its bytes (the checksums
of E57, the lengths of GLB's chunks, the archive around NPZ), the guard is made right again, so that what is behind it
is reached as well.
"""

import io
import json
import random
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

GROWN = 1 << 20
"""What a few inputs are made to hold by repeating what is in them: it is where memory and time show."""
_GROW_ONE_IN = 1000

NUMBERS = [
    b"0", b"-0", b"1", b"-1", b"2", b"3", b"127", b"128", b"255", b"256", b"65535", b"65536", b"1000000", b"2147483647",
    b"2147483648", b"4294967295", b"4294967296", b"9223372036854775807", b"-9223372036854775808",
    b"999999999999999999", b"9" * 30, b"1e400", b"-1e400", b"1e308", b"1e30", b"1e-320", b"nan", b"NaN", b"inf",
    b"-inf", b"1_0", b"0x10", b"1,5", b"1.5e", b"--1", b"+", b"", b".", b"1e", b"1e99999999999", b"\xd9\xa1",
]  # fmt: skip
_TOKENS = [b"\0", b"\xff" * 4, b"\n", b" ", b"\r", b"\t", b",", b";", b"#", b"//", b'"', b"'", b"/", b"\\\n", b"\0" * 4,
           b"\x7f\xff\xff\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1a", b"\x85", b"\xc2\xa0"]  # fmt: skip
_WORDS = {
    "ply": (b"ply|format ascii 1.0|format binary_little_endian 1.0|format binary_big_endian 1.0|comment x|obj_info x|"
            b"element vertex 3|element face 3|element edge 0|element x 5|property float x|property double y|"
            b"property uchar z|property int nx|property list uchar int vertex_indices|property list int double q|"
            b"property list uint64 uint64 vertex_index|property int64 z|"
            b"property uchar red|property ushort green|property float blue|property float confidence|"
            b"end_header|char|uchar|short|ushort|int|uint|int64|uint64|float|double|list"),
    "text": b"x y z|x,y,z,nx,ny,nz|x y z r g b|X;Y;Z|//X Y Z|# x y z|nx|z|60|1,5 2,5 3,5|1 2 3|1;2;3|\"1\",\"2\",\"3\"",
    "pcd": (b"FIELDS x y z|SIZE 4 4 4|SIZE 8 8 8|TYPE F F F|TYPE I I I|TYPE U U U|COUNT 1 1 1|WIDTH 60|HEIGHT 1|"
            b"POINTS 60|DATA ascii|DATA binary|DATA binary_compressed|VERSION .7|VIEWPOINT 0 0 0 1 0 0 0|normal_x|"
            b"rgb|rgba|FIELDS x y z rgb"),
    "obj": (b"v 1 2 3|v 1 2 3 0 0.5 1|vn 0 0 1|vt 0 0|f 1 2 3|f -1 -2 -3|f 1//1 2//2 3//3|f 1/1/1|f|v|vn|g x|usemtl x|"
            b"mtllib x|l 1 2"),
    "off": b"OFF|NOFF|COFF|STOFF|OFF BINARY|3 0 1 2|4 0 1 2 3|0|1 0|3 0 0 0 255 0 0",
    "stl": b"solid|endsolid|facet normal 0 0 0|outer loop|vertex 0 0 0|endloop|endfacet",
    "e57": (b"type=\"Float\"|type=\"Integer\"|type=\"ScaledInteger\"|type=\"String\"|type=\"Structure\"|"
            b"type=\"Vector\"|type=\"CompressedVector\"|type=\"Blob\"|precision=\"double\"|precision=\"single\"|minimum=\"0\"|"
            b"maximum=\"0\"|scale=\"0\"|offset=\"1e300\"|recordCount=\"60\"|fileOffset=\"48\"|cartesianX|"
            b"sphericalRange|<x type=\"Float\"/>|<![CDATA[|]]>|nor:normalX|<vectorChild type=\"Structure\">"),
    "glb": (b"\"bufferView\"|\"byteOffset\"|\"count\"|\"componentType\"|\"byteStride\"|\"byteLength\"|\"uri\"|"
            b"\"indices\"|\"sparse\"|\"matrix\"|\"children\"|\"mode\"|null|true|[]|{}|\"SCALAR\"|\"VEC3\"|\"MAT4\"|\"COLOR_0\"|"
            b"\"_CONFIDENCE\"|\"normalized\""),
}  # fmt: skip
WORDS = {kind: words.split(b"|") for kind, words in _WORDS.items()}


def mutated(kind: str, seeds: Sequence[bytes], rng: random.Random) -> bytes:
    """One of the seeds, or two of them together, with one to five things wrong."""
    data = rng.choice(seeds)
    structured = _STRUCTURED.get(kind)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        if structured and rng.random() < 0.6:
            data = structured(data, rng)
        elif kind in _BINARY or rng.random() < 0.3:
            data = any_bytes(data, rng, seeds)
        else:
            data = text(data, rng, WORDS.get(kind, []))
    if rng.randrange(_GROW_ONE_IN) == 0:
        data = grown(data, rng)
    return data


_BINARY = ("npy", "npz", "las", "laz", "e57", "glb")


def any_bytes(data: bytes, rng: random.Random, seeds: Sequence[bytes] = ()) -> bytes:
    """What can go wrong with any bytes."""
    at, length = _place(data, rng), rng.choice((1, 1, 2, 4, 8, 50, 300))
    match rng.randrange(9):
        case 0 if data:
            return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[at + length :]
        case 3:
            return data[: at + length] + data[at:]
        case 4:
            return data[:at] + rng.randbytes(length) + data[at + length :]
        case 5:
            token = rng.choice(_TOKENS + NUMBERS)
            return data[:at] + token + data[at + rng.choice((0, len(token))) :]
        case 6 if seeds:
            other = rng.choice(seeds)
            return data[:at] + other[_place(other, rng) :]
        case _:
            return with_integer(data, at, rng.choice((1, 2, 4, 8)), rng)


def with_integer(data: bytes, at: int, size: int, rng: random.Random) -> bytes:
    """An integer of `size` bytes, or a float, at `at`, in either byte order: one that is likely to hurt."""
    order = rng.choice(("little", "little", "big"))
    if size >= 4 and rng.randrange(6) == 0:
        value = rng.choice((float("nan"), float("inf"), -1.0, 0.0, 1e30, 5e-324, 1e300 if size == 8 else 1e38))
        code = ("<" if order == "little" else ">") + ("d" if size == 8 else "f")
        return data[:at] + struct.pack(code, value) + data[at + size :]
    top = 1 << 8 * size
    old = int.from_bytes(data[at : at + size], order)  # type: ignore[arg-type]
    value = rng.choice((0, 1, 2, 255, 65536, 10**6, top - 1, top // 2, top // 2 - 1, top // 4, old + 1, old - 1,
                        old * 2, len(data), len(data) - at, rng.randrange(top)))  # fmt: skip
    return data[:at] + (value % top).to_bytes(size, order) + data[at + size :]  # type: ignore[arg-type]


def text(data: bytes, rng: random.Random, words: Sequence[bytes]) -> bytes:
    """What can go wrong with lines of words and numbers."""
    match rng.randrange(8):
        case 0 | 1:  # another number
            return _replaced(rb"[-+]?\d[\d.eE+-]*", data, rng.choice(NUMBERS), rng)
        case 2 if words:  # another word
            word = rng.choice(words)
            pattern = rb"[^\n]+" if b" " in word else rb"[A-Za-z_][A-Za-z_0-9]*"
            return _replaced(pattern, data, word, rng)
        case 3:
            lines = data.split(b"\n")
            i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
            match rng.randrange(4):
                case 0:
                    del lines[i]
                case 1:
                    lines.insert(j, lines[i])
                case 2:
                    lines[i], lines[j] = lines[j], lines[i]
                case _:
                    lines.insert(i, rng.choice(words) if words else b"")
            return b"\n".join(lines)
        case 4:  # other line ends, here and there or everywhere
            end, half = rng.choice((b"\r\n", b"\r", b"\n\n", b" \n", b"\n\r", b"")), rng.randrange(len(data) + 1)
            return data[:half] + data[half:].replace(b"\n", end, rng.choice((1, 3, -1)))
        case 5:  # other separators
            old, new = rng.choice((b" ", b".", b",")), rng.choice((b",", b";", b"\t", b", ", b"  ", b"", b"."))
            return data.replace(old, new, rng.choice((1, 2, -1)))
        case 6:
            return rng.choice((b"\xef\xbb\xbf", b"\n\n", b" ", b"#\n", b"\0")) + data
        case _:
            return any_bytes(data, rng)


def grown(data: bytes, rng: random.Random) -> bytes:
    """A part of it, often a line or a few bytes, repeated to GROWN bytes."""
    at = _place(data, rng)
    end = data.find(b"\n", at) + 1 if rng.random() < 0.5 else 0
    part = data[at:end] if end else data[at : at + rng.choice((1, 2, 3, 13, 100, 10**6))]
    return data[:at] + (part or b"0 ") * (GROWN // len(part or b"0 ")) + data[at + rng.choice((0, len(part))) :]


def _place(data: bytes, rng: random.Random) -> int:
    """More often than not near the beginning, where headers are."""
    return rng.randrange(max(min(len(data), rng.choice((64, 400, len(data)))), 1))


def _replaced(pattern: bytes, data: bytes, new: bytes, rng: random.Random) -> bytes:
    """One match of the pattern replaced; half the time one of the first few."""
    found = re.compile(pattern).search(data, _place(data, rng))
    return data if found is None else data[: found.start()] + new + data[found.end() :]


# What each format's own structure allows


def _ply(data: bytes, rng: random.Random) -> bytes:
    """In the header alone, and with the body as it is."""
    end = data.find(b"end_header\n")
    if end < 0:
        return any_bytes(data, rng)
    if rng.randrange(12) == 0:
        many = b"".join(b"property float a%d\n" % i for i in range(rng.choice((10, 10, 100, 3000))))
        return data[:end] + many + data[end:]
    return text(data[:end], rng, WORDS["ply"]) + data[end:]


def _pcd(data: bytes, rng: random.Random) -> bytes:
    end = re.search(rb"DATA \w+\n", data)
    if end is None:
        return any_bytes(data, rng)
    if rng.randrange(4) == 0:  # the sizes of the compressed data
        return with_integer(data, end.end() + rng.choice((0, 4)), 4, rng)
    return text(data[: end.end()], rng, WORDS["pcd"]) + data[end.end() :]


def _stl(data: bytes, rng: random.Random) -> bytes:
    if data[:5] == b"solid":
        return text(data, rng, WORDS["stl"])
    return with_integer(data, 80, 4, rng) if rng.random() < 0.3 else with_integer(data, 84 + _place(data, rng), 4, rng)


_DTYPES = ["'<f8'", "'>f8'", "'<f4'", "'|u1'", "'<i8'", "'<f2'", "'<c16'", "'|b1'", "'|O'", "'<U10'", "'|S4'", "'|V0'",
           "'|V8'", "'<M8[s]'", "'<f16'", "'(3,)<f8'", "'(1000000000,)<f8'", "'f8,f8,f8'", "'<f8,<f8'",
           "[('x', '<f8'), ('y', '<f8'), ('z', '<f8')]", "[('x', '<f8', (2,)), ('y', '<f8'), ('z', '<f8')]",
           "[('x', '<f8'), ('y', '<f8'), ('z', '|O')]", "[('x', [('a', '<f8')]), ('y', '<f8'), ('z', '<f8')]",
           "[('', '|V4'), ('x', '<f8'), ('y', '<f8'), ('z', '<f8')]", "[]", "None", "5", "'x'", "{}"]  # fmt: skip
_SHAPES = ["(60, 6)", "(60, 3)", "(0, 3)", "(3,)", "()", "(60,)", "(-1, 3)", "(-5, 3)", "(-1, -1)", "(60, 0)",
           "(0, 0)", "(1000000000000, 3)", "(9223372036854775807, 6)", "(2, 9223372036854775807, 0)", "(99, 10**30)",
           "(0, 999999999999999999999999999)", "(1, 1, 1, 60, 6)", f"({'1, ' * 70})", "(True, 3)", "(6.0, 6)", "60",
           "(360, 1)", "(1, 360)", "(10, 36)", "(120, 3)", "(3, 120)"]  # fmt: skip


def _npy(data: bytes, rng: random.Random) -> bytes:
    """Another header in front of the same numbers."""
    if len(data) < 10:
        return any_bytes(data, rng)
    length = int.from_bytes(data[8:10], "little")
    header, body = data[10 : 10 + length], data[10 + length :]
    match rng.randrange(6):
        case 0:
            header = text(header, rng, [])
        case 1:
            return with_integer(data, rng.choice((6, 7, 8)), rng.choice((1, 2, 4)), rng)
        case 2:
            header = b"(" * rng.choice((10, 10, 90, 90, 300, 3000)) + header
        case _:
            written = f"{{'descr': {rng.choice(_DTYPES)}, 'fortran_order': {rng.random() < 0.5}, "
            header = f"{written}'shape': {rng.choice(_SHAPES)}, }}".encode()
    version = rng.choice((1, 1, 2, 3))
    size = struct.pack("<H" if version == 1 else "<I", len(header) % 65536)
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + body


def _npz(data: bytes, rng: random.Random) -> bytes:
    """The archive's arrays made wrong and packed again, or the archive's own records made wrong."""
    if rng.randrange(3) == 0:  # lies about sizes, offsets and methods, in the local header or in the directory
        start = data.find(rng.choice((b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06")))
        return with_integer(data, max(start, 0) + rng.randrange(4, 46), rng.choice((1, 2, 4, 8)), rng)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()[:20]]
    except Exception:  # noqa: BLE001 - already damaged, in one way or another
        return any_bytes(data, rng)
    if not members:
        return any_bytes(data, rng)
    i = rng.randrange(len(members))
    name, content = members[i]
    match rng.randrange(4):
        case 0:
            members[i] = (rng.choice(("points.npy", "normals.npy", "xyz", "../x.npy", "", "é.npy", "n.npy")), content)
        case 1:
            members.insert(i, (name + "2", content))
        case _:
            members[i] = (name, _npy(content, rng))
    stream = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    if rng.randrange(40) == 0:
        method = rng.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(stream, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that come twice
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name or "x"), content, method)
    return stream.getvalue()


_LAS_FIELDS = [(24, 1), (25, 1), (94, 2), (96, 4), (100, 4), (104, 1), (105, 2), (107, 4), (111, 4), (131, 8), (139, 8),
               (147, 8), (155, 8), (163, 8), (227, 8), (235, 8), (243, 4), (247, 8), (255, 8)]  # fmt: skip


def _las(data: bytes, rng: random.Random) -> bytes:
    """Fields of the header, of the records behind it, of the LASzip record, of the chunk table and of the layers."""
    header, start = int.from_bytes(data[94:96], "little"), int.from_bytes(data[96:100], "little")
    if rng.random() < 0.4:
        at, size = rng.choice(_LAS_FIELDS)
        return with_integer(data, at, size, rng)
    laszip = data.find(b"laszip encoded") - 2
    places = [header + 18, header + 20, start, start + 8 + rng.randrange(120), len(data) - 8]
    if laszip > 0:
        record = laszip + 54
        places += [laszip + 18, laszip + 20] + [record + at for at in (0, 2, 12, 16, 24, 32, 34, 36, 38, 40, 42, 44)]
        table = int.from_bytes(data[start : start + 8], "little")
        places += [table, table + 4, table + 8]
    return with_integer(data, min(rng.choice(places), len(data)), rng.choice((1, 2, 4, 4, 8)), rng)


def _e57(data: bytes, rng: random.Random) -> bytes:
    """The bytes within the pages, the XML among them, with the checksums of the pages as they have to be."""
    logical = bytearray(e57_unpaged(data))
    if len(logical) < 48:
        return any_bytes(data, rng)
    offset, length = struct.unpack("<QQ", logical[24:40])
    at = offset // 1024 * 1020 + offset % 1024
    choice = rng.random()
    if choice < 0.6 and at + length <= len(logical):
        xml = bytes(logical[at : at + length])
        xml = _e57_xml(xml, rng) if rng.random() < 0.3 else text(xml, rng, WORDS["e57"])
        logical[24:40] = struct.pack("<QQ", offset, len(xml))
        logical = logical[:at] + xml
    elif choice < 0.75:
        logical = bytearray(with_integer(bytes(logical), rng.randrange(48), rng.choice((1, 2, 4, 8)), rng))
    else:  # the sections and packets of the points
        place = rng.choice((48, 48 + 8, 48 + 16, 48 + 24, 48 + 32, 48 + 34, 48 + 36, rng.randrange(48, max(at, 49))))
        logical = bytearray(with_integer(bytes(logical), place, rng.choice((1, 2, 4, 8)), rng))
    return e57_paged(bytes(logical))


_ENTITIES = b'<!DOCTYPE e57Root [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'


def _e57_xml(xml: bytes, rng: random.Random) -> bytes:
    match rng.randrange(7):
        case 0:
            return xml.replace(b"<e57Root", _ENTITIES + b"<e57Root", 1).replace(b"Scan 0", b"&b;")
        case 1:
            return xml.replace(b"<data3D", b"<a>" * rng.choice((50, 500, 5000)) + b"<data3D", 1)
        case 2:
            count = rng.choice((b"0", b"-1", b"61", b"1000000", b"1000000000000", b"9" * 25))
            return re.sub(rb'recordCount="\d*"', b'recordCount="%s"' % count, xml, count=rng.choice((0, 1)))
        case 3:
            kind = rng.choice((b'type="Integer" minimum="0" maximum="0"', b'type="Integer"',
                               b'type="ScaledInteger" minimum="0" maximum="0" scale="1e-3" offset="0"',
                               b'type="ScaledInteger" minimum="9" maximum="-9"', b'type="String"'))  # fmt: skip
            axis = rng.choice((b"X", b"Y", b"Z", b"[XYZ]"))
            return re.sub(rb"<(cartesian" + axis + rb') type="Float"[^>]*>[^<]*<', rb"<\1 " + kind + rb">0<", xml)
        case 4:
            return re.sub(rb'fileOffset="\d*"', b'fileOffset="%d"' % rng.choice((0, 48, 49, 1020, 1 << 40, 812)), xml)
        case 5:
            return xml.replace(b"UTF-8", rng.choice((b"UTF-16", b"ISO-8859-1", b"EBCDIC-CP-US", b"x")), 1)
        case _:
            found = re.search(rb"<vectorChild.*?</vectorChild>", xml, re.DOTALL)
            return xml if not found else xml.replace(found[0], found[0] * rng.choice((0, 2, 100)), 1)


def e57_unpaged(data: bytes) -> bytes:
    """The content of an E57's pages without their checksums."""
    return b"".join(data[at : at + 1020] for at in range(0, len(data), 1024))


def e57_paged(logical: bytes) -> bytes:
    """Pages with checksums; the header's own length is made right, unless it was made wrong on purpose."""
    logical += bytes(-len(logical) % 1020 or (0 if logical else 1020))
    rows = np.frombuffer(logical, np.uint8).reshape(-1, 1020).copy()
    promised = int.from_bytes(rows[0, 16:24].tobytes(), "little")
    if promised % 1024 == 0 and promised < 1 << 30:
        rows[0, 16:24] = np.frombuffer(struct.pack("<Q", 1024 * len(rows)), np.uint8)
    sums = np.bitwise_xor.reduce(_crc_terms()[np.arange(1020), rows], axis=1) ^ _crc_of_zeros()
    return b"".join(row.tobytes() + struct.pack(">I", crc) for row, crc in zip(rows, sums.tolist(), strict=True))


@cache
def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [(value >> 1) ^ (0x82F63B78 if value & 1 else 0) for value in table]
    return table


@cache
def _crc_terms() -> np.ndarray:
    """CRC-32C is linear: what each value of each byte of a page adds to the checksum (1020, 256)."""
    first = np.array(_crc_table(), dtype=np.uint32)
    terms = np.empty((1020, 256), dtype=np.uint32)
    terms[-1] = first
    for at in range(1018, -1, -1):
        terms[at] = first[terms[at + 1] & 255] ^ (terms[at + 1] >> 8)
    return terms


@cache
def _crc_of_zeros() -> int:
    value = 0xFFFFFFFF
    for _ in range(1020):
        value = _crc_table()[value & 255] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def _glb(data: bytes, rng: random.Random) -> bytes:
    """The scene's JSON, with the lengths around it as they have to be."""
    length = int.from_bytes(data[12:16], "little")
    scene, rest = data[20 : 20 + length], data[20 + length :]
    if rng.random() < 0.3:
        try:
            content = json.loads(scene)
        except ValueError:
            return any_bytes(data, rng)
        _damage_json(content, rng)
        scene = json.dumps(content).encode()
    else:
        scene = text(scene, rng, WORDS["glb"])
    scene += b" " * (-len(scene) % 4)
    size = 20 + len(scene) + len(rest)
    return data[:8] + struct.pack("<III", size, len(scene), 0x4E4F534A) + scene + rest


_JSON = [0, -1, 1, 3, 10**9, 2**63, 10**30, 1e308, 0.5, None, True, "", "x", "/dev/zero", "data:,", [], {}, [0], [[]]]


def _damage_json(content: object, rng: random.Random) -> None:
    while isinstance(content, dict | list) and content:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = rng.choice(keys)
        inner = content[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.85:
            content = inner
        else:
            content[key] = rng.choice(_JSON)
            return


_STRUCTURED: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "ply": _ply,
    "pcd": _pcd,
    "stl": _stl,
    "npy": _npy,
    "npz": _npz,
    "las": _las,
    "laz": _las,
    "e57": _e57,
    "glb": _glb,
}
