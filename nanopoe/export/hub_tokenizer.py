"""Our BPE tokenizer as a standard tokenizer.json: no custom code, equal token for token.

A saved vocabulary knows the rank of each byte string; the merge that made it is the last one when its bytes are
merged with the lower ranks only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HubTokenizer

from nanopoe.errors import DataError
from nanopoe.tokenizer import Tokenizer

PROBE = ("The year 1984, x+=3;\n\tdef f(x):  return x**2   # caf\u00e9 \u4f60\u597d \U0001f600\u200d\U0001f525\r\n\r\n"
         "I'm WE'LL \u017f 12345678 a\u0301 \u2028 <|bos|> \x00 " + "ab" * 40 + " " * 33)


def byte_alphabet() -> dict[int, str]:
    """Byte -> the printable character that stands for it in tokenizer.json (the GPT-2 convention)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}


def merge_pairs(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The two parts of every token of more than one byte, in rank order. DataError for one that BPE cannot make."""
    never = len(ranks)
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            best, i = min((ranks.get(parts[i] + parts[i + 1], never), i) for i in range(len(parts) - 1))
            if best >= rank:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) != 2:
            raise DataError(f"token {rank} {token!r} cannot be reached by merging tokens of lower rank", "tokenizer",
                            "train the tokenizer again")
        yield parts[0], parts[1]


def hub_tokenizer(tokenizer: Tokenizer) -> HubTokenizer:
    """Convert, and check on a probe text that both encode alike."""
    ranks, special_ids = tokenizer.mergeable_ranks, tokenizer.special_ids
    ids = sorted([*ranks.values(), *special_ids.values()])
    if ids != list(range(tokenizer.vocab_size)):
        raise DataError(f"ids are not 0 to {tokenizer.vocab_size - 1}, each once", "tokenizer",
                        "train the tokenizer again")
    alphabet = byte_alphabet()

    def text(token: bytes) -> str:
        return "".join(alphabet[b] for b in token)

    hub = HubTokenizer(models.BPE(vocab={text(token): rank for token, rank in ranks.items()},
                                  merges=[(text(a), text(b)) for a, b in merge_pairs(ranks)], ignore_merges=True))
    hub.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(tokenizer.pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    hub.decoder = decoders.ByteLevel()
    by_id = sorted(special_ids, key=special_ids.__getitem__)
    hub.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in by_id])
    hub.encode_special_tokens = True                 # for the probe: as ours, special strings in text are plain text
    same = hub.encode(PROBE).ids == tokenizer.encode(PROBE) and all(
        hub.token_to_id(name) == i for name, i in special_ids.items())
    hub.encode_special_tokens = False
    if not same:
        raise DataError("the exported tokenizer encodes a probe text differently", "tokenizer",
                        f"its split pattern may not be portable: {tokenizer.pattern}")
    return hub


def tokenizer_config(sequence_len: int) -> dict[str, Any]:
    """The dict of tokenizer_config.json. Nothing is added to a text by itself: prompts write <|bos|> (see the card)."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|bos|>",
        "pad_token": "<|bos|>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_len,
        "model_input_names": ["input_ids", "attention_mask"],
    }
