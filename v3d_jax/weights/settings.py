"""Settings dataclasses to JSON and back, checked by their annotations.

A settings class is a frozen dataclass of bool, int, float, str, None, `Literal`, unions of these,
tuples of any of them, string-keyed dicts, and other settings classes. JSON has no tuple: they are
written as lists.
"""

import dataclasses
import types
import typing
from typing import Any, TypeVar

from v3d_jax.errors import UserError

T = TypeVar("T")


def to_json(settings: Any) -> dict[str, Any]:
    """The settings as a JSON object: nested objects for nested dataclasses, lists for tuples."""
    return _lists(dataclasses.asdict(settings))


def from_json(cls: type[T], data: Any, where: str = "settings") -> T:
    """Builds `cls` from a JSON object; a key left out takes the class's default.

    Raises `UserError` naming the unknown keys, the missing keys without a default, or the value
    that does not fit its annotation; `where` names the object in the message.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where}: expected an object, got {_show(data)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise UserError(
            f"{where}: unknown {', '.join(unknown)}; {cls.__name__} has {', '.join(fields)}"
        )
    missing = [
        name
        for name, field in fields.items()
        if name not in data
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: missing {', '.join(missing)}")
    hints = typing.get_type_hints(cls)
    values = {key: _value(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_lists(entry) for entry in value]
    return value


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, value, where)
    if origin is typing.Literal:
        return _checked(
            value in arguments, value, where, f"one of {', '.join(map(str, arguments))}"
        )
    if hint is tuple or origin is tuple:
        return _tuple(arguments or (Any, ...), value, where)
    if hint is dict or origin is dict:
        _checked(isinstance(value, dict), value, where, "an object")
        entry = arguments[1] if arguments else Any
        return {key: _value(entry, part, f"{where}.{key}") for key, part in value.items()}
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(_checked(number, value, where, "a number"))
    if hint is int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return _checked(whole, value, where, "an integer")
    if hint in (bool, str, types.NoneType):
        return _checked(isinstance(value, hint), value, where, hint.__name__)
    raise TypeError(f"{where}: settings cannot be annotated {hint}")


def _union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    others = [argument for argument in arguments if argument is not types.NoneType]
    if len(others) == 1 and value is not None:
        return _value(others[0], value, where)
    for argument in arguments:
        try:
            return _value(argument, value, where)
        except UserError:
            continue
    names = " or ".join(getattr(argument, "__name__", str(argument)) for argument in arguments)
    raise UserError(f"{where}: expected {names}, got {_show(value)}")


def _tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    _checked(isinstance(value, list | tuple), value, where, "a list")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    _checked(len(value) == len(arguments), value, where, f"{len(arguments)} entries")
    pairs = zip(arguments, value, strict=True)
    return tuple(_value(hint, entry, f"{where}[{i}]") for i, (hint, entry) in enumerate(pairs))


def _checked(ok: bool, value: Any, where: str, expected: str) -> Any:
    if not ok:
        raise UserError(f"{where}: expected {expected}, got {_show(value)}")
    return value


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
