"""Manifold mixup of any model: MixUp's blend in a hidden layer, at a single run of the model."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils.hooks import RemovableHandle

from ._core.checks import check_bool
from ._core.dispatch import on_device, outside_graphs
from ._core.draw import Stream, beta, check_alpha, pairing
from .mixing import MixedTarget
from .ops.mixup import blend

__all__ = ["ManifoldMixup"]

# The most hidden layers that are candidates by default: as many as in the blog's ResNet.
_HIDDEN = 4
# With activation checkpointing, the most forwards that may await their backward. Older mixes are
# forgotten.
_REMEMBERED = 256


class ManifoldMixup(nn.Module):
    """Manifold mixup of a model: blend the output of one layer, and the labels with it.

    The layer's output h becomes lam*h + (1 - lam)*h[index].

    Call it as `output, target = mm(x, y)`. In training mode each call draws one of the candidates
    and runs the model once, with the blend at that candidate. The target is a `MixedTarget`, for
    `MixupCrossEntropyLoss`, `MixupLoss` or any code that takes (y_i, y_j, lam). In eval mode it is
    the bare model: `mm(x, y)` returns (output, y), and `mm(x)` the output. Calls of the model
    itself mix nothing.

    Args:
        model: any nn.Module, also one in DistributedDataParallel or torch.compile.
        layers: names of modules, as in `model.named_modules()`; the output of each is a candidate.
            If None, the blog's choice in any network: the input of the first stage ("stem"), and
            the output of every stage but the last; four of these, spread evenly, if there are
            more. The stages are the first three or more children of one class, from the model down
            through its largest child: a ResNet's layer1 to layer4, a transformer's blocks, the
            convolutions of a plain nn.Sequential.
        alpha: lam is drawn from Beta(alpha, alpha), one for the batch; 0 mixes nothing.
        include_input: whether the input, x, is a candidate as well.
        generator: the source of all draws; it must be on the host. If None, the module has its own
            generator, which is reproducible from torch.manual_seed, differs by rank, and is saved
            and restored with the state_dict.

    Call:
        x: the model's first argument: a tensor with the batch first, or tuples, lists, dicts and
            dataclasses of tensors. In it, as in a layer's output, each floating-point tensor with
            the batch as its first dimension is blended. All else is kept.
        y: labels, (B, ...).
        *args, **kwargs: further arguments of the model, passed on unchanged.

    Attributes:
        candidates: the names of the candidates; "input" is x.
        last_k, last_layer, last_lam: the index and the name of the candidate that the last call in
            training mode drew, and lam as a number.

    The model carries hooks until `close()`, the end of a `with` block, or the deletion of the
    ManifoldMixup. Activation checkpointing needs them to repeat the forward's mix in its
    recomputation: close after the backward. (A backward in compiled autograd recomputes without
    them.)

    The model may be compiled, fullgraph or not, before its first call; each candidate makes its own
    graph. If the ManifoldMixup itself is compiled, its draw breaks the graph before the model's.

    Raises:
        ValueError, TypeError: if an argument or input is not allowed. The message names it and what
            is allowed.
        RuntimeError: if in a call a candidate never runs or runs twice, so that there is no single
            place to mix.

    Source: Verma et al., "Manifold Mixup: Better Representations by Interpolating Hidden States"
    (2019).

    Example:
        >>> mm = regfast.ManifoldMixup(torchvision.models.resnet18(num_classes=10))
        >>> mm.candidates
        ('input', 'stem', 'layer1', 'layer2', 'layer3')
        >>> output, target = mm(torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))
        >>> regfast.MixupCrossEntropyLoss()(output, target).backward()
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        *,
        alpha: float = 2.0,
        include_input: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        check_bool("include_input", include_input)
        check_alpha("alpha", alpha)
        self._stream = Stream(generator)
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(
                "generator must be on the cpu, where the layer is drawn, got one on "
                f"{generator.device}"
            )
        hidden = _default_candidates(model) if layers is None else _named_candidates(model, layers)
        self._candidates = (_INPUT, *hidden) if include_input else hidden
        if not self._candidates:
            raise ValueError(
                f"layers must name a module where include_input is False, got {layers!r}"
            )
        self.model = model
        self.alpha = alpha
        self.last_k: int | None = None
        self.last_lam: float | None = None
        self._install()

    def _install(self) -> None:
        """Hook the model's candidates, and start without remembered forwards."""
        self._active: _Mix | None = None
        self._past = _Past()
        self._handles: list[RemovableHandle] = []
        for k, candidate in enumerate(self._candidates):
            if candidate != _INPUT:
                module = self.model.get_submodule(candidate.path)
                register: Any = (
                    module.register_forward_pre_hook
                    if candidate.before
                    else module.register_forward_hook
                )
                self._handles.append(register(_Hook(self, k)))
        self._removal = weakref.finalize(self, _remove, self._handles)

    def close(self) -> None:
        """Remove the hooks from the model; in eval mode the module still works."""
        self._removal()

    def __enter__(self) -> ManifoldMixup:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def candidates(self) -> tuple[str, ...]:
        return tuple(candidate.name for candidate in self._candidates)

    @property
    def last_layer(self) -> str | None:
        return None if self.last_k is None else self.candidates[self.last_k]

    def forward(self, x: Any, y: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            output = self.model(x, *args, **kwargs)
            return output if y is None else (output, y)
        if _INPUT in self._candidates and isinstance(x, Tensor) and not x.is_floating_point():
            raise ValueError(
                f"ManifoldMixup: x is a candidate, and must be floating-point, got {x.dtype}: or "
                "pass include_input=False"
            )
        mix, target = self._begin(x, y)
        try:
            if self._candidates[mix.k] == _INPUT:
                x = self._blend(mix, x)
            output = self.model(x, *args, **kwargs)
            self._check_runs(mix)
        finally:
            self._end(mix)
        return output, target

    @outside_graphs("a torch.Generator cannot be drawn from within a graph")
    def _begin(self, x: Any, y: Any) -> tuple[_Mix, MixedTarget]:
        """Return the mix of a call and its target.

        The mix is drawn. If a backward is recomputing the call, it is the mix of the first run.
        """
        if not self._removal.alive:
            raise RuntimeError(
                "ManifoldMixup was closed, and mixes no more: call it in eval mode, or its model"
            )
        _check_labels(y, x)
        node = _running_node()
        mix = self._draw(len(y), y.device) if node is None else self._past.find(node)
        if mix is None:
            raise RuntimeError(
                "ManifoldMixup was called within a backward that is not recomputing a call of it"
            )
        return mix, MixedTarget(y, y[on_device(mix.index, y.device)], mix.lam)

    def _draw(self, batch: int, device: torch.device) -> _Mix:
        generator = self._stream.generator
        k = int(torch.randint(len(self._candidates), (), generator=generator, device="cpu"))
        index, lam = pairing("random", batch, generator), beta(self.alpha, (), generator)
        self.last_k, self.last_lam = k, float(lam)
        index, lam = (on_device(t, device) for t in (index, lam))
        self._active = self._past.begin(
            _Mix(k, index, lam, [int(c == _INPUT) for c in self._candidates])
        )
        return self._active

    @outside_graphs("it reads autograd's counter")
    def _end(self, mix: _Mix) -> None:
        if mix is self._active:
            self._past.end(mix)
            self._active = None

    def _visit(self, k: int, value: Any) -> Any:
        """Return what candidate k outputs in place of `value`; None for the value itself."""
        node = None if torch.compiler.is_compiling() else _running_node()
        mix = self._active if node is None else self._past.find(node)
        if mix is None:
            return None
        if node is None:
            mix.runs[k] += 1
            if mix.runs[k] > 1:
                raise RuntimeError(
                    f"ManifoldMixup: {self.candidates[k]!r} ran twice in a forward; name a "
                    "module that runs once"
                )
        return self._blend(mix, value) if mix.k == k else None

    def _blend(self, mix: _Mix, value: Any) -> Any:
        batch, blended = len(mix.index), []

        def blend_batch(t: Tensor) -> Tensor:
            if not t.is_floating_point() or t.shape[:1] != (batch,):
                return t
            blended.append(t)
            return blend(t, mix.index, mix.lam)

        result = _map(blend_batch, value)
        if not blended:
            expected = f"a floating-point tensor with the batch, {batch}, as its first dimension"
            raise ValueError(
                f"ManifoldMixup: {self.candidates[mix.k]!r} must be or hold {expected}, got "
                f"{_describe(value)}"
            )
        return result

    def _check_runs(self, mix: _Mix) -> None:
        """Refuse a model with a candidate that did not run."""
        if mix is self._active and 0 in mix.runs:
            raise RuntimeError(_never_ran(self.model, self._candidates, mix.runs))

    def get_extra_state(self) -> Tensor:
        return self._stream.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        self._stream.set_state(state)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_active": None, "_past": None, "_removal": self._removal.alive}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        is_open = self._removal
        # The copied model has copies of the hooks, and these handles belong to them.
        _remove(self._handles)
        self._install()
        if not is_open:
            self.close()

    def extra_repr(self) -> str:
        return f"candidates={list(self.candidates)}, alpha={self.alpha}"


class _Candidate(NamedTuple):
    """A place to mix in: the output of a module of the model, or the input of one."""

    name: str
    path: str
    before: bool = False


_INPUT = _Candidate("input", "", before=True)


class _Hook:
    """The hook of candidate k.

    It holds its owner by a weak reference. A copy of it has no owner and does nothing.
    """

    def __init__(self, owner: ManifoldMixup | None = None, k: int = 0) -> None:
        self._owner = None if owner is None else weakref.ref(owner)
        self._k = k

    def __call__(self, module: nn.Module, *values: Any) -> Any:
        owner = None if self._owner is None else self._owner()
        # PyTorch calls a pre-hook with the arguments, and a hook with the arguments and the output.
        return None if owner is None else owner._visit(self._k, values[-1])

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


@dataclasses.dataclass(eq=False)
class _Mix:
    """The mix of one forward.

    `runs` counts the runs of each candidate. The forward's autograd nodes are those with numbers
    in [first, last).
    """

    k: int
    index: Tensor
    lam: Tensor
    runs: list[int]
    first: int = 0
    last: float = math.inf


class _Past:
    """The forwards that may still have a backward, told apart by their autograd nodes.

    A recomputation runs in the backward of a node that its forward made. Each thread numbers the
    nodes that it makes.
    """

    def __init__(self) -> None:
        self._mixes: deque[_Mix] = deque()
        self._forgotten = -math.inf

    def begin(self, mix: _Mix) -> _Mix:
        # Without gradients a forward makes no node. But a reentrant checkpoint around it has just
        # made one, and its backward recomputes this forward.
        mix.first = _next_number() - (not torch.is_grad_enabled())
        # If the numbers fall, another thread has taken over.
        while self._mixes and (
            len(self._mixes) == _REMEMBERED or self._mixes[-1].last > _next_number()
        ):
            self._forgotten = max(self._forgotten, self._mixes.popleft().last)
        self._mixes.append(mix)
        return mix

    def end(self, mix: _Mix) -> None:
        mix.last = _next_number()

    def find(self, node: int) -> _Mix | None:
        """Return the forward that made the node of this number, or None."""
        for mix in self._mixes:
            if mix.first <= node < mix.last:
                return mix
        if node < self._forgotten:
            raise RuntimeError(
                "ManifoldMixup: a backward recomputes a forgotten forward: it is over "
                f"{_REMEMBERED} forwards old, or another thread's"
            )
        return None


def _next_number() -> int:
    """Return the number of the autograd node that this thread makes next."""
    return torch._C._autograd._get_sequence_nr()


def _running_node() -> int | None:
    """Return the number of the node with a backward running in this thread, or None.

    If a recomputed checkpoint holds another, a backward runs within the backward of a node. The
    forward made the outermost node.
    """
    node: Any = torch._C._current_autograd_node()
    if node is None:
        return None
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is BackwardCFunction.apply.__code__:
            node = frame.f_locals["self"]
        frame = frame.f_back
    return node._sequence_nr()


def _unwrapped(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the model within DistributedDataParallel or torch.compile, and the path to it."""
    path = ""
    while (children := dict(model.named_children())).keys() in ({"module"}, {"_orig_mod"}):
        (name, model) = children.popitem()
        path += f"{name}."
    return path, model


def _default_candidates(model: nn.Module) -> tuple[_Candidate, ...]:
    """Return the first stage's input and the output of every stage but the last; four at most."""
    path, inner = _unwrapped(model)
    parent, stages = _stages(inner)
    module, prefix = inner.get_submodule(parent), f"{parent}." if parent else ""
    children = list(module._modules)
    places = []
    for before, stage in zip((None, *stages), stages):
        if before is None:
            if not _is_first(inner, prefix + stage):
                places.append(_Candidate("stem", path + prefix + stage, before=True))
        elif isinstance(module, nn.Sequential):
            # Modules between two stages count with the first. The last of them may stand in many
            # places, such as a shared ReLU, so the hook is on the next stage's input.
            name = children[children.index(stage) - 1]
            places.append(_Candidate(prefix + name, path + prefix + stage, before=True))
        else:
            places.append(_Candidate(prefix + before, path + prefix + before))
    if not places:
        raise ValueError(
            "layers must name modules: by default they are blocks of one class, or the layers of "
            "an nn.Sequential, and "
            f"{type(inner).__name__} holds none (its children are "
            f"{_quoted(dict(inner.named_children()))})"
        )
    count = min(len(places), _HIDDEN)
    return tuple(places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count))


def _stages(model: nn.Module) -> tuple[str, list[str]]:
    """Return the path of the module that holds the stages, and their names in it.

    This is the first module with at least three children of one class, from the model down through
    the largest child. Without one, it is the module with the most children of one class.
    """
    best: tuple[str, list[str]] = "", []
    path, module = "", model
    while len(best[1]) < 3:
        children = {
            name: child
            for name, child in module.named_children()
            if any(True for _ in child.parameters())
        }
        if not children:
            break
        alike: dict[type[nn.Module], list[str]] = {}
        for name, child in children.items():
            # A ModuleList is never called. Only an nn.Sequential defines what follows a layer.
            if not isinstance(child, nn.ModuleList) and (
                child._modules or isinstance(module, nn.Sequential)
            ):
                alike.setdefault(type(child), []).append(name)
        size = {name: sum(1 for _ in child.modules()) for name, child in children.items()}
        stages = max(
            alike.values(), key=lambda names: sum(map(size.__getitem__, names)), default=[]
        )
        if len(stages) > len(best[1]):
            best = path, stages
        largest = max(size, key=size.__getitem__)
        path, module = f"{path}.{largest}" if path else largest, children[largest]
    return best


def _is_first(model: nn.Module, path: str) -> bool:
    """Return whether the path is made of first children, so that the model's input enters it."""
    for name in path.split("."):
        if name != next(iter(model._modules)):
            return False
        model = model.get_submodule(name)
    return True


def _named_candidates(model: nn.Module, layers: Any) -> tuple[_Candidate, ...]:
    if (
        isinstance(layers, str)
        or not isinstance(layers, Sequence)
        or not all(isinstance(name, str) for name in layers)
    ):
        raise TypeError(f"layers must be a sequence of module names or None, got {layers!r}")
    path, inner = _unwrapped(model)
    known = {name for name, _ in inner.named_modules(remove_duplicate=False) if name}
    candidates = []
    for name in layers:
        # A name may have the wrapper's prefix or not.
        short = name.removeprefix(path)
        if short not in known:
            close = difflib.get_close_matches(short, known)
            hint = (
                f"did you mean {_quoted(close)}?"
                if close
                else f"its children are {_quoted(dict(inner.named_children()))}"
            )
            raise ValueError(
                f"layers must name modules of {type(inner).__name__}, got {name!r}; {hint}"
            )
        candidates.append(_Candidate(name, path + short))
    modules = [model.get_submodule(candidate.path) for candidate in candidates]
    for i, module in enumerate(modules):
        if module in modules[:i]:
            raise ValueError(
                f"layers must name each module once, got {candidates[i].name!r} twice or under "
                "two names"
            )
    return tuple(candidates)


def _never_ran(model: nn.Module, candidates: Sequence[_Candidate], runs: Sequence[int]) -> str:
    missing = [candidate for candidate, count in zip(candidates, runs) if not count]
    names = _quoted(candidate.name for candidate in missing)
    message = f"ManifoldMixup: {names} never ran in the forward"
    blocks = {candidate: _last_block(model, candidate) for candidate in missing}
    if any(blocks.values()):
        layers = [
            blocks.get(candidate) or candidate.name
            for candidate in candidates
            if candidate != _INPUT
        ]
        message += (
            "; activation checkpointing, such as timm's, may run a stage's blocks without a call "
            "of "
            f"the stage: name the last block, layers={layers}"
        )
    if any(
        "_orig_mod" in module._modules or module._compiled_call_impl for module in model.modules()
    ):
        message += (
            "; a model that ran compiled before it had its hooks must be compiled again, "
            "after torch.compiler.reset()"
        )
    return message


def _last_block(model: nn.Module, candidate: _Candidate) -> str | None:
    """Return the module with the candidate's output if the candidate's own module does not run."""
    path = _previous(model, candidate.path) if candidate.before else candidate.path
    name = path
    while (module := model.get_submodule(name))._modules and isinstance(
        module, (nn.Sequential, nn.ModuleList)
    ):
        name += f".{list(module._modules)[-1]}"
    return name if candidate.before or name != path else None


def _previous(model: nn.Module, path: str) -> str:
    """Return the path of the sibling before this module; for a first child, its parent's."""
    parent, _, name = path.rpartition(".")
    children = list(model.get_submodule(parent)._modules)
    if name == children[0]:
        return _previous(model, parent)
    return ".".join(filter(None, (parent, children[children.index(name) - 1])))


def _check_labels(y: Any, x: Any) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(
            f"ManifoldMixup: y must be a Tensor of labels in training mode, got {type(y).__name__}"
        )
    batch = x.shape[:1] if isinstance(x, Tensor) else y.shape[:1]
    if y.ndim == 0 or y.shape[:1] != batch:
        expected = f"({batch[0] if batch else 'B'}, ...)"
        raise ValueError(
            f"ManifoldMixup: y must have shape {expected}, labels of each sample of x, got "
            f"{tuple(y.shape)}"
        )


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply the function to every tensor in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: _map(function, getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.init
        }
        return dataclasses.replace(value, **fields)
    if isinstance(value, (tuple, list)):
        items = [_map(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        result: Any = copy.copy(value)
        for key, item in value.items():
            result[key] = _map(function, item)
        return result
    return value


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of ({', '.join(map(_describe, value))})"
    return type(value).__name__


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
