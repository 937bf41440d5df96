#!/usr/bin/env python3
"""GPT-2 124M optimizer steps in PyTorch on one GPU, for a side-by-side run with Stretto.

usage: torch_gpu.py [--batch 64] [--length 1024] [--tokens 524288] [--steps 10] [--no-compile]
torch.compile, flash attention, bf16 autocast over f32 parameters, fused AdamW, vocabulary padded to
50304, random tokens. Prints one JSON line with the median step after four of warm-up.
"""
import argparse
import json
import statistics
import time

import torch
from torch_gpt2 import Gpt2


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=524288, help="of an optimizer step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda")
    vocabulary, used = 50304, 50257
    model = Gpt2(vocabulary).to(device)
    step_model = model if args.no_compile else torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95),
                                  weight_decay=0.1, fused=True)
    micro = max(1, args.tokens // (args.batch * args.length))
    times = []
    warm_up = 4
    for _ in range(args.steps + warm_up):
        batches = [torch.randint(used, (args.batch, args.length + 1), device=device)
                   for _ in range(micro)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        for ids in batches:
            with torch.autocast("cuda", torch.bfloat16):
                loss = step_model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()) / micro
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    median = statistics.median(times[warm_up:])
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__,
                      "step_ms": median * 1e3,
                      "tokens_per_second": micro * args.batch * args.length / median,
                      "peak_bytes": torch.cuda.max_memory_allocated()}))


if __name__ == "__main__":
    main()
