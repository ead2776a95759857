"""Plain data <-> attrs classes, strictly: nothing is converted, and every mistake is collected with its dotted path.

`Checked` classes check the values that they are built from in Python by the same rules.

Not cattrs: by default it converts values (``"4"`` to 4), and its messages name neither the nearest valid key nor the
registered components.
"""

import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

import attrs

from spdfq.errors import ComponentError, SpdfqError
from spdfq.registry import registry

_FAILED: Any = object()
_NOUNS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "a table",
}
_LARGEST: dict[Any, float] = {int: 2**63 - 1, float: 3.4e38}


def component(kind: str, default: Any = attrs.NOTHING) -> Any:
    """An attrs field for one component of a kind; in a recipe, a table with ``type`` or only the component's name.

    Args:
        kind: registry kind.
        default: a function that makes the default component, or ``None`` for an optional component; without it, the
            component is required.
    """
    metadata = {"kind": kind}
    if default is None or default is attrs.NOTHING:
        return attrs.field(default=default, metadata=metadata)
    return attrs.field(factory=default, metadata=metadata)


def components(kind: str) -> Any:
    """An attrs field for named components of a kind: a table of tables, whose keys are types unless they give one."""
    return attrs.field(factory=dict, metadata={"kind": kind, "many": dict})


def component_list(kind: str) -> Any:
    """An attrs field for a sequence of components of a kind: an array of tables."""
    return attrs.field(factory=tuple, metadata={"kind": kind, "many": list})


class Checked:
    """Base of attrs classes that check the values they are built from in Python as strictly as those of a recipe.

    A wrong value, an unknown name and a missing one are a `ComponentError` with one line for each. Components are given
    as objects, tables as objects of their class, and arrays as tuples or lists.
    """

    __slots__ = ()

    @classmethod
    def __attrs_init_subclass__(cls) -> None:
        build: Any = cls.__init__

        @functools.wraps(build)
        def init(self: Any, *args: Any, **given: Any) -> None:
            problems: list[str] = []
            values = _arguments(type(self), args, given, problems)
            if problems:
                raise ComponentError("\n".join(problems))
            try:
                build(self, **values)
            except SpdfqError:
                raise
            except (ValueError, TypeError) as error:
                raise ComponentError(f"{type(self).__name__}: {_validator_message(error)}") from None

        cls.__init__ = init  # type: ignore[method-assign]


def _arguments(cls: type, args: tuple, given: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The checked values of the fields of a class, from the arguments of a call."""
    fields = {field.alias: field for field in attrs.fields(cls) if field.init}
    in_order = [name for name, field in fields.items() if not field.kw_only]
    if len(args) > len(in_order):
        _fail(problems, cls.__name__, f"takes its values by name ({', '.join(fields)})")
    unnamed = dict(zip(in_order, args, strict=False))
    if twice := sorted(unnamed.keys() & given):
        _fail(problems, cls.__name__, f"{twice[0]} is given twice")
    return _values(cls, fields, unnamed | given, cls.__name__, problems, _given)


def structure(cls: type, data: Any, path: str, problems: list[str]) -> Any:
    """Build an instance of an attrs class from a table.

    Args:
        cls: the attrs class.
        data: the table, as plain data.
        path: dotted path of the table in its file, for messages.
        problems: one line is appended for each mistake.

    Returns:
        The instance; if there was any mistake, an object that must not be used.
    """
    if not isinstance(data, dict):
        return _fail(problems, path, f"expected a table, got {_shown(data)}")
    before = len(problems)
    fields = {field.name: field for field in attrs.fields(cls) if field.init}
    values = _values(cls, fields, data, path, problems, _field)
    if len(problems) > before:
        return _FAILED
    try:
        return cls(**values)
    except (ValueError, TypeError, SpdfqError) as error:
        return _fail(problems, path or "recipe", _validator_message(error).removeprefix(f"{cls.__name__}: "))


_hints = functools.cache(typing.get_type_hints)


def _values(
    cls: type, fields: dict[str, Any], data: dict, path: str, problems: list[str], read: Callable[..., Any]
) -> dict[str, Any]:
    """The value of each field that is given, as ``read`` returns it."""
    misspelt = set()
    for key in data:
        if key not in fields:
            near = _nearest(key, fields)
            misspelt.add(near)
            _fail(problems, _join(path, key), _unknown_key(near, fields))
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = read(field, _hints(cls).get(field.name, Any), data[name], _join(path, name), problems)
        elif field.default is attrs.NOTHING and name not in misspelt:
            _fail(problems, _join(path, name), "is required")
    return values


def unstructure(value: Any, kind: str | None = None) -> Any:
    """The plain data that `structure` reads back as an equal object; fields that are ``None`` are left out."""
    if attrs.has(type(value)):
        table = {"type": registry(kind).name_of(type(value))} if kind else {}
        for field in attrs.fields(type(value)):
            inner = getattr(value, field.name) if field.init else None
            if inner is not None:
                table[field.name] = _unstructure_field(field, inner)
        return table
    if isinstance(value, (tuple, list)):
        return [unstructure(item) for item in value]
    return value


def _unstructure_field(field: attrs.Attribute, value: Any) -> Any:
    kind: Any = field.metadata.get("kind")
    many = field.metadata.get("many")
    if many is dict:
        return {name: unstructure(item, kind) for name, item in value.items()}
    if many is list:
        return [unstructure(item, kind) for item in value]
    return unstructure(value, kind)


def _field(field: attrs.Attribute, hint: Any, data: Any, path: str, problems: list[str]) -> Any:
    kind: Any = field.metadata.get("kind")
    many = field.metadata.get("many")
    if many is dict:
        return _named_components(kind, data, path, problems)
    if many is list:
        if not isinstance(data, list):
            return _fail(problems, path, f"expected an array of tables, got {_shown(data)}")
        return tuple(_component(kind, item, f"{path}.{index}", problems) for index, item in enumerate(data))
    if kind:
        return _component(kind, data, path, problems, fallback=_default_type(field))
    return _validated(field, _value, hint, data, path, problems)


def _validated(
    field: attrs.Attribute, read: Callable[..., Any], hint: Any, data: Any, path: str, problems: list[str]
) -> Any:
    """The value that ``read`` returns, if the field's validator accepts it."""
    before = len(problems)
    value = read(hint, data, path, problems)
    if len(problems) == before and field.validator is not None and not (value is None and field.default is None):
        try:
            field.validator(None, field, value)
        except AttributeError:
            return value  # the validator reads other fields; it runs again when the object is built
        except (ValueError, TypeError) as error:
            return _fail(problems, path, _validator_message(error))
    return value


def _given(field: attrs.Attribute, hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    """A field's value that is given in Python."""
    kind: Any = field.metadata.get("kind")
    many = field.metadata.get("many")
    if not kind:
        return _validated(field, _object, hint, value, path, problems)
    if many is dict:
        if not isinstance(value, dict):
            return _fail(problems, path, f"expected a dict of {kind} objects by name, got {_shown(value)}")
        return {name: _given_component(kind, item, _join(path, str(name)), problems) for name, item in value.items()}
    if many is list:
        if not isinstance(value, (tuple, list)):
            return _fail(problems, path, f"expected a list of {kind} objects, got {_shown(value)}")
        return tuple(_given_component(kind, item, f"{path}.{at}", problems) for at, item in enumerate(value))
    return value if value is None and field.default is None else _given_component(kind, value, path, problems)


def _given_component(kind: str, value: Any, path: str, problems: list[str]) -> Any:
    if registry(kind).has(value):
        return value
    example = registry(kind).get(registry(kind).names()[0]).__name__
    return _fail(problems, path, f"expected {_one(kind)} such as {example}(), got {_shown(value)}")


def _object(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    """A value that is given in Python: like plain data, but ``None`` and objects of other classes are possible."""
    hint = getattr(hint, "__supertype__", hint)  # of a NewType
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or (value is None and type(None) in arguments):
        return value
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, value, path, problems, _object)
    if origin is tuple:
        return _tuple(arguments, list(value) if isinstance(value, tuple) else value, path, problems, _object)
    if origin is typing.Literal or hint in _NOUNS:
        return _value(hint, value, path, problems)
    if isinstance(origin or hint, type) and not isinstance(value, origin or hint):
        return _fail(problems, path, f"expected {_noun(hint)}, got {_shown(value)}")
    return value


def _named_components(kind: str, data: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(data, dict):
        return _fail(problems, path, f"expected a table of tables such as [{path}.NAME], got {_shown(data)}")
    return {
        name: _component(kind, table, _join(path, name), problems, fallback=name, name_path=True)
        for name, table in data.items()
    }


def _component(
    kind: str, data: Any, path: str, problems: list[str], fallback: str | None = None, name_path: bool = False
) -> Any:
    table = {"type": data} if isinstance(data, str) else data
    if not isinstance(table, dict):
        return _fail(problems, path, f"expected {_one(kind)} (a name or a table with 'type'), got {_shown(data)}")
    name = table.get("type", fallback)
    if not isinstance(name, str):
        return _fail(
            problems, path, f"needs 'type', the name of {_one(kind)} (known: {', '.join(registry(kind).names())})"
        )
    try:
        cls = registry(kind).get(name)
    except SpdfqError as error:
        where = path if (name_path and "type" not in table) or isinstance(data, str) else _join(path, "type")
        return _fail(problems, where, str(error))
    return structure(cls, {key: value for key, value in table.items() if key != "type"}, path, problems)


def _default_type(field: attrs.Attribute) -> str | None:
    if field.default is attrs.NOTHING or field.default is None:
        return None
    return registry(field.metadata["kind"]).name_of(type(field.default.factory()))


def _value(hint: Any, data: Any, path: str, problems: list[str]) -> Any:
    hint = getattr(hint, "__supertype__", hint)  # of a NewType
    if hint is Any:
        return data
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, data, path, problems)
    if origin is typing.Literal:
        if data in arguments and type(data) in {type(choice) for choice in arguments}:
            return data
        return _fail(problems, path, f"expected one of {', '.join(map(repr, arguments))}, got {_shown(data)}")
    if origin is tuple:
        return _tuple(arguments, data, path, problems)
    if attrs.has(hint):
        return structure(hint, data, path, problems)
    if type(data) in (int, float) and hint in _LARGEST and _LARGEST[hint] < abs(data) < math.inf:
        return _fail(problems, path, f"is too large, the maximum is {_LARGEST[hint]:.2g}")
    if hint is float and type(data) is int:
        data = float(data)
    if type(data) is not hint:
        return _fail(problems, path, f"expected {_noun(hint)}, got {_shown(data)}")
    if hint is float and not math.isfinite(data):
        return _fail(problems, path, f"expected a finite number, got {data}")
    return data


def _union(choices: tuple, data: Any, path: str, problems: list[str], read: Callable[..., Any] | None = None) -> Any:
    choices = tuple(choice for choice in choices if choice is not type(None))
    for choice in choices:
        found: list[str] = []
        value = (read or _value)(choice, data, path, found)
        if not found:
            return value
    if len(choices) == 1:
        problems.extend(found)
        return _FAILED
    return _fail(problems, path, f"expected {' or '.join(map(_noun, choices))}, got {_shown(data)}")


def _tuple(items: tuple, data: Any, path: str, problems: list[str], read: Callable[..., Any] | None = None) -> Any:
    if not isinstance(data, list):
        return _fail(problems, path, f"expected an array, got {_shown(data)}")
    if items[-1] is Ellipsis:
        items = items[:1] * len(data)
    elif len(items) != len(data):
        return _fail(problems, path, f"expected an array of {len(items)} values, got {len(data)}")
    pairs = enumerate(zip(items, data, strict=True))
    return tuple((read or _value)(hint, item, f"{path}.{index}", problems) for index, (hint, item) in pairs)


def _one(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiouAEIOU" else f"a {kind}"


def _noun(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        return "an array" if Ellipsis in items else f"an array of {len(items)} values"
    return _NOUNS.get(hint) or _one(getattr(hint, "__name__", str(hint)))


def _validator_message(error: Exception) -> str:
    """The sentence of an attrs validator's error, without its other arguments (attribute and value)."""
    return str(error.args[0]) if error.args else type(error).__name__


def _nearest(key: Any, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(str(key), known, n=1)), None)


def _unknown_key(near: str | None, known: Iterable[str]) -> str:
    hint = f"; did you mean {near!r}?" if near else ""
    return f"unknown key{hint} (keys: {', '.join(known) or 'none'})"


def _shown(data: Any) -> str:
    nouns: dict[type, str] = {dict: "a table", list: "an array", tuple: "an array"}
    if isinstance(data, type):
        return f"the class {data.__name__}"
    plain = data is None or isinstance(data, (bool, int, float, str))
    return nouns.get(type(data)) or (repr(data) if plain else _one(type(data).__name__))


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _fail(problems: list[str], path: str, message: str) -> Any:
    problems.append(f"{path}: {message}")
    return _FAILED
