"""One pretraining from a config to its run folder: checkpoints per epoch, log, result row.

Shapes: N training images, B images a step over all ranks, S side in pixels, K classes.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core import dist
from core.config import save_config, to_dict
from core.errors import InputError
from core.identity import check_version, data_digest, protocol_name, recipe_hash
from core.results import ROWS_FILE, ResultRow, append_rows, code_version, sha256_of
from data.datasets import (
    IndexedDataset,
    evaluation_loader,
    normalise,
    open_dataset,
    places_of,
    report_split,
    to_device,
)
from models import amp, checkpoint, factory
from models.base import Network
from pretrain.folder import (
    CONFIG,
    begin,
    check_resumable,
    checkpoint_path,
    is_recorded,
    prepare_folder,
)
from pretrain.objectives import CTC, CrossEntropy
from pretrain.recipe import (
    PretrainConfig,
    changed_from_shipped,
    check_read,
    identifying,
    recipe_of,
)
from training import loop
from training.loop import Hooks, Objective
from training.resume import Position

METHODS = ("random", "ce", "ctc")
LARGEST_SEED = (1 << 32) - 1


@dist.naming_lost_ranks()
def pretrain(config: PretrainConfig, folder: Path, resume_run: bool = False) -> Path:
    """Train into a run folder and return the path of the last checkpoint.

    Raises:
        InputError: a recipe, data set or folder that does not fit; nothing has been written then.
        LostRank: another process has died, or did not answer for ``loop.timeout`` seconds.
    """
    device = dist.init(config.loop.device, config.loop.timeout)
    has_state = dist.from_main(lambda: prepare_folder(folder, config, resume_run))
    dataset, held_out, objective = make_ready(config)
    with dist.locked(folder):
        dist.from_main(lambda: begin(folder, config, resume_run, has_state))
        return train(config, folder, device, dataset, held_out, objective, has_state)


def train(
    config: PretrainConfig,
    folder: Path,
    device: torch.device,
    dataset: IndexedDataset,
    held_out: IndexedDataset,
    objective: Objective,
    has_state: bool,
) -> Path:
    """Train in a locked folder and record the result; return the last checkpoint's path."""
    last = sum(stage.epochs for stage in objective.stages())
    if dist.is_main():
        print(describe(config, dataset, last, device), flush=True)
    path = checkpoint_path(folder, last)
    model: Any = objective.model

    def save_weights(epoch: int) -> None:
        facts = facts_of(config, dataset, epoch)
        checkpoint.save_checkpoint(checkpoint_path(folder, epoch), model.state_dict(), facts)

    scores: dict[int, float] = {}

    def evaluate(epoch: int) -> dict[str, float]:
        scores[epoch] = top1(model, held_out, config, device)
        return {"top1": scores[epoch]}

    def batches() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return prepared(dataset, config, device)

    def accept(begun: Mapping[str, Any], position: Position) -> None:
        check_resumable(folder, config, begun, position, recipe["data"])
        save_config(config, folder / CONFIG)  # it may differ in epochs, paths, workers, …

    recipe = identifying(config) | {"data": dist.from_main(lambda: dataset.digest)}
    legs = loop.train(
        objective,
        dataset,
        config.loop,
        folder,
        Hooks(save_weights, evaluate, batches),
        seed=config.seed,
        device=device,
        workers=config.data.workers,
        resume_run=has_state,
        recipe=recipe,
        check_state=accept,
    )
    if dist.is_main() and not path.exists():  # removed since
        save_weights(last)
    if last and not dist.from_main(lambda: is_recorded(folder, last)):
        value = scores[last] if last in scores else top1(model, held_out, config, device)
        dist.from_main(lambda: record(config, folder, dataset, held_out, path, value, legs))
    elif has_state and dist.is_main():
        print(f"{folder} was finished already; nothing to do")
    dist.barrier()
    return path


def make_ready(config: PretrainConfig) -> tuple[IndexedDataset, IndexedDataset, Objective]:
    """Return ``open_data``'s images and the objective around a network drawn from the seed.

    Raises:
        InputError: a value of the recipe is not valid, or not read; nothing is written.
    """
    check_version(config.version)
    if not 0 <= config.seed <= LARGEST_SEED:
        raise InputError(f"seed {config.seed} must be in 0..{LARGEST_SEED}")
    if config.method not in METHODS:
        raise InputError(f"method {config.method!r} is not one of {', '.join(METHODS)}")
    factory.check_name(config.arch)
    (config.ctc if config.method == "ctc" else config.ce).stages()
    check_read(config)
    loop.check(config.loop)  # what needs no data comes first: to list a million files takes minutes
    torch.manual_seed(config.seed)
    dataset, held_out = open_data(config)
    loop.check(config.loop, len(dataset))
    factory.check_image_size(config.arch, dataset.image_size)
    return dataset, held_out, build_objective(config, dataset)


def build_objective(config: PretrainConfig, dataset: IndexedDataset) -> Objective:
    """Return the method's objective around a fresh network."""
    if dataset.labels.dim() != 1:
        raise InputError(f"{dataset.name} has several labels an image; pretraining needs one")
    options = {"drop_path_rate": config.drop_path_rate} if config.drop_path_rate else {}
    model: Any = factory.create_model(config.arch, len(dataset.classes), **options)
    if config.zero_init_residual and hasattr(model, "zero_init_residual"):
        model.zero_init_residual()
    if config.method == "ctc":
        return CTC(model, dataset.labels, config.ctc, config.seed)
    ce = config.ce
    if config.method == "random":
        ce = dataclasses.replace(ce, stage=dataclasses.replace(ce.stage, epochs=0))
    return CrossEntropy(model, ce)


def open_data(config: PretrainConfig) -> tuple[IndexedDataset, IndexedDataset]:
    """Return the training images, augmented, and those that the final number is given on."""
    dataset = open_dataset(config.data, "train", train=True, seed=config.seed)
    return dataset, open_dataset(config.data, report_split(config.data))


@torch.no_grad()
def top1(model: Network, dataset: IndexedDataset, config: PretrainConfig, device: Any) -> float:
    """Return the share of images whose highest logit is their class, in %, over all ranks."""
    model.eval()
    counts = torch.zeros(2, dtype=torch.float64, device=device)  # right, all
    for images, labels, _ in prepared(dataset, config, device):
        with amp.autocast(config.loop.amp, device):
            predicted = model(images).argmax(1)
        counts[0] += (predicted == labels).sum()
        counts[1] += len(labels)
    model.train()
    right, images_seen = dist.all_sum(counts).tolist()
    return 100.0 * right / images_seen


def prepared(
    dataset: IndexedDataset, config: PretrainConfig, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this rank's share as (normalised images, labels, index) on the device, un-augmented."""
    loader = evaluation_loader(
        dataset, config.loop.batch_size, config.data.workers, dist.rank(), dist.world_size()
    )
    for batch in loader:
        images, labels, index = to_device(device, *batch)
        yield normalise(images, dataset.mean, dataset.std), labels, index


def facts_of(config: PretrainConfig, dataset: IndexedDataset, epoch: int) -> checkpoint.Facts:
    """Return a checkpoint's facts."""
    return checkpoint.Facts(
        arch=factory.canonical(config.arch),
        num_classes=len(dataset.classes),
        method=config.method,
        epoch=epoch,
        seed=config.seed,
        dataset=dataset.name,
        image_size=dataset.image_size,
        mean=dataset.mean,
        std=dataset.std,
        config=to_dict(config),
        code=code_version(),
    )


def record(
    config: PretrainConfig,
    folder: Path,
    dataset: IndexedDataset,
    held_out: IndexedDataset,
    path: Path,
    value: float,
    legs: list[dict[str, Any]],
) -> None:
    """Append the run's number to its ``results.jsonl``; ``legs`` are those of ``loop.train``."""
    changed = changed_from_shipped(config)
    row = ResultRow(
        step="pretrain",
        protocol=protocol_name(config.recipe, changed),
        dataset=held_out.name,
        split=held_out.split,
        metric="top1",
        value=value,
        unit="%",
        init=config.init or config.method,
        seed=config.seed,
        epoch=int(path.stem.removeprefix("epoch_")),
        weights=sha256_of(path),
        weights_path=str(path),
        config=recipe_hash(recipe_of(config)),
        data=data_digest([dataset.digest], [held_out.digest]),
        version=config.version,
        run=str(folder),
        details={
            "images": len(held_out),
            "read_from": places_of([dataset, held_out]),
            "world_size": dist.world_size(),
            "device": dist.pick_device(config.loop.device).type,
            "batch_size": config.loop.batch_size,
            "amp": amp.resolve(config.loop.amp, dist.pick_device(config.loop.device)),
            "torch": torch.__version__,
            "overrides": changed,
            **({"legs": legs} if len(legs) > 1 else {}),
        },
    )
    append_rows(folder / ROWS_FILE, [row])


def describe(
    config: PretrainConfig, dataset: IndexedDataset, epochs: int, device: torch.device
) -> str:
    """Return a sentence on the run with its derived values."""
    steps = epochs * (len(dataset) // config.loop.batch_size)
    world = dist.world_size()
    return (
        f"{config.method}: {config.arch} on {dataset.name} ({len(dataset)} images of "
        f"{dataset.image_size} px, {len(dataset.classes)} classes), {epochs} epochs = {steps} "
        f"steps of {config.loop.batch_size} images ({config.loop.batch_size // world} on each of "
        f"{world} {device.type} process{'es' if world > 1 else ''}), seed {config.seed}"
    )
