"""Reference models: whatever turns packed tokens into hidden states, and a head we apply ourselves.

    checkpoint   a .pt file of train_gpt.py, or a run folder (its last.pt)
    directory    a causal LM saved by `transformers`, or the id of one on the Hub, NAME or NAME@REVISION (extra: `hf`)

The backbone is called for hidden states only; logits are never materialised (`curriculum.moments` reduces them).
Attention stays within documents: both kinds use the trainer's own `attend`.

A model whose tokenizer is not the shards' reads the text encoded again (`curriculum.retokenize`); which path a
reference takes is found out when it is opened. A model of another vocabulary without a tokenizer is refused.

This module alone imports `train_gpt`, and only where a model is opened: nothing else knows how to run a checkpoint.

Shapes: T tokens of one packed row   D hidden width   V vocabulary
"""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from curriculum.moments import CAPS, Moments, token_moments
from curriculum.retokenize import Retokenizer, encodes_alike, fast_backend, open_retokenizer
from data.cli import InputError
from data.segments import packed_rows
from data.shards import Corpus
from data.tokenizer import of_corpus

# Tokens of whole documents whose activations stay in a CPU's caches: a model of 4 layers of 192 goes through them up to
# twice as fast as through 32,768 at once (LOG.md, 2026-11-21).
CPU_PIECE = 2048
OPENED = itertools.count()  # transformers references of this process


@dataclass(frozen=True)
class Reference:
    about: dict  # what identifies it: goes into the provenance of every score
    hidden: Callable[[Tensor, np.ndarray], Tensor]  # tokens int64 (T,), bounds (documents + 1,) -> (T, D)
    head_VD: Tensor
    vocab_size: int
    device: torch.device
    bias_V: Tensor | None = None
    cap: float = 0.0
    cap_kind: str = "rsqrt"
    retokenizer: Retokenizer | None = None  # set: score it with `retokenized_measures`; None: it reads the shards' ids

    @torch.inference_mode()
    def moments(self, input_T: np.ndarray, target_T: np.ndarray, bounds: np.ndarray) -> Moments:
        """NLL, entropy and varentropy of every prediction of packed documents; fp32 tensors (T,) on the CPU."""
        token_T, target_T = (torch.from_numpy(x.astype(np.int64)).to(self.device) for x in (input_T, target_T))
        found = token_moments(
            self.hidden_in_pieces(token_T, bounds),
            self.head_VD,
            target_T,
            bias_V=self.bias_V,
            vocab_size=self.vocab_size,
            cap=self.cap,
            cap_kind=self.cap_kind,
        )
        return Moments(*(column.cpu() for column in found))

    def hidden_in_pieces(self, token_T: Tensor, bounds: np.ndarray) -> Tensor:
        """Hidden states (T, D) of packed documents, on a CPU some documents at a time."""
        if self.device.type != "cpu":
            return self.hidden(token_T, bounds)
        length_N = np.diff(bounds)
        cuts = packed_rows(length_N, max(CPU_PIECE, int(length_N.max())))
        pieces = [
            self.hidden(token_T[bounds[a] : bounds[b]], bounds[a : b + 1] - bounds[a])
            for a, b in zip(cuts[:-1], cuts[1:], strict=True)
        ]
        return torch.cat(pieces)


def open_reference(name: str, corpus: Corpus, max_len: int, *, device: str = "auto", dtype: str = "auto") -> Reference:
    """Open a checkpoint, a run folder, a model directory or a Hub id, and check that it fits the corpus.

    Raises InputError if it cannot be found or read, holds NaN, has another vocabulary and no tokenizer of its own to
    encode the text again, or reads the shards' ids but cannot see max_len of them.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no usable CUDA GPU; use --device cpu")
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"--dtype {dtype}: expected auto, float32 or bfloat16")
    path = Path(name)
    if path.is_dir() and (path / "last.pt").is_file():
        path = path / "last.pt"
    opened = open_checkpoint if path.is_file() else open_transformers
    return opened(str(path) if path.exists() else name, corpus, max_len, torch.device(device), getattr(torch, dtype))


def open_checkpoint(name: str, corpus: Corpus, max_len: int, device: torch.device, dtype: torch.dtype) -> Reference:
    """A checkpoint of our own trainer. It computes in fp32 on CPU and bf16 on CUDA, as it was trained."""
    from curriculum.config import validate
    from train_gpt import GPT, documents, load_checkpoint

    saved = load_checkpoint(Path(name))
    if not {"model", "config", "vocab_size"} <= saved.keys():
        raise InputError(f"{name}: a .pt file, but not a checkpoint of train_gpt.py")
    if saved["vocab_size"] != corpus.vocab_size:
        raise InputError(
            f"{name}: the reference has {saved['vocab_size']} token ids, the shards in {corpus.folder} have "
            f"{corpus.vocab_size}: it was trained on another vocabulary"
        )
    cfg = validate(saved["config"], name)
    model = GPT(cfg.model, saved["vocab_size"])
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise InputError(f"{name}: its weights do not fit this version of train_gpt.py: {error}") from None
    refuse_nan(name, model)
    if max_len > cfg.data.seq_len:
        print(f"note: {name} was trained on segments of {cfg.data.seq_len} tokens and scores segments of {max_len}")
    model.to(device).eval()
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Reference(
        about=dict(kind="checkpoint", weights_sha256=weights_sha256(model), step=saved["step"], dtype=str(compute)[6:]),
        hidden=lambda token_T, bounds: model.hidden(token_T, documents(bounds, max_len, device)),
        head_VD=model.head.detach().to(compute),
        vocab_size=saved["vocab_size"],
        device=device,
        bias_V=None if model.head_bias is None else model.head_bias.detach(),
        cap=cfg.model.softcap,
    )


def open_transformers(name: str, corpus: Corpus, max_len: int, device: torch.device, dtype: torch.dtype) -> Reference:
    """A causal LM through `transformers`, with our attention in place of its own."""
    given, revision = name, ""
    if not Path(given).exists():
        name, _, revision = given.partition("@")
    if not Path(name).exists() and (name.startswith((".", "/")) or name.endswith(".pt") or name.count("/") > 1):
        raise InputError(f"{given}: no such checkpoint, run folder or model directory")
    try:
        import transformers
    except ImportError:
        raise InputError(
            f"{given}: a transformers model needs the extra: pip install 'entropy-curriculum[hf]'"
        ) from None
    from train_gpt import attend, documents

    transformers.logging.set_verbosity_error()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, revision=revision or "main", dtype=dtype)
    except Exception as error:  # it raises OSError, ValueError and its HTTP library's errors alike
        raise InputError(
            f"{given}: not a model directory here, nor reachable on the Hub ({first_line(error)})"
        ) from None
    refuse_nan(given, model)
    model.to(device).eval()
    about_model = model.config.get_text_config()
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{given}: has no output head: not a causal language model")
    longest = getattr(about_model, "max_position_embeddings", None)
    retokenizer = retokenizer_of(given, name, revision, corpus, max_len, about_model, head.weight.shape[0])
    # The most tokens of a document the model is given at once.
    window = retokenizer.window if retokenizer else max_len
    if longest is not None and window > longest:
        raise InputError(f"{given}: sees at most {longest} tokens, --max-len is {max_len}")

    layout: list = []  # the documents of the row being computed, for the attention function below

    def attention(module, q, k, v, attention_mask, scaling=None, dropout=0.0, **options):
        if options.get("softcap") or (options.get("sliding_window") or window) < window:
            raise InputError(f"{given}: its attention has a softcap or a window shorter than {window}: not supported")
        q_THE, k_THE, v_THE = (x[0].transpose(0, 1) for x in (q, k, v))
        scale = scaling if scaling is not None else q_THE.shape[-1] ** -0.5
        return attend(q_THE, k_THE, v_THE, layout[0], scale)[None], None

    # The registry is transformers' own and global: two references at once need two names.
    ours = f"within_documents_{next(OPENED)}"
    transformers.AttentionInterface.register(ours, attention)
    transformers.AttentionMaskInterface.register(ours, lambda *args, **kwargs: None)
    model.set_attn_implementation(ours)

    def hidden(token_T, bounds):
        layout[:] = [documents(bounds, window, device)]
        out = model.base_model(
            input_ids=token_T[None], position_ids=layout[0].position_T[None].to(device), use_cache=False
        )
        return out.last_hidden_state[0]

    reference = Reference(
        about=dict(
            kind="transformers",
            name=name,
            revision=getattr(model.config, "_commit_hash", None) or revision or None,
            weights_sha256=weights_sha256(model),
            dtype=str(dtype)[6:],
            transformers=transformers.__version__,
            **(about_retokenizer(retokenizer) if retokenizer else {}),
        ),
        hidden=hidden,
        head_VD=head.weight.detach(),
        bias_V=head.bias.detach() if getattr(head, "bias", None) is not None else None,
        vocab_size=retokenizer.num_ids if retokenizer else corpus.vocab_size,
        device=device,
        cap=getattr(about_model, "final_logit_softcapping", None) or 0.0,
        cap_kind="tanh",
        retokenizer=retokenizer,
    )
    refuse_other_logits(given, model, reference, ours)
    return reference


def retokenizer_of(
    given: str, name: str, revision: str, corpus: Corpus, max_len: int, about_model, num_rows: int
) -> Retokenizer | None:
    """None if the model reads the shards' ids; else its own tokenizer, and a note on the terminal.

    Raises InputError if its vocabulary is another one and it has no tokenizer that could be used.
    """
    tokenizer = load_tokenizer(given, name, revision)
    # More ids than the shards' are padding or another tokenizer's: only with the very same vocabulary do ids agree.
    fits = corpus.vocab_size <= about_model.vocab_size < corpus.vocab_size + 256
    if fits and (tokenizer is None or encodes_alike(of_corpus(corpus), corpus.bos_id, tokenizer)):
        return None
    if tokenizer is None:
        raise InputError(
            f"{given}: the reference has {about_model.vocab_size} token ids, the shards in {corpus.folder} have "
            f"{corpus.vocab_size}: it was trained on another vocabulary"
        )
    # Text of max_len shard tokens is rarely more than a few times as many of the reference's: 4 bounds what odd text
    # (a byte-level reference, a thousand rulers of dashes) may cost.
    limits = [4 * max_len]
    limits += [getattr(about_model, key, None) for key in ("max_position_embeddings", "sliding_window")]
    retokenizer = open_retokenizer(given, tokenizer, min(limit for limit in limits if limit), num_rows)
    print(
        f"note: {given} has another tokenizer ({retokenizer.num_ids} ids) than the shards ({corpus.vocab_size}): the "
        "text is encoded again for it; across tokenizers compare nll_per_byte, not means per token"
    )
    return retokenizer


def load_tokenizer(given: str, name: str, revision: str):
    """The tokenizer that lies beside a model, or None. Raises InputError if there is one that cannot be loaded."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except Exception as error:  # as above, and whatever converting an old tokenizer may raise
        if any(Path(name).glob("tokenizer*")):
            raise InputError(f"{given}: its tokenizer cannot be loaded ({first_line(error)})") from None
        return None
    # Some architectures come with an empty tokenizer of their own where no file holds one.
    has_words = not tokenizer.is_fast or fast_backend(tokenizer) is not None
    return tokenizer if has_words else None


def about_retokenizer(retokenizer: Retokenizer) -> dict:
    """What of another tokenizer changes numbers, and which numbers may be compared with other references'."""
    import tokenizers

    return dict(
        comparable="nll_per_byte",
        tokenizer_sha256=retokenizer.sha256(),
        tokenizers=tokenizers.__version__,
        window=retokenizer.window,
    )


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@torch.inference_mode()
def refuse_other_logits(name: str, model, reference: Reference, attention: str) -> None:
    """Compare our packed hidden states and head with the model's own logits, document by document.

    A scaling of logits we do not know of, or an attention that is not ours, shows here rather than in the scores.
    """
    lengths = [5, 9]
    bounds = np.array([0, 5, 14], dtype=np.int32)
    token_T = torch.arange(14, device=reference.device) * 7 % reference.vocab_size
    hidden = reference.hidden(token_T, bounds)
    logits = hidden.float() @ reference.head_VD.float().T
    if reference.bias_V is not None:
        logits = logits + reference.bias_V.float()
    ours = CAPS[reference.cap_kind](logits, reference.cap)
    model.set_attn_implementation("eager")
    theirs = torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in token_T.split(lengths)])
    model.set_attn_implementation(attention)
    difference = (ours - theirs.float()).abs().max().item()
    allowed = (1e-3 if reference.head_VD.dtype == torch.float32 else 0.1) * (1 + theirs.abs().max().item())
    if not difference <= allowed:
        raise InputError(
            f"{name}: its own logits differ from head(hidden) by up to {difference:.3g}: the architecture does "
            "something to hidden states or logits that is not supported"
        )


def refuse_nan(name: str, model: torch.nn.Module) -> None:
    for parameter, values in model.named_parameters():
        if not torch.isfinite(values).all():
            raise InputError(f"{name}: its weights hold NaN or infinity (in {parameter}): the file is damaged")


def weights_sha256(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all parameters: the same weights, however saved, hash alike."""
    sha = hashlib.sha256()
    for name, values in sorted(model.named_parameters()):
        sha.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        sha.update(values.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()
