"""outlines, unchanged, on a patched model: its output types run on hf_accel's masks. Needs `pip install outlines`."""

import sys
from pathlib import Path
from typing import Literal

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_accel

try:
    import outlines
    from pydantic import BaseModel, Field
except ImportError:
    print("outlines is not installed: pip install outlines")
    sys.exit()


class Animal(BaseModel):
    name: str = Field(pattern="^[a-z_]{3,12}$")
    legs: int = Field(ge=0, le=8)


folder = Path(hf_accel.__file__).parent / "demo_model"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = hf_accel.patch(AutoModelForCausalLM.from_pretrained(folder))

ask = outlines.from_transformers(model, tokenizer)
print(Animal.model_validate_json(ask("def animal():", Animal, max_new_tokens=60, do_sample=False)))
print(ask.batch(["color = ", "sky = "], Literal["red", "blue"], max_new_tokens=8))
generator = outlines.Generator(ask, outlines.regex(r"[0-9]{1,3}\.[0-9]"))
print(generator("def half(x): return ", max_new_tokens=8))
