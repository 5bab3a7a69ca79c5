"""Main text of web pages: this reader against trafilatura alone, on Markdown whose text is known.

    python tools/bench_pages.py [--every 8] [--folder ../shared/data/security/web]

Each Markdown document is rendered to HTML and set into the frames of typical sites. Words are compared as multisets
with those of the rendered document: precision (no furniture) and recall (nothing lost); then the share of headings,
table rows and code lines that are still such. A document is used whole and, as a short page, with its first twelve
paragraphs.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

from domain_llm.data.pages import html_text

NAV = (
    "<ul>"
    + "".join(
        f'<li><a href="/{w}">{w}</a></li>'
        for w in "Home Projects Chapters Events About Membership Donate Contact".split()
    )
    + "</ul>"
)
SIDE = (
    "<h3>Index</h3><ul>"
    + "".join(
        f'<li><a href="/c/{w}">{w} Sheet</a></li>' for w in "Alpha Beta Gamma Delta Epsilon Zeta Eta Theta".split()
    )
    + "</ul>"
)
COOKIE = (
    "<p>We use cookies to improve your visit. By continuing you agree to our cookie policy.</p>"
    "<button>Accept all</button>"
)
RELATED = (
    "<h4>Related articles</h4><ul><li><a href='/1'>Ten things you did not know</a></li>"
    "<li><a href='/2'>The best tools of the year</a></li></ul>"
)
FOOT = (
    "".join(
        f"<div><h4>{h}</h4><ul>"
        + "".join(f"<li><a href='/{h}{i}'>{h} item {i}</a></li>" for i in range(6))
        + "</ul></div>"
        for h in ("Company", "Resources", "Legal")
    )
    + "<p>Copyright 2024 Foundation. All rights reserved.</p>"
)
COMMENTS = "".join(
    f"<div class='comment'><b>user{i}</b> <p>Thanks, this helped me a lot with my project number {i}, "
    "great write up.</p><a href='#'>Reply</a></div>"
    for i in range(6)
)

FRAMES = {
    "main and nav elements": (
        "<header><nav>{NAV}</nav></header><div class='cookie-banner'>{COOKIE}</div><main>{body}</main>"
        "<aside>{SIDE}{RELATED}</aside><footer>{FOOT}</footer>"
    ),
    "a blog's classes": (
        "<div id='masthead' class='site-header'>{NAV}</div><div class='site-content'><div class='hentry'>"
        "<div class='entry-meta'>Posted on 3 May by admin</div><div class='entry-content'>{body}</div></div>"
        "<div class='comments-area'>{COMMENTS}</div></div><div class='widget-area'>{SIDE}</div>"
        "<div class='site-footer'>{FOOT}</div>"
    ),
    "a wiki's classes": (
        "<div id='content' class='mw-body'><div id='siteSub'>From Wiki</div>"
        "<div id='mw-content-text'>{body}</div><div id='catlinks'>Categories: <a>Security</a></div></div>"
        "<div id='mw-navigation'>{NAV}{SIDE}</div><div id='footer'>{FOOT}</div>"
    ),
    "classes without meaning": (
        "<div class='css-1'>{NAV}</div><div class='css-2'>{COOKIE}</div><div class='css-3'>"
        "<div class='css-4'>{SIDE}</div><div class='css-5'>{body}</div>"
        "<div class='css-6'>{RELATED}{COMMENTS}</div></div><div class='css-7'>{FOOT}</div>"
    ),
    "a table as layout": (
        "<table><tr><td colspan=2>{NAV}</td></tr><tr><td>{SIDE}</td><td>{body}</td></tr><tr>"
        "<td colspan=2>{FOOT}</td></tr></table>"
    ),
    "furniture inside": (
        "<div id='top'>{NAV}</div><div class='post-content'><div class='share-buttons'>"
        "<p>Share this on <a>Facebook</a></p></div>{body}<div class='newsletter'>"
        "<p>Subscribe to our newsletter and get the latest posts every week.</p></div>"
        "<div class='related-posts'>{RELATED}</div></div><div>{FOOT}</div>"
    ),
    "nothing around": "{body}",
}


def words(text):
    return Counter(re.findall(r"\w+", text.lower()))


def plain(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def measure(documents, frame, reader):
    "Precision and recall of words, and shares of headings, rows and code lines kept."
    from bs4 import BeautifulSoup

    both = want = got = 0
    kept, there = Counter(), Counter()
    for body in documents:
        page = (
            "<!DOCTYPE html><html><head><meta charset='utf-8'><title>A page</title></head><body>"
            + frame.format(body=body, **{k: v for k, v in globals().items() if isinstance(v, str) and k.isupper()})
            + "</body></html>"
        )
        text, truth = reader(page), BeautifulSoup(body, "lxml")
        a, b = words(truth.get_text(" ")), words(text.removeprefix("# A page"))
        both += sum((a & b).values())
        want += sum(a.values())
        got += sum(b.values())
        lines = text.split("\n")
        sets = dict(
            headings={plain(line) for line in lines if line.startswith("#")},
            rows={plain(line) for line in lines if "|" in line},
            code={line.rstrip() for line in lines},
        )
        parts = dict(
            headings=[plain(h.get_text()) for h in truth.find_all(re.compile("^h[1-6]$"))],
            rows=[plain(r.get_text(" ")) for r in truth.find_all("tr")],
            code=[line.rstrip() for p in truth.find_all("pre") for line in p.get_text().split("\n") if line.strip()],
        )
        for k, v in parts.items():
            there[k] += len(v)
            kept[k] += sum(x in sets[k] for x in v)
    return dict(
        precision=both / max(got, 1),
        recall=both / max(want, 1),
        **{k: kept[k] / max(there[k], 1) for k in ("headings", "rows", "code")},
    )


def main():
    import trafilatura
    from markdown_it import MarkdownIt

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument(
        "--folder", default=str(Path(__file__).resolve().parents[2] / "shared" / "data" / "security" / "web")
    )
    a = parser.parse_args()
    settings = dict(include_tables=True, include_formatting=True, include_links=False, include_comments=False)

    def alone(page):
        return trafilatura.extract(page, output_format="markdown", **settings) or ""

    readers = {"ours": lambda page: html_text("page.html", page.encode()), "trafilatura": alone}
    markdown = MarkdownIt("commonmark").enable("table")
    texts = [p.read_text(encoding="utf-8") for p in sorted(Path(a.folder).glob("*.md"))[:: a.every]]
    for size, documents in (
        ("whole", [markdown.render(t) for t in texts]),
        ("short", [markdown.render("\n\n".join(t.split("\n\n")[:12])) for t in texts]),
    ):
        for name, frame in FRAMES.items():
            for who, reader in readers.items():
                print(
                    f"{size:6} {name:24} {who:12}",
                    "  ".join(f"{k} {v:.3f}" for k, v in measure(documents, frame, reader).items()),
                    flush=True,
                )


if __name__ == "__main__":
    main()
