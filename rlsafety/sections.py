"""Sections: frozen dataclasses that check themselves, with one comment a field.

A section is declared once. Its fields carry type and default, the comment behind a field is its
help, `rules` says what values mean something. Recipes fill mutable ConfigDicts (`blank`), a run
works with the frozen section (`Section.of`).
"""

import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict, config_dict

from rlsafety.errors import UserError
from rlsafety.flags import did_you_mean

FLOAT32 = (2.0**-126, (2 - 2.0**-23) * 2.0**127)  # smallest normal and largest number of a device


@dataclasses.dataclass(frozen=True)
class Section:
  """Base of every section: types and finiteness of its fields, then its own rules."""

  infinite: typing.ClassVar[tuple[str, ...]] = ()  # fields that may be inf

  def __post_init__(self) -> None:
    for name, wanted in field_types(type(self)).items():
      value = _typed(self.label(name), getattr(self, name), wanted)
      if name not in self.infinite and _infinite(value):
        raise UserError(f"{self.label(name)}={value!r}: must be finite")
      object.__setattr__(self, name, value)
    for name, holds, what in self.rules():
      if not holds:
        raise UserError(f"{self.label(name)}={getattr(self, name)!r}: {what}")

  def rules(self) -> Iterator[tuple[str, bool, str]]:
    """(field, does it hold?, what must hold) for everything that types do not say."""
    return iter(())

  @classmethod
  def label(cls, name: str) -> str:
    """How messages call a field: sampler.group, or steps for a field of the run itself."""
    return f"{cls.__name__.lower()}.{name}" if cls.__name__ != "Config" else name

  @classmethod
  def of(cls, values: Mapping) -> typing.Self:
    """The section with these values; None leaves a field at its default.

    Raises UserError for a field that does not exist, with the nearest that does, and for one that
    has no default and is missing.
    """
    known = field_types(cls)
    for name in values:
      if name not in known:
        hint = did_you_mean(name, known, f"; fields: {', '.join(known)}")
        raise UserError(f"{cls.label(name)}: no such field{hint}")
    given = {name: value for name, value in values.items() if value is not None}
    for field in dataclasses.fields(cls):
      if field.default is dataclasses.MISSING and field.name not in given:
        raise UserError(f"{cls.label(field.name)}: is missing")
    return cls(**given)


@functools.cache
def field_types(cls: type[Section]) -> dict[str, type]:
  """{field: type} in order of declaration."""
  hints = typing.get_type_hints(cls)
  return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@functools.cache
def comments(cls: type[Section]) -> dict[str, str]:
  """{field: the comment behind its declaration}, read from the source."""
  found = re.findall(r"^  (\w+): [^#\n]+?(?:  # (.*))?$", inspect.getsource(cls), re.M)
  return {name: comment for name, comment in found if name in field_types(cls)}


def blank(section: Section, keep: tuple[str, ...] = ()) -> ConfigDict:
  """A mutable copy whose fields are unset, except `keep`: for sections whose name decides the
  defaults of the other fields, so that setting one leaves the others to the name."""
  out = ConfigDict()
  for name, wanted in field_types(type(section)).items():
    kind = typing.get_origin(wanted) or wanted
    out[name] = getattr(section, name) if name in keep else config_dict.placeholder(kind)
  return out


def _infinite(value) -> bool:
  items = value if isinstance(value, tuple) else (value,)
  return any(isinstance(item, float) and math.isinf(item) for item in items)


def _typed(label: str, value, wanted):
  """value in the type of its field, or a UserError that names both."""
  if isinstance(wanted, type) and issubclass(wanted, Section):
    if isinstance(value, wanted):
      return value
    if isinstance(value, Mapping | ConfigDict):
      return wanted.of(dict(value))
  kind = typing.get_origin(wanted) or wanted
  if kind is tuple and isinstance(value, list | tuple):
    of = typing.get_args(wanted)[0]
    return tuple(_typed(label, item, of) for item in value)
  if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
    if math.isnan(value):
      raise UserError(f"{label}={value!r}: must be a number")
    size = abs(value)
    if size != math.inf and (size > FLOAT32[1] or 0 < size < FLOAT32[0]):
      raise UserError(f"{label}={value!r:.40}: no float32 holds it (1.2e-38 to 3.4e38)")
    return float(value)
  if kind is float and isinstance(value, str):  # of a list in a flag, or "inf" as JSON stores it
    try:
      return _typed(label, float(value), float)
    except ValueError:
      raise UserError(f"{label}={value!r}: needs float") from None
  if isinstance(value, kind) and (kind is bool) == isinstance(value, bool):
    if kind is int and abs(value) >= 2**32:
      raise UserError(f"{label}={value!r:.40}: must lie below 2**32")
    return value
  name = kind.__name__ if isinstance(kind, type | types.GenericAlias) else str(kind)
  raise UserError(f"{label}={value!r:.99}: needs {name}")
