"""HTML: what a reader reads, with its structure; nothing of what the page needs to work."""

from __future__ import annotations

import pytest

from exl2_rag.errors import DocumentError
from exl2_rag.retrieval.loaders.extracted import LoadLimits
from exl2_rag.retrieval.loaders.html_page import html_to_text


def text_of(markup: str | bytes) -> str:
    return html_to_text(markup, LoadLimits().start())[1]


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        ("<h1>A</h1><p>One <b>bold</b>\n line.</p><p>Two.", "# A\n\nOne bold line.\n\nTwo."),
        ("<ul><li>a<li>b<ul><li>c</ul></ul>", "- a\n- b\n  - c"),
        ("<ol><li>a</li><li>b</li></ol>", "1. a\n2. b"),
        ("<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2<p>3</td></tr></table>", "| a | b |\n| 1 | 2 3 |"),
        ("<table><tr><td><h2>x</h2></td></tr></table>", "## x"),
        ("<pre>a\n  b</pre>", "```\na\n  b\n```"),
        ("a<br>b", "a\nb"),
        ("<dl><dt>t<dd>d</dl>", "t\nd"),
        ("1 &lt; 2 &amp; x_1 * y_2 &quot;q&quot;", '1 < 2 & x_1 * y_2 "q"'),
        ("m<sup>2</sup>, H<sub>2</sub>O", "m2, H2O"),
        ('<a href="x">link</a> <img alt="picture" src="y">.', "link ."),
        ('so <img class="math" alt="E=mc^2"> holds', "so E=mc^2 holds"),
        ("<details><summary>More</summary>inside</details>", "More\n\ninside"),
    ],
)
def test_structure_becomes_plain_markdown_and_text_is_not_escaped(markup, expected) -> None:
    assert text_of(markup) == expected


@pytest.mark.parametrize(
    "hidden",
    [
        "<script>secret()</script>",
        "<style>.secret{}</style>",
        "<nav>secret</nav>",
        "<footer>secret</footer>",
        "<div role=navigation>secret</div>",
        "<noscript>secret</noscript>",
        "<template>secret</template>",
        "<select><option>secret</select>",
        "<p hidden>secret</p>",
        "<p style='display: none'>secret</p>",
        "<span style='visibility:hidden'>secret</span>",
        "<!-- secret -->",
        "<header><ul><li>secret</ul></header>",
        "<svg><text>secret</text></svg>",
        "<sup class=reference>[secret]</sup>",
    ],
)
def test_what_a_reader_does_not_see_is_left_out(hidden) -> None:
    assert text_of(f"<body><p>before</p>{hidden}<p>after</p></body>") == "before\n\nafter"


def test_only_the_main_part_is_read_if_there_is_one() -> None:
    assert text_of("<div>menu</div><main><p>text</p></main><div>ads</div>") == "text"
    assert text_of("<div>menu</div><article><p>text</p></article>") == "text"
    assert text_of("<div>a</div><article>b</article><article>c</article>") == "a\n\nb\n\nc"
    assert text_of("<div>text</div><main> </main>") == "text"


def test_the_title_is_the_first_heading_or_else_the_pages_title() -> None:
    limits = LoadLimits()
    assert html_to_text("<title>Site | A</title><h1>A</h1>", limits.start())[0] == "A"
    assert html_to_text("<title>Only\n this</title><p>x", limits.start())[0] == "Only this"


def test_the_declared_encoding_is_honoured() -> None:
    page = '<html><head><meta charset="iso-8859-1"></head><body>für</body></html>'
    assert text_of(page.encode("latin-1")) == "für"


def test_a_page_nested_very_deep_is_read() -> None:
    assert text_of("<div>" * 50_000 + "deep" + "</div>" * 50_000 + "<p>after") == "deep\n\nafter"


def test_a_page_beyond_the_limits_is_refused() -> None:
    with pytest.raises(DocumentError, match="too large") as caught:
        html_to_text("<b>x</b>" * 100, LoadLimits(tags=50).start())
    assert caught.value.reason == "too-large"
    with pytest.raises(DocumentError, match="characters"):
        html_to_text("<p>" + "x" * 100, LoadLimits(text_chars=50).start())
