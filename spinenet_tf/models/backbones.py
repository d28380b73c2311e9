"""Which backbone a size's name stands for."""

import keras

from spinenet_tf import specs
from spinenet_tf.models.fpn import ResNetFPN
from spinenet_tf.models.mobile import SpineNetMobile
from spinenet_tf.models.mobilenet import MobileNetLite
from spinenet_tf.models.spinenet import SpineNet

BUILDERS = (
    (specs.SIZES, SpineNet),
    (specs.MOBILE_SIZES, SpineNetMobile),
    (specs.PYRAMIDS, ResNetFPN),
    (specs.MOBILENETS, MobileNetLite),
)


def backbone_of(size: str, **kwargs) -> keras.Model:
    """Builds the pyramid network that `size` names; see the builders for `kwargs`.

    Raises:
      ValueError: no table of `specs` has the size.
    """
    for table, build in BUILDERS:
        if size in table:
            return build(size, **kwargs)
    known = sorted(name for table, _ in BUILDERS for name in table)
    raise ValueError(f"size={size!r} is not one of {known}")
