"""Every command of README and of docs' pages runs, word for word, with toy arguments after it.

A command that a page gains without an entry here fails the test, and so does an entry that no page
has.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.shapes.scenes import write_coco
from tests import fake_slurm, tool_process
from tests.coco_cases import random_case, write_run

ROOT = Path(__file__).resolve().parent.parent
TINY_RUN = "data.workers 0 data.limit 40 loop.batch_size 20 loop.log_every 1 loop.amp none"
TINY_NPZ = "data.name npz data.root {npz} data.image_size 32"
TINY_CTC = "ctc.stage1.epochs 1 ctc.stage1.warmup_epochs 0 ctc.stage2.epochs 1 ctc.num_negatives 8"
TINY_NET = (
    "INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 "
    "SOLVER.WARMUP_ITERS 1 TEST.PRECISE_BN.ENABLED False DATALOADER.NUM_WORKERS 0"
)
R18 = "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.RES2_OUT_CHANNELS 64"
TINY_FINETUNE = "loop.batch_size 16 finetune.steps 2 finetune.lr [0.01] finetune.weight_decay [0.0]"
TINY_SUITE = (
    "initialisations.random.overrides.data.limit 40 "
    "initialisations.random.overrides.loop.batch_size 20 "
    "protocols.mask_rcnn_R18_FPN_shapes.overrides.SOLVER.MAX_ITER 2 "
    "protocols.mask_rcnn_R18_FPN_shapes.overrides.SUITE.SHAPES.TRAIN_IMAGES 8 "
    "protocols.mask_rcnn_R18_FPN_shapes.overrides.SUITE.SHAPES.VAL_IMAGES 4"
)
TINY_COCO = "--train-json {json} --train-images {images} --val-json {json} --val-images {images}"

# a page's command → what stands in for its example files, and what follows it; each after those
# that make what it reads
TOY: dict[str, tuple[dict[str, str], str]] = {
    "tools/pretrain.sh ctc": ({}, f"--output {{runs}}/r50 {TINY_RUN} {TINY_CTC}"),
    "tools/convert_to_d2.py runs/ctc_shapes-s1/checkpoints/epoch_0009.pth": (
        {"runs/ctc_shapes-s1/checkpoints/epoch_0009.pth": "{runs}/r50/checkpoints/epoch_0002.pth"},
        "",
    ),
    "tools/train_net.py --config detection/mask_rcnn_R50_FPN_1x.yaml --weights "
    "runs/ctc_shapes-s1/checkpoints/epoch_0009_d2.pth": (
        {
            "runs/ctc_shapes-s1/checkpoints/epoch_0009_d2.pth": (
                "{runs}/r50/checkpoints/epoch_0002_d2.pth"
            )
        },
        f"--num-gpus 0 {TINY_COCO} --output {{runs}}/detection {TINY_NET}",
    ),
    "tools/pretrain.sh ce": (
        {},
        f"--output {{runs}}/r18 arch resnet18 ce.stage.epochs 1 {TINY_RUN}",
    ),
    "tools/pretrain.sh ctc --config pretrain/ctc_cifar100.yaml data.root /data/cifar100": (
        {},
        f"--output {{runs}}/cifar arch resnet18_cifar_w16 {TINY_NPZ} {TINY_CTC} {TINY_RUN}",
    ),
    "tools/pretrain.sh ctc --config pretrain/ctc_imagenet.yaml data.root /data/imagenet": (
        {},
        f"--output {{runs}}/imagenet arch resnet18 {TINY_NPZ} {TINY_CTC} {TINY_RUN}",
    ),
    "tools/pretrain.sh ctc --output runs/mine data.name folder data.root /data/my_images "
    "arch resnet18": (
        {"runs/mine": "{runs}/mine", "/data/my_images": "{folder}"},
        f"{TINY_CTC} {TINY_RUN}",
    ),
    "tools/make_shards.py /data/my_shards data.name folder data.root /data/my_images": (
        {"/data/my_shards": "{runs}/my_shards", "/data/my_images": "{folder}"},
        "images_per_shard 20",
    ),
    "tools/pretrain.sh ctc --output runs/sharded data.name folder data.root /data/my_shards "
    "arch resnet18": (
        {"runs/sharded": "{runs}/sharded", "/data/my_shards": "{runs}/my_shards"},
        f"{TINY_CTC} {TINY_RUN}",
    ),
    "tools/pretrain.sh ctc --output runs/mine --resume": ({"runs/mine": "{runs}/mine"}, ""),
    "tools/convert_to_d2.py --list-formats": ({}, ""),
    "tools/convert_to_d2.py ckpt.pth": (
        {"ckpt.pth": "{runs}/r18/checkpoints/epoch_0001.pth"},
        "--output {runs}/ckpt_d2.pth",
    ),
    "tools/convert_to_d2.py ckpt_d2.pth --to torchvision": (
        {"ckpt_d2.pth": "{runs}/ckpt_d2.pth"},
        "--output {runs}/ckpt_torchvision.pth",
    ),
    "tools/train_net.py --config detection/mask_rcnn_R50_FPN_1x.yaml --weights ckpt_d2.pth "
    "--num-gpus 8": (
        {"ckpt_d2.pth": "{runs}/ckpt_d2.pth", "--num-gpus 8": "--num-gpus 0"},
        f"{TINY_COCO} --output {{runs}}/detection18 {TINY_NET} {R18}",
    ),
    "tools/train_net.py --config detection/mask_rcnn_R50_FPN_1x.yaml --weights ckpt_d2.pth "
    "--num-gpus 0 --train-json instances_train.json --train-images images "
    "--val-json instances_val.json --val-images images SOLVER.MAX_ITER 20 "
    "SOLVER.IMS_PER_BATCH 2": (
        {
            "ckpt_d2.pth": "{runs}/ckpt_d2.pth",
            "instances_train.json": "{json}",
            "instances_val.json": "{json}",
            "images images": "images {images}",
        },
        f"--output {{runs}}/detection_any {TINY_NET} {R18}",
    ),
    "tools/train_net.py --config detection/mask_rcnn_R50_FPN_1x.yaml --weights ckpt_d2.pth "
    "--num-gpus 8 --dry-run": (
        {"ckpt_d2.pth": "{runs}/ckpt_d2.pth"},
        f"{TINY_COCO} --output {{runs}}/planned {TINY_NET} SOLVER.IMS_PER_BATCH 8 {R18}",
    ),
    "tools/preflight.py --config detection/mask_rcnn_R50_FPN_1x.yaml --weights ckpt_d2.pth "
    "--num-gpus 8": (
        {"ckpt_d2.pth": "{runs}/ckpt_d2.pth", "--num-gpus 8": "--num-gpus 0"},
        f"{TINY_COCO} --output {{runs}}/planned {TINY_NET} {R18} "
        "--images 2 --only keys,parity,stem,input,memory,evaluate,resume",
    ),
    "tools/run_transfer.py --config transfer/linear.yaml --data cub200 --weights ckpt.pth": (
        {"ckpt.pth": "{runs}/r18/checkpoints/epoch_0001.pth"},
        f"--output {{runs}}/linear methods [linear] data.workers 0 {TINY_NPZ}",
    ),
    "tools/run_transfer.py --config transfer/cub200_finetune.yaml --weights ckpt.pth": (
        {"ckpt.pth": "{runs}/r18/checkpoints/epoch_0001.pth"},
        f"--output {{runs}}/finetune data.workers 0 {TINY_NPZ} {TINY_FINETUNE}",
    ),
    "tools/run_analysis.py --run runs/NAME --config analysis/timeline_cifar100.yaml": (
        {"runs/NAME": "{runs}/cifar"},
        "targets [] quantities [retrieval,clustering] features.workers 0",
    ),
    "tools/benchmark.py --config suites/quickstart.yaml": (
        {},
        f"--output {{runs}}/quickstart --only random {TINY_SUITE}",
    ),
    "tools/benchmark.py --config suites/table5.yaml --dry-run": ({}, ""),
    "tools/benchmark.py --config suites/table5.yaml --executor slurm slurm.partition gpu "
    "slurm.hours 24": (
        {"suites/table5.yaml": "suites/quickstart.yaml"},
        f"--output {{runs}}/quickstart_slurm --only random {TINY_SUITE}",
    ),
    "tools/slurm.py --nodes 2 --gpus 8 --hours 24 -- tools/run_pretrain.py ctc --config "
    "pretrain/ctc_imagenet.yaml --output runs/x": (
        {"--nodes 2 --gpus 8": "--gpus 0 --logs {runs}/slurm", "runs/x": "{runs}/x"},
        f"arch resnet18 {TINY_NPZ} {TINY_CTC} {TINY_RUN}",
    ),
    "tools/evaluate.py --results coco_instances_results.json --annotations instances_val.json": (
        {
            "coco_instances_results.json": (
                "{runs}/detection_any/inference/coco_instances_results.json"
            ),
            "instances_val.json": "{json}",
        },
        "--output {runs}/evaluated",
    ),
    "tools/compare.py runs/quickstart": (
        {"runs/quickstart": "{pair}"},
        "--resamples 100",
    ),
    "tools/make_report.py runs/quickstart": ({"runs/quickstart": "{runs}/quickstart"}, ""),
}


def page_commands() -> list[str]:
    """Return the commands of the pages' bash blocks, comments stripped, in order, each once."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory, tiny_npz: Path) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("readme")
    coco = write_coco(folder / "coco", "train", 6, 64)
    with np.load(tiny_npz) as content:
        for split in ("train", "test"):
            for number, (image, label) in enumerate(
                zip(content[f"x_{split}"], content[f"y_{split}"], strict=True)
            ):
                path = folder / "folder" / split / str(content["classes"][label]) / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), image)
    slurm = folder / "slurm"  # stand-ins for its commands, which run the jobs here
    slurm.mkdir()
    fake_slurm.write_commands(slurm)
    _, detections = random_case(folder, 0)
    for init, found in (("ce", detections[::2]), ("ctc", detections)):
        write_run(folder / "pair" / init, folder / "random0.json", found, init, 1)
    return {
        "runs": str(folder / "runs"),
        "pair": str(folder / "pair"),
        "npz": str(tiny_npz),
        "folder": str(folder / "folder"),
        "json": str(coco.json),
        "images": str(coco.images),
        "slurm": str(slurm),
    }


def test_every_command_of_the_pages_works(stand_ins: dict[str, str]) -> None:
    assert {c for c in page_commands() if not c.startswith("make")} == set(TOY)
    commands = list(TOY)  # in the order in which one makes what another reads
    environment = {**os.environ, "PYTHON": sys.executable, "NPROC": "1"}
    environment["DETECTRON2_DATASETS"] = "/nowhere"
    environment["PATH"] = stand_ins["slurm"] + os.pathsep + environment["PATH"]
    if importlib.util.find_spec("submitit") is None:
        commands = [command for command in commands if "slurm" not in command]
    futures: list[Future[None]] = []
    before: dict[str, list[Future[None]]] = {}  # those that read or write a folder of the runs
    with ThreadPoolExecutor(2) as pool:
        for command in commands:
            words = _toy_words(command, stand_ins)
            folders = set(re.findall(re.escape(stand_ins["runs"]) + r"/\w+", " ".join(words)))
            waits = [future for folder in folders for future in before.get(folder, [])]
            future = pool.submit(_run, words, environment, waits)
            futures.append(future)
            for folder in folders:
                before.setdefault(folder, []).append(future)
    for future in futures:
        future.result()


def _toy_words(command: str, stand_ins: dict[str, str]) -> list[str]:
    replaced, more = TOY[command]
    for old, new in replaced.items():
        assert old in command, f"{old} is not in {command}"
        command = command.replace(old, new)
    return shlex.split(f"{command} {more}".format(**stand_ins))


def _run(words: list[str], environment: dict[str, str], waits: list[Future[None]]) -> None:
    for future in waits:  # submitted earlier, so that they are done or under way
        future.result()
    if words[0].endswith(".py"):
        result = tool_process.call([str(ROOT / words[0]), *words[1:]], ROOT, environment, 600)
    else:
        result = subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
    said = result.stdout[-1500:] + result.stderr[-3000:]
    assert result.returncode == 0, f"{shlex.join(words)}\n{said}"


@pytest.mark.parametrize("command", [c for c in page_commands() if c.startswith("make")])
def test_every_make_target_of_the_pages_exists(command: str) -> None:
    result = subprocess.run(
        [*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
