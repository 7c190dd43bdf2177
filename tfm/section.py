"""What every section of the config is made of: fields whose types are checked, and the way to and from JSON values."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal

from tfm.errors import UserError


class ConfigError(UserError):
  """A configuration that cannot work; the message says which fields disagree and what to do."""


def require(condition: bool, sentence: str) -> None:
  if not condition:
    raise ConfigError(sentence)


def require_fraction(name: str, value: float) -> None:
  require(0.0 <= value < 1.0, f'{name} is {value}; it is a probability, so give 0 <= {name} < 1.')


def require_positive(owner: Any, *names: str) -> None:
  for name in names:
    value = getattr(owner, name)
    require(value > 0, f'{name} is {value}; give a number above 0.')


class Section:
  """A frozen dataclass that checks the type of every field, then its own rules (`check`), when it is built."""

  def __post_init__(self):
    hints = typing.get_type_hints(type(self))
    for name, value in vars(self).copy().items():
      object.__setattr__(self, name, _check_type(hints[name], value, f'{type(self).__name__}.{name}'))
    self.check()

  def check(self) -> None:
    """Raise `ConfigError` where the fields do not go together."""


def nearest(name: str, names: typing.Iterable[str]) -> str:
  """ "; did you mean 'x'?" for the closest of `names`, or nothing."""
  close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
  return f"; did you mean '{close[0]}'?" if close else ''


def build(cls, values: dict[str, Any], where: str):
  require(isinstance(values, dict), f'{where} should be a table of fields, not {values!r}.')
  types_ = typing.get_type_hints(cls)
  for name in values:
    require(name in types_, f"{where} has no field '{name}'{nearest(name, types_)}")
  arguments = {}
  for name, value in values.items():
    sections = [kind for kind in typing.get_args(types_[name]) or (types_[name],) if dataclasses.is_dataclass(kind)]
    if sections:
      arguments[name] = _build_one_of(sections, value, f'{where}.{name}')
    else:
      arguments[name] = _check_type(types_[name], value, f'{where}.{name}')
  return cls(**arguments)


def _build_one_of(sections: list, values: Any, where: str):
  """Of several the one whose `kind` the values name; the first where they name none."""
  if len(sections) == 1 or not isinstance(values, dict):
    return build(sections[0], values, where)
  named = {section.kind: section for section in sections}
  values = dict(values)
  kind = values.pop('kind', sections[0].kind)
  require(kind in named, f'{where}.kind is {kind!r}; choose one of {", ".join(map(repr, named))}.')
  return build(named[kind], values, where)


def _check_type(kind, value, where: str):
  origin, options = typing.get_origin(kind), typing.get_args(kind)
  if dataclasses.is_dataclass(kind):
    require(isinstance(value, kind), f'{where} is {value!r}; give a {kind.__name__}.')
    return value
  if origin is Literal:
    require(value in options, f'{where} is {value!r}; choose one of {", ".join(map(repr, options))}.')
    return value
  allowed = options if origin in (types.UnionType, typing.Union) else (kind,)
  if float in allowed and type(value) is int:
    return float(value)
  require(type(value) in allowed, f'{where} is {value!r}, which is not {" or ".join(t.__name__ for t in allowed)}.')
  return value
