"""Pyramids on Keras' MobileNets, in the style of the baselines of Table 9, other papers' models.

Those papers' heads are not RetinaNet's (SSDLite has 6 anchors a place, and predictions of its own
for every level), so the published costs are approached, not reproduced: tests/test_baselines.py
has both.
"""

import gin
import keras

from spinenet_tf import specs
from spinenet_tf.models.fpn import conv, fpn, nas_fpn
from spinenet_tf.models.layers import Style

# The layers that the features go into. SSDLite takes C4 expanded, from inside the block that
# halves it, and C5 from the end (MobileNetV2 paper, section 6.2); FPN takes the blocks' outputs.
SSD_TAPS = {
    "MobileNetV2": "block_13_pad",
    "MobileNetV3Large": "expanded_conv_12_depthwise_pad",
    "MobileNetV3Small": "expanded_conv_8_depthwise_pad",
}
FPN_TAPS = {"C3": "block_6_expand", "C4": "block_13_expand", "C5": "Conv_1"}


@gin.configurable
def MobileNetLite(  # noqa: N802 - a network's name, as in keras.applications
    size: str = "MobileNetV2-FPNLite",
    *,
    input_shape: tuple[int | None, int | None, int] = (None, None, 3),
    endpoints: int | None = None,
    **style,
) -> keras.Model:
    """Builds a MobileNet with a pyramid of separable convolutions (Table 9's baselines).

    Args:
      size: a row of `specs.MOBILENETS`.
      input_shape: (height, width, 3); None only where run-time sides are multiples of 32.
      endpoints: channels of the pyramid; by default the size's.
      **style: fields of `Style`; the activation is the pyramid's, the network keeps its own, as
        its padding. Neither stochastic depth nor DropBlock is used.

    Returns:
      A functional model: images [b, h, w, 3] float, normalised -> {'P3': ..., 'P7': ...} for
      FPNLite and NAS-FPNLite, {'P4': ..., 'P9': ...} for SSDLite; P_l is [b, ceil(h / 2**l),
      ceil(w / 2**l), endpoints].

    Raises:
      ValueError: unknown size or style.
    """
    row, style = specs.row(specs.MOBILENETS, size), Style(**style)
    network = _network(row.network, input_shape, style)
    filters = endpoints or row.endpoints
    if row.decoder == "ssd":
        c4 = network.get_layer(SSD_TAPS[row.network]).input
        outputs = _ssd(c4, network.output, filters, style)
    else:
        features = {level: network.get_layer(layer).input for level, layer in FPN_TAPS.items()}
        decode = {"fpn": fpn, "nas_fpn": nas_fpn}[row.decoder]
        outputs = decode(features, network.input, filters, style, separable=True)
    return keras.Model(network.input, outputs, name=size.lower().replace("-", "_"))


def _ssd(c4, c5, filters: int, style: Style) -> dict:
    """{'P4': ..., 'P9': ...}: C4 and C5 at one width, then 1x1 and separable 3x3 / 2 (SSDLite)."""
    outputs = {
        "P4": style.conv_bn(c4, filters, name="p4"),
        "P5": style.conv_bn(c5, filters, name="p5"),
    }
    for level in (6, 7, 8, 9):
        x = style.conv_bn(outputs[f"P{level - 1}"], filters // 2, name=f"p{level}_squeeze")
        x = conv(x, filters, 3, style, f"p{level}", strides=2, separable=True)
        outputs[f"P{level}"] = style.act(style.norm(x, f"p{level}_bn"), f"p{level}_act")
    return outputs


def _network(name: str, input_shape: tuple, style: Style) -> keras.Model:
    """Keras' network without its classifier, with the batch norm and weight decay of `style`."""
    kwargs = {} if name == "MobileNetV2" else {"include_preprocessing": False}
    build = getattr(keras.applications, name)
    network = build(input_shape=input_shape, include_top=False, weights=None, **kwargs)

    def restyle(layer):
        config = layer.get_config()
        if isinstance(layer, keras.layers.BatchNormalization):
            config |= {key: getattr(style, key) for key in ("momentum", "epsilon", "synchronized")}
        if isinstance(layer, keras.layers.DepthwiseConv2D):
            config["depthwise_regularizer"] = style.decay()
        elif isinstance(layer, keras.layers.Conv2D):
            config["kernel_regularizer"] = style.decay()
        return type(layer).from_config(config)

    return keras.models.clone_model(network, clone_function=restyle)
