"""The page: whole, self-contained, escaped, and the same to eyes and ears."""

import base64
import hashlib
import itertools
import re
from html.parser import HTMLParser

import pytest

from ngc_jax.groups.plan import GroupPlan, Plan
from ngc_jax.models.config import DecoderConfig
from ngc_jax.reporting import blocks, texts, views
from ngc_jax.reporting.page import Part, Sample, Section, Tile, render, settings_rows, token_classes, write_page
from tests.models.compact import compact_model
from tests.reporting.setting import HOSTILE, comparison, metrics, stability
from tests.tiny import HF_CONFIGS

# Elements without an end tag, in HTML.
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Reader(HTMLParser):
    """Elements with attributes in order, text outside style and script, and whether all ends match."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.text, self.open = [], [], []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def everything(text="one two three four"):
    """A page with a section of every kind."""
    model = compact_model()
    depth, sequence = stability(texts=(text, "short one")), stability("sequence", (text + " " * 8,))
    compared = comparison()
    compared["entries"][0]["variant"] = text
    errors = {block.name: 0.1 for block in model.plan.blocks()}
    maps = (blocks.kept_map(model.config, model.plan, text), blocks.loss_map(model.config, model.plan, errors, text))
    parts = (
        Part(text, text, maps, notes=(text,)),
        Part("pareto", charts=(views.pareto(compared, [(0.6, text)]), *views.other_variants(compared))),
        Part("depth", texts=tuple(texts.texts(depth, (0.1, 1.0)))),
        Part("curves", charts=(views.growth(depth), views.potential_by_layer(depth), *views.spectra(depth))),
        Part("sequence", texts=tuple(texts.texts(sequence, (1.0, 1.0))), charts=(views.growth(sequence),)),
        Part("training", charts=tuple(views.training(metrics()))),
        Part("samples", samples=(Sample(text, ((text, text),)),)),
        Part("command", code=text, settings=((text, text),)),
    )
    return render(text, text, [Tile("1", text, text)], [Section("one", text, "One", (text,), parts)])


@pytest.fixture(scope="module")
def page():
    return everything()


def test_the_page_is_well_formed_with_unique_ids_that_all_references_meet(page):
    reader = Reader(page)
    ids = [attrs["id"] for _, attrs in reader.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in reader.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set(attrs.get(name, "").split()) <= set(ids)
        if attrs.get("href", "").startswith("#"):
            assert attrs["href"][1:] in ids


def test_nothing_is_fetched_and_only_our_own_style_and_script_may_run(page):
    for tag, attrs in Reader(page).elements:
        assert tag not in ("img", "link", "iframe", "object", "embed", "base", "image", "use"), tag
        assert not {"src", "srcset", "xlink:href", "action", "style"} & set(attrs), (tag, attrs)
        assert not any(name.startswith("on") for name in attrs), (tag, attrs)
        assert attrs.get("href", "#").startswith("#")
    assert "url(" not in page
    assert "@import" not in page
    assert "http://" not in page
    assert "https://" not in page
    metas = [attrs for tag, attrs in Reader(page).elements if tag == "meta"]
    (policy,) = (attrs["content"] for attrs in metas if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_hostile_text_stays_text(page):
    hostile = everything(HOSTILE)
    reader, plain = Reader(hostile), Reader(page)
    assert {tag for tag, _ in reader.elements} == {tag for tag, _ in plain.elements}
    assert [tag for tag, _ in reader.elements].count("script") == 1
    assert not any("onerror" in attrs or "src" in attrs for _, attrs in reader.elements)
    assert HOSTILE in "".join(reader.text)  # nothing was lost on the way
    assert "{{ 7*7 }}" in "".join(reader.text)


def test_headings_are_in_order(page):
    levels = [int(tag[1]) for tag, _ in Reader(page).elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_every_picture_has_a_name_and_a_table(page):
    elements = Reader(page).elements
    pictures = [attrs for tag, attrs in elements if tag == "svg" and "chart" in attrs.get("class", "")]
    assert len(pictures) >= 9
    assert all(attrs["role"] in ("img", "group") and attrs["aria-labelledby"] for attrs in pictures)
    texts_shown = sum(tag == "article" for tag, _ in elements)
    assert sum(tag == "details" for tag, _ in elements) == len(pictures) + texts_shown


def test_every_token_can_be_reached_and_says_its_numbers(page):
    tokens = [attrs for tag, attrs in Reader(page).elements if attrs.get("role") == "option"]
    assert all("stability" in attrs["aria-label"] or "measured" in attrs["aria-label"] or "few" in attrs["aria-label"]
               for attrs in tokens)  # fmt: skip
    boxes = sum(attrs.get("role") == "listbox" for _, attrs in Reader(page).elements)
    assert [attrs["tabindex"] for attrs in tokens].count("0") == boxes
    assert any("grows" in attrs["class"].split() for attrs in tokens)


def test_growing_tokens_are_marked_without_colour_too():
    results = stability()
    (text, _) = texts.texts(results, (0.1, 1.0))
    for place, rate in enumerate(results["prompts"][0]["tokens_metric"]):
        assert ("grows" in token_classes(text, place).split()) == (place > 0 and rate > 0)


def test_eighty_layers_fit():
    config = DecoderConfig.from_hf({**HF_CONFIGS["llama"], "num_hidden_layers": 80})
    groups = tuple(
        GroupPlan(f"{layer}-{roles}", tuple(config.block(layer, role) for role in roles), 4)
        for layer in range(80)
        for roles in ("qkv", "o", "ug", "d")
    )
    part = Part("deep", charts=(blocks.kept_map(config, Plan(groups), "deep"),))
    page = render("deep", "", [], [Section("one", "One", "One", (), (part,))])
    cells = [attrs for _, attrs in Reader(page).elements if attrs.get("role") == "gridcell"]
    assert len(cells) == 560
    assert len(page) < 1_000_000


def test_what_has_no_number_is_left_out_of_pictures():
    results = stability()
    prompt = results["prompts"][0]
    prompt["growth"][1][2] = float("-inf")
    prompt["tokens_metric"][2], prompt["tokens_metric"][3] = float("-inf"), float("nan")
    prompt["layer_exponents"] = [[None, None], [float("nan"), 1.0], [0.5, None]]
    charts = (views.growth(results), *views.spectra(results))
    part = Part("odd", charts=charts, texts=tuple(texts.texts(results, texts.colour_limits([results]))))
    page = render("odd", "", [], [Section("one", "One", "One", (), (part,))])
    for _, attrs in Reader(page).elements:
        for name in ("d", "x", "y", "height", "width", "transform"):
            assert not re.search("nan|inf", attrs.get(name, "")), attrs


def test_settings_are_flattened():
    rows = settings_rows({"a": {"b": 1, "c": None}, "d": [1, 2], "e": True})
    assert rows == (("a.b", "1"), ("a.c", "–"), ("d", "1, 2"), ("e", "True"))


def test_the_page_is_written_whole(tmp_path):
    file = tmp_path / "page.html"
    assert write_page("grün\n", file) == 6
    assert file.read_text(encoding="utf-8") == "grün\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
