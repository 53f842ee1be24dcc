"""An order in a plain training loop, the kind nanoGPT has: rows of x and y, a model that returns logits and loss.

    python -m examples.nanogpt_loop data/stdlib --order orders/fold5-0.npy --out runs/nanogpt.pt

What concerns the order is three lines: open the stream, wrap it for a DataLoader, keep its state in the checkpoint. Run
the same command again and it goes on, exactly.

Shapes: B rows   T tokens of a row   D width   V vocabulary
"""

from pathlib import Path

from data.cli import InputError, command


def main(
    shards: Path,
    /,
    out: Path,
    order: str = "",
    seq_len: int = 128,
    batch_rows: int = 16,
    steps: int = 0,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    lr: float = 1e-3,
    save_every: int = 100,
) -> None:
    """Train a small GPT on the rows of an order.

    Args:
        shards: folder of shards, one shard, or a glob.
        out: checkpoint to write, and to go on from if it is there.
        order: order file; without one the shards as they lie.
        seq_len: tokens in a row; documents share rows.
        batch_rows: rows in a batch.
        steps: batches to train on, from the order's first; 0: the whole order.
        width: of the model, a multiple of heads.
        layers: of the model.
        heads: of the model.
        lr: of AdamW.
        save_every: steps between checkpoints; one is written at the end.
    """
    import torch
    from torch.utils.data import DataLoader

    from curriculum.loader import OrderDataset, open_stream

    if width % heads:
        raise InputError(f"--width {width}: expected a multiple of --heads {heads}")
    stream = open_stream(shards, order)
    rows = OrderDataset(stream, seq_len, batch_rows=batch_rows)
    steps = min(steps or rows.steps, rows.steps)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = small_gpt(stream.corpus.vocab_size, seq_len, width, layers, heads).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    step = 0
    if out.exists():
        saved = torch.load(out, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        rows.load_state_dict(saved["rows"])
        step = saved["step"]
        print(f"{out}: going on at step {step} of {steps}")

    ready = iter(DataLoader(rows, batch_size=batch_rows)) if step < steps else None
    while step < steps:
        batch = next(ready)
        x_BT, y_BT = batch["input_ids"].to(device), batch["targets"].to(device)
        _, loss = model(x_BT, y_BT)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        step += 1
        if step % 10 == 0 or step == steps:
            print(f"step {step}/{steps} loss {loss.item():.4f}")
        if step % save_every == 0 or step == steps:
            state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), rows=rows.state_dict(), step=step)
            out.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, out.with_suffix(".tmp"))
            out.with_suffix(".tmp").replace(out)


def small_gpt(vocab_size: int, seq_len: int, width: int, layers: int, heads: int):
    """A pre-norm GPT with learned positions. It sees rows, not documents: attention runs across their joints."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x_BTD):
            qkv = self.qkv(self.norm_1(x_BTD)).chunk(3, dim=-1)
            q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in qkv)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x_BTD = x_BTD + self.proj(y.transpose(1, 2).flatten(2))
            return x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD))))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(seq_len, width)
            self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size)

        def forward(self, x_BT, y_BT):
            positions = torch.arange(x_BT.shape[1], device=x_BT.device)
            logits_BTV = self.head(self.norm(self.blocks(self.tokens(x_BT) + self.positions(positions))))
            # Ignored targets (-100) fill the rows of the order's last batch.
            return logits_BTV, F.cross_entropy(logits_BTV.flatten(0, 1), y_BT.flatten())

    return GPT()


if __name__ == "__main__":
    command(main)
