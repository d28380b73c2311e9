"""Shards written by an Apache Beam pipeline, for data sets that outgrow one machine.

The same `write_shard` runs on every worker, so the files are those of a run on one machine, byte
for byte; only small files of jobs and results lie beside them meanwhile. Any runner will do:
Dataflow, Flink, Spark, or Beam's own direct runner. Beam is an optional dependency (the extra
`beam`), hence imported only when such a run is started.
"""

import functools
import json
import pickle
from collections.abc import Iterator

import tensorflow as tf

from spinenet_tf.data.shards import Runner, Shard, in_processes, write_json, write_shard

JOBS, RESULT = ".jobs", ".result.json"


def runner(beam_options: str | None, workers: int | None) -> Runner:
    """What writes shards: a Beam pipeline with these options or, with None, processes here."""
    if beam_options is None:
        return functools.partial(in_processes, workers=workers)
    return functools.partial(in_beam, options=beam_options.split())


def in_beam(shards: list[Shard], options: list[str]) -> Iterator[tuple[str, dict]]:
    """Writes shards by a Beam pipeline; yields the path and the result of each, as `in_processes`.

    The shards' folder and the images must be at the same path on every worker (gs://), and workers
    must have this package. A shard is one element, so there should be several for each worker.
    Shards that a stopped pipeline has finished are found again by their results.

    Args:
      options: Beam's pipeline options, such as ['--runner=DataflowRunner', '--project=P', ...].

    Raises:
      ImportError: Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ImportError("--beam_options needs Apache Beam: pip install apache-beam") from error
    pending = [s for s in shards if not tf.io.gfile.exists(s.path + RESULT)]
    for shard in pending:
        with tf.io.gfile.GFile(shard.path + JOBS, "wb") as file:
            file.write(pickle.dumps(shard))
    if pending:
        with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
            paths = pipeline | "shards" >> beam.Create([shard.path for shard in pending])
            _ = paths | beam.Reshuffle() | "convert" >> beam.Map(convert_shard)
    for shard in shards:
        with tf.io.gfile.GFile(shard.path + RESULT) as file:
            result = json.load(file)
        yield shard.path, result
        for kind in (JOBS, RESULT):
            if tf.io.gfile.exists(shard.path + kind):
                tf.io.gfile.remove(shard.path + kind)


def convert_shard(path: str) -> str:
    """What a worker does: writes the shard whose jobs lie beside `path`, then its result."""
    with tf.io.gfile.GFile(path + JOBS, "rb") as file:
        shard = pickle.loads(file.read())
    write_json(path + RESULT, write_shard(shard))
    return path
