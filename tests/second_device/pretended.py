"""A device that exists in name only, to test on a machine without a GPU what a GPU would refuse.

Tensors "on" it are computed on the CPU, but as torch sees them they are elsewhere: an operation on one of them and on a
tensor of the CPU is refused as on a GPU, likewise `numpy()` and noise from a generator of the CPU. What takes the way
of a GPU (`device.type != "cpu"`) takes it here. Kernels and speed of a GPU are not tested by this.

`begin` changes torch for the whole process; tests call it in processes of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._pytree import tree_map

NAME = "pretended"
TRAVELS = {"aten::copy_", "aten::_to_copy"}
"""Operations on two devices at once."""
INDEXED = {"aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
"""Operations that take their index from the CPU, too."""


class Backend(backend_registration._DummyBackendModule):
    """What torch asks the module of a device."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False


class Elsewhere(Tensor):
    """A tensor of the device; `here` is where it is computed."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            layout=here.layout,
            device=torch.device(NAME, 0),
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(op, *args, **(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{NAME}({self.here})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = Elsewhere(self.here.detach().clone())
        if isinstance(self, nn.Parameter):
            copied = nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return copied

    # What a GPU does with its tensors and torch leaves to subclasses of its own.

    def tolist(self) -> Any:
        return self.here.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, **kwargs: Any) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device, **kwargs)


def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation of the device, by way of the CPU.

    Raises:
        RuntimeError: not everything is on the device.
    """
    name = op._schema.name
    known: dict[int, Elsewhere] = {}
    strangers: list[Tensor] = []

    def here(value: Any) -> Any:
        if isinstance(value, Elsewhere):
            known[id(value.here)] = value
            return value.here
        if isinstance(value, Tensor) and value.dim():
            strangers.append(value)
        return value

    arguments, options = tree_map(here, args), tree_map(here, kwargs)
    goes_home = options.get("device") is not None and options["device"].type == "cpu"
    if "device" in options and options["device"] is not None:
        options["device"] = torch.device("cpu")
    if name in INDEXED:  # what is indexed and what is put there must be on the device, the index need not
        strangers = [t for t in strangers if t.dtype not in (torch.long, torch.bool)]
    if known and strangers and name not in TRAVELS:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {NAME} and cpu")
    generator = options.get("generator")
    if generator is not None and generator._cdata not in PLACED and not goes_home:
        raise RuntimeError(f"{name}: expected a generator of {NAME} but found one of the CPU")
    result = op(*arguments, **options)
    for mine in known.values():
        assert mine.shape == mine.here.shape, f"{name} resizes a tensor, which this pretence cannot follow"
    if goes_home or (name == "aten::copy_" and not isinstance(args[0], Elsewhere)):
        return args[0] if name == "aten::copy_" else result

    def elsewhere(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Elsewhere(value)

    return tree_map(elsewhere, result)


class Generator(torch._C.Generator):
    """A generator that says where it belongs."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        if made.place.type == NAME:
            # Operations are handed the same generator in another Python object.
            KEPT.append(made)
            PLACED.add(made._cdata)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place


def _made_here(make: Any) -> Any:
    """Torch makes these in ways that pass by the registration of a device in Python."""

    def made(*args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any) -> Tensor:
        value = make(*args, **kwargs)
        value = value if device is None else value.to(device)
        return value.requires_grad_(requires_grad)

    return made


def _one_hot(labels: Tensor, classes: int = -1, make: Any = F.one_hot) -> Tensor:
    return make(labels.cpu(), classes).to(labels.device)


def begin() -> None:
    """Make the device known to torch, for the rest of the process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
    library = torch.library.Library("_", "IMPL", "PrivateUse1")
    library.fallback(compute)  # type: ignore[attr-defined]
    KEPT.append(library)
    torch.Generator = Generator  # type: ignore[misc, assignment]
    for name in ("tensor", "arange", "linspace", "eye", "randperm", "tril_indices", "triu_indices"):
        setattr(torch, name, _made_here(getattr(torch, name)))
    F.one_hot = _one_hot


KEPT: list[Any] = []
"""A library's registrations end with it, and a generator's number is given to another one."""

PLACED: set[int] = set()
"""Numbers of the device's generators."""
