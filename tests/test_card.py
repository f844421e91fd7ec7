"""Model cards: results, metadata, nothing private, and publication on a stub of the Hub."""

import base64
import json
import re
import runpy
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FOLDER, REPOSITORY, TINY, write_folder
from PIL import Image

from kd_lightning import api
from kd_lightning.config.published import published_config, published_metrics
from kd_lightning.errors import InputError, RunError
from kd_lightning.files import read_json, write_json
from kd_lightning.reports import card_results
from kd_lightning.reports.card import CardOptions, model_card
from kd_lightning.reports.statistics import interval, wilson
from kd_lightning.results import FIGURE, Figure
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows.publish import publish


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished distilled run, and copies that stand for a second seed and for the baseline."""
    root = tmp_path_factory.mktemp("secret-place")
    data = ("data_dir=" + str(root / "data"), "data.root=" + str(write_folder(root / "my-images")))
    given = (*TINY, *FOLDER, *data, f"output_dir={root / 'out'}", "method=logit", "logger=none")
    run = api.run(*given, "trainer.max_epochs=1")
    folder = Path(run["folder"]).parent
    Path(run["folder"]).rename(folder / "logit-small-s0")
    accuracies = {("logit", 0): 0.75, ("logit", 1): 0.5, ("none", 0): 0.5, ("none", 1): 0.5}
    for (method, seed), accuracy in accuracies.items():
        place = folder / f"{method}-small-s{seed}"
        place.mkdir(exist_ok=True)
        own = {"method": method, "seed": seed, "name": place.name, "test_accuracy": accuracy}
        if method == "none":
            own |= {"teacher_test_accuracy": None, "agreement": None}
        write_json(place / "metrics.json", {**run, **own, "folder": str(place)})
    config = (folder / "logit-small-s0" / "config.yaml").read_text()
    for place in folder.iterdir():
        place.joinpath("config.yaml").write_text(config)
    return folder


@pytest.fixture
def run(runs):
    return runs / "logit-small-s0"


def front_matter(card):
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_interval_of_the_test_accuracy():
    """Against scipy's implementation of Wilson's interval."""
    from scipy.stats import binomtest

    for correct, total in ((0, 12), (9, 12), (12, 12), (9243, 10_000)):
        expected = binomtest(correct, total).proportion_ci(0.95, "wilson")
        assert wilson(correct / total, total) == pytest.approx(tuple(expected), abs=1e-12)


def test_card_reports_results_with_intervals(run):
    card = model_card(run)
    low, high = wilson(0.75, 12)
    assert f"| test accuracy | 75.00 % ({100 * low:.2f} to {100 * high:.2f}; Wilson, 12 im" in card
    assert "| 62.50 ± 17.68 % (2 seeds) |" in card
    low, high = interval([0.25, 0.0])
    gain = f"+12.50 percentage points ({100 * low:+.2f} to {100 * high:+.2f}; Student's t, 2 pairs"
    assert gain in card
    assert "Hinton, Vinyals & Dean (2015)" in card
    assert "Classes: class0, class1, class2." in card


def test_metadata_is_what_the_hub_reads(run):
    from huggingface_hub import ModelCard

    card = model_card(run, CardOptions(license="apache-2.0", dataset="me/photos"))
    data = ModelCard(card).data
    named = data.to_dict()
    assert (named["license"], named["library_name"]) == ("apache-2.0", "kd_lightning")
    assert (data.datasets, data.metrics) == (["me/photos"], ["accuracy"])
    assert "knowledge-distillation" in data.tags
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.75)
    assert (result.dataset_name, result.dataset_type) == ("my-images", "me/photos")
    without = model_card(run)
    assert "license" not in front_matter(without)
    assert "Not chosen yet" in without
    assert "Not chosen yet" not in card


def test_absent_figures_are_left_out_and_present_ones_shown(run, monkeypatch):
    metrics = read_json(run / "metrics.json")
    known = ("status", "name", "setting", "method", "student", "seed", "test_accuracy")
    old = {key: metrics[key] for key in known}
    assert "Calibration" not in "\n".join(card_results.result_tables(run, old))
    figures = {
        "test_ece": Figure("test_ece", "fraction", "calibration error"),
        "latency_1_one_thread_p50": Figure("latency_1_one_thread_p50", "number", "of a|b"),
    }
    monkeypatch.setattr(card_results, "FIGURE", {**FIGURE, **figures})
    measured = {**metrics, "test_ece": 0.0123, "latency_1_one_thread_p50": 2.5}
    tables = "\n".join(card_results.result_tables(run, measured))
    assert "| `test_ece`: calibration error | 1.23 % |" in tables
    assert "| `latency_1_one_thread_p50`: of a\\|b | 2.5 |" in tables


def test_card_of_a_run_without_teacher_or_neighbours(runs, tmp_path):
    (tmp_path / "alone").mkdir()
    for name in ("config.yaml", "metrics.json"):
        (tmp_path / "alone" / name).write_bytes((runs / "none-small-s0" / name).read_bytes())
    card = model_card(tmp_path / "alone")
    assert "None: trained on the labels alone." in card
    assert "| test accuracy | 50.00 % |" in card  # without a confusion matrix: no interval
    assert "gain" not in card


@pytest.mark.parametrize(
    ("section", "changes", "words"),
    [
        ("teacher", {}, "trained on the same images for 1 epochs."),
        ("teacher", {"pretrained": True, "model": {"model_name": "resnet50"}},
         "with the pretrained weights of `resnet50`."),
        ("teacher", {"pretrained": True, "model": {"model_name": "resnet50"}, "finetune": True},
         "of `resnet50`, then trained on the same images for 1 epochs."),
        ("teacher", {"checkpoint": "/a/x.pt"}, "from the file `x.pt`."),
        ("teacher", {"members": [{}, {}], "checkpoint": "/a/x.pt"}, "an ensemble of 2 networks."),
        ("teacher", {"trainer": {}}, "trained on the same images for 1 epochs."),
        ("student", {"checkpoint": "/a/x.pt"}, "- student: initialised from the file `x.pt`"),
        ("student", {"pretrained": True, "model": {"_target_": "x.y", "model_name": "resnet18"}},
         "- student: initialised with the pretrained weights of `resnet18`"),
    ],
)  # fmt: skip
def test_card_says_where_the_weights_are_from(run, tmp_path, section, changes, words):
    copy = RunDirectory(shutil.copytree(run, tmp_path / "run"))
    config = copy.read_config()
    config[section] |= changes
    copy.write_config(config)
    assert words in model_card(copy.path)


def test_card_is_not_written_if_it_cannot_be_published(run, tmp_path, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "run")
    arguments = ["card", str(copy), "--push", "me/small", "--file", str(tmp_path / "typo.onnx")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "scripts" / "card.py"), run_name="__main__")
    assert stop.value.code == 2
    assert not (copy / "README.md").exists()


def test_card_of_the_current_folder(run, monkeypatch):
    monkeypatch.chdir(run)
    assert "gain" in model_card(run)
    assert model_card(".") == model_card(run)


def test_card_has_the_normalisation_of_the_student(run, tmp_path):
    copy = RunDirectory(shutil.copytree(run, tmp_path / "run"))
    config = copy.read_config()
    config["student"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    copy.write_config(config)
    card = model_card(copy.path)
    assert "mean [0.1, 0.2, 0.3] and standard deviation [0.4, 0.5, 0.6]" in card


def test_code_of_the_card_loads_the_student(run, monkeypatch):
    code = re.search(r"```python\n(.*?)```", model_card(run), re.DOTALL)[1]
    monkeypatch.chdir(run.parent)
    Image.new("RGB", (20, 10)).save(run.parent / "image.png")
    known = {}
    exec(code, known)
    assert known["student"].classes == ("class0", "class1", "class2")


def test_special_characters_do_not_break_the_card(run, tmp_path):
    for name in ("config.yaml", "confusion.csv"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    names = ["a|b", "<script>", "two\nlines"]
    write_json(tmp_path / "metrics.json", read_json(run / "metrics.json") | {"class_names": names})
    card = model_card(tmp_path)
    assert r"Classes: a\|b, \<script\>, two lines." in card
    assert front_matter(card)["library_name"] == "kd_lightning"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/photos", "photos"),
        ("~/photos/", "photos"),
        ("../client/photos", "photos"),
        (r"C:\Users\me\photos", "photos"),
        ("file:/home/me/mlruns", "mlruns"),
        ("sqlite:////home/me/x.db", "x.db"),
        ("read from /home/me/x.txt", "read from x.txt"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("features.3:input", "features.3:input"),
        ("and/or", "and/or"),
    ],
)
def test_paths_are_reduced_to_names(text, expected):
    config = {"method": {"x": [text]}, "logger": {"wandb": {"entity": "me"}}, "data_dir": text}
    tidied = published_config(config)
    assert tidied == {"method": {"x": [expected]}, "data_dir": "data"}
    assert published_config({"data": {"root": "client/photos"}}) == {"data": {"root": "photos"}}
    metrics = published_metrics({"class_names": ["/m/012"], "device": text, "folder": text})
    assert metrics == {"class_names": ["/m/012"], "device": expected}


def test_invalid_requests(run, tmp_path):
    with pytest.raises(InputError, match="--license must be an identifier"):
        CardOptions(license="MIT License")
    with pytest.raises(InputError, match="--push must be OWNER/NAME"):
        CardOptions(repository="name")
    with pytest.raises(InputError, match="not a run directory"):
        model_card(tmp_path)
    with pytest.raises(InputError, match="is not a file"):
        publish(run, "me/small", files=[tmp_path / "missing.onnx"])
    clash = tmp_path / "student.safetensors"
    clash.write_bytes(b"x")
    with pytest.raises(InputError, match="two files would be published as student"):
        publish(run, "me/small", files=[clash])


class Hub(ThreadingHTTPServer):
    """A stub of the Hugging Face Hub: creation of repositories, uploads by git-LFS, commits."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Requests)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.calls, self.created, self.files, self.uploaded = [], [], {}, {}


class Requests(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self):
        self.server.uploaded[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self):
        hub, body, path = self.server, self.body(), self.path.partition("?")[0]
        hub.calls.append(path.rpartition("me/small")[2] or path)
        if self.headers.get("Authorization") != "Bearer hf_test":
            self.answer({"error": "Invalid user token."}, 401)
        elif path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self.answer({"url": f"{hub.address}/me/small", "name": "me/small"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.startswith("/api/models/me/small/preupload/"):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": modes})
        elif path == "/me/small.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for part in objects:
                part["actions"] = {"upload": {"href": f"{hub.address}/lfs/{part['oid']}"}}
            self.answer({"transfer": "basic", "objects": objects})
        elif path.startswith("/api/models/me/small/commit/"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.uploaded[value["oid"]]
            url = f"{hub.address}/me/small/commit/{'0' * 40}"
            self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})
        else:
            self.answer({"error": "not found"}, 404)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_published_student_can_be_loaded_and_tells_nothing_private(run, hub, tmp_path):
    extra = tmp_path / "student.onnx"
    extra.write_bytes(b"exported")
    options = CardOptions(license="mit")
    url = publish(
        run, "me/small", options, [extra], private=True, endpoint=hub.address, token="hf_test"
    )
    assert url.startswith(f"{hub.address}/me/small/commit/")
    assert hub.calls[0] == "/api/repos/create"
    assert hub.calls[-1].startswith("/commit/main")
    assert hub.created[0]["name"] == "small"
    assert hub.created[0].get("visibility", hub.created[0].get("private")) in ("private", True)
    assert set(hub.files) == {
        "README.md", "config.yaml", "metrics.json", "student.safetensors", "student.onnx",
    }  # fmt: skip
    assert hub.files["student.onnx"] == b"exported"
    for name, content in hub.files.items():
        assert b"secret-place" not in content, name
        assert str(tmp_path.parent).encode() not in content, name
    card = hub.files["README.md"].decode()
    assert "snapshot_download('me/small')" in card
    assert "`student.onnx`" in card

    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name, content in hub.files.items():
        (downloaded / name).write_bytes(content)
    pixels = torch.rand(2, 3, 16, 16)
    expected = api.load_student(run).probabilities(pixels)
    torch.testing.assert_close(api.load_student(downloaded).probabilities(pixels), expected)


def test_failed_publication_is_one_sentence(run, hub, monkeypatch):
    with pytest.raises(RunError, match=r"me/small could not be published on the Hub: .*401"):
        publish(run, "me/small", endpoint=hub.address, token="hf_wrong")
    assert hub.files == {}
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"pip install -e '.\[hub\]'"):
        publish(run, "me/small")
