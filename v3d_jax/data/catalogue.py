"""Sweet Home 3D's furniture catalogues: `.sh3f` archives of OBJ models and one properties file.

Axes of its models, once `rotation` is applied: y up, front along z (the bottom of the plan).
"""

import dataclasses
import re
import zipfile
from pathlib import Path

import numpy as np

from v3d_jax.data import parts

PROPERTIES = "PluginFurnitureCatalog.properties"

_ESCAPES = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}
_KEY = re.compile(r"((?:\\.|[^\\=: \t])+)[ \t]*[=: \t][ \t]*(.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One object of a catalogue.

    `model` is the path inside `archive`; `rotation` is row-major and turns the model's vertices;
    `size` is width, depth, height in centimetres.
    """

    archive: Path
    name: str
    category: str
    model: str
    rotation: tuple[float, ...]
    size: tuple[float, float, float]
    creator: str
    license: str
    door_or_window: bool

    @property
    def identity(self) -> str:
        """A name that no other object has: catalogue and model file, without endings."""
        return f"{self.archive.stem}/{Path(self.model).stem}"


def properties(text: str) -> dict[str, str]:
    """Parses a Java properties file: comments, continued lines and escapes."""
    joined = re.sub(r"(?<!\\)((?:\\\\)*)\\\r?\n[ \t]*", r"\1", text)
    found = {}
    for line in joined.splitlines():
        line = line.lstrip()
        if not line or line[0] in "#!":
            continue
        match = _KEY.match(line)
        key, value = match.groups() if match else (line, "")
        found[_unescape(key)] = _unescape(value)
    return found


def _unescape(text: str) -> str:
    def replace(match: re.Match) -> str:
        code = match.group(1)
        return chr(int(code[1:], 16)) if len(code) == 5 else _ESCAPES.get(code, code)

    return re.sub(r"\\(u[0-9a-fA-F]{4}|.)", replace, text)


def entries(path: Path) -> list[Entry]:
    """Lists a catalogue's objects in its order; raises `parts.UnreadableMesh` if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            table = properties(archive.read(PROPERTIES).decode("latin-1"))
        numbers = sorted(int(key.partition("#")[2]) for key in table if key.startswith("model#"))
        return [_entry(Path(path), table, number) for number in numbers]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise parts.UnreadableMesh(str(path), f"not a furniture catalogue ({error})") from error


def _entry(path: Path, table: dict[str, str], number: int) -> Entry:
    def value(key: str, default: str | None = None) -> str:
        found = table.get(f"{key}#{number}", default)
        if found is None:
            raise ValueError(f"{key}#{number} is missing")
        return found.strip()

    rotation = tuple(float(x) for x in value("modelRotation", "1 0 0 0 1 0 0 0 1").split())
    if len(rotation) != 9:
        raise ValueError(f"modelRotation#{number} has {len(rotation)} numbers")
    return Entry(
        archive=path,
        name=value("name"),
        category=value("category"),
        model=value("model").lstrip("/"),
        rotation=rotation,
        size=(float(value("width")), float(value("depth")), float(value("height"))),
        creator=value("creator", ""),
        license=value("license", " ".join(table.get("license", "").split())),
        door_or_window=value("doorOrWindow", "false") == "true",
    )


def rotation(entry: Entry) -> np.ndarray:
    """The entry's rotation as a float32 [3, 3] matrix."""
    return np.asarray(entry.rotation, np.float32).reshape(3, 3)
