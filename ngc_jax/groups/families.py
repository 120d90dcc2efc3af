"""The 35 named topologies that have been studied, as plain text in the language of `topology`."""

from collections.abc import Mapping
from types import MappingProxyType

# fmt: off
_ATTENTION = [
    "q-k-v", "qq-kk-vv", "qqq-kk-vv", "qq-kkk-vv", "qq-kk-vvv",
    "qq-kv", "kk-qv", "vv-qk", "qkv", "qqq-kkk-vvv",
    "qkk-qvv", "qvv-qkk", "qq-kkvv", "kk-qqvv", "vv-qqkk",
]
_MLP = [
    "u-g-d", "uu-gg-dd", "ugd", "ug-d", "ud-g",
    "gd-u", "ug-dd", "ud-gg", "gd-uu", "u-gg-dd",
    "uu-g-dd", "uu-gg-d", "uu-g-d", "u-gg-d", "u-g-dd",
]
# fmt: on

HYBRIDS: Mapping[str, str] = MappingProxyType(
    {
        "hybrid1": "kk-qv-qv-qq-kk-vv",
        "hybrid2": "qq-kk-vv-kk-qv-qv",
        "hybrid3": "0:50%=kk-qv; 50%:=qq-kk-vv",
        "hybrid4": "0:50%=qq-kk-vv; 50%:=kk-qv",
        "hybrid5": "kkk-qq-vv-qv",
    }
)
"""The families that the language knows by name; the name stands for its text."""

FAMILIES: Mapping[str, str] = MappingProxyType({text: text for text in (*_ATTENTION, *_MLP)} | dict(HYBRIDS))
"""All named families, name to text: 15 of attention, 15 of the MLP (their text is their name), 5 hybrids."""
