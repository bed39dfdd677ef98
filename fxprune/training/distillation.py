"""Distillation: the pruned model learns from what the dense model gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxprune.common.compiled import uncompiled
from fxprune.common.contents import leaves_of
from fxprune.common.hooks import in_mode
from fxprune.common.numbers import check_integer, check_number
from fxprune.common.public import calling_user_code, iterate_user_input, public, short_repr
from fxprune.errors import ArgumentError, ModelError
from fxprune.inputs import ExampleInputs, as_call
from fxprune.result.plan import stored_plan
from fxprune.training.features import Capture, Features

__all__ = ["Distillation", "soft_target_loss"]


@public
def soft_target_loss(
    student: Tensor, teacher: Tensor, temperature: float = 2.0, *, dim: int = -1
) -> Tensor:
    r"""Return :math:`T^2 \, \mathrm{KL}(p_T \Vert q_T)` for the softened classes of two models.

    :math:`p_T` and :math:`q_T` are the softmax of the teacher's and of the student's logits
    divided by T.

    Parameters
    ----------
    student, teacher:
        Logits, of the same shape.
    temperature:
        T, above 0.
    dim:
        The dimension of the classes. The mean is taken over all others.

    Returns
    -------
    Tensor
        A scalar, in at least single precision.

    Raises
    ------
    ArgumentError
        If the shapes differ, ``temperature`` is not above 0, or there is no such dimension.

    Notes
    -----
    Hinton et al., "Distilling the Knowledge in a Neural Network", NIPS 2014 workshop, section 2.
    With the factor :math:`T^2`, gradients have the same size for all T.

    Examples
    --------
    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]).log()
    >>> # 0.25 log(0.25 / 0.5) + 0.75 log(0.75 / 0.5)
    >>> round(soft_target_loss(student, teacher, temperature=1).item(), 4)
    0.1308
    """
    temperature = check_number("temperature", temperature, above=0)
    if not isinstance(student, Tensor) or not isinstance(teacher, Tensor):
        kinds = f"{type(student).__name__} and {type(teacher).__name__}"
        raise ArgumentError(f"logits must be tensors, not {kinds}.")
    dim = check_integer("dim", dim, -student.dim())
    if student.shape != teacher.shape or dim >= student.dim():
        raise ArgumentError(
            f"logits of shapes {tuple(student.shape)} and {tuple(teacher.shape)} cannot be "
            f"compared along dim={dim!r}: they must have the same classes there."
        )
    dtype = torch.promote_types(student.dtype, torch.float32)
    given = F.log_softmax(student.to(dtype) / temperature, dim)
    target = F.log_softmax(teacher.to(dtype) / temperature, dim)
    divergence = F.kl_div(given, target, reduction="none", log_target=True).sum(dim)
    return temperature**2 * divergence.mean()


Select = Callable[[object], object]
"""A function from the output of a model to its logits."""


@public
class Distillation:
    r"""The loss with which a pruned model learns from the dense one.

    .. math:: \lambda \, T^2 \, \mathrm{KL}(p_T \Vert q_T)
        + \mu \, \frac{1}{|F|} \sum_{f \in F} \lVert s_f - t_f \rVert^2 / \lVert t_f \rVert^2

    The first term compares logits (:func:`soft_target_loss`). The second compares features: the
    outputs of modules that both models call under the same name. Of the dense model's features
    only the surviving channels are compared, so that no learned adapter is needed.

    Use it as a context manager. Inside, call the student once and then :meth:`loss`. The teacher
    runs in evaluation mode and without gradients. Afterwards, the modes and hooks of both models
    are as before.

    Parameters
    ----------
    teacher:
        The dense model; with ``features`` the one that was pruned, or the result of an earlier
        stage.
    student:
        The ``model`` of what :func:`fxprune.prune`, :func:`fxprune.apply` or :func:`fxprune.load`
        returned. It may be called through a wrapper such as DistributedDataParallel.
    temperature:
        T, above 0.
    logit_strength, feature_strength:
        The factors :math:`\lambda` and :math:`\mu`, at least 0.
    features:
        Names of modules whose outputs are compared. They are the modules that the graph of the
        student calls; a module that is made of others has dissolved into them.
    logits:
        A function from a model's output to its logits: a tensor, or several in a container. By
        default they are the only floating-point tensor of the output.
    dim:
        The dimension of the classes. It must be given for logits of more than two dimensions: -1
        for tokens, 1 for maps.

    Raises
    ------
    ArgumentError
        If a number is not in its range, if a feature does not survive (the message names similar
        ones), or if ``student`` is not the result of a pruning.
    ModelError
        If ``teacher`` or ``student`` is no module.
    PlanError
        If features are given and the teacher has another architecture than the pruned model had.

    Notes
    -----
    Hinton et al., "Distilling the Knowledge in a Neural Network", NIPS 2014 workshop; Romero et
    al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, eq. 3, without the regressor, and relative
    to the norm of the feature.

    Examples
    --------
    >>> import fxprune
    >>> net, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(5, 3)
    >>> pruned = fxprune.prune(net, x, channels=0.5)
    >>> with Distillation(net, pruned.model, features=["1"]) as distillation:
    ...     distillation.loss(pruned.model(x), x).backward()
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        *,
        temperature: float = 2.0,
        logit_strength: float = 1.0,
        features: Iterable[str] = (),
        feature_strength: float = 1.0,
        logits: Select | None = None,
        dim: int | None = None,
    ) -> None:
        self.teacher, self.student = _checked_models(teacher, student)
        self.temperature = check_number("temperature", temperature, above=0)
        self.logit_strength = check_number("logit_strength", logit_strength)
        self.feature_strength = check_number("feature_strength", feature_strength)
        self.logits, self.dim = logits, dim
        names = _checked_names(features)
        self._features = _features(self.teacher, self.student, names) if names else None
        self._stack = ExitStack()
        self._student = Capture(self.student, names)
        self._teacher = Capture(self.teacher, names)
        self._entered = False

    def __enter__(self) -> Distillation:
        if self._entered:
            raise ArgumentError("this Distillation is entered already: make another one.")
        with ExitStack() as stack:
            for capture in (self._student, self._teacher) if self._features else ():
                stack.enter_context(capture.watching())
            self._stack, self._entered = stack.pop_all(), True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered = False
        self._stack.close()

    @public
    def loss(self, output: object, inputs: ExampleInputs) -> Tensor:
        """Return the loss for one call of the student.

        Parameters
        ----------
        output:
            What the student has just given.
        inputs:
            What it was called with: a tensor, a tuple of positional arguments or a dict of keyword
            arguments.

        Returns
        -------
        Tensor
            A scalar through which gradients flow to the student.

        Raises
        ------
        ArgumentError
            Outside of the context; if the logits are not known, or those of the models have other
            shapes; if the features do, or the student was not called exactly once.
        CallbackError
            If the teacher or the function ``logits`` raises an error.
        """
        if not self._entered:
            raise ArgumentError(
                "the loss watches both models: call it inside `with distillation:`."
            )
        call = as_call(inputs)
        calling = calling_user_code("the teacher, given these inputs,")
        with torch.no_grad(), in_mode(self.teacher, False), calling:
            taught = self.teacher(*call.args, **call.kwargs)
        terms = []
        if self.logit_strength:
            terms.append(self.logit_strength * self._logit_loss(output, taught))
        if self._features is not None:
            terms.append(self.feature_strength * self._feature_loss(self._features))
        if not terms:
            raise ArgumentError(
                "nothing is compared: give features=, or a logit_strength above 0."
            )
        return torch.stack(terms).sum()

    def _feature_loss(self, features: Features) -> Tensor:
        """Return the distance of the features in the latest calls of both models.

        Raises
        ------
        ArgumentError
            If they cannot be those of the same inputs.
        """
        calls, with_gradients = self._student.calls, self._student.with_gradients
        given, target = self._student.take(), self._teacher.take()
        if calls > 1 or with_gradients != torch.is_grad_enabled():
            raise ArgumentError(
                f"the student was called {calls} times with gradients since the last loss: call "
                "it once, and then the loss, so that its features are those of the same inputs. "
                "Other calls belong into torch.no_grad()."
            )
        return features.distance(given, target)

    def _logit_loss(self, output: object, taught: object) -> Tensor:
        """Return the loss of the logits; the mean, if there are several."""
        pairs = zip(self._logits_of(output), self._logits_of(taught), strict=True)
        losses = [
            soft_target_loss(given, target, self.temperature, dim=self._class_dim(given))
            for given, target in pairs
        ]
        return torch.stack(losses).mean()

    def _logits_of(self, output: object) -> list[Tensor]:
        """Return the logits in an output.

        Raises
        ------
        ArgumentError
            If it is not known which tensors they are.
        """
        if self.logits is not None:
            with calling_user_code("the function logits"):
                output = self.logits(output)
        tensors = [leaf for leaf in leaves_of(output) if isinstance(leaf, Tensor)]
        found = [tensor for tensor in tensors if tensor.is_floating_point()]
        if not found or (len(found) > 1 and self.logits is None):
            raise ArgumentError(
                f"the output has {len(found)} floating-point tensors, so it is not known which "
                "are the logits: give logits=, a function such as lambda output: output.logits."
            )
        return found

    def _class_dim(self, logits: Tensor) -> int:
        """Return the dimension of the classes.

        Raises
        ------
        ArgumentError
            If it is not known.
        """
        if self.dim is None and logits.dim() > 2:
            raise ArgumentError(
                f"the logits have shape {tuple(logits.shape)}, so it is not known which dimension "
                "holds the classes: give dim=-1 for tokens or dim=1 for maps."
            )
        return -1 if self.dim is None else self.dim


def _checked_models(teacher: object, student: object) -> tuple[nn.Module, nn.Module]:
    """Return both models, or raise an error if one is no module or both are the same."""
    for name, model in (("teacher", teacher), ("student", student)):
        if not isinstance(model, nn.Module):
            hint = (
                " Give its .model." if isinstance(getattr(model, "model", None), nn.Module) else ""
            )
            raise ModelError(f"{name} is a {type(model).__name__}, no torch.nn.Module.{hint}")
    if teacher is student:
        raise ArgumentError("teacher and student are the same model, which cannot teach itself.")
    return uncompiled(teacher), uncompiled(student)


def _checked_names(features: object) -> tuple[str, ...]:
    """Return names of modules as a tuple."""
    if isinstance(features, str):
        return (features,)
    if not isinstance(features, Iterable):
        raise ArgumentError(f"features={short_repr(features)}: give a list of names of modules.")
    found = tuple(iterate_user_input(features, "features"))
    for name in found:
        if not isinstance(name, str):
            raise ArgumentError(f"features: {short_repr(name)} is no name of a module.")
    return tuple(dict.fromkeys(found))


def _features(teacher: nn.Module, student: nn.Module, names: tuple[str, ...]) -> Features:
    """Return the features of these names, by the plan that made the student."""
    plan = stored_plan(student)
    if plan is None:
        raise ArgumentError(
            "features need a student with its plan: give the model that fxprune.prune, apply or "
            "load returned, with the shapes that it had."
        )
    return Features(teacher, plan, names)
