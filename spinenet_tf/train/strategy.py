"""Which devices to train on, and what their processes tell each other."""

import gin
import numpy as np
import tensorflow as tf

KINDS = ("auto", "tpu", "mirrored", "multi_worker", "one_device")


@gin.configurable
def make_strategy(kind: str = "auto", tpu: str = "local") -> tf.distribute.Strategy:
    """The distribution strategy.

    Args:
      kind: 'tpu', 'mirrored' (all GPUs of a machine, or its logical CPUs), 'multi_worker' (machines
        named by TF_CONFIG), 'one_device', or 'auto': mirrored if there are several GPUs, otherwise
        one device.
      tpu: name or grpc:// address of the TPU, or 'local' on a TPU VM.

    Raises:
      ValueError: unknown kind, or no TPU of that name.
    """
    if kind not in KINDS:
        raise ValueError(f"make_strategy.kind={kind!r} is not one of {KINDS}")
    if kind == "tpu":
        return _tpu_strategy(tpu)
    if kind == "multi_worker":
        return tf.distribute.MultiWorkerMirroredStrategy()
    if kind == "mirrored" or (kind == "auto" and len(tf.config.list_physical_devices("GPU")) > 1):
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([d.name for d in devices])
    return tf.distribute.get_strategy()


def _tpu_strategy(tpu: str) -> tf.distribute.TPUStrategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu)
        if tpu != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        raise ValueError(
            f"no TPU {tpu!r} here ({error}); install requirements-tpu.txt, give its name as "
            "make_strategy.tpu, or train without one: --gin_param=\"make_strategy.kind='auto'\""
        ) from error
    return tf.distribute.TPUStrategy(resolver)


def input_is_here(strategy: tf.distribute.Strategy) -> bool:
    """Whether the input runs in this process, so that it may call Python."""
    tpu = isinstance(strategy, tf.distribute.TPUStrategy)
    return not tpu or not strategy.cluster_resolver.cluster_spec().as_dict()  # of 'local': none


def in_words(strategy: tf.distribute.Strategy) -> str:
    """Such as '8 replicas on TPU'."""
    gpu = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    kind = "TPU" if isinstance(strategy, tf.distribute.TPUStrategy) else gpu
    n = strategy.num_replicas_in_sync
    return f"{n} replica{'s' * (n > 1)} on {kind}"


def many_workers(strategy: tf.distribute.Strategy) -> bool:
    """Whether this is one of several processes that run the same program."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process writes what there is one of."""
    if not many_workers(strategy):
        return True
    resolver = strategy.cluster_resolver
    chief = "chief" if "chief" in resolver.cluster_spec().jobs else "worker"
    return (resolver.task_type, resolver.task_id) == (chief, 0)


def gather(strategy: tf.distribute.Strategy, value) -> np.ndarray:
    """The rows of all replicas, on all workers, as one array."""
    if not many_workers(strategy):
        return np.concatenate([v.numpy() for v in strategy.experimental_local_results(value)])
    # Its collectives take no bool and no uint8.
    small = (tf.bool, tf.uint8)
    value = strategy.run(lambda v: tf.cast(v, tf.int32) if v.dtype in small else v, (value,))
    return strategy.gather(value, axis=0).numpy()
