"""What the sections of a configuration are made of: checked numbers, and the base of a section."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

_MOST = 10_000_000  # a number beyond it is a slip, and would take days or all memory
Positive = Annotated[int, Field(gt=0, le=_MOST)]
Count = Annotated[int, Field(ge=0, le=_MOST)]
Steps = Annotated[int, Field(ge=0, le=100_000)]
MinisetSize = Annotated[int, Field(ge=8)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Inside = Annotated[float, Field(gt=0, lt=1)]
Beta = Annotated[float, Field(gt=0, lt=2.5)]
Term = Literal["mono", "mono_clamped", "rbf", "point_ipa", "pair"]


class Section(BaseModel):
    """A group of settings: unknown keys are refused, docstrings of fields are the help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True
    )
