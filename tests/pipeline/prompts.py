"""Prompts for the shipped model, and the model itself."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_accel.demo.model import shipped_model

PROMPTS = [
    "Q: What does json.dumps do?\nA:",
    "The",
    "Return the absolute path of a file. If the file does not exist, raise",
    "Q: What does os.walk do?\nA:",
    "class Thread",
    "A list is",
    "import os",
    "If the argument is a string, it must be",
    "Return True if",
    "An object",
]
CHAT = [{"role": "user", "content": "What does json.dumps do?"}]
OTHER_CHAT = [{"role": "user", "content": "What does os.walk do?"}, {"role": "assistant", "content": "Walk the"}]
GREEDY = {"do_sample": False, "max_new_tokens": 9}


def load():
    path = shipped_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)
