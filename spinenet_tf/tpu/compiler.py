"""Compiles a serialized HLO module for a TPU that is not there, with the real compiler (libtpu).

    python compiler.py step.hlo --topology=v3:2x2 --output=step

writes step.txt, the optimised and scheduled program, and prints one line of JSON: bytes of memory
by kind, seconds; or an error, if the program needs more memory than there is. With --plan=FOLDER it
ends where the compiler has assigned memory and before it writes machine code, which takes most of
the time: no step.txt, and the bytes of the plan; 100 MB of dumps are left in the empty FOLDER. A
script of its own, run by path: needs jax and libtpu, and must not share a process with TensorFlow.
"""

import argparse
import glob
import json
import os
import re
import sys
import threading
import time
import traceback

ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not look for the machine's TPU
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several compilations side by side
    "JAX_PLATFORMS": "cpu",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "",
    # What v6e's SparseCore does are operations that jaxlib cannot read from the program.
    "LIBTPU_INIT_ARGS": "--xla_tpu_offload_gather_to_sparsecore=false "
    "--xla_tpu_enable_offloading_scatter_to_sparsecore=false "
    "--xla_tpu_enable_offloading_sort_to_sparsecore=false",
}
MEMORY = ("argument", "output", "alias", "temp", "generated_code")


def compile_for(hlo: bytes, topology: str):
    """A loaded executable of `hlo` for one device of `topology`, such as 'v3:2x2'."""
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax._src.lib import _jax, xla_client
    from jax._src.lib.mlir import ir
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    with mlir.make_ir_context():
        module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(hlo))
        _erase_copies(module, ir)
        options = compiler.get_compile_options(num_replicas=1, num_partitions=1)
        return device.client.compile(module, xla_client.DeviceList((device,)), options)


def _erase_copies(module, ir) -> None:
    """Drops mhlo.copy, an identity that libtpu's front end refuses."""
    copies = []

    def collect(operation):
        if operation.name == "mhlo.copy":
            copies.append(operation)
        return ir.WalkResult.ADVANCE

    module.operation.walk(collect)
    for copy in copies:
        copy.result.replace_all_uses_with(copy.operands[0])
        copy.erase()


def _figures(executable, output: str) -> dict:
    """Bytes of memory by kind; writes the program."""
    stats = executable.get_compiled_memory_stats()
    with open(f"{output}.txt", "w") as file:
        file.write(executable.hlo_modules()[0].to_string())
    return {kind: getattr(stats, f"{kind}_size_in_bytes") for kind in MEMORY}


def planned_bytes(report: str) -> int:
    """Bytes of the chip's main memory in the compiler's report of memory usage.

    It is the space 'default'; what v4's report names 'hbm' has the size of its memory on chip.

    Raises:
      ValueError: it is no such report.
    """
    if not (found := re.search(r"^Memory Space: default.*\nTotal bytes: (\d+)", report, re.M)):
        raise ValueError(f"no report of memory usage: {report[:200]!r}")
    return int(found[1])


def _end_with_plan(folder: str, start: float) -> None:
    """Waits for the program that is written after the report of memory usage, then ends."""
    while not glob.glob(f"{folder}/*after_buffer_assignment.txt"):
        time.sleep(0.1)
    try:
        with open(glob.glob(f"{folder}/*memory-usage-report.txt")[0]) as file:
            figures = {"planned": planned_bytes(file.read())}
    except (IndexError, ValueError):  # of a thread, which alone would not end the process
        traceback.print_exc()
        os._exit(1)
    _end(figures, start)


def _end(figures: dict, start: float) -> None:
    print(json.dumps(figures | {"seconds": round(time.monotonic() - start, 1)}))
    sys.stdout.flush()
    os._exit(0)  # libtpu takes long to end


def main() -> None:
    """Compiles the file that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("hlo")
    parser.add_argument("--topology", required=True)
    parser.add_argument("--output", required=True, help="path without ending")
    parser.add_argument("--plan", help="end when memory is assigned; an empty folder for dumps")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    os.environ.pop("TPU_LIBRARY_PATH", None)
    start = time.monotonic()
    if args.plan:
        os.environ["XLA_FLAGS"] = f"--xla_dump_to={args.plan} --xla_dump_hlo_as_text=true"
        threading.Thread(target=_end_with_plan, args=(args.plan, start), daemon=True).start()
    with open(args.hlo, "rb") as file:
        hlo = file.read()
    try:
        figures = _figures(compile_for(hlo, args.topology), args.output)
    except Exception as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        figures = {"error": str(error)[:1000]}
    _end(figures, start)


if __name__ == "__main__":
    main()
