"""Texts on which two encoders are compared: what conversions and rebuilt tokenizers usually get wrong."""

from __future__ import annotations

from collections.abc import Iterable

# Runs of spaces, line breaks, leading and trailing spaces, digits, rare characters.
PROBES = (
    "Hello world", " two  spaces   and\ttabs\t\t", "def f(x):\n    if x:\n        return 0\n\n\n", "x" * 40,
    "3.14159 + 2,718 = 1234567890", "naïve café, ½ ﬁne Ⅳ, Übergröße", "日本語とрусский язык",
    "🙂👩‍👩‍👧‍👦 \u200b\u00a0 e\u0301", "=" * 79, " " * 23 + "}", "\n\n  \n", "", " ", "a", "▁",
    "I'll say: don't, WE'VE (it's) \"quoted\" -- e.g. x_1, CamelCase, ALL CAPS.",
    "Die Straße über den Fluß; «où ça?» ¿Qué? Zażółć gęślą jaźń.",
    "Ελληνικά κείμενα, العربية من اليمين، עברית, हिन्दी में लिखा, ภาษาไทย, 한국어 문장, 中文句子。",
    '#include <stdio.h>\r\nint main() { printf("%d\\n", 1 << 3); }\r\n// ~!@#$^&*|?',
    "https://example.org/a-b?c=d&e=%20f 192.168.0.1 2024-02-29T12:30:00Z 1_000_000 0xFF",
    "\ufeffmark\u2028line\u3000wide\u00adsoft", "\x85next\x85",
)  # fmt: skip
BYTE_NAMES = "".join(f"<0x{byte:02X}>" for byte in range(256))  # in a text these are text, not the bytes


def probe_texts(names: Iterable[str]) -> list[str]:
    """PROBES, and texts that spell out bytes and the ``names`` of special and added tokens."""
    spelled = [text for name in names for text in (name, f"a{name} {name}", f"\n{name}\n")]
    return [*PROBES, BYTE_NAMES, *spelled]
