"""The predict command."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from attrs import asdict
from spdfq_cli import options

if TYPE_CHECKING:
    from spdfq.inference import Classified, Classifier


@click.command()
@click.argument("model", metavar="RUN|FILE.onnx", type=click.Path(path_type=Path))
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--top", type=int, metavar="N", help="Number of classes of each image.  [default: 5, or all if fewer]")
@options.as_json
def predict(model: Path, images: tuple[Path, ...], top: int | None, as_json: bool) -> None:
    """Print the labels of images, and their probabilities.

    An IMAGE is a file or a folder of files. A file of spdfq export is run in onnxruntime. The model of a run without an
    exported file is simulated.
    """
    from spdfq.errors import DataError
    from spdfq.inference import image_files

    files = image_files(images)
    classifier = _classifier(model)
    top = classifier.checked_top(top)
    if not as_json:
        click.echo(f"model  {classifier.source}, {_how(classifier)}")
    found = []
    for each in classifier.classify(files, top):
        found.append(each)
        if not as_json and not each.problem:
            click.echo("\n".join(_lines(each)))
    if as_json:
        options.print_json(_result(classifier, found))
    if not classifier.class_names:
        options.note(f"note: {classifier.source} has no names of classes; labels are numbers from 0")
    if problems := [f"{each.image}: {each.problem}" for each in found if each.problem]:
        raise DataError("\n".join(problems))


def _classifier(model: Path) -> "Classifier":
    if model.is_dir():
        from spdfq.runs.predicting import load_run

        return load_run(model)
    from spdfq.inference import load

    return load(model)


def _how(classifier: "Classifier") -> str:
    if classifier.computed == "simulated":
        return "simulated: quantized values, computed in float"
    return f"run in {classifier.computed}"


def _lines(classified: "Classified") -> list[str]:
    rows = [f"{100 * each.probability:6.2f} %  {each.label}" for each in classified.predictions]
    return [str(classified.image), *rows]


def _result(classifier: "Classifier", found: list["Classified"]) -> dict[str, Any]:
    return {
        "model": classifier.source,
        "computed": classifier.computed,
        "images": [
            {"image": str(each.image), "predictions": [asdict(one) for one in each.predictions]}
            for each in found
            if not each.problem
        ],
        "unreadable": [{"image": str(each.image), "reason": each.problem} for each in found if each.problem],
    }
