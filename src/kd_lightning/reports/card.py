"""Model card of a run: Markdown with the metadata that the Hugging Face Hub reads."""

import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kd_lightning.config.nodes import Node, find_target
from kd_lightning.config.published import published_config, published_metrics
from kd_lightning.config.stored import student_data, student_model
from kd_lightning.config.trust import TRUSTED
from kd_lightning.errors import InputError
from kd_lightning.files import tidy
from kd_lightning.reports.card_results import result_tables
from kd_lightning.results import FIGURE
from kd_lightning.storage.identity import target_paths
from kd_lightning.storage.run_directory import RunDirectory

DATASETS = {
    "cifar10": ("CIFAR-10", "uoft-cs/cifar10"),
    "cifar100": ("CIFAR-100", "uoft-cs/cifar100"),
    "imagenet": ("ImageNet-1k", "ILSVRC/imagenet-1k"),
    "tiny-imagenet": ("Tiny ImageNet", "zh-plus/tiny-imagenet"),
    "digits": ("Digits (scikit-learn)", None),
}
"""Name of a data set to its title and its id on the Hugging Face Hub."""

MOST_CLASSES = 100
"""Number of class names that are listed."""


@dataclass(frozen=True)
class CardOptions:
    """What a card says besides the contents of the run.

    Attributes:
        license: identifier of the licence of the weights, as on the Hub: ``mit``, ``apache-2.0``.
        dataset: id of the data set on the Hub; None: that of a known data set.
        repository: ``OWNER/NAME`` on the Hub, if the card is published there.
        files: names of exported files that are published with it.
    """

    license: str | None = None
    dataset: str | None = None
    repository: str | None = None
    files: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise InputError(
                f"--license must be an identifier as on the Hugging Face Hub, such as mit, "
                f"apache-2.0 or other, not {self.license!r}"
            )
        for option, value in (("--push", self.repository), ("--dataset", self.dataset)):
            if value is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", value, re.ASCII):
                raise InputError(f"{option} must be OWNER/NAME, not {value!r}")


def model_card(run_dir: str | Path, options: CardOptions | None = None) -> str:
    """The model card of a finished run. It contains no path of the machine.

    Args:
        run_dir: folder of the run. Other seeds of the run, and runs of the method `none`, are found
            in the same setting.
        options: what the card says besides.

    Returns:
        Markdown, with metadata in YAML in front.

    Raises:
        InputError: there is no finished and tested run in the folder.
    """
    options = options or CardOptions()
    directory = RunDirectory(run_dir)
    config, metrics = directory.read_config(), directory.read_metrics()
    if metrics.get("status") != "finished" or not isinstance(metrics.get("test_accuracy"), float):
        raise InputError(f"{run_dir} contains no finished run with a test accuracy")
    config, metrics = published_config(config), published_metrics(metrics)
    data = student_data(config)
    title, dataset = _dataset(data, options)
    name = options.repository or str(metrics["name"])
    parts = [
        _front_matter(metrics, options, str(data["name"]), title, dataset),
        f"# {_text(name.rpartition('/')[2])}",
        _summary(data, metrics, title),
        *_section("Data", _data(data, metrics, title, dataset)),
        *_section("Teacher", _teacher(config["teacher"], config["trainer"], metrics)),
        *_section("Method", _method(config["method"], metrics)),
        _settings(config["student"], config["optimizer"], data, config.get("ema"), metrics),
        *_section("Results", result_tables(directory.path, metrics)),
        *_section("Limitations", _limitations(data, metrics, title)),
        *_section("Licence", _licence(options, title)),
        *_section("How to load", _loading(student_model(config), metrics, options)),
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str, paragraphs: Iterable[str]) -> list[str]:
    return [f"## {title}", *paragraphs]


def _dataset(data: Node, options: CardOptions) -> tuple[str, str | None]:
    """Title of the data set, and its id on the Hub."""
    name = str(data.get("name"))
    title, known = DATASETS.get(name, (name, None))
    if name == "folder" and data.get("root"):
        title = str(data["root"])
    return title, options.dataset or known


def _front_matter(
    metrics: Node, options: CardOptions, name: str, title: str, dataset: str | None
) -> str:
    result = {
        "task": {"type": "image-classification", "name": "Image Classification"},
        "dataset": {
            "name": title,
            "type": dataset or tidy(title if name == "folder" else name),
            "split": "test",
        },
        "metrics": [
            {
                "type": "accuracy",
                "value": round(metrics["test_accuracy"], 6),
                "name": "Test accuracy",
            }
        ],
    }
    content: Node = {
        **({"license": options.license} if options.license else {}),
        "library_name": "kd_lightning",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "knowledge-distillation", "pytorch-lightning"],
        **({"datasets": [dataset]} if dataset else {}),
        "metrics": ["accuracy"],
        "model-index": [{"name": str(metrics["name"]), "results": [result]}],
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def _summary(data: Node, metrics: Node, title: str) -> str:
    taught = ""
    if metrics.get("teacher_test_accuracy") is not None:
        taught = f", distilled from {_text(metrics['teacher'])}"
        if metrics.get("compression_ratio"):
            ratio = FIGURE["compression_ratio"].show(metrics["compression_ratio"])
            taught += f", which has {ratio} times as many"
    return (
        f"An image classifier for {data['num_classes']} classes, trained on "
        f"{_text(title)}: the network `{_text(metrics['student'])}` with "
        f"{metrics['parameters']:,} parameters{taught}. Test accuracy "
        f"{100 * metrics['test_accuracy']:.2f} %. Made with kd_lightning."
    )


def _data(data: Node, metrics: Node, title: str, dataset: str | None) -> list[str]:
    size = data["image_size"]
    known = f" (`{dataset}` on the Hugging Face Hub)" if dataset else ""
    text = (
        f"{_text(title)}{known}. Input: RGB images of {size} x {size} pixels, scaled to [0, 1], "
        f"normalised with mean {data['mean']} and standard deviation {data['std']}."
    )
    names = [_text(name) for name in metrics.get("class_names") or ()]
    if not names:
        return [text]
    more = f" and {len(names) - MOST_CLASSES} more" if len(names) > MOST_CLASSES else ""
    return [text, f"Classes: {', '.join(names[:MOST_CLASSES])}{more}."]


def _teacher(teacher: Node, trainer: Node, metrics: Node) -> list[str]:
    if metrics.get("teacher_test_accuracy") is None:
        return ["None: trained on the labels alone."]
    count = metrics.get("teacher_parameters")
    text = f"`{_text(metrics['teacher'])}`" + (f", {count:,} parameters" if count else "")
    text += f", test accuracy {100 * metrics['teacher_test_accuracy']:.2f} %"
    if teacher.get("run"):
        text += ", the student of an earlier run"
    elif teacher.get("decay"):
        text += ", a moving average of the student"
    elif teacher.get("members"):
        count = len(teacher["members"])
        text += f", an ensemble of {count} network{'s' if count > 1 else ''}"
    else:
        epochs = {**trainer, **teacher["trainer"]}.get("max_epochs")
        trained = f"trained on the same images for {epochs} epochs"
        start = _start(teacher)
        text += f", {start or trained}"
        text += f", then {trained}" if start and teacher.get("finetune") else ""
    return [f"{text}."]


def _start(node: Node) -> str:
    """Where the weights of a student or teacher are from; empty if it was initialised randomly."""
    if source := node.get("checkpoint") or node.get("outputs"):
        return f"from the file `{_text(source)}`"
    if node.get("pretrained"):
        return f"with the pretrained weights of `{_text(node['model'].get('model_name'))}`"
    return ""


def _method(method: Node, metrics: Node) -> list[str]:
    terms = []
    for name, term in method["terms"].items():
        numbers = [
            f"{key} {value:g}"
            for key, value in term.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        terms.append(f"- `{_text(name)}` ({', '.join(numbers)}){_citation(term)}")
    return [
        f"`{_text(metrics['method'])}`: the sum of these loss terms.",
        "\n".join(terms),
    ]


def _settings(student: Node, optimizer: Node, data: Node, ema: float | None, metrics: Node) -> str:
    start = _start(student)
    name = str(optimizer["_target_"]).rpartition(".")[2]
    settings = {
        "optimizer": f"{name}, learning rate {optimizer.get('lr')}",
        "epochs": metrics["epochs"],
        "batch size": data.get("batch_size"),
        "training views": _target(data.get("augmentation")),
        "mixing": _target(data.get("mixing")),
        "moving average of the weights": ema,
        "seed": metrics["seed"],
        "precision": metrics.get("precision"),
        "device": metrics.get("device"),
        "torch": metrics.get("torch"),
        "commit of kd_lightning": metrics.get("git_commit"),
    }
    shown = [f"- student: initialised {start}"] if start else []
    shown += [f"- {key}: {_text(value)}" for key, value in settings.items() if value is not None]
    listed = "\n".join(shown)
    return f"Settings (the complete configuration is in `config.yaml`):\n\n{listed}"


def _target(node: Any) -> str | None:
    return str(node["_target_"]).rpartition(".")[2] if isinstance(node, dict) else None


def _citation(term: Mapping[str, Any]) -> str:
    """The source of a term of this package, from the first paragraph of its module."""
    if not str(term.get("_target_")).startswith("kd_lightning.losses."):
        return ""  # not imported: it may be of an untrusted package
    module = getattr(find_target(term["_target_"], "method.terms"), "__module__", "")
    words = inspect.cleandoc(getattr(sys.modules.get(module), "__doc__", None) or "")
    paragraph = " ".join(words.partition("\n\n")[0].split())
    return f": {paragraph}" if paragraph else ""


def _limitations(data: Node, metrics: Node, title: str) -> list[str]:
    size = data["image_size"]
    points = [
        f"Every image is assigned to one of the {data['num_classes']} classes, even if "
        "it shows none of them.",
        f"Evaluated on the test images of {_text(title)} only. Accuracy on images from other "
        f"sources, or of another resolution than {size} x {size} pixels, is unknown.",
        "Not evaluated for fairness, robustness to corruptions, or adversarial inputs.",
    ]
    if metrics.get("teacher_test_accuracy") is not None:
        points.append("Errors and biases of the teacher may have been passed on.")
    if metrics.get("temperature") is None:
        points.append("The predicted probabilities have not been calibrated.")
    return ["\n".join(f"- {point}" for point in points)]


def _licence(options: CardOptions, title: str) -> list[str]:
    return [
        f"Weights: `{options.license}`."
        if options.license
        else "**Not chosen yet.** The author of the weights has to choose one (`--license`); until "
        "then nobody else may use them.",
        f"The images of {_text(title)}, and the teacher, have terms of their own, which may limit "
        "the use of a model trained with them (such as to non-commercial research); check them "
        "before use.",
    ]


def _loading(model: Node, metrics: Node, options: CardOptions) -> list[str]:
    packages = sorted(
        {
            target.partition(".")[0]
            for target in target_paths(model)
            if not target.startswith(tuple(f"{name}." for name in TRUSTED))
        }
    )
    trust = f", trust={packages}" if packages else ""
    lines = ["from kd_lightning import api", ""]
    folder = repr(str(metrics["name"]))
    if options.repository:
        lines.insert(0, "from huggingface_hub import snapshot_download")
        lines[-1:] = ["", f"folder = snapshot_download({options.repository!r})"]
        folder = "folder"
    lines += [
        f"student = api.load_student({folder}{trust})",
        'print(student.predict(["image.png"]))',
        'print(student.probabilities(["image.png"]))',
    ]
    code = "\n".join(["```python", *lines, "```"])
    found = [code]
    if packages:
        found.append(f"`trust` allows code of {', '.join(packages)}, which has to be installed.")
    if options.files:
        listed = ", ".join(f"`{_text(name)}`" for name in options.files)
        found.append(
            f"Exported: {listed}. ONNX files are run by onnxruntime and take 8-bit RGB pixels "
            "(batch, height, width, 3); class names and image size are in their metadata."
        )
    return found


def _text(value: Any) -> str:
    """Characters that are special in Markdown, or not printable, replaced or escaped."""
    words = "".join(c if c.isprintable() else " " for c in str(value))
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", words)
