"""A text-generation pipeline whose lists run as one continuously batched set."""

import torch

import hf_accel
from hf_accel.demo.model import shipped_model

pipe = hf_accel.AcceleratedPipeline(shipped_model(), dtype=torch.float32)

for output in pipe(["The", "A list is", "Return True if"], do_sample=False, max_new_tokens=12):
    print(output[0]["generated_text"])

chat = [{"role": "user", "content": "What does json.dumps do?"}]
print(pipe(chat, do_sample=False, max_new_tokens=20)[0]["generated_text"][-1])

for piece in pipe("Q: What does os.walk do?\nA:", stream=True, do_sample=False, max_new_tokens=20):
    print(piece, end="", flush=True)
print()

for index, piece in pipe(["import", "class"], stream=True, do_sample=False, max_new_tokens=4):
    print(index, repr(piece))
