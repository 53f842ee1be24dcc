"""The text view: its numbers against the score table, its page against whatever bytes a text may hold."""

import dataclasses
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import train_gpt
from curriculum import score
from curriculum.reference import open_reference
from data.cli import InputError, command
from data.segments import corpus_segments
from data.shards import open_corpus, read_shard, write_corpus_json, write_shard
from data.tokenizer import of_corpus, token_bytes
from scripts import view
from tests.conftest import BOS_ID
from tests.test_train_gpt import tiny_config

MAX_LEN = 64


@pytest.fixture(scope="module")
def reference(tiny_corpus, tmp_path_factory) -> str:
    """A checkpoint of random weights, large enough that its predictions differ."""
    path = tmp_path_factory.mktemp("reference") / "random.pt"
    cfg = tiny_config(tiny_corpus, path.parent)
    torch.manual_seed(0)
    model = train_gpt.GPT(cfg.model, 257)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torch.save(dict(model=model.state_dict(), config=cfg.model_dump(), vocab_size=257, step=0), path)
    return str(path)


@pytest.fixture(scope="module")
def spiky(tiny_corpus, tmp_path_factory):
    """A corpus of one document with everything that could break a page or a terminal; tokens are bytes."""
    folder = tmp_path_factory.mktemp("spiky")
    text = "\n<script>alert('\"&\"')</script> €\x1b[31m\x00\t\r\u202e<|endoftext|>".encode()
    tokens = np.array([BOS_ID, *text, BOS_ID, *b"b", BOS_ID], np.uint16)
    write_shard(folder / "spiky_train_000000.bin", tokens)
    ranks = open_corpus(tiny_corpus).tokenizer["ranks"]
    (folder / ranks).write_bytes((tiny_corpus / ranks).read_bytes())
    tokenizer = open_corpus(tiny_corpus).tokenizer
    write_corpus_json(folder, tokenizer=tokenizer, vocab_size=257, bos_id=BOS_ID, source="<b>&amp;</b>")
    return folder


class Page(HTMLParser):
    """What a browser makes of a page: the text of every <pre>, tokens with their titles, table rows, open tags."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.texts, self.titles, self.rows, self.open, self.tokens = [], [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "pre":
            self.texts.append("")
        if tag == "b":
            self.titles.append(dict(attributes)["title"])
            self.tokens.append(float(dict(attributes)["style"].removeprefix("--v:")))
        if tag == "tr":
            self.rows.append([])
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "pre" in self.open:
            self.texts[-1] += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def predictions_of(folder, reference: str, i: int):
    """Targets of segment i, and the reference's moments of them."""
    corpus = open_corpus(folder)
    segments = corpus_segments(corpus, MAX_LEN)
    start, length = segments.start_N[i], segments.length_N[i]
    tokens = np.array(read_shard(corpus.paths[segments.shard_N[i]])[start : start + length + 1])
    model = open_reference(reference, corpus, MAX_LEN)
    return tokens[1:].tolist(), model.moments(tokens[:-1], tokens[1:], np.array([0, length], np.int32))


def test_numbers_are_those_of_the_score_table(tiny_corpus, reference, tmp_path):
    """Segments scored in packed rows there, alone here; the means of the page's table are the segment's row."""
    score.main(str(tiny_corpus), reference, tmp_path / "scores", max_len=MAX_LEN)
    columns = score.read_scores(tmp_path / "scores").columns
    out = tmp_path / "view.html"
    for i in (0, 5, len(columns["nll"]) - 1):
        view.main(str(tiny_corpus), reference, (i,), out=out, max_len=MAX_LEN)
        rows = [row for row in Page(out.read_text()).rows if row[0] != "#"]
        target_T, moments = predictions_of(tiny_corpus, reference, i)
        assert [row[1] for row in rows] == [view.one_line(bytes([t % 256]), t == BOS_ID) for t in target_T]
        assert [float(row[2]) for row in rows] == pytest.approx(moments.nll_N.tolist(), abs=1e-3)
        for name, at in (("nll", 2), ("entropy", 3), ("varentropy", 4)):
            mean = np.mean([float(row[at]) for row in rows])
            assert mean == pytest.approx(float(columns[name][i]), abs=1e-3)


@pytest.mark.parametrize("by", ["entropy", "varentropy", "nll"])
def test_the_colour_is_the_value_on_the_scale(tiny_corpus, reference, tmp_path, by):
    out = tmp_path / "view.html"
    view.main(str(tiny_corpus), reference, (3,), by=by, out=out, max_len=MAX_LEN, top=6.0)
    page = Page(out.read_text())
    column = {"nll": 2, "entropy": 3, "varentropy": 4}[by]
    values = [float(row[column]) for row in page.rows if row[0] != "#"]
    assert page.tokens == pytest.approx([min(value / 6, 1) for value in values], abs=0.006)
    assert "≥ 6</span>" in out.read_text() and view.MEANING[by] in out.read_text()


def test_the_page_shows_the_text_whatever_it_holds(spiky, reference, tmp_path):
    out = tmp_path / "view.html"
    view.main(str(spiky), reference, (0, 1, 0), out=out, max_len=MAX_LEN)  # a segment asked for twice is shown once
    page = Page(out.read_text(encoding="utf-8"))
    assert page.tags.count("pre") == 2 and page.tags.count("script") == 1
    shown = r"""<script>alert('"&"')</script> \xe2\x82\xac\x1b[31m\x00⇥\x0d\xe2\x80\xae<|endoftext|>"""
    assert page.texts == [f"\nBOS↵\n{shown}BOS", "\nBOSbBOS"]  # a browser drops the first newline of a <pre>
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", out.read_text(encoding="utf-8"))
    assert "<b>&amp;</b>" not in out.read_text(encoding="utf-8")  # the corpus's name for itself
    assert page.titles[1].startswith("<  nll ") and "https:" not in out.read_text(encoding="utf-8")


def test_on_the_terminal_nothing_of_the_text_is_a_control_sequence(spiky, reference, capsys, monkeypatch):
    view.main(str(spiky), reference, (0,), max_len=MAX_LEN)
    plain = capsys.readouterr().out
    assert "\x1b" not in plain and r"\x1b[31m\x00⇥" in plain and "⟨BOS⟩↵\n<script>" in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    view.main(str(spiky), reference, (0,), max_len=MAX_LEN, top=0.01)  # every prediction is above it
    coloured = capsys.readouterr().out
    assert re.sub(r"\x1b\[(38;5;16;48;5;\d+|0)m", "", coloured).endswith(plain.partition("\n\n")[2])
    assert "\x1b[38;5;16;48;5;" in coloured and "the entropy of the prediction it answers" in coloured
    assert "\n\n⟨BOS⟩" in coloured  # the first token answers no prediction
    assert not re.search(r"48;5;\d+m[^\x1b]*\n", coloured)  # no colour runs on over a line's end


def test_long_segments_are_cut_on_the_terminal_and_said_to_be(tiny_corpus, reference, capsys, monkeypatch):
    monkeypatch.setattr(view, "TERMINAL_TOKENS", 5)
    corpus = open_corpus(tiny_corpus)
    segments = corpus_segments(corpus, MAX_LEN)
    longest = int(np.argmax(segments.length_N))
    view.main(str(tiny_corpus), reference, (longest,), max_len=MAX_LEN)
    assert f"... and {segments.length_N[longest] + 1 - 5} tokens more; --out view.html" in capsys.readouterr().out


def test_every_byte_can_be_shown(tiny_corpus):
    pieces = token_bytes(of_corpus(open_corpus(tiny_corpus)))
    for token, piece in enumerate(pieces):
        text = view.one_line(piece, token == BOS_ID)
        assert text.isprintable() and text and " " not in text


def test_segment_may_be_repeated_on_the_command_line(tiny_corpus, reference, monkeypatch, capsys):
    argv = ["view", str(tiny_corpus), "--reference", reference, "--segment", "2", "--segment", "1", "--max-len", "64"]
    monkeypatch.setattr(sys, "argv", argv)
    command(view.repeatable(view.main))
    assert re.findall(r"^segment (\d+):", capsys.readouterr().out, re.M) == ["2", "1"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(segment=(10**6,)), r"--segment 1000000: no such segment; .* has segments 0 to \d+ \(--max-len 64"),
        (dict(segment=(0, -1)), r"--segment -1: no such segment; .* has segments 0 to \d+"),
        (dict(segment=()), r"name a segment with --segment; .* has segments 0 to \d+"),
        (dict(top=-1.0), "--top -1.0: expected a value in nats"),
        (dict(unit="line"), "--unit line: expected one of document, window"),
    ],
)
def test_refused(tiny_corpus, reference, options, sentence):
    with pytest.raises(InputError, match=sentence):
        view.main(str(tiny_corpus), reference, **dict(segment=(0,), max_len=MAX_LEN) | options)


def test_a_reference_with_another_tokenizer_is_refused(tiny_corpus, reference, monkeypatch):
    """It would take the shards' ids for its own and answer with numbers all the same."""
    opened = open_reference(reference, open_corpus(tiny_corpus), MAX_LEN)
    other = dataclasses.replace(opened, retokenizer=object())
    monkeypatch.setattr("curriculum.reference.open_reference", lambda *args, **options: other)
    with pytest.raises(InputError, match="another tokenizer than the shards'"):
        view.main(str(tiny_corpus), reference, (0,), max_len=MAX_LEN)
