"""Triton's interpreter without the work that it repeats, a third of the time of a step."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any


def install() -> None:
    """Let the device functions of a launch keep what the launch has replaced in the language.

    A launch replaces every builtin of triton.language and restores them at its end; in between, every call of a device
    function searches the whole language and replaces them by the same again. Other versions of Triton than those that
    do so are left alone.
    """
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):
        return
    replace = interpreter._patch_lang
    replaced: set[str] = set()  # modules, during a launch

    def patch_lang(function: FunctionType) -> Any:
        used = {value.__name__ for value in function.__globals__.values() if inspect.ismodule(value)}
        used &= {language.__name__, language.core.__name__}
        if used <= replaced:
            return interpreter._LangPatchScope()
        scope = replace(function)
        if replaced:  # a device function that uses more of the language than the launch does
            return scope
        restore = scope.restore

        def end() -> None:
            replaced.clear()
            restore()

        scope.restore = end
        replaced.update(used)
        return scope

    interpreter._patch_lang = patch_lang
