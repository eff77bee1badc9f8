"""The C4 detector's region head with one more normalisation, as MoCo's protocol has it.

N regions, D = 2048 channels of res5, h×w its map (7×7).
"""

from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import nn


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """detectron2's ``Res5ROIHeads`` whose res5 (N×D×h×w) is followed by a norm of D channels.

    Networks from self-supervised training end in features of any scale; the norm brings them to the
    scale that the box predictor starts from (MoCo, arXiv 1911.05722, appendix A.3). It is not part
    of the backbone: pretrained weights have nothing for it.
    """

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        blocks, channels = super()._build_res5_block(cfg)
        blocks.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return blocks, channels
