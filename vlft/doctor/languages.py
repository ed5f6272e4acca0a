"""Which scripts and languages texts are in.

Scripts come from unicodedata. Languages come from py3langid where it is installed (pip install 'vlft[doctor]'): 5 MB,
numpy alone, right on questions of five words. lingua is as good, and its models are 96 MB.
"""

from __future__ import annotations

import importlib.util
import unicodedata
from collections import Counter
from functools import lru_cache

_FEWEST_LETTERS = 12
"""In fewer letters of an alphabet no language is told from another."""
_FEWEST_SIGNS = 2
"""The same where a sign is a syllable or a word."""
_NAMES = {
    "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "fa": "Persian", "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi",
    "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "nl": "Dutch",
    "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sv": "Swedish",
    "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese", "zxx": "no language",
}  # fmt: skip
_SCRIPTS = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}
SHORT = "too short to tell"


@lru_cache(maxsize=1 << 16)
def script(sign: str) -> str:
    """The script of a letter (Latin, Han, Kana, Hangul, Cyrillic, ...); empty for what is none."""
    if not sign.isalpha():
        return ""
    word = unicodedata.name(sign, "").split(" ")[0].split("-")[0]
    return _SCRIPTS.get(word, word.capitalize())


def scripts(text: str) -> Counter[str]:
    """Letters of each script."""
    found = Counter(map(script, text))
    found.pop("", None)
    return found


def main_script(text: str) -> str:
    """The script of most letters; empty without letters."""
    found = scripts(text).most_common(1)
    return found[0][0] if found else ""


def tells_languages() -> bool:
    return importlib.util.find_spec("py3langid") is not None


def language(text: str) -> str:
    """`English`; the script without py3langid; `SHORT` where there is too little text."""
    found = scripts(text)
    signs = sum(n for name, n in found.items() if name in ("Han", "Kana", "Hangul"))
    if signs < _FEWEST_SIGNS and found.total() < _FEWEST_LETTERS:
        return SHORT
    if not tells_languages():
        return f"{found.most_common(1)[0][0]} script"
    import py3langid

    code = str(py3langid.classify(text)[0])
    return _NAMES.get(code, code)


def apart(a: Counter[str], b: Counter[str]) -> float:
    """Half the summed differences of two mixes' shares: 0 the same, 1 nothing in common."""
    if not a or not b:
        return 0.0
    return sum(abs(a[name] / a.total() - b[name] / b.total()) for name in a | b) / 2
