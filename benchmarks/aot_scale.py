"""Compiles a training step for machines that are not there, and reads what it would take.

    python benchmarks/aot_scale.py --config configs/llama_3b.py --devices v6e:16x16 --mesh 1,256,1
    python benchmarks/aot_scale.py --config configs/tokenizer_256.py --devices cpu:8 --mesh 1,8,1

`v6e:16x16` and the like are TPU topologies, compiled by the real TPU compiler in `libtpu` (point
TPU_LIBRARY_PATH to its libtpu.so if it is not installed beside jax); no TPU is needed. `cpu:N`
compiles for N emulated devices: the same partitioning, other memory. Prints one row of the table in
docs/scaling.md and, with --out, appends all numbers as a JSON line.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import tempfile
import time

FIELDS = (
    "config | devices | mesh | batch | arguments GB | temporaries GB | TFLOP | MB sent: total | "
    "all-gather | reduce-scatter | all-reduce | all-to-all | permute | collectives | compile s"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, type=pathlib.Path)
    parser.add_argument("--devices", required=True, help="TPU topology such as v6e:2x4, or cpu:8")
    parser.add_argument("--mesh", required=True, help="data,fsdp,tensor; -1 for what is left")
    parser.add_argument("--rows", type=int, default=1, help="batch rows per device")
    parser.add_argument("--rules", help="sharding rules as JSON, [[regex, rule], ...]")
    parser.add_argument("--accumulate-steps", type=int, default=1)
    parser.add_argument(
        "--attention",
        default="auto",
        help="on CPUs long rows go one by one, which divides badly: xla",
    )
    parser.add_argument("--low-effort", action="store_true", help="compile faster, optimise less")
    parser.add_argument("--out", type=pathlib.Path, help="append the numbers to this file")
    args = parser.parse_args()
    report = measure(args)
    if args.out:
        with args.out.open("a") as file:
            file.write(json.dumps(report) + "\n")
    print(FIELDS)
    print(row(report))


def measure(args) -> dict:
    platform = prepare_environment(args.devices)
    import hlo_costs

    from dicode_jax.config import load_config_file
    from dicode_jax.runtime.platform import tracing_for
    from dicode_jax.runtime.sharding import make_mesh
    from dicode_jax.stages.registry import build_stage
    from dicode_jax.training.setup import plan_stage

    config = load_config_file(args.config)
    data, fsdp, tensor = (int(size) for size in args.mesh.split(","))
    changes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    if args.rules:
        changes["rules"] = tuple(tuple(rule) for rule in json.loads(args.rules))
    devices = find_devices(args.devices, platform)
    rows = args.rows * len(devices)
    config = dataclasses.replace(
        config,
        batch_size=rows,
        sharding=dataclasses.replace(config.sharding, **changes),
        optim=dataclasses.replace(config.optim, accumulate_steps=args.accumulate_steps),
    )
    if hasattr(config, "text_length"):  # a language model: its targets come from a token cache
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, kind="cache", path="unused")
        )
    mesh = make_mesh(config.sharding, devices)
    stage = build_stage(config)
    plan = plan_stage(stage, mesh)
    with tracing_for(attention=args.attention):
        lowered = plan.lower(stage.batch_shapes(rows))
    start = time.perf_counter()
    compiled, text = compile_to_text(lowered, platform, args.low_effort)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    costs = hlo_costs.program_costs(text, len(devices))
    return {
        "config": args.config.stem,
        "dtype": config.dtype,
        "devices": args.devices,
        "num_devices": len(devices),
        "mesh": list(mesh.shape.values()),
        "rules": config.sharding.rules,
        "batch_size": rows,
        "accumulate_steps": args.accumulate_steps,
        "low_effort": args.low_effort,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "flops": costs.flops,
        "sent_bytes": costs.sent,
        "collectives": costs.count,
        "compile_seconds": seconds,
    }


def row(report: dict) -> str:
    """The numbers of one device and step, as a row of a Markdown table."""
    sent = report["sent_bytes"]
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
    cells = [
        report["config"],
        f"{report['num_devices']} ({report['devices']})",
        " x ".join(map(str, report["mesh"])),
        report["batch_size"],
        f"{report['argument_bytes'] / 1e9:.2f}",
        f"{report['temporary_bytes'] / 1e9:.2f}",
        f"{report['flops'] / 1e12:.2f}",
        f"{sum(sent.values()) / 1e6:,.0f}",
        *(f"{sent.get(kind, 0) / 1e6:,.0f}" for kind in kinds),
        sum(report["collectives"].values()),
        f"{report['compile_seconds']:.0f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def prepare_environment(devices: str) -> str:
    """Sets what must be set before jax is imported; returns the platform that compiles."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    kind, _, size = devices.partition(":")
    if kind == "cpu":
        flags = f"--xla_force_host_platform_device_count={int(size)}"
        os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
        return "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    return "tpu"


def find_devices(name: str, platform: str) -> list:
    """Emulated devices, or the abstract ones of a TPU topology."""
    import jax

    if platform == "cpu":
        return jax.devices()
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(name, platform="tpu").devices)


def compile_to_text(lowered, platform: str, low_effort: bool):
    """The compiled program and its text.

    The TPU's is read from a dump: `as_text()` cannot read back its asynchronous instructions.
    """
    if platform == "cpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        if low_effort:
            options |= {"exec_time_optimization_effort": -1.0}
        compiled = lowered.compile(compiler_options=options)
        [path] = pathlib.Path(folder).glob("*train_step*.after_optimizations.txt")
        return compiled, path.read_text()


if __name__ == "__main__":
    main()
