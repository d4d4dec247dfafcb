"""pydantic's complaints as one line: path, value, reason, nearest name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from samba_lm.validation import explain


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Attention(_Strict):
    kind: Literal["attention"] = "attention"
    heads: int = 1


class Mamba(_Strict):
    kind: Literal["mamba"] = "mamba"
    state: int = 16


class Config(_Strict):
    width: int = Field(8, ge=1)
    name: str = "x"
    layers: tuple[Annotated[Attention | Mamba, Field(discriminator="kind")], ...] = ()
    scales: dict[str, float] = {}
    inner: Attention | None = None

    @field_validator("name")
    @classmethod
    def _named(cls, name: str) -> str:
        if name == "":
            raise ValueError("give it a name, please")
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.width == 7:
            raise ValueError("width = 7: must be even.")
        return self


CASES: list[tuple[dict[str, Any], str]] = [
    ({"width": "abc"}, "width = 'abc': input should be a valid integer, unable to parse string as an integer"),
    ({"width": 0}, "width = 0: input should be greater than or equal to 1"),
    ({"width": 1.5}, "width = 1.5: input should be a valid integer, got a number with a fractional part"),
    ({"width": None}, "width = None: input should be a valid integer"),
    ({"widht": 3}, "widht = 3: unknown key. Did you mean 'width'?"),
    ({"zzz": 3}, "zzz = 3: unknown key. Known: inner, layers, name, scales, width."),
    ({"name": ""}, "name = '': give it a name, please"),
    ({"width": 7}, "width = 7: must be even."),
    (
        {"layers": [{"kind": "mamba"}, {"kind": "mamba", "stat": 3}]},
        "layers[1].stat = 3: unknown key. Did you mean 'state'?",
    ),
    ({"layers": [{"kind": "mamba", "state": "x"}]}, "layers[0].state = 'x': input should be a valid integer"),
    ({"layers": [{"kind": "mumba"}]}, "layers[0] = {'kind': 'mumba'}: input tag 'mumba'"),
    ({"layers": 3}, "layers = 3: input should be a valid tuple"),
    ({"scales": {"a": "b"}}, "scales.a = 'b': input should be a valid number"),
    ({"inner": {"haeds": 2}}, "inner.haeds = 2: unknown key. Did you mean 'heads'?"),
    ({"width": "abc", "nmae": "y"}, "nmae = 'y': unknown key. Did you mean 'name'? (and 1 more)."),
]


def _error(given: dict[str, Any], model: type[BaseModel] = Config) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(given)
    return caught.value


@pytest.mark.parametrize(("given", "line"), CASES)
def test_explain(given: dict[str, Any], line: str) -> None:
    said = explain(_error(given), Config)
    assert said.startswith(line)
    assert "\n" not in said


def test_the_prefix_leads_the_path() -> None:
    assert explain(_error({"width": 0}), Config, prefix="model").startswith("model.width = 0: ")
    assert explain(_error({"width": 7}), Config, prefix="model") == "model: width = 7: must be even."


def test_without_the_model_the_path_is_still_told() -> None:
    assert explain(_error({"widht": 3})) == "widht = 3: unknown key."


def test_missing() -> None:
    class Needs(BaseModel):
        a: int

    assert explain(_error({}, Needs), Needs) == "a is missing: give it a value."


def test_an_alias_is_the_name_people_know() -> None:
    class Foreign(BaseModel):
        model_config = ConfigDict(extra="forbid")
        norm_class: str = Field("x", alias="_norm_class")

    assert explain(_error({"norm_clas": 1}, Foreign), Foreign).endswith("Did you mean '_norm_class'?")


def test_a_long_value_is_cut() -> None:
    said = explain(_error({"width": "9x" * 500}), Config)
    assert len(said) < 160
    assert "..." in said


class _Places(_Strict):
    val: Annotated[str, AfterValidator(str.strip)] | dict[str, Annotated[str, AfterValidator(str.strip)]] = ""


def test_a_member_of_a_union_is_no_part_of_the_path() -> None:
    with pytest.raises(ValidationError) as caught:
        _Places.model_validate({"val": 3})
    for model in (None, _Places):
        assert explain(caught.value, model).startswith("val = 3: ")
