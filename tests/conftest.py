import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from pathlib import Path

import gin
import keras
import pytest
import tensorflow as tf
from tensorflow.python.framework import config  # no public name to switch determinism off

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def shared() -> Path:
    """The team's folder of facts and references; users do not have it."""
    if not SHARED.exists():
        pytest.skip("shared/ is not here")
    return SHARED


@pytest.fixture
def eagerly():
    """Functions run eagerly, where it is not the compiled ones that are tested: tracing a training
    loop takes longer than a dozen of its steps."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture(autouse=True)
def _clean_state():
    """Each test begins with the same seed, and no bindings, policy or determinism of others."""
    keras.utils.set_random_seed(0)
    yield
    gin.clear_config()
    config.disable_op_determinism()
    keras.config.set_dtype_policy("float32")
