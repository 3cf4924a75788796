"""Tiny frozen models with redrawn weights, and a tokenizer for which " dog" and "dog" are different words."""

from typing import Any

import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

import tiny
from openblip2.model.language import DecoderLM, EncoderDecoderLM, LanguageModel
from openblip2.model.vision import HFVision

SIDE = 12
L, INNER, LM_HEADS = 20, 26, 5
STD = 0.4  # pre-norm layers tolerate a larger std than the Q-Former's
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "\n"]
PLAIN = "a dog cat bus red blue left of two the on grass sits runs photo question: answer: what is it yes no"
PLAIN += " small and user turn bird tree"
WORDS = [*SPECIAL, *PLAIN.split(), *(f" {word}" for word in PLAIN.split())]
W = len(WORDS)  # 61
PAD, BOS, EOS, NEWLINE = 0, 1, 2, 4


def ids(text: str) -> list[int]:
    """The ids of the words and special tokens in `text`, which are separated by "|"."""
    return [WORDS.index(word) for word in text.split("|")] if text else []


def tokenizer(bos: str | None = "<s>", eos: str | None = "</s>", pad: str | None = "<pad>") -> Any:
    """A tokenizer whose words include the space before them, as in byte-level tokenizers."""
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[^\s]+"), "isolated")
    words.decoder = decoders.Fuse()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=bos, eos_token=eos, pad_token=pad, unk_token="<unk>"
    )


SHARED: dict[str, Any] = {"vocab_size": W, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


def opt() -> hf.PreTrainedModel:
    """An OPT whose embeddings, of width L, are narrower than its layers, as in OPT-350m."""
    sizes: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "ffn_dim": INNER}
    config = hf.OPTConfig(**SHARED, **sizes, word_embed_proj_dim=L, max_position_embeddings=50)
    return tiny.redraw(hf.OPTForCausalLM(config), std=STD)


def gpt2() -> hf.PreTrainedModel:
    config = hf.GPT2Config(**SHARED, n_embd=L, n_head=LM_HEADS, n_inner=INNER, n_layer=2, n_positions=50)
    return tiny.redraw(hf.GPT2LMHeadModel(config), std=STD)


def llama() -> hf.PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": L, "num_attention_heads": LM_HEADS, "intermediate_size": INNER}
    config = hf.LlamaConfig(**SHARED, **sizes, num_hidden_layers=2, num_key_value_heads=1)
    return tiny.redraw(hf.LlamaForCausalLM(config), std=STD)


def t5() -> hf.PreTrainedModel:
    """A T5 with FlanT5's gated GELU and an untied output embedding."""
    sizes: dict[str, Any] = {"d_model": L, "d_kv": 4, "d_ff": INNER, "num_heads": LM_HEADS}
    sizes |= {"num_layers": 3, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu"}
    special: dict[str, Any] = {"tie_word_embeddings": False, "decoder_start_token_id": PAD}
    model = hf.T5ForConditionalGeneration(hf.T5Config(**SHARED, **sizes, **special))
    # A new T5 ties its output embedding to its input embedding despite its config.
    model.set_output_embeddings(nn.Linear(L, W, bias=False))
    return tiny.redraw(model, seed=2, std=0.3)


def vision() -> HFVision:
    """P = 7: a class token, two registers and 2 x 2 patches of 6 px."""
    config = hf.Dinov2WithRegistersConfig(
        hidden_size=tiny.V,
        num_hidden_layers=3,
        num_attention_heads=1,
        mlp_ratio=2,
        image_size=SIDE,
        patch_size=6,
        num_register_tokens=2,
        hidden_dropout_prob=0.5,
    )
    return HFVision(tiny.redraw(hf.Dinov2WithRegistersModel(config)), image_size=SIDE)


def pictures(count: int = tiny.B) -> Tensor:
    """uint8 `[B, 3, S, S]`."""
    random = torch.Generator().manual_seed(6)
    return torch.randint(256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=random)


DECODERS = {"opt": opt, "gpt2": gpt2, "llama": llama}
MODELS = {**DECODERS, "t5": t5}


def language(kind: str, llm: hf.PreTrainedModel | None = None, **options: Any) -> LanguageModel:
    """One of `MODELS` with its tokenizer; `options` are those of `DecoderLM`."""
    llm = MODELS[kind]() if llm is None else llm
    if kind == "t5":
        return EncoderDecoderLM(llm, tokenizer(bos=None), **options)
    return DecoderLM(llm, tokenizer(), **options)


def constant(kind: str, *words: tuple[str, float], **options: Any) -> LanguageModel:
    """A model with the same logits at every position for every input: those given, and 0 for other words."""
    llm: Any = MODELS[kind]()
    head = nn.Linear(llm.get_output_embeddings().weight.shape[1], W)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    head.bias.data[: len(SPECIAL)] = -50.0
    for word, logit in words:
        head.bias.data[WORDS.index(word)] = logit
    llm.set_output_embeddings(head)
    return language(kind, llm, **options)


def soft_prompts(count: int = 3) -> Tensor:
    """`[B, Q, L]`."""
    return 0.5 * torch.randn(count, tiny.Q, L, generator=torch.Generator().manual_seed(0))


def embed(llm: hf.PreTrainedModel, words: list[int]) -> Tensor:
    """Input embeddings of a text: `[T, L]`."""
    embeddings: Any = llm.get_input_embeddings()
    return embeddings(torch.tensor(words, dtype=torch.long))
