"""The sizes of the SpineNet paper as tables: backbones (section 3.4), subnets (4.1), Appendix A.

Pure Python. A size's name says which backbone it is of, so that `RetinaNet('R50-FPN')` needs no
other argument. Section and table numbers are those of arXiv 1912.05027.
"""

from typing import NamedTuple

from spinenet_tf import ablations, graphs, our_graphs


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


class Pyramid(NamedTuple):
    """A baseline's pyramid network on a ResNet (Tables 2, 3 and 5)."""

    resnet: str  # a row of RESNETS
    decoder: str  # 'fpn' or 'nas_fpn'


class MobileNet(NamedTuple):
    """A network of `keras.applications` with a pyramid of separable convolutions (Table 9)."""

    network: str
    decoder: str  # 'fpn', 'nas_fpn' or 'ssd'
    convs: int  # of the class and box subnets
    endpoints: int  # not published for RetinaNet's subnets: what comes nearest to Table 9's costs


class DenseHead(NamedTuple):
    """RetinaNet's class and box subnets (section 4.1) and the pyramid width they sit on."""

    convs: int = 4  # 3x3 convolutions before the prediction
    filters: int = 256
    endpoints: int = 256  # channels of P3..P7
    separable: bool = False  # depthwise 3x3, then 1x1 (Appendix A)


class RegionHead(NamedTuple):
    """Mask R-CNN's subnets (section 4.1) and the pyramid width they sit on."""

    rpn_convs: int = 1
    convs: int = 4  # of the mask subnet and, but for box_convs, of the box subnet
    filters: int = 256  # of all 3x3 convolutions
    fc: int = 1024  # units of the box subnet's fully connected layers
    endpoints: int = 256
    box_convs: int | None = None  # of the box subnet, where it has another number
    fcs: int = 1  # fully connected layers of the box subnet
    norm: bool = True  # batch norm after every hidden layer of the subnets


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
    "R35-SP18": Scaling(graph=our_graphs.R35_SP18),
    "R23-SP30": Scaling(graph=graphs.R23_SP30),
    "R14-SP39": Scaling(graph=our_graphs.R14_SP39),
    "R0-SP53": Scaling(graph=graphs.R0_SP53),
    "hourglass": Scaling(graph=our_graphs.HOURGLASS),
    "fish": Scaling(graph=our_graphs.FISH),
    # Table 8: 'R0-SP53-short' is R0-SP53 without its short-range connections, ...
    **{
        f"R0-SP53-{remove}": Scaling(graph=ablations.damage(graphs.R0_SP53, remove))
        for remove in ablations.DAMAGES
    },
}

# Appendix A. Widths are truncated, as in Model Garden. The paper's TPU code rounds them to
# multiples of 8, which is further from Table 9's multiply-adds; the parameters there of 49XS and
# 49S (0.82M, 0.97M) are 6 % below these; multiples of 8 give 49XS', no rounding we tried both.
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

PYRAMIDS = {
    "R50-FPN": Pyramid("R50", "fpn"),
    "R101-FPN": Pyramid("R101", "fpn"),
    "R152-FPN": Pyramid("R152", "fpn"),
    "R50-NAS-FPN": Pyramid("R50", "nas_fpn"),
}

# Other papers' detectors in Table 9, in their style: MobileNetV2 is arXiv 1801.04381, V3
# 1905.02244, FPNLite and NAS-FPNLite (7 @ 64) 1904.07392.
MOBILENETS = {
    "MobileNetV2-FPNLite": MobileNet("MobileNetV2", "fpn", 4, 128),
    "MobileNetV2-NAS-FPNLite": MobileNet("MobileNetV2", "nas_fpn", 4, 64),
    "MobileNetV2-SSDLite": MobileNet("MobileNetV2", "ssd", 0, 256),
    "MobileNetV3-SSDLite": MobileNet("MobileNetV3Large", "ssd", 0, 64),
    "MobileNetV3-Small-SSDLite": MobileNet("MobileNetV3Small", "ssd", 0, 64),
}

# Section 4.1, RetinaNet subnets by size; all others have DenseHead's defaults.
RETINANET_HEADS = {name: DenseHead() for name in (*SIZES, *PYRAMIDS)} | {
    "49S": DenseHead(filters=128, endpoints=256),
    "190": DenseHead(convs=7, filters=512, endpoints=512),
    **{
        name: DenseHead(filters=size.endpoints, endpoints=size.endpoints, separable=True)
        for name, size in MOBILE_SIZES.items()
    },
    **{
        name: DenseHead(size.convs, size.endpoints, size.endpoints, separable=True)
        for name, size in MOBILENETS.items()
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
