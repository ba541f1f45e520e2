"""Cases in Triton's interpreter, hastened: `python -m tests.kernels.interpreter NAME SEED`.

NAME is a module of this folder, as `decode_cases`. On a GPU it runs as it is.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace as replace_fields
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """For this process, whose kernels are interpreted: what they compute stays what it is.

    At every call of a function by a kernel all of Triton's language is searched for what to
    replace, which the first call in a launch has replaced: once a launch and module is enough. A
    table of all types is made wherever one is looked up, and the type of every block anew.
    `tl.sort` sums up number by number. And each sum is asked whether it fits into 32 bits, which it
    does in cases as small as these; no GPU asks.
    """
    replaced: set[int] = set()
    known: dict[str, np.dtype[Any]] = {}
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
    options = interpreter.interpreter_builder.options
    launch, replace = interpreter.GridExecutor.__call__, interpreter._patch_lang
    numpy_type, reduce = interpreter._get_np_dtype, interpreter.ReduceOps.generic_reduce
    make_block = tl.block_type.__init__

    def launched(self: interpreter.GridExecutor, *args: Any, **kwargs: Any) -> None:
        replaced.clear()  # the last launch put back what it had replaced
        launch(self, *args, **kwargs)

    def replaced_once(function: Callable[..., Any]) -> Any:
        module = id(function.__globals__)
        if module in replaced:
            return None  # only the launch, which comes first, puts back
        replaced.add(module)
        return replace(function)

    def remembered(kind: tl.dtype) -> np.dtype[Any]:
        name = kind.scalar.name
        if name not in known:
            known[name] = numpy_type(kind)
        return known[name]

    def remembered_block(self: tl.block_type, scalar: tl.dtype, shape: Sequence[Any]) -> None:
        key = (scalar.name, *[tl.core._unwrap_if_constexpr(length) for length in shape])
        if key not in blocks:
            make_block(self, scalar, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def reduced(self: interpreter.ReduceOps, tensors: tuple[tl.tensor, ...]) -> list[tl.tensor]:
        if self.combine_fn is not tl.standard._xor_combine or self.axis is None:
            return reduce(self, tensors)
        [one] = tensors
        numbers = np.bitwise_xor.reduce(one.handle.data, axis=self.axis, keepdims=self.keep_dims)
        return [self.to_tensor(numbers, one.dtype)]

    interpreter.GridExecutor.__call__ = launched
    interpreter._patch_lang = replaced_once
    interpreter._get_np_dtype = remembered
    tl.block_type.__init__ = remembered_block
    interpreter.interpreter_builder.options = replace_fields(options, sanitize_overflow=False)
    interpreter.ReduceOps.generic_reduce = reduced


def main(cases: str, seed: int) -> None:
    """Run all cases of a module for one seed."""
    if triton.knobs.runtime.interpret:
        hasten()
    importlib.import_module(f"tests.kernels.{cases}").main(seed)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
