"""The base of all request bodies: strict types, and fields that are refused by name."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from fairkv_jax.serve.unsupported import Refused


class NotServed(ValueError):
    """A request sets a known field that is not supported.

    `field` is the field of the body, `name` the path of the value in it if that is longer.
    """

    def __init__(self, field: str, refused: Refused, name: str | None = None):
        self.field = field
        super().__init__(
            f"{name or field} is not supported by this server ({refused.reason}): {refused.way_out}"
        )


def _as_integer(value: Any) -> Any:
    """Converts 5.0 to 5, because JSON Schema calls every number without a fraction an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as_integers(values: Any) -> Any:
    if not isinstance(values, list) or float not in set(map(type, values)):
        return values
    return [_as_integer(value) for value in values]


OptionalInteger = Annotated[int | None, BeforeValidator(_as_integer)]
Integers = Annotated[list[int], BeforeValidator(_as_integers)]


class Body(BaseModel):
    """Values are not converted: the string "1" and NaN are not accepted as numbers.

    Unknown fields are ignored. Those of `REFUSED` are known and would change the answer; they are
    refused unless they have a value without effect. They are not fields of the model, so the
    OpenAPI description does not list them.
    """

    model_config = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True
    )

    REFUSED: ClassVar[Mapping[str, Refused]] = {}
    PATH: ClassVar[str] = ""
    """Where the object stands in the request, if it is not the request itself."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, refused in cls.REFUSED.items():
                if not refused.accepts(data.get(name)):
                    path = f"{cls.PATH}.{name}" if cls.PATH else name
                    raise NotServed(path.split(".")[0], refused, path)
        return data
