"""Accelerate a model that is already loaded: same `generate`, same answers."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
from hf_accel.demo.model import shipped_model

path = shipped_model()  # any hub id or folder
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
prompts = ["Q: What does os.walk do?\nA:", "The", "Return True if"]
inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")

plain = model.generate(**inputs, do_sample=False, max_new_tokens=20)
hf_accel.patch(model)
accelerated = model.generate(**inputs, do_sample=False, max_new_tokens=20)
assert torch.equal(plain, accelerated)

for text in tokenizer.batch_decode(accelerated, skip_special_tokens=True):
    print(repr(text))
print(hf_accel.get_engine(model).stats())

hf_accel.unpatch(model)  # as if nothing had happened
