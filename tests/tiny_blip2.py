"""Tiny BLIP-2 models in transformers' format as folders on disk, as a user would have them, with redrawn parameters.

A new model would hide bugs, because its queries are zeros and its image encoder has weights of 1e-10. As in the
published models, OPT stops at a line break and its first token is "</s>", T5 has an untied output embedding, and the
Q-Former that reads text has `[DEC]` after BERT's words.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor, nn

import tiny
import tiny_models
from openblip2.model.vision import CLIP_MEAN, CLIP_STD
from tiny_models import BOS, EOS, INNER, LM_HEADS, NEWLINE, PAD, SIDE, STD, L
from tiny_runs import BERT_WORDS, named

PATCH, P, V = 3, 17, 22  # 4 x 4 patches and a class token
IMAGE = tiny_models.W  # the id of "<image>", which the processor adds to the tokenizer
W = IMAGE + 2  # one more than the tokenizer has, because published vocabularies are padded
RETRIEVER_WORDS = len(BERT_WORDS) + 1  # with [DEC]
POSITIONS = 16
FIRST = {"opt": "</s>", "gpt2": "<s>", "llama": "<s>", "t5": None}  # the tokenizer's first token
END = {"opt": "\n", "gpt2": "</s>", "llama": "</s>", "t5": "</s>"}  # what stops the language model
KINDS = tuple(END)
# Seeds of language models whose texts differ; some texts end early, and beams and length penalty change some.
SEEDS = {"opt": 14, "gpt2": 7, "llama": 28, "t5": 19}


def generator(kind: str, folder: Path) -> Path:
    """`Blip2ForConditionalGeneration` and its processor. kind: opt, gpt2, llama or t5."""
    return _generator(kind, folder, hf.Blip2ForConditionalGeneration(_config(_language(kind), False, IMAGE)))


def instructed(kind: str, folder: Path) -> Path:
    """`InstructBlipForConditionalGeneration` and its processor with two tokenizers. kind: as for `generator`."""
    config = hf.InstructBlipConfig(
        vision_config=hf.InstructBlipVisionConfig(**_ENCODER),
        qformer_config=hf.InstructBlipQFormerConfig(**_QFORMER, **_TEXT),
        text_config=_language(kind),
        num_query_tokens=tiny.Q,
        image_token_index=IMAGE,
    )
    return _generator(kind, folder, hf.InstructBlipForConditionalGeneration(config), bert())


def bert() -> Any:
    """The Q-Former's tokenizer, with [DEC]."""
    words: Any = hf.BertTokenizer(vocab={word: n for n, word in enumerate(BERT_WORDS)})
    words.add_special_tokens({"bos_token": "[DEC]"})
    assert len(words) == RETRIEVER_WORDS
    return words


def _generator(kind: str, folder: Path, model: Any, qformer_tokenizer: Any = None) -> Path:
    _redraw(model)
    language: Any = model.language_model
    std = 0.2 if kind == "t5" else STD  # T5 does not scale its attention: with more, float32 loses 5 digits
    tiny.redraw(language, SEEDS[kind], std)
    if kind == "t5":  # FlanT5's output embedding is untied, but a new T5 ties it despite its config
        language.set_output_embeddings(tiny.redraw(nn.Linear(L, W, bias=False), seed=1))
    language.get_output_embeddings().weight.data[tiny_models.WORDS.index(END[kind])] *= 2  # some texts end early
    model.save_pretrained(folder)
    made = processor(tokenizer(kind), qformer_tokenizer)
    assert made.tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    made.save_pretrained(folder)
    return folder


def retriever(folder: Path) -> Path:
    """`Blip2ForImageTextRetrieval`, whose Q-Former reads text, and its processor."""
    _redraw(hf.Blip2ForImageTextRetrieval(_config(None, text=True))).save_pretrained(folder)
    processor(bert()).save_pretrained(folder)
    return folder


def tokenizer(kind: str) -> Any:
    """The tokenizer of `tiny_models`; it adds the first or the end token where the real one does."""
    words = tiny_models.tokenizer(bos=FIRST[kind])
    around = {"opt": "</s> $A", "llama": "<s> $A", "t5": "$A </s>"}
    if kind in around:
        template = processors.TemplateProcessing(around[kind], special_tokens=[("<s>", BOS), ("</s>", EOS)])
        words.backend_tokenizer.post_processor = template
    return words


def pixel_values(pictures: Tensor) -> Tensor:
    """Converts uint8 `[B, 3, S, S]` to the input of transformers."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pictures / 255 - mean) / std


def _redraw(model: Any) -> Any:
    tiny.redraw(model)
    # With a larger std, attention makes the queries nearly equal, and float32 loses the gradients of attended rows.
    tiny.redraw(model.qformer, seed=2, std=0.1)
    return model


_ENCODER: dict[str, Any] = {**named(width=V, layers=3, heads=2, ffn=40), "image_size": SIDE, "patch_size": PATCH}
_QFORMER: dict[str, Any] = named(width=tiny.D, layers=tiny.LAYERS, heads=tiny.HEADS, ffn=tiny.FFN)
_TEXT: dict[str, Any] = {"vocab_size": RETRIEVER_WORDS, "max_position_embeddings": POSITIONS}


def _config(language: hf.PreTrainedConfig | None, text: bool, image_token_index: int | None = None) -> hf.Blip2Config:
    qformer = _QFORMER | _TEXT if text else _QFORMER
    return hf.Blip2Config(
        vision_config=hf.Blip2VisionConfig(**_ENCODER),
        qformer_config=hf.Blip2QFormerConfig(**qformer, use_qformer_text_input=text),
        text_config=language,
        num_query_tokens=tiny.Q,
        image_text_hidden_size=tiny.E,
        image_token_index=image_token_index,
    )


def _language(kind: str) -> hf.PreTrainedConfig:
    shared: dict[str, Any] = {"vocab_size": W, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    if kind == "gpt2":
        return hf.GPT2Config(**shared, n_embd=L, n_head=LM_HEADS, n_inner=INNER, n_layer=2, n_positions=50)
    if kind == "t5":
        # As FlanT5: a gated GELU, an untied output embedding, no first token.
        sizes: dict[str, Any] = {"d_model": L, "d_kv": 4, "d_ff": INNER, "num_heads": LM_HEADS, "num_layers": 3}
        sizes |= {
            "num_decoder_layers": 2,
            "decoder_start_token_id": PAD,
            "feed_forward_proj": "gated-gelu",
            "dense_act_fn": "gelu",
        }
        sizes |= {"bos_token_id": None, "tie_word_embeddings": False}
        return hf.T5Config(**{**shared, **sizes})
    sizes = {"hidden_size": L, "num_attention_heads": LM_HEADS, "num_hidden_layers": 2}
    if kind == "llama":
        return hf.LlamaConfig(**shared, **sizes, intermediate_size=INNER, num_key_value_heads=1)
    shared |= {"bos_token_id": EOS, "eos_token_id": NEWLINE}
    # The projection in transformers is as wide as the layers, so OPT's embeddings must be, too.
    return hf.OPTConfig(**shared, **sizes, ffn_dim=INNER, word_embed_proj_dim=L, max_position_embeddings=50)


def processor(words: Any, qformer_tokenizer: Any = None) -> Any:
    """transformers' processor with a tokenizer, to which it adds `<image>`; with two tokenizers, InstructBLIP's."""
    pictures = hf.BlipImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD)
    )
    if qformer_tokenizer is not None:
        return hf.InstructBlipProcessor(pictures, words, qformer_tokenizer, num_query_tokens=tiny.Q)
    return hf.Blip2Processor(pictures, words, num_query_tokens=tiny.Q)


def changed_config(change: Any, file: str = "config.json") -> Callable[[Path], None]:
    """Returns a function that changes the values of a JSON file in a folder."""

    def changed(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        change(values)
        (folder / file).write_text(json.dumps(values))

    return changed


def changed_tensors(change: Any) -> Callable[[Path], None]:
    """Returns a function that changes the tensors in a folder."""

    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return changed
