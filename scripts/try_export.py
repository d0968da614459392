"""Generate from an exported Hugging Face repo with transformers alone: by the full model and in every mode it has."""

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
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    for prompt in args.prompt or ["The "]:
        ids = tokenizer("<|bos|>" + prompt, return_tensors="pt")
        for name, method, options in ways(model, greedy=args.temperature == 0):
            torch.manual_seed(0)
            out = getattr(model, method)(**ids, max_new_tokens=args.tokens, return_dict_in_generate=True, **sampling,
                                         **options)
            answer = tokenizer.decode(out.sequences[0, ids["input_ids"].size(1):])
            figures = "".join(f", {key.replace('_', ' ')} {value:.2f}" for key, value in (out.get("statistics") or {})
                              .items() if key in ("mean_depth", "mean_accepted"))
            console.print(Text.assemble(f"\n[{name}{figures}] ", (prompt, "bold"), (answer, "cyan")), soft_wrap=True)


def ways(model: Any, greedy: bool) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, method of the model, its options) of every way to generate that the export has values for."""
    config = model.config
    found: list[tuple[str, str, dict[str, Any]]] = [("full model", "generate", {})]
    if config.specialists:
        found = [(f"specialist {one['name']}", "generate", {"specialist": i})
                 for i, one in enumerate(config.specialists)]
        return [*found, ("base", "generate", {"head_mode": "base"}), ("dual", "generate", {"head_mode": "dual"})]
    if config.poe_mode == "none":
        return found
    found.append(("stage 0 alone", "generate", {"stage": 0}))
    if len(config.stage_boundaries) > 1:
        found.append(("speculative", "generate_speculative", {}))
    if greedy and config.poe_wand_lead_max_bounds is not None:
        found += [("adaptive depth", "generate_wand", {}), ("routed", "generate_routed", {})]
    return found


if __name__ == "__main__":
    main()
