"""Builds the models of a run on the meta device from their sizes alone: no download, and no weight is read."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from openblip2.config import RunSettings
from openblip2.errors import UserError, one_line
from openblip2.model.bert import bert_sizes
from openblip2.model.build import build_stage1, build_stage2, connector_class
from openblip2.model.language import DecoderLM, EncoderDecoderLM, LanguageModel
from openblip2.model.precision import DTYPES
from openblip2.model.qformer import QFormer
from openblip2.model.stage1 import Stage1
from openblip2.model.stage2 import Stage2
from openblip2.model.template import PAPER_TEMPLATE
from openblip2.model.vision import HFVision
from openblip2.model.wheels import locate

_OPT = {"vocab_size": 50272, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048}
_T5 = {"num_layers": 24, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "tie_word_embeddings": False}
# The models of the presets: a configuration class of transformers, and the values that differ from its defaults.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "google-bert/bert-base-uncased": ("BertConfig", {}),
    "Salesforce/blip2-itm-vit-g": ("Blip2VisionConfig", {}),  # EVA-CLIP's ViT-g/14, 39 of its 40 layers
    "openai/clip-vit-large-patch14": ("CLIPVisionConfig", {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
        "patch_size": 14,
    }),
    "facebook/opt-2.7b": ("OPTConfig", _OPT | {"hidden_size": 2560, "ffn_dim": 10240, "word_embed_proj_dim": 2560}),
    "facebook/opt-6.7b": ("OPTConfig", _OPT | {"hidden_size": 4096, "ffn_dim": 16384, "word_embed_proj_dim": 4096}),
    "google/flan-t5-xl": ("T5Config", _T5 | {"d_model": 2048, "d_ff": 5120, "num_heads": 32}),
    "google/flan-t5-xxl": ("T5Config", _T5 | {"d_model": 4096, "d_ff": 10240, "num_heads": 64}),
}  # fmt: skip


def build_model(settings: RunSettings, dtype: torch.dtype) -> Stage1 | Stage2:
    """The model of a run on the meta device, in training mode.

    Args:
        dtype: The dtype of frozen weights whose setting is "auto", "int8" or "int4".

    Raises:
        UserError: The sizes of a model are not known, or a model cannot be used in its role.
    """
    start, sizes = settings.qformer.start, None
    if connector_class(settings) is QFormer:
        sizes = bert_sizes(start, _config("qformer.start", start))
    with torch.device("meta"):
        vision = _build_vision(settings, dtype)
        if settings.stage == "stage1":
            return build_stage1(settings, vision, sizes).train()
        return build_stage2(settings, vision, sizes, language=_build_language(settings, dtype)).train()


def _build_vision(settings: RunSettings, dtype: torch.dtype) -> HFVision:
    from transformers import AutoModel, Blip2VisionModel

    named = settings.vision
    config = _config("vision.name", named.name)
    config = getattr(config, "vision_config", config)  # the vision part of a larger model
    if not {"image_size", "patch_size", "num_hidden_layers"} <= config.to_dict().keys():
        raise UserError(f"vision.name {named.name!r} is a {config.model_type!r}: it must be a vision transformer")
    # AutoModel does not support BLIP-2's encoder.
    load: Any = Blip2VisionModel if config.model_type == "blip_2_vision_model" else AutoModel.from_config
    encoder = load(config)
    return HFVision(encoder.to(DTYPES.get(named.dtype, dtype)), named.layer, named.image_size)


def _build_language(settings: RunSettings, dtype: torch.dtype) -> LanguageModel:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    named = settings.language
    config = _config("language.name", named.name)
    config = config.text_config if "qformer_config" in config.sub_configs else config  # the language part of a BLIP-2
    if named.exact_gelu:
        config.dense_act_fn = "gelu"
    loader: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    llm = loader.from_config(config)
    if config.model_type == "t5" and not config.scale_decoder_outputs:
        # FlanT5's output embedding is not tied, but transformers ties it if there is no checkpoint to read.
        shape = llm.get_input_embeddings().weight.shape
        llm.set_output_embeddings(nn.Linear(shape[1], shape[0], bias=False))
    kind: Any = EncoderDecoderLM if config.is_encoder_decoder else DecoderLM
    template = PAPER_TEMPLATE if named.template == "chat" else named.template  # a chat template needs the tokenizer
    language = kind(llm.to(DTYPES.get(named.dtype, dtype)), LengthTokenizer(), template, named.end)
    language._ends_in_head = True  # it cannot be tested without values
    return language


class LengthTokenizer:
    """Replaces a tokenizer that is not available: one token for every four characters, about as many as in English."""

    bos_token, eos_token, unk_token_id, model_max_length = "</s>", "</s>", None, int(1e30)
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [1] * -(-len(text) // 4)}


def _config(setting: str, name: str) -> Any:
    import transformers

    if name in CONFIGS:
        return getattr(transformers, CONFIGS[name][0])(**CONFIGS[name][1])
    folder = Path(locate(name))
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{setting} {name!r}: its sizes are not known, and a plan downloads nothing: give a directory with its "
            f"config.json, or one of {', '.join(CONFIGS)}"
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{setting} {name!r} cannot be read: {one_line(error)}") from error
