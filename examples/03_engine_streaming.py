"""The engine by hand: requests with their own sampling parameters, and text as it comes."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel
from hf_accel.demo.model import shipped_model

path = shipped_model()
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
engine = hf_accel.Engine(model, tokenizer, num_pages=256)

greedy = hf_accel.SamplingParams(temperature=0.0, max_tokens=16)
several = hf_accel.SamplingParams(n=3, temperature=0.8, top_p=0.95, max_tokens=12, seed=1)
for output in engine.generate(["Return True if", "A list is"], [greedy, several]):
    for completion in output.outputs:
        print(output.prompt, "->", repr(completion.text), completion.finish_reason)

for chunk in engine.stream("Q: What does os.walk do?\nA:", greedy):
    print(chunk.text, end="", flush=True)
print()
print(engine.stats())
engine.shutdown()
