"""JSON that a schema allows, from plain or patched `generate`. Needs no network: the demo model ships with the package."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z_]{3,12}$"},
        "legs": {"type": "integer", "minimum": 0, "maximum": 8},
        "tame": {"type": "boolean"},
    },
    "required": ["name", "legs", "tame"],
    "additionalProperties": False,
}
folder = Path(hf_accel.__file__).parent / "demo_model"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = hf_accel.patch(AutoModelForCausalLM.from_pretrained(folder))
processor = hf_accel.JSONSchemaLogitsProcessor(SCHEMA, tokenizer)  # or a pydantic model, a dataclass, a TypedDict

inputs = tokenizer("def animal():", return_tensors="pt")
torch.manual_seed(0)
output = model.generate(**inputs, max_new_tokens=60, do_sample=True, top_k=20, logits_processor=[processor])
print(json.loads(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)))
