"""A plain HuggingFace script: nothing of hf_accel's API in it. Try: hf-accel run --stats examples/04_unchanged_script.py"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

shipped = Path(__file__).resolve().parent.parent / "hf_accel" / "demo_model"
path = sys.argv[1] if len(sys.argv) > 1 else str(shipped)
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

inputs = tokenizer("Q: What does os.walk do?\nA:", return_tensors="pt")
output = model.generate(**inputs, do_sample=False, max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))

generator = pipeline("text-generation", model=path, dtype=torch.float32)
print(generator("Return True if", do_sample=False, max_new_tokens=12)[0]["generated_text"])
