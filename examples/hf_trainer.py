"""An order in Hugging Face's Trainer (needs the extra `hf` and `accelerate`).

    python -m examples.hf_trainer data/stdlib --order orders/fold5-0.npy --out runs/hf

Rows in the format "hf" are what a causal LM of transformers takes: `labels` are the true next tokens, one position
further, since the model shifts them itself; `position_ids` begin anew with every document, and models that make their
masks from them keep attention within documents (only without a cache: `use_cache=False`). Trainer deals rows to
processes and skips what a checkpoint has seen by itself: the dataset is told of neither.
"""

from pathlib import Path

from data.cli import InputError, command


def main(
    shards: Path,
    /,
    out: Path,
    order: str = "",
    seq_len: int = 128,
    batch_rows: int = 8,
    steps: int = 0,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    lr: float = 1e-3,
    save_every: int = 100,
    workers: int = 0,
) -> None:
    """Train a small GPT-2 on the rows of an order; goes on from the last checkpoint in `out`.

    Args:
        shards: folder of shards, one shard, or a glob.
        out: folder for checkpoints.
        order: order file; without one the shards as they lie.
        seq_len: predictions in a row; documents share rows.
        batch_rows: rows in a batch of one process.
        steps: batches to train on; 0: the whole order.
        width: of the model, a multiple of heads.
        layers: of the model.
        heads: of the model.
        lr: of AdamW.
        save_every: steps between checkpoints.
        workers: processes that read.
    """
    try:
        import accelerate  # noqa: F401  # Trainer asks for it late, and at length
        from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
        from transformers.trainer_utils import get_last_checkpoint
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install transformers accelerate") from None

    from curriculum.loader import OrderDataset, open_stream

    if width % heads:
        raise InputError(f"--width {width}: expected a multiple of --heads {heads}")
    stream = open_stream(shards, order)
    # batch_rows is told so that workers deal whole batches in order.
    rows = OrderDataset(stream, seq_len, batch_rows=batch_rows, format="hf")
    set_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=stream.corpus.vocab_size,
            n_positions=seq_len,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            use_cache=False,
            bos_token_id=stream.corpus.bos_id,
            eos_token_id=stream.corpus.bos_id,
        )
    )
    settings = TrainingArguments(
        output_dir=str(out),
        max_steps=steps or rows.steps,
        per_device_train_batch_size=batch_rows,
        learning_rate=lr,
        save_steps=save_every,
        logging_steps=10,
        dataloader_num_workers=workers,
        report_to=[],
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(out) if out.is_dir() else None)
    trainer.save_model()


if __name__ == "__main__":
    command(main)
