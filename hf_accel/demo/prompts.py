"""The demo's workloads: questions after one shared few-shot prefix, and beginnings of pages of mixed lengths."""

from __future__ import annotations

import inspect
import math
import pydoc
import random
from dataclasses import dataclass
from typing import Any

EXAMPLES = (
    "os.path.join", "json.loads", "shutil.copyfile", "textwrap.dedent", "heapq.heappush", "bisect.insort_right",
    "functools.partial", "statistics.median", "tempfile.mkdtemp", "calendar.isleap", "random.shuffle", "glob.glob",
)  # fmt: skip
QUESTIONS = (
    "json.dumps", "os.path.exists", "shutil.rmtree", "textwrap.wrap", "heapq.heappop", "bisect.bisect_left",
    "functools.reduce", "statistics.mean", "tempfile.TemporaryDirectory", "calendar.monthrange", "random.choice",
    "os.walk", "subprocess.run", "pathlib.Path.mkdir", "logging.getLogger", "collections.Counter.most_common",
    "threading.Thread.start", "socket.create_connection", "urllib.parse.urlparse", "email.message_from_string",
    "zipfile.is_zipfile", "hashlib.new", "inspect.signature", "ast.parse", "copy.deepcopy", "queue.Queue.put",
)  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """Prompts that are run and compared together.

    Attributes:
        title: what they have in common.
        prompts: token ids of each.
    """

    title: str
    prompts: list[list[int]]


def workloads(tokenizer: Any, num_prompts: int, max_prompt_tokens: int, seed: int) -> list[Workload]:
    """Both workloads; longer prompts lose their first tokens."""
    rng = random.Random(seed)
    prefix = few_shot_prefix()
    names = rng.sample(QUESTIONS, len(QUESTIONS))
    shared = [f"{prefix}Q: What does {names[i % len(names)]} do?\nA:" for i in range(num_prompts)]
    mixed = [_beginning(rng) for _ in range(num_prompts)]
    num_shared = min(len(tokenizer(prefix)["input_ids"]), max_prompt_tokens)
    return [
        Workload(
            f"few-shot questions on a shared prefix of {num_shared} tokens", _ids(tokenizer, shared, max_prompt_tokens)
        ),
        Workload("pages of mixed lengths", _ids(tokenizer, mixed, max_prompt_tokens)),
    ]


def few_shot_prefix() -> str:
    """Questions with their answers, from the docstrings of the running Python."""
    answers = ((name, inspect.getdoc(pydoc.locate(name)) or "") for name in EXAMPLES)
    return "".join(f"Q: What does {name} do?\nA: {' '.join(doc.split()[:40])}\n\n" for name, doc in answers)


def _beginning(rng: random.Random) -> str:
    """The first words of a page of the language reference: from 4 to 250, evenly spread on a log scale."""
    from pydoc_data.topics import topics

    words = topics[rng.choice(sorted(topics))].split(" ")
    return " ".join(words[: round(math.exp(rng.uniform(math.log(4), math.log(250))))])


def _ids(tokenizer: Any, texts: list[str], max_tokens: int) -> list[list[int]]:
    return [list(tokenizer(text)["input_ids"])[-max_tokens:] for text in texts]
