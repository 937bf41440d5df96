#!/usr/bin/env python3
"""stretto-convert against transformers: a random model of each family goes from-hf and to-hf again;
transformers must load the result, compute the same logits and find the same bytes.

    roundtrip.py path/to/stretto-convert

Exit code 77: the Python packages are not there.
"""

import json
import pathlib
import struct
import subprocess
import sys
import tempfile

try:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    from generate import our_names
except ImportError as error:
    print(f"skipped: {error}; pip install torch transformers safetensors")
    sys.exit(77)

SMALL = dict(vocab_size=53, num_hidden_layers=2, max_position_embeddings=17,
             bos_token_id=None, eos_token_id=[5, 7])


def rotary(config_class, tied=False, **more):
    return config_class(**(SMALL | dict(
        hidden_size=18, intermediate_size=11, num_attention_heads=6, num_key_value_heads=2,
        head_dim=4, rms_norm_eps=1e-6, tie_word_embeddings=tied) | more))


LLAMA31 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 9}
CASES = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=53, n_positions=17, n_embd=15, n_layer=2,
                                            n_head=3, n_inner=13, bos_token_id=1, eos_token_id=2),
    "llama": lambda: rotary(transformers.LlamaConfig),
    "llama31_tied": lambda: rotary(transformers.LlamaConfig, True, rope_parameters=LLAMA31),
    "qwen2_tied": lambda: rotary(transformers.Qwen2Config, True),
    "qwen3": lambda: rotary(transformers.Qwen3Config),
}


class Converter:
    def __init__(self, program):
        self.program = program

    def __call__(self, *arguments):
        subprocess.run([self.program, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)

    def refusal(self, *arguments):
        """The message of a call that must fail with one sentence."""
        result = subprocess.run([self.program, *map(str, arguments)], capture_output=True, text=True)
        assert result.returncode in (1, 2), (arguments, result)
        assert result.stderr.count("\n") == 1 and not result.stdout, result
        return result.stderr


def raw_tensors(directory):
    """Every tensor's type, shape and bytes, read without a library."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        size, = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8:8 + size]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = (entry["dtype"], entry["shape"],
                                 data[8 + size + begin:8 + size + end])
    return tensors


def logits(directory, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    ids = torch.arange(14).remainder(11)[None]
    with torch.no_grad():
        return model.eval()(ids).logits


def round_trip(convert, config, root, dtype):
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.copy_(0.3 * torch.randn_like(parameter) + (parameter.dim() == 1))
    model.to(dtype).save_pretrained(root / "hf")
    convert("from-hf", root / "hf", root / "ours")
    convert("to-hf", root / "ours", root / "back")
    # In between, each tensor has the place that the reference values were written with.
    shard, = (root / "ours" / "step-00000000").glob("*.safetensors")
    ours, expected = load_file(shard), our_names(config.model_type, model.named_parameters())
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert raw_tensors(root / "back") == raw_tensors(root / "hf")
    assert torch.equal(logits(root / "back", dtype), logits(root / "hf", dtype))
    back = transformers.AutoConfig.from_pretrained(root / "back")
    for key in ("bos_token_id", "eos_token_id", "tie_word_embeddings", "vocab_size"):
        assert getattr(back, key) == getattr(config, key), key
    # The step directory itself is taken, too.
    convert("to-hf", root / "ours" / "step-00000000", root / "again")
    assert raw_tensors(root / "again") == raw_tensors(root / "hf")
    return model


def other_forms(convert, root):
    """Names without prefix and version 4's configuration; types converted; what must be refused."""
    weights = load_file(root / "hf" / "model.safetensors")
    config = json.loads((root / "hf" / "config.json").read_text())
    hub = root / "hub"
    hub.mkdir()
    bare = {n.removeprefix("transformer.").removeprefix("model."): w for n, w in weights.items()}
    if config["model_type"] == "gpt2":
        bare["h.0.attn.bias"] = torch.ones(1, 1, 17, 17)  # a buffer of old files
    save_file(bare, hub / "model.safetensors")
    if (rope := config.pop("rope_parameters", None)) is not None:
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    (hub / "config.json").write_text(json.dumps(config))
    convert("from-hf", hub, root / "hub_ours")
    convert("to-hf", root / "hub_ours", root / "hub_back")
    assert raw_tensors(root / "hub_back") == raw_tensors(root / "hf")

    convert("to-hf", root / "ours", root / "bf16", "--dtype", "bf16", "--eos", 3)
    rounded = load_file(root / "bf16" / "model.safetensors")
    assert all(torch.equal(rounded[n], w.bfloat16()) for n, w in weights.items())
    back = transformers.AutoConfig.from_pretrained(root / "bf16")
    assert back.dtype == torch.bfloat16 and back.eos_token_id == 3

    def refused(change_weights=None, change_config=None):
        broken = root / "broken"
        broken.mkdir(exist_ok=True)
        w, c = dict(bare), dict(config)
        if change_weights:
            change_weights(w)
        if change_config:
            change_config(c)
        save_file(w, broken / "model.safetensors")
        (broken / "config.json").write_text(json.dumps(c))
        return convert.refusal("from-hf", broken, root / "broken_ours")

    final = "ln_f.weight" if config["model_type"] == "gpt2" else "norm.weight"
    assert "no tensor" in refused(lambda w: w.pop(final))
    assert "has shape [3]" in refused(lambda w: w.update({final: torch.zeros(3)}))
    assert "has no place" in refused(lambda w: w.update({"score.weight": torch.zeros(3)}))
    assert "has type I32" in refused(
        lambda w: w.update({final: w[final].to(torch.int32)}))
    assert "vocab_size" in refused(change_config=lambda c: c.pop("vocab_size"))
    assert not (root / "broken_ours").exists()
    assert "config.json" in convert.refusal("from-hf", root / "nowhere", root / "x")
    assert "nowhere" in convert.refusal("to-hf", root / "nowhere", root / "x")
    assert "from-hf" in convert.refusal("from-hf", root)
    assert "vocabulary" in convert.refusal("to-hf", root / "ours", root / "x", "--eos", 53)


def main():
    convert = Converter(sys.argv[1])
    for name, make in CASES.items():
        for dtype in (torch.float32, torch.bfloat16):
            with tempfile.TemporaryDirectory() as folder:
                root = pathlib.Path(folder)
                round_trip(convert, make(), root, dtype)
                if dtype == torch.float32:
                    other_forms(convert, root)
        print(f"{name}: the same bytes and logits")


if __name__ == "__main__":
    main()
