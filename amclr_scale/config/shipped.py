"""The configurations that ship with the package, found by name: `quickstart`, `objectives/sogclr`, `mini_amclr`.

A path that exists is taken as it is. Anything else is looked up in `configs/`, which lies beside the package in a
checkout and inside it once installed.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = ("", "objectives", "studies", "evaluation")


def shipped() -> Path:
    """The folder of configurations."""
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"


def find(name: str | Path, folder: str = "") -> Path:
    """The file that a name means; the name itself, as a path, where there is none.

    Args:
        name: a path, or a shipped configuration's name with or without folder and `.yaml`.
        folder: where to look first: objectives, studies or evaluation.
    """
    path = Path(name).expanduser()
    return path if path.is_file() or path.is_absolute() else _shipped(path, folder) or path


def find_from(file: Path, name: str) -> Path:
    """The file that a name means inside another configuration, wherever the command is run; beside it if there is none.

    Args:
        file: the configuration that names it.
        name: a path relative to the file's folder, or a shipped configuration's name.
    """
    beside = file.parent / Path(name).expanduser()
    return beside if beside.is_file() else _shipped(Path(name), "") or beside


def _shipped(path: Path, folder: str) -> Path | None:
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    for place in (folder, *FOLDERS):
        for found in (shipped().joinpath(place, *parts), shipped().joinpath(place, *parts[:-1], f"{path.name}.yaml")):
            if parts and found.is_file():
                return found
    return None


def names(folder: str = "") -> list[str]:
    """What there is in one folder, without `.yaml`."""
    return sorted(path.stem for path in (shipped() / folder).glob("*.yaml"))
