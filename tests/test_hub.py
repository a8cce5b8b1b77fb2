"""Models to share: in a folder, and on a hub that speaks the protocol of Hugging Face."""

import json
import sys
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from ipar_sparse import IPAR, UserError
from ipar_sparse.data.writers import to_anndata
from ipar_sparse.evaluation.layouts import load_reference


@pytest.fixture(scope="module")
def shared(small_run, tmp_path_factory):
    """A folder that was written to be shared."""
    folder = tmp_path_factory.mktemp("shared") / "model"
    assert IPAR.load(small_run).save_pretrained(folder) is None
    return folder


def test_a_shared_model_predicts_the_same(shared, small_run, small_slides):
    cells = to_anndata(small_slides[3])
    given = IPAR.load(small_run).predict(cells, copy=True)
    again = IPAR.from_pretrained(shared).predict(cells, copy=True)
    np.testing.assert_array_equal(given.obsm["X_ipar"], again.obsm["X_ipar"])
    for mine, theirs in zip(load_reference(small_run), load_reference(shared), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_what_is_shared_holds_no_path_and_no_state_of_training(shared, small_run):
    names = {path.name for path in shared.iterdir()}
    assert "model.safetensors" in names and not {"last.safetensors", "tensorboard"} & names
    recorded = json.loads((shared / "inputs.json").read_text())
    assert {one["path"] for one in recorded["train"] + recorded["val"]} == {None}
    card = (shared / "README.md").read_text()
    assert "| cortex1 | 140 | trained on |" in card and "library_name: ipar_sparse" in card
    assert str(small_run) not in card
    assert "cortex1, 140 cells" in IPAR.from_pretrained(shared).info()["trained on"]


def test_refusals(shared, small_run, tmp_path, monkeypatch):
    model = IPAR.load(small_run)
    with pytest.raises(UserError, match="run itself"):
        model.save_pretrained(small_run, overwrite=True)
    with pytest.raises(UserError, match="exists"):
        model.save_pretrained(shared)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run directory"):
        model.save_pretrained(tmp_path / "other", overwrite=True)
    with pytest.raises(UserError, match="is no folder, and no model of the hub"):
        IPAR.from_pretrained("nothing")
    with pytest.raises(UserError, match="not a run directory|no run"):
        IPAR.from_pretrained(tmp_path / "other")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'ipar_sparse\[hub\]'"):
        IPAR.from_pretrained("someone/model")


class Hub(BaseHTTPRequestHandler):
    """Serves one repository as huggingface.co does: its list of files, then each file."""

    folder: Path
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        _, *parts = self.path.partition("?")[0].split("/")
        if parts[:4] == ["api", "models", "me", "cortex"]:
            paths = sorted(self.folder.iterdir())
            told = {"id": "me/cortex", "sha": self.commit}
            told["siblings"] = [{"rfilename": path.name} for path in paths]
            if parts[4] == "tree":
                one = {"type": "file", "oid": self.commit}
                told = [one | {"path": p.name, "size": p.stat().st_size} for p in paths]
            return self.send(json.dumps(told).encode(), body, "application/json")
        if parts[:3] == ["me", "cortex", "resolve"] and (self.folder / parts[-1]).is_file():
            return self.send((self.folder / parts[-1]).read_bytes(), body)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, content, body, kind="application/octet-stream"):
        self.send_response(200)
        headers = {"Content-Type": kind, "Content-Length": len(content)}
        headers |= {"X-Repo-Commit": self.commit, "ETag": f'"{sha256(content).hexdigest()}"'}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def test_a_model_is_downloaded_from_a_hub(shared, tmp_path):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Hub,), {"folder": shared}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {"endpoint": f"http://127.0.0.1:{server.server_port}", "cache_dir": tmp_path}
    assert "trained on cortex1, cortex2" in repr(IPAR.from_pretrained("me/cortex", **hub))
    with pytest.raises(UserError, match="me/none: the hub gave no answer that helps") as refused:
        IPAR.from_pretrained("me/none", **hub)
    assert "\n" not in str(refused.value)
    server.shutdown()
    again = IPAR.from_pretrained("me/cortex", local_files_only=True, **hub)
    assert again.info()["genes"] == "60"
