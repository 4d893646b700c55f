"""Whether an object is a plug-in: which hooks it fills, and what keeps it from being one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import pluggy

from retroexit.errors import PluginError, closest
from retroexit.plugins.info import brief

__all__ = ["hooks_of"]


def hooks_of(plugin: object, manager: pluggy.PluginManager) -> tuple[str, ...]:
    """Check a plug-in as a whole, and list the hooks that it fills, sorted.

    Args:
        plugin: Module or object whose functions carry `hookimpl`.
        manager: Knows the hooks.

    Raises:
        PluginError: If it is a class, fills no hook, or one of its functions names an unknown hook, is not
            marked, wraps others or asks for arguments that it is not given.
    """
    if isinstance(plugin, type):
        raise PluginError(
            f"{plugin.__name__} is a class; announce a module, or an object of the class", plugin
        )
    known = vars(manager.hook)
    hooks = set()
    for name in dir(plugin):
        options = manager.parse_hookimpl_opts(plugin, name)
        if options is None:
            if name in known and inspect.isroutine(getattr(plugin, name)):
                raise PluginError(f"{name!r} is not marked with hookimpl", plugin)
            continue
        hook = _checked(name, getattr(plugin, name), options, known)
        if hook is not None:
            hooks.add(hook)
    if not hooks:
        raise PluginError(f"{brief(plugin)} implements no hook; mark its functions with hookimpl", plugin)
    return tuple(sorted(hooks))


def _checked(name: str, function: Any, options: Mapping[str, Any], known: Mapping[str, Any]) -> str | None:
    """Name the hook that a function fills; ``None`` if it is for another version of ours and says so."""
    hook: str = options.get("specname") or name
    if hook not in known:
        if options.get("optionalhook"):
            return None
        raise PluginError(f"no hook {hook!r}; closest: {closest(hook, sorted(known))}", function)
    if options.get("wrapper") or options.get("hookwrapper"):
        raise PluginError(f"{hook!r} is implemented as a wrapper; return a value instead", function)
    given = known[hook].spec.argnames
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        # pluggy leaves out whatever has a default, so that a hook would never see the real value.
        has_default = parameter.default is not parameter.empty
        is_given = parameter.name in given and parameter.kind is not parameter.KEYWORD_ONLY
        if is_given == has_default:
            wanted = f"{parameter.name!r}{' with a default' if has_default else ''}"
            arguments = f"({', '.join(given)}), by position" if given else "no arguments"
            raise PluginError(f"{hook!r} asks for {wanted}; it is given {arguments}", function)
    return hook
