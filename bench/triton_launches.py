"""What Triton makes of the kernels that a call would launch, for any GPU, on a machine without one.

Not under the interpreter: a process of its own, in which launches are recorded and not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


@dataclass(frozen=True)
class Launch:
    """A kernel and all it was called with."""

    kernel: JITFunction[Any]
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def variant(self, target: GPUTarget) -> str:
        """What a compiled kernel is kept under: launches of the same variant share it."""
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, make_backend(target))
        return f"{self.kernel.fn.__module__}.{self.kernel.__name__} {binder(*self.arguments, **self.options)[1:]}"

    def compile(self, target: GPUTarget) -> Any:
        """As the launch itself would, types, alignment and constants included."""
        backend = make_backend(target)
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = binder(*self.arguments, **self.options)
        options, signature, constexprs, attributes = self.kernel._pack_args(
            backend, self.options, bound, specialization, options
        )
        source = ASTSource(self.kernel, signature, constexprs, attributes)
        return triton.compile(source, target=target, options=options.__dict__)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Kernels are not launched but listed."""
    launches: list[Launch] = []

    def run(self: JITFunction[Any], *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, grid if isinstance(grid, tuple) else grid({}), arguments, options))

    before = JITFunction.run
    JITFunction.run = run  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = before  # type: ignore[method-assign]
