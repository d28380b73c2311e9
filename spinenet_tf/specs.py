"""The sizes of the SpineNet paper as tables: backbones (section 3.4), subnets (4.1), Appendix A.

Pure Python. A size's name says which backbone it is of, so that `RetinaNet('R50-FPN')` needs no
other argument. Section and table numbers are those of arXiv 1912.05027.
"""

from typing import NamedTuple

from spinenet_tf import graphs


class Scaling(NamedTuple):
    """A SpineNet: its graph, and how it grows out of SpineNet-49 (section 3.4)."""

    width: float = 1.0  # multiplies every 3x3 convolution width, truncated
    alpha: float = 0.5  # width of a resampling edge, relative to the parent's 3x3 convolution
    repeats: int = 1  # blocks in a row per node
    endpoints: int = 256  # channels of P3..P7
    graph: graphs.Graph = graphs.SPINENET_49


class MobileScaling(NamedTuple):
    """A SpineNet of MBConv blocks (Appendix A)."""

    width: float  # multiplies every width, truncated
    endpoints: int  # channels of P3..P7, and of the class and box subnets


class ResNetStages(NamedTuple):
    """A ResNet: the kind of its blocks, and how many levels 2 to 5 have."""

    kind: str
    blocks: tuple[int, int, int, int]


class DenseHead(NamedTuple):
    """RetinaNet's class and box subnets (section 4.1) and the pyramid width they sit on."""

    convs: int = 4  # 3x3 convolutions before the prediction
    filters: int = 256
    endpoints: int = 256  # channels of P3..P7
    separable: bool = False  # depthwise 3x3, then 1x1 (Appendix A)


class RegionHead(NamedTuple):
    """Mask R-CNN's subnets (section 4.1) and the pyramid width they sit on."""

    rpn_convs: int = 1
    convs: int = 4  # of the box and of the mask subnet
    filters: int = 256  # of all 3x3 convolutions
    fc: int = 1024  # units of the box subnet's fully connected layer
    endpoints: int = 256


# 3x3 convolution width of a block by level, SpineNet-49 (section 3.3: L5, L6 and L7 have 256).
WIDTHS = {1: 32, 2: 64, 3: 128, 4: 256, 5: 256, 6: 256, 7: 256}
STEM_FILTERS = 64  # the first 7x7 convolution; not scaled in any released checkpoint
RESNET_WIDTHS = {2: 64, 3: 128, 4: 256, 5: 512}

# Appendix A: output channels of an MBConv block by level.
MOBILE_WIDTHS = {1: 16, 2: 24, 3: 40, 4: 80, 5: 112, 6: 112, 7: 112}
MOBILE_STEM_FILTERS = 8
MOBILE_EXPANSION = 6
MOBILE_SE_RATIO = 0.2  # of the block's input width; not stated by the paper, official code

# Section 3.4. For 49S the paper's counts need 256 endpoints in RetinaNet (Table 2; see below) and
# 128 in Mask R-CNN (Table 5). Below the line: the models of Tables 1, 3 and 7.
SIZES = {
    "49S": Scaling(width=0.65, endpoints=128),
    "49": Scaling(),
    "96": Scaling(repeats=2),
    "143": Scaling(alpha=1.0, repeats=3),
    "190": Scaling(width=1.3, alpha=1.0, repeats=4, endpoints=512),
    # ---
    "R23-SP30": Scaling(graph=graphs.R23_SP30),
    "R0-SP53": Scaling(graph=graphs.R0_SP53),
}

# Appendix A.
MOBILE_SIZES = {
    "mobile-49XS": MobileScaling(width=0.6, endpoints=24),
    "mobile-49S": MobileScaling(width=0.65, endpoints=40),
    "mobile-49": MobileScaling(width=1.0, endpoints=48),
}

# The baselines' ResNets (He et al., arXiv 1512.03385, Table 1).
RESNETS = {
    "R34": ResNetStages("residual", (3, 4, 6, 3)),
    "R50": ResNetStages("bottleneck", (3, 4, 6, 3)),
    "R101": ResNetStages("bottleneck", (3, 4, 23, 3)),
    "R152": ResNetStages("bottleneck", (3, 8, 36, 3)),
}

# Pyramid networks on them (Tables 2, 3 and 5): ResNet, decoder.
PYRAMIDS = {
    "R50-FPN": ("R50", "fpn"),
    "R101-FPN": ("R101", "fpn"),
    "R152-FPN": ("R152", "fpn"),
    "R50-NAS-FPN": ("R50", "nas_fpn"),
}

# Section 4.1, RetinaNet subnets by size; all others have DenseHead's defaults.
RETINANET_HEADS = {name: DenseHead() for name in (*SIZES, *PYRAMIDS)} | {
    "49S": DenseHead(filters=128, endpoints=256),
    "190": DenseHead(convs=7, filters=512, endpoints=512),
    **{
        name: DenseHead(filters=size.endpoints, endpoints=size.endpoints, separable=True)
        for name, size in MOBILE_SIZES.items()
    },
}

# Section 4.1, Mask R-CNN subnets by size. The text gives 49S a fully connected layer of 1024; 512,
# as in the official code, is what Table 5 counts.
REGION_HEADS = {name: RegionHead() for name in (*SIZES, *PYRAMIDS)} | {
    "49S": RegionHead(filters=128, fc=512, endpoints=128),
    "190": RegionHead(rpn_convs=7, convs=7, filters=384, endpoints=512),
}


def filters(level: int, width: float) -> int:
    """3x3 convolution width of a block at `level`, scaled and truncated as in the paper's code."""
    return int(WIDTHS[level] * width)


def row(table: dict, size: str, **overrides):
    """The row of a table here, with the overrides that are not None.

    Raises:
      ValueError: the table has no such size.
    """
    if size not in table:
        raise ValueError(f"size={size!r} is not one of {sorted(table)}")
    return table[size]._replace(**{k: v for k, v in overrides.items() if v is not None})
