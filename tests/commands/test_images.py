"""`ngc-jax convert --images` and `ngc-jax evaluate --images`, on a tiny model and a few files."""

import json

import numpy as np
import pytest
from PIL import Image

from ngc_jax.cli import main
from ngc_jax.errors import UsageError
from ngc_jax.evaluation.images import evaluate_images, labelled_files
from ngc_jax.models.load import load_model
from ngc_jax.models.save import save_model
from tests.tiny_encoder import tiny_encoder, tiny_images


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Thirty images of 14 x 12 pixels in folders named by their classes' numbers."""
    directory = tmp_path_factory.mktemp("photos")
    pixels = np.clip(128 + 60 * tiny_images(30, size=14)[..., :12], 0, 255).astype(np.uint8)
    for number, image in enumerate(pixels):
        folder = directory / str(number % 5)
        folder.mkdir(exist_ok=True)
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number:02d}.png")
    (directory / "0" / ".hidden.png").write_bytes(b"no image")
    (directory / "0" / "notes.txt").write_text("no image")
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tiny_encoder(), tmp_path_factory.mktemp("model") / "tiny")


def test_convert_and_evaluate(model, photos, tmp_path):
    out, summary = str(tmp_path / "compact"), tmp_path / "summary.json"
    options = ["--images", str(photos), "--image-count", "20", "--method", "svd_llm", "--keep", "0.8"]
    assert main(["convert", str(model), "--out", out, *options, "--json", str(summary)]) == 0
    made = json.loads(summary.read_text())
    assert made["keep_ratio"] <= 0.8
    assert made["calibration"] == {"images": f"20 images of {photos.name}", "tokens": 200}
    compact = load_model(out)
    assert made["stored_parameters"] == compact.plan.count_parameters()
    assert main(["evaluate", out, "--images", str(photos), "--json", str(summary)]) == 0
    found = json.loads(summary.read_text())
    files, labels = labelled_files(photos, compact.labels)
    assert len(files) == 30
    expected = evaluate_images(compact, compact.preprocessor.load(files), labels)
    assert (found["correct"], found["count"]) == (expected.correct, 30)
    logits = compact.encoder.apply({"params": compact.params}, compact.preprocessor.load(files))
    assert found["correct"] == (np.asarray(logits).argmax(-1) == labels).sum()
    assert main(["info", out]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "MODEL", "--out", "o", "--images", "PHOTOS", "--text", "a.txt"], "--text is for texts"),
        (["convert", "MODEL", "--out", "o", "--images", "PHOTOS", "--bits", "8"], "not quantised yet"),
        (["convert", "MODEL", "--out", "o", "--images", "PHOTOS", "--image-count", "31"], "there are 30 images"),
        (["convert", "MODEL", "--out", "o", "--images", "no-such"], "no such directory"),
        (["convert", "MODEL", "--out", "o"], "vit is an image encoder"),
        (["convert", "MODEL", "--out", "o", "--image-count", "3"], "add --images"),
        (["evaluate", "MODEL"], "reads no text"),
        (["evaluate", "MODEL", "--images", "PHOTOS/0"], "has no sub-folders"),
        (["evaluate", "MODEL", "--images", "PHOTOS", "--task", "arc_easy"], "two evaluations"),
        (["generate", "MODEL", "--prompt", "a"], "reads no text"),
        (["export", "MODEL", "--to", "gguf", "--out", "o"], "is an image encoder"),
        (["stability", "MODEL", "--prompt", "a", "--out", "o"], "image encoder"),
        (["distil", "MODEL", "--trainable", "all", "--teacher", "MODEL", "--out", "o"], "image encoder"),
        (["compare", "MODEL", "--out", "o"], "image encoder"),
        (["plan-memory", "MODEL"], "image encoder"),
        (["report", "MODEL", "--out", "o.html"], None),
        (["push", "MODEL", "--repo", "me/x", "--dry-run"], None),
    ],
)
def test_what_is_refused(arguments, message, model, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [one.replace("MODEL", str(model)).replace("PHOTOS", str(photos)) for one in arguments]
    code = main(given)
    if message is None:
        assert code == 0
        return
    error = capsys.readouterr().err
    assert code == 2, error
    assert message in " ".join(error.split())
    assert arguments[0] == "compare" or not (tmp_path / "o").exists()


def test_folders_that_are_not_classes(photos, tmp_path, capsys):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "1.png")
    with pytest.raises(UsageError, match="is not named after a class of the model"):
        labelled_files(tmp_path, ["dog", "bird", "fish"])
    files, labels = labelled_files(tmp_path, ["dog", "cat"])
    assert (len(files), labels.tolist()) == (1, [1])
    files, labels = labelled_files(photos, list("edcba"))
    assert labels.tolist() == sorted(labels.tolist())
