"""The check of a configuration before anything is built: constructor signatures are the schema.

Every problem is found and reported together, with suggestions. Nothing outside the allow-list is imported:
a configuration is data and must not be able to run code of its choice.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from robustflat.apps.config import Root
from robustflat.errors import UserError

TRUSTED = ("robustflat", "torch.nn", "torch.optim", "torchvision.models", "torchvision.transforms")
"""Packages and parts of packages that a configuration may take classes and functions from. Not all of torch: it has
functions that run text as code (`torch.fx.graph_module`), compile it, or write files (`torch.save`)."""

NEVER = (
    "robustflat.apps", "robustflat.attacks.ensemble_progress", "robustflat.data.downloads", "robustflat.data.hdf5",
    "robustflat.data.prepare", "robustflat.loggers.jsonl", "robustflat.loggers.ledger",
    "robustflat.models.external.optional_package", "robustflat.models.external.robustbench_module",
    "robustflat.models.profiling", "robustflat.ranks", "robustflat.reporting", "robustflat.store",
    "robustflat.training.checkpoint", "robustflat.training.profiling",
)  # fmt: skip
"""Parts of trusted packages that write files, import by name or start things: no configuration needs them."""

WRITERS = ("robustflat.loggers", "robustflat.training.callbacks")
"""Parts that write into a `folder`, which is the run's and not the configuration's to choose."""

SUPPLIED: Mapping[str, frozenset[str]] = {
    "trainer": frozenset({"model", "data", "attack", "make_optimizer", "make_schedule", "logger", "streams"}),
}
"""Arguments that the application fills in, by path of the node."""

NEEDED = ("dataset", "model", "optimizer", "schedule", "attack", "trainer", "evaluation")
"""Groups that training cannot do without; there may be no flatness measure and no further logger."""

_ADDED = {
    "model.auxiliary": " trainer=self_supervised asks for it, a second head that tells rotations apart: resnet*, "
    "preact_resnet18, wrn_* and convnext have one.",
}
"""Why a key is there that the user has not written."""

HYDRA_KEYS = frozenset({"_target_", "_partial_", "_convert_", "_recursive_", "_args_"})


def check(config: DictConfig, also: Collection[str] = ()) -> list[str]:
    """All problems of a composed configuration, each a line 'key: what is wrong and what is allowed'.

    Args:
        config: the composed root, `hydra` node removed.
        also: keys at the top level beside those of a training run.

    Returns:
        The problems in the order of the file; empty if there are none.
    """
    trusted = (*TRUSTED, *(str(p) for p in config.get("trusted_packages") or ()))
    return [*_unknown_at_the_root(config, also), *_walk(config, "", trusted)]


def _unknown_at_the_root(config: DictConfig, also: Collection[str]) -> Iterator[str]:
    """Keys that nothing reads: `+epochs=3` would otherwise train the default number of epochs without a word."""
    known = [*(field.name for field in dataclasses.fields(Root)), *also]
    for key in map(str, config):
        if key not in known:
            places = [g for g in known if isinstance(config.get(g), DictConfig) and key in config[g]]
            hint = f" Did you mean {places[0]}.{key}?" if places else _suggest(key, known, list_all=False)
            yield f"{key}: nothing reads this key at the top level.{hint}"


def require_valid(config: DictConfig) -> None:
    """Raise one `UserError` that lists every problem found by `check`.

    Raises:
        UserError: if there is any.
    """
    refuse([*_groups_left_out(config), *check(config)])


def refuse(problems: Sequence[str]) -> None:
    """Raise one error that lists problems of a configuration.

    Args:
        problems: sentences that begin with a key; none: nothing happens.

    Raises:
        UserError: if there is any.
    """
    if problems:
        lines = "\n".join(f"  - {p}" for p in problems)
        raise UserError(f"The configuration has {len(problems)} problem{'s'[: len(problems) > 1]}:\n{lines}")


def _groups_left_out(config: DictConfig) -> Iterator[str]:
    """Groups without which nothing can be trained, that are null or no longer name what to build."""
    for group in NEEDED:
        node = config.get(group)
        if not isinstance(node, DictConfig) or "_target_" not in node:
            yield f"{group}: is {_show(node)}, but training needs one; choose a file of conf/{group} with {group}=..."


def _walk(node: DictConfig | ListConfig, path: str, trusted: Sequence[str]) -> Iterator[str]:
    if isinstance(node, DictConfig) and "_target_" in node:
        yield from _check_target(node, path, trusted)
    keys: Any = range(len(node)) if isinstance(node, ListConfig) else list(node)
    for key in keys:
        here = f"{path}.{key}" if path else str(key)
        if OmegaConf.is_missing(node, key):
            yield f"{here}: needs a value; write {here}=... on the command line."
            continue
        try:
            value = node[key]
        except OmegaConfBaseException as error:
            yield f"{here}: {str(error).splitlines()[0]}"
            continue
        if isinstance(value, DictConfig | ListConfig):
            yield from _walk(value, here, trusted)


def _check_target(node: DictConfig, path: str, trusted: Sequence[str]) -> Iterator[str]:
    target = str(node["_target_"])
    try:
        made = resolve_target(target, trusted)
    except UserError as error:
        yield f"{path}._target_: {error}"
        return
    if "_args_" in node:
        yield f"{path}._args_: positional arguments are not allowed; name each argument."
    yield from _check_flags(node, path)
    yield from _check_folder(node, path, made)
    try:
        signature = inspect.signature(made)
    except (ValueError, TypeError):  # written in C, in a package that the user trusts
        yield f"{path}._target_: '{target}' does not say which arguments it takes; wrap it in a function of your own."
        return
    hints = _hints(made)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    accepted = [n for n, p in signature.parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    given = [str(k) for k in node if str(k) not in HYDRA_KEYS]
    for key in given:
        if key not in accepted and not open_ended:
            why = _ADDED.get(f"{path}.{key}", "")
            yield f"{path}.{key}: {_short(target)} takes no argument '{key}'.{why}{_suggest(key, accepted)}"
        elif key in hints:
            yield from _check_value(node, key, hints[key], f"{path}.{key}")
    if not node.get("_partial_", False):
        supplied = SUPPLIED.get(path, frozenset())
        for name in accepted:
            if signature.parameters[name].default is inspect.Parameter.empty and name not in {
                *given,
                *supplied,
            }:
                yield f"{path}.{name}: {_short(target)} needs this argument and nothing gives it."


def _check_flags(node: DictConfig, path: str) -> Iterator[str]:
    """Hydra's own keys of a node."""
    for key in ("_partial_", "_recursive_"):
        if key in node and not isinstance(node.get(key), bool):
            yield f"{path}.{key}: expected true or false, got {_show(node.get(key))}."
    if str(node.get("_convert_", "none")) not in ("none", "partial", "object", "all"):
        yield f"{path}._convert_: must be one of none, partial, object, all, got {_show(node.get('_convert_'))}."


def _check_folder(node: DictConfig, path: str, made: Callable[..., Any]) -> Iterator[str]:
    """Where files go is not a configuration's choice."""
    if "folder" in node and _inside(made.__module__, WRITERS):
        yield f"{path}.folder: files go into the run's folder, below outputs=...; leave this out."


def resolve_target(target: str, trusted: Sequence[str] = TRUSTED) -> Callable[..., Any]:
    """The class or function that a `_target_` names, imported only if its package is trusted.

    Args:
        target: dotted path.
        trusted: packages, or parts of packages such as "torch.nn".

    Raises:
        UserError: for a path outside the allow-list (before any import), or one that leads nowhere.
    """
    module_name, _, name = target.rpartition(".")
    if not _inside(target, trusted):
        package = target.split(".")[0]
        raise UserError(
            f"'{target}' is outside the trusted packages ({', '.join(trusted)}) and was not imported. "
            f"If you trust it: trusted_packages=[{module_name if package in ('torch', 'torchvision') else package}]"
        )
    _refuse_closed(target, target)
    if _inside(target, TRUSTED) and any(part.startswith("_") for part in target.split(".")):
        raise UserError(f"'{target}' is private, and a configuration may name public classes and functions only.")
    module = _import_module(module_name, target)
    made = getattr(module, name, None)
    if made is None:
        public = [n for n, v in vars(module).items() if not n.startswith("_") and callable(v)]
        raise UserError(f"cannot import '{target}'.{_suggest(name, public, list_all=False)}")
    if not callable(made):
        raise UserError(f"'{target}' is not a class or function.")
    if isinstance(module, type) and _inside(target, TRUSTED) and not _on_its_own(module, name):
        # WeightsEnum.get_state_dict of torchvision unpickles what a URL leads to, with `self` from the configuration.
        raise UserError(f"'{target}' is a method of objects, which a configuration may not call.")
    origin = getattr(made, "__module__", None)
    if not isinstance(origin, str) or origin == "builtins":
        raise UserError(f"'{target}' is a built-in function, which a configuration may not call.")
    if not _inside(origin, trusted):
        raise UserError(f"'{target}' leads to {origin}, which is outside the trusted packages.")
    _refuse_closed(f"{origin}.{getattr(made, '__qualname__', name)}", target)
    return typing.cast(Callable[..., Any], made)


def _on_its_own(owner: type, name: str) -> bool:
    """Whether an attribute of a class needs no object of it: a class inside, a class method or a static one."""
    return isinstance(inspect.getattr_static(owner, name), type | classmethod | staticmethod)


def _inside(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _refuse_closed(name: str, target: str) -> None:
    if _inside(name, NEVER):
        raise UserError(f"'{target}' may not be used in a configuration: it writes, imports or starts things.")


def _import_module(name: str, target: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not name.startswith(error.name):
            raise UserError(f"'{target}' needs the package {error.name}, which is not installed.") from error
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot import '{target}': {error}") from error
    parent, _, last = name.rpartition(".")
    if not parent:
        raise UserError(f"cannot import '{target}'.")
    outer = _import_module(parent, target)
    inner = getattr(outer, last, None)
    if isinstance(inner, type):  # a class method such as Class.build
        return inner
    known = [m.rsplit(".", 1)[1] for m in _submodules(parent)]
    raise UserError(f"cannot import '{target}': {parent} has no module '{last}'.{_suggest(last, known)}")


def _submodules(package: str) -> list[str]:
    import pkgutil

    path = getattr(importlib.import_module(package), "__path__", None)
    return [m.name for m in pkgutil.iter_modules(path, f"{package}.")] if path else []


def _hints(made: Callable[..., Any]) -> dict[str, Any]:
    source = made.__init__ if isinstance(made, type) else made  # type: ignore[misc]
    try:
        return typing.get_type_hints(source)
    except (NameError, TypeError, AttributeError):
        return {}


def _check_value(node: DictConfig, key: str, hint: Any, path: str) -> Iterator[str]:
    if OmegaConf.is_missing(node, key):
        return  # reported by the walk
    try:
        value = node[key]
    except OmegaConfBaseException:
        return  # reported by the walk
    if not _fits(value, hint):
        yield f"{path}: expected {_describe(hint)}, got {_show(value)}.{_fraction(value)}"


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if hint in _SCALARS:
        return _SCALARS[hint](value)
    try:
        return _fits_structure(value, origin or hint, [part for part in typing.get_args(hint) if part is not Ellipsis])
    except OmegaConfBaseException:
        return True  # an entry cannot be resolved or has no value: reported by the walk


_SCALARS: dict[Any, Callable[[Any], bool]] = {
    bool: lambda v: isinstance(v, bool),
    int: lambda v: isinstance(v, int) and not isinstance(v, bool),
    float: lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    str: lambda v: isinstance(v, str),
}


_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)


def _fits_structure(value: Any, kind: Any, inside: Sequence[Any]) -> bool:
    if not isinstance(kind, type):
        return True
    if issubclass(kind, collections.abc.Mapping):
        named = isinstance(value, Mapping | DictConfig) and "_target_" not in value
        return named and all(_fits(entry, part) for part in inside[1:] for entry in value.values())
    if kind in _LISTS:
        listed = isinstance(value, list | tuple | ListConfig)
        return listed and all(not inside or any(_fits(entry, part) for part in inside) for entry in value)
    if issubclass(kind, str):
        return isinstance(value, str)
    return isinstance(value, DictConfig) and "_target_" in value  # an object: built from a node


def _describe(hint: Any) -> str:
    args = [a for a in typing.get_args(hint)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _describe(a) for a in args)
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    kind = typing.get_origin(hint) or hint
    name = getattr(kind, "__name__", str(kind))
    if hint in _SCALARS:
        return name
    if isinstance(kind, type) and issubclass(kind, collections.abc.Mapping):
        return "a mapping of named entries"
    if kind in _LISTS:
        return f"a list of {_describe(args[0])}" if args and args[0] in _SCALARS else "a list"
    return f"a node with _target_ (a {name})"


def _show(value: Any) -> str:
    if isinstance(value, DictConfig | ListConfig):
        text = str(OmegaConf.to_container(value, resolve=False))
        return text if len(text) < 80 else text[:77] + "..."
    return f"{value!r} ({type(value).__name__})" if value is not None else "null"


def _fraction(value: Any) -> str:
    """The number that a text such as "8/255" means, to write instead."""
    found = re.fullmatch(r"(\d+)/([1-9]\d*)", value) if isinstance(value, str) else None
    if found and found[2] == "255":
        return f" Pixel values are written '${{px:{found[1]}}}'."
    return f" Write {int(found[1]) / int(found[2])!r}." if found else ""


def _short(target: str) -> str:
    return target.rsplit(".", 1)[-1]


def _suggest(word: str, options: Sequence[str], *, list_all: bool = True) -> str:
    close = get_close_matches(word, options, n=1)
    text = f" Did you mean '{close[0]}'?" if close else ""
    return f"{text} Accepted: {', '.join(options)}." if list_all and options else text
