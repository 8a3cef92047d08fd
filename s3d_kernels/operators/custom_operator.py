"""Custom operators of `torch.library` that plain tensors reach without torch's dispatcher.

Through the dispatcher every call passes several layers of Python and is translated argument by argument in each; and
the whole schema is read again wherever there is a backward. That takes longer than all the rest that a layer does on
the host, and on a GPU it can take longer than the kernels themselves. Nothing of it matters where tensors are plain,
and no one looks on: then the operator's body and formulas are called as they are. Whoever traces a graph or intercepts
operators (torch.compile, fake tensors, modes, subclasses of Tensor, functorch) meets the operator of `torch.library`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_TENSORS = frozenset({Tensor, torch.nn.Parameter})
_OTHERS = frozenset({int, float, bool, str, list, type(None)})  # among the arguments of our operators


class CustomOperator:
    """An operator with the body, fake implementation and derivative of `torch.library.custom_op`.

    Args:
        name: with namespace, "s3d_kernels::conv3d".
        body: computes it below autograd; never returns one of its arguments, nor a view of one.
    Attributes:
        name: as given.
        definition: the operator of `torch.library`.
    """

    def __init__(self, name: str, body: Callable[..., Any]) -> None:
        self.name = name
        self.definition = torch.library.custom_op(name, body, mutates_args=())
        self._body = body
        self._function: type[torch.autograd.Function] | None = None

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """As of `torch.library.custom_op`."""
        return self.definition.register_fake(fake)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """As of `torch.library.custom_op`."""
        self.definition.register_autograd(backward, setup_context=setup_context)
        body = self._body

        def forward(ctx: Any, *args: Any) -> Any:
            output = body(*args)
            if setup_context is not None:
                setup_context(ctx, args, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        # The name is what profilers show, as of an operator.
        self._function = type(self.name, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or somebody_looks_on():
            return self.definition(*args)
        requires_grad = False
        for argument in args:
            kind = type(argument)
            if kind in _TENSORS and not argument.is_meta:
                requires_grad = requires_grad or argument.requires_grad
            elif kind not in _OTHERS:
                return self.definition(*args)
        if requires_grad and torch.is_grad_enabled():
            # An operator without derivative says so in backward.
            return self.definition(*args) if self._function is None else self._function.apply(*args)
        with torch._C._profiler._RecordFunctionFast(self.name):
            return self._body(*args)


def custom_operator(name: str) -> Callable[[Callable[..., Any]], CustomOperator]:
    """Make a function an operator of this name: a decorator."""
    return lambda body: CustomOperator(name, body)


def somebody_looks_on() -> bool:
    """Whether a mode, a transform or a tracer is set that may want to see operators."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )
