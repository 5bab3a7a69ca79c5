"""Build the documentation site from nbs/ into _docs/html. Nothing is executed: the pages show the outputs as kept.

    python tools/build_site.py             (needs pip install -e ".[docs]" and npm, for two scripts that the pages load)
    python tools/build_site.py --check     (only checks that every link of the sources leads somewhere)

Chapters stand in the order of their numbers. A link to a notebook becomes a link to its page, a link to another file of
the repository a link to GitHub. A link that leads nowhere stops the build, and so does every warning of Sphinx.
"""

import re
import shutil
import subprocess
import sys
import tarfile
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from posixpath import normpath
from urllib.parse import unquote

import nbformat
from colab import CELL_ID, ROOT, settings

OUT = ROOT / "_docs"
SOURCE = OUT / "source"
HTML = OUT / "html"
PARTS = {
    "0": "Start",
    "1": "Models and demo",
    "2": "Data",
    "3": "Judge",
    "4": "Train",
    "5": "Ship",
    "6": "Run",
    "9": "Appendix",
}
TEXTS = ["README.zh.md", "CONTRIBUTING.md"]
IMAGES = {".png", ".svg", ".jpg", ".jpeg", ".gif"}
SCRIPTS = {
    "mermaid@11.17.2": ("package/dist/", re.compile(r"(mermaid\.esm\.min|chunks/mermaid\.esm\.min/.*)\.mjs")),
    "mathjax@3.2.2": ("package/es5/", re.compile(r"tex-svg-full\.js")),
}
CSS = """
header.bd-header { display: none; }
@media (min-width: 1200px) {
  .bd-sidebar-primary { flex: 0 0 15rem; }
  .bd-sidebar-secondary { width: 13rem; min-width: 13rem; }
}
.bd-main .bd-content .bd-article-container { max-width: 68rem; }
.bd-article p, .bd-article li, .bd-article blockquote { max-width: 50rem; }
div.highlight pre { font-size: 0.72rem; }
.cell_output pre { font-size: 0.72rem; white-space: pre-wrap; }
.mermaid-container pre, pre.mermaid { background: none; border: none; box-shadow: none; }
pre.mermaid > svg, .mermaid-container svg { width: auto !important; height: auto !important; }
details { margin: 0.5rem 0; }
"""

CODE = re.compile(r"(^ *```.*?^ *```|^ *~~~.*?^ *~~~|`[^`\n]+`)", re.M | re.S)
MARKDOWN_LINK = re.compile(r'(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)((?:\s+"[^"]*")?\))')
HTML_LINK = re.compile(r'(\s(?:href|src)=")([^"]+)(")')
DIAGRAM_LINK = re.compile(r'(^\s*click\s+\S+\s+(?:href\s+)?")([^"]+)(")', re.M)
SCRIPT_IMPORT = re.compile(r'^import \w+ from "(\./[^"]+)"', re.M)
DIRECTIVE = re.compile(r"^#\|\s*(?!slow|cuda).*\n?", re.M)
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp)\b", re.M)


def notebooks():
    "The notebooks in course order, the index left out."
    return [path for path in sorted((ROOT / "nbs").glob("*.ipynb")) if path.stem != "index"]


def page_files():
    "The source file in the built folder of each page, by the page's path in the repository."
    found = {"README.md": "index.ipynb", "nbs/index.ipynb": "index.ipynb"}
    for path in notebooks():
        found[f"nbs/{path.name}"] = path.name
    for name in TEXTS:
        if (ROOT / name).exists():
            found[name] = name
    return found


class Links:
    "Turns the links of one file into links of the site, and collects those that lead nowhere."

    def __init__(
        self,
        path: str,  # the file, from the root of the repository
    ):
        self.path = path
        self.pages = page_files()
        self.broken = []
        self.github = settings()["git_url"]
        self.branch = settings()["branch"]

    def find(self, target):
        "The file or folder of the repository that a link names, as a path from the root, or None."
        folders = [PurePosixPath(self.path).parent]
        if self.path == "nbs/index.ipynb":
            folders.append(PurePosixPath("."))
        for folder in folders:
            inside = normpath(str(folder / unquote(target)))
            if not inside.startswith("..") and (ROOT / inside).exists():
                return inside
        return None

    def resolve(
        self,
        target: str,  # as the link has it
        html: bool,  # whether a browser reads the link as it is, without Sphinx between
    ):
        "The target that the link has on the site."
        own = re.match(re.escape(self.github) + rf"/(?:blob|tree)/{self.branch}/([^#]+)(#.*)?$", target)
        if target.startswith("#"):
            return target.lower()
        if own is None and re.match(r"([a-z]+:|data:)", target):
            return target
        path, mark, anchor = target.partition("#")
        inside = own[1] if own and (ROOT / own[1]).exists() else self.find(path) if own is None else None
        if inside is None:
            self.broken.append(f"{self.path}: {target}")
            return target
        if inside in self.pages:
            file = PurePosixPath(self.pages[inside])
            name = f"{file.stem}.html" if html else str(file)
            return name + mark + anchor.lower()
        if PurePosixPath(inside).suffix in IMAGES:
            return keep_image(inside)
        kind = "tree" if (ROOT / inside).is_dir() else "blob"
        return f"{self.github}/{kind}/{self.branch}/{inside}{mark}{anchor}"

    def replace(self, pattern, text, html):
        "The text with the target of every link that the pattern finds resolved."
        return pattern.sub(lambda found: found[1] + self.resolve(found[2], html) + found[3], text)

    def rewrite(
        self,
        text: str,  # Markdown
        html: bool = False,  # of an output, which Sphinx takes as it is
    ):
        "The text with its links resolved; in code only those of diagrams."
        pieces = CODE.split(text)
        for i, piece in enumerate(pieces):
            if i % 2 == 0:
                piece = self.replace(MARKDOWN_LINK, piece, html)
                pieces[i] = self.replace(HTML_LINK, piece, html=True)
            elif piece.lstrip().startswith("```mermaid"):
                pieces[i] = self.replace(DIAGRAM_LINK, piece, html=True)
        return "".join(pieces)


def keep_image(
    path: str,  # from the root of the repository
):
    "Copy a picture beside the pages; its new path."
    copy = SOURCE / "pictures" / path
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / path, copy)
    return f"pictures/{path}"


def page_cell(
    cell,  # a cell of a notebook, changed in place
    links,  # of its notebook
):
    "The cell as the site shows it, or None for one that it leaves out."
    if cell.get("id") == CELL_ID or (cell.cell_type == "code" and HIDDEN.search(cell.source)):
        return None
    if cell.cell_type == "markdown":
        cell.source = links.rewrite(cell.source)
        return cell
    if re.search(r"^#\|\s*echo:\s*false", cell.source, re.M):
        cell.metadata["tags"] = ["remove-input"]
    cell.source = DIRECTIVE.sub("", cell.source)
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "text/markdown" in data:
            data["text/markdown"] = links.rewrite(data["text/markdown"], html=True)
    return cell


def contents():
    "The table of contents: a Markdown cell with the chapters of every part."
    lists = []
    for digit, caption in PARTS.items():
        chapters = [path.stem for path in notebooks() if path.name[0] == digit]
        lists.append((caption, chapters))
    lists.append(("More", [Path(name).stem for name in TEXTS if (ROOT / name).exists()]))
    blocks = []
    for caption, names in lists:
        if names:
            entries = "\n".join(names)
            blocks.append(f"```{{toctree}}\n:caption: {caption}\n:hidden:\n\n{entries}\n```")
    return nbformat.v4.new_markdown_cell("\n\n".join(blocks))


def write_sources():
    "Write the pages' sources into the build folder; returns the links that lead nowhere."
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    broken = []
    for path, file in page_files().items():
        if path == "README.md":
            continue
        links = Links(path)
        if path.endswith(".md"):
            text = links.rewrite((ROOT / path).read_text(encoding="utf-8"))
            (SOURCE / file).write_text(text, encoding="utf-8")
        else:
            nb = nbformat.read(ROOT / path, 4)
            shown = [page_cell(cell, links) for cell in nb.cells]
            nb.cells = [cell for cell in shown if cell is not None]
            if file == "index.ipynb":
                nb.cells.append(contents())
            nbformat.write(nb, SOURCE / file)
        broken += links.broken
    return broken


def fetch_scripts():
    "Put the scripts that draw diagrams and formulas beside the pages, so that these need no other server."
    packages = OUT / "npm"
    packages.mkdir(exist_ok=True)
    for package, (folder, wanted) in SCRIPTS.items():
        name = package.split("@")[0]
        archive = packages / (package.replace("@", "-") + ".tgz")
        if not archive.exists():
            subprocess.run(["npm", "pack", "--silent", package], cwd=packages, check=True)
        with tarfile.open(archive) as tar:
            for member in tar.getmembers():
                inside = member.name.removeprefix(folder)
                if member.name.startswith(folder) and wanted.fullmatch(inside):
                    target = SOURCE / "_static" / name / inside
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(tar.extractfile(member).read())
    (SOURCE / "_static" / "site.css").write_text(CSS)


def configuration():
    "The settings of Sphinx."
    ini = settings()
    return dict(
        project=ini["title"],
        author=ini["author"],
        copyright=ini["copyright"],
        language="en",
        extensions=["myst_nb", "sphinxcontrib.mermaid", "sphinx.ext.mathjax", "sphinx.ext.githubpages"],
        nb_execution_mode="off",
        nb_render_markdown_format="gfm",
        myst_enable_extensions=["dollarmath"],
        myst_heading_anchors=4,
        myst_fence_as_directive=["mermaid"],
        mermaid_use_local="mermaid/mermaid.esm.min.mjs",
        mermaid_init_config=dict(startOnLoad=False, flowchart=dict(useMaxWidth=False)),
        mermaid_fullscreen=False,
        mathjax_path="mathjax/tex-svg-full.js",
        html_theme="sphinx_book_theme",
        html_title=ini["title"],
        html_baseurl=ini["doc_host"] + ini["doc_baseurl"] + "/",
        html_static_path=["_static"],
        html_css_files=["site.css"],
        html_use_index=False,
        html_theme_options=dict(
            repository_url=ini["git_url"],
            repository_branch=ini["branch"],
            path_to_docs="nbs",
            use_repository_button=True,
            launch_buttons=dict(colab_url="https://colab.research.google.com"),
            show_toc_level=2,
        ),
        suppress_warnings=["mystnb.unknown_mime_type"],
    )


def build():
    "Run Sphinx over the sources; a warning is an error."
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace

    shutil.rmtree(HTML, ignore_errors=True)
    with docutils_namespace():
        app = Sphinx(
            srcdir=SOURCE,
            confdir=None,
            outdir=HTML,
            doctreedir=OUT / "doctrees",
            buildername="html",
            confoverrides=configuration(),
            freshenv=True,
            warningiserror=True,
        )
        app.build()
    return app.statuscode


class Page(HTMLParser):
    "The ids of a page and the targets of its links."

    def __init__(self, text):
        super().__init__()
        self.ids = {"", "top"}
        self.targets = set(SCRIPT_IMPORT.findall(text))
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if "id" in values:
            self.ids.add(values["id"])
        for key in ("href", "src"):
            if values.get(key):
                self.targets.add(values[key])


def broken_in_pages():
    "The links among the built pages that lead nowhere."
    pages = {path.name: Page(path.read_text(encoding="utf-8")) for path in HTML.glob("*.html")}
    broken = []
    for name, page in pages.items():
        for target in page.targets:
            path, _, anchor = target.partition("#")
            path = unquote(path.partition("?")[0]) or name
            if re.match(r"([a-z]+:|//)", target):
                continue
            if not (HTML / path).exists() or (path in pages and unquote(anchor) not in pages[path].ids):
                broken.append(f"{name}: {target}")
    return sorted(broken)


def stop_at(broken):
    "Exit with the list of links that lead nowhere, if there are any."
    if broken:
        sys.exit("links that lead nowhere:\n" + "\n".join(broken))


if __name__ == "__main__":
    stop_at(write_sources())
    if "--check" not in sys.argv:
        fetch_scripts()
        failed = build()
        stop_at(broken_in_pages())
        if failed:
            sys.exit("Sphinx found faults, named above")
        print(f"open {HTML / 'index.html'}")
