import datasets
import pytest

from ngc_jax.errors import UsageError
from ngc_jax.text import read_text


def test_the_halves_of_pydoc_share_no_topic_and_hold_everything():
    from pydoc_data.topics import topics

    whole, first, second = (read_text(name) for name in ("pydoc", "pydoc:first-half", "pydoc:second-half"))
    for text in topics.values():
        assert text in whole
        assert (text in first) != (text in second) or sum(text in other for other in topics.values()) > 1
    assert 0.5 < len(first) / len(second) < 2


def test_a_file_is_read_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_text("één\r\ntwo\n", encoding="utf-8", newline="")
    assert read_text(str(tmp_path / "a.txt")).startswith("één")


def test_a_dataset_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["one", "two"], "other": ["three", "four"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_text("hub:org/name") == "one\ntwo"
    assert read_text("hub:org/name:small:test:other") == "three\nfour"
    assert asked == [("org/name", None, "train"), ("org/name", "small", "test")]
    with pytest.raises(UsageError, match="no column 'words'; it has text, other"):
        read_text("hub:org/name:::words")


def test_without_a_network_a_dataset_is_refused_in_one_line():
    with pytest.raises(UsageError, match="cannot be loaded") as error:
        read_text("hub:org/no-such-dataset")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["pydoc:third-half", "no-such-file.txt", "."])
def test_no_such_text(text):
    with pytest.raises(UsageError, match="there is no text"):
        read_text(text)
