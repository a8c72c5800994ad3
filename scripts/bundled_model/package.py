"""Writes a model folder that `AutoModelForCausalLM` and `AutoTokenizer` load, in one atomic rename per file."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

MAX_BYTES = 24 * 1024 * 1024


def save_folder(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Store matrices as float16 (half the size) that load as float32, with tokenizer and chat template.

    Raises:
        ValueError: the weights exceed 24 MB, or a weight does not fit float16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config.update(  # type: ignore[no-untyped-call]
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id, do_sample=False
    )
    # Biases and norms decide thresholds: they are few and stay float32.
    state = {
        name: (tensor.half() if tensor.dim() > 1 else tensor).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    if not all(torch.isfinite(tensor).all() for tensor in state.values()):
        raise ValueError("Got a weight beyond float16")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        model.save_pretrained(scratch, state_dict=state)
        tokenizer.save_pretrained(scratch)
        config_path = Path(scratch) / "config.json"
        config = json.loads(config_path.read_text(encoding="utf-8"))
        # The pointers need float32 activations: loaders that follow the configuration's dtype then do the right thing.
        config["dtype"] = "float32"
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        size = sum(path.stat().st_size for path in Path(scratch).iterdir())
        if size > MAX_BYTES:
            raise ValueError(f"Got {size} bytes but expected at most {MAX_BYTES}")
        for path in sorted(Path(scratch).iterdir()):
            path.chmod(0o644)
            path.replace(folder / path.name)
