"""What all parts of a configuration are made of. Imports no torch."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
PositiveNumber = Annotated[float, Field(gt=0)]
# a list, or its words with commas between them, as a command line has them
Words = Annotated[list[str], BeforeValidator(lambda v: [w.strip() for w in v.split(",")] if isinstance(v, str) else v)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)
