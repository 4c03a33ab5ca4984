"""What an objective declares, its options above all, read from its source file without importing torch.

An objective is one file with a class `class SogCLR(Objective, name="sogclr")` and a nested dataclass `Config`. So
that adding an objective touches that one file and a configuration is still checked in milliseconds on a login node,
this module parses the file. Each `Config`, with what it inherits, becomes a pydantic model. The class's `Declarations`,
with what they inherit, become a class of their own: their source is compiled alone.

    found = declared({"name": "amclr", "omega": 2})
    found.inputs.count("image_views")         # 2
    found.negatives(B=128)                    # 127

Base classes may stand in the same file or in a module of amclr_scale that it imports from. A file outside the package
is named by `objective.module`.
"""

import __future__

import ast
import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, Optional, TypeVar, Union

from pydantic import BaseModel, create_model

from amclr_scale import declarations
from amclr_scale.config.section import Checked
from amclr_scale.config.source_files import source_of
from amclr_scale.declarations import Declarations, Equal, Inputs, mistakes_of_layers, queue_of, with_layers
from amclr_scale.errors import UserError

T = TypeVar("T")
PACKAGE = Path(__file__).parent.parent
OBJECTIVES = PACKAGE / "objectives"

_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "None": None}
_DECLARED = [name for name in vars(Declarations) if not name.startswith("_")]
_NAMES = {name: value for name, value in vars(declarations).items() if not name.startswith("_")} | {"math": math}


@dataclass(frozen=True)
class Source:
    """An objective as its file has it."""

    options: type[BaseModel]  # a model of them, with extra keys forbidden
    whole: type[BaseModel]  # with num_samples too, where the Config has it: no key, the trainer takes it from the index
    declarations: type[Declarations]


@dataclass(frozen=True)
class Declared:
    """What an objective declares at given options.

    Raises:
        UserError: a declaration is not what it may be, or is not plain Python.
    """

    name: str
    options: BaseModel
    by: type[Declarations]

    @cached_property
    def inputs(self) -> Inputs:
        """What it reads."""
        return self._ask(lambda options: Inputs(with_layers(self.by.inputs_of(options), options)))

    @property
    def group_size(self) -> int | None:
        """Pairs of the global batch that share negatives; None: all of them, or it has no such option."""
        return None if self.by.group_option is None else getattr(self.options, self.by.group_option)

    def negatives(self, B: int) -> int:
        """Negatives of an anchor at a global batch of B."""
        in_batch: int = self._ask(lambda options: self.by.negatives_of(options, B))
        return in_batch + int(queue_of(self.options)["size"])

    @property
    def stored_rows(self) -> int | Literal["all"]:
        """Stored rows of the data set's samples that a step compares with."""
        return self._ask(self.by.stored_rows_of)

    def equals(self, B: int) -> Equal | None:
        """Another objective that computes the same at a global batch of B."""
        more = queue_of(self.options)["size"] or getattr(self.options, "layers", None)
        return None if more else self._ask(lambda options: self.by.equals(options, B))

    def mistakes(self, B: int, b: int) -> list[str]:
        """What would fail at a global batch of B with b of it on a rank."""
        lines = self._ask(lambda options: list(self.by.mistakes_of(options, B, b)))
        slots = queue_of(self.options)["size"]
        if 0 < slots < B:
            lines.append(f"queue.size: expected at least train.global_batch_size = {B} slots, or 0, got {slots}")
        return lines + self._ask(lambda options: list(mistakes_of_layers(self.by.inputs_of(options), options)))

    def _ask(self, declaration: Callable[[Any], T]) -> T:
        try:
            return declaration(self.options)
        except Exception as error:
            plain = "; declarations may use builtins, math and amclr_scale.declarations alone"
            why = f"{error}{plain if isinstance(error, NameError) else ''}"
            raise UserError(f"objective.{self._to_blame(declaration)}: {self.name}: {why}") from error

    def _to_blame(self, declaration: Callable[[Any], Any]) -> str:
        """The option whose default would have let a declaration be; `name` where there is no such option."""
        for option, field_of in type(self.options).model_fields.items():
            if option == "num_samples" or field_of.is_required() or getattr(self.options, option) == field_of.default:
                continue
            with contextlib.suppress(Exception):
                declaration(self.options.model_copy(update={option: field_of.default}))
                return option
        return "name"


def declared(section: Mapping[str, Any], num_samples: int | None = None) -> Declared:
    """What the objective of a configuration's section declares. Options that it does not name have their defaults.

    Args:
        section: `objective` of a configuration.
        num_samples: N, of the data set; None where it is not known, or does not matter to what will be asked.

    Raises:
        UserError: there is no such objective.
    """
    source = find(section)
    known = {key: value for key, value in section.items() if key in source.options.model_fields}
    if "num_samples" in source.whole.model_fields:
        known["num_samples"] = num_samples
    return Declared(str(section["name"]), source.whole.model_construct(**known), source.declarations)


def find(section: Mapping[str, Any]) -> Source:
    """The objective that `name`, and `module` where it is given, mean.

    Raises:
        UserError: there is none, or its file cannot be read.
    """
    name, module = section.get("name"), section.get("module")
    found = sources() if module is None else outside(Path(module))
    if name not in found:
        where = "" if module is None else f" in {module}, which has {', '.join(found) or 'none'}"
        raise UserError(f"objective.name: no such objective {name!r}{where}")
    return found[name]


@cache
def sources() -> dict[str, Source]:
    """The package's objectives by name."""
    return {name: source for file in sorted(OBJECTIVES.rglob("*.py")) for name, source in _sources(_package(file))}


def option_models() -> dict[str, type[BaseModel]]:
    """Objective name -> a model of its options, for the package's."""
    return {name: source.options for name, source in sources().items()}


def outside(path: Path) -> dict[str, Source]:
    """The objectives in a file outside the package, by name.

    Raises:
        UserError: the file cannot be read, or declares something that is not plain Python.
    """
    return _outside(str(path), source_of(path))


@cache
def _outside(path: str, text: str) -> dict[str, Source]:
    try:
        return dict(_sources(_File(path, ast.parse(text))))
    except SyntaxError as error:
        raise UserError(f"objective.module: {path}, line {error.lineno}: {error.msg}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"objective.module: {path}: {error}") from error


@dataclass(frozen=True, eq=False)
class _File:
    path: str
    tree: ast.Module
    classes: dict[str, ast.ClassDef] = field(init=False)

    def __post_init__(self) -> None:
        found = {node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)}
        object.__setattr__(self, "classes", found)

    def class_of(self, node: ast.expr) -> "tuple[_File, ast.ClassDef] | None":
        """The class that an expression names, where it is one of ours."""
        match node:
            case ast.Name(id=name) if name in self.classes:
                return self, self.classes[name]
            case ast.Name(id=name):
                return self._imported(name)
            case ast.Attribute(value=outer, attr=name):
                owner = self.class_of(outer)
                return None if owner is None else owner[0].inside(owner[1], name)
        return None

    def inside(self, node: ast.ClassDef, name: str) -> "tuple[_File, ast.ClassDef] | None":
        """A class nested in a class or in one of its bases."""
        for inner in node.body:
            if isinstance(inner, ast.ClassDef) and inner.name == name:
                return self, inner
        for file, base in self.bases(node):
            found = file.inside(base, name)
            if found is not None:
                return found
        return None

    def bases(self, node: ast.ClassDef) -> "Iterator[tuple[_File, ast.ClassDef]]":
        """Its base classes, as far as they are ours."""
        return (found for base in node.bases if (found := self.class_of(base)) is not None)

    def _imported(self, name: str) -> "tuple[_File, ast.ClassDef] | None":
        for node in self.tree.body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE.name:
                for alias in node.names:
                    path = PACKAGE.parent.joinpath(*(node.module or "").split(".")).with_suffix(".py")
                    if (alias.asname or alias.name) == name and path.is_file():
                        file = _package(path)
                        return file.class_of(ast.Name(alias.name))
        return None


@cache
def _package(path: Path) -> _File:
    return _File(str(path), ast.parse(path.read_text("utf-8")))


def _sources(file: _File) -> Iterator[tuple[str, Source]]:
    for node in file.classes.values():
        named = [k.value.value for k in node.keywords if k.arg == "name" and isinstance(k.value, ast.Constant)]
        if named and isinstance(named[0], str):
            found = file.inside(node, "Config")
            options = _options(*found) if found else {}
            of_data = {"num_samples": (int | None, None)} if options.pop("num_samples", None) else {}
            model: type[BaseModel] = create_model(named[0], __base__=Checked, **options)  # type: ignore[call-overload]
            whole: type[BaseModel] = create_model(named[0], __base__=model, **of_data)  # type: ignore[call-overload]
            yield named[0], Source(model, whole, _declarations(file, node))


def _options(file: _File, config: ast.ClassDef) -> dict[str, tuple[Any, Any]]:
    """Field name -> (type, default or ... where there is none), inherited ones first."""
    found: dict[str, tuple[Any, Any]] = {}
    for base in config.bases:
        inherited = file.class_of(base)
        if inherited is None:
            raise TypeError(
                f"Config: its base {ast.unparse(base)} is in no file that is read; define it in the objective's file, "
                f"or import it from {PACKAGE.name}"
            )
        found |= _options(*inherited)
    for line in config.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            default = ... if line.value is None else ast.literal_eval(line.value)
            found[line.target.id] = (_annotation(line.annotation, file), default)
    return found


def _annotation(node: ast.expr, file: _File) -> Any:
    """`float | None` and the like, from its syntax. Only what YAML can hold is allowed: a class is a section."""
    match node:
        case ast.Name(id=name) if name in _TYPES:
            return _TYPES[name]
        case ast.Constant(value=None):
            return None
        case ast.Name(id=name) if (found := file.class_of(node)) is not None:
            return create_model(name, __base__=Checked, **_options(*found))  # type: ignore[call-overload]
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union[_annotation(left, file), _annotation(right, file)]  # noqa: UP007 - the operands are values here
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            values = choices.elts if isinstance(choices, ast.Tuple) else [choices]
            return Literal[tuple(ast.literal_eval(value) for value in values)]
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[inner, ast.Constant(value=rest)])):
            if rest is ...:
                return tuple.__class_getitem__((_annotation(inner, file), ...))
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return Optional[_annotation(inner, file)]  # noqa: UP045 - likewise
    raise TypeError(
        f"{ast.unparse(node)}: an objective's Config may hold int, float, bool, str, Literal, tuple[..., ...], "
        "sections and | None"
    )


def _declarations(file: _File, node: ast.ClassDef) -> type[Declarations]:
    """The class, without all that is not declared in plain Python."""
    bases = [_declarations(*base) for base in file.bases(node) if base[1].name not in ("Objective", "Declarations")]
    namespace = dict(_NAMES)
    namespace |= {f"base_{number}": base for number, base in enumerate(bases or [Declarations])}
    light = copy.copy(node)
    light.bases = [ast.Name(name, ast.Load()) for name in namespace if name.startswith("base_")]
    light.keywords, light.decorator_list = [], []
    light.body = [line for line in node.body if _names(line) in _DECLARED] or [ast.Pass()]
    module = ast.fix_missing_locations(ast.Module([light], type_ignores=[]))
    flags = __future__.annotations.compiler_flag  # of types that are not there
    exec(compile(module, file.path, "exec", flags, dont_inherit=True), namespace)
    found: type[Declarations] = namespace[node.name]
    return found


def _names(line: ast.stmt) -> str | None:
    """What a line of a class body defines."""
    match line:
        case ast.FunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
            return name
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name
    return None
