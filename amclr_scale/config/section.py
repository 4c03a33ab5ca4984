"""What all parts of a configuration are made of. Imports no torch."""

from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
PositiveNumber = Annotated[float, Field(gt=0)]
# a list, or its words with commas between them, as a command line has them
Words = Annotated[list[str], BeforeValidator(lambda v: [w.strip() for w in v.split(",")] if isinstance(v, str) else v)]

# Name -> where it lies; null, in what was exported: not on this machine.
Names = Annotated[dict[str, str | None], Field(min_length=1)]
OneName = Annotated[dict[str, str | None], Field(min_length=1, max_length=1)]


class Checked(BaseModel):
    """Unknown keys are errors, and true and false are no numbers."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_1(cls, value: Any, info: ValidationInfo) -> Any:
        """Where a key takes numbers, pydantic would read true as 1."""
        field = cls.model_fields.get(info.field_name or "")
        if isinstance(value, bool) and field and not _holds(field.annotation, bool, Any):
            if _holds(field.annotation, str) and not _holds(field.annotation, int, float):
                raise ValueError("expected text; put it in quotes where it is a name")
            raise ValueError("expected a value that is not true or false")
        return value


class Section(Checked):
    """A part of the configuration: its values do not change after loading."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True, validate_default=True)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, or may hold beside null; None: it holds something else."""
    for one in (annotation, *(get_args(annotation) if type(None) in get_args(annotation) else ())):
        if isinstance(one, type) and issubclass(one, BaseModel):
            return one
    return None


def _holds(annotation: Any, *types: Any) -> bool:
    """Whether any of these is a part of an annotation, such as bool of `bool | None`."""
    return annotation in types or any(_holds(part, *types) for part in get_args(annotation))
