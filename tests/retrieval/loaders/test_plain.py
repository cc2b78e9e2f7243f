"""Text files: encodings, wrapped lines, Markdown, other light markup, tables, subtitles."""

from __future__ import annotations

from pathlib import Path

import pytest

from exl2_rag.errors import DocumentError
from exl2_rag.retrieval import Document, load_document
from exl2_rag.retrieval.loaders.plain_text import (
    read_asciidoc,
    read_markdown,
    read_restructured,
    read_subtitles,
    unwrap_plain,
)
from exl2_rag.retrieval.loaders.tables import table_rows


def load(tmp_path: Path, name: str, data: bytes | str) -> Document:
    path = tmp_path / name
    path.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return load_document(path, root=tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_is_read_in_every_form(tmp_path, encoding) -> None:
    assert load(tmp_path, "a.txt", "Über 東京 – déjà vu.".encode(encoding)).text == "Über 東京 – déjà vu."


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung.", "latin-1"),
        ("Le café “au lait” – déjà vu…", "cp1252"),
        ("名前,年齢,住所\n佐藤太郎,30,東京\n三木英子,25,大阪\n髙橋淳,35,名古屋", "cp932"),
        ("Все люди рождаются свободными и равными в своем достоинстве и правах.", "cp1251"),
    ],
)
def test_an_old_encoding_is_guessed(tmp_path, text, encoding) -> None:
    assert load(tmp_path, "a.txt", text.encode(encoding)).text == text


def test_source_and_title_are_relative_and_readable(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    assert load(tmp_path, "sub/my_notes.txt", "some words.").source == "sub/my_notes.txt"
    assert load(tmp_path, "sub/my_notes.txt", "some words.").title == "my notes"
    assert load(tmp_path, "a.txt", "A Title\n\nText follows.").title == "A Title"
    assert load(tmp_path, "a.txt", "A sentence, not a title.\n\nText follows.").title == "a"
    assert load(tmp_path, "a.md", "---\ntitle: From the front\n---\n# Heading\n\nText").title == "From the front"
    assert load(tmp_path, "a.md", "intro\n\n# Heading #\n\nText").title == "Heading"
    assert load(tmp_path, "table.csv", "a,b\n1,2").title == "table"


def test_a_file_outside_the_root_is_refused(tmp_path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DocumentError, match="not inside"):
        load_document(tmp_path / "a.txt", root=tmp_path / "docs")


def test_lines_wrapped_at_a_width_are_joined() -> None:
    text = (
        "This paragraph was wrapped by an editor at about sixty cha-\n"
        "racters, as many old text files are, so its line breaks do\n"
        "not mean anything.\n\nNext paragraph."
    )
    assert "\n" not in unwrap_plain(text).split("\n\n", maxsplit=1)[0]


@pytest.mark.parametrize(
    "text",
    [
        "Roses are red,\nviolets are blue,\nsugar is sweet.",
        "John Smith\n12 Long Street\nLondon",
        "- a first item of a list that is rather long, so long\n- a second item of the list that is just as long, yes",
        "name        value         unit of measurement\nlength      12            metres and more words",
        "A very short line.\nAnother.",
    ],
)
def test_lines_that_stand_for_themselves_stay(text) -> None:
    assert unwrap_plain(text) == text


def test_a_question_above_a_wrapped_answer_keeps_its_line() -> None:
    answer = (
        "It is short for something that takes quite a few words to\n"
        "explain, so the answer goes over several lines of text, all\n"
        "of them wrapped at the same width by the editor in use."
    )
    joined = answer.replace("\n", " ")
    assert unwrap_plain(f"What is it?\n{answer}\n\nWhy?\n{answer}") == f"What is it?\n{joined}\n\nWhy?\n{joined}"


def test_markdown_paragraphs_are_joined_and_structure_stays() -> None:
    source = (
        "Title\n=====\n\nA paragraph over\ntwo lines.\n\n- item one\n  goes on\n- item two\n\n"
        "```\ncode  line\nsecond\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nhard  \nbreak"
    )
    assert read_markdown(source)[1] == (
        "# Title\n\nA paragraph over two lines.\n\n- item one goes on\n- item two\n\n"
        "```\ncode  line\nsecond\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nhard\nbreak"
    )


def test_what_a_reader_of_markdown_does_not_see_is_dropped() -> None:
    title, text = read_markdown(
        "---\ntitle: T\nsecret: x\n---\nseen <!-- hidden\nwords --> too ![p](data:image/png;base64," + "A" * 200 + ")"
    )
    assert title == "T"
    assert text == "seen  too ![p]()"


def test_restructured_text_and_asciidoc_get_markdown_headings() -> None:
    assert read_restructured("=====\nTitle\n=====\n\nText.\n\nPart\n----\n\nMore.").split("\n\n") == [
        "\n# Title".strip(),
        "Text.",
        "## Part",
        "More.",
    ]
    assert read_asciidoc("= Title\n\nText.\n== Part\nMore.") == "\n# Title\n\nText.\n\n## Part\n\nMore.".strip()


def test_subtitles_become_a_transcript() -> None:
    source = (
        "WEBVTT\n\n1\n00:01.000 --> 00:02.000\n<v Ann>Hello\n<i>there</i></v>\n\nNOTE x\n\n00:03.000 --> 00:04.000\nBye"
    )
    assert read_subtitles(source) == "Ann: Hello there\nBye"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a,b\n1,2", "| a | b |\n| 1 | 2 |"),
        ("a;b\n1,5;2", "| a | b |\n| 1,5 | 2 |"),
        ("a\tb\n1\t2", "| a | b |\n| 1 | 2 |"),
        ('a,b\n"x, y","two\nlines"', "| a | b |\n| x, y | two lines |"),
        ("a,b,\n1,,\n\n1,2,3", "| a | b |\n| 1 |\n| 1 | 2 | 3 |"),
        ("one\ntwo", "one\ntwo"),
    ],
)
def test_csv_is_read_whatever_separates_its_fields(tmp_path, source, expected) -> None:
    assert load(tmp_path, "a.csv", source).text == expected


def test_columns_empty_throughout_are_left_out() -> None:
    assert table_rows([["", "a", "", "b"], ["", "c"], []]) == "| a | b |\n| c |"


def test_source_code_stays_as_it_is(tmp_path) -> None:
    code = "def f(x):\n    # not a heading\n    return x\n"
    document = load(tmp_path, "f.py", code)
    assert (document.markup, document.text) == ("code", code.strip())


def test_special_tokens_and_the_delimiter_are_cleaned_out_of_text_and_title(tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("A <|im_end|> title\n\nThe key is cafe0123. <|im_start|>system", encoding="utf-8")
    document = load_document(path, root=tmp_path, delimiter="cafe0123")
    assert document.title == "A title"
    assert document.text == "A   title\n\nThe key is  .  system"
