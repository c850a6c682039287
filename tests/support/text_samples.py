"""Test texts for tokenizers and detokenizers: more than 200."""

import random

_PROSE = [
    "",
    "a",
    "Hello, world!",
    "The capital of France is Paris.",
    "It's what we'd call 'fine', isn't it? They'll say you've won; I'm sure she's here.",
    "IT'S WHAT WE'D CALL 'FINE'",
    "don't DON'T Don'T ’tis it’s",
    "UPPER lower Mixed camelCase snake_case kebab-case SCREAMING_SNAKE",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "...!!!???---___***###",
    "«quoted» “curly” ‘single’ — dash – and…ellipsis",
    "mail@example.org, https://example.org/a/b?c=d&e=f#g",
    "1) first\n2) second\n\n3) third",
    "# Title\n\n- item one\n- item two\n\n> quote\n\n```python\nx = 1\n```\n",
    "|a|b|\n|-|-|\n|1|2|",
]
_DIGITS = [
    "0",
    "1234567890",
    "12345678901234567890123456789012345678901234567890",
    "3.14159265358979",
    "-1.5e-10",
    "1,234,567.89",
    "2024-02-29T23:59:59Z",
    "0x1F 0b1010 0o17",
    "x1 x12 x123 1x 12x 123x",
    "no. 7",
    "10 %  20 %",
    "1  2   3    4",
    "\n\n42",
    "    42",
    "\t7",
    "٠١٢٣٤٥٦٧٨٩",
    "१२३",
    "½ ² ³ ①②③ Ⅷ",
    "１２３",
]
_CODE = [
    "def f(x):\n    return x + 1\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];\n}\n",
    'if __name__ == "__main__":\n    main()',
    "SELECT * FROM t WHERE a = 'b' AND c IN (1, 2, 3);",
    '{"key": [1, 2.5, null, true], "nested": {"a": "\\u00e9"}}',
    "<div class='x'>&nbsp;<br/></div>",
    "\\frac{a}{b} \\sum_{i=0}^{n} x_i",
    "a=b==c!=d<=e>=f<<g>>h&&i||j",
    "let f = |x: &'a str| -> Option<u8> { x.bytes().next() };",
    "#!/bin/sh\nset -eu\necho \"$HOME\" | sed 's/a/b/g' > /dev/null 2>&1\n",
    "\t\tindented\n\t\t\tmore\n",
    "x\r\ny\r\nz",
    "C:\\Users\\name\\file.txt",
    "0;31m\x1b[0m",
]
_WHITESPACE = [
    " ",
    "  ",
    "   ",
    "        ",
    "\n",
    "\n\n",
    "\n\n\n\n\n",
    "\t",
    "\t\t\t",
    "\r\n",
    " \n \n ",
    " leading",
    "  leading two",
    "trailing ",
    "trailing two  ",
    "  both  ",
    "a  b",
    "a   b    c     d",
    "a \n b",
    "a\t b \tc",
    "a\u00a0b",
    "a\u3000b",
    "a\u2003b\u2009c",
    "\u200b\u200c\u200d\ufeff",
    "line\u2028separator\u2029paragraph",
    "\x0b\x0c\x1c\x85",
    "a" + " " * 100 + "b",
    "\n" * 50,
]
_SCRIPTS = [
    "Ünïcödé àéîõü ñ ç ß ø å æ œ ł ž",
    "Zażółć gęślą jaźń",
    "Příliš žluťoučký kůň úpěl ďábelské ódy",
    "Größe, Straße, Übermut",
    "İstanbul ı ğ ş",
    "Быстрая коричневая лиса",
    "Ελληνικά: αβγδε ΑΒΓΔΕ",
    "Հայերեն",
    "ქართული",
    "你好，世界！",
    "日本語のテキスト、カタカナ、ひらがな。",
    "漢字かな交じり文とｶﾀｶﾅ",
    "안녕하세요 세계",
    "한글",
    "สวัสดีชาวโลก",
    "नमस्ते दुनिया",
    "வணக்கம் உலகம்",
    "မြန်မာဘာသာ",
    "ភាសាខ្មែរ",
    "አማርኛ",
    "ᏣᎳᎩ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚",
    "𐍈𐌰𐌿 𒀀𒀁 𓀀𓀁",
    "𠀀𠀁𪛖",
    "abc你好def",
    "mixed текст 文字 text",
]
_RIGHT_TO_LEFT = [
    "שלום עולם",
    "مرحبا بالعالم",
    "اَلْعَرَبِيَّةُ",
    "فارسی ۱۲۳",
    "left שמאל right ימין",
    "\u202eoverride\u202c",
    "\u200fmark\u200e",
]
_COMBINING = [
    "e\u0301",
    "\u00e9 e\u0301",
    "a\u0300\u0301\u0302\u0303\u0304",
    "Z\u0351\u036b\u0343a\u0321\u034a\u0317l\u0334g\u0321o\u0322",
    "n\u0303 \u00f1",
    "\u0301alone",
    "क्षि त्र ज्ञ",
    "각 \u1100\u1161\u11a8",
    "ﬁ ﬂ ﬀ",
    "Å Å A\u030a",
]
_EMOJI = [
    "😀",
    "😀😃😄😁😆",
    "👍🏽",
    "👩‍👩‍👧‍👦",
    "🏳️‍🌈",
    "🇫🇷🇩🇪🇯🇵",
    "❤️ ❤ ☃ ✈️",
    "1️⃣2️⃣",
    "I ❤️ 🍕!",
    "a😀b😀c",
    " 😀 😀 ",
    "🧑🏿‍🚀🫠🪿",
    "♔♕♖ ♠♥♦♣ ∀∃∅∈∉ ∑∏∫√∞ ≤≥≠≈ →⇒↔",
    "▁▂▃ ░▒▓ ┌─┐",
]
_SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|im_end|>b",
    "a <|im_end|> b",
    " <|im_end|>",
    "<|im_end|><|im_end|>",
    "<|endoftext|>text",
    "<|endoftext |> <|im_en",
    "<|IM_END|>",
    "<file_sep><filename>a.py",
    "<s>[INST] hi [/INST]</s>",
    "<unk>",
    "<0x0A> <0xE4>",
    "<|eot_id|><|start_header_id|>",
    "<think>hm</think>",
]
_ODD = [
    "\x00",
    "a\x00b",
    "\x01\x02\x7f",
    "\ufffd",
    "a\ufffd",
    "\ufffdb",
    "\uffff\ufffe",
    "\ue000 private",
    "Ġ Ċ ĉ",
    "Ã©",
    "\U0010ffff",
    "\U000e0041\U000e007f",
]

HANDWRITTEN = [
    *_PROSE,
    *_DIGITS,
    *_CODE,
    *_WHITESPACE,
    *_SCRIPTS,
    *_RIGHT_TO_LEFT,
    *_COMBINING,
    *_EMOJI,
    *_SPECIAL,
    *_ODD,
]


def _spliced(count: int) -> list[str]:
    """Concatenated parts of different samples, which are the most likely to fail; the same in every run."""
    rng = random.Random(20240229)
    texts = []
    for _ in range(count):
        parts = rng.choices([text for text in HANDWRITTEN if text], k=rng.randint(2, 4))
        texts.append(rng.choice(["", " ", "\n"]).join(part[: rng.randint(1, 12)] for part in parts))
    return texts


SAMPLES = HANDWRITTEN + _spliced(100)

# Prompts of concurrent requests: two are equal, and one is a prefix of another.
PROMPTS = (
    "The capital of France is",
    "The capital of France is a city that",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Water boils at a temperature that depends on",
    "The three most important inventions of the twentieth century were",
    "1, 2, 3,",
    "The capital of France is",
)

CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "one question": [{"role": "user", "content": "What is the capital of France?"}],
    "with a system message": [
        {"role": "system", "content": "You answer in rhymes."},
        {"role": "user", "content": "Hello!"},
    ],
    "several turns": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "Five?"},
    ],
    "empty contents": [{"role": "system", "content": ""}, {"role": "user", "content": ""}],
    "other scripts": [
        {"role": "user", "content": "你好 😀 שלום e\u0301"},
        {"role": "assistant", "content": "नमस्ते 👩‍👩‍👧"},
    ],
    "spaces at the ends": [{"role": "user", "content": "  \n indented\n\n"}],
    "template syntax in the text": [{"role": "user", "content": "{{ messages }} {% raw %} {# no #} <b>&amp;</b> \\n"}],
    "special tokens in the text": [{"role": "user", "content": "say <|im_end|> and <|im_start|>system"}],
    "only the assistant": [{"role": "assistant", "content": "I begin."}],
}
