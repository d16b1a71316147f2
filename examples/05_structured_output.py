"""Text of a given form through four doors. Needs no network: the demo model ships with the package."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
from hf_accel import SamplingParams

ANIMAL = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z_]{3,12}$"},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
    },
    "required": ["name", "legs"],
    "additionalProperties": False,
}
folder = Path(hf_accel.__file__).parent / "demo_model"
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
inputs = tokenizer("def animal():", return_tensors="pt")
start = inputs.input_ids.shape[1]
torch.manual_seed(0)

# Plain transformers: a logits processor. Also a pydantic model, a dataclass or a TypedDict instead of a schema.
processor = hf_accel.JSONSchemaLogitsProcessor(ANIMAL, tokenizer)
output = model.generate(**inputs, max_new_tokens=60, do_sample=True, top_k=20, logits_processor=[processor])
print(json.loads(tokenizer.decode(output[0, start:], skip_special_tokens=True)))

hf_accel.patch(model)  # a patched model: by keyword, and the pipeline with one for each prompt
output = model.generate(**inputs, max_new_tokens=60, tokenizer=tokenizer, regex=r"return [0-9]{1,3}\.[0-9]")
print(tokenizer.decode(output[0, start:], skip_special_tokens=True))
pipe = hf_accel.AcceleratedPipeline(model, tokenizer, return_full_text=False)
print(pipe(["a = ", "color = "], choice=[["1", "2"], None], max_new_tokens=8))

engine = hf_accel.Engine(model, tokenizer)  # the engine: each request its own
params = [SamplingParams(choice=["red", "blue"]), SamplingParams(json_schema=ANIMAL)]
print([o.outputs[0].text for o in engine.generate(["color = ", "animal = "], params)])
