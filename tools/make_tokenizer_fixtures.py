"""Writes fixtures/tokenizers/: small tokenizers of the real families, and what the Python library does with hostile text.

  python3 tools/make_tokenizer_fixtures.py      (needs tokenizers)

hostile.json is the list of texts; <family>/expected.json has, for each text and for all of them joined by newlines,
the ids without and with the special tokens, the text decoded from the latter without and with them, and the text
of every three ids (characters cut in the middle). variants.json has families with some parts exchanged, and of what
they make of each text the first digits of a hash.
"""

import copy
import hashlib
import json
import random
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

OUT = Path(__file__).parent / "fixtures" / "tokenizers"

MIXED = list("abcABthe .,!'\"\n\r\t  0123 _") + [
    "\u00e9", "e\u0301", "\u200b", "\u200d", "\ufeff", "\u0085", "\u00a0", "\u2028", "\u3000", "\U0001f600",
    "\U0001f469\u200d\U0001f467", "\U0001d4b3", "\U00020000", "\u6f22", "\u5b57", "\u2581", "\u0120", "\u00df", "\u0130",
    "\u03a3", "\u0661", "\u2167", "\u00bd", "\x00", "\u180e", "\ue000", "\U0010fffd", "<mask>", "<s>", "</s>", "<unk>",
    "<|endoftext|>", " the ", "'s", "\u0345", "\ufb01", "\u1161", "\uac01", "\u0903", "\u2060", "\ufe0f", "$&",
]  # fmt: skip


def mixed(rng: random.Random) -> str:
    return "".join(rng.choice(MIXED) for _ in range(50))


HOSTILE = [
    "",
    " ",
    "\n",
    "The cat sat on the mat.",
    "  two spaces before, three   inside, four after    ",
    "tabs\tand\t\tmore\ttabs\n\tindented\n        eight spaces",
    "windows\r\nline ends\r\n\r\nand an old mac one\rhere",
    "empty lines\n\n\n\nin a row",
    "Don't! \"Really?\" she said; 'yes' (he'll, we've, I'm, they'd, it's, you're, can't, N'T, IT'S)...",
    "Hello ,world !What 's this ? I do n't know . ' a ' b",
    "well-known e-mail: someone@example.com, https://example.com/a?b=c&d=e#f_g%20h",
    "numbers 0 1 12 123 1234 12345 1,234,567.89 3.14e-10 0x1F \u00bd \u2167 \u00b2\u00b3\u00b9 \u0663\u0664\u0665 \u0967\u0968 \u2460",
    "snake_case camelCase SCREAMING kebab-case __init__ a_1 x2y3",
    "for (let i = 0; i < 10; i++) { a[i] += `${b}` ?? c; } // done",
    "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m A\u030angstro\u0308m \u1e9b\u0323 \u01c6 \ufb01nd \uff21\uff22\uff23 \u2126",
    "\u0301lone accent, a \u0301 spaced one, and a\u0301\u0302\u0303\u0304\u0305 stacked",
    "STRASSE Stra\u00dfe \u0130stanbul \u0131 \u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2 \u039f\u0394\u039f\u03a3 \u01c5",
    "emoji \U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7 \u2764\ufe0f 1\ufe0f\u20e3 \U0001f3f4\U000e0067\U000e0062\U000e007f",
    "zero\u200bwidth\u200cnon\u200djoiners\u2060word\ufeffbom\u00adsoft\u180ehyphen",
    "\ufeffa byte order mark before, \ufeffinside,\ufeff!, \ufeff\ufeff twice, \ufeff ",
    "next \u0085 lines \u0085\u0085x !\u0085! \u0085",
    "spaces: no\u00a0break em\u2003thin\u2009ideo\u3000graphic ogham\u1680line\u2028para\u2029next\u0085line narrow\u202f",
    "controls: \x01\x02\x07\x08\x0b\x0c\x1b[31mred\x1b[0m \x1c\x1f \x7f\x80\x9f end",
    "nul \x00 inside",
    "right to left: \u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u202ertl\u202c \u200f!",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947 \u0b95\u0bcd\u0bb7 \u1019\u103c\u1014\u103a\u1019\u102c \uac00\uac01 \u1100\u1161\u11a8",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\uff76\uff85 \u4e2dabc\u6587 \U00020000\U0002a6d6 \ufa0e \u3400",
    "\u2014 dashes \u2013 and \u2026 \u201ccurly\u201d \u2018quotes\u2019 \u00ab\u00bb \u3010\u3011 \u00a1\u00bf \u2030 \u20ac $ \u00a3 + < = > | ~ ^ ` \u00a9 \u2192 \u221e \u00d7",
    "private \ue000\U0010fffd unassigned \u0378 replacement \ufffd nonchar \uffff\U0001ffff",
    "x" * 130 + " long words " + "abcdefghij" * 30 + " " + "\u00e9" * 101,
    "!" * 40 + "?" * 40 + " ?!?! ... --- *** ((())) \"'\"'",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bababababababababababababab",
    " " * 70 + "after seventy" + "\n" * 20 + " \n \n\t\n  end ",
    "<|endoftext|>special<|endoftext|> inside<s>text</s> <unk> [UNK][CLS] [SEP] [EOS] <pad><|begin_of_text|><|endof text|>",
    "a<|endoftext|>\nb <|endoftext|> c  <mask>  d<mask>",
    "<0x41><0x0A> \u2581under\u2581scores \u2581 \u0120\u010a ## ##ing [unused1] @@ </w>",
    "constructor __proto__ toString hasOwnProperty valueOf",
    "``quoted'' and ''twice'' `once'",
    "the end",
    # characters beyond U+FFFF and of no width, where a splitter may count halves or see a border
    "\U0001d4b3\U00020000\u200b\U0001f469\u200d\U0001f467a\u200bb\u200cc\ufeffd \U0002f868\U0002a6e1 \U0001d7d9\U0001d7da2",
    "\ufeff\ufeffx \ufeffy z\ufeff \u200b \u200b\u200b\u2060w \U0001f600\ufeff\U0001f600 \u0085\ufeff\u0085",
    "\u0085 \ufeff\u3000both ends \u3000\ufeff \u0085",
    "\u0085<mask>\u0085 \ufeff<mask>\ufeff\u3000<mask>\u2028x\U00020000<mask>\u00e9 <mask>_ <mask>. a<mask>",
    "$& $1 $$ a$b $` $' $<x> \\1 \\$",
] + [mixed(random.Random(seed)) for seed in range(12)]


def corpus() -> list[str]:
    """Four hundred lines of our own, the same on every machine."""
    rng = random.Random(0)
    who = "the cat|the old dog|a small bird|my friend Anna|the king|her brother|a fox|the teacher|L\u00e9a|Bj\u00f6rn".split(
        "|"
    )
    did = "saw|liked|followed|was looking for|didn't find|wanted|remembered|couldn't see|sang to|walked with".split(
        "|"
    )
    what = "the river|a red apple|some bread|the moon|an open door|the garden|a caf\u00e9|twelve stones|the snow|a song".split(
        "|"
    )
    how = [
        "slowly",
        "in the morning",
        "again and again",
        "at 10:30",
        "in 1984",
        "happily",
        "\u2014 alone \u2014",
        "under the stars",
    ]
    end = [".", ".", "!", "?", "...", "; then it rained.", " (or so they say).", ', and said: "Hello!"']
    lines = [
        f"{rng.choice(who)} {rng.choice(did)} {rng.choice(what)} {rng.choice(how)}{rng.choice(end)}"
        for _ in range(400)
    ]
    lines = [line[0].upper() + line[1:] if rng.random() < 0.8 else line for line in lines]
    code = [
        "def f(x):\n    return x + 1\n",
        "  a = [1, 2, 3]\n\n  b = a[0]",
        "if (x == 0) {\n\tx++;\n}",
        "100 200 3000 42 7 1999",
    ]
    other = [
        "\u4f60\u597d\u4e16\u754c",
        "\u0448\u0430\u0433 \u0437\u0430 \u0448\u0430\u0433\u043e\u043c",
        "\u05e9\u05dc\u05d5\u05dd",
        "na\u00efve caf\u00e9 \u00e9t\u00e9",
        "\U0001f600 ok \U0001f44d",
    ]
    return lines + code * 5 + other * 3


# The hostile characters are trained on as well: in a vocabulary that lacks them every wrong split is the same [UNK].
TEXT = corpus() + [text for text in HOSTILE if not text.isascii() and len(text) < 200]
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel.alphabet()
FALLBACK = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]


def byte_level(trainer_args: dict, pre, normalizer=None) -> Tokenizer:
    t = Tokenizer(models.BPE())
    if normalizer is not None:
        t.normalizer = normalizer
    t.pre_tokenizer = pre
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(
        TEXT, trainers.BpeTrainer(initial_alphabet=BYTES, show_progress=False, **trainer_args)
    )
    return t


def template(t: Tokenizer, pattern: str) -> None:
    names = [w for w in pattern.split() if w != "$A"]
    t.post_processor = processors.TemplateProcessing(
        single=pattern, special_tokens=[(w, t.token_to_id(w)) for w in names]
    )


def gpt2() -> Tokenizer:
    t = byte_level(
        {"vocab_size": 1200, "special_tokens": ["<|endoftext|>"]},
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    t.post_processor = processors.ByteLevel(trim_offsets=False)
    return t


def gpt_neox() -> Tokenizer:
    """Pythia and the pile-4L target: NFC, and runs of spaces as added tokens that are not special."""
    t = byte_level(
        {"vocab_size": 1200, "special_tokens": ["<|endoftext|>", "<|padding|>"]},
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        normalizers.NFC(),
    )
    t.post_processor = processors.ByteLevel(trim_offsets=True)
    t.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    t.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True, normalized=False)])
    return t


def llama3() -> Tokenizer:
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t = byte_level({"vocab_size": 1200, "special_tokens": []}, pre_tokenizers.Sequence([split, byte]))
    t.add_special_tokens(["<|begin_of_text|>", "<|endoftext|>"])
    t.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", t.token_to_id("<|begin_of_text|>"))],
    )
    saved = json.loads(t.to_str())
    saved["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(saved))


def qwen2() -> Tokenizer:
    """Qwen2's: NFC, single digits."""
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT.replace("{1,3}", "")), behavior="isolated")
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    args = {"vocab_size": 1200, "special_tokens": ["<|endoftext|>"]}
    return byte_level(args, pre_tokenizers.Sequence([split, byte]), normalizers.NFC())


def smollm() -> Tokenizer:
    """SmolLM's: digits one by one, then GPT-2's split."""
    pre = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return byte_level({"vocab_size": 1200, "special_tokens": ["<|endoftext|>"]}, pre)


def falcon() -> Tokenizer:
    """Falcon's: splits with other behaviours than "isolated", some of them after the bytes."""
    pre = [
        pre_tokenizers.Punctuation(behavior="contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
    ]
    return byte_level({"vocab_size": 1200, "special_tokens": ["<|endoftext|>"]}, pre_tokenizers.Sequence(pre))


def merged() -> Tokenizer:
    """Gemma's split (spaces stay with the word before), and its mirror image at dots and digits."""
    pre = [
        pre_tokenizers.Split(" ", behavior="merged_with_previous"),
        pre_tokenizers.Split(Regex(r"[.\d]"), behavior="merged_with_next"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return byte_level({"vocab_size": 1200, "special_tokens": ["<|endoftext|>"]}, pre_tokenizers.Sequence(pre))


def sentencepiece_bpe() -> Tokenizer:
    t = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    t.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=1000, special_tokens=FALLBACK, limit_alphabet=80, show_progress=False),
    )
    saved = json.loads(t.to_str())
    saved["added_tokens"] = saved["added_tokens"][
        :3
    ]  # the byte tokens are ordinary entries of the vocabulary
    return Tokenizer.from_str(json.dumps(saved))


def llama2() -> Tokenizer:
    t = sentencepiece_bpe()
    t.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    template(t, "<s> $A")
    return t


def llama2_metaspace() -> Tokenizer:
    """The form of newer conversions (legacy false) and Mistral: a pre-tokenizer instead of a normalizer."""
    saved = json.loads(llama2().to_str())
    saved["normalizer"] = None
    saved["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": "first",
        "split": False,
    }
    return Tokenizer.from_str(json.dumps(saved))


def unigram() -> Tokenizer:
    t = Tokenizer(models.Unigram())
    t.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    t.train_from_iterator(
        TEXT,
        trainers.UnigramTrainer(
            vocab_size=1400, special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    )
    template(t, "$A </s>")
    return t


def bert() -> Tokenizer:
    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer = normalizers.BertNormalizer(lowercase=True)
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    t.train_from_iterator(
        TEXT, trainers.WordPieceTrainer(vocab_size=1400, special_tokens=special, show_progress=False)
    )
    template(t, "[CLS] $A [SEP]")
    return t


def simplestories() -> Tokenizer:
    """The settings of SimpleStories' word-piece tokenizer."""
    t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    t.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    )
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Whitespace(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    t.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=1400, special_tokens=["[UNK]", "[EOS]"], show_progress=False
    )
    t.train_from_iterator(TEXT, trainer)
    template(t, "$A [EOS]")
    return t


def word_level() -> Tokenizer:
    t = Tokenizer(models.WordLevel(unk_token="<unk>"))
    t.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()]
    )
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>"]
    t.train_from_iterator(
        TEXT, trainers.WordLevelTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    )
    template(t, "<s> $A </s>")
    return t


def gemma() -> Tokenizer:
    """Gemma's: spaces become letters first, so that its splitter finds none, and a document is one piece."""
    saved = json.loads(llama2().to_str())
    space = {"String": " "}
    saved["normalizer"] = {"type": "Replace", "pattern": space, "content": "\u2581"}
    saved["pre_tokenizer"] = {
        "type": "Split", "pattern": space, "behavior": "MergedWithPrevious", "invert": False
    }  # fmt: skip
    return Tokenizer.from_str(json.dumps(saved))


def roberta() -> Tokenizer:
    """RoBERTa's and BLOOM's: a space is put before the text."""
    args = {"vocab_size": 1200, "special_tokens": ["<s>", "</s>", "<mask>"]}
    t = byte_level(args, pre_tokenizers.ByteLevel(add_prefix_space=True))
    t.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=True)
    return t


def fixed_length() -> Tokenizer:
    """A token for every three characters, of those that are common."""
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.FixedLength(length=3)
    t.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=900, special_tokens=["<unk>", "</s>"], show_progress=False)
    )
    return t


def word_level_split() -> Tokenizer:
    """One token a word between spaces, as the tokenizers of toy languages have."""
    t = Tokenizer(models.WordLevel(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        vocab_size=900, special_tokens=["<unk>", "<|endoftext|>"], show_progress=False
    )
    t.train_from_iterator(TEXT, trainer)
    return t


FAMILIES = {  # name: (tokenizer, tokenizer_config.json)
    "gpt2": (
        gpt2,
        {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    ),
    "gpt-neox": (gpt_neox, {"tokenizer_class": "GPTNeoXTokenizer", "eos_token": "<|endoftext|>"}),
    "llama3": (
        llama3,
        {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": True,
        },
    ),
    "qwen2": (qwen2, {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|endoftext|>"}),
    "smollm": (
        smollm,
        {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    ),
    "falcon": (falcon, {"eos_token": "<|endoftext|>"}),
    "merged": (merged, {"eos_token": "<|endoftext|>"}),
    "llama2": (
        llama2,
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
        },
    ),
    "llama2-metaspace": (
        llama2_metaspace,
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "legacy": False,
        },
    ),
    "unigram": (
        unigram,
        {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    ),
    "bert": (
        bert,
        {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": True,
            "unk_token": "[UNK]",
            "sep_token": "[SEP]",
            "cls_token": "[CLS]",
        },
    ),
    "simplestories": (
        simplestories,
        {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "eos_token": "[EOS]"},
    ),
    "gemma": (gemma, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "roberta": (roberta, {"bos_token": "<s>", "eos_token": "</s>"}),
    "fixed-length": (fixed_length, {"unk_token": "<unk>", "eos_token": "</s>"}),
    "word-level": (
        word_level,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
        },
    ),
    "word-level-split": (
        word_level_split,
        {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "eos_token": "<|endoftext|>"},
    ),
}


def variants() -> list[dict]:
    """Changes of families: what they put in place of a part, into the model, or behind the added tokens."""

    def level(**more) -> dict:
        return {
            "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True, **more
        }  # fmt: skip

    def before_bytes(*pre) -> dict:
        return {"type": "Sequence", "pretokenizers": [*pre, level(use_regex=False)]}

    def split(behavior: str, invert: bool, **pattern) -> dict:
        return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}

    def metaspace(**more) -> dict:
        return {"type": "Metaspace", "replacement": "\u2581", **more}

    def bert_normalizer(clean: bool, lower: bool, strip: bool | None) -> dict:
        return {
            "type": "BertNormalizer", "clean_text": clean, "handle_chinese_chars": clean, "strip_accents": strip,
            "lowercase": lower,
        }  # fmt: skip

    pre: list[tuple[str, dict | None]] = [
        ("gpt2", level(add_prefix_space=True, use_regex=False)),
        ("gpt-neox", level(add_prefix_space=True)),
        (
            "gpt2",
            {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, level(add_prefix_space=True)],
            },
        ),
        ("gpt2", before_bytes({"type": "FixedLength", "length": 2})),
        ("word-level-split", {"type": "FixedLength", "length": 1}),
        ("bert", {"type": "FixedLength", "length": 5}),
        ("word-level-split", {"type": "CharDelimiterSplit", "delimiter": "a"}),
        ("llama2-metaspace", metaspace(add_prefix_space=True)),
        ("unigram", metaspace(prepend_scheme="first", split=False)),
        (
            "unigram",
            {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace(prepend_scheme="always")]},
        ),
        ("llama2-metaspace", None),
        ("unigram", None),
    ]
    for scheme in ("always", "first", "never"):
        for whole in (True, False):
            pre.append(("llama2-metaspace", metaspace(prepend_scheme=scheme, split=not whole)))
    for behavior in ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        for invert in (False, True):
            pre.append(("gpt2", before_bytes(split(behavior, invert, Regex="[\\s.0-9]|\u00e9"))))
            pre.append(("gpt2", before_bytes(split(behavior, invert, String=" "))))
        pre.append(("gpt2", before_bytes({"type": "Punctuation", "behavior": behavior})))
    for name in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer"):
        pre.append(("gpt2", before_bytes({"type": name})))
    found = [{"base": base, "pre_tokenizer": part} for base, part in pre]

    words = {"pre_tokenizer": {"type": "Whitespace"}}  # unknown words beside each other
    plain = {"base": "llama2-metaspace", "model": {"byte_fallback": False}}
    found += [plain, {**plain, **words}, {**plain, "model": {"byte_fallback": False, "fuse_unk": False}}]
    found += [{**plain, "model": {"byte_fallback": False, "unk_token": None}}]
    found += [{"base": "unigram", "normalizer": None}, {"base": "gpt2", "model": {"end_of_word_suffix": "</w>"}}]

    norms = [{"type": name} for name in ("NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Lowercase")]
    norms += [{"type": "Strip", "strip_left": left, "strip_right": True} for left in (True, False)]
    norms += [{"type": "Replace", "pattern": {"String": "$"}, "content": "$& a$$b"}]
    norms += [{"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " $1 "}]
    norms += [bert_normalizer(True, True, None), bert_normalizer(False, True, False)]
    norms += [bert_normalizer(True, False, True), bert_normalizer(True, False, None)]
    found += [{"base": "gpt2", "normalizer": norm} for norm in norms]

    flags = [{}, {"lstrip": True}, {"rstrip": True}, {"normalized": True, "lstrip": True, "rstrip": True}]
    flags += [{"special": True}, {"single_word": True}, {"normalized": True, "single_word": True}]
    for base in ("gpt2", "llama2", "gpt-neox", "llama2-metaspace", "bert"):
        for flag in flags:
            standard = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
            words = ["<mask>"] if base != "gpt-neox" else []
            words += ["the ", "\U0001d4b3\U00020000"]  # none in the vocabulary
            added = [{"content": word, **standard, **flag} for word in words]
            found.append({"base": base, "added_tokens": added})
    return found


def varied(change: dict) -> Tokenizer:
    saved = json.loads((OUT / change["base"] / "tokenizer.json").read_text())
    for part, value in copy.deepcopy(change).items():
        if part == "model":
            saved["model"] |= value
        elif part == "added_tokens":
            top = max([*saved["model"]["vocab"].values(), *(t["id"] for t in saved["added_tokens"])]) + 1
            for i, token in enumerate(value):
                saved["added_tokens"].append({**token, "id": top + i})
        elif part != "base":
            saved[part] = value
    return Tokenizer.from_str(json.dumps(saved))


def digests(t: Tokenizer) -> str:
    """Eight digits a text."""
    ids = (json.dumps(t.encode(text).ids, separators=(",", ":")) for text in HOSTILE)
    return "".join(hashlib.sha256(line.encode()).hexdigest()[:8] for line in ids)


def expected(t: Tokenizer, text: str) -> dict:
    plain, full = t.encode(text, add_special_tokens=False).ids, t.encode(text).ids
    return {
        "ids": plain,
        **({"full": full} if full != plain else {}),
        "text": t.decode(full, skip_special_tokens=True),
        "raw": t.decode(full, skip_special_tokens=False),
        "threes": [t.decode(plain[i : i + 3], skip_special_tokens=False) for i in range(0, len(plain), 3)],
    }


def dump(path: Path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    for name, (make, config) in FAMILIES.items():
        folder = OUT / name
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "tokenizer.json").exists():  # kept: two of the trainers break ties by chance
            dump(folder / "tokenizer.json", json.loads(make().to_str()))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        dump(folder / "tokenizer_config.json", config)
        dump(folder / "expected.json", [expected(tokenizer, text) for text in [*HOSTILE, "\n".join(HOSTILE)]])
        print(
            f"{name:18} {tokenizer.get_vocab_size():4} tokens",
            *(f"{f.name} {f.stat().st_size}" for f in sorted(folder.iterdir())),
        )
    (OUT / "hostile.json").write_text(json.dumps(HOSTILE, indent=1) + "\n")
    changes = [{**change, "digests": digests(varied(change))} for change in variants()]
    (OUT / "variants.json").write_text("[\n" + ",\n".join(json.dumps(change) for change in changes) + "\n]\n")
