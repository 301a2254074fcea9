"""Makes tests/data/golden from ../shared/golden: the same cases, small enough to live in the repository.

Random weights and recorded tensors only. The tokenizers stay out: the token ids of the prompts are recorded,
and of both embedding tables only the rows that those ids use are kept, renumbered in ascending order (so the
largest id, at which CLIP pools, stays the largest). Run from the repository root:
    python tests/data/make_golden.py ../shared/golden
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer, T5TokenizerFast

HERE = Path(__file__).parent / "golden"
NEGATIVE = "bad quality, low resolution"


def main(source: Path) -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    snapshot = HERE / "snapshot"
    for part in ("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2"):
        shutil.copytree(source / "snapshot" / part, snapshot / part, copy_function=shutil.copyfile)
    shutil.copytree(source / "adapter", HERE / "adapter", copy_function=shutil.copyfile)
    for file in source.glob("*.safetensors"):
        # img_ids and decoded are implied by the size and by the images, or are tested where ../shared is.
        tensors = {k: v for k, v in load_file(file).items() if k not in ("img_ids", "decoded", "velocity")}
        if "prompt_embeds" in tensors:
            tensors["prompt_embeds"] = tensors["prompt_embeds"][:1].clone()
        save_file(tensors, HERE / file.name)

    cases = json.loads((source / "cases.json").read_text())
    prompts = sorted({case["prompt"] for case in cases["cases"].values()} | {NEGATIVE})
    clip = CLIPTokenizer.from_pretrained(source / "snapshot/tokenizer")
    t5 = T5TokenizerFast.from_pretrained(source / "snapshot/tokenizer_2")
    ids = {
        "clip": clip(prompts, padding="max_length", max_length=77, truncation=True).input_ids,
        "t5": t5(prompts, padding="max_length", max_length=512, truncation=True).input_ids,
    }
    for kind, folder, names in (
        ("clip", "text_encoder", ["text_model.embeddings.token_embedding.weight"]),
        ("t5", "text_encoder_2", ["shared.weight", "encoder.embed_tokens.weight"]),
    ):
        used = sorted({i for row in ids[kind] for i in row})
        ids[kind] = [[used.index(i) for i in row] for row in ids[kind]]
        file = snapshot / folder / "model.safetensors"
        tensors = load_file(file)
        for name in names:
            if name in tensors:
                tensors[name] = tensors[name][torch.tensor(used)].clone()
        save_file(tensors, file, metadata={"format": "pt"})
        config = json.loads((snapshot / folder / "config.json").read_text())
        config["vocab_size"] = len(used)
        (snapshot / folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokens = {prompt: {"clip": ids["clip"][i], "t5": ids["t5"][i]} for i, prompt in enumerate(prompts)}
    (HERE / "cases.json").write_text(json.dumps(cases["cases"], indent=1) + "\n")
    (HERE / "tokens.json").write_text(json.dumps(tokens) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
