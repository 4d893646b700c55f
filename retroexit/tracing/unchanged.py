"""Whether a generator is still what was recorded: its modules, hooks and settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retroexit.core.identity import named_tensors
from retroexit.errors import GeneratorError, ModeError
from retroexit.tracing.recorder import Recorder

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_SIMPLE = (bool, float, str)  # numbers of other types, and tuples, are what forwards cache
_SAMPLES = 8


class Snapshot:
    """The modules of a generator at one time: children, hooks, forwards of their own, simple attributes; no weights."""

    def __init__(self, generator: nn.Module) -> None:
        self._modules = [
            (name, module, type(module), vars(module).get("forward"), module.training, _facts(module))
            for name, module in generator.named_modules()
        ]

    def drop_changed(self) -> None:
        """Forget the simple attributes that have changed since: the forward itself sets them."""
        for _, module, _, _, _, facts in self._modules:
            now = vars(module)
            simple = [(name, value) for name, value in facts.items() if type(value) in _SIMPLE]
            for name, value in simple:
                if type(now.get(name)) is not type(value) or now[name] != value:
                    del facts[name]

    def check(self) -> None:
        """Raise `ModeError` if a module is in another mode, `GeneratorError` with the change if it has changed."""
        for name, module, kind, forward, mode, facts in self._modules:
            now = vars(module)
            # One call in C compares all facts; `_change` finds out which one differs.
            if (
                module.training is mode
                and type(module) is kind
                and now.get("forward") is forward
                and facts.items() <= now.items()
            ):
                continue
            if module.training != mode:
                names = {True: "train", False: "eval"}
                raise ModeError(
                    f"{type(module).__name__} must be in {names[mode]} mode as in the recording, got "
                    f"{names[not mode]} mode. Set the generator's mode back, or wrap it again."
                )
            _refuse_accelerate(name, module)
            change = _change(module, kind, forward, facts)
            if change:
                where = f"{name!r} ({kind.__name__})" if name else f"the {kind.__name__} itself"
                raise GeneratorError(
                    f"the generator must be as it was wrapped, got a change in {where}: {change}. Undo it, or wrap "
                    "and fit again."
                )


class WeightSnapshot:
    """The weights of a generator at one time, by where they are, how often they were written, and a few numbers."""

    def __init__(self, generator: nn.Module) -> None:
        self._generator = generator
        self._facts, self._numbers = self._read()

    def _read(self) -> tuple[dict[str, tuple[Any, ...]], Tensor]:
        facts, numbers = dict[str, tuple[Any, ...]](), list[Tensor]()
        for name, weight in named_tensors(self._generator):
            version = 0 if weight.is_inference() else weight._version
            facts[name] = (weight.data_ptr(), weight.dtype, tuple(weight.shape), version)
            flat = torch.view_as_real(weight).flatten() if weight.is_complex() else weight.reshape(-1)
            numbers.append(flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].float())
        together = [part.to(numbers[0].device) for part in numbers]
        return facts, torch.cat(together).cpu().nan_to_num() if numbers else torch.zeros(0)

    def check(self, advice: str) -> None:
        """Raise `GeneratorError` with the advice if weights have changed."""
        facts, numbers = self._read()
        names = [name for name in {**self._facts, **facts} if self._facts.get(name) != facts.get(name)]
        if names or not torch.equal(numbers, self._numbers):  # writes through .data do not count as writes
            where = f"{names[0]!r}" if names else "them"
            raise GeneratorError(f"the generator's weights must stay as they were, got a change in {where}. {advice}")


def refuse_accelerate(generator: nn.Module) -> None:
    """Raise `GeneratorError` if a module has the hooks by which accelerate moves weights in and out."""
    for name, module in generator.named_modules():
        _refuse_accelerate(name, module)


def _refuse_accelerate(name: str, module: nn.Module) -> None:
    hook = vars(module).get("_hf_hook")
    if hook is not None:
        raise GeneratorError(
            f"the generator must have no hooks of accelerate, got {type(hook).__name__} on "
            f"{name or type(module).__name__!r}: copies of offloaded layers have no weights. Call "
            "accelerate.hooks.remove_hook_from_module(generator, recurse=True), and move the generator to one device."
        )


def _facts(module: nn.Module) -> dict[str, Any]:
    """What `Snapshot.check` compares by name with the module's own dictionary."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    own = vars(module)
    facts: dict[str, Any] = {name: own[name].copy() for name in ("_modules", *_HOOKS)}
    # A recording that runs in another thread adds its own hooks for a while.
    for hooks in (facts[name] for name in _HOOKS):
        for number in [n for n, hook in hooks.items() if _is_ours(hook)]:
            del hooks[number]
    facts.update((name, value) for name, value in own.items() if type(value) in _SIMPLE)
    return facts


def _is_ours(hook: Any) -> bool:
    return isinstance(getattr(hook, "__self__", None), Recorder)


def _change(module: nn.Module, kind: type, forward: Any, facts: dict[str, Any]) -> str:
    """Describe what differs; empty if only hooks of a recording do."""
    now = vars(module)
    if type(module) is not kind:
        return f"its class is now {type(module).__name__}"
    if now.get("forward") is not forward:
        return "its forward was replaced"
    current = _facts(module)
    for name, value in facts.items():
        if name in current and current[name] == value:
            continue
        if name == "_modules":
            keys = [k for k in {**value, **current[name]} if value.get(k) is not current[name].get(k)]
            return f"child {', '.join(map(repr, keys))} was added, replaced or removed"
        if name in _HOOKS:
            return f"{name[1:].replace('_', ' ')} were added or removed"
        return f"{name} was {value!r} and is {now.get(name, 'gone')!r}"
    return ""
