"""Protocols: safe to read, hard to mistype, and never under another's name."""

from pathlib import Path

import pytest

from core.errors import InputError
from detection import cfg as configs
from detection.trainer import check_builds

ROOT = Path(__file__).resolve().parent.parent
FPN = "detection/mask_rcnn_R50_FPN_1x.yaml"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["SOLVER.MAX_ITR", "4"], ["SOLVER.MAX_ITR", "SOLVER.MAX_ITER"]),
        (["SOLVER.MAX_ITER", "soon"], ["SOLVER.MAX_ITER", "integer", "soon"]),
        (["MODEL.MASK_ON", "1"], ["MODEL.MASK_ON", "True or False"]),
        (["SOLVER.MAX_ITER"], ["SOLVER.MAX_ITER", "no value"]),
        (["SOLVER.MAX_ITER=4"], ["SOLVER.MAX_ITER 4"]),
        (["SOLVER", "4"], ["SOLVER", "group"]),
    ],
)
def test_a_bad_override_is_named(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        configs.load_cfg(FPN, overrides)
    assert all(word in str(error.value) for word in words)


def test_a_yaml_tag_is_refused_in_the_file_and_in_its_base(tmp_path: Path) -> None:
    sentinel = tmp_path / "ran"
    evil = tmp_path / "evil.yaml"
    evil.write_text(f"OUTPUT_DIR: !!python/object/apply:os.system ['touch {sentinel}']\n")
    (tmp_path / "child.yaml").write_text("_BASE_: evil.yaml\nSEED: 1\n")
    for name in ("evil.yaml", "child.yaml"):
        with pytest.raises(InputError, match="plain YAML"):
            configs.load_cfg(tmp_path / name)
    assert not sentinel.exists()


def test_a_changed_protocol_loses_its_name_and_a_neutral_key_does_not() -> None:
    base = configs.protocol_keys(configs.load_cfg(FPN))
    neutral = configs.load_cfg(FPN, ["SEED", "5", "OUTPUT_DIR", "x", "DATALOADER.NUM_WORKERS", "0"])
    assert configs.changed_keys(neutral, base) == {}
    assert configs.hash_of(neutral) == configs.hash_of(configs.load_cfg(FPN))
    short = configs.load_cfg(FPN, ["SOLVER.MAX_ITER", "4"])
    changed = configs.changed_keys(short, base)
    assert changed == {"SOLVER.MAX_ITER": 4}
    name = configs.protocol_name(short, changed)
    assert name.startswith("mask_rcnn_R50_FPN_1x+")
    assert name != configs.protocol_name(short, {"SOLVER.MAX_ITER": 5})


def test_an_integer_is_taken_where_a_number_is_wanted() -> None:
    assert configs.load_cfg(FPN, ["SOLVER.BASE_LR", "1"]).SOLVER.BASE_LR == 1.0


def test_the_saved_config_reads_back_equal(tmp_path: Path) -> None:
    cfg = configs.load_cfg(FPN, ["INPUT.MIN_SIZE_TRAIN", "(320,)", "MODEL.WEIGHTS", "a.pth"])
    (tmp_path / "config.yaml").write_text(configs.as_yaml(cfg))
    again = configs.load_cfg(tmp_path / "config.yaml")
    assert configs._plain(again) == configs._plain(cfg)


def test_sync_norm_has_a_stand_in_on_every_hardware() -> None:
    assert [
        configs.norm_for("cuda", 8),
        configs.norm_for("cpu", 2),
        configs.norm_for("cpu", 1),
    ] == [
        "SyncBN",
        "naiveSyncBN",
        "BN",
    ]
    cfg = configs.load_cfg(FPN)
    assert configs.set_norms(cfg, "BN") == 2
    assert (cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM) == ("BN", "BN")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("MODEL.META_ARCHITECTURE", "Mask2Former", "it can be GeneralizedRCNN, RetinaNet"),
        ("MODEL.BACKBONE.NAME", "resnet", "build_resnet_fpn_backbone"),
        ("MODEL.FPN.NORM", "SyncBn", "it can be '' (none), BN, SyncBN"),
        ("MODEL.RESNETS.DEPTH", "20", "it can be 18, 34, 50"),
        ("MODEL.ROI_HEADS.NAME", "Heads", "StandardROIHeads"),
        ("MODEL.FPN.IN_FEATURES", "('res2','res9')", "'res9', which is not one of"),
        ("MODEL.DEVICE", "cuda:3", "CUDA_VISIBLE_DEVICES"),
        ("MODEL.PIXEL_MEAN", "[1.0]", "three numbers"),
        ("MODEL.LOAD_PROPOSALS", "True", "is not supported"),
        ("SOLVER.LR_SCHEDULER_NAME", "Cosine", "WarmupCosineLR"),
        ("SOLVER.MAX_ITER", "-3", "more than 0"),
        ("SOLVER.BASE_LR", "-0.1", "more than 0"),
        ("SOLVER.BASE_LR", "float('nan')", "a number"),
        ("SOLVER.WARMUP_ITERS", "-1", "0 or more"),
        ("SOLVER.STEPS", "(5,4)", "iterations that rise"),
        ("INPUT.FORMAT", "HSV", "it can be RGB, BGR"),
        ("INPUT.MIN_SIZE_TRAIN", "()", "one or more sizes"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "the least and the largest"),
        ("TEST.AUG.ENABLED", "True", "is not supported"),
        ("TEST.EXPECTED_RESULTS", "[['bbox','AP',38.5,0.2]]", "is not supported"),
    ],
)
def test_a_value_that_no_run_can_have_is_refused_with_what_it_can_be(
    key: str, value: str, words: str
) -> None:
    with pytest.raises(InputError) as error:
        configs.check_values(configs.load_cfg(FPN, [key, value]))
    assert key in str(error.value)
    assert words in str(error.value)


def test_every_shipped_config_has_values_that_it_can_have() -> None:
    files = sorted((ROOT / "configs" / "detection").glob("*.yaml"))
    assert len(files) > 9
    for file in files:
        configs.check_values(configs.load_cfg(file))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("MODEL.RPN.IN_FEATURES", "('p2','p9')", "KeyError: 'p9'"),
        ("MODEL.ROI_MASK_HEAD.NAME", "Head", "No object named 'Head'"),
        ("MODEL.RESNETS.DEPTH", "18", "RES2_OUT_CHANNELS = 64"),
    ],
)
def test_a_detector_or_schedule_that_detectron2_cannot_build_is_one_sentence(
    key: str, value: str, words: str
) -> None:
    check_builds(configs.load_cfg(FPN))
    with pytest.raises(InputError, match="detectron2 cannot build") as error:
        check_builds(configs.load_cfg(FPN, [key, value]))
    assert words in str(error.value)
    assert "\n" not in str(error.value)
