"""The command line `hf-accel`: `demo`, `run`, `env`. Reads arguments and says errors in plain words; does no work itself."""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from typing import Any

import hf_accel
from hf_accel.config import EngineConfig

EXAMPLES = """examples:
  hf-accel demo                                   the shipped model, plain generate beside the patched one
  hf-accel demo --model Qwen/Qwen3-0.6B --dtype bfloat16
  hf-accel run my_script.py --its-own --options   your script, unchanged, accelerated
  hf-accel run --stats -m my_package.evaluate --limit 100
  hf-accel run --set num_pages=4096 --set policy=fcfs my_script.py
  hf-accel env                                    versions and hardware, for a bug report
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 (it failed) or 2 (it was asked for wrongly)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    script_arguments: list[str] = []
    if arguments[:1] == ["run"]:
        own, script_arguments = split_run_arguments(arguments[1:])
        arguments = ["run", *own]
    args = build_parser().parse_args(arguments)
    try:
        if args.command == "run":
            return _run(args, script_arguments)
        return _env() if args.command == "env" else _demo(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"hf-accel {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run`'s script arguments are split off before."""
    parser = argparse.ArgumentParser(
        prog="hf-accel",
        description="Accelerate HuggingFace text generation inside your own process.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-accel {hf_accel.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,run,env}")
    _add_demo(commands)
    _add_run(commands)
    commands.add_parser("env", help="print versions, processor, C++ ops and GPU")
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="plain generate and the patched model side by side, on the shipped model or yours",
        description="Runs the same prompts through plain generate and through the patched model, and compares every token.",
    )
    demo.add_argument(
        "--model", metavar="ID_OR_FOLDER", help="a hub id or a folder (default: the model that is shipped)"
    )
    demo.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default float32")
    demo.add_argument("--max-new-tokens", type=_positive, default=48, metavar="N", help="for each prompt (default 48)")
    demo.add_argument("--num-prompts", type=_positive, default=16, metavar="N", help="for each workload (default 16)")
    demo.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="CPU threads (default: 1 for the shipped model, which is too small for more; torch's own choice for others)",
    )
    demo.add_argument("--seed", type=int, default=0, help="picks the prompts (default 0)")


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="run an existing script, unchanged, with its models accelerated",
        usage="hf-accel run [--stats] [--set KEY=VALUE]... (SCRIPT | -m MODULE) [ARGUMENT]...",
        description="Runs a Python script or module. Every causal language model that it loads with from_pretrained or "
        "pipeline() is patched; one that cannot be is left as it is, and a line says why.",
    )
    run.add_argument("--stats", action="store_true", help="print what the engines did when the script ends")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="options",
        help="an engine option, as page_size=32",
    )
    run.add_argument("-m", dest="module", metavar="MODULE", help="run a module, as python -m does")
    run.add_argument("script", nargs="?", help="the script; all that follows is its own")


def split_run_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split what follows `run` into our options with the script (or `-m module`), and the script's own arguments."""
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        if argument == "--":
            return [*arguments[:index], *arguments[index + 1 : index + 2]], list(arguments[index + 2 :])
        if argument == "-m":
            return list(arguments[: index + 2]), list(arguments[index + 2 :])
        if not argument.startswith("-"):
            return list(arguments[: index + 1]), list(arguments[index + 1 :])
        index += 2 if argument == "--set" else 1
    return list(arguments), []


def parse_engine_options(options: Sequence[str]) -> dict[str, Any]:
    """`["page_size=32", "policy=fcfs"]` as keyword arguments of EngineConfig.

    Raises:
        ValueError: an option is malformed, unknown or out of range.
    """
    config: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not key:
            raise ValueError(f"--set takes KEY=VALUE, got {option!r}")
        config[key.strip().replace("-", "_")] = _value(text.strip())
    EngineConfig.from_kwargs(**config)
    return config


def _value(text: str) -> Any:
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _run(args: argparse.Namespace, script_arguments: list[str]) -> int:
    from hf_accel import launcher

    if (args.module is None) == (args.script is None):
        raise ValueError("name a script, or -m and a module; see hf-accel run --help")
    config = parse_engine_options(args.options)
    target = args.module if args.module is not None else args.script
    return launcher.run(
        target, script_arguments, as_module=args.module is not None, engine_config=config, show_stats=args.stats
    )


def _demo(args: argparse.Namespace) -> int:
    from hf_accel.demo import compare

    options = compare.DemoOptions(
        model=args.model,
        dtype=args.dtype,
        max_new_tokens=args.max_new_tokens,
        num_prompts=args.num_prompts,
        threads=args.threads,
        seed=args.seed,
    )
    return compare.main(options)


def _env() -> int:
    from hf_accel import env

    lines = env.report()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")
    return 0
