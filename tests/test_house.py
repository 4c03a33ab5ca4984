"""The house stays one that a stranger finds the way in: small rooms, short files, few doors to heavy packages."""

import ast
import re
from pathlib import Path

import yaml

from tests.conftest import FIRST, LONG_FILES

ROOT = Path(__file__).parents[1]
MOST_LINES = 350
MOST_MODULES = 22
ONE_METHOD_ONE_FILE = {Path("amclr_scale/objectives"), Path("tests/objectives")}


def sources() -> list[Path]:
    folders = ("amclr_scale", "launch", "tools", "tests")
    return [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_a_file_is_read_in_one_sitting():
    found = sources()
    assert len(found) > 300
    long = {str(path): lines for path in found if (lines := len((ROOT / path).read_text().splitlines())) > MOST_LINES}
    assert long == {}


def test_a_room_is_seen_at_one_glance():
    rooms: dict[Path, int] = {}
    for path in sources():
        rooms[path.parent] = rooms.get(path.parent, 0) + 1
    crowded = {str(room): n for room, n in rooms.items() if n > MOST_MODULES and room not in ONE_METHOD_ONE_FILE}
    assert crowded == {}


def test_the_long_files_of_the_suite_are_there():
    assert [name for name in (*FIRST, *LONG_FILES) if not (ROOT / "tests" / f"{name}.py").is_file()] == []


def documented(docstring: str) -> list[str]:
    """The names under `Args:`; one line may name several."""
    names, inside = [], False
    for line in docstring.splitlines():
        if not line.startswith(" ") and line:
            inside = line.strip() == "Args:"
        elif inside and (found := re.match(r"    ([\w, *]+): ", line)):
            names += [name.strip(" *") for name in found[1].split(",")]
    return names


def test_parameters_that_a_docstring_explains_exist():
    explained, wrong = 0, []
    for path in sources():
        text = (ROOT / path).read_text()
        for node in ast.walk(ast.parse(text)) if "Args:" in text else ():
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            names = documented(ast.get_docstring(node) or "")
            if not names:
                continue
            made = [f for f in getattr(node, "body", []) if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
            fields = [f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
            functions = [node] if isinstance(node, ast.FunctionDef) else made
            given = [
                name.arg for function in functions for name in ast.walk(function.args) if isinstance(name, ast.arg)
            ]
            explained += len(names)
            wrong += [f"{path}:{node.lineno}: {name}" for name in names if name not in {*given, *fields}]
    assert explained > 300
    assert wrong == []


def test_workflows_run_steps_of_ci_run_and_nothing_else():
    run = (ROOT / ".ci/run").read_text()
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    names = [step.removeprefix(".ci/run ") for step in steps]
    assert sorted(names) == ["check", "docs", "fast", "quickstart", "test"]
    assert all(re.search(rf"^ +(\w+ \| )*{name}( \| \w+)*\)", run, re.MULTILINE) for name in names)
    matrices = [job["strategy"]["matrix"]["python"] for job in workflow["jobs"].values() if "strategy" in job]
    assert matrices == [["3.11", "3.12", "3.13"]] * 3
