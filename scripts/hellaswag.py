"""HellaSwag: does a model find the true ending of a scene the most likely of four?

    python -m scripts.hellaswag runs/speed/seed0 hellaswag_val.jsonl --shards data/fineweb10B
    python -m scripts.hellaswag openai-community/gpt2 Rowan/hellaswag --limit 1000     # from the Hub (extra hf)

Chance is 0.25. GPT-2 124M reaches 0.2955 length-normalised in this setting (build-nanogpt's public figure; not measured
here). As there, an ending is encoded with a space before it, the scene is taken as it is, and losses are counted over
the ending alone; unlike there, a document begins with BOS, as every document in the shards does.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.cli import InputError, command
from data.segments import packed_rows
from data.shards import open_corpus
from data.tokenizer import of_corpus


class Question(NamedTuple):
    scene: str
    endings: list[str]
    label: int  # which of them is true


def main(
    model: str,
    questions: str,
    /,
    shards: str = "data/fineweb10B",
    limit: int | None = None,
    row_tokens: int = 8192,
    device: str = "auto",
) -> None:
    """Print the share of HellaSwag's questions that a model answers rightly.

    Args:
        model: a run folder or checkpoint of train_gpt.py, a transformers model directory or Hub id.
        questions: HellaSwag's public .jsonl file, or the id of a dataset on the Hub (its validation split).
        shards: shards whose tokenizer the model reads.
        limit: only the first this many questions; None means all.
        row_tokens: tokens computed at once.
        device: auto, cpu or cuda.
    """
    from curriculum.reference import open_reference

    found = list(read_questions(questions))[:limit]
    corpus = open_corpus(shards, quiet=True)
    encoding = of_corpus(corpus)
    tokens, ending_lens = [], []
    for question in found:
        scene = encoding.encode_ordinary(question.scene)
        for ending in question.endings:
            told = encoding.encode_ordinary(" " + ending)
            tokens.append(np.array([corpus.bos_id, *scene, *told]))
            ending_lens.append(len(told))
    longest = max(len(x) for x in tokens) - 1
    reference = open_reference(model, corpus, longest, device=device)
    if reference.retokenizer is not None:
        raise InputError(f"{model}: reads other token ids than {shards}; give --shards with the model's own tokenizer")
    nats = ending_nats(tokens, np.array(ending_lens), reference.moments, max(row_tokens, longest))
    sums, right = nats.reshape(len(found), -1), np.array([question.label for question in found])
    means = sums / np.array(ending_lens).reshape(sums.shape)
    for name, values in (("accuracy", sums), ("length-normalised", means)):
        share = accuracy(values, right)
        print(f"{name:18}{share:.4f} ± {(share * (1 - share) / len(found)) ** 0.5:.4f}  ({len(found):,} questions)")


def read_questions(source: str) -> Iterator[Question]:
    """Questions of a .jsonl file or a dataset on the Hub. InputError on one that is not HellaSwag's."""
    for number, row in enumerate(rows_of(source), 1):
        try:
            question = Question(str(row["ctx"]), [str(x) for x in row["endings"]], int(row["label"]))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{source}: row {number} has no ctx, endings and label: not labelled HellaSwag") from None
        if len(question.endings) != 4 or question.label not in range(4):
            raise InputError(
                f"{source}: row {number} has {len(question.endings)} endings, and {question.label} is right"
            )
        yield question


def rows_of(source: str) -> Iterator[dict]:
    path = Path(source)
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise InputError(f"{path}: line {number} is not JSON: {line[:60]!r}") from None
        if not lines:
            raise InputError(f"{path}: the file is empty")
        return
    if source.endswith((".json", ".jsonl")) or source.count("/") != 1:
        raise InputError(f"{source}: no such file; HellaSwag's hellaswag_val.jsonl is on github.com/rowanz/hellaswag")
    try:
        from datasets import load_dataset

        yield from load_dataset(source, split="validation")
    except ImportError:
        raise InputError(
            f"{source}: a dataset of the Hub needs the extra: pip install 'entropy-curriculum[hf]'"
        ) from None
    except Exception as error:  # it raises its own, its HTTP library's and OSError alike
        raise InputError(f"{source}: neither a file here nor a dataset on the Hub ({error})") from None


def ending_nats(tokens: list[np.ndarray], ending_lens: np.ndarray, moments, row_tokens: int) -> np.ndarray:
    """Summed loss (nats) of the last `ending_lens[i]` tokens of each document `tokens[i]`, float64.

    `moments(input_T, target_T, bounds)` is a reference's; documents are packed whole into rows of `row_tokens`.
    """
    length_N = np.array([len(x) - 1 for x in tokens])
    found = []
    rows = packed_rows(length_N, row_tokens)
    for first, last in zip(rows[:-1], rows[1:], strict=True):
        documents = tokens[first:last]
        bounds = np.concatenate([[0], np.cumsum(length_N[first:last])]).astype(np.int32)
        input_T, target_T = (np.concatenate([x[cut] for x in documents]) for cut in (slice(-1), slice(1, None)))
        nll_T = moments(input_T, target_T, bounds).nll_N.double().numpy()
        ends = zip(bounds[1:].tolist(), ending_lens[first:last].tolist(), strict=True)
        found += [nll_T[end - count : end].sum() for end, count in ends]
    return np.array(found)


def accuracy(nats_QE: np.ndarray, right_Q: np.ndarray) -> float:
    """Share of the questions whose right ending has the smallest loss; the first one wins a tie.

    >>> accuracy(np.array([[1.0, 2.0], [3.0, 2.0]]), np.array([0, 0]))
    0.5
    """
    return float((nats_QE.argmin(1) == right_Q).mean())


if __name__ == "__main__":
    command(main)
