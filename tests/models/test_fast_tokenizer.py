"""Tokenizers read without transformers have the ids, texts and chats of transformers' AutoTokenizer."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from ngc_jax.errors import UsageError
from ngc_jax.models.chat_template import render_chat
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.models.tokenizer_model import quiet_transformers

with quiet_transformers():
    from transformers import AutoTokenizer
    from transformers.utils.chat_template_utils import render_jinja_template

CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's 12345 o'clock.",
    "def f(x):\n    return [x ** 2, 'naïve café', \"½\"]\n\t\tdone",
    "Übung macht den Meister. 你好 世界 안녕 🙂 the fox, the dog, the end",
] * 8
WORDS = [
    "<s>",
    "</s>",
    "<turn>",
    "<|tool|>",
    "<image>",
    " <turn> ",
    "[Mask]",
    "[mask]",
    "the",
    " fox",
    "  ",
    "\n",
    "🙂",
    "½ ﬁ",
    "é",
    "Z<",
]
TEXTS = st.one_of(st.text(max_size=20), st.lists(st.sampled_from(WORDS), max_size=8).map("".join))


def byte_level() -> Backend:
    """As GPT-2, Llama 3 and Qwen; BOS by its own post-processor."""
    made = Backend(models.BPE())
    made.normalizer = normalizers.NFC()
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens(["<s>", "</s>", AddedToken("<turn>", lstrip=True, special=True)])
    made.add_tokens([AddedToken("[mask]", normalized=True), AddedToken("<|tool|>", normalized=False, rstrip=True)])
    bos = ("<s>", made.token_to_id("<s>"))
    made.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])]
    )
    return made


def unigram() -> Backend:
    """As T5 and Llama 2: SentencePiece's marks for spaces, bytes for unknown characters."""
    made = Backend(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("``", '"')])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    state = json.loads(made.to_str())
    state["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
    state["model"]["byte_fallback"] = True
    made = Backend.from_str(json.dumps(state))
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return made


def words() -> Backend:
    """Neither post-processor nor decoder; a limit and padding, as published files have."""
    vocabulary = {word: index for index, word in enumerate(["<unk>", "the", "fox", "Z", "<s>", "é", "<image>"])}
    made = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.enable_truncation(3)
    made.enable_padding(length=6, pad_id=5, pad_token="é")
    return made


TEMPLATE = """{%- set state = namespace(system='', turns=0) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set state.system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}{% if state.system or tools %}<turn>system
{{ state.system }}
{% if tools %}# Tools
{% for tool in tools %}
{{ tool | tojson }}
{{ tool | tojson(indent=2) }}
{% endfor %}
{% endif %}
</s>
{% endif %}
{% for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- if state.turns >= 4 %}{% break %}{% endif %}
    {%- set state.turns = state.turns + 1 %}
    {%- if message.role not in ['user', 'assistant', 'tool'] %}
        {{- raise_exception('Unknown role: ' + message.role) }}
    {%- endif %}
<turn>{{ message.role }}
    {%- if message.reasoning_content is defined %} ({{ message.reasoning_content }}{{ message.thinking }}){% endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {%- set mine = message.content | default('nothing') %}{{ mine }}{{ eos_token }}
        {%- endgeneration %}{{ mine is defined }}
    {%- else %}
{{ message['content'] if message.content is string else message.content | tojson }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
<|tool|>{{ call.function.name }}{{ dict(a=1, **call.function.arguments) | tojson(sort_keys=True) }}
    {%- endfor %}
{% endfor %}
{% if documents %}{{ documents | map(attribute='title') | join(', ') }}{% endif %}
{{ strftime_now('%Y') | length }}{{ image_token is defined }}{{ enable_thinking | default('unset') }}
{%- if add_generation_prompt %}<turn>assistant
{% endif %}"""
TOOL = {
    "type": "function",
    "function": {"name": "look<up>", "description": "Über & 'more'", "parameters": {"n": [1, 2.5]}},
}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi <s> there"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "é 'quoted' <b>"}],
    [
        {"role": "user", "content": [{"type": "text", "text": "parts"}, {"type": "image", "image": np.zeros(2)}]},
        {"role": "skip", "content": "never"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"b": "ü"}}}]},
        {"role": "tool", "content": {"n": np.float32(0.5), "yes": np.True_, "none": None}},
        {"role": "assistant", "content": "Done.", "reasoning": "because"},
        {"role": "user", "content": "one too many"},
    ],
]

Settings = dict[str, Any]
# The ways in which files beside tokenizer.json change ids or texts: the backend, tokenizer_config.json, other files.
FILES: dict[str, tuple[Callable[[], Backend], Settings, dict[str, Any]]] = {
    "byte level": (
        byte_level,
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": TEMPLATE,
            "image_token": "<image>",
            "add_bos_token": False,
        },
        {},
    ),
    "tokens of the config": (
        byte_level,
        {
            "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": True, "normalized": False},
            "pad_token": None,
            "eos_token": "</s>",
            "added_tokens_decoder": {
                "900": {"content": "the", "special": False, "normalized": True},
                "330": {"content": "<s>", "special": True, "rstrip": True},
                "334": {"content": "<|tool|>", "special": True, "normalized": False},
            },
            "additional_special_tokens": ["<turn>", "<new>"],
        },
        {"special_tokens_map.json": {"eos_token": "<turn>"}, "chat_template.jinja": TEMPLATE},
    ),
    "older files": (
        byte_level,
        {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<|tool|>", "Z<"]},
        {
            "special_tokens_map.json": {"eos_token": {"content": "<turn>", "lstrip": False}, "pad_token": "<pad>"},
            "added_tokens.json": {"[Mask]": 336, "<image>": 335, "<turn>": 332},
        },
    ),
    "unigram": (
        unigram,
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "split_special_tokens": True,
        },
        {},
    ),
    "names of its own": (
        unigram,
        {
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "extra_special_tokens": {"image_token": "<image>", "boi": "<turn>"},
            "chat_template": [{"name": "default", "template": "{{ boi }}{{ image_token }}{{ eos_token }}"}],
        },
        {},
    ),
    "several templates": (
        words,
        {"bos_token": "<s>", "eos_token": "<new>", "chat_template": "not this one"},
        {
            "chat_template.jinja": TEMPLATE,
            "additional_chat_templates/tool_use.jinja": "{{ tools[0].function.name }}{{ bos_token }}",
        },
    ),
    "no config": (words, {}, {}),
}


def write(directory: Path, name: str) -> Path:
    make, settings, files = FILES[name]
    made = make()
    made.save(str(directory / "tokenizer.json"))
    files = {**files, "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **settings}}
    for file, content in files.items():
        path = directory / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return directory


@cache
def pair(directory: Path) -> tuple[Tokenizer, Any]:
    return Tokenizer.load(directory), AutoTokenizer.from_pretrained(str(directory))


@pytest.fixture(scope="module", params=FILES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tokenizer"), request.param)


def same(ours: Tokenizer, theirs: Any, text: str) -> None:
    text = text.encode(errors="replace").decode()
    for special in (True, False):
        ids = theirs(text, add_special_tokens=special)["input_ids"]
        assert ours.encode(text, special_tokens=special).tolist() == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


@given(text=TEXTS)
@example("".join(WORDS))
@example(CORPUS[1])
def test_ids_and_texts(directory: Path, text: str) -> None:
    same(*pair(directory), text)


def test_special_tokens(directory: Path) -> None:
    ours, theirs = pair(directory)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.pad == next(i for i in (theirs.pad_token_id, theirs.eos_token_id, 0) if i is not None)
    assert ours._fast.special_tokens == theirs.special_tokens_map
    assert list(ours._fast.extra_special_tokens) == theirs.extra_special_tokens
    flags = {index: repr(token) for index, token in theirs.added_tokens_decoder.items()}
    assert {index: repr(token) for index, token in ours._backend.get_added_tokens_decoder().items()} == flags


@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("chat", CHATS)
def test_chats(directory: Path, chat: list[dict[str, Any]], tools: Any) -> None:
    ours, theirs = pair(directory)
    if theirs.chat_template is None:
        with pytest.raises(UsageError, match="no chat template"):
            ours.render_chat(chat, tools=tools)
        return
    for options in ({}, {"add_generation_prompt": False, "enable_thinking": False, "documents": [{"title": "A"}]}):
        expected = theirs.apply_chat_template(
            chat, tools=tools, tokenize=False, **{"add_generation_prompt": True, **options}
        )
        assert ours.render_chat(chat, tools=tools, **options) == expected
        ids = theirs(expected, add_special_tokens=False)["input_ids"]
        options.pop("documents", None)
        if not options:
            assert ours.apply_chat_template(chat, tools=tools).tolist() == ids


def test_what_is_saved_is_the_same_for_both(directory: Path, tmp_path: Path) -> None:
    ours, theirs = pair(directory)
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for again in (Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(str(tmp_path))):
        one, other = (again, theirs) if isinstance(again, Tokenizer) else (ours, again)
        for text in ("".join(WORDS), *CORPUS[:3]):
            same(one, other, text)
        assert one._fast.special_tokens == other.special_tokens_map
        if theirs.chat_template is not None:
            expected = other.apply_chat_template(CHATS[2], tools=[TOOL], tokenize=False, add_generation_prompt=True)
            assert one.render_chat(CHATS[2], tools=[TOOL]) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}{{ loop.changed(m.role) }}{% endfor %}",
        "  {% if true %}\n  x\n  {% endif %}  \n{{- ' y ' -}}\n",
        "{{ messages | tojson }}|{{ messages | tojson(ensure_ascii=true, separators=(',', ':')) }}",
        "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(messages[0].content) }}",
        "{{ messages[0].content | upper | length }}{{ messages[0].missing is none }}{{ messages[0].missing }}",
        "{% set ns = namespace(self=1) %}{% set ns.x = 2 %}{{ ns.x }}{{ ns.self }}{{ dict.fromkeys('ab', 0) }}",
        "{%- for m in messages -%}{%- generation -%} {{ m.content }} {%- endgeneration -%}{%- endfor -%}",
    ],
)
def test_jinjas_environment_is_that_of_transformers(template: str) -> None:
    chat = [{"role": "user", "content": "<é> & 'x'"}, {"role": "user", "content": "b"}]
    (expected,), _ = render_jinja_template([chat], chat_template=template)
    assert render_chat(template, chat, special_tokens={}, add_generation_prompt=False) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__base__ }}",
        "{{ strftime_now.__globals__ }}",
        "{{ messages[0].update(a=1) }}",
        "{{ messages[0].image.tofile('x') }}",
    ],
)
def test_a_template_stays_in_its_sandbox(template: str) -> None:
    chat = [{"role": "user", "content": "a", "image": np.zeros(2)}]
    try:
        text = render_chat(template, chat, special_tokens={})
    except TemplateError as error:
        text = re.sub(".*(unsafe|private|has no attribute|undefined).*", "", str(error))
    assert text == ""


def test_what_is_no_conversation_is_refused() -> None:
    from tests.tiny import tiny_tokenizer

    for wrong in ([], "Hi", {"role": "user", "content": "Hi"}, [["user", "Hi"]], None):
        with pytest.raises(UsageError, match="a conversation is a list of messages"):
            tiny_tokenizer().apply_chat_template(wrong)


def test_nothing_of_transformers_is_imported(tmp_path: Path) -> None:
    write(tmp_path, "byte level")
    program = f"""
import sys
from pathlib import Path
from ngc_jax.models.tokenizer import Tokenizer
tokenizer = Tokenizer.load(Path({str(tmp_path)!r}))
print(tokenizer.render_chat([{{"role": "user", "content": "Hi"}}]))
tokenizer.save(Path({str(tmp_path)!r}) / "again")
assert "transformers" not in sys.modules"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_older_files_need_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    (tmp_path / "vocab.json").write_text("{}")
    find = importlib.util.find_spec
    missing: Mapping[str, None] = {"transformers": None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: missing[name] if name in missing else find(name, *a)
    )
    with pytest.raises(
        UsageError, match=r"no tokenizer\.json.* takes the package transformers.*pip install transformers"
    ):
        Tokenizer.load(tmp_path)
