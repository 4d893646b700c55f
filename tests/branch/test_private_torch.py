"""What `retroexit.branch.widths.shape_env` relies on in PyTorch beyond its documentation."""

import inspect
import logging
import math

import pytest
import sympy
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.types import py_sym_types
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from retroexit.branch.widths import shape_env
from retroexit.branch.widths.shape_env import SizeEnv, SymbolicMode


@pytest.fixture
def env():
    return SizeEnv()


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("evaluate_expr", ["orig_expr", "hint"]),
        ("replace", ["expr"]),
        ("simplify", ["expr"]),
        ("bound_sympy", ["expr"]),
        ("_maybe_evaluate_static", ["expr"]),
    ],
)
def test_a_shape_environment_has_the_methods_that_are_overridden(method, parameters):
    names = list(inspect.signature(getattr(ShapeEnv, method)).parameters)
    assert names[1 : 1 + len(parameters)] == parameters
    assert method in vars(SizeEnv)


def test_a_static_evaluation_is_told_by_keyword_to_use_real_sizes():
    parameters = inspect.signature(ShapeEnv._maybe_evaluate_static).parameters
    assert parameters["compute_hint"].kind is inspect.Parameter.KEYWORD_ONLY


def test_a_shape_environment_keeps_real_sizes_and_a_version():
    plain = ShapeEnv(duck_shape=False)
    name = "backed_var_to_val" if hasattr(plain, "backed_var_to_val") else "var_to_val"  # torch < 2.10
    assert not getattr(plain, name)
    assert isinstance(plain._version_counter, int)


def test_a_symbolic_size_has_an_expression_and_a_hint(env):
    size = env.size(8)
    assert isinstance(size, torch.SymInt) and isinstance(size, py_sym_types)
    assert isinstance(size.node, SymNode)
    assert isinstance(size.node.expr, sympy.Symbol) and size.node.hint == 8
    assert env.expression(size * 2 + 1) == 2 * size.node.expr + 1


def test_comparing_sizes_asks_the_environment_and_equates_them(env):
    a, b = env.size(8), env.size(8)
    assert a == b
    assert env.expression(a) == env.expression(b)


def test_an_inequality_equates_nothing(env):
    a, b = env.size(8), env.size(4)
    assert a > b and a != b and b > 2
    assert env.expression(a) != env.expression(b)


@pytest.mark.parametrize("convert", [int, math.sqrt, lambda size: range(size)[-1]])
def test_a_conversion_goes_through_the_node_and_fixes_nothing(env, convert):
    size = env.size(9)
    assert convert(size) == convert(9)
    assert isinstance(env.expression(size), sympy.Symbol)


def test_a_changed_version_makes_known_sizes_be_simplified_again(env):
    size = env.size(8)
    version = env._version_counter
    assert str(size.node.expr) == str(env.expression(size))
    env.pin(size, "a reason")
    assert env._version_counter > version
    assert size.node.expr == 8 == env.expression(size)


def test_fake_tensors_have_symbolic_sizes_and_operations_on_them_add_equations(env):
    mode = SymbolicMode(env)
    assert isinstance(mode, FakeTensorMode) and mode.shape_env is env and mode.allow_non_fake_inputs
    x, weight = mode.fake(torch.rand(2, 8), [False, True]), mode.fake(torch.rand(4, 8), [True, True])
    with mode.running():
        y = x @ weight.mT
    assert isinstance(y, FakeTensor)
    assert env.expression(x.shape[1]) == env.expression(weight.shape[1])
    assert env.expression(y.shape[1]) == env.expression(weight.shape[0])


def test_caching_of_fake_operations_can_be_disabled(env):
    assert hasattr(FakeTensorMode(), "cache_enabled")
    assert SymbolicMode(env).cache_enabled is False


def test_operations_on_real_tensors_are_computed_within_the_mode(env):
    x = torch.ones(3)
    with SymbolicMode(env).running():
        assert float(x.sum()) == 3


def test_arguments_of_a_dispatched_operation_have_the_names_of_its_schema(env):
    aten = torch.ops.aten
    for operation, name in [
        (aten.embedding.default, "weight"),
        (aten.index.Tensor, "indices"),
        (aten.index_select.default, "dim"),
        (aten.gather.default, "dim"),
        (aten.select.int, "index"),
        (aten.slice.Tensor, "end"),
    ]:
        assert name in [argument.name for argument in operation._schema.arguments]
    mode = SymbolicMode(env)
    x = mode.fake(torch.rand(2, 8), [False, True])
    with mode.running():
        _ = x[:, 3]
    assert env.expression(x.shape[1]) == 8


def test_the_python_dispatcher_and_the_fast_path_of_attention_are_restored(env):
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(KeyError), SymbolicMode(env).running():
        assert not torch.backends.mha.get_fastpath_enabled()
        assert all(logging.getLogger(name).disabled for name in shape_env._LOGGERS)
        raise KeyError
    assert torch.backends.mha.get_fastpath_enabled() is fast
    assert not any(logging.getLogger(name).disabled for name in shape_env._LOGGERS)
    with enable_python_dispatcher():
        assert isinstance(torch.ones(1) + 1, Tensor)


def test_bounds_and_leaves(env):
    size = env.size(8)
    bounds = env.bound_sympy(size.node.expr)
    assert isinstance(bounds, ValueRanges) and (bounds.lower, bounds.upper) == (0, int_oo)
    assert tree_leaves(([1, {"a": 2}], None)) == [1, 2, None]
