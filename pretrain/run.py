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
from core.config import load_config, save_config, shipped_config, to_dict
from core.errors import InputError
from core.files import check_folder, check_not_locked, is_empty, sweep
from core.identity import (
    changed_keys,
    check_version,
    data_digest,
    effective,
    protocol_name,
    recipe_hash,
)
from core.results import (
    ROWS_FILE,
    ResultRow,
    append_rows,
    code_version,
    read_rows,
    sha256_of,
)
from data.datasets import (
    DataConfig,
    IndexedDataset,
    evaluation_loader,
    normalise,
    open_dataset,
    places_of,
    report_split,
    resolved,
    to_device,
)
from models import amp, checkpoint, factory
from models.base import Network
from pretrain.objectives import CTC, CrossEntropy
from pretrain.recipe import CEConfig, CTCConfig
from training import loop, resume
from training.loop import Hooks, LoopConfig, Objective
from training.resume import Position
from training.schedule import changed_past

METHODS = ("random", "ce", "ctc")
LARGEST_SEED = (1 << 32) - 1
CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"  # in a run folder
STAGE_KEYS = {"ce": "ce.stage", "ctc1": "ctc.stage1", "ctc2": "ctc.stage2"}  # by stage


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """A pretraining recipe."""

    version: int = 1  # of the recipe: raised when what it computes changes
    recipe: str = ""  # its name in result rows; the tool sets the file's
    init: str = ""  # the initialisation's name in tables; "": the method
    method: str = "ce"  # ce, ctc, or random: only the initialisation is saved, as epoch 0
    arch: str = "resnet50"  # a name of models.factory: resnet50, timm/NAME or FILE.py:FUNCTION
    zero_init_residual: bool = False  # every residual branch starts at zero (arXiv 1706.02677, 5.1)
    # in our ResNets; timm's networks and a user's keep their own initialisation
    drop_path_rate: float = 0.0  # stochastic depth of timm's networks (arXiv 1603.09382)
    seed: int = 1  # of weights, order, augmentation, negatives
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    ce: CEConfig = dataclasses.field(default_factory=CEConfig)  # read when method is ce
    ctc: CTCConfig = dataclasses.field(default_factory=CTCConfig)  # read when method is ctc
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)


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


def check_read(config: PretrainConfig) -> None:
    """Raise InputError if a key is set that nothing reads."""
    recipe, default = to_dict(config), to_dict(PretrainConfig())
    for group in {"ce", "ctc"} - {config.method} if config.method != "random" else ():
        for key in changed_keys({group: recipe[group]}, {group: default[group]}):
            raise InputError(f"{key} is set, but method {config.method} does not read it")


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


def prepare_folder(folder: Path, config: PretrainConfig, resume_run: bool) -> bool:
    """Check that a fresh run starts in an empty folder and a resumed one in its own.

    Returns whether there is a state to go on from. A run that was killed before its first one has
    only a config, and perhaps its initialisation: resumed, it starts at the beginning.

    Raises:
        InputError: the folder is in use, not empty, or of another recipe.
    """
    check_folder(folder)
    check_not_locked(folder)  # now, not after the data are listed
    if resume_run and (folder / CONFIG).exists() and not resume.is_there(folder):
        begun = load_config(PretrainConfig, folder / CONFIG)
        resume.check_recipe(folder, identifying(begun), identifying(config))
        return False
    if resume_run:
        state = resume.load(folder)[1]
        position = Position(**state["position"])
        check_resumable(folder, config, state["recipe"], position)
    else:
        check_empty(folder)
    return resume_run


def check_empty(folder: Path) -> None:
    """Raise InputError unless a fresh run can start in a folder."""
    if not is_empty(folder):
        raise InputError(f"{folder} is not empty: go on with --resume, or choose another --output")


def begin(folder: Path, config: PretrainConfig, resume_run: bool, has_state: bool) -> None:
    """Remove half-written files from a locked folder; save the config of a run without state."""
    if not resume_run:
        check_empty(folder)  # again: another run may have begun while the data were listed
    for place in (folder, folder / CHECKPOINTS):
        sweep(place)
    if not has_state:
        save_config(config, folder / CONFIG)


def is_recorded(folder: Path, epoch: int) -> bool:
    """Whether the run's result row is written: a kill may come between the last state and it."""
    rows = folder / ROWS_FILE
    return rows.exists() and any(
        (row.step, row.epoch) == ("pretrain", epoch) for row in read_rows(rows)
    )


def recipe_of(config: PretrainConfig) -> dict[str, Any]:
    """Return the part of a config that its method reads, the data set's own values filled in."""
    unread = {"ce", "ctc"} - {config.method}
    content = to_dict(config) | {"data": to_dict(resolved(config.data))}
    return {key: value for key, value in content.items() if key not in unread}


def changed_from_shipped(config: PretrainConfig) -> dict[str, Any]:
    """Return the keys that differ from this suite's recipe of that name, none if there is none."""
    path = shipped_config(config.recipe, "pretrain")
    if path is None:
        return {}
    shipped = load_config(PretrainConfig, path)
    data = dataclasses.replace(shipped.data, name=config.data.name)  # which rows name
    return changed_keys(recipe_of(config), recipe_of(dataclasses.replace(shipped, data=data)))


def identifying(config: PretrainConfig) -> dict[str, Any]:
    """Return by key all that the weights depend on, beside the data."""
    own = {"version": config.version, "seed": config.seed}
    return effective(recipe_of(config)) | own


def check_resumable(
    folder: Path,
    config: PretrainConfig,
    begun: Mapping[str, Any],
    position: Position,
    data: str = "",
) -> None:
    """Raise InputError unless a run can go on under a config: the same one, or with other epochs.

    Args:
        begun: the recipe of the run's state, by key.
        data: digest of the training images and labels; "": not known yet.
    """
    now = identifying(config) | {"data": data or begun["data"]}
    epochs = {stage: f"{key}.epochs" for stage, key in STAGE_KEYS.items()}
    kept = {key: begun[key] for key in epochs.values() if key in begun}
    resume.check_recipe(folder, begun, now | kept)
    stages = config.ctc.stages() if config.method == "ctc" else config.ce.stages()
    before = [dataclasses.replace(s, epochs=kept.get(epochs[s.name], s.epochs)) for s in stages]
    reason = changed_past(before, stages, position.stage, position.epoch, position.step)
    if reason:
        raise InputError(f"{folder} cannot go on with other epochs: {reason}")


def checkpoint_path(folder: Path, epoch: int) -> Path:
    """Return where the weights of an epoch lie."""
    return folder / CHECKPOINTS / f"epoch_{epoch:04d}.pth"


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
