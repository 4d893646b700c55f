"""What `retroexit.branch.widths.shape_env` relies on in PyTorch beyond its documentation."""

import inspect
import logging
import math

import pytest
import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.numbers import int_oo

from retroexit.branch.widths import shape_env
from retroexit.branch.widths.shape_env import SizeEnv, SymbolicMode


@pytest.fixture
def env():
    return SizeEnv()


@pytest.mark.parametrize("method", ["evaluate_expr", "replace", "simplify", "bound_sympy", "_maybe_evaluate_static"])
def test_a_shape_environment_has_the_methods_that_are_overridden(method):
    signature = inspect.signature(getattr(ShapeEnv, method)).parameters
    parameters = ["orig_expr", "hint"] if method == "evaluate_expr" else ["expr"]
    assert list(signature)[1 : 1 + len(parameters)] == parameters
    assert method in vars(SizeEnv)
    if method == "_maybe_evaluate_static":
        assert signature["compute_hint"].kind is inspect.Parameter.KEYWORD_ONLY


def test_equal_sizes_are_equated_and_inequalities_and_conversions_fix_nothing(env):
    a, b, c = env.size(9), env.size(9), env.size(4)
    assert a > c and a != c and c > 2
    for convert in (int, math.sqrt, lambda size: range(size)[-1]):
        assert convert(a) == convert(9)
    assert isinstance(env.expression(a), sympy.Symbol) and a.node.hint == 9
    assert a == b and env.expression(a) == env.expression(b) != env.expression(c)
    assert env.expression(a * 2 + 1) == 2 * env.expression(a) + 1
    bounds = env.bound_sympy(c.node.expr)
    assert (bounds.lower, bounds.upper) == (0, int_oo)


def test_a_pinned_size_is_a_number_from_then_on(env):
    size, version = env.size(8), env._version_counter
    assert str(size.node.expr) == str(env.expression(size))
    env.pin(size, "a reason")
    assert env._version_counter > version
    assert size.node.expr == 8 == env.expression(size)


def test_operations_on_fake_tensors_add_equations(env):
    mode = SymbolicMode(env)
    assert isinstance(mode, FakeTensorMode) and hasattr(FakeTensorMode(), "cache_enabled")
    assert mode.cache_enabled is False
    x, weight = mode.fake(torch.rand(2, 8), [False, True]), mode.fake(torch.rand(4, 8), [True, True])
    with mode.running():
        y = x @ weight.mT
    assert env.expression(x.shape[1]) == env.expression(weight.shape[1])
    assert env.expression(y.shape[1]) == env.expression(weight.shape[0])


def test_real_tensors_are_computed_with_and_an_index_into_the_channels_pins_their_number(env):
    mode, real = SymbolicMode(env), torch.ones(3)
    x = mode.fake(torch.rand(2, 8), [False, True])
    with mode.running():
        assert float(real.sum()) == 3
        _ = x[:, 3]
    assert env.expression(x.shape[1]) == 8


def test_the_fast_path_of_attention_and_the_loggers_are_restored_after_an_error(env):
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), SymbolicMode(env).running():
        assert not torch.backends.mha.get_fastpath_enabled()
        assert all(logging.getLogger(name).disabled for name in shape_env._LOGGERS)
        raise KeyError
    assert torch.backends.mha.get_fastpath_enabled() is fast
    assert not any(logging.getLogger(name).disabled for name in shape_env._LOGGERS)
