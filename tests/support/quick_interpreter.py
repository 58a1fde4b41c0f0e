"""Triton's interpreter without work that it repeats or that has no effect: steps in a third of the time, bit for bit.

What is replaced here is private to Triton: `install` leaves versions that it does not know as they are.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from types import FunctionType
from typing import Any

KNOWN = ("3.6",)
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


def known() -> bool:
    """Whether the installed Triton is one whose interpreter can be changed."""
    import triton

    return triton.__version__.rpartition(".")[0] in KNOWN


def install() -> None:
    """Change the interpreter of this process, if it is a known one."""
    if known():
        _search_once()
        _check_overflow_at_once()
        _find_dtypes_once()
        _type_tuples_when_asked()


def _search_once() -> None:
    """Let the device functions of a launch keep what has been replaced in the language.

    A launch replaces every builtin of the modules of triton.language that its kernel sees, and restores them at last.
    In between every call of a device function searches the modules that this one sees, finds hardly any builtin left,
    and replaces what it finds for good.
    """
    from triton import language
    from triton.runtime import interpreter

    replace = interpreter._patch_lang
    during: set[str] = set()  # modules, by the launch
    for_good: set[str] = set()  # by device functions

    def patch_lang(function: FunctionType) -> Any:
        used = {value.__name__ for value in function.__globals__.values() if inspect.ismodule(value)}
        used &= {language.__name__, language.core.__name__}
        if during and used <= during | for_good:
            return interpreter._LangPatchScope()
        scope = replace(function)
        if during:
            for_good.update(used)
            return scope
        restore = scope.restore

        def end() -> None:
            during.clear()
            restore()

        scope.restore = end
        during.update(used)
        return scope

    interpreter._patch_lang = patch_lang


def _check_overflow_at_once() -> None:
    """Look for overflow of int32 in numpy's int64 and not by nine more operations of the language."""
    import numpy
    from triton.language.semantic import TritonSemantic

    def check(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
        scalar = lhs.type.scalar
        if scalar.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
            return
        a, b = (tensor.handle.data.astype(numpy.int64) for tensor in (lhs, rhs))
        result = OPERATIONS[operation.__name__](a, b)
        fits = scalar.get_int_min_value() <= result.min() and result.max() <= scalar.get_int_max_value()
        assert fits, f"int{scalar.int_bitwidth} overflow detected for operation {operation.__name__}"

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def _find_dtypes_once() -> None:
    """Remember the numpy dtype of a type instead of making the table of all of them for each look."""
    from triton.runtime import interpreter

    find, found = interpreter._get_np_dtype, dict[str, Any]()

    def np_dtype(type_: Any) -> Any:
        name = type_.scalar.name
        if name not in found:
            found[name] = find(type_.scalar)
        return found[name]

    interpreter._get_np_dtype = np_dtype


def _type_tuples_when_asked() -> None:
    """Give a tuple its type when it is asked for: nobody asks for that of a shape, which every tensor has."""
    from triton.language import core

    def init(self: Any, args: Any, type: Any = None) -> None:
        self.values = list(args)
        if type is not None:
            self.type = type if isinstance(type, core.tuple_type) else core.tuple_type(type)

    def get(self: Any) -> Any:
        if "_type" not in self.__dict__:
            self._type = core._type_for_tuple_values(self.values)
        return self._type

    def put(self: Any, value: Any) -> None:
        self._type = value

    core.tuple.__init__ = init
    core.tuple.type = property(get, put)
