"""What the tests of failing runs share."""
import json
import subprocess


def running(pid):
    """Whether the process exists and has not ended."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def prepare(tokenize, scratch, config, words=lambda: "milk"):
    """Writes a small text, its tokens (text.train.bin) and config.json into the folder."""
    with open(f"{scratch}/text.txt", "w") as text:
        text.writelines(f"{i * i} bottles of {words()}\n\n" for i in range(400))
    subprocess.run([tokenize, "--tokenizer", "bytes", "--output", f"{scratch}/text",
                    f"{scratch}/text.txt"], check=True, stdout=subprocess.DEVNULL)
    with open(f"{scratch}/config.json", "w") as file:
        json.dump(config, file)
