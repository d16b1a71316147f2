"""Parameters of several linears in one tensor, so that one product computes them all, and each parameter a view of its rows.

Owns the tensor, and what it takes to give every parameter memory of its own back. The modules keep their Parameter objects:
`state_dict`, optimizers, `deepcopy` and `torch.save` see what they saw. Does not know what the linears are for.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import nn

_OWNERS = 2  # of a storage nobody else refers to: the parameter, and the object that asks


def why_not_movable(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """ "" when nobody could see that these plain dense parameters moved to other memory, else the reason.

    Args:
        parameters: (name, parameter), once for each place in the model where it stands.
    """
    seen: set[int] = set()
    for name, parameter in parameters:
        if id(parameter) in seen:
            return f"{name} is shared between modules"
        seen.add(id(parameter))
        if not parameter.is_contiguous():
            return f"{name} is not contiguous"
        if parameter.is_inference():
            return f"{name} was made in inference mode"
        if _has_other_owners(parameter):
            return f"another tensor shares the memory of {name}"
    return ""


def _has_other_owners(tensor: torch.Tensor) -> bool:
    storage = tensor.untyped_storage()
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return storage.nbytes() != tensor.nbytes
    return bool(count(storage._cdata) > _OWNERS)


class FusedParameters:
    """The parameters `name` of `modules`, one under the other; made from parameters that `why_not_movable` admits or that
    lie like this already (in another's tensor: that is then used, and not taken apart at the end).

    While it is made, memory for its parameters is held twice.

    Args:
        modules: held weakly.
        name: of the parameter in each of them; all of one dtype and device, and of one shape but for the first axis.
    """

    def __init__(self, modules: Sequence[nn.Module], name: str) -> None:
        self._modules = [weakref.ref(module) for module in modules]
        self._name = name
        parameters = self._parameters()
        self._num_rows = [len(p) for p in parameters]
        adopted = lying_together(parameters)
        self._adopted = adopted is not None
        self.tensor: torch.Tensor
        if adopted is not None:
            self.tensor = adopted
        else:
            first = parameters[0]
            self.tensor = torch.empty(sum(self._num_rows), *first.shape[1:], dtype=first.dtype, device=first.device)
            self.follow()

    def _parameters(self) -> list[nn.Parameter]:
        modules = [ref() for ref in self._modules]
        assert all(m is not None for m in modules), "the model is alive while its parameters move"
        return [m._parameters[self._name] for m in modules]

    def _slices(self) -> tuple[torch.Tensor, ...]:
        return self.tensor.split(self._num_rows)

    def strays(self) -> list[nn.Parameter]:
        """The parameters that are no view of the tensor, or no longer: replaced, or given other memory by the user."""
        pairs = zip(self._parameters(), self._slices(), strict=True)
        return [p for p, rows in pairs if not _same_place(p, rows)]

    def fits(self) -> bool:
        """Whether the parameters still have the shapes, dtype and device of the tensor's rows."""
        return all(
            (p.shape, p.dtype, p.device) == (rows.shape, rows.dtype, rows.device)
            for p, rows in zip(self._parameters(), self._slices(), strict=True)
        )

    @torch.no_grad()
    def follow(self) -> None:
        """Copy the strays' values to their rows and make them views; the tensor stays where it is."""
        for parameter, rows in zip(self._parameters(), self._slices(), strict=True):
            if not _same_place(parameter, rows):
                rows.copy_(parameter)
                parameter.data = rows
                self._adopted = False

    @torch.no_grad()
    def release(self) -> None:
        """Give each parameter that is still a view memory of its own. The object is of no use afterwards."""
        if self._adopted:
            return
        for ref, rows in zip(self._modules, self._slices(), strict=True):
            module = ref()
            parameter = None if module is None else module._parameters.get(self._name)
            if parameter is not None and _same_place(parameter, rows):
                parameter.data = rows.clone()


def lying_together(parameters: Sequence[nn.Parameter]) -> torch.Tensor | None:
    """The tensor of which contiguous parameters are consecutive rows, all in one storage; None if they are not."""
    first, end = parameters[0], parameters[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for p in parameters:
        if p.data_ptr() != end or not p.is_contiguous() or p.untyped_storage().data_ptr() != storage:
            return None
        end += p.nbytes
    shape = (sum(len(p) for p in parameters), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride())


def _same_place(tensor: torch.Tensor, rows: torch.Tensor) -> bool:
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device) == (
        rows.data_ptr(), rows.shape, rows.stride(), rows.dtype, rows.device,
    )  # fmt: skip
