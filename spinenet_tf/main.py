"""Trains, evaluates, shows and exports what a gin recipe describes.

    python -m spinenet_tf.main --mode=train_and_eval --gin_file=gin_configs/demo.gin \\
        --model_dir=/tmp/demo
"""

import difflib
import os
import re
import sys
from logging import getLogger
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import gin
from absl import app, flags, logging

MODES = (
    "train", "eval", "train_and_eval", "predict", "export", "profile", "draw", "convert",
    "tpu_compile",
)  # fmt: skip
SETTINGS = ("activation", "epsilon", "image_size", "anchor_size")  # flags about foreign checkpoints
FLAGS = flags.FLAGS
flags.DEFINE_enum("mode", "train_and_eval", MODES, "what to do")
flags.DEFINE_multi_string("gin_file", [], "recipe; several are read in order, later ones win")
flags.DEFINE_multi_string("gin_param", [], "one binding, such as 'Schedule.epochs=12'")
flags.DEFINE_string("model_dir", None, "folder of checkpoints, summaries and figures; gs:// works")
flags.DEFINE_multi_string("images", [], "predict: image files or globs")
flags.DEFINE_string(
    "output",
    None,
    "to write; eval, predict, export, tpu_compile: folder; draw: PNG or SVG; convert: folder or "
    "file",
)
flags.DEFINE_string(
    "checkpoint", None, "convert, eval, predict, export: weights of the official code (TF1), of "
    "Model Garden (TF2) or ours"
)  # fmt: skip
flags.DEFINE_string("init_checkpoint", None, "train: weights of any such kind to start from")
flags.DEFINE_enum("format", "own", ("own", "official_tf1"), "convert: what to write")
flags.DEFINE_bool("optimizer", False, "convert: the momentum too, so that training can go on")
flags.DEFINE_string("activation", None, "of a foreign checkpoint's model, if the guess is wrong")
flags.DEFINE_float("epsilon", None, "batch norm's, likewise")
flags.DEFINE_integer("image_size", None, "side in pixels of the model's input, likewise")
flags.DEFINE_float("anchor_size", None, "side of its smallest anchors in strides, likewise")
flags.DEFINE_list(
    "tpu_type", None, "tpu_compile: some of v3 (default), v4, v5e, v5p, v6e, or slices as v4-64"
)
flags.DEFINE_bool("plan", False, "tpu_compile: see what fits, without machine code and times")
flags.DEFINE_bool("json", False, "print JSON instead of text")


def main(argv: list[str]) -> None:
    """Runs the mode that the flags name; a mistake of the user ends in one line."""
    if argv[1:]:
        raise app.UsageError(f"what is {argv[1]!r}? All arguments are --flags.")
    try:
        _run(FLAGS)
    except Exception as error:
        if FLAGS.verbosity > 0:
            raise
        # As it ends, TensorFlow would list each value of a checkpoint that was not restored.
        getLogger("tensorflow").setLevel("ERROR")
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        sys.exit(f"error: {kind}{error}\n(--verbosity=1 shows where)")


def _run(args) -> None:
    _check(args)
    import tensorflow as tf  # after the flags are known to be right: it takes seconds

    from spinenet_tf import modes

    if args["verbosity"].using_default_value:
        logging.set_verbosity(logging.WARNING)
        tf.get_logger().setLevel("WARNING")
    settings = {name: args[name].value for name in SETTINGS}
    if args.mode == "convert":
        return modes.convert(args.checkpoint, args.output, args.format, args.optimizer, **settings)
    if args.checkpoint:  # becomes a model folder, of which the rest of the mode is
        modes.adopt(args.checkpoint, args.model_dir, **settings)
    start = [f"Training.init_from = {args.init_checkpoint!r}"] if args.init_checkpoint else []
    parse_gin(args.gin_file, [*args.gin_param, *start], args.model_dir)
    modes.check_read(args.gin_param)
    match args.mode:
        case "train":
            modes.train(args.model_dir)
        case "train_and_eval":
            modes.train_and_eval(args.model_dir)
        case "eval":
            modes.evaluate(args.model_dir, args.output or args.model_dir)
        case "predict":
            if not args.images:
                raise ValueError("--mode=predict needs --images")
            modes.predict(
                args.model_dir, args.images, args.output or f"{args.model_dir}/predictions"
            )
        case "export":
            modes.export(args.model_dir, args.output or f"{args.model_dir}/saved_model")
        case "profile":
            modes.profile(args.json)
        case "tpu_compile":
            modes.tpu_compile(args.tpu_type or ["v3"], args.output or "", args.json, args.plan)
        case "draw":
            modes.draw(args.output or "graph.png")


def _check(args) -> None:
    """Flags that do not go with the mode would silently do nothing.

    Raises:
      ValueError: says which.
    """
    mode = args.mode
    if mode not in ("profile", "draw", "convert", "tpu_compile") and not args.model_dir:
        raise ValueError(f"--mode={mode} needs --model_dir")
    if mode == "convert" and not (args.checkpoint and args.output):
        raise ValueError("--mode=convert needs --checkpoint and --output")
    taken = {
        "checkpoint": ("convert", "eval", "predict", "export"),
        "init_checkpoint": ("train", "train_and_eval"),
        "optimizer": ("convert",),
        "tpu_type": ("tpu_compile",),
        "plan": ("tpu_compile",),
        "images": ("predict",),
        "output": ("eval", "predict", "export", "draw", "convert", "tpu_compile"),
        "json": ("profile", "tpu_compile"),
        "gin_file": tuple(m for m in MODES if m != "convert"),
        "gin_param": tuple(m for m in MODES if m != "convert"),
        "format": ("convert",),
    }
    for flag, modes in taken.items():
        if args[flag].present and args[flag].value and mode not in modes:
            raise ValueError(f"--{flag} does not go with --mode={mode}, but with {modes}")
    given = [f"--{name}" for name in SETTINGS if args[name].value is not None]
    if given and not args.checkpoint:
        raise ValueError(f"{', '.join(given)}: only with --checkpoint; recipes have gin parameters")


def parse_gin(files: list[str], params: list[str], model_dir: str | None) -> None:
    """Reads recipes, or the one saved in `model_dir`, and locks the configuration.

    Raises:
      FileNotFoundError: no such recipe. ValueError: a name that nothing has, with the nearest one,
        or a scope in which nothing is read.
    """
    from tensorflow.io import gfile

    gin.config.register_file_reader(gfile.GFile, gfile.exists)  # gs://
    saved = f"{model_dir}/config.gin"
    if not files and model_dir and gfile.exists(saved):
        files = [saved]
    if not files:
        raise ValueError("no recipe: give --gin_file (see gin_configs/)")
    for file in files:
        if not gfile.exists(file):
            raise FileNotFoundError(f"--gin_file={file}: no such file")
        for folder in Path(file).resolve().parents[:3]:
            gin.add_config_file_search_path(str(folder))
    gin.add_config_file_search_path(str(Path(__file__).resolve().parents[1] / "gin_configs"))
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # gin logs every folder in which an include is not
    try:
        gin.parse_config_files_and_bindings(files, params)
    except SyntaxError as error:
        raise ValueError(f"{error.msg}: {error.text}; strings need quotes of their own") from error
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}{_nearest(str(error))}") from error
    finally:
        logging.set_verbosity(verbosity)
    for scope, selector in gin.config._CONFIG:
        name = selector.rpartition(".")[2]
        read = scope in ("", "train", "eval") and (not scope or name == "Data")
        if selector.startswith("spinenet_tf.") and not read:
            raise ValueError(f"{scope}/{name}: nothing reads it; scopes are train/Data, eval/Data")


def _nearest(message: str) -> str:
    """A suggestion for the name that gin did not know."""
    unknown = re.search(r"(?:matching|parameter named) '([^']+)'", message)
    if not unknown:
        return ""
    known = sorted(_known_names())
    close = difflib.get_close_matches(unknown[1].split("/")[-1], known, n=1, cutoff=0.5)
    return f"\ndid you mean {close[0]!r}?" if close else f"\nknown: {', '.join(known)}"


def _known_names() -> set[str]:
    import inspect

    names = set()
    for selector, configurable in gin.config._REGISTRY.items():
        if configurable.module and configurable.module.startswith("spinenet_tf"):
            names.add(selector.split(".")[-1])
            names.update(inspect.signature(configurable.wrapper).parameters)
    return names


if __name__ == "__main__":
    app.run(main)
