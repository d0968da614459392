"""Generate from an exported Hugging Face repo with transformers alone: the full pool, then the first stage."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from nanopoe.errors import CheckpointError, ConfigError, entrypoint

EXAMPLES = """examples:
  python -m scripts.try_export out/quickstart-hf
  python -m scripts.try_export out/quickstart-hf --prompt "import os" --tokens 80 --temperature 0.8"""


def load(repo: Path) -> tuple[Any, Any]:
    """Tokenizer and model of an export, by transformers. CheckpointError if it cannot load them."""
    if not (repo / "config.json").is_file():
        raise CheckpointError("no export here", repo, "write one with scripts.export_hf")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:                                         # the code in the repo is ours, written there by scripts.export_hf
        return (AutoTokenizer.from_pretrained(repo, trust_remote_code=True),
                AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True))
    except Exception as error:                   # what damaged files make transformers raise has no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"cannot be loaded ({reason[:200]})", repo,
                              "write it again with scripts.export_hf") from error


@entrypoint
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.try_export", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", type=Path, help="folder written by scripts.export_hf")
    parser.add_argument("--prompt", action="append", help="text to continue (may be given several times)")
    parser.add_argument("--tokens", type=int, default=40, help="new tokens [40]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy [0]")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.tokens < 1 or not 0 <= args.temperature < float("inf"):
        raise ConfigError("--tokens must be 1 or more, --temperature 0 or more", "command line")
    tokenizer, model = load(args.repo)

    import torch
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    views: dict[str, dict[str, int]] = {"full model": {}}
    if getattr(model.config, "poe_mode", "none") != "none":
        views["stage 0 alone"] = {"stage": 0}
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    for prompt in args.prompt or ["The "]:
        ids = tokenizer("<|bos|>" + prompt, return_tensors="pt")
        for name, view in views.items():
            torch.manual_seed(0)
            out = model.generate(**ids, max_new_tokens=args.tokens, **sampling, **view)
            answer = tokenizer.decode(out[0, ids["input_ids"].size(1):])
            console.print(Text.assemble(f"\n[{name}] ", (prompt, "bold"), (answer, "cyan")), soft_wrap=True)


if __name__ == "__main__":
    main()
