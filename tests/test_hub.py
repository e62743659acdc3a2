"""A model's folder is whole or not there, whatever the Hub on 127.0.0.1 that the test itself serves does to it."""
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data import hub
from data.download import cache_dir
from data.hub import hub_folder

ROOT = Path(hub.__file__).resolve().parent.parent
COMMIT, OTHER_COMMIT = "c" * 40, "d" * 40
WEIGHTS = bytes(range(256)) * 40
SMALL = {"config.json": b'{"model_type": "roberta"}', "vocab.json": b"{}", "merges.txt": b"#version: 0.2\n",
         "tokenizer_config.json": b"{}"}
WANTED = {**SMALL, "model.safetensors": WEIGHTS}
UNWANTED = dict.fromkeys(("README.md", "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin", "model.onnx", "rust_model.ot",
                          "generation_config.json", "bpe_encoder.bin", "original/tokenizer.model", "onnx/config.json",
                          "../evil"), b"x")


def row(file, content):
    """As the Hub lists it: what is large lies in LFS and has a SHA-256, what is small has git's blob id."""
    size = {"rfilename": file, "size": len(content)}
    if file.endswith((".safetensors", ".bin")):
        return {**size, "blobId": "0" * 40, "lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}}
    return {**size, "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path, server = self.path.partition("?")[0], self.server
        file = "list" if path.startswith("/api/") else path.rpartition(f"{server.commit}/")[2]
        server.requests.append((file, self.headers))
        mode = server.modes[file].pop(0) if server.modes.get(file) else "well"
        if isinstance(mode, (int, tuple)):
            code, location = (mode, None) if isinstance(mode, int) else mode
            self.send_response(code)
            if location:  # to a host: the same path there
                self.send_header("Location", location + (self.path if location.startswith("http") else ""))
            for name, value in server.extra.items():
                self.send_header(name, value)
            return self.end_headers()
        if mode == "hang up":
            return self.connection.close()
        listing = {"sha": server.commit, "siblings": list(server.rows.values())}
        body = json.dumps(listing).encode() if file == "list" else server.files[file]
        self.answer({"wrong": bytes(len(body)), "long": body + b"more", "short": body[:-1]}.get(mode, body), mode)

    def answer(self, body, mode):
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        if start and start >= len(body):
            return self.send_error(416)
        partial = start and mode != "whole"
        body = body[start:] if partial else body
        self.send_response(206 if partial else 200)
        if partial:
            self.send_header("Content-Range", f"bytes {start + (mode == 'shifted')}-{start + len(body) - 1}/{start + len(body)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if mode in ("cut", "slow") else body)
        self.wfile.flush()
        if mode == "slow":
            self.server.over.wait(20)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    """files: what it has; rows: what it lists; modes: {file: how it misbehaves, each time}; requests: [(file, headers)]."""
    daemon_threads, block_on_close = True, False

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commit, self.modes, self.extra, self.requests, self.over = COMMIT, {}, {}, [], threading.Event()
        self.offer(files)
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def offer(self, files):
        self.files, self.rows = files, {file: row(file, content) for file, content in files.items()}

    def asked(self, file=None):
        """The files that were asked for; of one file, what Range each request had."""
        return [name if file is None else headers["Range"] for name, headers in self.requests if file in (None, name)]

    def handle_error(self, *args):
        pass

    def stop(self):
        self.over.set()
        self.shutdown()
        self.server_close()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub with one model, caches of its own, no pauses."""
    for name in [name for name in os.environ if name.startswith(("HF_", "XDG_")) or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    server = Server({**WANTED, **UNWANTED})
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DUAL_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "PAUSE", 0)
    monkeypatch.setattr(hub, "TIMEOUT", 9)
    yield server
    server.stop()


@pytest.fixture
def storage(server):
    """Another host, to which the Hub redirects for large files."""
    storage = Server({**WANTED, **UNWANTED})
    yield storage
    storage.stop()


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def final_files():
    return [path for path in cache_dir().rglob("*") if path.is_file() and not path.name.endswith((".part", ".lock"))]


def snapshot(home, files, commit=COMMIT):
    """The Hub's own cache with `files` of a/model."""
    folder = home / "hub" / "models--a--model"
    for file, body in [("refs/main", commit.encode())] + [(f"snapshots/{commit}/{file}", body) for file, body in files.items()]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(body)
    return folder / "snapshots" / commit


# ---------------------------------------------------------------------------------------------------------------------
# What is fetched


def test_the_needed_files_are_fetched_once_and_no_other_is_asked_for(server, capfd):
    folder = hub_folder("a/model")
    assert folder == str(cache_dir() / "hub" / "a--model" / "main") and content(folder) == WANTED
    assert sorted(server.asked()) == sorted(["list", *WANTED])
    assert hub_folder("a/model") == folder and len(server.requests) == 1 + len(WANTED)
    assert sorted(os.listdir(Path(folder).parent)) == [".lock", "main"]
    assert "fetching a/model/model.safetensors ... done in 0 s\n" in capfd.readouterr().err


def test_a_name_without_an_account_and_a_commit_as_revision_work(server):
    assert hub_folder("model", COMMIT) == str(cache_dir() / "hub" / "model" / COMMIT)
    assert content(cache_dir() / "hub" / "model" / COMMIT) == WANTED


INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}).encode()
SHARDS = {"model.safetensors.index.json": INDEX, "model-1.safetensors": b"one", "model-2.safetensors": b"two"}


@pytest.mark.parametrize("weights", [SHARDS, {"pytorch_model.bin": b"pickle"},
                                     {"pytorch_model.bin.index.json": b'{"weight_map": {"a": "p-1.bin"}}', "p-1.bin": b"pickle"}])
def test_each_way_in_which_weights_are_stored_is_taken_and_unnamed_shards_are_not(server, weights):
    server.offer({**SMALL, **weights, "model-3.safetensors": b"of another checkpoint"})
    assert content(hub_folder("a/model")) == {**SMALL, **weights}
    hub_folder("a/model")
    assert len(server.requests) == 1 + len(SMALL) + len(weights)


@pytest.mark.parametrize("shard", ["../evil.safetensors", "/evil.safetensors", "sub/evil.safetensors", "..", "config.json",
                                   "gone.safetensors", 7])
def test_an_index_that_names_anything_but_a_shard_beside_it_is_refused(server, shard, tmp_path):
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    server.offer({**SMALL, "model.safetensors.index.json": index, **({} if shard == "gone.safetensors" else {str(shard): b"x"})})
    with pytest.raises(ValueError, match="is no index of weights|has no gone.safetensors, which its index of weights names"):
        hub_folder("a/model")
    assert not list(tmp_path.rglob("*evil*")) and not (cache_dir() / "hub" / "a--model" / "main").exists()


@pytest.mark.parametrize("missing, words", [(("config.json",), "has no config.json"), (("merges.txt",), "has no vocabulary"),
                                            (("model.safetensors", "pytorch_model.bin"), "has no weights .model.safetensors, ")])
def test_a_model_that_lacks_a_part_is_refused_before_anything_is_fetched(server, missing, words):
    server.offer({file: body for file, body in {**WANTED, **UNWANTED}.items() if file not in missing})
    with pytest.raises(ValueError, match=f"a/model at {server.url} {words}"):
        hub_folder("a/model")
    assert server.asked() == ["list"]


@pytest.mark.parametrize("name", ["../x", "a/b/c", "", "/etc/passwd", "a/", "/a", "a/..", "a/b..c", "..", ".", "a b", "a\n",
                                  "a\\b", "c:x", "a/b?x", "a%2fb", "é", "a--b"])
def test_what_is_no_name_of_a_model_is_refused_before_any_request(server, name):
    with pytest.raises(ValueError, match="is no name of a model"):
        hub_folder(name)
    with pytest.raises(ValueError, match="is no revision of a model"):
        hub_folder("a/model", f"/{name}")
    assert server.requests == [] and not cache_dir().exists()


# ---------------------------------------------------------------------------------------------------------------------
# The Hub's own cache


@pytest.mark.parametrize("files", [WANTED, {**SMALL, **SHARDS},
                                   {"config.json": b"{}", "vocab.txt": b"a", "pytorch_model.bin": b"x"}])
@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "HOME"])
def test_a_whole_model_in_the_hubs_own_cache_is_used_without_a_request(server, files, variable, tmp_path, monkeypatch):
    where = tmp_path / {"HF_HOME": "home", "HF_HUB_CACHE": "other", "HOME": ".cache/huggingface"}[variable]
    folder = snapshot(where, files)
    if variable == "HF_HUB_CACHE":
        monkeypatch.setenv(variable, str(where / "hub"))
    if variable == "HOME":
        monkeypatch.delenv("HF_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
    assert hub_folder("a/model") == hub_folder("a/model", COMMIT) == str(folder)
    assert server.requests == [] and not cache_dir().exists()


@pytest.mark.parametrize("files", [{}, SMALL, {"config.json": b"{}", "model.safetensors": b"x"},
                                   {"vocab.txt": b"x", "model.safetensors": b"x"},
                                   {**SMALL, **SHARDS, "model-2.safetensors": None}])
def test_half_a_model_in_the_hubs_own_cache_is_not_used_and_left_alone(server, files, tmp_path):
    files = {file: body for file, body in files.items() if body}
    folder = snapshot(tmp_path / "home", files)
    assert content(hub_folder("a/model")) == WANTED and content(folder) == files


def test_a_file_that_the_hubs_own_cache_points_to_and_does_not_have_is_missing(server, tmp_path):
    folder = snapshot(tmp_path / "home", SMALL)
    (folder / "model.safetensors").symlink_to(tmp_path / "home" / "blobs" / "gone")
    assert content(hub_folder("a/model")) == WANTED


# ---------------------------------------------------------------------------------------------------------------------
# Transfers that go wrong


def test_what_was_cut_off_goes_on_where_it_stopped(server):
    server.modes["model.safetensors"] = ["cut", "cut"]
    assert content(hub_folder("a/model")) == WANTED
    half = len(WEIGHTS) // 2
    assert server.asked("model.safetensors") == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]


def test_a_server_that_ignores_the_range_is_read_from_its_first_byte(server):
    server.modes["model.safetensors"] = ["cut", "whole"]
    assert content(hub_folder("a/model")) == WANTED
    assert server.asked("model.safetensors") == [None, f"bytes={len(WEIGHTS) // 2}-"]


def test_a_range_other_than_the_one_asked_for_is_not_used(server):
    server.modes["model.safetensors"] = ["cut", "shifted"]
    assert content(hub_folder("a/model")) == WANTED
    assert server.asked("model.safetensors") == [None, f"bytes={len(WEIGHTS) // 2}-", None]


PASSING = "cut", "slow", "hang up", 429, 500, 503
DAMAGE = "wrong", "long", "short"


@pytest.mark.parametrize("file, mode", [("list", mode) for mode in PASSING] + [
    (file, mode) for file in ("config.json", "model.safetensors") for mode in PASSING + DAMAGE])
def test_what_may_pass_is_tried_again(server, file, mode, capfd, monkeypatch):
    if mode == "slow":
        monkeypatch.setattr(hub, "TIMEOUT", 0.2)
    server.modes[file] = [mode] if mode == "slow" else [mode, mode]
    assert content(hub_folder("a/model")) == WANTED
    assert len(server.asked(file)) >= (2 if mode == "slow" else 3) and " failed (" in capfd.readouterr().err


@pytest.mark.parametrize("file, mode, words", [
    ("model.safetensors", "wrong", f"it has SHA-256 [0-9a-f]*, expected is {hashlib.sha256(WEIGHTS).hexdigest()}"),
    ("model.safetensors", "long", "it has 10,244 bytes, expected are 10,240"),
    ("model.safetensors", "short", "it has 10,239 bytes, expected are 10,240"),
    ("vocab.json", "wrong", f"it has blob id [0-9a-f]*, expected is {row('', b'{}')['blobId']}"),
    ("model.safetensors", 503, "answers 503 Service Unavailable")])
def test_what_stays_wrong_is_given_up_by_name_and_leaves_nothing_under_a_final_name(server, file, mode, words):
    server.modes[file] = [mode] * 9
    with pytest.raises(ValueError, match=f"could not fetch a/model/{file} .*{words}") as error:
        hub_folder("a/model")
    assert "\n" not in str(error.value) and len(server.asked(file)) == hub.ATTEMPTS
    assert not (cache_dir() / "hub" / "a--model" / "main").exists() and not list(cache_dir().rglob(f"{file}*"))
    server.modes = {}
    assert content(hub_folder("a/model")) == WANTED


def test_pauses_grow(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(hub, "PAUSE", 1)
    monkeypatch.setattr(hub.time, "sleep", pauses.append)
    server.modes["config.json"] = [500] * 9
    with pytest.raises(ValueError, match="answers 500"):
        hub_folder("a/model")
    assert pauses == [1, 2, 4, 8], "and none when it gives up"


@pytest.mark.parametrize("header, value, damage", [("X-Linked-Size", len(WEIGHTS), "short"),
                                                   ("X-Linked-Size", len(WEIGHTS), "long"),
                                                   ("X-Linked-Etag", f'"{hashlib.sha256(WEIGHTS).hexdigest()}"', "wrong")])
def test_where_a_mirror_lists_names_alone_its_headers_count(server, storage, header, value, damage):
    server.rows = {file: {"rfilename": file, "size": None, "lfs": None} for file in server.files}
    server.extra = {header: str(value)}
    server.modes = {"model.safetensors": [(302, storage.url)] * 9, "vocab.json": ["cut"]}
    storage.modes["model.safetensors"] = [damage, "cut"]
    assert content(hub_folder("a/model")) == WANTED
    assert storage.asked("model.safetensors") == [None, None, f"bytes={len(WEIGHTS) // 2}-"]


def test_a_part_that_is_already_longer_than_the_file_is_dropped(server):
    server.rows = {file: {"rfilename": file} for file in server.files}
    work = cache_dir() / "hub" / "a--model" / f"{COMMIT}.incomplete"
    work.mkdir(parents=True)
    (work / "model.safetensors.part").write_bytes(WEIGHTS + b"more")
    assert content(hub_folder("a/model")) == WANTED


def test_a_full_disk_passes_through_and_leaves_nothing_under_a_final_name(server, monkeypatch):
    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, chunk):
            raise OSError(28, "No space left on device")

    def open_on_a_full_disk(path, mode):
        return Full(open(path, mode)) if str(path).endswith(".part") else open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(hub, "open", open_on_a_full_disk, raising=False)
        with pytest.raises(OSError, match="No space left"):
            hub_folder("a/model")
    assert final_files() == [] and server.asked() == ["list", "config.json"], "and it is not tried again"
    assert content(hub_folder("a/model")) == WANTED


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def start():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from data import hub; print(hub.hub_folder('a/model'))"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def killed_in_the_middle(server):
    """What a process leaves that was killed with half the weights on the disk."""
    server.modes["model.safetensors"] = ["slow"]
    process, work = start(), cache_dir() / "hub" / "a--model" / f"{server.commit}.incomplete"
    deadline = time.time() + 9
    while "model.safetensors" not in server.asked():
        time.sleep(0.01)
        assert process.poll() is None and time.time() < deadline
    process.kill()
    process.communicate()
    assert work.is_dir() and not (work.parent / "main").exists()
    (work / "model.safetensors.part").write_bytes(WEIGHTS[:100])  # not what had come by then, which is a matter of luck
    server.requests.clear()
    return work


def test_a_killed_process_is_taken_up_by_the_next_without_fetching_anything_twice(server):
    killed_in_the_middle(server)
    assert content(hub_folder("a/model")) == WANTED
    assert server.asked() == ["list", "model.safetensors"] and server.asked("model.safetensors") == ["bytes=100-"]


def test_a_part_of_another_commit_is_not_taken_up(server):
    killed_in_the_middle(server)
    server.commit = OTHER_COMMIT
    server.offer({**WANTED, "model.safetensors": WEIGHTS[::-1]})
    assert content(hub_folder("a/model")) == {**WANTED, "model.safetensors": WEIGHTS[::-1]}
    assert server.asked("model.safetensors") == [None]


def test_a_process_killed_between_the_last_byte_and_the_name_is_taken_up_without_a_request(server):
    work = killed_in_the_middle(server)
    (work / "model.safetensors.part").write_bytes(WEIGHTS)
    assert content(hub_folder("a/model")) == WANTED and server.asked() == ["list"]


def test_an_exception_in_the_middle_is_taken_up_too(server, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hub, "check", interrupted)
        with pytest.raises(KeyboardInterrupt):
            hub_folder("a/model")
    assert final_files() == [] and content(hub_folder("a/model")) == WANTED
    assert len(server.asked("config.json")) == 1


@pytest.mark.skipif(not hub.fcntl, reason="no locks here")
def test_who_comes_second_waits_and_says_so(server, capfd):
    (cache_dir() / "hub" / "a--model").mkdir(parents=True)
    with ThreadPoolExecutor(1) as pool:
        with open(cache_dir() / "hub" / "a--model" / ".lock", "w") as lock:
            hub.fcntl.flock(lock, hub.fcntl.LOCK_EX)
            second = pool.submit(hub_folder, "a/model")
            time.sleep(0.1)
            assert server.requests == [] and "waiting for another process, which fetches a/model" in capfd.readouterr().err
        assert content(second.result()) == WANTED


def test_two_threads_at_once_fetch_each_file_once(server):
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(hub_folder, ["a/model", "a/model"]))
    assert folders[0] == folders[1] and content(folders[0]) == WANTED
    assert sorted(server.asked()) == sorted(["list", *WANTED])


def test_two_processes_at_once_fetch_each_file_once(server):
    processes = [start() for _ in range(2)]
    outputs = [process.communicate(timeout=20) for process in processes]
    assert [out for out, _ in outputs] == [f"{cache_dir() / 'hub' / 'a--model' / 'main'}\n"] * 2, outputs
    assert content(cache_dir() / "hub" / "a--model" / "main") == WANTED and sorted(server.asked()) == sorted(["list", *WANTED])


def test_where_the_file_system_has_no_locks_it_goes_on_without(server, monkeypatch):
    if hub.fcntl:
        def no_locks(*args):
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(hub.fcntl, "flock", no_locks)
    assert content(hub_folder("a/model")) == WANTED


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and redirects


def tokens(server):
    return [headers["Authorization"] for _, headers in server.requests]


def test_the_token_goes_to_the_endpoint_and_to_no_other_host(server, storage, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret\n")
    server.modes["model.safetensors"] = [(302, storage.url)]
    server.modes["vocab.json"] = [(307, storage.url)]
    storage.modes["vocab.json"] = [(302, server.url)]
    assert content(hub_folder("a/model")) == WANTED
    assert storage.asked() == ["vocab.json", "model.safetensors"] and tokens(storage) == [None, None]
    sent = list(zip(server.asked(), tokens(server)))
    assert ("vocab.json", None) in sent, "once dropped, it stays so"
    sent.remove(("vocab.json", None))
    assert {token for _, token in sent} == {"Bearer hf_secret"}


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_relative_redirect_keeps_the_token(server, code, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.modes["list"] = [(code, "/api/models/new/model/revision/main?blobs=true")]
    server.modes["model.safetensors"] = [(code, f"/new/model/resolve/{COMMIT}/model.safetensors")]
    assert content(hub_folder("a/model")) == WANTED and set(tokens(server)) == {"Bearer hf_secret"}
    assert len(server.requests) == 3 + len(WANTED)


def test_what_was_cut_off_goes_on_through_a_redirect(server, storage):
    server.modes["model.safetensors"] = [(302, storage.url)] * 2
    storage.modes["model.safetensors"] = ["cut"]
    assert content(hub_folder("a/model")) == WANTED
    assert storage.asked("model.safetensors") == [None, f"bytes={len(WEIGHTS) // 2}-"]


def test_a_circle_of_redirects_ends(server):
    server.modes["list"] = [(302, "/api/models/a/model/revision/main?blobs=true")] * 30
    with pytest.raises(ValueError, match="answers 302"):
        hub_folder("a/model")


def test_the_token_is_also_read_from_the_file_of_the_login(server, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("hf_from_file\n")
    hub_folder("a/model")
    assert set(tokens(server)) == {"Bearer hf_from_file"}


def test_without_a_token_none_is_sent(server):
    hub_folder("a/model")
    assert set(tokens(server)) == {None}


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("file", ["list", "config.json"])
@pytest.mark.parametrize("mode, why, token, words", [
    (401, None, "", "a/model is gated or private .401., or it does not exist: accept its terms on .*/a/model, then set HF_TOKEN"),
    (403, "GatedRepo", "", "a/model is gated or private .403.: accept its terms on .*/a/model, then set HF_TOKEN"),
    (401, None, "hf_x", "the token has no access to a/model .401.: .*renew the token, which is in HF_TOKEN or .*token"),
    (403, "GatedRepo", "hf_x", "the token has no access to a/model .403.: accept its terms on .*/a/model"),
    (401, "RepoNotFound", "", "there is no model a/model .* or it is private: check the name, or set HF_TOKEN"),
    (404, "RepoNotFound", "hf_x", "there is no model a/model at .*: check the name, or set HF_TOKEN"),
    (404, "RevisionNotFound", "", "a/model has no revision '.*': those that it has are on .*/a/model"),
    (418, None, "", "/a/model/re.* answers 418 .* name a folder")])
def test_a_refusal_says_what_to_do_and_is_not_tried_again(server, file, mode, why, token, words, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    server.modes[file], server.extra = [mode], {"X-Error-Code": why} if why else {}
    with pytest.raises(ValueError, match=words) as error:
        hub_folder("a/model")
    assert "\n" not in str(error.value) and "hf_x" not in str(error.value)
    assert len(server.asked(file)) == 1 and final_files() == []


def test_a_404_without_a_reason_means_the_model_or_the_file(server):
    server.modes = {"list": [404], "config.json": [404]}
    with pytest.raises(ValueError, match="there is no model a/model"):
        hub_folder("a/model")
    with pytest.raises(ValueError, match=f"/a/model/resolve/{COMMIT}/config.json answers 404"):
        hub_folder("a/model")


def test_no_network_is_one_clear_sentence_at_once(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9/")
    monkeypatch.setattr(hub, "PAUSE", 60)
    with pytest.raises(ValueError, match="could not reach http://127.0.0.1:9: .*refused.* `python data/prepare.py a/model` and "
                                         "copy .*HF_ENDPOINT to a mirror, or name a folder"):
        hub_folder("a/model")


def test_a_host_that_never_answers_is_one_clear_sentence_too(server):
    server.modes["list"] = ["hang up"] * 9
    with pytest.raises(ValueError, match=f"could not fetch the list of files of a/model from {server.url} in 5 attempts .*copy"):
        hub_folder("a/model")


def test_a_storage_that_cannot_be_reached_is_named(server):
    server.modes["model.safetensors"] = [(302, "http://127.0.0.1:9")]
    with pytest.raises(ValueError, match="could not reach http://127.0.0.1:9: "):
        hub_folder("a/model")


def test_an_address_in_the_storage_that_has_expired_is_asked_for_anew(server, storage):
    server.modes["model.safetensors"] = [(302, storage.url)] * 2
    storage.modes["model.safetensors"] = [403]
    assert content(hub_folder("a/model")) == WANTED and len(server.asked("model.safetensors")) == 2


@pytest.mark.parametrize("body", ["<html>sign in</html>", "[]", "{}", '{"sha": "../..", "siblings": []}',
                                  '{"sha": null, "siblings": [{}]}', '{"sha": "cc", "siblings": [7]}'])
def test_an_answer_that_is_no_list_is_refused(server, body, monkeypatch):
    monkeypatch.setattr(json, "dumps", lambda listing: body)
    with pytest.raises(ValueError, match="answers with no list of the files of a/model.*does HF_ENDPOINT name a Hub"):
        hub_folder("a/model")


def test_an_endpoint_without_a_scheme_is_refused(server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    with pytest.raises(ValueError, match="HF_ENDPOINT is 'hf-mirror.com', and should start with https://"):
        hub_folder("a/model")


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_offline_means_no_request_and_what_is_there_is_used(server, value, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    with pytest.raises(ValueError, match="a/model is in no cache and HF_HUB_OFFLINE forbids .*prepare.py a/model"):
        hub_folder("a/model")
    assert server.requests == [] and not cache_dir().exists()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    folder = hub_folder("a/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert hub_folder("a/model") == folder


def test_a_folder_that_lost_a_file_says_so(server):
    folder = Path(hub_folder("a/model"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="main is not whole: delete it, and it is fetched again"):
        hub_folder("a/model")
