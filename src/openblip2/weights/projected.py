"""For encoders that transformers' BLIP-2 cannot hold: the language model alone, fed with projected queries.

openblip2 makes `image_embeds [n, Q, L]` of the pictures; any server that takes embeddings as a prompt writes the text.
"""

from pathlib import Path

from openblip2.model.language import LanguageModel
from openblip2.model.vision import FrozenVision
from openblip2.weights.checkpoint import Checkpoint
from openblip2.weights.run import write_run

EXAMPLE = '''"""Text about pictures, with openblip2 for the eyes and transformers or vLLM for the words.

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
# The same with vLLM, in its own environment (save the rows with torch.save there and back):
#
#     from vllm import LLM, SamplingParams
#     llm = LLM(str(LANGUAGE), enable_prompt_embeds=True)
#     rows = [{"prompt_embeds": row[keep.bool()]} for row, keep in zip(prompt_embeds, mask)]
#     how = SamplingParams(temperature=0.0, max_tokens=30)
#     print([answer.outputs[0].text for answer in llm.generate(rows, how)])
"""


def write_projected(checkpoint: Checkpoint, vision: FrozenVision, language: LanguageModel, folder: Path) -> None:
    """Fills a folder with a run that carries its parts, and an example."""
    settings = checkpoint.settings
    run = folder / "openblip2"
    run.mkdir()
    carries = checkpoint.carries | {"language"}
    write_run(run, settings, checkpoint.sizes, checkpoint.trained, vision, language, None, carries, vision.whitening)
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
