r"""Fine-tune a pruned torchvision classifier on ImageNet, or another folder of images.

    python examples/finetune.py resnet50 --weights DEFAULT --macs 0.5 --data-dir imagenet \
        --out runs/half
    torchrun --nproc-per-node 8 examples/finetune.py resnet50 --weights DEFAULT --macs 0.5 \
        --data-dir imagenet --out runs/half --distill 0.5 --ema 0.9999 --amp bf16
    torchrun --nproc-per-node 8 examples/finetune.py vit_b_16 --weights DEFAULT --params 0.6 \
        --data-dir imagenet --out runs/vit --parallel fsdp --clip 1 --accumulate 4 \
        --augment trivial
    # a folder that fxprune prune -o wrote
    python examples/finetune.py resnet50 --saved pruned/ --data-dir imagenet --out runs/own
    python examples/finetune.py resnet50 --weights DEFAULT --macs 0.5 --data-dir imagenet \
        --out runs/half --resume

DATA_DIR/train and DATA_DIR/val hold one folder per class. If the weights are for another number of
classes, the classifier is created anew. Such a dense model must be fine-tuned before it can be a
teacher: ``--channels 1.0`` keeps all channels, and the result in OUT/pruned/model.safetensors is
the ``--checkpoint`` of the next run.

The recipe: SGD with Nesterov momentum; a linear warm-up followed by half a cosine, step by step;
cross-entropy with smoothed labels; no weight decay on vectors, which are biases and the scales and
shifts of normalisations. With ``--distill ALPHA`` the loss is (1 - ALPHA) times that plus ALPHA
times T^2 KL(dense || pruned) of the outputs softened by ``--temperature`` T (Hinton et al., 2015).
With ``--ema DECAY`` a moving average of weights and buffers is validated and saved.

Under torchrun the first process prunes and the others replay its plan. Before the first step, a
check makes sure that all of them hold the same weights. ``--parallel ddp`` copies the model to
each process. ``fsdp`` shards parameters, gradients and the state of the optimizer between steps
(for the model as a whole, so that a step sees all of its parameters at once). Each process keeps
running statistics of its own images; they are averaged over the processes after each epoch. Every
image of the validation part counts once, whatever the number of processes, in single precision.

OUT receives ``last.pt`` after every epoch, whole or not at all, ``metrics.json``, and at the end
``pruned/``, for fxprune.load. ``--resume`` continues after the last complete epoch as if the run
had not been interrupted; on CPUs the result is the same to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import inspect
import json
import math
import os
import platform
import random
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import fxprune
from fxprune.criteria import CRITERIA
from fxprune.training import soft_target_loss

AUGMENTATIONS: dict[str, Callable[[], nn.Module] | None] = {
    "none": None,
    "rand": v2.RandAugment,
    "trivial": v2.TrivialAugmentWide,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# mean and deviation of ImageNet, which torchvision's weights expect
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUXILIARY = 0.3  # weight of the losses of auxiliary classifiers, as in the GoogLeNet paper
FREE = {
    "data_dir",
    "out",
    "workers",
    "resume",
    "stop_after_epoch",
    "print_every",
    "checkpoint",
    "saved",
}
"""Options that may differ when a run is resumed: paths, and what does not change any figure."""

Figures = dict[str, float]
Record = dict[str, Any]


class Refusal(Exception):  # noqa: N818 - it is shown as an error of the command line
    """A request that cannot be met; the text says how to fix it."""


# --------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class World:
    """This process among the processes of the run; the only one if torchrun did not start it."""

    rank: int
    size: int
    device: torch.device
    launched: bool

    @property
    def first(self) -> bool:
        """Whether this is the process that prunes, prints and writes."""
        return self.rank == 0

    def sums(self, *values: Tensor | float) -> list[float]:
        """Return the sums of numbers over the processes.

        They are added in double precision, so counts stay exact, and every process gets the same.
        """
        total = torch.stack(
            [torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in values]
        )
        if self.launched:
            distributed.all_reduce(total)
        return total.tolist()

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace floating-point tensors by their means over the processes."""
        for tensor in tensors if self.size > 1 else ():
            if tensor.is_floating_point():
                distributed.all_reduce(tensor)
                tensor /= self.size

    def gathered(self, value: Any) -> list[Any]:
        """Return the values of all processes, in their order."""
        found = [value] * self.size
        if self.launched:
            distributed.all_gather_object(found, value)
        return found

    def from_first(self, value: Any) -> Any:
        """Return the value of the first process."""
        box = [value]
        if self.launched:
            distributed.broadcast_object_list(box)
        return box[0]


@contextlib.contextmanager
def joined(options: argparse.Namespace) -> Iterator[World]:
    """Join the process group if torchrun started this process, and leave it at the end."""
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    device = torch.device(options.device)
    if not launched:
        yield World(0, 1, device, launched)
        return
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise Refusal(
                f"process {local} finds no GPU of its own: start as many as there are GPUs, or "
                "pass --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(distributed.get_rank(), distributed.get_world_size(), device, launched)
    finally:
        distributed.destroy_process_group()


def digest(model: nn.Module) -> str:
    """Return the SHA-256 of the names and bytes of a module's state."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def check_alike(world: World, pruned: fxprune.Pruned) -> None:
    """Check that every process holds the same plan and the same weights.

    From here on each process trains its own copy.
    """
    found = world.gathered(
        hashlib.sha256(f"{pruned.plan.to_json()} {digest(pruned.model)}".encode()).hexdigest()
    )
    if len(set(found)) > 1:
        raise Refusal(
            "the processes do not hold the same pruned model: give all of them the same files "
            "and versions"
        )


# -------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """The data that this process reads.

    The first ``own`` images of ``validation`` are its share; the rest fill up the last batch.
    """

    classes: int
    train: DataLoader
    validation: DataLoader
    own: int


def training_transform(size: int, augment: str) -> v2.Compose:
    """Return a transform that crops, mirrors, augments and normalises."""
    more = AUGMENTATIONS[augment]
    steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *([more()] if more else [])]
    return v2.Compose([*steps, *_normalised()])


def validation_transform(size: int, resize: int) -> v2.Compose:
    """Return a transform that resizes the shorter side, crops the centre and normalises."""
    return v2.Compose([v2.Resize(resize), v2.CenterCrop(size), *_normalised()])


def _normalised() -> list[nn.Module]:
    return [
        v2.PILToTensor(),
        v2.ToDtype(torch.get_default_dtype(), scale=True),
        v2.Normalize(MEAN, DEVIATION),
    ]


def load_data(options: argparse.Namespace, world: World) -> Data:
    """Read both folders and give each process its share of them."""
    train = _folder(
        options.data_dir, "train", training_transform(options.image_size, options.augment)
    )
    validation = _folder(
        options.data_dir, "val", validation_transform(options.image_size, options.resize)
    )
    if train.classes != validation.classes:
        odd = ", ".join(sorted(set(train.classes) ^ set(validation.classes))[:3])
        raise Refusal(
            "--data-dir: train and val must have the same folders of classes; only one of them "
            f"has {odd}"
        )
    shares = {"num_replicas": world.size, "rank": world.rank}
    loading: dict[str, Any] = {
        "num_workers": options.workers,
        "pin_memory": world.device.type == "cuda",
    }
    sampler: DistributedSampler = DistributedSampler(
        train, shuffle=True, seed=options.seed, **shares
    )
    loader: DataLoader = DataLoader(
        train, options.batch_size, sampler=sampler, drop_last=True, **loading
    )
    if not len(loader):
        raise Refusal(
            f"--batch-size {options.batch_size}: each process has only {len(sampler)} training "
            "images: choose less"
        )
    ordered: DistributedSampler = DistributedSampler(validation, shuffle=False, **shares)
    # The sampler gives each process the same number: a process that would have one image less gets
    # an image of another process as its last one.
    own = len(range(world.rank, len(validation), world.size))
    return Data(
        len(train.classes),
        loader,
        DataLoader(validation, options.batch_size, sampler=ordered, **loading),
        own,
    )


def _folder(data_dir: Path, part: str, transform: v2.Compose) -> ImageFolder:
    try:
        return ImageFolder(str(data_dir / part), transform)
    except OSError as error:
        raise Refusal(
            f"--data-dir: {part} must hold one folder of images per class: {error}"
        ) from error


# ------------------------------------------------------------------------------------------ models


def build(name: str, **arguments: Any) -> nn.Module:
    """Return a torchvision model.

    For two models torchvision warns that their default random weights will change; that warning is
    suppressed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The default weight initialization", category=FutureWarning
        )
        return torchvision.models.get_model(name, **{"weights": None, **arguments})


def dense_model(options: argparse.Namespace, classes: int) -> tuple[nn.Module, bool]:
    """Return the model to prune, in eval mode, and whether it is trained for these classes.

    It is not if it has random weights or if its classifier had to be replaced.
    """
    torch.manual_seed(options.seed)  # the same in every process
    fresh = build(options.model, num_classes=classes)
    if options.weights:
        trained = _with_weights(options.model, options.weights)
    elif options.checkpoint:
        state = _read_checkpoint(options.checkpoint)
        count = _class_count(options.model, fresh, classes, state)
        trained = fresh if count == classes else build(options.model, num_classes=count)
        _load_checkpoint(trained, state, options.checkpoint)
    else:
        return fresh.eval(), False
    replaced = [
        name
        for name, module in trained.named_modules()
        if _shapes(module) != _shapes(fresh.get_submodule(name))
    ]
    for name in replaced:
        trained.set_submodule(name, fresh.get_submodule(name))
    return trained.eval(), not replaced


def _with_weights(name: str, weights: str) -> nn.Module:
    try:
        return build(name, weights=weights)
    except OSError as error:
        raise Refusal(
            f"--weights {weights} cannot be downloaded ({error}): pass a file with --checkpoint"
        ) from error


def _shapes(module: nn.Module) -> list[torch.Size]:
    return [
        tensor.shape
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]


def _class_count(name: str, fresh: nn.Module, classes: int, state: Mapping[str, Tensor]) -> int:
    """Return the number of classes of a state dict.

    The tensors whose size is the number of classes are found by changing that number by one.
    """
    sizes = {key: tensor.shape for key, tensor in fresh.state_dict().items()}
    differing = [key for key in sizes if key in state and state[key].shape != sizes[key]]
    if not differing:
        return classes
    other = build(name, num_classes=classes + 1).state_dict()
    return next((len(state[key]) for key in differing if other[key].shape != sizes[key]), classes)


def _read_checkpoint(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        # training scripts wrap it with an epoch and an optimizer
        state = state.get("state_dict", state.get("model", state))
        if not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise TypeError("it holds other things than tensors")
        return state
    except Exception as error:  # pickle, safetensors and the system each raise their own
        raise Refusal(
            f"--checkpoint {path} cannot be read as a state dict (.pt or .safetensors): {error}"
        ) from error


def _load_checkpoint(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise Refusal(f"--checkpoint {path} does not fit the model: {error}") from error


def prune_alike(options: argparse.Namespace, dense: nn.Module, world: World) -> fxprune.Pruned:
    """Return the same pruned model in every process.

    It is read from a folder, or the first process prunes and the others replay its plan.
    """
    if options.saved:
        try:
            return fxprune.load(options.saved, lambda: dense)
        except fxprune.PlanError as error:
            raise Refusal(
                f"--saved {options.saved} cannot be used: {error} The model is built for the "
                "number of classes of the data; for another one, prune here, with --macs, "
                "--params or --channels"
            ) from error
    pruned, sent = None, ("", "")
    if world.first:
        try:
            pruned = _prune(options, dense)
            sent = pruned.plan.to_json(), ""
        except fxprune.FxpruneError as error:
            sent = "", str(error)
    text, refused = world.from_first(sent)
    if refused:  # every process stops here, so none waits for the first
        raise Refusal(refused)
    return pruned or fxprune.apply(fxprune.Plan.from_json(text), dense)


def _prune(options: argparse.Namespace, dense: nn.Module) -> fxprune.Pruned:
    image = torch.zeros(1, 3, options.image_size, options.image_size)
    budgets = {name: getattr(options, name) for name in ("channels", "macs", "params")}
    return fxprune.prune(
        dense, image, criterion=options.criterion, round_to=options.round_to, **budgets
    )


# ---------------------------------------------------------------------------------------- training


@dataclass
class Run:
    """Everything that a step needs.

    ``model`` is the one that is called: ``plain`` itself, or a wrapper that distributes it.
    """

    options: argparse.Namespace
    world: World
    data: Data
    dense: nn.Module
    pruned: fxprune.Pruned
    teacher: nn.Module | None
    plain: nn.Module
    model: nn.Module
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    taught_by: str
    metrics: Record = field(default_factory=dict)

    @property
    def epochs(self) -> list[Record]:
        """The figures of the epochs that are done."""
        return self.metrics["epochs"]

    @property
    def judged(self) -> nn.Module:
        """The model that is validated and saved.

        It is not DDP's wrapper, which would wait for the other processes at every batch.
        """
        return self.ema.module if self.ema else self.plain


def prepare(
    options: argparse.Namespace, world: World, data: Data, dense: nn.Module, pruned: fxprune.Pruned
) -> Run:
    """Distribute the model, and create everything that trains it."""
    # FSDP2 only takes contiguous parameters. A convolution follows the layout of its images
    # anyway.
    layout = torch.contiguous_format if options.parallel == "fsdp" else options.layout
    plain = pruned.model.to(world.device, memory_format=layout)
    ema = (
        AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=True)
        if options.ema
        else None
    )
    model = distribute(plain, options, world, bool(pruned.report.untouched))
    optimizer = torch.optim.SGD(
        parameter_groups(plain, options.decay),
        lr=options.rate,
        momentum=options.momentum,
        nesterov=options.momentum > 0,
    )
    each = -(-len(data.train) // options.accumulate)
    warm, total = round(options.warmup * each), options.epochs * each
    schedule = LambdaLR(optimizer, lambda step: share_of_rate(step, warm, total))
    scaler = torch.amp.GradScaler(world.device.type, enabled=options.amp == "fp16")
    dense = dense.to(world.device, memory_format=options.layout).requires_grad_(False)
    teacher, taught_by = (dense, digest(dense)) if options.distill else (None, "")
    return Run(
        options,
        world,
        data,
        dense,
        pruned,
        teacher,
        plain,
        model,
        ema,
        optimizer,
        schedule,
        scaler,
        taught_by,
    )


def distribute(
    plain: nn.Module, options: argparse.Namespace, world: World, unused: bool
) -> nn.Module:
    """Return the model in the form in which training calls it; FSDP2 changes it in place."""
    if not world.launched:
        return plain
    if options.parallel == "fsdp":
        mesh = distributed.init_device_mesh(world.device.type, (world.size,))
        return fully_shard(plain, mesh=mesh)
    # Statistics are averaged after each epoch. If those of the first process were sent before
    # every step, those of the others would be lost.
    known = inspect.signature(DistributedDataParallel).parameters
    # the second name is that of older versions of PyTorch
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(
        plain, gradient_as_bucket_view=True, find_unused_parameters=unused, **{sync: False}
    )


def parameter_groups(model: nn.Module, decay: float) -> list[Record]:
    """Return parameter groups in which weights decay and vectors do not.

    Vectors are biases, and the scales and shifts of normalisations.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def share_of_rate(step: int, warm: int, total: int) -> float:
    """Return the factor of the learning rate at a step.

    It rises linearly over ``warm`` steps, is 1 at the next step, and then falls along half a
    cosine to nearly 0.
    """
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def _at_least_single(outputs: Tensor) -> Tensor:
    """Return outputs in single precision, or in double precision if the model has it."""
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a network's output: logits first, then those of auxiliary heads."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def objective(run: Run, images: Tensor, labels: Tensor) -> Tensor:
    """Return the loss that a step lowers.

    The networks run in mixed precision, the losses in at least single precision.
    """
    options = run.options
    with torch.autocast(
        run.world.device.type, DTYPES.get(options.amp), enabled=options.amp != "none"
    ):
        outputs = tensors(run.model(images))
        with torch.no_grad():
            taught = tensors(run.teacher(images))[0] if run.teacher else None
    main, *auxiliary = (
        F.cross_entropy(_at_least_single(output), labels, label_smoothing=options.smoothing)
        for output in outputs
    )
    loss = main + AUXILIARY * sum(auxiliary)
    if taught is None:
        return loss
    soft = soft_target_loss(outputs[0], taught, options.temperature, dim=1)
    return (1 - options.distill) * loss + options.distill * soft


def train_epoch(run: Run, epoch: int) -> float:
    """Train on the whole training part once; return the mean loss over all processes."""
    loader, accumulate = run.data.train, run.options.accumulate
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # a DistributedSampler has it
    run.model.train()
    total = torch.zeros((), dtype=torch.float64, device=run.world.device)
    for number, (images, labels) in enumerate(loader):
        # the last group may be smaller
        group = min(accumulate, len(loader) - number // accumulate * accumulate)
        last = number % accumulate == group - 1
        with sending_gradients(run, last):
            loss = objective(run, *to_device(run, images, labels))
            run.scaler.scale(loss / group).backward()
        total += loss.detach()
        if last:
            step(run)
        if (
            run.world.first
            and run.options.print_every
            and (number + 1) % run.options.print_every == 0
        ):
            print(
                f"  batch {number + 1} of {len(loader)}: loss {loss.item():.4f}",
                file=sys.stderr,
                flush=True,
            )
    added, batches = run.world.sums(total, len(loader))
    return added / batches


def to_device(run: Run, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Move a batch to the device, in the memory layout of the networks."""
    device = run.world.device
    return images.to(device, non_blocking=True, memory_format=run.options.layout), labels.to(
        device, non_blocking=True
    )


@contextlib.contextmanager
def sending_gradients(run: Run, now: bool) -> Iterator[None]:
    """Keep gradients in their process until the last batch of a step."""
    if run.world.launched and run.options.parallel == "fsdp":
        run.model.set_requires_gradient_sync(now)  # type: ignore[operator]  # a method of FSDP2's modules
    with (
        run.model.no_sync()
        if isinstance(run.model, DistributedDataParallel) and not now
        else contextlib.nullcontext()
    ):
        yield


def step(run: Run) -> None:
    """Update the weights, the learning rate and the moving average once."""
    if run.options.clip:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.plain.parameters(), run.options.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    run.schedule.step()
    if run.ema:
        run.ema.update_parameters(run.plain)


@torch.no_grad()
def evaluate(run: Run, model: nn.Module) -> Figures:
    """Return top-1 and top-5 in percent over the validation part, each image counted once."""
    model.eval()
    left, several = run.data.own, min(5, run.data.classes)
    first, among, seen = 0, 0, 0
    for images, labels in run.data.validation:
        images, labels = to_device(run, images, labels)
        # the images that fill up the last batch belong to another process
        logits = tensors(model(images))[0][:left]
        ranked = logits.topk(several, dim=1).indices == labels[:left, None]
        first, among, seen = first + ranked[:, 0].sum(), among + ranked.sum(), seen + len(logits)
        left -= len(logits)
    # without this, FSDP2 would keep the whole parameters, and not notice that a resumed run
    # replaces them
    if hasattr(model, "reshard"):
        model.reshard()
    right, near, images = run.world.sums(first, among, seen)
    return {"top1": 100 * right / images, "top5": 100 * near / images, "images": int(images)}


# --------------------------------------------------------------------------------------- the state


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a new file beside the old one, sync it to disk, and then replace the old one.

    A reader finds either the old or the new file.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        write(new)
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def model_state(run: Run) -> dict[str, Tensor]:
    """Return the whole state of the model that is trained.

    With FSDP2 all processes take part, and only the first one gets it.
    """
    if run.options.parallel == "fsdp" and run.world.launched:
        return sharded.get_model_state_dict(run.plain, options=_gathering())
    return run.plain.state_dict()


def optimizer_state(run: Run) -> dict[str, Any]:
    """Return the whole state of the optimizer, as :func:`model_state` does for the model."""
    if run.options.parallel == "fsdp" and run.world.launched:
        return sharded.get_optimizer_state_dict(run.plain, run.optimizer, options=_gathering())
    return run.optimizer.state_dict()


def _gathering() -> sharded.StateDictOptions:
    return sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)


def random_state(world: World) -> Record:
    """Return the states of this process's random generators.

    Images, dropout and the order of the data draw from them.
    """
    cuda = torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate()}


def save_last(run: Run) -> None:
    """Write ``last.pt``: everything that the next epoch depends on.

    It holds tensors and plain data only, so that reading it runs no code.
    """
    state = {
        "options": fixed_options(run.options),
        "processes": run.world.size,
        "dense": run.taught_by,
        "plan": run.pruned.plan.to_json(),
        "report": json.dumps(run.pruned.report.to_dict()),
        "metrics": json.dumps(run.metrics),
        "epoch": len(run.epochs),
        "model": model_state(run),
        "ema": run.ema.state_dict() if run.ema else {},
        "optimizer": optimizer_state(run),
        "schedule": run.schedule.state_dict(),
        "scaler": run.scaler.state_dict(),
        "random": run.world.gathered(random_state(run.world)),
    }
    if run.world.first:
        write_atomically(run.options.out / "last.pt", lambda path: torch.save(state, path))


def fixed_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that a resumed run must share."""
    plain = (bool, int, float, str, type(None))
    return {
        name: value
        for name, value in sorted(vars(options).items())
        if name not in FREE and isinstance(value, plain)
    }


def read_last(options: argparse.Namespace, world: World) -> Record:
    """Read ``last.pt``, and refuse it if another command wrote it."""
    path = options.out / "last.pt"
    try:
        last = torch.load(path, map_location="cpu", weights_only=True)
        before, now = last["options"], fixed_options(options)
        different = [name for name in now if before.get(name) != now[name]]
    except Exception as error:  # torch, pickle and the system each raise their own
        raise Refusal(
            f"--resume: {path} cannot be read: {error}. Start again in another --out"
        ) from error
    if different:
        name = different[0]
        option = name if name == "model" else f"--{name.replace('_', '-')}"
        change = f"{option} was {before.get(name)} and is {now[name]}"
        raise Refusal(f"--resume: {change}: repeat the first command, or name another --out")
    if last["processes"] != world.size:
        raise Refusal(
            f"--resume: {last['processes']} processes were running and {world.size} are: start "
            "as many as before"
        )
    return last


def pruned_before(last: Record, dense: nn.Module) -> fxprune.Pruned:
    """Return the pruned model of the run to resume, without its weights.

    The dense model must also be the same as in that run.
    """
    if last["dense"] not in ("", digest(dense)):
        raise Refusal(
            "--resume: the dense model has other weights than before: give the same --weights or "
            "--checkpoint"
        )
    report = fxprune.Report.from_dict(json.loads(last["report"]))
    return replace(fxprune.apply(fxprune.Plan.from_json(last["plan"]), dense), report=report)


def restore(run: Run, last: Record) -> None:
    """Restore the state after the last complete epoch."""
    if run.options.parallel == "fsdp" and run.world.launched:
        whole = sharded.StateDictOptions(full_state_dict=True)
        sharded.set_model_state_dict(run.plain, last["model"], options=whole)
        sharded.set_optimizer_state_dict(
            run.plain, run.optimizer, last["optimizer"], options=whole
        )
    else:
        run.plain.load_state_dict(last["model"])
        run.optimizer.load_state_dict(last["optimizer"])
    if run.ema:
        run.ema.load_state_dict(last["ema"])
    run.schedule.load_state_dict(last["schedule"])
    run.scaler.load_state_dict(last["scaler"])
    own = last["random"][run.world.rank]
    torch.set_rng_state(own["torch"])
    if own["cuda"] is not None:
        torch.cuda.set_rng_state(own["cuda"], run.world.device)
    random.setstate(own["python"])
    run.metrics = {**run.metrics, **json.loads(last["metrics"]), "command": run.metrics["command"]}


def save_pruned(run: Run) -> None:
    """Write the final weights, or their moving average if there is one, for ``fxprune.load``."""
    state = run.judged.state_dict() if run.ema else model_state(run)
    if run.world.first:
        result = fxprune.apply(run.pruned.plan, run.dense)
        result.model.load_state_dict(state)
        replace(result, report=run.pruned.report).save(run.options.out / "pruned")


def save_metrics(run: Run) -> None:
    """Write ``metrics.json``."""
    if run.world.first:
        text = json.dumps(run.metrics, indent=1) + "\n"
        write_atomically(
            run.options.out / "metrics.json", lambda path: path.write_text(text, encoding="utf-8")
        )


# ------------------------------------------------------------------------------------ command line


def parser() -> argparse.ArgumentParser:
    """Return the parser with all options."""
    made = argparse.ArgumentParser(
        prog="finetune.py",
        # torchrun shows it once per process
        usage="finetune.py MODEL --data-dir FOLDER --out FOLDER [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("model", metavar="MODEL", help="name of a torchvision classifier")
    add(
        "--data-dir",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="holds train and val, with one folder per class in each",
    )
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="for last.pt, metrics.json and pruned/; created if missing",
    )
    add("--resume", action="store_true", help="continue after the last complete epoch in --out")
    add(
        "--stop-after-epoch",
        type=_count,
        metavar="N",
        help="stop after epoch N, for --resume; the schedule still covers --epochs",
    )
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of new layers, the order of images and their crops; default: 0",
    )
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda (nccl) or cpu (gloo)",
    )
    add(
        "--parallel",
        choices=("ddp", "fsdp"),
        default="ddp",
        help="how torchrun's processes share the model; default: ddp",
    )
    add(
        "--workers",
        type=_whole,
        default=_cores(),
        metavar="N",
        help="processes that read images for each training process",
    )
    add(
        "--print-every",
        type=_whole,
        default=100,
        metavar="N",
        help="print the loss to stderr every N batches; 0 for never",
    )
    _add_pruning(made.add_argument_group("pruning").add_argument)
    _add_training(made.add_argument_group("training").add_argument)
    _add_images(made.add_argument_group("images").add_argument)
    return made


def _add_pruning(add: Callable[..., object]) -> None:
    add(
        "--weights",
        metavar="NAME",
        help="weights of torchvision, such as DEFAULT (downloads them)",
    )
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a state dict: .safetensors, or .pt, which is read without running code",
    )
    for name, what in (
        ("macs", "multiply-accumulates"),
        ("params", "parameters"),
        ("channels", "units of every group"),
    ):
        add(
            f"--{name}",
            type=_share,
            metavar="SHARE",
            help=f"share of the {what} to keep; all given budgets must hold",
        )
    add(
        "--criterion",
        choices=sorted(CRITERIA),
        default="cpmc",
        help="measure of a unit's importance; default: cpmc",
    )
    add(
        "--round-to",
        type=_count,
        default=1,
        metavar="N",
        help="keep a multiple of N units in each group; default: 1",
    )
    add(
        "--saved",
        type=Path,
        metavar="FOLDER",
        help="read an earlier result, pruned from MODEL, instead",
    )


def _add_training(add: Callable[..., object]) -> None:
    add("--epochs", type=_count, default=30, help="epochs of training; default: 30")
    add(
        "--batch-size",
        type=_count,
        default=64,
        metavar="N",
        help="images per process and batch; default: 64",
    )
    add("--accumulate", type=_count, default=1, metavar="N", help="batches per step; default: 1")
    add(
        "--rate",
        type=_positive,
        default=0.02,
        help="highest learning rate of a step; default: 0.02",
    )
    add(
        "--warmup",
        type=_at_least_0,
        default=1.0,
        metavar="EPOCHS",
        help="epochs until --rate is reached, may be a fraction; default: 1",
    )
    add("--momentum", type=_at_least_0, default=0.9, help="momentum of SGD; default: 0.9")
    add(
        "--decay",
        type=_at_least_0,
        default=1e-4,
        help="weight decay, except on biases and normalisations; default: 1e-4",
    )
    add("--smoothing", type=_at_least_0, default=0.1, help="label smoothing; default: 0.1")
    add("--clip", type=_positive, metavar="NORM", help="clip the gradient of a step to this norm")
    add(
        "--distill",
        type=_share,
        metavar="ALPHA",
        help="share of the distillation from the dense model in the loss",
    )
    add(
        "--temperature",
        type=_positive,
        default=2.0,
        metavar="T",
        help="temperature of distillation; default: 2",
    )
    add(
        "--ema",
        type=_share,
        metavar="DECAY",
        help="average the weights over about 1 / (1 - DECAY) steps",
    )
    add(
        "--amp",
        choices=("bf16", "fp16", "none"),
        default="none",
        help="mixed precision; fp16 also scales the loss; default: none",
    )


def _add_images(add: Callable[..., object]) -> None:
    add(
        "--image-size",
        type=_count,
        default=224,
        metavar="PIXELS",
        help="height and width of images; default: 224",
    )
    add(
        "--resize",
        type=_count,
        metavar="PIXELS",
        help="shorter side of validation images before their crop; default: 8/7 of --image-size",
    )
    add(
        "--augment",
        choices=sorted(AUGMENTATIONS),
        default="none",
        help="RandAugment or TrivialAugment after the crop; default: none",
    )
    add(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="memory layout of images and weights; default: channels last",
    )


def _number(text: str, fits: Callable[[float], bool], what: str, kind: type = float) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not math.isfinite(value) or not fits(value):
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return value


def _whole(text: str) -> int:
    return _number(text, lambda value: value >= 0, "a whole number from 0 on", int)


def _count(text: str) -> int:
    return _number(text, lambda value: value >= 1, "a whole number from 1 on", int)


def _share(text: str) -> float:
    return _number(text, lambda value: 0 < value <= 1, "a share above 0 and up to 1")


def _positive(text: str) -> float:
    return _number(text, lambda value: value > 0, "a number above 0")


def _at_least_0(text: str) -> float:
    return _number(text, lambda value: value >= 0, "a number from 0 on")


def _cores() -> int:
    """Return the number of data readers per process: its share of the cores, at most 8."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def check(options: argparse.Namespace) -> None:
    """Refuse impossible options, and set those that follow from others.

    Nothing is read yet except names.
    """
    known = torchvision.models.list_models(module=torchvision.models)
    if options.model not in known:
        near = (
            " or ".join(difflib.get_close_matches(options.model, known))
            or "resnet50, for instance"
        )
        raise Refusal(f"no torchvision classifier is named {options.model}: try {near}")
    _check_sources(options)
    if options.distill and not (options.weights or options.checkpoint):
        raise Refusal(
            "--distill: a dense model with random weights teaches nothing: give it some with "
            "--weights or --checkpoint"
        )
    if options.ema == 1:
        raise Refusal("--ema 1 would never leave the first weights: choose less, as 0.999")
    if options.ema and options.parallel == "fsdp":
        raise Refusal(
            "--ema needs whole parameters, which --parallel fsdp shards: leave one of them out"
        )
    if options.parallel == "fsdp" and "RANK" not in os.environ:
        raise Refusal(
            "--parallel fsdp needs processes: start with torchrun --nproc-per-node N, or leave "
            "it out"
        )
    if options.smoothing >= 1:
        raise Refusal(
            f"--smoothing {options.smoothing} leaves nothing of the labels: choose less than 1, "
            "as 0.1"
        )
    if options.device.partition(":")[0] not in ("cpu", "cuda"):
        raise Refusal(f"--device {options.device}: choose cuda or cpu")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise Refusal("--device cuda: there is no GPU that PyTorch can use: pass --device cpu")
    _check_out(options)
    options.resize = options.resize or -(-options.image_size * 8 // 7)
    options.layout = torch.channels_last if options.channels_last else torch.contiguous_format


def _check_sources(options: argparse.Namespace) -> None:
    """Check the options that say what is pruned and with which weights."""
    budgets = [f"--{name}" for name in ("macs", "params", "channels") if getattr(options, name)]
    if not options.saved and not budgets:
        raise Refusal(
            "nothing says how much to prune: give --macs, --params or --channels, or an earlier "
            "result with --saved"
        )
    if options.saved and budgets:
        raise Refusal(f"--saved is pruned already: leave out {' and '.join(budgets)}")
    if options.weights and options.checkpoint:
        raise Refusal(
            "--weights and --checkpoint both give weights to the dense model: choose one"
        )
    names = [*torchvision.models.get_model_weights(options.model).__members__]
    if options.weights and options.weights not in names:
        raise Refusal(
            f"{options.model} has no weights named {options.weights}: choose from "
            f"{', '.join(names)}"
        )


def _check_out(options: argparse.Namespace) -> None:
    there = (options.out / "last.pt").exists()
    if options.resume and not there:
        raise Refusal(
            f"--resume: {options.out} has no last.pt yet: leave out --resume to start there"
        )
    if there and not options.resume:
        raise Refusal(
            f"{options.out} holds a run already: go on with --resume, or name another folder "
            "with --out"
        )


def command_line(arguments: Sequence[str], world: World) -> str:
    """Return the command that was given."""
    launcher = f"torchrun --nproc-per-node {world.size}" if world.launched else "python"
    return f"{launcher} examples/finetune.py {shlex.join(arguments)}"


# -------------------------------------------------------------------------------------------- main


def main(arguments: Sequence[str] | None = None) -> Record:
    """Read the command line, prune, train and write the results.

    Return the content of ``metrics.json``, in every process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    made = parser()
    options = made.parse_args(arguments)
    try:
        check(options)
        with joined(options) as world:
            run = started(options, world, arguments)
            train(run)
            return run.metrics
    except (Refusal, fxprune.FxpruneError) as error:
        made.error(str(error))


def started(options: argparse.Namespace, world: World, arguments: Sequence[str]) -> Run:
    """Return the run, ready for its first step or for the step at which it resumes."""
    if world.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    data = load_data(options, world)
    dense, knowing = dense_model(options, data.classes)
    if options.distill and not knowing:
        raise Refusal(
            f"--distill: the dense model's weights are not for these {data.classes} classes, so "
            "that it cannot teach them: fine-tune it first, with --channels 1.0, and pass its "
            "OUT/pruned/model.safetensors as --checkpoint"
        )
    if world.first and not (options.weights or options.checkpoint or options.saved):
        print(
            "note: the weights are random; --weights, --checkpoint or --saved gives trained ones",
            file=sys.stderr,
        )
    last = read_last(options, world) if options.resume else None
    pruned = pruned_before(last, dense) if last else prune_alike(options, dense, world)
    check_alike(world, pruned)
    run = prepare(options, world, data, dense, pruned)
    run.metrics = described(run, arguments)
    if last:
        restore(run, last)
        return run
    # crops and dropout differ between processes
    torch.manual_seed(1000 * (options.seed + 1) + world.rank)
    random.seed(1000 * (options.seed + 1) + world.rank)
    run.metrics["dense"] = evaluate(run, run.dense) if knowing else None
    run.metrics["pruned"] = evaluate(run, run.plain)
    if not run.teacher:
        run.dense.cpu()  # not needed again until the result is saved
    if world.first:
        print(
            f"dense: {_as_text(run.metrics['dense'])}; pruned, before training: "
            f"{_as_text(run.metrics['pruned'])}",
            flush=True,
        )
    return run


def machine(world: World) -> Record:
    """Return what the figures of a run may depend on, apart from its options."""
    device = (
        torch.cuda.get_device_name()
        if world.device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    versions = {
        package.__name__: str(package.__version__) for package in (torch, torchvision, fxprune)
    }
    return {"device": device, "threads": torch.get_num_threads(), "versions": versions}


def described(run: Run, arguments: Sequence[str]) -> Record:
    """Return what is known before the first epoch."""
    report = run.pruned.report
    return {
        "command": command_line(arguments, run.world),
        "machine": machine(run.world),
        "model": run.options.model,
        "classes": run.data.classes,
        "processes": run.world.size,
        "parallel": run.options.parallel if run.world.launched else None,
        "options": fixed_options(run.options),
        "macs": {"before": report.macs_before, "after": report.macs_after},
        "parameters": {"before": report.params_before, "after": report.params_after},
        "epochs": [],
    }


def train(run: Run) -> None:
    """Run the remaining epochs, each with a checkpoint; write the result after the last one."""
    options, world = run.options, run.world
    if world.first:
        options.out.mkdir(parents=True, exist_ok=True)
    if options.amp == "fp16":  # a step that overflows is skipped, but the schedule continues
        warnings.filterwarnings(
            "ignore", message=r"Detected call of `lr_scheduler\.step\(\)` before"
        )
    for epoch in range(
        len(run.epochs), min(options.epochs, options.stop_after_epoch or options.epochs)
    ):
        run.epochs.append(one_epoch(run, epoch))
        save_last(run)
        save_metrics(run)
    if len(run.epochs) == options.epochs:
        save_pruned(run)
        save_metrics(run)
        if world.first:
            print(
                f"written: {options.out / 'pruned'} and {options.out / 'metrics.json'}", flush=True
            )


def one_epoch(run: Run, epoch: int) -> Record:
    """Train, then validate the model that would be saved."""
    start, rate = time.perf_counter(), run.schedule.get_last_lr()[0]
    loss = train_epoch(run, epoch)
    if not math.isfinite(loss):
        raise Refusal(
            f"the loss of epoch {epoch + 1} is {loss}: start again with a lower --rate, or with "
            "--clip 1"
        )
    run.world.average([*run.plain.buffers(), *(run.ema.module.buffers() if run.ema else ())])
    figures = evaluate(run, run.judged)
    seconds = round(time.perf_counter() - start, 1)
    if run.world.first:
        print(
            f"epoch {epoch + 1} of {run.options.epochs}: loss {loss:.4f}, {_as_text(figures)}, "
            f"{seconds:.0f} s",
            flush=True,
        )
    return {"epoch": epoch + 1, "loss": loss, **figures, "rate": rate, "seconds": seconds}


def _as_text(figures: Figures | None) -> str:
    return (
        f"top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} %"
        if figures
        else "not trained on these classes"
    )


if __name__ == "__main__":
    main()
