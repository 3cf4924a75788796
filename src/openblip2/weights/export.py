"""Writes BLIP-2 for transformers and vLLM, or InstructBLIP if the Q-Former reads the prompt.

Such a folder also contains the frozen parts. It has no temperature and no head of ITG, and supports only one kind of
image encoder. For others, `write_projected` stores the language model alone, to be used with projected queries:
openblip2 computes `image_embeds [n, Q, L]`, and any server that accepts embeddings as a prompt generates the text.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openblip2.compat import quiet_transformers
from openblip2.model.language import LanguageModel
from openblip2.model.template import resolve_template
from openblip2.model.vision import FrozenVision
from openblip2.weights.checkpoint import HF, INSTRUCTBLIP, OURS, Checkpoint, rename
from openblip2.weights.huggingface import FRAME, FRAMED, IMAGE_TOKEN, usual_template
from openblip2.weights.run import write_run


def write_huggingface(
    checkpoint: Checkpoint, vision: FrozenVision, language: LanguageModel | None, tokenizer: Any, out: Path
) -> list[str]:
    """Fills an empty folder; returns one line for each thing that it cannot store. The passed parts are modified.

    Args:
        vision: an encoder of EVA-CLIP's architecture, without whitening, in the dtypes to be written.
        language: the language model of stage 2, in the dtypes to be written.
        tokenizer: the tokenizer of a Q-Former that reads text.
    """
    from transformers import AddedToken, Blip2Processor, BlipImageProcessorPil, InstructBlipProcessor

    instructed = checkpoint.settings.qformer.question_in_qformer
    with quiet_transformers():
        notes = _fit_encoder(checkpoint, vision)
        words: Any = tokenizer if language is None else language.tokenizer
        words.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
        image_token = words.convert_tokens_to_ids(IMAGE_TOKEN)
        if language is None:
            homeless = {name.split(".")[0] for name in rename(checkpoint.trained, OURS, HF)[1]}
            notes += [f"{part}: transformers cannot store it" for part in sorted(homeless)]
        else:
            notes += _fit_language(language, image_token)
        model = _build_model(checkpoint, vision, language, image_token)
        model.vision_model = vision.encoder
        names, _ = rename(checkpoint.trained, OURS, INSTRUCTBLIP if instructed else HF)
        for theirs, ours in names.items():
            module, _, last = theirs.rpartition(".")
            weight = nn.Parameter(checkpoint.trained[ours].detach(), requires_grad=False)
            setattr(model.get_submodule(module), last, weight)
        model.save_pretrained(out)
        side = {"height": vision.image_size, "width": vision.image_size}
        pictures = BlipImageProcessorPil(size=side, image_mean=list(vision.mean), image_std=list(vision.std))
        pictures.save_pretrained(out)  # preprocessor_config.json, which older programs need
        queries = checkpoint.settings.qformer.queries
        processor: Any = InstructBlipProcessor if instructed else Blip2Processor
        tokenizers = (words, tokenizer) if instructed else (words,)
        processor(pictures, *tokenizers, num_query_tokens=queries).save_pretrained(out)
    return notes


def _fit_encoder(checkpoint: Checkpoint, vision: FrozenVision) -> list[str]:
    """Changes the encoder so that it can be used without openblip2's settings."""
    notes, config = [], vision.encoder.config
    eps, own = checkpoint.settings.qformer.image_norm_eps, config.layer_norm_eps  # pyright: ignore
    if eps != own:
        notes.append(f"qformer.image_norm_eps={eps}: the encoder's {own} is used instead")
    native = config.image_size  # pyright: ignore
    if vision.image_size != native:  # other programs do not interpolate
        embeddings: Any = vision.encoder.embeddings
        count = 1 + (vision.image_size // config.patch_size) ** 2  # pyright: ignore
        tokens = embeddings.position_embedding.new_empty(1, count, vision.width)
        positions = embeddings.interpolate_pos_encoding(tokens, vision.image_size, vision.image_size)
        embeddings.position_embedding = nn.Parameter(positions.detach().clone(), requires_grad=False)
        config.image_size = vision.image_size  # pyright: ignore
        notes.append(f"the image encoder's positions: permanently interpolated from {native} to {vision.image_size} px")
    return notes


def _fit_language(language: LanguageModel, image_token: int) -> list[str]:
    """Adds `<image>` to the vocabulary; the returned notes also say if the template differs from transformers' own."""
    notes, llm = [], language.llm
    if image_token >= (rows := llm.get_input_embeddings().weight.shape[0]):  # pyright: ignore
        llm.resize_token_embeddings(image_token + 1)
        notes.append(f"the language model's vocabulary grew from {rows} to {image_token + 1}, for {IMAGE_TOKEN}")
    usual = usual_template(language.tokenizer)
    if language.template != resolve_template(usual, language.tokenizer):
        notes.append(
            f"the template {language.template[:60]!r}: transformers' processor uses {usual!r} instead; write the "
            "prompt in the form of the template"
        )
    return notes


def _build_model(checkpoint: Checkpoint, vision: FrozenVision, language: LanguageModel | None, image_token: int) -> Any:
    """transformers' model for a checkpoint, with the language model, but without other weights."""
    import transformers as hf

    settings, qformer, sizes = checkpoint.settings, checkpoint.settings.qformer, checkpoint.sizes
    instructed = qformer.question_in_qformer
    encoder = vision.encoder.config.to_dict()
    del encoder["model_type"]  # InstructBLIP has another name for it
    configs: dict[str, Any] = {
        "vision_config": encoder,
        "qformer_config": {
            "vocab_size": sizes["vocabulary"] or 30522,
            "hidden_size": sizes["width"],
            "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"],
            "intermediate_size": sizes["ffn"],
            "max_position_embeddings": sizes["positions"],
            "cross_attention_frequency": qformer.cross_every,
            "hidden_dropout_prob": qformer.dropout,
            "attention_probs_dropout_prob": qformer.dropout,
            "encoder_hidden_size": vision.width,
        },
        "num_query_tokens": qformer.queries,
        "image_token_index": image_token,
    }
    if not instructed:
        configs["qformer_config"]["use_qformer_text_input"] = language is None
    if language is None:
        config = hf.Blip2Config(**configs, image_text_hidden_size=settings.stage1.shared_width)
        with torch.device("meta"):  # every weight in it is about to be replaced
            return hf.Blip2ForImageTextRetrieval(config)
    llm, tokenizer = language.llm, language.tokenizer
    llm.config.architectures = [type(llm).__name__]  # vLLM reads it, and transformers does not set it by itself
    configs["text_config"] = llm.config.to_dict()
    frame = {name: getattr(settings.language, name) for name in FRAMED} | {"template": language.template}
    if instructed:
        frame["task"] = settings.task  # after VQA the Q-Former reads the question, otherwise the prompt
    configs[FRAME] = frame
    with torch.device("meta"):
        model: Any = (
            hf.InstructBlipForConditionalGeneration(hf.InstructBlipConfig(**configs))
            if instructed
            else hf.Blip2ForConditionalGeneration(hf.Blip2Config(**configs))
        )
    model.language_model = llm
    # `generate` of transformers should begin and end a text as openblip2 does.
    end = language.end[-1]
    model.generation_config = hf.GenerationConfig.from_model_config(llm.config)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return model


EXAMPLE = '''"""Text about pictures: openblip2 encodes the pictures, and transformers or vLLM generates the text.

    python image_embeds.py photo.jpg ...
"""

import sys
from pathlib import Path

import torch
from transformers import {loader}, AutoTokenizer

import openblip2

RUN = Path(__file__).parent / "openblip2"  # image encoder, connector, projection
LANGUAGE = RUN / "language"  # the language model, as transformers and vLLM load it
PROMPT = {prompt!r}

captioner = openblip2.load(RUN, precision="fp32")
pictures = sys.argv[1:]
image_embeds = captioner.soft_prompt(pictures)  # [n, {queries}, {width}]: the projected queries
print("image_embeds", list(image_embeds.shape), file=sys.stderr)

# In the run's template, with the prompt after it: [n, T, {width}], {side}-padded.
prompt_embeds, mask = captioner.embed(pictures, [PROMPT] * len(pictures))

llm = {loader}.from_pretrained(LANGUAGE, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(LANGUAGE)
with torch.inference_mode():
    found = llm.generate(
        inputs_embeds=prompt_embeds,
        attention_mask=mask,
        max_new_tokens=30,
        do_sample=False,
        num_beams=1,
        eos_token_id={end},
        pad_token_id={pad},
    )
for picture, text in zip(pictures, tokenizer.batch_decode(found, skip_special_tokens=True), strict=True):
    print(f"{{picture}}\\t{{text.strip()}}")
{vllm}'''

VLLM = """
# The same with vLLM, in its own environment (pass the rows on with torch.save and torch.load):
#
#     from vllm import LLM, SamplingParams
#     llm = LLM(str(LANGUAGE), enable_prompt_embeds=True)
#     rows = [{"prompt_embeds": row[keep.bool()]} for row, keep in zip(prompt_embeds, mask)]
#     how = SamplingParams(temperature=0.0, max_tokens=30)
#     print([answer.outputs[0].text for answer in llm.generate(rows, how)])
"""


def write_projected(checkpoint: Checkpoint, vision: FrozenVision, language: LanguageModel, folder: Path) -> None:
    """Fills a folder with a run that contains its frozen parts, and with an example script."""
    settings = checkpoint.settings
    run = folder / "openblip2"
    run.mkdir()
    carries = checkpoint.carries | {"language"}
    write_run(replace(checkpoint, carries=carries, whitening=vision.whitening), run, vision, language)
    generative = not language.llm.config.is_encoder_decoder
    pad = language.tokenizer.pad_token_id
    (folder / "image_embeds.py").write_text(
        EXAMPLE.format(
            loader="AutoModelForCausalLM" if generative else "AutoModelForSeq2SeqLM",
            prompt=settings.language.prompts[0],
            queries=checkpoint.sizes.get("tokens", settings.qformer.queries),
            width=language.width,
            side="left" if generative else "right",
            end=language.end[-1],
            pad=language.end[-1] if pad is None else pad,
            vllm=VLLM if generative else "",
        ),
        encoding="utf-8",
    )
