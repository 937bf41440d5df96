#!/usr/bin/env python3
"""Makes the table of whole steps on one GPU (docs/performance.md): tokens a second, the floor of the
same work on the same GPU, planned beside taken memory, and where the time goes.

usage: gpu_table.py --build BUILD_DIR --output DIR [--rows ROW,...] [--steps 8] [--no-torch]
       gpu_table.py --print DIR

Rows: gpt2 (with PyTorch between two runs of ours), 0.5b, 1.5b, 1.5b-fp8, 7b; all of them take ten to
fifteen minutes on an H200. DIR gets what was measured, one file each; --print makes the table of it
again.

The floor of a step is the sum of three parts, each measured in the same run (`stretto-bench
kernels`): products, each at the rate of its own shape; attention, at its own rate; and the bytes
of everything else, each input read once and each output written once, at the rate of a copy.
Kernels there run one after the other for some milliseconds, so a GPU that its power limit holds
back in whole steps stays above the floor.
"""
import argparse
import json
import pathlib
import re
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
# PyTorch on GPT-2 124M below 95 % of 470 k tok/s: something else is wrong with the machine.
LEAST_TORCH = 0.95 * 470e3

# Configuration, what is changed in it, and the least of it that we ask for: tokens a second.
ROWS = {
    "gpt2": ("GPT-2 124M, B 64", "bench_gpt2_124m_cuda.json", {}, None),
    "0.5b": ("Qwen2.5-0.5B, B 32", "bench_qwen2_0.5b_cuda.json", {}, 157e3),
    "1.5b": ("Qwen2.5-1.5B, B 32, bf16 moments", "bench_qwen2_1.5b_cuda.json",
             {"runtime.recompute": "none"}, 61.5e3),
    "1.5b-fp8": ("the same, B 16, in FP8 (e4m3)", "bench_qwen2_1.5b_cuda.json",
                 {"runtime.recompute": "none", "batch.micro": 16, "runtime.fp8": "e4m3"}, 75e3),
    "7b": ("Qwen2.5-7B, B 8, bf16 moments, no masters, 131,072 tokens a step",
           "bench_qwen2_7b_cuda.json",
           {"batch.global": 128, "batch.micro": 8, "optimizer.offload": "false"}, 14.2e3),
}
GPT2_RATIO = 1.25
MOST_PARAMETERS = 1 << 28  # of the optimizer's tensors when their kernels are measured alone
# What `train --profile` calls the layers of each family of kernels.
FAMILIES = {
    "products of the blocks": ("attn.qkv", "attn.out", "mlp.up", "mlp.gate_up", "mlp.down"),
    "attention": ("attn",),
    "head and loss": ("head",),
    "norms": ("attn_norm", "mlp_norm", "norm"),
    "embedding": ("embed",),
}
LEAST_SHARE = 0.85  # of the copy rate, of kernels that their bytes bound


def run(command, path):
    """Runs a program that writes its results to `path`."""
    print("+", " ".join(map(str, command)), file=sys.stderr, flush=True)
    try:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True,
                              errors="replace")
    except OSError as error:
        sys.exit(f"gpu_table.py: {command[0]} cannot be started: {error.strerror}")
    if done.returncode != 0:
        sys.exit(f"gpu_table.py: {command[0]} ended with {done.returncode}:\n"
                 f"{done.stdout[-2000:]}{done.stderr[-2000:]}")
    if command[0] == sys.executable:
        if not done.stdout.strip():
            sys.exit(f"gpu_table.py: {command[1]} has printed no results")
        path.write_text(done.stdout.splitlines()[-1] + "\n")


def load(path):
    """What a program has measured: a device, and results that are not empty."""
    try:
        read = json.loads(path.read_text())
    except OSError as error:
        sys.exit(f"gpu_table.py: {path} cannot be read: {error.strerror}; measure again, into a new "
                 "folder")
    except ValueError as error:
        sys.exit(f"gpu_table.py: {path} is no JSON ({error}); measure again, into a new folder")
    if not isinstance(read, dict) or read.get("results", [0]) == []:
        sys.exit(f"gpu_table.py: {path} holds no results; measure again, into a new folder")
    return read


def config_of(row):
    """The configuration of a row with its changes, as nested dictionaries."""
    _, name, changes, _ = ROWS[row]
    lines = (ROOT / "configs" / name).read_text().splitlines()
    config = json.loads("\n".join(re.sub(r"^\s*//.*", "", line) for line in lines))
    for key, value in changes.items():
        section, field = key.split(".")
        config[section][field] = json.loads(value) if value in ("true", "false") else value
    return config


def sizes_of(config):
    """What the kernels' shapes are made of, in the names of `stretto-bench kernels`."""
    model = config["model"]
    gpt2 = model["family"] == "gpt2"
    hidden, heads = model["hidden"], model["heads"]
    kv_heads = model.get("kv_heads", heads)
    ffn = model.get("ffn", 4 * hidden)
    rows = model["vocabulary"]
    qkv = (heads + 2 * kv_heads) * (hidden // heads)
    block = hidden * (qkv + hidden + (2 if gpt2 else 3) * ffn) + qkv + 2 * hidden
    if gpt2:
        block += hidden + ffn + hidden + 2 * hidden  # biases of products and of norms
    tied = model.get("tie_embeddings", True)
    parameters = model["layers"] * block + rows * hidden * (1 if tied else 2)
    parameters += model["max_positions"] * hidden + 2 * hidden if gpt2 else hidden
    return {
        "gpt2": gpt2, "layers": model["layers"], "parameters": parameters,
        "micro_batches": config["batch"]["global"] // config["batch"]["micro"],
        "shapes": {
            "tokens": config["batch"]["micro"] * config["data"]["sequence_length"],
            "length": config["data"]["sequence_length"], "hidden": hidden, "heads": heads,
            "kv-heads": kv_heads, "ffn": ffn, "vocabulary": (rows + 63) // 64 * 64,
            "parameters": min(parameters, MOST_PARAMETERS),
        },
    }


def measure(row, args):
    """Runs everything of one row."""
    _, name, changes, _ = ROWS[row]
    bench = args.build / "benchmarks" / "stretto-bench"
    config = [ROOT / "configs" / name]
    for key, value in changes.items():
        config += ["--set", f"{key}={value}"]
    train = [bench, "train", *config, "--set", f"steps={args.steps + 3}"]
    path = args.output / f"{row}.json"
    run([*train, "--json", path], path)
    if row == "gpt2" and not args.no_torch:
        path = args.output / "torch.json"
        run([sys.executable, ROOT / "benchmarks/train/torch_gpu.py", "--steps", args.steps], path)
        path = args.output / "gpt2-again.json"
        run([*train, "--json", path], path)
    path = args.output / f"{row}.profile.json"
    run([bench, "train", *config, "--profile", "--json", path], path)
    path = args.output / f"{row}.kernels.json"
    shapes = [x for k, v in sizes_of(config_of(row))["shapes"].items() for x in (f"--{k}", v)]
    run([bench, "kernels", *shapes, "--dtype", "bf16", "--repetitions", 5, "--json", path], path)


def bound_by_bytes(config):
    """The kernels of a row that do little more than move bytes."""
    gpt2 = config["model"]["family"] == "gpt2"
    norm = "layernorm" if gpt2 else "rmsnorm"
    names = [f"{norm} + residual forward", f"{norm} backward", "loss fused", update_of(config),
             "sum of squares"]
    return names if gpt2 else [*names, "rope", "swiglu forward", "swiglu backward"]


def update_of(config):
    """What `stretto-bench kernels` calls the update of this optimizer."""
    optimizer = config["optimizer"]
    name = "adamw" + (" bf16 moments" if optimizer.get("moments") == "bf16" else "")
    return name + ("" if optimizer.get("masters", True) else ", no masters")


def floors(row, kernels):
    """Milliseconds of a step by family of kernels."""
    config = config_of(row)
    sizes = sizes_of(config)
    shapes, layers, gpt2 = sizes["shapes"], sizes["layers"], sizes["gpt2"]
    fp8 = "fp8" in config["runtime"]
    by_name = {k["name"]: k for k in kernels}
    copy = by_name["copy"]["bytes_per_second"]

    def product(name, eight_bits=False):
        prefix = f"{'fp8' if eight_bits else 'linear'} {name} "
        passes = [k["seconds"] for n, k in by_name.items()
                  if n.startswith(prefix) and re.search(r"\d (forward|backward (input|weight))$", n)]
        if len(passes) != 3:
            sys.exit(f"gpu_table.py: {row}: {len(passes)} measurements of '{prefix}...', not 3")
        return sum(passes)

    def moved(name):
        return by_name[name]["bytes_per_second"] * by_name[name]["seconds"] / copy

    block = sum(product(n, fp8) for n in ("qkv", "out", "down"))
    block += (1 if gpt2 else 2) * product("up", fp8)
    if fp8:  # inputs and gradients become FP8, as they are and transposed
        width = moved("fp8 quantize and transpose") / shapes["hidden"]
        qkv = shapes["hidden"] + 2 * shapes["kv-heads"] * shapes["hidden"] // shapes["heads"]
        block += width * (3 * shapes["hidden"] + shapes["ffn"])  # inputs: norm, attention, norm, ffn
        block += width * (qkv + 2 * shapes["hidden"] + 2 * shapes["ffn"])
    attention = [k["seconds"] for n, k in by_name.items()
                 if re.fullmatch(r"attention \d+x\d+ (forward|backward)", n)]
    norm = "layernorm" if gpt2 else "rmsnorm"
    norms = moved(f"{norm} + residual forward") + moved(f"{norm} backward input")
    micro = {
        "products of the blocks": layers * block,
        "attention": layers * (sum(attention) + (0 if gpt2 else 2 * moved("rope"))),
        "head and loss": product("head") + moved("loss fused"),
        "norms": (2 * layers + 1) * norms,
        "embedding": moved("embedding forward") + moved("embedding backward"),
    }
    if not gpt2:
        micro["products of the blocks"] += layers * (moved("swiglu forward") +
                                                     moved("swiglu backward"))
    update = (moved(update_of(config)) + moved("sum of squares")) / shapes["parameters"]
    step = {family: 1e3 * sizes["micro_batches"] * s for family, s in micro.items()}
    step["norm and update"] = 1e3 * update * sizes["parameters"]
    return step


def measured(row, profile):
    """Milliseconds of a step by family of kernels, the host waiting after each layer."""
    sizes = sizes_of(config_of(row))
    found = {}
    for item in profile:
        kind = item["name"].split()[0]
        for family, kinds in FAMILIES.items():
            if re.fullmatch(r".* [FRBW]", item["name"]) and kind in kinds:
                found[family] = found.get(family, 0) + 1e3 * sizes["micro_batches"] * item["seconds"]
        if item["name"] == "norm and update":
            found[item["name"]] = 1e3 * item["seconds"]
    return found


def show(folder, rows):
    """Prints the tables as Markdown."""
    first = load(folder / f"{rows[0]}.json")
    print(f"{first['device']}\n")
    print("| model | aim | tok/s | floor of a step, ms | step, ms | over the floor "
          "| planned | taken | difference |\n|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        label, _, _, aim = ROWS[row]
        step = load(folder / f"{row}.json")["results"][0]
        floor = floors(row, load(folder / f"{row}.kernels.json")["results"])
        speed = f"{step['tokens_per_second'] / 1e3:.1f} k"
        wanted = f"{aim / 1e3:g} k" if aim else f"{GPT2_RATIO} x PyTorch"
        if (folder / "torch.json").exists() and row == "gpt2":
            torch = load(folder / "torch.json")["tokens_per_second"]
            again = load(folder / "gpt2-again.json")["results"][0]["tokens_per_second"]
            ours = (step["tokens_per_second"] + again) / 2
            speed += (f", {again / 1e3:.1f} k; PyTorch between them {torch / 1e3:.1f} k: "
                      f"**{ours / torch:.3f}**")
            if torch < LEAST_TORCH:
                speed += f" (void: PyTorch is below {LEAST_TORCH / 1e3:g} k)"
        total = sum(floor.values())
        planned, taken = step["planned_bytes"] / 1e6, step["device_bytes"] / 1e6
        print(f"| {label} | {wanted} | {speed} | {total:.1f} | {step['step_ms']:.1f} "
              f"| {step['step_ms'] / total:.3f} | {planned:,.0f} MB | {taken:,.0f} MB "
              f"| {taken - planned:,.0f} MB |")
    for row in rows:
        kernels = load(folder / f"{row}.kernels.json")["results"]
        floor = floors(row, kernels)
        took = measured(row, load(folder / f"{row}.profile.json")["results"])
        print(f"\n{ROWS[row][0]}: ms of a step, the host waiting after each layer\n")
        print("| | ms | floor | over it |\n|---|---|---|---|")
        for family, ms in took.items():
            print(f"| {family} | {ms:.1f} | {floor[family]:.1f} | {ms / floor[family]:.2f} |")
        print(f"| all | {sum(took.values()):.1f} | {sum(floor.values()):.1f} "
              f"| {sum(took.values()) / sum(floor.values()):.2f} |")
        names = bound_by_bytes(config_of(row))
        shares = sorted((k["share"], k["name"]) for k in kernels if k["name"] in names)
        if len(shares) != len(names):
            sys.exit(f"gpu_table.py: {row}: not all of {', '.join(names)} were measured")
        low = sum(share < LEAST_SHARE for share, _ in shares)
        print(f"\nOf the copy rate ({kernels[0]['bytes_per_second'] / 1e9:,.0f} GB/s; asked "
              f"{LEAST_SHARE:g}, {low} below): "
              f"{', '.join(f'{name} {share:.2f}' for share, name in shares)}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=pathlib.Path, help="holds benchmarks/stretto-bench")
    parser.add_argument("--output", type=pathlib.Path, help="a new or an empty folder")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--steps", type=int, default=8, help="behind the warm-up")
    parser.add_argument("--no-torch", action="store_true", help="without PyTorch's side")
    parser.add_argument("--print", type=pathlib.Path, metavar="DIR", help="measure nothing")
    args = parser.parse_args()
    rows = args.rows.split(",")
    for row in rows:
        if row not in ROWS:
            parser.error(f"--rows: '{row}' is none of {', '.join(ROWS)}")
    if args.print:
        there = [row for row in rows if (args.print / f"{row}.kernels.json").exists()]
        if not there:
            parser.error(f"--print: '{args.print}' has no measurements")
        try:
            return show(args.print, there)
        except (LookupError, TypeError, ArithmeticError) as error:
            sys.exit(f"gpu_table.py: the files in {args.print} are not of this version "
                     f"({type(error).__name__}: {error}); measure again, into a new folder")
    if not args.build or not args.output:
        parser.error("--build and --output are needed, or --print")
    if args.steps < 1:
        parser.error(f"--steps must be 1 or more, not {args.steps}")
    if not (args.build / "benchmarks" / "stretto-bench").exists():
        parser.error(f"--build: '{args.build}' has no benchmarks/stretto-bench; build with "
                     "-DSTRETTO_BUILD_BENCHMARKS=ON")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: '{args.output}' cannot be made: {error.strerror}")
    if any(args.output.iterdir()):
        parser.error(f"--output: '{args.output}' is not empty; name a new folder")
    for row in rows:
        measure(row, args)
    show(args.output, rows)


if __name__ == "__main__":
    # What runs ends with it.
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, lambda number, _: sys.exit(128 + number))
    main()
